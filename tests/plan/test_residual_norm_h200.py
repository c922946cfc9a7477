"""What an H200 that is not there runs between the matrix products of a 4B layer: kernels, bytes, epilogues, spills.

`launch/plan.sh` runs it, in an environment with JAX's CUDA plugin and ptxas. STREAMDIT_PLANS=DIR writes the kernels of
a layer to DIR/elementwise-h200.json.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamdit_jax import machine
from streamdit_jax.plan.kernels import Kernel, kernels

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None,
        reason="needs JAX's CUDA plugin and ptxas: run launch/plan.sh",
    ),
]
TOKENS = 16384 * 3072 * 2  # bytes of the hidden states once
DATA_SHEET, COPY = 4.8e12, 4.0e12  # bytes a second: as the data sheet says, and assumed of copies until it is measured
BUDGET = 0.45e-3 * COPY
PRODUCTS = ("gemm", "fp8_gemm", "batched_gemm")


# In a process of its own: one that has compiled a Mosaic kernel before does not ask ptxas again.
PROGRAM = """
import dataclasses, sys
from pathlib import Path
from streamdit_jax import sharding
from streamdit_jax.config import from_arguments
from streamdit_jax.plan.programs import streaming_program
from streamdit_jax.plan.report import COMPILER_OPTIONS
from streamdit_jax.plan.topology import describe

config = from_arguments(["--config=configs/streamdit_4b_distill.py", "--config.dit.num_layers=2"])
config = dataclasses.replace(
    config,
    dit=dataclasses.replace(config.dit, dtype="bfloat16"),
    mesh=dataclasses.replace(config.mesh, fsdp=1),
)
mesh = sharding.make_mesh(config.mesh, devices=describe("h200").devices)
compiled = streaming_program(config, mesh).lowered.compile(compiler_options=COMPILER_OPTIONS["gpu"])
Path(sys.argv[1]).write_text(compiled.as_text())
"""


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> tuple[list[Kernel], list[str]]:
    """The kernels of a streaming forward of two layers, in order, and what ptxas said of the residual norms."""
    folder = tmp_path_factory.mktemp("ptxas")
    environment = {
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": str(ROOT),
    }
    program = [sys.executable, "-c", PROGRAM, str(folder / "compiled.hlo")]
    subprocess.run(program, cwd=ROOT, env=os.environ | environment, check=True, timeout=900)
    said = [path.read_text() for path in sorted(folder.glob("residual_norm*.ptxas"))]
    return [kernel for kernel, _ in kernels((folder / "compiled.hlo").read_text(), guided=False)], said


def a_layer(every: list[Kernel]) -> list[Kernel]:
    """From the first layer's attention to the second's projections: one of each thing that a layer does."""
    first, second = (i for i, kernel in enumerate(every) if "self_attention/qkv" in kernel.scope and kernel.flops)
    return every[first + 1 : second + 1]


def is_attention(kernel: Kernel) -> bool:
    return kernel.kind == "cudnn" or "/window_attention/" in kernel.scope


def beyond(layer: list[Kernel]) -> list[Kernel]:
    """What is neither a matrix product nor attention."""
    return [kernel for kernel in layer if kernel.kind not in PRODUCTS and not is_attention(kernel)]


def test_a_layer_is_three_passes_between_its_products(every):
    layer = a_layer(every[0])
    moved = sum(kernel.read + kernel.written for kernel in beyond(layer))
    large = [kernel for kernel in beyond(layer) if kernel.read + kernel.written > TOKENS]
    record(layer, moved)
    assert moved <= BUDGET
    assert moved <= 10.2 * TOKENS, "twice stream and branch in, stream and hidden out; once stream in, hidden out"
    assert len(large) == 3
    epilogues = sorted(kernel.detail for kernel in layer if kernel.kind == "gemm")
    assert epilogues == ["BIAS"] * 5 + ["BIAS_GELU"]


def test_nothing_is_only_moved(every):
    """Neither tokens nor weights; shifted windows are found, not gathered."""
    large = [kernel for kernel in every[0] if kernel.kind == "copy" and kernel.read + kernel.written > TOKENS / 4]
    assert not large and not [kernel for kernel in every[0] if kernel.weight]
    windows = [kernel for kernel in every[0] if "/window_attention/" in kernel.scope]
    assert [kernel.kind for kernel in windows] == ["mosaic_gpu"] * 2


def test_no_register_is_spilled(every):
    assert every[1]
    for text in every[1]:
        assert "0 bytes spill stores, 0 bytes spill loads" in text
        assert int(re.search(r"Used (\d+) registers", text).group(1)) <= 128, "four blocks to a multiprocessor"


def record(layer: list[Kernel], moved: int) -> None:
    if folder := os.environ.get("STREAMDIT_PLANS"):
        report = {
            "what": "kernels of one layer of the 4B's streaming forward, compiled and not run",
            "target": "NVIDIA H200, by description",
            "bytes_beyond_products_and_attention": moved,
            "ms_at_data_sheet_bandwidth": round(1e3 * moved / DATA_SHEET, 4),
            "ms_at_assumed_copy_bandwidth": round(1e3 * moved / COPY, 4),
            "bandwidths": {"data_sheet": DATA_SHEET, "copy_assumed": COPY},
            "kernels": [row(kernel) for kernel in layer],
            "command": "STREAMDIT_PLANS=docs/results bash launch/plan.sh -k three_passes",
            "host": machine.hardware(),
            "versions": machine.versions(),
            "date": time.strftime("%Y-%m-%d"),
        }
        path = Path(folder) / "elementwise-h200.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def row(kernel: Kernel) -> dict:
    within = re.sub(r".*/Block/", "", kernel.scope)
    microseconds = round(1e6 * (kernel.read + kernel.written) / DATA_SHEET, 1)
    told = {"kind": kernel.kind, "detail": kernel.detail, "operation": within}
    return told | {"read_bytes": kernel.read, "written_bytes": kernel.written, "us_of_memory": microseconds}
