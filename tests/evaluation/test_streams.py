"""Reports of streams. Streams that show just what is asked, late, fading or frozen: what must be said of them is
known.
"""

import json

import numpy as np
import pytest

from streamdit_jax import cli, weights
from streamdit_jax.data import roadtrip
from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation import accuracy, batched, evaluate, long_streams, samplers, switches


@pytest.fixture
def shows(monkeypatch, oracle):
    """Replaces streams by an oracle."""

    def replace(**how):
        for module in (batched, long_streams, switches, samplers):
            monkeypatch.setattr(module, "StreamBatch", oracle(**how))

    return replace


def test_held_out_and_seen_combinations_are_apart():
    for split, held_out in (("held_out", True), ("seen", False)):
        asked = accuracy.wanted(split, 40, 3)
        assert {roadtrip.held_out(factors) for factors, _ in asked} == {held_out}
        assert len({factors for factors, _ in asked}) > 30
    trained = {roadtrip.clip_factors(index, 3, "train") for index in range(5000)}
    assert not trained & set(accuracy.wanted("seen", 40, 3)), "no clip that training was shown"


def test_perfect_streams_are_read_right(pipeline, shows):
    shows()
    report = accuracy.stream_accuracy(pipeline, 5, 4.0, 0, batch=3)
    assert report["mean"] == 1 and report["seen"]["mean"] == 1 and report["split"] == "held_out"
    assert set(report["accuracy"]) == set(roadtrip.FACTORS) and min(report["accuracy"].values()) >= 0.8
    assert report["motion"]["ratio"] == pytest.approx(1, abs=0.15)
    assert report["chance"] == 0.3111 and report["seconds"] == 4
    alone = accuracy.stream_accuracy(pipeline, 2, 2.0, 0, split="seen")
    assert alone["split"] == "seen" and "seen" not in alone and alone["mean"] == 1


def test_wrong_streams_are_read_wrong(pipeline, shows):
    """Chunks that are played backwards drive the other way, and show the same vehicle."""
    shows(alter=lambda frames, first: frames[::-1])
    report = accuracy.stream_accuracy(pipeline, 6, 2.0, 0, split="held_out")
    assert report["accuracy"]["direction"] <= 0.5 and report["accuracy"]["vehicle"] == 1
    assert report["mean"] < 1


def test_text_to_video_is_judged_on_its_one_clip(pipeline):
    assert accuracy.total_frames(pipeline, "N1c8s2", 8.0) == 32
    assert accuracy.total_frames(pipeline, "N4c2s2", 8.0) == 128
    assert accuracy.total_frames(pipeline, "N4c2s2", 0.5) == 32
    assert accuracy.total_frames(pipeline, "K4N1c4s3", 8.0) == 128, "with references, clips carry on"
    report = accuracy.stream_accuracy(pipeline, 2, 8.0, 0, split="held_out", scheme="N1c8s2", guidance=1.5)
    assert report["seconds"] == 2 and report["scheme"] == "N1c8s2" and report["guidance"] == 1.5


def test_perfect_long_streams_keep_everything(pipeline, shows, tmp_path):
    shows()
    sheet = tmp_path / "sheet.png"
    report = long_streams.long_streams(pipeline, 3, 12.0, 0, batch=2, sheet=str(sheet))
    assert report["mean_at_8_seconds"] == report["mean_at_end"] == report["kept"] == 1
    for name in ("brightness", "contrast"):
        drift = report["drift"][name]
        assert abs(drift["mean_percent"] - drift["renders_percent"]) < 8 and abs(drift["mean_percent"]) < 12
    assert [report["motion"][end]["ratio"] for end in ("start", "end")] == pytest.approx([1, 1], abs=0.15)
    assert [point["seconds"] for point in report["curve"]] == [2, 4, 6, 8, 10, 12]
    assert sheet.stat().st_size > 10_000 and "last_minute" not in report


