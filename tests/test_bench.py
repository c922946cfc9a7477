"""`streamdit bench`: what it counts, what it refuses, and one report of each kind."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamdit_jax import cli, machine
from streamdit_jax.bench import compare, peaks, profile, run, start, streaming
from streamdit_jax.bench.compilations import Compilations
from streamdit_jax.bench.subject import Subject, from_json, load_config, random_params, resolve
from streamdit_jax.errors import CheckpointError, ConfigError, StreamDiTError
from streamdit_jax.parameters import initialise
from streamdit_jax.pipeline import Pipeline

CONFIG = """
import json

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(json.loads({0!r}))
"""


@pytest.fixture(scope="module")
def trainable(tiny, tmp_path_factory):
    """The tiny configuration with a stage to train, as a file."""
    described = json.loads(tiny.to_json())
    described["training"]["flow_matching"] = {
        "steps": 100,
        "batch_size": 2,
        "num_frames": 8,
        "optimizer": {"learning_rate": 1e-3},
        "objective": {"mixture": {"entries": [["N4c2s1", 1.0]]}},
    }
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG.format(json.dumps(described)))
    return path


@pytest.fixture(scope="module")
def pipeline(tiny):
    return Pipeline(tiny, random_params(tiny))


def test_random_weights_have_the_models_shapes_and_listen(tiny):
    params = random_params(dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, ffn_width=2**15)))
    assert (
        float(jnp.std(params["dit"]["blocks"]["feed_forward"]["up"]["kernel"])) > 0
    )  # more numbers than the block has
    params = random_params(tiny)
    shapes = jax.eval_shape(lambda: initialise(tiny, jax.random.key(0)))
    jax.tree.map(lambda leaf, of: np.testing.assert_equal(leaf.shape, of.shape), params, shapes)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    assert all(float(jnp.std(leaf)) > 0 for leaf in jax.tree.leaves(params["dit"]) if leaf.ndim > 2)
    half = dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, dtype="bfloat16"))
    parts = {part: jax.tree.leaves(tree) for part, tree in random_params(half).items()}
    assert {leaf.dtype for leaf in parts["dit"]} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in parts["text"] + parts["tae"]} == {jnp.dtype("float32")}


def test_bytes_are_those_of_the_arrays(tiny):
    for dtype in ("float32", "bfloat16"):
        subject = Subject(dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, dtype=dtype)))
        params = random_params(subject.config)
        actual = {part: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
        assert subject.parameter_bytes() == actual


def test_a_subject_survives_the_way_to_another_process(trainable, tiny_model):
    for subject in (
        resolve([f"--config={trainable}"], None, precision="bfloat16", scheme="N2c4s3", guidance=1.0),
        resolve([], str(tiny_model), filling="ramp"),
    ):
        assert from_json(subject.to_json()) == subject


def test_what_is_asked_for_is_what_is_run(tiny_model):
    subject = resolve([], str(tiny_model), precision="bfloat16", scheme="N4c2s1", guidance=1.0)
    made = subject.pipeline()
    assert made.config.dit.dtype == "bfloat16" and made.scheme(None).micro_steps == 1
    assert subject.describe()["weights"] == str(tiny_model) and load_config(str(tiny_model)).dit.dtype == "auto"
    assert next(made.stream("a car")).shape == (8, 16, 16, 3)


def test_compilations_are_counted():
    triple = jax.jit(lambda x: 3 * x - 1)
    two, three = jnp.ones(2), jnp.ones(3)
    with Compilations() as first:
        triple(two).block_until_ready()
    with Compilations() as again:
        triple(two).block_until_ready()
    with Compilations() as other:
        triple(three).block_until_ready()
    assert (first.count, again.count, other.count) == (1, 0, 1) and first.seconds > 0 and again.seconds == 0
    triple(jnp.ones(4)).block_until_ready()
    assert other.count == 1, "it listens no longer"


def test_changes_recompile_nothing_and_what_recompiles_is_counted(pipeline, monkeypatch):
    assert streaming.recompilations(pipeline) == {"recompilations": 0}
    original = Pipeline.encode_prompt

    def careless(self, prompt):
        jax.jit(lambda x: x + 1)(np.ones(len(prompt)))  # a function that is made anew for every prompt
        return original(self, prompt)

    monkeypatch.setattr(Pipeline, "encode_prompt", careless)
    assert streaming.recompilations(pipeline)["recompilations"] == 9


def test_the_loop_counts_the_frames_it_shows(pipeline, monkeypatch):
    """Two viewers of chunks of 8 frames, who get one every tenth of a second, the last one late."""
    report = streaming.end_to_end(pipeline, 0.05)
    assert report["end_to_end_seconds"] >= 0.05 and report["chunk_jitter"] >= 1
    clock = iter(np.arange(0, 1000, 0.1))

    class Viewer:
        def __init__(self, *_, **__):
            self.late = iter([0.1] * 21 + [0.2] * 1000)

        def get(self, timeout):
            return SimpleNamespace(frames=np.zeros((8, 16, 16, 3), np.uint8), seconds=next(self.late))

    class Steady:
        def __init__(self, pipeline, slots):
            self.open = Viewer

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(streaming, "Engine", Steady)
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: float(next(clock)))
    report = streaming.end_to_end(pipeline, 1.95, sessions=2)
    assert report["end_to_end_seconds"] == 2 and report["end_to_end_fps"] == pytest.approx(2 * 8 / 0.1)
    assert report["chunk_ms_median"] == pytest.approx(100) and report["chunk_jitter"] > 1.5


def test_forwards_are_counted_by_their_share_of_a_chunk(pipeline, monkeypatch):
    """N4c2s2 on a clock that ticks at every look: two forwards, each of two prompts, for the 8 frames of a chunk."""
    clock = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: float(next(clock)))
    report = streaming.denoising(pipeline, 1.0)
    assert report["forward_ms_median"] == pytest.approx(100) and report["denoise_fps"] == pytest.approx(40)
    assert report["forwards_in_one"] == 2


def test_a_prompt_is_seen_when_it_changes_a_pixel(pipeline):
    report = streaming.prompt_latency(pipeline)
    # Up to two chunks wait to be taken when it is changed, and one is on its way.
    assert 1 <= report["prompt_to_first_changed_chunk"] <= 4
    assert 0 < report["prompt_to_first_changed_pixel_seconds"] < 60


def test_weights_that_do_not_listen_are_said_to(pipeline, monkeypatch):
    monkeypatch.setattr(streaming, "PROMPTS", ("a car", "a car", "a car"))
    with pytest.raises(StreamDiTError, match="do not listen"):
        streaming.prompt_latency(pipeline)


def test_sessions_are_held_against_the_first(pipeline):
    table = streaming.sessions(pipeline, [1, 2], 0.02)
    assert [line["sessions"] for line in table] == [1, 2] and table[0]["of_the_first"] == 1
    for line in table:
        assert line["of_each"] == pytest.approx(line["frames_per_second"] / line["sessions"], abs=0.01)
        assert line["of_the_first"] == pytest.approx(
            line["frames_per_second"] / table[0]["frames_per_second"], abs=1e-3
        )


def test_peaks_are_rates(monkeypatch):
    """Of a clock that takes half a second for each of them."""
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: float(next(clock)))
    measured = peaks.peaks(jnp.dtype("float32"), (64, 4096))
    assert measured == {"matmul_flops_per_second": 2 * 64**3 / 0.5, "copy_bytes_per_second": 2 * 4096 / 0.5}


def test_memory_is_read_from_the_machine():
    peak, of = machine.peak_bytes()
    held = np.ones(2**25)
    assert of == "process (resident set)" and peak > 2**26
    assert machine.peak_bytes()[0] >= peak and held.nbytes == 2**28
    assert machine.available_bytes() is None or machine.available_bytes() > 2**20


def plane(name, **lines):
    """Events are (kernel, nanoseconds) or (kernel, nanoseconds, instruction)."""
    events = {
        line: [
            SimpleNamespace(name=n, duration_ns=ns, stats=[("hlo_op", op) for op in instruction])
            for n, ns, *instruction in times
        ]
        for line, times in lines.items()
    }
    return SimpleNamespace(
        name=name, lines=[SimpleNamespace(name=line.replace("_", " "), events=of) for line, of in events.items()]
    )


def test_kernels_are_summed_by_kind():
    """Of the streams of the GPU, and of no derived line or host; two forwards."""
    planes = [
        plane(
            "/device:GPU:0",
            Stream_1=[
                ("nvjet_tst_128x256_h_bz_coopA_NTN", 4e6),
                ("cudnn_sdpa_sm90_flash_fprop", 6e6),
                ("cudnn_sdpa_sm90_flash_fprop", 3e6, "jit(step)/cross_attention/sdpa"),
                ("nvjet_qqtst_128x128_TNT", 2e6, "cublas-lt-matmul.7"),
                ("mosaic_residual_norm", 1e6),
            ],
            Stream_2=[("loop_multiply_fusion_3", 1e6), ("MemcpyD2D", 5e5), ("loop_multiply_fusion_3", 1e6)],
            XLA_Ops=[("everything again", 9e6)],
        ),
        plane("/host:CPU", Stream_1=[("python", 1e9)]),
    ]
    table = profile.summarise(profile._kernels(planes), 2)
    times = {key: value for key, value in table.items() if key != "largest_ms"}
    assert times == {
        "attention_ms": 3,
        "cross_attention_ms": 1.5,
        "gemm_ms": 2,
        "fp8_gemm_ms": 1,
        "copy_ms": 0.25,
        "elementwise_ms": 1.5,
    }
    assert list(table["largest_ms"])[:2] == ["cudnn_sdpa_sm90_flash_fprop", "nvjet_tst_128x256_h_bz_coopA_NTN"]
    bounds = {"kinds": {"attention": {"ms": 1.0}, "cross_attention": {"ms": 0.5}, "gemm": {"ms": 2.0}}}
    assert profile.against(table, bounds) == {
        "attention": {"measured_ms": 4.5, "bound_ms": 1.5, "times": 3.0},
        "gemm": {"measured_ms": 3, "bound_ms": 2, "times": 1.5},
    }


def test_a_cpu_gives_no_kernels():
    assert profile.kernel_times(lambda: None) is None


def test_fp8_is_measured_with_random_values_of_its_own(trainable, tiny):
    subject = resolve([f"--config={trainable}"], None, precision="fp8")
    assert subject.describe()["precision"] == "fp8" and from_json(subject.to_json()) == subject
    params = random_params(subject.config)
    types = {leaf.dtype for leaf in jax.tree.leaves(params["dit"]["blocks"]["self_attention"])}
    assert jnp.dtype("float8_e4m3fn") in types
    actual = {part: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert subject.parameter_bytes() == actual
    frames = next(Pipeline(subject.config, params).stream("a red car"))
    assert frames.std() > 1  # neither saturated nor silent
    assert resolve([f"--config={trainable}"], None, precision="bf16").config.dit.dtype == "bfloat16"


def test_rates_of_products_that_are_float8(monkeypatch):
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: float(next(clock)))
    assert peaks.product_rate(jnp.dtype("float8_e4m3fn"), 32) == 2 * 32**3 / 0.5


def test_the_peer_is_of_our_shape_and_needs_torch(tiny, monkeypatch):
    shapes = compare.shapes(tiny)
    assert shapes["windows"] * np.prod(shapes["window"]) == shapes["tokens"] and shapes["text_tokens"] == 64
    assert shapes["num_heads"] * shapes["head_dim"] == shapes["width"] == tiny.dit.width
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--compare: needs PyTorch: pip install torch"):
        run.run([], "roadtrip", peer=True)
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="--compare: is of streaming"):
        compare.require_peer("train")


def test_a_peer_that_fails_says_why(tiny, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "Popen", lambda *_, **__: Ended("", "Traceback\nOSError: no GPU\n"))
    with pytest.raises(StreamDiTError, match="the PyTorch peer ended with 1: OSError: no GPU"):
        compare.peer(tiny)


def test_our_attention_is_timed_at_the_windows_shape(tiny):
    report = compare.own_attention(tiny)
    windows, tokens, heads, dim = report["shape"]
    assert windows * tokens == np.prod(tiny.dit.grid) and heads * dim == tiny.dit.width and report["tflops"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_a_peer_measures_attention_products_and_where_diffusers_is_a_transformer(tiny):
    report = compare.peer(tiny)
    assert report["attention"]["default"]["ms"] > 0 and set(report["products"]) == {"qkv", "out", "up", "down"}
    if importlib.util.find_spec("diffusers"):
        assert report["transformer"]["windows"]["latents"][0] == compare.shapes(tiny)["windows"]
        assert report["transformer"]["whole"]["ms"] > 0 and any("rotary" in line for line in report["differs"])
    else:
        assert any("diffusers" in line for line in report["left_out"])


def mistakes(trainable, model):
    config = [f"--config={trainable}"]
    return [
        ([], {}, "--config: give a configuration"),
        (config, {"model": str(model)}, "and not both"),
        (["--config=missing.py"], {}, "there is no file missing.py"),
        ([*config, "--config.dit.depth=3"], {}, "has no field"),
        (config, {"scheme": "N9c9s9"}, "--scheme: N9c9s9 does not tile the buffer"),
        (config, {"scheme": "fast"}, "--scheme: 'fast' is not a partition scheme"),
        (config, {"filling": "none"}, "--filling: 'none'"),
        (config, {"precision": "fp4"}, "--precision: 'fp4' is not one of auto, float32, bfloat16, fp8"),
        ([], {"model": str(model), "precision": "fp8"}, "make one that is with `streamdit quantize"),
        (config, {"seconds": 0.0}, "--seconds: must be a positive number"),
        (config, {"seconds": float("inf")}, "--seconds: must be a positive number"),
        (config, {"sessions": "1,none"}, "--sessions: numbers from 1 to 64"),
        (config, {"sessions": "0"}, "--sessions: numbers from 1 to 64"),
        ([], {"model": str(model), "what": "train"}, "--what: train measures training.flow_matching"),
    ]


def test_what_cannot_be_measured_is_refused_at_once(trainable, tiny_model, monkeypatch):
    monkeypatch.setattr(start, "first_frames", lambda subject: pytest.fail("a process was started"))
    for overrides, options, message in mistakes(trainable, tiny_model):
        with pytest.raises(ConfigError) as raised:
            run.run(overrides, options.pop("model", None), **options)
        assert message in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="nowhere"):
        run.run([], "nowhere")


def test_what_does_not_fit_is_refused_before_anything_is_made(trainable, monkeypatch):
    subject = resolve([f"--config={trainable}"], None)
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"--config: tiny needs 0\.0 GB for its parameters, and .* has 0\.0 GB left"):
        subject.pipeline()
    with pytest.raises(ConfigError, match="for parameters, averages, moments and gradients"):
        run.run([f"--config={trainable}"], None, what="train", seconds=0.1)
    monkeypatch.setattr(machine, "available_bytes", lambda: None)
    assert subject.pipeline().fingerprint == "random", "where no one knows, it is tried"


def test_measuring_a_stream_loads_no_training_libraries():
    """Law 7 holds here too: whoever has the base installed can measure it."""
    program = (
        "import sys, streamdit_jax.bench.run, streamdit_jax.evaluation.evaluate\n"
        "heavy = ('grain', 'tensorflow_datasets', 'torch', 'tensorflow', 'orbax', 'optax', 'matplotlib', 'PIL')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert said.stdout.strip() == "[]"


def test_a_process_that_fails_says_why(trainable, monkeypatch):
    subject = resolve([f"--config={trainable}"], None)
    monkeypatch.setattr(start.subprocess, "Popen", lambda *_, **__: Ended(json.dumps({"mistake": "--config: no"}), ""))
    with pytest.raises(ConfigError, match="--config: no"):
        start.first_frames(subject.to_json())
    monkeypatch.setattr(start.subprocess, "Popen", lambda *_, **__: Ended("", "Traceback\nMemoryError: too much\n"))
    with pytest.raises(StreamDiTError, match="ended with 1: MemoryError: too much"):
        start.first_frames(subject.to_json())


class Ended:
    """A process that has ended."""

    returncode = 1

    def __init__(self, said, error):
        self._said = said, error

    def communicate(self, *_, **__):
        return self._said

    def poll(self):
        return self.returncode


def test_the_time_to_a_first_frame_is_counted_from_the_start_of_the_process(trainable, monkeypatch):
    """The child's clock is the parent's: a process that shows frames 3 s after it was started took 3 s."""

    def popen(*_, **__):
        at = time.perf_counter() + 3
        parts = {"weights": 1.0, "trace_and_lower": 0.1, "compile_or_read": 0.3, "run": 0.1}
        said = {"at": at, "parts": parts, "compile_seconds": 0.4, "programs_found": 7}
        return Ended(json.dumps(said), "")

    monkeypatch.setattr(start.subprocess, "Popen", popen)
    report = start.first_frames(resolve([f"--config={trainable}"], None).to_json())
    assert report["first_frame_seconds_cold"] == pytest.approx(3, abs=0.5)
    assert report["first_frame_parts_warm"]["python_and_jax"] == pytest.approx(1.5, abs=0.5)
    assert report["compile_seconds"] == 0.4


def bench(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(cli, "_enable_caches", lambda: None)
    code = cli.main(["bench", *arguments, "--json"])
    said, error = capsys.readouterr()
    assert code == 0, error
    assert said.count("\n") == 1
    return json.loads(said)


@pytest.mark.slow
def test_a_report_of_streaming(capsys, monkeypatch, trainable):
    report = bench(capsys, monkeypatch, f"--config={trainable}", "--seconds", "1", "--sessions", "1,2", "--guidance=1")
    promised = (
        "hardware versions command date forward_ms_median forward_ms_p99 decode_ms_per_chunk denoise_fps "
        "end_to_end_fps first_frame_seconds_cold first_frame_seconds_warm compile_seconds peak_memory_bytes "
        "flops_per_forward share_of_peak chunk_jitter prompt_to_first_changed_pixel_seconds sessions notes"
    )
    assert set(promised.split()) <= set(report)
    assert report["weights"].startswith("random") and report["recompilations"] == 0 and report["guidance"] == 1
    assert report["first_frame_seconds_warm"] < report["first_frame_seconds_cold"] and report["compile_seconds"] > 0
    assert 0.9 < report["cost_analysis_flops"] / report["flops_per_forward"] < 2
    assert 0 < report["share_of_peak"]["matmul"] < 1
    assert report["roofline"]["rates"]["source"] == "measured in this run"
    assert 0 < report["roofline"]["forward"]["ms"] < report["forward_ms_median"]
    assert "kernels" not in report and any(note.startswith("kernels: left out") for note in report["notes"])


@pytest.mark.slow
def test_a_report_of_the_forward_alone(capsys, monkeypatch, trainable):
    monkeypatch.setattr(start, "first_frames", lambda subject: pytest.fail("a process was started"))
    report = bench(
        capsys, monkeypatch, "--what=forward", f"--config={trainable}", "--seconds", "0.2", "--precision=fp8"
    )
    assert report["what"] == "forward" and report["precision"] == "fp8" and report["forward_ms_median"] > 0
    assert report["compile_seconds"] > 0 and "end_to_end_fps" not in report
    assert any("one layer" in note for note in report["notes"]) and any("float8" in note for note in report["notes"])


@pytest.mark.slow
def test_a_report_of_training(capsys, monkeypatch, trainable):
    report = bench(capsys, monkeypatch, "--what=train", f"--config={trainable}", "--seconds", "0.2")
    assert report["what"] == "train" and report["batch_size"] == 2 and report["steps"] >= 8
    assert report["clips_per_second"] == pytest.approx(2 / (1e-3 * report["step_ms_median"]), rel=0.01)
    assert 0 < report["mfu"] < 1 and np.isfinite(report["loss"]) and report["peak_memory_bytes"] > 0
