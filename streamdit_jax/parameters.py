"""A model's parameters: fresh ones, their shapes, and those of a model on disk where streaming wants them, on the
device, the transformer's layers apart.

The transformer's are in the type of the arithmetic. Those of autoencoder and text encoders, which compute in float32,
stay as they are stored beside a transformer in bfloat16, and are float32 otherwise: a number is the same in both. What
goes to the device goes there tensor by tensor, and stacked layers layer by layer, so that nothing is there twice.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from streamdit_jax import weights
from streamdit_jax.config import Config
from streamdit_jax.models.dit import DiT
from streamdit_jax.models.tae import TAE
from streamdit_jax.models.text import TextEncoder
from streamdit_jax.programs import Programs

PARTS = ("tae", "text", "dit")
_STACKED = "dit/blocks/"


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


def shapes(config: Config, programs: Programs | None = None) -> dict[str, Any]:
    """Shapes and types of the parameters of all parts, as `initialise` gives them. Finding them out takes a trace of
    the whole model; programs: where they are remembered.
    """

    def find() -> bytes:
        every = jax.eval_shape(functools.partial(initialise, config), jax.random.key(0))
        flat = traverse_util.flatten_dict(every, sep="/")
        return json.dumps({key: (leaf.shape, leaf.dtype.name) for key, leaf in flat.items()}).encode()

    found = json.loads(find() if programs is None else programs.remembered("shapes", config.to_json(), find))
    flat = {key: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for key, (shape, dtype) in found.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def load(directory: str | Path, described: Mapping[str, Any], config: Config, expected: Any) -> dict[str, Any]:
    """The parameters of a model on disk, as `Pipeline` takes them. described: its card. expected: shapes of all parts,
    layers stacked.

    Raises CheckpointError, naming the file or the parameter, where one is missing, damaged or of another shape.
    """
    stored = weights.part_shapes(directory, described, PARTS)
    for part in PARTS:
        weights.check_shapes(stored.get(part, {}), expected[part], f"{directory}: {part}")

    def put(key: str, tensor: np.ndarray) -> jax.Array:
        return _put(config, key, tensor)

    params = weights.load_parts(directory, described, PARTS, put, by_row=lambda key: key.startswith(_STACKED))
    by_layer = traverse_util.flatten_dict(params["dit"]["blocks"])
    count = config.dit.num_layers
    layers = [traverse_util.unflatten_dict({key: rows[i] for key, rows in by_layer.items()}) for i in range(count)]
    return {**params, "dit": {**params["dit"], "blocks": tuple(layers)}}


def place(config: Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of all parts, arrays of the host or of the device, as `load` gives them. The transformer's layers may
    be stacked or a tuple.
    """
    blocks = params["dit"]["blocks"]
    if not isinstance(blocks, tuple | list):
        count = len(jax.tree.leaves(blocks)[0])
        blocks = [jax.tree.map(lambda leaf, index=index: leaf[index], blocks) for index in range(count)]

    def put(prefix: str, tree: Any) -> Any:
        flat = traverse_util.flatten_dict(tree, sep="/")
        placed = {key: _put(config, prefix + key, leaf) for key, leaf in flat.items()}
        return traverse_util.unflatten_dict(placed, sep="/")

    rest = {key: value for key, value in params["dit"].items() if key != "blocks"}
    dit = {**put("dit/", rest), "blocks": tuple(put(_STACKED, layer) for layer in blocks)}
    return {"tae": put("tae/", params["tae"]), "text": put("text/", params["text"]), "dit": dit}


def _put(config: Config, key: str, leaf: Any) -> jax.Array:
    dtype = config.dit.compute_dtype
    if not key.startswith("dit/"):
        dtype = leaf.dtype if dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    dtype = weights.converted_type(key, leaf.dtype, dtype)
    if isinstance(leaf, jax.Array):
        return jnp.asarray(leaf, dtype)
    return jax.device_put(np.asarray(leaf).astype(dtype, copy=False))  # on the host, where nothing has to be compiled
