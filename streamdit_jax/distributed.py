"""The processes of one run: who started them is read from the environment, and `jax.distributed` begins from that.

    found                    read from
    ours                     STREAMDIT_COORDINATOR (HOST:PORT), STREAMDIT_PROCESSES, STREAMDIT_PROCESS
    Slurm                    what srun sets for each task of a step
    TPU JobSet (GKE, xpk)    TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, and MEGASCALE_* where there are several slices
    Kubernetes (GPU)         JOB_COMPLETION_INDEX, NNODES, and JAX_COORDINATOR_ADDRESS or JobSet's names
    Open MPI                 OMPI_COMM_WORLD_*
    Cloud TPU VM             STREAMDIT_CLUSTER=tpu-vm: JAX asks the machine's metadata server

STREAMDIT_CLUSTER=none is one process, whatever else is set. JAX_COORDINATOR_PORT sets the port, and
JAX_COORDINATOR_BIND_ADDRESS the address on which the coordinator listens, where the defaults do not suit.

JAX detects much of this itself. It is done here because JAX's coordinator, which has no authentication, then listens on
every interface; because its Slurm and MPI rules give each process one GPU even where it is alone on its machine; and so
that a variable that is missing is named.
"""

import dataclasses
import ipaddress
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from streamdit_jax.errors import ConfigError

PORT = 8482  # the coordinator's, where nothing says another; on Slurm and MPI it follows from the job's number
RETRY_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This process among its peers.

    found: what started it. coordinator: HOST:PORT of process 0. local_devices: the GPUs of this process, where several
    share a machine; None takes all that it sees. The last three numbers are None where JAX asks the metadata server.
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


def start(
    log: Callable[[str], None] = print,
    environment: Mapping[str, str] = os.environ,
    *,
    timeout_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> Cluster | None:
    """Begins `jax.distributed` as `detect` says; nothing happens, and JAX is not imported, for a process on its own.

    To be called before anything touches a device. log: takes one line. timeout_seconds: how long the processes wait for
    each other. heartbeat_seconds: after how long without a sign a process counts as dead.
    Raises ConfigError as `detect`, or where the coordinator's name does not become known or no peer answers in time.
    """
    cluster = detect(environment)
    if cluster is None or cluster.processes == 1:
        return cluster
    import jax

    if jax.distributed.is_initialized():
        return cluster
    # JAX's own handler would swallow a SIGTERM that comes before there is a step to stop at; `training.watch` does not.
    jax.config.update("jax_enable_preemption_service", False)
    sys.excepthook = _leave_after_traceback
    options: dict[str, Any] = {
        "initialization_timeout": timeout_seconds,
        "heartbeat_timeout_seconds": heartbeat_seconds,
    }
    if cluster.coordinator is None:
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(PORT))
        own = f"{_outward_address()}:{os.environ['JAX_COORDINATOR_PORT']}"
        options["coordinator_bind_address"] = environment.get("JAX_COORDINATOR_BIND_ADDRESS") or own
        jax.distributed.initialize(**options)
        log(f"process {jax.process_index()} of {jax.process_count()} ({cluster.found})")
        return dataclasses.replace(cluster, processes=jax.process_count(), process=jax.process_index())
    address = _resolved(cluster.coordinator, timeout_seconds)
    if cluster.process == 0:
        bind = environment.get("JAX_COORDINATOR_BIND_ADDRESS") or bind_address(cluster.coordinator, address)
        options["coordinator_bind_address"] = bind
    log(f"process {cluster.process} of {cluster.processes} ({cluster.found}), coordinator {cluster.coordinator}")
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
            **options,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"coordinator {cluster.coordinator}: the {cluster.processes} processes did not find each other within "
            f"{timeout_seconds} s ({str(error).splitlines()[0][:160]}); start all, and let them reach its port"
        ) from error
    return cluster


def leave(code: int) -> int:
    """Ends a process that failed while its peers go on; returns `code` where there are none.

    Python's usual end would wait for the peers, who wait for this process.
    """
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized() and jax.process_count() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _leave_after_traceback(*error) -> None:
    sys.__excepthook__(*error)
    leave(1)


def gather(tree: Any) -> Any:
    """Arrays of all processes' devices → numpy arrays, whole on every process. Every process makes the same call.

    One leaf at a time: the devices hold one leaf in full, beside their parts of the others.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    def whole(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def from_first(tree: Any) -> Any:
    """Process 0's numbers, as numpy arrays, on every process. `tree` has the same shapes on all."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        tree = multihost_utils.broadcast_one_to_all(tree)
    return jax.tree.map(np.asarray, tree)


def over_local_devices(batch: Any) -> Any:
    """A batch of this process alone → an array cut along its first axis over as many of its devices as divide it."""
    import jax

    from streamdit_jax import sharding

    devices = jax.local_devices()
    mesh = sharding.make_mesh(devices=devices[: math.gcd(len(batch), len(devices))])
    return jax.device_put(batch, sharding.batch_sharding(mesh))


def bind_address(coordinator: str, address: str) -> str:
    """Where the coordinator listens: on loopback if it is reached there, else on the one address that it is reached by.

    coordinator: HOST:PORT. address: what the host resolves to on the coordinator's own machine.
    """
    host, port = _host_port(coordinator)
    if ipaddress.ip_address(address).is_loopback and not _is_loopback(host):
        address = _outward_address()  # /etc/hosts often gives a machine's own name a loopback address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _outward_address() -> str:
    """This machine's address on the network that it reaches others by. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation; only the choice of interface matters
        except OSError as error:
            raise ConfigError(
                f"JAX_COORDINATOR_BIND_ADDRESS: set it to this machine's ADDRESS:PORT, which has no route ({error})"
            ) from None
        return probe.getsockname()[0]


def _resolved(coordinator: str, seconds: float) -> str:
    """The coordinator's address, once its name is known: in Kubernetes that takes until its pod has begun."""
    host, port = _host_port(coordinator)
    end = time.monotonic() + seconds
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0]
        except socket.gaierror as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"coordinator {coordinator}: {host} did not resolve in {seconds} s: {error}"
                ) from None
            time.sleep(RETRY_SECONDS)


def _host_port(address: str) -> tuple[str, int]:
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
    _host_port(environment["STREAMDIT_COORDINATOR"])
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
    _host_port(coordinator)
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
