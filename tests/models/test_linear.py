"""Linear maps: as flax's Dense, and in eight bits as their definition says, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.models.attention import HeadProjections
from streamdit_jax.models.linear import (
    FLOAT8,
    LARGEST,
    Linear,
    Weights,
    as_scale,
    multiply,
    quantize_weights,
    to_float8,
)

INPUTS, OUTPUTS = 48, 24


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def plain():
    """A map, and tokens."""
    return {"kernel": random(0, INPUTS, OUTPUTS), "bias": random(1, OUTPUTS)}, random(2, 3, 5, INPUTS)


def quantized(params, x, margin=1.0):
    return quantize_weights(params["kernel"], params["bias"], as_scale(margin * jnp.max(jnp.abs(x))))


def by_definition(x, params):
    """y = q(x / s) · q(W / k)ᵀ · (s · k) + b, by numpy in float64."""
    scale = np.float64(params["input_scale"])
    values = np.clip(np.asarray(x, np.float32) * (np.float32(1) / np.float32(scale)), -LARGEST, LARGEST)
    values = values.astype(FLOAT8).astype(np.float64)
    kernel = np.asarray(params["quantized_kernel"]).astype(np.float64)
    out = values @ kernel.T * (scale * np.asarray(params["kernel_scale"], np.float64))
    return out + np.asarray(params["bias"], np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_unquantised_map_is_that_of_flax(plain, dtype):
    params, x = plain
    dense, linear = nn.Dense(OUTPUTS, dtype=dtype), Linear(OUTPUTS, dtype)
    fresh = linear.init(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, fresh, dense.init(jax.random.key(3), x))
    np.testing.assert_array_equal(linear.apply({"params": params}, x), dense.apply({"params": params}, x))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
def test_a_quantised_map_is_its_definition_also_when_compiled(plain, dtype, tolerance):
    """Compiled too: XLA may leave out a pair of conversions, and with it the rounding."""
    params, x = plain
    params = quantized(params, x)
    linear, expected = Linear(OUTPUTS, dtype, quantized=True), by_definition(x.astype(dtype), params)
    for apply in (linear.apply, jax.jit(linear.apply)):
        out = apply({"params": params}, x.astype(dtype))
        assert out.dtype == dtype
        assert np.linalg.norm(np.asarray(out, np.float64) - expected) < tolerance * np.linalg.norm(expected)


def test_rounding_costs_what_eight_bits_cost(plain):
    """Three bits of mantissa, of values and of weights: √2 · 2⁻³ / √12 / 1.4 of a typical product, some 3.6 %."""
    params, x = plain
    exact = x @ params["kernel"]
    made = multiply(x, Weights.of(quantized(params, x)), jnp.float32) - params["bias"]
    assert 0.02 < jnp.linalg.norm(made - exact) / jnp.linalg.norm(exact) < 0.05


def test_parameters_have_the_names_types_and_places_that_are_quantised(plain):
    params, x = plain
    shapes = jax.eval_shape(lambda: Linear(OUTPUTS, jnp.bfloat16, quantized=True).init(jax.random.key(0), x)["params"])
    made = quantized(params, x)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), dict(shapes)
    )
    assert made["quantized_kernel"].shape == (OUTPUTS, INPUTS) and made["quantized_kernel"].dtype == FLOAT8
    assert float(jnp.max(jnp.abs(made["quantized_kernel"].astype(jnp.float32)))) == LARGEST


def test_stacked_layers_are_quantised_one_by_one(plain):
    params, _ = plain
    kernels, biases = jnp.stack([params["kernel"], 100 * params["kernel"]]), jnp.stack([params["bias"]] * 2)
    scales = as_scale(jnp.asarray([3.0, 7.0]))
    stacked = quantize_weights(kernels, biases, scales)
    for index in range(2):
        alone = quantize_weights(kernels[index], biases[index], scales[index])
        jax.tree.map(lambda all, one, index=index: np.testing.assert_array_equal(all[index], one), stacked, alone)


def test_what_is_too_large_saturates_and_what_is_no_number_stays_none():
    values = to_float8(jnp.asarray([1e9, -1e9, 448.0, 449.0, jnp.inf, jnp.nan, 0.0]), jnp.asarray(1.0))
    expected = [LARGEST, -LARGEST, LARGEST, LARGEST, LARGEST, np.nan, 0.0]
    np.testing.assert_array_equal(np.asarray(values).astype(np.float32), expected)


def test_outputs_and_inputs_without_any_value_stay_zero():
    made = quantize_weights(jnp.zeros((INPUTS, OUTPUTS)), jnp.ones(OUTPUTS), as_scale(0.0))
    np.testing.assert_array_equal(multiply(jnp.ones((2, INPUTS)), Weights.of(made), jnp.float32), np.ones((2, OUTPUTS)))


def test_maps_side_by_side_are_quantised_as_one(plain):
    params, x = plain
    params = quantized(params, x)
    heads = HeadProjections(3, OUTPUTS // 3, 2, jnp.float32, quantized=True).apply({"params": params}, x)
    whole = Linear(OUTPUTS, jnp.float32, quantized=True).apply({"params": params}, x)
    assert heads.shape == (3, 3, 5, 2, 4)
    np.testing.assert_array_equal(jnp.moveaxis(heads.reshape(3, 3, 5, 8), 0, 2).reshape(whole.shape), whole)
