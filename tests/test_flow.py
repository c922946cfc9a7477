"""Buffered flow matching against equations 1–3 and 6 of StreamDiT, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax import flow
from streamdit_jax.partition import PartitionScheme

SHAPE = (2, 6, 2, 3, 4)
SIGMA = 1e-5


def draw(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape)


def levels_of(spelling):
    return PartitionScheme.parse(spelling).step_levels()


def test_path_and_velocity_are_equations_1_and_2():
    clean, noise, t = draw(0), draw(1), np.random.default_rng(2).uniform(size=SHAPE[:2])
    expected, velocity = np.empty(SHAPE), np.empty(SHAPE)
    for b, f in np.ndindex(*SHAPE[:2]):
        expected[b, f] = t[b, f] * clean[b, f] + (1 - (1 - SIGMA) * t[b, f]) * noise[b, f]
        velocity[b, f] = clean[b, f] - (1 - SIGMA) * noise[b, f]
    np.testing.assert_allclose(flow.interpolate(clean, noise, t), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(flow.velocity_target(clean, noise), velocity, rtol=1e-13, atol=1e-13)
    # The same in float32 on a device, and one row of levels for the whole batch.
    single = flow.interpolate(jnp.float32(clean), jnp.float32(noise), jnp.float32(t[0]))
    np.testing.assert_allclose(single[0], expected[0], atol=1e-6)


def test_the_path_begins_as_noise_ends_clean_and_has_the_target_as_its_slope():
    clean, noise, ones = draw(0), draw(1), np.ones(SHAPE[:2])
    assert np.array_equal(flow.interpolate(clean, noise, 0 * ones), noise)
    # At t = 1 a trace of σ_min·noise is left.
    np.testing.assert_allclose(flow.interpolate(clean, noise, ones) - clean, SIGMA * noise, atol=1e-15)
    for t, h in ((0.0, 1.0), (0.3, 0.25), (0.9, 1e-3)):
        slope = (flow.interpolate(clean, noise, (t + h) * ones) - flow.interpolate(clean, noise, t * ones)) / h
        np.testing.assert_allclose(slope, flow.velocity_target(clean, noise), atol=1e-11)


def test_loss_is_the_mean_over_scored_frames():
    predicted, target = draw(0).astype(np.float32), draw(1).astype(np.float32)
    scored = np.array([[False, True, True, True, True, True], [False, False, True, False, True, True]])
    expected = np.mean([(predicted[b, f].astype(float) - target[b, f]) ** 2 for b, f in np.argwhere(scored)])
    np.testing.assert_allclose(flow.loss(predicted, target, scored), expected, rtol=1e-6)
    assert flow.loss(predicted, target, np.zeros_like(scored)) == 0
    # A prediction in bfloat16 is compared in float32.
    half = jnp.asarray(predicted, jnp.bfloat16)
    expected = np.mean([(np.float64(half[b, f]) - target[b, f]) ** 2 for b, f in np.argwhere(scored)])
    np.testing.assert_allclose(flow.loss(half, target, scored), expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [1e30, np.inf, np.nan])
def test_unscored_frames_have_no_part_in_loss_or_gradient(bad):
    predicted, target = jnp.float32(draw(0)), jnp.float32(draw(1))
    scored = jnp.arange(SHAPE[1])[None] >= jnp.array([[2], [3]])
    value, slope = jax.value_and_grad(flow.loss)(predicted, target, scored)
    for spoiled in (0, 1):
        pair = [predicted, target]
        pair[spoiled] = jnp.where(scored[..., None, None, None], pair[spoiled], bad)
        spoiled_value, spoiled_slope = jax.value_and_grad(flow.loss)(*pair, scored)
        assert spoiled_value == value and np.array_equal(spoiled_slope, slope)
    assert np.all(np.any(slope != 0, axis=(2, 3, 4)) == scored)


def test_guidance_is_linear_in_its_weight():
    nothing, prompt, weights = np.float32(draw(0)), np.float32(draw(1)), np.float32([0, 2.5])
    guided = np.asarray(flow.guide(nothing, prompt, weights))
    for b, w in enumerate(weights):
        np.testing.assert_allclose(guided[b], (1 - w) * nothing[b] + w * prompt[b], atol=1e-5)
    assert np.array_equal(guided[0], nothing[0]), "weight 0 is the empty prompt's velocity"
    np.testing.assert_allclose(flow.guide(nothing, prompt, 1.0), prompt, atol=1e-6)
    middle = flow.guide(nothing, prompt, (0.5 + 3) / 2)
    ends = np.asarray(flow.guide(nothing, prompt, 0.5)) + np.asarray(flow.guide(nothing, prompt, 3.0))
    np.testing.assert_allclose(middle, ends / 2, atol=1e-5)


def test_a_frame_whose_level_stays_is_returned_bit_for_bit():
    latents, velocity = jnp.float32(draw(0)), np.float32(draw(1))
    now, then = levels_of("K2N2c2s2")[:2]
    velocity[:, 0], velocity[:, 1] = np.nan, np.inf
    moved = flow.euler_step(latents, jnp.asarray(velocity), now, then)
    assert np.array_equal(moved[:, :2], latents[:, :2])
    expected = draw(0)[:, 2:] + (then - now)[None, 2:, None, None, None].astype(float) * velocity[:, 2:]
    np.testing.assert_allclose(moved[:, 2:], expected, atol=1e-6)
    assert flow.euler_step(latents, jnp.bfloat16(velocity), now, then).dtype == jnp.float32


@pytest.mark.parametrize("spelling", ["N1c6s1", "N1c6s7", "N6c1s1", "N3c2s4p2", "K2N2c2s3p0.5"])
def test_the_exact_velocity_carries_noise_to_the_data(spelling):
    """The path is straight: Euler steps of any size and schedule stay on it."""
    scheme = PartitionScheme.parse(spelling)
    clean, noise = draw(0), draw(1)
    levels = scheme.step_levels().astype(np.float64)
    x = flow.interpolate(clean, noise, levels[0])
    for now, then in itertools.pairwise(levels):
        t = np.broadcast_to(now, SHAPE[:2])[..., None, None, None]
        x0 = (x - t * clean) / (1 - (1 - SIGMA) * t)
        x = np.asarray(flow.euler_step(jnp.float32(x), jnp.float32(clean - (1 - SIGMA) * x0), now, then), np.float64)
        np.testing.assert_allclose(x, flow.interpolate(clean, noise, then), atol=2e-5)
    front = slice(scheme.num_references, scheme.num_references + scheme.chunk_size)
    np.testing.assert_allclose(x[:, front], clean[:, front], atol=1e-4)
