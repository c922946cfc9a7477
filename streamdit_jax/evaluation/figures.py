"""Figures for the documentation: levels of a stream under its schemes, curves of training, contact sheets of frames.

matplotlib and Pillow are imported where they draw; streaming needs neither.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from streamdit_jax.errors import ConfigError
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.training.metrics import read_metrics

# More cells than this cannot be told apart in a picture.
MOST_FRAMES, MOST_STEPS = 512, 4096
INK, PALE = "#22313f", "#eef1f4"


def level_map(scheme: PartitionScheme) -> np.ndarray:
    """The flow time of every latent frame of the video before each micro step of a running stream (§3.1, §3.2).

    Row e·s + m is micro step m after e emissions, when the buffer covers the latent frames e·c to e·c + B; the rest of
    a row is NaN. Rows go on until the buffer has moved on by about its own length. float32 [rows, frames].
    """
    levels, c, s = scheme.step_levels()[:-1], scheme.chunk_size, scheme.micro_steps
    emissions = max(2, -(-scheme.buffer_size // c))
    cells = np.full((emissions * s, scheme.buffer_size + (emissions - 1) * c), np.nan, np.float32)
    for e in range(emissions):
        cells[e * s : (e + 1) * s, e * c : e * c + scheme.buffer_size] = levels
    return cells


def _drawable(spelling: str) -> PartitionScheme:
    try:
        scheme = PartitionScheme.parse(spelling)
    except ValueError as mistake:
        raise ConfigError(f"schemes: {mistake}") from None
    steps = scheme.micro_steps * max(2, -(-scheme.buffer_size // scheme.chunk_size))
    if scheme.buffer_size > MOST_FRAMES or steps > MOST_STEPS:
        raise ConfigError(
            f"schemes: {spelling} takes {steps} micro steps to move {scheme.buffer_size} frames, too many to draw; "
            f"at most {MOST_STEPS} and {MOST_FRAMES}"
        )
    return scheme


def require_writable(path: str | Path, option: str = "--out") -> Path:
    """The path, if its directory exists; ConfigError, naming the option that gave it, otherwise."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: there is no directory {path.parent} to write {path.name} to")
    return path


