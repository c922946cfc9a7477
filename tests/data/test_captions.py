"""Captions: true, short, in the grammar's language."""

import re
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamdit_jax.data import captions
from streamdit_jax.data.captions import caption, full_caption
from streamdit_jax.data.roadtrip import FACTORS, SPLITS, Factors, combinations

EVERY = [factors for split in SPLITS for factors in combinations(split)]
# Words that give a value away, told apart from the grammar's own tables; a value may be named by these alone.
WORDS = {
    "vehicle": {"car": "car automobile sedan", "bus": "bus coach", "truck": "truck lorry"},
    "colour": {
        "red": "red crimson",
        "blue": "blue azure",
        "green": "green emerald",
        "yellow": "yellow",
        "white": "white",
        "purple": "purple violet",
    },
    "scenery": {
        "hills": "hills",
        "city": "city buildings",
        "desert": "desert cacti mesas",
        "forest": "forest pine woods",
        "sea": "sea coast beach",
    },
    "time": {
        "day": "day daylight sunny sunshine",
        "sunset": "sunset dusk sets evening",
        "night": "night dark starry stars",
    },
    "weather": {
        "clear": "clear dry sunny sunshine starry stars",
        "rain": "rain rainy rains wet",
        "snow": "snow snowy snows wintry",
    },
    "direction": {"left": "left leftwards", "right": "right rightwards"},
    "speed": {
        "slow": "slowly low slow cruises cruising crawls crawling gently",
        "fast": "fast quickly high speeds speeding races racing rushes rushing",
    },
}
WORDS = {name: {value: set(words.split()) for value, words in values.items()} for name, values in WORDS.items()}


def values_named(text: str, name: str) -> set[str]:
    words = set(re.findall(r"[a-z]+", text.replace("green hills", "hills")))
    return {value for value, cues in WORDS[name].items() if words & cues}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(EVERY), st.integers(0, 2**63))
def test_a_caption_is_short_ascii_and_true(factors, seed):
    text = caption(factors, np.random.default_rng(seed))
    assert text.isascii() and len(text.encode()) <= 110 and text == text.strip() and "  " not in text
    assert values_named(text, "vehicle") == {factors.vehicle}
    for field in fields(Factors):
        assert values_named(text, field.name) <= {getattr(factors, field.name)}, (field.name, text)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_the_full_caption_names_every_attribute():
    for factors in EVERY:
        text = full_caption(factors)
        assert text.isascii() and len(text) <= 110
        for name in FACTORS:
            assert values_named(text, name) == {getattr(factors, name)}, (name, text)
    assert len({full_caption(factors) for factors in EVERY}) == len(EVERY)


@pytest.mark.parametrize("name", [name for name in FACTORS if name != "vehicle"])
def test_each_attribute_is_dropped_a_quarter_of_the_time(name):
    rng = np.random.default_rng(0)
    drawn = [caption(EVERY[int(rng.integers(len(EVERY)))], rng) for _ in range(3000)]
    dropped = np.mean([not values_named(text, name) for text in drawn])
    assert 0.21 < dropped < 0.29  # 0.25 ± 5 standard errors


def test_the_same_generator_state_gives_the_same_caption():
    draws = [[caption(EVERY[7], np.random.default_rng(seed)) for seed in range(50)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 40  # and it varies


@pytest.mark.parametrize(
    "factors, prompt",
    [
        (
            Factors("car", "red", "hills", "day", "clear", "left", "fast"),
            "a red car drives past green hills on a sunny day",
        ),
        (Factors("car", "red", "sea", "night", "snow", "right", "slow"), "a red car drives through snow at night"),
    ],
)
def test_what_users_type_is_in_the_language(factors, prompt):
    rng = np.random.default_rng(1)
    assert any(caption(factors, rng) == prompt for _ in range(100_000))


def test_every_value_has_wordings():
    tables = {"vehicle": captions.VEHICLES, "colour": captions.COLOURS, "scenery": captions.PLACES}
    tables |= {"time": captions.TIMES, "weather": captions.WEATHERS}
    tables |= {"direction": captions.DIRECTIONS, "speed": captions.PACES}
    for name, table in tables.items():
        assert tuple(table) == FACTORS[name]
        assert all(len(wordings) == len(set(wordings)) >= 2 for wordings in table.values())
