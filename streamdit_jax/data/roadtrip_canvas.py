"""Drawing for the roadtrip world: position-hashed randomness and an anti-aliased canvas over an unbounded x axis.

Everything is a pure function of world position. Random numbers are hashes of (seed, stream, cell), and coverage comes
from the distance of a sample to a shape, so that a stretch of landscape looks the same whatever is drawn beside it.
"""

import numpy as np

SUB_X = 4  # samples per pixel across: layers scroll in quarter pixels
_MASK = (1 << 64) - 1


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), elementwise on uint64 (wrapping on purpose)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def hash_int(*values: int) -> int:
    """A 64-bit hash of integers, the same on every machine and in every process."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = _mix_int((state + 0x9E3779B97F4A7C15 + (int(value) & _MASK)) & _MASK)
    return state


def uniform(seed: int, stream: int, cells: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [len(cells), count]: `count` of them for every integer cell."""
    cells = np.asarray(cells, np.int64).astype(np.uint64)
    state = _mix(cells * np.uint64(0x9E3779B97F4A7C15) + np.uint64(hash_int(seed, stream)))
    lanes = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
    return (_mix(state[:, None] + lanes) >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def value_noise(x: np.ndarray, wavelength: float, seed: int, stream: int) -> np.ndarray:
    """Smooth noise in [0, 1] along x (pixels), float64: hashed values at multiples of `wavelength`, smoothly joined."""
    position = x / wavelength
    cell = np.floor(position).astype(np.int64)
    first = int(cell.min())
    table = uniform(seed, stream, np.arange(first, int(cell.max()) + 2), 1)[:, 0]
    fraction = position - cell
    weight = fraction * fraction * (3.0 - 2.0 * fraction)
    return table[cell - first] * (1.0 - weight) + table[cell - first + 1] * weight


class Canvas:
    """A stretch of world, premultiplied RGBA float32 [columns, rows, 4] on a grid of 4 × `sub_y` samples per pixel.

    `start` is its first column in quarter pixels of world x; `top` its first pixel row. Shapes take pixel coordinates.
    """

    def __init__(self, start: int, columns: int, top: int, rows: int, sub_y: int = 2):
        self.start, self.top, self.sub_y = start, top, sub_y
        self.x = (start + np.arange(columns) + 0.5) / SUB_X
        self.y = top + (np.arange(rows * sub_y) + 0.5) / sub_y
        self.rgba = np.zeros((columns, rows * sub_y, 4), np.float32)

    def cells(self, width: float, margin: float) -> np.ndarray:
        """Integer cells of `width` pixels whose objects, at most `margin` pixels beyond them, may touch the canvas."""
        first = int(np.floor((self.x[0] - margin) / width))
        return np.arange(first, int(np.floor((self.x[-1] + margin) / width)) + 1)

    def window(self, left: float, right: float, upper: float, lower: float):
        """Slices and float32 samples (x − left as a column, y as a row) of a bounding box with a pixel around it."""
        i = max(0, int(np.floor((left - 1.0) * SUB_X)) - self.start)
        j = min(len(self.x), max(i, int(np.ceil((right + 1.0) * SUB_X)) - self.start))
        k = max(0, int(np.floor((upper - 1.0 - self.top) * self.sub_y)))
        m = min(len(self.y), max(k, int(np.ceil((lower + 1.0 - self.top) * self.sub_y))))
        across = (self.x[i:j] - left).astype(np.float32)[:, None]
        return (slice(i, j), slice(k, m)), across, self.y[k:m].astype(np.float32)[None, :]

    def paint(self, where, coverage: np.ndarray, colour) -> None:
        """Lays a colour (float [3], or broadcastable to [columns, rows, 3]) over a window with the given coverage."""
        if coverage.size == 0:
            return
        target, cover = self.rgba[where], coverage[..., None]
        target *= 1.0 - cover
        target[..., :3] += cover * np.asarray(colour, np.float32)
        target[..., 3:] += cover

    def box(
        self, left, upper, right, lower, colour, radius: float = 0.0, alpha: float = 1.0, slant: float = 0.0
    ) -> None:
        """A rectangle with rounded corners; `slant` shears it to the right by that many pixels per pixel of height."""
        reach = abs(slant) * (lower - upper)
        where, across, y = self.window(left - reach, right + reach, upper, lower)
        half_w, half_h = (right - left) / 2, (lower - upper) / 2
        dx = np.abs(across - reach - half_w - slant * (lower - y)) - (half_w - radius)
        dy = np.abs(y - (upper + half_h)) - (half_h - radius)
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) if radius else np.maximum(dx, dy)
        distance = outside + (np.minimum(np.maximum(dx, dy), 0) if radius else 0) - radius
        self.paint(where, alpha * np.clip(0.5 - 2.0 * distance, 0, 1), colour)

    def ellipse(self, x, y, radius_x, radius_y, colour, alpha: float = 1.0, soft: bool = False) -> None:
        """A filled ellipse, or (soft) a glow that falls off smoothly from its centre to its edge."""
        where, across, rows = self.window(x - radius_x, x + radius_x, y - radius_y, y + radius_y)
        reach = np.hypot((across - radius_x) / radius_x, (rows - y) / radius_y)
        if soft:
            cover = np.clip(1.0 - reach, 0, 1) ** 2
        else:
            cover = np.clip(0.5 - 2.0 * (reach - 1.0) * min(radius_x, radius_y), 0, 1)
        self.paint(where, alpha * cover, colour)

    def spike(self, x, upper, lower, half_top, half_base, colour, alpha: float = 1.0) -> None:
        """An upright trapezoid around x: a triangle when `half_top` is 0."""
        wide = max(half_top, half_base)
        where, across, y = self.window(x - wide, x + wide, upper, lower)
        share = (y - upper) / (lower - upper)
        side = np.abs(across - wide) - (half_top + (half_base - half_top) * share)
        distance = np.maximum(side, np.maximum(upper - y, y - lower))
        self.paint(where, alpha * np.clip(0.5 - 2.0 * distance, 0, 1), colour)

    def ground(self, height: np.ndarray, colour, lower: float | None = None, alpha: float = 1.0) -> None:
        """Fills below the curve y = height(x) (float [columns]), down to `lower` when it is given."""
        y = self.y.astype(np.float32)[None, :]
        cover = np.clip(0.5 + 2.0 * (y - height.astype(np.float32)[:, None]), 0, 1)
        if lower is not None:
            cover = cover * np.clip(0.5 + 2.0 * (lower - y), 0, 1)
        self.paint((slice(None), slice(None)), alpha * cover, colour)

    def filtered(self) -> np.ndarray:
        """Box-filtered to whole pixels, float32 [columns − 3, rows, 4]; entry q: the pixel that begins at quarter q."""
        rows = self.rgba.reshape(len(self.x), -1, self.sub_y, 4).mean(axis=2)
        return (rows[:-3] + rows[1:-2] + rows[2:-1] + rows[3:]) * np.float32(1 / SUB_X)
