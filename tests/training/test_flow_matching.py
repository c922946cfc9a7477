"""The objectives of text and transformer: what is scored, what a caption may change, and what training starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax import flow
from streamdit_jax.models.text import tokenize
from streamdit_jax.stages import FlowMatchingObjective, MixtureConfig
from streamdit_jax.training.flow_matching import flow_matching, splice
from streamdit_jax.training.text_alignment import gist, pool, text_alignment


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


def test_gist_and_pool_against_numpy():
    latents = np.random.default_rng(0).normal(size=(2, 5, 2, 2, 3)).astype(np.float32)
    expected = np.concatenate([latents.mean(1).reshape(2, -1), latents.std(1).reshape(2, -1)], axis=1)
    np.testing.assert_allclose(gist(jnp.asarray(latents)), expected, atol=1e-5)
    sequence, mask = np.arange(12, dtype=np.float32).reshape(1, 4, 3), np.array([[True, True, False, False]])
    np.testing.assert_allclose(pool(((jnp.asarray(sequence), jnp.asarray(mask)),)), [[1.5, 2.5, 3.5]])


@pytest.mark.slow
def test_alignment_learns_to_read_colours_from_bytes(tiny):
    """Captions that differ by one word, clips that differ by it: after 150 steps most of the variance is explained."""
    import optax

    text = (dataclasses.replace(tiny.text[0], bias_per_layer=True, local_start=6.0, num_layers=2),)
    objective = text_alignment(dataclasses.replace(tiny, text=text))
    colours = ("red", "blue", "green", "white")
    looks = np.random.default_rng(1).normal(size=(4, 1, 4, 4, 4)).astype(np.float32)
    captions = [f"a {colours[i % 4]} {'car' if i < 8 else 'bus'} drives" for i in range(16)]
    batch = batch_of(captions) | {"latents": np.concatenate([looks[i % 4][None].repeat(8, 1) for i in range(16)])}
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        (_, metrics), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, (), batch, jax.random.key(0))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, metrics["explained"]

    state = optimizer.init(params)
    for _ in range(150):
        params, state, explained = step(params, state)
    assert explained > 0.7
