"""Window parallelism: tokens lie on several devices, cut at whole windows, and attention stays on each (StreamDiT
§4.1).

Devices hold tokens in token order, so unshifted windows need no communication. Before a layer whose windows are
shifted, the blocks that its windows have on other devices move there, and its output moves back: the hidden states
move, a quarter of what query, key, value and output would be. Which block goes where is planned here in NumPy, one
permutation of the devices for every distance between sender and receiver; distances that nothing travels are left out.
Any number of devices that divides the windows serves, and heads need not divide.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from streamdit_jax import sharding
from streamdit_jax.errors import ConfigError
from streamdit_jax.kernels import window_attention as kernels
from streamdit_jax.kernels.windows import TokenOrder, Windows

HEADS = ("batch", "tokens", "heads", None)


@dataclasses.dataclass(frozen=True, eq=False)
class Send:
    """One exchange: devices send to those at one distance from them.

    pairs: (sender, receiver) of those that have something to send. blocks: which of its blocks each device sends, as
        many for each as for the one that sends most.
    """

    pairs: tuple[tuple[int, int], ...]
    blocks: Int[np.ndarray, "devices count"]


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """A reordering of blocks over devices. take: for each place of a device, an index into its own blocks followed by
    those it receives, in the order of `sends`.
    """

    sends: tuple[Send, ...]
    take: Int[np.ndarray, "devices blocks"]


def plan_exchange(blocks: Int[np.ndarray, "blocks"], devices: int) -> Exchange:
    """The exchange after which place i holds what block blocks[i] held; devices hold equal runs of places."""
    local = blocks.size // devices
    sender, receiver = blocks // local, np.arange(blocks.size) // local
    distance = (receiver - sender) % devices
    take = np.where(distance == 0, blocks % local, -1)
    sends, received = [], local
    for step in range(1, devices):
        places = [np.flatnonzero((distance == step) & (sender == device)) for device in range(devices)]
        count = max(map(len, places))
        if not count:
            continue
        sent = np.zeros((devices, count), np.int32)
        for device, moved in enumerate(places):
            sent[device, : len(moved)] = blocks[moved] % local
            take[moved] = received + np.arange(len(moved))
        pairs = tuple((device, (device + step) % devices) for device, moved in enumerate(places) if len(moved))
        sends.append(Send(pairs, sent))
        received += count
    return Exchange(tuple(sends), take.reshape(devices, local).astype(np.int32))


@functools.cache
def layer_exchange(windows: Windows, devices: int, back: bool) -> Exchange:
    """The exchange from token order to a layer's order of windows, or back."""
    blocks = windows.blocks.ravel()
    return plan_exchange(np.argsort(blocks) if back else blocks, devices)


def _devices(windows: Windows) -> int:
    """Among how many devices the context cuts tokens. ConfigError where they do not divide the windows."""
    devices = sharding.parts("tokens")
    for count in (windows.blocks.shape[0], windows.order.num_windows):
        if count % devices:
            raise ConfigError(
                f"mesh.window: {devices} devices do not divide the {count} windows of {windows.order.grid} tokens; "
                f"use a divisor of {count}"
            )
    return devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _exchange(x, windows: Windows, devices: int, back: bool):
    """Moves blocks of [b, tokens, d]. A permutation, so its gradient is the way back: gathers only, no scatter."""
    plan = layer_exchange(windows, devices, back)
    axes = sharding.TABLE["tokens"]

    def local(x):
        here = jax.lax.axis_index(axes)
        x = rearrange(x, "b (blocks size) d -> b blocks size d", size=windows.order.block_size)
        pool = [x]
        for send in plan.sends:
            pool.append(jax.lax.ppermute(_pick(x, jnp.asarray(send.blocks)[here]), axes, send.pairs))
        x = _pick(jnp.concatenate(pool, axis=1), jnp.asarray(plan.take)[here])
        return rearrange(x, "b blocks size d -> b (blocks size) d")

    names = ("batch", "tokens", None)
    return sharding.map_shards(local, (x,), (names,), names)


def _pick(x: Float[Array, "b blocks size d"], places: Int[Array, "n"]) -> Float[Array, "b n size d"]:
    return x.at[:, places].get(mode="promise_in_bounds", unique_indices=True)


_exchange.defvjp(
    lambda x, *how: (_exchange(x, *how), None),
    lambda windows, devices, back, _, gradient: (_exchange(gradient, windows, devices, not back),),
)


