"""The vehicle of the roadtrip world: cached, anti-aliased sprites, facing right. A mirrored picture faces left."""

from functools import lru_cache

import numpy as np

from streamdit_jax.data.roadtrip_canvas import SUB_X, Canvas
from streamdit_jax.data.roadtrip_palette import BODY, Look, blend, look, rgb

ROAD_Y = 55.0  # where tyres meet the road, pixels from the top
LEFT, TOP, WIDTH, HEIGHT = 8, 34, 48, 28  # the sprite window, pixels
WHEEL_TOP, WHEEL_ROWS = 48, 8  # the rows that hold the wheels
BODY_X = np.arange(-4, 5)  # horizontal drift, quarter pixels
BODY_Y = np.arange(-1, 2)  # suspension, quarter pixels
WHEEL_PHASES = 12  # per half turn: a wheel with a two-armed hub looks the same after half a turn
WHEEL_RADIUS = 3.2
_WHEELS = {"car": (-8.6, 8.6), "bus": (-11.2, 11.2), "truck": (-14.6, -7.4, 13.6)}
NOSE = {"car": 14.5, "bus": 19.5, "truck": 19.8}  # from the middle to the headlights, pixels
_GLASS = rgb(176, 220, 246)
_LIT_GLASS = rgb(255, 222, 140)


def _body(canvas: Canvas, vehicle: str, colour: str, light: Look, x: float, y: float) -> None:
    """Draws everything but the wheels around x, with the road at y."""
    paint = light.vehicle(BODY[colour])
    bright, deep = blend(paint, np.ones(3, np.float32), 0.22), paint * np.float32(0.68)
    glass = _LIT_GLASS if light.dark else light.vehicle(_GLASS)
    dark = light.vehicle(rgb(44, 46, 54))
    lamp = rgb(255, 244, 190) if light.time != "day" or light.wet else light.vehicle(rgb(250, 240, 200))
    tail = rgb(255, 40, 30) if light.time != "day" else rgb(190, 24, 24)
    if vehicle == "car":
        canvas.spike(x - 1.2, y - 13.6, y - 7.0, 6.4, 9.8, paint)
        canvas.spike(x - 5.0, y - 12.3, y - 8.2, 2.5, 3.8, glass)
        canvas.spike(x + 2.6, y - 12.3, y - 8.2, 2.5, 3.8, glass)
        canvas.box(x - 14.2, y - 8.6, x + 14.4, y - 2.6, paint, radius=2.2)
        canvas.box(x - 12.8, y - 8.3, x + 12.8, y - 7.1, bright, radius=0.5)
        canvas.box(x - 13.8, y - 4.2, x + 14.0, y - 2.6, deep, radius=0.7)
        canvas.box(x + 12.2, y - 7.2, x + 14.6, y - 5.0, lamp, radius=0.8)
        canvas.box(x - 14.4, y - 7.2, x - 12.6, y - 5.2, tail, radius=0.6)
    elif vehicle == "bus":
        canvas.box(x - 19.2, y - 18.4, x + 19.4, y - 2.6, paint, radius=2.2)
        canvas.box(x - 17.6, y - 18.0, x + 17.6, y - 16.8, bright, radius=0.5)
        for k in range(5):
            canvas.box(x - 17.2 + 6.1 * k, y - 15.4, x - 12.5 + 6.1 * k, y - 10.2, glass, radius=0.6)
        canvas.box(x + 13.6, y - 15.4, x + 18.2, y - 9.2, glass, radius=0.8)
        canvas.box(x - 19.0, y - 8.4, x + 19.2, y - 7.0, bright)
        canvas.box(x - 18.8, y - 4.4, x + 19.0, y - 2.6, deep, radius=0.7)
        canvas.box(x + 17.4, y - 6.6, x + 19.6, y - 4.4, lamp, radius=0.8)
        canvas.box(x - 19.4, y - 6.6, x - 17.8, y - 4.4, tail, radius=0.6)
    else:
        canvas.box(x - 19.4, y - 4.8, x + 18.0, y - 2.6, dark, radius=0.6)
        canvas.box(x - 20.2, y - 18.6, x + 7.2, y - 4.6, paint, radius=0.9)
        canvas.box(x - 19.4, y - 18.2, x + 6.4, y - 16.8, bright, radius=0.4)
        canvas.box(x - 20.0, y - 9.6, x + 7.0, y - 7.8, deep)
        canvas.box(x + 8.4, y - 13.6, x + 16.4, y - 3.0, paint, radius=1.4)
        canvas.box(x + 9.0, y - 8.0, x + 19.8, y - 3.0, paint, radius=1.4)
        canvas.spike(x + 13.6, y - 12.4, y - 7.8, 2.2, 3.8, glass)
        canvas.box(x + 9.0, y - 4.4, x + 19.6, y - 2.8, deep, radius=0.6)
        canvas.box(x + 17.8, y - 7.2, x + 20.0, y - 5.0, lamp, radius=0.8)
        canvas.box(x - 20.4, y - 6.8, x - 18.8, y - 4.8, tail, radius=0.5)


