"""`streamdit bench`: one report of what streaming, or training, takes on the machine at hand."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from streamdit_jax import flops, machine, roofline
from streamdit_jax.bench import compare, profile, start, streaming, training
from streamdit_jax.bench.compilations import Compilations
from streamdit_jax.bench.peaks import peaks, product_rate
from streamdit_jax.bench.subject import Subject, resolve
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import DiT, unstack
from streamdit_jax.models.linear import FLOAT8
from streamdit_jax.pipeline import Pipeline
from streamdit_jax.weights import converted_type

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
    peer: bool = False,
) -> dict[str, Any]:
    """One report as a JSON-able dict. what: "stream" | "forward" | "train".

    overrides: `--config=FILE` and what it overrides, or none with a model. seconds: how long the loop runs end to end;
    its parts, and each number of sessions, run a quarter of that. peer: also time a PyTorch model of the same shape
    (`compare`). Raises ConfigError, before a device is touched where
    that can be seen, for what cannot be measured.
    """
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--seconds: must be a positive number, not {seconds}")
    counts = _counts(sessions)
    subject = resolve(overrides, model, precision=precision, scheme=scheme, guidance=guidance, filling=filling)
    if peer:
        compare.require_peer(what)
    if what == "train":
        training.require_stage(subject)
        measured = _train(subject, seconds)
    elif what == "forward":
        measured = _forward(subject.of_one_layer_text(), seconds, peer)
    else:
        measured = _stream(subject, seconds, counts, peer)
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


def _stream(subject: Subject, seconds: float, counts: list[int], peer: bool) -> dict[str, Any]:
    of_peer = compare.peer(subject.config) if peer else None  # both before this process holds the device
    first = start.first_frames(subject.to_json())
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
    report |= _against_roofline(subject, pipeline, best, notes)
    if of_peer is not None:
        report |= {"peer": of_peer, "attention": compare.own_attention(subject.config)}
    if subject.model is None:
        notes.append("first_frame_parts: weights are made at random in the new process, not read from disk")
    if report["forwards_in_one"] == 2:
        notes.append("forward_ms: a guided micro step, two forwards in one batch; flops_per_forward counts one of them")
    notes.append("flops_per_forward: products only, the text's keys and values taken as cached for a prompt")
    return report | {"notes": notes}


def _forward(subject: Subject, seconds: float, peer: bool) -> dict[str, Any]:
    """The transformer alone: its forwards, their kernels, and what they would take at least. No decoder, no new
    processes; minutes less.
    """
    of_peer = compare.peer(subject.config) if peer else None
    notes = ["weights: random text encoders have one layer; they are no part of what is measured"]
    pipeline = subject.pipeline()
    with Compilations() as compilations:
        report = streaming.denoising(pipeline, seconds) | _memory()
    best, counted = peaks(subject.config.dit.compute_dtype), flops.of_model(subject.config)
    rate = report["forwards_in_one"] * counted["total"] / (1e-3 * report["forward_ms_median"])
    report |= {
        "compile_seconds": round(compilations.seconds, 2),
        "flops_per_forward": counted["total"],
        "flops_of": counted,
        "peaks": {name: round(value) for name, value in best.items()},
        "share_of_peak": {"matmul": round(rate / best["matmul_flops_per_second"], 4)},
        **_against_roofline(subject, pipeline, best, notes),
    }
    if of_peer is not None:
        report |= {"peer": of_peer, "attention": compare.own_attention(subject.config)}
    return report | {"notes": notes if subject.model is None else notes[1:]}


def _against_roofline(subject: Subject, pipeline: Pipeline, best: dict[str, float], notes: list[str]) -> dict[str, Any]:
    """{"roofline", "kernels"}: what can be had of them; `notes` gets what cannot, and why."""
    found: dict[str, Any] = {}
    bounds = _bounds(subject, best)
    if bounds is None:
        notes.append("roofline: left out, for a CPU multiplies no float8")
    else:
        found["roofline"] = bounds
    kernels = profile.kernel_times(streaming.one_forward(pipeline))
    if kernels is None:
        notes.append(f"kernels: left out, for the profiler gives no kernels of a {jax.default_backend()}")
    else:
        found["kernels"] = kernels | {"against_roofline": profile.against(kernels, bounds["forward"])}
    return found


def _bounds(subject: Subject, best: dict[str, float]) -> dict[str, Any] | None:
    """`roofline.streaming` at rates that were measured in this run: what forward and decoder would take at least."""
    dtype, quantised = str(subject.config.dit.compute_dtype), subject.precision == "fp8"
    if quantised and jax.default_backend() == "cpu":
        return None
    measured = {"float32": None, "bfloat16": None, dtype: best["matmul_flops_per_second"], "fp8": None}
    if dtype != "float32":  # the decoder's
        measured["float32"] = product_rate(jnp.dtype("float32"))
    if quantised:
        measured["fp8"] = product_rate(FLOAT8)
    rates = roofline.Rates(**measured, bandwidth=best["copy_bytes_per_second"], source="measured in this run")
    return roofline.streaming(subject.config, rates, subject.precision)


def _cost_analysis(subject: Subject) -> float | None:
    """XLA's own count for one forward of one stream, before it is optimised: elementwise work is counted in, kernels
    that are not XLA's are not. None where it does not say. Nothing is computed.
    """
    config, of_text = subject.config, []
    for of_encoder in config.text:
        tokens = flops.text_tokens(config) // len(config.text)
        mask = jax.ShapeDtypeStruct((1, tokens), bool)
        of_text.append((jax.ShapeDtypeStruct((1, tokens, of_encoder.width), jnp.float32), mask))

    def of_streaming(path, leaf):
        dtype = converted_type(path[-1].key, leaf.dtype, config.dit.compute_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    params = jax.tree_util.tree_map_with_path(of_streaming, jax.eval_shape(unstack, subject.shapes()["dit"]))
    latents = jax.ShapeDtypeStruct((1, *config.dit.latent), jnp.float32)
    levels = jax.ShapeDtypeStruct((1, config.dit.latent[0]), jnp.float32)
    lowered = jax.jit(DiT(config.dit).apply).lower({"params": params}, latents, levels, tuple(of_text))
    cost = lowered.cost_analysis()
    return float(cost["flops"]) if cost and "flops" in cost else None


def _train(subject: Subject, seconds: float) -> dict[str, Any]:
    stage = subject.config.training.flow_matching
    if not stage.train_text:
        subject = subject.of_one_layer_text()
    report = training.training_step(subject, seconds) | _memory()
    best = peaks(subject.config.dit.compute_dtype)
    rate = report["flops_per_step"] / (1e-3 * report["step_ms_median"])
    report |= {"mfu": round(rate / best["matmul_flops_per_second"], 4)}
    notes = ["mfu: on one device; text encoders, whose products are not counted, are part of the step"]
    if not stage.train_text:
        notes.append(
            "weights: frozen text encoders have one layer here; a run may store what they make of its captions"
        )
    if jax.device_count() > 1:
        notes.append(f"one of {jax.device_count()} devices was used")
    return report | {"peaks": {name: round(value) for name, value in best.items()}, "notes": notes}
