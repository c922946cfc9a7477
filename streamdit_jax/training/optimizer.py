"""AdamW or Muon with warm-up, decay and clipping, built from an `OptimizerConfig`.

Everything is counted in *updates*: a step that was skipped because its loss or gradient was not finite (see `step.py`)
moves neither Adam's moments nor the schedule.
"""

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from streamdit_jax.sharding import is_stacked, path_name

# Biases by their function, whatever their dimensions: adaLN's tables and T5's relative attention bias are among them.
NOT_DECAYED = ("bias", "scale", "table", "relative_bias", "latent_mean", "latent_std")


def make_schedule(config, steps: int) -> optax.Schedule:
    """The learning rate of update n, n = 0 … steps − 1.

    With w warm-up steps, peak p and final scale f: `p·(n + 1)/w` for n < w (the first update already moves), then p for
    "constant", or for "cosine" `p·(f + (1 − f)·(1 + cos πq)/2)` with q running from 0 at n = w to 1 at n = steps − 1.

    Args:
        config: `learning_rate`, `warmup_steps`, `decay` ("cosine" or "constant"), `final_scale`.
        steps: length of the stage in updates.
    Raises:
        ValueError: `decay` is neither, or the warm-up is longer than the stage.
    """
    peak, warmup, final = float(config.learning_rate), int(config.warmup_steps), float(config.final_scale)
    if config.decay not in ("cosine", "constant"):
        raise ValueError(f'optimizer.decay: {config.decay!r} is unknown; use "cosine" or "constant"')
    if not 0 <= warmup <= steps:
        raise ValueError(f"optimizer.warmup_steps: {warmup} does not lie in a stage of {steps} steps; use 0 to {steps}")

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rising = jnp.minimum(1.0, (count + 1) / max(1, warmup))
        if config.decay == "constant":
            return peak * rising
        progress = jnp.clip((count - warmup) / max(1, steps - 1 - warmup), 0.0, 1.0)
        return peak * rising * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return schedule


def decay_mask(params):
    """Which parameters feel weight decay: true for matrices and kernels; false for biases, norms, statistics.

    Stacked layers ("blocks", see `sharding.py`) carry one more axis in front, so there a bias is two-dimensional; and
    the bias of a projection to heads is [heads, head_dim]. Hence the test is by name as well as by dimensions.

    Returns: a tree of bool like `params`.
    """

    def decays(path, leaf) -> bool:
        name = path_name(path)
        return name.rsplit("/", 1)[-1] not in NOT_DECAYED and jnp.ndim(leaf) - is_stacked(name) > 1

    return jax.tree_util.tree_map_with_path(decays, params)


def hidden_matrices(params):
    """Which parameters Muon updates: the kernels of stacked layers, each layer's [in, out] by itself.

    Returns: a tree like `params` of the dimensions that are orthogonalised, None for all other parameters.
    """

    def dimensions(path, leaf) -> MuonDimensionNumbers | None:
        name = path_name(path)
        hidden = is_stacked(name) and name.endswith("/kernel")
        return MuonDimensionNumbers(jnp.ndim(leaf) - 2, jnp.ndim(leaf) - 1) if hidden else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


# The root mean square of Muon's updates over that of the learning rate: about AdamW's, so that one learning rate serves
# both (2502.16982).
MUON_RMS = 0.2


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
    """Clip by global norm → the optimizer's direction → decoupled weight decay → learning rate.

    "adamw": Adam for all parameters (1711.05101). "muon": for `hidden_matrices`, Nesterov momentum, orthogonalised by
    five Newton–Schulz iterations and scaled to AdamW's root mean square (Jordan 2024; 2502.16982); Adam with Nesterov
    momentum, without weight decay, for all other parameters.

    Args:
        config: an `OptimizerConfig`: the schedule's fields and `name`, `b1`, `b2`, `momentum`, `eps`, `weight_decay`,
            `clip_norm` (0 clips nothing).
        steps: length of the stage in updates.
    Raises:
        ValueError: as `make_schedule`, or `clip_norm` is negative, or `name` is neither.
    """
    if config.clip_norm < 0:
        raise ValueError(
            f"optimizer.clip_norm: {config.clip_norm} is negative; use a positive norm, or 0 for no clipping"
        )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    schedule = make_schedule(config, steps)
    if config.name == "adamw":
        optimizer = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask
        )
    elif config.name == "muon":
        optimizer = muon(
            schedule,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            muon_weight_dimension_numbers=hidden_matrices,
            consistent_rms=MUON_RMS,
        )
    else:
        raise ValueError(f'optimizer.name: {config.name!r} is unknown; use "adamw" or "muon"')
    return optax.chain(*clip, optimizer)
