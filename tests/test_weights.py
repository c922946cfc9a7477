"""A model's files: of bounded size, read side by side, placed row by row, and refused where they are not what
model.json says.
"""

import json
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

from streamdit_jax import weights
from streamdit_jax.errors import CheckpointError


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "blocks": {
            "kernel": rng.standard_normal((6, 8, 5), np.float32),
            "bias": rng.standard_normal((6, 5), np.float32),
        },
        "table": rng.standard_normal((40, 7), np.float32),
        "one": np.float32(rng.standard_normal()),
        "counts": np.arange(3, dtype=np.int32),
    }


@pytest.fixture
def in_pieces(tmp_path):
    """A part of tensors that are larger than a file may be."""
    weights.save_model(tmp_path, {}, {"part": tree(), "small": {"x": np.ones(2, np.float32)}}, {}, file_bytes=500)
    return tmp_path


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_small_parts_are_one_file_and_stay_format_1(tmp_path):
    weights.save_model(tmp_path, {}, {"part": tree()}, {})
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["format"] == 1 and described["parts"]["part"].keys() == {"file", "sha256", "parameters"}
    same(weights.load_part(tmp_path, described, "part"), tree())


def test_large_parts_lie_in_files_of_bounded_size(in_pieces):
    described = weights.load_card(in_pieces)
    part = described["parts"]["part"]
    assert described["format"] == 2, "who reads format 1 alone says so, and does not look for a file"
    assert "files" not in described["parts"]["small"] and len(part["files"]) > 3
    header = 400
    assert max((in_pieces / one["file"]).stat().st_size for one in part["files"]) < 500 + header
    with safetensors.safe_open(in_pieces / part["files"][0]["file"], framework="numpy") as file:
        assert all(re.fullmatch(r"[\w/]+(@\d+)?", name) for name in file.keys())  # noqa: SIM118
    same(weights.load_part(in_pieces, described, "part"), tree())
    shapes = weights.part_shapes(in_pieces, described, ["part", "small"])
    weights.check_shapes({"part": tree(), "small": {"x": np.ones(2)}}, shapes, "here")
    weights.save_model(in_pieces, {}, {"part": tree(1)}, {})
    assert len(list(in_pieces.glob("*.safetensors"))) == 1, "files of the former model are gone"


def test_rows_are_placed_one_by_one_by_several_threads(in_pieces, monkeypatch):
    threads, calls = set(), []
    both = threading.Barrier(2, timeout=60)

    def place(key, tensor):
        if threading.get_ident() not in threads and len(threads) < 2:
            threads.add(threading.get_ident())
            both.wait()
        calls.append((key, tensor.shape))
        return jax.device_put(tensor)

    described = weights.load_card(in_pieces)
    loaded = weights.load_parts(
        in_pieces, described, ["part", "small"], place, by_row=lambda key: key.startswith("part/blocks/")
    )
    assert len(threads) == 2
    assert sorted(set(calls)) == [
        ("part/blocks/bias", (5,)),
        ("part/blocks/kernel", (8, 5)),
        ("part/counts", (3,)),
        ("part/one", ()),
        ("part/table", (40, 7)),
        ("small/x", (2,)),
    ]
    for name, rows in loaded["part"]["blocks"].items():
        assert isinstance(rows, tuple) and len(rows) == 6
        np.testing.assert_array_equal(np.stack(rows), tree()["blocks"][name])
    np.testing.assert_array_equal(loaded["part"]["table"], tree()["table"])


@pytest.mark.parametrize("damage", ["bit", "header", "truncated", "longer", "swapped", "garbage", "empty", "missing"])
def test_every_damaged_file_is_named_and_nothing_is_loaded(in_pieces, damage):
    described = weights.load_card(in_pieces)
    path, other = (in_pieces / described["parts"]["part"]["files"][number]["file"] for number in (2, 1))
    data = path.read_bytes()
    contents = {
        "bit": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "header": data.replace(b"F32", b"I32", 1),
        "truncated": data[:-1],
        "longer": data + b"\0",
        "swapped": other.read_bytes(),
        "garbage": b"\xff" * 100,
        "empty": b"",
    }
    path.write_bytes(contents[damage]) if damage in contents else path.unlink()
    message = "cannot be read" if damage == "missing" else "altered|pieces of"
    with pytest.raises(CheckpointError, match=message) as mistake:
        weights.load_part(in_pieces, described, "part")
    assert str(in_pieces) in str(mistake.value)


def test_a_list_of_files_that_was_shortened_is_refused(in_pieces):
    described = json.loads((in_pieces / "model.json").read_text())
    described["parts"]["part"]["files"].pop()
    (in_pieces / "model.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="the files of part are not those of its SHA-256"):
        weights.load_card(in_pieces)


def test_quantised_leaves_keep_their_types(tmp_path):
    leaves = {
        "kernel": np.linspace(-4, 4, 12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.float8_e4m3fn),
        "kernel_scale": np.full(3, 0.1, np.float32),
        "bias": np.full(3, 0.1, np.float32),
    }
    weights.save_model(tmp_path, {}, {"part": leaves}, {}, dtype="bfloat16")
    loaded = weights.load_part(tmp_path, weights.load_card(tmp_path), "part")
    assert {name: str(leaf.dtype) for name, leaf in loaded.items()} == {
        "kernel": "float8_e4m3fn",
        "kernel_scale": "float32",
        "bias": "bfloat16",
    }
    same(loaded["kernel"].view(np.uint8), leaves["kernel"].view(np.uint8))
    assert jnp.asarray(loaded["kernel"]).dtype == jnp.float8_e4m3fn


PEAK = """
import resource, sys
import jax, jax.numpy as jnp
from streamdit_jax import weights
described = weights.load_card(sys.argv[1])
jax.block_until_ready(jax.device_put(jnp.ones(3)))
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
loaded = weights.load_parts(sys.argv[1], described, ["part"], lambda key, x: jax.device_put(x), lambda key: True)
jax.block_until_ready(loaded)
print(peak() - before)
"""


def test_host_memory_is_bounded_while_reading(tmp_path):
    """256 MiB in rows of 2 MiB: on a CPU the device's memory is the host's, and little else is needed."""
    rows = np.ones((64, 2**19), np.float32)
    weights.save_model(tmp_path, {}, {"part": {"a": rows, "b": rows}}, {}, file_bytes=2**26)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    assert int(done.stdout) < (256 + 64) * 2**20
