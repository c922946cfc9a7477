"""Real shapes of windowed attention, for tests, measurements and tuning."""

import dataclasses

from streamdit_jax.kernels.windows import TokenOrder, Windows


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of a model: its windows, heads and head_dim."""

    windows: Windows
    heads: int
    dim: int

    @property
    def flops(self) -> int:
        """Of one example's forward, masked pairs of blocks left out; its gradients take 2.5 times as many."""
        windows, size = self.windows, self.windows.order.block_size
        mask = windows.block_mask
        pairs = windows.blocks.size * windows.blocks.shape[1] if mask is None else int(mask.sum())
        return 4 * pairs * size**2 * self.heads * self.dim


def _layer(grid, window, shifted: bool, *, heads: int, dim: int, wrap_time: bool = True) -> Shape:
    block = tuple(side // 2 for side in window)
    order = TokenOrder(grid, window, block)
    return Shape(Windows(order, window, block if shifted else (0, 0, 0), (wrap_time, True, True)), heads, dim)


def _roadtrip(window) -> Shape:
    order = TokenOrder((16, 8, 8), (16, 2, 8), (4, 2, 8))
    return Shape(Windows(order, window, (0, 0, 0), (True, True, True)), heads=2, dim=64)


SHAPES = {
    # configs/streamdit_4b*.py: 16 × 32 × 32 tokens of 512×512 video, 8 windows of 2048.
    "streamdit_4b": _layer((16, 32, 32), (8, 16, 16), False, heads=24, dim=128),
    "streamdit_4b_shifted": _layer((16, 32, 32), (8, 16, 16), True, heads=24, dim=128),
    # The same where a shifted window must not join the first frames to the last.
    "streamdit_4b_cut": _layer((16, 32, 32), (8, 16, 16), True, heads=24, dim=128, wrap_time=False),
    # Wan 2.1's 1.3B at 480×832 and 16 latent frames (12 heads of 128; 30 × 52 tokens, completed to 32 × 64).
    "wan_like_shifted": _layer((16, 32, 64), (8, 16, 16), True, heads=12, dim=128),
    # As wide as the 4B, in heads of 64.
    "head_64_shifted": _layer((16, 32, 32), (8, 16, 16), True, heads=48, dim=64),
    # configs/roadtrip.py: two rows of all frames, then four whole frames, in blocks that both are made of.
    "roadtrip_rows": _roadtrip((16, 2, 8)),
    "roadtrip_frames": _roadtrip((4, 8, 8)),
}
