"""The protocol: what is read is checked, and everything else is one clear error."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamdit_jax.serving.protocol import (
    HEADER,
    KEY,
    Allowance,
    Kind,
    Limits,
    Message,
    Parser,
    ProtocolError,
    event,
    pack,
    unpack,
)

PARSER = Parser(Limits(prompt_bytes=20, json_bytes=200))


def test_a_message_has_every_field_of_its_type():
    assert PARSER.parse('{"type": "prompt", "prompt": "a red car", "id": 3}') == Message(
        "prompt", 3, {"prompt": "a red car", "over": 0}
    )
    start = PARSER.parse('{"type": "start", "prompt": "a", "seed": -5, "strength": 1}').fields
    assert start == {"prompt": "a", "seed": -5, "guidance": None, "strength": 1.0, "source": "text"}
    assert PARSER.parse('{"type": "start", "source": "snapshot"}').fields["prompt"] is None


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("", "is no JSON"),
        ("nonsense", "is no JSON"),
        ("[" * 199, "is no JSON"),
        ('"' + "x" * 300 + '"', "at most 200 bytes"),
        ("[]", "must be"),
        ("null", "must be"),
        ('{"type": "fly"}', "must be"),
        ('{"type": ["prompt"]}', "must be"),
        ('{"prompt": "a"}', "must be"),
        ('{"type": "prompt"}', "prompt.prompt: is missing"),
        ('{"type": "start"}', "start.prompt: is missing"),
        ('{"type": "prompt", "prompt": 3}', "prompt.prompt: must be text, not 3"),
        ('{"type": "prompt", "prompt": "ä", "over": 1.0}', "prompt.over: must be a whole number from 0 to 64"),
        ('{"type": "prompt", "prompt": "a", "over": true}', "prompt.over"),
        ('{"type": "prompt", "prompt": "a", "over": -1}', "prompt.over"),
        ('{"type": "prompt", "prompt": "ääääääääääa"}', "at most 20 bytes"),
        ('{"type": "prompt", "prompt": "\\ud800"}', "prompt.prompt: must be text"),
        ('{"type": "prompt", "prompt": "a", "colour": 1}', 'has no field "colour"'),
        ('{"type": "pause", "x": 1}', "its fields: none"),
        ('{"type": "pause", "id": "x"}', "pause.id"),
        ('{"type": "start", "prompt": "a", "seed": 4294967296}', "start.seed"),
        ('{"type": "start", "prompt": "a", "source": "disk"}', "one of text, camera, image, snapshot"),
        ('{"type": "set", "strength": 1.5}', "set.strength: must be a number from 0 to 1, not 1.5"),
        ('{"type": "set", "guidance": NaN}', "NaN is no JSON number"),
        ('{"type": "set", "guidance": 1e999}', "set.guidance"),
        ('{"type": "hello", "codecs": []}', "hello.codecs"),
        ('{"type": "hello", "codecs": ["av1"]}', "hello.codecs"),
        ('{"type": "hello", "codecs": [["h264"]]}', "hello.codecs"),
        ('{"type": "hello", "version": 2}', "hello.version"),
        ('{"type": "shown", "frame": 1}', "shown.video: is missing"),
        ('{"type": "set", "guidance": ' + "9" * 160 + "}", "set.guidance"),
    ],
)
def test_mistakes_name_the_field(said, complaint):
    with pytest.raises(ProtocolError) as caught:
        PARSER.parse(said)
    assert complaint in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["prompt", "over", "seed", "guidance", "strength", "source", "codecs", "frame", "video", "id"])
types = st.sampled_from(["hello", "start", "prompt", "set", "shown", "pause", "keyframe", "stop"]) | values


@given(types, st.dictionaries(names, values, max_size=4))
def test_any_json_is_a_message_or_a_protocol_error(kind, fields):
    try:
        message = Parser(Limits()).parse(json.dumps({"type": kind, **fields}))
    except ProtocolError:
        return
    assert message.type == kind


@given(st.binary(max_size=64) | st.text(max_size=64))
def test_any_bytes_are_a_message_or_a_protocol_error(data):
    read = unpack if isinstance(data, bytes) else PARSER.parse
    try:
        read(data)
    except ProtocolError:
        return
    assert isinstance(data, bytes) and data[0] in [kind.value for kind in Kind]


def test_binary_messages_come_back_and_numbers_wrap():
    assert unpack(pack(Kind.H264, b"abc", flags=KEY, video=7, frame=2**32 + 5)) == (Kind.H264, KEY, 7, 5, b"abc")
    assert unpack(pack(Kind.RGB, b"a", video=2**16 + 1)).video == 1
    assert HEADER.size == 8, "docs/live.md and the page say so"


def test_events_hold_no_number_that_json_lacks():
    said = event("stats", engine={"ms": float("nan"), "n": 3}, other=float("inf"), items=[1])
    assert json.loads(said) == {"type": "stats", "engine": {"ms": None, "n": 3}, "other": None, "items": [1]}


@given(st.lists(st.floats(0, 1), max_size=200), st.floats(0.5, 20), st.integers(1, 20))
def test_an_allowance_lets_through_its_rate_and_its_burst(gaps, rate, burst):
    now = [0.0]
    allowance = Allowance(rate, burst, clock=lambda: now[0])
    taken = 0
    for gap in gaps:
        now[0] += gap
        taken += allowance.take()
    assert taken <= burst + rate * sum(gaps) + 1e-6
    now[0] += burst / rate + 1e-3
    assert sum(allowance.take() for _ in range(2 * burst)) == burst
