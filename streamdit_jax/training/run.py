"""A configuration's stages, one after another, through the one loop: data → autoencoder → latents → text encoder +
DiT → a model on disk.

    WORKDIR/data/…            the rendered roadtrip, or ingested video, if the configuration's source is one of these
    WORKDIR/latents           clips as latents, made once, by the finished autoencoder
    WORKDIR/<stage>/…         checkpoints, metrics.jsonl, TensorBoard events, samples
    WORKDIR/model             model.json and weights; `streamdit stream --model=WORKDIR` loads it

Each step looks for what it would make and goes on from there, so that a run that was stopped is continued by the same
command.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from streamdit_jax import distributed, sharding, weights
from streamdit_jax.config import Config, require_trainable
from streamdit_jax.data import encode, records, video
from streamdit_jax.data.roadtrip_builder import prepare_roadtrip
from streamdit_jax.errors import CheckpointError, ConfigError, DataError
from streamdit_jax.machine import hardware, versions
from streamdit_jax.models.tae import TAE
from streamdit_jax.models.text import tokenize
from streamdit_jax.parameters import initialise
from streamdit_jax.pipeline import Pipeline
from streamdit_jax.stages import StageConfig
from streamdit_jax.training import agreement
from streamdit_jax.training.abstract import abstract_batches
from streamdit_jax.training.autoencoder import autoencoder, latent_statistics, weigh_channels
from streamdit_jax.training.buckets import stage_batches
from streamdit_jax.training.distillation import distillation
from streamdit_jax.training.flow_matching import flow_matching, lengthen, max_tokens
from streamdit_jax.training.loop import run_stage
from streamdit_jax.training.objective import Objective
from streamdit_jax.training.text_alignment import text_alignment
from streamdit_jax.training.watch import Watch

INITIAL_CLIPS = 192
STATISTICS_CLIPS = 256
IMPORTANCE_CLIPS = 16
SAMPLE_SECONDS = 4
SAMPLE_PROMPTS = (
    "a red car drives past green hills on a sunny day",
    "a blue bus drives slowly to the left through the city at night",
    "a yellow truck drives fast to the right through the desert at sunset in the rain",
)
ENCODE_BATCH = 8


def open_source(config: Config, workdir: Path, log=print) -> records.Records:
    """The clips to train on: rendered, ingested or opened. DataError, naming it, for a source that is none of these."""
    data, source = config.data, Path(config.data.source)
    if data.source == "roadtrip":
        if jax.process_index() > 0:
            agreement.gather("")  # process 0 renders; the others then find what it made
        directory = prepare_roadtrip(
            workdir / "data", data.num_clips, data.clip_frames, data.captions_per_clip, config.seed, data.height
        )
        if jax.process_index() == 0:
            agreement.gather("")
        return records.open_records(directory)
    if not source.is_dir():
        raise DataError(f'{source}: data.source is neither "roadtrip" nor a directory')
    if encode.is_video_folder(source):
        pixels = workdir / "data" / "video"
        if _is_missing(pixels):
            log(f"reading the videos of {source}")
            encode.ingest(
                source,
                pixels,
                height=data.height,
                width=data.width,
                frame_rate=data.frame_rate,
                clip_frames=data.clip_frames,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        source = pixels
    return records.open_records(source)


def encode_records(config: Config, tae_params: Any, source: records.Records, out: Path, log=print) -> records.Records:
    """The clips of `source` as latents in `out`, made once, by all processes. `out` must not hold something else."""
    if _is_missing(out):
        log(f"encoding {len(source)} clips to latents")
        apply = jax.jit(lambda params, clips: TAE(config.tae).apply({"params": params}, clips, method=TAE.encode)[0])
        encode.encode(
            source.directory,
            out,
            lambda clips: np.asarray(apply(tae_params, distributed.over_local_devices(clips))),
            batch_size=ENCODE_BATCH,
            metadata={"autoencoder": _digest(tae_params)},
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    return records.open_records(out)


def _is_missing(directory: Path) -> bool:
    """Whether records are still to be made; process 0 looks, so that all processes do the same."""
    return agreement.gather(str(not directory.exists()))[0] == "True"


def _digest(params: Any) -> str:
    """Of an autoencoder's parameters: latents of another one are not gone on with."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def train(config: Config, workdir: str | Path, command: str = "", log=print) -> Path:
    """Runs the configuration's stages and returns the directory of the finished model.

    Raises ConfigError before any device work for stages that the data cannot feed, DataError for the data,
    CheckpointError for checkpoints that do not fit or are damaged. SIGTERM and Ctrl-C: see `training.watch`.
    """
    require_trainable(config)
    workdir, stages = Path(workdir), config.training
    if all(getattr(stages, field.name) is None for field in dataclasses.fields(stages)):
        names = ", ".join(field.name for field in dataclasses.fields(stages))
        raise ConfigError(f"training: has no stage; give one of {names}")
    with Watch() as watch:
        agreement.require_same({**json.loads(config.to_json()), "versions": versions()})
        return _train(config, workdir, command, watch, log)


