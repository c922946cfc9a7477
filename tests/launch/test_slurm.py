"""launch/slurm/train.sbatch as it is, with Slurm's commands replaced: preemption, requeue, mistakes, cancellation."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from streamdit_jax import weights
from streamdit_jax.data.records import write_records
from streamdit_jax.training.metrics import read_metrics
from tests.launch import slurm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(start, tmp_path):
    """Starts the batch script as Slurm does, in a checkout of links; `job.requeues` are what it asked of scontrol."""
    slurm.install(tmp_path / "bin")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "launch").symlink_to(ROOT / "launch")
    notes = tmp_path / "notes"

    def submit(*arguments, restarts=0, state="RUNNING", **environment):
        return start(
            *("bash", ROOT / "launch" / "slurm" / "train.sbatch", *arguments),
            PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            SLURM_SUBMIT_DIR=str(checkout),
            SLURM_JOB_ID=str(20_000 + os.getpid() % 4096),
            SLURM_NTASKS="2",
            SLURM_RESTART_COUNT=str(restarts),
            STREAMDIT_VENV=str(Path(sys.executable).parents[1]),
            SHIM_STATE=state,
            SHIM_NOTES=str(notes),
            **environment,
        )

    submit.requeues = lambda: notes.read_text().splitlines() if notes.exists() else []
    submit.checkout = checkout
    return submit


def wait_for(process, text, seconds=300):
    """Reads a program's standard error up to a line with this text; what was read."""
    lines, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        line = process.stderr.readline()
        lines.append(line)
        if text in line:
            return lines
        if not line and process.poll() is not None:
            break
    raise AssertionError(f"{text!r} never came:\n" + "".join(lines)[-3000:])


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_finishes(job, tmp_path):
    """Two tasks of one step: SIGTERM before the time limit, a checkpoint, 143, a requeue, and the rest of the run."""
    rng = np.random.default_rng(0)
    clips = [
        {"latents": rng.normal(size=(8, 8, 8, 4)).astype(np.float16), "captions": [f"clip {number}"]}
        for number in range(8)
    ]
    write_records(tmp_path / "latents", clips, "latents")
    arguments = ("--config=tests/launch/tiny_text.py", f"--config.data.source={tmp_path / 'latents'}")
    arguments = (*arguments, f"--workdir={tmp_path / 'run'}")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "XLA_FLAGS": "--xla_backend_optimization_level=0"}

    first = job(*arguments, **cache)
    wait_for(first, "text_alignment: step 3/60")
    os.kill(first.pid, signal.SIGTERM)  # as --signal=B:TERM@120 does: to the batch shell alone
    _, said = first.communicate(timeout=300)
    assert first.returncode == 143, said[-3000:]
    assert "stopped by SIGTERM after step" in said
    stopped = int(said.split("stopped by SIGTERM after step ")[1].split(",")[0])
    [requeue] = job.requeues()
    assert requeue.startswith("requeue ") and stopped < 60
    assert not (tmp_path / "run" / "model").exists()

    second = job(*arguments, restarts=1, **cache)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said[-3000:]
    assert f"text_alignment: resumed after step {stopped} of 60" in said
    assert "process 0 of 2 (Slurm), coordinator localhost:" in said
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "text_alignment")] == list(range(1, 61))
    assert set(weights.load_card(tmp_path / "run" / "model")["parts"]) == {"text"}
    assert len(job.requeues()) == 1 and not list(job.checkout.glob(".streamdit-*"))


def program(tmp_path, text):
    """A program that stands for streamdit."""
    path = tmp_path / "streamdit.sh"
    path.write_text(f"rank=$SLURM_PROCID\n{text}\n")
    return {"STREAMDIT_COMMAND": f"bash {path}"}


def test_a_mistake_has_the_last_word(job, tmp_path):
    """Rank 1 ends with 2; srun ends rank 0, which ends with 143; a requeue would only repeat it."""
    given = program(tmp_path, '[ "$rank" = 0 ] || exit 2; trap "exit 143" TERM; sleep 60 >/dev/null 2>&1 & wait')
    process = job("--config=x", **given)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert job.requeues() == [] and not list(job.checkout.glob(".streamdit-*"))


@pytest.mark.parametrize(
    ("restarts", "state", "requeued"), [(0, "RUNNING", 1), (2, "RUNNING", 0), (0, "COMPLETING", 0)]
)
def test_a_dead_process_is_requeued_within_bounds_unless_cancelled(job, tmp_path, restarts, state, requeued):
    given = program(tmp_path, "exit $((rank == 0 ? 75 : 137))")
    process = job("--config=x", restarts=restarts, state=state, STREAMDIT_REQUEUES="2", **given)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (75, 137), said
    assert len(job.requeues()) == requeued
