"""The Mosaic kernels compiled for an H200 that is not there: no register spills, no product waits for another.

`launch/plan.sh` runs it, in an environment with JAX's CUDA plugin and ptxas. STREAMDIT_PLANS=DIR writes what ptxas said
to DIR/kernel-h200-compile.json.
"""

import importlib.util
import json
import os
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from streamdit_jax import machine, sharding
from streamdit_jax.kernels import window_attention as attention
from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import TUNING
from streamdit_jax.kernels.window_attention.shapes import SHAPES
from streamdit_jax.plan import topology

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None,
        reason="needs JAX's CUDA plugin and ptxas: run launch/plan.sh",
    ),
]
NAMES = [name for name in SHAPES if name != "streamdit_4b"]  # whose kernels are those of its shifted layers
KERNELS = {"window_attention": "forward", "query_gradient": "query", "key_value_gradient": "key_value"}


def compiled(name, dtype, gradients, folder, monkeypatch):
    """The compiled program of one layer, forward or with gradients, and what ptxas said of each of its kernels."""
    for what in ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_PTX"):
        monkeypatch.setenv(what, "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    shape = SHAPES[name]
    mesh = jax.sharding.Mesh(topology.describe("h200:1").devices, ("data",))
    x = jax.ShapeDtypeStruct(
        (1, shape.windows.order.num_tokens, shape.heads, shape.dim), dtype, sharding=sharding.replicated(mesh)
    )

    def forward(query, key, value):
        return attention.window_attention(query, key, value, shape.windows, backend="mosaic_gpu")

    def both(query, key, value, cotangent):
        out, back = jax.vjp(forward, query, key, value)
        return out, *back(cotangent)

    with sharding.on(mesh):
        program = jax.jit(both).lower(x, x, x, x) if gradients else jax.jit(forward).lower(x, x, x)
    return program.compile(), {path.stem: of_kernel(path, shape.dim) for path in sorted(folder.glob("*.ptxas"))}


def of_kernel(path: Path, dim: int) -> dict:
    said = path.read_text()
    passes = path.with_name(path.stem + ".mlir-passes.log").read_text()
    kernel = next(part for part in reversed(KERNELS) if part in path.stem)
    tiles = getattr(TUNING[dim], KERNELS[kernel])
    return {
        "kernel": kernel if kernel == "window_attention" else f"window_attention_{kernel}",
        "columns": tiles.columns,
        "stages": tiles.stages,
        "registers_at_launch": int(re.search(r"Used (\d+) registers", said).group(1)),
        "registers_set": sorted(
            map(int, re.findall(r"setmaxnreg\S+ (?:\t)?(\d+)", path.with_suffix(".ptx").read_text()))
        ),
        "spill_store_bytes": int(re.search(r"(\d+) bytes spill stores", said).group(1)),
        "spill_load_bytes": int(re.search(r"(\d+) bytes spill loads", said).group(1)),
        "shared_memory_bytes": int(re.search(r"dynamic_shared_memory_size %c(\d+)_i32", passes).group(1)),
        "warnings": re.findall(r"\((C\d+)\)", said),
    }


# ptxas' words: C7510 and its kin say that products wait for each other, C7508 that registers cannot be set so.
SERIALISED = {"C7508", "C7510", "C7511", "C7512", "C7513", "C7514"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_no_spills_and_nothing_is_serialised(name, dtype, tmp_path, monkeypatch):
    program, kernels = compiled(name, jnp.dtype(dtype), True, tmp_path, monkeypatch)
    assert len(kernels) == 3
    for kernel in kernels.values():
        assert kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0, kernel
        assert not SERIALISED & set(kernel["warnings"]), kernel
        assert kernel["shared_memory_bytes"] <= 232448, kernel
    entry = program.as_text().partition("ENTRY")[2]
    moved = re.findall(r"= \S+ (copy|transpose|gather|slice|concatenate|pad)\(", entry)
    assert entry.count('custom_call_target="mosaic_gpu') == 3 and not moved
    if folder := os.environ.get("STREAMDIT_PLANS"):
        write(Path(folder) / "kernel-h200-compile.json", name, dtype, list(kernels.values()))


def write(path, name, dtype, kernels):
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= {
        "target": "NVIDIA H200 (sm_90a), by description; nothing was run on one",
        "hardware": machine.hardware(),
        "versions": machine.versions() | {"ptxas": ptxas_version()},
        "date": time.strftime("%Y-%m-%d"),
        "command": "STREAMDIT_PLANS=docs/results bash launch/plan.sh -k gpu_kernels",
    }
    report.setdefault("shapes", {}).setdefault(name, {})[dtype] = kernels
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def ptxas_version() -> str:
    return re.search(r"release ([\d.]+)", os.popen("ptxas --version").read()).group(1)


def test_a_forward_alone_keeps_no_log_sum_exp(tmp_path, monkeypatch):
    program, kernels = compiled("streamdit_4b_shifted", jnp.bfloat16, False, tmp_path, monkeypatch)
    [kernel] = kernels.values()
    assert kernel["spill_store_bytes"] == 0 and not SERIALISED & set(kernel["warnings"])
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes == 16384 * 24 * 128 * 2 and memory.temp_size_in_bytes == 0
