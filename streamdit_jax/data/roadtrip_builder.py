"""The roadtrip world as a TFDS dataset: splits train and held_out, pixels, in the format of `data.records`.

`prepare_roadtrip` renders once and reuses. The directory's name carries every parameter and a fingerprint of the
world, so a changed renderer or grammar never reads old clips. Everything follows from the seed: clip k of a split
has the factors and seed of `roadtrip.clip_factors(k, seed, split)`, whatever the number of workers.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tqdm import tqdm

from streamdit_jax.data import captions as grammar
from streamdit_jax.data import roadtrip
from streamdit_jax.data.records import SplitWriter, clip_example, clip_features, open_records, writing
from streamdit_jax.errors import DataError

_SHARD_BYTES = 256 << 20
_AHEAD = 4  # clips each worker may be ahead of the writer: evens out slow and fast clips


@dataclasses.dataclass(eq=False)
class RoadtripConfig(tfds.core.BuilderConfig):
    """What is rendered. `num_held_out` clips show factor combinations that training never sees; `world`:
    fingerprint or "".
    """

    name: str = "small"
    num_clips: int = 256
    num_held_out: int = 16
    clip_frames: int = 80
    size: int = 64
    captions_per_clip: int = 8
    seed: int = 0
    world: str = ""


class Roadtrip(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; `Roadtrip(config=RoadtripConfig(...), data_dir=..., file_format="array_record")`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list] = [RoadtripConfig()]
    # Nothing is downloaded. TFDS would look for checksums through importlib_resources, which it does not install.
    url_infos: ClassVar[dict] = {}
    workers: int | None = None  # processes that render; None: one per core

    def _info(self) -> tfds.core.DatasetInfo:
        c = self.builder_config
        shape = (c.clip_frames, c.size, c.size, 3)
        metadata = {"kind": "pixels", "shape": list(shape), "source": "roadtrip", "frame_rate": roadtrip.FRAME_RATE}
        metadata |= {k: getattr(c, k) for k in ("num_clips", "num_held_out", "captions_per_clip", "seed", "world")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="A vehicle drives through an endless landscape: rendered video with captions from a grammar.",
            features=clip_features("pixels", shape),
            metadata=tfds.core.MetadataDict(metadata),
        )

    def _split_generators(self, dl_manager):
        c = self.builder_config
        counts = (c.num_clips, c.num_held_out)
        return {split: self._generate_examples(split, count) for split, count in zip(roadtrip.SPLITS, counts) if count}

    def _generate_examples(self, split: str, count: int):
        c = self.builder_config
        clips = rendered(split, count, c.clip_frames, c.size, c.seed, self.workers)
        for index, video in enumerate(
            tqdm(clips, f"rendering {split}", count, unit="clip", disable=not sys.stderr.isatty())
        ):
            factors, clip_seed = roadtrip.clip_factors(index, c.seed, split)
            rng = np.random.default_rng([c.seed, roadtrip.SPLITS.index(split), index])
            clip = {
                "video": video,
                "captions": [grammar.caption(factors, rng) for _ in range(c.captions_per_clip)],
                "info": {"factors": dataclasses.asdict(factors), "seed": int(clip_seed), "index": index},
            }
            yield index, clip_example("pixels", clip)

    def _download_and_prepare(self, dl_manager, download_config, **unused):
        # TFDS's own writer shuffles through a thousand open files and a gigabyte of memory. Grain shuffles when
        # reading, so clips go straight to their files.
        infos = []
        for split, examples in self._split_generators(dl_manager).items():
            with contextlib.closing(examples), SplitWriter(self.data_path, self.name, split, _SHARD_BYTES) as writer:
                for _, example in examples:
                    record = self.info.features.serialize_example(example)
                    with writing(self.data_path.parent):
                        writer.write(record)
                with writing(self.data_path.parent):
                    infos.append(writer.finish())
        self.info.set_splits(tfds.core.SplitDict(infos))


def rendered(
    split: str, count: int, num_frames: int, size: int, seed: int, workers: int | None = None
) -> Iterator[np.ndarray]:
    """Renders clips 0 … count − 1 of `split` in child processes; yields uint8 [num_frames, size, size, 3] in order.

    `workers`: processes; None = one per core this process may use. DataError says a failed worker's last line.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = min(workers or cores, count)
    shape = (num_frames, size, size, 3)
    root = str(Path(__file__).resolve().parents[2])
    # -P and PYTHONPATH: the worker imports this package, whatever lies in the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    task = {"split": split, "seed": seed, "num_frames": num_frames, "size": size, "stop": count, "step": workers}
    processes, threads, queues = [], [], []
    with tempfile.TemporaryFile() as log:
        try:
            for start in range(workers):
                command = [
                    sys.executable,
                    "-P",
                    "-m",
                    "streamdit_jax.data.render_worker",
                    json.dumps(task | {"start": start}),
                ]
                processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment))
                queues.append(queue.Queue(_AHEAD))
                args = (processes[-1].stdout, int(np.prod(shape)), queues[-1])
                threads.append(threading.Thread(target=_pump, args=args, daemon=True))
                threads[-1].start()
            for index in range(count):
                data = queues[index % workers].get()
                if data is None:
                    processes[index % workers].wait()
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines() or ["no message"]
                    raise DataError(f"roadtrip: rendering clip {index} of split {split!r} failed: {said[-1]}")
                yield np.frombuffer(data, np.uint8).reshape(shape)
        finally:
            for process in processes:
                process.kill()
            for process, thread, waiting in zip(processes, threads, queues):
                process.wait()
                while thread.is_alive():  # it may be blocked on a full queue
                    with contextlib.suppress(queue.Empty):
                        waiting.get(timeout=0.05)
                process.stdout.close()


