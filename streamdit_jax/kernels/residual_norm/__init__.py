"""What lies between a transformer's matrix products: the residual stream takes up a gated branch, and is normalised and
modulated for the next one (StreamDiT §4.1, fig. 3). One function, a plain definition, and backends that are tried in
order.

All of it is memory traffic. The least is to read the stream and the branch once, and to write the stream and the
normalised tokens once; backends differ in how near they come.
"""

from collections.abc import Callable

from jaxtyping import Array, Float

from streamdit_jax.kernels.dispatch import dispatch
from streamdit_jax.kernels.residual_norm.reference import residual_norm as _reference
from streamdit_jax.kernels.residual_norm.xla import residual_norm as _xla
from streamdit_jax.kernels.windows import TokenOrder

PerFrame = Float[Array, "b f d"] | Float[Array, "d"]  # a value for every frame, or one for all tokens
Tables = tuple[Float[Array, "f d"], Float[Array, "h d"], Float[Array, "w d"]]
NORMS = ("layer", "rms")


def _mosaic_gpu(*arguments):
    from streamdit_jax.kernels.residual_norm.mosaic_gpu import residual_norm  # what it imports, only GPUs need

    return residual_norm(*arguments)


BACKENDS: dict[str, Callable] = {"reference": _reference, "xla": _xla, "mosaic_gpu": _mosaic_gpu}
# Per platform of the device that one traces for, the best first.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("xla",), "gpu": ("mosaic_gpu", "xla"), "tpu": ("xla",)}


def residual_norm(
    x: Float[Array, "b tokens d"],
    branch: Float[Array, "b tokens d"] | None,
    gate: PerFrame | None,
    scale: PerFrame,
    shift: PerFrame | None,
    order: TokenOrder,
    *,
    position: Tables | None = None,
    norm: str = "layer",
    epsilon: float = 1e-6,
    backend: str | None = None,
) -> tuple[Float[Array, "b tokens d"], Float[Array, "b tokens d"]]:
    """(residual, hidden): residual = x + gate ∘ branch + position, hidden = norm(residual) ∘ (1 + scale) + shift.

    x, branch: [batch, tokens, d], tokens in `order`; no branch adds nothing, and no gate is an open one.
    gate, scale, shift: per frame [batch, frames, d], or for all tokens [d]. No shift adds nothing.
    position: tables for frame, row and column of `order.grid`, [frames, d], [height, d] and [width, d], whose sum is
        added to every token.
    norm: "layer" or "rms", over d, without affine; epsilon is added to the variance.
    backend: as in `kernels.dispatch.dispatch`, which also says what is raised.

    Arithmetic is float32, and both results have the type of x. Raises ValueError for an unknown norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} is not one of {', '.join(NORMS)}")
    serve = dispatch("residual norm", BACKENDS, PREFERENCE, backend)
    return serve(x, branch, gate, scale, shift, order, position, norm, epsilon)
