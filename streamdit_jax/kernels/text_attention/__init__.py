"""Attention of video tokens to text tokens: one function, a plain definition, and backends that are tried in order
(StreamDiT §4.1).
"""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Int

from streamdit_jax.kernels.dispatch import dispatch
from streamdit_jax.kernels.text_attention.cudnn import text_attention as _cudnn
from streamdit_jax.kernels.text_attention.reference import text_attention as _reference
from streamdit_jax.kernels.text_attention.xla import text_attention as _xla

BACKENDS: dict[str, Callable] = {"reference": _reference, "xla": _xla, "cudnn": _cudnn}
# Per platform of the device that one traces for, the best first.
PREFERENCE: dict[str, tuple[str, ...]] = {"gpu": ("cudnn", "xla"), "tpu": ("xla",), "cpu": ("xla",)}


def text_attention(
    query: Float[Array, "b tokens heads dim"],
    key: Float[Array, "b s heads dim"],
    value: Float[Array, "b s heads dim"],
    reads: Int[Array, "b"] | Bool[Array, "b tokens s"],
    *,
    backend: str | None = None,
) -> Float[Array, "b tokens heads dim"]:
    """Softmax attention in which every video token sees text, scaled by 1/√dim.

    reads: how many of the first text tokens all video tokens see, at least 1; or which ones each of them sees.
    backend: as in `kernels.dispatch.dispatch`, which also says what is raised.
    """
    return dispatch("text attention", BACKENDS, PREFERENCE, backend)(query, key, value, reads)
