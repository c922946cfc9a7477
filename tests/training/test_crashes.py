"""Runs that are killed, stopped, starved or damaged: the same command goes on, exactly, or says why it does not."""

import itertools
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from streamdit_jax.training.checkpoint import Checkpoints
from streamdit_jax.training.goodput import PHASES, summary
from streamdit_jax.training.metrics import read_goodput, read_metrics


class Stopped(Exception):
    pass


def at_batch(toy, do):
    """Batches that call `do[n]` before they give batch n."""

    def make_batches(first_step):
        for step, batch in zip(itertools.count(first_step), toy.batches(first_step)):
            do.get(step, lambda: None)()
            yield batch

    return make_batches


def crash():
    raise Stopped


@pytest.fixture(scope="module")
def straight(toy, tmp_path_factory):
    """(workdir, final state) of 12 steps in one piece, with a checkpoint every 5 and at the end."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, toy.train(workdir, 12)


def digest(harness, workdir, like):
    restored = harness.stored(workdir, like)
    return harness.digest(restored.state, restored.next_step)


def test_n_steps_are_k_a_resume_and_the_others_by_their_sha256(toy, harness, straight, tmp_path):
    with pytest.raises(Stopped):
        toy.train(tmp_path, 12, make_batches=at_batch(toy, {8: crash}))
    toy.train(tmp_path, 12)
    assert digest(harness, tmp_path, straight[1]) == digest(harness, *straight)


@pytest.mark.parametrize(
    "kills, steps", [pytest.param(3, 60, id="3"), pytest.param(20, 360, marks=pytest.mark.slow, id="20")]
)
def test_killed_while_saving_a_run_goes_on_exactly(toy, harness, tmp_path, kills, steps):
    """SIGKILL at random moments of a save in the background: at most this save is lost."""
    every = 3
    fields = {"checkpoint_every": every, "log_every": 1}
    expected = toy.train(tmp_path / "straight", steps, **fields)
    rng, resumed, saved = np.random.default_rng(0), [], []
    checkpoints = tmp_path / "killed" / "checkpoints"
    for kill in range(kills + 1):
        run = harness.start((harness.TOY, tmp_path / "killed", steps, json.dumps(fields)))
        enough = int(rng.integers(4, 9))
        for line in run.stdout:
            if "resumed after step" in line:
                resumed.append(int(line.split()[4]))
            if ": step " in line:
                enough -= 1
            if kill < kills and enough <= 0:
                while not (unfinished := list(checkpoints.glob("*tmp*"))) and run.poll() is None:
                    time.sleep(0.0005)  # a fast disk is soon done
                saved.append(max(int(path.name.split(".")[0]) for path in unfinished))
                time.sleep(rng.uniform(0, 0.1))
                run.kill()
                break
        assert run.wait(60) == (-signal.SIGKILL if kill < kills else 0), run.stderr.read()
        run.stdout.close(), run.stderr.close()
    assert len(resumed) == len(saved) == kills
    for saving, start in zip(saved, resumed):
        assert start % every == 0 and start >= saving - every
    assert harness.stored(tmp_path / "killed", expected).next_step == steps
    assert digest(harness, tmp_path / "killed", expected) == digest(harness, tmp_path / "straight", expected)
    assert harness.facts(tmp_path / "killed") == harness.facts(tmp_path / "straight")


MESHES = """
import sys, jax
from streamdit_jax import sharding
from streamdit_jax.training.checkpoint import Checkpoints
sys.path.insert(0, sys.argv[1])
import harness, toy
from streamdit_jax.training.program import make_key, make_program
before = None
for devices in (8, 4, 2, 1):
    mesh = sharding.make_mesh({"fsdp": devices}, devices=jax.devices()[:devices])
    program, key = make_program(toy.objective(), toy.stage(4), mesh), make_key(0, mesh)
    like = program.abstract_state(key, toy.batch(0))
    checkpoints = Checkpoints(sys.argv[2], keep=9)
    if before is None:
        step, state = 0, program.first_state(key, toy.batch(0), like)
    else:
        step, state, position, _ = checkpoints.restore(like)
        assert position == step and harness.digest(state, step) == before, devices
    cut = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert (cut > 0) == (devices > 1), cut
    # One step further on this mesh, for the next one to find.
    constants = sharding.place(toy.objective().constants, mesh)
    batch = sharding.shard_batch(toy.batch(step), mesh)
    state, _ = program.compile_steps(like, constants, [batch], key)(state, constants, batch, key)
    checkpoints.save(step + 1, state, next_step=step + 1)
    checkpoints.wait()
    before = harness.digest(state, step + 1)
    checkpoints.close()
