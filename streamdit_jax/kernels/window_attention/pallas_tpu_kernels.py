"""The TPU kernels of windowed attention: a whole window of some heads in VMEM, forward and backward (StreamDiT §4.1).

One grid step attends within one window, for as many heads as `Case.lanes` holds. The window's pieces, runs of tokens
that lie contiguously, are fetched by one copy each, wherever the block table says that they lie, while the step before
computes; results go back the same way while the next one does. In VMEM a window is contiguous, so that tiles are as
large as the matrix unit wants, whatever its pieces are. A token is in one window only: the backward kernel holds all
that its gradients need, and makes those of query, key and value in one pass, without atomics.

Forward:   S = QKᵀ/√d,  P = exp(S − L),  O = PV,  with L the log-sum-exp of each row of S, saved in base 2
Backward:  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ − δ),  dQ = dS K/√d,  dK = dSᵀ Q/√d,  with δ = rowsum(dO ∘ O)

Backward, tiles are transposed, [keys, queries]: L and δ are then rows that broadcast over sublanes, and of the five
products only dQ's transposes a tile.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from streamdit_jax.kernels.window_attention.pallas_tpu_case import LANES, Case


@dataclasses.dataclass(frozen=True)
class Moves:
    """The copies of a step, in or out: `arrays` in HBM, [batch, tokens, heads · head_dim], or parts of one, each with
    the lane at which it begins; and the two halves of each of `buffers`, [2, tokens of a window, lanes], that take
    turns.
    """

    case: Case
    table: jax.Array
    arrays: Sequence
    buffers: Sequence
    semaphores: jax.Array
    out: bool = False

    def start(self, step, half) -> None:
        case = self.case
        example, group, window = case.place(step)

        @pl.loop(0, case.pieces)
        def _(piece):
            row = pl.multiple_of(self.table[window * case.pieces + piece] * case.size, case.size)
            here = pl.ds(pl.multiple_of(piece * case.size, case.size), case.size)
            for (array, first), buffer in zip(self.arrays, self.buffers):
                lanes = pl.ds(pl.multiple_of(first + group * case.lanes, LANES), case.lanes)
                ends = array.at[example, pl.ds(row, case.size), lanes], buffer.at[half, here]
                pltpu.make_async_copy(*(ends[::-1] if self.out else ends), self.semaphores.at[half]).start()

    def wait(self, half) -> None:
        """For all copies of a half: as many bytes as its buffers hold."""
        for buffer in self.buffers:
            pltpu.make_async_copy(buffer.at[half], buffer.at[half], self.semaphores.at[half]).wait()


def _overlapped(case: Case, fetched: Moves, written: Moves, compute: Callable) -> None:
    """`compute(half, window)` between the arrival of this step's inputs, with the next's on their way, and the
    departure of its results.
    """
    steps = case.grid[1]
    step = pl.program_id(1)
    number, half = pl.program_id(0) * steps + step, step % 2

    @pl.when(step == 0)
    def _():
        fetched.start(number, half)

    @pl.when(step + 1 < steps)
    def _():
        fetched.start(number + 1, 1 - half)

    fetched.wait(half)

    @pl.when(step >= 2)
    def _():
        written.wait(half)

    compute(half, case.place(number)[2])
    written.start(number, half)

    @pl.when(step == steps - 1)
    def _():
        if steps > 1:
            written.wait(1 - half)
        written.wait(half)


def _apart(case: Case, arrays: Sequence) -> list:
    """Query, key and value, or their gradients, with the lane at which each begins: three arrays, or side by side in
    one.
    """
    if len(arrays) == 3:
        return [(array, 0) for array in arrays]
    return [(arrays[0], index * case.heads * case.head_dim) for index in range(3)]


def _dot(a, b, contract: tuple[int, int]):
    """Products of tiles, summed in float32; exact for float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _own(case: Case, x, head: int):
    """A tile of 128 lanes with those of the other head that shares them set to zero."""
    if case.head_dim == LANES:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane // case.head_dim == head, x, jnp.zeros_like(x))


