"""Joint training on images and videos: each bucket compiled once, exact resume, and data of each bucket's own."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from streamdit_jax import sharding
from streamdit_jax.config import from_mapping
from streamdit_jax.data.records import write_records
from streamdit_jax.errors import ConfigError, DataError
from streamdit_jax.models.text import tokenize
from streamdit_jax.stages import BucketConfig, FlowMatchingObjective, FlowMatchingStage, MixtureConfig, OptimizerConfig
from streamdit_jax.training import program
from streamdit_jax.training.abstract import abstract_batches, abstract_objective
from streamdit_jax.training.buckets import stage_batches
from streamdit_jax.training.flow_matching import flow_matching
from streamdit_jax.training.loop import run_stage
from streamdit_jax.training.metrics import read_metrics
from streamdit_jax.training.run import train

BUCKETS = {"images": BucketConfig((1, 4, 4), 8, 0.4), "wide": BucketConfig((4, 2, 4), 4, 0.2, "")}


def configured(tiny, wide=None, **fields):
    """The tiny model with its own clips, images cut from them, and perhaps wide clips from a source of their own."""
    buckets = {"images": BUCKETS["images"]}
    if wide is not None:
        buckets["wide"] = dataclasses.replace(BUCKETS["wide"], source=str(wide))
    mixture = MixtureConfig((("N4c2s1", 1.0), *([("N2c2s1", 1.0)] if wide else [])), uniform_levels="logit_normal")
    stage = FlowMatchingStage(
        **{
            "steps": 30,
            "batch_size": 4,
            "num_frames": 8,
            "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=5, decay="constant"),
            "objective": FlowMatchingObjective(mixture),
            "buckets": buckets,
            "log_every": 1,
            "checkpoint_every": 15,
            **fields,
        }
    )
    return dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, flow_matching=stage))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Clips of 10 latent frames in the model's own shape, and of 4 in the wide one; each clip is one constant."""
    made = {}
    for name, shape in (("own", (10, 4, 4, 4)), ("wide", (4, 2, 4, 4))):
        clips = ({"latents": np.full(shape, i / 4 - 1), "captions": [f"clip {i}"]} for i in range(8))
        directory = tmp_path_factory.mktemp("latents") / name
        made[name] = write_records(directory, clips, "latents", {"frame_rate": 16.0})
    return made


def run(config, source, workdir, log=lambda _: None, make_batches=None):
    stage = config.training.flow_matching
    return run_stage(
        flow_matching(config, stage.objective, buckets=stage.shapes()),
        stage,
        make_batches or stage_batches(config, "flow_matching", source),
        workdir,
        seed=config.seed,
        mesh=sharding.make_mesh({"data": -1}, jax.devices()[:1]),
        batches=tuple(abstract_batches(config, "flow_matching").values()),
        log=log,
    )


@pytest.fixture(scope="module")
def trained(tiny, sources, tmp_path_factory):
    config, lines = configured(tiny), []
    workdir, lowered = tmp_path_factory.mktemp("run"), []
    lower = program.Program.lower
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.Program, "lower", lambda *a: lowered.append(program.shapes_of(a[3])) or lower(*a))
        state = run(config, sources["own"], workdir, lines.append)
    return config, workdir, state, lines, lowered


@pytest.mark.slow
def test_each_bucket_compiles_once_and_the_loss_falls(trained):
    _, workdir, _, lines, lowered = trained
    assert len(lowered) == len(set(lowered)) == 2
    assert any("compiled for 2 shapes of batch" in line for line in lines)
    metrics = read_metrics(workdir)
    losses = [line["loss"] for line in metrics]
    assert len(losses) == 30 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_training_on_buckets_resumes_exactly(trained, sources, tmp_path):
    """Law 2, with one integer for the data of all buckets."""
    config, _, straight, _, _ = trained
    half = dataclasses.replace(config.training.flow_matching, steps=15)
    stopped = dataclasses.replace(config, training=dataclasses.replace(config.training, flow_matching=half))
    run(stopped, sources["own"], tmp_path)
    resumed = run(config, sources["own"], tmp_path)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_a_batch_of_another_shape_is_refused(tiny, sources, tmp_path):
    config = configured(tiny)
    good = stage_batches(config, "flow_matching", sources["own"])

    def batches(first_step):
        for batch in good(first_step):
            yield {**batch, "latents": batch["latents"][:, :1, :2]}

    with pytest.raises(
        DataError, match=r"batch 0 is .*'latents': 'float32\[\d, 1, 2, 4, 4\]'.* but the step is compiled"
    ):
        run(config, sources["own"], tmp_path, make_batches=batches)


