"""Programs side by side, as a cluster starts them."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def clean_environment(**changes) -> dict[str, str]:
    """This environment without what a cluster would have set, for CPUs."""
    foreign = ("SLURM_", "STREAMDIT_", "OMPI_", "TPU_", "MEGASCALE_", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **changes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start():
    """Starts a program; whatever still runs at the end of the test is killed, with what it started."""
    with contextlib.ExitStack() as stack:

        def starting(*command, **environment):
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=clean_environment(**environment),
                start_new_session=True,
            )
            stack.callback(_end, process)
            return process

        yield starting


def _end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.communicate()


@pytest.fixture
def cluster(start):
    """Runs `streamdit` with the same arguments in several processes on loopback; their CompletedProcess in order."""

    def run(*arguments, processes=2, timeout=600, **environment):
        port = free_port()
        started = [
            start(
                *(sys.executable, "-m", "streamdit_jax.cli", *arguments),
                STREAMDIT_COORDINATOR=f"127.0.0.1:{port}",
                STREAMDIT_PROCESSES=str(processes),
                STREAMDIT_PROCESS=str(index),
                **environment,
            )
            for index in range(processes)
        ]
        outputs = [process.communicate(timeout=timeout) for process in started]
        return [subprocess.CompletedProcess(p.args, p.returncode, *said) for p, said in zip(started, outputs)]

    return run
