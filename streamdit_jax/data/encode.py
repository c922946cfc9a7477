"""Turns any video source into records: real video into pixels (`ingest`), pixels or real video into latents (`encode`).

A folder of videos holds video files (.mp4 .mkv .webm .mov .avi .m4v .gif, sub-folders included) and their captions,
as one of
  - `captions.jsonl`: a JSON object per line, {"file": "a.mp4", "caption": "..."} or {"file": "a.mp4", "captions":
  ["...", "..."]}
  - `captions.csv`:   with the header file,caption; a file may have several rows
  - `a.txt` beside each `a.mp4`: a caption per line
File names are relative to the folder. Every clip of a long video gets all its captions.

No model is imported: the autoencoder comes in as a function.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamdit_jax.data.parts import Clip, Report, Split, write_parts
from streamdit_jax.data.records import Records, check_free, open_records
from streamdit_jax.data.video import cut_clips, read_video
from streamdit_jax.errors import DataError

EXTENSIONS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif")

# video float32 [b, F, H, W, 3] in [-1, 1] → latents [b, f, h, w, C]
EncodeFn = Callable[[np.ndarray], np.ndarray]


def is_video_folder(directory: str | os.PathLike) -> bool:
    """Whether a directory is not one of records: then it must hold video files."""
    return not (Path(directory) / "dataset_info.json").exists()


def _videos(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())


def read_captions(folder: str | os.PathLike) -> dict[Path, list[str]]:
    """The folder's videos, sorted by name, each with its captions. See this module's docstring for the forms.

    DataError naming the file: the folder or its captions are missing, a line is malformed, a caption's video is
    missing, or a video has no caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of videos")
    videos = _videos(folder)
    if not videos:
        raise DataError(f"{folder}: holds no video files ({' '.join(EXTENSIONS)})")
    tables = [path for name in ("captions.jsonl", "captions.csv") if (path := folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder}: has both captions.jsonl and captions.csv; keep one")
    captions: dict[Path, list[str]] = {video: [] for video in videos}
    if tables:
        for where, name, texts in _table(tables[0]):
            video = folder / name
            if video not in captions:
                raise DataError(f"{where}: names {name!r}, which is not among the videos in {folder}")
            captions[video] += texts
    elif any(video.with_suffix(".txt").is_file() for video in videos):
        for video in videos:
            if (beside := video.with_suffix(".txt")).is_file():
                captions[video] = _text(beside).splitlines()
    else:
        raise DataError(
            f"{folder}: captions are missing: write captions.jsonl, captions.csv, or a .txt beside each video"
        )
    for video in videos:
        captions[video] = [text.strip() for text in captions[video] if text.strip()]
        if not captions[video]:
            raise DataError(f"{video}: has no caption in {tables[0] if tables else video.with_suffix('.txt').name}")
    return captions


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _table(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (place for messages, file name, captions) of every line of a captions file."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(_text(path).split("\n"), 1):
            if not line.strip():
                continue
            where, want = f"{path}:{number}", 'an object with "file" and "caption" (a string) or "captions" (strings)'
            try:
                entry = json.loads(line)
                name, texts = entry["file"], entry["captions"] if "captions" in entry else [entry["caption"]]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{where}: must be {want}") from error
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in (name, *texts)):
                raise DataError(f"{where}: must be {want}")
            yield where, name, texts
    else:
        rows = csv.DictReader(io.StringIO(_text(path), newline=""))
        try:
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                raise DataError(f"{path}: its first line must be the header file,caption")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if not row["file"] or row["caption"] is None:
                    raise DataError(f"{where}: must hold a file name and a caption")
                yield where, row["file"], [row["caption"]]
        except csv.Error as error:
            raise DataError(f"{path}:{rows.line_num}: is not CSV: {error}") from error


def _folder_split(folder: Path, size: Mapping[str, Any], skip_bad: bool) -> tuple[Split, str]:
    """The clips of all videos, in the order of their names, and a digest of names and captions.

    A video that does not decode raises, or, with `skip_bad`, its reason is noted.
    """
    videos = [(video.relative_to(folder).as_posix(), texts) for video, texts in read_captions(folder).items()]

    def clips(units: range, skipped: list[str]) -> Iterator[Clip]:
        for name, captions in (videos[unit] for unit in units):
            video = folder / name
            try:
                frames = read_video(video, size["height"], size["width"], size["frame_rate"])
                for number, clip in enumerate(cut_clips(frames, size["clip_frames"], str(video))):
                    yield {"video": clip, "captions": captions, "info": {"file": name, "clip": number}}
            except DataError as error:
                if not skip_bad:
                    raise
                skipped.append(str(error))

    return Split(len(videos), clips), hashlib.sha256(json.dumps(videos).encode()).hexdigest()


def _records_split(records: Records, multiple: int) -> Split:
    return Split(len(records), lambda units, _: (records[unit] for unit in units), multiple)


def ingest(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    height: int,
    width: int,
    frame_rate: float,
    clip_frames: int,
    *,
    skip_bad: bool = False,
    metadata: Mapping[str, Any] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Report:
    """Decodes a folder of videos into records of pixels in `out`: clips uint8 [clip_frames, height, width, 3].

    `skip_bad`: a video that does not decode or is too short is reported instead of raised; the clips of a video
    that breaks off half-way are kept up to there. `process_index` of `process_count`: see `parts.write_parts`.
    DataError: see `read_captions`, `read_video` and `write_parts`; or no video is good.
    """
    folder, out = Path(folder), Path(out)
    size = {"height": height, "width": width, "frame_rate": float(frame_rate), "clip_frames": clip_frames}
    if process_index == 0:
        check_free(out)  # before captions are read, not after
    split, content = _folder_split(folder, size, skip_bad)
    described = {"source": str(folder), **size, **(metadata or {})}
    return write_parts(
        out,
        {"train": split},
        "pixels",
        {**described, "content": content},
        described,
        process_index=process_index,
        process_count=process_count,
    )


def encode(
    source: str | os.PathLike | Records,
    out: str | os.PathLike,
    encode_fn: EncodeFn,
    *,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    frame_rate: float | None = None,
    clip_frames: int | None = None,
    skip_bad: bool = False,
    metadata: Mapping[str, Any] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Report:
    """Encodes a video source into records of latents in `out`; captions and info are kept.

    `source`: records of pixels or their directory (all splits are encoded; as `prepare_roadtrip` and `ingest` write
    them), or a folder of videos, for which `height`, `width`, `frame_rate` and `clip_frames` are needed. For
    records the first three, where given, are compared: an autoencoder is not applied to another size or rate than
    it was meant for.
    `encode_fn` always sees `batch_size` clips (a part's last batch is filled up and cut), so it compiles once.
    `process_index` of `process_count`: each writes its parts, on one file system, and returns once all are there; the
    files do not depend on how many there are. A killed call is gone on with by the same call (`parts.write_parts`).

    DataError as in `ingest`; also when `source` holds latents already or differs in size or rate.
    """
    source, out = Path(source.directory if isinstance(source, Records) else source), Path(out)
    size = {"height": height, "width": width, "frame_rate": frame_rate, "clip_frames": clip_frames}
    if process_index == 0:
        check_free(out)
    if not is_video_folder(source):
        first = open_records(source)
        size = _compared(first, size)
        splits = {name: _records_split(open_records(source, name), batch_size) for name in first.splits}
        content = hashlib.sha256((source / "dataset_info.json").read_bytes()).hexdigest()
    else:
        missing = [field for field, value in size.items() if value is None]
        if missing and source.is_dir():
            raise DataError(f"{source}: is a folder of videos; {', '.join(missing)} must be given for it")
        split, content = _folder_split(source, size, skip_bad)
        splits = {"train": split}
    described = {"source": str(source), **size, **(metadata or {})}
    encoded = {
        name: dataclasses.replace(split, clips=_encoding(split, encode_fn, batch_size))
        for name, split in splits.items()
    }
    return write_parts(
        out,
        encoded,
        "latents",
        {**described, "batch_size": batch_size, "content": content},
        described,
        process_index=process_index,
        process_count=process_count,
    )


def _encoding(split: Split, encode_fn: EncodeFn, batch_size: int):
    return lambda units, skipped: _encoded(split.clips(units, skipped), encode_fn, batch_size)


def _compared(records: Records, size: dict[str, Any]) -> dict[str, Any]:
    if records.kind != "pixels":
        raise DataError(
            f"{records.directory}: holds {records.kind} already; encoding needs records of pixels or videos"
        )
    frames, height, width, _ = records.shape
    have = {"height": height, "width": width, "frame_rate": records.metadata.get("frame_rate")}
    for field, value in have.items():
        if None not in (value, size[field]) and size[field] != value:
            raise DataError(
                f"{records.directory}: its {field} is {value}, but {size[field]} is asked for; render or ingest anew"
            )
    return {**have, "clip_frames": frames}


def _encoded(clips: Iterator[Clip], encode_fn: EncodeFn, batch_size: int) -> Iterator[Clip]:
    while batch := list(itertools.islice(clips, batch_size)):
        filled = batch + batch[-1:] * (batch_size - len(batch))
        video = np.stack([clip["video"] for clip in filled]).astype(np.float32) / 127.5 - 1
        latents = np.asarray(encode_fn(video), np.float32)
        if latents.ndim != 5 or len(latents) != batch_size:
            raise ValueError(f"encode_fn: gave {list(latents.shape)} for {batch_size} clips; want [b, f, h, w, C]")
        for clip, latent in zip(batch, latents):
            yield {"latents": latent, "captions": clip["captions"], "info": clip["info"]}
