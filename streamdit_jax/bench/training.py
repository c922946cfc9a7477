"""The training step under a clock: flow matching of text encoders and DiT, on random latents and real captions."""

import functools
import time
from typing import Any

import jax
import numpy as np

from streamdit_jax import flops
from streamdit_jax.bench.streaming import LEAST, quantiles
from streamdit_jax.bench.subject import Subject
from streamdit_jax.config import require_trainable
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.text import tokenize

CAPTION = "a red car"
# float32 parameters, their average, Adam's two moments, and the gradient.
COPIES = 5


def require_stage(subject: Subject) -> None:
    """ConfigError where the configuration trains no transformer, or a quantised one. No device is touched."""
    require_trainable(subject.config)
    if subject.config.training.flow_matching is None:
        raise ConfigError("--what: train measures training.flow_matching, which this configuration does not have")


def training_step(subject: Subject, seconds: float) -> dict[str, Any]:
    """Steps of the configuration's flow-matching stage, with its batch size, on one device.

    flops_per_step: three times those of the forwards (forward, and twice that backward) of the transformer; what
        rematerialisation repeats and the text encoders are not counted.
    Raises ConfigError where the stage is missing or its state does not fit.
    """
    from streamdit_jax.training.flow_matching import flow_matching, max_tokens
    from streamdit_jax.training.optimizer import make_optimizer, make_schedule
    from streamdit_jax.training.state import init_state
    from streamdit_jax.training.step import make_train_step

    require_stage(subject)
    config, stage = subject.config, subject.config.training.flow_matching
    parameters = jax.tree.leaves(subject.shapes())
    needed = 4 * COPIES * sum(leaf.size for leaf in parameters)
    subject.require_memory(needed, "parameters, averages, moments and gradients")
    objective = flow_matching(config, stage.objective)
    tx = make_optimizer(stage.optimizer, stage.steps)
    schedule = make_schedule(stage.optimizer, stage.steps)
    train_step = make_train_step(objective, tx, stage.ema_decay, schedule, stage.accumulate)
    step = jax.jit(train_step, donate_argnums=0)
    tokens, mask = tokenize(CAPTION, max_tokens(config.text))
    batch = {
        "latents": np.random.default_rng(0).normal(size=(stage.batch_size, *config.dit.latent)).astype(np.float32),
        "tokens": np.tile(tokens, (stage.batch_size, 1)),
        "text_mask": np.tile(mask, (stage.batch_size, 1)),
    }
    key = jax.random.key(config.seed)
    state = jax.jit(functools.partial(init_state, objective, tx))(key, batch)
    batch, constants = jax.device_put((batch, objective.constants))
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, constants, batch, key))
    first = time.perf_counter() - began
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < LEAST:
        before = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, constants, batch, key))
        times.append(time.perf_counter() - before)
    median, p99 = quantiles(times)
    per_step = 3 * stage.batch_size * flops.of_model(config, text_is_cached=False)["total"]
    return {
        "step_ms_median": median,
        "step_ms_p99": p99,
        "steps": len(times),
        "first_step_seconds": round(first, 2),
        "batch_size": stage.batch_size,
        "remat": config.dit.remat,
        "clips_per_second": round(stage.batch_size / np.median(times), 3),
        "flops_per_step": per_step,
        "loss": round(float(metrics["loss"]), 4),
    }
