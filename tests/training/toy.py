"""A regression small enough to train in a blink, with everything the loop cares about: noise from the step's key,
constants, a stacked layer, metrics of its own. Also a program, so that tests can kill it: `python toy.py WORKDIR STEPS
[json of StageConfig fields]`.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import sharding
from streamdit_jax.errors import DataError, StreamDiTError
from streamdit_jax.stages import OptimizerConfig, StageConfig
from streamdit_jax.training.loop import run_stage
from streamdit_jax.training.objective import Objective

INPUTS, WIDTH, OUTPUTS, BATCH = 16, 64, 8, 16
TRUTH = np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)).astype(np.float32)


def batch(step, size=BATCH, process=0, processes=1):
    """The rows of one process of the batch that step + 1 reads."""
    rng = np.random.default_rng((7, step))
    x = rng.normal(size=(size, INPUTS)).astype(np.float32)
    rows = slice(process * size // processes, (process + 1) * size // processes)
    return {"x": x[rows], "y": (x @ TRUTH)[rows]}


def batches(first_step):
    return (
        batch(step, process=jax.process_index(), processes=jax.process_count()) for step in itertools.count(first_step)
    )


def init(key, batch):
    def dense(key, inputs, outputs, *stack):
        kernel = jax.random.normal(key, (*stack, inputs, outputs)) / np.sqrt(inputs)
        return {"kernel": kernel, "bias": jnp.zeros((*stack, outputs))}

    keys = jax.random.split(key, 3)
    inputs = batch["x"].shape[-1]
    return {
        "toy": {
            "up": dense(keys[0], inputs, WIDTH),
            "blocks": {"query": dense(keys[1], WIDTH, WIDTH, 2)},
            "down": dense(keys[2], WIDTH, OUTPUTS),
        }
    }


def loss(params, constants, batch, key):
    def dense(params, x):
        return x @ params["kernel"] + params["bias"]

    params = params["toy"]
    x = jnp.tanh(dense(params["up"], batch["x"]))
    x = jax.lax.scan(lambda x, layer: (x + jnp.tanh(dense(layer, x)), None), x, params["blocks"]["query"])[0]
    error = dense(params["down"], x) - batch["y"] + constants["noise"] * jax.random.normal(key, batch["y"].shape)
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def objective(loss=loss):
    return Objective("toy", init, loss, {"noise": np.float32(0.1)})


def optimizer(**changes):
    return OptimizerConfig(**{"learning_rate": 0.01, "warmup_steps": 3, "weight_decay": 0.01, **changes})


def stage(steps, **changes):
    fields = {"batch_size": BATCH, "num_frames": 1, "optimizer": optimizer(), "log_every": 1, "checkpoint_every": 5}
    return StageConfig(steps=steps, **{**fields, **changes})


def train(
    workdir, steps, *, make_batches=batches, loss=loss, log=lambda _: None, config_json=None, sample_fn=None, **fields
):
    return run_stage(
        objective(loss),
        stage(steps, **fields),
        make_batches,
        workdir,
        seed=3,
        mesh=sharding.make_mesh(json.loads(os.environ.get("TOY_MESH", '{"data": -1}'))),
        config_json=config_json,
        sample_fn=sample_fn,
        log=log,
    )


def bits(tree):
    """All leaves as bytes, to be compared exactly."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def fault(place, step):
    """What TOY_FAULT="PLACE:STEP:PROCESS:KIND" asks for, when this process comes there."""
    wanted = os.environ.get("TOY_FAULT", "").split(":")
    if wanted[:3] != [place, str(step), str(jax.process_index())]:
        return
    if wanted[3] == "deadlock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif wanted[3] == "error":
        raise DataError("toy: the batch is gone")
    else:
        os.kill(os.getpid(), getattr(signal, wanted[3]))
        time.sleep(0.1)  # until it acts


def slow_batches(first_step):
    for step, one in zip(itertools.count(first_step), batches(first_step)):
        fault("batch", step)
        time.sleep(0.02)
        yield one


def slow_loss(*inputs):
    """Is traced once, for the compiled step: as long as its compilation may take."""
    if "compile" in os.environ.get("TOY_FAULT", ""):
        fault("compile", 0)
        time.sleep(60)
    return loss(*inputs)


def sample(step, params):
    fault("sample", step)


if __name__ == "__main__":
    if "TOY_PROCESS" in os.environ:
        address, count, index = os.environ["TOY_PROCESS"].split(",")
        jax.config.update("jax_enable_preemption_service", False)  # its handler would take SIGTERM from the watch
        jax.distributed.initialize(
            address,
            int(count),
            int(index),
            coordinator_bind_address=address,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=int(os.environ.get("TOY_HEARTBEAT", "100")),
        )
    fields = json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}")
    if "optimizer" in fields:
        fields["optimizer"] = optimizer(**fields["optimizer"])
    try:
        train(
            sys.argv[1],
            int(sys.argv[2]),
            make_batches=slow_batches,
            loss=slow_loss,
            sample_fn=sample,
            log=lambda line: print(line, flush=True),
            **fields,
        )
    except StreamDiTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
