"""The five landscapes of the roadtrip world, each as a far, a middle and a near layer over an unbounded x axis.

Every object belongs to an integer cell of its layer, and everything about it is hashed from (seed, layer, cell): the
panorama never ends and never repeats, and any stretch of it can be drawn alone.
"""

from collections.abc import Callable

import numpy as np

from streamdit_jax.data.roadtrip_canvas import Canvas, uniform, value_noise
from streamdit_jax.data.roadtrip_palette import Look, blend, rgb

VERGE, ROAD_TOP, ROAD_BOTTOM = 44.0, 47.0, 61.5
DASH_PERIOD, DASH_LENGTH = 20.0, 10.0
_WHITE = rgb(240, 245, 254)


def _objects(canvas: Canvas, seed: int, stream: int, width: float, margin: float, count: int = 8):
    """(x of the cell's left edge, hashed numbers) for every cell that may touch the canvas, from left to right."""
    cells = canvas.cells(width, margin)
    return zip(cells * width, uniform(seed, stream, cells, count))


def _shaded(canvas: Canvas, light: Look, upper, lower, top: float, bottom: float, **kind) -> np.ndarray:
    """A vertical gradient of land colour, float32 [rows, 3], from `upper` at y = top to `lower` at y = bottom."""
    share = np.clip((canvas.y - top) / (bottom - top), 0, 1).astype(np.float32)[:, None]
    a, b = light.land(upper, **kind), light.land(lower, **kind)
    return a + (b - a) * share


def _road(canvas: Canvas, light: Look, verge: np.ndarray) -> None:
    """The road with its kerb, lane dashes and lower verge; fills every row from ROAD_TOP down."""
    asphalt = _shaded(canvas, light, rgb(82, 84, 94), rgb(104, 106, 116), ROAD_TOP, ROAD_BOTTOM, snow=0.5)
    if light.wet:
        asphalt = blend(asphalt, light.haze, 0.22)
    flat = np.full(len(canvas.x), ROAD_TOP)
    canvas.ground(flat, asphalt)
    canvas.ground(flat, light.land(rgb(214, 210, 200), snow=0.6), lower=ROAD_TOP + 1.2)
    dash = light.land(rgb(255, 232, 140), snow=0.2)
    if light.dark:
        dash = blend(dash, rgb(200, 180, 110), 0.35)
    for x, _ in _objects(canvas, 0, 0, DASH_PERIOD, 0.0, 1):
        canvas.box(x + 2, 57.0, x + 2 + DASH_LENGTH, 59.0, dash, radius=0.5)
    canvas.ground(flat + (ROAD_BOTTOM - ROAD_TOP), light.land(verge * np.float32(0.9), snow=0.85))


def _pine(canvas: Canvas, light: Look, x, top, base, half, colour, **kind) -> None:
    """A conifer of three tiers; snow lies on their upper sides."""
    height = base - top
    leaf = light.land(colour, snow=0.15, **kind)
    shade = leaf * np.float32(0.86)
    for tier, (a, b, w) in enumerate(((0.40, 1.0, 1.0), (0.18, 0.72, 0.78), (0.0, 0.46, 0.54))):
        canvas.spike(x, top + a * height, top + b * height, 0.0, w * half, shade if tier == 1 else leaf)
        if light.snowy:
            snow = light.land(_WHITE, **kind)
            canvas.spike(
                x, top + a * height, top + (0.55 * b + 0.45 * a) * height, 0.0, 0.52 * w * half, snow, alpha=0.9
            )


def _hills_far(canvas: Canvas, seed: int, light: Look) -> None:
    ridge = 33.0 - 13.0 * value_noise(canvas.x, 46.0, seed, 20) - 3.0 * value_noise(canvas.x, 15.0, seed, 21)
    canvas.ground(ridge, _shaded(canvas, light, rgb(92, 146, 128), rgb(140, 186, 140), 20, 42, depth=0.32, snow=0.65))


