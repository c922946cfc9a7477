"""Streams of a whole model: laws 1 and 3, prompts, snapshots, and models that cannot be loaded."""

import dataclasses
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
from streamdit_jax import weight_files, weights
from streamdit_jax.data import roadtrip
from streamdit_jax.errors import CheckpointError, ConfigError, StreamDiTError
from streamdit_jax.models.dit import DiT
from streamdit_jax.partition import FILLINGS
from streamdit_jax.pipeline import Pipeline
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
@pytest.mark.parametrize("filling", FILLINGS)
def test_every_scheme_streams(pipeline, scheme, filling):
    stream = pipeline.stream("a bus", scheme=scheme, filling=filling)
    parsed = stream.scheme
    if parsed.num_references and filling != "ramp":
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


def test_a_running_stream_takes_nothing_from_the_host(pipeline):
    """Rows, guidance and text lie on the device; not even an explicit transfer is made."""
    stream = pipeline.stream("a red car", guidance=1.5)
    next(stream)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        with pytest.raises(RuntimeError, match="host-to-device"):
            jax.device_put(np.ones(3, np.float32)).block_until_ready()
        for _ in range(3):
            next(stream)
    stream.guidance, stream.prompt = 0.5, "snow"
    next(stream)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        next(stream)


@pytest.mark.parametrize("seed", [0, -1, -(2**31), 2**31 + 5, 2**32 - 1])
def test_a_seed_is_jax_s_own(pipeline, seed):
    state = pipeline.stream("", seed=seed).state
    assert np.array_equal(jax.random.key_data(state.keys[0]), jax.random.key_data(jax.random.key(seed)))


def test_layers_may_be_stacked_or_apart_on_the_host_or_on_the_device(pipeline, tiny, tiny_params):
    """As they are loaded, and in the type of the arithmetic."""
    blocks = tiny_params["dit"]["blocks"]
    layers = [jax.tree.map(lambda leaf, index=index: leaf[index], blocks) for index in range(tiny.dit.num_layers)]
    for params in (
        tiny_params,
        jax.tree.map(jnp.asarray, tiny_params),
        {**tiny_params, "dit": {**tiny_params["dit"], "blocks": layers}},
    ):
        made = Pipeline(tiny, params)
        assert isinstance(made.dit_params["blocks"], tuple)
        jax.tree.map(np.testing.assert_array_equal, made.dit_params, pipeline.dit_params)


def test_parameters_are_never_wider_than_they_are_stored(tiny, tiny_params, tmp_path):
    """Beside a transformer in bfloat16, as on accelerators; where it computes in float32, all are."""
    half = dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, dtype="bfloat16"))
    weights.save_model(tmp_path, json.loads(half.to_json()), tiny_params, {}, dtype="bfloat16")
    for config, dtype in ((half, "bfloat16"), (tiny, "float32")):
        made = sd.load(tmp_path, config=config)
        leaves = jax.tree.leaves((made.dit_params, made._tae_params, made._text_params))
        assert {str(leaf.dtype) for leaf in leaves} == {dtype}
    frames = [
        take(sd.load(tmp_path, config=half).stream("a red car"), 1),
        take(Pipeline(half, _half(tiny_params)).stream("a red car"), 1),
    ]
    assert np.abs(frames[0].astype(int) - frames[1]).max() <= 1


