"""Streams whose buffer is filled anew after a change of prompt, through the pipeline (`partition.Refill`)."""

import dataclasses
import json

import numpy as np
import pytest

import streamdit_jax as sd
from streamdit_jax import stream as streaming
from streamdit_jax.errors import ConfigError
from streamdit_jax.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return sd.load(tiny_model)


def take(stream, count):
    return np.concatenate([next(stream) for _ in range(count)])


@pytest.mark.parametrize("over", [0, 2])
def test_a_stream_that_is_filled_anew_replays_and_resumes(pipeline, over):
    """After a change of prompt, also from a snapshot in the midst of it; until then it is the stream that is not."""
    how = {"seed": 5, "scheme": "N4c2s2", "filling": "doubling"}
    stream, other = (pipeline.stream("a red car", refill=refill, **how) for refill in ("2:0.5", "0"))
    frames, plain = [take(stream, 2)], [take(other, 2)]
    receipt = stream.change("a blue bus at night", over=over)
    other.change("a blue bus at night", over=over)
    left = stream.forwards_until_frames
    frames, plain = [*frames, take(stream, 2)], [*plain, take(other, 2)]
    assert left == 2 and receipt.complete_frame == 16 + 8 * (2 + bool(over)) + 4
    if over:
        frames, plain = [*frames, take(stream, 1)], [*plain, take(other, 1)]
    assert np.array_equal(np.concatenate(frames), np.concatenate(plain))
    wait = stream.forwards_until_frames
    assert wait == 2 + len(streaming.refilling_rows(stream.scheme, 0.5).adopt)
    for _ in range(wait // 2):
        stream.forward()
    snapshot = stream.snapshot()
    frames.append(take(stream, 3))
    assert np.array_equal(take(pipeline.resume(snapshot), 3), frames[-1])
    assert not np.array_equal(take(other, 3), frames[-1])
    assert stream.frames_shown == sum(map(len, frames))
    log = json.loads(json.dumps(stream.log()))
    assert np.array_equal(np.concatenate(frames), take(pipeline.replay(log), 7 + bool(over)))
    old = {name: value for name, value in other.log().items() if name != "refill"}  # of 0.1.0
    assert pipeline.replay(old).log()["refill"] == "0"


def test_only_what_doubles_is_filled_anew(pipeline, tiny, tiny_params):
    """A model's own `refill` is for streams that can be; asked for where they cannot, it is refused."""
    sampling = dataclasses.replace(tiny.sampling, filling="doubling", refill="3")
    made = Pipeline(dataclasses.replace(tiny, sampling=sampling), tiny_params)
    for how, refill in (({}, "3"), ({"filling": "uniform"}, "0"), ({"scheme": "K2N3c2s2"}, "0"), ({"refill": 1}, "1")):
        assert made.stream("a red car", **how).log()["refill"] == refill
    assert made.stream("a red car", per_chunk_prompts=True).log()["refill"] == "0"
    for how in ({"filling": "uniform"}, {"scheme": "K2N3c2s2"}, {"per_chunk_prompts": True}):
        with pytest.raises(ConfigError, match="refill: "):
            made.stream("a red car", refill="1", **how)


def test_what_is_held_to_a_video_stays_held(pipeline):
    """At strength 0 frames are their input, also those that begin a second time."""
    video = np.random.default_rng(3).integers(0, 255, (96, 16, 16, 3), np.uint8)
    how = {"seed": 5, "scheme": "N4c2s2", "filling": "doubling", "refill": "1:0.5", "video": video, "strength": 0}
    stream, other = (pipeline.stream("a red car", **how) for _ in range(2))
    frames, plain = take(stream, 1), take(other, 1)
    stream.change("a blue bus at night")
    frames, plain = np.concatenate([frames, take(stream, 5)]), np.concatenate([plain, take(other, 5)])
    assert stream.forwards == other.forwards + len(streaming.refilling_rows(stream.scheme, 0.5).adopt)
    assert np.abs(frames.astype(int) - plain).max() <= 1
