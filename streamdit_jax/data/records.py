"""Clips on disk: ArrayRecord files with TFDS metadata, so that `tfds.builder_from_directory(directory)` reads them too.

One example is one clip:
  - kind "pixels":  `video`   uint8   [F, H, W, 3]
  - kind "latents": `latents` float16 [f, h, w, C]
  - `captions`: one or more strings
  - `info`:     JSON text: the roadtrip's factors and seed, or a file's name and clip number

Latents are float16: they are normalised to unit variance per channel, so its 11 bits (relative error 5e-4) lie two
orders of magnitude below the 0.1 σ of noise that costs the decoder half a decibel, and the files are half as large
as float32. bfloat16 would keep 8 bits and TFDS cannot store it.

Arrays are stored as raw bytes (TFDS's default encoding is 40 times slower to write); ArrayRecord compresses each record
with zstd, whose window of 1 MiB reaches over dozens of frames and so finds what they share. No TensorFlow is imported.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from streamdit_jax.errors import DataError

KINDS = {"pixels": ("video", np.uint8), "latents": ("latents", np.float16)}
VERSION = "1.0.0"
WRITER_OPTIONS = "group_size:1"  # a random access reads and decompresses one clip only
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def clip_features(kind: str, shape: tuple[int, int, int, int]) -> tfds.features.FeaturesDict:
    """TFDS features of one clip of `kind` ("pixels" or "latents"); `shape`: its frames, height, width and channels."""
    key, dtype = KINDS[kind]
    return tfds.features.FeaturesDict(
        {
            key: tfds.features.Tensor(shape=tuple(shape), dtype=dtype, encoding="bytes"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "info": tfds.features.Text(),
        }
    )


def serialize(features: tfds.features.FeaturesDict, example: Mapping[str, Any]) -> bytes:
    """What `features.serialize_example` gives, but the same bytes in every process: a protobuf's map has no order."""
    serializer = ExampleSerializer(features.get_serialized_info())
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)


def clip_example(kind: str, clip: Mapping[str, Any], name: str = "clip") -> dict[str, Any]:
    """Checks one clip and turns it into what `clip_features` serialises.

    `clip` has the array under "video" (pixels) or "latents" (any float type, stored as float16), "captions": list
    of strings (at least one), and optionally "info": a dict that JSON can hold. DataError, starting with `name`,
    says what is wrong.
    """
    key, dtype = KINDS[kind]
    array, captions = np.asarray(clip[key]), clip["captions"]
    if array.ndim != 4 or 0 in array.shape or (kind == "pixels" and array.shape[-1] != 3):
        want = "[frames, height, width, 3]" if kind == "pixels" else "[frames, height, width, channels]"
        raise DataError(f"{name}: {key} has shape {list(array.shape)}; it must be {want}")
    if kind == "pixels" and array.dtype != np.uint8:
        raise DataError(f"{name}: video is {array.dtype}; pixels must be uint8")
    if kind == "latents":
        limit = np.finfo(np.float16).max
        if not np.all(np.abs(array) <= limit):  # also false for NaN
            raise DataError(f"{name}: latents hold a value that is not finite or above {limit:.0f} (float16)")
    if isinstance(captions, str) or not captions or not all(isinstance(c, str) for c in captions):
        raise DataError(f"{name}: captions must be a list of at least one string, not {captions!r:.60}")
    info = json.dumps(clip.get("info", {}), sort_keys=True)
    return {key: np.ascontiguousarray(array, dtype), "captions": list(captions), "info": info}


