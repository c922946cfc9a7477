"""Attention to text: every backend against the plain definition; what no one reads has no say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.kernels import cudnn
from streamdit_jax.kernels import text_attention as attention

NAMES = [name for name in attention.BACKENDS if name != "reference"]
COUNTS = np.array([3, 7], np.int32)


def drawn(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((2, 10, 2, 8), (2, 7, 2, 8), (2, 7, 2, 8), (2, 10, 2, 8))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def reads(kind):
    """Of a number of tokens, or of those that each video token sees."""
    if kind == "count":
        return COUNTS
    seen = np.random.default_rng(1).uniform(size=(2, 10, 7)) < 0.6
    seen[..., 2] = True
    return seen


def result(backend, kind):
    """Output, and the gradients of query, key and value."""
    *given, cotangent = drawn()
    try:
        out, back = jax.vjp(
            lambda *qkv: attention.text_attention(*qkv, jnp.asarray(reads(kind)), backend=backend), *given
        )
    except NotImplementedError as reason:
        pytest.skip(f"{backend} declines: {reason}")
    return out, *back(cotangent)


@pytest.mark.parametrize("kind", ["count", "seen"])
@pytest.mark.parametrize("backend", NAMES)
def test_equals_the_definition_forward_and_backward(backend, kind):
    for value, wanted in zip(result(backend, kind), result("reference", kind)):
        np.testing.assert_allclose(value, wanted, atol=1e-5)


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_what_lies_behind_the_count_has_no_say(backend):
    query, key, value, _ = drawn()
    behind = np.arange(7)[None, :, None, None] >= COUNTS[:, None, None, None]
    loud = [jnp.where(behind, 1e4, x) for x in (key, value)]
    try:
        outs = [attention.text_attention(query, *kv, COUNTS, backend=backend) for kv in ((key, value), loud)]
    except NotImplementedError as reason:
        pytest.skip(f"{backend} declines: {reason}")
    assert np.array_equal(*outs)


def test_the_definition_equals_loops_in_float64():
    query, key, value, _ = (np.asarray(x, np.float64) for x in drawn())
    expected = np.zeros_like(query)
    for b, count in enumerate(COUNTS):
        for q in range(10):
            for h in range(2):
                weights = np.exp(key[b, :count, h] @ query[b, q, h] / np.sqrt(8))
                expected[b, q, h] = weights / weights.sum() @ value[b, :count, h]
    out = attention.text_attention(*drawn()[:3], jnp.asarray(COUNTS), backend="reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)


class Described:
    """A device that is not there."""

    def __init__(self, platform, compute_capability="9.0"):
        self.platform, self.device_kind, self.compute_capability = platform, "described", compute_capability


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "reason"),
    [
        (Described("cpu"), jnp.bfloat16, 64, "needs an NVIDIA GPU, not a cpu"),
        (Described("gpu"), jnp.float32, 64, "takes bfloat16 and float16, not float32"),
        (Described("gpu"), jnp.bfloat16, 20, "a multiple of 8 up to 256, not 20"),
        (Described("gpu", "8.0"), jnp.float16, 256, "a multiple of 8 up to 128, not 256"),
        (Described("gpu"), jnp.bfloat16, 128, "pip install nvidia-cudnn-cu13"),
    ],
)
def test_cudnn_says_what_it_does_not_take(monkeypatch, device, dtype, dim, reason):
    monkeypatch.setattr(cudnn.sharding, "target", lambda: device)
    monkeypatch.setattr(cudnn, "_found", lambda: False)
    with pytest.raises(NotImplementedError, match=reason):
        cudnn.require(jax.ShapeDtypeStruct((1, 4, 2, dim), dtype))
