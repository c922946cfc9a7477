"""The distillation objective on the tiny model: what is constant, what learns, and that it does."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from streamdit_jax import weights
from streamdit_jax.models.dit import DiT
from streamdit_jax.models.text import tokenize
from streamdit_jax.stages import DistillationStage, OptimizerConfig
from streamdit_jax.training.distillation import distillation
from streamdit_jax.training.flow_matching import lengthen

STAGE = DistillationStage(
    steps=10,
    batch_size=4,
    num_frames=8,
    optimizer=OptimizerConfig(1e-3, warmup_steps=1),
    scheme="N4c2s1",
    teacher_steps=2,
    guidance=2.0,
)


@pytest.fixture(scope="module")
def teacher(tiny_params):
    return {"text": tiny_params["text"], "dit": tiny_params["dit"]}


@pytest.fixture(scope="module")
def batch():
    tokens, mask = zip(*(tokenize(caption, 64) for caption in ["a red car"] * 2 + ["a blue bus at night"] * 2))
    latents = np.random.default_rng(0).normal(size=(4, 8, 4, 4, 4)).astype(np.float32)
    return {"latents": latents, "tokens": np.stack(tokens), "text_mask": np.stack(mask)}


def test_the_student_starts_as_the_teacher_and_only_its_dit_learns(tiny, teacher, batch):
    objective = distillation(tiny, STAGE, teacher)
    params = objective.init(jax.random.key(0), objective.first_batch)
    assert list(params) == ["dit"]
    jax.tree.map(np.testing.assert_array_equal, params["dit"], teacher["dit"])
    of_constants = jax.jit(jax.grad(lambda constants: objective.loss(params, constants, batch, jax.random.key(0))[0]))
    gradient = of_constants(objective.constants)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient["teacher"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "consistency"},
        {"scheme": "N4c2s2", "rollout_share": 0.5},
        {"scheme": "K2N3c2s1", "teacher_steps": 3},
        {"scheme": "N4c2s1p2", "uniform_share": 1.0, "rollout_share": 0.0},
        {"scheme": "K2N3c2s1", "uniform_share": 0.0, "ramp_share": 1.0, "rollout_share": 0.0},
        {"method": "consistency", "ramp_share": 0.5},
        {"scheme": "K2N3c2s1", "uniform_share": 0.0, "doubling_share": 1.0, "rollout_share": 0.25},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_any_scheme_method_and_share_gives_a_finite_loss(tiny, teacher, batch, changes):
    stage = dataclasses.replace(STAGE, **changes)
    objective = distillation(tiny, stage, teacher)
    params = objective.init(jax.random.key(0), objective.first_batch)
    loss, metrics = jax.jit(objective.loss)(params, objective.constants, batch, jax.random.key(1))
    assert np.isfinite(loss) and loss > 0 and metrics["target_norm"] > 0
    assert ("rollout_loss" in metrics) == (stage.rollout_share > 0)


def test_shares_of_filling_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"ramp_share: with uniform_share and doubling_share it makes 1\.5"):
        dataclasses.replace(STAGE, ramp_share=0.5, doubling_share=0.75)
    for field in ("ramp_share", "doubling_share"):
        with pytest.raises(ValueError, match=f"{field}: N1c8s1 is one chunk"):
            dataclasses.replace(STAGE, scheme="N1c8s1", **{field: 0.5})


def test_guidance_and_shares_are_data(tiny, teacher, batch):
    """Law 1: another guidance or share of uniform buffers does not compile the loss again."""
    first = distillation(tiny, STAGE, teacher)
    loss, params = jax.jit(first.loss), {"dit": teacher["dit"]}
    before = loss(params, first.constants, batch, jax.random.key(1))[0]
    second = distillation(tiny, dataclasses.replace(STAGE, guidance=3.0, uniform_share=0.9), teacher)
    assert loss(params, second.constants, batch, jax.random.key(1))[0] != before
    third = distillation(tiny, dataclasses.replace(STAGE, switch_share=1.0), teacher)
    assert loss(params, third.constants, batch, jax.random.key(1))[0] != before
    assert loss._cache_size() == 1


def test_frames_that_do_not_exist_yet_teach_nothing(tiny, teacher, batch):
    """The loss of a ramping buffer does not depend on what lies where no chunk has entered."""
    stage = dataclasses.replace(STAGE, ramp_share=1.0, uniform_share=0.0, rollout_share=0.0)
    objective, params = distillation(tiny, stage, teacher), {"dit": teacher["dit"]}
    last = {**batch, "latents": batch["latents"].copy()}
    last["latents"][:, 6:] = 7.0  # the last chunk of four never exists while a buffer ramps up
    loss = jax.jit(objective.loss)
    value = loss(params, objective.constants, batch, jax.random.key(2))[0]
    np.testing.assert_allclose(loss(params, objective.constants, last, jax.random.key(2))[0], value, rtol=1e-5)
    first = {**batch, "latents": batch["latents"] + 1.0}
    assert abs(loss(params, objective.constants, first, jax.random.key(2))[0] - value) > 1e-3 * value


@pytest.mark.slow
def test_a_student_learns_its_teacher(tiny, teacher, batch):
    """On fixed starts the student's error falls to a tenth: the target is a function it can represent."""
    objective = distillation(tiny, STAGE, teacher)
    params, tx = {"dit": teacher["dit"]}, optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        (loss, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
            params, objective.constants, batch, jax.random.key(7)
        )
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(200):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


