"""The autoencoder objective: its terms against formulas, images among videos, a start that training improves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdit_jax.models.tae import TAE, TAEConfig
from streamdit_jax.stages import AutoencoderObjective
from streamdit_jax.training import autoencoder as module

CONFIG = TAEConfig(5, ((4, 2, 2), (1, 2, 2)), (8, 8), (0, 1), linear_skip=True)


def clips(seed, count=4, frames=8, size=16):
    """Smooth moving patterns, uint8: easier than noise, harder than constants."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, (2, count, 1, 1, 1, 3))
    t = np.arange(frames)[None, :, None, None, None]
    y, x = (np.arange(size).reshape(shape) for shape in ((1, 1, -1, 1, 1), (1, 1, 1, -1, 1)))
    wave = np.sin(phase + 0.5 * x + 0.3 * speed * t) + np.cos(0.4 * y * speed)
    return (np.clip(wave * 0.25 + 0.5, 0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def started():
    objective = module.autoencoder(CONFIG, AutoencoderObjective(image_share=0.0))
    batch = {"video": clips(0)}
    return objective, jax.jit(objective.init)(jax.random.key(0), batch), batch


def numpy_outliers(latents, radius):
    """Movie Gen's formula, frame by frame, float64."""
    frames = latents.astype(np.float64).reshape(-1, *latents.shape[2:])
    total = 0.0
    for frame in frames:
        mean, std = frame.mean(axis=(0, 1)), frame.std(axis=(0, 1))
        excess = np.linalg.norm(frame - mean, axis=-1) - radius * np.linalg.norm(std)
        total += np.maximum(excess, 0).mean()
    return total / len(frames)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 4.0))
def test_outlier_penalty_is_the_papers(seed, radius):
    latents = np.random.default_rng(seed).standard_normal((2, 3, 4, 4, 5)).astype(np.float32)
    latents[0, 1, 2, 3] *= 30
    expected = numpy_outliers(latents, radius)
    np.testing.assert_allclose(module.outlier_penalty(latents, radius), expected, rtol=1e-4, atol=1e-5)


def test_outlier_penalty_pulls_at_the_outlier_only_and_is_smooth_on_constants():
    latents = np.random.default_rng(0).standard_normal((1, 1, 6, 6, 4)).astype(np.float32)
    assert float(module.outlier_penalty(latents, 3.0)) == 0
    latents[0, 0, 2, 2] = 20
    slope = np.abs(np.asarray(jax.grad(module.outlier_penalty)(latents, 3.0)))[0, 0].sum(axis=-1)
    assert slope[2, 2] > 5 * np.sort(slope.ravel())[-2]
    assert np.isfinite(jax.grad(module.outlier_penalty)(np.ones((1, 1, 4, 4, 2), np.float32), 3.0)).all()


def test_gradient_loss_against_loops():
    a, b = np.random.default_rng(1).standard_normal((2, 2, 3, 4, 5, 3)).astype(np.float32)
    expected = np.mean([np.abs(np.diff(a, axis=i) - np.diff(b, axis=i)).mean() for i in (1, 2, 3)])
    np.testing.assert_allclose(module.gradient_loss(a, b), expected, rtol=1e-5)
    assert float(module.gradient_loss(a, a + 0.7)) < 1e-6  # blind to brightness: that is L1's and MSE's task
    np.testing.assert_allclose(
        module.gradient_loss(a[:, :1], b[:, :1]),
        np.mean([np.abs(np.diff(a[:, :1] - b[:, :1], axis=i)).mean() for i in (2, 3)]),
        rtol=1e-5,
    )


def test_psnr_of_known_errors():
    zero = np.zeros((1, 2, 4, 4, 3), np.float32)
    np.testing.assert_allclose(module.psnr(zero, zero + 0.2), 20.0, atol=1e-4)
    grey = np.full((2, 4, 4, 3), 100, np.uint8)
    np.testing.assert_allclose(module.psnr(grey, grey + 51), 10 * np.log10(25), atol=1e-4)
    np.testing.assert_allclose(module.psnr(grey + 51, grey), 10 * np.log10(25), atol=1e-4)  # no uint8 wrap-around
    unit = module.to_unit_range(np.array([0, 255], np.uint8))
    assert unit.tolist() == [-1.0, 1.0]
    assert float(module.psnr(zero, zero)) > 100


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 1000))
def test_a_share_of_examples_becomes_stills(batch, share, seed):
    video = np.random.default_rng(seed).standard_normal((batch, 3, 2, 2, 3)).astype(np.float32)
    out = np.asarray(module.stills(video, share, jax.random.key(seed)))
    frozen = np.array([(row == row[:1]).all() for row in out])
    assert np.floor(share * batch - 1e-4) <= frozen.sum() <= np.ceil(share * batch + 1e-4)
    np.testing.assert_array_equal(out[~frozen], video[~frozen])
    np.testing.assert_array_equal(out[frozen], np.repeat(video[frozen][:, :1], 3, axis=1))


