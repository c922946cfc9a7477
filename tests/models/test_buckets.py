"""One transformer for several shapes of latents: the same parameters, positions cut, windows that end with the grid."""

import dataclasses

import jax
import numpy as np
import pytest

from streamdit_jax.models.dit import DiT, DiTConfig
from streamdit_jax.training.flow_matching import lengthen

VIDEO = DiTConfig(
    latent=(4, 8, 8, 3),
    patch=(1, 2, 2),
    width=16,
    num_layers=2,
    num_heads=2,
    ffn_width=32,
    windows=((2, 2, 2),),
    wrap=(False, True, True),
    remat="none",
)
IMAGE = dataclasses.replace(VIDEO, latent=(1, 8, 8, 3), windows=((1, 2, 2),))


def inputs(bucket, seed=0):
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(2, *bucket, 3)).astype(np.float32)
    levels = rng.uniform(size=(2, bucket[0])).astype(np.float32)
    text = rng.normal(size=(2, 5, 12)).astype(np.float32)
    return latents, levels, ((text, np.ones((2, 5), bool)),)


def filled(config):
    """Random values everywhere: a fresh model's gates are closed."""
    like = jax.eval_shape(DiT(config).init, jax.random.key(0), *inputs(config.latent[:3]))["params"]
    leaves, tree = jax.tree.flatten(like)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def test_an_image_in_a_video_model_is_what_the_image_model_makes_of_it():
    """`lengthen` keeps the image model's frame as the first; the image bucket of the longer model reads it back."""
    images = filled(IMAGE)
    like = jax.eval_shape(DiT(VIDEO).init, jax.random.key(0), *inputs(VIDEO.latent[:3]))["params"]
    video = lengthen(images, like)
    given = inputs((1, 8, 8))
    alone = jax.jit(DiT(IMAGE).apply)({"params": images}, *given)
    beside_video = jax.jit(DiT(VIDEO, ((1, 8, 8),)).apply)({"params": video}, *given)
    np.testing.assert_allclose(beside_video, alone, atol=1e-6)
    assert np.ptp(alone) > 0.1


@pytest.mark.parametrize("position", ["learned", "rope", "both"])
def test_a_smaller_bucket_is_the_smaller_model_with_the_first_positions(position):
    config = dataclasses.replace(VIDEO, position=position, windows=((2, 4, 4), (4, 2, 2)), num_layers=2)
    bucket = (2, 4, 8)
    params, given = filled(config), inputs(bucket)
    smaller = config.at(bucket)
    assert smaller.latent == (2, 4, 8, 3) and smaller.windows == ((2, 2, 4), (2, 2, 2))
    cut = params
    if position != "rope":
        tables = params["blocks"]["position"]
        tables = {name: tables[name][:, :size] for name, size in zip(("frame", "row", "column"), smaller.grid)}
        cut = {**params, "blocks": {**params["blocks"], "position": tables}}
    whole = jax.jit(DiT(config, (bucket,)).apply)({"params": params}, *given)
    np.testing.assert_allclose(whole, jax.jit(DiT(smaller).apply)({"params": cut}, *given), atol=1e-5)


def test_buckets_do_not_change_the_parameters_and_each_compiles_once():
    buckets = ((1, 8, 8), (4, 4, 8))
    model = DiT(VIDEO, buckets)
    trees = [jax.eval_shape(model.init, jax.random.key(0), *inputs(b)) for b in (VIDEO.latent[:3], *buckets)]
    assert trees[0] == trees[1] == trees[2]
    params, apply = filled(VIDEO), jax.jit(model.apply)
    for seed in range(2):
        for bucket in (VIDEO.latent[:3], *buckets):
            assert apply({"params": params}, *inputs(bucket, seed)).shape == (2, *bucket, 3)
    assert apply._cache_size() == 3


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"latent: the model takes \(4, 8, 8, 3\) or \(1, 8, 8, 3\) per buffer, not"):
        DiT(VIDEO, ((1, 8, 8),)).apply({"params": {}}, *inputs((2, 8, 8)))
    for bucket, message in (
        ((5, 8, 8), r"latent: \(5, 8, 8\) does not fit into the model's \(4, 8, 8\)"),
        ((4, 7, 8), "patch: 2 does not divide a latent height of 7"),
        ((3, 8, 8), "windows: 2 does not divide the 3 tokens along time"),
        ((0, 8, 8), "latent: every size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            VIDEO.at(bucket)
