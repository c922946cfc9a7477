"""`streamdit plan`: a configuration on a topology → what its step takes, or why it does not fit."""

import dataclasses
import re
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from streamdit_jax import machine, roofline, sharding
from streamdit_jax.config import Config, from_arguments
from streamdit_jax.errors import ConfigError
from streamdit_jax.plan.collectives import collectives, summary
from streamdit_jax.plan.fit import require_fit, too_large
from streamdit_jax.plan.kernels import census
from streamdit_jax.plan.programs import Lowered, streaming_program, training_step
from streamdit_jax.plan.topology import Topology, describe

PRECISIONS = ("auto", "float32", "bfloat16", "fp8")
EFFORT = -1.0
# Without a GPU nothing can be autotuned, and XLA's own matrix products would be those of its worst tiles.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
LIMIT = 0.95  # beside arguments and temporaries a device holds the program, and what the runtime keeps for itself


def run(
    overrides: Sequence[str],
    topology: str,
    *,
    what: str = "train",
    stage: str | None = None,
    bucket: str | None = None,
    slices: int | None = None,
    precision: str = "auto",
    limit: float = LIMIT,
    effort: float = EFFORT,
) -> dict[str, Any]:
    """Compiles the step that a command line names; its report, as docs/scale.md describes it.

    overrides: `--config=FILE …`. stage: of training, by default the last that the configuration has. bucket: of that
        stage's batches. slices: so many of the topology, over the slower network; mesh.slices by default. limit: the
        share of a device's memory that arguments and temporaries may take. effort: of the compiler, from -1 to 1; a run
        compiles with 0, which takes many times as long.
    Raises ConfigError for mistakes in these, for what lacks to compile, and for a step that does not fit, saying by how
        much and what would help.
    """
    if not 0 < limit <= 1:
        raise ConfigError(f"--limit: a share of the memory, above 0 and at most 1, not {limit}")
    if not -1 <= effort <= 1:
        raise ConfigError(f"--effort: from -1 to 1, not {effort}")
    config = from_arguments(overrides)
    stage = _stage(config, stage) if what == "train" else None
    slices = config.mesh.slices if slices is None else slices
    described = describe(topology, slices)
    config = _with_precision(config, precision, described)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=slices))
    mesh = sharding.make_mesh(config.mesh, devices=described.devices)
    began = time.perf_counter()
    lowered = training_step(config, stage, bucket, mesh) if stage else streaming_program(config, mesh)
    lower_seconds = time.perf_counter() - began
    sizes = {
        "config": config.name,
        "what": what,
        **lowered.facts,
        "topology": described.name,
        "slices": slices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "precision": "fp8" if config.dit.quantization == "fp8" else str(config.dit.compute_dtype),
        "parameters": lowered.parameters,
        "argument_bytes_per_device": lowered.argument_bytes(),
        "temporary_bytes_per_device": 0,
        "hbm_bytes_per_device": described.hbm_bytes,
    }
    require_fit(sizes, limit)  # what is too large already need not be compiled
    began, cpu = time.perf_counter(), time.process_time()
    options = COMPILER_OPTIONS.get(described.platform, {})
    compiled = _compile(lowered, sizes, limit, effort, options)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    sizes |= _memory(compiled)
    require_fit(sizes, limit)
    held = sizes["argument_bytes_per_device"] + sizes["temporary_bytes_per_device"]
    hlo, of_gpus = compiled.as_text(), {}
    if described.platform == "gpu":
        guided = lowered.facts.get("forwards_in_one") != 1
        of_gpus = {"kernels": census(hlo, guided=guided, layers=config.dit.num_layers)}
    return {
        **sizes,
        "hbm_share": round(held / described.hbm_bytes, 4),
        "flops_per_step": lowered.flops,
        "flops_per_step_per_device": None if lowered.flops is None else lowered.flops // mesh.size,
        "rematerialised_flops_per_step": lowered.repeated,
        "collectives": summary(collectives(hlo, dict(mesh.shape))),
        **of_gpus,
        "effort": effort,
        "compiler_options": options,
        "lower_seconds": round(lower_seconds, 1),
        "compile_seconds": round(seconds, 1),
        "compile_cpu_seconds": round(cpu, 1),
        "host_peak_bytes": machine.peak_bytes()[0],
        "host": machine.hardware(),
        "versions": machine.versions() | _compiler(described),
        "date": time.strftime("%Y-%m-%d"),
    }


