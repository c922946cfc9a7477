"""What a text is to every layer, computed once per prompt: the same forward, without the products that only text needs
(StreamDiT §8).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.models.dit import DiT, unstack
from streamdit_jax.models.text_cache import CachedText, cache_text
from streamdit_jax.pipeline import Pipeline

WIDTHS, TOKENS = (16, 12), 7
CHOICES = {
    "plain": {},
    "normalised": {"qk_norm": "head", "adaln": "per_block", "text_projection": "mlp"},
    "pooled": {"pooled_text": True, "qk_norm": "width"},
    "without": {"cross_attention": False},
}


def drawn(config, per_frame=False, seed=0):
    """Latents, levels, and the texts of two encoders, whose padding lies in the middle of what they say together."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(2, *config.latent)).astype(np.float32)
    levels = rng.uniform(size=latents.shape[:2]).astype(np.float32)
    masks = [np.array([[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], bool), np.ones((2, TOKENS), bool)]
    if per_frame:
        masks = [mask[:, None] & (rng.uniform(size=(2, config.latent[0], TOKENS)) < 0.7) for mask in masks]
        masks[1][..., 0] = True  # no frame may be without a word
    text = tuple((rng.normal(size=(2, TOKENS, width)).astype(np.float32), mask) for width, mask in zip(WIDTHS, masks))
    return latents, levels, text


def parameters(config, given):
    params = jax.jit(DiT(config).init)(jax.random.key(0), *given)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    )


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("per_frame", [False, True], ids=["one prompt", "prompts per frame"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_forward_is_the_same(tiny, choice, per_frame, layout):
    config = dataclasses.replace(tiny.dit, **CHOICES[choice])
    latents, levels, text = drawn(config, per_frame)
    params = parameters(config, (latents, levels, text))
    if layout == "unstacked":
        params = unstack(params)
    cache = jax.jit(functools.partial(cache_text, config))
    cached = cache(params, text)
    forward = jax.jit(lambda text: DiT(config).apply({"params": params}, latents, levels, text))
    np.testing.assert_allclose(forward(cached), forward(text), atol=2e-5)
    assert len(cached.layers) == (config.num_layers if config.cross_attention else 0)
    other = drawn(config, per_frame, seed=1)[2]
    heard = np.abs(forward(cache(params, other)) - forward(cached)).max()
    assert (heard > 1e-3) == config.cross_attention


def test_padding_never_speaks(tiny):
    """What lies in the padding, wherever that is, changes nothing at all."""
    latents, levels, text = drawn(tiny.dit)
    params = parameters(tiny.dit, (latents, levels, text))
    noisy = tuple((np.where(mask[..., None], x, 1e3).astype(np.float32), mask) for x, mask in text)
    forward = jax.jit(lambda text: DiT(tiny.dit).apply({"params": params}, latents, levels, text))
    assert np.array_equal(forward(text), forward(noisy))


def test_nothing_of_the_text_is_left_in_the_forward(tiny):
    """No weight that only text meets is read by a forward with cached text."""
    latents, levels, text = drawn(tiny.dit)
    params = unstack(parameters(tiny.dit, (latents, levels, text)))
    cached = cache_text(tiny.dit, params, text)

    def without(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jnp.full_like(leaf, jnp.nan) if "text" in str(path[0]) or "key_value" in str(path) else leaf
            ),
            tree,
        )

    forward = jax.jit(lambda params, text: DiT(tiny.dit).apply({"params": params}, latents, levels, text))
    assert np.array_equal(forward(without(params), cached), forward(params, cached))
    assert np.isnan(forward(without(params), text)).any()


def test_a_stream_computes_it_once_per_prompt(tiny, tiny_params):
    pipeline, texts = Pipeline(tiny, tiny_params), []
    original = pipeline.cache_text
    pipeline.cache_text = lambda text: texts.append(text) or original(text)
    stream = pipeline.stream("a red car", seed=0)
    for _ in range(3):
        next(stream)
    assert len(texts) == 2  # the empty prompt's, and this one's
    stream.prompt = "a blue bus"
    next(stream)
    next(stream)
    assert len(texts) == 3
    forward = stream.begin()
    assert isinstance(forward.condition.text, CachedText) and isinstance(forward.condition.null_text, CachedText)
    assert pipeline._cache_text._cache_size() == 1
