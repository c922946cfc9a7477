"""One endless video: the moving buffer, what steers it, and the decoder's carried state (StreamDiT §8).

    begin    what the next forward takes: its row, its condition, the input of the frames that enter
    finish   what the forward gave; the latents that leave
    next     both with the forward between them, and the frames decoded

A live engine calls begin and finish around the forward that many streams share; alone, `next` does all of it. So a
stream shows the same video alone and in company.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax import stream as streaming
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.text_cache import CachedText
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.snapshot import Snapshot
from streamdit_jax.steering import Steering, Text
from streamdit_jax.timetable import Receipt, Timetable
from streamdit_jax.video_input import Piece

LOG_FORMAT = 1
START = {
    "seed": int,
    "prompt": str,
    "scheme": str,
    "filling": str,
    "refill": str,
    "guidance": float,
    "strength": float,
    "per_chunk_prompts": bool,
    "image": bool,
    "video": bool,
}
EVENTS = ({"prompt": str, "over": int}, {"guidance": float}, {"strength": float}, {"video": bool})


class Forward(NamedTuple):
    """What one forward takes of a stream, each a batch of one and on the device."""

    row: streaming.Row
    condition: streaming.Condition
    source: streaming.Source


class Stream(Iterator[np.ndarray]):
    """An endless video. Each `next` gives the frames that left the buffer: uint8 [frames, height, width, 3].

    Set `prompt`, `guidance` or `strength` at any time: they take effect at the next micro step; `change` also tells
    when a prompt will be seen. `seconds` sums the time spent in "forward" and "decode"; `forwards` counts micro steps
    of this process, `step` those of the stream.
    """

    def __init__(self, pipeline: Any, start: dict[str, Any], video: Any = None):
        """A stream without its buffer; `Pipeline.stream`, `resume` and `replay` make whole ones.

        start: what `START` lists. video: has `take`, as VideoInput does. Raises ValueError for an unknown filling.
        """
        self._pipeline, self.scheme = pipeline, PartitionScheme.parse(start["scheme"])
        self.table = Timetable(
            self.scheme,
            start["filling"],
            pipeline.config.tae.compression[0],
            given_references=start["image"],
            refill=start["refill"],
        )
        steered = {name: start[name] for name in ("prompt", "guidance", "strength", "per_chunk_prompts")}
        self.steering = Steering(self.table, pipeline.encode_prompt, **steered)
        self.start = {**start, "guidance": self.guidance, "strength": self.strength}
        self._null = pipeline.null_text(start["per_chunk_prompts"])
        self._cached: tuple[Text, CachedText] | None = None
        self._weight: tuple[float, Array] | None = None
        self.state: streaming.StreamState | None = None
        self.step = 0
        self.decoder: Any = None  # the decoder's carried state, and references that were given but not yet shown
        self.unshown: Float[Array, "1 K h w c"] | None = None
        self.video, self._reads, self._had_video = video, start["video"], start["video"]
        self.encoder, self.frames_read = None, 0
        self._due: deque[dict[str, Any]] = deque()
        self.seconds, self.forwards = {"forward": 0.0, "decode": 0.0}, 0

    # ---- steering ----

    @property
    def seed(self) -> int:
        return self.start["seed"]

    @property
    def prompt(self) -> str:
        """What the video shows. Setting it is a hard switch; StreamDiTError for a prompt that is too long changes
        nothing.
        """
        return self.steering.prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self.change(prompt)

    @property
    def guidance(self) -> float:
        """Classifier-free guidance; 1 is none, and costs half."""
        return self.steering.guidance

    @guidance.setter
    def guidance(self, guidance: float) -> None:
        self.steering.set_guidance(self.step, guidance)

    @property
    def strength(self) -> float:
        """How far an input video is left behind: frames that enter are held to it up to level 1 − strength."""
        return self.steering.strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self.steering.set_strength(self.step, strength)

    def change(
        self, prompt: str, over: int = 0, *, text: Text | None = None, cached: CachedText | None = None
    ) -> Receipt:
        """A new prompt from the next micro step on; over: chunks to interpolate over, 0 for a hard switch.

        text, cached: the prompt's encoding and what the step takes of it, if they are at hand. Returns when it will be
        seen. StreamDiTError for a prompt that is too long, ConfigError for an impossible `over`; both change nothing.
        """
        receipt = self.steering.change(self.step, prompt, over, text)
        if cached is not None:
            self._cached = text, cached
        return receipt

    def read(self, video: Any) -> None:
        """Lets frames that enter from now on be held to a video, an object that has `take` as VideoInput does."""
        self.video, self._reads = video, True

    def log(self) -> dict[str, Any]:
        """All that `Pipeline.replay` needs to make this video again, as a JSON-able dict; input videos and images are
        not in it.
        """
        return {
            "format": LOG_FORMAT,
            "fingerprint": self._pipeline.fingerprint,
            **self.start,
            "events": [dict(event) for event in self.steering.events],
            "steps": self.step,
        }

    def follow(self, events: list[dict[str, Any]]) -> None:
        """Lets the events of a log happen again, each before its micro step."""
        self._due.extend(events)

    def _happen(self, event: dict[str, Any]) -> None:
        if "prompt" in event:
            self.change(event["prompt"], event["over"])
        elif "guidance" in event:
            self.guidance = event["guidance"]
        elif "strength" in event:
            self.strength = event["strength"]
        else:
            self._reads = event["video"]

    # ---- one forward ----

    @property
    def next_advances(self) -> bool:
        """Whether frames enter, and others leave, with the next micro step."""
        return bool(self.table.row(self.step).advance)

    @property
    def forwards_until_frames(self) -> int:
        """Micro steps until frames leave the buffer."""
        return self.table.steps_until_frames(self.step)

    @property
    def frames_shown(self) -> int:
        """Video frames that have left the buffer: the number of the next one."""
        return 0 if self.unshown is not None else self.table.frames_shown(self.step)

    def begin(self) -> Forward:
        """What the next forward takes; the stream counts it as done, and waits for `finish`."""
        while self._due and self._due[0]["step"] <= self.step:
            self._happen(self._due.popleft())
        if self.table.renews(self.step):
            self.state = self._pipeline.renew(self.scheme, self.state, self.table.renewal_level)
        row = self._pipeline.row(self.table, self.step)
        source = self._enter() if self.next_advances else self._pipeline.no_source(self.scheme)
        if self._weight is None or self._weight[0] != self.guidance:
            self._weight = self.guidance, jax.device_put(np.full(1, self.guidance, np.float32))
        condition = streaming.Condition(self.listen(), self._null, self._weight[1])
        self.step += 1
        return Forward(row, condition, source)

    def listen(self) -> CachedText:
        """What the next forward attends to, computed anew only where the text is another one."""
        text = self.steering.text(self.step)
        if self._cached is None or self._cached[0] is not text:
            self._cached = text, self._pipeline.cache_text(text)
        return self._cached[1]

    def _enter(self) -> streaming.Source:
        """The input of the frames that enter next."""
        count = self.scheme.chunk_size
        piece = self.video.take(count) if self.video is not None and self._reads else None
        if (piece is not None) != self._had_video:
            self._had_video = piece is not None
            self.steering.note(self.step, video=self._had_video)
        if piece is None:
            return self._pipeline.no_source(self.scheme)
        self.encoder, self.frames_read = piece.state, piece.frames_read
        return hold(piece, self.strength)

    def finish(self, state: streaming.StreamState, front: Array) -> Float[Array, "1 f h w c"] | None:
        """Takes what the forward gave; the clean latents if frames left the buffer."""
        self.state = state
        if self.table.shows_references(self.step - 1):
            return state.buffer[:, : self.scheme.num_references]
        return front if self.table.row(self.step - 1).advance else None

    def __next__(self) -> np.ndarray:
        began = time.perf_counter()
        latents, self.unshown = self.unshown, None
        while latents is None:
            latents = self.forward()
        # Everything is on its way to the device before anything is waited for; frames come as soon as they are made.
        frames, self.decoder = self._pipeline.decode(latents, self.decoder)
        frames.copy_to_host_async()
        jax.block_until_ready(latents)
        denoised = time.perf_counter()
        frames = np.asarray(frames)[0]
        self.seconds["forward"] += denoised - began
        self.seconds["decode"] += time.perf_counter() - denoised
        return frames

    def forward(self) -> Float[Array, "1 f h w c"] | None:
        """One micro step; the clean latents if frames left the buffer."""
        row, condition, source = self.begin()
        step = self._pipeline.step(self.scheme, masked=self.masked)
        self.forwards += 1
        return self.finish(*step(self.state, row, condition, source))

    @property
    def masked(self) -> bool:
        """Whether the model has to be told which frames exist."""
        return streaming.is_masked(self.table.filling)

    # ---- at rest ----

    def snapshot(self) -> Snapshot:
        """The stream between two micro steps, to `save`, `resume`, fork or move."""
        return self.freeze()(self.decoder)

    def freeze(self) -> Callable[[Any], Snapshot]:
        """The stream as it stands, without waiting for it: a function of the decoder's state at this moment, which a
        decoder that runs beside may know later.
        """
        # Copies: the buffers themselves are donated to the next step.
        state = jax.tree.map(jnp.copy, {**self.state._asdict(), "keys": jax.random.key_data(self.state.keys)})
        arrays = state if self.unshown is None else {**state, "unshown": self.unshown}
        arrays |= {f"encoder_{index}": leaf for index, leaf in enumerate(self.encoder or ())}
        facts = {
            "fingerprint": self._pipeline.fingerprint,
            "prompt": self.prompt,
            "guidance": self.guidance,
            "scheme": str(self.scheme),
            "filling": self.table.filling,
            "log": self.log(),
            "had_video": self._had_video,
            "frames_read": self.frames_read,
            "encoder": self.encoder is not None,
        }

        def with_decoder(decoder):
            leaves = {f"decoder_{index}": leaf for index, leaf in enumerate(decoder or ())}
            whole = {name: np.array(value) for name, value in (arrays | leaves).items()}
            return Snapshot({**facts, "decoder": decoder is not None}, whole)

        return with_decoder

    def restore(self, snapshot: Snapshot, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Brings a fresh stream to where a snapshot was taken. shapes: of the arrays that it may hold; who sends a
        snapshot does not choose them. ValueError, KeyError for anything else.
        """
        for name, array in snapshot.arrays.items():
            if name not in shapes or (array.shape, array.dtype) != (shapes[name].shape, shapes[name].dtype):
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        facts, arrays = snapshot.facts, {name: jnp.asarray(value) for name, value in snapshot.arrays.items()}
        arrays["keys"] = jax.random.wrap_key_data(arrays["keys"])
        self.state = streaming.StreamState(*(arrays[name] for name in streaming.StreamState._fields))
        self.unshown = arrays.get("unshown")
        for part in ("decoder", "encoder"):
            leaves = sum(name.startswith(f"{part}_") for name in shapes) if facts[part] else 0
            setattr(self, part, tuple(arrays[f"{part}_{index}"] for index in range(leaves)) or None)
        self.frames_read, self._had_video = facts["frames_read"], facts["had_video"]
        self.step = facts["log"]["steps"]
        self.steering.recall(facts["log"]["events"])
        self.listen()  # encodes what is still heard: here, and not before the next forward


