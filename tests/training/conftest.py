"""The toy objective and its harness as fixtures, because test folders are no packages; and a cache, for the toy is
compiled often."""

import importlib.util
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Most tests train the toy anew, with the same few programs."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy():
    return load("toy")


@pytest.fixture(scope="session")
def harness(compilation_cache):
    return load("harness")
