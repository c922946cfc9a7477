"""The roadtrip world: a vehicle drives for ever past a landscape. Factors, splits, and the renderer.

A clip is a pure function of (factors, seed, frame): frame t needs no predecessor, and the landscape never repeats.
Pictures are 64×64 at 16 frames a second. The world is drawn driving to the right; driving left is its mirror image.
"""

from dataclasses import dataclass, fields
from functools import cache
from itertools import product

import numpy as np

from streamdit_jax.data import roadtrip_sky as sky
from streamdit_jax.data import roadtrip_vehicle as sprites
from streamdit_jax.data.roadtrip_canvas import SUB_X, Canvas, hash_int, uniform
from streamdit_jax.data.roadtrip_palette import look
from streamdit_jax.data.roadtrip_scene import LAYERS, PARALLAX, SPANS

FACTORS: dict[str, tuple[str, ...]] = {
    "vehicle": ("car", "bus", "truck"),
    "colour": ("red", "blue", "green", "yellow", "white", "purple"),
    "scenery": ("hills", "city", "desert", "forest", "sea"),
    "time": ("day", "sunset", "night"),
    "weather": ("clear", "rain", "snow"),
    "direction": ("left", "right"),
    "speed": ("slow", "fast"),
}
FRAME_RATE = 16.0
SPEED = {"slow": 0.5, "fast": 1.25}  # pixels per frame at the roadside
SPLITS = ("train", "held_out")
_HELD_OUT_SHARE = 0.1
_CLOUD_PARALLAX, _WIND, _CLOUD_ROWS = 1 / 16, 1 / 32, (0, 28)
_BLOCK = 64  # frames composed at a time: bounds memory for long renders


@dataclass(frozen=True)
class Factors:
    """What a clip shows; every field takes one of the values that FACTORS lists for it, else ValueError."""

    vehicle: str
    colour: str
    scenery: str
    time: str
    weather: str
    direction: str
    speed: str

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in FACTORS[field.name]:
                raise ValueError(
                    f"{field.name}: unknown value {value!r}; it is one of {', '.join(FACTORS[field.name])}"
                )


def held_out(factors: Factors) -> bool:
    """Whether this combination is kept out of training: about a tenth of all 3,240, by a hash of the values' places."""
    places = [FACTORS[field.name].index(getattr(factors, field.name)) for field in fields(factors)]
    return hash_int(0x0F0, *places) < _HELD_OUT_SHARE * 2**64


