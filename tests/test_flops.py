"""The count of FLOPs against method's figures, and against every product that the model traces."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from streamdit_jax.config import from_arguments
from streamdit_jax.flops import forward_flops, of_model
from streamdit_jax.models.dit import DiT


def products(jaxpr) -> int:
    """2·m·k·n of every dot_general in a jaxpr, in whatever it calls, and as often as a scan repeats it."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += times * products(getattr(inner, "jaxpr", inner))
    return total


def traced(config, texts):
    """The products of one forward for one stream; nothing is computed."""
    latents = jax.ShapeDtypeStruct((1, *config.latent), jnp.float32)
    levels = jax.ShapeDtypeStruct((1, config.latent[0]), jnp.float32)
    text = tuple(
        (jax.ShapeDtypeStruct((1, tokens, width), jnp.float32), jax.ShapeDtypeStruct((1, tokens), bool))
        for tokens, width in texts
    )
    params = jax.eval_shape(lambda *given: DiT(config).init(jax.random.key(0), *given), latents, levels, text)
    return products(jax.make_jaxpr(DiT(config).apply)(params, latents, levels, text).jaxpr)


def test_the_4b_forward_takes_the_flops_that_the_method_names():
    """In TFLOP, at 16,384 tokens and 512 text tokens with cached keys: 112.2 + 3.3 + 13.2 = 128.7."""
    config = from_arguments(["--config=configs/streamdit_4b.py"]).dit
    counts = {name: round(value / 1e12, 1) for name, value in forward_flops(config, 512).items()}
    assert counts == {"gemm": 112.2, "cross_attention": 3.3, "window_attention": 13.2, "text": 0, "total": 128.7}
    whole = dataclasses.replace(config, windows=((16, 32, 32),), shifted=(False,))
    assert round(forward_flops(whole, 512)["window_attention"] / 1e12, 1) == 105.6


@pytest.mark.parametrize("file", ["configs/streamdit_4b.py", "configs/roadtrip.py"])
def test_of_a_model_equals_what_is_traced(file):
    config = from_arguments([f"--config={file}"])
    texts = [(of_encoder.max_tokens, of_encoder.width) for of_encoder in config.text]
    assert of_model(config, text_is_cached=False)["total"] == traced(config.dit, texts)


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": "swiglu", "adaln": "per_block", "text_projection": "mlp"},
        {"position": "rope", "qk_norm": "width", "pooled_text": True},
        {"cross_attention": False, "windows": ((4, 2, 2), (8, 1, 1)), "shifted": (False,)},
    ],
)
def test_of_every_choice_equals_what_is_traced(tiny, changes):
    config = dataclasses.replace(tiny.dit, **changes)
    counts = forward_flops(config, 2 * 24, (20, 12), text_is_cached=False)
    assert counts["total"] == traced(config, [(24, 20), (24, 12)])


def test_encoders_that_do_not_share_the_tokens(tiny):
    with pytest.raises(ValueError, match="text_widths: 0 encoders"):
        forward_flops(tiny.dit, 10, text_is_cached=False)
