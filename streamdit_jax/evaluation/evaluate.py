"""What a roadtrip model is worth, in numbers: the autoencoder's fidelity, and what the probe sees in streams of
held-out prompts.

`streamdit evaluate autoencoder` and `streamdit evaluate streams` print one of these reports.
"""

import time
from typing import Any

import numpy as np

from streamdit_jax.data import roadtrip
from streamdit_jax.data.captions import full_caption
from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation import figures, probes
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.pipeline import Pipeline, load
from streamdit_jax.training.run import hardware, versions

CLIP_FRAMES = 64
JUDGED_SECONDS = 2.0  # the end of a stream that the probe looks at
SHEET_ROWS = 10
JUDGED = ("vehicle", "colour", "scenery", "time", "weather", "direction")


def run(
    what: str,
    model: str,
    *,
    prompts: int = 100,
    seconds: float = 8.0,
    scheme: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    sheet: str | None = None,
) -> dict[str, Any]:
    """One report as a JSON-able dict. what: "autoencoder" | "streams". Raises ConfigError, CheckpointError for what
    it is given.
    """
    if prompts < 1:
        raise ConfigError(f"--prompts: at least 1, not {prompts}")
    pipeline = load(model)
    started = time.perf_counter()
    if what == "autoencoder":
        report = autoencoder_fidelity(pipeline, prompts, seed, sheet)
    else:
        report = stream_accuracy(pipeline, prompts, seconds, seed, scheme=scheme, guidance=guidance, sheet=sheet)
    return {
        "what": what,
        "model": model,
        **report,
        "seed": seed,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _held_out(count: int, seed: int) -> list[tuple[roadtrip.Factors, int]]:
    """Factor combinations that training never saw, each with a seed for its render."""
    return [roadtrip.clip_factors(index, seed, "held_out") for index in range(count)]


def autoencoder_fidelity(pipeline: Pipeline, clips: int, seed: int, sheet: str | None = None) -> dict[str, Any]:
    """PSNR in dB of held-out renders, coded and decoded whole: mean over clips of 10·log10(255² / mean squared error).

    Also by scenery, time and weather, and the worst clip, because a mean hides what is illegible.
    """
    scores, factors, rows = [], [], []
    for of_clip, clip_seed in _held_out(clips, seed):
        video = roadtrip.render(of_clip, clip_seed, CLIP_FRAMES, size=pipeline.config.data.height)
        latents = pipeline.encode_video(video[None].astype(np.float32) / 127.5 - 1)
        decoded = np.asarray(pipeline.decode(latents, None)[0])[0]
        error = np.mean(np.square(decoded.astype(np.float64) - video))
        scores.append(10 * np.log10(255**2 / error))
        factors.append(of_clip)
        if len(rows) < SHEET_ROWS:
            rows += [(f"{full_caption(of_clip)}: rendered", video), (f"decoded, {scores[-1]:.1f} dB", decoded)]
    if sheet is not None:
        figures.contact_sheet(rows, sheet)
    scores = np.array(scores)

    def by(factor):
        values = {value: scores[[getattr(f, factor) == value for f in factors]] for value in roadtrip.FACTORS[factor]}
        return {value: round(float(of_value.mean()), 2) for value, of_value in values.items() if len(of_value)}

    return {
        "clips": clips,
        "psnr_mean": round(float(scores.mean()), 2),
        "psnr_worst": round(float(scores.min()), 2),
        "psnr_by": {factor: by(factor) for factor in ("scenery", "time", "weather")},
    }


def stream_accuracy(
    pipeline: Pipeline,
    prompts: int,
    seconds: float,
    seed: int,
    *,
    scheme: PartitionScheme | str | None = None,
    guidance: float | None = None,
    sheet: str | None = None,
) -> dict[str, Any]:
    """The share of held-out prompts whose factors the probe reads in the last two seconds of a stream of `seconds`.

    Prompts name every factor. `mean` is over the factors of `JUDGED`; `chance` is what guessing would reach. `motion`
    is the mean absolute difference of neighbouring frames, in grey levels, beside that of real renders: a frozen
    stream has none.
    """
    params = probes.load_probe()
    judged = int(JUDGED_SECONDS * pipeline.frame_rate)
    total = max(judged, int(seconds * pipeline.frame_rate))
    ends, real, rows, wanted = [], [], [], _held_out(prompts, seed)
    stream = None
    for index, (factors, clip_seed) in enumerate(wanted):
        prompt = full_caption(factors)
        stream = pipeline.stream(prompt, seed + index, scheme=scheme, guidance=guidance)
        frames = []
        while sum(map(len, frames)) < total:
            frames.append(next(stream))
        video = np.concatenate(frames)[:total]
        ends.append(video[-judged:])
        real.append(roadtrip.render(factors, clip_seed, judged, size=pipeline.config.data.height))
        if sheet is not None and index < SHEET_ROWS:
            rows.append((prompt, video))
    if sheet is not None:
        figures.contact_sheet(rows, sheet)
    seen = probes.classify(params, np.stack(ends))
    accuracy = {
        name: float(np.mean([value == getattr(f, name) for value, (f, _) in zip(seen[name][0], wanted)]))
        for name in roadtrip.FACTORS
    }

    def motion(clips):
        return round(float(np.mean([np.abs(np.diff(c.astype(np.float32), axis=0)).mean() for c in clips])), 2)

    return {
        "prompts": prompts,
        "seconds": total / pipeline.frame_rate,
        "scheme": str(stream.scheme),
        "guidance": stream.guidance,
        "mean": round(float(np.mean([accuracy[name] for name in JUDGED])), 4),
        "chance": round(float(np.mean([1 / len(roadtrip.FACTORS[name]) for name in JUDGED])), 4),
        "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        "chance_of": {name: round(1 / len(values), 4) for name, values in roadtrip.FACTORS.items()},
        "motion": {"streams": motion(ends), "renders": motion(real)},
    }
