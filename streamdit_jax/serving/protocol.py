"""What a viewer and the server say to each other, and how much of it: JSON both ways, pictures as binary messages.

docs/live.md is the protocol's description. Nothing a viewer sends is believed before it went through `parse` or
`unpack`: each mistake is one ProtocolError whose message names the field and what would be right.
"""

import dataclasses
import enum
import json
import math
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from streamdit_jax.errors import StreamDiTError

VERSION = 1
CODECS = ("h264", "jpeg")
SOURCES = ("text", "camera", "image", "snapshot")
MAX_OVER = 64  # chunks of a transition
MAX_GUIDANCE = 20.0
MAX_FRAME = 2**32 - 1

# kind, flags, number of the video, number of the frame in it; little endian
HEADER = struct.Struct("<BBHI")
KEY, STILL = 1, 2  # flags: decoding may start here; a picture to start from, not a camera's


class Kind(enum.IntEnum):
    """First byte of a binary message."""

    H264 = 1  # one access unit, Annex B
    JPEG = 2  # one picture
    SNAPSHOT = 3  # a stream at rest, as `Snapshot.save` writes it
    MP4 = 4  # the last minute
    RGB = 5  # one picture of exactly height × width × 3 bytes, from the viewer


class ProtocolError(StreamDiTError):
    """A message that is no message of this protocol."""


class Message(NamedTuple):
    """One JSON message of a viewer: `fields` holds every field of its type; `id` is what its answer repeats."""

    type: str
    id: int | None
    fields: dict[str, Any]


