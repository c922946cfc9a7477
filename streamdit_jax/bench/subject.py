"""What is measured: a model on disk, or a configuration with random weights."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import machine, parameters, weights
from streamdit_jax.config import Config, from_arguments, from_mapping
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import DiTConfig
from streamdit_jax.models.linear import QUANTIZED
from streamdit_jax.pipeline import Pipeline, load
from streamdit_jax.programs import Programs
from streamdit_jax.sharding import path_name

PRECISIONS = ("auto", "float32", "bfloat16", "fp8")
ALIASES = {"bf16": "bfloat16"}
SPREAD = 64.0  # standard deviation of random float8 values, whose largest is 448
# Beside them a stream needs activations and XLA its scratch memory.
_SHARE_FOR_PARAMETERS = 0.9


@dataclasses.dataclass(frozen=True)
class Subject:
    """A configuration whose sampling and precision are those to be measured, and the model it came with, if any."""

    config: Config
    model: str | None = None

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        sampling = self.config.sampling
        return {
            "config": self.config.name,
            "weights": self.model or "random: a configuration was given, and no --model",
            "precision": self.precision,
            "scheme": sampling.scheme,
            "guidance": sampling.guidance,
            "filling": sampling.filling,
        }

    @property
    def precision(self) -> str:
        """float32 | bfloat16 | fp8: of the transformer's products."""
        return "fp8" if self.config.dit.quantization == "fp8" else str(self.config.dit.compute_dtype)

    def pipeline(self, programs: Programs | None = None) -> Pipeline:
        """Its weights on the device. programs: as `pipeline.load`. ConfigError where they do not fit."""
        self.require_memory(sum(self.parameter_bytes(programs).values()), "its parameters")
        if self.model is None:
            return Pipeline(self.config, random_params(self.config, programs), "random", programs)
        return load(self.model, config=self.config, programs=programs)

    def of_one_layer_text(self) -> "Subject":
        """The same with random text encoders of one layer, for what does not measure them: of the 4B model's
        parameters most are theirs. A model on disk stays as it is.
        """
        if self.model is not None:
            return self
        text = tuple(dataclasses.replace(of_encoder, num_layers=1) for of_encoder in self.config.text)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, text=text))

    def shapes(self, programs: Programs | None = None) -> dict[str, Any]:
        """Shapes of the parameters of each part; nothing is computed."""
        return parameters.shapes(self.config, programs)

    def parameter_bytes(self, programs: Programs | None = None) -> dict[str, int]:
        """Bytes of each part's parameters on the device: the transformer's in its own precision, the others' in
        float32.
        """
        return {
            part: sum(
                leaf.size * dtype.itemsize
                for leaf, dtype in zip(jax.tree.leaves(tree), _dtypes(self.config, part, tree))
            )
            for part, tree in self.shapes(programs).items()
        }

    def require_memory(self, needed: int, what: str) -> None:
        """ConfigError where `needed` bytes for `what` are more than what memory is left."""
        available = machine.available_bytes()
        if available is not None and needed > _SHARE_FOR_PARAMETERS * available:
            raise ConfigError(
                f"--config: {self.config.name} needs {needed / 1e9:.1f} GB for {what}, and {machine.hardware()} has "
                f"{available / 1e9:.1f} GB left; measure it on a larger device, or a smaller configuration here"
            )

    def to_json(self) -> str:
        """For another process; `from_json` reads it."""
        return json.dumps({"config": json.loads(self.config.to_json()), "model": self.model})


def from_json(text: str) -> Subject:
    """What `Subject.to_json` wrote."""
    described = json.loads(text)
    return Subject(from_mapping(described["config"]), described["model"])


def load_config(model: str) -> Config:
    """The configuration of a model on disk."""
    return from_mapping(weights.load_card(weights.find_model(model))["config"])


