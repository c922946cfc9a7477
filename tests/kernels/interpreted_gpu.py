"""The Mosaic kernels in Pallas' GPU interpreter, against the definition: `python interpreted_gpu.py NAME …`.

Prints a JSON object: per case the largest error of the output and of the gradients of query, key and value, as a share
of the largest value. The interpreter looks for races, raises where a barrier is left with arrivals that no one waited
for, and fills memory that was not written with NaN. It needs a thread for each warpgroup from JAX's own pool: set
NPROC in the environment to more than the machine has.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax.kernels.window_attention import mosaic_gpu
from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import Tiles, Tuning
from streamdit_jax.kernels.window_attention.reference import window_attention as reference
from streamdit_jax.kernels.windows import TokenOrder, Windows

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # JAX before 0.11
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # there is no public way to ask what was found

WRAP, CUT = (True, True, True), (False, True, True)


@dataclasses.dataclass(frozen=True)
class Case:
    """loops: the multiprocessors that the kernel believes in. data: segments are given as data. twice: run again.
    packed: query, key and value are one array.
    """

    windows: Windows
    dtype: str = "bfloat16"
    batch: int = 1
    heads: int = 1
    dim: int = 64
    loops: int = 1
    data: bool = False
    twice: bool = False
    packed: bool = False
    tuning: Tuning | None = None


def windows_of(grid, window, block, shift, wrap):
    return Windows(TokenOrder(grid, window, block), window, shift, wrap)


SMALL = Tuning(forward=Tiles(64, 2), query=Tiles(64, 2), key_value=Tiles(64, 2))
CASES = {
    # Blocks of 64 in parts: one warpgroup computes, and how many tiles it meets is data.
    "cut": Case(windows_of((4, 8, 8), (2, 8, 8), (1, 8, 8), (1, 0, 0), CUT)),
    # Windows in one part: two warpgroups in turn. One loop for three windows: it goes on from piece to piece.
    "wrapped": Case(windows_of((6, 8, 8), (2, 8, 8), (1, 8, 8), (1, 0, 0), WRAP), dtype="float16", tuning=SMALL),
    "unshifted": Case(windows_of((4, 8, 8), (2, 8, 8), (1, 8, 8), (0, 0, 0), WRAP), batch=2),
    "packed": Case(
        windows_of((2, 8, 8), (2, 8, 8), (1, 8, 8), (0, 0, 0), WRAP), batch=2, heads=2, loops=3, packed=True
    ),
    "head_128": Case(windows_of((4, 8, 16), (2, 8, 16), (1, 8, 16), (1, 0, 0), CUT), dim=128, twice=True),
    "float16": Case(windows_of((4, 8, 16), (2, 8, 16), (1, 8, 16), (1, 0, 0), WRAP), dim=128, dtype="float16"),
    # Seven tiles of 64 in a window: an odd number, so one warpgroup; three windows.
    "odd": Case(windows_of((7, 8, 24), (7, 8, 8), (7, 8, 8), (0, 0, 0), WRAP)),
    "two_axes": Case(windows_of((4, 16, 8), (2, 16, 8), (1, 8, 8), (1, 8, 0), (False, False, True))),
    "data": Case(windows_of((4, 8, 16), (2, 8, 16), (1, 8, 16), (1, 0, 0), CUT), data=True),
}


def lying(windows: Windows) -> tuple[Windows, np.ndarray]:
    """Windows that lie one after another, unshifted, as devices hold them; and where their tokens come from."""
    size = windows.order.block_size
    frames, *sides = windows.window
    order = TokenOrder((len(windows.blocks) * frames, *sides), windows.window, windows.order.block)
    places = (windows.blocks.reshape(-1, 1) * size + np.arange(size)).ravel()
    return Windows(order, windows.window, (0, 0, 0), WRAP), places


def errors(case: Case) -> list[float]:
    rng = np.random.default_rng(0)
    shape = (4, case.batch, case.windows.order.num_tokens, case.heads, case.dim)
    *given, cotangent = (jnp.asarray(x, case.dtype) for x in rng.normal(size=shape))
    wide = [x.astype(jnp.float32) for x in (*given, cotangent)]
    wanted, back = jax.vjp(lambda *qkv: reference(*qkv, case.windows), *wide[:3])
    wanted = (wanted, *back(wide[3]))
    windows, segments = case.windows, None
    if case.data:
        windows, places = lying(case.windows)
        *given, cotangent = (x[:, places] for x in (*given, cotangent))
        wanted, segments = [x[:, places] for x in wanted], jnp.asarray(case.windows.segments)
    run, run_packed = (
        functools.partial(
            function,
            tuning=case.tuning,
            multiprocessors=case.loops,
            interpret=InterpretGPUParams(detect_races=True),
        )
        for function in (mosaic_gpu.attend, mosaic_gpu.attend_packed)
    )

    def attend(*qkv, segments):
        if case.packed:
            return run_packed(jnp.stack(qkv, axis=2), windows, segments=segments)
        return run(*qkv, windows, segments=segments)

    @jax.jit
    def results(segments, cotangent, *given):
        out, back = jax.vjp(functools.partial(attend, segments=segments), *given)
        return out, *back(cotangent)

    found = results(segments, cotangent, *given)
    if case.twice:
        again = results(segments, cotangent, *given)
        assert all(np.array_equal(a, b) for a, b in zip(found, again)), "two runs are equal bit for bit"
    assert not gpu_callbacks.get_races().races_found
    assert all(x.dtype == case.dtype for x in found)
    return [float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()) for x, y in zip(found, wanted)]


if __name__ == "__main__":
    print(json.dumps({name: errors(CASES[name]) for name in sys.argv[1:]}))
