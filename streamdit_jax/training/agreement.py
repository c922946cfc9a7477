"""What the processes of a run tell each other beside the compiled step: short texts, by JAX's coordination service.

No device takes part, so it works while a device computes, hangs, or does not exist yet. Every process makes the same
`gather` calls in the same order. One process alone needs no service.
"""

import itertools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from streamdit_jax.errors import ConfigError

# Waiting for the others has no limit of its own: one may render data for hours. Who is dead or hangs is the watch's
# business (`training.watch`), which ends the waiting process.
WEEK = 7 * 24 * 3600 * 1000  # milliseconds
DIFFERENCES = 5  # named in one message

_calls = itertools.count()
_boards = itertools.count()


class Board:
    """Named texts that every process reads and writes. Processes make their boards in the same order."""

    def __init__(self):
        self._client, self._root = _client(), f"streamdit/board/{next(_boards)}"

    def put(self, name: str, text: str) -> None:
        """Writes, or writes over. `name` is "folder/name"."""
        self._client.key_value_set(f"{self._root}/{name}", text, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """name → text of all that is there."""
        entries = self._client.key_value_dir_get(f"{self._root}/{folder}")
        return {key.rsplit("/", 1)[1]: text for key, text in entries}


def gather(text: str) -> list[str]:
    """Each process's text, by process; returns when all have given theirs, so it is a barrier, too."""
    if jax.process_count() == 1:
        return [text]
    client, folder = _client(), f"streamdit/gather/{next(_calls)}"
    client.key_value_set(f"{folder}/{jax.process_index()}", text)
    client.wait_at_barrier(folder, WEEK)
    texts = {key.rsplit("/", 1)[1]: value for key, value in client.key_value_dir_get(folder)}
    return [texts[str(process)] for process in range(jax.process_count())]


def require_same(what: Mapping[str, Any]) -> None:
    """ConfigError on every process, naming fields and processes, unless all were given the same.

    what: anything that JSON can say; a configuration, versions, a stage.
    """
    mine = json.dumps(what, sort_keys=True, default=str)
    if len(set(gather(str(zlib.crc32(mine.encode()))))) == 1:
        return
    texts = gather(mine)
    for process, text in enumerate(texts):
        if text != texts[0]:
            found = differences(json.loads(texts[0]), json.loads(text))
            more = f" and {len(found) - DIFFERENCES} more" if len(found) > DIFFERENCES else ""
            named = "; ".join(
                f"{field}: {json.dumps(ours)} on process 0, {json.dumps(theirs)} on process {process}"
                for field, ours, theirs in found[:DIFFERENCES]
            )
            raise ConfigError(f"{named}{more}; all processes of a run need the same")


def differences(one: Any, other: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    """(field, one's value, other's) for all in which two configurations differ; None where one has no such field."""
    if isinstance(one, dict) and isinstance(other, dict):
        parts: Iterable[list] = (
            differences(one.get(name), other.get(name), f"{field}.{name}" if field else str(name))
            for name in sorted(one.keys() | other.keys(), key=str)
        )
        return [difference for part in parts for difference in part]
    return [] if one == other else [(field or "all of it", one, other)]


def _client():
    # JAX has no public name for its client; jax.experimental and Orbax use this one.
    from jax._src import distributed

    return distributed.global_state.client
