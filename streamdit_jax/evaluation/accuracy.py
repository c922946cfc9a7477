"""`streamdit evaluate streams`: the share of prompts whose factors a probe reads in streams of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from streamdit_jax.data import roadtrip
from streamdit_jax.data.captions import full_caption
from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation import figures, metrics, probes
from streamdit_jax.evaluation.batched import videos
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.pipeline import Pipeline

JUDGED = ("vehicle", "colour", "scenery", "time", "weather", "direction")  # the factors of the mean; speed is apart
JUDGED_SECONDS = 2.0  # the end of a stream that the probe looks at
SHEET_ROWS = 10
SPLITS = {"held_out": ("held_out",), "seen": ("seen",), "both": ("held_out", "seen")}
_SEEN_FROM = 1_000_000  # clips of seen combinations that are judged against were not rendered for training

Wanted = list[tuple[roadtrip.Factors, int]]


def wanted(split: str, count: int, seed: int) -> Wanted:
    """`count` combinations, each with a seed for its render: "held_out", which training never saw, or "seen"."""
    if split == "held_out":
        return [roadtrip.clip_factors(index, seed, "held_out") for index in range(count)]
    return [roadtrip.clip_factors(_SEEN_FROM + index, seed, "train") for index in range(count)]


def require_probe(pipeline: Pipeline) -> dict:
    """The probe's parameters. ConfigError where it cannot read what the model makes."""
    data = pipeline.config.data
    if (data.height, data.width, data.frame_rate) != (64, 64, roadtrip.FRAME_RATE):
        raise ConfigError(
            f"--model: the probe reads 64×64 pixels at {roadtrip.FRAME_RATE:g} frames a second, "
            f"not {data.height}×{data.width} at {data.frame_rate:g}"
        )
    return probes.load_probe()


def total_frames(pipeline: Pipeline, scheme: PartitionScheme | str | None, seconds: float) -> int:
    """Frames until a stream is judged: `seconds` of them, at least JUDGED_SECONDS.

    With one chunk and no references (N = 1, K = 0) nothing carries on from buffer to buffer: that is ordinary
    text-to-video, and its one clip of B latent frames is judged, however many seconds were asked for.
    """
    scheme, rate = pipeline.scheme(scheme), pipeline.frame_rate
    frames = max(round(JUDGED_SECONDS * rate), int(seconds * rate))
    if scheme.num_chunks == 1 and not scheme.num_references:
        clip = scheme.buffer_size * pipeline.config.tae.compression[0]
        if clip < round(JUDGED_SECONDS * rate):
            raise ConfigError(f"--scheme: a clip of {scheme} has {clip} frames; {JUDGED_SECONDS:g} seconds are judged")
        frames = min(frames, clip)
    return frames


def join(parts: Sequence[Mapping[str, Bool[np.ndarray, "b"]]]) -> dict[str, Bool[np.ndarray, "n"]]:
    """What `probes.right` found in several batches, as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in roadtrip.FACTORS}


def mean_of(right: Mapping[str, Bool[np.ndarray, "n"]]) -> float:
    """The share that is right, averaged over the factors of JUDGED."""
    return round(float(np.mean([np.mean(right[name]) for name in JUDGED])), 4)


def shares(right: Mapping[str, Bool[np.ndarray, "n"]]) -> dict[str, float]:
    """The share that is right, for each factor."""
    return {name: round(float(np.mean(of_factor)), 4) for name, of_factor in right.items()}


def chance() -> dict[str, Any]:
    """What guessing would reach: `chance`, to hold against a mean over JUDGED, and `chance_of` each factor."""
    of_factor = {name: 1 / len(values) for name, values in roadtrip.FACTORS.items()}
    return {
        "chance": round(float(np.mean([of_factor[name] for name in JUDGED])), 4),
        "chance_of": {name: round(value, 4) for name, value in of_factor.items()},
    }


def against_renders(streams: Sequence[np.ndarray], renders: Sequence[np.ndarray]) -> dict[str, float]:
    """A figure of `metrics` for streams and for renders of the same factors: its means, and the streams' ÷ the
    renders'.
    """
    of_streams, of_renders = (float(np.mean(np.concatenate(values))) for values in (streams, renders))
    return {
        "streams": round(of_streams, 3),
        "renders": round(of_renders, 3),
        "ratio": round(of_streams / of_renders, 4) if of_renders else None,
    }


def stream_accuracy(
    pipeline: Pipeline,
    prompts: int,
    seconds: float,
    seed: int,
    *,
    split: str = "both",
    batch: int = 8,
    sheet: str | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """The share of prompts whose factors the probe reads in the last two seconds of streams of `seconds`.

    Prompts name every factor. The figures are of `prompts` combinations that training never saw; those of as many seen
    combinations lie under "seen" (split "seen" gives them alone, "held_out" leaves them out). `mean` is over JUDGED;
    `motion` is the mean absolute difference of neighbouring frames in grey levels, beside that of real renders.
    sampling: scheme, guidance and filling, as `Pipeline.stream` takes them.
    """
    params, rows, report = require_probe(pipeline), [], {}
    total = total_frames(pipeline, sampling.get("scheme"), seconds)
    for place, name in enumerate(SPLITS[split]):
        figures_of = _judge(pipeline, params, wanted(name, prompts, seed), total, seed, batch, sampling, rows)
        report |= {"split": name, **figures_of} if place == 0 else {name: figures_of}
    if sheet is not None:
        figures.contact_sheet(rows[:SHEET_ROWS], sheet)
    return {**report, **chance(), "seconds": total / pipeline.frame_rate, "batch": min(batch, prompts)}


def _judge(pipeline, params, asked: Wanted, total: int, seed: int, batch: int, sampling, rows: list) -> dict[str, Any]:
    judged = round(JUDGED_SECONDS * pipeline.frame_rate)
    right, of_streams, of_renders, streams = [], [], [], None
    captions = [full_caption(factors) for factors, _ in asked]
    for first, made, streams in videos(pipeline, captions, total, seed, batch, **sampling):  # noqa: B007
        group = asked[first : first + len(made)]
        ends = made[:, -judged:]
        right.append(probes.right(params, ends, [factors for factors, _ in group]))
        of_streams.append(metrics.motion(ends))
        real = np.stack([roadtrip.render(factors, clip, judged, total - judged) for factors, clip in group])
        of_renders.append(metrics.motion(real))
        if len(rows) < SHEET_ROWS:
            rows += [(full_caption(factors), video) for (factors, _), video in zip(group, made)]
    right = join(right)
    return {
        "prompts": len(asked),
        "scheme": str(streams.scheme),
        "guidance": streams.guidance,
        "filling": streams.filling,
        "mean": mean_of(right),
        "accuracy": shares(right),
        "motion": against_renders(of_streams, of_renders),
    }
