"""docs/performance.md tells what is so: its tables are those of the raw reports, and these are what the code says."""

import json
import re
from pathlib import Path

import pytest

from streamdit_jax.config import from_arguments
from streamdit_jax.plan.report import roofline_of
from streamdit_jax.plan.table import roofline_rows

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
PRECISIONS = {"bf16": "bfloat16", "fp8": "fp8"}


def raw(name):
    return json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))


def told(name):
    """The lines of the document between the marks of that name."""
    return re.search(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end -->", TEXT, re.DOTALL).group(1).splitlines()


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_bounds_are_those_of_the_command(name):
    report = raw(f"roofline-h200-{name}")
    overrides = [word for word in report["command"].split() if word.startswith("--config")]
    now = roofline_of(overrides, "h200", precision=PRECISIONS[name])
    parts = ("forward", "decoder", "rates", "denoise_fps", "end_to_end_fps", "first_frame_ms", "decoder_share")
    assert {part: report[part] for part in parts} == {part: now[part] for part in parts}
    assert told(f"roofline-h200-{name} forward") == roofline_rows(report["forward"])


def test_the_decoder_and_frames_per_second():
    reports = {name: raw(f"roofline-h200-{name}") for name in PRECISIONS}
    assert told("roofline-h200-bf16 decoder") == roofline_rows(reports["bf16"]["decoder"])
    assert told("roofline-h200 fps") == [
        "| | forward | decoder | of both | denoiser alone | end to end | first frame |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {each['forward']['ms']:.1f} ms | {each['decoder']['ms']:.1f} ms | {each['decoder_share']:.1%} "
            f"| {each['denoise_fps']:g} FPS | {each['end_to_end_fps']:g} FPS "
            f"| {each['first_frame_ms'] / 1e3:.2f} s |"
            for name, each in reports.items()
        ),
    ]


def test_the_bounds_in_the_table_of_aims():
    for name in PRECISIONS:
        report = raw(f"roofline-h200-{name}")
        assert re.search(rf"\| forward, {name} \|.*\| {report['forward']['ms']:.1f} ms \| not measured", TEXT)
        assert re.search(rf"\| end to end .*, {name} \|.*\| {report['end_to_end_fps']:g} FPS \| not measured", TEXT)


@pytest.mark.parametrize("name, precision", [("plan-h200-student", "bf16"), ("plan-h200-student-fp8", "fp8")])
def test_the_census_is_that_of_the_plan(name, precision):
    report, bounds = raw(name), raw(f"roofline-h200-{precision}")["forward"]
    found = report["kernels"]
    lines = ["| kind | kernels | GB read | GB written |", "|---|---:|---:|---:|"]
    for kind, each in found["kinds"].items():
        lines.append(
            f"| {kind} | {each['count']} | {each['read_bytes'] / 1e9:.1f} | {each['written_bytes'] / 1e9:.1f} |"
        )
    read, written = (sum(each[what] for each in found["kinds"].values()) for what in ("read_bytes", "written_bytes"))
    lines += [
        f"| **all**, {found['per_layer']:g} a layer | {found['launches']} | {read / 1e9:.1f} | {written / 1e9:.1f} |",
        f"| of these: copies of more than a MiB | {found['copies']['count']} "
        f"| {found['copies']['bytes'] / 1e9:.1f} together | |",
        f"| of these: copies of weights | {found['weight_copies']['count']} | | |",
        f"| the roofline's | {bounds['count']} | {bounds['read_bytes'] / 1e9:.1f} "
        f"| {bounds['written_bytes'] / 1e9:.1f} |",
    ]
    assert told(f"{name} kernels") == lines
    assert found["weight_copies"]["count"] == 0 and report["what"] == "stream" and report["guidance"] == 1
    assert report["parameters"] > 4.1e9 and from_arguments([report["command"].split()[2]]).name == report["config"]


def test_every_figure_that_needs_a_gpu_has_a_command_that_there_is():
    rows = [line for line in TEXT.splitlines() if "not measured" in line and line.startswith("|")]
    steps = re.findall(r"^  (.*)$", (ROOT / "launch/gpu-hour.sh").read_text(), re.MULTILINE)
    names = {step.split(":")[0] for line in steps for step in line.split() if re.fullmatch(r"[\w-]+:\d:\d+", step)}
    assert len(rows) == 9
    for row in rows:
        (step,) = re.findall(r"`bash launch/gpu-hour\.sh ([\w-]+)`", row)
        assert step in names
