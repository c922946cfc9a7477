"""The processes of one run: `jax.distributed` begun from what `clusters` finds, and what they then hand each other.

JAX finds much of this itself. Ours is used because JAX's coordinator, which has no authentication, then listens on
every interface; because its Slurm and MPI rules give each process one GPU even where it is alone on its machine; and so
that a variable that is missing is named.
"""

import dataclasses
import ipaddress
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from streamdit_jax.clusters import PORT, Cluster, detect, host_port
from streamdit_jax.errors import ConfigError

RETRY_SECONDS = 2.0


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
    host, port = host_port(coordinator)
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
    host, port = host_port(coordinator)
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
