"""What the GPU kernels have in common: tiles brought by one warpgroup to those that compute, and matrix products.

A kernel is a loop over pieces of work, as many loops as the GPU has multiprocessors. One warpgroup only issues copies:
it runs ahead of the others by as many tiles as shared memory holds, from one piece of work into the next. Every tile
has a place in a ring, with a barrier that says it has come and one that says it may be overwritten.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import ROWS, Work

# Of the 504 registers that three warpgroups share: what computes gets these, what copies gets those.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


class Heads(NamedTuple):
    """Some heads of [b, tokens, all heads, dim]: `count` of them, from `first` on. So operands that one product made
    side by side are read where they lie.
    """

    array: jax.Array
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        batch, tokens, _, dim = self.array.shape
        return batch, tokens, self.count, dim

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self):
        return self.array.dtype


@dataclasses.dataclass(frozen=True)
class Ring:
    """Places in shared memory that tiles pass through. operands: (global, its first head, shared) of what comes and
    goes together.
    """

    operands: Sequence[tuple[Any, int, Any]]
    come: Any
    free: Any

    def fill(self, place, batch, head, start):
        """Waits until the place is free, and brings the tile that starts at a token."""
        plgpu.barrier_wait(self.free.at[place])
        for source, first, target in self.operands:
            tokens = pl.ds(start, target.shape[1])
            tile = source.at[batch, tokens, first + head] if len(source.shape) == 4 else source.at[batch, head, tokens]
            plgpu.copy_gmem_to_smem(tile, target.at[place], self.come.at[place])

    def wait(self, place) -> list[Any]:
        """The tile's references in shared memory, once it has come."""
        plgpu.barrier_wait(self.come.at[place])
        return self.tiles(place)

    def tiles(self, place) -> list[Any]:
        return [target.at[place] for *_, target in self.operands]

    def release(self, place):
        plgpu.barrier_arrive(self.free.at[place])


@dataclasses.dataclass(frozen=True)
class Here:
    """The warpgroup that runs a function, and how it computes. interpreted: on a CPU, where products are JAX's own."""

    warpgroup: Any
    interpreted: bool

    def accumulators(self, body: Callable, *shapes: tuple[int, int]):
        """body(*accumulators), which begin at zero."""
        if self.interpreted:
            return body(*(_Interpreted(shape) for shape in shapes))
        types = [plgpu.ACC(shape, jnp.float32) for shape in shapes]
        return pl.run_scoped(lambda *refs: body(*map(_Accumulator, refs)), *types)

    def laid(self, x, layout=plgpu.Layout.WGMMA):
        """An array in the layout of accumulators (or of their rows or columns)."""
        return x if self.interpreted else plgpu.layout_cast(x, layout)

    def place(self):
        """The warpgroup's place among owned tiles, in a loop: the compiler would compute the descriptors of their parts
        before it, and keep them in 32 registers that a loop has not got.
        """
        return lax.optimization_barrier(self.warpgroup)

    def zeros(self, *shape: int):
        return self.laid(jnp.zeros(shape, jnp.float32))

    def per_row(self, ref):
        """A vector in shared memory as a value per row of an accumulator."""
        return self.laid(ref[...], plgpu.Layout.WGMMA.reduce(1))

    def per_column(self, ref):
        return self.laid(ref[...], plgpu.Layout.WGMMA.reduce(0))


@dataclasses.dataclass(frozen=True)
class _Accumulator:
    """Registers that matrix products add to, asynchronously and in order."""

    ref: Any

    def add(self, a, b, *, transposed: bool = False):
        """Begins to add a·b, or a·bᵀ. a: in shared memory, or an array; b: in shared memory."""
        plgpu.wgmma(self.ref, a, b.transpose((1, 0)) if transposed else b)

    def read(self, pending: int = 0):
        """The sum, once no more than `pending` later products are under way."""
        return plgpu.wgmma_accumulator_load(self.ref, wait_n=pending)

    def write(self, x):
        self.ref[...] = x


class _Interpreted:
    """The same by JAX."""

    def __init__(self, shape: tuple[int, int]):
        self.value = jnp.zeros(shape, jnp.float32)

    def add(self, a, b, *, transposed: bool = False):
        a, b = a[...], b[...]
        self.value += jnp.dot(a, b.T if transposed else b, preferred_element_type=jnp.float32)
        # A warpgroup's product reads as copies write, asynchronously; the interpreter would see an ordinary read.
        plgpu.commit_smem()

    def read(self, pending: int = 0):
        return self.value

    def write(self, x):
        self.value = x


@dataclasses.dataclass(frozen=True)
class Turns:
    """Two warpgroups issue their products in turn, so that one's softmax runs beside the other's products."""

    barriers: Any
    warpgroup: Any

    def take(self):
        if self.barriers is not None:
            plgpu.barrier_wait(self.barriers.at[self.warpgroup])

    def give(self):
        if self.barriers is not None:
            plgpu.barrier_arrive(self.barriers.at[1 - self.warpgroup])


def per_row(x, like):
    return lax.broadcast_in_dim(x, like.shape, [0])


