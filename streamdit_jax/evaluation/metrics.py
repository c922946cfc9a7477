"""Figures of clips and of sets of clips: motion, flicker, brightness, contrast, and a Fréchet distance.

Clips are uint8 [clips, frames, height, width, 3]; figures of them are in grey levels (0 … 255), one per clip.
"""

import numpy as np
from jaxtyping import Float, UInt8


def _per_clip(measure, clips) -> Float[np.ndarray, "clips"]:
    """Clip by clip: the float32 of one clip is held at a time."""
    return np.array([measure(clip.astype(np.float32)) for clip in clips], np.float64)


def motion(clips: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, "n"]:
    """Mean absolute difference of neighbouring frames; 0 for a frozen clip."""
    return _per_clip(lambda clip: np.abs(np.diff(clip, axis=0)).mean(), clips)


def flicker(clips: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, "n"]:
    """Mean absolute second temporal difference |x[t + 1] − 2·x[t] + x[t − 1]|: what changes and changes back."""
    return _per_clip(lambda clip: np.abs(np.diff(clip, 2, axis=0)).mean(), clips)


def brightness(clips: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, "n"]:
    """Mean value."""
    return _per_clip(np.mean, clips)


def contrast(clips: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, "n"]:
    """Standard deviation of grey (the mean of red, green and blue) within a frame, averaged over frames."""
    return _per_clip(lambda clip: clip.mean(-1).std(axis=(1, 2)).mean(), clips)


def frechet_distance(first: Float[np.ndarray, "n k"], second: Float[np.ndarray, "m k"]) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½) of the Gaussians fitted to two sets of features (the FID's and FVD's form).

    It shrinks towards its true value as the sets grow, so compare sets of one size. ValueError for fewer than two
    rows, unequal widths, or values that are not finite.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features: need two [rows ≥ 2, k] of one k, not {list(a.shape)} and {list(b.shape)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features: must be finite")
    difference = np.square(a.mean(0) - b.mean(0)).sum()
    # R of a set's QR decomposition is a square root of its covariance, Σ = RᵀR, and tr (Σ₁Σ₂)^½ is the sum of the
    # singular values of R₁R₂ᵀ: no covariance is squared and rooted again, which would cost half of the digits.
    roots = [np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (a, b)]
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(difference + sum(np.square(root).sum() for root in roots) - 2 * cross)
