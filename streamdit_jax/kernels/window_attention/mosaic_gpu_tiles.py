"""Which tiles of tokens the GPU kernels work on, and where these lie: tables of int32, for every pattern of windows.

A tile is a run of tokens of one block, so that a window is a list of tiles and needs no copy, no roll and no gather.
Each piece of work owns a few row tiles (one for each warpgroup that computes) and meets all tiles of its part of the
window. Parts are sorted to lie one behind the other, so that blocks that may not see each other are not visited.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from streamdit_jax.kernels.windows import Windows

ROWS = 64  # rows of a warpgroup's matrix product


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel. columns: tokens of a tile that is met, 64 or a multiple. stages: tiles under way at once."""

    columns: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The sizes of the three kernels: forward, gradient of query, gradients of key and value."""

    forward: Tiles
    query: Tiles
    key_value: Tiles


# By head_dim: what fits 227 KiB of shared memory and a thread's registers (docs/results/kernel-h200-compile.json).
TUNING = {
    64: Tuning(forward=Tiles(128, 4), query=Tiles(128, 3), key_value=Tiles(64, 4)),
    128: Tuning(forward=Tiles(128, 2), query=Tiles(128, 2), key_value=Tiles(64, 3)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to do, for one kernel.

    pieces: for each piece of work the first token of each warpgroup's row tile, then where its tiles begin in `met`,
        and how many they are. met: the first token of every tile that is met. columns: tokens of these. count: how
        many tiles each piece meets where that is the same for all; otherwise None.
    """

    pieces: Int[Array, "pieces warpgroups+2"]
    met: Int[Array, "tiles"]
    columns: int = dataclasses.field(metadata=dict(static=True))
    count: int | None = dataclasses.field(metadata=dict(static=True))

    @property
    def warpgroups(self) -> int:
        return self.pieces.shape[1] - 2


def work_of(windows: Windows, segments: Int[Array, "windows blocks"] | None, columns: int) -> Work:
    """The work of one layer's windows. segments: by default those of the windows; given as data, tables are data too.

    Raises NotImplementedError where blocks are no multiple of 64 tokens.
    """
    size = windows.order.block_size
    if size % ROWS:
        raise NotImplementedError(f"blocks of {size} tokens are no multiple of {ROWS}")
    columns = math.gcd(columns, size)
    xp = np if segments is None else jnp
    segments = windows.segments if segments is None else segments
    blocks = xp.asarray(windows.blocks)
    count, per_window = blocks.shape
    # Two warpgroups share what they meet: their rows must lie in one part.
    whole = size if segments is not None else per_window * size
    warpgroups = 2 if whole % (2 * ROWS) == 0 else 1
    begin, met = np.zeros((1, per_window), np.int32), np.full((1, per_window), per_window)
    if segments is not None:
        order = xp.argsort(segments, axis=1, stable=True)
        blocks, segments = (xp.take_along_axis(x, order, axis=1) for x in (blocks, segments))
        begin = xp.sum(segments[:, :, None] > segments[:, None], axis=2)
        met = xp.sum(segments[:, :, None] == segments[:, None], axis=2)
    rows = (blocks[:, :, None] * size + np.arange(0, size, ROWS)).reshape(-1, warpgroups)
    tiles = (blocks[:, :, None] * size + np.arange(0, size, columns)).ravel()
    begin = begin + per_window * np.arange(count)[:, None]
    met = xp.broadcast_to(met, begin.shape)

    def of_rows(per_block):
        """A number per block, in tiles, at each piece's first row tile."""
        return xp.repeat(per_block.ravel() * (size // columns), size // ROWS).reshape(-1, warpgroups)[:, :1]

    pieces = xp.concatenate([rows, of_rows(begin), of_rows(met)], axis=1).astype(np.int32)
    return Work(
        jnp.asarray(pieces),
        jnp.asarray(tiles.astype(np.int32)),
        columns,
        per_window * size // columns if segments is None else None,
    )
