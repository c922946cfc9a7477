"""A tiny model of random weights on disk, for tests of everything that stands on one; and one compilation cache for
all processes of a session, which goes with it.
"""

import json
import os
import shutil
import tempfile

import jax
import numpy as np
import pytest

from streamdit_jax import weights
from streamdit_jax.config import Config, DataConfig, SamplingConfig
from streamdit_jax.models.dit import DiTConfig
from streamdit_jax.models.tae import TAEConfig
from streamdit_jax.models.text import TextConfig
from streamdit_jax.parameters import initialise


def pytest_configure(config):
    """What one process has compiled, the others find: workers, and what tests start, inherit the environment."""
    if hasattr(config, "workerinput") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    config.stash[CACHE] = tempfile.mkdtemp(prefix="streamdit-tests-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": config.stash[CACHE],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    jax.config.update("jax_compilation_cache_dir", config.stash[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_unconfigure(config):
    if directory := config.stash.get(CACHE, None):
        shutil.rmtree(directory, ignore_errors=True)


CACHE = pytest.StashKey[str]()


def tiny_config() -> Config:
    """8 frames of 4×4 latents of 4 channels: 32 video frames of 16×16."""
    return Config(
        name="tiny",
        seed=0,
        data=DataConfig(height=16, width=16, clip_frames=40, num_clips=4),
        tae=TAEConfig(latent_channels=4, factors=((2, 2, 2), (2, 2, 2)), widths=(8, 8), blocks=(1, 1)),
        text=(
            TextConfig(vocab_size=384, width=16, num_layers=1, num_heads=2, head_dim=8, ffn_width=16, max_tokens=64),
        ),
        dit=DiTConfig(
            latent=(8, 4, 4, 4),
            patch=(1, 2, 2),
            width=16,
            num_layers=2,
            num_heads=2,
            ffn_width=32,
            windows=((4, 2, 2),),
            wrap=(False, True, True),
            remat="none",
        ),
        sampling=SamplingConfig(scheme="N4c2s2", guidance=2.0),
    )


@pytest.fixture(scope="session")
def tiny():
    """The tiny model's configuration."""
    return tiny_config()


@pytest.fixture(scope="session")
def tiny_params():
    """Random parameters: a fresh model's gates are closed, and it would stream nothing but noise."""
    params = jax.jit(lambda key: initialise(tiny_config(), key))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    params = jax.tree.map(np.asarray, jax.tree.unflatten(tree, noisy))
    params["tae"]["latent_std"] = np.abs(params["tae"]["latent_std"])
    return params


@pytest.fixture(scope="session")
def tiny_model(tiny_params, tmp_path_factory):
    """A model directory. Tests that damage it work on a copy."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    weights.save_model(directory, json.loads(tiny_config().to_json()), tiny_params, {"command": "tests"})
    return directory
