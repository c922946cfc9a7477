"""The TPU kernels of windowed attention, interpreted on this machine's processor: numbers, copies, parts, lowering.

`tests/plan/test_tpu_kernels.py` compiles them for chips that are not there.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamdit_jax.kernels.window_attention as attention
from streamdit_jax import sharding
from streamdit_jax.kernels.window_attention import pallas_tpu
from streamdit_jax.kernels.window_attention.pallas_tpu_case import by_part, case_of
from streamdit_jax.kernels.windows import TokenOrder, Windows

interpreted = functools.partial(pallas_tpu.window_attention, interpret=True)
WRAP, CUT, NOWHERE = (True, True, True), (False, True, True), (False, False, False)


def windows_of(grid, window, shift, wrap, block=None):
    block = block or tuple(math.gcd(*pair) for pair in zip(window, shift))
    return Windows(TokenOrder(grid, window, block), window, shift, wrap)


# name: (windows, batch, heads, head_dim, whether some keys are masked, dtype)
CASES = {
    "contiguous": (windows_of((4, 8, 8), (2, 8, 8), (0, 0, 0), WRAP, block=(1, 4, 8)), 2, 1, 128, False, jnp.float32),
    "shifted": (windows_of((4, 8, 16), (4, 8, 8), (0, 4, 4), WRAP), 1, 4, 64, True, jnp.float32),
    "cut_in_time": (windows_of((8, 8, 16), (4, 8, 16), (2, 0, 0), CUT, block=(2, 8, 8)), 1, 1, 128, False, jnp.float32),
    "cut_everywhere": (windows_of((4, 16, 32), (2, 16, 16), (1, 0, 8), NOWHERE), 1, 2, 64, True, jnp.float32),
    "odd": (windows_of((3, 8, 16), (1, 8, 16), (0, 0, 0), WRAP), 1, 3, 128, False, jnp.float32),
    "half": (windows_of((4, 8, 16), (2, 8, 16), (1, 0, 0), WRAP), 1, 1, 128, True, jnp.bfloat16),
}
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1.6e-2}


WATCHED = """
import json
import jax, numpy as np
from jax.experimental.pallas import tpu as pltpu
from streamdit_jax.kernels.window_attention.pallas_tpu import window_attention
from streamdit_jax.kernels.window_attention.reference import window_attention as reference
from streamdit_jax.kernels.windows import TokenOrder, Windows

windows = Windows(TokenOrder((4, 16, 16), (2, 8, 16), (1, 8, 16)), (2, 8, 16), (1, 0, 0), (True, True, True))
*arrays, cotangent = np.random.default_rng(2).normal(size=(4, 1, 1024, 1, 128)).astype(np.float32)

def run(attend, **how):
    def both(*qkv):
        out, back = jax.vjp(lambda *qkv: attend(*qkv, windows, **how), *qkv)
        return out, *back(cotangent)

    return jax.jit(both)(*arrays)

