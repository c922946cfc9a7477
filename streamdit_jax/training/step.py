"""One training step as a pure function, for every objective."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from streamdit_jax import sharding
from streamdit_jax.training.objective import Batch, Objective
from streamdit_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
OWN_METRICS = ("loss", "grad_norm", "learning_rate", "nonfinite_count", "nonfinite_in_a_row")


def ema_rate(decay: float, updates) -> jax.Array:
    """min(decay, (1 + n)/(10 + n)) after n updates: the average of a short run is not that of its initialisation."""
    updates = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    ema_decay: float,
    schedule: optax.Schedule | None = None,
    accumulate: int = 1,
) -> Callable[[TrainState, object, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Builds (state, constants, batch, key) → (state, metrics).

    The step draws its randomness from `fold_in(key, state.step)`. Where the loss or the gradient's norm is not finite,
    parameters, their average and the optimizer's state stay as they were, the step number moves on (so the next batch
    and key are others), and the two counters tell. The choice is made here, over the whole update, because optax's own
    wrappers do not do it: `apply_if_finite` lets the NaN through after a few, and clipping by a norm that is NaN makes
    every leaf NaN.

    Args:
        objective: see `Objective`.
        tx: the optimizer.
        ema_decay: of the moving average, in [0, 1); warmed up by `ema_rate`.
        schedule: the learning rate by number of updates, only to be logged.
        accumulate: the batch goes through in so many parts of equal size, one after another, and the update takes the
            mean of their gradients; the loss and the objective's metrics are means, too. Only one part's activations
            are held at a time. Each part has randomness of its own, `fold_in(fold_in(key, state.step), part)`.

    Returns:
        A pure function, to be jitted with its first argument donated. Its metrics are float32 and int32 scalars:
        `loss`, `grad_norm` (before clipping), `learning_rate` (of this update), `nonfinite_count`,
        `nonfinite_in_a_row`, and what the objective adds.
    Raises:
        ValueError: while tracing, if the objective returns a metric under one of these names.
    """

    def differentiate(params, constants, batch: Batch, key):
        values, gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, constants, batch, key)
        # A gradient lies where its parameter lies; without a word, whole copies could be kept and updated everywhere.
        return values, sharding.constrain_parameters(gradient)

    def train_step(state: TrainState, constants, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            (loss, extra), gradient = differentiate(state.params, constants, batch, step_key)
        else:
            (loss, extra), gradient = _accumulated(differentiate, state.params, constants, batch, step_key, accumulate)
        if taken := sorted(set(extra) & set(OWN_METRICS)):
            raise ValueError(f"objective {objective.name}: metric {taken[0]!r} is the step's own; give it another name")

        # The norm is finite only if every square is, so that Adam's second moments stay finite too.
        grad_norm = optax.global_norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        done = state.step - state.nonfinite_count  # updates so far, which is Adam's own count

        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = ema_rate(ema_decay, done + 1)
        ema_params = jax.tree.map(lambda e, p: (e + (1 - rate) * (p - e)).astype(e.dtype), state.ema_params, params)

        def choose(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = (~finite).astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=choose(params, state.params),
            ema_params=choose(ema_params, state.ema_params),
            opt_state=choose(opt_state, state.opt_state),
            nonfinite_count=state.nonfinite_count + skipped,
            nonfinite_in_a_row=(state.nonfinite_in_a_row + 1) * skipped,
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "nonfinite_count": state.nonfinite_count,
            "nonfinite_in_a_row": state.nonfinite_in_a_row,
            **extra,
        }
        if schedule is not None:
            metrics["learning_rate"] = schedule(done)
        return state, metrics

    return train_step


def _accumulated(differentiate, params, constants, batch: Batch, key: jax.Array, parts: int):
    """Means over `parts` of a batch of what `differentiate` gives for each of them, summed in float32."""

    def cut(leaf):
        if jnp.ndim(leaf) == 0:
            return jnp.broadcast_to(leaf, (parts,))
        # Every parts-th row, so that a batch that is cut along its rows over devices stays where it is.
        strided = jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)
        return sharding.constrain(strided, None, "batch", *[None] * (leaf.ndim - 1))

    def add(total, numbered):
        number, part = numbered
        values, gradient = differentiate(params, constants, part, jax.random.fold_in(key, number))
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, (values, gradient)), None

    values, gradient = jax.eval_shape(differentiate, params, constants, jax.tree.map(lambda x: cut(x)[0], batch), key)
    values, gradient = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (values, gradient))
    # The sum lies where the parameters do; without a word, a whole copy could be kept on every device.
    total = (values, sharding.constrain_parameters(gradient))
    total, _ = jax.lax.scan(add, total, (jnp.arange(parts), jax.tree.map(cut, batch)))
    values, gradient = jax.tree.map(lambda x: x / parts, total)
    return values, jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)
