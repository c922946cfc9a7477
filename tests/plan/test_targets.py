"""The plans that docs/scale.md tells of: `launch/plan.sh` makes them all and fails where one misses its target.

They compile the 4B model for pods that are not there, which takes an environment of its own (the extra `plan`) and
some minutes each. STREAMDIT_PLANS=DIR writes each report to DIR/plan-NAME.json.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamdit_jax import flops, roofline
from streamdit_jax.config import from_arguments

ROOT = Path(__file__).parents[2]
HOST_BYTES = 6 * 2**30
COMPILE_SECONDS = 180


@dataclasses.dataclass(frozen=True)
class Target:
    """arguments: of `streamdit plan`. devices: how many they describe. share: the most of a device's memory.

    batch: the least global batch. compile_seconds: the most, on two cores that do nothing else; 0 for no bound.
    per_layer: for a GPU that streams, the most kernels of a layer; its products are then those of the roofline, none
    of its weights is copied, and nothing rolls.
    """

    arguments: str
    devices: int
    share: float = 0.8
    batch: int = 0
    compile_seconds: int = COMPILE_SECONDS
    per_layer: int = 0

    @property
    def package(self) -> str:
        return "jax_cuda13_plugin" if "=h" in self.arguments else "libtpu"


QUALITY, DISTILL = "--config=configs/streamdit_4b_quality.py", "--config=configs/streamdit_4b_distill.py"
BASE, TASK = "--config=configs/streamdit_4b.py", "--config=configs/streamdit_4b_task.py"
STUDENT = f"{QUALITY} --what=stream --config.mesh.fsdp=1 --config.sampling.scheme=N8c2s1 --config.sampling.guidance=1.0"
TARGETS = {
    "v5p-256": Target(f"{TASK} --topology=v5p:8x8x4", 256, batch=256),
    "v6e-256": Target(f"{TASK} --topology=v6e:16x16", 256, batch=256),
    "v5p-256-base": Target(f"{BASE} --topology=v5p:8x8x4", 256, batch=512),
    "v5p-2x256": Target(
        f"{TASK} --topology=v5p:8x8x4 --slices=2 --config.training.flow_matching.batch_size=512", 512, batch=512
    ),
    "v5p-256-distill": Target(
        f"{DISTILL} --topology=v5p:8x8x4 --config.training.distillation.batch_size=256", 256, batch=256
    ),
    "h200-stream": Target(f"{QUALITY} --topology=h200 --what=stream --config.mesh.fsdp=1", 1, compile_seconds=0),
    "h200-student": Target(f"{STUDENT} --topology=h200", 1, compile_seconds=0, per_layer=14),
    "h200-student-fp8": Target(f"{STUDENT} --topology=h200 --precision=fp8", 1, compile_seconds=0, per_layer=24),
    "v5e-8-stream": Target(
        f"{QUALITY} --topology=v5e:2x4 --what=stream --config.mesh.window=8 --config.mesh.fsdp=1", 8, compile_seconds=0
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", TARGETS)
def test_target(name):
    target = TARGETS[name]
    if importlib.util.find_spec(target.package) is None:
        pytest.skip(f"{target.package} is not installed: run launch/plan.sh, which makes an environment with it")
    report = plan(target.arguments)
    if folder := os.environ.get("STREAMDIT_PLANS"):
        path = Path(folder) / f"plan-{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    assert report["devices"] == target.devices
    assert report["hbm_share"] <= target.share
    assert report["host_peak_bytes"] <= HOST_BYTES
    assert report.get("batch_size", 0) >= target.batch
    assert not target.compile_seconds or report["compile_seconds"] <= target.compile_seconds
    if target.per_layer:
        require_kernels(target, report)


def require_kernels(target: Target, report: dict) -> None:
    """What XLA compiled of a student's forward is what the roofline is made of."""
    found, config = report["kernels"], from_arguments([QUALITY])
    rows = roofline.forward(config.dit, flops.text_tokens(config), report["precision"])
    for kind in ("gemm", "fp8_gemm"):
        assert found["kinds"].get(kind, {}).get("count", 0) == sum(row.count for row in rows if row.kind == kind)
    products = sum(each["flops"] for each in found["kinds"].values())
    assert products == sum(row.count * row.flops for row in rows if row.kind in ("gemm", "fp8_gemm"))
    assert "batched_gemm" not in found["kinds"], "attention writes its scores"
    assert found["weight_copies"]["count"] == 0
    assert not any(name in operation for operation in found["copies"]["of"] for name in ("gather", "concat", "roll"))
    assert found["per_layer"] <= target.per_layer
    # Attention of both kinds by kernels of their own.
    assert sum(found["kinds"][kind]["count"] for kind in ("mosaic_gpu", "cudnn")) >= 2 * config.dit.num_layers


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: run launch/plan.sh")
def test_a_pod_too_small_is_refused_in_one_line():
    done = run(f"{TASK} --topology=v5e:2x4 --config.mesh.fsdp=8")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "training.flow_matching does not fit v5e:2x4" in done.stderr and "accumulate" in done.stderr


def run(arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "streamdit_jax.cli", "plan", *arguments.split(), "--json"],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def plan(arguments: str) -> dict:
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
