"""Windowed attention: one function, a plain definition, and backends that are tried in order (StreamDiT §4.1)."""

import functools
import logging
from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Int

from streamdit_jax import sharding
from streamdit_jax.kernels.window_attention.cudnn import window_attention as _cudnn
from streamdit_jax.kernels.window_attention.mosaic_gpu import packed_window_attention as _packed_mosaic_gpu
from streamdit_jax.kernels.window_attention.mosaic_gpu import window_attention as _mosaic_gpu
from streamdit_jax.kernels.window_attention.pallas_tpu import packed_window_attention as _packed_pallas_tpu
from streamdit_jax.kernels.window_attention.pallas_tpu import window_attention as _pallas_tpu
from streamdit_jax.kernels.window_attention.reference import window_attention as _reference
from streamdit_jax.kernels.window_attention.xla import window_attention as _xla
from streamdit_jax.kernels.windows import Windows

logger = logging.getLogger("streamdit_jax")

BACKENDS: dict[str, Callable] = {
    "reference": _reference,
    "xla": _xla,
    "pallas_tpu": _pallas_tpu,
    "mosaic_gpu": _mosaic_gpu,
    "cudnn": _cudnn,
}
# Per platform of the device that one traces for, the best first. The plain definition materialises scores between all
# tokens: it specifies and tests, and is never chosen on its own.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "gpu": ("mosaic_gpu", "cudnn", "xla"),
    "tpu": ("pallas_tpu", "xla"),
    "cpu": ("xla",),
}
# Those that read query, key and value where one product has written them side by side.
PACKED: dict[str, Callable] = {"mosaic_gpu": _packed_mosaic_gpu, "pallas_tpu": _packed_pallas_tpu}


@functools.cache
def _log_choice(device: str, backend: str, passed_over: tuple[str, ...]) -> None:
    logger.info("window attention on %s: %s%s", device, backend, f" ({'; '.join(passed_over)})" if passed_over else "")


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
    backend: a name in `BACKENDS`; by default those of the platform of `sharding.target()` are tried in order, and the
        first that does not raise NotImplementedError serves. The choice is logged once for each kind of device.

    Raises ValueError for an unknown backend, NotImplementedError if none takes the case.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
        return BACKENDS[backend](query, key, value, windows, key_mask, segments)
    target = sharding.target()
    passed_over = []
    for name in PREFERENCE.get(target.platform, ("xla",)):
        try:
            result = BACKENDS[name](query, key, value, windows, key_mask, segments)
        except NotImplementedError as reason:
            passed_over.append(f"{name}: {reason}")
            continue
        _log_choice(target.device_kind, name, tuple(passed_over))
        return result
    raise NotImplementedError(f"no window attention on {target.device_kind}: {'; '.join(passed_over)}")


def packed_window_attention(
    qkv: Float[Array, "b tokens 3 heads dim"],
    windows: Windows,
    key_mask: Bool[Array, "b tokens"] | None = None,
    segments: Int[Array, "windows blocks"] | None = None,
) -> Float[Array, "b tokens heads dim"]:
    """`window_attention` of query, key and value that lie side by side, as one product makes them.

    The first backend of the platform's that takes the case serves if it reads them there; for others they are taken
    apart, which costs a copy of all three.
    """
    target = sharding.target()
    first = PREFERENCE.get(target.platform, ("xla",))[0]
    if first in PACKED:
        try:
            result = PACKED[first](qkv, windows, key_mask, segments)
        except NotImplementedError:
            pass  # what follows logs why
        else:
            _log_choice(target.device_kind, f"{first}, of query, key and value side by side", ())
            return result
    query, key, value = (qkv[:, :, index] for index in range(3))
    return window_attention(query, key, value, windows, key_mask, segments)
