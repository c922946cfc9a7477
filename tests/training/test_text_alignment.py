"""The text-alignment objective: what a caption's encoding is asked to tell, and that it learns to."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax import weights
from streamdit_jax.compiled import encode_text
from streamdit_jax.config import from_arguments, from_mapping
from streamdit_jax.data.captions import full_caption
from streamdit_jax.data.roadtrip import combinations
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.text import tokenize
from streamdit_jax.training.run import aligned
from streamdit_jax.training.text_alignment import gist, motion, pool, text_alignment

IMAGE = f"--config={Path(__file__).parents[2]}/configs/roadtrip_image.py"


def tokens_of(captions, most):
    tokens, mask = zip(*(tokenize(caption, most) for caption in captions))
    return {"tokens": np.stack(tokens), "text_mask": np.stack(mask)}


def test_gist_and_pool_against_numpy():
    latents = np.random.default_rng(0).normal(size=(2, 5, 2, 4, 3)).astype(np.float32)
    parts = gist(jnp.asarray(latents))
    np.testing.assert_allclose(parts["mean"], latents.mean(1).reshape(2, -1), atol=1e-5)
    np.testing.assert_allclose(parts["deviation"], latents.std(1).reshape(2, -1), atol=1e-5)
    moving = latents - latents.mean(1, keepdims=True)
    for clip, row, shift in itertools.product(range(2), range(2), (-1, 0, 1)):
        pairs = [(w, w + shift) for w in range(4) if 0 <= w + shift < 4]
        now = np.stack([moving[clip, :-1, row, w] for w, _ in pairs]).astype(np.float64)
        later = np.stack([moving[clip, 1:, row, w] for _, w in pairs]).astype(np.float64)
        expected = np.sum(now * later) / np.sqrt(np.sum(now**2) * np.sum(later**2))
        np.testing.assert_allclose(parts["motion"][clip, 2 * (shift + 1) + row], expected, atol=1e-4)
    sequence, mask = np.arange(12, dtype=np.float32).reshape(1, 4, 3), np.array([[True, True, False, False]])
    np.testing.assert_allclose(pool(((jnp.asarray(sequence), jnp.asarray(mask)),)), [[1.5, 2.5, 3.5]])


def test_motion_tells_whither_and_how_fast():
    """What passes by one place a frame correlates fully with itself one place on, and with nothing otherwise; what
    stands still, and a single frame, tell of no motion.
    """
    band = np.random.default_rng(0).normal(size=(40, 200)).astype(np.float32)  # channels at places along the road
    left = np.stack([band[:, frame : frame + 8].T for frame in range(64)])[None, :, None]  # [1, 64, 1, 8, 40]
    for clip, expected in ((left, [1, 0, 0]), (left[:, ::-1], [0, 0, 1]), (left[:, :1].repeat(64, 1), [0, 0, 0])):
        np.testing.assert_allclose(motion(jnp.asarray(clip))[0], expected, atol=0.1)
    np.testing.assert_array_equal(motion(jnp.asarray(left[:, :1])), np.zeros((1, 3)))


@pytest.mark.slow
def test_alignment_learns_to_read_colours_from_bytes(tiny):
    """Captions that differ by one word, clips that differ by it: after 150 steps most of the variance is explained."""
    import optax

    text = (dataclasses.replace(tiny.text[0], bias_per_layer=True, local_start=6.0, num_layers=2),)
    objective = text_alignment(dataclasses.replace(tiny, text=text))
    colours = ("red", "blue", "green", "white")
    looks = np.random.default_rng(1).normal(size=(4, 1, 4, 4, 4)).astype(np.float32)
    captions = [f"a {colours[i % 4]} {'car' if i < 8 else 'bus'} drives" for i in range(16)]
    latents = np.concatenate([looks[i % 4][None].repeat(8, 1) for i in range(16)])
    batch = {"latents": latents, **tokens_of(captions, 64)}
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        (_, metrics), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, (), batch, jax.random.key(0))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, metrics["explained_mean"]

    state = optimizer.init(params)
    for _ in range(150):
        params, state, explained = step(params, state)
    assert explained > 0.7


def test_alignment_goes_on_from_a_named_models_encoders():
    field = "--config.training.text_alignment.start_from"
    objective = aligned(from_arguments([IMAGE, f"{field}=roadtrip"]))
    begun = jax.jit(objective.init)(jax.random.key(0), objective.first_batch)["text"]
    directory = weights.find_model("roadtrip")
    stored = weights.load_part(directory, weights.load_card(directory), "text")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y, np.float32)), begun, stored)
    assert objective.constants == ()
    kept = aligned(from_arguments([IMAGE, f"{field}=roadtrip", "--config.training.text_alignment.keep=0.5"])).constants
    assert kept["keep"] == 0.5
    jax.tree.map(np.testing.assert_array_equal, kept["kept"], objective.first_batch["initial"]["text"])
    with pytest.raises(ConfigError, match=r"training\.text_alignment\.start_from: nowhere: no model"):
        aligned(from_arguments([IMAGE, f"{field}=nowhere"]))


def test_what_is_kept_is_pulled_back_to(tiny):
    """Nothing is forgotten where an encoder begins; elsewhere the loss grows by `keep` times what is, over the variance
    of what was.
    """
    batch = {"latents": np.random.default_rng(0).normal(size=(4, 8, 4, 4, 4)).astype(np.float32)}
    batch |= tokens_of(["a red car", "a blue bus at night", "a truck", "a white car in the snow"], 64)
    plain = text_alignment(tiny)
    params = jax.jit(plain.init)(jax.random.key(0), batch)
    other = jax.jit(plain.init)(jax.random.key(1), batch)
    keeping = text_alignment(tiny, other["text"], 0.5)
    loss = jax.jit(keeping.loss)
    value, metrics = loss(params, keeping.constants, batch, None)
    (now, mask), (then, _) = (
        encode_text(tiny.text, each["text"], batch["tokens"], batch["text_mask"])[0] for each in (params, other)
    )
    now, then = np.asarray(now, np.float64)[mask], np.asarray(then, np.float64)[mask]
    forgotten = np.mean((now - then) ** 2) / np.mean((then - then.mean(0)) ** 2)
    np.testing.assert_allclose(metrics["forgotten"], forgotten, rtol=1e-4)
    np.testing.assert_allclose(value, jax.jit(plain.loss)(params, (), batch, None)[0] + 0.5 * forgotten, rtol=1e-4)
    # Operation by operation: one program for both encodings may round them differently.
    assert keeping.loss(other, keeping.constants, batch, None)[1]["forgotten"] == 0


def test_the_encoders_that_ship_tell_every_motion_apart():
    """A linear reading of pooled encodings, fitted on some captions, tells direction and speed of others; and each has
    a share of their variance that a transformer can hear: 2 % at least. Encoders that were aligned without motion had
    0.3 and 0.06 %.
    """
    directory = weights.find_model("roadtrip")
    card = weights.load_card(directory)
    config, params = from_mapping(card["config"]), weights.load_part(directory, card, "text")
    factors = [combinations("train")[i] for i in np.random.default_rng(0).permutation(len(combinations("train")))[:400]]
    encoded = tokens_of([full_caption(each) for each in factors], config.text[0].max_tokens)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    x = np.asarray(jax.jit(lambda t, m: pool(encode_text(config.text, params, t, m)))(*encoded.values()), np.float64)
    x -= x.mean(0)
    for name, one in (("direction", "left"), ("speed", "slow")):
        side = np.array([1.0 if getattr(each, name) == one else -1.0 for each in factors])
        fitted = np.linalg.lstsq(x[:300], side[:300], rcond=None)[0]
        assert np.mean(np.sign(x[300:] @ fitted) == side[300:]) >= 0.95, name
        between = [x[side == value].mean(0) for value in (1, -1)]
        share = sum(np.mean(side == v) * np.sum(m**2) for v, m in zip((1, -1), between)) / np.sum(x**2, 1).mean()
        assert share >= 0.02, (name, share)
