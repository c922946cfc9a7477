"""The roofline's FLOPs against flops.py and against every product that the model traces; its bytes by hand."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from streamdit_jax import cli, roofline
from streamdit_jax.config import from_arguments
from streamdit_jax.flops import forward_flops, text_tokens
from streamdit_jax.models.tae import TAE, TAEConfig, initial_decoder_state
from streamdit_jax.roofline import RATES, Rates, Row, bound, decoder, forward, streaming

ROUND = Rates(float32=1e3, bfloat16=2e3, fp8=4e3, bandwidth=1e2, source="round numbers")


def total(rows):
    return sum(row.count * row.flops for row in rows)


@pytest.fixture(scope="module")
def model():
    student = ["--config.sampling.scheme=N8c2s1", "--config.sampling.guidance=1.0"]
    return from_arguments(["--config=configs/streamdit_4b_quality.py", *student])


@pytest.mark.parametrize("file", ["configs/streamdit_4b.py", "configs/roadtrip.py"])
@pytest.mark.parametrize("precision", roofline.SIZES)
def test_the_products_of_a_model_are_those_that_flops_counts(file, precision):
    config = from_arguments([f"--config={file}"])
    counted = forward_flops(config.dit, text_tokens(config))
    rows = forward(config.dit, text_tokens(config), precision, batch=3)
    assert total(rows) == 3 * counted["total"]
    of_kind = {kind: total(row for row in rows if row.kind == kind) for kind in ("attention", "cross_attention")}
    assert of_kind == {"attention": 3 * counted["window_attention"], "cross_attention": 3 * counted["cross_attention"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": "swiglu", "adaln": "per_block", "qk_norm": "head"},
        {"position": "rope", "qk_norm": "width"},
        {"position": "both"},
        {"cross_attention": False, "windows": ((4, 2, 2), (8, 1, 1)), "shifted": (False,)},
    ],
)
def test_the_products_of_every_choice(tiny, changes):
    config = dataclasses.replace(tiny.dit, **changes)
    for precision in roofline.SIZES:
        assert total(forward(config, 24, precision)) == forward_flops(config, 24)["total"]


def products(jaxpr):
    """2·m·k·n of every matrix product and convolution in a jaxpr and in what it calls."""
    count = 0
    for equation in jaxpr.eqns:
        outputs = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            count += 2 * outputs * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            count += 2 * outputs * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        for inner in equation.params.values():
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                count += products(getattr(inner, "jaxpr", inner))
    return count


@pytest.mark.parametrize(
    "config, latent",
    [
        (TAEConfig(8, widths=(128, 256, 512), blocks=(2, 2, 4), kernel_time=3), (2, 64, 64)),
        (TAEConfig(3, ((1, 2, 2), (2, 4, 2)), (8, 12), (1, 0), 2, linear_skip=True), (4, 3, 5)),
    ],
)
def test_the_products_of_a_chunks_decoder_are_those_that_are_traced(config, latent):
    _, rows, columns = config.compression
    latents = jax.ShapeDtypeStruct((1, *latent, config.latent_channels), jnp.float32)
    state = jax.eval_shape(lambda: initial_decoder_state(config, 1, rows * latent[1], columns * latent[2]))
    decode = TAE(config)
    params = jax.eval_shape(lambda x: decode.init(jax.random.key(0), x, method=TAE.decode), latents)
    jaxpr = jax.make_jaxpr(lambda params, x, state: decode.apply(params, x, state, method=TAE.decode))
    assert total(decoder(config, latent)) == products(jaxpr(params, latents, state).jaxpr) > 0


def test_the_bytes_of_the_4b_by_hand(model):
    """16,384 tokens of width 3,072 in bfloat16: 96 MiB of hidden states."""
    rows = {row.name: row for row in forward(model.dit, 768)}
    hidden = 96 * 2**20
    assert rows["qkv"].read == hidden + 2 * 3072 * 9216 + 2 * 9216 and rows["qkv"].written == 3 * hidden
    assert rows["up"].written == 16384 * 8192 * 2 and rows["qkv"].count == 32
    window = rows["window attention to 2048"]
    assert (window.read, window.written, window.flops) == (3 * hidden, hidden, 4 * 16384 * 2048 * 3072)
    assert rows["cross-attention"].read == hidden + 2 * 768 * 3072 * 2
    norm = rows["norm before cross-attention"]
    assert norm.written == 2 * hidden and norm.read == 2 * hidden + 3 * 16 * 3072 * 2
    # The product before it has added the residual.
    assert rows["norm before feed-forward"].written == hidden and rows["norm before feed-forward"].read < 1.01 * hidden
    assert rows["cross out"].read == rows["cross query"].read + hidden
    alone = {row.name: row for row in forward(dataclasses.replace(model.dit, cross_attention=False), 768)}
    assert alone["norm before feed-forward"] == dataclasses.replace(norm, name="norm before feed-forward")
    assert rows["first norm"].read < 1.01 * hidden and rows["norm before self-attention"].count == 31
    assert "gelu" not in rows and "query and key" not in rows  # an epilogue; and nothing to do without norm and angles


def test_fp8_reads_half_and_passes_more(model):
    wide = {row.name: row for row in forward(model.dit, 768)}
    rows = {row.name: row for row in forward(model.dit, 768, "fp8")}
    assert {name for name, row in rows.items() if row.kind == "fp8_gemm"} == {"qkv", "out", "up", "down"}
    assert rows["qkv"].read == 16384 * 3072 + 3072 * 9216 + 9216 * (2 + 4)
    assert rows["qkv"].written == wide["qkv"].written and rows["cross query"] == wide["cross query"]
    assert set(rows) - set(wide) == {"query, key and value", "attention to fp8", "gelu"}
    assert rows["gelu"].read == 2 * rows["gelu"].written


def test_guidance_doubles_the_tokens_and_reads_the_weights_once(model):
    one, two = ({row.name: row for row in forward(model.dit, 768, batch=batch)} for batch in (1, 2))
    weights = 2 * 3072 * 8192 + 2 * 8192
    assert two["up"].read - weights == 2 * (one["up"].read - weights)
    assert two["cross-attention"].read == 2 * one["cross-attention"].read


def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes():
    multiplies = Row("gemm", "gemm", 3, flops=4000, read=50, written=50, inputs="bfloat16")
    moves = Row("norm", "elementwise", 1, flops=0, read=100, written=300, inputs="bfloat16")
    eight = Row("fp8", "fp8_gemm", 1, flops=4000, read=200, written=0, inputs="fp8")
    report = bound((multiplies, moves, eight), ROUND)
    assert [(row["ms"], row["by"]) for row in report["rows"]] == [(6000, "flops"), (4000, "bytes"), (2000, "bytes")]
    assert report["ms"] == 12_000 and report["flops"] == 16_000
    assert (report["read_bytes"], report["written_bytes"]) == (3 * 50 + 100 + 200, 3 * 50 + 300)
    assert report["kinds"]["gemm"] == {"count": 3, "flops": 12_000, "read_bytes": 150, "written_bytes": 150, "ms": 6000}


def test_frames_per_second_count_the_decoder(model):
    report = streaming(model, RATES["h200"])
    chunk = report["forward"]["ms"] + report["decoder"]["ms"]
    assert report["frames_per_chunk"] == 8 and report["forwards_per_chunk"] == 1
    assert report["end_to_end_fps"] == pytest.approx(8000 / chunk, abs=0.01)
    assert report["end_to_end_fps"] < report["denoise_fps"]
    assert report["decoder_share"] == pytest.approx(report["decoder"]["ms"] / chunk, abs=1e-4)
    assert report["first_frame_ms"] == pytest.approx(8 * report["forward"]["ms"] + report["decoder"]["ms"], abs=0.1)
    doubling = dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, filling="doubling"))
    late = streaming(doubling, RATES["h200"])["first_frame_ms"]
    assert late == pytest.approx(36 * report["forward"]["ms"] + report["decoder"]["ms"], abs=0.1)
    sampling = dataclasses.replace(model.sampling, scheme="N8c2s4", guidance=2.0)
    guided = streaming(dataclasses.replace(model, sampling=sampling), RATES["h200"])
    assert guided["forward"]["flops"] == 2 * report["forward"]["flops"] and guided["forwards_per_chunk"] == 4
    assert guided["denoise_fps"] == pytest.approx(report["denoise_fps"] / 8, rel=0.02)


def test_a_precision_that_is_none(tiny):
    with pytest.raises(ValueError, match="precision: 'fp4' is not one of float32, bfloat16, fp8"):
        forward(tiny.dit, 24, "fp4")


def test_the_command_prints_json_and_tables(capsys):
    arguments = ["plan", "--roofline", "--config=configs/streamdit_4b_quality.py", "--topology=h200:8"]
    assert cli.main([*arguments, "--precision=fp8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["what"] == "roofline" and report["precision"] == "fp8" and report["command"].startswith("streamdit p")
    assert report["topology"] == "h200" and "measured on an H200" in report["rates"]["source"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "| qkv | gemm | 32 |" in said and "| convolution 0 | convolution | 2 |" in said and "end to end" in said


def test_a_topology_whose_rates_are_unknown(capsys):
    assert cli.main(["plan", "--roofline", "--config=configs/roadtrip.py", "--topology=v5e:2x2"]) == 2
    assert "--roofline: the rates of 'v5e' are not known, only those of h100, h200" in capsys.readouterr().err
