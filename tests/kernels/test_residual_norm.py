"""The residual norm: its definition against float64 NumPy, and every backend against its definition."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax import sharding
from streamdit_jax.kernels.residual_norm import BACKENDS, mosaic_gpu, residual_norm
from streamdit_jax.kernels.windows import TokenOrder

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # before jax 0.11
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

ORDER = TokenOrder((4, 4, 6), (2, 4, 2), (2, 2, 2))
# What is given: p, a value for each frame; a, one for all tokens.
CASES = {
    "gated": dict(branch=True, gate="p", scale="p", shift="p", position=True),
    "affine": dict(branch=True, gate="p", scale="a", shift="a"),
    "rms": dict(branch=True, gate="p", scale="a", norm="rms"),
    "open": dict(branch=True, scale="p", shift="a"),
    "alone": dict(scale="p", shift="p"),
    "placed": dict(scale="p", shift="p", position=True, norm="rms"),
}


def arguments(case, width=16, batch=2, dtype=jnp.float32, order=ORDER):
    """Arguments of a case with numbers of every size, as arrays and as what is not one."""
    rng, case = np.random.default_rng(0), dict(case)
    frames, kinds = order.grid[0], {"p": (batch, order.grid[0], width), "a": (width,)}

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x = array(batch, order.num_tokens, width) * 3 + 1
    branch = array(*x.shape) if case.get("branch") else None
    values = [array(*kinds[case[name]]) if name in case else None for name in ("gate", "scale", "shift")]
    position = tuple(array(size, width) for size in (frames, *order.grid[1:])) if case.get("position") else None
    return (x, branch, *values, order), dict(position=position, norm=case.get("norm", "layer"))


def plainly(x, branch, gate, scale, shift, order, *, position, norm):
    """The same in float64, token by token."""
    places = np.array(order.coordinates)
    x, branch, gate, scale, shift = (
        None if value is None else np.asarray(value, np.float64) for value in (x, branch, gate, scale, shift)
    )
    residual, hidden = np.zeros(x.shape), np.zeros(x.shape)
    for example, index in np.ndindex(x.shape[:2]):
        place = places[index]
        gate_here, scale_here, shift_here = (
            value if value is None or value.ndim == 1 else value[example, place[0]] for value in (gate, scale, shift)
        )
        total = x[example, index]
        if branch is not None:
            total = total + branch[example, index] * (1 if gate is None else gate_here)
        for table, where in zip(position or (), place):
            total = total + np.asarray(table, np.float64)[where]
        centred = total - total.mean() if norm == "layer" else total
        out = centred / np.sqrt(np.mean(centred**2) + 1e-6) * (1 + scale_here)
        residual[example, index], hidden[example, index] = total, out if shift is None else out + shift_here
    return residual, hidden


def on_a(platform, monkeypatch, kind="a chip", capability="9.0"):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(sharding, "target", lambda: device)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend, platform", [("reference", "cpu"), ("xla", "cpu"), ("xla", "gpu")])
def test_backends_equal_the_formula(case, backend, platform, monkeypatch):
    on_a(platform, monkeypatch)
    given, options = arguments(case)
    for ours, expected in zip(residual_norm(*given, **options, backend=backend), plainly(*given, **options)):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def gradients(given, options, backend):
    """Of a weighted sum of both results, by every array."""
    *arrays, order = given
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=given[0].shape).astype(np.float32) for _ in range(2)]

    def loss(arrays, position):
        out = residual_norm(*arrays, order, **options | {"position": position}, backend=backend)
        return sum(jnp.sum(weight * part) for weight, part in zip(weights, out))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays, options["position"])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("case", [CASES["gated"], CASES["rms"]], ids=["gated", "rms"])
def test_gradients_of_xla_are_those_of_the_definition(case, platform, monkeypatch):
    on_a(platform, monkeypatch)
    given, options = arguments(case)
    for ours, theirs in zip(*(jax.tree.leaves(gradients(given, options, name)) for name in ("xla", "reference"))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_half_precision_is_rounded_once(backend):
    """The residual is the nearest bfloat16; the hidden states are as far off as its rounding and theirs make them."""
    given, options = arguments(CASES["gated"], dtype=jnp.bfloat16)
    (residual, hidden), exact = residual_norm(*given, **options, backend=backend), plainly(*given, **options)
    assert residual.dtype == hidden.dtype == jnp.bfloat16
    residual, hidden = (np.asarray(value, np.float64) for value in (residual, hidden))
    assert np.all(np.abs(residual - exact[0]) <= 1.01 * 2**-8 * np.abs(exact[0]))
    assert np.sqrt(np.mean((hidden - exact[1]) ** 2) / np.mean(exact[1] ** 2)) < 2**-8


def test_half_precision_errs_less_than_operations_one_by_one():
    """What it replaces: flax's LayerNorm between sums and products that each round to bfloat16."""
    given, options = arguments(CASES["gated"], 64, dtype=jnp.bfloat16)
    x, branch, gate, scale, shift, order = given
    places = order.coordinates.T
    gate, scale, shift = (value[:, places[0]] for value in (gate, scale, shift))
    residual = x + branch * gate + sum(table[place] for table, place in zip(options["position"], places))
    norm = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, dtype=jnp.bfloat16)
    one_by_one = residual, norm.apply({}, residual) * (1 + scale) + shift
    for ours, theirs, exact in zip(residual_norm(*given, **options), one_by_one, plainly(*given, **options)):
        error, before = (np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2)) for y in (ours, theirs))
        assert error < 0.9 * before, (error, before)


