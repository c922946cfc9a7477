"""The command line: what it makes, and that every mistake is one line and exit code 2."""

import json

import av
import numpy as np
import pytest

from streamdit_jax import cli


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def compiled_here(tmp_path, monkeypatch):
    """The compilation cache of a user is left alone."""
    monkeypatch.setattr(cli, "_enable_caches", lambda: None)


def test_stream_writes_a_video_and_a_closing_line(capsys, tiny_model, tmp_path):
    out = tmp_path / "out.mp4"
    at = ["--at", "0.5:a blue bus", "--at", "1:"]
    code, said, _ = run(capsys, "stream", "a red car", "--model", tiny_model, "--seconds", 2.2, "--out", out, *at)
    assert code == 0
    assert said.startswith(f"{out}: 35 frames in ") and "frames per second" in said
    with av.open(str(out)) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, float(video.average_rate)) == ("h264", 16.0)
        assert (video.codec_context.pix_fmt, video.width, video.height) == ("yuv420p", 16, 16)
        assert sum(1 for _ in container.decode(video=0)) == 35


def test_videos_and_pictures_steer_a_stream(capsys, tiny_model, tmp_path):
    """Kept as they are at strength 0; a transition ends where it says."""
    from PIL import Image

    from streamdit_jax.data.video import read_video, write_video

    clip, picture = tmp_path / "clip.mp4", tmp_path / "picture.png"
    write_video(clip, np.full((40, 16, 16, 3), 200, np.uint8), 16.0)
    Image.fromarray(np.full((20, 30, 3), 40, np.uint8)).save(picture)
    arguments = ["--model", tiny_model, "--json", "--seconds", 1.5, "--at", "0.6:night", "--transition", 2]
    brightness = {}
    for name, given in {"clip": ["--video", clip], "picture": ["--image", picture]}.items():
        out = tmp_path / f"{name}.mp4"
        code, said, _ = run(capsys, "stream", "a red car", "--out", out, "--strength", 0, *given, *arguments)
        report = json.loads(said)
        assert code == 0 and report["frames"] == 24
        [change] = report["changes"]
        assert (change["prompt"], change["first_frame"], change["complete_frame"]) == ("night", 16, 16 + 8 * 5)
        brightness[name] = np.mean([frame.mean() for frame in read_video(out, 16, 16, 16.0)])
    assert brightness["clip"] != brightness["picture"]


