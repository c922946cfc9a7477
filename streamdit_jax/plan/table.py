"""A plan's report for readers: the same numbers as its JSON, in units that say something."""

from typing import Any

from streamdit_jax.plan.fit import size


def table(report: dict[str, Any]) -> str:
    """The report as lines of two columns, and one line for each kind of collective and mesh axis."""
    mesh = " × ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1) or "one device"
    slices = f", {report['slices']} slices" if report["slices"] > 1 else ""
    rows = [
        ("config", f"{report['config']}, {_program(report)}"),
        ("topology", f"{report['topology']}{slices}: {report['devices']} devices, {mesh}"),
        ("parameters", f"{count(report['parameters'])}, computed in {report['precision']}"),
        ("arguments", f"{size(report['argument_bytes_per_device'])} per device"),
        ("temporaries", f"{size(report['temporary_bytes_per_device'])} per device"),
        ("HBM", f"{report['hbm_share']:.1%} of {size(report['hbm_bytes_per_device'])}"),
    ]
    if report["flops_per_step"] is not None:
        each = report["flops_per_step_per_device"]
        again = report["rematerialised_flops_per_step"] / report["flops_per_step"]
        rows.append(("FLOPs", f"{count(report['flops_per_step'])}FLOP a step, {count(each)}FLOP per device"))
        rows[-1] = (rows[-1][0], rows[-1][1] + (f"; rematerialisation adds {again:.0%}" if again else ""))
    for kind, of_kind in report["collectives"].items():
        for axes, sent in of_kind["axes"].items():
            rows.append((kind, f"{sent['count']} over {axes or 'one device'}, {size(sent['bytes'])} per device"))
    if not report["collectives"]:
        rows.append(("collectives", "none"))
    if of_gpus := report.get("kernels"):
        rows.append(("kernels", f"{of_gpus['launches']} launches, {of_gpus['per_layer']:g} a layer"))
        for kind, moved in of_gpus["kinds"].items():
            read, written = size(moved["read_bytes"]), size(moved["written_bytes"])
            rows.append((kind, f"{moved['count']}, {read} read, {written} written"))
        for what in ("copies", "weight_copies"):
            counted = of_gpus[what]
            rows.append((what.replace("_", " "), f"{counted['count']}, {size(counted['bytes'])}"))
    rows.append(("compiled in", f"{report['compile_seconds']} s, {size(report['host_peak_bytes'])} of host memory"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def roofline_table(report: dict[str, Any]) -> str:
    """The bounds of the streaming loop as Markdown tables: the forward's kernels, the decoder's, frames per second."""
    fps = (
        f"first frame after {report['first_frame_ms'] / 1e3:.2f} s; denoiser alone {report['denoise_fps']:g} frames "
        f"per second, end to end {report['end_to_end_fps']:g}: {report['frames_per_chunk']} frames take "
        f"{report['forwards_per_chunk']} forwards and a decoding, which is {report['decoder_share']:.1%} of it"
    )
    sections = [f"{report['config']} on {report['topology']}, {report['scheme']} at guidance {report['guidance']:g}"]
    for name, precision in (("forward", report["precision"]), ("decoder", report["decoder_precision"])):
        sections.append("\n".join((f"{name}, {precision}", "", *roofline_rows(report[name]))))
    return "\n\n".join([*sections, fps])


def roofline_rows(bounds: dict[str, Any]) -> list[str]:
    """The lines of one Markdown table: every kernel, then the sum of each kind, then of all."""
    lines = ["| kernel | kind | runs | TFLOP | GB | ms at least | by |", "|---|---|---:|---:|---:|---:|---|"]
    sums = [{"name": f"**all {kind}**", "kind": kind, **each} for kind, each in bounds["kinds"].items()]
    for row in (*bounds["rows"], *sums, {"name": "**all**", "kind": "", **bounds}):
        moved = (row["read_bytes"] + row["written_bytes"]) / 1e9
        lines.append(
            f"| {row['name']} | {row['kind']} | {row['count']} | {row['flops'] / 1e12:.2f} | {moved:.2f} "
            f"| {row['ms']:.2f} | {row.get('by', '')} |"
        )
    return lines


def count(number: float) -> str:
    """A number for readers, as "4.12 G"."""
    for unit, power in (("P", 15), ("T", 12), ("G", 9), ("M", 6)):
        if number >= 10**power:
            return f"{number / 10**power:,.2f} {unit}"
    return f"{number:,.0f} "


def _program(report: dict[str, Any]) -> str:
    if report["what"] == "stream":
        return f"streaming step of {report['scheme']} at guidance {report['guidance']:g}"
    parts = f" in {report['accumulate']} parts" if report["accumulate"] > 1 else ""
    bucket = "" if report["bucket"] == "main" else f", bucket {report['bucket']}"
    return (
        f"training step of {report['stage']}{bucket}, {report['batch_size']} examples{parts}, remat {report['remat']}"
    )