class Binary(NamedTuple):
    """One binary message."""

    kind: Kind
    flags: int
    video: int
    frame: int
    payload: bytes


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a viewer may ask for. Sizes in bytes, times in seconds."""

    sessions: int = 4  # viewers who watch at once
    waiting: int = 16  # connections beyond those
    idle_seconds: float = 600.0  # without a sign of the viewer
    hello_seconds: float = 5.0  # from connection to greeting
    stall_seconds: float = 15.0  # of a reader who takes nothing
    prompt_bytes: int = 1000
    json_bytes: int = 16 * 1024
    snapshot_bytes: int = 32 * 1024 * 1024
    messages_per_second: float = 50.0  # besides those of a camera and the acknowledgements of what was shown
    requests_per_second: float = 4.0  # of those that make others wait: prompts, starts, files
    offences_per_minute: int = 20  # malformed messages, and those beyond the rate
    recent_seconds: float = 60.0  # what `download` gives
    recent_bytes: int = 64 * 1024 * 1024


class Allowance:
    """Lets through `rate` events a second on average, and `burst` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def take(self) -> bool:
        """Whether one more event is within the allowance; it then counts."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _whole(low: int, high: int):
    def check(value):
        if type(value) is not int or not low <= value <= high:  # a bool is an int, too
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _number(low: float, high: float):
    def check(value):
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def _choice(*choices: str):
    def check(value):
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

    return check


def _text(most: int):
    def check(value):
        # A lone surrogate is a string to JSON and to Python, and text to nobody else.
        if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("text")
        if len(value.encode()) > most:
            raise ValueError(f"text of at most {most} bytes")
        return value

    return check


def _flag(value):
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _codecs(value):
    if not isinstance(value, list) or not value or any(codec not in CODECS for codec in value):
        raise ValueError(f"a list of some of {', '.join(CODECS)}")
    return tuple(value)


def _or_none(check):
    return lambda value: None if value is None else check(value)


_NEEDED = object()


def messages(limits: Limits) -> dict[str, dict[str, tuple[Callable, Any]]]:
    """Type → field → (check, default): all that a viewer may say."""
    strength, guidance = _or_none(_number(0, 1)), _or_none(_number(0, MAX_GUIDANCE))
    prompt = _text(limits.prompt_bytes)
    return {
        "hello": {
            "version": (_whole(VERSION, VERSION), VERSION),
            "codecs": (_codecs, ("jpeg",)),
            "token": (_text(512), ""),
            "acknowledges": (_flag, False),
        },
        "start": {
            "prompt": (_or_none(prompt), None),  # a snapshot has its own
            "seed": (_whole(-(2**31), 2**32 - 1), 0),
            "guidance": (guidance, None),
            "strength": (strength, None),
            "source": (_choice(*SOURCES), "text"),
        },
        "prompt": {"prompt": (prompt, _NEEDED), "over": (_whole(0, MAX_OVER), 0)},
        "set": {"guidance": (guidance, None), "strength": (strength, None)},
        "shown": {"frame": (_whole(0, MAX_FRAME), _NEEDED), "video": (_whole(0, 2**16 - 1), _NEEDED)},
        **{name: {} for name in ("pause", "resume", "snapshot", "download", "keyframe", "stop", "alive")},
    }


def _short(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=True)
    return said if len(said) <= 40 else f"{said[:37]}..."


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


class Parser:
    """Reads the JSON messages of viewers within `limits`."""

    def __init__(self, limits: Limits):
        self._limits, self._messages = limits, messages(limits)

    def parse(self, text: str) -> Message:
        """ProtocolError for what is too long, no JSON, of an unknown type, or has unknown, missing or wrong fields."""
        if len(text) > self._limits.json_bytes:
            raise ProtocolError(f"message: a JSON message has at most {self._limits.json_bytes} bytes")
        try:
            said = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as mistake:
            reason = str(mistake) if isinstance(mistake, ValueError) else "nested too deeply"
            raise ProtocolError(f"message: is no JSON ({reason[:100]})") from None
        kind = said.pop("type", None) if isinstance(said, dict) else None
        if not isinstance(kind, str) or kind not in self._messages:
            raise ProtocolError(f'message: must be {{"type": …}} with one of {", ".join(self._messages)}')
        number = said.pop("id", None)
        fields = self._messages[kind]
        try:
            number = _or_none(_whole(0, 2**53))(number)
        except ValueError as mistake:
            raise ProtocolError(f"{kind}.id: must be {mistake}, not {_short(number)}") from None
        unknown = sorted(said.keys() - fields.keys())
        if unknown:
            raise ProtocolError(f"{kind}: has no field {_short(unknown[0])}; its fields: {', '.join(fields) or 'none'}")
        checked = {}
        for name, (check, default) in fields.items():
            if name not in said:
                if default is _NEEDED:
                    raise ProtocolError(f"{kind}.{name}: is missing")
                checked[name] = default
                continue
            try:
                checked[name] = check(said[name])
            except ValueError as mistake:
                raise ProtocolError(f"{kind}.{name}: must be {mistake}, not {_short(said[name])}") from None
        if kind == "start" and checked["prompt"] is None and checked["source"] != "snapshot":
            raise ProtocolError("start.prompt: is missing")
        return Message(kind, number, checked)


def pack(kind: Kind, payload: bytes, *, flags: int = 0, video: int = 0, frame: int = 0) -> bytes:
    """A binary message: 8 bytes of header, then the payload. Numbers of videos wrap at 2¹⁶, of frames at 2³²."""
    return HEADER.pack(kind, flags, video % 2**16, frame % 2**32) + payload


def unpack(data: bytes) -> Binary:
    """Reads a binary message. ProtocolError where it is shorter than its header or of an unknown kind."""
    if len(data) <= HEADER.size:
        raise ProtocolError(f"binary message: {len(data)} bytes; a header of {HEADER.size} and a payload are needed")
    kind, flags, video, frame = HEADER.unpack_from(data)
    try:
        kind = Kind(kind)
    except ValueError:
        kinds = ", ".join(f"{known.value} {known.name}" for known in Kind)
        raise ProtocolError(f"binary message: kind {kind} is unknown; known: {kinds}") from None
    return Binary(kind, flags, video, frame, data[HEADER.size :])


def event(kind: str, **fields: Any) -> str:
    """One JSON message to a viewer. Numbers are finite: JSON knows no others."""
    return json.dumps({"type": kind, **_finite(fields)}, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
