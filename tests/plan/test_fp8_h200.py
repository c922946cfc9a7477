"""What XLA runs of a quantised forward on an H200 that is not there: float8 products, and what rounding adds in bytes.

Needs JAX's CUDA plugin, and ptxas: launch/plan.sh. Two layers of StreamDiT-4B's shapes, which all layers repeat.
"""

import dataclasses
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from streamdit_jax import sharding
from streamdit_jax.config import from_arguments
from streamdit_jax.plan.kernels import kernels
from streamdit_jax.plan.programs import streaming_program
from streamdit_jax.plan.report import COMPILER_OPTIONS
from streamdit_jax.plan.topology import describe
from streamdit_jax.quantization import PROJECTIONS

ROOT = Path(__file__).parents[2]
LAYERS, TOKENS, WIDTH, HIDDEN = 2, 16_384, 3072, 8192

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
        reason="JAX's CUDA plugin is not installed: run launch/plan.sh",
    ),
]


def compiled(monkeypatch, **choices) -> str:
    """The optimised HLO of one unguided streaming step."""
    monkeypatch.chdir(ROOT)
    config = from_arguments(["--config=configs/streamdit_4b_distill.py", "--config.mesh.fsdp=1"])
    dit = dataclasses.replace(config.dit, num_layers=LAYERS, dtype="bfloat16", quantization="fp8", **choices)
    config = dataclasses.replace(config, dit=dit)
    program = streaming_program(config, sharding.make_mesh(config.mesh, devices=describe("h200").devices))
    return program.lowered.compile(compiler_options=COMPILER_OPTIONS["gpu"]).as_text()


@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
def test_a_quantised_forward_multiplies_float8_and_rounds_in_passing(monkeypatch, ffn):
    hlo = compiled(monkeypatch, ffn=ffn)
    every = list(kernels(hlo, guided=False))
    names = ["/".join(path) for path in PROJECTIONS if ffn == "swiglu" or path[1] != "gate"]

    products = Counter()
    for kernel, count in every:
        scope = "/".join(kernel.scope.split("/")[-3:-1])
        if kernel.flops and scope in names:
            assert kernel.kind == "fp8_gemm" and kernel.result.startswith("bf16"), kernel
            products[scope] += count
    assert products == Counter({name: LAYERS for name in names})
    assert hlo.count('"__cublas$lt$matmul$f8"') == LAYERS * len(names) * 2  # guided and unguided: one branch each
    assert not [kernel for kernel, _ in every if kernel.weight], "a weight is copied, or written dequantised"

    # Of each layer: the norms write float8 at once; attention's output and the hidden layer are read to be rounded.
    rounded = Counter()
    for kernel, count in every:
        if kernel.result.startswith("f8"):
            numbers = [int(size) for size in re.search(r"\[([\d,]+)\]", kernel.result).group(1).split(",")]
            rounded[numbers[-1] if numbers[-1] != 128 else WIDTH] += count
            maps = 2 if ffn == "swiglu" and numbers[-1] == HIDDEN else 1
            assert kernel.read < 1.02 * 2 * maps * kernel.written, kernel
    inputs = 4 if ffn == "swiglu" else 3  # a gate rounds the same values once more: its scale is a parameter of its own
    assert rounded == Counter({WIDTH: inputs * LAYERS, HIDDEN: LAYERS})

    wide = [kernel for kernel, _ in every if kernel.result.startswith("f32") and kernel.written >= TOKENS * WIDTH]
    assert not wide, "activations are written in float32"