def test_json_is_one_object_and_nothing_else(capsys, tiny_model, tmp_path):
    out = tmp_path / "out.mp4"
    arguments = ["--model", tiny_model, "--seconds", 1, "--out", out, "--scheme", "N4c2s1", "--guidance", 1]
    code, said, _ = run(capsys, "stream", "a red car", "--json", *arguments)
    report = json.loads(said)
    assert code == 0 and report["frames"] == 16 and report["scheme"] == "N4c2s1" and report["forwards"] == 3 + 2
    assert set(report["parts_seconds"]) == {"forward", "decode", "write"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "nowhere: no model of that name"),
        (["--scheme", "N9c9s9"], "scheme: N9c9s9 has 81 frames"),
        (["--at", "soon:night"], "--at: 'soon:night' is not SECONDS:PROMPT"),
        (["--at", "1"], "--at: '1' is not SECONDS:PROMPT"),
        (["--at", "1:" + "x" * 10_000], "prompt: 10000 bytes"),
        (["--transition", "-1"], "--transition: "),
        (["--strength", "1.5"], "strength: "),
        (["--refill", "2:5"], "refill: from 0 to 10000 chunks and a strength from 0 to 1, not 2:5"),
        (["--sheet", "no/such/sheet.png"], "--sheet: there is no directory"),
        (["--refill", "2"], "refill: is done by doubling, and the filling is uniform"),
        (["--video", "nowhere.mp4"], "nowhere.mp4: no such video file"),
        (["--image", "nowhere.png"], "nowhere.png: no such video file"),
        (["--seconds", "0"], "--seconds: must be a positive number"),
        (["--out", "no/such/folder/x.mp4"], "--out: there is no directory no/such/folder"),
    ],
)
def test_mistakes_are_one_line(capsys, tiny_model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", tiny_model]
    code, said, error = run(capsys, "stream", "a red car", *model, *arguments)
    assert code == 2 and said == "" and error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("prompt", ["", "x", "🚗 in the ❄️", "x" * 10_000])
def test_prompts_of_any_length(capsys, tiny_model, tmp_path, prompt):
    code, _, error = run(
        capsys, "stream", prompt, "--model", tiny_model, "--seconds", 0.5, "--out", tmp_path / "o.mp4", "--quiet"
    )
    if len(prompt) < 100:
        assert code == 0 and (tmp_path / "o.mp4").exists()
    else:
        assert code == 2 and "prompt: 10000 bytes, but at most" in error and not (tmp_path / "o.mp4").exists()


def test_training_mistakes_come_before_any_work(capsys, tmp_path):
    for arguments, message in (
        ([], "--config: give a file"),
        (["--config=missing.py"], "there is no file missing.py"),
        (["--config=configs/roadtrip.py", "--config.dit.num_heads=3"], "dit.num_heads"),
    ):
        code, _, error = run(capsys, "train", "--workdir", tmp_path / "run", *arguments)
        assert code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_figure(capsys, tmp_path):
    code, _, _ = run(capsys, "figure", "N4c2s2", "--out", tmp_path / "levels.png")
    assert code == 0 and (tmp_path / "levels.png").stat().st_size > 1000
    code, _, error = run(capsys, "figure", "N4", "--out", tmp_path / "other.png")
    assert code == 2 and "N4" in error


def test_encode_writes_latents_of_video_files(capsys, tiny_model, tmp_path):
    from streamdit_jax.data.records import open_records
    from streamdit_jax.data.video import write_video

    folder = tmp_path / "videos"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (90, 16, 16, 3), np.uint8)
    write_video(folder / "a.mp4", frames, 16.0)
    (folder / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "noise"}\n')
    code, said, _ = run(capsys, "encode", folder, tmp_path / "latents", "--model", tiny_model)
    records = open_records(tmp_path / "latents")
    assert code == 0 and "2 clips" in said and records.kind == "latents" and records.shape == (10, 4, 4, 4)
    assert records[0]["captions"] == ["noise"]
    code, _, error = run(capsys, "encode", folder, tmp_path / "latents", "--model", tiny_model)
    assert code == 2 and "latents" in error, "what is there is not overwritten"
    (folder / "b.mp4").write_bytes(b"no video")
    (folder / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "noise"}\n{"file": "b.mp4", "caption": "?"}\n')
    code, _, error = run(capsys, "encode", folder, tmp_path / "others", "--model", tiny_model)
    assert code == 2 and "b.mp4" in error and not (tmp_path / "others").exists()


def test_export_copies_a_model_in_half_the_bytes(capsys, tiny_model, tmp_path):
    report = tmp_path / "streams.json"
    report.write_text('{"mean": 0.5}')
    out = tmp_path / "half"
    code, said, _ = run(capsys, "export", tiny_model, out, "--report", report)
    assert code == 0 and "bfloat16" in said
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (tiny_model, out)]
    assert sizes[1] < 0.7 * sizes[0]
    card = json.loads((out / "model.json").read_text())["card"]
    assert card["metrics"] == {"streams": {"mean": 0.5}} and card["command"] == "tests"
    assert (
        run(capsys, "stream", "a car", "--model", out, "--seconds", 0.5, "--out", tmp_path / "o.mp4", "--quiet")[0] == 0
    )
    code, _, error = run(capsys, "export", tiny_model, out, "--report", tmp_path / "none.json")
    assert code == 2 and "none.json" in error
