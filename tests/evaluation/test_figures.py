"""Figures show the levels that the sampler visits, and the frames that they were given."""

import json

import numpy as np
import pytest
from PIL import Image

from streamdit_jax.errors import ConfigError
from streamdit_jax.evaluation.figures import contact_sheet, draw_curves, draw_levels, level_map
from streamdit_jax.partition import PartitionScheme


@pytest.mark.parametrize("spelling", ["N1c6s4", "N4c2s3", "N5c1s1", "K2N3c2s2", "K3N1c2s4"])
def test_a_column_of_the_map_is_the_life_of_a_frame(spelling):
    """Read downwards, a frame waits, rises along the grid from noise, and may stay on as a reference."""
    scheme = PartitionScheme.parse(spelling)
    K, c, s, size = scheme.num_references, scheme.chunk_size, scheme.micro_steps, scheme.buffer_size
    cells = level_map(scheme)
    positions = max(2, -(-size // c))
    assert cells.shape == (positions * s, size + (positions - 1) * c)
    assert np.array_equal(np.isfinite(cells).sum(axis=1), np.full(positions * s, size))
    # A frame that enters after the picture's first row: its chunk enters with the buffer's tail.
    column = cells[:, size]
    assert np.all(np.isnan(column[:s])), "it enters after the first chunk has left"
    seen = column[s:]
    grid = np.concatenate([scheme.grid()[:-1], np.ones(K * s)])
    assert np.array_equal(seen[: len(grid)], grid[: len(seen)])
    # The frames that leave first are those at the front.
    assert np.all(np.isnan(cells[s:, :c])) and np.all(np.isfinite(cells[:s, :c]))


def test_levels_are_drawn_to_a_picture(tmp_path):
    draw_levels(["N2c2s2", "K1N3c1s2p2", "N1c4s3"], tmp_path / "levels.png")
    picture = np.asarray(Image.open(tmp_path / "levels.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(picture, axis=0)) > 20, "a scale of colours, not an empty frame"


@pytest.mark.parametrize("spelling", ["8x2", "N0c2s1", "N8c2", "", "N8c2s9999", "N900c1s1"])
def test_schemes_that_cannot_be_drawn_are_named(tmp_path, spelling):
    with pytest.raises(ConfigError, match="schemes: ") as raised:
        draw_levels(["N8c2s2", spelling], tmp_path / "levels.png")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path):
    clip = np.zeros((1, 4, 4, 3), np.uint8)
    for draw in (lambda path: draw_levels(["N2c1s1"], path), lambda path: contact_sheet([("", clip)], path)):
        for path in (tmp_path / "nowhere" / "x.png", tmp_path / "x.unknown"):
            with pytest.raises(ConfigError, match=r"--out: .*x\."):
                draw(path)
    with pytest.raises(ConfigError, match="at least one"):
        draw_levels([], tmp_path / "levels.png")


def test_a_sheet_holds_evenly_spaced_frames_pixel_for_pixel(tmp_path):
    """Frame t of the clip is painted with the value 2·t; eight of 29 frames are 0, 4, …, 28."""
    clip = np.broadcast_to(np.arange(0, 58, 2, dtype=np.uint8)[:, None, None, None], (29, 10, 12, 3))
    short = np.full((3, 10, 12, 3), 200, np.uint8)
    contact_sheet([("a red car " * 9, clip), ("short", short)], tmp_path / "sheet.png", columns=8, scale=3)
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    values, counts = np.unique(picture[picture.std(axis=-1) == 0][:, 0], return_counts=True)
    area = dict(zip(values.tolist(), counts.tolist()))
    for frame in range(0, 29, 4):
        assert area[2 * frame] == 30 * 36
    assert 2 * 1 not in area and 2 * 27 not in area
    assert area[200] >= 3 * 30 * 36, "a clip shorter than the sheet shows each frame once"


@pytest.mark.parametrize("rows", [[], [("t", np.zeros((2, 4, 4, 3)))], [("t", np.zeros((0, 4, 4, 3), np.uint8))]])
def test_sheets_of_nothing_and_of_other_arrays(tmp_path, rows):
    with pytest.raises(ValueError, match="rows: "):
        contact_sheet(rows, tmp_path / "sheet.png")


def test_curves_of_stages_are_drawn_and_a_stage_without_them_is_named(tmp_path):
    """Two stages whose losses differ give two different panels; the picture is not blank."""
    for name, losses in (("a", [1.0, 0.5, 0.25]), ("b", [0.2, 0.9, 0.1])):
        (tmp_path / name).mkdir()
        rows = [{"step": 50 * i, "loss": loss, "velocity_loss_1of4": 2 * loss} for i, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves([tmp_path / "a", tmp_path / "b"], tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    left, right = picture[:, : picture.shape[1] // 2], picture[:, -(picture.shape[1] // 2) :]
    assert (picture < 100).mean() > 0.002 and not np.array_equal(left, right)
    with pytest.raises(ConfigError, match=r"stages: .*holds no metrics\.jsonl"):
        draw_curves([tmp_path], tmp_path / "curves.png")
