"""From video files and captions to clips and latents: the contents are right, and whatever is wrong is named."""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from streamdit_jax.data import parts
from streamdit_jax.data.encode import encode, ingest, is_video_folder, read_captions
from streamdit_jax.data.records import open_records, write_records
from streamdit_jax.data.video import write_video
from streamdit_jax.errors import DataError

SIZE = {"height": 16, "width": 16, "frame_rate": 16.0, "clip_frames": 4}


def fold(video):
    """Stands for an autoencoder: means of 4 frames × 8 × 8 pixels, exactly invertible for flat pictures."""
    assert video.dtype == np.float32 and np.abs(video).max() <= 1
    b, f, h, w, c = video.shape
    return video.reshape(b, f // 4, 4, h // 8, 8, w // 8, 8, c).mean((2, 4, 6))


def level(latent):
    """The frame number (of `numbered`) of a mean over four frames."""
    return ((latent.astype(float).mean() + 1) * 127.5 - 20) / 4


@pytest.fixture
def folder(tmp_path, numbered):
    """a.mp4: 10 frames (two clips of 4), sub/b.mp4: 5 frames (one)."""
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    write_video(tmp_path / "videos" / "a.mp4", numbered(10, 16, 16), 16.0)
    write_video(tmp_path / "videos" / "sub" / "b.mp4", numbered(25, 16, 16)[20:], 16.0)
    return tmp_path / "videos"


def jsonl(folder, *entries):
    (folder / "captions.jsonl").write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def good_jsonl(folder):
    jsonl(folder, {"file": "a.mp4", "captions": ["one", "zwei ✓"]}, {"file": "sub/b.mp4", "caption": "three"})


def test_jsonl_lines_end_at_line_feeds_only(folder):
    jsonl(folder, {"file": "a.mp4", "caption": "odd\u2028\x85line"}, {"file": "sub/b.mp4", "caption": "three"})
    assert read_captions(folder)[folder / "a.mp4"] == ["odd\u2028\x85line"]


def test_the_three_forms_of_captions_say_the_same(folder):
    want = {folder / "a.mp4": ["one", "zwei ✓"], folder / "sub" / "b.mp4": ["three"]}
    good_jsonl(folder)
    assert read_captions(folder) == want
    (folder / "captions.jsonl").unlink()
    (folder / "captions.csv").write_text(
        "file,caption\na.mp4,one\nsub/b.mp4,three\na.mp4,zwei ✓\n", encoding="utf-8-sig"
    )
    assert read_captions(folder) == want
    (folder / "captions.csv").unlink()
    (folder / "a.txt").write_text("one\n\nzwei ✓\n")
    (folder / "sub" / "b.txt").write_text("three")
    assert read_captions(folder) == want


def test_csv_captions_may_hold_commas_quotes_and_line_breaks(folder):
    (folder / "captions.csv").write_text('file,caption\na.mp4,"red, ""fast""\nand loud"\nsub/b.mp4,three\n')
    assert read_captions(folder)[folder / "a.mp4"] == ['red, "fast"\nand loud']


def test_ingest_cuts_long_videos_and_keeps_captions(folder, tmp_path):
    good_jsonl(folder)
    report = ingest(folder, tmp_path / "pixels", **SIZE)
    assert report.clips == {"train": 3} and report.skipped == ()
    records = open_records(tmp_path / "pixels")
    assert (records.kind, records.shape, len(records)) == ("pixels", (4, 16, 16, 3), 3)
    for index, (first, captions, info) in enumerate(
        [
            (0, ["one", "zwei ✓"], {"file": "a.mp4", "clip": 0}),
            (4, ["one", "zwei ✓"], {"file": "a.mp4", "clip": 1}),
            (20, ["three"], {"file": "sub/b.mp4", "clip": 0}),
        ]
    ):
        assert [round((float(f.mean()) - 20) / 4) for f in records[index]["video"]] == list(range(first, first + 4))
        assert records[index]["captions"] == captions and records[index]["info"] == info
    assert {k: records.metadata[k] for k in SIZE} == SIZE


def test_encoding_a_folder_equals_encoding_what_was_ingested(folder, tmp_path):
    good_jsonl(folder)
    shapes = []

    def watched(video):
        shapes.append(video.shape)
        return fold(video)

    encode(folder, tmp_path / "straight", watched, batch_size=2, metadata={"tae": "abc"}, **SIZE)
    assert shapes == [(2, 4, 16, 16, 3)] * 2  # one shape: the last batch is filled up
    ingest(folder, tmp_path / "pixels", **SIZE)
    assert is_video_folder(folder) and not is_video_folder(tmp_path / "pixels")
    encode(open_records(tmp_path / "pixels"), tmp_path / "twice", fold, batch_size=8)
    straight, twice = open_records(tmp_path / "straight"), open_records(tmp_path / "twice")
    assert (straight.kind, straight.shape, len(straight)) == ("latents", (1, 2, 2, 3), 3)
    assert straight.metadata["tae"] == "abc" and straight.metadata["clip_frames"] == 4
    for index, first in enumerate((0, 4, 20)):
        assert abs(level(straight[index]["latents"]) - (first + 1.5)) < 0.3
        np.testing.assert_array_equal(straight[index]["latents"], twice[index]["latents"])
        assert straight[index]["captions"] == twice[index]["captions"]
        assert straight[index]["info"] == twice[index]["info"]


def test_all_splits_of_records_are_encoded(tmp_path):
    def clips(n):
        return [
            {"video": np.full((4, 8, 8, 3), 10 * i, np.uint8), "captions": [str(i)], "info": {"i": i}} for i in range(n)
        ]

    write_records(tmp_path / "a", {"train": clips(3), "held_out": clips(2)}, "pixels", {"frame_rate": 16.0})
    report = encode(tmp_path / "a", tmp_path / "b", fold, height=8, width=8, frame_rate=16.0)
    assert report.clips == {"train": 3, "held_out": 2}
    latent = open_records(tmp_path / "b", "held_out")[1]
    np.testing.assert_allclose(latent["latents"], 10 / 127.5 - 1, rtol=1e-3)
    assert latent["captions"] == ["1"] and latent["info"] == {"i": 1}
    with pytest.raises(DataError, match="its height is 8, but 16 is asked for"):
        encode(tmp_path / "a", tmp_path / "c", fold, height=16)
    with pytest.raises(DataError, match=r"its frame_rate is 16\.0, but 24\.0"):
        encode(tmp_path / "a", tmp_path / "c", fold, frame_rate=24.0)
    with pytest.raises(DataError, match="holds latents already"):
        encode(tmp_path / "b", tmp_path / "c", fold)


def test_an_encoder_that_loses_clips_is_found_out(folder, tmp_path):
    good_jsonl(folder)
    with pytest.raises(ValueError, match=r"encode_fn: gave \[1, 1, 2, 2, 3\] for 2 clips"):
        encode(folder, tmp_path / "out", lambda video: fold(video)[:1], batch_size=2, **SIZE)
    assert not (tmp_path / "out").exists()


def captions_missing(folder):
    pass


def caption_of_a_missing_file(folder):
    good_jsonl(folder)
    with (folder / "captions.jsonl").open("a") as file:
        file.write('{"file": "c.mp4", "caption": "x"}\n')


def video_without_caption(folder):
    jsonl(folder, {"file": "a.mp4", "caption": "one"})


def video_with_empty_caption(folder):
    jsonl(folder, {"file": "a.mp4", "caption": " "}, {"file": "sub/b.mp4", "caption": "x"})


def video_without_text(folder):
    (folder / "a.txt").write_text("one")


def two_tables(folder):
    good_jsonl(folder)
    (folder / "captions.csv").write_text("file,caption\n")


def broken_json(folder):
    (folder / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "x"}\n{"file": \n')


def caption_of_another_type(folder):
    jsonl(folder, {"file": "a.mp4", "captions": "not a list"})


def csv_without_header(folder):
    (folder / "captions.csv").write_text("a.mp4,one\n")


def csv_with_an_open_quote(folder):
    (folder / "captions.csv").write_text('file,caption\na.mp4,"' + "x" * 200_000)


def csv_with_a_short_row(folder):
    (folder / "captions.csv").write_text("file,caption\na.mp4\n")


def not_utf8(folder):
    (folder / "captions.csv").write_bytes("file,caption\na.mp4,caf\xe9\n".encode("latin-1"))


def no_videos(folder):
    for path in list(folder.rglob("*.mp4")):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (captions_missing, "videos: captions are missing: write captions.jsonl"),
        (caption_of_a_missing_file, r"captions\.jsonl:3: names 'c\.mp4'"),
        (video_without_caption, r"sub/b\.mp4: has no caption in .*captions\.jsonl"),
        (video_with_empty_caption, r"a\.mp4: has no caption"),
        (video_without_text, r"sub/b\.mp4: has no caption in b\.txt"),
        (two_tables, "has both"),
        (broken_json, r"captions\.jsonl:2: must be an object"),
        (caption_of_another_type, r"captions\.jsonl:1: must be an object"),
        (csv_without_header, "header file,caption"),
        (csv_with_an_open_quote, r"captions\.csv:\d+: is not CSV"),
        (csv_with_a_short_row, r"captions\.csv:2: must hold"),
        (not_utf8, r"captions\.csv: cannot be read as UTF-8"),
        (no_videos, "holds no video files"),
    ],
)
def test_whatever_is_wrong_with_captions_is_named(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        ingest(folder, tmp_path / "out", **SIZE)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["videos"]


def test_bad_videos_are_named_or_skipped_and_counted(folder, tmp_path):
    good_jsonl(folder)
    (folder / "sub" / "b.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"sub/b\.mp4: cannot be decoded"):
        encode(folder, tmp_path / "out", fold, **SIZE)
    report = encode(folder, tmp_path / "out", fold, skip_bad=True, **SIZE)
    assert report.clips == {"train": 2} and len(report.skipped) == 1 and "b.mp4: cannot be decoded" in report.skipped[0]
    assert "2 clips (train); 1 videos left out" in str(report)
    with pytest.raises(DataError, match=r"none of its 2 videos .*a\.mp4: too short: it has 10 frames"):
        ingest(folder, tmp_path / "out2", skip_bad=True, **SIZE | {"clip_frames": 11})
    with pytest.raises(DataError, match=r"a\.mp4: too short: it has 10 frames and a clip needs 11"):
        ingest(folder, tmp_path / "out2", **SIZE | {"clip_frames": 11})


def test_requests_that_cannot_be_met_are_named_before_work_starts(folder, tmp_path):
    def never(video):
        raise AssertionError("work was started")

    with pytest.raises(DataError, match="nowhere: no such folder"):
        encode(tmp_path / "nowhere", tmp_path / "out", never, **SIZE)
    with pytest.raises(DataError, match="frame_rate, clip_frames must be given"):
        encode(folder, tmp_path / "out", never, height=16, width=16)
    good_jsonl(folder)
    ingest(folder, tmp_path / "out", **SIZE)
    with pytest.raises(DataError, match="already holds finished records"):
        encode(folder, tmp_path / "out", never, **SIZE)


def test_real_clips_are_ingested_and_encoded(tmp_path, real_clips):
    folder = tmp_path / "real"
    folder.mkdir()
    for name in ("bigbuckbunny", "bikes", "carphone_pristine"):
        (folder / f"{name}.mp4").symlink_to(real_clips[name])
        (folder / f"{name}.txt").write_text(f"the clip {name}\n")
    ingest(folder, tmp_path / "pixels", height=64, width=64, frame_rate=16.0, clip_frames=32)
    records = open_records(tmp_path / "pixels")
    # 84, 160 and 64 frames at 16 a second.
    assert [records[i]["info"]["file"] for i in range(len(records))] == (
        ["bigbuckbunny.mp4"] * 2 + ["bikes.mp4"] * 5 + ["carphone_pristine.mp4"] * 2
    )
    encode(tmp_path / "pixels", tmp_path / "latents", fold, batch_size=4)
    latents = open_records(tmp_path / "latents")
    assert latents.shape == (8, 8, 8, 3) and len(latents) == 9
    video = records[3]["video"].astype(np.float32)[None] / 127.5 - 1
    np.testing.assert_allclose(latents[3]["latents"], fold(video)[0], atol=1e-3)


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Records of 11 + 2 clips, cut into parts of 2; no process waits long for another."""
    monkeypatch.setattr(parts, "MOST_PARTS", 6)
    monkeypatch.setattr(parts, "POLL_SECONDS", 0.02)
    clips = [{"video": np.full((4, 8, 8, 3), 9 * i, np.uint8), "captions": [str(i)]} for i in range(13)]
    write_records(tmp_path / "pixels", {"train": clips[:11], "held_out": clips[11:]}, "pixels")
    return tmp_path / "pixels"


def contents(directory):
    """SHA-256 of every file that readers see."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def side_by_side(count, run):
    """Runs `run(process_index=…, process_count=count)` for every process at once; their results."""
    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(run, process_index=index, process_count=count) for index in range(count)]
        return [job.result(timeout=120) for job in jobs]


def test_any_number_of_processes_writes_the_same_bytes(many, tmp_path):
    alone = encode(many, tmp_path / "1", fold, batch_size=2)
    for count in (3, 11):  # more processes than parts, too
        reports = side_by_side(count, lambda **place: encode(many, tmp_path / str(place["process_count"]), fold,
                                                             batch_size=2, **place))  # fmt: skip
        assert [report.clips for report in reports] == [alone.clips] * count == [{"train": 11, "held_out": 2}] * count
        assert contents(tmp_path / str(count)) == contents(tmp_path / "1")
    records = open_records(tmp_path / "3")
    assert [records[i]["captions"] for i in range(11)] == [[str(i)] for i in range(11)]
    assert len(list((tmp_path / "3").glob("latents-train.array_record-*-of-00006"))) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "11", "3", "pixels"]