watched = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
found = run(window_attention, interpret=watched)
print(json.dumps([float(np.max(np.abs(a - b))) for a, b in zip(found, run(reference))]))
"""


@functools.cache
def drawn(case):
    """Query, key, value, cotangent, and a key mask or None."""
    windows, batch, heads, dim, masked, dtype = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    arrays = rng.normal(size=(4, batch, windows.order.num_tokens, heads, dim))
    mask = jnp.asarray(rng.uniform(size=(batch, windows.order.num_tokens)) < 0.6) if masked else None
    return *jnp.asarray(arrays, dtype), mask


@functools.cache
def compiled(backend, case):
    windows = CASES[case][0]

    @jax.jit
    def run(query, key, value, cotangent, mask):
        out, back = jax.vjp(lambda *qkv: backend(*qkv, windows, mask), query, key, value)
        return out, *back(cotangent)

    return run


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_forward_and_backward_and_again(case):
    found = compiled(interpreted, case)(*drawn(case))
    wide = [None if x is None else x.astype(jnp.float32) for x in drawn(case)[:4]]
    wanted = compiled(attention.BACKENDS["reference"], case)(*wide, drawn(case)[4])
    dtype = CASES[case][5]
    for name, array, expected in zip(("out", "query", "key", "value"), found, wanted):
        assert array.dtype == dtype
        np.testing.assert_allclose(array.astype(jnp.float32), expected, atol=TOLERANCE[dtype], err_msg=name)
    for array, again in zip(found, compiled(interpreted, case)(*drawn(case))):
        assert np.array_equal(array, again)
    mask = drawn(case)[4]
    if mask is not None:
        assert np.all(np.asarray(found[2])[~mask] == 0) and np.all(np.asarray(found[3])[~mask] == 0)


def test_a_window_without_keys_is_finite_and_leaves_others_alone():
    windows = windows_of((2, 8, 16), (1, 8, 16), (0, 0, 0), WRAP)
    query, key, value = np.random.default_rng(0).normal(size=(3, 1, 256, 1, 128)).astype(np.float32)
    mask = windows.order.coordinates[None, :, 0] >= 1
    run = jax.jit(lambda mask: interpreted(query, key, value, windows, mask))
    out, unmasked = run(jnp.asarray(mask)), run(jnp.ones_like(mask))
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(out[mask], unmasked[mask], atol=1e-6)


def test_parts_as_data_give_the_same_bits():
    """The parts of `windows.segments`, given as data for windows that say nothing of them."""
    windows = CASES["cut_everywhere"][0]
    whole = Windows(windows.order, windows.window, windows.shift, WRAP)
    *arrays, _, mask = drawn("cut_everywhere")
    given = jax.jit(lambda segments: interpreted(*arrays, whole, mask, segments))(jnp.asarray(windows.segments))
    assert np.array_equal(given, compiled(interpreted, "cut_everywhere")(*drawn("cut_everywhere"))[0])


@pytest.mark.parametrize("case", ["shifted", "cut_in_time"])
def test_side_by_side_they_give_the_same_bits(case):
    """Query, key and value as one product makes them, and their gradients likewise."""
    windows, (*arrays, cotangent, mask) = CASES[case][0], drawn(case)

    @jax.jit
    def run(qkv):
        out, back = jax.vjp(lambda qkv: pallas_tpu.packed_window_attention(qkv, windows, mask, interpret=True), qkv)
        return out, back(cotangent)[0]

    out, gradient = run(jnp.stack(arrays, axis=2))
    wanted, *gradients = compiled(interpreted, case)(*drawn(case))
    assert np.array_equal(out, wanted) and np.array_equal(gradient, jnp.stack(gradients, axis=2))


@pytest.mark.parametrize("wrap", [CUT, NOWHERE], ids=["cut", "nowhere"])
def test_only_blocks_that_see_each_other_are_computed(wrap):
    windows = windows_of((16, 32, 32), (8, 16, 16), (4, 8, 8), wrap)
    order, ranges = (np.asarray(x) for x in by_part(jnp.asarray(windows.segments)))
    first, last = ranges.reshape(*windows.blocks.shape, 2).transpose(2, 0, 1)
    assert np.sum(last - first) == windows.block_mask.sum() < windows.block_mask.size
    for window, places in enumerate(order):
        sorted_mask = windows.block_mask[window][places][:, places]
        for row, begin, end in zip(sorted_mask, first[window], last[window]):
            assert row[begin:end].all() and row.sum() == end - begin


def test_copies_are_as_long_as_windows_allow():
    def cut(windows, heads=24):
        case, table = case_of((1, heads, 128), jnp.bfloat16, windows, False, False)
        assert sorted(np.asarray(table).ravel().tolist()) == list(range(table.size))
        assert case.pieces * case.size == windows.blocks.shape[1] * windows.order.block_size
        return case

    block = (4, 8, 8)
    unshifted = cut(windows_of((16, 32, 32), (8, 16, 16), (0, 0, 0), WRAP, block))
    assert (unshifted.pieces, unshifted.size, unshifted.lanes, unshifted.grid) == (1, 2048, 128, (2, 96))
    assert cut(windows_of((16, 32, 32), (8, 16, 16), (4, 8, 8), WRAP, block)).pieces == 8
    # Windows as high and wide as the grid move along time alone, and so in halves.
    halves = cut(windows_of((16, 16, 16), (8, 16, 16), (4, 0, 0), WRAP, block))
    assert (halves.pieces, halves.size) == (2, 1024)
    # Of small windows, several heads make up a step.
    image = cut(windows_of((1, 32, 32), (1, 16, 16), (0, 8, 8), WRAP))
    assert (image.pieces, image.size, image.lanes) == (4, 64, 8 * 128)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 32}, "head_dim 32 is not 64 or 128"),
        ({"dim": 64, "heads": 3}, "3 heads of 64 do not fill 128 lanes"),
        ({"dtype": jnp.float16}, "float16, not bfloat16 or float32"),
        ({"windows": windows_of((4, 4, 8), (4, 4, 8), (2, 2, 4), WRAP)}, "pieces of 16"),
        ({"windows": windows_of((4, 8, 20), (4, 8, 10), (2, 0, 0), WRAP)}, "not multiples of 128"),
        ({"windows": windows_of((4, 16, 16), (2, 16, 16), (1, 8, 8), NOWHERE)}, "parts of windows in blocks of 64"),
        ({"windows": windows_of((32, 32, 32), (32, 32, 32), (0, 0, 0), WRAP)}, "too large to hold in VMEM"),
    ],
)
def test_what_it_declines(change, reason):
    case = {"windows": CASES["contiguous"][0], "heads": 2, "dim": 128, "dtype": jnp.bfloat16} | change
    x = jax.ShapeDtypeStruct((1, case["windows"].order.num_tokens, case["heads"], case["dim"]), case["dtype"])
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda *qkv: interpreted(*qkv, case["windows"]), x, x, x)


def test_it_declines_devices_that_are_no_tpu():
    with pytest.raises(NotImplementedError, match=f"not for {jax.default_backend()}"):
        pallas_tpu.window_attention(*drawn("odd")[:3], CASES["odd"][0])


@pytest.mark.slow
def test_copies_and_computation_do_not_race():
    """In an interpreter that delays copies until they are waited for, and follows who reads and writes what."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "8", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [
        sys.executable,
        "-c",
        WATCHED,
    ]  # of its own: the interpreter wants more threads than the machine may have
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RACE DETECTED" not in done.stdout + done.stderr
    assert max(json.loads(done.stdout)) < 2e-6


def test_it_declines_arrays_of_unlike_types():
    query, key, value = drawn("odd")[:3]
    with pytest.raises(NotImplementedError, match="not of one type"):
        interpreted(query, key, value.astype(jnp.bfloat16), CASES["odd"][0])


@pytest.mark.parametrize("shift", [(0, 0, 0), (4, 8, 8)], ids=["contiguous", "shifted"])
def test_for_a_tpu_it_is_chosen_and_lowered_without_moving_tokens(shift):
    class Described:
        platform, device_kind, process_index, num_cores = "tpu", "TPU v5", 0, 2

    windows = windows_of((16, 32, 32), (8, 16, 16), shift, WRAP, block=(4, 8, 8))
    x = jax.ShapeDtypeStruct((1, windows.order.num_tokens, 24, 128), jnp.bfloat16)

    def both(query, key, value, cotangent):
        out, back = jax.vjp(lambda *qkv: attention.window_attention(*qkv, windows), query, key, value)
        return out, *back(cotangent)

    with sharding.on(jax.sharding.Mesh([Described()], ("data",))):
        text = jax.jit(both).trace(x, x, x, x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2
    assert not any(f"stablehlo.{moved}" in text for moved in ("gather", "transpose", "concatenate", "slice", "dot"))
