"""Checkpoints: exact, verified, and clear about what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from streamdit_jax import sharding
from streamdit_jax.errors import CheckpointError
from streamdit_jax.training.checkpoint import Checkpoints
from streamdit_jax.training.checksums import checksums

MESH = sharding.make_mesh({"data": -1})


def tree(seed):
    rng = np.random.default_rng(seed)
    values = {
        "params": {"kernel": rng.normal(size=(33, 17)), "half": jnp.asarray(rng.normal(size=300), jnp.bfloat16)},
        "step": np.int32(seed),
        "mask": rng.random(9) < 0.5,
        "pixels": rng.integers(0, 256, (3, 5), np.uint8),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if np.asarray(x).dtype == np.float64 else None), values)


def abstract(tree):
    return sharding.abstract_arrays(jax.eval_shape(lambda: tree), MESH)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 10 and 20; copied, never changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory, keep=3)
    for step in (10, 20):
        checkpoints.save(step, tree(step), next_step=step, config={"seed": 1, "rate": 0.1})
    checkpoints.wait()
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restore(directory, like=None, step=None, say=lambda line: None):
    checkpoints = Checkpoints(directory, say=say)
    try:
        return checkpoints.restore(abstract(tree(0)) if like is None else like, step)
    finally:
        checkpoints.close()


def data_files(directory):
    """All files with content, largest first, by path within the directory."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted((path.relative_to(directory) for path in files), key=lambda p: (-(directory / p).stat().st_size, p))


def test_checksum_is_its_formula():
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=(5, 7, 3)).astype(np.float32), rng.integers(-9, 9, 11, np.int32), np.float32(3.5)):
        words = np.atleast_1d(x).reshape(-1).view(np.uint32).astype(object)
        factors = [(i * 2654435761 % 2**32) | 1 for i in range(len(words))]
        assert int(checksums([x])[0]) == sum(int(w) * f for w, f in zip(words, factors)) % 2**32


def test_checksum_notices_any_flipped_bit_and_swapped_values():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    original = int(checksums([x])[0])
    for bit in range(x.nbytes * 8):
        flipped = x.copy()
        flipped.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        assert int(checksums([flipped])[0]) != original
    assert int(checksums([x[::-1].copy()])[0]) != original


def test_everything_comes_back(directory):
    restored = restore(directory)
    assert bits(restored.state) == bits(tree(20))
    assert jax.tree.map(lambda x: x.dtype, restored.state) == jax.tree.map(lambda x: x.dtype, tree(20))
    assert restored.next_step == 20 and restored.config == {"seed": 1, "rate": 0.1}
    assert bits(restore(directory, step=10).state) == bits(tree(10))


def test_nothing_there(tmp_path, directory):
    with pytest.raises(CheckpointError, match=r"nowhere: no checkpoint is there"):
        restore(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no step 30 is there; there are \[10, 20\]"):
        restore(directory, step=30)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: cannot hold checkpoints"):
        Checkpoints(tmp_path / "file")


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            lambda t: t["params"].update(kernel=jnp.zeros((33, 18))),
            r"params/kernel is float32\[33, 17\] there and float32\[33, 18\] here",
        ),
        (
            lambda t: t["params"].update(kernel=jnp.zeros((33, 17), jnp.float16)),
            r"params/kernel is float32\[33, 17\] there and float16",
        ),
        (lambda t: t["params"].update(more=jnp.zeros(2)), r"params/more is missing there and float32\[2\] here"),
        (lambda t: t.pop("mask"), r"mask is bool\[9\] there and missing here"),
    ],
)
def test_another_configuration_is_named(directory, change, complaint):
    other = tree(0)
    change(other)
    with pytest.raises(
        CheckpointError, match=r"checkpoints/20: written with another configuration: " + complaint
    ) as error:
        restore(directory, abstract(other))
    assert "\n" not in str(error.value)


def flip(path, rng):
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(len(content) * 8))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("flips", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_silent(directory, flips):
    """Each is noticed, and the checkpoint set aside for the one before it; or nothing of the state is other for it."""
    pristine, like, rng = directory.with_name("pristine"), abstract(tree(0)), np.random.default_rng(flips)
    shutil.copytree(directory, pristine)
    names = data_files(directory / "20")
    largest, noticed = (directory / "20" / names[0]).stat().st_size, 0
    for n in range(flips):
        # Half of them where nearly all bytes are, the others in all files in turn.
        name = names[0] if n % 2 else names[n // 2 % len(names)]
        flip(directory / "20" / name, rng)
        lines = []
        restored = restore(directory, like, say=lines.append)
        assert restored.next_step == restored.step and bits(restored.state) == bits(tree(restored.step)), name
        if restored.step == 10:
            noticed += 1
            assert lines and (directory / "20.damaged").is_dir()
        else:
            assert restored.step == 20 and not lines
        shutil.rmtree(directory)
        shutil.copytree(pristine, directory)
    assert noticed >= flips // 3 and largest > 1000


def test_wrong_values_are_named_and_the_older_step_is_used(directory):
    """The bit flip that Orbax lets through: other values in a well-formed checkpoint."""
    shutil.rmtree(directory / "20" / "state")
    shutil.copytree(directory / "10" / "state", directory / "20" / "state")
    complaint = r"\S+ has other values than those that were saved"
    with pytest.raises(CheckpointError, match=r"checkpoints/20: damaged: " + complaint):
        restore(directory, step=20)  # asked for by its number, it is not replaced by another
    lines = []
    restored = restore(directory, say=lines.append)
    assert restored.step == 10 and bits(restored.state) == bits(tree(10))
    assert re.fullmatch(rf".*checkpoints/20: damaged: {complaint}; set aside as 20\.damaged", lines[0])
    assert re.fullmatch(complaint + r"\n", (directory / "20.damaged.txt").read_text())
    assert {"meta", "state"} <= {path.name for path in (directory / "20.damaged").iterdir()}
    assert restore(directory).step == 10


def test_what_was_set_aside_is_kept_and_not_counted(directory):
    for again in ("20.damaged", "20.damaged.2"):
        (directory / "20" / "meta" / "metadata").write_text("{")
        checkpoints = Checkpoints(directory, keep=2, say=lambda line: None)
        assert checkpoints.restore(abstract(tree(0))).step == 10
        checkpoints.save(20, tree(20), next_step=20)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20] and (directory / again / "meta").is_dir()
        checkpoints.close()


def test_altered_description_is_noticed(directory):
    path = directory / "20" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "next_step": 19}))
    with pytest.raises(CheckpointError, match=r"20: damaged: its description \(meta\) has other values"):
        restore(directory, step=20)


