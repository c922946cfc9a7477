"""Streaming inference: a buffer that denoises as a whole, emits at its front and takes in noise at its tail
(StreamDiT §3.1, §8; fig. 11–13).

A stream is a pure state and rows of levels that are applied to it, one forward each:

    denoise   X ← X + u(X, P, τ) ∘ Δτ over the whole buffer                                             (eq. 6)
    advance   after the last micro step: emit chunk 0; references ← last K of (references ∪ emitted);
              every chunk moves one place towards the front; fresh noise enters at the tail

Filling (fig. 13) is rows too, so that it runs through the same compiled step: `uniform` denoises all B frames
together and keeps, for each place of the buffer, the snapshot at that place's level; `ramp` starts from one noise
chunk and lets the others enter one by one; `doubling`, which is not the paper's, makes one frame clean, then the next
given the first, then two given two, four given four, and keeps snapshots as `uniform` does.

Filling anew, which is not the paper's either, is doubling in the middle of a stream: of its buffer only the first
frame, once it is clean, is kept, or some of it (`renew`), and the others are made after it, under the prompt of now.

A batch is independent streams: each has its own row, so that one may fill while another shifts and a third is idle.
The noise of chunk i is drawn from fold_in(key, i): a stream is the same however it is cut, resumed or batched.

Video to video (SDEdit, §5.4): a frame that enters with an input x_in of its own stays on the straight path from its
noise ε to x_in, whose velocity x_in − (1 − σ)·ε is constant, while its level is below `hold_until`; then it runs free.

A model is known here only as `velocity(latents, text, levels)`, with the mask of existing frames as a fourth argument
while a buffer ramps up or doubles.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from streamdit_jax import flow
from streamdit_jax.partition import FILLINGS, PartitionScheme

Velocity = Callable[..., Float[Array, "b f h w c"]]
REFERENCE_NOISE = np.uint32(0xFFFFFFFF)  # the "chunk" whose noise fills the places of references before there are any


class StreamState(NamedTuple):
    """What a stream is between two forwards.

    buffer: latents [batch, B, height, width, channels], float32. queue: the places that filling has finished, same
        shape.
    path: the constant velocity from a frame's noise to its input, same shape. hold_until: [batch, B], the level below
        which that velocity is taken instead of the predicted one; 0 for frames without an input.
    present: [batch, B], False for frames that do not exist yet. keys: one key per stream. next_chunk: [batch], number
        of the chunk that enters next.
    """

    buffer: Float[Array, "b f h w c"]
    queue: Float[Array, "b f h w c"]
    path: Float[Array, "b f h w c"]
    hold_until: Float[Array, "b f"]
    present: Bool[Array, "b f"]
    keys: Array
    next_chunk: Int[Array, "b"]


class Source(NamedTuple):
    """The input of frames that enter: of the c frames at the tail, or of a whole buffer at its start (§5.4).

    latents: [batch, frames, height, width, channels]. hold_until: [batch, frames], the level 1 − strength up to which a
        frame stays on the path to its input; 0 leaves it free from the first step.
    """

    latents: Float[Array, "b f h w c"]
    hold_until: Float[Array, "b f"]


class Condition(NamedTuple):
    """What steers a forward; all of it is data, so that changing it never recompiles.

    text, null_text: the prompt's and the empty prompt's encoding, pytrees with a leading batch axis. guidance:
        [batch]; 1 is unguided, and if every stream is, the forward for the empty prompt is not run.
    """

    text: Any
    null_text: Any
    guidance: Float[Array, "b"]


class Row(NamedTuple):
    """One forward: of all streams of a batch alike, or, by `stack_rows`, of each its own. Stacked along a leading axis,
    rows are also a program for a scan.

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


def stack_rows(rows: Sequence[Row]) -> Row:
    """The rows of a batch's streams, each [batch, …]: streams in one forward need not be in step."""
    return Row(*(np.stack(values) for values in zip(*rows)))


def idle_row(scheme: PartitionScheme) -> Row:
    """The row that leaves a stream bit for bit as it is: no level changes, nothing enters, nothing is emitted."""
    nothing = np.zeros(scheme.buffer_size, bool)
    return Row(np.ones((2, scheme.buffer_size), np.float32), nothing, nothing, np.bool_(False), np.bool_(False))


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


