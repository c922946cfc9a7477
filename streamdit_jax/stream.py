"""Streaming inference: a buffer that denoises as a whole, emits at its front and takes in noise at its tail
(StreamDiT §3.1, §8; fig. 11–13).

A stream is a pure state and rows of levels that are applied to it, one forward each:

    denoise   X ← X + u(X, P, τ) ∘ Δτ over the whole buffer                                             (eq. 6)
    advance   after the last micro step: emit chunk 0; references ← last K of (references ∪ emitted);
              every chunk moves one place towards the front; fresh noise enters at the tail

Filling (fig. 13) is rows too, so that it runs through the same compiled step: `uniform` denoises all B frames
together and keeps, for each place of the buffer, the snapshot at that place's level; `ramp` starts from one noise
chunk and lets the others enter one by one.

The noise of chunk i is drawn from fold_in(key, i): a stream is the same however it is cut, resumed or batched. A
model is known here only as `velocity(latents, text, levels)`, with the mask of existing frames as a fourth argument
while a buffer ramps up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from streamdit_jax import flow
from streamdit_jax.partition import PartitionScheme

Velocity = Callable[..., Float[Array, "b f h w c"]]
REFERENCE_NOISE = np.uint32(0xFFFFFFFF)  # the "chunk" whose noise fills the places of references before there are any


class StreamState(NamedTuple):
    """What a stream is between two forwards.

    buffer: latents [batch, B, height, width, channels], float32. queue: the places that filling has finished, same
        shape.
    present: [batch, B], False for frames that do not exist yet. keys: one key per stream. next_chunk: number of the
        chunk that enters next.
    """

    buffer: Float[Array, "b f h w c"]
    queue: Float[Array, "b f h w c"]
    present: Bool[Array, "b f"]
    keys: Array
    next_chunk: Int[Array, ""]


class Condition(NamedTuple):
    """What steers a forward; all of it is data, so that changing it never recompiles.

    text, null_text: the prompt's and the empty prompt's encoding, pytrees with a leading batch axis. guidance:
        [batch]; 1 is unguided, and if every stream is, the forward for the empty prompt is not run.
    """

    text: Any
    null_text: Any
    guidance: Float[Array, "b"]


class Row(NamedTuple):
    """One forward. Stacked along a leading axis, rows are a program for a scan.

    levels: [2, B], each frame's flow time before and after. enter: [B], frames that exist from here on. keep: [B],
        frames whose value after the step goes to the queue. adopt: the queue becomes the buffer. advance: the step
        ends with emission, shift and refill.
    """

    levels: Float[np.ndarray, "*n 2 f"]
    enter: Bool[np.ndarray, "*n f"]
    keep: Bool[np.ndarray, "*n f"]
    adopt: Bool[np.ndarray, "*n"]
    advance: Bool[np.ndarray, "*n"]


def row_at(rows: Row, index: int) -> Row:
    """One row of a program."""
    return Row(*(values[index] for values in rows))


def streaming_rows(scheme: PartitionScheme) -> Row:
    """The s rows that carry every chunk one place forward (§3.1). The chunk at the tail exists from here on, if it
    did not before.
    """
    steps = scheme.step_levels()
    shape = (scheme.micro_steps, scheme.buffer_size)
    return Row(
        levels=np.stack([steps[:-1], steps[1:]], axis=1),
        enter=np.broadcast_to(scheme.chunk_ids() == scheme.num_chunks - 1, shape),
        keep=np.zeros(shape, bool),
        adopt=np.zeros(scheme.micro_steps, bool),
        advance=np.arange(scheme.micro_steps) == scheme.micro_steps - 1,
    )


def filling_rows(scheme: PartitionScheme, filling: str = "uniform") -> Row:
    """The rows that fill a buffer from noise (§8, fig. 13): "uniform" or "ramp". ValueError otherwise.

    Uniform takes (N − 1)·s forwards, and T = N·s where there are references, which it makes. Ramp takes (N − 1)·s.
    """
    chunk, size = scheme.chunk_ids(), scheme.buffer_size
    if filling == "uniform":
        steps = scheme.total_steps if scheme.num_references else scheme.total_steps - scheme.micro_steps
        grid = scheme.grid()
        pairs = np.stack([grid[:steps], grid[1 : steps + 1]], axis=1)
        reached = np.arange(1, steps + 1)[:, None]
        at_place = reached == (scheme.num_chunks - 1 - chunk) * scheme.micro_steps
        return Row(
            levels=np.repeat(pairs[:, :, None], size, axis=2),
            enter=np.zeros((steps, size), bool),
            keep=np.where(chunk < 0, reached == scheme.total_steps, at_place),
            adopt=np.arange(steps) == steps - 1,
            advance=np.zeros(steps, bool),
        )
    if filling == "ramp":
        stages = range(1, scheme.num_chunks)
        levels = [np.stack([rows[:-1], rows[1:]], axis=1) for rows in map(scheme.ramp_levels, stages)]
        steps = len(levels) * scheme.micro_steps
        # The last chunk enters with the first streaming row, whose levels already count it in.
        enters = np.repeat(np.arange(scheme.num_chunks - 1), scheme.micro_steps)[:, None] == chunk
        return Row(
            levels=np.concatenate(levels) if levels else np.zeros((0, 2, size), np.float32),
            enter=enters,
            keep=np.zeros((steps, size), bool),
            adopt=np.zeros(steps, bool),
            advance=np.zeros(steps, bool),
        )
    raise ValueError(f"filling: {filling!r} is not one of uniform, ramp")


def chunk_noise(keys: Array, chunk: Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """The noise of one chunk for every stream: normal(fold_in(key, chunk))."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, chunk), shape, jnp.float32))(keys)