@pytest.mark.parametrize("how", ["cut", "empty", "delete"])
def test_incomplete_files_are_noticed(directory, how):
    pristine, like = directory.with_name("pristine"), abstract(tree(0))
    shutil.copytree(directory, pristine)
    names = [
        data_files(directory / "20")[0],
        Path("meta/metadata"),
        Path("state/manifest.ocdbt"),
        *([] if how == "delete" else [Path("state/_METADATA")]),  # without it, Orbax reads the values all the same
    ]
    for name in names:
        path, lines = directory / "20" / name, []
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if how == "cut" else 0])
        assert restore(directory, like, say=lines.append).step == 10
        assert re.search(rf"checkpoints/20: damaged: {name.parts[0]}: .*; set aside as 20\.damaged$", lines[0])
        assert "\n" not in lines[0] and "tensorstore_spec" not in lines[0]
        shutil.rmtree(directory)
        shutil.copytree(pristine, directory)


def test_no_intact_step_is_an_error_now_and_later(directory):
    """Nothing begins anew by itself."""
    for step in (10, 20):
        (directory / str(step) / "meta" / "metadata").write_text("{")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"no intact checkpoint is left; 10.damaged, 20.damaged were set aside"
        ):
            restore(directory)


def test_a_checkpoint_that_cannot_be_read_for_another_reason_stays(directory, monkeypatch):
    def full(*_, **__):
        raise MemoryError("no room for the state")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", full)
    with pytest.raises(CheckpointError, match=r"checkpoints/20: cannot be read: no room for the state; mend it"):
        restore(directory)
    assert (directory / "20").is_dir()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_saved(directory, value):
    poisoned = tree(30)
    poisoned["params"]["half"] = poisoned["params"]["half"].at[123].set(value)
    checkpoints = Checkpoints(directory)
    complaint = r"checkpoints/30: not saved: params/half has values that are not finite; step 20 is there and complete"
    with pytest.raises(CheckpointError, match=complaint):
        checkpoints.save(30, poisoned, next_step=30)
    checkpoints.wait()
    assert checkpoints.steps() == [10, 20]
    checkpoints.close()


def test_saving_in_the_background_is_not_disturbed_by_donation(tmp_path):
    """The buffers of a state that is being written are given to the next steps at once."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.5 + 1, state), donate_argnums=0)
    state = {"kernel": jnp.ones((1024, 1024)), "bias": jnp.arange(1000.0)}
    like, checkpoints, expected = abstract(state), Checkpoints(tmp_path / "c", keep=5), {}
    for n in range(1, 4):
        expected[n] = jax.tree.map(np.array, state)
        checkpoints.save(n, state, next_step=n)
        for _ in range(5):
            state = step(state)
    checkpoints.wait()
    for n, values in expected.items():
        assert bits(checkpoints.restore(like, n).state) == bits(values)
    checkpoints.close()


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for n in (1, 2, 5):
        checkpoints.save(n, tree(n), next_step=n)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5] and checkpoints.latest() == 5
    checkpoints.save(5, tree(6), next_step=6)  # is there already
    assert bits(checkpoints.restore(abstract(tree(0))).state) == bits(tree(5))
    checkpoints.close()


FULL_DISK = """
import resource, sys, time
import jax.numpy as jnp
from streamdit_jax.errors import CheckpointError
from streamdit_jax.training.checkpoint import Checkpoints
import jax, numpy as np
checkpoints = Checkpoints(sys.argv[1], keep=1)
state = {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}
checkpoints.save(1, state, next_step=1)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file grows beyond this, as if the disk were full
try:
    checkpoints.save(2, state, next_step=2)
    for _ in range(6000):
        checkpoints.check()  # as the loop does at each step; it does not wait
        time.sleep(0.01)
except CheckpointError as error:
    print(error)
checkpoints.close()
"""


def test_full_disk_while_saving_loses_nothing(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0 and len(lines) == 1, done.stdout + done.stderr
    assert lines[0].startswith(f"{tmp_path / 'c'}: saving a checkpoint failed: ")
    assert "step 1 is there and complete; check the disk's free space and run the same command again" in lines[0]
    state = {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}
    restored = restore(tmp_path / "c", abstract(state))
    assert bits(restored.state) == bits(state) and restored.next_step == 1