def roofline_of(overrides: Sequence[str], topology: str, *, precision: str = "auto") -> dict[str, Any]:
    """The bounds of a configuration's streaming loop on one GPU of a topology; nothing is compiled, no device touched.

    precision: auto | float32 | bfloat16 | fp8. Raises ConfigError for a topology whose rates nobody measured.
    """
    config, (kind, *_) = from_arguments(overrides), topology.split(":")
    if kind not in roofline.RATES:
        raise ConfigError(f"--roofline: the rates of {kind!r} are not known, only those of {', '.join(roofline.RATES)}")
    if precision == "auto":
        precision = "bfloat16" if config.dit.dtype == "auto" else config.dit.dtype
    return {
        "what": "roofline",
        "config": config.name,
        "topology": kind,
        **roofline.streaming(config, roofline.RATES[kind], precision),
        "versions": {"streamdit_jax": machine.versions()["streamdit_jax"]},
        "date": time.strftime("%Y-%m-%d"),
    }


def _stage(config: Config, name: str | None) -> str:
    """A stage of the configuration, by default its last. ConfigError where it does not have it."""
    names = [field.name for field in dataclasses.fields(config.training)]
    has = [field for field in names if getattr(config.training, field) is not None]
    if not has:
        raise ConfigError(f"training: {config.name} has no stage to plan; give one, or --what=stream")
    if name is not None and name not in has:
        raise ConfigError(f"--stage: {config.name} has {', '.join(has)}, not {name!r}")
    return name or has[-1]


def _with_precision(config: Config, precision: str, topology: Topology) -> Config:
    """The configuration with the type of its arithmetic: its own, or what "auto" is on that platform. fp8 quantises
    the model, and is "auto" beside that.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    quantization = "fp8" if precision == "fp8" else config.dit.quantization
    if precision in ("auto", "fp8"):
        precision = config.dit.dtype
    if precision == "auto":
        precision = "float32" if topology.platform == "cpu" else "bfloat16"
    return dataclasses.replace(config, dit=dataclasses.replace(config.dit, dtype=precision, quantization=quantization))


def _compile(
    lowered: Lowered, sizes: dict[str, Any], limit: float, effort: float, options: dict[str, Any]
) -> jax.stages.Compiled:
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", effort)
    try:
        return lowered.lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as mistake:
        message = str(mistake)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        raise too_large(sizes | named_sizes(message), limit, message) from None
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


def named_sizes(message: str) -> dict[str, int]:
    """What XLA's refusal says of temporaries or of the whole, in bytes; nothing where it says it otherwise."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = r"(\d+(?:\.\d+)?)([KMGT]?)"
    for pattern, name in (
        (rf"HLO temporaries \({number}\)", "temporary_bytes_per_device"),
        (rf"Used {number} of", "used_bytes_per_device"),
    ):
        if found := re.search(pattern, message):
            return {name: int(float(found.group(1)) * units[found.group(2)])}
    return {}


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    memory = compiled.memory_analysis()
    return {
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "temporary_bytes_per_device": memory.temp_size_in_bytes,
        "output_bytes_per_device": memory.output_size_in_bytes,
        "aliased_bytes_per_device": memory.alias_size_in_bytes,
    }


def _compiler(topology: Topology) -> dict[str, str]:
    """The version of the compiler for that platform, where it is a package of its own."""
    named = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin")}.get(topology.platform, ())
    found = {}
    for name in named:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