def filling_rows(scheme: PartitionScheme, filling: str = "uniform", *, given_references: bool = False) -> Row:
    """The rows that fill a buffer from noise (§8, fig. 13): "uniform", "ramp" or "doubling". ValueError otherwise.

    Uniform takes (N − 1)·s forwards, and T = N·s where there are references for it to make. Ramp takes (N − 1)·s.
    Doubling takes T for each of about log2(B) blocks, and fewer for the last.
    given_references: the references are clean from the start (`initial_state`), and no one has to make them.
    """
    chunk, size = scheme.chunk_ids(), scheme.buffer_size
    if filling == "doubling":
        # The step of a block after which a frame is as clean as its place in the buffer asks.
        place = np.where(chunk < 0, scheme.total_steps, (scheme.num_chunks - 1 - chunk) * scheme.micro_steps)
        return _doubling_rows(scheme, place, (chunk < 0) & given_references)
    if filling == "uniform":
        makes_references = scheme.num_references > 0 and not given_references
        steps = scheme.total_steps if makes_references else scheme.total_steps - scheme.micro_steps
        grid = scheme.grid()
        pairs = np.stack([grid[:steps], grid[1 : steps + 1]], axis=1)
        reached = np.arange(1, steps + 1)[:, None]
        at_place = reached == (scheme.num_chunks - 1 - chunk) * scheme.micro_steps
        levels = np.repeat(pairs[:, :, None], size, axis=2)
        return Row(
            levels=np.where((chunk < 0) & given_references, np.float32(1), levels),
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
    raise ValueError(f"filling: {filling!r} is not one of {', '.join(FILLINGS)}")


def refilling_rows(scheme: PartitionScheme, strength: float = 0.0) -> Row:
    """The rows that fill a buffer anew, by doubling, from its first frame: after the last micro step of a move, which
    must not advance, and `renew` at the level of the first row. They end with that advance. None where a buffer is one
    frame that stays as it is.

    strength: the share of the first frame's T steps that are taken again, rounded to whole ones (`partition.Refill`).
    ValueError for a scheme with references, which would bring back what they show.
    """
    if scheme.num_references:
        raise ValueError(f"refill: {scheme} has references, which would bring back what is to change; set it to 0")
    chunk, kept = scheme.chunk_ids(), round((1 - strength) * scheme.total_steps)
    given = (np.arange(len(chunk)) == 0) & (kept == scheme.total_steps)
    rows = _doubling_rows(scheme, (scheme.num_chunks - chunk) * scheme.micro_steps, given)
    rows = rows._replace(advance=rows.adopt)
    return rows if given[0] else jax.tree.map(lambda values: values[kept:], rows)


def _doubling_rows(scheme: PartitionScheme, place: Int[np.ndarray, "B"], given: Bool[np.ndarray, "B"]) -> Row:
    """A block after another, of the frames that are not given, until every frame has taken the steps of its place; the
    last block no more than that.
    """
    blocks = np.where(given, -1, scheme.doubling_blocks())
    wanted = sorted(set(blocks[(place > 0) & (blocks >= 0)]))
    lengths = [scheme.total_steps for _ in wanted[:-1]] + [place[blocks == last].max() for last in wanted[-1:]]
    row_block = np.repeat(np.array(wanted, np.int32), lengths)[:, None]
    reached = np.concatenate([np.zeros((0, 1), int), *(np.arange(1, length + 1)[:, None] for length in lengths)])
    levels = [scheme.doubling_levels(block) for block in wanted]
    pairs = [np.stack([of[:length], of[1 : length + 1]], axis=1) for of, length in zip(levels, lengths)]
    levels = np.concatenate([np.zeros((0, 2, scheme.buffer_size), np.float32), *pairs])
    return Row(
        levels=np.where(given, np.float32(1), levels),
        enter=row_block == blocks,
        keep=(row_block == blocks) & (reached == place),
        adopt=np.arange(len(levels)) == len(levels) - 1,
        advance=np.zeros(len(levels), bool),
    )


def is_masked(filling: str) -> bool:
    """Whether the model must be told which frames exist, in streams whose buffer is filled so."""
    return filling != "uniform"


def chunk_noise(keys: Array, chunk: Int[Array, "*#b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """The noise of one chunk, or of each stream's own, for every stream: normal(fold_in(key, chunk))."""

    def noise(key, chunk):
        return jax.random.normal(jax.random.fold_in(key, chunk), shape, jnp.float32)

    return jax.vmap(noise)(keys, jnp.broadcast_to(jnp.asarray(chunk, jnp.uint32), len(keys)))


def initial_state(
    keys: Array,
    scheme: PartitionScheme,
    frame: tuple[int, int, int],
    filling: str = "uniform",
    *,
    source: Source | None = None,
    references: Float[Array, "b K h w c"] | None = None,
) -> StreamState:
    """A buffer of noise, before filling. keys: [batch]; frame: (height, width, channels) of a latent frame.

    source: an input for every frame of the buffer (video to video). references: clean latents that are the references
    from the first step on; fill with `filling_rows(…, given_references=True)` then.
    """
    K = scheme.num_references
    chunks = [chunk_noise(keys, jnp.uint32(i), (scheme.chunk_size, *frame)) for i in range(scheme.num_chunks)]
    buffer = jnp.concatenate([chunk_noise(keys, REFERENCE_NOISE, (K, *frame)), *chunks], axis=1)
    present = jnp.full(buffer.shape[:2], not is_masked(filling))
    if source is None:
        source = Source(jnp.zeros_like(buffer), jnp.zeros(buffer.shape[:2]))
    path = flow.velocity_target(source.latents, buffer)
    if references is not None:
        buffer, present = buffer.at[:, :K].set(references), present.at[:, :K].set(True)
    return StreamState(
        buffer=buffer,
        queue=jnp.copy(buffer),  # of its own: both are donated to the first step
        path=path,
        hold_until=jnp.array(source.hold_until, jnp.float32),
        present=present,
        keys=keys,
        next_chunk=jnp.full(len(keys), scheme.num_chunks, jnp.uint32),
    )


def renew(state: StreamState, scheme: PartitionScheme, level: Float[Array, ""] | float = 1.0) -> StreamState:
    """The buffer with its first frame alone, put back to a level by its own noise; the others are the noise again that
    they were when they entered, and do not exist yet. For schemes without references; `refilling_rows` follow.
    """
    c, chunks = scheme.chunk_size, range(scheme.num_chunks)
    entered = [state.next_chunk - np.uint32(scheme.num_chunks - chunk) for chunk in chunks]
    frame = state.buffer.shape[2:]
    noise = jnp.concatenate([chunk_noise(state.keys, chunk, (c, *frame)) for chunk in entered], axis=1)
    first = jnp.broadcast_to(jnp.arange(scheme.buffer_size) == 0, state.present.shape)
    begun = jnp.where(level < 1, flow.interpolate(state.buffer, noise, jnp.full(first.shape, level)), state.buffer)
    queue = _where(first, state.buffer, state.queue)  # where a frame that stays as it is has its snapshot
    return state._replace(buffer=_where(first, begun, noise), queue=queue, present=first)


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


def _where(which: Bool[Array, "..."], this: Array, other: Array) -> Array:
    """`jnp.where` by stream, or by stream and frame."""
    return jnp.where(which.reshape(which.shape + (1,) * (this.ndim - which.ndim)), this, other)


def step(
    velocity: Velocity,
    state: StreamState,
    row: Row,
    condition: Condition,
    scheme: PartitionScheme,
    source: Source | None = None,
    *,
    masked: bool = False,
) -> tuple[StreamState, Float[Array, "b c h w channels"]]:
    """One forward: denoise by `row`, then keep, adopt, or emit, shift and refill (§3.1, eq. 6).

    Of `scheme` only K and c are read; levels come from `row`, so schedules and micro steps are data. row: one for all
    streams, or with a leading axis one for each (`stack_rows`); an idle one leaves its stream bit for bit as it is.
    source: the input of the frames that enter with this row's advance; None for none. masked: give the model the mask
    of existing frames; needed until all of them, references included, exist.

    Returns the state, and the frames [batch, c, …] at the place of chunk 0, which are clean when `row.advance`.
    """
    K, c = scheme.num_references, scheme.chunk_size
    row = jax.tree.map(jnp.asarray, row)
    if row.advance.ndim == 0:
        row = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(state.keys), *x.shape)), row)
    present = state.present | row.enter
    now, then = row.levels[:, 0], row.levels[:, 1]
    predicted = guided_velocity(velocity, state.buffer, now, condition, present if masked else None)
    held = _where(now < state.hold_until, state.path, predicted)
    buffer = flow.euler_step(state.buffer, held, now, then)
    queue = _where(row.keep, buffer, state.queue)
    buffer = _where(row.adopt, queue, buffer)
    front = buffer[:, K : K + c]
    # Dropping the first c frames also makes the references the last K of (references ∪ emitted). What enters is drawn
    # in every forward: on a GPU a branch waits for the host, and the noise of a chunk is soon drawn.
    noise = chunk_noise(state.keys, state.next_chunk, front.shape[1:])
    inputs, hold = source or Source(jnp.zeros_like(noise), jnp.zeros(noise.shape[:2]))
    enters = noise, flow.velocity_target(inputs, noise), hold, jnp.ones(noise.shape[:2], bool)
    stays = buffer, state.path, state.hold_until, present
    moved = (jnp.concatenate([old[:, c:], new], axis=1) for old, new in zip(stays, enters))
    buffer, path, hold_until, present = (_where(row.advance, new, old) for new, old in zip(moved, stays))
    next_chunk = state.next_chunk + row.advance.astype(state.next_chunk.dtype)
    return StreamState(buffer, queue, path, hold_until, present, state.keys, next_chunk), front


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

    Returns clean latents [batch, K + num_chunks·c, height, width, channels]; the K are made by filling, and a ramp-up
    has none.
    """
    K, c = scheme.num_references, scheme.chunk_size
    fill = filling_rows(scheme, filling)
    rows = jax.tree.map(
        lambda first, again: np.concatenate([first, np.tile(again, (num_chunks,) + (1,) * (again.ndim - 1))]),
        fill,
        streaming_rows(scheme),
    )
    masked = is_masked(filling)
    made = 0 if filling == "ramp" else K
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