def to_windows(x: Float[Array, "b tokens d"], windows: Windows) -> Float[Array, "b tokens d"]:
    """From token order to the order in which `window_attention` takes a layer's tokens.

    This is token order itself on a single device, where backends find their windows themselves. Raises ConfigError
    where the mesh's `window` does not divide the windows.
    """
    devices = _devices(windows)
    return x if devices == 1 or windows.is_reshape else _exchange(x, windows, devices, False)


def from_windows(x: Float[Array, "b tokens d"], windows: Windows) -> Float[Array, "b tokens d"]:
    """The way back from `to_windows`."""
    devices = _devices(windows)
    return x if devices == 1 or windows.is_reshape else _exchange(x, windows, devices, True)


def in_windows(table: np.ndarray, windows: Windows) -> np.ndarray:
    """A table with a row per token, from token order to that of `to_windows`."""
    return table if _devices(windows) == 1 or windows.is_reshape else table[_places(windows)]


def _places(windows: Windows) -> Int[np.ndarray, "tokens"]:
    """The tokens, by number in token order, in a layer's order of windows."""
    size = windows.order.block_size
    return (windows.blocks.reshape(-1, 1) * size + np.arange(size)).ravel().astype(np.int32)


def window_attention(
    query: Float[Array, "b tokens heads dim"],
    key: Float[Array, "b tokens heads dim"],
    value: Float[Array, "b tokens heads dim"],
    windows: Windows,
    key_mask: Bool[Array, "b tokens"] | None = None,
) -> Float[Array, "b tokens heads dim"]:
    """`kernels.window_attention` by each device on its examples, windows and heads; no backend sees a mesh.

    query, key, value: [batch, tokens, heads, head_dim] in the order of `to_windows`, as the result.
    key_mask: [batch, tokens] in token order; False for tokens that no one may attend to.
    """
    return _attend(kernels.window_attention, (query, key, value), HEADS, windows, key_mask)


def packed_window_attention(
    qkv: Float[Array, "b tokens 3 heads dim"], windows: Windows, key_mask: Bool[Array, "b tokens"] | None = None
) -> Float[Array, "b tokens heads dim"]:
    """`window_attention` of query, key and value side by side, as one product makes them.

    Where devices do not share the heads, they cross as the product's own [batch, tokens, columns]: a TPU's compiler
    lays an array with heads of its own otherwise, and would copy it, and the weights too.
    """
    if sharding.parts("heads") > 1:
        axes = ("batch", "tokens", None, "heads", None)
        return _attend(kernels.packed_window_attention, (qkv,), axes, windows, key_mask)
    parts = qkv.shape[2:]

    def attend(columns, *arguments, **named):
        return kernels.packed_window_attention(columns.reshape(*columns.shape[:2], *parts), *arguments, **named)

    return _attend(attend, (qkv.reshape(*qkv.shape[:2], -1),), ("batch", "tokens", "heads"), windows, key_mask)


def _attend(kernel, of_tokens, axes, windows: Windows, key_mask) -> Array:
    """The kernel by each device. of_tokens: arrays with a value per token, of these logical axes."""
    devices, segments, places = _devices(windows), None, None
    if devices > 1:
        # The mask stays whole and each device picks its own: layers of unlike windows would cut it in unlike ways.
        places = _places(windows) if key_mask is not None else None
        segments = windows.segments
        windows = _contiguous(windows, windows.blocks.shape[0] // devices)
    given = {
        "key_mask": (key_mask, ("batch", None if devices > 1 else "tokens")),
        "segments": (segments, ("tokens", None)),
        "places": (places, ("tokens",)),
    }
    given = {name: (jnp.asarray(array), axes) for name, (array, axes) in given.items() if array is not None}

    def local(*arrays):
        named = dict(zip(given, arrays[len(of_tokens) :]))
        if (mine := named.pop("places", None)) is not None:
            named["key_mask"] = named["key_mask"][:, mine]
        return kernel(*arrays[: len(of_tokens)], windows, **named)

    arrays = [*of_tokens, *(array for array, _ in given.values())]
    return sharding.map_shards(local, arrays, [axes] * len(of_tokens) + [axes for _, axes in given.values()], HEADS)


def _contiguous(windows: Windows, count: int) -> Windows:
    """`count` windows of this form that lie one after another, unshifted; their parts come as data."""
    frames, *sides = windows.window
    order = TokenOrder((count * frames, *sides), windows.window, windows.order.block)
    return Windows(order, windows.window, (0, 0, 0), (True, True, True))
