"""What a stream does at each of its micro steps, which it counts from 0: the row that each applies, the frames that
have been shown by then, and when a change reaches them (StreamDiT §8).

Filling comes first, then streaming, whose rows repeat. What a video shows is soon another after a change of prompt: the
chunks that are in the buffer take on new colours on their way. How it moves is not: each chunk goes on as the one
before it did. So a buffer may be filled anew some chunks after a change, from one frame, which tells how things look
and not how they move (`partition.Refill`; not in the paper); the micro steps of that lie in between those of streaming.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from streamdit_jax import stream as streaming
from streamdit_jax.partition import PartitionScheme, Refill


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
