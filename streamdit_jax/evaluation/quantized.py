"""What quantising costs: the quantised model beside the one that it was made from, which runs in float32.

    alone         relative error of a projection's output for the input that the float32 model gives it
    in_model      the same with the input that the other model's layers before it made
    velocity      relative error of the whole forward, on the states of the float32 model's streams
    one_forward   PSNR of the frames that leave after one forward from the same state, with the same decoder state
    stream        PSNR of streams of the same prompts and seeds that run apart from the first forward on

A relative error is √(Σ‖other − float32‖² / Σ‖float32‖²) over all forwards; a PSNR, in dB, is 10·log10(255² / mean
squared error) of the uint8 frames, the error averaged over what is named. bfloat16's own error, in the same measures,
is the yardstick.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from streamdit_jax import stream as streaming
from streamdit_jax import weights
from streamdit_jax.config import Config, from_mapping
from streamdit_jax.errors import ConfigError
from streamdit_jax.machine import hardware, versions
from streamdit_jax.models.dit import DiT, DiTConfig
from streamdit_jax.models.linear import Weights, multiply
from streamdit_jax.pipeline import Pipeline
from streamdit_jax.quantization import MARGIN, PROJECTIONS, calibrate, forwards, quantize_with, require_calibration

Model = tuple[Config, dict[str, Any]]
MODELS = ("bfloat16", "fp8", "fp8_bfloat16")


def run(
    model: str,
    out: str,
    *,
    prompts: Sequence[str],
    check: Sequence[str] = (),
    chunks: int = 8,
    seed: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Quantises a model into the directory `out`, and compares what was written with what it was made from: the report
    of `streamdit quantize`. check: the prompts to compare with; those of the calibration, with other seeds, by default.

    Raises ConfigError for what cannot be quantised (see `quantization.quantize`) and where `out` is the model itself;
    CheckpointError for a model that is none, and an `out` that cannot be written.
    """
    started, directory = time.perf_counter(), weights.find_model(model)
    if Path(out).resolve() == directory.resolve():
        raise ConfigError(f"--out: {out} is the model itself, which stays as it is; give another directory")
    config, params = source = _read(directory)
    require_calibration(config, prompts, chunks)
    largest = calibrate(Pipeline(config, params), prompts, chunks=chunks, seed=seed)
    quantized_config, quantized_params = quantize_with(config, params, largest)
    described = weights.load_card(directory)
    card = {
        "command": command,
        "hardware": hardware(),
        "versions": versions(),
        "calibration": {
            "prompts": list(prompts),
            "first_seed": seed,
            "chunks": chunks,
            "scheme": config.sampling.scheme,
            "guidance": config.sampling.guidance,
            "filling": config.sampling.filling,
            "margin": MARGIN,
            "largest_inputs": {name: [round(float(x), 4) for x in values] for name, values in largest.items()},
        },
        "quantized_from": {"model": model, "parts": described["parts"], "card": described.get("card", {})},
    }
    mapping = json.loads(quantized_config.to_json())
    weights.save_model(out, mapping, quantized_params, card, dtype=None)
    comparison = compare(source, _read(Path(out)), check or prompts, chunks=chunks, seed=seed + len(prompts))
    return {
        "model": model,
        "out": out,
        "dit_bytes": {
            "source": _part_bytes(directory, "dit"),
            "quantized": _part_bytes(Path(out), "dit"),
        },
        "calibration": card["calibration"],
        "comparison": comparison,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "hardware": hardware(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    sizes, comparison = report["dit_bytes"], report["comparison"]
    lines = [
        f"{report['out']}: the transformer in {sizes['quantized'] / 1e6:.1f} MB instead of "
        f"{sizes['source'] / 1e6:.1f} MB",
        f"against float32, {len(comparison['prompts'])} prompts, {comparison['chunks']} chunks each:",
    ]
    for name in MODELS:
        one = comparison[name]
        lines.append(
            f"  {name:<14} velocity off by {one['velocity']:.2%}; PSNR {one['one_forward']['mean']} dB after one "
            f"forward, {one['stream']['mean']} dB of streams (worst chunk {one['stream']['worst']} dB)"
        )
    return "\n".join(lines)


def _read(directory: Path) -> Model:
    described = weights.load_card(directory)
    params = {part: weights.load_part(directory, described, part) for part in ("tae", "text", "dit")}
    return from_mapping(described["config"]), params


def _part_bytes(directory: Path, part: str) -> int:
    shapes = weights.part_shapes(directory, weights.load_card(directory), [part])
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def compare(
    source: Model, quantized: Model, prompts: Sequence[str], *, chunks: int = 8, seed: int = 1000
) -> dict[str, Any]:
    """The report, as JSON-able values: of the source in bfloat16 ("bfloat16"), and of the quantised model with the rest
    of its arithmetic in float32 ("fp8") and in bfloat16 ("fp8_bfloat16", as on a GPU).

    prompts: each is streamed by the model's own scheme, filling and guidance until `chunks` chunks have left, with
        seeds `seed`, `seed` + 1, ….
    """
    reference = _pipeline(source, "float32")
    given = (source, "bfloat16"), (quantized, "float32"), (quantized, "bfloat16")
    others = {name: _pipeline(*model) for name, model in zip(MODELS, given)}
    seeded = [(prompt, seed + number) for number, prompt in enumerate(prompts)]
    streams = [list(forwards(reference, prompt, key, chunks)) for prompt, key in seeded]
    videos = [_frames(reference, stream) for stream in streams]
    report = {}
    for name, other in others.items():
        errors, one_forward, apart = None, [], []
        for (prompt, key), stream, video in zip(seeded, streams, videos):
            of_prompt, fronts = _from_same_states(reference, other, prompt, stream)
            errors = of_prompt if errors is None else jax.tree.map(np.add, errors, of_prompt)
            one_forward.append(_one_forward(reference, stream, fronts))
            apart.append(list(map(_squared, _frames(reference, forwards(other, prompt, key, chunks)), video)))
        report[name] = {
            "velocity": _relative(*errors["velocity"]),
            "layers": _by_layer(errors),
            "one_forward": _psnrs(np.array(one_forward)),
            "stream": _psnrs(np.array(apart)),
        }
    sampling = source[0].sampling
    return {
        "reference": "the source model in float32",
        "prompts": list(prompts),
        "first_seed": seed,
        "chunks": chunks,
        "scheme": sampling.scheme,
        "guidance": sampling.guidance,
        "filling": sampling.filling,
        **report,
    }


def _pipeline(model: Model, dtype: str) -> Pipeline:
    config, params = model
    return Pipeline(dataclasses.replace(config, dit=dataclasses.replace(config.dit, dtype=dtype)), params)


def _frames(decoder: Pipeline, stream: Iterable[tuple]) -> list[np.ndarray]:
    """The chunks of video that `forwards` made, decoded as they left."""
    videos, carried = [], None
    for _, row, _, front in stream:
        if row.advance:
            frames, carried = decoder.decode(front, carried)
            videos.append(np.asarray(frames))
    return videos


def _squared(video: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean(np.square(video.astype(np.float64) - other)))


def _psnrs(squared: np.ndarray) -> dict[str, Any]:
    """Of mean squared errors [prompts, chunks]."""
    return {
        "mean": _psnr(squared.mean()),
        "worst": _psnr(squared.max()),
        "by_chunk": [_psnr(value) for value in squared.mean(0)],
    }


def _psnr(squared: float) -> float | None:
    """None where nothing differs."""
    return None if squared == 0 else round(float(10 * np.log10(255**2 / squared)), 2)


def _relative(difference: float, size: float) -> float:
    return float(f"{np.sqrt(difference / size) if size else 0.0:.4g}")


def _by_layer(errors: dict[str, Any]) -> list[dict[str, dict[str, float]]]:
    names = [name for name in errors if name != "velocity"]
    count = len(errors[names[0]]["alone"][0])

    def of_layer(name, index):
        return {kind: _relative(*(sums[index] for sums in both)) for kind, both in errors[name].items()}

    return [{name: of_layer(name, index) for name in names} for index in range(count)]


def _from_same_states(
    reference: Pipeline, other: Pipeline, prompt: str, stream: Sequence[tuple]
) -> tuple[dict[str, Any], list[Array]]:
    """The sums of `_errors` over the forwards of the reference's stream, and the chunks that the other model makes of
    the same states.
    """
    text, total, fronts = other.cache_text(other.encode_prompt(prompt)), None, []
    step = other.step(other.scheme(None), masked=streaming.is_masked(other.config.sampling.filling))
    for state, row, condition, _ in stream:
        given = state.buffer, row.levels[0][None], condition.text, text
        errors = _errors(reference.config.dit, other.config.dit, reference.dit_params, other.dit_params, *given)
        errors = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), errors)
        total = errors if total is None else jax.tree.map(np.add, total, errors)
        if row.advance:
            theirs = streaming.Condition(text, other.null_text(), condition.guidance)
            fronts.append(step(jax.tree.map(jnp.copy, state), row, theirs)[1])
    return total, fronts


