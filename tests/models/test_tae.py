"""TAE: chunked equals whole, causality, folds and padding, the closed-form skip, sizes and mistakes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdit_jax.models import tae as tae_module
from streamdit_jax.models.tae import TAE, TAEConfig

# all of time folded in the first level; and state at three frame rates
FLAT = TAEConfig(4, ((4, 2, 2), (1, 2, 2)), (8, 12), (0, 2), kernel_time=3, linear_skip=True)
DEEP = TAEConfig(4, ((1, 2, 2), (2, 1, 1), (2, 2, 2)), (8, 8, 12), (1, 1, 1), kernel_time=2)
NAMED = {"flat": FLAT, "deep": DEEP}


@functools.cache
def model(name):
    """(TAE, params with weights large enough that every tap matters, jitted encode and decode)."""
    config = NAMED[name]
    tae = TAE(config)
    shapes = jax.eval_shape(tae.init, jax.random.key(0), jnp.zeros((1, 4, 8, 8, 3)), jax.random.key(1))["params"]
    params = jax.tree.map(lambda x: (x.ndim == 1) + 0.2 * noise(x.size, *x.shape), shapes)
    params |= {"latent_mean": noise(0, 4), "latent_std": np.full(4, 1.5, np.float32)}
    encode = jax.jit(lambda video, state: tae.apply({"params": params}, video, state, method=TAE.encode))
    decode = jax.jit(lambda latents, state: tae.apply({"params": params}, latents, state, method=TAE.decode))
    return tae, params, encode, decode


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pieces(lengths, x, state, run, unit):
    outs, start = [], 0
    for length in lengths:
        out, state = run(x[:, start * unit : (start + length) * unit], state)
        outs.append(out)
        start += length
    return np.concatenate(outs, axis=1)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(NAMED)), st.lists(st.integers(1, 2), min_size=4, max_size=4), st.integers(0, 5))
def test_chunked_equals_whole(name, draws, seed):
    _, _, encode, decode = model(name)
    lengths = []  # chunks of 1 or 2 latent frames, 4 in all: random cuts, few shapes to compile
    while sum(lengths) < 4:
        lengths.append(min(draws[len(lengths)], 4 - sum(lengths)))
    video, latents = noise(seed, 1, 16, 8, 8, 3), noise(seed, 1, 4, 2, 2, 4)
    start = (
        tae_module.initial_encoder_state(NAMED[name], 1, 8, 8),
        tae_module.initial_decoder_state(NAMED[name], 1, 8, 8),
    )
    for x, state, run, unit in zip((video, latents), start, (encode, decode), (4, 1)):
        whole = np.asarray(run(x, state)[0])
        tolerance = 1e-5 * max(1, np.abs(whole).max())
        np.testing.assert_allclose(pieces(lengths, x, state, run, unit), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_state_matters(name):
    """Without it chunks would differ: the equality above is not for want of temporal reach."""
    _, _, encode, decode = model(name)
    video, latents = noise(0, 1, 16, 8, 8, 3), noise(0, 1, 4, 2, 2, 4)
    for x, run, half in ((video, encode, 8), (latents, decode, 2)):
        whole, apart = run(x, None)[0], run(x[:, half:], None)[0]
        assert np.abs(whole[:, apart.shape[1] :] - apart).max() > 1e-3


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_spelt_out_start_equals_none(name):
    config = NAMED[name]
    _, _, encode, decode = model(name)
    video, latents = noise(1, 2, 8, 8, 8, 3), noise(1, 2, 2, 2, 2, 4)
    starts = tae_module.initial_encoder_state, tae_module.initial_decoder_state
    for x, run, start in zip((video, latents), (encode, decode), starts):
        state = start(config, 2, 8, 8)
        out, after = run(x, state)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)  # one signature: one compilation
        np.testing.assert_array_equal(out, run(x, None)[0])


@pytest.mark.parametrize("name", sorted(NAMED))
def test_no_output_sees_a_later_input(name):
    tae, params, _, _ = model(name)
    video, latents = noise(3, 1, 16, 8, 8, 3), noise(3, 1, 4, 2, 2, 4)

    def influence(method, x, unit_out, steps=4):
        """[output step, input step]: size of the gradient of a random projection of one by the other."""
        weights = noise(4, *jax.eval_shape(lambda x: tae.apply({"params": params}, x, method=method)[0], x).shape)

        def rows(x):
            out = tae.apply({"params": params}, x, method=method)[0] * weights
            return out.reshape(1, steps, unit_out, -1).sum(axis=(0, 2, 3))

        jacobian = jax.jit(jax.jacrev(rows))(x)  # [steps, 1, F, …]
        return np.abs(np.asarray(jacobian)).reshape(steps, steps, -1).sum(axis=-1)

    for method, x, unit_out in ((TAE.encode, video, 1), (TAE.decode, latents, 4)):
        table = influence(method, x, unit_out)
        assert (table[np.triu_indices(4, 1)] == 0).all()
        assert (np.diag(table) > 0).all() and (np.diag(table, -1) > 0).all()  # present and past do arrive


def test_an_image_is_a_one_frame_video():
    _, _, encode, _ = model("flat")
    image = noise(5, 1, 1, 8, 8, 3)
    still = encode(np.repeat(image, 4, axis=1), None)[0]
    assert still.shape == (1, 1, 2, 2, 4)
    np.testing.assert_array_equal(encode(image, None)[0], still)


@pytest.mark.parametrize("frames, latents", [(1, 1), (3, 1), (4, 1), (5, 2), (11, 3)])
def test_missing_frames_repeat_the_last(frames, latents):
    _, _, encode, _ = model("deep")
    video = noise(6, 1, frames, 8, 8, 3)
    full = np.concatenate([video, np.repeat(video[:, -1:], 4 * latents - frames, axis=1)], axis=1)
    out = encode(video, None)[0]
    assert out.shape[1] == latents
    np.testing.assert_allclose(out, encode(full, None)[0], atol=1e-5)


def test_training_forward_keeps_the_length_and_samples_the_posterior():
    tae, params, _, _ = model("flat")
    run = jax.jit(tae.apply)
    video = noise(7, 2, 6, 8, 8, 3)
    first, mean, log_variance = run({"params": params}, video, jax.random.key(0))
    again, *_ = run({"params": params}, video, jax.random.key(0))
    other, *_ = run({"params": params}, video, jax.random.key(1))
    assert first.shape == video.shape and mean.shape == log_variance.shape == (2, 2, 2, 2, 4)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_log_variance_is_clipped():
    tae, params, _, _ = model("flat")
    run = jax.jit(tae.apply, static_argnames="method")
    _, log_variance, _ = run({"params": params}, 1e6 * noise(8, 1, 4, 8, 8, 3), method=TAE.posterior)
    low, high = tae_module.LOG_VARIANCE_RANGE
    assert low <= float(log_variance.min()) and float(log_variance.max()) <= high
    huge = {**params, "encoder": jax.tree.map(lambda x: 100 * x, params["encoder"])}
    _, log_variance, _ = run({"params": huge}, noise(8, 1, 4, 8, 8, 3), method=TAE.posterior)
    assert float(log_variance.min()) == low and float(log_variance.max()) == high


def test_latents_are_normalised_by_the_statistics_and_back():
    tae, params, _, _ = model("flat")
    run = jax.jit(tae.apply, static_argnames="method")
    video = noise(9, 1, 8, 8, 8, 3)
    mean, std = jnp.array([1.0, -2.0, 0.5, 0.0]), jnp.array([2.0, 0.5, 1.0, 3.0])
    changed = {"params": {**params, "latent_mean": mean, "latent_std": std}}
    raw, _, _ = run(changed, video, method=TAE.posterior)
    latents, _ = run(changed, video, method=TAE.encode)
    np.testing.assert_allclose(latents * std + mean, raw, atol=1e-5)
    decoded, _ = run(changed, latents, method=TAE.decode)
    reconstructed, _ = run(changed, raw, method=TAE.reconstruct)
    np.testing.assert_allclose(decoded, reconstructed, atol=1e-4)
    slopes = jax.jit(jax.grad(lambda p: tae.apply(p, video, method=TAE.encode)[0].sum()))(changed)["params"]
    assert not slopes["latent_mean"].any() and not slopes["latent_std"].any()


def test_fold_and_unfold_are_inverse_and_local():
    x = noise(10, 2, 4, 6, 8, 3)
    folded = tae_module.fold(x, (2, 3, 4))
    assert folded.shape == (2, 2, 2, 2, 72)
    np.testing.assert_array_equal(tae_module.unfold(folded, (2, 3, 4)), x)
    np.testing.assert_array_equal(folded[1, 1, 0, 1], x[1, 2:4, 0:3, 4:8].ravel())


def plain_pca(video, time, size, count):
    """Video from the `count` leading principal components of its time × size × size patches, float64."""
    b, f, h, w, _ = video.shape
    patches = video.astype(np.float64).reshape(b, f // time, time, h // size, size, w // size, size, 3)
    patches = patches.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    flat = patches.reshape(-1, time * size * size * 3)
    mean = flat.mean(axis=0)
    _, _, rows = np.linalg.svd(flat - mean, full_matrices=False)
    back = (flat - mean) @ rows[:count].T @ rows[:count] + mean
    return back.reshape(patches.shape).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(video.shape)


def test_at_initialisation_the_skip_is_whitened_pca():
    config = TAEConfig(6, ((2, 2, 2), (1, 2, 2)), (8, 8), (0, 1), linear_skip=True)
    tae = TAE(config)
    run = jax.jit(tae.apply, static_argnames="method")
    low = np.repeat(np.repeat(noise(11, 3, 4, 8, 8, 3), 2, axis=2), 2, axis=3)  # correlated pixels: spectra with a drop
    video = np.clip(0.4 * low + 0.05 * noise(12, 3, 4, 16, 16, 3) + 0.2, -1, 1)
    params = jax.jit(tae.init)(jax.random.key(0), video, jax.random.key(1))["params"]
    params = tae_module.initialise_linear_skip(params, video, config)
    silent = {**params, "encoder": jax.tree.map(jnp.zeros_like, params["encoder"])}
    silent["decoder"] = jax.tree.map(jnp.zeros_like, params["decoder"])
    latents, _ = run({"params": silent}, video, method=TAE.encode)
    flat = np.asarray(latents, np.float64).reshape(-1, 6)
    np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(6), atol=1e-2)
    expected = plain_pca(video, 2, 4, 6)
    np.testing.assert_allclose(run({"params": silent}, latents, method=TAE.decode)[0], expected, atol=1e-3)
    # the trunk starts small beside it: the whole model begins near the closed form
    mean, _, _ = run({"params": params}, video, method=TAE.posterior)
    start, _ = run({"params": params}, mean, method=TAE.reconstruct)
    assert np.square(start - video).mean() < 1.1 * np.square(expected - video).mean()


def test_the_skip_survives_flat_video_and_refuses_a_model_without_one():
    params = {"other": 1}
    done = jax.jit(tae_module.initialise_linear_skip, static_argnums=2)(params, jnp.full((1, 4, 8, 8, 3), 0.5), FLAT)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(done)) and done["other"] == 1
    with pytest.raises(ValueError, match="linear_skip: "):
        tae_module.initialise_linear_skip(params, jnp.zeros((1, 4, 8, 8, 3)), DEEP)


@pytest.mark.parametrize(
    "shape, message",
    [((1, 4, 12, 64, 3), "height: 12 .* multiple of 8"), ((1, 4, 64, 63, 3), "width: 63 .* multiple of 8")],
)
def test_odd_sizes_say_what_would_fit(shape, message):
    tae = TAE(TAEConfig())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tae.init, jax.random.key(0), jnp.zeros(shape), jax.random.key(1))


@pytest.mark.parametrize(
    "field, value",
    [
        ("factors", ()),
        ("factors", ((1, 2), (2, 2, 2), (2, 2, 2))),
        ("factors", ((0, 2, 2), (2, 2, 2), (2, 2, 2))),
        ("widths", (8, 8)),
        ("widths", (8, 8, 0)),
        ("blocks", (1, 1, -1)),
        ("blocks", (1,)),
        ("latent_channels", 0),
        ("kernel_time", 0),
    ],
)
def test_config_mistakes_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        TAEConfig(**{field: value})


def test_lists_from_a_config_file_become_tuples():
    config = TAEConfig(factors=[[4, 2, 2], [1, 2, 2]], widths=[8, 8], blocks=[0, 1])
    assert hash(config) and config.compression == (4, 4, 4) and config.latent_shape(9, 8, 16) == (3, 2, 4, 8)


def test_the_4b_models_latents():
    """64 frames of 512 × 512 → [16, 64, 64, 8] (StreamDiT §4.1), in bfloat16 too."""
    config = TAEConfig(latent_channels=8, widths=(128, 256, 512), blocks=(2, 2, 3))
    assert config.compression == (4, 8, 8)
    tae = TAE(config, jnp.bfloat16)
    video, key = jax.ShapeDtypeStruct((1, 64, 512, 512, 3), jnp.float32), jax.random.key(0)
    params = jax.eval_shape(tae.init, key, video, key)
    latents, _ = jax.eval_shape(lambda p, v: tae.apply(p, v, method=TAE.encode), params, video)
    decoded, _ = jax.eval_shape(lambda p, z: tae.apply(p, z, method=TAE.decode), params, latents)
    assert latents.shape == (1, 16, 64, 64, 8) and latents.dtype == jnp.float32
    assert decoded.shape == video.shape and decoded.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert math.prod(latents.shape) * 96 == math.prod(video.shape)
