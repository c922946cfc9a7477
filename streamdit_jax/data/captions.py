"""Captions of the roadtrip world: a small grammar with synonyms, changing word order and dropped attributes.

A caption says only what is true of its clip. The vehicle is always named; every other attribute may be left out.
"""

import numpy as np

from streamdit_jax.data.roadtrip import Factors

MAX_BYTES = 110
DROP = 0.25  # the probability with which each attribute but the vehicle is left out

# The first wording of each list is the plain one, drawn half of the time.
VEHICLES = {"car": ("car", "automobile", "sedan"), "bus": ("bus", "coach"), "truck": ("truck", "lorry")}
COLOURS = {
    "red": ("red", "crimson", "cherry red"),
    "blue": ("blue", "azure", "deep blue"),
    "green": ("green", "emerald", "emerald green"),
    "yellow": ("yellow", "lemon yellow", "canary yellow"),
    "white": ("white", "plain white", "pure white"),
    "purple": ("purple", "violet", "deep purple"),
}
PLACES = {
    "hills": ("past green hills", "past rolling hills", "through the hills", "along grassy hills"),
    "city": ("through the city", "past tall buildings", "through a city", "along city streets"),
    "desert": ("through the desert", "across a desert", "past cacti and mesas", "across desert sand"),
    "forest": ("through the forest", "past pine trees", "through a pine forest", "through the woods"),
    "sea": ("along the sea", "by the sea", "along the coast", "past a palm beach"),
}
TIMES = {
    "day": ("during the day", "in daylight", "by day"),
    "sunset": ("at sunset", "at dusk", "as the sun sets"),
    "night": ("at night", "after dark", "under the night sky"),
}
WEATHERS = {
    "clear": ("in clear weather", "under clear skies", "in dry weather"),
    "rain": ("in the rain", "in rainy weather", "while it rains"),
    "snow": ("in the snow", "in snowy weather", "while it snows"),
}
THROUGH = {"rain": "through rain", "snow": "through snow"}  # instead of a place
OCCASIONS = {  # time and weather in one phrase
    ("day", "clear"): ("on a sunny day", "on a clear day", "in sunshine"),
    ("day", "rain"): ("on a rainy day", "on a wet day"),
    ("day", "snow"): ("on a snowy day", "on a wintry day"),
    ("sunset", "clear"): ("at a clear sunset", "on a clear evening"),
    ("sunset", "rain"): ("at a rainy sunset", "on a rainy evening"),
    ("sunset", "snow"): ("at a snowy sunset", "on a snowy evening"),
    ("night", "clear"): ("on a clear night", "on a starry night", "under the stars"),
    ("night", "rain"): ("on a rainy night", "on a wet night"),
    ("night", "snow"): ("on a snowy night", "on a wintry night"),
}
DIRECTIONS = {
    side: (f"to the {side}", f"heading {side}", f"towards the {side}", f"{side}wards") for side in ("left", "right")
}
PACES = {
    "slow": ("slowly", "at low speed", "at a slow pace"),
    "fast": ("fast", "quickly", "at high speed"),
}
VERBS = (("drives", "driving"), ("travels", "travelling"), ("moves", "moving"), ("goes", "going"))
PACED_VERBS = {
    "slow": (("cruises", "cruising"), ("crawls", "crawling"), ("rolls gently", "rolling gently")),
    "fast": (("speeds", "speeding"), ("races", "racing"), ("rushes", "rushing")),
}


def _draw(wordings: tuple, rng: np.random.Generator):
    """The first wording half of the time, else any of the others alike."""
    if len(wordings) == 1 or rng.random() < 0.5:
        return wordings[0]
    return wordings[1 + int(rng.integers(len(wordings) - 1))]


def _subject(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def full_caption(factors: Factors) -> str:
    """The canonical caption: all seven attributes in plain words, ASCII, at most MAX_BYTES bytes. Used for judging."""
    f = factors
    return (
        f"{_subject(f'{COLOURS[f.colour][0]} {VEHICLES[f.vehicle][0]}')} {VERBS[0][0]} {PACES[f.speed][0]} "
        f"{DIRECTIONS[f.direction][0]} {PLACES[f.scenery][0]} {TIMES[f.time][0]} {WEATHERS[f.weather][0]}"
    )


def caption(factors: Factors, rng: np.random.Generator) -> str:
    """One caption drawn from the grammar: ASCII, at most MAX_BYTES bytes, true of the clip."""
    said = {name: rng.random() >= DROP for name in ("colour", "scenery", "time", "weather", "direction", "speed")}
    subject = _draw(VEHICLES[factors.vehicle], rng)
    if said["colour"]:
        subject = f"{_draw(COLOURS[factors.colour], rng)} {subject}"
    subject = _subject(subject)

    verb, manner = _draw(VERBS, rng), []
    if said["speed"]:
        if rng.random() < 0.4:
            paces = PACED_VERBS[factors.speed]
            verb = paces[int(rng.integers(len(paces)))]
        else:
            manner.append(_draw(PACES[factors.speed], rng))
    if said["direction"]:
        manner.append(_draw(DIRECTIONS[factors.direction], rng))

    place, setting = [], []
    if said["scenery"]:
        place.append(_draw(PLACES[factors.scenery], rng))
    if said["time"] and said["weather"] and rng.random() < 0.5:
        setting.append(_draw(OCCASIONS[factors.time, factors.weather], rng))
    else:
        if said["weather"]:
            if not place and factors.weather in THROUGH and rng.random() < 0.5:
                place.append(THROUGH[factors.weather])
            else:
                setting.append(_draw(WEATHERS[factors.weather], rng))
        if said["time"]:
            setting.append(_draw(TIMES[factors.time], rng))
        if rng.random() < 0.5:
            setting.reverse()

    if rng.random() < 0.3:
        manner, place = place, manner
    front = setting.pop() if setting and rng.random() < 0.25 else ""
    tail = manner + place + setting
    form = rng.random()
    said_verb = verb[0] if form < 0.6 else f"is {verb[1]}" if form < 0.8 else verb[1]
    while True:
        sentence = " ".join([subject, said_verb, *tail])
        sentence = f"{front}, {sentence}" if front else sentence
        if len(sentence) <= MAX_BYTES:
            return sentence
        tail.pop(int(rng.integers(len(tail))))  # too long for the text encoder's window: leave one phrase out
