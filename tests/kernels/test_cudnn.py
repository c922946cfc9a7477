"""Windowed attention by cuDNN, without cuDNN: what is called for CUDA, and what is declined."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from streamdit_jax.kernels import cudnn
from streamdit_jax.kernels import window_attention as attention
from streamdit_jax.kernels.window_attention.shapes import SHAPES
from streamdit_jax.kernels.windows import TokenOrder, Windows

WRAP, CUT = (True, True, True), (False, True, True)


class Ampere:
    """A GPU that is not there, with a cuDNN that is."""

    platform, device_kind, compute_capability, core_count = "gpu", "described", "8.0", 108


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(cudnn.sharding, "target", Ampere)
    monkeypatch.setattr(cudnn, "_found", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)


def lowered(windows, heads, dim, dtype=jnp.bfloat16, **options):
    """StableHLO for CUDA of the output and the three gradients."""
    x = jax.ShapeDtypeStruct((1, windows.order.num_tokens, heads, dim), dtype)

    @jax.jit
    def both(query, key, value, cotangent):
        out, back = jax.vjp(lambda *qkv: attention.window_attention(*qkv, windows, **options), query, key, value)
        return out, *back(cotangent)

    return both.trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["streamdit_4b", "streamdit_4b_shifted"])
def test_a_gpu_before_hopper_attends_by_cudnn(ampere, name, dtype):
    """Windows are a batch axis: by a reshape, or a gather of whole blocks of query, key and value and back."""
    shape = SHAPES[name]
    text = lowered(shape.windows, shape.heads, shape.dim, dtype)
    called = set(re.findall(r"custom_call @(__cudnn\$\w+)", text))
    assert called == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert "tensor<8x2048x24x128x" in text
    assert ("gather" in text) == (not shape.windows.is_reshape)


def windows_of(wrap):
    return Windows(TokenOrder((4, 2, 2), (2, 2, 2), (1, 2, 2)), (2, 2, 2), (1, 0, 0), wrap)


def arrays(dim=8, dtype=jnp.bfloat16):
    return jnp.zeros((3, 1, 16, 1, dim), dtype)


@pytest.mark.parametrize(
    ("given", "wrap", "options", "reason"),
    [
        (arrays(), CUT, {}, "takes no windows in parts"),
        (arrays(), WRAP, {"segments": jnp.zeros((2, 2), jnp.int32)}, "takes no windows in parts"),
        (arrays(), WRAP, {"key_mask": jnp.ones((1, 16), bool)}, "takes no key mask"),
        (arrays(dtype=jnp.float32), WRAP, {}, "takes bfloat16 and float16, not float32"),
        (arrays(dim=136), WRAP, {}, "a multiple of 8 up to 128, not 136"),
    ],
)
def test_says_what_it_does_not_take(ampere, given, wrap, options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        attention.window_attention(*given, windows_of(wrap), **options, backend="cudnn")


def test_what_it_declines_goes_to_xla(ampere):
    text = lowered(windows_of(CUT), 1, 8)
    assert "cudnn" not in text and "dot_general" in text


def test_needs_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("this is one")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        attention.window_attention(*arrays(), windows_of(WRAP), backend="cudnn")