def _hills_middle(canvas: Canvas, seed: int, light: Look) -> None:
    ridge = 42.0 - 12.0 * value_noise(canvas.x, 34.0, seed, 22)
    canvas.ground(ridge, _shaded(canvas, light, rgb(136, 208, 92), rgb(70, 158, 70), 30, 46, depth=0.06, snow=0.78))
    for x, u in _objects(canvas, seed, 23, 15.0, 10.0):
        if u[0] < 0.6:
            x = x + 15.0 * u[1]
            y = 42.0 - 12.0 * float(value_noise(np.array([x]), 34.0, seed, 22)[0])
            size = 2.0 + 1.4 * u[2]
            canvas.ellipse(x, y - 0.4 * size, 1.2 * size, size, light.land(rgb(48, 128, 62), depth=0.06, snow=0.5))


def _hills_near(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 24, 36.0, 12.0):
        x, tall, size = x + 8.0 + 20.0 * u[0], 13.0 + 4.0 * u[1], 5.0 + 1.4 * u[2]
        leaf, top = rgb(52, 140, 58), 45.0 - tall
        canvas.box(x - 1.1, top, x + 1.1, 46.0, light.land(rgb(112, 76, 50)))
        canvas.ellipse(x, top, size + 0.8, size, light.land(leaf * np.float32(0.8), snow=0.3))
        canvas.ellipse(x - 0.2 * size, top - 0.3 * size, 0.85 * size, 0.75 * size, light.land(leaf, snow=0.7))
        canvas.ellipse(
            x - 0.35 * size, top - 0.5 * size, 0.4 * size, 0.35 * size, light.land(rgb(96, 182, 78), snow=0.9)
        )
    grass = VERGE - 1.5 * value_noise(canvas.x, 17.0, seed, 25)
    canvas.ground(grass, light.land(rgb(88, 178, 66), snow=0.85))
    _road(canvas, light, rgb(88, 178, 66))


_WALLS = (rgb(206, 176, 134), rgb(110, 126, 154), rgb(182, 98, 82), rgb(150, 150, 158), rgb(94, 122, 128))
_WINDOW, _LIT = rgb(66, 84, 112), rgb(255, 214, 118)


def _city_far(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 20, 11.0, 8.0):
        top, wall = 16.0 + 14.0 * u[0], light.land(rgb(138, 152, 184), depth=0.42)
        canvas.box(x, top, x + 9.0 + 4.0 * u[1], 48.0, wall)
        if light.dark and u[2] < 0.6:
            canvas.box(x + 3.0, top + 4.0, x + 6.0, top + 7.0, blend(wall, _LIT, 0.55), radius=0.6)


def _city_middle(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 21, 18.0, 10.0, 32):
        floors = 2 + int(3.0 * u[0])
        left, right, top = x + 0.5, x + 16.5 + 1.5 * u[1], 45.0 - 3.0 - 5.6 * floors
        wall = _WALLS[int(len(_WALLS) * u[2])]
        canvas.box(left, top, right, 48.0, light.land(wall, depth=0.05))
        canvas.box(left, top, right, top + 1.4, light.land(wall * np.float32(0.8), depth=0.05, snow=0.95))
        for k in range(3 * floors):
            row, column = divmod(k, 3)
            wx, wy = left + 1.7 + 5.0 * column, top + 3.0 + 5.6 * row
            lit = u[8 + k] < (0.55 if light.dark else 0.25 if light.time == "sunset" else 0.0)
            pane = light.lamp(_LIT) if lit else light.land(_WINDOW, depth=0.05)
            canvas.box(wx, wy, wx + 3.0, wy + 3.4, pane, radius=0.3)