def _half(params):
    """bfloat16's numbers in float32, which autoencoder and text encoder compute in."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), params)


def test_prompts_tell_the_frame_rate_where_captions_did(pipeline, tiny, tiny_params):
    """Movie Gen §3.1.3; the empty prompt stays the one without conditions."""
    data = dataclasses.replace(tiny.data, frame_rate_prompt=True)
    told = Pipeline(dataclasses.replace(tiny, data=data), tiny_params)
    for prompt, plainly in (("a red car", "FPS-16 a red car"), ("", "")):
        for (x, mask), (y, other) in zip(told.encode_prompt(prompt), pipeline.encode_prompt(plainly)):
            np.testing.assert_array_equal(mask, other)
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_prompts_and_seeds_matter_and_repeat(pipeline):
    first = take(pipeline.stream("a red car", seed=0), 2)
    assert np.array_equal(first, take(pipeline.stream("a red car", seed=0), 2))
    assert not np.array_equal(first, take(pipeline.stream("a red car", seed=1), 2))
    assert not np.array_equal(first, take(pipeline.stream("a bus in snow", seed=0), 2))


# ---- steering: receipts, transitions, logs ----


def first_difference(frames, others):
    """The number of the first frame that differs by more than rounding."""
    return int(np.argmax(np.abs(frames.astype(int) - others).max(axis=(1, 2, 3)) > 1))


@pytest.mark.parametrize("over, per_chunk", [(0, False), (2, False), (0, True)])
def test_a_change_of_prompt_and_its_log(pipeline, over, per_chunk):
    """Until the receipt's first frame nothing differs; a replayed log is the stream, by way of JSON, bit for bit."""
    how = {"seed": 5, "guidance": 1.5, "per_chunk_prompts": per_chunk}
    stream, other = (pipeline.stream("a red car", **how) for _ in range(2))
    frames, unchanged = [take(stream, 2)], take(other, 10)
    stream.forward()
    receipt = stream.change("a blue bus at night", over=over)
    frames += [take(stream, 3)]
    stream.guidance = 0.5
    frames = np.concatenate([*frames, take(stream, 5)])
    assert receipt.step == 6 + 2 * 2 + 1
    # With prompts per chunk it begins with the next chunk, when one more has left; the others hear of it from that one.
    assert receipt.first_frame == (24 if per_chunk else 16)
    assert first_difference(frames, unchanged) >= receipt.first_frame
    assert per_chunk or first_difference(frames, unchanged) == receipt.first_frame
    assert receipt.complete_frame == 16 + 8 * (5 if over else 4)
    log = json.loads(json.dumps(stream.log()))
    assert np.array_equal(frames, take(pipeline.replay(log), 10))
    assert [sorted(event) for event in log["events"]] == [["over", "prompt", "step"], ["guidance", "step"]]
    resumed = pipeline.resume(stream.snapshot())
    assert resumed.log() == stream.log() and np.array_equal(take(resumed, 2), take(stream, 2))


