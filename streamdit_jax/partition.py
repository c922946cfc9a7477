"""How a buffer of latent frames is split: schemes, levels, segments, mixtures (StreamDiT §3.2; eq. 7–9).

A buffer holds B = K + N·c latent frames in display order: K clean reference frames, then N chunks of c frames. A
chunk takes s micro steps before the buffer moves on by one chunk, so a frame is denoised in T = s·N steps from flow
time 0 (noise) to 1 (clean).

    grid             t_k = γ(k / T), k = 0..T, with γ(t) = t^p                                                   (eq. 9)
    at micro step m  chunk j sits at grid index k(j, m) = (N − 1 − j)·s + m; references sit at t = 1
    in training      chunk j draws u_j ~ U[(N − 1 − j)/N, (N − j)/N], and τ_j = γ(u_j) for all of its frames     (eq. 8)
                     where N = 1 and K = 0, which is plain text-to-video, u ~ sigmoid(N(0, 1)) may be drawn instead

Chunk 0 is the oldest, the cleanest, and the first that is shown. Sampler and training read their levels from the same
`PartitionScheme`.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

FILLINGS = ("uniform", "ramp", "doubling")  # the ways to fill a buffer; `stream.filling_rows`
_SPELLING = re.compile(r"(?:K(\d+))?N(\d+)c(\d+)s(\d+)(?:p(\d+(?:\.\d+)?))?")


@dataclasses.dataclass(frozen=True)
class PartitionScheme:
    """One way to split and denoise a buffer (§3.2).

    `num_references` K ≥ 0, `num_chunks` N ≥ 1, `chunk_size` c ≥ 1, `micro_steps` s ≥ 1, and the exponent `power` p >
    0 of the schedule γ(t) = t^p (1 is linear). Uniform noise, ordinary text-to-video, is N = 1 and c = B; diagonal
    denoising is c = 1, s = 1.

    Raises ValueError, naming the field, for anything else.
    """

    num_references: int
    num_chunks: int
    chunk_size: int
    micro_steps: int
    power: float = 1.0

    def __post_init__(self):
        for field, least in (("num_references", 0), ("num_chunks", 1), ("chunk_size", 1), ("micro_steps", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{field}: {value!r} is not a whole number of at least {least}")
            object.__setattr__(self, field, int(value))
        if not (np.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power: the schedule's exponent must be positive and finite, not {self.power!r}")
        object.__setattr__(self, "power", float(self.power))

    @classmethod
    def parse(cls, spelling: str) -> "PartitionScheme":
        """Reads "N8c2s16", "K2N7c2s16" or, with a power schedule, "N8c2s16p2". ValueError otherwise."""
        match = _SPELLING.fullmatch(spelling) if isinstance(spelling, str) else None
        if match is None:
            raise ValueError(f"{spelling!r} is not a partition scheme; write K2N7c2s16, or N8c2s16 without references")
        references, chunks, size, steps, power = match.groups()
        return cls(int(references or 0), int(chunks), int(size), int(steps), float(power or 1))

    def __str__(self) -> str:
        references = f"K{self.num_references}" if self.num_references else ""
        power = "" if self.power == 1 else f"p{self.power:.6f}".rstrip("0").rstrip(".")
        return f"{references}N{self.num_chunks}c{self.chunk_size}s{self.micro_steps}{power}"

    @property
    def buffer_size(self) -> int:
        """B = K + N·c, in latent frames."""
        return self.num_references + self.num_chunks * self.chunk_size

    @property
    def total_steps(self) -> int:
        """T = s·N, the micro steps between noise and clean."""
        return self.num_chunks * self.micro_steps

    def grid(self) -> Float[np.ndarray, "T+1"]:
        """t_k = γ(k / T) for k = 0..T (eq. 9), float32; exactly 0 and 1 at its ends."""
        return ((np.arange(self.total_steps + 1) / self.total_steps) ** self.power).astype(np.float32)

    def chunk_ids(self) -> Int[np.ndarray, "B"]:
        """The chunk that each frame belongs to, int32; −1 for references."""
        ids = np.repeat(np.arange(self.num_chunks), self.chunk_size)
        return np.concatenate([np.full(self.num_references, -1), ids]).astype(np.int32)

    def step_levels(self) -> Float[np.ndarray, "s+1 B"]:
        """Each frame's flow time before each of the s micro steps, and after the last; 1 = clean (§3.2)."""
        ids, steps = self.chunk_ids(), np.arange(self.micro_steps + 1)[:, None]
        index = np.where(ids < 0, self.total_steps, (self.num_chunks - 1 - ids) * self.micro_steps + steps)
        return self.grid()[index]

    def ramp_levels(self, present: int) -> Float[np.ndarray, "s+1 B"]:
        """The levels of a stage of the triangular ramp-up, in which only the first `present` chunks exist (1 ≤
        present ≤ N).

        The youngest of them starts from noise, so chunk j sits at grid index (present − 1 − j)·s + m. Absent chunks
        and references, whose frames are masked, are reported at 0 and 1. With all N chunks present this is
        `step_levels`.
        """
        ids, steps = self.chunk_ids(), np.arange(self.micro_steps + 1)[:, None]
        index = np.where(ids < present, (present - 1 - ids) * self.micro_steps + steps, 0)
        return self.grid()[np.where(ids < 0, self.total_steps, index)]

    def doubling_blocks(self) -> Int[np.ndarray, "B"]:
        """The block that each frame belongs to where a buffer doubles, of 1, 1, 2, 4, 8, … frames, int32."""
        return np.array([frame.bit_length() for frame in range(self.buffer_size)], np.int32)

    def doubling_levels(self, block: int) -> Float[np.ndarray, "T+1 B"]:
        """The levels of a stage of doubling: the frames of `block` go from noise to clean, those before it are clean,
        those after it are absent, and reported at 0.
        """
        blocks = self.doubling_blocks()
        return np.where(blocks == block, self.grid()[:, None], (blocks < block).astype(np.float32))

    def segment_bounds(self) -> Float[np.ndarray, "B 2"]:
        """The range of flow time from which each frame's training level is drawn (eq. 8, 9); [1, 1] for references."""
        ids = self.chunk_ids()[:, None]
        low_high = (self.num_chunks - 1 - ids + np.array([0, 1])) / self.num_chunks
        return (np.where(ids < 0, 1.0, low_high) ** self.power).astype(np.float32)

    def uniform(self) -> "PartitionScheme":
        """The ordinary text-to-video scheme over the same buffer and the same grid of T steps, with which a buffer is
        filled (§8).
        """
        return PartitionScheme(0, 1, self.buffer_size, self.total_steps, self.power)