def _keys_of(case: Case, ranges, window, query_tile, rows: int, columns: int):
    """First and last + 1 of the tiles of keys that a window's tile of queries sees."""
    if ranges is None:
        return 0, case.tokens // columns
    at = 2 * (window * case.pieces + query_tile * rows // case.size)
    return ranges[at] * (case.size // columns), ranges[at + 1] * (case.size // columns)


def _over(first, last, body: Callable, carry):
    """A loop over tiles; unrolled where its length is known, so that one tile's products overlap another's softmax."""
    if isinstance(first, int):
        for index in range(first, last):
            carry = body(index, carry)
        return carry
    return jax.lax.fori_loop(first, last, body, carry)


def _at(index, size: int):
    return pl.ds(index * size if isinstance(index, int) else pl.multiple_of(index * size, size), size)


def forward_kernel(case: Case, table, ranges, qkv, bias, out, lse, buffers, semaphores):
    """Refs: table, ranges in SMEM; qkv, those of query, key, value, or of one array, and out in HBM; bias [1, tokens of
    a window] or None; lse [heads of a step, tokens of a window].
    """
    rows, columns = case.tile
    q, k, v, o = buffers
    fetched = Moves(case, table, _apart(case, qkv), (q, k, v), semaphores.at[0])
    written = Moves(case, table, [(out, 0)], (o,), semaphores.at[1], out=True)

    def compute(half, window):
        @pl.loop(0, case.lanes // LANES)
        def _(chunk):
            lanes = _at(chunk, LANES)

            @pl.loop(0, case.tokens // rows)
            def _(tile):
                here = _at(tile, rows)
                queries, total = q[half, here, lanes], None
                for head in range(LANES // case.head_dim):
                    result, row = attend(_own(case, queries, head), half, window, lanes, tile)
                    total = _own(case, result, head) if total is None else total + _own(case, result, head)
                    lse[pl.ds(chunk * (LANES // case.head_dim) + head, 1), here] = row
                o[half, here, lanes] = total.astype(o.dtype)

    def attend(queries, half, window, lanes, tile):
        """Weighted values [rows, 128] of one tile of queries, and the log-sum-exps [1, rows] of its scores."""

        def see(index, carry):
            there = _at(index, columns)
            scores = _dot(queries, k[half, there, lanes], (1, 1)) * case.scale
            if bias is not None:
                scores = scores + bias[:, there]
            top = jnp.max(scores, axis=1, keepdims=True)
            if carry is not None:
                top = jnp.maximum(top, carry[0])
            weights = jnp.exp2(scores - top)
            sums = jnp.sum(weights, axis=1, keepdims=True)
            values = _dot(weights.astype(v.dtype), v[half, there, lanes], (1, 0))
            if carry is not None:
                old = jnp.exp2(carry[0] - top)
                sums, values = carry[1] * old + sums, carry[2] * old + values
            return top, sums, values

        first, last = _keys_of(case, ranges, window, tile, rows, columns)
        top, sums, values = _over(first + 1, last, see, see(first, None))
        spread = jnp.broadcast_to(top + jnp.log2(sums), (rows, LANES))
        return values / sums, jnp.transpose(spread)[:1]

    _overlapped(case, fetched, written, compute)


def backward_kernel(case: Case, table, ranges, qkv, out, gradient, bias, lse, gradients, buffers, sums, semaphores):
    """Refs as in `forward_kernel`: gradient, of out; gradients, of qkv; sums, float32, of dK and dV [tokens of a
    window, 128].
    """
    rows, columns = case.backward_tile
    q, k, v, o, do, dq, dk, dv = buffers
    key_sums, value_sums = sums
    inputs = [*_apart(case, qkv), (out, 0), (gradient, 0)]
    fetched = Moves(case, table, inputs, buffers[:5], semaphores.at[0])
    written = Moves(case, table, _apart(case, gradients), buffers[5:], semaphores.at[1], out=True)

    def compute(half, window):
        @pl.loop(0, case.lanes // LANES)
        def _(chunk):
            lanes = _at(chunk, LANES)
            key_sums[...] = jnp.zeros_like(key_sums)
            value_sums[...] = jnp.zeros_like(value_sums)

            @pl.loop(0, case.tokens // rows)
            def _(tile):
                here = _at(tile, rows)
                queries, cotangents = q[half, here, lanes], do[half, here, lanes]
                product = cotangents.astype(jnp.float32) * o[half, here, lanes].astype(jnp.float32)
                total = jnp.zeros((rows, LANES), jnp.float32)
                for head in range(LANES // case.head_dim):
                    row = lse[pl.ds(chunk * (LANES // case.head_dim) + head, 1), here]
                    delta = jnp.sum(jnp.transpose(_own(case, product, head)), axis=0, keepdims=True)
                    tiles = _own(case, queries, head), _own(case, cotangents, head), row, delta
                    total = total + _own(case, descend(*tiles, half, window, lanes, tile), head)
                dq[half, here, lanes] = (total / math.sqrt(case.head_dim)).astype(dq.dtype)

            dk[half, :, lanes] = (key_sums[...] / math.sqrt(case.head_dim)).astype(dk.dtype)
            dv[half, :, lanes] = value_sums[...].astype(dv.dtype)

    def descend(queries, cotangents, row, delta, half, window, lanes, tile):
        """√d times the gradient [rows, 128] of a tile of queries; adds to those of the keys and values that it sees."""

        def see(index, total):
            there = _at(index, columns)
            keys = k[half, there, lanes]
            scores = _dot(keys, queries, (1, 1)) * case.scale
            if bias is not None:
                scores = scores + jnp.transpose(jnp.broadcast_to(bias[:, there], (LANES, columns)))[:, :1]
            weights = jnp.exp2(scores - row)
            slopes = weights * (_dot(v[half, there, lanes], cotangents, (1, 1)) - delta)
            slopes = slopes.astype(keys.dtype)
            value_sums[there] += _dot(weights.astype(keys.dtype), cotangents, (1, 0))
            key_sums[there] += _dot(slopes, queries, (1, 0))
            return total + _dot(slopes, keys, (0, 0))

        first, last = _keys_of(case, ranges, window, tile, rows, columns)
        return _over(first, last, see, jnp.zeros((rows, LANES), jnp.float32))

    _overlapped(case, fetched, written, compute)


def _call(case: Case, kernel, name: str, scalars, arrays, bias, rows, outs, scratch, products: int):
    """A `pallas_call` of one of the kernels. arrays, outs: in HBM, fetched and written by the kernel itself; bias and
    rows (as `forward` takes and gives them): what the pipeline brings, None where there is none. products: matrix
    products of a window.
    """

    def place(core, step, *_):
        return case.place(core * case.grid[1] + step)

    def of_keys(*at):
        example, _, window = place(*at)
        return example, window, 0, 0

    window = case.tokens
    brought = pl.BlockSpec((None, None, 1, window), of_keys)
    of_heads = pl.BlockSpec((None, None, None, case.step_heads, window), lambda *at: (*place(*at), 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    inputs = [(array, anywhere) for array in arrays]
    inputs += [(bias, brought)] if bias is not None else []
    inputs += [(rows, of_heads)] if rows is not None else []
    work = 2 * case.batch * case.heads * case.windows * window**2
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=case.grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[of_heads if out.ndim == 5 else anywhere for out in outs],
            scratch_shapes=[*scratch, pltpu.SemaphoreType.DMA((2, 2))],
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=case.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * case.head_dim * work,
            transcendentals=work // 2,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *outs)),
        ),
        interpret=case.interpret,
        name=name,
    )(*scalars, *(array for array, _ in inputs))


def _halves(case: Case, count: int) -> list:
    return [pltpu.VMEM((2, case.tokens, case.lanes), case.dtype) for _ in range(count)]


def forward(case: Case, table, ranges, qkv: tuple, bias):
    """Output [batch, tokens, heads · head_dim], and log-sum-exps in base 2, [batch, groups, windows, heads of a step,
    tokens of a window], in the order of the table.

    table: int32 [windows · pieces], the number of each piece. ranges: int32 [windows · pieces · 2], first and last + 1
        of the pieces that each sees, or None. qkv: query, key, value, each [batch, tokens, heads · head_dim], or one
        array of them side by side. bias: float32 [batch, windows, 1, tokens of a window], added to the scores of each
        key, or None.
    """
    scalars = [table] if ranges is None else [table, ranges]

    def kernel(*refs):
        (seen, ranges_seen), refs = _scalars(refs, ranges)
        arrays, refs = refs[: len(qkv)], refs[len(qkv) :]
        masked, (out, lse, *buffers, semaphores) = (None, refs) if bias is None else (refs[0], refs[1:])
        forward_kernel(case, seen, ranges_seen, arrays, masked, out, lse, buffers, semaphores)

    width = case.heads * case.head_dim
    outs = [
        jax.ShapeDtypeStruct((*qkv[0].shape[:2], width), case.dtype),
        jax.ShapeDtypeStruct((case.batch, case.groups, case.windows, case.step_heads, case.tokens), jnp.float32),
    ]
    return _call(case, kernel, "window_attention_forward", scalars, qkv, bias, None, outs, _halves(case, 4), 2)


def backward(case: Case, table, ranges, qkv: tuple, bias, out, lse, gradient) -> list:
    """Gradients of `qkv`; arguments as `forward` takes and gives them."""
    scalars = [table] if ranges is None else [table, ranges]
    count = len(qkv)

    def kernel(*refs):
        (seen, ranges_seen), refs = _scalars(refs, ranges)
        arrays, (given, slope, *refs) = refs[:count], refs[count:]
        masked, (saved, *refs) = (None, refs) if bias is None else (refs[0], refs[1:])
        gradients, buffers, (*sums, semaphores) = refs[:count], refs[count : count + 8], refs[count + 8 :]
        backward_kernel(
            case, seen, ranges_seen, arrays, given, slope, masked, saved, gradients, buffers, sums, semaphores
        )

    outs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in qkv]
    scratch = _halves(case, 8) + [pltpu.VMEM((case.tokens, LANES), jnp.float32)] * 2
    arrays = (*qkv, out, gradient)
    return _call(case, kernel, "window_attention_backward", scalars, arrays, bias, lse, outs, scratch, 5)


def _scalars(refs: tuple, ranges) -> tuple:
    """The refs of table and ranges, None where there are none of these, and those that follow."""
    return ((refs[0], None), refs[1:]) if ranges is None else (refs[:2], refs[2:])