@pytest.mark.parametrize("per_chunk", [False, True])
def test_a_snapshot_within_a_transition_forks(pipeline, per_chunk):
    stream = pipeline.stream("a red car", seed=5, per_chunk_prompts=per_chunk)
    take(stream, 1)
    stream.change("a blue bus at night", over=0 if per_chunk else 3)
    take(stream, 1)
    fork = pipeline.resume(stream.snapshot())
    fork.change("snow", over=0 if per_chunk else 1)
    assert fork.prompt == "snow" and stream.prompt == "a blue bus at night"
    same, rest = pipeline.resume(stream.snapshot()), take(stream, 3)
    assert np.array_equal(rest, take(same, 3)) and not np.array_equal(rest, take(fork, 3))


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"format": 2}, "log: is no log"),
        ({"seed": "one"}, "log: seed: 'one' is no int"),
        ({"guidance": None}, "log: guidance: None is no float"),
        ({"steps": -1}, "log: steps: -1 is negative"),
        ({"events": [{"step": 3, "prompt": "a car"}]}, "log: events: "),
        ({"events": [3]}, "log: events: 3 is no change"),
        ({"scheme": "N4c1s1"}, "scheme: N4c1s1 has 4 frames"),
        ({"filling": "magic"}, "filling: "),
        ({"image": True}, "image: the logged stream had one"),
    ],
)
def test_logs_that_cannot_be_replayed(pipeline, damage, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.replay({**pipeline.stream("a red car").log(), **damage})
    with pytest.raises(CheckpointError, match="other weights"):
        pipeline.replay({**pipeline.stream("a red car").log(), "fingerprint": "another"})


# ---- videos and images that steer ----


def test_a_video_at_strength_zero_is_what_its_latents_decode_to(pipeline):
    """And frame i of the stream is frame i of the video, whatever is made of it after its end."""
    video = np.random.default_rng(0).integers(0, 255, (50, 16, 16, 3), np.uint8)
    padded = np.concatenate([video, video[-1:], video[-1:]])
    latents = pipeline.encode_video(padded[None].astype(np.float32) / 127.5 - 1)
    expected = np.asarray(pipeline.decode(latents, None)[0])[0]
    for frames in (video, iter(video), [video[:7], video[7], video[8:]]):
        stream = pipeline.stream("a red car", video=frames, strength=0.0)
        assert np.abs(take(stream, 6).astype(int) - expected[:48]).max() <= 1
    assert stream.log()["events"] == [{"step": 6 + 2 * 4 - 1, "video": False}], "13 latent frames: 8, and 2 + 2 + 1"
    free = pipeline.stream("a red car", video=video, strength=1.0)
    assert np.array_equal(take(free, 3), take(pipeline.stream("a red car"), 3)), "strength 1 leaves nothing of it"


@pytest.mark.parametrize("scheme, filling", [("N4c2s2", "uniform"), *(("K2N3c2s2", filling) for filling in FILLINGS)])
def test_a_video_steers_replays_and_resumes(pipeline, scheme, filling):
    rng = np.random.default_rng(1)
    video = np.repeat(rng.integers(0, 255, (1, 16, 16, 3), np.uint8), 100, axis=0)
    how = {"seed": 1, "scheme": scheme, "filling": filling, "strength": 0.4}
    stream, plain = pipeline.stream("a bus", video=video, **how), pipeline.stream("a bus", **how)
    frames, others = take(stream, 5), take(plain, 5)
    decoded = np.asarray(pipeline.decode(pipeline.encode_video(video[None, :40] / np.float32(127.5) - 1), None)[0])[0]

    def distance(made):
        return np.abs(made.astype(int) - decoded[: len(made)]).mean()

    assert distance(frames) < 0.7 * distance(others), "it is nearer to its input than chance is"
    snapshot = stream.snapshot()
    rest = take(stream, 3)
    assert np.array_equal(rest, take(pipeline.resume(snapshot, video=video[snapshot.facts["frames_read"] :]), 3))
    replayed = take(pipeline.replay(stream.log(), video=video), 8)
    assert np.array_equal(replayed, np.concatenate([frames, rest]))
    with pytest.raises(ConfigError, match="video: the logged stream had one"):
        pipeline.replay(stream.log())


@pytest.mark.parametrize(
    "scheme, filling",
    [("N4c2s2", "uniform"), ("K3N5c1s2", "uniform"), ("K3N5c1s2", "doubling"), ("K2N3c2s2", "ramp")],
)
def test_an_image_fills_the_buffer_and_is_the_first_reference(pipeline, scheme, filling):
    image = np.random.default_rng(2).integers(0, 255, (16, 16, 3), np.uint8)
    still = np.repeat(image[None, None], 32, axis=1).astype(np.float32) / 127.5 - 1
    latents = pipeline.encode_video(still)
    stream = pipeline.stream("a bus", image=image, strength=0.5, scheme=scheme, filling=filling)
    K = stream.scheme.num_references
    assert stream.frames_shown == 0
    if K:
        expected = np.asarray(pipeline.decode(latents[:, :K], None)[0])[0]
        assert np.abs(next(stream).astype(int) - expected).max() <= 1, "references are shown at once, and clean"
        assert stream.forwards == 0 and stream.frames_shown == 4 * K
        assert np.array_equal(stream.state.buffer[:, :K], np.asarray(latents[:, :K])) or np.allclose(
            stream.state.buffer[:, :K], latents[:, :K], atol=1e-5
        )
    at_zero = pipeline.stream("a bus", image=image, strength=0.0, scheme=scheme, filling=filling)
    expected = np.asarray(pipeline.decode(latents, None)[0])[0][: 4 * (K + stream.scheme.chunk_size)]
    made = take(at_zero, 2 if K else 1)
    assert np.abs(made.astype(int) - expected).max() <= 1
    snapshot = stream.snapshot()
    assert np.array_equal(take(stream, 3), take(pipeline.resume(snapshot), 3))
    assert len(take(pipeline.replay(stream.log(), image=image), 2)) > 0


def test_streamed_decoding_has_no_seam():
    """Flicker |x[t + 1] − 2·x[t] + x[t − 1]| across borders of chunks ÷ elsewhere, with the autoencoder that ships: as
    decoded at once, within 2 %.
    """
    pipeline = sd.load("roadtrip")
    factors, seed = roadtrip.clip_factors(0, 0, "held_out")
    video = roadtrip.render(factors, seed, 64, size=pipeline.config.data.height)
    latents = pipeline.encode_video(video[None].astype(np.float32) / 127.5 - 1)
    streamed, state = [], None
    for chunk in np.split(np.asarray(latents), latents.shape[1] // 2, axis=1):
        frames, state = pipeline.decode(chunk, state)
        streamed.append(np.asarray(frames, np.float64))

    def at_borders(frames):
        flicker = np.abs(np.diff(frames[0], 2, axis=0)).mean(axis=(1, 2, 3))
        border = (np.arange(len(flicker)) + 2) % streamed[0].shape[1] < 2
        return flicker[border].mean() / flicker[~border].mean()

    whole = at_borders(np.asarray(pipeline.decode(latents, None)[0], np.float64))
    assert abs(at_borders(np.concatenate(streamed, axis=1)) / whole - 1) < 0.02
    seams = [frames + number % 2 for number, frames in enumerate(streamed)]
    assert at_borders(np.concatenate(seams, axis=1)) / whole > 1.05, "one grey level more in every other chunk shows"


def test_inputs_that_are_no_videos(pipeline):
    for options, message in (
        (
            {"video": np.zeros((8, 8, 8, 3), np.uint8)},
            r"video: uint8 \[8, 8, 3\] given; the model takes uint8 \[16, 16",
        ),
        ({"video": np.zeros((8, 16, 16, 3))}, "video: float64"),
        ({"video": 3}, "video: uint8 .* are needed, not int"),
        ({"image": np.zeros((2, 16, 16, 3), np.uint8)}, "image: uint8"),
        ({"strength": -0.1}, "strength: "),
        ({"guidance": float("inf")}, "guidance: "),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline.stream("a red car", **options)


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
        stream.forward()
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


def test_who_sends_a_snapshot_does_not_choose_its_shapes(pipeline):
    snapshot = pipeline.stream("a red car").snapshot()
    arrays, facts = snapshot.arrays, snapshot.facts
    for changed in (
        Snapshot(facts, {**arrays, "buffer": np.zeros((2, 8, 4, 4, 4), np.float32)}),
        Snapshot(facts, {**arrays, "present": arrays["present"].astype(np.int32)}),
        Snapshot(facts, {**arrays, "more": np.zeros(3)}),
        Snapshot(facts, {name: array for name, array in arrays.items() if name != "path"}),
        Snapshot({**facts, "decoder": True}, arrays),
        Snapshot({**facts, "log": None}, arrays),
        Snapshot({**facts, "log": {**facts["log"], "scheme": "N4c1s1"}}, arrays),
        Snapshot({**facts, "log": {**facts["log"], "events": [{"step": 0, "guidance": float("nan")}]}}, arrays),
    ):
        with pytest.raises(CheckpointError, match="snapshot: cannot be continued"):
            pipeline.resume(changed)


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

    monkeypatch.setattr(weight_files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        weights.save_model(tmp_path, {}, {"part": {"x": np.ones(3, np.float32)}}, {})
    kept = weights.load_part(tmp_path, weights.load_card(tmp_path), "part")
    assert np.array_equal(kept["x"], np.zeros(3)) and not list(tmp_path.glob(".*partial"))


def test_decoding_in_bfloat16_shows_the_same_video(tiny, tiny_params, pipeline):
    """The decoder computes in the transformer's type. What it carries stays float32, for another device to go on."""
    config = dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, dtype="bfloat16"))
    half = Pipeline(config, tiny_params)
    latents = np.random.default_rng(0).normal(size=(3, 1, 2, 4, 4, 4)).astype(np.float32)
    carried, whole = [None, None], []
    for chunk in latents:
        frames = []
        for index, one in enumerate((half, pipeline)):
            video, carried[index] = one.decode(chunk, carried[index])
            frames.append(np.asarray(video).astype(float))
        whole.append(frames[0])
        assert 0 < np.abs(frames[0] - frames[1]).mean() < 0.5, "rounding, and not the same program"
    assert {leaf.dtype for leaf in jax.tree.leaves(carried)} == {jnp.dtype(jnp.float32)}
    at_once = np.asarray(half.decode(np.concatenate(latents, axis=1), None)[0])
    assert np.abs(np.concatenate(whole, axis=1) - at_once).max() <= 1
