"""The probe that judges generated streams: right on renders it never saw, and for the right reasons."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.data.roadtrip import FACTORS, Factors, held_out, render
from streamdit_jax.errors import CheckpointError
from streamdit_jax.evaluation import probes


@pytest.fixture(scope="module")
def fresh():
    """Renders of held-out combinations from a seed used nowhere else."""
    return probes.renders("held_out", 777, 64)


@pytest.fixture(scope="module")
def probe():
    return probes.load_probe()


def test_the_bundled_probe_reads_held_out_combinations(probe, fresh):
    clips, factors = fresh
    assert all(held_out(clip) for clip in factors)
    for name, share in probes.accuracy(probe, clips, factors).items():
        assert share >= 0.99 or round((1 - share) * len(clips)) <= 1, (name, share)


def test_it_reads_through_blur_and_noise(probe, fresh):
    clips, factors = fresh
    damaged = probes._damage(jax.random.key(3), jnp.asarray(clips[:32], jnp.float32) / 255.0)
    shares = probes.accuracy(probe, np.asarray(jnp.round(255.0 * damaged)).astype(np.uint8), factors[:32])
    assert min(shares.values()) >= 0.95, shares


def test_the_card_tells_how_it_was_made():
    card = json.loads(probes.BUNDLED.with_name("probe.json").read_text())
    assert min(card["accuracy_held_out_combinations"].values()) >= 0.99 and card["held_out_clips"] >= 1000
    assert set(card["accuracy_held_out_combinations"]) == set(FACTORS)
    assert probes.BUNDLED.stat().st_size < 1_000_000


def test_direction_is_read_from_motion_alone(probe, fresh):
    """A clip played backwards drives the other way, though its vehicle faces as before."""
    clips = fresh[0][:16]
    forwards, backwards = probes.classify(probe, clips), probes.classify(probe, clips[:, ::-1])
    other = {"left": "right", "right": "left"}
    assert np.mean([other[a] == b for a, b in zip(forwards["direction"][0], backwards["direction"][0])]) >= 0.95
    for name in ("vehicle", "colour", "scenery", "time"):
        assert forwards[name][0] == backwards[name][0]


def test_speed_is_read_from_motion(probe):
    """The same drive at two speeds starts with the same picture."""
    clips = [
        render(Factors("bus", "blue", "hills", "day", "clear", "right", speed), 5, 40) for speed in FACTORS["speed"]
    ]
    np.testing.assert_array_equal(clips[0][0], clips[1][0])
    assert probes.classify(probe, np.stack(clips)[:, :16])["speed"][0] == list(FACTORS["speed"])
    assert probes.classify(probe, np.stack(clips))["speed"][0] == list(FACTORS["speed"])  # longer clips, as a whole


def test_a_profile_peaks_at_the_shift():
    rng = np.random.default_rng(0)
    wide = rng.random((64, 200, 3)).astype(np.float32)
    for pixels in (-2, -1, 1, 2):
        clip = np.stack([wide[:, 100 - pixels * t : 164 - pixels * t] for t in range(16)])
        profile = np.asarray(probes.motion_profile(clip[None])).reshape(-1, 2 * probes.REACH + 1)
        assert (profile.argmax(-1) == probes.REACH + probes.LAG * pixels).all()
        assert profile.max() <= 1.001


def test_probabilities_are_independent_of_company(probe, fresh):
    clips = fresh[0][:35]
    whole, alone = probes.probabilities(probe, clips), probes.probabilities(probe, clips[33:34])
    for name, values in FACTORS.items():
        assert whole[name].shape == (35, len(values))
        np.testing.assert_allclose(whole[name].sum(-1), 1.0, atol=1e-5)
        np.testing.assert_allclose(whole[name][33:34], alone[name], atol=1e-5)
    assert probes.probabilities(probe, clips[:0])["vehicle"].shape == (0, 3)


@pytest.mark.slow
def test_training_learns_and_is_reproducible(tmp_path):
    losses = []
    params = probes.train_probe(1, steps=15, num_clips=16, batch_size=8, log=losses.append)
    first, last = (float(line.split()[-1]) for line in losses if line.startswith("step"))
    assert first > 8 and last < 0.75 * first  # chance: Σ log(values) = 8.5
    probes.save_probe(params, tmp_path / "p.safetensors")
    again = probes.load_probe(tmp_path / "p.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params["params"], again["params"])


def test_mistakes_are_named(probe, tmp_path):
    with pytest.raises(ValueError, match=r"frames ≥ 16, 64, 64, 3\], not uint8 \[1, 8, 64, 64, 3\]"):
        probes.classify(probe, np.zeros((1, 8, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="not float32"):
        probes.classify(probe, np.zeros((1, 16, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="give one for each clip"):
        probes.accuracy(probe, np.zeros((1, 16, 64, 64, 3), np.uint8), [])
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        probes.load_probe(tmp_path / "nothing.safetensors")
    probes.save_probe({"params": {"a": np.zeros(3)}}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other tensors"):
        probes.load_probe(tmp_path / "other.safetensors")
