"""`streamdit plan` on this machine's own devices: the real programs, their sizes, what they send, and its mistakes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamdit_jax import cli, flops
from streamdit_jax.config import from_arguments
from streamdit_jax.plan.table import table

ROOT = Path(__file__).parents[2]
CONFIG = """
import json
import ml_collections


def get_config():
    return ml_collections.ConfigDict(json.loads({text!r}), convert_dict=True)
"""
STAGES = {
    "flow_matching": {"objective": {"mixture": {"entries": [["N4c2s1", 1.0]]}}, "train_text": True, "start_from": ""},
    "distillation": {"scheme": "N4c2s1", "teacher_steps": 4, "guidance": 2.0},
}
PLANS = {
    "train": ["--topology=cpu:8", "--stage=flow_matching", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"],
    "stream": ["--topology=cpu:8", "--what=stream", "--config.mesh.fsdp=1", "--config.mesh.window=8"],
}
# Programs are compiled to be read and never run.
QUICK = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
PROGRAM = """
import contextlib, io, json, sys
from streamdit_jax import cli

reports = {}
for name, arguments in json.loads(sys.argv[1]).items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["plan", *arguments]) == 0, name
    reports[name] = json.loads(out.getvalue())
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """The tiny model with two stages, a mesh, and windows enough for eight devices."""
    fields = json.loads(tiny.to_json())
    stage = {"steps": 10, "batch_size": 16, "num_frames": 8, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}}
    fields["training"] = {name: stage | own for name, own in STAGES.items()}
    fields["mesh"] = {"data": 1, "fsdp": -1, "window": 1, "tensor": 1, "slices": 1}
    fields["dit"] |= {"windows": [[2, 1, 1]], "remat": "full", "width": 64}
    path = tmp_path_factory.mktemp("plan") / "small.py"
    path.write_text(CONFIG.format(text=json.dumps(fields)))
    return path


def plans(config, named):
    """Reports of several plans, made in one process: of eight host devices, and the only one that takes libtpu."""
    named = {name: [f"--config={config}", "--json", *rest] for name, rest in named.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(named)],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def reports(config):
    return plans(config, PLANS)


def test_a_training_step(reports, config):
    report = reports["train"]
    assert (report["what"], report["stage"], report["bucket"]) == ("train", "flow_matching", "main")
    assert report["devices"] == 8 and report["mesh"] == {"data": 1, "fsdp": 4, "window": 1, "tensor": 2}
    # Parameters, their average and two moments, of which all but the small ones are cut in eight.
    assert 16 * report["parameters"] / 8 < report["argument_bytes_per_device"] < 16 * report["parameters"]
    assert report["temporary_bytes_per_device"] > 0 and report["output_bytes_per_device"] > 0
    share = (report["argument_bytes_per_device"] + report["temporary_bytes_per_device"]) / report[
        "hbm_bytes_per_device"
    ]
    assert report["hbm_share"] == pytest.approx(share, abs=1e-4)
    forward = flops.of_model(from_arguments([f"--config={config}"]), text_is_cached=False)["total"]
    assert report["flops_per_step"] == 3 * 16 * forward
    assert report["flops_per_step_per_device"] == report["flops_per_step"] // 8
    assert 0 < report["rematerialised_flops_per_step"] < 16 * forward
    # What is gathered within the scanned blocks counts once for each of the two layers, forward and backward.
    assert report["collectives"]["all-gather"]["axes"]["fsdp"]["count"] >= 4
    assert report["collectives"]["all-reduce"]["bytes"] > 0
    assert report["versions"]["jax"] and report["host_peak_bytes"] > 2**27 and report["compile_seconds"] > 0


def test_the_axes_of_what_is_sent(reports):
    axes = {name for kind in reports["train"]["collectives"].values() for name in kind["axes"]}
    assert "tensor" in axes and any("fsdp" in name for name in axes) and not any("window" in name for name in axes)


