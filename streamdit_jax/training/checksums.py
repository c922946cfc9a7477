"""What is verified of a state before it is saved and after it is restored, computed where the state lies."""

import math

import jax
import jax.numpy as jnp


@jax.jit
def checksums(tree) -> list[jax.Array]:
    """A uint32 for each leaf, in the order of `jax.tree.leaves`: Σ bits(xᵢ)·(odd number of i) mod 2³².

    An odd factor is invertible, so one flipped bit always changes the sum; and a sum of integers is the same in every
    order, so it does not depend on the number of devices.
    """

    def one(x):
        x = jnp.asarray(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):  # the flat index without a reshape, which would gather a sharded array
            stride = math.prod(x.shape[axis + 1 :]) % 2**32
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        # Multiplied by a large odd constant before it is made odd, so that neighbours' factors differ in many bits.
        return jnp.sum(bits.astype(jnp.uint32) * ((index * jnp.uint32(2654435761)) | jnp.uint32(1)), dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(tree)]


@jax.jit
def finite(tree) -> list[jax.Array]:
    """Whether all values of a leaf are finite, in the order of `jax.tree.leaves`; integers are."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return [jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True) for x in leaves]


@jax.jit
def checked(tree) -> tuple[list[jax.Array], list[jax.Array]]:
    """(`checksums`, `finite`), in one reading of the state."""
    return checksums(tree), finite(tree)
