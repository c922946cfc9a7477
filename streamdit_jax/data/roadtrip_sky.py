"""What hangs over the roadtrip world: sky, sun, moon, stars, the sea's mirror of them, clouds, rain and snow."""

import numpy as np

from streamdit_jax.data.roadtrip_canvas import SUB_X, Canvas, uniform, value_noise
from streamdit_jax.data.roadtrip_palette import Look, blend, rgb

HORIZON = 45.0
SEA_TOP = 31.0  # where the sea meets the sky, pixels from the top
RAIN_DROPS, RAIN_SPEED, RAIN_LENGTH, RAIN_SLANT = (
    10,
    2.0,
    8.0,
    0.3,
)  # pixels per frame; pixels; pixels across per pixel down
SNOW_FLAKES, SNOW_SPEED, SNOW_DRIFT = 16, 0.5, 0.25  # pixels per frame down and across
_PAD = 12  # pixels around the picture in which drops may begin and end


def backdrop(seed: int, light: Look, sea: bool) -> np.ndarray:
    """The still part of the sky, float32 [64 x, 64 y, 3]."""
    canvas = Canvas(0, 64 * 4 + 3, 0, 64)
    horizon = SEA_TOP if sea else HORIZON
    canvas.rgba[..., :3] = light.sky(canvas.y / horizon)[None]
    canvas.rgba[..., 3] = 1.0
    place = uniform(seed, 1, np.arange(12), 3)
    clear = light.weather == "clear"
    x, y = 10.0 + 44.0 * place[0, 0], 8.0 + 5.0 * place[0, 1]
    glitter = None
    if light.time == "night" and clear:
        for u, v, w in place[1:]:
            canvas.ellipse(
                64 * u, 3 + (0.55 * horizon) * v, 1.6, 1.6, rgb(255, 250, 225), alpha=0.45 + 0.55 * w, soft=True
            )
            canvas.ellipse(64 * u, 3 + (0.55 * horizon) * v, 0.6, 0.6, rgb(255, 250, 225), alpha=0.45 + 0.55 * w)
        canvas.ellipse(x, y, 12, 12, rgb(150, 170, 230), alpha=0.45, soft=True)
        canvas.ellipse(x, y, 4.2, 4.2, rgb(246, 240, 214))
        canvas.ellipse(x + 2.0, y - 1.2, 3.5, 3.5, light.sky(np.array([y / horizon]))[0])
        glitter = rgb(196, 206, 240)
    elif light.time == "sunset" and light.weather != "rain":
        y = horizon - 12.0 + 3.0 * place[0, 1] - (0.0 if sea else 4.0)
        share = 1.0 if clear else 0.6
        canvas.ellipse(x, y, 24, 20, rgb(255, 214, 120), alpha=0.75 * share, soft=True)
        canvas.ellipse(x, y, 6.2, 6.2, rgb(255, 232, 150), alpha=share)
        glitter = rgb(255, 214, 130)
    elif light.time == "day" and light.weather != "rain":
        share = 1.0 if clear else 0.45
        canvas.ellipse(x, y, 13, 13, rgb(255, 246, 200), alpha=0.8 * share, soft=True)
        canvas.ellipse(x, y, 5.0, 5.0, rgb(255, 238, 120) if clear else rgb(255, 250, 235), alpha=share)
        glitter = rgb(236, 248, 255) if clear else None
    if sea:
        _sea(canvas, light, x, glitter)
    return np.ascontiguousarray(canvas.filtered()[::SUB_X, :, :3])


def _sea(canvas: Canvas, light: Look, sun_x: float, glitter: np.ndarray | None) -> None:
    depth = np.clip((canvas.y - SEA_TOP) / 13.0, 0, 1).astype(np.float32)[:, None]
    far, near = light.land(rgb(64, 138, 206)), light.land(rgb(38, 176, 190))
    water = blend(far + (near - far) * depth, light.haze, 0.22)
    canvas.ground(np.full(len(canvas.x), SEA_TOP), water)
    if glitter is not None:
        spread = 3.0 + 0.45 * (canvas.y - SEA_TOP)
        column = np.exp(-(((canvas.x[:, None] - sun_x) / spread) ** 2)) * (canvas.y > SEA_TOP)
        canvas.paint((slice(None), slice(None)), (0.55 * column).astype(np.float32), glitter)