@dataclasses.dataclass(frozen=True)
class Refill:
    """When a buffer is filled anew, spelled CHUNKS[:STRENGTH] as "2:0.875"; "0" for never (`stream.refilling_rows`).

    chunks: so many leave between a change of prompt and this. strength: the share of its steps that the frame takes
    again from which the buffer is filled: 0 keeps it as it is, 1 leaves nothing of it, which is a cut.
    Raises ValueError, beginning with "refill: ", for what cannot be.
    """

    chunks: int
    strength: float = 0.0

    def __post_init__(self):
        if not 0 <= self.chunks <= 10_000 or not 0 <= self.strength <= 1:
            raise ValueError(f"refill: from 0 to 10000 chunks and a strength from 0 to 1, not {self}")

    @classmethod
    def parse(cls, spelling: "str | Refill") -> "Refill":
        """The refill that a spelling such as "2:0.875" names."""
        if isinstance(spelling, Refill):
            return spelling
        match = re.fullmatch(r"(\d+)(?::(\d+(?:\.\d*)?|\.\d+))?", str(spelling))
        if match is None:
            raise ValueError(f"refill: CHUNKS[:STRENGTH], as 2:0.875, or 0 for never; not {spelling!r}")
        return cls(int(match[1]), float(match[2] or 0))

    def __str__(self) -> str:
        return f"{self.chunks}:{self.strength:g}" if self.strength else f"{self.chunks}"


class Mixture(NamedTuple):
    """M schemes over one buffer of B frames as arrays: data to a compiled step, so that a mixture costs one
    compilation (§3.2).

    Each of `first_low` (u of the segment's lower end), `width` (1/N; 0 for references) and `chunk` (the chunk's
    number, −1 for references) is [M, B]; `num_chunks`, `power`, `probability` and `logit_normal` (draw the offset so,
    instead of uniformly) are [M].
    """

    first_low: Float[Array, "M B"]
    width: Float[Array, "M B"]
    chunk: Int[Array, "M B"]
    num_chunks: Int[Array, "M"]
    power: Float[Array, "M"]
    probability: Float[Array, "M"]
    logit_normal: Bool[Array, "M"]
    shared_offset: Float[Array, ""]
    ramp: Float[Array, ""]


