"""A stream at rest: one safetensors file with its facts as JSON. Nothing is unpickled."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from streamdit_jax.errors import CheckpointError

MARK = "streamdit_snapshot"
# What every snapshot tells, whichever version wrote it; the rest is between a stream and `Pipeline.resume`.
FACTS = {"fingerprint", "prompt", "guidance", "scheme", "filling"}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """facts: the model's fingerprint, scheme and filling, prompt and guidance as they stand, the stream's log, and how
    far its input video was read; arrays: the buffer, and the carried states of decoder and encoder.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def save(self, path: str | Path) -> None:
        """Writes one file, all or nothing. CheckpointError, naming it, where it cannot be written."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        described = json.dumps({**self.facts, "sha256": self._digest()})
        try:
            partial.write_bytes(safetensors.numpy.save(self.arrays, metadata={MARK: described}))
            os.replace(partial, path)
        except OSError as mistake:
            partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: the snapshot could not be written ({mistake.strerror or mistake})"
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """Reads a file that `save` wrote. CheckpointError, naming it, where it is missing, foreign, truncated or
        altered.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such snapshot")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                described = json.loads((file.metadata() or {})[MARK])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except KeyError:
            raise CheckpointError(f"{path}: is no snapshot of a stream") from None
        except (OSError, ValueError, safetensors.SafetensorError) as mistake:
            raise CheckpointError(f"{path}: is damaged or no snapshot ({mistake})") from None
        digest = described.pop("sha256", None)
        snapshot = cls(described, arrays)
        if digest != snapshot._digest():
            raise CheckpointError(f"{path}: is damaged: its contents do not match their SHA-256")
        if not described.keys() >= FACTS:
            missing = ", ".join(sorted(FACTS - described.keys()))
            raise CheckpointError(f"{path}: is damaged or no snapshot (it does not tell {missing})")
        return snapshot

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name in sorted(self.arrays):
            digest.update(name.encode() + np.ascontiguousarray(self.arrays[name]).tobytes())
        return digest.hexdigest()