def test_the_share_of_stills_is_right_on_average():
    video = np.arange(3.0)[None, :, None, None, None] + np.zeros((3, 3, 1, 1, 3))
    rows = jax.vmap(lambda key: module.stills(video, 0.25, key)[:, 1, 0, 0, 0] == 0)(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert abs(float(rows.mean()) - 0.25) < 0.02


def test_the_loss_is_the_weighted_sum_of_its_parts(started):
    _, params, batch = started
    weights = dict(l1=0.5, mse=3.0, gradient=0.25, kl=0.01, outlier=0.1, outlier_radius=1.0, image_share=0.5)
    loss = jax.jit(module.autoencoder(CONFIG, AutoencoderObjective(**weights)).loss)
    total, metrics = loss(params, (), batch, jax.random.key(3))
    assert set(metrics) == {"l1", "mse", "gradient", "kl", "outlier", "psnr"} and float(metrics["outlier"]) > 0
    parts = ("l1", "mse", "gradient", "kl", "outlier")
    np.testing.assert_allclose(total, sum(weights[name] * metrics[name] for name in parts), rtol=1e-5)


def test_kl_is_that_of_gaussians(started):
    objective, params, batch = started
    video = module.to_unit_range(batch["video"])
    posterior = jax.jit(lambda p, v: TAE(CONFIG).apply({"params": p}, v, method=TAE.posterior))
    mean, log_variance, _ = posterior(params["tae"], video)
    mean, variance = np.asarray(mean, np.float64), np.exp(np.asarray(log_variance, np.float64))
    expected = np.mean(0.5 * (mean**2 + variance - 1 - np.log(variance)))
    _, metrics = jax.jit(objective.loss)(params, (), batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-4)


def test_training_starts_at_pca_and_descends(started):
    objective, params, batch = started
    flat = batch["video"].astype(np.float64) / 127.5 - 1
    patches = flat.reshape(4, 2, 4, 4, 4, 4, 4, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 192)
    singular = np.linalg.svd(patches - patches.mean(axis=0), compute_uv=False)
    closed_form = np.square(singular[5:]).sum() / patches.size

    optimizer = optax.adam(3e-3)
    memory = optimizer.init(params)

    @jax.jit
    def step(params, memory, key):
        (_, metrics), slopes = jax.value_and_grad(objective.loss, has_aux=True)(params, (), batch, key)
        updates, memory = optimizer.update(slopes, memory, params)
        return optax.apply_updates(params, updates), memory, metrics

    history = []
    for i in range(60):
        params, memory, metrics = step(params, memory, jax.random.key(i))
        history.append(float(metrics["mse"]))
    assert history[0] < 1.25 * closed_form + 1e-3  # the rest is the posterior's noise and the trunk's small start
    assert history[-1] < 0.8 * history[0]


def test_init_is_traceable_and_without_a_skip_too():
    config = TAEConfig(5, ((4, 2, 2), (1, 2, 2)), (8, 8), (0, 1))
    objective = module.autoencoder(config, AutoencoderObjective())
    shapes = jax.eval_shape(objective.init, jax.random.key(0), {"video": clips(0)})
    assert set(shapes) == {"tae"} and "encoder_skip" not in shapes["tae"]


def test_statistics_normalise_the_data_they_saw(started):
    _, params, _ = started
    videos = [clips(seed) for seed in range(1, 4)]
    changed = module.latent_statistics(params["tae"], iter(videos), CONFIG)
    encode = jax.jit(lambda v: TAE(CONFIG).apply({"params": changed}, v, method=TAE.encode)[0])
    latents = np.concatenate([encode(module.to_unit_range(v)) for v in videos]).reshape(-1, 5)
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std(axis=0), 1, atol=1e-4)
    assert changed["encoder"] is params["tae"]["encoder"] and changed["latent_std"].dtype == jnp.float32


def test_statistics_of_nothing_and_of_a_constant(started):
    _, params, _ = started
    with pytest.raises(ValueError, match="videos: "):
        module.latent_statistics(params["tae"], [], CONFIG)
    one_frame = module.latent_statistics(params["tae"], [np.zeros((1, 4, 4, 4, 3), np.uint8)], CONFIG)
    assert (np.asarray(one_frame["latent_std"]) == 1).all()


def test_channels_weigh_what_they_change_in_the_picture(started):
    """A decoder that is linear changes the picture by the norm of a channel's column; at power 0.5 so do the scales.
    Pictures themselves are coded as before.
    """
    _, params, batch = started
    params = jax.tree.map(jnp.asarray, params["tae"])
    params["decoder"] = jax.tree.map(jnp.zeros_like, params["decoder"])
    params = module.latent_statistics(params, [batch["video"]], CONFIG)
    videos = [clips(seed) for seed in range(4)]
    weighed = module.weigh_channels(params, videos, CONFIG, 0.5)
    scale = params["latent_std"] / weighed["latent_std"]
    expected = jnp.linalg.norm(params["decoder_skip"]["kernel"] * params["latent_std"][:, None], axis=1)
    expected /= jnp.sqrt(jnp.mean(expected**2))
    np.testing.assert_allclose(scale, expected, rtol=0.1)
    np.testing.assert_allclose(jnp.mean(scale**2), 1, rtol=1e-5)
    assert scale.max() > 1.3 * scale.min()

    def coded(params):
        video = module.to_unit_range(batch["video"])
        latents = TAE(CONFIG).apply({"params": params}, video, method=TAE.encode)[0]
        return TAE(CONFIG).apply({"params": params}, latents, method=TAE.decode)[0]

    np.testing.assert_allclose(coded(weighed), coded(params), atol=1e-4)
    same = module.weigh_channels(params, videos, CONFIG, 0.0)
    np.testing.assert_allclose(same["latent_std"], params["latent_std"], rtol=1e-6)
    with pytest.raises(ValueError, match="videos"):
        module.weigh_channels(params, [], CONFIG, 0.5)
