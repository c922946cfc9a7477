"""The real programs, lowered for shapes alone: the training step of a stage, and one step of streaming.

They are those that `training.loop` and `pipeline` compile. No parameter, batch or state exists: each is a shape, a type
and a place.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from streamdit_jax import flops, sharding, stream
from streamdit_jax.compiled import streaming_step
from streamdit_jax.config import Config, require_trainable
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import DiTConfig, parameter_count, unstack
from streamdit_jax.models.text_cache import cache_text
from streamdit_jax.parameters import initialise
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.weights import converted_type


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program before it is compiled.

    lowered: as `jax.stages.Lowered`. arguments: its abstract arguments. parameters: how many numbers learn, or stream.
    flops, repeated: of one step on all devices, None where nobody counted them; and what rematerialisation adds.
    facts: what a report says of the choice.
    """

    lowered: Any
    arguments: Any
    parameters: int
    flops: int | None
    repeated: int
    facts: dict[str, Any]

    def argument_bytes(self) -> int:
        """On one device."""
        return sum(_bytes_on_device(leaf) for leaf in jax.tree.leaves(self.arguments))


def training_step(config: Config, stage_name: str, bucket: str | None, mesh: jax.sharding.Mesh) -> Lowered:
    """The step of a stage, on batches of a bucket; None is the stage's own shape.

    ConfigError for a bucket that the stage does not have, for a batch that the mesh cannot cut, and for a quantised
    model.
    """
    require_trainable(config)
    from streamdit_jax.training.abstract import abstract_objective
    from streamdit_jax.training.program import abstract_key, make_program

    stage = getattr(config.training, stage_name)
    objective, batches = abstract_objective(config, stage_name)
    main = next(iter(batches))
    if bucket is not None and bucket not in batches:
        raise ConfigError(f"--bucket: {bucket!r} is not one of {', '.join(batches)}")
    batch = batches[bucket or main]
    program, key = make_program(objective, stage, mesh), abstract_key(mesh)
    state = program.abstract_state(key, objective.first_batch or batches[main])
    constants = sharding.abstract_arrays(jax.eval_shape(lambda tree: tree, objective.constants), mesh)
    arguments = state, constants, program.abstract_batch(batch), key
    examples = max(leaf.shape[0] for leaf in batch.values() if leaf.shape)
    repeated = 0
    if stage_name in ("flow_matching", "distillation"):
        shape = config.dit.at(batch["latents"].shape[1:4])
        repeated = examples * rematerialised(shape, flops.text_tokens(config))
    facts = {
        "stage": stage_name,
        "bucket": bucket or main,
        "batch_size": examples,
        "accumulate": stage.accumulate,
        "remat": config.dit.remat,
    }
    counted = None if objective.flops is None else objective.flops(batch)
    return Lowered(program.lower(*arguments), arguments, parameter_count(state.params), counted, repeated, facts)


def streaming_program(config: Config, mesh: jax.sharding.Mesh) -> Lowered:
    """One micro step of one stream: the transformer in its own precision, its layers unrolled."""
    scheme = PartitionScheme.parse(config.sampling.scheme)
    shape = PartitionScheme(scheme.num_references, scheme.num_chunks, scheme.chunk_size, 1)
    dtype, frame, guidance = config.dit.compute_dtype, config.dit.latent[1:], config.sampling.guidance

    def begin(key):
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(converted_type(sharding.path_name(path), leaf.dtype, dtype)),
            initialise(config, key)["dit"],
        )
        state = stream.initial_state(key[None], shape, frame, config.sampling.filling)
        tokens = flops.text_tokens(config) // len(config.text)
        text = tuple((jnp.zeros((1, tokens, of.width)), jnp.ones((1, tokens), bool)) for of in config.text)
        source = stream.Source(jnp.zeros((1, shape.chunk_size, *frame)), jnp.zeros((1, shape.chunk_size)))
        cached = cache_text(config.dit, params, text)
        return unstack(params), state, stream.Condition(cached, cached, jnp.full(1, guidance)), source

    params, state, condition, source = jax.eval_shape(begin, jax.random.key(0))
    row = jax.eval_shape(lambda: stream.stack_rows([stream.row_at(stream.streaming_rows(scheme), 0)]))
    whole = sharding.replicated(mesh)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), (state, row, condition, source)
    )
    arguments = sharding.abstract_arrays(params, mesh), *placed
    with sharding.on(mesh):
        lowered = streaming_step(config.dit, shape, stream.is_masked(config.sampling.filling)).lower(*arguments)
    forwards = 1 if guidance == 1 else 2
    facts = {"scheme": config.sampling.scheme, "guidance": guidance, "forwards_in_one": forwards}
    counted = forwards * flops.of_model(config)["total"]
    return Lowered(lowered, arguments, parameter_count(params), counted, 0, facts)


def rematerialised(config: DiTConfig, text_tokens: int) -> int:
    """Products of one example's forward that the backward pass computes again, by `remat`."""
    counts = flops.forward_flops(config, text_tokens)
    if config.remat == "none":
        return 0
    if config.remat == "dots":  # what has batch dimensions is not kept: scores and weighted values
        return counts["window_attention"] + counts["cross_attention"]
    # All that is within the blocks: what grows with their number.
    twice = flops.forward_flops(dataclasses.replace(config, num_layers=2 * config.num_layers), text_tokens)
    return twice["total"] - counts["total"]


def _bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    data = jax.eval_shape(jax.random.key_data, leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    whole = math.prod(data.shape) * data.dtype.itemsize
    return whole * math.prod(leaf.sharding.shard_shape(leaf.shape)) // max(1, math.prod(leaf.shape))
