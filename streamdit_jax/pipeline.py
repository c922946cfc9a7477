"""Text encoder, DiT and TAE as one thing: load(...) → .stream(prompt) → frames (StreamDiT §8; fig. 11).

A stream owns the moving buffer and the decoder's carried state, so that frames decoded chunk by chunk are those of
the whole clip. Prompt, guidance, seed and the levels of a scheme are data to one compiled step.
"""

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import stream as streaming
from streamdit_jax import weights
from streamdit_jax.config import Config, from_mapping
from streamdit_jax.errors import CheckpointError, ConfigError, StreamDiTError
from streamdit_jax.models.dit import DiT, Text, unstack
from streamdit_jax.models.tae import TAE, initial_decoder_state
from streamdit_jax.models.text import TextEncoder, tokenize
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.snapshot import Snapshot

BUNDLED = Path(__file__).with_name("bundled")


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{weights.MODEL_FILE}"))


def find_model(name_or_directory: str | Path) -> Path:
    """The directory of a bundled model, of a model, or of the run that wrote one. CheckpointError where there is
    none.
    """
    bundled = BUNDLED / str(name_or_directory)
    if str(name_or_directory) in bundled_models():
        return bundled
    directory = Path(name_or_directory)
    for candidate in (directory, directory / "model"):
        if (candidate / weights.MODEL_FILE).exists():
            return candidate
    raise CheckpointError(
        f"{name_or_directory}: no model of that name ships with the package "
        f"({', '.join(bundled_models()) or 'none does'}), and no {weights.MODEL_FILE} lies in a directory of that name"
    )


def load(name_or_directory: str | Path) -> "Pipeline":
    """A bundled model by name, or the directory that `streamdit train` or `convert` wrote.

    Raises CheckpointError where it is missing, foreign, truncated or altered; ConfigError where its configuration is
    impossible.
    """
    directory = find_model(name_or_directory)
    card = weights.load_card(directory)
    config = from_mapping(card["config"])
    params = {part: weights.load_part(directory, card, part) for part in ("tae", "text", "dit")}
    expected = jax.eval_shape(functools.partial(initialise, config), jax.random.key(0))
    for part, tree in expected.items():
        weights.check_shapes(params[part], tree, f"{directory}: {part}")
    fingerprint = "+".join(card["parts"][part]["sha256"][:16] for part in ("tae", "text", "dit"))
    return Pipeline(config, params, fingerprint)


