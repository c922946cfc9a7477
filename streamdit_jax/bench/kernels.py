"""Windowed attention alone, forward and backward, by every backend of the platform, beside a matrix product's rate.

    python -m streamdit_jax.bench.kernels --json [--shape NAME ...] [--dtype float16] [--tune] [--no-torch]

prints one JSON object (without --json, a table): rates, and how far the results are from XLA's in float32. PyTorch's
scaled_dot_product_attention is timed in a process of its own where torch is installed. --tune times the Mosaic kernels
with other tiles than those of `TUNING`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from streamdit_jax import machine, sharding
from streamdit_jax.bench.peaks import product_rate
from streamdit_jax.kernels import window_attention as attention
from streamdit_jax.kernels.window_attention import mosaic_gpu
from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import TUNING, Tiles
from streamdit_jax.kernels.window_attention.shapes import SHAPES, Shape

BACKWARD = 2.5  # times the FLOPs of the forward: five products where that has two
BATCHES, CALLS = 15, 10  # what is timed; calls of a batch follow one another, so that launches are hidden
ENOUGH_SECONDS = 0.02  # a batch needs no more calls than take this long
TORCH_SECONDS = 60
DEFAULT_SHAPES = ("streamdit_4b", "streamdit_4b_shifted", "streamdit_4b_cut")
# The sizes that --tune tries, one kernel at a time.
CANDIDATES = {
    "forward": [Tiles(columns, stages) for columns in (64, 128) for stages in (2, 3, 4)],
    "query": [Tiles(columns, stages) for columns in (64, 128) for stages in (2, 3, 4)],
    "key_value": [Tiles(64, stages) for stages in (2, 3, 4)],
}


def measure(shapes: dict[str, Shape], dtype: jnp.dtype, *, tune: bool = False) -> dict[str, Any]:
    """Rates and errors of every backend, by shape. A backend that declines says why."""
    report: dict[str, Any] = {
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "date": time.strftime("%Y-%m-%d"),
        "dtype": str(dtype),
        "product_tflops": round(product_rate(dtype) / 1e12, 4),
        "shapes": {},
    }
    names = attention.PREFERENCE.get(sharding.target().platform, ("xla",))
    for name, shape in shapes.items():
        windows = shape.windows
        tokens = windows.order.num_tokens // len(windows.blocks)
        wanted = results(
            functools.partial(attention.window_attention, windows=windows, backend="xla"), shape, dtype, 32
        )
        timed = {each: backend_rates(each, shape, dtype, wanted) for each in names}
        report["shapes"][name] = {
            "windows": [len(windows.blocks), tokens, shape.heads, shape.dim],
            "flops": shape.flops,
            **timed,
        }
        if tune and "declined" not in timed.get("mosaic_gpu", {"declined": ""}):
            report["shapes"][name]["tuning"] = tuned(shape, dtype)
    return report


def backend_rates(name: str, shape: Shape, dtype: jnp.dtype, wanted: list[jax.Array]) -> dict[str, Any]:
    """wanted: the output and the gradients in float32."""
    function = functools.partial(attention.window_attention, windows=shape.windows, backend=name)
    try:
        return rates(function, shape, dtype) | errors(results(function, shape, dtype), wanted)
    except NotImplementedError as reason:
        return {"declined": str(reason)}


def drawn(shape: Shape, dtype: jnp.dtype) -> list[jax.Array]:
    """Query, key, value, and the direction of a gradient."""
    size = (1, shape.windows.order.num_tokens, shape.heads, shape.dim)
    return [jax.random.normal(key, size, dtype) for key in jax.random.split(jax.random.key(0), 4)]


def results(function: Callable, shape: Shape, dtype: jnp.dtype, bits: int | None = None) -> list[jax.Array]:
    """The output, and the gradients of query, key and value. bits: 32 computes with the same values in float32."""
    given = [x.astype(jnp.float32) if bits == 32 else x for x in drawn(shape, dtype)]

    @jax.jit
    def run(*given):
        with jax.default_matmul_precision("highest" if bits == 32 else None):
            out, back = jax.vjp(function, *given[:3])
            return [out, *back(given[3])]

    return run(*given)


def errors(found: list[jax.Array], wanted: list[jax.Array]) -> dict[str, float]:
    """The largest difference as a share of the largest value: of the output, and of the worst of the gradients."""
    out, *gradients = (
        float(jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y))) for x, y in zip(found, wanted)
    )
    return {"forward_error": float(f"{out:.3g}"), "backward_error": float(f"{max(gradients):.3g}")}


def rates(function: Callable, shape: Shape, dtype: jnp.dtype) -> dict[str, float]:
    """Milliseconds and TFLOP/s of the output alone, and of the gradients of query, key and value from what the forward
    has saved.
    """
    *given, direction = drawn(shape, dtype)
    forward = median_seconds(jax.jit(function), *given)
    _, back = jax.jit(lambda *qkv: jax.vjp(function, *qkv))(*given)
    backward = median_seconds(jax.jit(lambda back, direction: back(direction)), back, direction)
    return {
        "forward_ms": round(1e3 * forward, 4),
        "forward_tflops": round(shape.flops / forward / 1e12, 4),
        "backward_ms": round(1e3 * backward, 4),
        "backward_tflops": round(BACKWARD * shape.flops / backward / 1e12, 4),
    }


def median_seconds(function: Callable, *arguments: Any) -> float:
    """Of one call: the median of batches of calls that are waited for together, after two that compile and warm up."""

    def seconds(calls: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        return (time.perf_counter() - began) / calls

    seconds(1)
    calls = min(CALLS, 1 + int(ENOUGH_SECONDS / seconds(1)))
    return statistics.median(seconds(calls) for _ in range(BATCHES))


def tuned(shape: Shape, dtype: jnp.dtype) -> list[dict[str, Any]]:
    """The rates with each of `CANDIDATES`, the others as in `TUNING`; those that do not fit are left out."""
    report = []
    for kernel, candidates in CANDIDATES.items():
        for tiles in candidates:
            tuning = dataclasses.replace(TUNING[shape.dim], **{kernel: tiles})
            function = functools.partial(
                mosaic_gpu.attend,
                windows=shape.windows,
                tuning=tuning,
                multiprocessors=sharding.target().core_count,
            )
            try:
                timed = rates(function, shape, dtype)
            except ValueError:  # too much shared memory
                continue
            report.append({"kernel": kernel, **dataclasses.asdict(tiles), **timed})
    return report


def torch_rates(shape: Shape, dtype: jnp.dtype) -> dict[str, Any]:
    """PyTorch's scaled_dot_product_attention of as many windows (`bench.peer`). Before this process takes the device's
    memory. What fails is said under "failed".
    """
    windows = shape.windows
    given = {
        "dtype": str(dtype),
        "window": list(windows.window),
        "windows": len(windows.blocks),
        "num_heads": shape.heads,
        "head_dim": shape.dim,
    }
    command = [sys.executable, "-m", "streamdit_jax.bench.peer", "--attention"]
    try:
        done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"was not done within {TORCH_SECONDS} seconds"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(report: dict[str, Any]) -> Iterable[str]:
    yield f"{report['hardware']}, {report['dtype']}; a product reaches {report['product_tflops']:.1f} TFLOP/s"
    for name, shape in report["shapes"].items():
        for backend, rate in shape.items():
            if isinstance(rate, dict):
                yield f"{name:24} {backend:12} " + (
                    rate.get("declined")
                    or f"forward {rate['forward_tflops']:8.2f} TFLOP/s, backward {rate['backward_tflops']:8.2f}, "
                    f"off by {rate['forward_error']:.1%} and {rate['backward_error']:.1%}"
                )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m streamdit_jax.bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(DEFAULT_SHAPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--tune", action="store_true", help="time the Mosaic kernels with other tiles, too")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    given = parser.parse_args(arguments)
    chosen, dtype = {name: SHAPES[name] for name in given.shape}, jnp.dtype(given.dtype)
    peer = None
    if not given.no_torch and importlib.util.find_spec("torch") is not None:
        peer = torch_rates(next(iter(chosen.values())), dtype)
    report = measure(chosen, dtype, tune=given.tune)
    report["command"] = " ".join(["python -m streamdit_jax.bench.kernels", *(arguments or sys.argv[1:])])
    if peer is not None:
        report["torch"] = peer
    print(json.dumps(report) if given.json else "\n".join(table(report)))


if __name__ == "__main__":
    main()
