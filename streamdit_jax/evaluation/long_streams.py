"""`streamdit evaluate long`: what is left of a prompt, and of the picture, after minutes of streaming.

A stream is read in windows of two seconds as it is made; of its frames only those of a contact sheet are kept.
"""

from typing import Any

import numpy as np

from streamdit_jax.data import roadtrip
from streamdit_jax.data.captions import full_caption
from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation import figures, metrics, probes
from streamdit_jax.evaluation.accuracy import (
    JUDGED_SECONDS,
    SHEET_ROWS,
    Wanted,
    against_renders,
    chance,
    mean_of,
    require_probe,
    shares,
    wanted,
)
from streamdit_jax.evaluation.batched import StreamBatch, groups
from streamdit_jax.pipeline import Pipeline

EARLY_SECONDS = 8.0  # what comes later is held against the stream's first eight seconds
SHEET_SECONDS = (0, 10, 60, 300)
MEASURES = {"brightness": metrics.brightness, "contrast": metrics.contrast, "motion": metrics.motion}
_CURVE_POINTS = 30


def long_streams(
    pipeline: Pipeline,
    prompts: int,
    seconds: float,
    seed: int,
    *,
    split: str = "held_out",
    batch: int = 8,
    sheet: str | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Streams of `seconds`, judged at 8 s and at their end. ConfigError for less than ten seconds.

    mean_at_8_seconds, mean_at_end: the share that the probe reads right in the two seconds before, averaged over
        JUDGED; `kept` is their ratio, and the two `accuracy_…` give each factor. From two minutes on, `first_minute`
        and `last_minute` average over the windows of theirs; `kept_last_minute` is the last ÷ the first, and
        `last_minute_over_8_seconds` the last ÷ what was read at 8 s.
    drift: of brightness and of contrast between the first and the last 8 s, in %: of the mean over streams, of the
        stream that drifts most, and of the mean of real renders over the same frames, whose landscape passes too.
    motion: in the first and last 8 s, against renders. curve: means over time.
    sheet: a picture of ten streams at 0, 10, 60 and 300 s, and of renders of their factors at the same times.
    """
    params, rate = require_probe(pipeline), pipeline.frame_rate
    window, early = round(JUDGED_SECONDS * rate), round(EARLY_SECONDS / JUDGED_SECONDS)
    count = int(seconds * rate) // window
    if count <= early:
        raise ConfigError(
            f"--seconds: a long stream has more than {EARLY_SECONDS:g} seconds and a window of {JUDGED_SECONDS:g}, "
            f"not {seconds:g}"
        )
    times = [time for time in SHEET_SECONDS if time * rate <= count * window]
    asked, parts, rows = wanted(split, prompts, seed), [], []
    for first, group, real in groups(asked, batch):
        streams = StreamBatch(
            pipeline,
            [full_caption(factors) for factors, _ in group],
            range(seed + first, seed + first + len(group)),
            **sampling,
        )
        part, kept = _watch(streams, params, group[:real], window, count, [int(time * rate) for time in times])
        parts.append(part)
        if sheet is not None and len(rows) < SHEET_ROWS:
            rows += [_row(*of_clip, frames, times, rate) for of_clip, frames in zip(group[:real], kept)]
    if sheet is not None:
        figures.contact_sheet(rows[:SHEET_ROWS], sheet, columns=2 * len(times))
    read = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    of_window = [{name: read[name][index] for name in roadtrip.FACTORS} for index in range(count)]
    at_8, at_end = of_window[early - 1], of_window[-1]
    return {
        "prompts": prompts,
        "split": split,
        "seconds": count * window / rate,
        "scheme": str(streams.scheme),
        "guidance": streams.guidance,
        "filling": streams.filling,
        "batch": min(batch, prompts),
        "mean_at_8_seconds": mean_of(at_8),
        "mean_at_end": mean_of(at_end),
        "kept": _ratio(mean_of(at_end), mean_of(at_8)),
        "accuracy_at_8_seconds": shares(at_8),
        "accuracy_at_end": shares(at_end),
        **_minutes(read, round(60 / JUDGED_SECONDS), count, mean_of(at_8)),
        **chance(),
        **_ends(read, asked, early, count, window),
        "curve": _curve(read, of_window, count),
    }


def _watch(streams: StreamBatch, params: dict, group: Wanted, window: int, count: int, moments: list[int]):
    """(figures [windows, streams] by factor and by measure; uint8 [streams, moments, height, width, 3])."""
    factors, kept, windows = [factors for factors, _ in group], [], []
    pending, made = [], 0
    last = count * window - 1
    while len(windows) < count:
        frames = next(streams)[: len(group)]
        inside = [min(moment, last) - made for moment in moments]
        kept += [frames[:, place].copy() for place in inside if 0 <= place < frames.shape[1]]
        made += frames.shape[1]
        pending.append(frames)
        if sum(chunk.shape[1] for chunk in pending) < window:
            continue
        pending = [np.concatenate(pending, axis=1)]
        while pending[0].shape[1] >= window and len(windows) < count:
            clips, pending[0] = pending[0][:, :window], pending[0][:, window:]
            measures = {name: measure(clips) for name, measure in MEASURES.items()}
            windows.append(probes.right(params, clips, factors) | measures)
    return {name: np.stack([of_window[name] for of_window in windows]) for name in windows[0]}, np.stack(kept, axis=1)


def _row(factors, clip, frames, times, rate):
    """One line of the sheet: a stream at some moments, then renders at the same."""
    real = [roadtrip.render(factors, clip, 1, start=int(time * rate))[0] for time in times]
    spelled = ", ".join(map(str, times))
    title = f"{full_caption(factors)}   |   the stream at {spelled} s   |   renders at {spelled} s"
    return title, np.concatenate([frames, np.stack(real)])


def _ratio(value: float, to: float) -> float | None:
    return round(value / to, 4) if to else None


def _minutes(read: dict, minute: int, count: int, at_8_seconds: float) -> dict[str, Any]:
    if count < 2 * minute:
        return {}
    of_first, of_last = (
        mean_of({name: read[name][part].ravel() for name in roadtrip.FACTORS})
        for part in (slice(0, minute), slice(count - minute, count))
    )
    return {
        "first_minute": of_first,
        "last_minute": of_last,
        "kept_last_minute": _ratio(of_last, of_first),
        "last_minute_over_8_seconds": _ratio(of_last, at_8_seconds),
    }


def _ends(read: dict, asked: Wanted, early: int, count: int, window: int) -> dict[str, Any]:
    """Drift between the first and the last 8 seconds, and motion in them, against renders of the same frames."""
    places = {"start": 0, "end": (count - early) * window}
    real = {name: [] for name in places}
    for factors, clip in asked:
        for name, start in places.items():
            frames = roadtrip.render(factors, clip, early * window, start=start)[None]
            real[name].append([measure(frames)[0] for measure in MEASURES.values()])
    renders = {
        name: dict(zip(MEASURES, np.array(values).T)) for name, values in real.items()
    }  # [end of the stream][measure] → [streams]
    streams = {
        "start": {name: read[name][:early].mean(0) for name in MEASURES},
        "end": {name: read[name][-early:].mean(0) for name in MEASURES},
    }

    def drift(name):
        first, last = streams["start"][name], streams["end"][name]
        each = 100 * (last / np.maximum(first, 1e-6) - 1)
        of_renders = 100 * (renders["end"][name].mean() / renders["start"][name].mean() - 1)
        return {
            "mean_percent": round(float(100 * (last.mean() / max(first.mean(), 1e-6) - 1)), 2),
            "largest_percent": round(float(each[np.abs(each).argmax()]), 2),
            "renders_percent": round(float(of_renders), 2),
        }

    return {
        "drift": {name: drift(name) for name in ("brightness", "contrast")},
        "motion": {name: against_renders([streams[name]["motion"]], [renders[name]["motion"]]) for name in places},
    }


def _curve(read: dict, of_window: list[dict], count: int) -> list[dict[str, float]]:
    points = []
    for part in np.array_split(np.arange(count), min(count, _CURVE_POINTS)):
        point = {"seconds": float((part[-1] + 1) * JUDGED_SECONDS)}
        point["mean"] = round(float(np.mean([mean_of(of_window[index]) for index in part])), 4)
        points.append(point | {name: round(float(read[name][part].mean()), 2) for name in MEASURES})
    return points
