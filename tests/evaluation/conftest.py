"""A tiny model of random weights whose video the probe can read: 64×64 pixels, 16 frames per second."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from streamdit_jax.parameters import initialise
from streamdit_jax.pipeline import Pipeline


@pytest.fixture(scope="session")
def readable(tiny):
    """The tiny configuration with an autoencoder of 4×16×16: a buffer of 8 latent frames is 32 frames of video."""
    tae = dataclasses.replace(tiny.tae, factors=((2, 4, 4), (2, 4, 4)))
    text = (dataclasses.replace(tiny.text[0], max_tokens=128),)
    return dataclasses.replace(tiny, tae=tae, text=text, data=dataclasses.replace(tiny.data, height=64, width=64))


@pytest.fixture(scope="session")
def pipeline(readable):
    """Random weights, gates included: prompts and seeds change the picture."""
    params = jax.jit(functools.partial(initialise, readable))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    params = jax.tree.map(np.asarray, jax.tree.unflatten(tree, noisy))
    params["tae"]["latent_std"] = np.abs(params["tae"]["latent_std"])
    return Pipeline(readable, params)


@pytest.fixture(scope="session")
def oracle():
    """`oracle.oracle`, as a fixture, because test folders are no packages."""
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.oracle