def resolve(
    overrides: Sequence[str],
    model: str | None,
    *,
    precision: str = "auto",
    scheme: str | None = None,
    guidance: float | None = None,
    filling: str | None = None,
) -> Subject:
    """The subject that a command line names: `--config=FILE …` or a model, and how it is to be run. No device is
    touched.

    Raises ConfigError for both or neither, and for a precision, scheme or filling that cannot be; CheckpointError for
    a model that is none.
    """
    if bool(overrides) == (model is not None):
        raise ConfigError("--config: give a configuration, as --config=configs/roadtrip.py, or a --model, and not both")
    precision = ALIASES.get(precision, precision)
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    config = from_arguments(overrides) if model is None else load_config(model)
    changes = {"scheme": scheme, "guidance": guidance, "filling": filling}
    try:
        sampling = dataclasses.replace(
            config.sampling, **{name: value for name, value in changes.items() if value is not None}
        )
        dit = _with_precision(config.dit, precision, model)
        return Subject(dataclasses.replace(config, sampling=sampling, dit=dit), model)
    except ValueError as mistake:
        raise ConfigError(f"--{str(mistake).removeprefix('sampling.')}") from None


def _with_precision(dit: DiTConfig, precision: str, model: str | None) -> DiTConfig:
    if precision == "auto":
        return dit
    if precision != "fp8" and dit.quantization == "none":
        return dataclasses.replace(dit, dtype=precision)
    if precision == "fp8" and (model is None or dit.quantization == "fp8"):
        return dataclasses.replace(dit, quantization="fp8")
    if precision == "fp8":
        raise ConfigError(
            f"--precision: {model} is not quantised; make one that is with `streamdit quantize {model} DIR`"
        )
    raise ConfigError(f"--precision: the model is quantised to fp8; {precision} needs the one that it was made from")


def _dtypes(config: Config, part: str, tree: Any) -> list[jnp.dtype]:
    """Of each leaf on the device: the transformer's in its own precision, the others' in float32."""
    dtype = config.dit.compute_dtype if part == "dit" else jnp.dtype("float32")
    return [
        weights.converted_type(path_name(path), leaf.dtype, dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def random_params(config: Config, programs: Programs | None = None, seed: int = 0) -> dict[str, Any]:
    """Parameters for a clock, on the device, in the types that a pipeline holds. Unlike a fresh model's no gate is
    closed, so that a prompt reaches the picture. One block of normal numbers, repeated on the device: gigabytes take
    seconds. Quantised maps get values that use float8's range, and scales that make them as large as
    the others; no calibration is needed where nothing has been learnt.
    """
    block = np.random.default_rng(seed).standard_normal(2**20, np.float32)
    scales = {"kernel_scale": 1 / (SPREAD * np.sqrt(config.dit.width)), "input_scale": 1 / SPREAD}
    constant = {"scale": 1, "latent_std": 1, **scales}

    def fill(path, leaf, dtype):
        name = path[-1].key
        if name in constant:
            return jnp.full(leaf.shape, constant[name], dtype)
        scale = 0.1 if leaf.ndim < 2 or "bias" in name else 1 / np.sqrt(leaf.shape[-2])
        scale = SPREAD if name == QUANTIZED else scale
        if leaf.size > block.size:
            return _repeated(block, np.float32(scale), leaf.shape, dtype)
        return jnp.asarray((scale * block[: leaf.size]).astype(dtype).reshape(leaf.shape))

    params = {}
    for part, tree in parameters.shapes(config, programs).items():
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        filled = [fill(path, leaf, dtype) for (path, leaf), dtype in zip(paths, _dtypes(config, part, tree))]
        params[part] = jax.tree.unflatten(structure, filled)
    return params


@functools.partial(jax.jit, static_argnums=(2, 3))
def _repeated(block: jax.Array, scale: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    size = math.prod(shape)
    return jnp.tile(scale * block, -(-size // block.size))[:size].reshape(shape).astype(dtype)
