"""What a stream is told while it runs: prompts, guidance and strength, by micro step (StreamDiT §8).

Its timetable says which row each step applies and which frames it shows; its steering says what the frames attend to.
A change is an event at a step: seed, settings and events are all that a stream is made of, and replay it exactly.

    hard switch     from the next micro step on, every chunk of the buffer attends to the new prompt
    interpolation   over n chunks: step k of n·s attends to (1 − k/(n·s))·old + k/(n·s)·new, token by token; the mask is
                    the union of both, and padding counts as zero
    per chunk       each chunk attends, for as long as it is in the buffer, to the prompt that was current at its first
                    step; old and new lie side by side under a mask per frame. A buffer knows two prompts: where a third
                    arrives before the first has left, its chunks go over to the second
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax.errors import ConfigError
from streamdit_jax.timetable import Receipt, Timetable

KEEPS_PROMPTS = "refill: no chunk would keep the prompt it entered with; set it to 0"
Text = Any  # per text encoder its sequence and mask, as `models.dit.Text`


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
