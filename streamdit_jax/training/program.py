"""A stage as programs: the shapes and places of its state, its first state, and its compiled step (laws 1 and 5).

The loop runs these programs; `streamdit plan` compiles the same ones for machines that are not there.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import optax

from streamdit_jax import sharding
from streamdit_jax.errors import ConfigError
from streamdit_jax.stages import StageConfig
from streamdit_jax.training.objective import Batch, Objective
from streamdit_jax.training.optimizer import make_optimizer, make_schedule
from streamdit_jax.training.state import TrainState, init_state
from streamdit_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What `objective` and `stage` are on `mesh`. Arguments may be arrays, or `jax.ShapeDtypeStruct`s for devices that
    are only described.
    """

    objective: Objective
    stage: StageConfig
    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformation
    schedule: optax.Schedule

    def abstract_state(self, key, first_batch: Batch) -> TrainState:
        """The state's shapes, types and shardings. key: of the stage; first_batch: what `Objective.init` reads.
        ConfigError where the mesh would leave much of the parameters whole on every device.
        """
        like = jax.eval_shape(functools.partial(init_state, self.objective, self.tx), key, first_batch)
        sharding.require_cut(like.params, self.mesh, f"mesh: in training.{self.objective.name},")
        return sharding.abstract_arrays(like, self.mesh)

    def first_state(self, key, first_batch: Batch, like: TrainState) -> TrainState:
        """The state before the first step, made in its place. like: `abstract_state`."""
        initialise = functools.partial(init_state, self.objective, self.tx)
        return jax.jit(initialise, out_shardings=_shardings(like))(key, first_batch)

    def lower(self, like: TrainState, constants: Any, batch: Batch, key) -> Any:
        """The step (state, constants, batch, key) → (state, metrics), lowered; the state is donated. like:
        `abstract_state`. Its `.compile()` takes this shape of batch only, so that another is an error and never a
        second compilation.
        """
        step = jax.jit(
            make_train_step(self.objective, self.tx, self.stage.ema_decay, self.schedule, self.stage.accumulate),
            donate_argnums=0,
            out_shardings=(_shardings(like), sharding.replicated(self.mesh)),
        )
        with sharding.on(self.mesh):
            return step.lower(like, constants, batch, key)

    def compile_steps(self, like: TrainState, constants: Any, batches: Iterable[Batch], key) -> "Steps":
        """The step for each of these batches, one of every shape that will come; see `lower`."""
        different = {shapes_of(batch): batch for batch in batches}
        return Steps({s: self.lower(like, constants, batch, key).compile() for s, batch in different.items()})

    def abstract_batch(self, batch: Batch) -> Batch:
        """A global batch's shapes and types with their places; see `sharding.shard_batch`."""
        whole, cut = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut if len(x.shape) else whole), batch
        )


def shapes_of(batch: Batch) -> tuple[tuple[str, str], ...]:
    """What tells batches of different buckets apart: (name, "float32[8, 4]") of each array, in a fixed order."""
    named = jax.tree_util.tree_leaves_with_path(batch)
    return tuple((sharding.path_name(path), f"{x.dtype}{list(x.shape)}") for path, x in named)


class Steps:
    """A stage's compiled steps, one for each shape of batch; called as the step. Another shape is a KeyError."""

    def __init__(self, compiled: dict[tuple, Any]):
        self._compiled = compiled

    def __len__(self) -> int:
        return len(self._compiled)

    def __call__(self, state: TrainState, constants: Any, batch: Batch, key) -> tuple[TrainState, Any]:
        return self._compiled[shapes_of(batch)](state, constants, batch, key)


def make_program(objective: Objective, stage: StageConfig, mesh: jax.sharding.Mesh) -> Program:
    """ConfigError where the batch size does not suit the mesh, or an optimizer's field is impossible."""
    field, shards = f"training.{objective.name}", sharding.batch_shards(mesh)
    parts = shards * stage.accumulate
    for name, size in stage.batch_sizes().items():
        if size % parts:
            times = f" and {stage.accumulate} parts one after another" if stage.accumulate > 1 else ""
            raise ConfigError(
                f"{field}.{name}: {size} examples cannot be cut for {shards} devices{times}; use a multiple of {parts}"
            )
    try:
        tx, schedule = make_optimizer(stage.optimizer, stage.steps), make_schedule(stage.optimizer, stage.steps)
    except ValueError as error:
        raise ConfigError(f"{field}.{error}") from error
    return Program(objective, stage, mesh, tx, schedule)


def abstract_key(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """The shape of a stage's key, the same on every device."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def make_key(seed: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """key(seed), the same on every device."""
    return jax.jit(lambda: jax.random.key(seed), out_shardings=sharding.replicated(mesh))()


def _shardings(like: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, like)
