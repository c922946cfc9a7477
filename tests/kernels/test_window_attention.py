"""Every backend of windowed attention against the plain definition, and that definition against loops in float64.

A backend is covered by its name in `BACKENDS`; cases that it declines (NotImplementedError) are skipped and say why.
"""

import contextlib
import functools
import itertools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamdit_jax.kernels.window_attention as attention
from streamdit_jax import sharding
from streamdit_jax.kernels import dispatch
from streamdit_jax.kernels.windows import TokenOrder, Windows
from streamdit_jax.models.dit import DiTConfig

NAMES = [name for name in attention.BACKENDS if name != "reference"]
WRAP, CUT, NOWHERE = (True, True, True), (False, True, True), (False, False, False)


def windows_of(grid, window, shift, wrap):
    block = tuple(math.gcd(*pair) for pair in zip(window, shift))
    return Windows(TokenOrder(grid, window, block), window, shift, wrap)


def second_of_two(wrap):
    """The shifted layer of a pattern of two unlike windows: its windows are not those that tokens are ordered by."""
    sizes = dict(width=8, num_layers=2, num_heads=1, ffn_width=8, wrap=wrap)
    return DiTConfig((8, 4, 4, 1), (1, 1, 1), windows=((4, 2, 2), (2, 2, 4)), **sizes).layer_windows()[1]


# name: (windows, batch, heads, head_dim, whether some keys are masked)
CASES = {
    "plain": (windows_of((4, 4, 4), (2, 2, 4), (0, 0, 0), WRAP), 2, 2, 8, False),
    "shifted": (windows_of((8, 4, 2), (4, 2, 2), (2, 1, 0), WRAP), 2, 2, 8, False),
    "cut_in_time": (windows_of((8, 4, 2), (4, 2, 2), (2, 1, 0), CUT), 2, 2, 8, False),
    "cut_masked": (windows_of((8, 2, 4), (4, 2, 2), (2, 0, 1), NOWHERE), 2, 2, 8, True),
    "whole_masked": (windows_of((6, 2, 2), (6, 2, 2), (0, 0, 0), WRAP), 3, 1, 8, True),
    "odd": (windows_of((9, 1, 5), (3, 1, 5), (1, 0, 0), CUT), 1, 3, 5, True),
    "two_windows": (second_of_two(CUT), 1, 2, 8, False),
    "head_64": (windows_of((4, 2, 2), (2, 2, 2), (1, 0, 0), CUT), 1, 2, 64, False),
    "head_128": (windows_of((4, 2, 2), (2, 2, 2), (1, 0, 0), WRAP), 1, 1, 128, True),
}


@functools.cache
def drawn(case):
    """Query, key, value, cotangent, and a key mask or None."""
    windows, batch, heads, dim, masked = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    arrays = rng.normal(size=(4, batch, windows.order.num_tokens, heads, dim)).astype(np.float32)
    mask = rng.uniform(size=(batch, windows.order.num_tokens)) < 0.6 if masked else None
    if masked:  # tokens that see no key have no defined result: nothing may be asked of them
        sees = np.asarray(attention.BACKENDS["reference"](*_counting(windows, mask)))
        arrays[3] *= (sees > 0)[..., :1]
    return *arrays, mask


def _counting(windows, mask):
    """Arguments with which the definition averages the mask over each token's window: 0 where it sees no key."""
    zeros = jnp.zeros((*mask.shape, 1, 1))
    return zeros, zeros, jnp.asarray(mask, jnp.float32)[..., None, None], windows


@functools.cache
def compiled(backend, case):
    windows = CASES[case][0]

    @jax.jit
    def run(query, key, value, cotangent, mask):
        def forward(*qkv):
            return attention.window_attention(*qkv, windows, mask, backend=backend)

        out, back = jax.vjp(forward, query, key, value)
        return out, back(cotangent)

    return run


@contextlib.contextmanager
def declining():
    """What a backend does not take is skipped, with its reason."""
    try:
        yield
    except NotImplementedError as reason:
        pytest.skip(f"declined: {reason}")


def result(backend, case):
    """Output and the gradients of query, key and value."""
    with declining():
        return compiled(backend, case)(*drawn(case))


