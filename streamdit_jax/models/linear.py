"""Linear maps of tokens: in the type of the arithmetic, or in 8-bit floating point (fp8) for inference.

A quantised map is, with values q(·) rounded to float8_e4m3fn and saturated at ±448:

    y = q(x / input_scale) · q(W / kernel_scale)ᵀ · (input_scale · kernel_scale) + bias

input_scale is one static number, found by a calibration pass (`streamdit_jax.quantization`), because a product of
scaled values leaves it outside; kernel_scale has one number per output for the same reason. float8 values are exact in
bfloat16 and float32, so the definition below is the same on every device. Where the hardware multiplies float8, XLA
takes the two conversions into the product (cuBLASLt; the weights have to lie as [out, in] for it), and both scales and
the bias join the elementwise work that follows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = 448.0  # the largest finite float8_e4m3fn
QUANTIZED = "quantized_kernel"  # the parameter that tells a quantised map from another


class Weights(NamedTuple):
    """Of one map: kernel [in, *out], bias [*out]. Quantised: kernel float8 [*out, in], kernel_scale float32 [*out] and
    input_scale float32 [].
    """

    kernel: Array
    bias: Array
    kernel_scale: Array | None = None
    input_scale: Array | None = None

    @classmethod
    def of(cls, params: Mapping[str, Array]) -> "Weights":
        """Those of a map's parameters, quantised or not."""
        kernel = params[QUANTIZED] if QUANTIZED in params else params["kernel"]
        return cls(kernel, params["bias"], params.get("kernel_scale"), params.get("input_scale"))


class Linear(nn.Module):
    """Tokens [..., in] → [..., features]: as flax's Dense, or quantised.

    Parameters: `kernel` [in, features] and `bias`; or, quantised, `quantized_kernel` float8_e4m3fn [features, in],
    `kernel_scale` float32 [features], `input_scale` float32 [] and `bias`. Initialised quantised, it is the zero map:
    its values come from `quantization.quantize`.
    """

    features: int
    dtype: jnp.dtype
    quantized: bool = False
    result: jnp.dtype | None = None  # the type of the outputs, if it is not that of the arithmetic

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        return multiply(x, declare(self, x.shape[-1], self.features, self.quantized), self.dtype, self.result)


def declare(module: nn.Module, inputs: int, features: int, quantized: bool) -> Weights:
    """The parameters of a map from `inputs` to `features`, as those of `module`."""
    if not quantized:
        kernel = module.param("kernel", nn.initializers.lecun_normal(), (inputs, features))
        return Weights(kernel, module.param("bias", nn.initializers.zeros, (features,)))
    return Weights(
        kernel=module.param(QUANTIZED, nn.initializers.zeros, (features, inputs), FLOAT8),
        bias=module.param("bias", nn.initializers.zeros, (features,)),
        kernel_scale=module.param("kernel_scale", nn.initializers.ones, (features,), jnp.float32),
        input_scale=module.param("input_scale", nn.initializers.ones, (), jnp.float32),
    )


def multiply(x: Float[Array, "*batch inputs"], weights: Weights, dtype: jnp.dtype, result=None) -> Array:
    """The map of tokens, [*batch, *out]: a product in and as `dtype`, outputs as `result`, by default the same."""
    quantized = weights.input_scale is not None
    if quantized:
        x = to_float8(x, weights.input_scale)
    inputs = weights.kernel.ndim - 1 if quantized else 0
    out = jax.lax.dot_general(x.astype(dtype), weights.kernel.astype(dtype), (((x.ndim - 1,), (inputs,)), ((), ())))
    if quantized:
        out = out.astype(jnp.float32) * (weights.input_scale * weights.kernel_scale)
    return (out + weights.bias.astype(out.dtype)).astype(result or dtype)


def to_float8(values: Float[Array, "..."], scale: Float[Array, "..."]) -> Array:
    """values / scale as float8_e4m3fn; what is too large becomes ±448, what is no number stays none."""
    scaled = values.astype(jnp.float32) * (1 / scale.astype(jnp.float32))
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(FLOAT8)


def quantize_weights(
    kernel: Float[Array, "*layers inputs out"], bias: Float[Array, "*layers out"], input_scale: Float[Array, "*layers"]
) -> dict[str, Array]:
    """The parameters of the quantised map, from those of `Linear`; layers may be stacked. Each output's weights are
    scaled so that the largest is ±448.
    """
    kernel = jnp.swapaxes(kernel.astype(jnp.float32), -1, -2)
    scale = as_scale(jnp.max(jnp.abs(kernel), axis=-1))
    return {
        QUANTIZED: to_float8(kernel, scale[..., None]),
        "kernel_scale": scale,
        "input_scale": jnp.asarray(input_scale, jnp.float32),
        "bias": bias,
    }


def as_scale(largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """The scale that takes ±`largest` to ±448, float32; 1 where there is nothing to scale."""
    largest = jnp.asarray(largest, jnp.float32)
    return jnp.where(largest > 0, largest / LARGEST, 1)
