"""What a stream does at each of its micro steps, and what it is told while it runs (StreamDiT §8).

A stream counts its micro steps from 0. Its timetable says which row each step applies and which frames it shows; its
steering says what the frames attend to. A change is an event at a step: seed, settings and events are all that a stream
is made of, and replay it exactly.

    hard switch     from the next micro step on, every chunk of the buffer attends to the new prompt
    interpolation   over n chunks: step k of n·s attends to (1 − k/(n·s))·old + k/(n·s)·new, token by token; the mask is
                    the union of both, and padding counts as zero
    per chunk       each chunk attends, for as long as it is in the buffer, to the prompt that was current at its first
                    step; old and new lie side by side under a mask per frame. A buffer knows two prompts: where a third
                    arrives before the first has left, its chunks go over to the second

What a video shows is soon another: the chunks that are in the buffer take on new colours on their way. How it moves is
not: each chunk goes on as the one before it did. So a buffer may be filled anew some chunks after a change, from one
frame, which tells how things look and not how they move (`partition.Refill`; not in the paper).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from streamdit_jax import stream as streaming
from streamdit_jax.errors import ConfigError
from streamdit_jax.partition import PartitionScheme, Refill

KEEPS_PROMPTS = "refill: no chunk would keep the prompt it entered with; set it to 0"
Text = Any  # per text encoder its sequence and mask, as `models.dit.Text`


class Receipt(NamedTuple):
    """When a change of prompt reaches the picture; frames are numbered from the first of the video.

    step: the first micro step under its influence. first_frame: the first frame that it can touch. complete_frame: from
    this frame on, frames have had nothing but the new prompt in all of their steps.
    """

    step: int
    first_frame: int
    complete_frame: int


class Timetable:
    """Which row each micro step of a stream applies, and which frames have been shown by then; all closed form.

    latent_frames: video frames per latent frame. given_references: the references are given, clean, and shown first.
    refill: when, after a change of prompt (`follow`), the buffer is filled anew. The micro steps of that come in
    between those of streaming, before the last of a move advances.
    Raises ValueError for an unknown filling, and for a refill of what is not filled by doubling or has references.
    """

    def __init__(
        self,
        scheme: PartitionScheme,
        filling: str,
        latent_frames: int,
        *,
        given_references: bool = False,
        refill: Refill | str = "0",
    ):
        self.scheme, self.filling, self.latent_frames = scheme, filling, latent_frames
        self.refill = Refill.parse(refill)
        self.given_references = given_references and scheme.num_references > 0
        self._fill = streaming.filling_rows(scheme, filling, given_references=self.given_references)
        self._flow = streaming.streaming_rows(scheme)
        self._anew, self._anew_steps = None, 0
        if self.refill.chunks:
            if filling != "doubling":
                raise ValueError(f"refill: is done by doubling, and the filling is {filling}; set it to 0")
            self._anew = streaming.refilling_rows(scheme, self.refill.strength)
            self._anew_steps = len(self._anew.adopt)
        self._renewals: list[int] = []  # the micro steps at which the buffer is renewed: the latest, in order
        self._earlier_steps = 0  # what those before them took
        self.fill_steps = len(self._fill.adopt)
        self._makes_references = bool(self._fill.adopt.any()) and scheme.num_references > 0
        self._makes_references &= not self.given_references
        # Of each frame that filling leaves behind: the micro step from which it is there, and its own first one. The
        # last chunk stays pure noise until the micro steps that follow.
        enters = np.concatenate([self._fill.enter, np.ones((1, scheme.buffer_size), bool)])
        last = scheme.chunk_ids() == scheme.num_chunks - 1
        there = np.where(streaming.is_masked(filling), np.argmax(enters, axis=0), 0)
        self._there = np.where((scheme.chunk_ids() < 0) & self.given_references, 0, there)
        self._first = np.where(last, self.fill_steps, self._there)

    def follow(self, step: int, over: int) -> None:
        """A change of prompt before micro step `step`, interpolated over so many chunks: when the buffer is filled anew
        follows from it. A renewal that has not begun gives way. Changes come in order.
        """
        complete = self._complete(step, over)
        self._renewals = [begin for begin in self._renewals if begin <= step]
        while self._renewals and self._renewals[0] + self._anew_steps < step:
            self._earlier_steps += self._anew_steps
            del self._renewals[0]
        if not self._anew_steps or not complete:  # nothing has heard another prompt
            return
        moves = max(0, self._streamed(complete)[0] - self.fill_steps) // self.scheme.micro_steps
        moves += self.refill.chunks + 1
        last = self.fill_steps + moves * self.scheme.micro_steps - 1  # the micro step that does not advance
        self._renewals.append(last + self._earlier_steps + self._anew_steps * len(self._renewals) + 1)

    def _complete(self, step: int, over: int) -> int:
        """The first micro step that knows the new prompt alone."""
        return step + max(0, over * self.scheme.micro_steps - 1)

    def _streamed(self, step: int) -> tuple[int, int | None]:
        """How many of the first `step` micro steps were of filling and streaming; and, while the buffer is filled anew,
        the place within that. The step that should have advanced is not done until then.
        """
        earlier = self._earlier_steps
        for begin in self._renewals:
            if step < begin:
                break
            if step < begin + self._anew_steps:
                return begin - 1 - earlier, step - begin
            earlier += self._anew_steps
        return step - earlier, None

    def renews(self, step: int) -> bool:
        """Whether the buffer is renewed before this micro step (`stream.renew`), at `renewal_level`."""
        return step in self._renewals

    @property
    def renewal_level(self) -> np.float32:
        """The level that the frame which is kept is put back to; 1 leaves it as it is."""
        return self._anew.levels[0, 0, 0]

    def place(self, step: int) -> tuple[str, int]:
        """A name of the row that a micro step applies: after filling, rows repeat."""
        streamed, anew = self._streamed(step)
        if anew is not None:
            return "anew", anew
        place = min(streamed, self.fill_steps + (streamed - self.fill_steps) % self.scheme.micro_steps)
        return "stays" if self.renews(step + 1) else "moves", place

    def row(self, step: int) -> streaming.Row:
        """The row of a micro step."""
        kind, place = self.place(step)
        if kind == "anew":
            return streaming.row_at(self._anew, place)
        if place < self.fill_steps:
            return streaming.row_at(self._fill, place)
        row = streaming.row_at(self._flow, place - self.fill_steps)
        return row._replace(advance=np.bool_(False)) if kind == "stays" else row

    def shows_references(self, step: int) -> bool:
        """Whether the references that filling made leave with this micro step."""
        return self._makes_references and step == self.fill_steps - 1

    def steps_until_frames(self, step: int) -> int:
        """Micro steps from here until frames are shown."""
        s, (streamed, anew) = self.scheme.micro_steps, self._streamed(step)
        if anew is not None:
            return self._anew_steps - anew
        if streamed >= self.fill_steps:
            left = s - (streamed - self.fill_steps) % s
        else:
            left = self.fill_steps - streamed + (0 if self._makes_references else s)
        return left + self._anew_steps * self.renews(step + left)

    def shifts(self, step: int) -> int:
        """Chunks that have left after so many micro steps."""
        return max(0, self._streamed(step)[0] - self.fill_steps) // self.scheme.micro_steps

    def frames_shown(self, step: int) -> int:
        """Video frames that have left after so many micro steps."""
        shown = self.given_references or (self._makes_references and step >= self.fill_steps)
        return self.latent_frames * (shown * self.scheme.num_references + self.shifts(step) * self.scheme.chunk_size)

    def first_steps(self, step: int) -> Int[np.ndarray, "B"]:
        """The first micro step of each frame of the buffer as it stands before `step`."""
        return self._steps_of(self.shifts(step) * self.scheme.chunk_size + np.arange(self.scheme.buffer_size))[1]

    def _steps_of(self, frames: Int[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Of frames, numbered from the first of the first buffer: the micro step from which each is there, and its own
        first one.
        """
        scheme = self.scheme
        chunk = (frames - scheme.num_references) // scheme.chunk_size
        entered = self.fill_steps + (chunk - scheme.num_chunks + 1) * scheme.micro_steps
        of_filling = np.minimum(frames, scheme.buffer_size - 1)
        filled = frames < scheme.buffer_size
        return np.where(filled, self._there[of_filling], entered), np.where(filled, self._first[of_filling], entered)

    def receipt(self, step: int, over: int, *, per_chunk: bool = False) -> Receipt:
        """What a change before micro step `step`, interpolated over so many chunks, touches; `follow` knows of it."""
        scheme, complete = self.scheme, self._complete(step, over)
        # The frame sought is in the buffer by then, or of the chunk that enters next.
        frames = self.shifts(complete) * scheme.chunk_size + np.arange(scheme.buffer_size + scheme.chunk_size)
        frames = frames[frames >= (0 if self._makes_references else scheme.num_references)]  # given ones hear nothing
        place = int(np.argmax(self._begin_from(frames, complete)))
        first_complete = int(frames[place])
        if self._renewals and self._renewals[-1] > complete:  # of what is in the buffer then, its first frame is kept
            kept = int(self.renewal_level > 0)
            first_complete = min(first_complete, self.shifts(self._renewals[-1]) * scheme.chunk_size + kept)
        # A chunk that keeps its own prompt still attends to its neighbours, and they to it.
        there = int(self._steps_of(frames)[0][place])
        touched = self.frames_shown(max(step, there) if per_chunk else step) + self.latent_frames * self._clean(step)
        if self._makes_references and not per_chunk:  # some may be clean before others are begun
            clean = self._there[: scheme.num_references] + scheme.total_steps <= step
            touched = max(touched, self.latent_frames * int(clean.sum()))
        unshown = 0 if self.given_references or self._makes_references else scheme.num_references
        return Receipt(step, touched, self.latent_frames * (first_complete - unshown))

    def _begin_from(self, frames: Int[np.ndarray, "n"], step: int) -> Bool[np.ndarray, "n"]:
        """Whether these frames, of the buffer or later ones, take their own first step at a micro step or after it."""
        streamed, anew = self._streamed(step)
        if anew is None:
            return self._steps_of(frames)[1] >= streamed
        size, entered = self.scheme.buffer_size, np.argmax(self._anew.enter, axis=0)
        entered[0] = -1 if self.renewal_level > 0 else 0
        place = frames - self.shifts(step) * self.scheme.chunk_size
        return (place >= size) | (entered[np.minimum(place, size - 1)] >= anew)

    def _clean(self, step: int) -> int:
        """How many frames of the buffer are as clean as they will be, while it is filled anew."""
        anew = self._streamed(step)[1]
        if anew is None:
            return 0
        made = np.where(self._anew.keep.any(axis=0), np.argmax(self._anew.keep, axis=0), -1) < anew
        return int(made[: self.scheme.chunk_size].sum())


