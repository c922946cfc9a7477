"""Everything that a training step changes, in one tree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from streamdit_jax.training.objective import Batch, Objective


class TrainState(flax.struct.PyTreeNode):
    """The state of a stage after `step` steps. It holds no random key: a step's is `fold_in(key(seed), step)` (law 2).

    Attributes:
        step: int32 scalar, steps done, skipped ones included.
        params: the objective's parameters.
        ema_params: their exponential moving average, what sampling and the finished model use.
        opt_state: optax's.
        nonfinite_count: int32 scalar, steps skipped so far because loss or gradient was not finite.
        nonfinite_in_a_row: int32 scalar, how many of them were the latest ones.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    nonfinite_count: jax.Array
    nonfinite_in_a_row: jax.Array


def init_state(objective: Objective, tx: optax.GradientTransformation, key: jax.Array, batch: Batch) -> TrainState:
    """The state before the first step. Pure: run it under `jit` with `out_shardings` so that no device ever holds all
    of a large model, or under `jax.eval_shape` for its shapes.

    Args:
        key: key(seed) of the stage.
        batch: one batch; objectives read its shapes, and may read its values (a data-dependent initialisation).
    """
    params = objective.init(key, batch)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        # A copy of its own: the state is donated to the step, and one buffer cannot be given away twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
        nonfinite_count=zero,
        nonfinite_in_a_row=zero,
    )