def test_ingesting_is_shared_too_and_bad_files_are_counted_over_all(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "POLL_SECONDS", 0.02)
    good_jsonl(folder)
    (folder / "a.mp4").write_bytes(b"no video")
    for count in (1, 3):
        out = tmp_path / str(count)
        reports = side_by_side(count, lambda **place: ingest(folder, out, skip_bad=True, **SIZE, **place))  # noqa: B023
        for report in reports:
            assert report.clips == {"train": 1}
            [reason] = report.skipped
            assert "a.mp4: cannot be decoded" in reason
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    said = json.loads((tmp_path / "3" / "report.json").read_text())
    assert said["clips"] == {"train": 1} and "a.mp4: cannot be decoded" in said["skipped"][0]
    (folder / "sub" / "b.mp4").write_bytes(b"no video either")

    def none_left(**place):
        with pytest.raises(DataError, match=r"videos: none of its 2 videos can be used; the first: .*a\.mp4"):
            ingest(folder, tmp_path / "none", skip_bad=True, **SIZE, **place)

    side_by_side(2, none_left)
    assert not (tmp_path / "none").exists() and not (tmp_path / ".none.parts").exists()


def test_what_was_stopped_goes_on_and_what_was_altered_is_done_again(many, tmp_path):
    encode(many, tmp_path / "whole", fold, batch_size=2)
    calls = []

    def until(limit):
        def encoder(video):
            calls.append(1)
            if len(calls) == limit:
                raise InterruptedError("stopped")
            return fold(video)

        return encoder

    with pytest.raises(InterruptedError):
        encode(many, tmp_path / "out", until(4), batch_size=2)
    work = tmp_path / ".out.parts"
    done = sorted(work.glob("latents-*"))
    assert len(done) == 3 and not list(work.glob("unfinished/*partial*")) and not (tmp_path / "out").exists()
    done[1].write_bytes(done[1].read_bytes()[:-1] + b"?")  # damaged since
    with pytest.raises(DataError, match=r"\.out\.parts: was begun with batch_size '2', not '4'; delete it"):
        encode(many, tmp_path / "out", fold, batch_size=4)
    calls.clear()
    encode(many, tmp_path / "out", until(100), batch_size=2)
    assert len(calls) == 7 - 2  # six parts of train and one of held_out, of which two were done and sound
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


SLOW = """
import sys, time
import numpy as np
from pathlib import Path
from streamdit_jax.data import parts
from streamdit_jax.data.encode import encode
parts.MOST_PARTS = 6

def fold(video):
    time.sleep(0.3)
    b, f, h, w, c = video.shape
    return video.reshape(b, f // 4, 4, h // 8, 8, w // 8, 8, c).mean((2, 4, 6))

encode(sys.argv[1], sys.argv[2], fold, batch_size=2, process_index=int(sys.argv[3]), process_count=2)
"""


def test_a_killed_process_loses_at_most_the_part_it_was_at(many, tmp_path):
    encode(many, tmp_path / "whole", fold, batch_size=2)

    def start(index):
        command = [sys.executable, "-c", SLOW, str(many), str(tmp_path / "out"), str(index)]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()})

    first = start(0)
    try:
        receipts = tmp_path / ".out.parts" / "unfinished"
        end = time.monotonic() + 120
        while len(list(receipts.glob("*-0*.json"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.parts").glob("latents-*")}
    assert len(before) >= 2
    both = [start(0), start(1)]
    try:
        assert [process.wait(timeout=120) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    for path, written in before.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == written, "was done again"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
