"""The roadtrip on disk: what lies there is what the renderer draws, built once, whoever builds it and however."""

import subprocess
import sys
import textwrap
from dataclasses import asdict

import numpy as np
import pytest
import tensorflow_datasets as tfds

from streamdit_jax.data import roadtrip, roadtrip_builder
from streamdit_jax.data.records import open_records
from streamdit_jax.data.roadtrip_builder import prepare_roadtrip, rendered
from streamdit_jax.errors import DataError

SMALL = {"num_clips": 5, "num_held_out": 2, "clip_frames": 3, "size": 16, "captions_per_clip": 3, "seed": 7}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return prepare_roadtrip(tmp_path_factory.mktemp("roadtrip"), workers=2, **SMALL)


def test_clips_are_the_renderers_and_splits_keep_their_combinations(directory):
    for split, count in (("train", 5), ("held_out", 2)):
        records = open_records(directory, split)
        assert (len(records), records.kind, records.shape) == (count, "pixels", (3, 16, 16, 3))
        for index in range(count):
            factors, seed = roadtrip.clip_factors(index, 7, split)
            assert roadtrip.held_out(factors) == (split == "held_out")
            np.testing.assert_array_equal(records[index]["video"], roadtrip.render(factors, seed, 3, size=16))
            assert records[index]["info"] == {"factors": asdict(factors), "seed": seed, "index": index}
            assert len(records[index]["captions"]) == 3 and all(records[index]["captions"])
    assert records.metadata["frame_rate"] == 16.0 and records.metadata["seed"] == 7


def test_plain_tfds_finds_it(directory):
    builder = tfds.builder_from_directory(str(directory))
    assert builder.info.name == "roadtrip" and builder.info.splits["train"].num_examples == 5
    assert builder.as_data_source("train")[4]["video"].shape == (3, 16, 16, 3)


def test_same_parameters_are_reused_and_others_built_beside(directory, monkeypatch):
    root = directory.parents[2]
    before = {p: p.stat().st_mtime_ns for p in directory.iterdir()}
    assert prepare_roadtrip(root, **SMALL) == directory
    assert {p: p.stat().st_mtime_ns for p in directory.iterdir()} == before
    other = prepare_roadtrip(root, **SMALL | {"num_clips": 1, "num_held_out": 0})
    assert other != directory and open_records(other).splits == ("train",)
    # A world that draws otherwise never reads the old clips.
    monkeypatch.setattr(roadtrip_builder.grammar, "caption", lambda factors, rng: "something else")
    assert roadtrip_builder.world_fingerprint() not in directory.parent.name


def test_bytes_do_not_depend_on_the_number_of_workers(directory, tmp_path):
    again = prepare_roadtrip(tmp_path, workers=3, **SMALL)
    for path in directory.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_a_script_without_a_main_guard_may_build(tmp_path):
    """multiprocessing's spawn would run this script once more in every worker."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from streamdit_jax.data.roadtrip_builder import prepare_roadtrip
        prepare_roadtrip({str(tmp_path / "data")!r}, num_clips=2, num_held_out=0, clip_frames=2, size=16, workers=2)
        print("once", "tensorflow" in sys.modules)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.splitlines() == ["once False"], done.stderr


def test_a_failing_renderer_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(roadtrip_builder.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="rendering clip 0 of split 'train' failed"):
        prepare_roadtrip(tmp_path, **SMALL)
    assert not [p for p in tmp_path.rglob("*") if "array_record" in p.name]
    assert not [p for p in (tmp_path / "roadtrip").glob("clips*") if any(p.iterdir())]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(DataError, match=r"file: could not be written: .*Not a directory"):
        prepare_roadtrip(tmp_path / "file", **SMALL)


def test_workers_end_when_the_reader_stops_early():
    clips = rendered("train", 50, 2, 16, seed=0, workers=2)
    next(clips)
    clips.close()  # returns: children killed and waited for, threads joined


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_clips": 0}, "num_clips is 0"), ({"size": 60}, "roadtrip: size"), ({"seed": -1}, "seed is -1")],
)
def test_impossible_parameters_are_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        prepare_roadtrip(tmp_path, **SMALL | change)
