"""The safetensors files that a model's parameters lie in: written in files of bounded size, and read side by side,
tensor by tensor, straight to where they belong.

A file is read once: what is hashed is what is placed. Host memory holds a few tensors at a time, whatever the model's
size, where `place` puts them elsewhere. A tensor larger than a file is cut along its first axis into several; the piece
that begins with row 7 is named "name@7".
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from streamdit_jax.errors import CheckpointError

FILE_BYTES = 2**30
THREADS = 8  # that read at the same time: a core hashes some 1–2 GB/s, a disk of several GB/s keeps as many busy
_TYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}

Place = Callable[[str, np.ndarray], Any]


class File(NamedTuple):
    """prefix: goes before the names of its tensors. sha256: what its contents must have."""

    prefix: str
    path: Path
    sha256: str


class _Tensor(NamedTuple):
    """A tensor of a file, or the rows of one from `row` on."""

    key: str
    row: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class _Header(NamedTuple):
    raw: bytes
    tensors: list[_Tensor]  # in the order of the bytes


# ---- writing ----


def write_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it. CheckpointError, naming it, where that fails; what was there
    is unchanged then.
    """
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


def write(directory: Path, name: str, leaves: Iterable[tuple[str, np.ndarray]], most: int) -> list[dict[str, str]]:
    """Writes tensors into files of at most `most` bytes each (a row is not cut), in the order given: their names and
    digests. Takes one file's tensors at a time from `leaves`. CheckpointError, naming the file, as `write_file`.
    """
    written = []
    for group in _groups(_pieces(leaves, most), most):
        data = safetensors.numpy.save(group)
        digest = hashlib.sha256(data).hexdigest()
        # The digest in the name keeps the former model's files apart until model.json names the new ones.
        written.append({"file": f"{name}-{digest[:8]}.safetensors", "sha256": digest})
        write_file(directory / written[-1]["file"], data)
    return written


def _groups(pieces: Iterable[tuple[str, np.ndarray]], most: int) -> Iterator[dict[str, np.ndarray]]:
    """What goes into each file; one at least."""
    group, size = {}, 0
    for key, piece in pieces:
        if group and size + piece.nbytes > most:
            yield group
            group, size = {}, 0
        group[key], size = np.asarray(piece, order="C"), size + piece.nbytes
    yield group


