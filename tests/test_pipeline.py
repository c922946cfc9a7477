"""Streams of a whole model: laws 1 and 3, prompts, snapshots, and models that cannot be loaded."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamdit_jax as sd
from streamdit_jax import stream as streaming
from streamdit_jax import weights
from streamdit_jax.errors import CheckpointError, ConfigError, StreamDiTError
from streamdit_jax.models.dit import DiT
from streamdit_jax.snapshot import Snapshot


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return sd.load(tiny_model)


def take(stream, count):
    return np.concatenate([next(stream) for _ in range(count)])


def test_frames_come_in_chunks(pipeline):
    stream = pipeline.stream("a red car", seed=1)
    for _ in range(3):
        frames = next(stream)
        assert frames.dtype == np.uint8 and frames.shape == (8, 16, 16, 3)
    assert np.ptp(frames) > 0


def test_a_stream_equals_offline_sampling_and_whole_decoding(pipeline):
    """Law 3: step by step with carried decoder state = one scan, decoded at once."""
    streamed = take(pipeline.stream("a red car", seed=3), 6)
    condition = streaming.Condition(
        pipeline.encode_prompt("a red car"), pipeline.encode_prompt(""), np.full(1, 2.0, np.float32)
    )

    def velocity(latents, text, levels):
        return DiT(pipeline.config.dit).apply({"params": pipeline._dit_params}, latents, levels, text)

    latents = streaming.sample(velocity, jax.random.key(3)[None], condition, pipeline.scheme(None), (4, 4, 4), 6)
    whole = np.asarray(pipeline.decode(latents, None)[0])[0]
    assert np.abs(whole.astype(int) - streamed).max() <= 1


@pytest.mark.parametrize("scheme", ["N4c2s2", "K2N3c2s2", "K4N1c4s3", "N8c1s1", "N1c8s4"])
@pytest.mark.parametrize("filling", ["uniform", "ramp"])
def test_every_scheme_streams(pipeline, scheme, filling):
    stream = pipeline.stream("a bus", scheme=scheme, filling=filling)
    parsed = stream.scheme
    if parsed.num_references and filling == "uniform":
        assert len(next(stream)) == 4 * parsed.num_references
    before = stream.forwards_until_frames
    assert len(next(stream)) == 4 * parsed.chunk_size and before >= 1
    assert stream.forwards_until_frames == parsed.micro_steps


def test_prompt_seed_guidance_levels_never_recompile(pipeline):
    """Law 1: they are inputs of one compiled step."""
    stream = pipeline.stream("a red car", seed=0, guidance=2.0)
    next(stream)
    sizes = [step._cache_size() for step in pipeline._steps.values()]
    stream.prompt, stream.guidance = "a blue bus at night", 1.0
    next(stream)
    next(pipeline.stream("", seed=9, scheme="N4c2s5p2", guidance=0.5))
    assert [step._cache_size() for step in pipeline._steps.values()] == sizes
    assert pipeline._encode_text._cache_size() == 1


def test_prompts_and_seeds_matter_and_repeat(pipeline):
    first = take(pipeline.stream("a red car", seed=0), 2)
    assert np.array_equal(first, take(pipeline.stream("a red car", seed=0), 2))
    assert not np.array_equal(first, take(pipeline.stream("a red car", seed=1), 2))
    assert not np.array_equal(first, take(pipeline.stream("a bus in snow", seed=0), 2))


def test_a_prompt_takes_effect_at_the_next_micro_step(pipeline):
    stream, other = pipeline.stream("a red car", seed=5), pipeline.stream("a red car", seed=5)
    assert np.array_equal(next(stream), next(other))
    other.prompt = "a blue bus at night"
    assert other.prompt == "a blue bus at night"
    assert not np.array_equal(next(stream), next(other)), "even the chunk that leaves next has a step to go"


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize("scheme", ["N4c2s2", "K2N3c2s2"])
def test_a_resumed_snapshot_continues_bit_for_bit(pipeline, tiny_model, tmp_path, chunks, scheme):
    """Law 3, also from a file, also between the micro steps of a filling."""
    stream = pipeline.stream("a red car", seed=2, scheme=scheme, guidance=1.5)
    if chunks == 0:
        stream._forward()
    else:
        take(stream, chunks)
    snapshot = stream.snapshot()
    snapshot.save(tmp_path / "s.snap")
    expected = take(stream, 3)
    assert np.array_equal(expected, take(pipeline.resume(snapshot), 3))
    resumed = sd.load(tiny_model).resume(tmp_path / "s.snap")
    assert resumed.prompt == "a red car" and resumed.guidance == 1.5
    assert np.array_equal(expected, take(resumed, 3))


@pytest.mark.slow
def test_a_snapshot_continues_in_another_process(pipeline, tiny_model, tmp_path):
    stream = pipeline.stream("a red car", seed=2)
    take(stream, 2)
    stream.snapshot().save(tmp_path / "s.snap")
    expected = take(stream, 2)
    program = (
        "import sys, numpy as np, streamdit_jax as sd\n"
        "stream = sd.load(sys.argv[1]).resume(sys.argv[2])\n"
        "np.save(sys.argv[3], np.concatenate([next(stream), next(stream)]))\n"
    )
    files = [str(tiny_model), str(tmp_path / "s.snap"), str(tmp_path / "frames.npy")]
    subprocess.run([sys.executable, "-c", program, *files], check=True, timeout=300)
    assert np.array_equal(expected, np.load(tmp_path / "frames.npy"))


def test_damaged_and_foreign_snapshots(pipeline, tmp_path, tiny_params):
    stream = pipeline.stream("a red car")
    path = tmp_path / "s.snap"
    stream.snapshot().save(path)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-5] ^= 1
    for content in (data[: len(data) // 2], bytes(flipped), b"not a snapshot", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"s\.snap"):
            Snapshot.load(path)
    with pytest.raises(CheckpointError, match="no such snapshot"):
        pipeline.resume(tmp_path / "missing.snap")
    with pytest.raises(CheckpointError, match="other weights"):
        sd.pipeline.Pipeline(pipeline.config, tiny_params, "other").resume(stream.snapshot())
    with pytest.raises(CheckpointError, match="could not be written"):
        stream.snapshot().save(tmp_path / "no" / "such" / "folder.snap")


@pytest.mark.parametrize("prompt", ["", "a", "🚗💨 a câr"])
def test_short_and_strange_prompts_stream(pipeline, prompt):
    assert next(pipeline.stream(prompt)).shape == (8, 16, 16, 3)


def test_a_prompt_that_is_too_long_changes_nothing(pipeline):
    with pytest.raises(StreamDiTError, match="10000 bytes"):
        pipeline.stream("x" * 10_000)
    stream = pipeline.stream("a red car")
    with pytest.raises(StreamDiTError):
        stream.prompt = "x" * 10_000
    assert stream.prompt == "a red car" and len(next(stream)) == 8


def test_impossible_streams(pipeline):
    for options, message in (
        ({"scheme": "N4c1s1"}, "scheme: N4c1s1 has 4 frames"),
        ({"scheme": "many"}, "scheme"),
        ({"filling": "magic"}, "filling"),
        ({"seed": 2**40}, "seed"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline.stream("a red car", **options)


def test_models_that_cannot_be_loaded(tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match="no model of that name"):
        sd.load("nowhere")

    def copy():
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return shutil.copytree(tiny_model, tmp_path / "model")

    directory = copy()
    assert sd.load(tmp_path).config.name == "tiny", "the run's directory will do"
    part = next(directory.glob("dit-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        sd.load(directory)
    part.unlink()
    with pytest.raises(CheckpointError, match=part.name):
        sd.load(directory)
    for content in ("{", "[]", '{"format": 99}'):
        (copy() / "model.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"model\.json"):
            sd.load(directory)
    card = weights.load_card(copy())
    card["config"]["dit"]["ffn_width"] = 48
    (directory / "model.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"dit: parameter .* has shape"):
        sd.load(directory)
    card["config"]["dit"]["num_heads"] = 3
    (directory / "model.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"dit\.num_heads"):
        sd.load(directory)


def test_weights_round_trip_in_both_types(tmp_path):
    tree = {"a": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}, "n": np.arange(3, dtype=np.int32)}
    for dtype, error in (("float32", 0), ("bfloat16", 4e-3)):
        weights.save_model(tmp_path / dtype, {}, {"part": tree}, {}, dtype=dtype)
        loaded = weights.load_part(tmp_path / dtype, weights.load_card(tmp_path / dtype), "part")
        assert loaded["a"]["kernel"].dtype == jnp.dtype(dtype) and loaded["n"].dtype == np.int32
        assert np.abs(loaded["a"]["kernel"].astype(np.float32) - tree["a"]["kernel"]).max() <= error


def test_a_save_that_fails_leaves_the_former_model(tmp_path, monkeypatch):
    """A disk that is full while the second model is saved."""
    weights.save_model(tmp_path, {}, {"part": {"x": np.zeros(3, np.float32)}}, {})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        weights.save_model(tmp_path, {}, {"part": {"x": np.ones(3, np.float32)}}, {})
    kept = weights.load_part(tmp_path, weights.load_card(tmp_path), "part")
    assert np.array_equal(kept["x"], np.zeros(3)) and not list(tmp_path.glob(".*partial"))