def draw_clouds(canvas: Canvas, seed: int, light: Look) -> None:
    """A few broad clouds; under rain and snow the cover is denser."""
    colour, opacity = light.cloud
    if light.weather != "clear":
        cover = 7.0 + 9.0 * value_noise(canvas.x, 26.0, seed, 11) + 3.0 * value_noise(canvas.x, 9.0, seed, 12)
        below = canvas.y[None, :] - cover[:, None]
        canvas.paint(
            (slice(None), slice(None)), (opacity * np.clip(0.5 - below / 5.0, 0, 1)).astype(np.float32), colour
        )
        return
    lower = blend(colour, light.haze, 0.30)
    for cell, u in zip(canvas.cells(38.0, 20.0), uniform(seed, 10, canvas.cells(38.0, 20.0), 6)):
        x, y, width = 38.0 * (cell + 0.2 + 0.6 * u[0]), 7.0 + 11.0 * u[1], 8.0 + 4.0 * u[2]
        canvas.ellipse(x, y + 1.4, width, 2.9, lower, alpha=opacity)
        canvas.ellipse(x - 0.35 * width, y - 0.4, 0.45 * width, 3.0, colour, alpha=opacity)
        canvas.ellipse(x + 0.25 * width, y - 1.4, 0.5 * width, 3.6, colour, alpha=opacity)


def precipitation(seed: int, light: Look, ticks: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Rain or snow before everything else: coverage float32 [frames, 64 x, 64 y] and its colour; None when clear."""
    if light.weather == "clear":
        return None
    rain = light.wet
    count, speed = (RAIN_DROPS, RAIN_SPEED) if rain else (SNOW_FLAKES, SNOW_SPEED)
    period = int((64 + 2 * _PAD) / speed)
    cover = np.zeros((len(ticks), 64 + 2 * _PAD, 64 + 2 * _PAD), np.float32)
    frames = np.arange(len(ticks))[:, None, None]
    wide, high = (7, 13) if rain else (6, 6)
    for drop in range(count):
        # every fall of a drop is a new drop: its place is hashed from its lane and the number of the fall
        age = ticks + (period * drop) // count
        fall, age = age // period, age % period
        u = uniform(seed, 40 + drop, fall, 3)
        y = -_PAD + 2.0 + speed * age
        if rain:
            x = 86.0 * (drop * 0.618034 % 1.0 * 0.75 + 0.25 * u[:, 0]) - RAIN_SLANT * (y + _PAD)
            left, upper = np.floor(x - 2).astype(int), np.floor(y - RAIN_LENGTH - 2).astype(int)
        else:
            x = 96.0 * (drop * 0.618034 % 1.0 * 0.75 + 0.25 * u[:, 0]) - SNOW_DRIFT * age
            x = x + 1.6 * np.sin(2 * np.pi * (age / 56.0 + u[:, 1]))
            left, upper = np.floor(x - 2.5).astype(int), np.floor(y - 2.5).astype(int)
        left = np.clip(left, -_PAD, 64 + _PAD - wide)
        upper = np.clip(upper, -_PAD, 64 + _PAD - high)
        columns, rows = left[:, None] + np.arange(wide), upper[:, None] + np.arange(high)
        dx = (columns + 0.5 - x[:, None]).astype(np.float32)[:, :, None]
        dy = (rows + 0.5 - y[:, None]).astype(np.float32)[:, None, :]
        if rain:
            # distance to the segment from the drop's head up along its path
            along = np.clip((RAIN_SLANT * dx - dy) / (1 + RAIN_SLANT**2), 0, RAIN_LENGTH)
            distance = np.hypot(dx - RAIN_SLANT * along, dy + along)
            spot = (0.72 - 0.32 * along / RAIN_LENGTH) * np.clip(1.25 - distance, 0, 1)
        else:
            spot = 0.92 * np.clip(1.55 + 0.5 * u[:, 2].astype(np.float32)[:, None, None] - np.hypot(dx, dy), 0, 1)
        index = (frames, columns[:, :, None] + _PAD, rows[:, None, :] + _PAD)
        cover[index] = np.maximum(cover[index], spot)
    bright = {"day": 1.0, "sunset": 0.92, "night": 0.74}[light.time]
    colour = (rgb(214, 228, 246) if rain else rgb(252, 253, 255)) * np.float32(bright)
    return cover[:, _PAD:-_PAD, _PAD:-_PAD], colour
