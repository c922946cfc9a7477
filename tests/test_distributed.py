"""Which cluster an environment describes, where its coordinator listens, and two processes that find each other."""

import json
import os
import socket
import subprocess
import sys

import pytest

from streamdit_jax import distributed
from streamdit_jax.clusters import Cluster, detect
from streamdit_jax.distributed import bind_address
from streamdit_jax.errors import ConfigError

OURS = {"STREAMDIT_COORDINATOR": "10.0.0.2:1234", "STREAMDIT_PROCESSES": "4", "STREAMDIT_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "node[007-010,12],other3",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x6)",
}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t-0.net,t-1.net"}
MEGASCALE = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "lead.net:8081",
}
KUBERNETES = {
    "JOB_COMPLETION_INDEX": "1",
    "NNODES": "2",
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "workers",
    "KUBERNETES_SERVICE_HOST": "10.1.0.1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        ({"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script
        ({"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.1.0.1"}, None),  # pods that work alone
        (OURS, Cluster("STREAMDIT_COORDINATOR", 4, 3, "10.0.0.2:1234")),
        ({"STREAMDIT_PROCESSES": "1"}, Cluster("STREAMDIT_PROCESSES", 1, 0)),
        (OURS | SLURM | TPU, Cluster("STREAMDIT_COORDINATOR", 4, 3, "10.0.0.2:1234")),
        (SLURM | {"STREAMDIT_CLUSTER": "none"}, None),
        (SLURM, Cluster("Slurm", 6, 5, "node007:61443")),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu1"}, Cluster("Slurm", 6, 5, "gpu1:61443")),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu1,gpu2"}, Cluster("Slurm", 6, 5, "gpu1:61443")),
        (SLURM | {"SLURM_STEP_NODELIST": "rack[3-4]-ib"}, Cluster("Slurm", 6, 5, "rack3-ib:61443")),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, Cluster("Slurm", 6, 5, "node007:99")),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"},
            Cluster("Slurm", 6, 5, "node007:61443", (1,)),
        ),
        (  # srun --gpus-per-task=1 has given the task its GPU
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"},
            Cluster("Slurm", 6, 5, "node007:61443"),
        ),
        (TPU, Cluster("TPU JobSet", 2, 1, "t-0.net:8482")),
        (TPU | KUBERNETES, Cluster("TPU JobSet", 2, 1, "t-0.net:8482")),
        (TPU | MEGASCALE, Cluster("TPU JobSet", 6, 5, "lead.net:8482")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, Cluster("TPU JobSet", 1, 0)),
        (TPU | {"TPU_PROCESS_ADDRESSES": "a:1,b:2"}, Cluster("TPU JobSet", 2, 1, "a:8482")),
        (KUBERNETES, Cluster("Kubernetes", 2, 1, "run-workers-0-0.run:8482")),
        (KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "lead:77"}, Cluster("Kubernetes", 2, 1, "lead:77")),
        (KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "lead"}, Cluster("Kubernetes", 2, 1, "lead:8482")),
        (MPI, Cluster("Open MPI", 4, 3, "10.96.0.1:62624", (1,))),
        (
            MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
            Cluster("Open MPI", 4, 3, "127.0.0.1:62624", (3,)),
        ),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::1,2620::2]:43370"},
            Cluster("Open MPI", 4, 3, "[fe80::1]:62880", (1,)),
        ),
        ({"STREAMDIT_CLUSTER": "tpu-vm"}, Cluster("Cloud TPU VM")),
    ],
)
def test_every_kind_of_cluster_is_recognised(environment, cluster):
    assert detect(environment) == cluster


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(OURS, "STREAMDIT_PROCESS"), "^STREAMDIT_PROCESS: missing .*STREAMDIT_COORDINATOR"),
        (without(OURS, "STREAMDIT_COORDINATOR"), "^STREAMDIT_COORDINATOR: missing"),
        (OURS | {"STREAMDIT_PROCESS": "4"}, "^STREAMDIT_PROCESS: 4, but STREAMDIT_PROCESSES says 4; .* 0 to 3"),
        (OURS | {"STREAMDIT_PROCESS": "-1"}, "^STREAMDIT_PROCESS: '-1' is not a whole number from 0 on"),
        (OURS | {"STREAMDIT_PROCESSES": "two"}, "^STREAMDIT_PROCESSES: 'two' is not a whole number"),
        (OURS | {"STREAMDIT_COORDINATOR": "10.0.0.2"}, "^coordinator: '10.0.0.2' is not HOST:PORT"),
        (OURS | {"STREAMDIT_COORDINATOR": "a:99999"}, "^coordinator: 'a:99999' is not HOST:PORT"),
        (SLURM | {"SLURM_PROCID": "6"}, "^SLURM_PROCID: 6, but SLURM_NTASKS says 6"),
        (without(SLURM, "SLURM_JOB_ID"), "^SLURM_JOB_ID: missing"),
        (without(TPU, "TPU_WORKER_ID"), "^TPU_WORKER_ID: missing"),
        (TPU | {"TPU_WORKER_ID": "2"}, "^TPU_WORKER_ID: 2, but TPU_WORKER_HOSTNAMES says 2"),
        (TPU | without(MEGASCALE, "MEGASCALE_SLICE_ID"), "^MEGASCALE_SLICE_ID: missing"),
        (TPU | MEGASCALE | {"MEGASCALE_SLICE_ID": "3"}, "^MEGASCALE_SLICE_ID: 3, but MEGASCALE_NUM_SLICES says 3"),
        (without(KUBERNETES, "NNODES"), "^NNODES: missing"),
        (without(KUBERNETES, "REPLICATED_JOB_NAME"), "^REPLICATED_JOB_NAME: missing"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "2"}, "^JOB_COMPLETION_INDEX: 2, but NNODES says 2"),
        (without(MPI, "OMPI_MCA_orte_hnp_uri"), "^JAX_COORDINATOR_ADDRESS: missing; this Open MPI"),
        (SLURM | {"JAX_COORDINATOR_PORT": "no"}, "^JAX_COORDINATOR_PORT: 'no'"),
        ({"STREAMDIT_CLUSTER": "pbs"}, "^STREAMDIT_CLUSTER: 'pbs' is not one of none, tpu-vm"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_named(environment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        detect(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["slurm_cluster.SlurmCluster", "ompi_cluster.OmpiCluster"])
def test_ours_agrees_with_jax_own_detection(monkeypatch, name):
    module, _, kind = name.partition(".")
    theirs = getattr(pytest.importorskip(f"jax._src.clusters.{module}"), kind)
    environment = SLURM if kind == "SlurmCluster" else MPI
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    ours = detect(environment)
    assert ours.coordinator == theirs.get_coordinator_address(timeout_secs=1, override_coordinator_port=None)
    assert (ours.processes, ours.process) == (theirs.get_process_count(), theirs.get_process_id())


def test_the_coordinator_never_listens_on_every_interface(monkeypatch):
    monkeypatch.setattr(distributed, "_outward_address", lambda: "10.0.0.9")
    assert bind_address("localhost:5", "127.0.0.1") == "127.0.0.1:5"
    assert bind_address("127.0.0.1:5", "127.0.0.1") == "127.0.0.1:5"
    assert bind_address("node1:5", "10.0.0.2") == "10.0.0.2:5"
    assert bind_address("node1:5", "127.0.1.1") == "10.0.0.9:5"  # as Debian names itself in /etc/hosts
    assert bind_address("node1:5", "fd00::2") == "[fd00::2]:5"


def test_one_process_starts_nothing():
    program = (
        "import sys; from streamdit_jax import distributed; "
        "print(distributed.start(environment={}), distributed.start(environment={'STREAMDIT_PROCESSES': '1'}).process, "
        "'jax' in sys.modules, distributed.leave(2))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "None 0 False 2\n"


def test_a_coordinator_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "RETRY_SECONDS", 0.0)
    with pytest.raises(ConfigError, match=r"^coordinator nowhere\.invalid:7: nowhere\.invalid did not resolve"):
        distributed.start(environment=OURS | {"STREAMDIT_COORDINATOR": "nowhere.invalid:7"}, timeout_seconds=0)


PROGRAM = """
import json, sys
from streamdit_jax import distributed
cluster = distributed.start(lambda line: print(line, file=sys.stderr))
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("data",))
whole = np.arange(8.0).reshape(4, 2)
cut = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("data")), lambda index: whole[index])
gathered = distributed.gather({"cut": cut, "own": np.float32(cluster.process)})
first = distributed.from_first({"x": np.float32(10 + cluster.process)})
sockets = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}").readlines()[1:]]
ports = [fields[1] for fields in sockets if fields[3] == "0A"]
spread = distributed.over_local_devices(np.arange(6.0))
assert len(spread.sharding.device_set) == 2 and spread.is_fully_addressable and spread.sum() == 15
assert len(distributed.over_local_devices(np.arange(3.0)).sharding.device_set) == 1
report = [len(jax.devices()), gathered["cut"].tolist(), float(gathered["own"]), float(first["x"]), ports]
print("said", json.dumps(report), flush=True)
sys.stdin.read()  # JAX ends a process whose coordinator is gone: process 0 stays until the other has left
distributed.leave(6 + cluster.process)
"""


def test_two_processes_find_each_other_on_loopback():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "STREAMDIT_"))},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "STREAMDIT_COORDINATOR": f"localhost:{port}",
        "STREAMDIT_PROCESSES": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "STREAMDIT_PROCESS": str(index)},
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in reversed(started)][::-1]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [6, 7], outputs
    for index, (said, error) in enumerate(outputs):
        [line] = [line for line in said.splitlines() if line.startswith("said ")]  # gloo talks, too, before or after
        devices, cut, own, first, listening = json.loads(line.removeprefix("said "))
        assert (devices, cut, own, first) == (4, [[0, 1], [2, 3], [4, 5], [6, 7]], index, 10)
        if index == 0:  # who still runs when the other looks is chance
            [place] = [place for place in listening if place.endswith(f":{port:04X}")]
            assert place.endswith(f"0100007F:{port:04X}")  # 127.0.0.1, or the same within IPv6
        assert f"process {index} of 2 (STREAMDIT_COORDINATOR), coordinator localhost:{port}" in error
