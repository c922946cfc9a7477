"""launch/gpu-hour.sh: what it would run, that one step's failure stops no other, and that JAX starts with its flags."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, FLAGS = ROOT / "launch/gpu-hour.sh", ROOT / "launch/gpu-flags.sh"
CALL_SECONDS = 600

# An interpreter that stands in for one with a GPU: it prints what it was asked, and fails at fp8.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
if "--precision=fp8" in sys.argv:
    sys.exit("Traceback\\nRuntimeError: no fp8 here")
print(json.dumps({{"arguments": sys.argv[1:], "flags": os.environ["XLA_FLAGS"], "path": os.environ["PYTHONPATH"]}}))
"""


def hour(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        check=False,
    )


def listed(*arguments):
    done = hour("--list", *arguments)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^== (\S+), at most (\d+) s: XLA_FLAGS='(.*?)' (.*)$", done.stdout, re.MULTILINE)


def test_three_calls_of_ten_minutes_hold_every_step():
    every = listed()
    assert [name for name, *_ in every] == [name for call in "123" for name, *_ in listed(call)]
    for call in "123":
        assert 0 < sum(int(seconds) for _, seconds, *_ in listed(call)) < CALL_SECONDS
    assert {"kernels", "forward-bf16", "forward-fp8", "stream-bf16", "stream-fp8", "train", "compare"} <= {
        name for name, *_ in every
    }
    assert "gpu_variants=(" + " ".join(name[6:] for name, *_ in listed("flags")) + ")" in FLAGS.read_text()


def test_the_commands_are_those_of_the_command_line():
    from streamdit_jax import cli

    for _, _, _, command in listed():
        words = command.split()
        if "streamdit_jax.cli" in words:
            arguments, rest = cli.make_parser(cli.RUNS).parse_known_args(words[words.index("streamdit_jax.cli") + 1 :])
            assert arguments.command == "bench" and all(word.startswith("--config") for word in rest)
            assert (ROOT / rest[0].partition("=")[2]).exists()


def test_a_step_that_fails_stops_no_other(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = hour("2", "flags-triton", PYTHON=python, OUT=tmp_path / "out")
    assert done.returncode == 1 and "failed: stream-fp8" in done.stderr and "RuntimeError: no fp8 here" in done.stdout
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"gpu-stream-bf16.json", "gpu-flags-triton.json", "gpu-hour.log"}
    report = json.loads((tmp_path / "out/gpu-flags-triton.json").read_text())
    assert report["flags"].endswith("--xla_gpu_enable_triton_gemm=true") and str(ROOT) in report["path"]


@pytest.mark.parametrize("arguments, message", [((), "name a call"), (("4",), "4 is no step"), (("bench",), "no step")])
def test_mistakes(arguments, message):
    done = hour(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_jax_starts_with_every_flag():
    """An unknown flag, or an unknown value of one, aborts the process."""
    shown = subprocess.run(
        ["bash", "-c", f"source {FLAGS}; set | grep -A0 ^gpu_flags_"], capture_output=True, text=True, check=True
    )
    flags = sorted(set(re.findall(r'"(--xla_[^"]*)"', shown.stdout)))
    assert len(flags) >= 8
    values: dict[str, list[str]] = {}
    for flag in flags:
        values.setdefault(flag.partition("=")[0], []).append(flag)
    for index in range(max(map(len, values.values()))):
        chosen = [several[min(index, len(several) - 1)] for several in values.values()]
        assert start(chosen) == 0, chosen
    assert start(["--xla_gpu_no_such_flag=1"]) != 0


def start(flags):
    program = "import jax; jax.numpy.ones(2).block_until_ready()"
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)},
        capture_output=True,
        timeout=300,
        check=False,
    ).returncode
