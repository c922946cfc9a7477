"""A model on disk: a directory with `model.json` and the safetensors files of its parts (tae, text, dit). Nothing is
unpickled.

    model.json   {"format": 1, "config": {…}, "parts": {"dit": {"file", "sha256", "parameters"}}, "card": {how it was
    made}}

A part of more than a gibibyte lies in several files, so that they can be read side by side: format 2, whose parts have
{"files": [{"file", "sha256"}, …], "sha256": the digest of theirs, "parameters"}.

Every file is written under a temporary name and renamed, `model.json` last, so that an interrupted save leaves the
former model whole.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from streamdit_jax import weight_files
from streamdit_jax.errors import CheckpointError

MODEL_FILE = "model.json"
FORMATS = (1, 2)
BUNDLED = Path(__file__).with_name("bundled")


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{MODEL_FILE}"))


def find_model(name_or_directory: str | Path) -> Path:
    """The directory of a bundled model, of a model, or of the run that wrote one. CheckpointError where there is
    none.
    """
    bundled = BUNDLED / str(name_or_directory)
    if str(name_or_directory) in bundled_models():
        return bundled
    directory = Path(name_or_directory)
    for candidate in (directory, directory / "model"):
        if (candidate / MODEL_FILE).exists():
            return candidate
    raise CheckpointError(
        f"{name_or_directory}: no model of that name ships with the package "
        f"({', '.join(bundled_models()) or 'none does'}), and no {MODEL_FILE} lies in a directory of that name"
    )


def converted_type(key: str, stored: Any, dtype: Any) -> jnp.dtype:
    """The type that a leaf of that name has in a model of type `dtype`: quantised weights and their scales keep their
    own, and so does what is no floating-point number.
    """
    stored = jnp.dtype(stored)
    of_quantised = stored.itemsize == 1 or key.endswith("_scale")
    return stored if of_quantised or not jnp.issubdtype(stored, jnp.floating) else jnp.dtype(dtype)


def save_model(
    directory: str | Path,
    config: Mapping[str, Any],
    parts: Mapping[str, Any],
    card: Mapping[str, Any],
    dtype: str | None = "float32",
    file_bytes: int = weight_files.FILE_BYTES,
) -> None:
    """Writes a model directory.

    parts: name → nested dict of arrays. dtype: floating-point leaves are stored so ("bfloat16" halves the size), but
        for quantised ones; None: as they are. card: command, steps, hardware, metrics, seed. file_bytes: a part larger
        than that lies in several files. Raises CheckpointError, naming the file, where it cannot be written; an older
        model there stays as it was.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as mistake:
        raise CheckpointError(f"{directory}: cannot be a model directory ({mistake.strerror})") from None
    described, stale = {}, {path.name for path in directory.glob("*.safetensors")}
    for name, tree in parts.items():
        flat = traverse_util.flatten_dict(tree, sep="/")
        stored = (
            (key, np.asarray(leaf).astype(converted_type(key, leaf.dtype, dtype or leaf.dtype), copy=False))
            for key, leaf in sorted(flat.items())
        )
        files = weight_files.write(directory, name, stored, file_bytes)
        if len(files) > 1:
            files = [{"files": files, "sha256": _digest_of(files)}]
        described[name] = {**files[0], "parameters": sum(leaf.size for leaf in flat.values())}
    number = 2 if any("files" in part for part in described.values()) else 1
    text = json.dumps({"format": number, "config": config, "parts": described, "card": card}, indent=1)
    weight_files.write_file(directory / MODEL_FILE, text.encode())
    for name in stale - {one["file"] for part in described.values() for one in _files_of(part)}:
        (directory / name).unlink(missing_ok=True)


def _digest_of(files: Sequence[Mapping[str, str]]) -> str:
    return hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()


def _files_of(part: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    return part.get("files", [part])


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
        or described.get("format") not in FORMATS
        or not {"config", "parts"} <= described.keys()
    ):
        known = " or ".join(map(str, FORMATS))
        raise CheckpointError(f"{path}: is not a streamdit model of format {known}, which this version reads")
    for name, part in described["parts"].items():
        if "files" in part and part["sha256"] != _digest_of(part["files"]):
            raise CheckpointError(f"{path}: is damaged: the files of {name} are not those of its SHA-256")
    return described


def load_part(directory: str | Path, described: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One part's parameters on the host, in the type they are stored in, as a nested dict.

    Raises CheckpointError, naming the file, where it is missing, truncated or altered.
    """
    return load_parts(directory, described, [name], lambda key, tensor: tensor).get(name, {})


def load_parts(
    directory: str | Path,
    described: Mapping[str, Any],
    names: Sequence[str],
    place: Callable[[str, np.ndarray], Any],
    by_row: Callable[[str], bool] = lambda key: False,
) -> dict[str, Any]:
    """Several parts, all of their files read side by side: nested dicts of what `place` makes of each tensor, whose
    name is as "dit/blocks/feed_forward/up/kernel". by_row: of these it gets the rows of the first axis one by one, and
    a tuple is returned.

    Raises CheckpointError, naming the file, where one is missing, truncated or altered.
    """
    flat = weight_files.read(_files(directory, described, names), place, by_row)
    return traverse_util.unflatten_dict(flat, sep="/")


def part_shapes(directory: str | Path, described: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Shapes and types of the parameters of several parts, from what stands before them in their files; raises as
    `load_parts`, but for what only a digest tells.
    """
    return traverse_util.unflatten_dict(weight_files.shapes(_files(directory, described, names)), sep="/")


def _files(directory: str | Path, described: Mapping[str, Any], names: Sequence[str]) -> list[weight_files.File]:
    files = []
    for name in names:
        if name not in described["parts"]:
            raise CheckpointError(
                f"{directory}: this model has no {name}; it has {', '.join(described['parts']) or 'nothing'}"
            )
        for one in _files_of(described["parts"][name]):
            files.append(weight_files.File(f"{name}/", Path(directory) / one["file"], one["sha256"]))
    return files


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
    where one has other parts or parameters than the first, and for transformers that are quantised: the mean of scaled
    values is none of theirs.
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
            if any(jnp.dtype(leaf.dtype).itemsize == 1 for leaf in jax.tree.leaves(total)):
                raise CheckpointError(
                    f"{directories[0]}: its {name} is quantised, and scaled values have no mean; average the models "
                    "that these were made from, and quantise the result"
                )
            total = jax.tree.map(lambda x: x.astype(np.float32), total)
            for directory, card in zip(directories[1:], cards[1:]):
                other = load_part(directory, card, name)
                check_shapes(other, total, f"{directory}: {name}")
                total = jax.tree.map(lambda t, x: t + x.astype(np.float32), total, other)
            total = jax.tree.map(lambda x: x / np.float32(len(cards)), total)
        parts[name] = total
    return cards[0]["config"], parts
