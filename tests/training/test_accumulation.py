"""Gradient accumulation: the update of the whole batch, in parts that need less memory, cut over devices or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from streamdit_jax import sharding
from streamdit_jax.errors import ConfigError
from streamdit_jax.training.objective import Objective
from streamdit_jax.training.program import make_program
from streamdit_jax.training.state import init_state
from streamdit_jax.training.step import make_train_step

SIZE = 512


def one_step(toy, parts, mesh, poison=None):
    """What a step of a loss without randomness makes of the toy: (state, metrics, compiled step)."""
    objective = Objective("toy", toy.init, toy.loss, {"noise": np.float32(0)})
    program = make_program(objective, toy.stage(9, batch_size=SIZE, accumulate=parts), mesh)
    local, key = toy.batch(0, SIZE), jax.random.key(3)
    if poison is not None:
        local["x"][poison] = np.nan
    batch, constants = sharding.shard_batch(local, mesh), sharding.place(objective.constants, mesh)
    like = program.abstract_state(key, batch)
    step = program.lower(like, constants, batch, key).compile()
    return *step(program.first_state(key, batch, like), constants, batch, key), step


def single():
    return sharding.make_mesh({"data": -1}, jax.devices()[:1])


def assert_same_update(one, other):
    """The loss, the gradient's norm and Adam's moments, which are the gradient; an update's sign hides small ones."""
    for name in ("loss", "mae", "grad_norm"):
        np.testing.assert_allclose(one[1][name], other[1][name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[0].opt_state), jax.tree.leaves(other[0].opt_state)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_parts_make_the_update_of_the_whole_with_less_memory(toy):
    whole, parts = one_step(toy, 1, single()), one_step(toy, 8, single())
    assert_same_update(whole, parts)
    temporary = [made[2].memory_analysis().temp_size_in_bytes for made in (whole, parts)]
    assert temporary[1] < temporary[0] / 2


def test_a_part_that_is_not_finite_skips_the_whole_update(toy):
    state, metrics, _ = one_step(toy, 4, single(), poison=SIZE - 1)
    assert not np.isfinite(metrics["loss"]) and metrics["nonfinite_count"] == 1 and state.step == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema_params)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_each_part_has_randomness_of_its_own(toy):
    """Were the draws of all parts one, their mean square would be the square of their mean."""

    def loss(params, constants, batch, key):
        value, extra = toy.loss(params, constants, batch, key)
        draw = jax.random.uniform(key)
        return value, {**extra, "draw": draw, "square": draw**2}

    step = make_train_step(toy.objective(loss), optax.sgd(0.1), 0.9, accumulate=4)
    state = init_state(toy.objective(loss), optax.sgd(0.1), jax.random.key(0), toy.batch(0))
    _, metrics = jax.jit(step)(state, {"noise": np.float32(0)}, toy.batch(0), jax.random.key(3))
    assert metrics["square"] - metrics["draw"] ** 2 > 1e-3


def test_batches_that_do_not_divide_are_named(toy):
    with pytest.raises(ValueError, match="accumulate: 3 does not divide a batch_size of 16"):
        toy.stage(9, accumulate=3)
    two = jax.sharding.Mesh(np.array(jax.devices()[:1] * 2), ("data",))
    with pytest.raises(
        ConfigError, match=r"toy.batch_size: 16 examples cannot be cut for 2 devices and 16 parts .* 32"
    ):
        make_program(toy.objective(), toy.stage(9, accumulate=16), two)


SHARDED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jax, toy, test_accumulation as here
from streamdit_jax import sharding
mesh = sharding.make_mesh({"data": 2, "fsdp": 2})
made = [here.one_step(toy, parts, mesh) for parts in (1, 4)]
here.assert_same_update(*made)
here.assert_same_update(here.one_step(toy, 1, here.single()), made[1])
gathers = [step.as_text().count(" all-gather(") for *_, step in made]
temporary = [step.memory_analysis().temp_size_in_bytes for *_, step in made]
print(json.dumps({"gathers": gathers, "temporary": temporary}))
"""


@pytest.mark.slow
def test_parts_of_a_batch_that_is_cut_over_devices():
    """Four devices: the same update, nothing gathered that was not gathered before, and less memory on each."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", SHARDED, str(Path(__file__).parent)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["gathers"][0] == said["gathers"][1] > 0
    assert said["temporary"][1] < said["temporary"][0] / 2
