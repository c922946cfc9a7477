"""Quantising a model: calibration, what it leaves alone, files, and the commands that must not damage it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamdit_jax as sd
from streamdit_jax import cli, quantization, weights
from streamdit_jax.errors import CheckpointError, ConfigError
from streamdit_jax.evaluation import quantized as measures
from streamdit_jax.models.dit import DiT, unstack
from streamdit_jax.models.linear import FLOAT8, LARGEST
from streamdit_jax.parameters import initialise
from streamdit_jax.pipeline import Pipeline

PROMPTS = ("a red car", "a blue bus at night")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch):
    """The compilation cache of a user is left alone."""
    monkeypatch.setattr(cli, "_enable_caches", lambda: None)


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat(tree)}


def flat(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.fixture(scope="module")
def pipeline(tiny, tiny_params):
    return Pipeline(tiny, tiny_params)


@pytest.fixture(scope="module")
def quantized(tiny, tiny_params, pipeline):
    """The tiny model, quantised; and the largest inputs that calibration saw."""
    largest = quantization.calibrate(pipeline, PROMPTS, chunks=1)
    return *quantization.quantize_with(tiny, tiny_params, largest), largest


@pytest.fixture(scope="module")
def model(quantized, tmp_path_factory):
    """On disk, where what is not quantised is bfloat16."""
    config, params, _ = quantized
    directory = tmp_path_factory.mktemp("quantized") / "model"
    weights.save_model(directory, json.loads(config.to_json()), params, {"command": "tests"}, dtype="bfloat16")
    return directory


def test_only_the_projections_change(tiny_params, quantized):
    config, params, _ = quantized
    before, after = leaves(tiny_params), leaves(params)
    names = [f"dit/blocks/{module}/{name}" for module, name in quantization.PROJECTIONS if name != "gate"]
    assert before.keys() - after.keys() == {f"{name}/kernel" for name in names}
    added = {f"{name}/{leaf}" for name in names for leaf in ("quantized_kernel", "kernel_scale", "input_scale")}
    assert after.keys() - before.keys() == added
    for name in before.keys() & after.keys():
        np.testing.assert_array_equal(before[name], after[name])
    assert config.dit.quantization == "fp8"


def test_parameters_are_those_that_the_quantised_configuration_asks_for(quantized):
    config, params, _ = quantized
    expected = jax.eval_shape(lambda key: initialise(config, key), jax.random.key(0))
    weights.check_shapes(params["dit"], expected["dit"], "quantised")
    wanted = leaves(expected["dit"])
    for name, leaf in leaves(params["dit"]).items():
        assert leaf.dtype == wanted[name].dtype, name


def test_scales_hold_the_largest_input_of_every_forward(tiny, pipeline, quantized):
    """What calibration saw fits with room to spare, at every level of the buffer, filling included."""
    _, params, largest = quantized
    for module, name in quantization.PROJECTIONS:
        if name == "gate":
            continue
        scale = np.asarray(params["dit"]["blocks"][module][name]["input_scale"])
        seen = np.asarray(largest[f"{module}/{name}"])
        assert seen.shape == (tiny.dit.num_layers,) and (seen > 0).all()
        np.testing.assert_allclose(scale * LARGEST, quantization.MARGIN * seen, rtol=1e-6)
    again = {}
    for state, row, condition, _ in quantization.forwards(pipeline, PROMPTS[1], 1, 1):
        given = pipeline.dit_params, state.buffer, row.levels[0][None], condition.text
        for name, seen in quantization._largest_inputs(tiny.dit, *given).items():
            again[name] = jnp.maximum(again.get(name, 0), seen)
    assert all(np.all(again[name] <= largest[name]) for name in largest)


def test_calibration_visits_every_level_of_the_scheme(pipeline):
    """Levels of the buffer's frames over the forwards: of filling, and of every micro step of every chunk."""
    steps = list(quantization.forwards(pipeline, "a red car", 0, chunks=2))
    scheme = pipeline.scheme(None)
    visited = {float(level) for _, row, _, _ in steps for level in row.levels[0]}
    assert visited >= {float(level) for level in scheme.step_levels()[:-1].ravel()}
    assert sum(bool(row.advance) for _, row, _, _ in steps) == 2


@pytest.mark.slow
def test_calibration_is_deterministic(tiny, tiny_params, quantized):
    again = quantization.calibrate(Pipeline(tiny, tiny_params), PROMPTS, chunks=1)
    jax.tree.map(np.testing.assert_array_equal, again, quantized[2])


@pytest.mark.parametrize(
    "prompts, chunks, message", [((), 1, "--prompt: give at least one"), (PROMPTS, 0, "--chunks:")]
)
def test_what_cannot_be_calibrated_is_named(tiny, tiny_params, prompts, chunks, message):
    with pytest.raises(ConfigError, match=message):
        quantization.quantize(tiny, tiny_params, prompts, chunks=chunks)


def test_a_quantised_model_is_not_quantised_again(quantized):
    with pytest.raises(ConfigError, match=r"dit\.quantization: the model is quantised already"):
        quantization.quantize(quantized[0], quantized[1], PROMPTS)


