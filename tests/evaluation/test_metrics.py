"""Figures of clips against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdit_jax.evaluation import metrics


def test_motion_and_flicker_of_a_ramp_and_of_a_blink():
    """A clip that brightens evenly moves and does not flicker; one that blinks flickers twice as much as it moves."""
    ramp = np.broadcast_to(3 * np.arange(8, dtype=np.uint8)[:, None, None, None], (8, 4, 4, 3))
    blink = np.broadcast_to(10 * (np.arange(8, dtype=np.uint8) % 2)[:, None, None, None], (8, 4, 4, 3))
    clips = np.stack([ramp, blink, np.full_like(ramp, 7)])
    assert metrics.motion(clips).tolist() == [3, 10, 0]
    assert metrics.flicker(clips).tolist() == [0, 20, 0]
    assert metrics.brightness(clips).tolist() == [10.5, 5, 7]


def test_contrast_is_that_of_grey_within_a_frame():
    half = np.zeros((1, 2, 4, 4, 3), np.uint8)
    half[0, :, :2] = 100
    assert metrics.contrast(half).tolist() == [50]
    fading = np.stack([np.full((4, 4, 3), 20 * t, np.uint8) for t in range(5)])[None]
    assert metrics.contrast(fading).tolist() == [0], "changes over time are no contrast"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(0.2, 4))
def test_frechet_distance_of_a_moved_and_stretched_set(seed, shift, scale):
    """For y = scale·x + shift the distance is ‖Δμ‖² + (scale − 1)²·tr Σ, whatever the covariance."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)
    y = scale * x + shift
    moved = np.square(y.mean(0) - x.mean(0)).sum() + (scale - 1) ** 2 * np.trace(np.cov(x, rowvar=False))
    assert metrics.frechet_distance(x, y) == pytest.approx(moved, rel=1e-5, abs=1e-6)
    assert metrics.frechet_distance(y, x) == pytest.approx(moved, rel=1e-5, abs=1e-6)


def test_frechet_distance_against_a_matrix_square_root():
    """Covariances that do not commute: against tr √(Σ₁Σ₂) by eigenvalues of the product itself."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.abs(np.linalg.eigvals(first @ second))).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * cross
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_fewer_rows_than_features_are_no_trouble():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(4, 30))
    assert metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("other", [np.zeros((1, 3)), np.zeros((5, 2)), np.full((5, 3), np.nan), np.zeros(3)])
def test_features_that_cannot_be_compared(other):
    with pytest.raises(ValueError, match="features: "):
        metrics.frechet_distance(np.random.default_rng(0).normal(size=(5, 3)), other)
