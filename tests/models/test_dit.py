"""The transformer against a plain float64 definition, and its laws by gradients (StreamDiT §4.1, fig. 3)."""

import dataclasses
import functools
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax.config import from_arguments
from streamdit_jax.kernels.windows import TokenOrder
from streamdit_jax.models.dit import DiT, DiTConfig, parameter_count, unstack
from streamdit_jax.models.embeddings import rotary_angles, rotate

ROOT = Path(__file__).parents[2]
TINY = DiTConfig(
    latent=(4, 2, 4, 3),
    patch=(1, 1, 2),
    width=24,
    num_layers=1,
    num_heads=2,
    ffn_width=20,
    windows=((4, 2, 2),),
    shifted=(False,),
    time_frequencies=8,
    dtype="float32",
)
TEXT_WIDTHS = (5, 7)


def inputs_of(config, batch=1, seed=0):
    """Latents, levels and the text of two encoders of unlike width, padded."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(batch, *config.latent)).astype(np.float32)
    levels = np.sort(rng.uniform(size=(batch, config.latent[0])).astype(np.float32))[:, ::-1]
    masks = np.array([[True, True, False]] * batch), np.array([[True, False, True, False]] * batch)
    text = tuple(
        (rng.normal(size=(*mask.shape, width)).astype(np.float32), mask) for mask, width in zip(masks, TEXT_WIDTHS)
    )
    return latents, levels, text


def shapes_of(config, text_widths=TEXT_WIDTHS):
    latents = jax.ShapeDtypeStruct((1, *config.latent), jnp.float32)
    levels = jax.ShapeDtypeStruct((1, config.latent[0]), jnp.float32)
    text = tuple(
        (jax.ShapeDtypeStruct((1, 3, width), jnp.float32), jax.ShapeDtypeStruct((1, 3), jnp.bool_))
        for width in text_widths
    )
    return jax.eval_shape(DiT(config).init, jax.random.key(0), latents, levels, text)["params"]


def filled(config, scale=0.3):
    """Parameters without the zeros of a fresh model; equal names have equal numbers in every configuration."""

    def fill(path, shape):
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jnp.asarray(rng.normal(size=shape.shape) * scale, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes_of(config))


@functools.cache
def compiled_apply(config):
    return jax.jit(DiT(config).apply)


def apply(config, params, *inputs):
    return compiled_apply(config)({"params": params}, *inputs)


# ---- against a plain definition ----


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"pooled_text": True, "qk_norm": "head", "norm": "rms"},
        {"norm": "rms", "ffn": "swiglu"},
        {"adaln": "per_block", "qk_norm": "head"},
        {"position": "rope", "qk_norm": "width", "text_projection": "mlp"},
        {"position": "both", "qk_norm": "head"},
    ],
    ids=lambda variant: "-".join(map(str, variant.values())) or "movie_gen",
)
def test_every_variant_equals_its_plain_definition(variant, plain_dit):
    config = dataclasses.replace(TINY, **variant)
    params, (latents, levels, text) = filled(config), inputs_of(config)
    one = [(x[0], mask[0]) for x, mask in text]
    expected = plain_dit.velocity(unstack(params), config, latents[0], levels[0], one)
    out = apply(config, params, latents, levels, text)
    assert out.dtype == jnp.float32 and out.shape == latents.shape
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    if not variant:
        half = apply(dataclasses.replace(config, dtype="bfloat16"), params, latents, levels, text)
        error = np.sqrt(np.mean((half[0] - expected) ** 2) / np.mean(expected**2))
        assert half.dtype == jnp.float32 and 1e-5 < error < 0.05


@pytest.mark.parametrize("head_dim", [8, 16, 128])
def test_rotary_positions_are_those_of_wan(head_dim, plain_dit):
    order = TokenOrder((6, 4, 4), (3, 2, 4), (3, 1, 2))
    x = np.random.default_rng(0).normal(size=(2, 96, 3, head_dim)).astype(np.float32)
    angles = rotary_angles(order, head_dim)
    assert angles.shape == (96, head_dim // 2)
    expected = np.stack([plain_dit.wan_rotation(example.astype(np.float64), order.coordinates) for example in x])
    np.testing.assert_allclose(rotate(x, angles), expected, atol=1e-5)


# ---- layers: scanned for training, unrolled for inference ----


def test_scanned_and_unrolled_layers_are_the_same_function():
    """Two periods of two unlike layers each."""
    config = dataclasses.replace(TINY, num_layers=4, windows=((4, 2, 2), (2, 2, 2)), shifted=(False, True))
    params, inputs = filled(config, 0.15), inputs_of(config, batch=2)
    scanned, unrolled = (apply(config, tree, *inputs) for tree in (params, unstack(params)))
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-4, atol=1e-5)
    order = dict(unstack(params), blocks=unstack(params)["blocks"][::-1])
    assert np.abs(apply(config, order, *inputs) - unrolled).max() > 1e-2, "and their order matters"


@pytest.mark.slow
def test_rematerialisation_saves_memory_and_changes_no_gradient():
    config = dataclasses.replace(TINY, num_layers=2, windows=((2, 2, 2),), shifted=(True,), cross_attention=False)
    params, inputs = filled(config, 0.15), inputs_of(config)
    weight = np.random.default_rng(1).normal(size=inputs[0].shape)

    def compiled(remat, params):
        def loss(params):
            out = DiT(dataclasses.replace(config, remat=remat)).apply({"params": params}, *inputs)
            return jnp.sum(out * weight)

        step = jax.jit(jax.grad(loss)).lower(params).compile()
        return step(params), step.memory_analysis().temp_size_in_bytes

    gradients, _ = compiled("none", unstack(params))
    memory = {}
    for remat in ("none", "dots", "full"):
        of_stack, memory[remat] = compiled(remat, params)
        assert jax.tree.structure(unstack(of_stack)) == jax.tree.structure(gradients)
        for a, b in zip(jax.tree.leaves(unstack(of_stack)), jax.tree.leaves(gradients)):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    assert memory["full"] < memory["dots"] < memory["none"], memory


def test_a_fresh_model_predicts_exactly_nothing_and_its_layers_pass_everything_on():
    config = dataclasses.replace(TINY, num_layers=2)
    inputs = inputs_of(config)
    params, out = jax.jit(DiT(config).init_with_output)(jax.random.key(0), *inputs)[::-1]
    assert np.array_equal(out, np.zeros_like(inputs[0]))
    params, blocks = params["params"], params["params"]["blocks"]
    closed = (blocks["modulation"], params["time_projection"], blocks["cross_attention"]["out"], params["velocity"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(closed)), "gates and outputs begin at zero"
    kernels = blocks["self_attention"]["qkv"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1]), "layers begin with numbers of their own"
    assert jax.tree.structure(params) == jax.tree.structure(shapes_of(config))


# ---- who influences whom, by gradients ----


def gradients_of(config, inputs, frame_mask=None):
    """d(each output token, weighted at random) / d(latents, levels, text); leaves [tokens out, 1, …], in the raster."""
    latents, levels, text = inputs
    params = unstack(filled(config))
    shape = (1, *config.latent)
    weights = np.random.default_rng(2).normal(size=shape).astype(np.float32)

    @jax.jit
    def run(latents, levels, sequences):
        def forward(latents, levels, sequences):
            pairs = tuple((x, mask) for x, (_, mask) in zip(sequences, text))
            return DiT(config).apply({"params": params}, latents, levels, pairs, frame_mask)

        _, back = jax.vjp(forward, latents, levels, sequences)
        count = math.prod(config.latent[:3])
        one_hot = jnp.eye(count).reshape(count, 1, *config.latent[:3], 1)
        return jax.vmap(lambda each: back(each * weights))(one_hot)

    return run(latents, levels, tuple(x for x, _ in text))


def sees(*groups):
    """Which places see each other when each group is a window: [places, places]."""
    count = sum(map(len, groups))
    matrix = np.zeros((count, count), bool)
    for group in groups:
        matrix[np.ix_(group, group)] = True
    return matrix


PLAIN_TIME, PLAIN_HEIGHT = sees([0, 1, 2, 3], [4, 5, 6, 7]), sees([0, 1], [2, 3])
MOVED_TIME = {True: sees([2, 3, 4, 5], [6, 7, 0, 1]), False: sees([0, 1], [2, 3, 4, 5], [6, 7])}
MOVED_HEIGHT = sees([1, 2], [3, 0])


@pytest.mark.parametrize("layers, wrap", [(1, True), (2, True), (2, False)])
def test_information_crosses_windows_only_through_shifts(layers, wrap):
    """Windows of 4 frames × 2 rows of 8 × 4 tokens, the second layer's moved by half; every pair is checked."""
    config = dataclasses.replace(
        TINY, latent=(8, 4, 1, 2), patch=(1, 1, 1), num_layers=layers, windows=((4, 2, 1),),
        shifted=(False, True)[:layers], wrap=(wrap, True, True),
    )  # fmt: skip
    expected = np.kron(PLAIN_TIME, PLAIN_HEIGHT)
    if layers == 2:
        expected = np.kron(MOVED_TIME[wrap], MOVED_HEIGHT).astype(int) @ expected.astype(int) > 0
    latents, *_ = gradients_of(config, inputs_of(config))
    influence = np.any(np.asarray(latents) != 0, axis=-1).reshape(32, 32)
    assert np.array_equal(influence, expected)
    frames = influence.reshape(8, 4, 8, 4).any(axis=(1, 3))
    assert frames[0, 7] == frames[7, 0] == (layers == 2 and wrap), "the cleanest and the noisiest frame"
    assert frames[3, 4] == (layers == 2)