@jax.jit
def mix(old: Text, new: Text, weight: Float[Array, ""]) -> Text:
    """(1 − weight)·old + weight·new, token by token; either mask's tokens are seen, and padding counts as zero."""

    def of_encoder(a, b):
        first, second = (jnp.where(mask[..., None], sequence, 0) for sequence, mask in (a, b))
        return (1 - weight) * first + weight * second, a[1] | b[1]

    return tuple(of_encoder(a, b) for a, b in zip(old, new))


@jax.jit
def side_by_side(old: Text, new: Text, takes_new: Array) -> Text:
    """Both prompts in one text of 2·S tokens: frames where takes_new [batch, B] see the new one, others the old."""

    def of_encoder(a, b):
        shown = a[1][:, None] & ~takes_new[..., None], b[1][:, None] & takes_new[..., None]
        return jnp.concatenate([a[0], b[0]], axis=1), jnp.concatenate(shown, axis=-1)

    return tuple(of_encoder(a, b) for a, b in zip(old, new))


class _Prompt(NamedTuple):
    text: str
    start: int  # the first micro step it has a say in
    over: int  # chunks until it alone is heard
    weight: float | None  # what it had reached when the next one arrived; None for the present one


class Steering:
    """Prompt, guidance and strength of one stream, by micro step, with a log of their changes.

    encode: a prompt's text input, [1, tokens, width] and mask per encoder. Setting what cannot be raises ConfigError
    and changes nothing.
    """

    def __init__(
        self,
        table: Timetable,
        encode: Callable[[str], Text],
        *,
        prompt: str,
        guidance: float,
        strength: float,
        per_chunk_prompts: bool = False,
    ):
        if table.refill.chunks and per_chunk_prompts:
            raise ConfigError(KEEPS_PROMPTS)
        self.table, self.per_chunk_prompts, self._encode = table, per_chunk_prompts, encode
        self.guidance, self.strength = _guidance(guidance), _strength(strength)
        self.events: list[dict[str, Any]] = []
        self._chain = [_Prompt(prompt, 0, 0, None)]
        self._texts = {prompt: encode(prompt)}
        self._last: tuple[Any, Text] | None = None

    @property
    def prompt(self) -> str:
        return self._chain[-1].text

    def change(self, step: int, prompt: str, over: int = 0, text: Text | None = None) -> Receipt:
        """A new prompt before micro step `step`; over: chunks to interpolate over. text: its encoding, if at hand."""
        if isinstance(over, bool) or not isinstance(over, int | np.integer) or not 0 <= over <= 10_000:
            raise ConfigError(f"over: a whole number of chunks from 0 to 10000, not {over!r}")
        if over and self.per_chunk_prompts:
            raise ConfigError("over: must be 0 where each chunk keeps the prompt it entered with")
        text = self._encode(prompt) if text is None else text
        self.note(step, prompt=prompt, over=int(over))
        self._follow(step, prompt, int(over))
        self._texts = {link.text: self._texts.get(link.text) for link in self._chain} | {prompt: text}
        return self.table.receipt(step, over, per_chunk=self.per_chunk_prompts)

    def _follow(self, step: int, prompt: str, over: int) -> None:
        """Appends a prompt to the chain, and drops what is no longer heard."""
        present = self._chain[-1]
        if self.per_chunk_prompts:
            kept = self._chain[:-1] if present.start == step else [present]  # one that no step has seen never was
        else:
            heard = self._weight(present, step - 1)
            kept = [present] if heard >= 1 else [*self._chain[:-1], present._replace(weight=heard)]
            kept = [link for link in kept if link.weight is None or link.weight > 0 or link is kept[0]]
            kept = kept if over else []
        self._chain = [*kept, _Prompt(prompt, step, over, None)]
        self.table.follow(step, over)

    def _weight(self, link: _Prompt, step: int) -> float:
        """How much of the text at a micro step is this prompt, against those before it."""
        if not link.over:
            return 1.0
        return min(1.0, max(0, step - link.start + 1) / (link.over * self.table.scheme.micro_steps))

    def text(self, step: int) -> Text:
        """What the frames attend to at a micro step: masks [1, tokens], or [1, B, 2·tokens] with prompts per chunk."""
        *before, present = self._chain
        if self.per_chunk_prompts:
            takes_new = self.table.first_steps(step) >= present.start
            key = present, takes_new.tobytes()
        else:
            weight = self._weight(present, step)
            key = present, weight
        if self._last is None or self._last[0] != key:
            if self.per_chunk_prompts:
                old = before[-1] if before else present
                made = side_by_side(*(self._text_of(link) for link in (old, present)), takes_new[None])
            elif weight >= 1:
                made = self._text_of(present)
            else:
                made = mix(self._base(), self._text_of(present), np.float32(weight))
            self._last = key, made
        return self._last[1]

    def _text_of(self, link: _Prompt) -> Text:
        if self._texts.get(link.text) is None:
            self._texts[link.text] = self._encode(link.text)
        return self._texts[link.text]

    def _base(self) -> Text:
        """What was heard when the present prompt arrived."""
        first, *rest = self._chain[:-1]
        return functools.reduce(
            lambda text, link: mix(text, self._text_of(link), np.float32(link.weight)), rest, self._text_of(first)
        )

    def set_guidance(self, step: int, guidance: float) -> None:
        """Guidance from a micro step on."""
        self.guidance = _guidance(guidance)
        self.note(step, guidance=self.guidance)

    def set_strength(self, step: int, strength: float) -> None:
        """Strength of the frames that enter with this micro step or later."""
        self.strength = _strength(strength)
        self.note(step, strength=self.strength)

    def note(self, step: int, **change: Any) -> None:
        """Logs an event, in place of what it makes void: a change of its kind that no micro step has seen."""
        first = len(self.events)
        while first and self.events[first - 1]["step"] == step:
            first -= 1

        def is_void(event):
            # An interpolation begins at what a hard switch just before it has set.
            return event.keys() == {"step", *change} and not (change.get("over") and not event["over"])

        self.events[first:] = [event for event in self.events[first:] if not is_void(event)]
        self.events.append({"step": step, **change})

    def recall(self, events: list[dict[str, Any]]) -> None:
        """Brings a fresh steering to where these events left another one, encoding only what is still heard."""
        for event in events:
            if "prompt" in event:
                self._follow(event["step"], event["prompt"], event["over"])
            self.guidance = _guidance(event.get("guidance", self.guidance))
            self.strength = _strength(event.get("strength", self.strength))
        self.events = [dict(event) for event in events]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _guidance(value: float) -> float:
    if not abs(_number(value)) <= 1000:
        raise ConfigError(f"guidance: a number from -1000 to 1000, 1 being none, not {value!r}")
    return _number(value)


def _strength(value: float) -> float:
    if not 0 <= _number(value) <= 1:
        raise ConfigError(f"strength: a number from 0 (the input as it is) to 1 (nothing of it), not {value!r}")
    return _number(value)
