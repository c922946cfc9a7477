"""From video files and captions to clips and latents: the contents are right, and whatever is wrong is named."""

import json

import numpy as np
import pytest

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
