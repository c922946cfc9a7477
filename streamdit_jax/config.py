"""Configuration: ml_collections in, frozen dataclasses out; every mistake is a ConfigError that names the field.

A config file is Python with a `get_config()` that returns a ConfigDict. It runs as code: load only files you trust.
What a model directory stores is the same tree as JSON, which does not run. Each dataclass lists exactly the fields
that something reads; any other key is an error.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamdit_jax import partition
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import DiTConfig
from streamdit_jax.models.tae import TAEConfig
from streamdit_jax.models.text import TextConfig
from streamdit_jax.partition import PartitionScheme


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from: "roadtrip"; a folder of video files with captions; or records that `streamdit encode`
    wrote.

    clip_frames: frames of a stored clip; a training example is a random crop of it. height, width, frame_rate: what
        video is resampled to.
    num_clips, captions_per_clip: how much of the roadtrip world is rendered.
    autoencoder: a model, bundled or a directory, whose autoencoder is used instead of training one; "" for none.
    """

    source: str = "roadtrip"
    num_clips: int = 4096
    clip_frames: int = 80
    captions_per_clip: int = 8
    height: int = 64
    width: int = 64
    frame_rate: float = 16.0
    autoencoder: str = ""

    def __post_init__(self):
        for field in ("num_clips", "clip_frames", "captions_per_clip", "height", "width", "frame_rate"):
            _require(getattr(self, field) > 0, f"{field}: must be positive, not {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up. decay: cosine (to final_scale of the learning rate at the last step) | constant."""

    learning_rate: float
    warmup_steps: int = 100
    decay: str = "cosine"
    final_scale: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        _require(self.learning_rate > 0, f"learning_rate: must be positive, not {self.learning_rate}")
        _require(self.decay in ("cosine", "constant"), f"decay: {self.decay!r} is not one of cosine, constant")
        _require(self.warmup_steps >= 0, f"warmup_steps: must not be negative, not {self.warmup_steps}")
        _require(0 <= self.final_scale <= 1, f"final_scale: lies between 0 and 1, not at {self.final_scale}")
        _require(self.clip_norm > 0, f"clip_norm: must be positive, not {self.clip_norm}")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """The mixture of partition schemes of a training run (StreamDiT §3.2); see `partition.mixture`.

    entries: (scheme, weight) pairs, as ("N8c2s1", 1.0); training does not depend on the micro steps s.
    uniform_share: share of plain text-to-video. draw: a scheme per "example" or per "batch".
    shared_offset, ramp: shares of examples with one offset for all chunks, and of ramping-up buffers.
    """

    entries: tuple[tuple[str, float], ...]
    uniform_share: float = 0.0
    draw: str = "example"
    shared_offset: float = 0.5
    ramp: float = 0.0

    def __post_init__(self):
        _require(self.draw in ("example", "batch"), f"draw: {self.draw!r} is not one of example, batch")
        for index, (spelling, _) in enumerate(self.entries):
            try:
                PartitionScheme.parse(spelling)
            except ValueError as mistake:
                raise ValueError(f"entries.{index}: {mistake}") from None
        self.arrays()

    @property
    def schemes(self) -> tuple[PartitionScheme, ...]:
        return tuple(PartitionScheme.parse(spelling) for spelling, _ in self.entries)

    def arrays(self) -> partition.Mixture:
        """The mixture as arrays, data to a compiled step."""
        weighted = [(scheme, weight) for scheme, (_, weight) in zip(self.schemes, self.entries)]
        return partition.mixture(
            weighted, uniform_share=self.uniform_share, shared_offset=self.shared_offset, ramp=self.ramp
        )


@dataclasses.dataclass(frozen=True)
class AutoencoderObjective:
    """Weights of the autoencoder's losses; `image_share` of the examples count as one-frame videos (Movie Gen
    §3.1.1).
    """

    l1: float = 1.0
    mse: float = 2.0
    gradient: float = 0.5
    kl: float = 1e-4
    outlier: float = 1e-3
    outlier_radius: float = 3.0
    image_share: float = 0.25

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _require(
                getattr(self, field.name) >= 0, f"{field.name}: must not be negative, not {getattr(self, field.name)}"
            )
        _require(self.image_share <= 1, f"image_share: lies between 0 and 1, not at {self.image_share}")


@dataclasses.dataclass(frozen=True)
class FlowMatchingObjective:
    """Buffered flow matching over a mixture of partition schemes; captions are dropped for guidance at
    `caption_dropout`.
    """

    mixture: MixtureConfig
    caption_dropout: float = 0.1

    def __post_init__(self):
        _require(
            0 <= self.caption_dropout <= 1, f"caption_dropout: lies between 0 and 1, not at {self.caption_dropout}"
        )


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What every stage of training has. batch_size counts all devices; intervals are in steps, 0 for never.

    num_frames: frames of an example: of pixels for the autoencoder, of latents (the whole buffer) for the transformer.
    abort_after_nonfinite: so many non-finite steps in a row end the run; each is skipped and counted.
    """

    steps: int
    batch_size: int
    num_frames: int
    optimizer: OptimizerConfig
    ema_decay: float = 0.999
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = 0
    abort_after_nonfinite: int = 10

    def __post_init__(self):
        for field in (
            "steps",
            "batch_size",
            "num_frames",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "abort_after_nonfinite",
        ):
            _require(getattr(self, field) >= 1, f"{field}: must be at least 1, not {getattr(self, field)}")
        _require(
            self.optimizer.warmup_steps <= self.steps,
            f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is more than the stage's {self.steps} steps",
        )
        _require(self.sample_every >= 0, f"sample_every: must not be negative, not {self.sample_every}")
        _require(0 <= self.ema_decay < 1, f"ema_decay: lies from 0 to below 1, not at {self.ema_decay}")


@dataclasses.dataclass(frozen=True)
class AutoencoderStage(StageConfig):
    objective: AutoencoderObjective = AutoencoderObjective()


@dataclasses.dataclass(frozen=True)
class TextAlignmentStage(StageConfig):
    """Text encoders alone, so that a DiT finds something to read; see `training.text_alignment`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchingStage(StageConfig):
    """start_from: a model, bundled or a directory, whose text encoders and DiT are fine-tuned (§5.1); "" for none."""

    objective: FlowMatchingObjective
    start_from: str = ""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The stages of a run, in the order in which they run; a stage that is absent is skipped."""

    autoencoder: AutoencoderStage | None = None
    text_alignment: TextAlignmentStage | None = None
    flow_matching: FlowMatchingStage | None = None


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the model streams unless told otherwise. filling: uniform | ramp (StreamDiT §8, fig. 13)."""

    scheme: str
    guidance: float = 1.0
    filling: str = "uniform"

    def __post_init__(self):
        try:
            PartitionScheme.parse(self.scheme)
        except ValueError as mistake:
            raise ValueError(f"scheme: {mistake}") from None
        _require(self.filling in ("uniform", "ramp"), f"filling: {self.filling!r} is not one of uniform, ramp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; −1 takes what is left. See `sharding`."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = [getattr(self, field.name) for field in dataclasses.fields(self)]
        _require(
            all(size == -1 or size >= 1 for size in sizes), f"data: axes have at least 1 device, or −1; not {sizes}"
        )
        _require(sizes.count(-1) <= 1, f"data: only one axis can take what is left (−1), not {sizes.count(-1)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A model and how it is trained and sampled."""

    name: str
    tae: TAEConfig
    text: tuple[TextConfig, ...]
    dit: DiTConfig
    sampling: SamplingConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self):
        _require(len(self.text) > 0, "text: give at least one text encoder")
        frames, height, width, channels = self.dit.latent
        _require(
            channels == self.tae.latent_channels,
            f"dit.latent: {channels} channels, but tae.latent_channels is {self.tae.latent_channels}",
        )
        _, tall, wide = self.tae.compression
        for field, size, factor, latent in (
            ("height", self.data.height, tall, height),
            ("width", self.data.width, wide, width),
        ):
            _require(
                size == factor * latent,
                f"data.{field}: {size} pixels make {size / factor:g} latents after compression by {factor}, "
                f"but dit.latent has {latent}",
            )
        schemes = [("sampling.scheme", PartitionScheme.parse(self.sampling.scheme))]
        for field, stage in (
            ("training.text_alignment", self.training.text_alignment),
            ("training.flow_matching", self.training.flow_matching),
        ):
            if stage is None:
                continue
            if isinstance(stage, FlowMatchingStage):
                mixture = stage.objective.mixture
                schemes += [(f"{field}.objective.mixture.entries", scheme) for scheme in mixture.schemes]
            _require(
                stage.num_frames == frames,
                f"{field}.num_frames: {stage.num_frames}, but dit.latent has {frames} frames",
            )
        for field, scheme in schemes:
            _require(
                scheme.buffer_size == frames,
                f"{field}: {scheme} does not tile the buffer: it has {scheme.buffer_size} frames "
                f"and dit.latent {frames}",
            )

    def to_json(self) -> str:
        """The configuration as JSON, which `from_mapping` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def _convert(value: Any, annotation: Any, path: str) -> Any:
    """`value` as the annotated type, or a ConfigError that names `path`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(value, next(a for a in arguments if a is not type(None)), path)
    if dataclasses.is_dataclass(annotation):
        value = _plain(value)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected fields of {annotation.__name__}, not {value!r}")
        return _build(annotation, value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{path}: expected a sequence, not {value!r}")
        kinds = [arguments[0]] * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ConfigError(f"{path}: expected {len(kinds)} values, not the {len(value)} of {value!r}")
        return tuple(_convert(item, kind, f"{path}.{index}") for index, (item, kind) in enumerate(zip(value, kinds)))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {annotation.__name__}, not {value!r}")
    return value


def _build(cls: type, mapping: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"{cls.__name__} has {', '.join(fields)}"
            raise ConfigError(f"{prefix}{key}: nothing reads this key; {hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: missing, and {cls.__name__} has no default for it")
    values = {key: _convert(value, hints[key], f"{prefix}{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as mistake:
        raise ConfigError(f"{prefix}{mistake}") from None


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """A Config from a ConfigDict or from parsed JSON.

    Raises ConfigError, naming the field, for unknown, missing, ill-typed and impossible values; no device is touched.
    """
    return _build(Config, _plain(mapping), "")


def _plain(value: Any) -> Any:
    """A ConfigDict as a dict."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def from_arguments(arguments: Sequence[str]) -> Config:
    """A Config from `--config=FILE.py` (or `FILE.py:argument`) and overrides such as `--config.dit.width=128`.

    Raises ConfigError for a file that is missing or does not run, and for overrides of fields that the file does not
    have.
    """
    from absl import flags
    from ml_collections import config_flags

    given = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    if not given:
        raise ConfigError("--config: give a file, as --config=configs/roadtrip.py")
    file = given[-1].split(":")[0]
    if not Path(file).is_file():
        raise ConfigError(f"--config: there is no file {file}")
    values = flags.FlagValues()
    arguments = ["streamdit", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        unknown = values(arguments)[1:]
        config = None if unknown else _plain(values.config)
    except Exception as mistake:  # the file is a program: it may raise anything
        cause = mistake.__cause__ or mistake
        if isinstance(cause, KeyError | AttributeError) and len(arguments) > 2:
            name = str(cause).replace("\\n", " ").strip("'\" ").split("\n")[0]
            raise ConfigError(f"{file}: has no field {name}, so no override can set it; add it to the file") from None
        lines = [line.strip(" '\"") for line in str(cause).replace("\\n", "\n").splitlines() if line.strip()]
        raise ConfigError(f"{file}: {' '.join(lines[-3:]) or type(cause).__name__}") from None
    if unknown:
        raise ConfigError(f"{unknown[0]}: unknown argument; overrides look like --config.dit.width=128")
    return _build(Config, config, "")
