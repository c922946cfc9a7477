"""Text encoder: parity with Hugging Face's T5 and UMT5, bytes, padding.

fixtures/t5_parity.safetensors was made once with torch 2.13.0 and transformers 5.23.0: for "t5" (feed_forward_proj
"gated-gelu"), "t5_relu" ("relu") and "umt5" ("gated-gelu"), a T5EncoderModel or UMT5EncoderModel with vocab_size 48,
d_model 24, d_kv 6, num_heads 3, d_ff 40, num_layers 2, relative_attention_num_buckets 16,
relative_attention_max_distance 40, dropout 0, every parameter drawn from 0.3·N(0, 1) (+ 1 for norms,
torch.manual_seed(0)); tokens [2, 60] in 3…47, the second row padded after 37. It holds `<name>/<state_dict key>`,
`<name>/output` (last_hidden_state), `tokens` and `mask`.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from streamdit_jax.models.text import TextConfig, TextEncoder, relative_buckets, tokenize

FIXTURE = Path(__file__).parent / "fixtures" / "t5_parity.safetensors"
SMALL = TextConfig(width=24, num_layers=2, num_heads=3, head_dim=8, ffn_width=32)


@pytest.fixture(scope="module")
def small():
    tokens, mask = tokenize("a red car", 16)
    encoder = TextEncoder(SMALL)
    return encoder, encoder.init(jax.random.key(0), tokens[None], mask[None])


def encode(small, text, length):
    encoder, params = small
    tokens, mask = tokenize(text, length)
    return np.asarray(encoder.apply(params, tokens[None], mask[None]))[0], mask


def from_state_dict(weights):
    """Our parameters from a T5 state dict: names one to one, kernels transposed."""
    names = {
        "shared.weight": ("embedding", "embedding"),
        "encoder.final_layer_norm.weight": ("final_norm", "scale"),
    }
    layers = {
        "layer.0.SelfAttention.q.weight": ("attention", "query", "kernel"),
        "layer.0.SelfAttention.k.weight": ("attention", "key", "kernel"),
        "layer.0.SelfAttention.v.weight": ("attention", "value", "kernel"),
        "layer.0.SelfAttention.o.weight": ("attention", "out", "kernel"),
        "layer.0.SelfAttention.relative_attention_bias.weight": ("attention", "relative_bias"),
        "layer.0.layer_norm.weight": ("attention_norm", "scale"),
        "layer.1.DenseReluDense.wi.weight": ("ffn", "in", "kernel"),
        "layer.1.DenseReluDense.wi_0.weight": ("ffn", "gate", "kernel"),
        "layer.1.DenseReluDense.wi_1.weight": ("ffn", "in", "kernel"),
        "layer.1.DenseReluDense.wo.weight": ("ffn", "out", "kernel"),
        "layer.1.layer_norm.weight": ("ffn_norm", "scale"),
    }
    params = {}
    for key, value in weights.items():
        if key in names:
            path = names[key]
        else:
            _, _, index, rest = key.split(".", 3)
            path = (f"block_{index}", *layers[rest])
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value.T if path[-1] == "kernel" else value
    return params


@pytest.mark.parametrize("name", ["t5", "t5_relu", "umt5"])
def test_equals_hugging_face(name):
    data = load_file(FIXTURE)
    weights = {key.split("/", 1)[1]: value for key, value in data.items() if key.startswith(name + "/")}
    expected = weights.pop("output")
    ffn = "relu" if name == "t5_relu" else "gated_gelu"
    config = TextConfig(
        vocab_size=48, width=24, num_layers=2, num_heads=3, head_dim=6, ffn_width=40, ffn=ffn, relative_buckets=16,
        relative_max_distance=40, bias_per_layer=name == "umt5",
    )  # fmt: skip
    encoder, params = TextEncoder(config), from_state_dict(weights)
    fresh = jax.eval_shape(encoder.init, jax.random.key(0), data["tokens"], data["mask"])["params"]
    assert jax.tree.map(lambda x: x.shape, fresh) == jax.tree.map(lambda x: x.shape, params)
    out = np.asarray(encoder.apply({"params": params}, data["tokens"], data["mask"]))
    np.testing.assert_allclose(out[data["mask"]], expected[data["mask"]], rtol=0, atol=1e-4)
    assert not out[~data["mask"]].any()


@pytest.mark.parametrize("num_buckets, max_distance, length", [(32, 128, 160), (16, 40, 60), (8, 20, 33)])
def test_relative_buckets_follow_the_formula(num_buckets, max_distance, length):
    buckets = relative_buckets(length, num_buckets, max_distance)
    half, exact = num_buckets // 2, num_buckets // 4
    for query in (0, length // 2, length - 1):
        for key in range(length):
            distance = abs(key - query)
            if distance < exact:
                expected = distance
            else:
                share = math.log(distance / exact) / math.log(max_distance / exact)
                if abs(share * (half - exact) - round(share * (half - exact))) < 1e-5:
                    continue  # a whole logarithm: float32 rounding decides, parity with T5 covers it
                expected = min(exact + int(share * (half - exact)), half - 1)
            assert buckets[query, key] == expected + (half if key > query else 0)
    assert buckets.max() == num_buckets - 1


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_tokens_are_bytes_and_come_back(text):
    data = text.encode()
    tokens, mask = tokenize(text, 200)
    assert tokens.dtype == np.int32 and mask.dtype == bool and mask.sum() == len(data) + 1
    assert bytes((tokens[: len(data)] - 3).astype(np.uint8)) == data
    assert tokens[len(data)] == 1 and not tokens[len(data) + 1 :].any()


def test_an_emoji_is_four_bytes_and_a_full_prompt_fits():
    tokens, mask = tokenize("🚗", 5)
    assert tokens.tolist() == [0xF0 + 3, 0x9F + 3, 0x9A + 3, 0x97 + 3, 1] and mask.all()


@pytest.mark.parametrize("text, size", [("x" * 10_000, 10_000), ("é" * 64, 128), ("🚗" * 32, 128)])
def test_a_prompt_too_long_says_by_how_much(text, size):
    with pytest.raises(ValueError, match=f"prompt: {size} bytes, but at most 127 fit"):
        tokenize(text, 128)


def test_broken_unicode_is_one_clear_error():
    with pytest.raises(ValueError, match="prompt: no valid Unicode at character 2") as caught:
        tokenize("a \udcff", 128)
    assert not isinstance(caught.value, UnicodeError)


@pytest.mark.parametrize("text", ["", "a red car 🚗", "bus"])
def test_padding_changes_nothing(small, text):
    short, short_mask = encode(small, text, len(text.encode()) + 1)
    long, long_mask = encode(small, text, 40)
    np.testing.assert_allclose(long[long_mask], short[short_mask], rtol=0, atol=1e-5)
    assert not long[~long_mask].any()


def test_what_stands_in_the_padding_is_not_read(small):
    encoder, params = small
    tokens, mask = tokenize("a red car", 20)
    other = np.where(mask, tokens, 77)
    same = encoder.apply(params, tokens[None], mask[None]) == encoder.apply(params, other[None], mask[None])
    assert bool(same.all())


def test_an_empty_prompt_is_one_vector_and_words_matter(small):
    empty, mask = encode(small, "", 12)
    assert mask.tolist() == [True] + [False] * 11 and np.isfinite(empty).all() and empty[0].any()
    red, blue = encode(small, "a red car", 12)[0], encode(small, "a sea car", 12)[0]
    assert np.abs(red - blue)[9].max() > 1e-3  # the EOS position has seen the words before it


def test_order_matters_through_the_position_bias(small):
    there, back = encode(small, "ab", 3)[0], encode(small, "ba", 3)[0]
    assert np.abs(there[2] - back[2]).max() > 1e-4


def test_bfloat16_computation_stays_close_and_returns_float32(small):
    encoder, params = small
    tokens, mask = tokenize("a red car drives", 20)
    exact = encoder.apply(params, tokens[None], mask[None])
    coarse = TextEncoder(SMALL, jnp.bfloat16).apply(params, tokens[None], mask[None])
    assert coarse.dtype == jnp.float32
    assert 1e-5 < float(jnp.sqrt(jnp.mean((coarse - exact) ** 2))) < 0.05


def test_umt5_xxl_has_its_published_size():
    config = TextConfig(
        vocab_size=256384, width=4096, num_layers=24, num_heads=64, head_dim=64, ffn_width=10240, bias_per_layer=True,
        max_tokens=512,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 512), jnp.bool_)
    shapes = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), tokens, mask)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 5_680_910_336  # Wan 2.1's UMT5-XXL encoder: 5.68 B


@pytest.mark.parametrize(
    "field, value",
    [("width", 0), ("num_layers", -1), ("ffn", "swish"), ("relative_buckets", 6), ("relative_max_distance", 8)],
)
def test_config_mistakes_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        TextConfig(**{field: value})
