"""The geometry of windows against brute force over coordinates."""

import itertools
import math

import numpy as np
import pytest

from streamdit_jax.kernels.windows import TokenOrder, Windows
from streamdit_jax.models.dit import DiTConfig

ORDERS = [
    TokenOrder((4, 2, 6), (2, 2, 3), (1, 2, 3)),
    TokenOrder((8, 4, 4), (4, 2, 4), (2, 1, 2)),
    TokenOrder((3, 5, 7), (3, 5, 7), (1, 1, 1)),
    TokenOrder((6, 1, 2), (2, 1, 1), (2, 1, 1)),
    TokenOrder((1, 1, 1), (1, 1, 1), (1, 1, 1)),
]


def windows_of(grid, window, shift, wrap, block=None):
    """Windows over the order of their own, in the largest blocks that allow the shift."""
    block = block or tuple(math.gcd(*pair) for pair in zip(window, shift))
    return Windows(TokenOrder(grid, window, block), window, shift, wrap)


def of_pattern(windows, shifted, wrap, latent=(8, 8, 8, 4)):
    """The windows of layers that share one order, as the transformer makes them."""
    sizes = dict(width=8, num_layers=math.lcm(len(windows), len(shifted)), num_heads=1, ffn_width=8)
    return DiTConfig(latent, (1, 2, 2), windows=windows, shifted=shifted, wrap=wrap, **sizes).layer_windows()


BOTH = (True, True, True)
CASES = [
    windows_of((4, 2, 6), (2, 2, 3), (0, 0, 0), BOTH),
    windows_of((16, 4, 4), (8, 2, 2), (4, 1, 1), BOTH),
    windows_of((16, 4, 4), (8, 2, 2), (4, 1, 1), (False, True, True)),
    windows_of((16, 4, 4), (8, 2, 2), (4, 1, 1), (False, False, False)),
    windows_of((9, 1, 3), (3, 1, 3), (1, 0, 0), (False, True, False)),
    windows_of((6, 4, 2), (6, 2, 2), (0, 1, 0), (True, False, True), block=(3, 1, 2)),
    *of_pattern(((4, 2, 2), (2, 4, 4)), (False, True), BOTH),
    *of_pattern(((8, 2, 4), (4, 4, 2)), (True, False), (False, True, False)),
    *of_pattern(((8, 4, 2), (2, 2, 4)), (False, False, True, True), (False, True, True)),
]


def segments(size, window, shift, wrap):
    """The places along one axis that see each other: windows walked round the ring, cut at the seam unless wrapped."""
    for start in range(shift, size + shift, window):
        places = range(start, start + window)
        parts = [{p % size for p in places}]
        if not wrap:
            parts = [{p for p in places if p < size}, {p - size for p in places if p >= size}]
        yield from filter(None, parts)


