"""The TPU kernels of windowed attention, compiled at the 4B's shape for chips that are not there, alone and within the
4B's training step. For `launch/plan.sh`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: run launch/plan.sh"
    ),
]
# Processes of their own: libtpu serves one at a time, and the plans of test_targets.py are others.
KERNELS = """
import json, sys
import jax, jax.numpy as jnp
from streamdit_jax import sharding
from streamdit_jax.kernels.window_attention import window_attention
from streamdit_jax.kernels.windows import TokenOrder, Windows
from streamdit_jax.plan.topology import describe

found = {}
order = TokenOrder((16, 32, 32), (8, 16, 16), (4, 8, 8))
mesh = jax.sharding.Mesh([describe(sys.argv[1]).devices[0]], ("data",))
for name, shift, cut, dtype, dim in json.loads(sys.argv[2]):
    windows = Windows(order, (8, 16, 16), tuple(shift), (not cut, True, True))
    x = jax.ShapeDtypeStruct((1, 16384, 24, dim), dtype, sharding=sharding.replicated(mesh))

    def both(query, key, value, cotangent):
        out, back = jax.vjp(lambda *qkv: window_attention(*qkv, windows), query, key, value)
        return out, *back(cotangent)

    with sharding.on(mesh):
        compiled = jax.jit(both).lower(x, x, x, x).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    found[name] = {"kernels": compiled.as_text().count("tpu_custom_call"), "bytes": held}
print(json.dumps(found))
"""
STEP = """
import json, re, sys
from streamdit_jax import sharding
from streamdit_jax.config import from_arguments
from streamdit_jax.plan.programs import training_step
from streamdit_jax.plan.topology import describe
import dataclasses, jax

config = from_arguments(["--config=configs/streamdit_4b_task.py"])
config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, dtype="bfloat16"))
mesh = sharding.make_mesh(config.mesh, devices=describe("v5p:8x8x4").devices)
jax.config.update("jax_exec_time_optimization_effort", -1.0)
text = training_step(config, "flow_matching", None, mesh).lowered.compile().as_text()
calls = re.findall(r"%\\S*window_attention_(forward|backward)\\S* = [^\\n]*tpu_custom_call", text)
print(json.dumps({name: calls.count(name) for name in ("forward", "backward")}))
"""
SHIFT = (4, 8, 8)
CASES = (
    ("contiguous", (0, 0, 0), False, "bfloat16", 128),
    ("shifted", SHIFT, False, "bfloat16", 128),
    ("cut_in_time", SHIFT, True, "bfloat16", 128),
    ("head_64", SHIFT, False, "bfloat16", 64),
    ("float32", SHIFT, True, "float32", 128),
)


def run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_both_kernels_compile_at_the_shape_of_the_4b(topology):
    found = run(KERNELS, topology, json.dumps(CASES))
    assert set(found) == {case[0] for case in CASES}
    for name, *_, dtype, dim in CASES:
        array = 16384 * 24 * dim * (4 if dtype == "float32" else 2)
        assert found[name]["kernels"] == 2, name
        # Arguments and results by themselves lie otherwise than within a model: at most each is copied once.
        assert found[name]["bytes"] < 9 * array, name


def test_a_training_step_of_the_4b_runs_them():
    """A scan over pairs of layers: each pair's two kernels forward, again as rematerialised, and backward."""
    assert run(STEP) == {"forward": 4, "backward": 2}