def _city_near(canvas: Canvas, seed: int, light: Look) -> None:
    canvas.ground(np.full(len(canvas.x), VERGE - 0.5), light.land(rgb(172, 172, 176), snow=0.7))
    for x, u in _objects(canvas, seed, 22, 40.0, 14.0):
        x, pole = x + 8.0 + 20.0 * u[0], light.land(rgb(56, 60, 70))
        canvas.box(x - 0.7, 27.0, x + 0.7, 46.0, pole, radius=0.3)
        canvas.box(x - 0.7, 26.4, x + 5.0, 27.8, pole, radius=0.6)
        if light.time != "day":
            canvas.ellipse(x + 4.6, 28.6, 9.0, 9.0, _LIT, alpha=0.6 if light.dark else 0.35, soft=True)
        canvas.box(
            x + 2.6, 27.4, x + 6.6, 29.4, _LIT if light.time != "day" else light.land(rgb(236, 236, 228)), radius=0.8
        )
    _road(canvas, light, rgb(164, 164, 168))


def _desert_far(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 20, 40.0, 22.0):
        x, top, half = x + 12.0 + 16.0 * u[0], 19.0 + 8.0 * u[1], 8.0 + 6.0 * u[2]
        stone = light.land(rgb(204, 108, 70), depth=0.16, snow=0.15)
        canvas.spike(x, top + 8.0, 46.0, half + 1.0, half + 8.0, stone * np.float32(0.92))
        canvas.spike(x, top, top + 9.0, half - 1.5, half, stone)
        canvas.spike(x, top, top + 2.6, half - 1.5, half - 1.0, light.land(rgb(228, 138, 90), depth=0.16, snow=0.9))


def _desert_middle(canvas: Canvas, seed: int, light: Look) -> None:
    dune = 42.5 - 8.0 * value_noise(canvas.x, 40.0, seed, 21)
    canvas.ground(dune, _shaded(canvas, light, rgb(248, 206, 132), rgb(222, 164, 92), 34, 46, snow=0.72))


def _desert_near(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 22, 34.0, 10.0):
        x, top = x + 6.0 + 20.0 * u[0], 28.0 + 4.0 * u[1]
        if u[2] < 0.75:
            green = light.land(rgb(58, 138, 74), snow=0.1)
            canvas.box(x - 1.6, top, x + 1.6, 46.0, green, radius=1.6)
            canvas.box(x - 5.2, top + 7.0, x, top + 9.4, green, radius=1.1)
            canvas.box(x - 5.4, top + 3.6, x - 3.0, top + 9.4, green, radius=1.1)
            canvas.box(x, top + 9.0, x + 5.0, top + 11.4, green, radius=1.1)
            canvas.box(x + 2.8, top + 5.4, x + 5.2, top + 11.4, green, radius=1.1)
            if light.snowy:
                canvas.ellipse(x, top + 0.8, 1.6, 1.3, light.land(_WHITE))
        else:
            rock = light.land(rgb(168, 108, 78), snow=0.3)
            canvas.ellipse(x, 44.0, 5.0, 4.0, rock)
            canvas.ellipse(x - 1.0, 42.4, 2.8, 1.8, light.land(rgb(204, 142, 104), snow=0.9))
    sand = VERGE - 1.0 * value_noise(canvas.x, 21.0, seed, 23)
    canvas.ground(sand, light.land(rgb(236, 186, 110), snow=0.8))
    _road(canvas, light, rgb(236, 186, 110))


def _forest_far(canvas: Canvas, seed: int, light: Look) -> None:
    def ridge(x):
        return 31.0 - 9.0 * value_noise(x, 40.0, seed, 20)

    cool = rgb(58, 116, 108)
    for x, u in _objects(canvas, seed, 21, 6.0, 8.0):
        x = x + 6.0 * u[0]
        y, tall = float(ridge(np.array([x]))[0]), 6.0 + 4.0 * u[1]
        canvas.spike(x, y - tall + 2, y + 3, 0.0, 4.0, light.land(cool, depth=0.36, snow=0.45))
    canvas.ground(ridge(canvas.x), light.land(cool, depth=0.36, snow=0.45))


def _forest_middle(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 22, 8.0, 9.0):
        x, top = x + 1.0 + 6.0 * u[0], 22.0 + 9.0 * u[1]
        colour = blend(rgb(30, 96, 62), rgb(54, 124, 66), float(u[2]))
        _pine(canvas, light, x, top, 46.0, 5.4 + 1.6 * u[3], colour, depth=0.08)