def test_the_forward_is_close_to_that_of_the_source(tiny, tiny_params, quantized):
    """And the layers, scanned or one by one, are the same function."""
    config, params, _ = quantized
    key = jax.random.key(5)
    latents, levels = jax.random.normal(key, (1, *tiny.dit.latent)), jnp.linspace(1, 0, 8)[None]
    text = ((jax.random.normal(key, (1, 6, 16)), jnp.ones((1, 6), bool)),)

    def forward(config, params):
        return jax.jit(lambda params: DiT(config.dit).apply({"params": params}, latents, levels, text))(params)

    exact, made = forward(tiny, tiny_params["dit"]), forward(config, params["dit"])
    error = jnp.linalg.norm(made - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.1
    np.testing.assert_allclose(forward(config, unstack(params["dit"])), made, atol=1e-5)


def test_a_quantised_model_streams_from_disk_and_holds_no_wider_copy(model, quantized):
    pipeline = sd.load(model)
    assert next(pipeline.stream("a red car")).dtype == np.uint8
    one = pipeline.dit_params["blocks"][0]["feed_forward"]["up"]
    assert {name: leaf.dtype for name, leaf in one.items()} == {
        "quantized_kernel": FLOAT8,
        "kernel_scale": jnp.float32,
        "input_scale": jnp.float32,
        "bias": pipeline.config.dit.compute_dtype,
    }
    assert one["quantized_kernel"].shape == (32, 16)
    np.testing.assert_array_equal(
        one["quantized_kernel"], quantized[1]["dit"]["blocks"]["feed_forward"]["up"]["quantized_kernel"][0]
    )


def test_files_name_their_types_as_safetensors_does(model):
    [file] = model.glob("dit-*.safetensors")
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    of_map = {name: header[f"blocks/self_attention/qkv/{name}"]["dtype"] for name in ("quantized_kernel", "bias")}
    assert of_map == {"quantized_kernel": "F8_E4M3", "bias": "BF16"}
    assert header["blocks/self_attention/qkv/kernel_scale"]["dtype"] == "F32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_leaves_quantised_values_and_scales_as_they_are(model, tmp_path, capsys, dtype):
    assert cli.main(["export", str(model), str(tmp_path / "copy"), f"--dtype={dtype}"]) == 0
    before, after = (
        leaves(weights.load_part(path, weights.load_card(path), "dit")) for path in (model, tmp_path / "copy")
    )
    for name in before:
        kept = name.endswith(("quantized_kernel", "_scale"))
        assert after[name].dtype == (before[name].dtype if kept else jnp.dtype(dtype)), name
        np.testing.assert_array_equal(before[name].astype(np.float32), after[name].astype(np.float32))
    assert sd.load(tmp_path / "copy").config.dit.quantization == "fp8"


def test_quantised_models_have_no_mean(model, quantized, tmp_path):
    config, params, _ = quantized
    weights.save_model(tmp_path / "other", json.loads(config.to_json()), params, {})
    with pytest.raises(CheckpointError, match=r"model: its dit is quantised, and scaled values have no mean"):
        weights.average([model, tmp_path / "other"])


def test_files_of_another_precision_than_the_configuration_are_refused(model, tiny, quantized, tmp_path):
    unquantised = json.loads(tiny.to_json())
    weights.save_model(tmp_path / "mixed", unquantised, quantized[1], {})
    with pytest.raises(CheckpointError, match="input_scale is not part of this configuration"):
        sd.load(tmp_path / "mixed")


CONFIG = """
from configs import roadtrip

def get_config():
    config = roadtrip.get_config()
    config.dit.quantization = "fp8"
    return config
"""


def test_training_refuses_before_any_device_work(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("a device was asked for"))
    (tmp_path / "quantized.py").write_text(CONFIG)
    arguments = [f"--config={tmp_path / 'quantized.py'}"]
    for command in (["train", f"--workdir={tmp_path / 'run'}"], ["bench", "--what=train"]):
        assert cli.main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "dit.quantization: fp8 is for inference" in error
    assert not (tmp_path / "run").exists()


def test_the_command_names_what_it_cannot_do(capsys, tiny_model, model, tmp_path):
    for arguments, message in (
        (["--model", tiny_model], "--prompt: give at least one prompt"),
        (["--model", model, "--prompt", "a"], "dit.quantization: the model is quantised already"),
        (["--model", tiny_model, "--prompt", "a", "--chunks", "0"], "--chunks: at least 1"),
        (["--model", tmp_path / "none", "--prompt", "a"], "no model of that name"),
    ):
        assert cli.main(["quantize", "--out", str(tmp_path / "out"), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()
    assert cli.main(["quantize", "--model", str(tiny_model), "--out", str(tiny_model), "--prompt", "a"]) == 2
    assert "--out:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_a_model_and_says_what_it_costs(capsys, tiny_model, tmp_path):
    out = tmp_path / "fp8"
    arguments = ["--prompt", "a red car", "--check", "a blue bus", "--check", "snow", "--chunks", "2", "--json"]
    assert cli.main(["quantize", "--model", str(tiny_model), "--out", str(out), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dit_bytes"]["quantized"] < report["dit_bytes"]["source"]
    comparison = report["comparison"]
    assert (comparison["prompts"], comparison["first_seed"], comparison["scheme"]) == (
        ["a blue bus", "snow"],
        1,
        "N4c2s2",
    )
    for name in ("bfloat16", "fp8", "fp8_bfloat16"):
        one = comparison[name]
        assert 0 < one["velocity"] < 0.1 and len(one["layers"]) == 2 and len(one["stream"]["by_chunk"]) == 2
        assert one["stream"]["worst"] <= min(one["stream"]["by_chunk"]) <= one["stream"]["mean"]
    first = comparison["fp8"]["layers"][0]["self_attention/qkv"]
    assert 0.01 < first["alone"] < 0.1 and first["alone"] == pytest.approx(first["in_model"], rel=1e-3)
    card = weights.load_card(out)
    assert card["card"]["calibration"] == report["calibration"] and card["config"]["dit"]["quantization"] == "fp8"
    assert card["card"]["quantized_from"]["card"] == {"command": "tests"}
    assert next(sd.load(out).stream("a red car", seed=3)).shape[1:] == (16, 16, 3)


@pytest.mark.slow
def test_a_model_beside_itself_differs_in_nothing(tiny, tiny_params):
    """And a model that is off by a known factor differs by that factor."""
    source = tiny, tiny_params
    report = measures.compare(source, source, ["a red car"], chunks=1)["fp8"]
    assert report["velocity"] == 0 and report["one_forward"]["mean"] is None and report["stream"]["worst"] is None
    velocity = jax.tree.map(lambda leaf: 1.25 * leaf, tiny_params["dit"]["velocity"])
    other = tiny, {**tiny_params, "dit": {**tiny_params["dit"], "velocity": velocity}}
    report = measures.compare(source, other, ["a red car"], chunks=1)["fp8"]
    assert report["velocity"] == pytest.approx(0.25, rel=1e-3)
    assert all(one == {"alone": 0, "in_model": 0} for layer in report["layers"] for one in layer.values())


def test_the_guide_tells_the_recorded_figures():
    guide = (ROOT / "docs/quantization.md").read_text(encoding="utf-8")
    recorded = json.loads((ROOT / "docs/results/quantize-roadtrip.json").read_text(encoding="utf-8"))["comparison"]
    for name, what in (
        ("bfloat16", "the source in bfloat16"),
        ("fp8", "fp8, the rest in float32"),
        ("fp8_bfloat16", "fp8, the rest in bfloat16"),
    ):
        one = recorded[name]
        figures = [one[of][kind] for of in ("one_forward", "stream") for kind in ("mean", "worst")]
        row = " | ".join([what, f"{one['velocity']:.2%}", *(f"{figure:.1f}" for figure in figures)])
        assert f"| {row} |" in guide
    assert recorded["fp8_bfloat16"]["stream"]["worst"] >= 35


SHARDED = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
from streamdit_jax import quantization, sharding
from streamdit_jax.models.dit import DiT, DiTConfig, unstack
from streamdit_jax.models.linear import as_scale

config = DiTConfig(latent=(8, 8, 8, 4), patch=(1, 2, 2), width=32, num_layers=2, num_heads=4, ffn_width=64,
                   windows=((4, 2, 2),), ffn=sys.argv[1], remat="none", dtype="float32")
key = jax.random.key(0)
latents, levels = jax.random.normal(key, (1, *config.latent)), jnp.linspace(1, 0, 8)[None]
text = ((jax.random.normal(key, (1, 6, 16)), jnp.ones((1, 6), bool)),)
params = DiT(config).init(key, latents, levels, text)["params"]
params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), params)
largest = {f"{a}/{b}": np.full(2, 5.0) for a, b in quantization.PROJECTIONS if config.ffn == "swiglu" or b != "gate"}
blocks = quantization.quantize_blocks(params["blocks"], largest)
params, config = unstack({**params, "blocks": blocks}), dataclasses.replace(config, quantization="fp8")
alone = jax.jit(lambda params: DiT(config).apply({"params": params}, latents, levels, text))(params)
for axes in ({"fsdp": 2, "tensor": 2}, {"window": 2, "tensor": 2}):
    mesh = sharding.make_mesh(axes)
    with sharding.on(mesh):
        placed = sharding.place(params, mesh)
        forward = jax.jit(lambda params: DiT(config).apply({"params": params}, latents, levels, text))
        np.testing.assert_allclose(forward(placed), alone, atol=2e-2 * float(jnp.std(alone)))
    kernel = placed["blocks"][0]["feed_forward"]["down"]["quantized_kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (32 // axes.get("fsdp", 1), 64 // axes["tensor"])
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["gelu", "swiglu"])
def test_a_sharded_quantised_forward_equals_that_of_one_device(ffn):
    """Cut along the sides that its unquantised kernels are cut along, over `tensor` too."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, ffn], capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]
