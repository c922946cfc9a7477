"""Devices by description: what compilers need to know of chips that are not there.

v5p:8x8x4   a TPU slice by the shape of its torus (v5e and v6e have two axes, v5p and tpu7x three)
h200:8      so many GPUs, eight to a host
cpu:8       so many devices of this machine; always available
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from streamdit_jax.errors import ConfigError

GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator. hbm_bytes: of one device, as far as a program may use it. axes: of its slices' shapes."""

    platform: str
    hbm_bytes: int
    axes: int = 0
    target: str = ""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that programs are compiled for. hbm_bytes: of each."""

    name: str
    platform: str
    devices: Sequence[jax.Device]
    hbm_bytes: int


# Hopper, in the words of XLA's GpuTargetConfig; the two kinds differ by their memory (NVIDIA's data sheets).
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def _hopper(name: str, mebibytes: int, bandwidth: int) -> Chip:
    memory = mebibytes * 2**20
    return Chip("gpu", memory, target=_HOPPER.format(name=name, memory=memory, bandwidth=bandwidth))


# Of TPUs, what XLA's compiler names as the capacity when a program exceeds it; of tpu7x per device, two to a chip.
CHIPS = {
    "v5e": Chip("tpu", int(15.75 * 2**30), axes=2),
    "v5p": Chip("tpu", int(95.74 * 2**30), axes=3),
    "v6e": Chip("tpu", int(31.25 * 2**30), axes=2),
    "tpu7x": Chip("tpu", int(94.75 * 2**30), axes=3),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 81559, 3_350_000_000_000),
    "h200": _hopper("NVIDIA H200", 143771, 4_800_000_000_000),
}
KINDS = (*CHIPS, "cpu")
# libtpu asks what machine it is on, and complains at length that it is none; of a described slice it is not asked.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def describe(spelling: str, slices: int = 1) -> Topology:
    """The devices of a topology, `slices` times over for TPU slices that a data-centre network joins.

    Raises ConfigError for a spelling that is none, a package that is missing, and a libtpu that another process holds.
    """
    kind, _, shape = spelling.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"--topology: {kind!r} is not one of {', '.join(KINDS)}; give v5p:8x8x4, h200:8 or cpu:8")
    if not re.fullmatch(r"(\d+(x\d+)*)?", shape) or "0" in shape.split("x"):
        raise ConfigError(f"--topology: {shape!r} is no shape; give v5p:8x8x4, h200:8 or cpu:8")
    sizes = [int(size) for size in shape.split("x")] if shape else [1]
    if slices < 1:
        raise ConfigError(f"--slices: at least 1, not {slices}")
    if kind == "cpu":
        return _host(spelling, math.prod(sizes))
    if CHIPS[kind].platform == "gpu":
        return _gpus(kind, spelling, sizes, slices)
    return _tpus(kind, spelling, sizes, slices)


def only_describe(spelling: str) -> None:
    """JAX on this machine's own processor, whatever else it has, with as many host devices as `spelling` names.

    To be called before JAX has begun; afterwards it is too late for host devices, and `describe` says so.
    """
    jax.config.update("jax_platforms", "cpu")
    host = re.fullmatch(r"cpu:(\d+)", spelling)
    if host and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", int(host.group(1)))


def _host(spelling: str, count: int) -> Topology:
    if len(jax.devices("cpu")) < count:
        raise ConfigError(
            f"--topology: {spelling} needs {count} host devices, and JAX has begun with {len(jax.devices('cpu'))}; "
            f"start anew with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Topology(spelling, "cpu", jax.devices("cpu")[:count], memory // count)


def _gpus(kind: str, spelling: str, sizes: list[int], slices: int) -> Topology:
    count = math.prod(sizes)
    if slices > 1:
        raise ConfigError(f"--slices: {kind} hosts are no slices; give {kind}:{slices * count} instead")
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise ConfigError(f"--topology: {count} GPUs do not fill hosts of {GPUS_PER_HOST}; give a multiple")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
        raise ConfigError(f"--topology: {kind} needs JAX's CUDA plugin: pip install 'streamdit_jax[plan]'")
    hosts = math.ceil(count / GPUS_PER_HOST)
    description = topologies.get_topology_desc(
        platform="cuda", target_config=CHIPS[kind].target, topology=f"1x{hosts}x{count // hosts}"
    )
    return Topology(spelling, "gpu", description.devices, CHIPS[kind].hbm_bytes)


def _tpus(kind: str, spelling: str, sizes: list[int], slices: int) -> Topology:
    axes = CHIPS[kind].axes
    if len(sizes) != axes:
        example = "x".join(["4"] * axes)
        raise ConfigError(f"--topology: {kind} has shapes of {axes} axes, as {kind}:{example}; not {spelling}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology: {kind} needs libtpu: pip install 'streamdit_jax[plan]'")
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    # A host has 2×2 chips along the first two axes; a smaller slice is one host.
    host = [min(size, whole) for size, whole in zip(sizes, (2, 2, 1))] + [1] * (3 - axes)
    try:
        description = topologies.get_topology_desc(spelling, "tpu", num_slices=slices, chips_per_host_bounds=host)
    except jax.errors.JaxRuntimeError as mistake:
        message = str(mistake).splitlines()[0]
        if "lockfile" in message or "already in use" in message:
            raise ConfigError(
                "--topology: another process holds libtpu, which serves one at a time; wait until it has ended "
                "(if none runs: remove libtpu_lockfile from the temporary folder)"
            ) from None
        raise ConfigError(f"--topology: {spelling} is no slice ({message})") from None
    return Topology(spelling, "tpu", description.devices, CHIPS[kind].hbm_bytes)
