"""Buffered flow matching (StreamDiT §3.1; eq. 1–3, 6): every latent frame of a buffer has a flow time of its own.

    path       x_t = t·x1 + (1 − (1 − σ)·t)·x0,  x0 ~ N(0, I),  σ = 1e-5      (eq. 1)
    velocity   v = x1 − (1 − σ)·x0                                            (eq. 2)
    loss       mean over scored frames of ‖u(X_τ, P, τ) − V‖²                 (eq. 3)
    guidance   g = u(∅) + w·(u(P) − u(∅))
    Euler      X ← X + u ∘ Δτ                                                 (eq. 6)

Latents are [batch, frames, height, width, channels]; levels are [batch, frames] or [frames]; 0 is noise, 1 is clean.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SIGMA_MIN = 1e-5


def _per_frame(levels):
    """Levels [..., frames] against latents [..., frames, height, width, channels]."""
    return levels[..., None, None, None]


def interpolate(
    clean: Float[Array, "*b f h w c"], noise: Float[Array, "*b f h w c"], levels: Float[Array, "*#b f"]
) -> Float[Array, "*b f h w c"]:
    """The point at flow time `levels` on the straight path from noise to the clean latents (eq. 1)."""
    t = _per_frame(levels)
    return t * clean + (1 - (1 - SIGMA_MIN) * t) * noise


def velocity_target(clean: Float[Array, "*b f h w c"], noise: Float[Array, "*b f h w c"]) -> Float[Array, "*b f h w c"]:
    """The velocity of that path, the same at every flow time (eq. 2)."""
    return clean - (1 - SIGMA_MIN) * noise


def loss(
    predicted: Float[Array, "b f h w c"], target: Float[Array, "b f h w c"], scored: Bool[Array, "b f"]
) -> Float[Array, ""]:
    """Mean squared velocity error over the scored frames of the batch (eq. 3); 0 where no frame is scored.

    What is predicted for other frames, even NaN, reaches neither the loss nor its gradient.
    """
    error = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    per_frame = jnp.mean(jnp.square(jnp.where(_per_frame(scored), error, 0)), axis=(2, 3, 4))
    return jnp.sum(per_frame) / jnp.maximum(jnp.sum(scored), 1)


def guide(
    unconditional: Float[Array, "b f h w c"], conditional: Float[Array, "b f h w c"], guidance: Float[Array, "*#b"]
) -> Float[Array, "b f h w c"]:
    """Classifier-free guidance: weight 0 ignores the prompt, 1 is the conditional velocity, more exaggerates it."""
    weight = jnp.reshape(jnp.asarray(guidance, unconditional.dtype), (-1, 1, 1, 1, 1))
    return unconditional + weight * (conditional - unconditional)


def euler_step(
    latents: Float[Array, "b f h w c"],
    velocity: Float[Array, "b f h w c"],
    levels: Float[Array, "*#b f"],
    next_levels: Float[Array, "*#b f"],
) -> Float[Array, "b f h w c"]:
    """One step of each frame from its level to its next one (eq. 6).

    A frame whose level does not change, such as a reference, is returned bit for bit, whatever its velocity.
    """
    delta = _per_frame(next_levels - levels)
    return jnp.where(delta == 0, latents, latents + velocity.astype(latents.dtype) * delta)