class SplitWriter:
    """Streams serialised clips into files of about `shard_bytes`, in order; `finish` gives them their final names."""

    def __init__(self, directory: Path, dataset: str, split: str, shard_bytes: int):
        self._directory, self._dataset, self._split, self._limit = directory, dataset, split, shard_bytes
        self._paths: list[Path] = []
        self.lengths: list[int] = []
        self._total = self._in_shard = 0
        self._writer = None

    def write(self, record: bytes):
        if self._writer is None or self._in_shard + len(record) > self._limit:
            self.close()
            self._paths.append(self._directory / f"{self._split}.{len(self._paths)}")
            self.lengths.append(0)
            self._in_shard = 0
            self._writer = ArrayRecordWriter(str(self._paths[-1]), WRITER_OPTIONS)
        self._writer.write(record)
        self.lengths[-1] += 1
        self._in_shard += len(record)
        self._total += len(record)

    def close(self):
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *failure):
        # Only frees the file: what failed before is the error to show, and `finish` proves the files.
        with contextlib.suppress(RuntimeError, OSError):
            self.close()

    def finish(self) -> tfds.core.SplitInfo:
        """Closes and checks the files; their split's metadata. DataError when a file does not hold what was written."""
        self.close()
        template = _template(self._directory, self._dataset, self._split)
        for index, (path, length) in enumerate(zip(self._paths, self.lengths)):
            # The writer reports a full disk late or not at all: only the reader's count proves the file.
            check_shard(path, length)
            path.rename(template.sharded_filepath(shard_index=index, num_shards=len(self._paths)))
        return tfds.core.SplitInfo(
            name=self._split, shard_lengths=self.lengths, num_bytes=self._total, filename_template=template
        )


def _template(directory: Path, dataset: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=str(directory), template=_TEMPLATE, dataset_name=dataset, split=split, filetype_suffix="array_record"
    )


def shard_path(directory: Path, kind: str, split: str, index: int, shards: int) -> Path:
    """The name of one file of a split."""
    return Path(_template(directory, kind, split).sharded_filepath(shard_index=index, num_shards=shards))


def check_shard(path: Path, length: int):
    """DataError where a file is no complete ArrayRecord file of `length` clips. Its index is read, not its clips."""
    try:
        reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0")
        count = reader.num_records()
        reader.close()  # raises for a file without its footer, which opens with 0 records
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{path}: not a complete ArrayRecord file ({_first_line(error)}); write the records again"
        ) from error
    if count != length:
        raise DataError(
            f"{path}: holds {count} clips where {length} were written; it is damaged: write the records again"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def write_records(
    directory: str | os.PathLike,
    examples: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    kind: str,
    metadata: Mapping[str, Any] | None = None,
    shard_bytes: int = 256 << 20,
) -> "Records":
    """Writes clips to `directory` and opens its first split. Nothing bears the final name until everything is written.

    `examples`: an iterable of clips as in `clip_example` (the split is then "train"), or a dict from split name to
    such an iterable. All clips have one shape. They are written in order, one at a time: memory holds one clip.
    `kind`: "pixels" or "latents". `metadata`: a dict that JSON can hold; `kind` and `shape` are added to it.
    `shard_bytes`: uncompressed bytes per file.

    DataError: the directory already holds something, a clip is malformed or of another shape, no clips, or the disk
    is full.
    """
    directory = Path(directory)
    if kind not in KINDS:
        raise DataError(f"{directory}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    check_free(directory)
    splits = examples if isinstance(examples, Mapping) else {"train": examples}
    partial = directory.parent / f".{directory.name}.incomplete-{os.getpid()}-{threading.get_ident()}"
    with writing(directory):
        partial.mkdir(parents=True)
    try:
        shape, infos = None, []
        for split, clips in splits.items():
            with SplitWriter(partial, kind, split, shard_bytes) as writer:
                for index, clip in enumerate(clips):
                    name = f"{directory}: {split} clip {index}"
                    example = clip_example(kind, clip, name)
                    array = example[KINDS[kind][0]]
                    if shape is None:
                        shape, features = array.shape, clip_features(kind, array.shape)
                    if array.shape != shape:
                        raise DataError(f"{name} has shape {list(array.shape)}; the clips before it have {list(shape)}")
                    with writing(directory):
                        writer.write(serialize(features, example))
                if not writer.lengths:
                    raise DataError(f"{directory}: split {split!r} has no clips; at least one is needed")
                with writing(directory):
                    infos.append(writer.finish())
        with writing(directory):
            _write_metadata(partial, kind, shape, infos, metadata or {})
            check_free(directory)
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_records(directory, next(iter(splits)))


def write_metadata(
    directory: Path,
    kind: str,
    shape: tuple[int, ...],
    splits: Mapping[str, Sequence[tuple[int, int]]],
    metadata: Mapping[str, Any],
):
    """Makes records of files that bear the names of `shard_path`; `splits`: name → (clips, bytes) of each file."""
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[clips for clips, _ in files],
            num_bytes=sum(size for _, size in files),
            filename_template=_template(directory, kind, name),
        )
        for name, files in splits.items()
    ]
    _write_metadata(directory, kind, shape, infos, metadata)


