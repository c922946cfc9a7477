"""Embeddings of time, place and text for the diffusion transformer (StreamDiT §4.1; Movie Gen §3.1.2)."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax.kernels.windows import TokenOrder

# Flow time in [0, 1] is embedded on the scale of diffusion steps, as every DiT since the first does.
TIME_SCALE = 1000.0


def sinusoidal(levels: Float[Array, "b f"], width: int) -> Float[Array, "b f width"]:
    """Cosines, then sines, of the levels at width/2 geometric frequencies between 1 and 1/10000."""
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    angles = TIME_SCALE * levels[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nn.Module):
    """One embedding per frame from its flow time: sinusoids → Linear → SiLU → Linear."""

    width: int
    frequencies: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, levels: Float[Array, "b f"]) -> Float[Array, "b f width"]:
        x = sinusoidal(levels, self.frequencies).astype(self.dtype)
        x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(x)


class TextProjection(nn.Module):
    """One text encoder's sequence to the model's width: Linear → LayerNorm (Movie Gen), or Linear → GELU → Linear
    (Wan 2.1).
    """

    width: int
    kind: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b s text"]) -> Float[Array, "b s width"]:
        x = nn.Dense(self.width, dtype=self.dtype, name="linear_1")(x.astype(self.dtype))
        if self.kind == "mlp":
            return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(nn.gelu(x, approximate=True))
        return nn.LayerNorm(dtype=self.dtype, name="norm")(x)


class FactorisedPosition(nn.Module):
    """Learnable tables for frame, row and column, whose sum is every token's position (Movie Gen §3.1.2).

    grid: the largest grid, which the tables are made for; one that `order` has smaller takes the first entries of each.
    """

    order: TokenOrder
    grid: tuple[int, int, int]
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "f width"], Float[Array, "h width"], Float[Array, "w width"]]:
        tables = [
            self.param(name, nn.initializers.normal(0.02), (size, self.width))
            for name, size in zip(("frame", "row", "column"), self.grid)
        ]
        return tuple(table[:size].astype(self.dtype) for table, size in zip(tables, self.order.grid))


def rotary_angles(order: TokenOrder, head_dim: int, theta: float = 10_000.0) -> Float[np.ndarray, "tokens half"]:
    """Angles of 3-D rotary embedding: a head's pairs are divided among time, height and width as in Wan 2.1.

    Of the head_dim/2 pairs, height and width take head_dim // 6 each and time the rest. float32, [tokens, head_dim /
    2], token order.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, size in enumerate((head_dim - 2 * side, side, side)):
        frequencies = theta ** (-np.arange(0, size, 2) / size)
        angles.append(order.coordinates[:, axis, None] * frequencies)
    return np.concatenate(angles, axis=-1).astype(np.float32)


def rotate(
    x: Float[Array, "b tokens heads dim"], angles: Float[np.ndarray, "tokens half"]
) -> Float[Array, "b tokens heads dim"]:
    """Rotates neighbouring pairs of channels by the angles of their token."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    even, odd = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
