"""Clips written in parts: by one process or several, and again after a kill, always to the same bytes.

A source is cut into parts, each a run of its clips or videos and one ArrayRecord file. How it is cut follows from the
source alone, so it does not matter how many processes there are: process p of P writes parts p, p + P, …

    .OUT.parts/latents-train.array_record-00003-of-00128     a part, under its final name once it is complete
    .OUT.parts/unfinished/plan.json                          what is written: source, sizes, model, parts
    .OUT.parts/unfinished/train-00003.json                   a part's receipt: clips, bytes, SHA-256, what was left out
    OUT                                                      the same directory, renamed by process 0 at the end

A part counts as done when its file has the digest of its receipt. Nothing but the shared file system connects the
processes.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from streamdit_jax.data import records
from streamdit_jax.errors import DataError

MOST_PARTS = 128  # of a split, as long as they stay small
MOST_UNITS = 512  # clips or videos in a part: what a kill can cost a process
POLL_SECONDS = 1.0
READ_SECONDS = 60.0
REPORT = "report.json"
Clip = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written: `clips` per split, and the videos left out with the reason (only with skip_bad)."""

    directory: Path
    clips: Mapping[str, int]
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{count} clips ({split})" for split, count in self.clips.items())
        left_out = f"; {len(self.skipped)} videos left out" if self.skipped else ""
        return f"{self.directory}: {counts}{left_out}"