def _wheels(canvas: Canvas, vehicle: str, light: Look, x: float, phase: float) -> None:
    """Draws the wheels, turned clockwise by `phase` half turns."""
    tyre, rim, hub = light.vehicle(rgb(30, 30, 36)), light.vehicle(rgb(176, 180, 190)), light.vehicle(rgb(74, 76, 86))
    for offset in _WHEELS[vehicle]:
        cx, cy = x + offset, ROAD_Y - WHEEL_RADIUS
        canvas.ellipse(cx, cy, WHEEL_RADIUS, WHEEL_RADIUS, tyre)
        canvas.ellipse(cx, cy, 2.0, 2.0, rim)
        where, across, y = canvas.window(cx - 2, cx + 2, cy - 2, cy + 2)
        # y points down, so increasing angles turn clockwise: the way a wheel rolls to the right
        u, v = across - 2, y - cy
        cos, sin = np.cos(np.pi * phase), np.sin(np.pi * phase)
        bar = np.maximum(np.abs(u * cos + v * sin) - 1.9, np.abs(v * cos - u * sin) - 0.6).astype(np.float32)
        canvas.paint(where, np.clip(0.5 - 2.0 * bar, 0, 1), hub)


def _blank() -> Canvas:
    return Canvas(LEFT * SUB_X - BODY_X[-1], WIDTH * SUB_X + len(BODY_X) + SUB_X - 2, TOP, HEIGHT, sub_y=4)


def _drifts(canvas: Canvas) -> np.ndarray:
    """What is drawn around x = 32, at each drift: float32 [drift 9, WIDTH, HEIGHT, 4]."""
    pixels = canvas.filtered()
    # looked at from a quarter pixel further left, the vehicle stands a quarter pixel further right
    return np.stack([pixels[BODY_X[-1] - shift :: SUB_X][:WIDTH] for shift in BODY_X])


@lru_cache(maxsize=256)
def bodies(vehicle: str, colour: str, time: str, wet: bool) -> np.ndarray:
    """Premultiplied bodies float32 [drift 9, suspension 3, WIDTH, HEIGHT, 4], facing right, with their shadow."""
    light = look(time, "rain" if wet else "clear")
    nose = NOSE[vehicle]
    stack = []
    for rise in BODY_Y:
        canvas = _blank()
        if wet:  # the road mirrors the vehicle
            canvas.ellipse(32.0, ROAD_Y + 2.0, nose + 1.0, 5.0, light.vehicle(BODY[colour]), alpha=0.7, soft=True)
        canvas.ellipse(32.0, ROAD_Y + 0.2, nose + 2.5, 2.6, np.zeros(3), alpha=0.75, soft=True)
        canvas.ellipse(32.0, ROAD_Y - 1.2, nose - 1.5, 2.2, np.zeros(3), alpha=0.45)
        _body(canvas, vehicle, colour, light, 32.0, ROAD_Y + rise / 4)
        stack.append(_drifts(canvas))
    return np.stack(stack, axis=1)


@lru_cache(maxsize=64)
def wheels(vehicle: str, time: str, wet: bool) -> np.ndarray:
    """Premultiplied wheels float32 [drift 9, phase 12, WIDTH, WHEEL_ROWS, 4]."""
    light = look(time, "rain" if wet else "clear")
    stack = []
    for phase in range(WHEEL_PHASES):
        canvas = _blank()
        _wheels(canvas, vehicle, light, 32.0, phase / WHEEL_PHASES)
        stack.append(_drifts(canvas)[:, :, WHEEL_TOP - TOP : WHEEL_TOP - TOP + WHEEL_ROWS])
    return np.stack(stack, axis=1)


@lru_cache(maxsize=32)
def beam(vehicle: str, time: str, wet: bool) -> np.ndarray:
    """Light that the headlights add, float32 [drift 9, 64, 64, 3]; all zero by dry day."""
    strength = {"day": 0.0, "sunset": 0.10, "night": 0.42}[time] + (0.06 if wet else 0.0)
    x = (np.arange(64) + 0.5)[None, :, None] - 32.0 - NOSE[vehicle] - BODY_X[:, None, None] / 4
    y = (np.arange(64) + 0.5)[None, None, :] - (ROAD_Y - 5.4) - 0.16 * np.maximum(x, 0)
    spread = 1.4 + 0.26 * np.maximum(x, 0)
    cone = np.exp(-((y / spread) ** 2)) * np.clip(x + 0.5, 0, 1) * np.exp(-np.maximum(x, 0) / 13)
    halo = 0.9 * np.exp(-(x**2 + (y + 0.16 * np.maximum(x, 0)) ** 2) / 5.0)
    return ((strength * (cone + halo))[..., None] * rgb(255, 236, 170)).astype(np.float32)
