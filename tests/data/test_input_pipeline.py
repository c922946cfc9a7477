"""Laws of the input: rows depend on (seed, global example) only; one integer resumes; every epoch shows every clip
once.
"""

import numpy as np
import pytest

from streamdit_jax.data.input_pipeline import BucketedBatches, global_index, make_batches
from streamdit_jax.data.records import write_records
from streamdit_jax.errors import DataError

CLIPS, FRAMES = 11, 9


def tokenize(text):
    if len(text) > 30:
        raise ValueError(f"the text has {len(text)} bytes; 30 fit")
    tokens = np.zeros(31, np.int32)
    tokens[: len(text)] = [ord(c) for c in text]
    return tokens, tokens > 0


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    def clips():
        for i in range(CLIPS):
            # Pixel (0, 0) tells the clip, (0, 1) the frame.
            video = np.zeros((FRAMES, 2, 2, 3), np.uint8)
            video[:, 0, 0], video[:, 0, 1] = i, np.arange(FRAMES)[:, None]
            yield {"video": video, "captions": [f"{i} as {word}" for word in ("red", "green", "blue")]}

    return write_records(tmp_path_factory.mktemp("data") / "pixels", clips(), "pixels")


def take(records, steps, **options):
    options = {"batch_size": 4, "num_frames": 5, "seed": 3, "tokenize": tokenize} | options
    batches = make_batches(records, **options)
    result = [next(batches) for _ in range(steps)]
    assert batches.next_step == options.get("first_step", 0) + steps
    batches.close()
    return result


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_shapes_types_and_that_crops_are_consecutive_frames_of_one_clip(records):
    starts = set()
    for batch in take(records, 20):
        assert batch["video"].shape == (4, 5, 2, 2, 3) and batch["video"].dtype == np.uint8
        assert batch["tokens"].shape == (4, 31) and batch["tokens"].dtype == np.int32
        assert batch["text_mask"].shape == (4, 31) and batch["text_mask"].dtype == bool
        for video, tokens in zip(batch["video"], batch["tokens"]):
            clip, frames = video[:, 0, 0, 0], video[:, 0, 1, 0].astype(int)
            assert len(set(clip)) == 1
            assert list(np.diff(frames)) == [1] * 4
            starts.add(int(frames[0]))
            assert bytes(tokens[tokens > 0].astype(np.uint8)).decode().split(" as ")[0] == str(clip[0])
    assert starts == set(range(FRAMES - 5 + 1))  # the last start counts too


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_are_identical_whatever_the_number_of_processes(records, processes):
    whole = take(records, 6)
    parts = [take(records, 6, process_index=i, process_count=processes) for i in range(processes)]
    joined = [{k: np.concatenate([p[n][k] for p in parts]) for k in whole[0]} for n in range(6)]
    assert_same(whole, joined)


def test_global_index_deals_every_example_once():
    for processes in (1, 2, 4, 8):
        rows = 8 // processes
        dealt = [global_index(i, rows, 8, p) for p in range(processes) for i in range(5 * rows)]
        assert sorted(dealt) == list(range(40))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resuming_at_next_step_equals_never_stopping(records, prefetch):
    straight = take(records, 9, prefetch=prefetch)
    assert_same(straight[4:], take(records, 5, first_step=4, prefetch=prefetch))
    # Another number of processes may continue.
    assert_same(
        [{k: v[2:] for k, v in b.items()} for b in straight[4:]],
        take(records, 5, first_step=4, process_index=1, process_count=2),
    )


def test_every_epoch_shows_every_clip_once_in_another_order(records):
    seen = np.concatenate([b["video"][:, 0, 0, 0, 0] for b in take(records, CLIPS, batch_size=3)])
    epochs = seen.reshape(3, CLIPS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(CLIPS))
    assert len({tuple(e) for e in epochs}) == 3