def visible(windows):
    """Which tokens, in token order, see each other: [tokens, tokens]."""
    axes = []
    for size, window, shift, wrap in zip(windows.order.grid, windows.window, windows.shift, windows.wrap):
        sees = np.zeros((size, size), bool)
        for segment in segments(size, window, shift, wrap):
            for a, b in itertools.product(segment, segment):
                sees[a, b] = True
        axes.append(sees)
    where = windows.order.coordinates
    return np.all([sees[np.ix_(where[:, axis], where[:, axis])] for axis, sees in enumerate(axes)], axis=0)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_arrange_and_restore(order):
    raster = np.random.default_rng(0).normal(size=(2, *order.grid, 3))
    arranged = order.arrange(raster)
    assert arranged.shape == (2, order.num_tokens, 3)
    assert np.array_equal(order.restore(arranged), raster)
    for index, (frame, row, column) in enumerate(order.coordinates):
        assert np.array_equal(arranged[:, index], raster[:, frame, row, column])
    assert len({tuple(place) for place in order.coordinates}) == order.num_tokens == math.prod(order.grid)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_windows_and_blocks_lie_contiguously(order):
    for size in (order.window, order.block):
        boxes = (order.coordinates // np.array(size)).reshape(-1, math.prod(size), 3)
        assert np.all(boxes == boxes[:, :1]), "the tokens of a box are neighbours in token order"
        assert len({tuple(box) for box in boxes[:, 0]}) == len(boxes), "and each box comes once"
    assert order.block_size == math.prod(order.block) and math.prod(order.block_grid) * order.block_size == len(
        order.coordinates
    )


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_values_per_frame_row_and_column_add_up_at_their_tokens(order):
    tables = [10.0**axis * np.arange(size)[:, None] for axis, size in zip((0, 2, 4), order.grid)]
    spread = sum(order.spread(table, axis) for axis, table in enumerate(tables))
    assert len(spread) == order.num_windows
    assert np.array_equal(spread.ravel(), order.coordinates @ [1, 100, 10_000])


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_sums_along_an_axis_are_those_of_its_tokens(order):
    x = np.random.default_rng(0).normal(size=(2, order.num_tokens, 3))
    for axis, size in enumerate(order.grid):
        expected = [x[:, order.coordinates[:, axis] == place].sum((0, 1)) for place in range(size)]
        np.testing.assert_allclose(order.sum_along(x, axis), expected, atol=1e-12)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_values_per_frame_reach_the_tokens_of_their_frame(order, joined):
    """A table of frame numbers, spread, meets every token's own frame number."""
    frames = np.arange(order.grid[0])[None, :, None]
    tokens = order.coordinates[None, :, :1]
    split = order.split_frames(tokens, joined)
    assert np.array_equal(np.broadcast_to(order.spread_frames(frames, joined), split.shape), split)
    assert np.array_equal(split.reshape(tokens.shape), tokens), "splitting does not move tokens"


@pytest.mark.parametrize("windows", CASES, ids=str)
def test_windows_hold_every_block_once_and_mask_as_brute_force_says(windows):
    order, size = windows.order, windows.order.block_size
    blocks = windows.blocks
    assert np.array_equal(np.sort(blocks.ravel()), np.arange(order.num_tokens // size)), "a permutation"
    assert blocks.shape[1] * size == math.prod(windows.window)
    mask = windows.block_mask
    if mask is None:
        mask = np.ones((len(blocks), blocks.shape[1], blocks.shape[1]), bool)
    sees = np.zeros((order.num_tokens,) * 2, bool)
    tokens = (blocks[:, :, None] * size + np.arange(size)).reshape(len(blocks), -1)
    for of_window, of_mask in zip(tokens, mask):
        sees[np.ix_(of_window, of_window)] = of_mask.repeat(size, axis=0).repeat(size, axis=1)
    assert np.array_equal(sees, visible(windows))


@pytest.mark.parametrize("windows", CASES, ids=str)
def test_what_costs_nothing_is_recognised(windows):
    own = windows.window == windows.order.window
    moved = any(shift for shift in windows.shift)
    assert not (own and not moved) or windows.is_reshape
    assert not moved or not windows.is_reshape
    wraps = all(wrap or not shift for wrap, shift in zip(windows.wrap, windows.shift))
    assert (windows.block_mask is None) == wraps


def test_half_windows_in_time_that_do_not_wrap():
    """Windows of 8 over 16 frames, shifted by half: 4 | 8 | 4, where wrapping joins the two fours."""
    (_, shifted), (_, wrapped) = (
        of_pattern(((8, 4, 4),), (False, True), (wrap, True, True), latent=(16, 8, 8, 4)) for wrap in (False, True)
    )
    frames = np.arange(16)
    part = (frames >= 4).astype(int) + (frames >= 12)
    for windows, expected in ((shifted, part), (wrapped, part % 2)):
        sees = visible(windows)
        time = windows.order.coordinates[:, 0]
        assert np.array_equal(sees, expected[time][:, None] == expected[time][None])
        _, region = windows.window_and_region(windows.order.coordinates)
        assert np.array_equal(sees, np.all(region[:, None] == region[None], axis=-1))


def test_a_window_as_long_as_its_axis_is_not_shifted():
    for windows in of_pattern(((8, 2, 4), (4, 4, 4)), (True,), BOTH):
        assert windows.shift == tuple(w // 2 if w < g else 0 for w, g in zip(windows.window, (8, 4, 4)))


@pytest.mark.parametrize("window, block", [((3, 2, 2), (1, 1, 1)), ((0, 2, 2), (1, 1, 1)), ((4, 2, 2), (4, 2, 0))])
def test_orders_that_do_not_tile(window, block):
    with pytest.raises(ValueError, match="windows: "):
        TokenOrder((8, 4, 4), window, block)


@pytest.mark.parametrize("window, shift, message", [((3, 2, 2), (0, 0, 0), "windows"), ((4, 2, 2), (1, 0, 0), "shift")])
def test_windows_that_the_blocks_do_not_follow(window, shift, message):
    order = TokenOrder((8, 4, 4), (4, 2, 2), (2, 2, 2))
    with pytest.raises(ValueError, match=message):
        Windows(order, window, shift, BOTH)
    with pytest.raises(ValueError, match="shift: 4 along time"):
        Windows(order, (4, 2, 2), (4, 0, 0), BOTH)