def hold(piece: Piece, strength: float) -> streaming.Source:
    """A piece of an input video as what frames are held to; frames past the video's end are free."""
    held = np.arange(piece.latents.shape[1]) < piece.length
    return streaming.Source(piece.latents, np.where(held, 1 - strength, 0).astype(np.float32)[None])


def first_source(
    video: Any, scheme: PartitionScheme, frame: tuple[int, int, int], strength: float, *, references: bool
) -> streaming.Source:
    """The input of a whole buffer, from a video that is read piece by piece, as a stream reads it later.

    references: the video's first K frames are those of the references; otherwise it begins with chunk 0.
    """
    K, c = scheme.num_references, scheme.chunk_size
    nothing = [streaming.Source(jnp.zeros((1, size, *frame)), np.zeros((1, size), np.float32)) for size in (K, c)]
    sources = [] if references or not K else [nothing[0]]
    for size in [K] * (references and K > 0) + [c] * scheme.num_chunks:
        piece = video.take(size)
        sources.append(nothing[size == c] if piece is None else hold(piece, strength))
    return streaming.Source(*(jnp.concatenate(parts, axis=1) for parts in zip(*sources)))


def checked_log(log: Any) -> dict[str, Any]:
    """A log that `Stream.log` gave, perhaps by way of JSON. ConfigError, naming the field, for anything else."""

    def fits(values, kinds):
        return all(
            isinstance(values.get(name), (int, float) if kind is float else kind)
            and (kind is bool or not isinstance(values[name], bool))
            for name, kind in kinds.items()
        )

    if not isinstance(log, dict) or log.get("format") != LOG_FORMAT or not isinstance(log.get("events"), list):
        raise ConfigError(f"log: is no log of a stream of format {LOG_FORMAT}")
    log = {"refill": "0", **log}  # those of 0.1.0 have none
    for name, kind in {**START, "fingerprint": str, "steps": int}.items():
        if not fits(log, {name: kind}):
            raise ConfigError(f"log: {name}: {log.get(name)!r} is no {kind.__name__}")
    if log["steps"] < 0:
        raise ConfigError(f"log: steps: {log['steps']} is negative")
    for event in log["events"]:
        if not isinstance(event, dict) or not fits(event, {"step": int}) or not any(fits(event, k) for k in EVENTS):
            raise ConfigError(f"log: events: {event!r} is no change of prompt, guidance, strength or video")
    return log
