"""The flow-matching objective: what is scored, what a caption may change, and what training starts from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax import flow
from streamdit_jax.models.text import tokenize
from streamdit_jax.stages import FlowMatchingObjective, MixtureConfig
from streamdit_jax.training.flow_matching import flow_matching, splice


def batch_of(captions, seed=0):
    tokens, mask = zip(*(tokenize(caption, 64) for caption in captions))
    latents = np.random.default_rng(seed).normal(size=(len(captions), 8, 4, 4, 4)).astype(np.float32)
    return {"latents": latents, "tokens": np.stack(tokens), "text_mask": np.stack(mask)}


def objective_of(tiny, entries=(("N4c2s1", 1.0),), dropout=0.0, **options):
    return flow_matching(tiny, FlowMatchingObjective(MixtureConfig(entries, **options), caption_dropout=dropout))


@pytest.fixture(scope="module")
def params(tiny_params):
    return {"text": tiny_params["text"], "dit": tiny_params["dit"]}


def test_a_fresh_model_predicts_nothing_and_loses_the_target(tiny):
    """Closed gates and a zero head: the velocity is 0, and the loss the mean square of eq. 2's target."""
    objective, batch = objective_of(tiny), batch_of(["a red car"] * 4)
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    loss, metrics = jax.jit(objective.loss)(params, objective.constants, batch, jax.random.key(1))
    noise = jax.random.normal(jax.random.split(jax.random.key(1), 3)[1], batch["latents"].shape)
    target = flow.velocity_target(batch["latents"], noise)
    np.testing.assert_allclose(loss, jnp.mean(target**2), rtol=1e-5)
    assert metrics["scored_share"] == 1


def test_references_are_not_scored(tiny, params):
    objective, batch = objective_of(tiny, (("K2N3c2s1", 1.0),)), batch_of(["a red car"] * 4)
    loss = jax.jit(objective.loss)
    value, metrics = loss(params, objective.constants, batch, jax.random.key(1))
    assert metrics["scored_share"] == 0.75 and np.isfinite(value)


def test_captions_matter_unless_they_are_dropped(tiny, params):
    one, other = batch_of(["a red car"] * 4), batch_of(["a blue bus at night"] * 4)
    for dropout, same in ((0.0, False), (1.0, True)):
        objective = objective_of(tiny, dropout=dropout)
        loss = jax.jit(objective.loss)
        values = [loss(params, objective.constants, batch, jax.random.key(1))[0] for batch in (one, other)]
        assert (values[0] == values[1]) == same


def test_a_spliced_clip_begins_as_the_one_before_it():
    """Each example is its own from its place on, and the one before it in the batch up to there; places cover all."""
    latents = jnp.arange(400.0).repeat(6).reshape(400, 6, 1, 1, 1)
    done = np.asarray(jax.jit(splice)(jax.random.key(0), latents, 0.5))[..., 0, 0, 0]
    whole = np.all(done == np.arange(400)[:, None], axis=1)
    assert 0.4 < whole.mean() < 0.6
    places = (done == (np.arange(400)[:, None] - 1) % 400).sum(axis=1)
    wanted = np.where(np.arange(6) < places[:, None], (np.arange(400)[:, None] - 1) % 400, np.arange(400)[:, None])
    np.testing.assert_array_equal(done, wanted)
    assert set(places[~whole]) == {1, 2, 3, 4, 5}
    np.testing.assert_array_equal(splice(jax.random.key(0), latents, 0.0), latents)
    np.testing.assert_array_equal(splice(jax.random.key(0), latents[:, :1], 1.0), latents[:, :1])  # images have no past


def test_a_switch_is_learnt_from_the_clip_that_was_spliced(tiny, params):
    """The loss of a batch with switch_share 1 is that of its spliced clips."""
    batch, key = batch_of(["a red car", "a blue bus at night"]), jax.random.key(1)
    spliced = {**batch, "latents": np.asarray(splice(jax.random.fold_in(key, 1), batch["latents"], 1.0))}
    mixture = MixtureConfig((("N4c2s1", 1.0),))
    sharing = flow_matching(tiny, FlowMatchingObjective(mixture, caption_dropout=0.0, switch_share=1.0))
    plain = flow_matching(tiny, FlowMatchingObjective(mixture, caption_dropout=0.0))
    loss = jax.jit(sharing.loss)
    value = loss(params, sharing.constants, batch, key)[0]
    assert value == loss(params, plain.constants, spliced, key)[0] != loss(params, plain.constants, batch, key)[0]
    assert loss._cache_size() == 1


@pytest.mark.parametrize("spelling", ["N1c8s1", "K4N1c4s1"])
def test_what_is_at_one_level_is_of_one_clip(tiny, params, spelling):
    """What is made at once, a whole clip or the rest of one, has one prompt, whatever switch_share."""
    batch, key = batch_of(["a red car", "a blue bus at night"]), jax.random.key(1)
    mixture = MixtureConfig(((spelling, 1.0),))
    sharing, plain = (
        flow_matching(tiny, FlowMatchingObjective(mixture, caption_dropout=0.0, switch_share=share))
        for share in (1.0, 0.0)
    )
    loss = jax.jit(sharing.loss)
    assert loss(params, sharing.constants, batch, key)[0] == loss(params, plain.constants, batch, key)[0]


def test_mixtures_are_data_to_one_compiled_loss(tiny, params):
    """Law 1: other schemes, weights and shares, of the same number, do not compile again."""
    batch = batch_of(["a red car"] * 4)
    first = objective_of(tiny, (("N4c2s1", 1.0), ("N8c1s1", 2.0)))
    loss = jax.jit(first.loss)
    loss(params, first.constants, batch, jax.random.key(1))
    second = objective_of(tiny, (("K2N3c2s1", 3.0), ("N2c4s1p2", 1.0)), shared_offset=1.0, dropout=0.3)
    loss(params, second.constants, batch, jax.random.key(2))
    assert loss._cache_size() == 1


def test_a_ramping_mixture_trains_on_partial_buffers(tiny, params):
    objective, batch = objective_of(tiny, ramp=1.0), batch_of(["a red car"] * 4)
    value, metrics = jax.jit(objective.loss)(params, objective.constants, batch, jax.random.key(3))
    assert np.isfinite(value) and metrics["scored_share"] < 1


def test_training_starts_from_what_is_given(tiny, params):
    objective, batch = objective_of(tiny), batch_of(["a red car"] * 2)
    begun = objective.init(jax.random.key(0), {**batch, "initial": {"text": params["text"]}})
    assert begun["text"] is params["text"] and not np.any(begun["dit"]["velocity"]["kernel"])
    begun = objective.init(jax.random.key(0), {**batch, "initial": params})
    assert begun["dit"] is params["dit"]


def test_text_encoders_that_do_not_learn_are_constants(tiny, params):
    """The same loss as with learning ones, and parameters, so gradients and a moving average too, of the DiT alone."""
    learning, batch = objective_of(tiny), batch_of(["a red car"] * 4)
    frozen = flow_matching(
        tiny, FlowMatchingObjective(MixtureConfig((("N4c2s1", 1.0),)), caption_dropout=0.0), text_params=params["text"]
    )
    begun = frozen.init(jax.random.key(0), {**batch, "initial": params})
    assert list(begun) == ["dit"] and begun["dit"] is params["dit"]
    expected, _ = jax.jit(learning.loss)(params, learning.constants, batch, jax.random.key(1))
    value, _ = jax.jit(frozen.loss)(begun, frozen.constants, batch, jax.random.key(1))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
