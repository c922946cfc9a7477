"""Programs that are found ready: the same frames bit for bit, nothing traced, and nothing believed that is damaged,
another's, or where others may write.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamdit_jax as sd
from streamdit_jax import programs
from streamdit_jax.models.dit import DiT
from streamdit_jax.models.tae import TAE
from streamdit_jax.models.text import TextEncoder
from streamdit_jax.programs import Programs, UnsafeCache

pytest.importorskip("flatbuffers")


def test_a_second_start_traces_no_model_and_shows_the_same_frames(tiny_model, tmp_path, monkeypatch):
    def frames(pipeline):
        stream = pipeline.stream("a red car", seed=3)
        made = [next(stream)]
        before = stream.state
        stream.prompt = "snow"
        made.append(next(stream))
        assert before.buffer.is_deleted() and before.queue.is_deleted(), "the state is donated"
        assert not pipeline.dit_params["velocity"]["kernel"].is_deleted()
        return np.concatenate(made)

    direct = frames(sd.load(tiny_model))
    first = Programs(tmp_path / "programs")
    assert np.array_equal(frames(sd.load(tiny_model, programs=first)), direct)
    names = ["cache_text", "decode", "encode_text", "initial_decoder", "initial_state", "shapes", "step"]
    assert sorted(first.written) == names and not first.found

    def traced(*_, **__):
        pytest.fail("the model was traced")

    for module, method in ((DiT, "__call__"), (TAE, "decode"), (TextEncoder, "__call__")):
        monkeypatch.setattr(module, method, traced)
    second = Programs(tmp_path / "programs")
    assert np.array_equal(frames(sd.load(tiny_model, programs=second)), direct)
    assert sorted(second.found) == names and not second.written


# ---- one small function ----


def scaled(facts, directory, factor=2.0):
    """A function of its parameters and more, and what it is kept in."""
    kept = Programs(directory)
    return kept.jit("scaled", lambda params, x: {"y": factor * params * x["a"]}, facts), kept


X = {"a": np.arange(3, dtype=np.float32)}
TWO = np.float32(2)


def result(function, x=X):
    return np.asarray(function(TWO, x)["y"])


@pytest.mark.parametrize("damage", ["bit", "truncated", "garbage", "empty", "renamed", "writable", "link"])
def test_what_is_damaged_or_another_s_is_made_again(tmp_path, damage, caplog):
    function, kept = scaled("two", tmp_path / "kept")
    right = result(function)
    (path,) = kept.directory.iterdir()
    data = path.read_bytes()
    if damage == "renamed":
        other, _ = scaled("three", tmp_path / "other", factor=3.0)
        result(other)
        shutil.copy(next((tmp_path / "other").iterdir()), path)
    elif damage == "writable":
        path.chmod(0o666)
    elif damage == "link":
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    else:
        damaged = data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]
        contents = {"bit": damaged, "truncated": data[:-9], "garbage": b"\x80\x04cos\n", "empty": b""}
        path.write_bytes(contents[damage])
    again, kept = scaled("two", tmp_path / "kept")
    assert np.array_equal(result(again), right)
    assert (kept.written, kept.found) == (["scaled"], []) and path.name in caplog.text
    once_more, kept = scaled("two", tmp_path / "kept")
    assert np.array_equal(result(once_more), right) and kept.found == ["scaled"]


def test_all_that_a_program_depends_on_tells_it_apart(tmp_path, monkeypatch):
    def made(facts="two", x=X):
        function, kept = scaled(facts, tmp_path / "kept")
        result(function, x)
        return kept.written

    assert made() and not made()
    assert made(facts="three")
    assert made(x={"a": np.arange(4, dtype=np.float32)})
    assert made(x={"a": np.arange(3, dtype=np.int32)})
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_min_max=true")
        assert made()
    with monkeypatch.context() as patched:
        patched.setattr(programs, "_source", lambda: "another")
        assert made()
    with monkeypatch.context() as patched:
        patched.setattr(programs, "_versions", lambda: {"jax": "99"})
        assert made()
    with jax.default_matmul_precision("highest"):
        assert made()
    assert not made()


def test_shapes_of_one_program_in_one_process(tmp_path):
    function, kept = scaled("two", tmp_path / "kept")
    for size in (3, 4, 3):
        assert result(function, {"a": jnp.ones(size)}).shape == (size,)
    assert function._cache_size() == 2 and len(kept.written) == 2


def test_a_function_that_cannot_be_kept_still_runs(tmp_path, caplog):
    kept = Programs(tmp_path / "kept")

    def callback(_, x):
        return jax.pure_callback(lambda x: x + 1, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    function = kept.jit("callback", callback, None)
    assert np.array_equal(function(None, np.ones(2, np.float32)), [2, 2])
    assert not kept.written and "callback: cannot be kept" in caplog.text


def test_a_cache_that_is_full_or_read_only_stops_nothing(tmp_path, monkeypatch, caplog):
    function, kept = scaled("two", tmp_path / "kept")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(programs.os, "replace", full)
    assert np.array_equal(result(function), 4 * X["a"])
    assert "could not be written (No space left on device)" in caplog.text and not list(kept.directory.iterdir())


def test_the_least_used_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_KEPT", 2)
    kept = Programs(tmp_path / "kept")
    for number in range(4):
        kept.remembered("text", number, lambda number=number: b"%d" % number)
        for path in kept.directory.iterdir():
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
    assert len(list(kept.directory.iterdir())) == 2
    assert kept.remembered("text", 3, lambda: b"new") == b"3"


# ---- whose directories ----


def test_directories_that_others_may_write_to_are_refused(tmp_path):
    safe = tmp_path / "cache" / "programs"
    Programs(safe)
    assert safe.stat().st_mode & 0o777 == 0o700
    for place in (safe, safe.parent):
        for mode in (0o775, 0o757):
            place.chmod(mode)
            with pytest.raises(UnsafeCache, match=f"others may write to {place}; .*chmod go-w"):
                Programs(safe)
        place.chmod(0o755)
    safe.parent.chmod(0o1777)  # as /tmp: nobody else may rename what is ours
    Programs(safe)


@pytest.mark.skipif(os.getuid() != 0, reason="only the superuser gives files away")
def test_what_belongs_to_another_user_is_refused(tmp_path):
    directory = tmp_path / "programs"
    function, _ = scaled("two", directory)
    result(function)
    (path,) = directory.iterdir()
    os.chown(path, 12345, -1)
    function, kept = scaled("two", directory)
    assert np.array_equal(result(function), 4 * X["a"]) and kept.written == ["scaled"]
    os.chown(directory, 12345, -1)
    with pytest.raises(UnsafeCache, match="belongs to another user"):
        Programs(directory)


@pytest.fixture
def settings():
    """JAX's settings, which `enable_caches` changes, as they were."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_both_caches_are_the_user_s_own_or_none(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    caches = programs.enable_caches()
    assert caches.executables == str(tmp_path / "streamdit_jax" / "compiled") == jax.config.jax_compilation_cache_dir
    assert caches.programs.directory == tmp_path / "streamdit_jax" / "programs" and not caches.refused

    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", str(shared))
    caches = programs.enable_caches()
    assert caches.executables is None is caches.programs and jax.config.jax_compilation_cache_dir is None
    assert len(caches.refused) == 1 and f"others may write to {shared}" in caches.refused[0]

    shared.chmod(0o755)
    planted = shared / "jit_step-cache"
    planted.write_bytes(b"code")
    planted.chmod(0o666)
    jax.config.update("jax_compilation_cache_dir", str(shared))
    assert f"others may write to {planted}" in programs.enable_caches().refused[0]

    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    caches = programs.enable_caches()
    assert caches.executables == "gs://bucket/cache" and caches.programs.directory.parent.parent == tmp_path


@pytest.mark.slow
def test_compiling_ahead_fills_both_caches_once(tiny_model, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run(*arguments):
        command = [sys.executable, "-m", "streamdit_jax.cli", *arguments, "--model", str(tiny_model), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=environment)
        return json.loads(done.stdout)

    first, second = (run("compile", "--sessions=2") for _ in range(2))
    assert first["programs_written"] > 6 and first["executables_written"] >= first["programs_written"] - 1
    assert Path(first["programs"]) == tmp_path / "streamdit_jax" / "programs"
    assert (second["programs_written"], second["executables_written"]) == (0, 0)
    assert second["programs_found"] == first["programs_written"]
    kept = sorted((tmp_path / "streamdit_jax").rglob("*"))
    run("stream", "a red car", "--seconds=0.6", f"--out={tmp_path / 'stream.mp4'}")
    assert sorted((tmp_path / "streamdit_jax" / "programs").iterdir()) == [p for p in kept if p.suffix == ".program"]