def initial_state(
    keys: Array, scheme: PartitionScheme, frame: tuple[int, int, int], filling: str = "uniform"
) -> StreamState:
    """A buffer of noise, before filling. keys: [batch]; frame: (height, width, channels) of a latent frame."""
    chunks = [chunk_noise(keys, jnp.uint32(i), (scheme.chunk_size, *frame)) for i in range(scheme.num_chunks)]
    references = chunk_noise(keys, REFERENCE_NOISE, (scheme.num_references, *frame))
    buffer = jnp.concatenate([references, *chunks], axis=1)
    shape = (len(keys), scheme.buffer_size)
    return StreamState(
        buffer=buffer,
        queue=jnp.copy(buffer),  # of its own: both are donated to the first step
        present=jnp.full(shape, filling == "uniform"),
        keys=keys,
        next_chunk=jnp.uint32(scheme.num_chunks),
    )


def guided_velocity(
    velocity: Velocity, latents: Array, levels: Array, condition: Condition, present: Array | None
) -> Float[Array, "b f h w c"]:
    """u(∅) + w·(u(P) − u(∅)); a single forward at run time when every guidance is 1."""

    def forward(latents, text, levels, present):
        return velocity(latents, text, levels) if present is None else velocity(latents, text, levels, present)

    def unguided():
        return forward(latents, condition.text, levels, present).astype(jnp.float32)

    def guided():
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), (latents, levels, present))
        text = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition.null_text, condition.text)
        both = forward(twice[0], text, twice[1], twice[2]).astype(jnp.float32)
        return flow.guide(*jnp.split(both, 2), condition.guidance)

    return jax.lax.cond(jnp.all(condition.guidance == 1), unguided, guided)


def step(
    velocity: Velocity,
    state: StreamState,
    row: Row,
    condition: Condition,
    scheme: PartitionScheme,
    *,
    masked: bool = False,
) -> tuple[StreamState, Float[Array, "b c h w channels"]]:
    """One forward: denoise by `row`, then keep, adopt, or emit, shift and refill (§3.1, eq. 6).

    Of `scheme` only K, N and c are read; levels come from `row`, so schedules and micro steps are data. masked: give
    the model the mask of existing frames; needed until a ramp-up, references included, is complete.

    Returns the state, and the frames [batch, c, …] at the place of chunk 0, which are clean when `row.advance`.
    """
    K, c = scheme.num_references, scheme.chunk_size
    row = jax.tree.map(jnp.asarray, row)
    present = state.present | row.enter
    levels = jnp.broadcast_to(row.levels[:, None], (2, *present.shape))
    predicted = guided_velocity(velocity, state.buffer, levels[0], condition, present if masked else None)
    buffer = flow.euler_step(state.buffer, predicted, levels[0], levels[1])
    queue = jnp.where(row.keep[:, None, None, None], buffer, state.queue)
    buffer = jnp.where(row.adopt, queue, buffer)
    front = buffer[:, K : K + c]

    def shift():
        # Dropping the first c frames also makes the references the last K of (references ∪ emitted).
        def moved(x, incoming):
            return jnp.concatenate([x[:, c:], incoming], axis=1)

        noise = chunk_noise(state.keys, state.next_chunk, front.shape[1:])
        entered = jnp.ones((len(present), c), bool)
        return moved(buffer, noise), moved(present, entered), state.next_chunk + 1

    buffer, present, next_chunk = jax.lax.cond(row.advance, shift, lambda: (buffer, present, state.next_chunk))
    return StreamState(buffer, queue, present, state.keys, next_chunk), front


def sample(
    velocity: Velocity,
    keys: Array,
    condition: Condition,
    scheme: PartitionScheme,
    frame: tuple[int, int, int],
    num_chunks: int,
    *,
    filling: str = "uniform",
) -> Float[Array, "b frames h w c"]:
    """Offline sampling: filling and `num_chunks` emissions as one `lax.scan`, so that it compiles one forward (§3.1).

    Returns clean latents [batch, K + num_chunks·c, height, width, channels]; the K come from a uniform filling, and a
    ramp-up has none.
    """
    K, c = scheme.num_references, scheme.chunk_size
    fill = filling_rows(scheme, filling)
    rows = jax.tree.map(
        lambda first, again: np.concatenate([first, np.tile(again, (num_chunks,) + (1,) * (again.ndim - 1))]),
        fill,
        streaming_rows(scheme),
    )
    masked = filling == "ramp"
    made = K if filling == "uniform" else 0
    state = initial_state(keys, scheme, frame, filling)
    output = jnp.zeros((len(keys), made + num_chunks * c, *frame), jnp.float32)

    def body(carry, row):
        state, output, place = carry
        state, front = step(velocity, state, row, condition, scheme, masked=masked)
        if made:
            output = jnp.where(row.adopt, output.at[:, :made].set(state.buffer[:, :made]), output)
        written = jax.lax.dynamic_update_slice_in_dim(output, front, place, axis=1)
        return (state, jnp.where(row.advance, written, output), place + c * row.advance), None

    (_, output, _), _ = jax.lax.scan(body, (state, output, jnp.int32(made)), rows)
    return output
