"""`streamdit evaluate samplers`: teachers, students and schemes side by side, judged on the same prompts in one run."""

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from streamdit_jax.data import roadtrip
from streamdit_jax.data.captions import full_caption
from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation import metrics, probes
from streamdit_jax.evaluation.accuracy import (
    JUDGED_SECONDS,
    Wanted,
    against_renders,
    chance,
    join,
    mean_of,
    require_probe,
    shares,
    total_frames,
    wanted,
)
from streamdit_jax.evaluation.batched import StreamBatch, videos
from streamdit_jax.partition import FILLINGS
from streamdit_jax.pipeline import Pipeline, load

FEATURE_WINDOWS = 4  # one-second windows of each clip's end: the same number for a stream and for one short clip
TIMED_CHUNKS = 4
_ROW = re.compile(rf"(.+):([KN][^:]*):([^:]+?)(?::({'|'.join(FILLINGS)}))?")


class Row(NamedTuple):
    """One line of the table."""

    model: str
    scheme: str
    guidance: float
    filling: str | None


def parse_row(text: str) -> Row:
    """MODEL:SCHEME:GUIDANCE[:FILLING], such as roadtrip:N8c2s16:2 or runs/student:N8c2s1:1:ramp. ConfigError
    otherwise.
    """
    match = _ROW.fullmatch(text)
    try:
        model, scheme, guidance, filling = match.groups()
        return Row(model, scheme, float(guidance), filling)
    except (AttributeError, ValueError):
        raise ConfigError(
            f"--row: {text!r} is not MODEL:SCHEME:GUIDANCE[:FILLING], such as roadtrip:N8c2s16:2:uniform"
        ) from None


def compare(
    rows: list[str],
    prompts: int,
    seconds: float,
    seed: int,
    *,
    split: str = "held_out",
    batch: int = 8,
    table: str | None = None,
) -> dict[str, Any]:
    """Judges every row at `seconds` on the same prompts and seeds; `table` names a Markdown file to write.

    mean, accuracy: as in `stream_accuracy`; relative_to_first is a row's mean ÷ the first row's.
    fvd_like: the Fréchet distance between the features of streams and of real renders of the same factors, over the
        last four one-second windows of each clip. Features are `probes.features`: 48 of the pictures, 48 of motion. It
        is no FVD of the literature, whose network has seen other videos. `fvd_like_of_renders` is the distance of
        renders to renders of the same factors and other seeds: the least that a perfect model would reach on average.
    flicker, motion: over the last two seconds, against renders.
    frames_per_second: of one stream alone, in this run: denoising, decoding, and both one after the other (`bench`
        measures them overlapped); forwards_per_latent_frame counts the two of guidance.

    Raises ConfigError before any stream is made for rows that cannot be sampled.
    """
    parsed = [parse_row(text) for text in rows]
    if not parsed:
        raise ConfigError("--row: give at least one MODEL:SCHEME:GUIDANCE[:FILLING]")
    if table is not None and not Path(table).parent.is_dir():
        raise ConfigError(f"--table: there is no directory {Path(table).parent} to write {Path(table).name} to")
    pipelines = {row.model: load(row.model) for row in dict.fromkeys(parsed)}
    totals = []
    for row in parsed:
        params = require_probe(pipelines[row.model])
        totals.append(total_frames(pipelines[row.model], row.scheme, seconds))
    least = FEATURE_WINDOWS * probes.MIN_FRAMES
    if min(totals) < least:
        raise ConfigError(f"--seconds: {least} frames of a stream are judged, so at least 4 seconds, not {seconds:g}")
    if prompts < 2:
        raise ConfigError(f"--prompts: a Fréchet distance needs at least 2 of them, not {prompts}")

    asked = wanted(split, prompts, seed)
    # Windows of renders end where the longest streams do, so that the road is as far travelled.
    of_renders = _measure(params, _renders(asked, max(totals)), asked)
    elsewhere = [(factors, clip ^ 1) for factors, clip in asked]
    again = np.concatenate([probes.features(params, windows(clips)) for clips in _renders(elsewhere, max(totals))])
    lines = []
    for row, total in zip(parsed, totals):
        lines.append(_judge(pipelines[row.model], row, params, asked, total, seed, batch, of_renders))
        lines[-1]["relative_to_first"] = round(lines[-1]["mean"] / lines[0]["mean"], 4) if lines[0]["mean"] else None
    report = {
        "prompts": prompts,
        "split": split,
        "batch": min(batch, prompts),
        "fvd_like_of_renders": round(metrics.frechet_distance(of_renders["features"], again), 3),
        **chance(),
        "rows": lines,
    }
    if table is not None:
        try:
            Path(table).write_text(markdown(report), encoding="utf-8")
        except OSError as mistake:
            raise ConfigError(f"--table: {table} cannot be written ({mistake.strerror})") from None
    return report