def draw_levels(schemes: Sequence[str], path: str | Path) -> None:
    """Draws each scheme, such as "N8c2s2", as a panel of `level_map`; writes PNG, or what the suffix of `path` names.

    Columns are latent frames of the video, rows are micro steps, one forward each; colour is flow time. White lines
    divide chunks, references are hatched.

    Raises ConfigError for a spelling that is no scheme, a scheme too large to draw, and a place that cannot be written.
    """
    if not schemes:
        raise ConfigError("schemes: give at least one, such as N8c2s2")
    drawn, path = [_drawable(spelling) for spelling in schemes], require_writable(path)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.2 * columns + 0.9, 3.5 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.12)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, scheme in zip(panels, drawn):
        image = _draw_panel(panel, scheme)
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    bar = figure.colorbar(image, ax=list(panels), shrink=0.5, aspect=26, pad=0.015, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_yticklabels(["0  noise", "0.25", "0.5", "0.75", "1  clean"])
    bar.set_label("flow time", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK, labelsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as mistake:  # no space, no permission; a suffix that is no picture's
        raise ConfigError(f"--out: {path} cannot be written: {mistake}") from None


def _draw_panel(panel, scheme: PartitionScheme):
    """One scheme on one pair of axes; returns the image, for the colour bar."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    K, N, c, s = scheme.num_references, scheme.num_chunks, scheme.chunk_size, scheme.micro_steps
    size = scheme.buffer_size
    cells = level_map(scheme)
    steps, frames = cells.shape
    panel.set_facecolor(PALE)
    image = panel.imshow(
        cells, cmap="YlGnBu_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=(0, frames, steps, 0)
    )
    for e in range(steps // s):
        top, left = e * s, e * c
        borders = left + K + c * np.arange(1 if K else 0, N + 1)
        panel.vlines(borders, top, top + s, color="white", linewidth=0.9)
        if K:
            panel.add_patch(
                Rectangle((left, top), K, s, fill=False, hatch="/////", edgecolor="#9aa0a6", linewidth=0, zorder=2)
            )
            panel.vlines(left + K, top, top + s, color=INK, linewidth=1.1, zorder=3)
        panel.add_patch(Rectangle((left, top), size, s, fill=False, edgecolor=INK, linewidth=0.7, zorder=3))
    label = dict(color="#7b8794", fontsize=7.5, style="italic", zorder=4)
    panel.text(0.015, 0.03, "shown", transform=panel.transAxes, ha="left", va="bottom", **label)
    panel.text(0.985, 0.97, "yet to enter", transform=panel.transAxes, ha="right", va="top", **label)

    cost = f"{s / c:g} forward{'' if s == c else 's'} per latent frame"
    power = "" if scheme.power == 1 else f"   γ(t) = t^{scheme.power:g}"
    facts = f"K = {K}   N = {N}   c = {c}   s = {s}{power}   ·   B = {size}   ·   {cost}"
    panel.set_title(str(scheme), loc="left", fontsize=12, fontweight="bold", color=INK, pad=18)
    above = panel.text(0, 1.025, facts, transform=panel.transAxes, fontsize=8, color=INK, va="bottom")
    above.set_in_layout(False)
    panel.set_xlabel("latent frame of the video" + (", references hatched" if K else ""), color=INK, fontsize=9)
    panel.set_ylabel("micro step", color=INK, fontsize=9)
    panel.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.tick_params(length=0, colors=INK, labelsize=8)
    panel.spines[:].set_visible(False)
    return image


def draw_curves(stages: Sequence[str | Path], path: str | Path) -> None:
    """Draws the loss of each training stage over its steps, a panel each; `velocity_loss_…` by quarter where there is
    one.

    stages: directories that a training run wrote, each with a metrics.jsonl. ConfigError for one without.
    """
    import matplotlib.pyplot as plt

    path, lines = require_writable(path), []
    for stage in map(Path, stages):
        if not (rows := read_metrics(stage)):
            raise ConfigError(f"stages: {stage} holds no metrics.jsonl; give a directory such as runs/x/flow_matching")
        lines.append(rows)
    figure, panels = plt.subplots(1, len(lines), figsize=(4.2 * len(lines), 3.2), squeeze=False, layout="constrained")
    for panel, stage, rows in zip(panels[0], stages, lines):
        drawn = [name for name in rows[0] if name == "loss" or name.startswith("velocity_loss")]
        for name in drawn:
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = {"color": INK, "linewidth": 2} if name == "loss" else {"linewidth": 0.8}
            panel.plot(*zip(*points), label=name, **style)
        panel.set(title="/".join(Path(stage).parts[-2:]), xlabel="step")
        panel.legend(fontsize=7, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as mistake:
        raise ConfigError(f"--out: {path}: {mistake}") from None
    finally:
        plt.close(figure)


def contact_sheet(
    rows: Sequence[tuple[str, UInt8[np.ndarray, "F H W 3"]]], path: str | Path, columns: int = 8, scale: int = 3
) -> None:
    """Writes a picture with one titled row per clip: `columns` of its frames, evenly spaced from the first to the last.

    rows: (title, uint8 [frames, height, width, 3]). scale: pixels per pixel, repeated and not smoothed, so that the
    sheet shows what the model made.

    Raises ValueError for no rows, empty clips and arrays of another kind, ConfigError for a place that cannot be
    written.
    """
    if not rows or columns < 1 or scale < 1:
        raise ValueError(f"rows: a sheet needs clips, columns and a scale, not {len(rows)}, {columns} and {scale}")
    for title, clip in rows:
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or not len(clip):
            raise ValueError(f"rows: {title!r} is {clip.dtype} {clip.shape}, not uint8 [frames, height, width, 3]")
    path = require_writable(path)

    from PIL import Image, ImageDraw, ImageFont

    gap, margin, size = 4, 12, 15
    font = ImageFont.load_default(size)
    strips = []
    for title, clip in rows:
        chosen = clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)]
        large = chosen.repeat(scale, axis=1).repeat(scale, axis=2)
        padded = np.pad(large, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
        strips.append((title, np.concatenate(list(padded), axis=1)[:, :-gap]))
    width = max(strip.shape[1] for _, strip in strips)
    letters = max(8, int(width / font.getlength("n")))
    titled = [(textwrap.wrap(title, letters) or [""], strip) for title, strip in strips]
    line = size + 5
    height = sum(len(lines) * line + gap + strip.shape[0] + margin for lines, strip in titled)
    sheet = Image.new("RGB", (width + 2 * margin, height + margin), "white")
    pen, y = ImageDraw.Draw(sheet), margin
    for lines, strip in titled:
        for text in lines:
            pen.text((margin, y), text, fill=INK, font=font)
            y += line
        y += gap
        sheet.paste(Image.fromarray(strip), (margin, y))
        y += strip.shape[0] + margin
    try:
        sheet.save(path)
    except (OSError, ValueError) as mistake:
        raise ConfigError(f"--out: {path} cannot be written: {mistake}") from None