def initialise(config: Config, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of all parts: {"tae", "text": {"0": …}, "dit"}; under `jax.eval_shape` only their shapes."""
    text_key, dit_key, tae_key = jax.random.split(key, 3)
    text, text_params = [], {}
    for index, of_encoder in enumerate(config.text):
        tokens, mask = jnp.zeros((1, of_encoder.max_tokens), jnp.int32), jnp.ones((1, of_encoder.max_tokens), bool)
        encoder = TextEncoder(of_encoder)
        text_params[str(index)] = encoder.init(jax.random.fold_in(text_key, index), tokens, mask)["params"]
        text.append((jnp.zeros((1, of_encoder.max_tokens, of_encoder.width)), mask))
    latents = jnp.zeros((1, *config.dit.latent))
    video = jnp.zeros((1, config.tae.compression[0], config.data.height, config.data.width, 3))
    return {
        "tae": TAE(config.tae).init(tae_key, video, tae_key)["params"],
        "text": text_params,
        "dit": DiT(config.dit).init(dit_key, latents, jnp.zeros(latents.shape[:2]), tuple(text))["params"],
    }


class Pipeline:
    """A model ready to stream. Compiled functions are shared by all of its streams."""

    def __init__(self, config: Config, params: dict[str, Any], fingerprint: str = "unsaved"):
        """params: {"tae", "text", "dit"} as `initialise` gives them. fingerprint: tells snapshots of different
        weights apart.
        """
        self.config, self.fingerprint = config, fingerprint
        dtype = config.dit.compute_dtype
        self._tae_params, self._text_params = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float32), (params["tae"], params["text"])
        )
        self._dit_params = unstack(jax.tree.map(lambda x: jnp.asarray(x, dtype), params["dit"]))
        self._steps: dict[tuple, Any] = {}
        self._encode_text = jax.jit(self._encode_text_once)
        self._decode = jax.jit(self._decode_once)
        self._encode_video = jax.jit(self._encode_video_once)

    @property
    def frame_rate(self) -> float:
        """Frames per second of the video."""
        return self.config.data.frame_rate

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

    def stream(
        self,
        prompt: str,
        seed: int = 0,
        *,
        scheme: PartitionScheme | str | None = None,
        guidance: float | None = None,
        filling: str | None = None,
    ) -> "Stream":
        """An endless video: an iterator of uint8 [frames, height, width, 3].

        scheme, guidance and filling are the model's own unless given. Raises ConfigError for a scheme that does not
        tile the buffer or an unknown filling, and StreamDiTError for a prompt that is too long.
        """
        sampling = self.config.sampling
        scheme, filling = self.scheme(scheme), filling or sampling.filling
        try:
            streaming.filling_rows(scheme, filling)
        except ValueError as mistake:
            raise ConfigError(str(mistake)) from None
        if not -(2**31) <= seed < 2**32:
            raise ConfigError(f"seed: a whole number of at most 32 bits, not {seed}")
        keys = jax.random.key(seed)[None]
        state = streaming.initial_state(keys, scheme, self.config.dit.latent[1:], filling)
        guidance = sampling.guidance if guidance is None else guidance
        return Stream(self, prompt, scheme, guidance, filling, state, decoder=None, row=0)

    def resume(self, snapshot: "Snapshot | str | Path") -> "Stream":
        """Continues a stream where `Stream.snapshot` left it, bit for bit. CheckpointError for another model's or a
        damaged snapshot.
        """
        snapshot = snapshot if isinstance(snapshot, Snapshot) else Snapshot.load(snapshot)
        if snapshot.facts["fingerprint"] != self.fingerprint:
            raise CheckpointError("snapshot: was made by a model with other weights; load that model to resume it")
        scheme = PartitionScheme.parse(snapshot.facts["scheme"])
        arrays = {name: jnp.asarray(value) for name, value in snapshot.arrays.items()}
        state = streaming.StreamState(
            *(arrays[name] for name in ("buffer", "queue", "present")),
            keys=jax.random.wrap_key_data(arrays["keys"]),
            next_chunk=arrays["next_chunk"],
        )
        decoder = tuple(arrays[f"decoder_{index}"] for index in range(snapshot.facts["decoder"])) or None
        of_stream = (snapshot.facts[name] for name in ("guidance", "filling"))
        return Stream(self, snapshot.facts["prompt"], scheme, *of_stream, state, decoder, snapshot.facts["row"])

    def encode_prompt(self, prompt: str) -> Text:
        """The DiT's text input for one prompt. StreamDiTError where it has more bytes than the model takes."""
        try:
            tokens, mask = tokenize(prompt, min(config.max_tokens for config in self.config.text))
        except ValueError as mistake:
            raise StreamDiTError(str(mistake)) from None
        return self._encode_text(self._text_params, tokens[None], mask[None])

    def _encode_text_once(self, params, tokens, mask) -> Text:
        return tuple(
            (TextEncoder(config).apply({"params": params[str(index)]}, tokens, mask), mask)
            for index, config in enumerate(self.config.text)
        )

    def _decode_once(self, params, latents, state):
        video, state = TAE(self.config.tae).apply({"params": params}, latents, state, method=TAE.decode)
        return jnp.clip(jnp.round((video + 1) * 127.5), 0, 255).astype(jnp.uint8), state

    def _encode_video_once(self, params, video):
        return TAE(self.config.tae).apply({"params": params}, video, method=TAE.encode)[0]

    def encode_video(self, video: np.ndarray) -> jax.Array:
        """Video [b, F, H, W, 3] in [−1, 1] → normalised latents [b, f, h, w, C]."""
        return self._encode_video(self._tae_params, video)

    def decode(self, latents: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Latents [b, f, h, w, C] → uint8 frames [b, F, H, W, 3] and the decoder's state to carry on; None starts a
        video.
        """
        if state is None:
            data = self.config.data
            state = initial_decoder_state(self.config.tae, len(latents), data.height, data.width)
        return self._decode(self._tae_params, latents, state)

    def step(self, scheme: PartitionScheme, masked: bool):
        """The compiled step (state, row, condition) → (state, front), shared by all schemes of equal K, N and c."""
        shape = PartitionScheme(scheme.num_references, scheme.num_chunks, scheme.chunk_size, 1)
        if (shape, masked) not in self._steps:

            def step(params, state, row, condition):
                def velocity(latents, text, levels, *present):
                    return DiT(self.config.dit).apply({"params": params}, latents, levels, text, *present)

                return streaming.step(velocity, state, row, condition, shape, masked=masked)

            self._steps[shape, masked] = jax.jit(step, donate_argnums=1)
        return functools.partial(self._steps[shape, masked], self._dit_params)


class Stream(Iterator[np.ndarray]):
    """An endless video. Each `next` gives the frames that left the buffer: uint8 [frames, height, width, 3].

    Set `prompt` or `guidance` at any time: they take effect at the next micro step. `seconds` sums the time
    spent in "forward" and "decode"; `forwards` counts micro steps.
    """

    def __init__(self, pipeline: Pipeline, prompt, scheme, guidance, filling, state, decoder, row: int):
        self._pipeline, self.scheme, self._filling = pipeline, scheme, filling
        self._state, self._decoder, self._row = state, decoder, row
        self._fill, self._flow = streaming.filling_rows(scheme, filling), streaming.streaming_rows(scheme)
        self._null = pipeline.encode_prompt("")
        self.seconds, self.forwards = {"forward": 0.0, "decode": 0.0}, 0
        self.prompt, self.guidance = prompt, guidance

    @property
    def prompt(self) -> str:
        """What the video shows. Setting it runs the text encoder; StreamDiTError for a prompt that is too long
        changes nothing.
        """
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._text, self._prompt = self._pipeline.encode_prompt(prompt), prompt

    @property
    def forwards_until_frames(self) -> int:
        """Micro steps until frames leave the buffer."""
        fill = len(self._fill.adopt)
        if self._row >= fill:
            return self.scheme.micro_steps - (self._row - fill) % self.scheme.micro_steps
        made = self.scheme.num_references > 0 and self._filling == "uniform"
        return fill - self._row + (0 if made else self.scheme.micro_steps)

    def __next__(self) -> np.ndarray:
        began = time.perf_counter()
        latents = None
        while latents is None:
            latents = self._forward()
        jax.block_until_ready(latents)
        denoised = time.perf_counter()
        frames, self._decoder = self._pipeline.decode(latents, self._decoder)
        frames = np.asarray(frames)[0]
        self.seconds["forward"] += denoised - began
        self.seconds["decode"] += time.perf_counter() - denoised
        return frames

    def _forward(self) -> jax.Array | None:
        """One micro step; the clean latents if frames left the buffer."""
        fill, references = len(self._fill.adopt), self.scheme.num_references
        if self._row < fill:
            row = streaming.row_at(self._fill, self._row)
        else:
            row = streaming.row_at(self._flow, (self._row - fill) % self.scheme.micro_steps)
        condition = streaming.Condition(self._text, self._null, np.full(1, self.guidance, np.float32))
        step = self._pipeline.step(self.scheme, masked=self._filling == "ramp")
        self._state, front = step(self._state, row, condition)
        self._row += 1
        self.forwards += 1
        if row.adopt and references:
            return self._state.buffer[:, :references]
        return front if row.advance else None

    def snapshot(self) -> Snapshot:
        """The stream between two micro steps, to `save`, `resume`, fork or move."""
        state = self._state
        arrays = {
            "buffer": state.buffer,
            "queue": state.queue,
            "present": state.present,
            "keys": jax.random.key_data(state.keys),
            "next_chunk": state.next_chunk,
        }
        decoder = self._decoder or ()
        arrays |= {f"decoder_{index}": leaf for index, leaf in enumerate(decoder)}
        facts = {
            "fingerprint": self._pipeline.fingerprint,
            "prompt": self.prompt,
            "guidance": float(self.guidance),
            "scheme": str(self.scheme),
            "filling": self._filling,
            "row": self._row,
            "decoder": len(decoder),
        }
        # Copies: the buffers themselves are donated to the next step.
        return Snapshot(facts, {name: np.array(value) for name, value in arrays.items()})