def _write_metadata(directory: Path, kind: str, shape, infos, metadata: Mapping[str, Any]):
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=clip_features(kind, shape),
        split_infos=infos,
        version=VERSION,
        check_data=False,  # its check reads through TensorFlow
        description=f"StreamDiT clips: {kind}.",
        metadata=tfds.core.MetadataDict({**metadata, "kind": kind, "shape": list(shape)}),
    )


@contextlib.contextmanager
def writing(target: str | os.PathLike):
    """Turns what file systems and ArrayRecord raise (a full disk, no permission) into a DataError naming `target`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DataError(f"{target}: could not be written: {_first_line(error)}") from error


def check_free(directory: str | os.PathLike):
    """DataError when `directory` exists and is not an empty directory: finished records are never overwritten."""
    directory = Path(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if (directory / "dataset_info.json").exists():
        raise DataError(f"{directory}: already holds finished records; delete it or write to another directory")
    if directory.exists():
        raise DataError(f"{directory}: exists and is not an empty directory; write to another directory")


class Records:
    """Random access to one split of a directory of clips; safe to read from several threads.

    `kind` "pixels" or "latents"; `shape` (F, H, W, C) of every clip; `metadata`: what its writer said; `splits`:
    names of all splits. `records[i]` → {"video" or "latents": array (read-only), "captions": list of str, "info":
    dict}.
    """

    def __init__(self, directory: Path, split: str, builder: tfds.core.DatasetBuilder, metadata: dict[str, Any]):
        self.directory, self.split, self.metadata = directory, split, metadata
        self.kind: str = metadata["kind"]
        self.key, self.dtype = KINDS[self.kind]
        self.splits: tuple[str, ...] = tuple(builder.info.splits)
        self.shape: tuple[int, int, int, int] = tuple(builder.info.features[self.key].shape)
        self._files = [Path(p) for p in builder.info.splits[split].filepaths]
        self._source = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)} in {self.directory}")
        try:
            example = self._source[index]
            return {
                self.key: example[self.key],
                "captions": [c.decode() for c in example["captions"]],
                "info": json.loads(example["info"]),
            }
        except (RuntimeError, ValueError, KeyError) as error:
            files = self._files[0] if len(self._files) == 1 else self.directory
            raise DataError(
                f"{files}: clip {index} of split {self.split!r} is damaged: {_first_line(error)}"
            ) from error


def open_records(directory: str | os.PathLike, split: str = "train") -> Records:
    """Opens one split of what `write_records`, `prepare_roadtrip` or `streamdit encode` wrote.

    DataError, naming the directory or file: it is missing, not ours, of an unknown kind, lacks `split`, or a file
    is missing or truncated (every file's index is read; a flipped bit inside a clip is found by its checksum when
    that clip is read).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; write clips there with `streamdit encode`")
    if not (directory / "dataset_info.json").exists():
        raise DataError(
            f"{directory}: holds no records (dataset_info.json is missing); write them with `streamdit encode`"
        )
    try:
        builder = tfds.builder_from_directory(str(directory))
        metadata = dict(builder.info.metadata.items())
    except Exception as error:  # the protobuf, JSON and TFDS layers each raise their own types for damaged metadata
        raise DataError(f"{directory}: its metadata cannot be read: {_first_line(error)}") from error
    kind = metadata.get("kind")
    if kind not in KINDS or KINDS[kind][0] not in builder.info.features:
        raise DataError(
            f"{directory}: a foreign dataset (metadata.json names kind {kind!r}); ours is {' or '.join(KINDS)}"
        )
    if split not in builder.info.splits:
        raise DataError(f"{directory}: has no split {split!r}; it has {', '.join(builder.info.splits)}")
    info = builder.info.splits[split]
    for path, length in zip(info.filepaths, info.shard_lengths):
        if not Path(path).exists():
            raise DataError(f"{path}: missing; the records in {directory} are incomplete")
        check_shard(Path(path), length)
    return Records(directory, split, builder, metadata)