print("equal")
"""


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_restores_to_the_bit_on_another(harness, tmp_path):
    (done,) = harness.processes(
        ("-c", MESHES, os.path.dirname(harness.TOY), tmp_path / "c"),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert done.stdout.endswith("equal\n"), done.stderr


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(toy, straight, tmp_path):
    with pytest.raises(Stopped):
        toy.train(tmp_path, 12, make_batches=at_batch(toy, {12: crash, 11: crash}))
    checkpoints, lines = tmp_path / "checkpoints", []
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [5, 10]
    for path in (checkpoints / "10" / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    state = toy.train(tmp_path, 12, log=lines.append)
    assert lines[0].startswith(f"{checkpoints / '10'}: damaged: state: ") and lines[0].endswith("aside as 10.damaged")
    assert lines[1] == "toy: resumed after step 5 of 12"
    assert toy.bits(state) == toy.bits(straight[1]) and (checkpoints / "10.damaged").is_dir()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 13))


def test_one_nan_is_one_skipped_step(toy, tmp_path):
    def make_batches(first_step):
        for step, batch in zip(itertools.count(first_step), toy.batches(first_step)):
            yield {**batch, "x": batch["x"] * (np.float32("nan") if step == 4 else 1)}

    state = toy.train(tmp_path, 9, make_batches=make_batches)
    assert (int(state.step), int(state.nonfinite_count)) == (9, 1)
    assert [line["nonfinite_count"] for line in read_metrics(tmp_path)] == [0] * 4 + [1] * 5


def test_a_failed_save_surfaces_at_the_next_step(toy, harness, tmp_path):
    state = toy.train(tmp_path, 5)
    fields = json.dumps({"checkpoint_every": 500, "log_every": 50})
    command = ("-c", FULL_DISK, harness.TOY, tmp_path, 1000, fields)
    (full,) = harness.processes(command, JAX_ENABLE_COMPILATION_CACHE="false")
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert f"CheckpointError: {tmp_path / 'checkpoints'}: saving a checkpoint failed: " in full.stderr
    assert "step 5 is there and complete" in full.stderr
    assert int(full.stdout.splitlines()[-1].split()[2].split("/")[0]) < 1000  # before it was to save again
    assert toy.bits(harness.stored(tmp_path, state).state) == toy.bits(state)


FULL_DISK = """
import json, resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # no file grows beyond this, as if the disk were full
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("place", ["batch:0", "compile:0"])
def test_stopped_before_the_first_step_a_run_ends_at_once(harness, tmp_path, place, number):
    if (place, number) == ("batch:0", "SIGINT"):
        pytest.skip("as SIGTERM, and a start of JAX costs seconds")
    (done,) = harness.processes((harness.TOY, tmp_path, 12), TOY_FAULT=f"{place}:0:{number}", timeout=50)
    assert done.returncode == 128 + getattr(signal, number), (
        done.stderr
    )  # and not a minute later: the toy compiles slowly
    assert done.stderr == f"stopped by {number}; nothing was there to be saved\n"
    assert not list((tmp_path / "checkpoints").iterdir())


def test_stopped_while_sampling_or_saving_a_run_saves_and_leaves(toy, straight, harness, tmp_path):
    def sample(step, params):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        toy.train(tmp_path, 12, sample_fn=sample, sample_every=2)
    assert stopped.value.code == 143 and harness.stored(tmp_path, straight[1]).next_step == 5

    def save(self, step, *arguments, **named):
        whole(self, step, *arguments, **named)
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = Checkpoints.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Checkpoints, "save", save)
        toy.train(tmp_path, 12)
    assert harness.stored(tmp_path, straight[1]).next_step == 11
    assert toy.bits(toy.train(tmp_path, 12)) == toy.bits(straight[1])


