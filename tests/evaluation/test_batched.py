"""Batched streams are the streams that a user sees."""

import numpy as np
import pytest

from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation import batched

PROMPTS = ["a red car", "a blue bus at night", "a truck"]


@pytest.mark.parametrize(
    "scheme, filling, guidance, refill",
    [
        ("N4c2s2", "uniform", 2.0, "0"),
        ("N4c2s2", "ramp", 1.0, "0"),
        ("K2N3c2s1", "uniform", 1.0, "0"),
        ("K2N3c2s1", "doubling", 1.0, "0"),
        ("N4c2s2", "doubling", 1.0, "1:0.25"),
    ],
)
def test_a_batch_is_its_streams(pipeline, scheme, filling, guidance, refill):
    """To rounding: the same seeds and prompts, one by one; also after the prompts are changed."""
    sampling = {"scheme": scheme, "filling": filling, "guidance": guidance, "refill": refill}
    streams = batched.StreamBatch(pipeline, PROMPTS, [5, 6, 2**31 + 7], **sampling)
    alone = [pipeline.stream(prompt, seed, **sampling) for prompt, seed in zip(PROMPTS, [5, 6, 2**31 + 7])]
    for count in range(4):
        if count == 2:
            streams.change(PROMPTS[::-1])
            for stream, prompt in zip(alone, PROMPTS[::-1]):
                stream.prompt = prompt
        together = next(streams)
        apart = np.stack([next(stream) for stream in alone])
        assert together.shape == apart.shape and together.dtype == np.uint8
        assert np.abs(together.astype(int) - apart).max() <= 1
    assert streams.forwards == alone[0].forwards and streams.emitted == 4
    assert min(streams.seconds.values()) > 0


def test_groups_fill_up_the_last_one():
    assert list(batched.groups(list("abcde"), 2)) == [(0, ["a", "b"], 2), (2, ["c", "d"], 2), (4, ["e", "e"], 1)]
    assert list(batched.groups(list("ab"), 8)) == [(0, ["a", "b"], 2)], "no larger than needed"


def test_videos_have_the_frames_asked_for(pipeline):
    made = list(batched.videos(pipeline, PROMPTS, 12, 0, 2, scheme="N4c2s1", guidance=1.0, filling=None))
    assert [(first, video.shape) for first, video, _ in made] == [(0, (2, 12, 64, 64, 3)), (2, (1, 12, 64, 64, 3))]
    assert not np.array_equal(made[0][1][0], made[0][1][1])


def test_batches_that_cannot_be_made(pipeline):
    with pytest.raises(ConfigError, match="scheme: N4c4s1 has 16 frames"):
        batched.StreamBatch(pipeline, ["a"], [0], scheme="N4c4s1")
    with pytest.raises(ConfigError, match="filling: 'none'"):
        batched.StreamBatch(pipeline, ["a"], [0], filling="none")
    with pytest.raises(ValueError, match="prompts: 1 for 2 seeds"):
        batched.StreamBatch(pipeline, ["a"], [0, 1])
