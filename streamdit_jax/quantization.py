"""fp8 inference: a calibration pass, and the quantised model that it gives (`models.linear` defines the arithmetic).

    1. The model streams the prompts as it always does. In every forward the largest |input| of each projection is kept:
       over the buffer's whole range of levels, for the prompt and for the empty prompt that guidance uses.
    2. The projections' weights become float8 with a scale for each output; their inputs get one static scale each.

Only the projections of self-attention and feed-forward are quantised. Modulation, embeddings, cross-attention and the
output stay in the type of the arithmetic: they are few, and what steers the picture.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax import stream as streaming
from streamdit_jax.config import Config
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import DiT, DiTConfig
from streamdit_jax.models.linear import as_scale, quantize_weights
from streamdit_jax.pipeline import Pipeline

# An input that is larger than all of the calibration's is kept up to so many times their largest. Against 1, 1.5 and 2,
# and 0.99 to 0.99999 quantiles, it gave the smallest error of the velocity (docs/quantization.md).
MARGIN = 1.25
# Within a block: module and map. A feed-forward without a gate has no "gate".
PROJECTIONS = (
    ("self_attention", "qkv"),
    ("self_attention", "out"),
    ("feed_forward", "up"),
    ("feed_forward", "gate"),
    ("feed_forward", "down"),
)
Largest = dict[str, Float[Array, "layers"]]


def quantize(
    config: Config, params: dict[str, Any], prompts: Sequence[str], *, chunks: int = 8, seed: int = 0
) -> tuple[Config, dict[str, Any]]:
    """The quantised model: a configuration whose dit.quantization is "fp8", and its parameters; what is not quantised
    is as it was.

    prompts: to calibrate with; each is streamed by the model's own scheme, filling and guidance until `chunks` chunks
    have left its buffer, with seeds `seed`, `seed` + 1, …; the same arguments give the same model.

    Raises ConfigError for a model that is quantised already, for no prompts, and for fewer than one chunk.
    """
    require_calibration(config, prompts, chunks)
    largest = calibrate(Pipeline(config, params), prompts, chunks=chunks, seed=seed)
    return quantize_with(config, params, largest)


def require_calibration(config: Config, prompts: Sequence[str], chunks: int) -> None:
    """ConfigError for what cannot be calibrated, or so; nothing is computed."""
    if config.dit.quantization != "none":
        raise ConfigError(
            f"dit.quantization: the model is quantised already ({config.dit.quantization}); "
            "quantise the one that it was made from"
        )
    if not prompts:
        raise ConfigError("--prompt: give at least one prompt to calibrate with")
    if chunks < 1:
        raise ConfigError(f"--chunks: at least 1, not {chunks}")


def calibrate(pipeline: Pipeline, prompts: Sequence[str], *, chunks: int = 8, seed: int = 0) -> Largest:
    """The largest |input| of each projection, "self_attention/qkv" and so on, by layer. See `quantize`."""
    require_calibration(pipeline.config, prompts, chunks)
    largest = None
    for number, prompt in enumerate(prompts):
        for state, row, condition, _ in forwards(pipeline, prompt, seed + number, chunks):
            for text in (condition.text, condition.null_text):
                seen = _largest_inputs(
                    pipeline.config.dit, pipeline.dit_params, state.buffer, row.levels[0][None], text
                )
                largest = seen if largest is None else jax.tree.map(jnp.maximum, largest, seen)
    return largest


def forwards(pipeline: Pipeline, prompt: str, seed: int, chunks: int):
    """The forwards of a stream by the model's own sampling, until `chunks` chunks have left: yields of each the state
    before it, its row and condition, and the frames at the place of chunk 0 after it, which leave if `row.advance`.
    """
    sampling, scheme = pipeline.config.sampling, pipeline.scheme(None)
    text = pipeline.cache_text(pipeline.encode_prompt(prompt))
    condition = streaming.Condition(text, pipeline.null_text(), np.full(1, sampling.guidance, np.float32))
    state = streaming.initial_state(
        jax.random.key(seed % 2**32)[None], scheme, pipeline.config.dit.latent[1:], sampling.filling
    )
    fill, flow = streaming.filling_rows(scheme, sampling.filling), streaming.streaming_rows(scheme)
    rows = [streaming.row_at(fill, index) for index in range(len(fill.adopt))]
    rows += [streaming.row_at(flow, index) for index in range(scheme.micro_steps)] * chunks
    step = pipeline.step(scheme, masked=streaming.is_masked(sampling.filling))
    for row in rows:
        before, (state, front) = state, step(jax.tree.map(jnp.copy, state), row, condition)  # a step takes its state
        yield before, row, condition, front


@functools.partial(jax.jit, static_argnums=0)
def _largest_inputs(config: DiTConfig, params: Any, latents: Array, levels: Array, text: Any) -> Largest:
    """Of one forward; params: the layers as a tuple."""
    seen: dict[str, list[Array]] = {}

    def watch(call, arguments, keywords, context):
        if context.module.path in PROJECTIONS and context.method_name == "__call__":
            largest = jnp.max(jnp.abs(arguments[0].astype(jnp.float32)))
            seen.setdefault("/".join(context.module.path), []).append(largest)
        return call(*arguments, **keywords)

    with nn.intercept_methods(watch):
        DiT(config).apply({"params": params}, latents, levels, text)
    return {name: jnp.stack(values) for name, values in seen.items()}


def quantize_with(config: Config, params: dict[str, Any], largest: Largest) -> tuple[Config, dict[str, Any]]:
    """The quantised model for the largest |input| of each projection, as `calibrate` gives them."""
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, quantization="fp8"))
    blocks = quantize_blocks(params["dit"]["blocks"], largest)
    return config, {**params, "dit": {**params["dit"], "blocks": blocks}}


def quantize_blocks(blocks: Mapping[str, Any], largest: Largest) -> dict[str, Any]:
    """The stacked parameters of all layers, with the projections that `largest` names quantised."""
    blocks = dict(blocks)
    for path, values in largest.items():
        module, name = path.split("/")
        one = blocks[module][name]
        quantized = _quantize_weights(one["kernel"], one["bias"], as_scale(MARGIN * values))
        blocks[module] = {**blocks[module], name: quantized}
    return blocks


_quantize_weights = jax.jit(quantize_weights)
