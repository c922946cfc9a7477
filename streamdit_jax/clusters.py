"""Which cluster started this process, read from its environment: pure functions, without JAX or the network.

    found                    read from
    ours                     STREAMDIT_COORDINATOR (HOST:PORT), STREAMDIT_PROCESSES, STREAMDIT_PROCESS
    Slurm                    what srun sets for each task of a step
    TPU JobSet (GKE, xpk)    TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, and MEGASCALE_* where there are several slices
    Kubernetes (GPU)         JOB_COMPLETION_INDEX, NNODES, and JAX_COORDINATOR_ADDRESS or JobSet's names
    Open MPI                 OMPI_COMM_WORLD_*
    Cloud TPU VM             STREAMDIT_CLUSTER=tpu-vm: JAX asks the machine's metadata server

STREAMDIT_CLUSTER=none is one process, whatever else is set. JAX_COORDINATOR_PORT sets the port, and
JAX_COORDINATOR_BIND_ADDRESS the address on which the coordinator listens, where the defaults do not suit.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from streamdit_jax.errors import ConfigError

PORT = 8482  # the coordinator's, where nothing says another; on Slurm and MPI it follows from the job's number


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This process among its peers.

    found: what started it. coordinator: HOST:PORT of process 0. local_devices: the GPUs of this process, where several
    share a machine; None takes all that it sees. Only `found` is known where JAX asks the metadata server.
    """

    found: str
    processes: int | None = None
    process: int | None = None
    coordinator: str | None = None
    local_devices: tuple[int, ...] | None = None


def detect(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that an environment describes, or None for a process on its own. Touches neither JAX nor the network.

    Raises ConfigError, naming the variable, where one is missing, is no number, or contradicts another.
    """
    wanted = environment.get("STREAMDIT_CLUSTER", "")
    if wanted == "none":
        return None
    if wanted == "tpu-vm":
        return Cluster("Cloud TPU VM")
    if wanted:
        raise ConfigError(f"STREAMDIT_CLUSTER: {wanted!r} is not one of none, tpu-vm; unset, it is found out")
    return next((found for read in _READERS if (found := read(environment)) is not None), None)


def host_port(address: str) -> tuple[str, int]:
    """HOST:PORT in two, IPv6 addresses without their brackets. ConfigError where it is not of that form."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):(\d+)", address)
    if not found or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"coordinator: {address!r} is not HOST:PORT, such as 10.0.0.2:{PORT}")
    return found[1].strip("[]"), int(found[2])


def _read_ours(environment: Mapping[str, str]) -> Cluster | None:
    names = ("STREAMDIT_COORDINATOR", "STREAMDIT_PROCESSES", "STREAMDIT_PROCESS")
    if not any(environment.get(name) for name in names):
        return None
    if environment.get("STREAMDIT_PROCESSES") == "1":
        return Cluster("STREAMDIT_PROCESSES", 1, 0)
    _require(environment, names)
    host_port(environment["STREAMDIT_COORDINATOR"])
    return _cluster("STREAMDIT_COORDINATOR", environment, *names[1:], environment["STREAMDIT_COORDINATOR"])


def _read_slurm(environment: Mapping[str, str]) -> Cluster | None:
    # Of a step: in a batch script, outside srun, the job's variables are there, but no step's; that is one process.
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return None
    _require(environment, ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID"))
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[\]]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[\]]*))?", nodes)
    if not first:
        raise ConfigError(f"SLURM_STEP_NODELIST: {nodes!r} is no list of nodes, such as node[01-04]")
    host = "".join(part or "" for part in first.groups())
    coordinator = f"{host}:{_port(environment, _number(environment, 'SLURM_JOB_ID', 0))}"
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    crowded = any(int(count) > 1 for count in re.findall(r"(?:^|,)(\d+)", tasks))
    devices = _shared(environment, _number(environment, "SLURM_LOCALID", 0)) if crowded else None
    return _cluster("Slurm", environment, "SLURM_NTASKS", "SLURM_PROCID", coordinator, devices)


