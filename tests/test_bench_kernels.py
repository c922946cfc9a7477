"""The benchmark of windowed attention: its FLOPs, and what it prints, on whatever this is."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.bench import kernels
from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import ROWS, work_of
from streamdit_jax.kernels.window_attention.shapes import SHAPES, Shape
from streamdit_jax.kernels.windows import TokenOrder, Windows

WINDOWS = Windows(TokenOrder((4, 4, 4), (2, 4, 4), (1, 4, 4)), (2, 4, 4), (1, 0, 0), (True, True, True))


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_the_kernels_do(name):
    """Two products of as many rows and columns as tiles meet: parts of windows that see nothing are no work."""
    shape = SHAPES[name]
    work = work_of(shape.windows, None, 128)
    tiles = work.warpgroups * int(np.asarray(work.pieces)[:, -1].sum())
    assert shape.flops == 4 * tiles * ROWS * work.columns * shape.dim * shape.heads


def test_the_4b_layer_takes_412_gflop():
    for name in ("streamdit_4b", "streamdit_4b_shifted"):
        assert SHAPES[name].flops == 4 * 8 * 2048**2 * 24 * 128
    assert SHAPES["streamdit_4b_cut"].flops == SHAPES["streamdit_4b"].flops * 3 // 4


@pytest.fixture
def quick(monkeypatch):
    """Without the matrix product, and with few repeats of a small shape."""
    monkeypatch.setattr(kernels, "product_rate", lambda dtype: 1e12)
    monkeypatch.setattr(kernels, "BATCHES", 3)
    monkeypatch.setattr(kernels, "CALLS", 2)
    monkeypatch.setitem(kernels.SHAPES, "streamdit_4b", Shape(WINDOWS, 2, 8))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts on a CPU's backends")
def test_rates_follow_from_flops_and_times(quick):
    report = kernels.measure({"small": Shape(WINDOWS, 2, 8)}, jnp.dtype("float32"), tune=True)
    assert (report["product_tflops"], report["dtype"]) == (1.0, "float32")
    small = report["shapes"]["small"]
    assert small["windows"] == [2, 32, 2, 8] and small["flops"] == 4 * 2 * 32**2 * 16
    assert small.keys() == {"windows", "flops", "xla"}, "other backends are not a CPU's"
    for part, share in (("forward", 1), ("backward", 2.5)):
        flops = small["xla"][f"{part}_tflops"] * small["xla"][f"{part}_ms"] * 1e9
        assert flops == pytest.approx(share * small["flops"], rel=0.2, abs=1e5)


def test_results_are_held_against_float32(quick, monkeypatch):
    """In bfloat16 they are off by its rounding; a backend that computes something else shows at once."""
    shape, dtype = Shape(WINDOWS, 2, 8), jnp.dtype("bfloat16")
    small = kernels.measure({"small": shape}, dtype)["shapes"]["small"]["xla"]
    assert 0 < small["forward_error"] < 0.02 and 0 < small["backward_error"] < 0.05
    monkeypatch.setitem(kernels.attention.BACKENDS, "doubling", lambda query, key, value, *rest: query + value)
    monkeypatch.setitem(kernels.attention.PREFERENCE, "cpu", ("doubling",))
    wrong = kernels.measure({"small": shape}, dtype)["shapes"]["small"]["doubling"]
    assert wrong["forward_error"] > 0.2 and wrong["backward_error"] > 0.2


def test_a_backend_that_declines_says_why(quick):
    found = kernels.backend_rates("mosaic_gpu", Shape(WINDOWS, 2, 8), jnp.dtype("float32"), [])
    assert found.keys() == {"declined"} and found["declined"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts on a CPU's backends")
def test_it_prints_one_json_object(quick, capsys):
    kernels.main(["--json", "--shape", "streamdit_4b", "--no-torch"])
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "python -m streamdit_jax.bench.kernels --json --shape streamdit_4b --no-torch"
    assert report["shapes"]["streamdit_4b"]["xla"]["forward_ms"] > 0 and "torch" not in report
    kernels.main(["--shape", "streamdit_4b", "--no-torch"])
    assert "a product reaches 1.0 TFLOP/s" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_torch_is_timed_in_its_own_process():
    found = kernels.torch_rates(Shape(WINDOWS, 2, 8), jnp.dtype("float32"))
    assert found["shape"] == [2, 32, 2, 8] and found["default"]["ms"] > 0