def run(
    compute: Callable,
    inputs: Sequence[jax.Array | Heads],
    *,
    name: str,
    work: Work,
    owned: Sequence[Sequence[int]],
    met: Sequence[Sequence[int]],
    outputs: Sequence[jax.ShapeDtypeStruct],
    stages: int,
    turns: bool,
    multiprocessors: int,
    interpret: Any = None,
) -> list[jax.Array]:
    """Runs a kernel over all pieces of work of all heads and examples.

    compute(here, turns, owned, met, count, step) -> outputs, one tile of each for the warpgroup's rows; called by each
        computing warpgroup for each piece. owned, met: rings; count: how many tiles are met; step: how many were met
        before, so that tile j lies at place (step + j) mod stages. It waits for and releases each tile once.
    inputs: [b, tokens, heads, dim], as arrays or as `Heads` of one, or float32 [b, heads, tokens]. owned, met: which
        of them come together, per ring, as a row tile for each warpgroup or as tiles that are met.
    interpret: parameters of the interpreter, or None.
    """
    batch, _, heads, _ = inputs[0].shape
    firsts = [each.first if isinstance(each, Heads) else 0 for each in inputs]
    arrays = [each.array if isinstance(each, Heads) else each for each in inputs]
    warpgroups, pieces = work.warpgroups, work.pieces.shape[0]
    total = pieces * heads * batch
    loops = min(total, multiprocessors)

    def shared(array, places, rows):
        if array.ndim == 3:
            return plgpu.SMEM((places, rows), array.dtype)
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((places, rows, array.shape[-1]), array.dtype, transforms=transforms)

    def barriers(groups, places, releases):
        come = [plgpu.Barrier(num_arrivals=len(group), num_barriers=places) for group in groups]
        return come, [plgpu.Barrier(num_arrivals=releases, num_barriers=places)] * len(groups)

    scratch = dict(
        owned_tiles=[[shared(inputs[i], warpgroups, ROWS) for i in group] for group in owned],
        owned_barriers=barriers(owned, warpgroups, 1),
        met_tiles=[[shared(inputs[i], stages, work.columns) for i in group] for group in met],
        met_barriers=barriers(met, stages, warpgroups),
        out_tiles=[shared(out, warpgroups, ROWS) for out in outputs],
        turn_barriers=plgpu.Barrier(num_barriers=2) if turns and warpgroups == 2 else None,
    )

    def body(
        pieces_ref, met_ref, *refs, owned_tiles, owned_barriers, met_tiles, met_barriers, out_tiles, turn_barriers
    ):
        sources, targets = refs[: len(inputs)], refs[len(inputs) :]

        def rings(groups, tiles, barriers):
            return [
                Ring([(sources[i], firsts[i], tile) for i, tile in zip(group, of_group)], come, free)
                for group, of_group, come, free in zip(groups, tiles, *barriers)
            ]

        owned_rings = rings(owned, owned_tiles, owned_barriers)
        met_rings = rings(met, met_tiles, met_barriers)
        loop, warpgroup = lax.axis_index("loop"), lax.axis_index("warpgroup")

        def each_piece(visit):
            """Folds step, the number of tiles met so far, through visit(batch, head, piece, count, step)."""

            def next_piece(i, step):
                number = loop + i * loops
                rest, piece = lax.div(number, pieces), lax.rem(number, pieces)
                count = work.count or pieces_ref[piece, warpgroups + 1]
                visit(lax.div(rest, heads), lax.rem(rest, heads), piece, count, step)
                return step + count

            lax.fori_loop(0, lax.div(total - 1 - loop, loops) + 1, next_piece, jnp.int32(0))

        @pl.when(warpgroup == warpgroups)
        def _copy():
            if warpgroups == 2:
                plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def visit(batch, head, piece, count, step):
                begin = pieces_ref[piece, warpgroups]

                def fill(j, rings):
                    start = met_ref[begin + j]
                    for ring in rings:
                        ring.fill(lax.rem(step + j, stages), batch, head, start)

                # The last piece's own tiles are the last to be free: what is met first need not wait for that.
                fill(0, met_rings[:1])
                for ring in owned_rings:
                    for place in range(warpgroups):
                        ring.fill(place, batch, head, pieces_ref[piece, place])
                fill(0, met_rings[1:])
                pl.loop(1, count)(lambda j: fill(j, met_rings))

            each_piece(visit)
            for ring in [*owned_rings, *met_rings]:
                for place in range(ring.operands[0][-1].shape[0]):
                    plgpu.barrier_wait(ring.free.at[place])

        @pl.when(warpgroup < warpgroups)
        def _compute():
            if warpgroups == 2:
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            here, order = Here(warpgroup, interpret is not None), Turns(turn_barriers, warpgroup)
            for ring in owned_rings:
                ring.release(warpgroup)
            for ring in met_rings:
                for place in range(stages):
                    ring.release(place)
            pl.when(warpgroup == 1)(order.give)

            def visit(batch, head, piece, count, step):
                results = compute(here, order, owned_rings, met_rings, count, step)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for result, tile in zip(results, out_tiles):
                    tile[warpgroup] = result.astype(tile.dtype)
                plgpu.commit_smem()
                tokens = pl.ds(pieces_ref[piece, warpgroup], ROWS)
                for tile, target in zip(out_tiles, targets):
                    place = target.at[batch, tokens, head] if len(target.shape) == 4 else target.at[batch, head, tokens]
                    plgpu.copy_smem_to_gmem(tile.at[warpgroup], place)

            each_piece(visit)
            pl.when(warpgroup == 0)(order.take)
            plgpu.wait_smem_to_gmem(0)

    # Lane: what each thread holds is laid out here, rather than inferred, as newer versions of JAX do unless told.
    parameters = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=(loops,),
        grid_names=("loop",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=parameters,
        interpret=interpret,
        kernel_name=name,
    )
    return kernel(work.pieces, work.met, *arrays)