def test_a_run_that_hangs_shows_where_and_ends_with_a_code_to_restart_on(harness, tmp_path):
    command = (harness.TOY, tmp_path, 12, '{"hang_seconds": 8}')
    (done,) = harness.processes(command, TOY_FAULT="batch:7:0:deadlock", timeout=100)
    assert done.returncode == os.EX_TEMPFAIL
    assert done.stderr.startswith("no progress for ") and ", in data after step 6\n" in done.stderr
    assert "in fault" in done.stderr and "in fetch" in done.stderr  # the stack of the main thread


def test_a_profile_on_demand(toy, tmp_path):
    """By a signal, and by a file; the steps after it are traced, and the run is the same."""
    lines = []
    asked = {4: lambda: os.kill(os.getpid(), signal.SIGUSR1), 5: lambda: time.sleep(1.5)}
    asked |= {14: (tmp_path / "profile").touch, 15: lambda: time.sleep(2.5)}
    toy.train(tmp_path, 24, make_batches=at_batch(toy, asked), log=lines.append, checkpoint_every=100)
    assert sum("profiling 5 steps after step " in line for line in lines) == 2 and not (tmp_path / "profile").exists()
    traces = sorted((tmp_path / "traces").glob("step_*/process_0/plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 2 and all(path.stat().st_size for path in traces)


def test_goodput_accounts_for_all_of_the_time(toy, tmp_path):
    """Of a run that crashed at step 8, after 5 was saved, and was started again."""

    def sample(step, params):
        time.sleep(0.2)

    began = time.time()
    with pytest.raises(Stopped):
        toy.train(tmp_path, 12, make_batches=at_batch(toy, {8: crash, 3: lambda: time.sleep(0.5)}))
    toy.train(tmp_path, 12, sample_fn=sample, sample_every=6)
    wall = time.time() - began
    lines = read_goodput(tmp_path)
    assert {tuple(line["seconds"]) for line in lines} == {PHASES} and len({line["started"] for line in lines}) == 2
    assert [line["first_step"] for line in lines][:: len(lines) - 1] == [0, 5]
    assert lines[0]["seconds"]["compile"] > 0 and lines[-1]["seconds"]["restore"] > 0
    assert lines[-1]["seconds"]["sample"] >= 0.4 and lines[-1]["seconds"]["checkpoint"] > 0
    first = [line for line in lines if line["started"] == lines[0]["started"]]
    assert first[-1]["seconds"]["data"] >= 0.4  # the device had nothing to do meanwhile
    told = summary(tmp_path)
    assert told["starts"] == 2 and told["seconds"] <= wall and 0 < told["lost"] < told["step"]
    assert told["down"] >= 0 and 0 < told["goodput"] < 1
    parts = sum(told[phase] for phase in PHASES) + told["down"]
    assert parts == pytest.approx(told["seconds"], rel=1e-6)
    assert len(lines[0]["step_seconds"]) == 1 and lines[0]["step_seconds"][0] > 0
    assert summary(tmp_path / "nowhere") == {}


def test_the_share_of_the_peak_is_told_where_the_peak_is_known(toy, tmp_path, monkeypatch):
    """MFU = FLOPs per second / (devices × peak)."""
    import dataclasses

    from streamdit_jax.machine import peak_flops_per_second
    from streamdit_jax.training import report

    assert peak_flops_per_second("NVIDIA H200") == 9.89e14 and peak_flops_per_second("TPU v5 lite") == 1.97e14
    assert peak_flops_per_second("cpu") is None
    counted, objective = [], toy.objective
    monkeypatch.setattr(report, "peak_flops_per_second", lambda kind: 1e9)
    monkeypatch.setattr(
        toy, "objective", lambda loss: dataclasses.replace(objective(loss), flops=lambda b: counted.append(1) or 10**6)
    )
    toy.train(tmp_path, 8, log_every=4)
    for line in read_metrics(tmp_path):
        assert line["mfu"] == pytest.approx(line["steps_per_second"] * 1e6 / 1e9 / jax.device_count())
    assert len(counted) == 8
