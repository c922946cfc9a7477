"""The kernels for Hopper without one: interpreted, lowered for CUDA, and their tables against brute force.

tests/plan/test_gpu_kernels.py compiles them for an H200. On a GPU, tests/kernels/test_window_attention.py runs them.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.config import from_arguments
from streamdit_jax.kernels import window_attention as attention
from streamdit_jax.kernels.window_attention import mosaic_gpu
from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import ROWS, TUNING, work_of
from streamdit_jax.kernels.window_attention.shapes import SHAPES, Shape
from streamdit_jax.kernels.windows import TokenOrder, Windows

HERE = Path(__file__).parent
WRAP, CUT, NOWHERE = (True, True, True), (False, True, True), (False, False, False)
# Of the largest value: outputs, weights and their gradients are rounded to the type of the input.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10}
FAST = {"wrapped": "float16"}
SLOW = {"cut": "bfloat16", "unshifted": "bfloat16", "head_128": "bfloat16", "float16": "float16", "odd": "bfloat16"}
SLOW |= {"two_axes": "bfloat16", "data": "bfloat16", "packed": "bfloat16"}


def interpret(*cases):
    """A process of its own: the interpreter needs more threads than a small machine gives JAX."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "8", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "interpreted_gpu.py"), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_equals_the_definition_without_races():
    check(interpret(*FAST), FAST)


@pytest.mark.slow
def test_every_form_equals_the_definition_without_races():
    check(interpret(*SLOW), SLOW)


def check(found, types):
    assert found.keys() == types.keys()
    for name, errors in found.items():
        assert all(error <= TOLERANCE[types[name]] for error in errors), (name, errors)


def lowered(shape: Shape, dtype=jnp.bfloat16):
    """StableHLO for CUDA of the output and the three gradients."""
    x = jax.ShapeDtypeStruct((1, shape.windows.order.num_tokens, shape.heads, shape.dim), dtype)

    @jax.jit
    def both(query, key, value, cotangent):
        out, back = jax.vjp(lambda *qkv: mosaic_gpu.attend(*qkv, shape.windows), query, key, value)
        return out, *back(cotangent)

    return both.trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()


def operations(text):
    """(operation, types of its results) of each line of StableHLO."""
    for line in text.splitlines():
        if named := re.search(r"= stablehlo\.(\w+)", line):
            yield named.group(1), re.split(r"->| : ", line)[-1]


def test_the_4b_layer_is_three_calls_and_nothing_moves_around_them():
    shape = SHAPES["streamdit_4b_shifted"]
    assert (shape.windows.blocks.shape, shape.windows.order.block_size) == ((8, 8), 256)
    text = lowered(shape)
    assert text.count("custom_call @mosaic_gpu") == text.count("custom_call") == 3
    whole = {name for name, types in operations(text) if "16384x24x128" in types}
    assert whole == {"custom_call", "convert", "multiply"}, "delta reads the output and its gradient; the rest is calls"
    assert not re.search(r"stablehlo\.(gather|dynamic_slice|concatenate|slice|pad)", text)


def test_query_key_and_value_are_read_where_one_product_wrote_them(monkeypatch):
    """Nothing but the call touches a token; where the kernel does not serve, they are taken apart."""
    monkeypatch.setattr(mosaic_gpu.sharding, "target", lambda: Described("gpu"))
    shape = SHAPES["streamdit_4b_shifted"]
    qkv = jax.ShapeDtypeStruct((1, shape.windows.order.num_tokens, 3, shape.heads, shape.dim), jnp.bfloat16)
    run = jax.jit(lambda qkv: attention.packed_window_attention(qkv, shape.windows))
    text = run.trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
    whole = [name for name, types in operations(text) if "tensor<1x16384x" in types]
    assert text.count("custom_call") == 1 and sorted(whole) == ["custom_call", "reshape"]
    qkv = np.random.default_rng(0).normal(size=(1, TINY.order.num_tokens, 3, 2, 8)).astype(np.float32)
    out = attention.packed_window_attention(jnp.asarray(qkv), TINY)
    np.testing.assert_array_equal(out, attention.window_attention(*np.moveaxis(qkv, 2, 0), TINY))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_lowers_for_cuda(name, dtype):
    assert lowered(SHAPES[name], dtype).count("custom_call @mosaic_gpu") == 3


GEOMETRIES = {
    "plain": (((4, 16, 16), (2, 16, 16), (1, 8, 8)), (0, 0, 0), WRAP),
    "wrapped": (((4, 16, 16), (2, 16, 8), (1, 8, 8)), (1, 8, 0), WRAP),
    "cut": (((4, 16, 16), (2, 16, 8), (1, 8, 8)), (1, 8, 0), CUT),
    "nowhere": (((4, 32, 16), (2, 16, 16), (1, 16, 8)), (1, 0, 8), NOWHERE),
    "odd": (((3, 8, 24), (3, 8, 8), (1, 8, 8)), (0, 0, 0), WRAP),
    "odd_cut": (((6, 8, 24), (3, 8, 24), (1, 8, 24)), (1, 0, 0), CUT),
}


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_each_row_meets_what_it_may_see_once(name, columns, data):
    order, shift, wrap = GEOMETRIES[name]
    windows = Windows(TokenOrder(*order), order[1], shift, wrap)
    segments = windows.segments
    if data:
        segments = np.zeros_like(windows.blocks) if segments is None else segments
        work = jax.jit(lambda segments: work_of(windows, segments, columns))(jnp.asarray(segments))
    else:
        work = work_of(windows, None, columns)
    assert windows.order.block_size % work.columns == 0 and work.columns <= columns
    tokens = windows.order.num_tokens
    meets = np.zeros((tokens, tokens), int)
    met = np.asarray(work.met)
    for *rows, begin, count in np.asarray(work.pieces):
        assert work.count in (None, count)
        for start in met[begin : begin + count]:
            for row in rows:
                meets[row : row + ROWS, start : start + work.columns] += 1
    window, region = windows.window_and_region(windows.order.coordinates)
    place = np.concatenate([window, region], axis=1)
    assert np.array_equal(meets, np.all(place[:, None] == place[None], axis=-1))


