"""What a roadtrip model is worth, in numbers: `streamdit evaluate WHAT` prints one of these reports.

autoencoder   PSNR of held-out renders, coded and decoded
streams       what a probe reads in streams of prompts                                       accuracy.py
long          … after a minute, or five, and how far the picture has drifted                 long_streams.py
switch        … after the prompt was changed                                                 switches.py
samplers      teachers, students and schemes side by side                                    samplers.py
"""

import time
from typing import Any

import numpy as np

from streamdit_jax.data import roadtrip
from streamdit_jax.data.captions import full_caption
from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation import figures
from streamdit_jax.evaluation.accuracy import SHEET_ROWS, SPLITS, stream_accuracy, wanted
from streamdit_jax.evaluation.long_streams import long_streams
from streamdit_jax.evaluation.samplers import compare
from streamdit_jax.evaluation.switches import switches
from streamdit_jax.machine import hardware, versions
from streamdit_jax.pipeline import Pipeline, load

CLIP_FRAMES = 64
# Of each report: prompts, seconds, and the combinations it judges, unless given.
DEFAULTS = {
    "autoencoder": (100, 4.0, "held_out"),
    "streams": (100, 8.0, "both"),
    "long": (10, 60.0, "held_out"),
    "switch": (70, 8.0, "held_out"),
    "samplers": (50, 8.0, "held_out"),
}


def run(
    what: str,
    model: str,
    *,
    prompts: int | None = None,
    seconds: float | None = None,
    scheme: str | None = None,
    guidance: float | None = None,
    filling: str | None = None,
    refill: str | None = None,
    split: str | None = None,
    batch: int = 8,
    seed: int = 0,
    sheet: str | None = None,
    rows: list[str] | None = None,
    table: str | None = None,
) -> dict[str, Any]:
    """One report as a JSON-able dict. what: a name in DEFAULTS. Raises ConfigError, CheckpointError for what it is
    given.
    """
    prompts, seconds, split = (
        default if given is None else given for given, default in zip((prompts, seconds, split), DEFAULTS[what])
    )
    if prompts < 1:
        raise ConfigError(f"--prompts: at least 1, not {prompts}")
    if batch < 1:
        raise ConfigError(f"--batch: at least 1 stream, not {batch}")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--seconds: must be a positive number, not {seconds}")
    if split not in SPLITS or (split == "both" and what != "streams"):
        raise ConfigError(f"--split: held_out or seen; both is for streams, not for {what}")
    if not 0 <= seed < 2**31:
        raise ConfigError(f"--seed: a whole number from 0 to below 2³¹, not {seed}")
    if sheet is not None:
        figures.require_writable(sheet, "--sheet")
    sampling = {"scheme": scheme, "guidance": guidance, "filling": filling}
    for option, given, reports in (
        ("--row", rows, ("samplers",)),
        ("--table", table, ("samplers",)),
        ("--sheet", sheet, ("autoencoder", "streams", "long")),
        *((f"--{name}", value, ("streams", "long", "switch")) for name, value in sampling.items()),
        ("--refill", refill, ("switch",)),
    ):
        if given not in (None, []) and what not in reports:
            raise ConfigError(f"{option}: is for {', '.join(reports)}, not for {what}")
    started = time.perf_counter()
    common = {"split": split, "batch": batch}
    if what == "samplers":
        report = compare(rows or [], prompts, seconds, seed, table=table, **common)
    else:
        pipeline = load(model)
        if what == "autoencoder":
            report = autoencoder_fidelity(pipeline, prompts, seed, sheet, split)
        elif what == "streams":
            report = stream_accuracy(pipeline, prompts, seconds, seed, sheet=sheet, **common, **sampling)
        elif what == "long":
            report = long_streams(pipeline, prompts, seconds, seed, sheet=sheet, **common, **sampling)
        else:
            report = switches(pipeline, prompts, seconds, seed, refill=refill, **common, **sampling)
        report = {"model": model, **report}
    return {
        "what": what,
        **report,
        "seed": seed,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def autoencoder_fidelity(
    pipeline: Pipeline, clips: int, seed: int, sheet: str | None = None, split: str = "held_out"
) -> dict[str, Any]:
    """PSNR in dB of a split's renders, coded and decoded whole: mean over clips of 10·log10(255² / mean squared error).

    Also by scenery, time and weather, and the worst clip, because a mean hides what is illegible.
    """
    scores, factors, rows = [], [], []
    for of_clip, clip_seed in wanted(split, clips, seed):
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
        "split": split,
        "psnr_mean": round(float(scores.mean()), 2),
        "psnr_worst": round(float(scores.min()), 2),
        "psnr_by": {factor: by(factor) for factor in ("scenery", "time", "weather")},
    }