@dataclasses.dataclass(frozen=True)
class Split:
    """A split to write: `units` clips or videos, and a function from a run of them, and a list for the reasons of those
    left out, to their clips. A part holds a multiple of `multiple` units, so that batches are full.
    """

    units: int
    clips: Callable[[range, list[str]], Iterator[Clip]]
    multiple: int = 1

    @property
    def part_units(self) -> int:
        """Units in a part; the last part may have fewer."""
        wanted = min(MOST_UNITS, -(-self.units // MOST_PARTS))
        return -(-wanted // self.multiple) * self.multiple

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.units // self.part_units)


@dataclasses.dataclass(frozen=True)
class _Part:
    split: str
    number: int
    units: range
    file: Path
    receipt: Path


def write_parts(
    out: Path,
    splits: Mapping[str, Split],
    kind: str,
    plan: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Report:
    """Writes this process's parts of `out`, waits for those of the others, and returns what was written by all.

    Args:
        splits: name → what to write. The same on every process.
        kind: of the records, "pixels" or "latents".
        plan: what the contents follow from: the `source`, a digest of it, …; work begun for another plan is refused.
        metadata: of the records, as `records.write_records` takes it.
        process_index, process_count: which parts are this process's.
    Raises:
        DataError: `out` is taken, parts of another plan lie beside it, nothing could be used, clips differ in shape, a
            finished part was altered while others were written, or the disk is full. A later call goes on from there.
    """
    work = out.parent / f".{out.name}.parts"
    plan = {**plan, "kind": kind, "parts": {name: [split.units, split.parts] for name, split in splits.items()}}
    plan = json.loads(json.dumps(plan))
    if process_index == 0:
        records.check_free(out)
        with records.writing(out):
            (work / "unfinished").mkdir(parents=True, exist_ok=True)
            _begin(work, plan)
    elif report := _wait_for_the_plan(work, out, plan):
        return report
    parts = [
        _Part(
            name,
            number,
            range(number * split.part_units, min((number + 1) * split.part_units, split.units)),
            records.shard_path(work, kind, name, number, split.parts),
            work / "unfinished" / f"{name}-{number:05d}.json",
        )
        for name, split in splits.items()
        for number in range(split.parts)
    ]
    mine = parts[process_index::process_count]
    quiet = process_index > 0 or not sys.stderr.isatty()
    for part in tqdm(mine, "parts", unit="part", disable=quiet):
        if process_index > 0 and (report := _finished(out, plan)):
            return report  # the others needed nothing of this process
        if not _is_done(part):
            _write(part, splits[part.split].clips, kind, out)
    receipts = _receipts(parts, out, plan)
    if isinstance(receipts, Report):
        return receipts
    report = _report(out, splits, receipts)
    shape = _shape(out, receipts)
    if empty := [name for name, count in report.clips.items() if count == 0]:
        _put(work / "unfinished" / f"read-{process_index}.json", True)
        if process_index == 0 and _all_have_read(work, process_count):
            shutil.rmtree(work)  # its receipts say that nothing can be used; the next call shall look again
        why = f"none of its {len(report.skipped)} videos can be used; the first: {'; '.join(report.skipped[:1])}"
        raise DataError(f"{plan['source']}: {why if report.skipped else f'split {empty[0]!r} has no clips'}")
    if process_index == 0:
        _finish(work, out, kind, shape, receipts, plan, metadata, report)
    while not (done := _finished(out, plan)):
        time.sleep(POLL_SECONDS)
    return done


def _wait_for_the_plan(work: Path, out: Path, plan: dict) -> Report | None:
    """Returns once process 0 has begun with the same plan; the report, where it has finished already."""
    while (begun := _json(work / "unfinished" / "plan.json")) is None:
        if report := _finished(out, plan):
            return report
        try:
            records.check_free(out)
        except DataError:
            if report := _finished(out, plan):  # just now
                return report
            raise
        time.sleep(POLL_SECONDS)
    _compare(work, begun, plan)
    return None


def _begin(work: Path, plan: dict) -> None:
    """Writes the plan, or compares it with the one that work was begun with."""
    path = work / "unfinished" / "plan.json"
    begun = _json(path)
    if begun is None:
        _put(path, plan)
    else:
        _compare(work, begun, plan)


def _compare(work: Path, begun: dict, plan: dict) -> None:
    if begun != plan:
        field = next(name for name in [*plan, *begun] if begun.get(name) != plan.get(name))
        raise DataError(
            f"{work}: was begun with {field} {str(begun.get(field))!r:.80}, not {str(plan.get(field))!r:.80}; "
            "delete it to begin anew"
        )


def _write(part: _Part, clips: Callable, kind: str, out: Path) -> None:
    """Encodes and writes one part. The receipt comes last: a kill at any moment leaves the part undone, or done."""
    partial = part.receipt.with_suffix(f".partial-{uuid.uuid4().hex}")
    skipped, shape, count, size = [], None, 0, 0
    with records.writing(out):
        writer = ArrayRecordWriter(str(partial), records.WRITER_OPTIONS)
    try:
        for index, clip in enumerate(clips(part.units, skipped)):
            name = f"{out}: {part.split} part {part.number} clip {index}"
            example = records.clip_example(kind, clip, name)
            array = example[records.KINDS[kind][0]]
            if shape is None:
                shape, features = array.shape, records.clip_features(kind, array.shape)
            if array.shape != shape:
                raise DataError(f"{name} has shape {list(array.shape)}; the clips before it have {list(shape)}")
            record = records.serialize(features, example)
            with records.writing(out):
                writer.write(record)
            count, size = count + 1, size + len(record)
        with records.writing(out):
            writer.close()
        records.check_shard(partial, count)
        receipt = {"clips": count, "bytes": size, "sha256": _sha256(partial), "shape": shape, "skipped": skipped}
        with records.writing(out):
            os.replace(partial, part.file)
            _put(part.receipt, receipt)
    finally:
        partial.unlink(missing_ok=True)


def _is_done(part: _Part) -> bool:
    """Whether an earlier run finished a part, and its file is what was written then."""
    receipt = _json(part.receipt)
    return receipt is not None and part.file.is_file() and _sha256(part.file) == receipt["sha256"]


def _receipts(parts: Sequence[_Part], out: Path, plan: dict) -> list[tuple[_Part, dict]] | Report:
    """Every part's receipt, once all are there; or the report, where process 0 was quicker to finish."""
    found: list[tuple[_Part, dict]] = []
    while len(found) < len(parts):
        part = parts[len(found)]
        if (receipt := _json(part.receipt)) is not None:
            found.append((part, receipt))
        elif report := _finished(out, plan):
            return report
        else:
            time.sleep(POLL_SECONDS)
    return found


def _all_have_read(work: Path, process_count: int) -> bool:
    """Waits until every process has read the receipts, which it would otherwise wait for in vain; not for ever."""
    deadline = time.monotonic() + READ_SECONDS
    files = [work / "unfinished" / f"read-{process}.json" for process in range(process_count)]
    while not (all_read := all(file.exists() for file in files)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return all_read


def _report(out: Path, splits: Iterable[str], receipts: list[tuple[_Part, dict]]) -> Report:
    counts = {name: sum(receipt["clips"] for part, receipt in receipts if part.split == name) for name in splits}
    return Report(out, counts, tuple(itertools.chain(*(receipt["skipped"] for _, receipt in receipts))))


def _shape(out: Path, receipts: list[tuple[_Part, dict]]) -> tuple[int, ...] | None:
    """The one shape of all clips; None where there are none."""
    shapes = {tuple(receipt["shape"]): part for part, receipt in receipts if receipt["clips"]}
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise DataError(
            f"{out}: the clips of {second.split} part {second.number} have shape {list(other)}, those of {first.split} "
            f"part {first.number} {list(one)}; all must have one"
        )
    return next(iter(shapes), None)


def _finish(work, out, kind, shape, receipts, plan, metadata, report: Report) -> None:
    """Adds the metadata and gives the directory its name. What is killed here is done again by the next call."""
    for part, receipt in receipts:
        records.check_shard(part.file, receipt["clips"])
    with records.writing(out):
        sizes = {
            name: [(r["clips"], r["bytes"]) for part, r in receipts if part.split == name] for name in report.clips
        }
        records.write_metadata(work, kind, shape, sizes, {**metadata, "plan": _digest(plan)})
        _put(work / REPORT, {"clips": report.clips, "skipped": report.skipped, "plan": _digest(plan)})
        records.check_free(out)
        work.rename(out)
        shutil.rmtree(out / "unfinished")


def _finished(out: Path, plan: dict) -> Report | None:
    """The report of finished records, if they are of this plan."""
    said = _json(out / REPORT)
    if said is None or said["plan"] != _digest(plan):
        return None
    return Report(out, said["clips"], tuple(said["skipped"]))


def _digest(plan: dict) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> Any:
    """A JSON file, or None where there is none, or one that was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _put(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees all of it or nothing."""
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # machines that share a directory may share a number
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(partial, path)