def windows(clips: np.ndarray) -> np.ndarray:
    """The last FEATURE_WINDOWS windows of a second of each clip: uint8 [clips · FEATURE_WINDOWS, 16, 64, 64, 3]."""
    ends = clips[:, -FEATURE_WINDOWS * probes.MIN_FRAMES :]
    return ends.reshape(-1, probes.MIN_FRAMES, *clips.shape[2:])


def _renders(asked: Wanted, total: int, group: int = 8):
    """The ends of real clips, some at a time."""
    frames = FEATURE_WINDOWS * probes.MIN_FRAMES
    for first in range(0, len(asked), group):
        some = asked[first : first + group]
        yield np.stack([roadtrip.render(factors, clip, frames, total - frames) for factors, clip in some])


def _measure(params: dict, clips_by_batch, asked: Wanted) -> dict[str, Any]:
    """Right factors, features, flicker and motion of clips that come batch by batch."""
    judged, first = round(JUDGED_SECONDS * roadtrip.FRAME_RATE), 0
    right, features, flicker, motion = [], [], [], []
    for clips in clips_by_batch:
        ends = clips[:, -judged:]
        right.append(probes.right(params, ends, [factors for factors, _ in asked[first : first + len(clips)]]))
        features.append(probes.features(params, windows(clips)))
        flicker.append(metrics.flicker(ends))
        motion.append(metrics.motion(ends))
        first += len(clips)
    return {"right": join(right), "features": np.concatenate(features), "flicker": flicker, "motion": motion}


def _judge(pipeline: Pipeline, row: Row, params, asked, total, seed, batch, of_renders) -> dict[str, Any]:
    sampling = {"scheme": row.scheme, "guidance": row.guidance, "filling": row.filling}
    captions = [full_caption(factors) for factors, _ in asked]
    made = (clips for _, clips, _ in videos(pipeline, captions, total, seed, batch, **sampling))
    found = _measure(params, made, asked)
    scheme = pipeline.scheme(row.scheme)
    return {
        "model": row.model,
        "scheme": str(scheme),
        "guidance": row.guidance,
        "filling": row.filling or pipeline.config.sampling.filling,
        "seconds": total / pipeline.frame_rate,
        "steps": scheme.total_steps,
        "forwards_per_latent_frame": scheme.micro_steps / scheme.chunk_size * (1 if row.guidance == 1 else 2),
        "mean": mean_of(found["right"]),
        "accuracy": shares(found["right"]),
        "fvd_like": round(metrics.frechet_distance(found["features"], of_renders["features"]), 3),
        "flicker": against_renders(found["flicker"], of_renders["flicker"]),
        "motion": against_renders(found["motion"], of_renders["motion"]),
        "frames_per_second": _speed(StreamBatch(pipeline, captions[:1], [seed], **sampling)),
    }


def _speed(stream: StreamBatch) -> dict[str, float]:
    """One stream's frames per second after what is compiled has been compiled."""
    next(stream)  # fills the buffer, and compiles
    # With references the first frames are a group of another size, whose decoding compiles apart.
    next(stream)
    stream.seconds = dict.fromkeys(stream.seconds, 0.0)
    began, frames = time.perf_counter(), 0
    for _ in range(TIMED_CHUNKS):
        frames += next(stream).shape[1]
    whole = time.perf_counter() - began
    return {
        "denoise": round(frames / stream.seconds["forward"], 2),
        "decode": round(frames / stream.seconds["decode"], 2),
        "both": round(frames / whole, 2),
        "on": jax.default_backend(),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    head = ["model", "scheme", "guidance", "steps", "probe", "of the first", "FVD-like", "flicker ÷ renders"]
    head += ["motion ÷ renders", "frames/s", "denoising", "decoding"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        filling = f" ({row['filling']})" if row["filling"] != "uniform" else ""
        relative = "" if row["relative_to_first"] is None else f"{row['relative_to_first']:.0%}"
        speed = row["frames_per_second"]
        cells = [
            Path(row["model"]).name if "/" in row["model"] else row["model"],
            row["scheme"] + filling,
            f"{row['guidance']:g}",
            str(row["steps"]),
            f"{row['mean']:.1%}",
            relative,
            f"{row['fvd_like']:.2f}",
            f"{row['flicker']['ratio']:.2f}",
            f"{row['motion']['ratio']:.2f}",
            *(f"{speed[part]:.1f}" for part in ("both", "denoise", "decode")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{report['prompts']} prompts of {report['split'].replace('_', '-')} combinations. Guessing reaches "
        f"{report['chance']:.1%}; renders of other seeds have an FVD-like distance of "
        f"{report['fvd_like_of_renders']:.2f}.",
        "",
    ]
    return "\n".join(lines)
