"""Runs of the toy in processes of their own, side by side, killed and looked at: what the tests of crashes, resumes and
several processes share. A fixture (see conftest.py), because test folders are no packages."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from streamdit_jax.training.checkpoint import Checkpoints
from streamdit_jax.training.metrics import read_metrics

TOY = str(Path(__file__).with_name("toy.py"))
RATES = ("steps_per_second", "examples_per_second")


def environment(**changes):
    """Of a program on this machine's CPU; compiled programs are shared, as within the tests."""
    cache = jax.config.jax_compilation_cache_dir
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": os.getcwd(),
        **({"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}),
        **changes,
    }


def start(command, **changes):
    """A program that runs; the caller ends it."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
    )


def processes(*commands, timeout=300, **changes):
    """Runs programs side by side; their CompletedProcess in order. A change may be a list, with a value for each."""
    started = []
    try:
        for i, command in enumerate(commands):
            mine = {name: value[i] if isinstance(value, list) else value for name, value in changes.items()}
            started.append(start(command, **mine))
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *output) for p, output in zip(started, outputs)]


def cluster(count=2, devices=2):
    """The environment of so many processes that are one run on this machine's loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return {
        "TOY_PROCESS": [f"{address},{count},{i}" for i in range(count)],
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def facts(workdir):
    """The metrics without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in RATES} for line in read_metrics(workdir)]


def stored(workdir, like, step=None):
    """A checkpoint of a run, the newest by default."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return checkpoints.restore(abstract, step)
    finally:
        checkpoints.close()


def digest(state, next_step):
    """SHA-256 over parameters, their average, optimizer, counters and data position."""
    total = hashlib.sha256(str(next_step).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape}".encode())
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()
