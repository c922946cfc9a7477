"""Clips on disk: what is written is read, nothing unfinished bears a final name, and damage is named."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from streamdit_jax.data.records import open_records, write_records
from streamdit_jax.errors import DataError


def pixel_clips(count, frames=4, size=8):
    rng = np.random.default_rng(0)
    for i in range(count):
        video = rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
        yield {
            "video": video,
            "captions": [f"clip {i}", "ünï ✓ 🚗"][: 1 + i % 2],
            "info": {"seed": i, "factors": {"a": "b"}},
        }


def latent_clips(count, frames=3):
    rng = np.random.default_rng(1)
    for i in range(count):
        yield {"latents": rng.standard_normal((frames, 2, 2, 5), dtype=np.float32), "captions": [str(i)]}


def test_pixels_round_trip_over_shards_in_order(tmp_path):
    clips = list(pixel_clips(7))
    # A clip is some 870 bytes: three fit a shard.
    records = write_records(tmp_path / "a", iter(clips), "pixels", {"frame_rate": 16.0}, shard_bytes=2900)
    assert len(list((tmp_path / "a").glob("*.array_record-*"))) == 3
    assert (len(records), records.kind, records.shape, records.metadata["frame_rate"]) == (
        7,
        "pixels",
        (4, 8, 8, 3),
        16.0,
    )
    for i, clip in enumerate(clips):
        assert records[i]["video"].dtype == np.uint8
        np.testing.assert_array_equal(records[i]["video"], clip["video"])
        assert records[i]["captions"] == clip["captions"]
        assert records[i]["info"] == clip["info"]
    with pytest.raises(IndexError):
        records[7]


def test_latents_are_float16_to_half_a_unit_in_the_last_place(tmp_path):
    records = write_records(tmp_path / "a", latent_clips(3), "latents")
    assert records.kind == "latents"
    for i, clip in enumerate(latent_clips(3)):
        assert records[i]["latents"].dtype == np.float16
        np.testing.assert_allclose(records[i]["latents"].astype(np.float32), clip["latents"], rtol=2**-11, atol=1e-7)


def test_plain_tfds_reads_the_directory_and_splits(tmp_path):
    write_records(tmp_path / "a", {"train": pixel_clips(3), "held_out": pixel_clips(2)}, "pixels")
    (tmp_path / "a").rename(tmp_path / "moved")
    source = tfds.builder_from_directory(str(tmp_path / "moved")).as_data_source("held_out")
    clip = list(pixel_clips(2))[1]
    np.testing.assert_array_equal(source[1]["video"], clip["video"])
    assert source[1]["captions"][1].decode() == clip["captions"][1]
    assert open_records(tmp_path / "moved", "held_out").splits == ("train", "held_out")
    assert len(open_records(tmp_path / "moved", "held_out")) == 2


def test_writing_the_same_clips_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_records(tmp_path / name, pixel_clips(3), "pixels", {"x": 1})
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_finished_records_are_never_overwritten(tmp_path):
    write_records(tmp_path / "a", pixel_clips(2), "pixels")
    with pytest.raises(DataError, match="already holds finished records"):
        write_records(tmp_path / "a", pixel_clips(1), "pixels")
    assert len(open_records(tmp_path / "a")) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty directory"):
        write_records(tmp_path / "b", pixel_clips(1), "pixels")
    (tmp_path / "empty").mkdir()
    assert len(write_records(tmp_path / "empty", pixel_clips(1), "pixels")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": np.zeros((4, 8, 8, 3), np.float32)}, "clip 1: video is float32"),
        (
            {"video": np.zeros((5, 8, 8, 3), np.uint8)},
            r"clip 1 has shape \[5, 8, 8, 3\]; the clips before it have \[4, 8, 8, 3\]",
        ),
        ({"video": np.zeros((4, 8, 8), np.uint8)}, "clip 1: video has shape"),
        ({"captions": []}, "clip 1: captions must be a list of at least one string"),
        ({"captions": "one"}, "clip 1: captions must be a list"),
    ],
)
def test_a_malformed_clip_is_named_and_leaves_nothing(tmp_path, change, message):
    clips = list(pixel_clips(3))
    clips[1] = clips[1] | change
    with pytest.raises(DataError, match=message):
        write_records(tmp_path / "a", clips, "pixels")
    assert list(tmp_path.iterdir()) == []


def test_latents_that_are_not_finite_are_refused(tmp_path):
    for bad in (np.nan, np.inf, 1e6):
        with pytest.raises(DataError, match="not finite"):
            write_records(tmp_path / "a", [{"latents": np.full((1, 2, 2, 1), bad), "captions": ["x"]}], "latents")


def test_no_clips_and_unknown_kind(tmp_path):
    with pytest.raises(DataError, match="no clips"):
        write_records(tmp_path / "a", [], "pixels")
    with pytest.raises(DataError, match="pixels, latents"):
        write_records(tmp_path / "a", [], "sounds")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_callers_generator_is_not_disguised(tmp_path):
    def clips():
        yield from pixel_clips(1)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_records(tmp_path / "a", clips(), "pixels")
    assert list(tmp_path.iterdir()) == []


def test_missing_foreign_and_damaged_directories_are_named(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        open_records(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no records"):
        open_records(tmp_path / "empty")
    write_records(tmp_path / "a", pixel_clips(2), "pixels")
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        open_records(tmp_path / "a", "test")
    metadata = json.loads((tmp_path / "a" / "metadata.json").read_text())
    (tmp_path / "a" / "metadata.json").write_text(json.dumps(metadata | {"kind": "sounds"}))
    with pytest.raises(DataError, match="foreign"):
        open_records(tmp_path / "a")
    (tmp_path / "a" / "metadata.json").write_text(json.dumps(metadata)[:-3])
    with pytest.raises(DataError, match="metadata cannot be read"):
        open_records(tmp_path / "a")
    (tmp_path / "a" / "metadata.json").write_text(json.dumps(metadata))
    (tmp_path / "a" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="metadata cannot be read"):
        open_records(tmp_path / "a")


def test_missing_truncated_and_flipped_files_are_named(tmp_path):
    records = write_records(tmp_path / "a", pixel_clips(20, size=32), "pixels")
    (file,) = (tmp_path / "a").glob("*.array_record-*")
    whole = file.read_bytes()
    for cut in (0, 10, 65536, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=file.name):
            open_records(tmp_path / "a")
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name}: missing"):
        open_records(tmp_path / "a")
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    file.write_bytes(flipped)
    records = open_records(tmp_path / "a")
    with pytest.raises(DataError, match=r"clip \d+ of split 'train' is damaged"):
        for i in range(len(records)):
            records[i]


def test_a_full_disk_is_one_data_error_and_leaves_no_directory(tmp_path):
    script = f"""
        import resource, sys
        sys.path[:0] = {sys.path!r}
        import numpy as np
        from streamdit_jax.data.records import write_records
        from streamdit_jax.errors import DataError
        rng = np.random.default_rng(0)
        clip = lambda: {{"video": rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), "captions": ["x"]}}
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # files beyond 300 kB fail as on a full disk
        try:
            write_records({str(tmp_path / "a")!r}, (clip() for _ in range(40)), "pixels")
        except DataError as error:
            print("DataError", error)
        print("tensorflow" in sys.modules, "torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    first, second = done.stdout.strip().splitlines()
    assert first.startswith("DataError") and str(tmp_path / "a") in first
    assert second == "False False"
    assert list(tmp_path.iterdir()) == []
