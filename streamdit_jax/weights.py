"""A model on disk: a directory with `model.json` and one safetensors file per part (tae, text, dit). Nothing is
unpickled.

    model.json   {"format": 1, "config": {…}, "parts": {"dit": {"file", "sha256", "parameters"}}, "card": {how it was
    made}}

Every file is written under a temporary name and renamed, `model.json` last, so that an interrupted save leaves the
former model whole.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from streamdit_jax.errors import CheckpointError

MODEL_FILE = "model.json"
FORMAT = 1


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as mistake:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: could not be written ({mistake.strerror or mistake}); what was there is unchanged"
        ) from None


def save_model(
    directory: str | Path,
    config: Mapping[str, Any],
    parts: Mapping[str, Any],
    card: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Writes a model directory.

    parts: name → nested dict of arrays. dtype: floating-point leaves are stored so ("bfloat16" halves the size).
        card: command, steps, hardware, metrics, seed. Raises CheckpointError, naming the file, where it cannot be
        written; an older model there stays as it was.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as mistake:
        raise CheckpointError(f"{directory}: cannot be a model directory ({mistake.strerror})") from None
    described, stale = {}, {path.name for path in directory.glob("*.safetensors")}
    for name, tree in parts.items():
        flat = {
            key: np.asarray(leaf).astype(
                jnp.dtype(dtype) if np.asarray(leaf).dtype.kind in "fV" else np.asarray(leaf).dtype
            )
            for key, leaf in traverse_util.flatten_dict(tree, sep="/").items()
        }
        data = safetensors.numpy.save(flat)
        digest = hashlib.sha256(data).hexdigest()
        # The digest in the name keeps the former model's files apart until model.json names the new ones.
        file = f"{name}-{digest[:8]}.safetensors"
        _write(directory / file, data)
        described[name] = {"file": file, "sha256": digest, "parameters": sum(leaf.size for leaf in flat.values())}
    text = json.dumps({"format": FORMAT, "config": config, "parts": described, "card": card}, indent=1)
    _write(directory / MODEL_FILE, text.encode())
    for name in stale - {part["file"] for part in described.values()}:
        (directory / name).unlink(missing_ok=True)


def load_card(directory: str | Path) -> dict[str, Any]:
    """`model.json` of a model directory. Raises CheckpointError where there is none, or it is no model of this
    format.
    """
    path = Path(directory) / MODEL_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: no model here; `streamdit train --workdir=DIR` writes one to DIR"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as mistake:
        raise CheckpointError(f"{path}: is damaged or not a model ({mistake})") from None
    if (
        not isinstance(described, dict)
        or described.get("format") != FORMAT
        or not {"config", "parts"} <= described.keys()
    ):
        raise CheckpointError(f"{path}: is not a streamdit model of format {FORMAT}")
    return described


def load_part(directory: str | Path, described: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One part's parameters, in the type they are stored in, as a nested dict.

    Raises CheckpointError, naming the file, where it is missing, truncated or altered.
    """
    if name not in described["parts"]:
        raise CheckpointError(
            f"{directory}: this model has no {name}; it has {', '.join(described['parts']) or 'nothing'}"
        )
    part = described["parts"][name]
    path = Path(directory) / part["file"]
    try:
        data = path.read_bytes()
    except OSError as mistake:
        raise CheckpointError(f"{path}: cannot be read ({mistake.strerror}), but {MODEL_FILE} names it") from None
    if hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise CheckpointError(
            f"{path}: is truncated or altered: its SHA-256 is not the one in {MODEL_FILE}; copy the model again"
        )
    # safetensors.numpy.load does not know bfloat16; safe_open does.
    with safetensors.safe_open(path, framework="numpy") as file:
        return traverse_util.unflatten_dict({key: file.get_tensor(key) for key in file.keys()}, sep="/")  # noqa: SIM118


def check_shapes(params: Any, expected: Any, where: str) -> None:
    """Raises CheckpointError, naming the first parameter, where the trees' names or shapes differ."""
    have, want = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, expected))
    for key in sorted(have.keys() | want.keys()):
        if key not in have or key not in want:
            raise CheckpointError(
                f"{where}: parameter {key} is {'missing' if key not in have else 'not part of this configuration'}"
            )
        if tuple(have[key].shape) != tuple(want[key].shape):
            raise CheckpointError(
                f"{where}: parameter {key} has shape {tuple(have[key].shape)}, not {tuple(want[key].shape)}"
            )


def average(directories: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mean of the weights of several models of one shape, as Movie Gen averages its fine-tuned ones (§3.3.3): their
    configuration, the first one's, and the parts.

    Summed in float32; a part that is the same file in all of them is that part. CheckpointError, naming the model,
    where one has other parts or parameters than the first.
    """
    cards = [load_card(directory) for directory in directories]
    names = sorted(cards[0]["parts"])
    for directory, card in zip(directories, cards):
        if (theirs := sorted(card["parts"])) != names:
            raise CheckpointError(
                f"{directory}: has the parts {', '.join(theirs)}, but {directories[0]} has {', '.join(names)}"
            )
    parts = {}
    for name in names:
        total = load_part(directories[0], cards[0], name)
        if len({card["parts"][name]["sha256"] for card in cards}) > 1:
            total = jax.tree.map(lambda x: x.astype(np.float32), total)
            for directory, card in zip(directories[1:], cards[1:]):
                other = load_part(directory, card, name)
                check_shapes(other, total, f"{directory}: {name}")
                total = jax.tree.map(lambda t, x: t + x.astype(np.float32), total, other)
            total = jax.tree.map(lambda x: x / np.float32(len(cards)), total)
        parts[name] = total
    return cards[0]["config"], parts