def test_long_streams_that_fade_and_freeze(pipeline, shows):
    """Brightness and contrast fall to a half after eight seconds, and nothing moves any more."""
    still = {}

    def fade(frames, first):
        if first < 128:
            return frames
        still.setdefault("frame", frames[:1])
        return np.repeat(still["frame"] // 2, len(frames), axis=0)

    shows(alter=fade)
    report = long_streams.long_streams(pipeline, 1, 16.0, 0)
    assert report["drift"]["brightness"]["mean_percent"] == pytest.approx(-50, abs=4)
    assert report["drift"]["contrast"]["largest_percent"] == pytest.approx(-50, abs=6)
    assert report["motion"]["end"]["ratio"] == 0 and report["motion"]["start"]["ratio"] > 0.8
    assert report["accuracy_at_8_seconds"]["speed"] == 1


@pytest.mark.slow
def test_the_last_minute_is_held_against_the_first(pipeline, shows):
    """From the second minute on every stream shows the mirror image: the direction is lost, the rest stays."""
    shows(alter=lambda frames, first: frames if first < 960 else frames[:, :, ::-1])
    report = long_streams.long_streams(pipeline, 1, 120.0, 0)
    assert report["first_minute"] == 1 and report["last_minute"] == pytest.approx(5 / 6, abs=0.02)
    assert report["kept_last_minute"] == pytest.approx(5 / 6, abs=0.02)
    assert report["last_minute_over_8_seconds"] == report["last_minute"] and report["accuracy_at_end"]["direction"] == 0


@pytest.mark.parametrize("delay", [0, 3])
def test_a_switch_is_reached_when_it_shows(pipeline, shows, delay):
    """Chunks have 8 frames and a reading is of 16: the new factor is read one or two chunks after it shows."""
    shows(delay=delay)
    report = switches.switches(pipeline, 7, 2.0, 0, batch=4)
    assert report["followed_chunks"] == 8 and report["followed_frames"] == 64 and report["streams"] == 7
    assert report["reached"] == 1 and report["already"] == 0
    assert 8 * delay + 8 <= report["frames_until_reached"] <= 8 * delay + 16
    assert report["unchanged"] >= 0.97 and report["unchanged_before"] >= 0.97
    assert set(report["of"]) == set(roadtrip.FACTORS) and report["of"]["colour"]["streams"] == 1


def test_a_switch_that_never_shows(pipeline, shows):
    shows(delay=1000)
    report = switches.switches(pipeline, 7, 2.0, 0)
    assert report["reached"] == 0 and report["frames_until_reached"] is None
    assert report["unchanged"] >= 0.97, "what was not to change has not changed"


def test_a_change_changes_one_factor():
    rng = np.random.default_rng(0)
    (factors, _), *_ = accuracy.wanted("held_out", 1, 0)
    for name in roadtrip.FACTORS:
        other = vars(switches.changed(factors, name, rng))
        assert [key for key, value in vars(factors).items() if other[key] != value] == [name]


@pytest.mark.parametrize(
    "text, row",
    [
        ("roadtrip:N8c2s16:2", ("roadtrip", "N8c2s16", 2.0, None)),
        ("runs/a:b:K2N7c2s1p2:1.5:ramp", ("runs/a:b", "K2N7c2s1p2", 1.5, "ramp")),
    ],
)
def test_rows_of_the_table(text, row):
    assert samplers.parse_row(text) == row


@pytest.mark.parametrize("text", ["roadtrip", "roadtrip:N8c2s1", "roadtrip:N8c2s1:much", "roadtrip:N8c2s1:1:slow:", ""])
def test_rows_that_are_none(text):
    with pytest.raises(ConfigError, match="--row: "):
        samplers.parse_row(text)


def test_perfect_samplers_are_as_near_to_renders_as_renders(pipeline, oracle, monkeypatch, tmp_path):
    """And a sampler that repeats each frame moves half as much, flickers, and is far away."""
    models = {"good": oracle(), "bad": oracle(alter=lambda frames, first: frames[::2].repeat(2, axis=0) // 2)}

    def load(name):
        for module in (batched, samplers):
            monkeypatch.setattr(module, "StreamBatch", models[name])
        return pipeline

    monkeypatch.setattr(samplers, "load", load)
    tables = {}
    for name in models:
        table = tmp_path / f"{name}.md"
        report = samplers.compare([f"{name}:N4c2s2:1"], 8, 4.0, 0, batch=4, table=str(table))
        (tables[name],) = report["rows"]
        assert "| probe |" in table.read_text() and "| N4c2s2 | 1 | 8 |" in table.read_text()
    good, bad = tables["good"], tables["bad"]
    assert good["mean"] == 1 and good["relative_to_first"] == 1
    assert good["fvd_like"] < 2 * report["fvd_like_of_renders"] and bad["fvd_like"] > 2 * good["fvd_like"]
    assert good["flicker"]["ratio"] == pytest.approx(1, abs=0.15) and bad["motion"]["ratio"] < 0.8
    assert good["steps"] == 8 and good["forwards_per_latent_frame"] == 1
    # The oracle spends half a second of every chunk of 8 frames on denoising, and a quarter on decoding.
    assert good["frames_per_second"]["denoise"] == 16 and good["frames_per_second"]["decode"] == 32


@pytest.fixture(scope="module")
def model(pipeline, readable, tmp_path_factory):
    """The pipeline's weights on disk."""
    import jax

    directory = tmp_path_factory.mktemp("readable") / "model"
    blocks = pipeline._dit_params["blocks"]
    stacked = {**pipeline._dit_params, "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}
    parts = {"tae": pipeline._tae_params, "text": pipeline._text_params, "dit": stacked}
    weights.save_model(directory, json.loads(readable.to_json()), jax.tree.map(np.asarray, parts), {})
    return directory


@pytest.mark.parametrize(
    "arguments, keys",
    [
        (["autoencoder", "--prompts", "2"], {"psnr_mean", "psnr_worst", "psnr_by"}),
        (["streams", "--prompts", "2", "--seconds", "2"], {"mean", "chance", "accuracy", "motion", "seen", "scheme"}),
        (["long", "--prompts", "2", "--seconds", "10"], {"kept", "drift", "motion", "curve", "chance"}),
        (["switch", "--prompts", "2", "--seconds", "1"], {"reached", "already", "unchanged", "of"}),
        (["samplers", "--prompts", "2", "--seconds", "4", "--row", "MODEL:N4c2s1:1"], {"rows", "fvd_like_of_renders"}),
    ],
)
def test_commands_print_one_json_object(capsys, monkeypatch, model, arguments, keys):
    """Of a real, if meaningless, model."""
    monkeypatch.setattr(cli, "_enable_caches", lambda: None)
    arguments = [argument.replace("MODEL", str(model)) for argument in arguments]
    chosen = [] if arguments[0] == "samplers" else ["--model", str(model)]
    assert cli.main(["evaluate", *arguments, *chosen, "--json", "--seed", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert keys | {"what", "command", "hardware", "versions", "date", "wall_seconds"} <= set(report)
    assert report["what"] == arguments[0] and report["seed"] == 4
    assert report["command"].startswith(f"streamdit evaluate {arguments[0]} ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["streams", "--prompts", "0"], "--prompts: at least 1"),
        (["streams", "--batch", "0"], "--batch: at least 1"),
        (["streams", "--seconds", "-1"], "--seconds: must be a positive number"),
        (["streams", "--scheme", "N9c9s9"], "scheme: N9c9s9 has 81 frames"),
        (["streams", "--sheet", "no/such/x.png"], "--sheet: there is no directory"),
        (["long", "--seconds", "9"], "--seconds: a long stream has more than 8"),
        (["long", "--split", "both"], "--split: held_out or seen"),
        (["switch", "--sheet", "x.png"], "--sheet: is for autoencoder, streams, long, not for switch"),
        (["autoencoder", "--scheme", "N4c2s1"], "--scheme: is for streams, long, switch"),
        (["samplers"], "--row: give at least one"),
        (["samplers", "--scheme", "N4c2s1", "--row", "MODEL:N4c2s1:1"], "--scheme: is for"),
        (["samplers", "--row", "MODEL:N1c8s2:1", "--prompts", "2"], "--seconds: 64 frames of a stream are judged"),
        (["samplers", "--row", "MODEL:N4c2s1:1", "--prompts", "1"], "--prompts: a Fréchet distance"),
        (["samplers", "--row", "MODEL:N4c2s1:1", "--table", "no/such/t.md"], "--table: there is no directory"),
        (["streams", "--row", "MODEL:N4c2s1:1"], "--row: is for samplers"),
        (["streams", "--refill", "2"], "--refill: is for switch, not for streams"),
        (["streams", "--seed", "-1"], "--seed: a whole number"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, model, tmp_path, arguments, message):
    monkeypatch.setattr(cli, "_enable_caches", lambda: None)
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("MODEL", str(model)) for argument in arguments]
    assert cli.main(["evaluate", *arguments, "--model", str(model)]) == 2
    said, error = capsys.readouterr()
    assert said == "" and error.count("\n") == 1 and message in error


def test_a_model_that_the_probe_cannot_read(tiny_model):
    with pytest.raises(ConfigError, match="--model: the probe reads 64×64 pixels at 16 frames a second, not 16×16"):
        evaluate.run("streams", str(tiny_model))
