"""Windowed attention: one function, a plain definition, and backends that are tried in order (StreamDiT §4.1)."""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Int

from streamdit_jax.kernels.dispatch import dispatch
from streamdit_jax.kernels.window_attention.cudnn import window_attention as _cudnn
from streamdit_jax.kernels.window_attention.mosaic_gpu import packed_window_attention as _packed_mosaic_gpu
from streamdit_jax.kernels.window_attention.mosaic_gpu import window_attention as _mosaic_gpu
from streamdit_jax.kernels.window_attention.pallas_tpu import packed_window_attention as _packed_pallas_tpu
from streamdit_jax.kernels.window_attention.pallas_tpu import window_attention as _pallas_tpu
from streamdit_jax.kernels.window_attention.reference import window_attention as _reference
from streamdit_jax.kernels.window_attention.xla import window_attention as _xla
from streamdit_jax.kernels.windows import Windows

BACKENDS: dict[str, Callable] = {
    "reference": _reference,
    "xla": _xla,
    "pallas_tpu": _pallas_tpu,
    "mosaic_gpu": _mosaic_gpu,
    "cudnn": _cudnn,
}
# Per platform of the device that one traces for, the best first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "gpu": ("mosaic_gpu", "cudnn", "xla"),
    "tpu": ("pallas_tpu", "xla"),
    "cpu": ("xla",),
}


def window_attention(
    query: Float[Array, "b tokens heads dim"],
    key: Float[Array, "b tokens heads dim"],
    value: Float[Array, "b tokens heads dim"],
    windows: Windows,
    key_mask: Bool[Array, "b tokens"] | None = None,
    segments: Int[Array, "windows blocks"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Array, "b tokens heads dim"]:
    """Softmax attention in which every token sees the tokens of its window, scaled by 1/√dim.

    query, key, value: [batch, tokens, heads, head_dim], tokens in the order of `windows.order`.
    key_mask: [batch, tokens], False for tokens that no one may attend to; a token that sees none has an unspecified,
        finite result.
    segments: [windows, blocks of a window], the part of its window that each block belongs to, where this is data, as
        on devices that hold windows of unlike parts; only blocks of one part see each other. By default it is as
        `windows.segments` says.
    backend: as in `kernels.dispatch.dispatch`, which also says what is raised.
    """
    serve = dispatch("window attention", BACKENDS, PREFERENCE, backend)
    return serve(query, key, value, windows, key_mask, segments)


def _apart(qkv, windows, key_mask, segments):
    query, key, value = (qkv[:, :, index] for index in range(3))
    return window_attention(query, key, value, windows, key_mask, segments)


# Backends that read query, key and value where one product has written them side by side.
PACKED: dict[str, Callable] = {
    "mosaic_gpu": _packed_mosaic_gpu,
    "pallas_tpu": _packed_pallas_tpu,
    "taken apart": _apart,
}
PACKED_PREFERENCE: dict[str, tuple[str, ...]] = {
    "gpu": ("mosaic_gpu", "taken apart"),
    "tpu": ("pallas_tpu", "taken apart"),
    "cpu": ("taken apart",),
}


def packed_window_attention(
    qkv: Float[Array, "b tokens 3 heads dim"],
    windows: Windows,
    key_mask: Bool[Array, "b tokens"] | None = None,
    segments: Int[Array, "windows blocks"] | None = None,
) -> Float[Array, "b tokens heads dim"]:
    """`window_attention` of query, key and value that lie side by side, as one product makes them.

    Backends that do not read them there have them taken apart, which costs a copy of all three.
    """
    serve = dispatch("window attention of query, key and value side by side", PACKED, PACKED_PREFERENCE)
    return serve(qkv, windows, key_mask, segments)
