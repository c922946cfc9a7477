"""The rules of the house: who may import whom, what loads what, and how fast (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import streamdit_jax

YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"
ROOT = Path(__file__).parents[1] / "streamdit_jax"

# Floors from the ground; a file may import from its own floor or from below, and none imports cli.
FLOORS = [
    {
        "errors",
        "partition",
        "flow",
        "sharding",
        "kernels",
        "data",
        "weights",
        "weight_files",
        "snapshot",
        "machine",
        "clusters",
        "distributed",
    },
    {
        "models",
        "stream",
        "config",
        "stages",
        "steering",
        "timetable",
        "video_input",
        "endless",
        "flops",
        "roofline",
        "parameters",
        "programs",
        "compiled",
    },
    {"pipeline", "live", "distill"},
    {"training", "serving", "quantization"},
    {"evaluation", "bench", "plan"},
    {"cli_stream", "cli_compile", "cli_arguments"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            yield name, path


def imports(path):
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "streamdit_jax":
            inside = node.module.split(".")[1:]
            found |= {".".join([*inside, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".", 1)[1] for alias in node.names if alias.name.startswith("streamdit_jax.")}
    known = {name for name, _ in modules()}
    return {name if name in known else name.rpartition(".")[0] for name in found} - {""}


def room(name):
    return name.split(".")[0]


def test_every_room_has_a_floor():
    assert {room(name) for name, _ in modules()} <= FLOOR.keys() | {"bundled"}


def test_no_arrow_runs_up():
    for name, path in modules():
        for other in imports(path):
            assert FLOOR[room(other)] <= FLOOR[room(name)], f"{name} imports {other}"
            assert room(other) != "cli" and (room(name) not in ("partition", "flow")), f"{name} imports {other}"
            assert room(name) != "models" or room(other) in ("models", "kernels", "sharding"), f"{name} imports {other}"
            assert room(name) != "stream" or room(other) in ("flow", "partition"), f"{name} imports {other}"


def test_no_circles():
    graph = {name: imports(path) for name, path in modules()}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' → '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for other in graph.get(name, ()):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_only_sharding_knows_partition_specs():
    for name, path in modules():
        assert name == "sharding" or "PartitionSpec" not in path.read_text(), name


def test_nothing_is_unpickled():
    for name, path in modules():
        assert not any(word in path.read_text() for word in ("import pickle", "allow_pickle=True", "cloudpickle")), name


def run(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    return result.stdout.strip()


def test_importing_and_streaming_load_no_training_libraries(tiny_model):
    """Law 7: neither grain nor tfds nor torch nor orbax, and no TensorFlow."""
    loaded = run(
        "import sys, streamdit_jax as sd\n"
        "import streamdit_jax.cli\n"
        f"next(sd.load({str(tiny_model)!r}).stream('a red car'))\n"
        "heavy = ('grain', 'tensorflow_datasets', 'torch', 'tensorflow', 'orbax', 'optax')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.parametrize(
    "flags, jaxlib, cpu, expected",
    [
        ("", "0.10.2", "flags : avx avx2", f"{YNNPACK}="),
        ("--xla_a=1", "0.10.2", "flags : avx2", f"--xla_a=1 {YNNPACK}="),
        (f"{YNNPACK}=dot", "0.10.2", "flags : avx2", f"{YNNPACK}=dot"),
        ("--xla_a=1", "0.10.2", "flags : avx2 avx512f", "--xla_a=1"),
        ("--xla_a=1", "0.10.2", "Features : asimd", "--xla_a=1"),
        ("--xla_a=1", "0.12.0", "flags : avx2", "--xla_a=1"),
    ],
)
def test_ynnpack_is_left_out_only_where_it_crashes(flags, jaxlib, cpu, expected):
    assert streamdit_jax._without_ynnpack(flags, jaxlib, cpu) == expected


@pytest.mark.slow
def test_importing_takes_no_longer_than_jax_and_half_a_second():
    """Law 7. The best of three, because a busy machine only ever adds."""
    clock = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    ours = min(float(run(clock.format("import streamdit_jax as sd; sd.PartitionScheme"))) for _ in range(3))
    jax_alone = min(float(run(clock.format("import jax"))) for _ in range(3))
    assert ours <= jax_alone + 0.5
