"""Where tokens lie and which of them share a window: the geometry of windowed attention (StreamDiT §4.1).

A grid of (F, H, W) tokens is cut into blocks; the tokens of a block are contiguous from patchify to unpatchify, and
blocks are ordered by window. Unshifted windows are then a reshape, and shifted windows a permutation of whole blocks:
no roll, no copy of partitions.

    token order: [windows (nf, nh, nw), parts of a window (pf, ph, pw), tokens of a block (bf, bh, bw)]
"""

import dataclasses
import functools
import math

import numpy as np
from einops import rearrange, reduce, repeat
from jaxtyping import Array, Bool, Float, Int

Axes = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """The order of the tokens of a (frames, height, width) grid: blocks contiguous, ordered by window.

    Raises ValueError where a window does not divide the grid, or a block the window.
    """

    grid: Axes
    window: Axes
    block: Axes

    def __post_init__(self):
        for axis, size, window, block in zip(("time", "height", "width"), self.grid, self.window, self.block):
            if window < 1 or size % window:
                raise ValueError(f"windows: {window} does not divide the {size} tokens along {axis}")
            if block < 1 or window % block:
                raise ValueError(f"windows: blocks of {block} do not divide a window of {window} along {axis}")

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def num_windows(self) -> int:
        return math.prod(size // window for size, window in zip(self.grid, self.window))

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return math.prod(self.block)

    @property
    def block_grid(self) -> Axes:
        return tuple(size // block for size, block in zip(self.grid, self.block))

    def _sizes(self) -> dict[str, int]:
        parts = {f"p{axis}": window // block for axis, window, block in zip("fhw", self.window, self.block)}
        return parts | {f"b{axis}": block for axis, block in zip("fhw", self.block)}

    def arrange(self, x: Float[Array, "b f h w d"]) -> Float[Array, "b tokens d"]:
        """From the raster grid to token order."""
        pattern = "b (nf pf bf) (nh ph bh) (nw pw bw) d -> b (nf nh nw pf ph pw bf bh bw) d"
        return rearrange(x, pattern, **self._sizes())

    def restore(self, x: Float[Array, "b tokens d"]) -> Float[Array, "b f h w d"]:
        """From token order to the raster grid."""
        pattern = "b (nf nh nw pf ph pw bf bh bw) d -> b (nf pf bf) (nh ph bh) (nw pw bw) d"
        counts = {f"n{axis}": size // window for axis, size, window in zip("fhw", self.grid, self.window)}
        return rearrange(x, pattern, **self._sizes(), **counts)

    def split_frames(self, x: Float[Array, "b tokens d"], joined: bool = False) -> Float[Array, "b *factors d"]:
        """Tokens with the factors of their frame index as axes of their own, so that a value per frame broadcasts.

        joined: windows stay one axis, which any divisor of their number can cut, [b, windows, pf, parts, bf, block, d];
            otherwise those along time have one for themselves, [b, nf, nh · nw, pf, parts, bf, block, d].
        """
        sizes = self._sizes()
        windows = "windows" if joined else "nf windows"
        return rearrange(
            x,
            f"b ({windows} pf parts bf block) d -> b {windows} pf parts bf block d",
            windows=self.num_windows if joined else self._windows_per_time,
            pf=sizes["pf"],
            parts=sizes["ph"] * sizes["pw"],
            bf=sizes["bf"],
            block=sizes["bh"] * sizes["bw"],
        )

    def spread_frames(self, x: Float[Array, "b f d"], joined: bool = False) -> Float[Array, "b *factors d"]:
        """A value per frame in the form that broadcasts against `split_frames`."""
        sizes = self._sizes()
        x = rearrange(x, "b (nf pf bf) d -> b nf 1 pf 1 bf 1 d", pf=sizes["pf"], bf=sizes["bf"])
        if not joined:
            return x
        return repeat(x, "b nf 1 pf 1 bf 1 d -> b (nf windows) pf 1 bf 1 d", windows=self._windows_per_time)

    @property
    def _windows_per_time(self) -> int:
        return self.grid[1] // self.window[1] * (self.grid[2] // self.window[2])

    def spread(self, x: Float[Array, "n d"], axis: int) -> Float[Array, "windows *place d"]:
        """A value per frame, row or column (axis 0, 1, 2) in a form whose sum over the axes is a value per token, once
        its leading axes are joined: [windows, parts of a window (pf, ph, pw), tokens of a block (bf, bh, bw), d].
        """
        sizes = self._sizes()
        n, p, b = (f"{kind}{'fhw'[axis]}" for kind in "npb")
        places = [p if index == axis else "1" for index in range(3)] + [
            b if index == axis else "1" for index in range(3)
        ]
        counts = {f"n{name}": size // window for name, size, window in zip("fhw", self.grid, self.window)}
        return repeat(x, f"({n} {p} {b}) d -> (nf nh nw) {' '.join(places)} d", **counts, **{p: sizes[p], b: sizes[b]})

    def sum_along(self, x: Float[Array, "b tokens d"], axis: int) -> Float[Array, "n d"]:
        """The sum of all examples' tokens of each frame, row or column (axis 0, 1, 2): the transpose of `spread`."""
        counts = {f"n{name}": size // window for name, size, window in zip("fhw", self.grid, self.window)}
        kept = " ".join(f"{kind}{'fhw'[axis]}" for kind in "npb")
        return reduce(x, f"b (nf nh nw pf ph pw bf bh bw) d -> ({kept}) d", "sum", **counts, **self._sizes())

    @functools.cached_property
    def coordinates(self) -> Int[np.ndarray, "tokens 3"]:
        """The (frame, row, column) of every token, in token order."""
        raster = np.stack(np.meshgrid(*map(np.arange, self.grid), indexing="ij"), axis=-1)
        return self.arrange(raster[None].astype(np.int32))[0]


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of one attention layer over tokens in `order` (§4.1).

    window: tokens per axis. shift: how far the windows are moved towards higher indices, per axis, in tokens; cyclic.
    wrap: per axis, whether a window that reaches past the end attends to both of its parts as one. Without wrapping
        its two parts are windows of their own, so that along time the cleanest and the noisiest frames of a buffer
        never meet (4 | 8 | 4 for 8 of 16).

    Raises ValueError where the window does not divide the grid, or blocks neither window nor shift.
    """

    order: TokenOrder
    window: Axes
    shift: Axes
    wrap: tuple[bool, bool, bool]

    def __post_init__(self):
        TokenOrder(self.order.grid, self.window, self.order.block)
        for axis, shift, window, block in zip(("time", "height", "width"), self.shift, self.window, self.order.block):
            if not 0 <= shift < window or shift % block:
                raise ValueError(
                    f"shift: {shift} along {axis} must be a multiple of the block, {block}, below {window}"
                )

    def window_and_region(self, coordinates: Int[np.ndarray, "n 3"]) -> tuple[np.ndarray, np.ndarray]:
        """For token coordinates [n, 3]: the window each lies in, and the part of it that it may attend to; both [n,
        3], per axis.
        """
        moved = coordinates - np.array(self.shift)
        window = moved % np.array(self.order.grid) // np.array(self.window)
        region = np.where(self.wrap, window, moved // np.array(self.window))
        return window, region

    @functools.cached_property
    def _block_coordinates(self) -> Int[np.ndarray, "blocks 3"]:
        return self.order.coordinates[:: self.order.block_size]

    @functools.cached_property
    def blocks(self) -> Int[np.ndarray, "windows blocks_per_window"]:
        """The blocks of every window; for windows that are neither shifted nor unlike the order's own, simply 0, 1,
        2, …
        """
        window, _ = self.window_and_region(self._block_coordinates)
        inside = (self._block_coordinates - np.array(self.shift)) % np.array(self.order.grid) % np.array(self.window)
        keys = np.concatenate([window, inside], axis=1)
        return np.lexsort(keys.T[::-1]).reshape(-1, math.prod(self.window) // self.order.block_size)

    @functools.cached_property
    def is_reshape(self) -> bool:
        """Whether the windows lie contiguously in token order already."""
        return bool(np.all(self.blocks.ravel() == np.arange(self.blocks.size)))

    @functools.cached_property
    def segments(self) -> Int[np.ndarray, "windows blocks_per_window"] | None:
        """The part of its window that each block belongs to: blocks attend to those of their own part. None where
        every window is one part.
        """
        _, region = self.window_and_region(self._block_coordinates)
        of_window = region[self.blocks]
        if np.all(of_window == of_window[:, :1]):
            return None
        # Without wrapping, an axis has at most two regions in a window, before the seam and after it.
        differs = of_window != of_window.min(axis=1, keepdims=True)
        return (differs @ np.array([4, 2, 1])).astype(np.int32)

    @functools.cached_property
    def block_mask(self) -> Bool[np.ndarray, "windows blocks_per_window blocks_per_window"] | None:
        """Which pairs of blocks of a window may attend to each other; None where all may."""
        if self.segments is None:
            return None
        return self.segments[:, :, None] == self.segments[:, None]