def test_each_bucket_reads_its_own_data(tiny, sources):
    config = configured(tiny, sources["wide"].directory)
    batches = stage_batches(config, "flow_matching", sources["own"])(0)
    shapes = {next(batches)["latents"].shape for _ in range(30)}
    batches.close()
    assert shapes == {(4, 8, 4, 4, 4), (8, 1, 4, 4, 4), (4, 4, 2, 4, 4)}


def test_records_of_another_shape_or_kind_are_named(tiny, sources, tmp_path):
    config = configured(tiny, sources["own"].directory)
    with pytest.raises(
        DataError, match=r"buckets.wide.source: the clips of .* are \(10, 4, 4, 4\), which has no \(4, 2"
    ):
        stage_batches(config, "flow_matching", sources["own"])
    with pytest.raises(DataError, match="nowhere: no such directory"):
        stage_batches(configured(tiny, "nowhere"), "flow_matching", sources["own"])
    pixels = [{"video": np.zeros((4, 8, 16, 3), np.uint8), "captions": ["x"]}]
    write_records(tmp_path / "pixels", pixels, "pixels")
    with pytest.raises(DataError, match=r"buckets.wide.source: .* holds pixels; make latents by `streamdit encode`"):
        stage_batches(configured(tiny, tmp_path / "pixels"), "flow_matching", sources["own"])


def test_captions_of_videos_tell_their_frame_rate_and_those_of_images_do_not(tiny, sources, tmp_path):
    config = configured(tiny, sources["wide"].directory)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, frame_rate_prompt=True))
    batches = stage_batches(config, "flow_matching", sources["own"])(0)
    seen = {True: set(), False: set()}
    for _ in range(12):
        batch = next(batches)
        seen[batch["latents"].shape[1] > 1] |= {tuple(row) for row in batch["tokens"]}
    batches.close()
    captions = [f"clip {number}" for number in range(8)]
    assert seen[True] <= {tuple(tokenize(f"FPS-16 {caption}", 64)[0]) for caption in captions}
    assert seen[False] <= {tuple(tokenize(caption, 64)[0]) for caption in captions}
    untold = write_records(tmp_path / "a", [{"latents": np.zeros((10, 4, 4, 4)), "captions": ["x"]}], "latents")
    with pytest.raises(DataError, match=r"tells no frame rate for data\.frame_rate_prompt"):
        stage_batches(config, "flow_matching", untold)


def test_the_abstract_objective_is_the_real_one(tiny, sources):
    """The same shapes of state and the same program text, whether weights and data are there or not."""
    config = configured(tiny, sources["wide"].directory)
    stage, mesh = config.training.flow_matching, sharding.make_mesh({"data": -1}, jax.devices()[:1])
    real = flow_matching(config, stage.objective, buckets=stage.shapes())
    abstract, batches = abstract_objective(config, "flow_matching")
    assert list(batches) == ["main", "images", "wide"]
    texts = []
    for objective in (real, abstract):
        made = program.make_program(objective, stage, mesh)
        batch = made.abstract_batch(batches["images"])
        like = made.abstract_state(program.abstract_key(mesh), batch)
        constants = sharding.abstract_arrays(objective.constants, mesh)
        texts.append(made.lower(like, constants, batch, program.abstract_key(mesh)).as_text())
    assert texts[0] == texts[1]
    of_images, of_videos = (abstract.flops(batches[name]) for name in ("images", "main"))
    # An image has an eighth of a video's tokens, but as much text.
    assert 1 / 8 < (of_images / 8) / (of_videos / 4) < 1
    with pytest.raises(ConfigError, match=r"training\.distillation: the configuration has no such stage"):
        abstract_objective(config, "distillation")


def test_frozen_text_and_teachers_are_abstract(tiny):
    mapping = json.loads(tiny.to_json())
    optimizer = {"learning_rate": 1e-3}
    mixture = {"entries": [["N4c2s1", 1.0]]}
    stage = {"steps": 200, "batch_size": 4, "num_frames": 8, "optimizer": optimizer}
    flow = {**stage, "objective": {"mixture": mixture}, "train_text": False, "text_from": "nowhere"}
    student = {**stage, "scheme": "N4c2s1", "teacher_steps": 2, "guidance": 2.0}
    mapping["training"] = {"flow_matching": flow, "distillation": student}
    config = from_mapping(mapping)
    for name, parts in (("flow_matching", ("text",)), ("distillation", ("teacher", "text"))):
        objective, batches = abstract_objective(config, name)
        for part in parts:
            leaves = jax.tree.leaves(objective.constants[part])
            assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        batch, key = batches["main"], jax.random.key(0)
        params = jax.eval_shape(objective.init, key, objective.first_batch or batch)
        loss, _ = jax.eval_shape(objective.loss, params, objective.constants, batch, key)
        assert loss.shape == () and objective.flops(batches["main"]) > 0
    with pytest.raises(ConfigError, match=r"training\.flow_matching\.text_from: nowhere: no model of that name"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, source="nowhere")), "unused")