def _pieces(leaves: Iterable[tuple[str, np.ndarray]], most: int) -> Iterator[tuple[str, np.ndarray]]:
    for key, leaf in leaves:
        if leaf.nbytes <= most or leaf.ndim == 0 or len(leaf) < 2:
            yield key, leaf
            continue
        rows = max(1, most * len(leaf) // leaf.nbytes)
        for row in range(0, len(leaf), rows):
            yield f"{key}@{row}", leaf[row : row + rows]


# ---- reading ----


def shapes(files: Sequence[File]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the tensors, from the files' headers alone; raises as `read`."""
    return {
        key: jax.ShapeDtypeStruct(_whole(pieces), pieces[0].dtype)
        for key, pieces in _by_key(files, list(map(_header, files))).items()
    }


def read(
    files: Sequence[File], place: Place = lambda key, tensor: tensor, by_row: Callable[[str], bool] = lambda key: False
) -> dict[str, Any]:
    """What `place` makes of every tensor: it is called by several threads, with each tensor once, and may keep it.

    by_row: of these tensors, `place` gets the rows of the first axis one by one, and a tuple of what it made is
        returned.

    Raises CheckpointError, naming the file, where one is missing, truncated or altered; nothing is returned then.
    """
    headers = list(map(_header, files))
    pieces = _by_key(files, headers)
    reading = _Reading(place, by_row, pieces)
    with ThreadPoolExecutor(min(THREADS, max(1, len(files))), "weights") as pool:
        futures = [pool.submit(reading.file, file, header) for file, header in zip(files, headers)]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            reading.stopped = True  # at the next tensor, where one has failed
    return {
        key: tuple(made[row] for row in sorted(made)) if by_row(key) else made[0] for key, made in reading.made.items()
    }


class _Reading:
    """What the threads share."""

    def __init__(self, place: Place, by_row: Callable[[str], bool], pieces: dict[str, list[_Tensor]]):
        self._place, self._by_row, self._pieces = place, by_row, pieces
        self._lock, self._joined = threading.Lock(), {}
        self.made: dict[str, dict[int, Any]] = {key: {} for key in pieces}
        self.stopped = False

    def file(self, file: File, header: _Header) -> None:
        digest, before = hashlib.sha256(header.raw), None
        try:
            with open(file.path, "rb", buffering=0) as opened:
                opened.seek(len(header.raw))
                for tensor in header.tensors:
                    for key, row, value in self._tensor(opened, digest, tensor, file):
                        if self.stopped:
                            return
                        jax.block_until_ready(before)  # one on its way to the device, while the next is read
                        self.made[key][row] = before = value
        except OSError as mistake:
            raise CheckpointError(f"{file.path}: cannot be read ({mistake.strerror or mistake})") from None
        if digest.hexdigest() != file.sha256:
            raise _altered(file)

    def _tensor(self, opened: BinaryIO, digest: Any, tensor: _Tensor, file: File) -> Iterator[tuple[str, int, Any]]:
        """Reads one tensor of a file: what was placed, with its name and row."""
        key = file.prefix + tensor.key
        if self._by_row(key):
            for row in range(tensor.shape[0]):
                part = np.empty(tensor.shape[1:], tensor.dtype)
                _fill(opened, digest, part, file)
                yield key, tensor.row + row, self._place(key, part)
            return
        count = len(self._pieces[key])
        if count == 1:
            whole = np.empty(tensor.shape, tensor.dtype)
            _fill(opened, digest, whole, file)
            yield key, 0, self._place(key, whole)
            return
        with self._lock:
            whole, missing = self._joined.setdefault(key, (np.empty(_whole(self._pieces[key]), tensor.dtype), [count]))
        _fill(opened, digest, whole[tensor.row : tensor.row + tensor.shape[0]], file)
        with self._lock:
            missing[0] -= 1
            if missing[0]:
                return
            del self._joined[key]
        yield key, 0, self._place(key, whole)


def _fill(opened: BinaryIO, digest: Any, array: np.ndarray, file: File) -> None:
    """Reads the next bytes of a file into an array, which is contiguous, and adds them to the digest."""
    raw = array.reshape(-1).view(np.uint8)
    done = 0
    while done < len(raw):
        count = opened.readinto(raw[done:].data)
        if not count:
            raise _altered(file)
        done += count
    digest.update(raw.data)


def _altered(file: File) -> CheckpointError:
    return CheckpointError(
        f"{file.path}: is truncated or altered: its SHA-256 is not the one in model.json; copy the model again"
    )


def _header(file: File) -> _Header:
    """What a file says of its tensors. It is not to be believed before the digest is right, so nothing here trusts it
    further than the file is long.
    """
    try:
        with open(file.path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if length > size - 8:
                raise ValueError("longer than the file")
            opened.seek(0)
            raw = opened.read(8 + length)
        return _Header(raw, _tensors(json.loads(raw[8:]), size - len(raw)))
    except OSError as mistake:
        raise CheckpointError(
            f"{file.path}: cannot be read ({mistake.strerror or mistake}), but model.json names it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _altered(file) from None


def _tensors(described: dict[str, Any], size: int) -> list[_Tensor]:
    """The tensors of a header, whose bytes follow each other and end with the file; ValueError otherwise."""
    end, tensors = 0, []
    entries = [(name, facts) for name, facts in described.items() if name != "__metadata__"]
    for name, facts in sorted(entries, key=lambda entry: entry[1]["data_offsets"]):
        key, _, row = name.rpartition("@")
        key, row = (key, int(row)) if key and row.isdecimal() else (name, 0)
        tensor = _Tensor(key, row, np.dtype(_TYPES[facts["dtype"]]), tuple(map(int, facts["shape"])))
        if min(tensor.shape, default=0) < 0 or list(facts["data_offsets"]) != [end, end + tensor.nbytes]:
            raise ValueError(f"{name} is not where it should be")
        end += tensor.nbytes
        tensors.append(tensor)
    if end != size:
        raise ValueError("bytes are left over or missing")
    return tensors


def _by_key(files: Sequence[File], headers: Sequence[_Header]) -> dict[str, list[_Tensor]]:
    """The pieces of each tensor over all files, in order. CheckpointError where they are not all of it."""
    pieces: dict[str, list[_Tensor]] = {}
    for file, header in zip(files, headers):
        for tensor in header.tensors:
            pieces.setdefault(file.prefix + tensor.key, []).append(tensor)
    for key, parts in pieces.items():
        parts.sort(key=lambda tensor: tensor.row)
        row = 0
        for tensor in parts:
            if tensor.row != row or tensor.shape[1:] != parts[0].shape[1:] or tensor.dtype != parts[0].dtype:
                raise CheckpointError(f"{files[0].path.parent}: the pieces of {key} do not fit; copy the model again")
            row += tensor.shape[0] if tensor.shape else 1
    return pieces


def _whole(pieces: Sequence[_Tensor]) -> tuple[int, ...]:
    if len(pieces) == 1:
        return pieces[0].shape
    return (sum(tensor.shape[0] for tensor in pieces), *pieces[0].shape[1:])
