"""What is measured: a model on disk, or a configuration with random weights."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import machine, weights
from streamdit_jax.config import Config, from_arguments, from_mapping
from streamdit_jax.errors import ConfigError
from streamdit_jax.pipeline import Pipeline, find_model, initialise, load

PRECISIONS = ("auto", "float32", "bfloat16")
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
            "precision": str(self.config.dit.compute_dtype),
            "scheme": sampling.scheme,
            "guidance": sampling.guidance,
            "filling": sampling.filling,
        }

    def pipeline(self) -> Pipeline:
        """Its weights on the device. ConfigError where they do not fit."""
        self.require_memory(sum(self.parameter_bytes().values()), "its parameters")
        if self.model is None:
            return Pipeline(self.config, random_params(self.config), "random")
        if self.config == load_config(self.model):
            return load(self.model)
        directory = find_model(self.model)
        card = weights.load_card(directory)
        params = {part: weights.load_part(directory, card, part) for part in ("tae", "text", "dit")}
        return Pipeline(self.config, params, "measured")

    def shapes(self) -> dict[str, Any]:
        """Shapes of the parameters of each part; nothing is computed."""
        return jax.eval_shape(lambda: initialise(self.config, jax.random.key(0)))

    def parameter_bytes(self) -> dict[str, int]:
        """Bytes of each part's parameters on the device: the transformer's in its own precision, the others' in
        float32.
        """
        size = {"dit": self.config.dit.compute_dtype.itemsize}
        return {
            part: size.get(part, 4) * sum(leaf.size for leaf in jax.tree.leaves(tree))
            for part, tree in self.shapes().items()
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
    return from_mapping(weights.load_card(find_model(model))["config"])


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
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    config = from_arguments(overrides) if model is None else load_config(model)
    changes = {"scheme": scheme, "guidance": guidance, "filling": filling}
    try:
        sampling = dataclasses.replace(
            config.sampling, **{name: value for name, value in changes.items() if value is not None}
        )
        dit = config.dit if precision == "auto" else dataclasses.replace(config.dit, dtype=precision)
        return Subject(dataclasses.replace(config, sampling=sampling, dit=dit), model)
    except ValueError as mistake:
        raise ConfigError(f"--{str(mistake).removeprefix('sampling.')}") from None


def random_params(config: Config, seed: int = 0) -> dict[str, Any]:
    """Parameters for a clock, on the device, the transformer's in its own precision. Unlike a fresh model's no gate is
    closed, so that a prompt reaches the picture. One block of normal numbers, repeated: nothing has to be compiled, and
    gigabytes take seconds.
    """
    block = np.random.default_rng(seed).standard_normal(2**20, np.float32)

    def fill(path, leaf, dtype):
        name = path[-1].key
        if name in ("scale", "latent_std"):
            return jnp.ones(leaf.shape, dtype)
        scale = 0.1 if leaf.ndim < 2 or "bias" in name else 1 / np.sqrt(leaf.shape[-2])
        return jnp.asarray(np.resize((scale * block).astype(dtype), leaf.shape))

    shapes = jax.eval_shape(lambda: initialise(config, jax.random.key(0)))
    return {
        part: jax.tree_util.tree_map_with_path(
            functools.partial(fill, dtype=config.dit.compute_dtype if part == "dit" else jnp.dtype("float32")), tree
        )
        for part, tree in shapes.items()
    }
