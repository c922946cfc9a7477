"""Multistep distillation: a student makes in one unguided step what its teacher makes in r guided ones (§4.2).

The whole buffer goes from Y_0 at levels τ^0 to the next step of the *student's* scheme, τ^r, on the teacher's finer
grid:

    teacher       g = u(∅) + w·(u(P) − u(∅)),  Y_{m+1} = Y_m + (τ^{m+1} − τ^m) ∘ g,  m = 0 … r − 1
    segment       v̄ = (Y_r − Y_0) / (τ^r − τ^0)                     the average velocity, of the buffer jointly
    consistency   one teacher step from Y_m, then the student's own step to τ^r, instead of the rest   (2403.06807)
    loss          mean over scored frames of ‖u_φ(Y_0, P, τ^0) − stop_grad(v̄)‖²

With N8c2s1 and r = 16 this is the paper's: 128 guided steps become 8. With N8c2s8 and r = 2 it is one round of
progressive halving, 16 → 8, to be repeated with the student as the teacher. Reference frames do not move and are not
scored. A model is known here only as `velocity(latents, text, levels)`, with the mask of existing frames as a fourth
argument where a buffer may ramp up or double.

Inputs Y_0 are real clips noised to the levels that streaming visits; a share of them instead to those of a filling,
uniform, ramping up or doubling, so that the student can fill its own buffer; and a share made by the student itself,
streaming from there on, so that it learns to mend its own drift.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from streamdit_jax import flow, stream
from streamdit_jax.partition import FILLINGS, PartitionScheme


class Walks(NamedTuple):
    """The steps that a student takes of one kind, as its teacher walks them.

    levels: [n, r + 1, B], those of the teacher's r steps within each. present: [n, B], the frames that exist.
    """

    levels: Float[np.ndarray, "n steps B"]
    present: Bool[np.ndarray, "n B"]


class Starts(NamedTuple):
    """Every place a student's step can start from, as arrays: data to the compiled step.

    streaming: its s micro steps. fillings: the steps of each of `FILLINGS`.
    """

    streaming: Walks
    fillings: dict[str, Walks]


class Drawn(NamedTuple):
    """A start for each example: the levels of the teacher's steps, [b, r + 1, B]; the frames that exist, and those that
    this step changes and that have a loss, [b, B].
    """

    levels: Float[Array, "b steps B"]
    present: Bool[Array, "b B"]
    scored: Bool[Array, "b B"]


def starts(scheme: PartitionScheme, teacher_steps: int) -> Starts:
    """The levels at which a teacher of `teacher_steps` steps, r, for each of the student's walks a buffer of `scheme`.

    The teacher's grid is γ(k / (r·T)): its every r-th point is the student's. ValueError for r < 1.
    """
    if teacher_steps < 1:
        raise ValueError(f"teacher_steps: at least 1, not {teacher_steps}")
    finer = PartitionScheme(
        scheme.num_references,
        scheme.num_chunks,
        scheme.chunk_size,
        scheme.micro_steps * teacher_steps,
        scheme.power,
    )

    def walks(rows, entered=None):
        """The teacher's rows, r at a time; neighbours share an end. entered: of the student's rows; None for all."""
        pairs = rows.levels.reshape(-1, teacher_steps, 2, scheme.buffer_size)
        levels = np.concatenate([pairs[:, :, 0], pairs[:, -1:, 1]], axis=1)
        if entered is None:
            return Walks(levels, np.ones((len(levels), scheme.buffer_size), bool))
        return Walks(levels, np.logical_or.accumulate(entered, axis=0))

    fillings = {
        filling: walks(stream.filling_rows(finer, filling), stream.filling_rows(scheme, filling).enter)
        for filling in FILLINGS
        if stream.is_masked(filling)
    }
    # To its end, though a buffer without references is filled a chunk earlier; references, if any, are given.
    whole = stream.streaming_rows(finer.uniform())
    whole = whole._replace(levels=np.where(scheme.chunk_ids() < 0, np.float32(1), whole.levels))
    return Starts(walks(stream.streaming_rows(finer)), {"uniform": walks(whole), **fillings})


def draw_starts(key: Array, start: Starts, batch_size: int, shares: Mapping[str, float | Array]) -> Drawn:
    """A start for each example: a micro step of streaming or, for a share each, of a filling; evenly drawn. shares: of
    some of `FILLINGS`; a filling that takes no steps has none.
    """

    def one(row):
        share_key, place_key = jax.random.split(jax.random.fold_in(key, row))
        share, place = jax.random.uniform(share_key), jax.random.uniform(place_key)

        def pick(walks):
            number = len(walks.levels)
            index = jnp.minimum((place * number).astype(int), number - 1)
            return tuple(jnp.asarray(bank)[index] for bank in walks)

        (levels, present), below = pick(start.streaming), 0.0
        for filling, walks in start.fillings.items():
            above = below + shares.get(filling, 0.0)
            if len(walks.levels):
                chosen = (share >= below) & (share < above)
                levels, present = (jnp.where(chosen, *both) for both in zip(pick(walks), (levels, present)))
            below = above
        return Drawn(levels, present, present & (levels[-1] > levels[0]))

    return jax.vmap(one)(jnp.arange(batch_size))


def _moved(velocity: Array, levels: Array, next_levels: Array) -> Array:
    """How far a step takes a buffer. Summed, it keeps the digits that (Y_r − Y_0) would lose on short segments."""
    return velocity * (next_levels - levels)[..., None, None, None]


def _average(moved: Array, levels: Array, next_levels: Array) -> Array:
    """Displacement over flow time; 0 for frames that do not move."""
    delta = (next_levels - levels)[..., None, None, None]
    return jax.lax.stop_gradient(jnp.where(delta == 0, 0, moved / jnp.where(delta == 0, 1, delta)))


def segment_target(
    teacher: stream.Velocity,
    latents: Float[Array, "b f h w c"],
    levels: Float[Array, "b steps f"],
    condition: stream.Condition,
    present: Bool[Array, "b f"] | None = None,
) -> Float[Array, "b f h w c"]:
    """v̄ of the teacher's r guided steps from `latents` along `levels` [b, r + 1, f] (§4.2); 0 where nothing moves.
    present: the frames that exist, where the model is to know.

    One `lax.scan`: the teacher is compiled once, whatever r. No gradient flows through it.
    """

    def advance(carry, pair):
        buffer, moved = carry
        velocity = stream.guided_velocity(teacher, buffer, pair[0], condition, present)
        return (flow.euler_step(buffer, velocity, pair[0], pair[1]), moved + _moved(velocity, pair[0], pair[1])), None

    path = jnp.moveaxis(levels, 1, 0)
    pairs = jnp.stack([path[:-1], path[1:]], axis=1)
    (_, moved), _ = jax.lax.scan(advance, (latents, jnp.zeros_like(latents)), pairs)
    return _average(moved, levels[:, 0], levels[:, -1])


def consistency_target(
    teacher: stream.Velocity,
    student: stream.Velocity,
    latents: Float[Array, "b f h w c"],
    levels: Float[Array, "b steps f"],
    place: Array,
    condition: stream.Condition,
    present: Bool[Array, "b f"] | None = None,
) -> Float[Array, "b f h w c"]:
    """The average velocity from the `place`-th of the teacher's points, [b] in 0 … r − 1, to the segment's end: one
    guided teacher step, then the student's own (multistep consistency, 2403.06807). No gradient flows through it.
    """
    rows = jnp.arange(len(latents))
    now, after, end = levels[rows, place], levels[rows, place + 1], levels[:, -1]
    guided = stream.guided_velocity(teacher, latents, now, condition, present)
    mask = () if present is None else (present,)
    rest = student(flow.euler_step(latents, guided, now, after), condition.text, after, *mask)
    return _average(_moved(guided, now, after) + _moved(rest, after, end), now, end)


def rollout(
    student: stream.Velocity,
    latents: Float[Array, "b f h w c"],
    keys: Array,
    cycles: Array,
    text,
    scheme: PartitionScheme,
    most: int,
) -> Float[Array, "b f h w c"]:
    """Buffers at the first micro step, after the student itself has streamed `cycles` [b] ≤ `most` chunks from them.

    Unguided; what enters at the tail is fresh noise from keys [b], as in streaming. No gradient flows through it.
    """
    c, rows = scheme.chunk_size, stream.streaming_rows(scheme)

    def cycle(buffer, number):
        before = buffer
        for before_level, after_level in rows.levels:
            now, then = (jnp.broadcast_to(level, buffer.shape[:2]) for level in (before_level, after_level))
            buffer = flow.euler_step(buffer, student(buffer, text, now), now, then)
        noise = stream.chunk_noise(keys, jnp.broadcast_to(number, keys.shape), (c, *buffer.shape[2:]))
        buffer = jnp.concatenate([buffer[:, c:], noise], axis=1)
        going = (number < cycles)[:, None, None, None, None]
        return jnp.where(going, buffer, before), None

    end, _ = jax.lax.scan(cycle, latents, jnp.arange(most, dtype=jnp.uint32))
    return jax.lax.stop_gradient(end)