@pytest.mark.parametrize("adaln", ["single", "per_block"])
def test_a_level_modulates_the_tokens_of_its_own_frame_only(adaln):
    """Windows of one frame: nothing else joins the frames, so that all that a level can reach is its own frame."""
    config = dataclasses.replace(TINY, windows=((1, 2, 2),), adaln=adaln)
    latents, levels, _ = gradients_of(config, inputs_of(config))
    own = np.broadcast_to(np.eye(4, dtype=bool)[:, None], (4, 8, 4))
    assert np.array_equal((np.asarray(levels) != 0).reshape(4, 8, 4), own)
    assert np.array_equal(np.any(np.asarray(latents) != 0, axis=(3, 4, 5)).reshape(4, 8, 4), own)


def test_absent_frames_and_padded_text_influence_nothing_that_exists():
    config = dataclasses.replace(TINY, num_layers=2, windows=((4, 2, 2), (2, 1, 2)), shifted=(False, True))
    inputs, present = inputs_of(config), np.array([[False, True, True, False]])
    latents, levels, text = gradients_of(config, inputs, present)
    between = np.any(np.asarray(latents) != 0, axis=(3, 4, 5)).reshape(4, 8, 4).any(axis=1)
    by_level = (np.asarray(levels) != 0).reshape(4, 8, 4).any(axis=1)
    there = present[0]
    for influence in (between, by_level):
        assert not influence[there][:, ~there].any()
        assert influence[np.ix_(there, there)].all()
    for gradient, (_, mask) in zip(text, inputs[2]):
        per_token = np.any(np.asarray(gradient) != 0, axis=(0, 1, 3))
        assert np.array_equal(per_token, mask[0]), "every token that exists reaches the output, padding does not"