def mixture(
    entries: list[tuple[PartitionScheme, float]],
    *,
    uniform_share: float = 0.0,
    logit_normal: bool = False,
    shared_offset: float = 0.0,
    ramp: float = 0.0,
) -> Mixture:
    """Builds the arrays of a weighted mixture (§3.2, Tables 3 and 4).

    entries: (scheme, weight) pairs over one buffer size; weights need not sum to one.
    uniform_share: the share of draws that is plain text-to-video instead (N = 1, c = B).
    logit_normal: plain text-to-video, from an entry or from uniform_share, draws its flow time from logit-normal(0, 1)
        (Movie Gen §3.1.2) instead of uniformly; other schemes do not.
    shared_offset: the share of examples whose chunks share one offset within their segments, which is what inference
        visits; the others draw an offset for each chunk (eq. 8).
    ramp: the share of examples in which only the first r ~ U{1..N} chunks exist, as in the triangular ramp-up.

    Raises ValueError for an empty mixture, unequal buffer sizes, negative weights, and shares outside [0, 1].
    """
    if not entries:
        raise ValueError("entries: a mixture needs at least one scheme")
    for name, share in (("uniform_share", uniform_share), ("shared_offset", shared_offset), ("ramp", ramp)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: a share lies between 0 and 1, not at {share}")
    sizes = {scheme.buffer_size for scheme, _ in entries}
    if len(sizes) > 1:
        spelled = ", ".join(f"{scheme} has {scheme.buffer_size}" for scheme, _ in entries)
        raise ValueError(f"entries: every scheme of a mixture must tile the same buffer, but of frames {spelled}")
    weights = np.array([weight for _, weight in entries], np.float64)
    if not np.all(np.isfinite(weights)) or weights.min() < 0 or weights.sum() <= 0:
        raise ValueError(f"entries: weights must be non-negative and not all zero, not {weights.tolist()}")

    schemes = [scheme for scheme, _ in entries]
    probability = (1 - uniform_share) * weights / weights.sum()
    if uniform_share:
        schemes.append(PartitionScheme(0, 1, sizes.pop(), 1, schemes[0].power))
        probability = np.append(probability, uniform_share)
    chunk = np.stack([scheme.chunk_ids() for scheme in schemes])
    counts = np.array([scheme.num_chunks for scheme in schemes], np.int32)
    return Mixture(
        first_low=np.where(chunk < 0, 1, (counts[:, None] - 1 - chunk) / counts[:, None]).astype(np.float32),
        width=np.where(chunk < 0, 0, 1 / counts[:, None]).astype(np.float32),
        chunk=chunk,
        num_chunks=counts,
        power=np.array([scheme.power for scheme in schemes], np.float32),
        probability=probability.astype(np.float32),
        logit_normal=logit_normal & ~np.any(chunk, axis=1),
        shared_offset=np.float32(shared_offset),
        ramp=np.float32(ramp),
    )


class TrainingLevels(NamedTuple):
    """What a training step needs of a drawn partition; all [batch, B].

    `levels`: flow time τ. `scored`: the frame has a loss (it exists and is no reference). `present`: the frame exists.
    """

    levels: Float[Array, "batch B"]
    scored: Bool[Array, "batch B"]
    present: Bool[Array, "batch B"]


@functools.partial(jax.jit, static_argnames=("batch_size", "per_example"))
def draw_levels(key: Array, schemes: Mixture, batch_size: int, *, per_example: bool = True) -> TrainingLevels:
    """Draws a scheme of the mixture, for each example or once for the batch, and a level for each chunk (eq. 8, 9).

    Every example owns its key, `fold_in(key, row)`, so a row's levels do not depend on how the batch is divided among
    devices.
    """

    def one(row):
        choice_key, offset_key, share_key, ramp_key, length_key = jax.random.split(jax.random.fold_in(key, row), 5)
        scheme_key = choice_key if per_example else jax.random.fold_in(key, batch_size)
        index = jax.random.choice(scheme_key, schemes.probability.shape[0], p=schemes.probability)
        chunk, count = schemes.chunk[index], schemes.num_chunks[index]
        size = chunk.shape[0]
        offset = jax.random.uniform(offset_key, (size,))[jnp.maximum(chunk, 0)]
        shared = jax.random.uniform(share_key, (2,))
        offset = jnp.where(shared[0] < schemes.shared_offset, shared[1], offset)
        # The quantiles of the logit-normal distribution, so that the same draw serves both.
        offset = jnp.where(schemes.logit_normal[index], jax.nn.sigmoid(jax.scipy.special.ndtri(offset)), offset)
        level = schemes.first_low[index] + offset * schemes.width[index]

        present_chunks = jax.random.randint(length_key, (), 1, count + 1)
        present_chunks = jnp.where(jax.random.uniform(ramp_key) < schemes.ramp, present_chunks, count)
        present = chunk < present_chunks
        # While the buffer ramps up, its youngest chunk is the noisiest one: every level is lower by the chunks that
        # are missing.
        missing = (count - present_chunks).astype(level.dtype) / count
        level = jnp.where(chunk < 0, 1.0, jnp.clip(level - missing, 0, 1))
        # References exist once something has been emitted, which a ramp-up has not.
        present &= (chunk >= 0) | (present_chunks == count)
        return TrainingLevels(level ** schemes.power[index], present & (chunk >= 0), present)

    return jax.vmap(one)(jnp.arange(batch_size))