def test_seeds_differ_and_captions_and_crops_are_drawn_evenly(records):
    a, b = take(records, 1), take(records, 1, seed=4)
    assert any(not np.array_equal(a[0][k], b[0][k]) for k in a[0])
    words, starts = {}, {}
    for batch in take(records, 150, num_frames=8):
        for video, tokens in zip(batch["video"], batch["tokens"]):
            word = bytes(tokens[tokens > 0].astype(np.uint8)).decode().split()[-1]
            words[word] = words.get(word, 0) + 1
            start = int(video[0, 0, 1, 0])
            starts[start] = starts.get(start, 0) + 1
    # 600 draws of 3 and of 2: five standard deviations are 58 and 61.
    assert set(words) == {"red", "green", "blue"} and all(abs(n - 200) < 58 for n in words.values())
    assert set(starts) == {0, 1} and all(abs(n - 300) < 61 for n in starts.values())


def test_without_a_tokenizer_the_crops_are_the_same(records):
    plain = take(records, 3, tokenize=None)
    assert [set(b) for b in plain] == [{"video"}] * 3
    assert_same(plain, [{"video": b["video"]} for b in take(records, 3)])


def test_latents_come_as_float32(tmp_path):
    clips = [{"latents": np.full((3, 2, 2, 4), i + 0.5), "captions": ["x"]} for i in range(2)]
    batch = take(write_records(tmp_path / "a", clips, "latents"), 1, num_frames=3)[0]
    assert batch["latents"].dtype == np.float32 and batch["latents"].shape == (4, 3, 2, 2, 4)
    assert set(np.unique(batch["latents"])) == {0.5, 1.5}


def test_bad_requests_are_named(records):
    with pytest.raises(DataError, match="num_frames is 10 and its clips have 9 video frames"):
        take(records, 1, num_frames=10)
    with pytest.raises(ValueError, match="batch_size"):
        take(records, 1, batch_size=5, process_count=2)
    with pytest.raises(ValueError, match="process_index"):
        take(records, 1, process_index=2, process_count=2)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_caption_that_does_not_fit_and_a_damaged_clip_reach_the_caller_as_data_errors(tmp_path, prefetch):
    clips = [
        {"video": np.random.default_rng(i).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8), "captions": ["x" * 31]}
        for i in range(50)
    ]
    long = write_records(tmp_path / "long", clips, "pixels")
    with pytest.raises(DataError, match=r"of clip .*31 bytes; 30 fit"):
        take(long, 1, num_frames=2, prefetch=prefetch)
    (file,) = (tmp_path / "long").glob("*.array_record-*")
    data = bytearray(file.read_bytes())
    for position in range(1000, 100_000, 1000):
        data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        take(long, 40, num_frames=2, tokenize=None, prefetch=prefetch)


SHARES = {"main": 0.5, "images": 0.3, "tall": 0.2}


def bucketed(records, steps, first_step=0, seed=3, **options):
    shapes = {"main": (4, 5), "images": (6, 1), "tall": (2, 3)}

    def open_bucket(name, first):
        rows, frames = shapes[name]
        options_of = {"seed": seed, "tokenize": tokenize, "prefetch": 0} | options
        return make_batches(records, batch_size=rows, num_frames=frames, first_step=first, **options_of)

    batches = BucketedBatches(open_bucket, SHARES, seed=seed, first_step=first_step)
    result = [next(batches) for _ in range(steps)]
    assert batches.next_step == first_step + steps
    batches.close()
    return result


def test_a_bucket_is_drawn_for_each_step_and_walks_through_its_own_data(records):
    batches = bucketed(records, 60)
    frames = [batch["video"].shape[1] for batch in batches]
    # Of 60 draws with shares 0.5, 0.3 and 0.2, four standard deviations are 15.5, 14.2 and 12.4.
    for length, expected, most in ((5, 30, 15.5), (1, 18, 14.2), (3, 12, 12.4)):
        assert abs(frames.count(length) - expected) < most
    images = [batch for batch in batches if batch["video"].shape[1] == 1]
    assert_same(images, take(records, len(images), batch_size=6, num_frames=1))


def test_buckets_resume_by_one_integer_and_agree_on_all_processes(records):
    straight = bucketed(records, 30)
    for start in (1, 13):
        assert_same(straight[start:], bucketed(records, 30 - start, first_step=start))
    parts = [bucketed(records, 30, process_index=i, process_count=2) for i in range(2)]
    assert_same(straight, [{k: np.concatenate([p[n][k] for p in parts]) for k in straight[n]} for n in range(30)])
    assert [b["video"].shape for b in straight] != [b["video"].shape for b in bucketed(records, 30, seed=4)]