def _train(config: Config, workdir: Path, command: str, watch: Watch, log) -> Path:
    stages = config.training
    _require_models(config)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    source = open_source(config, workdir, log)
    model = workdir / "model"
    parts = _finished_parts(model)
    card = {"command": command, "seed": config.seed, "hardware": hardware(), "versions": versions(), "stages": {}}
    if (model / weights.MODEL_FILE).exists():
        card["stages"] = weights.load_card(model)["card"].get("stages", {})

    if config.data.autoencoder:
        parts["tae"] = _borrowed_autoencoder(config)
    elif stages.autoencoder is not None and not _is_finished(card, "autoencoder", stages.autoencoder):
        if source.kind != "pixels":
            raise ConfigError(f"training.autoencoder: needs pixels, but {config.data.source} holds {source.kind}")
        objective = _from_many_clips(
            autoencoder(config.tae, stages.autoencoder.objective, config.dit.compute_dtype), config, source
        )
        state, facts = _run(
            config, "autoencoder", stages.autoencoder, objective, source, workdir, mesh, None, watch, log
        )
        tae = distributed.gather(state.ema_params["tae"])
        videos = (source[int(index)]["video"][None] for index in _spread(len(source), STATISTICS_CLIPS))
        tae = latent_statistics(tae, videos, config.tae)
        if stages.autoencoder.importance_power:
            videos = (source[int(index)]["video"][None] for index in _spread(len(source), IMPORTANCE_CLIPS))
            tae = weigh_channels(tae, videos, config.tae, stages.autoencoder.importance_power)
        parts["tae"] = distributed.from_first(tae)
        card["stages"]["autoencoder"] = facts
        _save(model, config, parts, card)

    latents = None
    for name in ("text_alignment", "flow_matching", "distillation"):
        stage = getattr(stages, name)
        if stage is None or _is_finished(card, name, stage):
            continue
        if latents is None:
            latents = _latents(config, parts, source, workdir, log)
        if name == "text_alignment":
            objective, sample = aligned(config), None
        else:
            objective = _started(config, parts) if name == "flow_matching" else _distilled(config, parts)
            sample = _sampler(config, parts, workdir / name) if "tae" in parts else None
        state, facts = _run(config, name, stage, objective, latents, workdir, mesh, sample, watch, log)
        parts |= {part: distributed.gather(tree) for part, tree in state.ema_params.items() if part != "head"}
        card["stages"][name] = facts
        _save(model, config, parts, card)
    return model


def _from_many_clips(objective: Objective, config: Config, source: records.Records) -> Objective:
    """The objective, initialised from a little of many clips: principal components of one batch would be those of a
    few scenes.
    """
    frames = min(config.tae.compression[0], source.shape[0])
    videos = np.stack([source[int(index)]["video"][:frames] for index in _spread(len(source), INITIAL_CLIPS)])
    return dataclasses.replace(objective, first_batch={"video": videos})


