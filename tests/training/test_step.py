"""One training step: its average, numbers that are not finite, one compilation, the state handed over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.training.optimizer import make_optimizer, make_schedule
from streamdit_jax.training.state import init_state
from streamdit_jax.training.step import ema_rate, make_train_step

KEY = jax.random.key(0)


def build(toy, loss=None, **optimizer):
    """(state, step, constants) of the toy; the step is not jitted."""
    objective = toy.objective(loss or toy.loss)
    config = toy.optimizer(**optimizer)
    tx = make_optimizer(config, 100)
    state = jax.jit(lambda key, batch: init_state(objective, tx, key, batch))(KEY, toy.batch(0))
    return state, make_train_step(objective, tx, 0.9, make_schedule(config, 100)), objective.constants


@pytest.fixture(scope="module")
def poisoned(toy):
    """(state, jitted step, constants) of a loss times the batch's `poison`, so that a NaN can come with one batch."""

    def loss(params, constants, batch, key):
        value, extra = toy.loss(params, constants, batch, key)
        return value * batch["poison"], {**extra, "draw": jax.random.uniform(key)}

    state, step, constants = build(toy, loss, learning_rate=0.02)
    return state, jax.jit(step), constants


def dose(toy, step, poison=1.0):
    return {**toy.batch(step), "poison": np.float32(poison)}


def test_average_is_warmed_up(toy, poisoned):
    assert ema_rate(0.999, 1) == pytest.approx(2 / 11) and ema_rate(0.999, 90) == pytest.approx(0.91)
    assert ema_rate(0.5, 90) == 0.5 and ema_rate(0.999, 1_000_000) == pytest.approx(0.999)
    state, step, constants = poisoned
    average = jax.tree.map(np.float64, state.ema_params)
    for n in range(4):
        state, _ = step(state, constants, dose(toy, n), KEY)
        rate = min(0.9, (2 + n) / (11 + n))
        average = jax.tree.map(lambda a, p, rate=rate: rate * a + (1 - rate) * np.float64(p), average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema_params, average)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nonfinite_step_changes_nothing_but_the_counters(toy, poisoned, poison):
    state, step, constants = poisoned
    good, bad = dose(toy, 0), dose(toy, 0, poison)
    state, metrics = step(state, constants, good, KEY)
    assert metrics["nonfinite_count"] == 0 and state.step == 1
    before = state
    for again in range(1, 6):  # however many: optax.apply_if_finite would let one of these through
        state, metrics = step(state, constants, bad, KEY)
        for part in ("params", "ema_params", "opt_state"):
            assert toy.bits(getattr(state, part)) == toy.bits(getattr(before, part))
        assert (state.step, state.nonfinite_count, state.nonfinite_in_a_row) == (1 + again, again, again)
        assert metrics["nonfinite_in_a_row"] == again
    # The next update is the second one for schedule, Adam and average; only its randomness is that of the seventh step.
    direct, _ = step(before.replace(step=state.step, nonfinite_count=state.nonfinite_count), constants, good, KEY)
    state, metrics = step(state, constants, good, KEY)
    assert toy.bits(state.params) == toy.bits(direct.params) and toy.bits(state.ema_params) == toy.bits(
        direct.ema_params
    )
    assert (state.nonfinite_count, state.nonfinite_in_a_row) == (5, 0)
    assert metrics["learning_rate"] == pytest.approx(0.02 * 2 / 3)


def test_infinite_gradient_of_a_finite_loss_is_skipped_too(toy):
    def loss(params, constants, batch, key):
        root = jnp.sum(jnp.sqrt(jnp.abs(params["toy"]["up"]["bias"])))  # zero at zero, with an infinite slope
        return root + toy.loss(params, constants, batch, key)[0], {}

    state, step, constants = build(toy, loss)
    after, metrics = jax.jit(step)(state, constants, toy.batch(0), KEY)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert toy.bits(after.params) == toy.bits(state.params) and after.nonfinite_count == 1


def test_huge_gradient_cannot_poison_the_moments(toy, poisoned):
    state, step, constants = poisoned
    state, _ = step(state, constants, dose(toy, 0, 1e30), KEY)
    assert state.nonfinite_count == 1  # its square overflows float32
    state, _ = step(state, constants, dose(toy, 0, 1e15), KEY)
    assert state.nonfinite_count == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.params, state.opt_state)))


def test_each_step_has_its_own_randomness_from_one_key(toy, poisoned):
    (state, step, constants), draws = poisoned, []
    for _ in range(3):
        state, metrics = step(state, constants, dose(toy, 0), KEY)
        draws.append(float(metrics["draw"]))
    assert draws == [float(jax.random.uniform(jax.random.fold_in(KEY, n))) for n in range(3)]
    assert len(set(draws)) == 3


def test_compiles_once_and_takes_the_state_over(toy):
    traces = []

    def loss(params, constants, batch, key):
        traces.append(1)
        return toy.loss(params, constants, batch, key)

    state, step, _ = build(toy, loss)
    step = jax.jit(step, donate_argnums=0)
    for n in range(4):  # other data, constants and seeds are other values of the same shapes
        before = state
        state, _ = step(state, {"noise": np.float32(0.1 * n)}, toy.batch(n), jax.random.key(n))
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert len(traces) == 1


def test_metric_names_do_not_collide(toy):
    state, step, constants = build(toy, lambda *inputs: (toy.loss(*inputs)[0], {"grad_norm": 1.0}))
    with pytest.raises(ValueError, match="metric 'grad_norm' is the step's own"):
        jax.eval_shape(step, state, constants, toy.batch(0), KEY)


def test_training_learns_the_truth(toy, poisoned):
    (state, step, constants), losses = poisoned, []
    for n in range(100):
        state, metrics = step(state, constants, dose(toy, n), KEY)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