def _read_tpu(environment: Mapping[str, str]) -> Cluster | None:
    listed = "TPU_PROCESS_ADDRESSES" if environment.get("TPU_PROCESS_ADDRESSES") else "TPU_WORKER_HOSTNAMES"
    if not environment.get(listed):
        return None
    hosts = [host.strip().split(":")[0] for host in environment[listed].split(",")]
    slices = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
    several = any(environment.get(name) for name in slices)
    if several:
        _require(environment, slices)
    count = _number(environment, "MEGASCALE_NUM_SLICES", 1) if several else 1
    if len(hosts) * count == 1:
        return Cluster("TPU JobSet", 1, 0)
    _require(environment, ("TPU_WORKER_ID",))
    place = _below(environment, "TPU_WORKER_ID", len(hosts), listed)
    if several:
        place += len(hosts) * _below(environment, "MEGASCALE_SLICE_ID", count, "MEGASCALE_NUM_SLICES")
    host = environment["MEGASCALE_COORDINATOR_ADDRESS"].split(":")[0] if several else hosts[0]
    return Cluster("TPU JobSet", len(hosts) * count, place, f"{host}:{_port(environment)}")


def _read_kubernetes(environment: Mapping[str, str]) -> Cluster | None:
    named = ("JAX_COORDINATOR_ADDRESS", "NNODES", "JOBSET_NAME")
    if "JOB_COMPLETION_INDEX" not in environment or not any(environment.get(name) for name in named):
        return None  # an indexed Job whose pods work on their own says neither how many they are nor who leads
    _require(environment, ("NNODES",))
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator:
        _require(environment, ("JOBSET_NAME", "REPLICATED_JOB_NAME"))
        jobset = environment["JOBSET_NAME"]
        coordinator = f"{jobset}-{environment['REPLICATED_JOB_NAME']}-0-0.{jobset}"
    if ":" not in coordinator:
        coordinator = f"{coordinator}:{_port(environment)}"
    host_port(coordinator)
    return _cluster("Kubernetes", environment, "NNODES", "JOB_COMPLETION_INDEX", coordinator)


def _read_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    _require(environment, names)
    size, here, rank = (_number(environment, name, least) for name, least in zip(names, (1, 1, 0)))
    launcher = environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", launcher)
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if coordinator:
        coordinator = coordinator if ":" in coordinator else f"{coordinator}:{_port(environment)}"
    elif here == size:
        coordinator = f"127.0.0.1:{_port(environment, int(found[1]) // 2**12 if found else os.getppid())}"
    elif found:  # mpirun's machine, which also runs rank 0 unless it was told otherwise
        host = f"[{found[2]}]" if ":" in found[2] else found[2]
        coordinator = f"{host}:{_port(environment, int(found[1]) // 2**12)}"
    elif size > 1:
        raise ConfigError("JAX_COORDINATOR_ADDRESS: missing; this Open MPI does not tell; give HOST:PORT of rank 0")
    devices = _shared(environment, rank) if here > 1 else None
    return _cluster("Open MPI", environment, names[0], "OMPI_COMM_WORLD_RANK", coordinator, devices)


_READERS = (_read_ours, _read_slurm, _read_tpu, _read_kubernetes, _read_open_mpi)


def _cluster(found, environment, count: str, index: str, coordinator: str, devices=None) -> Cluster:
    processes = _number(environment, count, 1)
    return Cluster(found, processes, _below(environment, index, processes, count), coordinator, devices)


def _shared(environment: Mapping[str, str], local: int) -> tuple[int, ...] | None:
    """The GPU of a process that shares its machine, unless it was given its own already."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return None if visible is not None and "," not in visible else (local,)


def _port(environment: Mapping[str, str], job: int | None = None) -> int:
    """The coordinator's port; of several jobs on a machine, each its own."""
    if environment.get("JAX_COORDINATOR_PORT"):
        return _number(environment, "JAX_COORDINATOR_PORT", 1)
    return PORT if job is None else 61440 + job % 4096


def _require(environment: Mapping[str, str], names: tuple[str, ...]) -> None:
    given = [name for name in names if environment.get(name)]
    for name in names:
        if name not in given:
            beside = f", but {', '.join(given)} is set" if given else ""
            raise ConfigError(f"{name}: missing in the environment{beside}; set it, or STREAMDIT_CLUSTER=none")


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment[name]
    if not re.fullmatch(r"\d+", text.strip()) or int(text) < least:
        raise ConfigError(f"{name}: {text!r} is not a whole number from {least} on")
    return int(text)


def _below(environment: Mapping[str, str], name: str, count: int, counted: str) -> int:
    number = _number(environment, name, 0)
    if number >= count:
        raise ConfigError(f"{name}: {number}, but {counted} says {count}; it lies from 0 to {count - 1}")
    return number