def _spread(total: int, wanted: int) -> np.ndarray:
    """Up to `wanted` indices, evenly over `total`."""
    return np.linspace(0, total - 1, min(total, wanted)).astype(int)


def _latents(config: Config, parts: dict, source: records.Records, workdir: Path, log) -> records.Records:
    """The clips as latents: the source itself, or what the run's autoencoder makes of its pixels."""
    if source.kind == "latents":
        return source
    if "tae" not in parts:
        raise ConfigError(
            f"training.autoencoder: missing, and {workdir / 'model'} holds no trained autoencoder "
            f"to encode {config.data.source} with"
        )
    return encode_records(config, parts["tae"], source, workdir / "latents", log)


def _started(config: Config, parts: dict) -> Objective:
    """Flow matching that starts from the text encoders of an earlier stage, or from the parts of named models."""
    stage = config.training.flow_matching
    initial = jax.tree.map(lambda x: np.asarray(x, np.float32), {"text": parts["text"]} if "text" in parts else {})
    of_model = ("dit",) if stage.text_from else ("text", "dit")
    for field, wanted in (("start_from", of_model), ("text_from", ("text",))):
        if named := getattr(stage, field):
            initial |= _parts_of(_named_model(f"training.flow_matching.{field}", named), config, wanted)
    if not stage.train_text:
        parts["text"] = initial["text"]
    frozen = None if stage.train_text else initial["text"]
    objective = flow_matching(config, stage.objective, text_params=frozen, buckets=stage.shapes())
    if not initial:
        return objective
    tokens, mask = tokenize("", max_tokens(config.text))
    batch = {"tokens": tokens[None], "text_mask": mask[None], "initial": initial}
    return dataclasses.replace(objective, first_batch=batch)


def aligned(config: Config) -> Objective:
    """Alignment of fresh text encoders, or of those of the model that the stage names."""
    stage = config.training.text_alignment
    if not stage.start_from:
        return text_alignment(config)
    directory = _named_model("training.text_alignment.start_from", stage.start_from)
    initial = _parts_of(directory, config, ("text",))
    objective = text_alignment(config, initial["text"] if stage.keep else None, stage.keep)
    tokens, mask = tokenize("", max_tokens(config.text))
    latents = np.zeros((1, *config.dit.latent), np.float32)
    batch = {"tokens": tokens[None], "text_mask": mask[None], "latents": latents}
    return dataclasses.replace(objective, first_batch=batch | {"initial": initial})


def _distilled(config: Config, parts: dict) -> Objective:
    """Distillation of the teacher that the stage names, or of what the run has made; text encoders stay as they are."""
    named = config.training.distillation.teacher
    directory = _named_model("training.distillation.teacher", named) if named else None
    teacher = parts if directory is None else _parts_of(directory, config, ("text", "dit"))
    parts["text"] = teacher["text"]
    return distillation(config, config.training.distillation, teacher)


def _require_models(config: Config) -> None:
    """ConfigError where a model that the run starts from is not there: said before any data are made."""
    stages = config.training
    text, flow, student = stages.text_alignment, stages.flow_matching, stages.distillation
    named = {"data.autoencoder": config.data.autoencoder}
    if text is not None:
        named["training.text_alignment.start_from"] = text.start_from
    if flow is not None:
        named |= {f"training.flow_matching.{field}": getattr(flow, field) for field in ("start_from", "text_from")}
    if student is not None:
        named["training.distillation.teacher"] = student.teacher
    for field, name in named.items():
        if name:
            _named_model(field, name)


def _named_model(field: str, name: str) -> Path:
    """The directory of the model that a field names. ConfigError, naming the field, where there is none."""
    try:
        return weights.find_model(name)
    except CheckpointError as missing:
        raise ConfigError(f"{field}: {missing}") from None