def _forest_near(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 23, 38.0, 12.0):
        x, top = x + 8.0 + 22.0 * u[0], 13.0 + 6.0 * u[1]
        canvas.box(x - 1.4, 38.0, x + 1.4, 46.0, light.land(rgb(92, 62, 44)))
        _pine(canvas, light, x, top, 41.5, 7.6, rgb(22, 82, 52))
    moss = VERGE - 1.5 * value_noise(canvas.x, 11.0, seed, 24)
    canvas.ground(moss, light.land(rgb(58, 116, 54), snow=0.85))
    _road(canvas, light, rgb(58, 116, 54))


def _sea_far(canvas: Canvas, seed: int, light: Look) -> None:
    for x, u in _objects(canvas, seed, 20, 40.0, 16.0):
        x = x + 10.0 + 20.0 * u[0]
        if u[1] < 0.5:
            canvas.box(x - 3.6, 32.2, x + 3.6, 34.0, light.land(rgb(150, 74, 54), depth=0.1), radius=0.7)
            canvas.spike(x + 0.8, 23.5, 31.6, 0.0, 2.8, light.land(rgb(252, 250, 242), depth=0.1))
            canvas.spike(x - 2.6, 26.0, 31.6, 0.0, 1.5, light.land(rgb(240, 120, 90), depth=0.1))
        elif u[1] < 0.8:
            isle = light.land(rgb(70, 140, 96), depth=0.35, snow=0.7)
            canvas.spike(x, 28.4 - 2.0 * u[2], 31.6, 3.0, 12.0, isle)


def _sea_middle(canvas: Canvas, seed: int, light: Look) -> None:
    crest = light.land(rgb(226, 244, 250), depth=0.15)
    for row, stream in enumerate((21, 22, 23)):
        for x, u in _objects(canvas, seed, stream, 22.0, 12.0):
            half = (3.0 + 3.0 * u[1]) * (0.7 + 0.25 * row)
            canvas.ellipse(x + 22.0 * u[0], 35.0 + 2.7 * row, half, 0.7, crest, alpha=0.55)


def _sea_near(canvas: Canvas, seed: int, light: Look) -> None:
    shore = 41.5 - 1.5 * value_noise(canvas.x, 24.0, seed, 24)
    canvas.ground(shore, light.land(rgb(238, 248, 250)))
    canvas.ground(shore + 1.3, light.land(rgb(246, 220, 164), snow=0.7))
    for x, u in _objects(canvas, seed, 25, 38.0, 16.0):
        x, top = x + 9.0 + 20.0 * u[0], 22.0 + 4.0 * u[1]
        lean, bark, leaf = 0.18, light.land(rgb(148, 104, 66)), light.land(rgb(56, 156, 74), snow=0.35)
        crown = x + lean * (45.0 - top)
        canvas.box(x - 0.9, top, x + 0.9, 45.0, bark, slant=lean)
        for side in (-1, 1):
            canvas.ellipse(crown + side * 3.8, top - 0.8, 4.2, 1.6, leaf)
            canvas.ellipse(crown + side * 4.6, top + 1.8, 2.4, 2.4, leaf * np.float32(0.88))
        canvas.ellipse(crown, top - 2.0, 2.6, 2.0, light.land(rgb(92, 186, 88), snow=0.7))
    _road(canvas, light, rgb(240, 214, 160))


Layer = Callable[[Canvas, int, Look], None]
LAYERS: dict[str, tuple[Layer, Layer, Layer]] = {
    "hills": (_hills_far, _hills_middle, _hills_near),
    "city": (_city_far, _city_middle, _city_near),
    "desert": (_desert_far, _desert_middle, _desert_near),
    "forest": (_forest_far, _forest_middle, _forest_near),
    "sea": (_sea_far, _sea_middle, _sea_near),
}
PARALLAX = (0.125, 0.375, 1.0)  # how fast each layer passes, as a share of the road's speed
SPANS = ((12, 48), (16, 48), (10, 64))  # the rows that each layer may touch