def test_two_warpgroups_serve_where_their_rows_share_a_part():
    def count(name):
        order, shift, wrap = GEOMETRIES[name]
        return work_of(Windows(TokenOrder(*order), order[1], shift, wrap), None, 128).warpgroups

    assert {name: count(name) for name in GEOMETRIES} == {
        **dict.fromkeys(("plain", "wrapped", "nowhere"), 2),
        **dict.fromkeys(("cut", "odd", "odd_cut"), 1),
    }


SMALL = Windows(TokenOrder((2, 8, 8), (2, 8, 8), (1, 8, 8)), (2, 8, 8), (0, 0, 0), WRAP)
TINY = Windows(TokenOrder((2, 4, 4), (2, 4, 4), (1, 4, 4)), (2, 4, 4), (0, 0, 0), WRAP)


@pytest.mark.parametrize(
    ("windows", "dtype", "dim", "masked", "reason"),
    [
        (SMALL, "float32", 64, False, "takes bfloat16 or float16, not float32"),
        (SMALL, "bfloat16", 96, False, "takes a head_dim of 64 or 128, not 96"),
        (SMALL, "bfloat16", 64, True, "takes no key mask"),
        (TINY, "bfloat16", 64, False, "blocks of 16 tokens are no multiple of 64"),
    ],
)
def test_says_what_it_does_not_take(windows, dtype, dim, masked, reason):
    x = jnp.zeros((1, windows.order.num_tokens, 1, dim), dtype)
    mask = jnp.ones(x.shape[:2], bool) if masked else None
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.attend(x, x, x, windows, mask)


class Described:
    """A device that is not there."""

    core_count = 132

    def __init__(self, platform, compute_capability="9.0"):
        self.platform, self.device_kind, self.compute_capability = platform, "described", compute_capability


@pytest.mark.parametrize("device", [Described("cpu"), Described("gpu", "8.0"), Described("gpu", "10.0")])
def test_needs_a_hopper(monkeypatch, device):
    monkeypatch.setattr(mosaic_gpu.sharding, "target", lambda: device)
    x = jnp.zeros((1, SMALL.order.num_tokens, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU, not described"):
        attention.window_attention(x, x, x, SMALL, backend="mosaic_gpu")


def test_serves_first_on_a_hopper(monkeypatch):
    monkeypatch.setattr(mosaic_gpu.sharding, "target", lambda: Described("gpu"))
    x = jax.ShapeDtypeStruct((1, SMALL.order.num_tokens, 1, 64), jnp.bfloat16)
    run = jax.jit(lambda *qkv: attention.window_attention(*qkv, SMALL))
    assert run.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_at_full_size_on_a_gpu(name, dtype):
    """Against the definition in float32, a window and two heads at a time: its scores would not fit otherwise."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    shape = SHAPES[name]
    windows, size = shape.windows, shape.windows.order.block_size
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (1, windows.order.num_tokens, shape.heads, shape.dim), dtype) for key in keys]

    def run(function, *arrays):
        out, back = jax.vjp(function, *arrays[:3])
        return out, *back(arrays[3])

    found = jax.jit(lambda *arrays: run(lambda *qkv: mosaic_gpu.attend(*qkv, windows), *arrays))(*arrays)

    @jax.jit
    def definition(seen, *arrays):
        def attend(query, key, value):
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest") / math.sqrt(shape.dim)
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision="highest")

        return run(attend, *(x.astype(jnp.float32) for x in arrays))

    for window in (0, len(windows.blocks) - 1):
        places = (windows.blocks[window][:, None] * size + np.arange(size)).ravel()
        seen = (
            np.ones((1, 1))
            if windows.block_mask is None
            else windows.block_mask[window].repeat(size, 0).repeat(size, 1)
        )
        part = [x[:, places, :2] for x in arrays]
        for value, wanted in zip(found, definition(jnp.asarray(seen, bool), *part)):
            error = jnp.abs(value[:, places, :2].astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()
            assert float(error) <= 2 * TOLERANCE[dtype]


def test_tuning_fits_the_shapes():
    assert {shape.dim for shape in SHAPES.values()} <= TUNING.keys()


@pytest.mark.parametrize(
    ("config", "names"),
    [("streamdit_4b", ["streamdit_4b", "streamdit_4b_shifted"]), ("roadtrip", ["roadtrip_rows", "roadtrip_frames"])],
)
def test_shapes_are_those_of_the_configurations(config, names):
    dit = from_arguments([f"--config={HERE.parents[1]}/configs/{config}.py"]).dit
    of_layers = [Shape(windows, dit.num_heads, dit.head_dim) for windows in dit.layer_windows()[:2]]
    assert [SHAPES[name] for name in names] == of_layers
