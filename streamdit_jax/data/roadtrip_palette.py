"""Light and colour of the roadtrip world: what time of day and weather do to the sky, the land and the vehicle."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def rgb(red: float, green: float, blue: float) -> np.ndarray:
    """An 8-bit colour as float32 [3] in [0, 1]."""
    return np.array([red, green, blue], np.float32) / 255.0


def blend(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """a at share 0, b at share 1."""
    return a + (b - a) * np.float32(share)


BODY = {
    "red": rgb(222, 40, 44),
    "blue": rgb(36, 92, 236),
    "green": rgb(34, 168, 78),
    "yellow": rgb(252, 206, 36),
    "white": rgb(244, 246, 250),
    "purple": rgb(150, 58, 200),
}

_SKY = {  # zenith, middle, horizon
    "day": (rgb(62, 140, 236), rgb(132, 194, 250), rgb(206, 232, 252)),
    "sunset": (rgb(84, 54, 140), rgb(216, 92, 118), rgb(255, 182, 96)),
    "night": (rgb(8, 12, 40), rgb(20, 30, 74), rgb(48, 62, 116)),
}
_OVERCAST = {  # what rain and snow draw over the sky: colour at the zenith, colour at the horizon, share
    ("day", "rain"): (rgb(96, 108, 126), rgb(158, 168, 180), 0.88),
    ("day", "snow"): (rgb(158, 178, 204), rgb(220, 228, 238), 0.85),
    ("sunset", "rain"): (rgb(84, 66, 96), rgb(196, 132, 112), 0.70),
    ("sunset", "snow"): (rgb(146, 116, 164), rgb(246, 192, 176), 0.60),
    ("night", "rain"): (rgb(26, 31, 50), rgb(62, 72, 98), 0.80),
    ("night", "snow"): (rgb(36, 44, 76), rgb(84, 98, 138), 0.75),
}
_LIGHT = {
    "day": np.array([1.0, 1.0, 1.0], np.float32),
    "sunset": np.array([0.94, 0.66, 0.58], np.float32),
    "night": np.array([0.30, 0.37, 0.57], np.float32),
}
_SNOW_LIGHT = {  # snow keeps more of the light than what it covers
    "day": np.array([1.0, 1.0, 1.0], np.float32),
    "sunset": np.array([0.97, 0.80, 0.85], np.float32),
    "night": np.array([0.44, 0.51, 0.72], np.float32),
}
_VEHICLE_LIGHT = {
    "day": np.array([1.0, 1.0, 1.0], np.float32),
    "sunset": np.array([0.97, 0.86, 0.84], np.float32),
    "night": np.array([0.80, 0.80, 0.85], np.float32),
}
_SNOW = rgb(236, 242, 252)


@dataclass(frozen=True)
class Look:
    """How one (time, weather) colours the world. Colours are float32 [3] in [0, 1]."""

    time: str
    weather: str

    @property
    def dark(self) -> bool:
        """Lamps and lit windows are on."""
        return self.time == "night"

    @property
    def snowy(self) -> bool:
        return self.weather == "snow"

    @property
    def wet(self) -> bool:
        return self.weather == "rain"

    def sky(self, height: np.ndarray) -> np.ndarray:
        """Colours [n, 3] at heights [n] between 0 (zenith) and 1 (horizon)."""
        top, middle, low = _SKY[self.time]
        height = np.clip(height, 0, 1).astype(np.float32)[:, None]
        upper, lower = top + (middle - top) * (height / 0.6), middle + (low - middle) * ((height - 0.6) / 0.4)
        clear = np.where(height < 0.6, upper, lower)
        if self.weather == "clear":
            return clear
        high, horizon, share = _OVERCAST[self.time, self.weather]
        return blend(clear, high + (horizon - high) * height, share)

    @property
    def haze(self) -> np.ndarray:
        """What distance fades to: the sky just above the horizon."""
        return self.sky(np.array([0.92]))[0]

    def land(self, colour: np.ndarray, depth: float = 0.0, snow: float = 0.0) -> np.ndarray:
        """A lit landscape colour; `depth` 0 near … 1 lost in haze; `snow`: how much of it snow may cover."""
        light = _LIGHT[self.time]
        if self.snowy:
            colour, light = blend(colour, _SNOW, snow), blend(light, _SNOW_LIGHT[self.time], snow)
        if self.wet:
            grey = colour.mean(axis=-1, keepdims=True)
            colour = blend(colour, np.broadcast_to(grey, colour.shape), 0.30) * np.float32(0.80)
        return blend(colour * light, self.haze, depth)

    def lamp(self, colour: np.ndarray) -> np.ndarray:
        """What shines by itself keeps its colour."""
        return colour

    def vehicle(self, colour: np.ndarray) -> np.ndarray:
        """The vehicle is tinted less than the land, so that its colour can be told at every hour."""
        return colour * _VEHICLE_LIGHT[self.time] * np.float32(0.94 if self.wet else 1.0)

    @property
    def cloud(self) -> tuple[np.ndarray, float]:
        """Colour and opacity of clouds."""
        clear = {"day": rgb(255, 255, 255), "sunset": rgb(255, 160, 130), "night": rgb(70, 84, 134)}[self.time]
        if self.weather == "clear":
            return clear, {"day": 0.92, "sunset": 0.85, "night": 0.55}[self.time]
        shade = self.sky(np.array([0.1]))[0] * np.float32(0.86 if self.wet else 1.0)
        return (shade, 0.8) if self.wet else (blend(shade, np.ones(3, np.float32), 0.35), 0.7)


@lru_cache(maxsize=16)
def look(time: str, weather: str) -> Look:
    return Look(time, weather)
