"""The residual norm in one pass: stream and branch are read once, and stream and hidden states written once.

A warpgroup takes the rows of a tile one after another, and asks for the next row before it works on this one. All
tokens of a tile belong to one frame and lie side by side in the grid, so that what modulates them comes from the cache
of its multiprocessor, and positions are one table per frame and one per place. XLA's own kernels need the stream once
more (see `xla`), which this saves where there is a branch; backward is XLA's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from streamdit_jax import sharding
from streamdit_jax.kernels.residual_norm.xla import residual_norm as _xla
from streamdit_jax.kernels.windows import TokenOrder

THREADS = 128  # of a warpgroup, which has a row among its threads
VECTOR_BYTES = 16  # the widest load of a thread
ROWS = 8  # rows of a tile, or as many as divide those of a frame that lie together
LARGEST = 8192  # channels that a warpgroup's registers hold


def residual_norm(
    x,
    branch,
    gate,
    scale,
    shift,
    order: TokenOrder,
    position=None,
    norm="layer",
    epsilon=1e-6,
    *,
    rows: int = ROWS,
    interpret: Any = None,
):
    """See `streamdit_jax.kernels.residual_norm.residual_norm`.

    rows: the most rows of a tile. interpret: parameters of the interpreter of GPU kernels, which runs them on a CPU.
    NotImplementedError without a branch, where XLA makes one pass of it too; for rows that a warpgroup cannot share
    evenly; where several devices work; and on other devices than GPUs of compute capability 9 or higher.
    """
    if branch is None:
        raise NotImplementedError("without a branch XLA makes one pass of it too")
    if math.prod(sharding.parts(axis) for axis in ("batch", "tokens", "heads")) > 1:
        raise NotImplementedError("several devices")
    if x.dtype.itemsize > 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise NotImplementedError(f"{x.dtype} is not float32, bfloat16 or float16")
    if x.shape[-1] % (THREADS * VECTOR_BYTES // x.dtype.itemsize) or x.shape[-1] > LARGEST:
        raise NotImplementedError(f"rows of {x.shape[-1]} values of {x.dtype}")
    if interpret is None:
        device = sharding.target()
        if device.platform != "gpu" or float(getattr(device, "compute_capability", "0")) < 9:
            raise NotImplementedError(f"{device.device_kind} is no GPU of compute capability 9 or higher")
    arrays = (x, branch, gate, scale, shift, position)
    return _residual_norm(*arrays, order, norm, epsilon, rows, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def _residual_norm(x, branch, gate, scale, shift, position, order, norm, epsilon, rows, interpret):
    dtype = x.dtype
    rows = math.gcd(rows, order.block[1] * order.block[2])
    factor = 1 + scale.astype(jnp.float32)
    values = {name: _by_row(value, dtype) for name, value in (("gate", gate), ("factor", factor), ("shift", shift))}
    if position is not None:
        frame, row, column = position
        values["frame"] = frame.astype(dtype)
        values["place"] = _places(order, row, column).astype(dtype)
    values = {name: value for name, value in values.items() if value is not None}
    return _one_pass(x, branch, values, tile_table(order, rows), rows, norm, epsilon, interpret)


def _forward(x, branch, gate, scale, shift, position, *how):
    arrays = (x, branch, gate, scale, shift, position)
    return _residual_norm(*arrays, *how), arrays


def _backward(order, norm, epsilon, rows, interpret, arrays, gradients):
    def again(x, branch, gate, scale, shift, position):
        return _xla(x, branch, gate, scale, shift, order, position, norm, epsilon)

    return jax.vjp(again, *arrays)[1](gradients)


_residual_norm.defvjp(_forward, _backward)


def _by_row(value, dtype) -> Array | None:
    """A value per frame or for all tokens as rows: [batch · frames, d], or [1, d]."""
    return None if value is None else value.astype(dtype).reshape(-1, value.shape[-1])


def _places(order: TokenOrder, row: Float[Array, "h d"], column: Float[Array, "w d"]) -> Float[Array, "places d"]:
    """The sum of the tables for row and column at each place of a frame, in the order in which a frame's tokens lie."""
    at = order.coordinates[order.coordinates[:, 0] == 0]
    row, column = row.astype(jnp.float32), column.astype(jnp.float32)
    whole = (row[:, None] + column).reshape(-1, row.shape[-1])
    return whole[at[:, 1] * order.grid[2] + at[:, 2]]


@functools.cache
def tile_table(order: TokenOrder, rows: int) -> Int[np.ndarray, "tiles 2"]:
    """For each tile of `rows` tokens its frame, and where its places begin in the order of a frame's tokens."""
    frame, row, column = order.coordinates.T
    place = np.empty(order.grid[1:], np.int32)
    first = frame == 0
    place[row[first], column[first]] = np.arange(first.sum())
    table = np.stack([frame, place[row, column]], axis=-1).reshape(-1, rows, 2)
    assert np.all(table == table[:, :1] + np.arange(rows)[:, None] * np.array([0, 1])), "a tile is of one frame"
    return np.ascontiguousarray(table[:, 0], np.int32)


def _one_pass(x, branch, values, table, rows, norm, epsilon, interpret):
    batch, tokens, width = x.shape
    names, rows_of = tuple(values), {name: len(value) for name, value in values.items()}

    def load(ref, *index):
        if interpret is not None:
            return ref[index]
        vector = VECTOR_BYTES // x.dtype.itemsize
        return plgpu.layout_cast(ref[index], plgpu.Layout.WG_STRIDED((width,), vec_size=vector))

    def body(table_ref, x_ref, branch_ref, *refs):
        values, (residual_ref, hidden_ref) = dict(zip(names, refs)), refs[len(names) :]
        example, tile = lax.axis_index("example"), lax.axis_index("tile")
        frame, place = table_ref[tile, 0], table_ref[tile, 1]

        def of_tile(name):
            rows = rows_of[name]
            index = example * (rows // batch) + frame if rows > 1 else jnp.int32(0)
            return load(values[name], frame if name == "frame" else index).astype(jnp.float32)

        def of_row(row):
            return load(x_ref, example, tile * rows + row), load(branch_ref, example, tile * rows + row)

        def one_row(row, loaded):
            following = of_row(jnp.minimum(row + 1, rows - 1))
            residual, branch = (value.astype(jnp.float32) for value in loaded)
            residual += of_tile("gate") * branch if "gate" in values else branch
            if "place" in values:
                residual += of_tile("frame") + load(values["place"], place + row).astype(jnp.float32)
            residual_ref[example, tile * rows + row] = residual.astype(residual_ref.dtype)
            centred = residual - jnp.sum(residual) / width if norm == "layer" else residual
            hidden = centred * lax.rsqrt(jnp.sum(centred * centred) / width + epsilon) * of_tile("factor")
            if "shift" in values:
                hidden += of_tile("shift")
            hidden_ref[example, tile * rows + row] = hidden.astype(hidden_ref.dtype)
            return following

        lax.fori_loop(0, rows, one_row, of_row(0))

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    how = {} if interpret is None else {"interpret": interpret}
    run = plgpu.kernel(
        body,
        out_type=(out, out),
        grid=(batch, tokens // rows),
        grid_names=("example", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=False),
        kernel_name="residual_norm",
        **how,
    )
    return run(jnp.asarray(table), x, branch, *values.values())
