"""`streamdit bench`: one report of what streaming, or training, takes on the machine at hand."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from streamdit_jax import flops, machine
from streamdit_jax.bench import profile, start, streaming, training
from streamdit_jax.bench.peaks import peaks
from streamdit_jax.bench.subject import Subject, resolve
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import DiT, unstack

MOST_SESSIONS = 64


def run(
    overrides: Sequence[str],
    model: str | None,
    *,
    what: str = "stream",
    precision: str = "auto",
    scheme: str | None = None,
    guidance: float | None = None,
    filling: str | None = None,
    seconds: float = 60.0,
    sessions: str = "1,2,4",
) -> dict[str, Any]:
    """One report as a JSON-able dict. what: "stream" | "train".

    overrides: `--config=FILE` and what it overrides, or none with a model. seconds: how long the loop runs end to end;
    its parts, and each number of sessions, run a quarter of that. Raises ConfigError, before a device is touched where
    that can be seen, for what cannot be measured.
    """
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--seconds: must be a positive number, not {seconds}")
    counts = _counts(sessions)
    subject = resolve(overrides, model, precision=precision, scheme=scheme, guidance=guidance, filling=filling)
    if what == "train":
        training.require_stage(subject)
        measured = _train(subject, seconds)
    else:
        measured = _stream(subject, seconds, counts)
    return {
        "what": what,
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "date": time.strftime("%Y-%m-%d"),
        **subject.describe(),
        **measured,
    }


def _memory() -> dict[str, Any]:
    """The peak so far: before the machine's peaks are measured, which take memory of their own."""
    peak, of = machine.peak_bytes()
    return {"peak_memory_bytes": peak, "peak_memory_of": of}


def _counts(sessions: str) -> list[int]:
    try:
        counts = [int(count) for count in sessions.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or max(counts) > MOST_SESSIONS:
        raise ConfigError(f"--sessions: numbers from 1 to {MOST_SESSIONS}, as 1,2,4, not {sessions!r}")
    return counts


def _stream(subject: Subject, seconds: float, counts: list[int]) -> dict[str, Any]:
    first = start.first_frames(subject.to_json())  # before this process holds the device
    part, notes = seconds / 4, []
    pipeline = subject.pipeline()
    report = streaming.denoising(pipeline, part) | streaming.decoding(pipeline, part / 4)
    report |= streaming.end_to_end(pipeline, seconds) | first | streaming.first_frame(pipeline) | _memory()
    best = peaks(subject.config.dit.compute_dtype)
    counted = flops.of_model(subject.config)
    forward = 1e-3 * report["forward_ms_median"]
    work = report["forwards_in_one"] * counted["total"]
    # The least that a forward moves: its parameters and the buffer, in and out; activations may stay on the chip.
    buffer_bytes = 4 * report["forwards_in_one"] * math.prod(subject.config.dit.latent)
    moved = subject.parameter_bytes()["dit"] + 2 * buffer_bytes
    report |= {
        "flops_per_forward": counted["total"],
        "flops_of": counted,
        "cost_analysis_flops": _cost_analysis(subject),
        "peaks": {name: round(value) for name, value in best.items()},
        "share_of_peak": {
            "matmul": round(work / forward / best["matmul_flops_per_second"], 4),
            "copy": round(moved / forward / best["copy_bytes_per_second"], 4),
        },
        **streaming.prompt_latency(pipeline),
        **streaming.recompilations(pipeline),
        "sessions": streaming.sessions(pipeline, counts, part),
    }
    kernels = profile.kernel_times(streaming.one_forward(pipeline))
    if kernels is None:
        notes.append(f"kernels: left out, for the profiler gives no kernels of a {jax.default_backend()}")
    else:
        report["kernels"] = kernels
    if subject.model is None:
        notes.append("first_frame_parts: weights are made at random in the new process, not read from disk")
    if report["forwards_in_one"] == 2:
        notes.append("forward_ms: a guided micro step, two forwards in one batch; flops_per_forward counts one of them")
    notes.append("flops_per_forward: products only, the text's keys and values taken as cached for a prompt")
    return report | {"notes": notes}


def _cost_analysis(subject: Subject) -> float | None:
    """XLA's own count for one forward of one stream, before it is optimised: elementwise work is counted in, kernels
    that are not XLA's are not. None where it does not say. Nothing is computed.
    """
    config, of_text = subject.config, []
    for of_encoder in config.text:
        tokens = flops.text_tokens(config) // len(config.text)
        mask = jax.ShapeDtypeStruct((1, tokens), bool)
        of_text.append((jax.ShapeDtypeStruct((1, tokens, of_encoder.width), jnp.float32), mask))
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dit.compute_dtype),
        jax.eval_shape(unstack, subject.shapes()["dit"]),
    )
    latents = jax.ShapeDtypeStruct((1, *config.dit.latent), jnp.float32)
    levels = jax.ShapeDtypeStruct((1, config.dit.latent[0]), jnp.float32)
    lowered = jax.jit(DiT(config.dit).apply).lower({"params": params}, latents, levels, tuple(of_text))
    cost = lowered.cost_analysis()
    return float(cost["flops"]) if cost and "flops" in cost else None


def _train(subject: Subject, seconds: float) -> dict[str, Any]:
    report = training.training_step(subject, seconds) | _memory()
    best = peaks(subject.config.dit.compute_dtype)
    rate = report["flops_per_step"] / (1e-3 * report["step_ms_median"])
    report |= {"mfu": round(rate / best["matmul_flops_per_second"], 4)}
    notes = ["mfu: on one device; text encoders, whose products are not counted, are part of the step"]
    if jax.device_count() > 1:
        notes.append(f"one of {jax.device_count()} devices was used")
    return report | {"peaks": {name: round(value) for name, value in best.items()}, "notes": notes}