@pytest.mark.parametrize("backend", NAMES)
class TestBackend:
    @pytest.mark.parametrize("case", CASES)
    def test_equals_the_definition_forward_and_backward(self, backend, case):
        out, gradients = result(backend, case)
        expected, expected_gradients = result("reference", case)
        asked = np.any(drawn(case)[3] != 0, axis=-1, keepdims=True)
        np.testing.assert_allclose(out * asked, expected * asked, atol=1e-5)
        for gradient, wanted in zip(gradients, expected_gradients):
            np.testing.assert_allclose(gradient, wanted, atol=1e-5)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in (out, *gradients))

    @pytest.mark.parametrize("case", CASES)
    def test_two_runs_are_equal_bit_for_bit(self, backend, case):
        first, second = (jax.tree.leaves(result(backend, case)) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second))

    @pytest.mark.parametrize("case", [case for case in CASES if CASES[case][-1]])
    def test_masked_keys_and_their_values_have_no_gradient(self, backend, case):
        mask = drawn(case)[4]
        _, (query, key, value) = result(backend, case)
        assert np.all(np.asarray(key)[~mask] == 0) and np.all(np.asarray(value)[~mask] == 0)
        assert np.any(np.asarray(value)[mask] != 0) and np.any(np.asarray(query) != 0)

    def test_bfloat16_stays_near_the_definition(self, backend):
        windows = CASES["cut_in_time"][0]
        half = [jnp.asarray(x, jnp.bfloat16) for x in drawn("cut_in_time")[:3]]
        with declining():
            out = attention.window_attention(*half, windows, backend=backend)
        expected = attention.window_attention(*(x.astype(jnp.float32) for x in half), windows, backend="reference")
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_parts_of_windows_may_be_data(backend):
    """Tokens that lie in a shifted layer's order already, with the layer's parts given: the shifted layer's result."""
    windows, mask = CASES["cut_masked"][0], drawn("cut_masked")[4]
    size = windows.order.block_size
    places = (windows.blocks.reshape(-1, 1) * size + np.arange(size)).ravel()
    moved = [x[:, places] for x in (*drawn("cut_masked")[:3], mask)]
    frames, *sides = windows.window
    order = TokenOrder((len(windows.blocks) * frames, *sides), windows.window, windows.order.block)
    lying = Windows(order, windows.window, (0, 0, 0), WRAP)
    run = jax.jit(lambda *qkv: attention.window_attention(*qkv[:3], lying, *qkv[3:], backend=backend))
    with declining():
        out = run(*moved, jnp.asarray(windows.segments))
    expected = result("reference", "cut_masked")[0]
    asked = np.any(drawn("cut_masked")[3] != 0, axis=-1, keepdims=True)
    np.testing.assert_allclose(out * asked[:, places], (expected * asked)[:, places], atol=1e-5)
    assert len(np.unique(windows.segments)) > 1


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_a_window_without_keys_is_finite_and_leaves_others_alone(backend):
    """All keys of the first half of time masked; tokens of the second half see what they saw."""
    windows = windows_of((4, 2, 2), (2, 2, 2), (0, 0, 0), WRAP)
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 1, 16, 1, 4)).astype(np.float32)
    mask = windows.order.coordinates[None, :, 0] >= 2
    with declining():
        out = attention.window_attention(query, key, value, windows, mask, backend=backend)
    unmasked = attention.window_attention(query, key, value, windows, backend=backend)
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(out[mask], unmasked[mask], atol=1e-6)


@pytest.mark.parametrize("wrap", [WRAP, CUT, NOWHERE], ids=["wrap", "cut", "nowhere"])
def test_the_definition_equals_loops_in_float64(wrap):
    grid, window, shift = (4, 4, 1), (2, 2, 1), (1, 1, 0)
    windows = windows_of(grid, window, shift, wrap)
    rng = np.random.default_rng(1)
    query, key, value = rng.normal(size=(3, 1, 16, 2, 3))
    mask = rng.uniform(size=16) < 0.7

    def share(a, b):
        """Whether two (frame, row, column) lie in one window, and on one side of a seam that does not wrap."""
        for axis, (size, w, s) in enumerate(zip(grid, window, shift)):
            steps = [(place[axis] - s) % size for place in (a, b)]
            if steps[0] // w != steps[1] // w:
                return False
            wrapped = [place[axis] - s < 0 for place in (a, b)]
            if not wrap[axis] and wrapped[0] != wrapped[1]:
                return False
        return True

    places = windows.order.coordinates.tolist()
    expected = np.full_like(query, np.nan)
    for (i, place), head in itertools.product(enumerate(places), range(2)):
        seen = [j for j, other in enumerate(places) if mask[j] and share(place, other)]
        if not seen:
            continue
        weights = np.exp([query[0, i, head] @ key[0, j, head] / math.sqrt(3) for j in seen])
        expected[0, i, head] = sum(w * value[0, j, head] for w, j in zip(weights, seen)) / sum(weights)
    out = attention.window_attention(
        *(jnp.asarray(x, jnp.float32) for x in (query, key, value)), windows, mask[None], backend="reference"
    )
    asked = ~np.isnan(expected)
    assert asked.mean() > 0.5
    np.testing.assert_allclose(out[asked], expected[asked], atol=1e-6)


def small():
    windows = windows_of((2, 1, 1), (2, 1, 1), (0, 0, 0), WRAP)
    return *jnp.ones((3, 1, 2, 1, 2)), windows


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match=r"backend: 'cuda' is not one of reference, xla, pallas_tpu"):
        attention.window_attention(*small(), backend="cuda")


def test_a_backend_that_declines_is_passed_over_and_the_choice_logged_once(monkeypatch, caplog):
    def declines(*arguments):
        raise NotImplementedError("needs an accelerator")

    monkeypatch.setitem(attention.BACKENDS, "declining", declines)
    platform, kind = jax.devices()[0].platform, jax.devices()[0].device_kind
    monkeypatch.setitem(attention.PREFERENCE, platform, ("declining", "xla"))
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="streamdit_jax"):
        outs = [attention.window_attention(*small()) for _ in range(2)]
    assert np.array_equal(outs[0], attention.window_attention(*small(), backend="xla"))
    [message] = [record.getMessage() for record in caplog.records if record.name == "streamdit_jax"]
    assert message == f"window attention on {kind}: xla (declining: needs an accelerator)"

    monkeypatch.setitem(attention.PREFERENCE, platform, ("declining",))
    with pytest.raises(NotImplementedError, match="declining: needs an accelerator"):
        attention.window_attention(*small())


def test_backends_are_tried_for_the_device_that_one_traces_for(monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "doubling", lambda query, *rest: 2 * query)
    monkeypatch.setitem(attention.PREFERENCE, "tpu", ("doubling", "xla"))

    class Described:
        platform, device_kind, process_index = "tpu", "TPU v5", 0

    query, *rest = small()
    run = jax.jit(lambda query: attention.window_attention(query, *rest))
    here = run(query)
    with sharding.on(jax.sharding.Mesh([Described()], ("data",))):
        assert np.array_equal(run(query), 2 * query)
    assert np.array_equal(run(query), here) and not np.array_equal(here, 2 * query)