def test_what_is_not_known_is_named():
    given, options = arguments(CASES["alone"])
    with pytest.raises(ValueError, match=r"^norm: 'batch' is not one of layer, rms"):
        residual_norm(*given, norm="batch")
    with pytest.raises(ValueError, match=r"^backend: 'cuda' is not one of reference, xla, mosaic_gpu"):
        residual_norm(*given, **options, backend="cuda")


# ---- the GPU kernel ----

TILED = TokenOrder((2, 2, 4), (2, 2, 2), (1, 2, 2))


def interpreted(given, options, rows=2):
    return mosaic_gpu.residual_norm(
        *given, options["position"], options["norm"], rows=rows, interpret=InterpretGPUParams(detect_races=True)
    )


def test_the_gpu_kernel_equals_the_definition():
    given, options = arguments(CASES["gated"], 1024, batch=1, dtype=jnp.bfloat16, order=TILED)
    for ours, expected in zip(interpreted(given, options), residual_norm(*given, **options, backend="reference")):
        assert ours.dtype == jnp.bfloat16
        ours, expected = (np.asarray(value, np.float32) for value in (ours, expected))
        np.testing.assert_allclose(ours, expected, rtol=2**-7, atol=2**-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "affine", "rms", "open"])
@pytest.mark.parametrize("batch, order", [(1, TokenOrder((1, 2, 2), (1, 2, 2), (1, 2, 2))), (2, TILED)])
def test_every_case_of_the_gpu_kernel(name, batch, order):
    given, options = arguments(CASES[name], 512, batch, order=order)
    for ours, expected in zip(interpreted(given, options), residual_norm(*given, **options, backend="reference")):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_gpu_kernel_are_those_of_the_definition(monkeypatch):
    """Backward is XLA's and needs the arguments only: the kernel's own results are put in for it."""
    given, options = arguments(CASES["gated"], 512, 1, order=TILED)
    monkeypatch.setattr(mosaic_gpu, "_one_pass", lambda x, *_: (x, x))
    on_a("gpu", monkeypatch)
    for ours, theirs in zip(
        *(jax.tree.leaves(gradients(given, options, name)) for name in ("mosaic_gpu", "reference"))
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case, width, dtype, reason",
    [
        ("alone", 1024, jnp.float32, "without a branch"),
        ("gated", 384, jnp.float32, "rows of 384 values of float32"),
        ("gated", 16384, jnp.bfloat16, "rows of 16384 values"),
        ("gated", 1024, jnp.bfloat16, "a chip is no GPU of compute capability 9"),
    ],
)
def test_the_gpu_kernel_says_what_it_does_not_take(case, width, dtype, reason, monkeypatch):
    on_a("gpu", monkeypatch, capability="8.9")
    given, options = arguments(CASES[case], width, 1, dtype, TILED)
    with pytest.raises(NotImplementedError, match=reason):
        residual_norm(*given, **options, backend="mosaic_gpu")
    jax.eval_shape(lambda: residual_norm(*given, **options))  # and another backend serves


@pytest.mark.parametrize("order", [ORDER, TILED, TokenOrder((16, 32, 32), (8, 16, 16), (4, 8, 8))], ids=str)
def test_tiles_are_of_one_frame_and_of_neighbouring_places(order):
    rows = 2
    table = np.repeat(mosaic_gpu.tile_table(order, rows), rows, axis=0)
    place = table[:, 1] + np.arange(len(table)) % rows
    assert np.array_equal(table[:, 0], order.coordinates[:, 0])
    seen = {}
    for where, here in zip(place, order.coordinates[:, 1:]):
        assert np.array_equal(seen.setdefault(where, here), here)
    assert len(seen) == order.grid[1] * order.grid[2]


def test_the_whole_of_a_4b_layer_is_one_kernel_on_a_gpu(monkeypatch):
    """Lowered for CUDA: one custom call, and nothing of the size of the tokens beside it."""
    on_a("gpu", monkeypatch)
    order = TokenOrder((16, 32, 32), (8, 16, 16), (4, 8, 8))
    x, per_frame = (jax.ShapeDtypeStruct((1, count, 3072), jnp.bfloat16) for count in (order.num_tokens, 16))
    tables = tuple(jax.ShapeDtypeStruct((size, 3072), jnp.bfloat16) for size in order.grid)

    def run(x, branch, gate, scale, shift, position):
        return residual_norm(x, branch, gate, scale, shift, order, position=position)

    traced = jax.jit(run).trace(x, x, per_frame, per_frame, per_frame, tables)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    made = [line for line in text.splitlines() if "= stablehlo" in line and line.count("tensor<1x16384x3072") > 0]
    assert len(made) == 1 and "@mosaic_gpu" in made[0], made


def test_there_is_a_test_for_every_backend():
    assert set(BACKENDS) == {"reference", "xla", "mosaic_gpu"}
