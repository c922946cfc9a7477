"""Programs that a new process finds ready, so that it starts within seconds: it neither traces the model nor lowers
it, and does not compile.

    traced and lowered   StableHLO in flatbuffers, by `jax.export`: `Programs`, one file for each function and its
                         arguments' shapes
    compiled             executables: JAX's own persistent compilation cache, beside them

Both are code that runs with the user's rights. So they are only read from directories that nobody else may write to,
and never from a model's directory; nothing is unpickled. What a program depends on is part of its name. A file that is
damaged, or is another's, is as good as none: it is made again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax import export

import streamdit_jax
from streamdit_jax import stream
from streamdit_jax.models.text_cache import CachedText

logger = logging.getLogger("streamdit_jax")
_MARK = b"streamdit program 1\n"
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "einops")
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Of JAX's own settings, those that say where and when things are kept or told, and so change no program.
_NO_PART_OF_PROGRAMS = (
    "cache",
    "guard",
    "log",
    "dump",
    "traceback",
    "distributed",
    "platforms",
    "profiler",
    "coordination",
)
# Kernels, cuDNN's among them, may change from version to version; versions are part of a program's name.
ANY_CALL = export.DisabledSafetyCheck.custom_call("ALL")
_KEPT = 256  # files; those that have not been used for longest go

for _type in (stream.StreamState, stream.Source, stream.Condition, stream.Row, CachedText):
    export.register_namedtuple_serialization(_type, serialized_name=f"streamdit_jax.{_type.__name__}")


class UnsafeCache(Exception):
    """A directory that is not used, such as one that others may write to; the message says why."""


class Programs:
    """A directory of programs, for functions that `jit` is given. Raises UnsafeCache where others may write to it, and
    OSError where it cannot be made.

    written, found: the names of the programs that this process has made, and that it has found ready.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(self.directory)
        self.written: list[str] = []
        self.found: list[str] = []
        self._lock = threading.RLock()

    def jit(self, name: str, function: Callable, facts: Any, donate_argnums: tuple[int, ...] = ()) -> "Program":
        """As `jax.jit`, for a function whose first argument are parameters, which have the same shapes in every call,
        or None. facts: what `function` closes over, whose repr is the same for the same program; with its name, the
        versions, the device and the arguments' shapes it tells programs apart.
        """
        return Program(self, name, function, repr(facts), donate_argnums)

    def remembered(self, name: str, facts: Any, make: Callable[[], bytes]) -> bytes:
        """What `make` gives, or gave another process of these versions, for these facts."""
        key = self._key(name, repr(facts))
        data = self._read(name, key)
        if data is None:
            data = make()
            self._write(name, key, data)
        return data

    def _key(self, *facts: str) -> str:
        return hashlib.sha256(json.dumps([*facts, _surroundings()]).encode()).hexdigest()

    def _path(self, name: str, key: str) -> Path:
        return self.directory / f"{name}-{key[:32]}.program"

    def _read(self, name: str, key: str) -> bytes | None:
        """The data of a program, if it is there, whole, of that key, and nobody else's."""
        path = self._path(name, key)
        try:
            opened = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            with open(opened, "rb") as file:
                _check_owner(path, os.fstat(file.fileno()), of_file=True)
                data = file.read()
        except FileNotFoundError:
            return None
        except (OSError, UnsafeCache) as mistake:
            logger.warning("%s: is not used: %s", path, mistake)
            return None
        head = _MARK + bytes.fromhex(key)
        digest, payload = data[len(head) : len(head) + 32], data[len(head) + 32 :]
        if not data.startswith(head) or hashlib.sha256(payload).digest() != digest:
            logger.warning("%s: is damaged or no program, and is made again", path)
            return None
        self.found.append(name)
        with contextlib.suppress(OSError):  # a cache that was filled for whoever comes is read-only
            os.utime(path)
        return payload

    def _write(self, name: str, key: str, payload: bytes) -> None:
        path = self._path(name, key)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(_MARK + bytes.fromhex(key) + hashlib.sha256(payload).digest() + payload)
            os.replace(partial, path)
            self._forget()
        except OSError as mistake:
            partial.unlink(missing_ok=True)
            logger.warning("%s: could not be written (%s); the next start takes longer", path, mistake.strerror)
            return
        self.written.append(name)

    def _forget(self) -> None:
        kept = sorted(self.directory.glob("*.program"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[_KEPT:]:
            path.unlink(missing_ok=True)


class Program:
    """A function, compiled for every set of shapes that it is called with: see `Programs.jit`."""

    def __init__(self, programs: Programs, name: str, function: Callable, facts: str, donate_argnums: tuple[int, ...]):
        self._programs, self._name, self._facts, self._donated = programs, name, facts, donate_argnums
        self._function = jax.jit(function, donate_argnums=donate_argnums)
        self._ready: dict[Any, Callable] = {}

    def __call__(self, *args: Any) -> Any:
        return self.ready(*args)(*args)

    def ready(self, *args: Any) -> Callable:
        """The compiled function for arguments of these shapes; they may be `jax.ShapeDtypeStruct`s."""
        shapes = _shapes(args[1:])
        if shapes not in self._ready:
            with self._programs._lock:
                if shapes not in self._ready:
                    self._ready[shapes] = self._find(args)
        return self._ready[shapes]

    def _cache_size(self) -> int:
        """How many sets of shapes it has been compiled for, as a jitted function tells."""
        return len(self._ready)

    def _find(self, args: tuple) -> Callable:
        programs, key = self._programs, self._programs._key(self._name, self._facts, repr(_shapes(args)))
        data = programs._read(self._name, key)
        if data is None:
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
            try:
                exported = export.export(self._function, disabled_checks=[ANY_CALL])(*abstract)
                data = bytes(exported.serialize())
            except (ValueError, NotImplementedError) as mistake:
                logger.warning("%s: cannot be kept for the next start: %s", self._name, str(mistake).split("\n")[0])
                return self._function
            programs._write(self._name, key, data)
        # Called as the next process calls it, so that both look for the same executable.
        call = export.deserialize(bytearray(data)).call
        return jax.jit(call, donate_argnums=self._donated)


def _shapes(args: tuple) -> tuple:
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@functools.cache
def _source() -> str:
    """A digest of this package's own source: who changes a line makes other programs."""
    digest = hashlib.sha256()
    root = Path(streamdit_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}


def _surroundings() -> dict[str, Any]:
    """All that a program depends on beside its function and its arguments."""
    device = jax.devices()[0]
    settings = {
        name: repr(value)
        for name, value in jax.config.values.items()
        if not any(word in name for word in _NO_PART_OF_PROGRAMS)
    }
    return {
        "source": _source(),
        "versions": _versions(),
        "python": sys.version_info[:2],
        "device": [device.platform, device.device_kind, device.client.platform_version],
        "settings": dict(sorted(settings.items())),
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }


# ---- where they are kept ----


@dataclasses.dataclass(frozen=True)
class Caches:
    """Where compiled code is kept; None for what is refused, and why."""

    executables: str | None
    programs: Programs | None
    refused: tuple[str, ...]


def enable_caches() -> Caches:
    """Turns JAX's persistent compilation cache on, for all programs however small, and opens the programs beside it.

    In JAX_COMPILATION_CACHE_DIR, or else in the user's own cache directory ($XDG_CACHE_HOME or ~/.cache). Neither is
    used where others than the user may write to it. Of an address, such as gs://…, it cannot be told who may: it is
    taken as given, for executables alone.
    """
    given = jax.config.jax_compilation_cache_dir
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamdit_jax"
    executables, programs, refused = given or str(base / "compiled"), None, []
    remote = "://" in executables
    try:
        if not remote:
            Path(executables).mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(Path(executables))
            for entry in os.scandir(executables):
                _check_owner(Path(entry.path), entry.stat())
    except (OSError, UnsafeCache) as mistake:
        refused.append(f"{executables}: compiled code is neither read nor kept here: {mistake}")
        executables = None
    try:
        if importlib.util.find_spec("flatbuffers") is None:
            raise UnsafeCache("jax.export needs flatbuffers: pip install flatbuffers")
        # Within JAX's own directory: who chooses one chooses both.
        programs = Programs(base / "programs" if remote else Path(given or base) / "programs")
    except (OSError, UnsafeCache) as mistake:
        if executables is not None:
            refused.append(f"programs are neither read nor kept: {mistake}")
    jax.config.update("jax_compilation_cache_dir", executables)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Caches(executables, programs if executables else None, tuple(refused))


def check_private(directory: Path) -> None:
    """Raises UnsafeCache where anyone but this user and the superuser may write to a directory, or put another in its
    place.
    """
    directory = directory.resolve()
    for place in (directory, *directory.parents):
        facts = place.stat()
        if place != directory and facts.st_mode & stat.S_ISVTX:
            continue  # as /tmp: others may write there, but not rename what is ours
        _check_owner(place, facts)


def _check_owner(path: Path, facts: os.stat_result, *, of_file: bool = False) -> None:
    if not hasattr(os, "getuid"):
        return
    if of_file and not stat.S_ISREG(facts.st_mode):
        raise UnsafeCache(f"{path} is no file")
    if facts.st_uid not in (os.getuid(), 0):
        raise UnsafeCache(f"{path} belongs to another user; it should be your own")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeCache(f"others may write to {path}; it should be yours alone: chmod go-w {path}")