def test_texts_of_several_encoders_are_one_sequence():
    latents, levels, text = inputs_of(TINY)
    params = filled(TINY)
    both = apply(TINY, params, latents, levels, text)
    swapped = dict(params, text_projection_0=params["text_projection_1"], text_projection_1=params["text_projection_0"])
    np.testing.assert_allclose(apply(TINY, swapped, latents, levels, text[::-1]), both, atol=1e-4)
    silent = (text[0], (text[1][0], np.zeros_like(text[1][1])))
    alone = apply(TINY, params, latents, levels, text[:1])
    np.testing.assert_allclose(apply(TINY, params, latents, levels, silent), alone, atol=1e-4)
    assert np.abs(both - alone).max() > 1e-2


# ---- prompts per frame ----


def side_by_side(first, second, takes_second):
    """Two prompts in one text: keys of both, and for each frame a mask that shows one of them."""
    return tuple(
        (
            np.concatenate([a, b], axis=1),
            np.concatenate([m[:, None] & ~takes_second[..., None], n[:, None] & takes_second[..., None]], axis=-1),
        )
        for (a, m), (b, n) in zip(first, second)
    )


@pytest.mark.parametrize("pooled", [False, True])
def test_frames_with_prompts_of_their_own_are_those_of_separate_forwards(pooled, plain_dit):
    """Windows of one frame keep the frames apart: each must be what a forward with its prompt alone makes of it."""
    config = dataclasses.replace(TINY, num_layers=2, windows=((1, 2, 2),), pooled_text=pooled, qk_norm="head")
    params, (latents, levels, first) = filled(config), inputs_of(config, batch=2)
    second = inputs_of(config, batch=2, seed=1)[2]
    takes_second = np.array([[False, True, True, False], [True, True, False, True]])
    out = apply(config, params, latents, levels, side_by_side(first, second, takes_second))
    one, other = (apply(config, params, latents, levels, text) for text in (first, second))
    expected = np.where(takes_second[..., None, None, None], other, one)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(out, expected, atol=1e-5 * scale)
    assert np.abs(one - other).max() > 1e-2 * scale
    mixed = dataclasses.replace(config, num_layers=1, windows=((4, 2, 2),), shifted=(False,))
    text = side_by_side(first, second, takes_second)
    params = filled(mixed)
    out = apply(mixed, params, latents, levels, text)
    plain = plain_dit.velocity(unstack(params), mixed, latents[0], levels[0], [(x[0], mask[0]) for x, mask in text])
    np.testing.assert_allclose(out[0], plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())