def _pump(pipe, size: int, clips: queue.Queue):
    """Moves whole clips from a worker's pipe to the queue; None marks the end."""
    while len(data := pipe.read(size)) == size:
        clips.put(data)
    clips.put(None)


def world_fingerprint() -> str:
    """Eight hex digits that change with what the renderer draws and the grammar says (sampled in 12 clips)."""
    digest = hashlib.sha256()
    for index in range(12):
        factors, seed = roadtrip.clip_factors(index, 0, roadtrip.SPLITS[index % 2])
        digest.update(repr((factors, seed)).encode())
        digest.update(np.ascontiguousarray(roadtrip.render(factors, seed, 1, start=17 * index)))
        rng = np.random.default_rng(index)
        digest.update("\n".join(grammar.caption(factors, rng) for _ in range(32)).encode())
    return digest.hexdigest()[:8]


@contextlib.contextmanager
def _quiet():
    """Keeps TFDS's announcements off standard output, which may be someone's JSON, and its hints off the log."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.set_verbosity(verbosity)


def prepare_roadtrip(
    data_dir: str | os.PathLike,
    num_clips: int = 4096,
    clip_frames: int = 80,
    captions_per_clip: int = 8,
    seed: int = 0,
    size: int = 64,
    num_held_out: int | None = None,
    workers: int | None = None,
) -> Path:
    """Renders the roadtrip clips under `data_dir`, or finds those rendered before; the directory.

    `num_held_out`: clips of the held_out split; None = a sixteenth of `num_clips`, at least 16. The directory
    appears under its name only when it is complete. With several processes on one file system let one of them call
    this first.
    DataError: a parameter is not positive, the renderer does not draw that size, the disk is full, a renderer
    failed, or the clips found are damaged.
    """
    numbers = {"num_clips": num_clips, "clip_frames": clip_frames, "captions_per_clip": captions_per_clip, "size": size}
    for field, value in numbers.items():
        if value < 1:
            raise DataError(f"roadtrip: {field} is {value}; it must be at least 1")
    if seed < 0:
        raise DataError(f"roadtrip: seed is {seed}; it must not be negative")
    try:
        roadtrip.render(*roadtrip.clip_factors(0, seed, "train"), num_frames=1, size=size)
    except ValueError as error:
        raise DataError(f"roadtrip: {error}") from error
    held_out = max(16, num_clips // 16) if num_held_out is None else num_held_out
    world = world_fingerprint()
    name = f"clips{num_clips}+{held_out}_frames{clip_frames}_size{size}_captions{captions_per_clip}_seed{seed}_{world}"
    config = RoadtripConfig(
        name=name,
        num_clips=num_clips,
        num_held_out=held_out,
        clip_frames=clip_frames,
        size=size,
        captions_per_clip=captions_per_clip,
        seed=seed,
        world=world,
    )
    with _quiet():
        builder = Roadtrip(config=config, data_dir=str(data_dir), file_format="array_record")
        builder.workers = workers
        directory = Path(builder.data_dir)
        if not directory.exists():
            with writing(data_dir):
                directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as downloads:  # TFDS insists on a place for what it never downloads
                builder.download_and_prepare(download_dir=downloads)
    open_records(directory)
    return directory
