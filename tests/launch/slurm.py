"""Stands for Slurm's commands on one machine, so that launch/slurm/train.sbatch runs as it is; see test_slurm.py.

As programs: `srun [options] COMMAND…` starts SLURM_NTASKS tasks with the variables that srun sets, sends them its
SIGTERM, with --kill-on-bad-exit ends all after the first that fails, and ends with the highest code. `squeue` says
$SHIM_STATE, and `scontrol requeue JOB` notes that in $SHIM_NOTES.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def install(folder: Path) -> None:
    """Puts the commands into a folder for PATH."""
    folder.mkdir()
    for name in ("srun", "squeue", "scontrol"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)


def srun(arguments: list[str]) -> int:
    options = list(itertools.takewhile(lambda word: word.startswith("--"), arguments))
    command = arguments[len(options) :]
    count = int(os.environ["SLURM_NTASKS"])
    tasks = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": str(count),
            },
        )
        for index in range(count)
    ]

    def forward(*_):
        for task in tasks:
            if task.poll() is None:
                task.terminate()

    signal.signal(signal.SIGTERM, forward)
    ended = False
    while None in (codes := [task.poll() for task in tasks]):
        if not ended and "--kill-on-bad-exit=1" in options and any(codes):
            ended = True
            forward()
        time.sleep(0.05)
    return max(code if code >= 0 else 128 - code for code in codes)


def main(name: str, arguments: list[str]) -> int:
    if name == "srun":
        return srun(arguments)
    if name == "squeue":
        print(os.environ["SHIM_STATE"])
    else:
        with open(os.environ["SHIM_NOTES"], "a") as notes:
            notes.write(" ".join(arguments) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