@cache
def combinations(split: str) -> tuple[Factors, ...]:
    """All combinations of a split ("train" or "held_out"), in a fixed order. ValueError for another split."""
    if split not in SPLITS:
        raise ValueError(f"split: unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    every = (Factors(*values) for values in product(*FACTORS.values()))
    return tuple(factors for factors in every if held_out(factors) == (split == "held_out"))


def clip_factors(index: int, seed: int, split: str) -> tuple[Factors, int]:
    """Factors and render seed of the index-th clip of a split: uniform over its combinations, reproducible anywhere."""
    choices = combinations(split)
    place = SPLITS.index(split)
    return choices[hash_int(seed, place, index, 0) % len(choices)], hash_int(seed, place, index, 1) >> 1


def render(factors: Factors, seed: int, num_frames: int, start: int = 0, size: int = 64) -> np.ndarray:
    """Frames start … start + num_frames − 1 of a clip, uint8 [num_frames, size, size, 3].

    Deterministic; frame t depends on (factors, seed, t) only. Sizes 16 and 32 are box-filtered from 64.
    Raises ValueError for another size, a negative start or no frames.
    """
    if size not in (16, 32, 64):
        raise ValueError(f"size: the world is drawn at 16, 32 or 64 pixels, not {size}")
    if num_frames < 1 or start < 0:
        raise ValueError(f"num_frames, start: need at least 1 frame from frame 0 on, not {num_frames} from {start}")
    ticks = start + np.arange(num_frames, dtype=np.int64)
    video = np.empty((num_frames, size, size, 3), np.uint8)
    still = sky.backdrop(seed, look(factors.time, factors.weather), factors.scenery == "sea")
    for first in range(0, num_frames, _BLOCK):
        block = slice(first, first + _BLOCK)
        picture = _compose(factors, seed, ticks[block], still)
        if size < 64:
            fold = 64 // size
            picture = picture.reshape(len(picture), size, fold, size, fold, 3).mean(axis=(2, 4), dtype=np.float32)
        picture *= 255.0
        picture += 0.5
        if factors.direction == "left":
            picture = picture[:, ::-1]
        video[block] = np.clip(picture, 0, 255, out=picture).astype(np.uint8).swapaxes(1, 2)
    return video


def _compose(factors: Factors, seed: int, ticks: np.ndarray, still: np.ndarray) -> np.ndarray:
    """Frames driving to the right, float32 [frames, 64 x, 64 y, 3] in [0, 1]."""
    light = look(factors.time, factors.weather)
    road = SPEED[factors.speed] * ticks  # exact: speeds and parallaxes are binary fractions
    frames = np.repeat(still[None], len(ticks), axis=0)
    _lay(frames, sky.draw_clouds, seed, light, _CLOUD_PARALLAX * road + _WIND * ticks, 0, _CLOUD_ROWS)
    for depth, (draw, parallax, rows) in enumerate(zip(LAYERS[factors.scenery], PARALLAX, SPANS)):
        _lay(frames, draw, seed, light, parallax * road, depth + 1, rows)
    _drive(frames, factors, seed, ticks, road)
    fallen = sky.precipitation(seed, light, ticks)
    if fallen is not None:
        cover, colour = fallen
        frames += cover[..., None] * (colour - frames)
    return frames


def _lay(frames, draw, seed, light, travel, depth, rows) -> None:
    """Draws the stretch of one layer that passes by, and lays it over the frames at its quarter-pixel places."""
    origin = 4 * (hash_int(seed, 2, depth) % 4096)  # so that clips with other seeds begin elsewhere
    places = np.floor(SUB_X * travel).astype(np.int64) + origin
    first, top, bottom = int(places[0]), *rows
    canvas = Canvas(first, int(places[-1]) - first + SUB_X * 64, top, bottom - top)
    draw(canvas, seed, light)
    columns = (places - first)[:, None] + SUB_X * np.arange(64)
    _over(frames[:, :, top:bottom], canvas.filtered()[columns])


def _over(region: np.ndarray, layer: np.ndarray) -> None:
    """Composites premultiplied RGBA over RGB, in place."""
    region *= 1.0 - layer[..., 3:]
    region += layer[..., :3]


def _drive(frames: np.ndarray, factors: Factors, seed: int, ticks: np.ndarray, road: np.ndarray) -> None:
    """Puts the vehicle into its lane: it drifts and sways a little, and its wheels turn as fast as the road passes."""
    phase = uniform(seed, 3, np.arange(1), 3)[0]
    drift = np.rint(4.0 * np.sin(2 * np.pi * ((ticks % 160) / 160 + phase[0]))).astype(int) - sprites.BODY_X[0]
    sway = np.rint(1.2 * np.sin(2 * np.pi * ((road % 16.0) / 16.0 + phase[1]))).astype(int) - sprites.BODY_Y[0]
    half_turns = road / (np.pi * sprites.WHEEL_RADIUS)
    turn = np.floor(sprites.WHEEL_PHASES * (half_turns % 1.0)).astype(int)
    kind = (factors.time, factors.weather == "rain")
    columns = slice(sprites.LEFT, sprites.LEFT + sprites.WIDTH)
    top, wheel = sprites.TOP, sprites.WHEEL_TOP
    _over(
        frames[:, columns, top : top + sprites.HEIGHT],
        sprites.bodies(factors.vehicle, factors.colour, *kind)[drift, sway],
    )
    _over(frames[:, columns, wheel : wheel + sprites.WHEEL_ROWS], sprites.wheels(factors.vehicle, *kind)[drift, turn])
    frames += sprites.beam(factors.vehicle, *kind)[drift]


__all__ = ["FACTORS", "FRAME_RATE", "SPEED", "SPLITS", "Factors", "clip_factors", "combinations", "held_out", "render"]