# ---- shapes ----


def test_parameters_of_the_4b_model():
    config = from_arguments([f"--config={ROOT / 'configs' / 'streamdit_4b.py'}"])
    count = parameter_count(shapes_of(config.dit, [of_encoder.width for of_encoder in config.text]))
    assert abs(count / 4.117e9 - 1) < 0.005
    layer = 4 * 3072**2 + 4 * 3072 + 4 * 3072**2 + 4 * 3072 + 2 * 3072 * 8192 + 8192 + 3072  # attentions, feed-forward
    layer += 6 * 3072 + 2 * 3072 + (16 + 32 + 32) * 3072  # modulation table, cross-attention's norm, positions
    assert parameter_count(shapes_of(config.dit)["blocks"]) == 32 * layer


def test_parameters_of_wan():
    config = DiTConfig(
        latent=(20, 60, 104, 16), patch=(1, 2, 2), width=1536, num_layers=30, num_heads=12, ffn_width=8960,
        windows=((20, 30, 52),), shifted=(False,), position="rope", qk_norm="width", text_projection="mlp",
    )  # fmt: skip
    assert abs(parameter_count(shapes_of(config, (4096,))) / 1.419e9 - 1) < 0.001


@pytest.mark.parametrize(
    "field, value",
    [
        ("latent", (4, 2, 4)),
        ("latent", (4, 2, 0, 3)),
        ("patch", (2, 1, 2)),
        ("patch", (1, 1, 3)),
        ("patch", (1, 0, 2)),
        ("patch", (1, 2)),
        ("width", 0),
        ("num_layers", 0),
        ("num_heads", 0),
        ("num_heads", 5),
        ("ffn_width", 0),
        ("windows", ()),
        ("windows", ((3, 2, 2),)),
        ("windows", ((0, 2, 2),)),
        ("windows", ((4, 2),)),
        ("shifted", ()),
        ("wrap", (True, True)),
        ("norm", "batch"),
        ("ffn", "relu"),
        ("adaln", "none"),
        ("position", "sine"),
        ("qk_norm", True),
        ("text_projection", "linear"),
        ("remat", "some"),
        ("dtype", "float16"),
        ("time_frequencies", 7),
        ("time_frequencies", 0),
    ],
)
def test_a_field_that_cannot_be_built_is_named(field, value):
    with pytest.raises(ValueError) as raised:
        dataclasses.replace(TINY, **{field: value})
    assert str(raised.value).startswith(f"{field}: ") and "\n" not in str(raised.value)


def test_fields_that_do_not_go_together_are_named():
    for fields, message in (
        (dict(num_layers=3, shifted=(False, True)), "num_layers: 3 layers do not hold whole patterns of 2"),
        (dict(latent=(6, 2, 4, 3), windows=((3, 2, 2),), shifted=(True,)), "windows: a window of 3 along time has no"),
        (dict(width=18, position="rope", num_heads=2), "num_heads: rotary positions need an even head size, not 9"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **fields)
    latents, levels, text = inputs_of(TINY)
    with pytest.raises(ValueError, match=r"latent: the model takes \(4, 2, 4, 3\) per buffer, not \(3, 2, 4, 3\)"):
        DiT(TINY).apply({"params": filled(TINY)}, latents[:, :3], levels[:, :3], text)