def _parts_of(directory: Path, config: Config, names: tuple[str, ...]) -> dict[str, Any]:
    """Parts of a model as float32, checked against the shapes of this configuration; a DiT's buffer may be shorter."""
    described = weights.load_card(directory)
    expected = jax.eval_shape(lambda key: initialise(config, key), jax.random.key(0))
    parts = {name: weights.load_part(directory, described, name) for name in names}
    if "dit" in parts:
        parts["dit"] = lengthen(parts["dit"], expected["dit"])
    for name, tree in parts.items():
        weights.check_shapes(tree, expected[name], f"{directory}: {name}")
    return jax.tree.map(lambda x: np.asarray(x, np.float32), parts)


def _sampler(config: Config, parts: dict, folder: Path):
    """Writes streams of the parameters at hand."""

    def sample(step, params):
        params = distributed.gather(params)
        if jax.process_index() == 0:
            write_samples(config, {**parts, **params}, folder / "samples" / f"step_{step:07d}")

    return sample


def _is_finished(card: dict, name: str, stage: StageConfig) -> bool:
    """Whether a model's card says that a stage had all of its steps; a configuration with more of them goes on."""
    return card["stages"].get(name, {}).get("steps", 0) >= stage.steps


def _borrowed_autoencoder(config: Config) -> dict[str, Any]:
    """The autoencoder of the model that `data.autoencoder` names. ConfigError where it is of another shape."""
    directory = _named_model("data.autoencoder", config.data.autoencoder)
    described = weights.load_card(directory)
    theirs = described["config"].get("tae")
    if theirs != json.loads(config.to_json())["tae"]:
        raise ConfigError(f"data.autoencoder: the one of {directory} has the shape {theirs}, not that of tae")
    return jax.tree.map(lambda x: np.asarray(x, np.float32), weights.load_part(directory, described, "tae"))


def _finished_parts(model: Path) -> dict[str, Any]:
    if not (model / weights.MODEL_FILE).exists():
        return {}
    card = weights.load_card(model)
    return {part: weights.load_part(model, card, part) for part in card["parts"]}


def _save(model: Path, config: Config, parts: dict, card: dict) -> None:
    if jax.process_index() == 0:
        weights.save_model(model, json.loads(config.to_json()), parts, card)


def _run(config, name: str, stage: StageConfig, objective, source, workdir, mesh, sample_fn, watch, log):
    """One stage through the loop; its state, and the facts of it for the model's card."""
    began = time.monotonic()
    state = run_stage(
        objective,
        stage,
        stage_batches(config, name, source),
        workdir / name,
        seed=config.seed,
        mesh=mesh,
        batches=tuple(abstract_batches(config, name).values()),
        config_json=json.loads(config.to_json()),
        sample_fn=sample_fn,
        watch=watch,
        log=log,
    )
    facts = {
        "steps": int(state.step),
        "batch_size": stage.batch_size,
        "skipped_steps": int(state.nonfinite_count),
        "seconds_of_last_start": round(time.monotonic() - began, 1),
        "clips": len(source),
        "finished": time.strftime("%Y-%m-%d"),
    }
    return state, facts


def write_samples(config: Config, params: dict, folder: Path) -> None:
    """Streams a few prompts with the model's own sampling into MP4 files."""
    pipeline = Pipeline(config, params)
    folder.mkdir(parents=True, exist_ok=True)
    frames_wanted = int(SAMPLE_SECONDS * config.data.frame_rate)
    for index, prompt in enumerate(SAMPLE_PROMPTS):
        stream, frames = pipeline.stream(prompt, seed=index), []
        while sum(map(len, frames)) < frames_wanted:
            frames.append(next(stream))
        video.write_video(folder / f"{index}.mp4", np.concatenate(frames)[:frames_wanted], config.data.frame_rate)
