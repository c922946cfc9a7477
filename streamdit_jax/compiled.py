"""The functions that a pipeline compiles: parameters first, arrays in, arrays out. Each closes over no more than
configurations, which come before the parameters.

Streams that live apart come as tuples of batches of one, and leave so: they are joined and parted inside.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import stream as streaming
from streamdit_jax.models.dit import DiT, DiTConfig
from streamdit_jax.models.tae import TAE, TAEConfig, initial_decoder_state
from streamdit_jax.models.text import TextConfig, TextEncoder
from streamdit_jax.models.text_cache import Text
from streamdit_jax.partition import PartitionScheme


def encode_text(configs: Sequence[TextConfig], params: Any, tokens: jax.Array, mask: jax.Array) -> Text:
    """Every encoder's sequence [b, t, width] and mask, the `text` of a DiT, for tokens int32 and mask bool [b, t].
    params: {"0": …, "1": …, …}.
    """
    return tuple(
        (TextEncoder(config).apply({"params": params[str(index)]}, tokens, mask), mask)
        for index, config in enumerate(configs)
    )


def encode_video(config: TAEConfig, params: Any, video: jax.Array) -> jax.Array:
    """Video [b, F, H, W, 3] in [−1, 1] → normalised latents [b, f, h, w, C]."""
    return TAE(config).apply({"params": params}, video, method=TAE.encode)[0]


def encode_frames(config: TAEConfig, params: Any, frames: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    """Frames uint8 [F, H, W, 3] of one video → latents [1, f, h, w, C] and the encoder's state."""
    video = frames[None].astype(jnp.float32) / 127.5 - 1
    return TAE(config).apply({"params": params}, video, state, method=TAE.encode)


def decode(config: TAEConfig, dtype: Any, params: Any, latents: Any, state: Any) -> tuple[Any, Any]:
    """Latents [b, f, h, w, C] → uint8 frames [b, F, H, W, 3] and the decoder's state; or tuples of both. dtype: of the
    arithmetic.
    """
    apart = isinstance(latents, tuple)
    if apart:
        latents, state = _join(latents), _join(state)
    video, state = TAE(config, dtype).apply({"params": params}, latents, state, method=TAE.decode)
    state = jax.tree.map(lambda x: x.astype(jnp.float32), state)  # as a snapshot has it, on whatever device
    video = jnp.clip(jnp.round((video + 1) * 127.5), 0, 255).astype(jnp.uint8)
    return (_split(video), _split(state)) if apart else (video, state)


def begin_decoding(config: TAEConfig, batch: int, size: tuple[int, int], _: None) -> Any:
    """The decoder's state at the start of a video. size: height and width of its frames."""
    return initial_decoder_state(config, batch, *size)


def begin(
    scheme: PartitionScheme,
    frame: tuple[int, ...],
    filling: str,
    _: None,
    seed: jax.Array,
    source: Any,
    references: Any,
) -> streaming.StreamState:
    """A stream's buffer of noise. seed: uint32 [1]."""
    keys = jax.vmap(jax.random.key)(seed)
    return streaming.initial_state(keys, scheme, frame, filling, source=source, references=references)


def renew(
    scheme: PartitionScheme, _: None, state: streaming.StreamState, level: jax.Array | np.float32
) -> streaming.StreamState:
    """A buffer that is to be filled anew, its first frame put back to a level."""
    return streaming.renew(state, scheme, level)


def streaming_step(config: DiTConfig, scheme: PartitionScheme, masked: bool, compiled: Callable | None = None) -> Any:
    """The jitted (params, state, row, condition, source=None) → (state, front) behind `Pipeline.step`; the state is
    donated. `streamdit plan` compiles it for devices that are not there. compiled: in place of `jax.jit`, with the
    facts that the function closes over.
    """

    def step(params, state, row, condition, source=None):
        def velocity(latents, text, levels, *present):
            return DiT(config).apply({"params": params}, latents, levels, text, *present)

        apart = not isinstance(state, streaming.StreamState)
        if apart:
            state, row, condition, source = map(_join, (state, row, condition, source))
        result = streaming.step(velocity, state, row, condition, scheme, source, masked=masked)
        return tuple(map(_split, result)) if apart else result

    if compiled is None:
        return jax.jit(step, donate_argnums=1)
    return compiled(step, scheme, masked, donate_argnums=(1,))


def _join(trees: tuple) -> Any:
    """Pytrees of one example each as a batch."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _split(tree: Any) -> tuple:
    """A batch as pytrees of one example each."""
    count = len(jax.tree.leaves(tree)[0])
    return tuple(jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], tree) for index in range(count))
