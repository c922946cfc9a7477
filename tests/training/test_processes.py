"""A run of several processes on this machine's loopback: one run to the bit, that stops as one and never waits for the
dead. Bounds are far above what the watch needs (see `training.messenger`), for machines that are busy."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from streamdit_jax.training.agreement import differences
from streamdit_jax.training.checkpoint import Checkpoints
from streamdit_jax.training.goodput import PHASES
from streamdit_jax.training.metrics import read_goodput

# What is trained does not depend on the number of steps.
FIELDS = {"optimizer": {"learning_rate": 0.01, "decay": "constant", "warmup_steps": 3}}
HANG_SECONDS = 12


def run(harness, workdir, steps, *, fault="", fields=FIELDS, timeout=300, count=2, devices=2, **changes):
    """A cluster's processes, side by side. fields: of the stage, or one of them for each process."""
    environment = {**harness.cluster(count, devices), **changes}
    each = fields if isinstance(fields, list) else [fields] * len(environment["TOY_PROCESS"])
    commands = [(harness.TOY, workdir, steps, json.dumps(mine)) for mine in each]
    return harness.processes(*commands, TOY_FAULT=fault, timeout=timeout, **environment)


def newest(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        return checkpoints.latest()
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def straight(toy, harness, tmp_path_factory):
    """(workdir, a state of its shapes) of 10 steps by 2 processes × 2 devices, in one piece."""
    workdir = tmp_path_factory.mktemp("straight")
    for done in run(harness, workdir, 10):
        assert done.returncode == 0, done.stderr
    alone = toy.train(tmp_path_factory.mktemp("alone"), 10, optimizer=toy.optimizer(**FIELDS["optimizer"]))
    return workdir, alone


def digest(harness, workdir, like):
    restored = harness.stored(workdir, like)
    return harness.digest(restored.state, restored.next_step)


def test_differences_are_named():
    one, other = {"a": {"b": 1, "c": [1, 2]}, "d": None}, {"a": {"b": 2, "c": [1, 2]}, "e": 3}
    assert differences(one, other) == [("a.b", 1, 2), ("e", None, 3)]
    assert differences(one, one) == [] and differences(1, 2) == [("all of it", 1, 2)]


@pytest.mark.slow
def test_several_processes_are_one_run(harness, straight):
    """One device gives the same, to rounding."""
    workdir, alone = straight
    for ours, theirs in zip(
        jax.tree.leaves(alone.params), jax.tree.leaves(harness.stored(workdir, alone).state.params)
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_speed_of_each_process_is_known(harness, tmp_path):
    """Once a beat has carried it, and they are a second apart: 200 steps take four."""
    for done in run(harness, tmp_path, 200, fields={**FIELDS, "checkpoint_every": 200}):
        assert done.returncode == 0, done.stderr
    lines = read_goodput(tmp_path)
    paces = [line["step_seconds"] for line in lines if "step_seconds" in line]
    assert set(lines[-1]["seconds"]) == set(PHASES) and len(paces[-1]) == 2 and min(paces[-1]) > 0


@pytest.mark.slow
def test_preemption_of_one_process_stops_all_at_the_same_step_and_the_run_goes_on_exactly(harness, straight, tmp_path):
    workdir, like = straight
    stopped = run(harness, tmp_path, 10, fault="batch:4:1:SIGTERM")
    assert [done.returncode for done in stopped] == [143, 143], stopped[0].stderr + stopped[1].stderr
    step = newest(tmp_path)
    assert 4 <= step < 10
    assert f"toy: stopped by SIGTERM after step {step}, which is saved; the same command goes on" in stopped[0].stdout
    assert [done.returncode for done in run(harness, tmp_path, 10)] == [0, 0]
    assert digest(harness, tmp_path, like) == digest(harness, workdir, like)
    assert harness.facts(tmp_path) == harness.facts(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["batch:0:1:SIGTERM", "compile:0:0:SIGTERM"])
def test_preemption_before_the_first_step_ends_all_at_once(harness, tmp_path, fault):
    """The toy compiles for a minute; nobody waits for that."""
    stopped = run(harness, tmp_path, 10, fault=fault, timeout=55)
    assert [done.returncode for done in stopped] == [143, 143], stopped[0].stderr + stopped[1].stderr
    victim = fault.split(":")[2]
    for done in stopped:
        assert f"stopped by SIGTERM to process {victim}; nothing was there to be saved" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_moves_between_numbers_of_processes(toy, harness, straight, tmp_path):
    """2 processes × 2 devices → 1 × 4 → 2 × 2, each from what the one before saved."""
    workdir, like = straight
    for steps, processes in ((4, 2), (7, 1), (10, 2)):
        for done in run(harness, tmp_path, steps, count=processes, devices=4 // processes):
            assert done.returncode == 0, done.stderr
        assert newest(tmp_path) == steps
    ours, theirs = (harness.stored(path, like) for path in (tmp_path, workdir))
    assert ours.next_step == theirs.next_step == 10
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # steps on other processes sum in another order


@pytest.mark.slow
def test_all_processes_set_the_same_checkpoint_aside(harness, tmp_path):
    """Parameters are cut over all devices, and only the files of those of process 1 are damaged."""
    fields, mesh = {**FIELDS, "checkpoint_every": 3}, '{"fsdp": 4}'
    for done in run(harness, tmp_path, 6, fields=fields, TOY_MESH=mesh):
        assert done.returncode == 0, done.stderr
    for path in (tmp_path / "checkpoints" / "6" / "state" / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = run(harness, tmp_path, 10, fields=fields, TOY_MESH=mesh)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    line = next(line for line in done[0].stdout.splitlines() if "damaged" in line)
    assert line.startswith(f"{tmp_path / 'checkpoints' / '6'}: damaged: state: ")
    assert line.endswith(" (on process 1); set aside as 6.damaged")
    assert "toy: resumed after step 3 of 10" in done[0].stdout and (tmp_path / "checkpoints" / "6.damaged").is_dir()
    assert newest(tmp_path) == 10


@pytest.mark.slow
def test_processes_with_different_configurations_fail_before_the_first_step_on_each(harness, tmp_path):
    done = run(harness, tmp_path, 10, fields=[FIELDS, {**FIELDS, "ema_decay": 0.5}])
    for one in done:
        assert one.returncode == 2, one.stderr
        assert one.stderr.splitlines()[-1] == (
            "ConfigError: training.toy.ema_decay: 0.999 on process 0, 0.5 on process 1; "
            "all processes of a run need the same"
        )
    assert not (tmp_path / "checkpoints").exists()


def end_of(harness, workdir, fault, victim):
    """What the other process of two came to, and in how many seconds after the fault."""
    fields = {**FIELDS, "hang_seconds": HANG_SECONDS}
    command = (harness.TOY, workdir, 400, json.dumps(fields))
    environment = {**harness.cluster(), "TOY_FAULT": fault}
    started = []
    try:
        for index in range(2):
            mine = {**environment, "TOY_PROCESS": environment["TOY_PROCESS"][index]}
            started.append(harness.start(command, **mine))
        output = started[1 - victim].communicate(timeout=240)
        return started[1 - victim].returncode, output
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, victim", [("SIGSTOP", 0), ("SIGSTOP", 1), ("SIGKILL", 0), ("SIGKILL", 1), ("deadlock", 1)]
)
def test_a_dead_or_hung_process_is_named_and_ends_the_others(harness, tmp_path, how, victim):
    began = time.monotonic()
    code, (_, stderr) = end_of(harness, tmp_path, f"batch:6:{victim}:{how}", victim)
    assert time.monotonic() - began < 200  # the start of both included
    if (how, victim) == ("SIGKILL", 0):
        # With process 0 went the coordination service, and JAX aborts its clients at once. It names the leader.
        assert code in (os.EX_TEMPFAIL, -signal.SIGABRT) and ("process 0" in stderr or "leader" in stderr), stderr
        return
    assert code == os.EX_TEMPFAIL, stderr
    told = next(line for line in stderr.splitlines() if line.startswith(f"process {1 - victim}: "))
    assert f"process {victim} " in told and ("silent" in told or "no progress" in told)
    assert "most recent call first" in stderr  # where this process's threads were


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(harness, tmp_path):
    done = run(harness, tmp_path, 10, fault="batch:4:1:error")
    assert [one.returncode for one in done] == [2, 2], done[0].stderr + done[1].stderr
    assert "process 1 ended: DataError: toy: the batch is gone" in done[0].stderr
    assert "DataError: toy: the batch is gone" in done[1].stderr