def _one_forward(decoder: Pipeline, stream: Sequence[tuple], fronts: Sequence[Array]) -> list[float]:
    """The squared error of each chunk's frames: of `fronts`, against those of the stream, decoded from its state."""
    squared, carried = [], None
    for theirs, ours in zip(fronts, (front for _, row, _, front in stream if row.advance)):
        other, _ = decoder.decode(theirs, carried)
        frames, carried = decoder.decode(ours, carried)
        squared.append(_squared(np.asarray(frames), np.asarray(other)))
    return squared


@functools.partial(jax.jit, static_argnums=(0, 1))
def _errors(
    config: DiTConfig,
    other: DiTConfig,
    params: Any,
    other_params: Any,
    latents: Array,
    levels: Array,
    text: Any,
    other_text: Any,
) -> dict[str, Any]:
    """(Σ difference², Σ float32²) of the velocity, and of each projection's output, by layer."""
    velocity, inputs, outputs = _watched(config, params, latents, levels, text)
    other_velocity, _, other_outputs = _watched(other, other_params, latents, levels, other_text)
    sums = {"velocity": _sums(other_velocity, velocity)}
    for path in outputs:
        alone = []
        for index, x in enumerate(inputs[path]):
            first, second = (
                multiply(x, Weights.of(tree["blocks"][index][path[0]][path[1]]), of.compute_dtype)
                for of, tree in ((other, other_params), (config, params))
            )
            alone.append(_sums(first, second))
        in_model = [_sums(first, second) for first, second in zip(other_outputs[path], outputs[path])]
        sums["/".join(path)] = {
            "alone": tuple(map(jnp.stack, zip(*alone))),
            "in_model": tuple(map(jnp.stack, zip(*in_model))),
        }
    return sums


def _watched(config: DiTConfig, params: Any, latents: Array, levels: Array, text: Any):
    """The velocity, and by projection the inputs and outputs of all layers."""
    inputs, outputs = {}, {}

    def watch(call, arguments, keywords, context):
        out = call(*arguments, **keywords)
        if context.module.path in PROJECTIONS and context.method_name == "__call__":
            inputs.setdefault(context.module.path, []).append(arguments[0])
            outputs.setdefault(context.module.path, []).append(out)
        return out

    with nn.intercept_methods(watch):
        velocity = DiT(config).apply({"params": params}, latents, levels, text)
    return velocity, inputs, outputs


def _sums(other: Array, reference: Array) -> tuple[Array, Array]:
    reference = reference.astype(jnp.float32)
    return jnp.sum(jnp.square(other.astype(jnp.float32) - reference)), jnp.sum(jnp.square(reference))
