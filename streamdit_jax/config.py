"""Configuration: ml_collections in, frozen dataclasses out; every mistake is a ConfigError that names the field.

A config file is Python with a `get_config()` that returns a ConfigDict. It runs as code: load only files you trust.
What a model directory stores is the same tree as JSON, which does not run. Each dataclass lists exactly the fields
that something reads; any other key is an error.
"""

import contextlib
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamdit_jax.errors import ConfigError
from streamdit_jax.models.dit import DiTConfig
from streamdit_jax.models.tae import TAEConfig
from streamdit_jax.models.text import TextConfig
from streamdit_jax.partition import FILLINGS, PartitionScheme, Refill
from streamdit_jax.stages import TrainingConfig, require


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from: "roadtrip"; a folder of video files with captions; or records that `streamdit encode`
    wrote.

    clip_frames: frames of a stored clip; a training example is a random crop of it. height, width, frame_rate: what
        video is resampled to.
    frame_rate_prompt: captions and prompts begin with the frame rate of their video, "FPS-16 a red car" (Movie Gen
        §3.1.3).
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
    frame_rate_prompt: bool = False
    autoencoder: str = ""

    def __post_init__(self):
        for field in ("num_clips", "clip_frames", "captions_per_clip", "height", "width", "frame_rate"):
            require(getattr(self, field) > 0, f"{field}: must be positive, not {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the model streams unless told otherwise. filling: uniform | ramp | doubling (StreamDiT §8, fig. 13;
    `stream.filling_rows`). refill: when a buffer that was filled by doubling is filled anew, after a change of prompt
    (`partition.Refill`).
    """

    scheme: str
    guidance: float = 1.0
    filling: str = "uniform"
    refill: str = "0"

    def __post_init__(self):
        try:
            PartitionScheme.parse(self.scheme)
        except ValueError as mistake:
            raise ValueError(f"scheme: {mistake}") from None
        require(self.filling in FILLINGS, f"filling: {self.filling!r} is not one of {', '.join(FILLINGS)}")
        Refill.parse(self.refill)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; −1 takes what is left. slices: groups of devices that a slower network
    joins; the outermost part of `data` goes over them. See `sharding`.
    """

    data: int = -1
    fsdp: int = 1
    window: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        sizes = [self.data, self.fsdp, self.window, self.tensor]
        require(
            all(size == -1 or size >= 1 for size in sizes), f"data: axes have at least 1 device, or −1; not {sizes}"
        )
        require(sizes.count(-1) <= 1, f"data: only one axis can take what is left (−1), not {sizes.count(-1)}")
        require(self.slices >= 1, f"slices: must be at least 1, not {self.slices}")
        require(
            self.data == -1 or self.data % self.slices == 0,
            f"slices: {self.slices} slices do not divide a data axis of {self.data}; make it a multiple",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A model and how it is trained and sampled."""

    name: str
    tae: TAEConfig
    text: tuple[TextConfig, ...]
    dit: DiTConfig
    sampling: SamplingConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self):
        require(len(self.text) > 0, "text: give at least one text encoder")
        frames, height, width, channels = self.dit.latent
        require(
            channels == self.tae.latent_channels,
            f"dit.latent: {channels} channels, but tae.latent_channels is {self.tae.latent_channels}",
        )
        _, tall, wide = self.tae.compression
        for field, size, factor, latent in (
            ("height", self.data.height, tall, height),
            ("width", self.data.width, wide, width),
        ):
            require(
                size == factor * latent,
                f"data.{field}: {size} pixels make {size / factor:g} latents after compression by {factor}, "
                f"but dit.latent has {latent}",
            )
        schemes = [("sampling.scheme", PartitionScheme.parse(self.sampling.scheme))]
        flow_matching, distillation = self.training.flow_matching, self.training.distillation
        for field, stage in (("flow_matching", flow_matching), ("distillation", distillation)):
            if stage is not None:
                require(
                    stage.num_frames == frames,
                    f"training.{field}.num_frames: {stage.num_frames}, but dit.latent has {frames} frames",
                )
        if distillation is not None:
            require(
                bool(distillation.teacher) or flow_matching is not None,
                "training.distillation.teacher: names no model, and no stage flow_matching trains one; name one",
            )
            schemes.append(("training.distillation.scheme", PartitionScheme.parse(distillation.scheme)))
        if flow_matching is not None:
            self._check_mixture("training.flow_matching")
            self._check_buckets("training.flow_matching")
        for field, scheme in schemes:
            require(
                scheme.buffer_size == frames,
                f"{field}: {scheme} does not tile the buffer: it has {scheme.buffer_size} frames "
                f"and dit.latent {frames}",
            )

    def _check_mixture(self, field: str) -> None:
        stage, frames = self.training.flow_matching, self.dit.latent[0]
        lengths = {frames, *(bucket.latent[0] for bucket in stage.buckets.values())}
        *shorter, longest = sorted(lengths)
        known = f"{', '.join(map(str, shorter))} or {longest}" if shorter else f"{longest}"
        for scheme in stage.objective.mixture.schemes:
            require(
                scheme.buffer_size in lengths,
                f"{field}.objective.mixture.entries: {scheme} does not tile a buffer of {known} frames",
            )
        for length in lengths:
            try:
                stage.objective.mixture.arrays(length)
            except ValueError as mistake:
                raise ValueError(f"{field}.objective.mixture.{mistake}") from None
        sources = stage.train_text or stage.start_from or stage.text_from or self.training.text_alignment is not None
        require(
            bool(sources),
            f"{field}.train_text: False leaves text encoders untrained; give start_from, text_from or "
            "training.text_alignment",
        )

    def _check_buckets(self, field: str) -> None:
        for name, bucket in self.training.flow_matching.buckets.items():
            try:
                self.dit.at(bucket.latent)
            except ValueError as mistake:
                raise ValueError(f"{field}.buckets.{name}.latent: {str(mistake).removeprefix('latent: ')}") from None
            require(
                bool(bucket.source) or bucket.latent[1:] == self.dit.latent[1:3],
                f"{field}.buckets.{name}.source: missing; the stage's own data has only {self.dit.latent[1:3]} latents "
                f"of height and width, not {bucket.latent[1:]}",
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
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected names with their fields, not {value!r}")
        return {str(name): _convert(value[name], arguments[1], f"{path}.{name}") for name in sorted(value)}
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


def require_trainable(config: Config) -> None:
    """ConfigError for a configuration whose transformer is quantised: rounded weights have no use for a gradient."""
    if config.dit.quantization != "none":
        raise ConfigError(
            f"dit.quantization: {config.dit.quantization} is for inference; train with none, and quantise the result "
            "with `streamdit quantize`"
        )


def _plain(value: Any) -> Any:
    """A ConfigDict as a dict."""
    return value.to_dict() if hasattr(value, "to_dict") else value


@contextlib.contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Within, modules that lie there can be imported: a config builds on another as `from configs import other`."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(directory))


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
        with _importable(Path(file).resolve().parents[1]):
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