@pytest.mark.slow
def test_distillation_is_the_last_stage_and_its_teacher_is_a_scan(config):
    """The teacher's steps cost FLOPs, and next to nothing to compile: they are one scan."""
    found = plans(
        config,
        {
            "few": ["--topology=cpu:8"],
            "many": ["--topology=cpu:8", "--config.training.distillation.teacher_steps=16"],
        },
    )
    few, many = found["few"], found["many"]
    assert few["stage"] == many["stage"] == "distillation"
    assert many["flops_per_step"] > 2 * few["flops_per_step"]
    assert many["temporary_bytes_per_device"] < 1.2 * few["temporary_bytes_per_device"]


def test_a_streaming_step_by_windows(reports):
    report = reports["stream"]
    assert report["mesh"]["window"] == 8 and report["scheme"] == "N4c2s2" and report["forwards_in_one"] == 2
    assert report["collectives"]["collective-permute"]["axes"].keys() == {"window"}
    # The transformer is whole on every device, in float32 here.
    assert report["argument_bytes_per_device"] > 4 * report["parameters"]


def test_the_table_says_the_same(reports):
    lines = table(reports["train"]).splitlines()
    assert " ".join(lines[0].split()) == "config tiny, training step of flow_matching, 16 examples, remat full"
    text = table(reports["stream"])
    assert "streaming step of N4c2s2 at guidance 2" in text and "8 devices, window 8" in text
    assert "collective-permute" in text and "over window" in text and "compiled in" in text


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; launch/plan.sh has it")
def test_tpus_that_are_not_there(config):
    train = ["--stage=flow_matching", "--config.mesh.fsdp=4"]
    found = plans(
        config,
        {
            "v5e": ["--topology=v5e:2x2", *train],
            "v6e": ["--topology=v6e:2x4", "--what=stream", "--config.mesh.fsdp=1", "--config.mesh.window=8"],
            "slices": ["--topology=v5p:2x2x1", "--slices=2", "--config.mesh.data=2", *train],
        },
    )
    assert [found[name]["devices"] for name in found] == [4, 8, 8]
    assert found["v5e"]["precision"] == "bfloat16" and found["v5e"]["versions"]["libtpu"]
    assert found["v6e"]["collectives"]["collective-permute"]["axes"].keys() == {"window"}
    sent = found["slices"]["collectives"]
    assert sent["all-reduce"]["axes"]["slices"]["bytes"] > 0 and sent["all-gather"]["axes"].keys() == {"fsdp"}


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no CUDA plugin is installed; launch/plan.sh has it"
)
def test_gpus_that_are_not_there(config):
    train = ["--topology=h100:8", "--stage=flow_matching"]
    found = plans(config, {"train": train, "stream": ["--topology=h200", "--what=stream"]})
    assert found["train"]["collectives"]["all-gather"]["axes"].keys() == {"fsdp"}
    assert found["stream"]["collectives"] == {} and found["stream"]["hbm_bytes_per_device"] == 143771 * 2**20


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--topology=v9:2x2"], "--topology: 'v9' is not one of v5e, v5p, v6e, tpu7x, h100, h200, cpu"),
        (["--topology=cpu:0"], "--topology: '0' is no shape"),
        (["--topology=v5p:8x8"], "--topology: v5p has shapes of 3 axes, as v5p:4x4x4; not v5p:8x8"),
        (["--topology=h200:12"], "--topology: 12 GPUs do not fill hosts of 8"),
        (["--topology=h200:8", "--slices=2"], "--slices: h200 hosts are no slices; give h200:16 instead"),
        (["--topology=cpu:1", "--slices=0"], "--slices: at least 1, not 0"),
        (["--topology=cpu:1", "--stage=autoencode"], "--stage: tiny has flow_matching, distillation, not 'autoencode'"),
        (["--topology=cpu:1", "--stage=flow_matching", "--bucket=tall"], "--bucket: 'tall' is not one of main"),
        (["--topology=cpu:1", "--limit=2"], "--limit: a share of the memory"),
        (["--topology=cpu:64"], "--topology: cpu:64 needs 64 host devices, and JAX has begun with"),
        (["--topology=cpu:1", "--stage=flow_matching", "--limit=1e-6"], "training.flow_matching does not fit cpu:1"),
    ],
)
def test_mistakes_are_one_line(config, arguments, complaint, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    import jax

    jax.devices()
    assert cli.main(["plan", f"--config={config}", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"streamdit: {complaint}") and captured.err.count("\n") == 1
