"""`streamdit train` and `streamdit encode` in two processes do what they do in one."""

import json
import sys

import numpy as np
import pytest
from flax import traverse_util

from streamdit_jax import weights
from streamdit_jax.data.records import open_records

FLAGS = "--xla_backend_optimization_level=0"  # compiling is most of the work


def parameters(workdir):
    """Every parameter of the model that a run wrote, by part and path."""
    model = workdir / "model"
    described = weights.load_card(model)
    parts = {part: weights.load_part(model, described, part) for part in described["parts"]}
    return {part: traverse_util.flatten_dict(tree, sep="/") for part, tree in parts.items()}, described["card"]


@pytest.mark.slow
def test_all_stages_in_two_processes_equal_those_in_one(start, cluster, tmp_path):
    """The same two devices, in one process and in two: data, autoencoder, latents, text, flow matching, the model."""
    train = ("train", "--config=tests/launch/tiny.py", "--config.mesh.fsdp=2", "--config.mesh.data=1")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    alone = start(
        *(sys.executable, "-m", "streamdit_jax.cli", *train, f"--workdir={tmp_path / 'one'}"),
        **cache,
        XLA_FLAGS=f"{FLAGS} --xla_force_host_platform_device_count=2",
    )
    _, error = alone.communicate(timeout=900)
    assert alone.returncode == 0, error[-3000:]
    done = cluster(*train, f"--workdir={tmp_path / 'two'}", timeout=900, **cache, XLA_FLAGS=FLAGS)
    for index, process in enumerate(done):
        assert process.returncode == 0, process.stderr[-3000:]
        assert f"process {index} of 2 (STREAMDIT_COORDINATOR)" in process.stderr
    assert "trained; try" in done[0].stdout and "trained" not in done[1].stdout
    assert "autoencoder: step 4/4" in done[0].stderr and "step 4/4" not in done[1].stderr

    latents = [open_records(tmp_path / run / "latents") for run in ("one", "two")]
    assert len(latents[0]) == len(latents[1]) == 8
    for index in range(8):
        np.testing.assert_allclose(*(np.float32(one[index]["latents"]) for one in latents), rtol=0, atol=0.02)
        assert latents[0][index]["captions"] == latents[1][index]["captions"]
    (one, card), (two, _) = (parameters(tmp_path / run) for run in ("one", "two"))
    assert set(card["stages"]) == {"autoencoder", "text_alignment", "flow_matching"}
    for part in ("tae", "text", "dit"):
        assert one[part].keys() == two[part].keys()
        for name, values in one[part].items():
            # Of a tensor as a whole: Adam turns a gradient that is nothing but rounding into a full step.
            apart = np.linalg.norm(two[part][name] - values) / max(np.linalg.norm(values), 1e-6)
            assert apart < 0.01, f"{part}/{name}: {apart:.2g} apart"


@pytest.mark.slow
def test_two_processes_encode_what_one_does(cluster, tiny_model, tmp_path):
    from streamdit_jax.data.video import write_video

    folder = tmp_path / "videos"
    folder.mkdir()
    entries = []
    for number in range(4):
        frames = np.random.default_rng(number).integers(0, 255, (45, 16, 16, 3), np.uint8)
        write_video(folder / f"{number}.mp4", frames, 16.0)
        entries.append(json.dumps({"file": f"{number}.mp4", "caption": f"noise {number}"}))
    (folder / "2.mp4").write_bytes(b"no video")
    (folder / "captions.jsonl").write_text("\n".join(entries))
    for processes in (1, 2):
        command = ("encode", folder, tmp_path / str(processes), "--model", tiny_model)
        if processes == 2:
            stopped = cluster(*command, processes=2)  # without --skip-bad: process 0 has video 2, and ends the run
            assert stopped[0].returncode == 2 and "2.mp4: cannot be decoded" in stopped[0].stderr
            assert stopped[1].returncode != 0 and not (tmp_path / "2").exists()
        done = cluster(*command, "--skip-bad", processes=processes)
        assert [process.returncode for process in done] == [0] * processes, done[0].stderr[-2000:]
        assert "3 clips (train); 1 videos left out" in done[0].stdout and "2.mp4: cannot be decoded" in done[0].stdout
    one, two = (open_records(tmp_path / run) for run in ("1", "2"))
    for index in range(3):
        assert one[index]["captions"] == two[index]["captions"]
        np.testing.assert_array_equal(one[index]["latents"], two[index]["latents"])