def test_an_image_model_has_all_that_a_video_model_needs(tiny):
    """Lengthened, its parameters have the names and shapes of the longer buffer's, and its velocity there is finite."""
    image = dataclasses.replace(tiny.dit, latent=(1, *tiny.dit.latent[1:]), windows=((1, 2, 2),))
    text = ((np.ones((1, 5, 16), np.float32), np.ones((1, 5), bool)),)

    def init(config):
        latents = np.zeros((1, *config.latent), np.float32)
        return DiT(config).init(jax.random.key(0), latents, np.zeros(latents.shape[:2]), text)["params"]

    expected = jax.eval_shape(lambda: init(tiny.dit))
    video = lengthen(jax.jit(lambda: init(image))(), expected)
    weights.check_shapes(video, expected, "lengthened")
    latents = np.ones((1, *tiny.dit.latent), np.float32)
    velocity = jax.jit(DiT(tiny.dit).apply)({"params": video}, latents, np.full((1, 8), 0.5, np.float32), text)
    assert velocity.shape == latents.shape and np.all(np.isfinite(velocity))


def frames_of(old, length):
    """The positions of frames, and of rows, after `lengthen` from those of `old`, [layers, frames, width]."""
    rows = np.ones((2, 4, old.shape[-1]))
    shapes = {"frame": np.zeros((2, length, old.shape[-1])), "row": np.zeros(rows.shape)}
    new = lengthen({"blocks": {"position": {"frame": old, "row": rows}}}, {"blocks": {"position": shapes}})
    assert new["blocks"]["position"]["row"] is rows
    return new["blocks"]["position"]["frame"]


def test_a_longer_buffer_repeats_the_positions_of_its_frames():
    old = np.arange(2 * 2 * 3.0).reshape(2, 2, 3)
    np.testing.assert_array_equal(frames_of(old, 8), np.repeat(old, 4, axis=1))


def test_the_frames_of_a_lengthened_image_model_can_be_told_apart():
    """The first keeps its position; the others lie at a fair distance from it and from each other."""
    old = np.random.default_rng(0).normal(size=(2, 1, 64))
    frames = frames_of(old, 16)
    np.testing.assert_array_equal(frames[:, 0], old[:, 0])
    distance = np.sqrt(np.mean((frames[0, :, None] - frames[0, None]) ** 2, axis=-1))
    assert distance[~np.eye(16, dtype=bool)].min() > 0.03 and distance.max() < 0.3
