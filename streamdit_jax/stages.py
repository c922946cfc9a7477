"""What a configuration says of training: its stages, their losses and their optimizer, as frozen dataclasses.

`config.py` reads them. Each lists exactly the fields that something reads; an impossible value is a ValueError that
begins with the field's name.
"""

import dataclasses

from streamdit_jax import partition
from streamdit_jax.partition import PartitionScheme

MAIN = "main"  # the bucket of a stage's own shape


def require(condition: bool, message: str) -> None:
    """ValueError with `message`, which begins with a field's name, unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What makes updates of gradients. name: adamw | muon (see `training.optimizer.make_optimizer`). decay: cosine (to
    final_scale of the learning rate at the last step) | constant. momentum: Muon's; b1, b2: Adam's.
    """

    learning_rate: float
    name: str = "adamw"
    warmup_steps: int = 100
    decay: str = "cosine"
    final_scale: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    momentum: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        require(self.learning_rate > 0, f"learning_rate: must be positive, not {self.learning_rate}")
        require(self.name in ("adamw", "muon"), f"name: {self.name!r} is not one of adamw, muon")
        require(self.decay in ("cosine", "constant"), f"decay: {self.decay!r} is not one of cosine, constant")
        require(self.warmup_steps >= 0, f"warmup_steps: must not be negative, not {self.warmup_steps}")
        require(0 <= self.final_scale <= 1, f"final_scale: lies between 0 and 1, not at {self.final_scale}")
        require(0 <= self.momentum < 1, f"momentum: lies in [0, 1), not at {self.momentum}")
        require(self.clip_norm > 0, f"clip_norm: must be positive, not {self.clip_norm}")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """The mixture of partition schemes of a training run (StreamDiT §3.2); see `partition.mixture`.

    entries: (scheme, weight) pairs, as ("N8c2s1", 1.0); training does not depend on the micro steps s. A batch whose
        clips have another length than the buffer takes the entries that tile it.
    uniform_share: share of plain text-to-video. uniform_levels: how its flow time is drawn, "uniform" or "logit_normal"
        (Movie Gen §3.1.2), wherever it comes from: an entry with N = 1 and K = 0 is plain text-to-video, too.
    draw: a scheme per "example" or per "batch".
    shared_offset, ramp: shares of examples with one offset for all chunks, and of ramping-up buffers.
    """

    entries: tuple[tuple[str, float], ...]
    uniform_share: float = 0.0
    uniform_levels: str = "uniform"
    draw: str = "example"
    shared_offset: float = 0.5
    ramp: float = 0.0

    def __post_init__(self):
        require(self.draw in ("example", "batch"), f"draw: {self.draw!r} is not one of example, batch")
        require(
            self.uniform_levels in ("uniform", "logit_normal"),
            f"uniform_levels: {self.uniform_levels!r} is not one of uniform, logit_normal",
        )
        for index, (spelling, _) in enumerate(self.entries):
            try:
                PartitionScheme.parse(spelling)
            except ValueError as mistake:
                raise ValueError(f"entries.{index}: {mistake}") from None
        require(len(self.entries) > 0, "entries: a mixture needs at least one scheme")
        for frames in {scheme.buffer_size for scheme in self.schemes}:
            self.arrays(frames)

    @property
    def schemes(self) -> tuple[PartitionScheme, ...]:
        return tuple(PartitionScheme.parse(spelling) for spelling, _ in self.entries)

    def arrays(self, frames: int) -> partition.Mixture:
        """The mixture of the schemes that tile `frames` frames, as arrays: data to a compiled step.

        A single frame needs no entry: there is one way to divide it. ValueError where no scheme tiles another length.
        """
        weighted = [
            (scheme, weight) for scheme, (_, weight) in zip(self.schemes, self.entries) if scheme.buffer_size == frames
        ]
        if frames == 1 and not weighted:
            weighted = [(PartitionScheme(0, 1, 1, 1), 1.0)]
        require(len(weighted) > 0, f"entries: no scheme tiles a buffer of {frames} frames; add one")
        return partition.mixture(
            weighted,
            uniform_share=self.uniform_share,
            logit_normal=self.uniform_levels == "logit_normal",
            shared_offset=self.shared_offset,
            ramp=self.ramp,
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
            require(
                getattr(self, field.name) >= 0, f"{field.name}: must not be negative, not {getattr(self, field.name)}"
            )
        require(self.image_share <= 1, f"image_share: lies between 0 and 1, not at {self.image_share}")


@dataclasses.dataclass(frozen=True)
class FlowMatchingObjective:
    """Buffered flow matching over a mixture of partition schemes; captions are dropped for guidance at
    `caption_dropout`. switch_share: of the examples, those whose first frames are another clip's, as after a change of
    prompt (`training.flow_matching.splice`).
    """

    mixture: MixtureConfig
    caption_dropout: float = 0.1
    switch_share: float = 0.0

    def __post_init__(self):
        for name in ("caption_dropout", "switch_share"):
            require(0 <= getattr(self, name) <= 1, f"{name}: lies between 0 and 1, not at {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What every stage of training has. batch_size counts all devices; intervals are in steps, 0 for never.

    num_frames: frames of an example: of pixels for the autoencoder, of latents (the whole buffer) for the transformer.
    accumulate: the parts of a batch that go through one after another; the update takes the mean of their gradients.
    abort_after_nonfinite: so many non-finite steps in a row end the run; each is skipped and counted.
    hang_seconds: how long a step, a save or sampling may take before the run counts as hanging, and ends to be started
        again; a process that says nothing at all is given 80 s at most.
    """

    steps: int
    batch_size: int
    num_frames: int
    optimizer: OptimizerConfig
    ema_decay: float = 0.999
    accumulate: int = 1
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = 0
    abort_after_nonfinite: int = 10
    hang_seconds: float = 1800.0

    def __post_init__(self):
        for field in (
            "steps",
            "batch_size",
            "num_frames",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "abort_after_nonfinite",
        ):
            require(getattr(self, field) >= 1, f"{field}: must be at least 1, not {getattr(self, field)}")
        require(
            self.batch_size % self.accumulate == 0,
            f"accumulate: {self.accumulate} does not divide a batch_size of {self.batch_size}",
        )
        require(
            self.optimizer.warmup_steps <= self.steps,
            f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is more than the stage's {self.steps} steps",
        )
        require(self.hang_seconds > 0, f"hang_seconds: must be positive, not {self.hang_seconds}")
        require(self.sample_every >= 0, f"sample_every: must not be negative, not {self.sample_every}")
        require(0 <= self.ema_decay < 1, f"ema_decay: lies from 0 to below 1, not at {self.ema_decay}")

    def batch_sizes(self) -> dict[str, int]:
        """The sizes of the batches that the stage's step takes, by the name of their field."""
        return {"batch_size": self.batch_size}

    def buckets_by_name(self) -> dict[str, "BucketConfig"]:
        """Batches of other shapes than the stage's own; only flow matching has them."""
        return {}


def _require_company(field: str, share: float, examples: int) -> None:
    """ValueError where clips that begin as another one have no other one beside them."""
    require(
        share == 0 or examples > 1,
        f"{field}: {share} of the clips begin as another clip of the same part of a batch, which has only one; use a "
        "larger batch_size, a smaller accumulate, or 0",
    )


@dataclasses.dataclass(frozen=True)
class AutoencoderStage(StageConfig):
    """importance_power: a finished channel's scale is (what one deviation of it changes in the picture)^power; 0 gives
    every channel deviation 1, 0.5 makes distances between latents those between pictures. See
    `training.autoencoder.weigh_channels`.
    """

    objective: AutoencoderObjective = AutoencoderObjective()
    importance_power: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.importance_power <= 1, f"importance_power: from 0 to 1, not {self.importance_power}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextAlignmentStage(StageConfig):
    """Text encoders alone, so that a DiT finds something to read; see `training.text_alignment`.

    start_from: a model, bundled or a directory, whose text encoders learn on; "" for fresh ones.
    keep: how much they hold on to the encodings that they had there, which a DiT may already read.
    """

    start_from: str = ""
    keep: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(self.keep >= 0, f"keep: must not be negative, not {self.keep}")
        require(self.keep == 0 or bool(self.start_from), "keep: there is nothing to hold on to; give start_from")


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """Batches of another shape than the stage's own, trained on beside them (Movie Gen §3.2.1).

    latent: (frames, height, width) of the latents, none above `dit.latent`; (1, height, width) is an image.
    batch_size: of all devices. share: of the steps; the stage's own shape has what is left.
    source: records of latents of this size; "" cuts shorter clips, so also single frames, out of the stage's own data.
    """

    latent: tuple[int, int, int]
    batch_size: int
    share: float
    source: str = ""

    def __post_init__(self):
        require(min(self.latent) >= 1, f"latent: every size must be at least 1, not {self.latent}")
        require(self.batch_size >= 1, f"batch_size: must be at least 1, not {self.batch_size}")
        require(0 < self.share < 1, f"share: lies between 0 and 1, not at {self.share}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatchingStage(StageConfig):
    """start_from: a model, bundled or a directory, whose text encoders and DiT are fine-tuned (§5.1); "" for none. It
    may have a shorter buffer: training on images comes first (`training.flow_matching.lengthen`).
    text_from: a model whose text encoders are taken instead, for a DiT that begins anew or elsewhere.
    train_text: whether the text encoders learn too; they must come from somewhere if not.
    buckets: batches of other shapes, by a name of their own.
    """

    objective: FlowMatchingObjective
    start_from: str = ""
    text_from: str = ""
    train_text: bool = True
    buckets: dict[str, BucketConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        for name, bucket in self.buckets.items():
            require(name != MAIN, f"buckets.{name}: this is the name of the stage's own shape; choose another")
            require(
                bucket.batch_size % self.accumulate == 0,
                f"buckets.{name}.batch_size: accumulate = {self.accumulate} does not divide {bucket.batch_size}",
            )
        sizes = [self.batch_size, *(bucket.batch_size for bucket in self.buckets.values() if bucket.latent[0] > 1)]
        _require_company("objective.switch_share", self.objective.switch_share, min(sizes) // self.accumulate)
        shares = sum(bucket.share for bucket in self.buckets.values())
        require(shares < 1, f"buckets: their shares make {shares:g}; the stage's own shape needs some of the steps")

    def buckets_by_name(self) -> dict[str, BucketConfig]:
        return {name: self.buckets[name] for name in sorted(self.buckets)}

    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The buckets' (frames, height, width) of latents, each once."""
        return tuple(sorted({bucket.latent for bucket in self.buckets.values()}))

    def shares(self) -> dict[str, float]:
        """Of the steps, by bucket; the stage's own shape first, the others by name."""
        named = {name: bucket.share for name, bucket in self.buckets_by_name().items()}
        return {MAIN: 1 - sum(named.values()), **named}

    def batch_sizes(self) -> dict[str, int]:
        others = {f"buckets.{name}.batch_size": bucket.batch_size for name, bucket in self.buckets_by_name().items()}
        return super().batch_sizes() | others


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationStage(StageConfig):
    """Multistep distillation (StreamDiT §4.2); see `distill`.

    teacher: a model, bundled or a directory, or "" for what this run has trained so far; the student starts as it and
        shares its text encoders.
    scheme: the student's, such as N8c2s1. teacher_steps: steps of the teacher for each of the student's.
    guidance: the teacher's. method: segment | consistency. rollout_share: share of the inputs that are states of the
        student's own streaming after up to `rollout_chunks` chunks. uniform_share, ramp_share, doubling_share: shares
        of the others that are buffers at one level, buffers that ramp up, and buffers that double (`stream`).
    switch_share: as in flow matching.
    """

    scheme: str
    teacher_steps: int
    guidance: float
    teacher: str = ""
    method: str = "segment"
    uniform_share: float = 0.25
    ramp_share: float = 0.0
    doubling_share: float = 0.0
    rollout_share: float = 0.25
    rollout_chunks: int = 4
    switch_share: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        try:
            scheme = PartitionScheme.parse(self.scheme)
        except ValueError as mistake:
            raise ValueError(f"scheme: {mistake}") from None
        require(self.method in ("segment", "consistency"), f"method: {self.method!r} is not segment or consistency")
        for field in ("teacher_steps", "rollout_chunks"):
            require(getattr(self, field) >= 1, f"{field}: must be at least 1, not {getattr(self, field)}")
        for field in ("uniform_share", "ramp_share", "doubling_share", "rollout_share", "switch_share"):
            require(0 <= getattr(self, field) <= 1, f"{field}: lies between 0 and 1, not at {getattr(self, field)}")
        filling = sum(self.filling_shares().values())
        require(
            filling <= 1,
            f"ramp_share: with uniform_share and doubling_share it makes {filling:g} of the inputs; at most 1",
        )
        for field in ("ramp_share", "doubling_share"):
            require(
                getattr(self, field) == 0 or scheme.num_chunks > 1,
                f"{field}: {self.scheme} is one chunk, which is noise when a stream begins; set it to 0",
            )
        _require_company("switch_share", self.switch_share, self.batch_size // self.accumulate)

    def filling_shares(self) -> dict[str, float]:
        """Of the inputs that the student did not make itself, by filling; the rest is at the levels of streaming."""
        return {"uniform": self.uniform_share, "ramp": self.ramp_share, "doubling": self.doubling_share}


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The stages of a run, in the order in which they run; a stage that is absent is skipped."""

    autoencoder: AutoencoderStage | None = None
    text_alignment: TextAlignmentStage | None = None
    flow_matching: FlowMatchingStage | None = None
    distillation: DistillationStage | None = None
