"""What the TPU kernels of windowed attention are compiled for: how windows are cut into copies, steps and tiles."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from streamdit_jax.kernels.windows import Windows

LANES = 128
LOG2E = math.log2(math.e)
# Queries × keys at once, where a window has as many: of those tried, what the compiler schedules in the fewest
# bundles of instructions for v5e, v5p and v6e. Float32 takes half of the rows: its products are six of bfloat16 each.
TILE, BACKWARD_TILE = (1024, 1024), (512, 1024)
STEP_TOKENS = 2048  # of a step, over its heads by 128 lanes: enough work to hide the copies behind
LEAST_COPY = 32  # tokens; smaller copies than 8 KiB cost more than they bring
VMEM_BYTES = 48 * 2**20  # of the 64 MiB and more of v5e and newer


@dataclasses.dataclass(frozen=True)
class Case:
    """What the kernels are compiled for.

    batch, windows, heads, head_dim: of the call. pieces, size: of a window, and tokens of each. lanes: of a step, a
        multiple of 128. tile: rows and columns of scores that are computed at once, forward and backward. Where windows
        consist of parts that do not see each other, tiles lie within pieces. interpret: as `pallas_call` takes it.
    """

    batch: int
    windows: int
    heads: int
    head_dim: int
    pieces: int
    size: int
    lanes: int
    tile: tuple[int, int]
    backward_tile: tuple[int, int]
    dtype: jnp.dtype
    interpret: bool = False

    @property
    def tokens(self) -> int:
        """Of a window."""
        return self.pieces * self.size

    @property
    def groups(self) -> int:
        """Steps for each window, over its heads."""
        return self.heads * self.head_dim // self.lanes

    @property
    def step_heads(self) -> int:
        return self.lanes // self.head_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Steps in two halves, where that comes out: chips of two cores give one to each."""
        steps = self.batch * self.groups * self.windows
        return (2, steps // 2) if steps % 2 == 0 else (1, steps)

    @property
    def scale(self) -> float:
        """Of scores, so that 2 to their power is the exponential."""
        return LOG2E / math.sqrt(self.head_dim)

    def place(self, step):
        """(example, group of heads, window) of a step by number; windows go round fastest."""
        rest, window = step // self.windows, step % self.windows
        return rest // self.groups, rest % self.groups, window

    @property
    def vmem_bytes(self) -> int:
        """What the backward kernel, the larger, holds at once: both halves of eight buffers, two sums, some tiles."""
        tiles = max(math.prod(self.tile), math.prod(self.backward_tile))
        return self.tokens * (16 * self.lanes * self.dtype.itemsize + 2 * LANES * 4) + 8 * tiles * 4 + 2**21


def case_of(
    sizes: tuple[int, int, int], dtype: jnp.dtype, windows: Windows, segments: bool, interpret
) -> tuple[Case, Int[Array, "windows pieces"]]:
    """How the kernels take arrays of so many (examples, heads, head_dim), and the number of each window's pieces.

    segments: whether the parts of windows are data. Raises NotImplementedError for what they do not take.
    """
    batch, heads, dim = sizes
    if dim not in (64, 128):
        raise NotImplementedError(f"head_dim {dim} is not 64 or 128")
    if heads * dim % LANES:
        raise NotImplementedError(f"{heads} heads of {dim} do not fill {LANES} lanes")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{dtype}, not bfloat16 or float32")
    parts = segments or windows.segments is not None
    # Parts are said of blocks, so blocks stay the pieces.
    blocks, size = (windows.blocks, windows.order.block_size) if parts else _longest_pieces(windows)
    window = blocks.shape[1] * size
    if size % LEAST_COPY or window % LANES:
        raise NotImplementedError(
            f"windows of {window} tokens in pieces of {size}, not multiples of 128 and {LEAST_COPY}"
        )
    if parts and size % LANES:
        raise NotImplementedError(f"parts of windows in blocks of {size} tokens, not a multiple of {LANES}")
    chunks = heads * dim // LANES
    together = max(n for n in range(1, chunks + 1) if chunks % n == 0 and (n == 1 or n * window <= STEP_TOKENS))
    span = size if parts else window
    tile, backward_tile = (
        (_tile(span, rows * 2 // jnp.dtype(dtype).itemsize), _tile(span, columns))
        for rows, columns in (TILE, BACKWARD_TILE)
    )
    case = Case(
        batch=batch,
        windows=len(blocks),
        heads=heads,
        head_dim=dim,
        pieces=blocks.shape[1],
        size=size,
        lanes=together * LANES,
        tile=tile,
        backward_tile=backward_tile,
        dtype=jnp.dtype(dtype),
        interpret=interpret,
    )
    if case.vmem_bytes > VMEM_BYTES:
        raise NotImplementedError(f"windows of {window} tokens are too large to hold in VMEM")
    return case, jnp.asarray(blocks, jnp.int32)


def _longest_pieces(windows: Windows) -> tuple[Int[np.ndarray, "windows pieces"], int]:
    """The longest pieces, equal and aligned to their size, that make up the windows; and the tokens of one."""
    blocks, size = windows.blocks, windows.order.block_size
    for count in range(blocks.shape[1], 0, -1):
        if blocks.shape[1] % count:
            continue
        runs = blocks.reshape(len(blocks), -1, count)
        if np.all(runs == runs[..., :1] + np.arange(count)) and not np.any(runs[..., 0] % count):
            return runs[..., 0] // count, count * size
    raise AssertionError("a block is a piece")


def _tile(tokens: int, most: int) -> int:
    """The largest multiple of 128 that divides `tokens`, up to `most`."""
    return max(size for size in range(LANES, most + 1, LANES) if tokens % size == 0)


def by_part(segments: Int[Array, "windows blocks"]) -> tuple[Int[Array, "windows blocks"], Int[Array, "n"]]:
    """The order in which the blocks of a part follow one another; and of each, then, the first and last + 1 of those
    that it sees.
    """
    order = jnp.argsort(segments, axis=1, stable=True)
    part = jnp.take_along_axis(segments, order, axis=1)
    first = jnp.sum(part[:, None] < part[:, :, None], axis=-1)
    last = jnp.sum(part[:, None] <= part[:, :, None], axis=-1)
    return order, jnp.stack([first, last], axis=-1).astype(jnp.int32).ravel()
