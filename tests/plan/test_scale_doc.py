"""docs/scale.md tells what is so: its table of axes is that of sharding.py, and its figures are those of the plans."""

import json
import re
from collections import Counter
from pathlib import Path

from streamdit_jax import sharding
from streamdit_jax.plan.fit import size

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/scale.md").read_text(encoding="utf-8")


def rows_under(header: str) -> list[list[str]]:
    """The rows of the table whose header line starts so."""
    lines = TEXT.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_table_of_logical_axes():
    told = {axis: tuple(mesh.split(", ")) for axis, mesh in rows_under("| logical axis |")}
    assert told == sharding.TABLE


def test_the_figures_are_those_of_the_plans():
    rows = rows_under("| plan |")
    reports = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "docs/results").glob("plan-*.json"))}
    assert len(rows) > 0 and {re.sub(r"\[(.*)\]\(.*\)", r"\1", row[0]) for row in rows} == set(reports)
    for name, *cells in rows:
        assert cells == figures(reports[re.sub(r"\[(.*)\]\(.*\)", r"\1", name)])


def figures(report: dict) -> list[str]:
    """A row of the document's table."""
    sent = Counter()
    for kind in report["collectives"].values():
        sent.update({axes: each["bytes"] for axes, each in kind["axes"].items()})
    mesh = " × ".join(f"{name} {count}" for name, count in report["mesh"].items() if count > 1) or "one device"
    return [
        f"{mesh}, {report['slices']} slices" if report["slices"] > 1 else mesh,
        str(report.get("batch_size", 1)),
        size(report["argument_bytes_per_device"]),
        size(report["temporary_bytes_per_device"]),
        f"{report['hbm_share']:.1%}",
        ", ".join(f"{axes} {size(count)}" for axes, count in sent.most_common() if count > 0.01 * sent.total()) or "",
        f"{report['compile_seconds']:.0f} s, {size(report['host_peak_bytes'])}",
    ]
