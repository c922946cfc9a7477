"""Text encoder, DiT and TAE as one thing: load(...) → .stream(prompt) → frames (StreamDiT §8; fig. 11).

A pipeline holds the weights and the compiled functions, which its streams share. Prompt, guidance, seed, input video
and the levels of a scheme are data to one compiled step.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import compiled, parameters, weights
from streamdit_jax import stream as streaming
from streamdit_jax.config import Config, from_mapping
from streamdit_jax.endless import START, Stream, checked_log, first_source
from streamdit_jax.errors import CheckpointError, ConfigError, StreamDiTError
from streamdit_jax.models.tae import initial_decoder_state, initial_encoder_state
from streamdit_jax.models.text import tokenize, with_frame_rate
from streamdit_jax.models.text_cache import CachedText, Text, cache_text
from streamdit_jax.partition import PartitionScheme, Refill
from streamdit_jax.programs import Programs
from streamdit_jax.snapshot import Snapshot
from streamdit_jax.steering import side_by_side
from streamdit_jax.timetable import Timetable
from streamdit_jax.video_input import VideoInput, frames_of


def load(
    name_or_directory: str | Path, *, config: Config | None = None, programs: Programs | None = None
) -> "Pipeline":
    """A bundled model by name, or the directory that `streamdit train` or `convert` wrote.

    config: used in place of the model's own, with other sampling or another precision. programs: where compiled
    functions are found ready, and kept for the next process.

    Raises CheckpointError where it is missing, foreign, truncated or altered; ConfigError where its configuration is
    impossible.
    """
    directory = weights.find_model(name_or_directory)
    card = weights.load_card(directory)
    config = from_mapping(card["config"]) if config is None else config
    params = parameters.load(directory, card, config, parameters.shapes(config, programs))
    fingerprint = "+".join(card["parts"][part]["sha256"][:16] for part in parameters.PARTS)
    return Pipeline(config, params, fingerprint, programs)


class Pipeline:
    """A model ready to stream. Compiled functions are shared by all of its streams."""

    def __init__(
        self,
        config: Config,
        params: dict[str, Any],
        fingerprint: str = "unsaved",
        programs: Programs | None = None,
    ):
        """params: {"tae", "text", "dit"} as `parameters.initialise` gives them; the layers may be a tuple.
        fingerprint: tells snapshots of different weights apart. programs: as `load`.
        """
        self.config, self.fingerprint, self._programs = config, fingerprint, programs
        placed = parameters.place(config, params)
        self._tae_params, self._text_params, self._dit_params = (placed[part] for part in ("tae", "text", "dit"))
        self._steps: dict[tuple, Any] = {}
        self._starts: dict[tuple, Any] = {}
        self._constants: dict[tuple, Any] = {}
        self._encode_text = self._compiled("encode_text", functools.partial(compiled.encode_text, config.text))
        self._cache_text = self._compiled("cache_text", functools.partial(cache_text, config.dit))
        decode = functools.partial(compiled.decode, config.tae, config.dit.compute_dtype)
        self._decode = self._compiled("decode", decode)
        self._encode_video = jax.jit(functools.partial(compiled.encode_video, config.tae))
        self._encode_frames = self._compiled("encode_frames", functools.partial(compiled.encode_frames, config.tae))

    def _compiled(self, name: str, function: Callable, *facts: Any, donate_argnums: tuple[int, ...] = ()) -> Callable:
        """`jax.jit` of a function of parameters, or None, and more; or a program that the next process finds ready.
        facts: what it closes over, beside the shapes of the model.
        """
        if self._programs is None:
            return jax.jit(function, donate_argnums=donate_argnums)
        model = self.config.tae, self.config.text, self.config.dit, self._size
        return self._programs.jit(name, function, (*model, *facts), donate_argnums)

    @property
    def frame_rate(self) -> float:
        """Frames per second of the video."""
        return self.config.data.frame_rate

    @property
    def dit_params(self) -> Any:
        """The transformer's parameters as the step takes them: in the type of the arithmetic, layers as a tuple."""
        return self._dit_params

    @property
    def latent_frames(self) -> int:
        """Video frames per latent frame."""
        return self.config.tae.compression[0]

    @property
    def _size(self) -> tuple[int, int]:
        return self.config.data.height, self.config.data.width

    def scheme(self, scheme: PartitionScheme | str | None) -> PartitionScheme:
        """The scheme, or the model's own for None. ConfigError where it does not tile the model's buffer."""
        scheme = self.config.sampling.scheme if scheme is None else scheme
        try:
            scheme = PartitionScheme.parse(scheme) if isinstance(scheme, str) else scheme
        except ValueError as mistake:
            raise ConfigError(f"scheme: {mistake}") from None
        frames = self.config.dit.latent[0]
        if scheme.buffer_size != frames:
            raise ConfigError(
                f"scheme: {scheme} has {scheme.buffer_size} frames, but the model's buffer holds {frames}"
            )
        return scheme

    def refill(self, scheme: PartitionScheme, filling: str, per_chunk_prompts: bool = False) -> Refill:
        """The model's own, where streams of this kind can be filled anew; none elsewhere."""
        can_be = filling == "doubling" and not scheme.num_references and not per_chunk_prompts
        return Refill.parse(self.config.sampling.refill if can_be else "0")

    def stream(
        self,
        prompt: str,
        seed: int = 0,
        *,
        scheme: PartitionScheme | str | None = None,
        guidance: float | None = None,
        filling: str | None = None,
        video: Iterable[np.ndarray] | None = None,
        image: np.ndarray | None = None,
        strength: float = 0.6,
        per_chunk_prompts: bool = False,
        refill: Refill | str | None = None,
    ) -> Stream:
        """An endless video: an iterator of uint8 [frames, height, width, 3].

        scheme, guidance and filling are the model's own unless given.
        video: frames uint8 [height, width, 3], as an array [n, …] or any iterable, a camera's too; frame i steers frame
            i (§5.4). After its end the stream runs free. image: one such frame, which the buffer is filled with, and
            which is the first reference where K > 0; beside it a video steers only what enters.
        strength: frames stay on the path to their input up to level 1 − strength: 0 is the input, 1 leaves nothing of
            it.
        per_chunk_prompts: each chunk keeps the prompt that it entered with.
        refill: when, after a change of prompt, the buffer is filled anew from a frame, so that motion follows the
            prompt, too; "0" for never. The model's own unless given, where the buffer doubles and has no references.

        Raises ConfigError, naming the field, for what cannot be, and StreamDiTError for a prompt that is too long.
        """
        sampling, scheme = self.config.sampling, self.scheme(scheme)
        filling = filling or sampling.filling
        start = {
            "seed": seed,
            "prompt": prompt,
            "scheme": str(scheme),
            "filling": filling,
            "refill": str(self.refill(scheme, filling, per_chunk_prompts) if refill is None else refill),
            "guidance": sampling.guidance if guidance is None else guidance,
            "strength": strength,
            "per_chunk_prompts": bool(per_chunk_prompts),
        }
        return self._open(start, video, image)

    def replay(
        self, log: dict[str, Any], *, video: Iterable[np.ndarray] | None = None, image: np.ndarray | None = None
    ) -> Stream:
        """The stream whose `log` this is, from its first frame on, every change at its micro step; it goes on when the
        log ends. video, image: what that stream was given.

        Raises ConfigError for what is no log, or lacks its video or image; CheckpointError for another model's.
        """
        log = checked_log(log)
        if log["fingerprint"] != self.fingerprint:
            raise CheckpointError("log: was made by a model with other weights; load that model to replay it")
        needed = {"video": log["video"] or any("video" in event for event in log["events"]), "image": log["image"]}
        for name, given in (("video", video), ("image", image)):
            if needed[name] != (given is not None):
                raise ConfigError(f"{name}: the logged stream had {'one' if needed[name] else 'none'}")
        start = {name: log[name] for name in START if name not in ("video", "image")}
        self.scheme(start["scheme"])
        stream = self._open(start, video, image, reads=log["video"])
        stream.follow(log["events"])
        return stream

    def _open(self, start: dict[str, Any], video, image, *, reads: bool = True) -> Stream:
        """A stream at its beginning: its noise, and what it is given to start from."""
        scheme, seed, filling = PartitionScheme.parse(start["scheme"]), start["seed"], start["filling"]
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not -(2**31) <= seed < 2**32:
            raise ConfigError(f"seed: a whole number of at most 32 bits, not {seed!r}")
        if video is not None and not isinstance(video, VideoInput):
            video = self.video_input(video)
        given = {"image": image is not None, "video": video is not None and reads}
        try:
            stream = Stream(self, {**start, **given, "seed": int(seed)}, video=video)
        except ConfigError:
            raise
        except ValueError as mistake:
            raise ConfigError(str(mistake)) from None
        source, frame, strength = None, self.config.dit.latent[1:], stream.strength
        if image is not None:
            frames = itertools.repeat(np.asarray(image)[None], self.config.dit.latent[0] * self.latent_frames)
            still = VideoInput(self.encode_frames, frames_of(frames, *self._size, "image"), self.latent_frames)
            source = first_source(still, scheme, frame, strength, references=True)
            if scheme.num_references:
                stream.unshown = source.latents[:, : scheme.num_references]
        elif given["video"]:
            source = first_source(video, scheme, frame, strength, references=filling != "ramp")
            stream.encoder, stream.frames_read = video.state, video.frames_read
        shape = PartitionScheme(scheme.num_references, scheme.num_chunks, scheme.chunk_size, 1)
        if (shape, filling) not in self._starts:
            begin = functools.partial(compiled.begin, shape, frame, filling)
            self._starts[shape, filling] = self._compiled("initial_state", begin, shape, filling)
        number = np.array([int(seed) % 2**32], np.uint32)
        stream.state = self._starts[shape, filling](None, number, source, stream.unshown)
        if stream.table.refill.chunks and ("renews", shape) not in self._constants:
            # Compiled now, and not in the middle of a video.
            jax.block_until_ready(self.renew(scheme, jax.tree.map(jnp.copy, stream.state), np.float32(1)))
            self._constants["renews", shape] = True
        stream.listen()
        return stream

    def renew(self, scheme: PartitionScheme, state: streaming.StreamState, level: np.float32) -> streaming.StreamState:
        """A state of these streams with its buffer to be filled anew (`stream.renew`); the former one is donated."""
        shape = PartitionScheme(0, scheme.num_chunks, scheme.chunk_size, 1)
        if ("renew", shape) not in self._steps:
            renew = functools.partial(compiled.renew, shape)
            self._steps["renew", shape] = self._compiled("renew", renew, shape, donate_argnums=(1,))
        return self._steps["renew", shape](None, state, level)

    def resume(self, snapshot: "Snapshot | str | Path", *, video: Iterable[np.ndarray] | None = None) -> Stream:
        """Continues a stream where `Stream.snapshot` left it, bit for bit. CheckpointError for another model's or a
        damaged snapshot.

        video: the rest of its input, from frame `snapshot.facts["frames_read"]` on; without it new frames are free.
        """
        snapshot = snapshot if isinstance(snapshot, Snapshot) else Snapshot.load(snapshot)
        if snapshot.facts["fingerprint"] != self.fingerprint:
            raise CheckpointError("snapshot: was made by a model with other weights; load that model to resume it")
        try:
            log = checked_log(snapshot.facts.get("log"))
            stream = Stream(self, {name: log[name] for name in START})
            stream.restore(snapshot, self._snapshot_shapes(self.scheme(log["scheme"])))
        except (ValueError, TypeError, KeyError) as mistake:
            raise CheckpointError(f"snapshot: cannot be continued by this version ({mistake})") from None
        if video is not None:
            stream.read(self.video_input(video, stream.encoder, stream.frames_read))
        return stream

    def _snapshot_shapes(self, scheme: PartitionScheme) -> dict[str, jax.ShapeDtypeStruct]:
        """What the arrays of a snapshot look like."""
        frame = self.config.dit.latent[1:]
        state = jax.eval_shape(lambda: streaming.initial_state(jax.random.key(0)[None], scheme, frame))
        shapes = state._asdict() | {"keys": jax.eval_shape(jax.random.key_data, state.keys)}
        shapes["unshown"] = jax.ShapeDtypeStruct((1, scheme.num_references, *frame), jnp.float32)
        for part, initial in (("decoder", initial_decoder_state), ("encoder", initial_encoder_state)):
            leaves = jax.eval_shape(lambda initial=initial: initial(self.config.tae, 1, *self._size))
            shapes |= {f"{part}_{index}": leaf for index, leaf in enumerate(leaves)}
        return shapes

    def encode_prompt(self, prompt: str) -> Text:
        """The DiT's text input for one prompt. StreamDiTError where it has more bytes than the model takes."""
        if self.config.data.frame_rate_prompt:
            prompt = with_frame_rate(prompt, self.frame_rate)
        try:
            tokens, mask = tokenize(prompt, min(config.max_tokens for config in self.config.text))
        except ValueError as mistake:
            raise StreamDiTError(str(mistake)) from None
        return self._encode_text(self._text_params, tokens[None], mask[None])

    def cache_text(self, text: Text) -> CachedText:
        """What the step takes of a text; to be computed when the text changes, not at every step."""
        return self._cache_text(self._dit_params, text)

    def null_text(self, per_chunk_prompts: bool = False) -> CachedText:
        """The empty prompt, which guidance leads away from, as the step takes it; in the form of prompts per chunk
        where asked.
        """
        if ("null", per_chunk_prompts) not in self._constants:
            null = self.encode_prompt("")
            if per_chunk_prompts:
                null = side_by_side(null, null, np.zeros((1, self.config.dit.latent[0]), bool))
            self._constants["null", per_chunk_prompts] = self.cache_text(null)
        return self._constants["null", per_chunk_prompts]

    def no_source(self, scheme: PartitionScheme) -> streaming.Source:
        """No input, for a chunk of one stream."""
        size = scheme.chunk_size
        if ("source", size) not in self._constants:
            latents = np.zeros((1, size, *self.config.dit.latent[1:]), np.float32)
            self._constants["source", size] = jax.device_put(streaming.Source(latents, np.zeros((1, size), np.float32)))
        return self._constants["source", size]

    def row(self, table: Timetable, step: int) -> streaming.Row:
        """The row of a micro step, [1, …], on the device: they repeat, and streams share them, so that a forward takes
        nothing from the host.
        """
        kind = table.scheme, table.filling, table.given_references, table.refill
        return self._row(table.row(step), "row", *kind, table.place(step))

    def idle_row(self, scheme: PartitionScheme) -> streaming.Row:
        """The row that changes nothing, as `row`."""
        return self._row(streaming.idle_row(scheme), "idle", scheme.buffer_size)

    def _row(self, row: streaming.Row, *name: Any) -> streaming.Row:
        if name not in self._constants:
            self._constants[name] = jax.device_put(streaming.stack_rows([row]))
        return self._constants[name]

    def encode_frames(self, frames: np.ndarray, state: Any = None) -> tuple[jax.Array, Any]:
        """Frames uint8 [F, H, W, 3] of one video → latents [1, f, h, w, C] and the encoder's state to carry on; None
        starts a video.
        """
        if state is None:
            state = initial_encoder_state(self.config.tae, 1, *self._size)
        return self._encode_frames(self._tae_params, frames, state)

    def video_input(self, video: Iterable[np.ndarray], state: Any = None, frames_read: int = 0) -> VideoInput:
        """Frames uint8 [H, W, 3], or arrays of them, to steer a stream with; state, frames_read: to continue one."""
        return VideoInput(self.encode_frames, frames_of(video, *self._size), self.latent_frames, state, frames_read)

    def encode_video(self, video: np.ndarray) -> jax.Array:
        """Video [b, F, H, W, 3] in [−1, 1] → normalised latents [b, f, h, w, C]."""
        return self._encode_video(self._tae_params, video)

    def decode(self, latents: Any, state: Any) -> tuple[Any, Any]:
        """Latents [b, f, h, w, C] → uint8 frames [b, F, H, W, 3] and the decoder's state to carry on; None starts a
        video.

        Of videos that live apart: tuples of latents and of states of one video each give tuples of both.
        """
        if isinstance(latents, tuple):
            state = tuple(self.initial_decoder(1) if one is None else one for one in state)
        else:
            state = self.initial_decoder(len(latents)) if state is None else state
        return self._decode(self._tae_params, latents, state)

    def initial_decoder(self, batch: int) -> Any:
        """The decoder's state at the start of a video."""
        if ("decoder", batch) not in self._starts:
            begin = functools.partial(compiled.begin_decoding, self.config.tae, batch, self._size)
            self._starts["decoder", batch] = self._compiled("initial_decoder", begin, batch)
        return self._starts["decoder", batch](None)

    def step(self, scheme: PartitionScheme, masked: bool):
        """The compiled step (state, row, condition, source=None) → (state, front) of a batch of streams, shared by all
        schemes of equal K, N and c.

        Streams that live apart go through one forward, too: tuples of states, rows, conditions and sources of a batch
        of one each give tuples of states and fronts.
        """
        shape = PartitionScheme(scheme.num_references, scheme.num_chunks, scheme.chunk_size, 1)
        if (shape, masked) not in self._steps:
            compile_step = functools.partial(self._compiled, "step")
            self._steps[shape, masked] = compiled.streaming_step(self.config.dit, shape, masked, compile_step)
        return functools.partial(self._steps[shape, masked], self._dit_params)
