"""The real streaming loop under a clock: forwards, decoding, both overlapped in a live engine, prompts, sessions."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from streamdit_jax.bench.compilations import Compilations
from streamdit_jax.errors import StreamDiTError
from streamdit_jax.evaluation.batched import StreamBatch
from streamdit_jax.live import Engine, Session
from streamdit_jax.pipeline import Pipeline

PROMPTS = ("a red car", "a blue bus at night", "a truck in snow")
LEAST = 8  # forwards, chunks or decodings, however little time there is
LATENCY_TRIALS = 3
LIMIT_SECONDS = 600.0  # for a chunk that does not come


def quantiles(times: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile, in milliseconds."""
    return round(1e3 * float(np.median(times)), 3), round(1e3 * float(np.percentile(times, 99)), 3)


def denoising(pipeline: Pipeline, seconds: float) -> dict[str, Any]:
    """Every forward of one running stream, waited for one by one; no decoding."""
    forward, sampling = one_forward(pipeline), pipeline.config.sampling
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < LEAST:
        before = time.perf_counter()
        forward()
        times.append(time.perf_counter() - before)
    # Frames that are under way count by their share of the s forwards that each chunk takes.
    scheme = pipeline.scheme(None)
    per_forward = scheme.chunk_size * pipeline.config.tae.compression[0] / scheme.micro_steps
    median, p99 = quantiles(times)
    return {
        "forward_ms_median": median,
        "forward_ms_p99": p99,
        "forwards": len(times),
        "forwards_in_one": 1 if sampling.guidance == 1 else 2,
        "denoise_fps": round(per_forward * len(times) / sum(times), 2),
    }


def one_forward(pipeline: Pipeline) -> Callable[[], None]:
    """A function that runs, and waits for, one micro step of a running stream."""
    stream = StreamBatch(pipeline, PROMPTS[:1], [0])
    for _ in range(2):
        jax.block_until_ready(stream.latents())

    def forward() -> None:
        stream.forward()
        stream.wait()

    return forward


def decoding(pipeline: Pipeline, seconds: float) -> dict[str, Any]:
    """The decoder alone, one chunk after another with its state carried on, until frames are on the host."""
    stream = StreamBatch(pipeline, PROMPTS[:1], [0])
    next(stream)
    latents = jax.block_until_ready(stream.latents())
    np.asarray(stream.decode(latents))
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < LEAST:
        before = time.perf_counter()
        frames = np.asarray(stream.decode(latents))
        times.append(time.perf_counter() - before)
    return {"decode_ms_per_chunk": quantiles(times)[0], "frames_per_chunk": frames.shape[1]}


def end_to_end(pipeline: Pipeline, seconds: float, sessions: int = 1) -> dict[str, Any]:
    """`sessions` viewers of a live engine who take every chunk at once: the denoiser never waits for the decoder, nor
    for them. Counts all of their frames, from when each is in the middle of its stream.

    chunk_jitter: the 99th percentile of the time between two chunks of one viewer ÷ its median.
    """
    with Engine(pipeline, slots=sessions) as engine:
        viewers = [engine.open(PROMPTS[index % len(PROMPTS)], index) for index in range(sessions)]
        for viewer in viewers:
            for _ in range(2):
                viewer.get(LIMIT_SECONDS)
        began, frames, between, round_ = time.perf_counter(), 0, [], 0
        ended = began
        while ended - began < seconds or round_ < LEAST:
            for viewer in viewers:
                chunk = viewer.get(LIMIT_SECONDS)
                frames += len(chunk.frames)
                between.append(chunk.seconds)
            ended, round_ = time.perf_counter(), round_ + 1
    median, p99 = quantiles(between)
    return {
        "end_to_end_fps": round(frames / (ended - began), 2),
        "end_to_end_seconds": round(ended - began, 2),
        "chunk_ms_median": median,
        "chunk_ms_p99": p99,
        "chunk_jitter": round(p99 / median, 3),
    }


def first_frame(pipeline: Pipeline) -> dict[str, float]:
    """Seconds from a prompt to the first frames on the host in an engine that is running; median of three."""
    times = []
    with Engine(pipeline, slots=1) as engine:
        for seed in range(LATENCY_TRIALS):
            began = time.perf_counter()
            session = engine.open(PROMPTS[seed % len(PROMPTS)], seed)
            session.get(LIMIT_SECONDS)
            times.append(time.perf_counter() - began)
            session.close()
    return {"first_frame_seconds_running": round(float(np.median(times)), 4)}


def prompt_latency(pipeline: Pipeline) -> dict[str, Any]:
    """Seconds from a change of prompt in a live engine to the first frames on the host that the old prompt would not
    have made; median of three. The text encoder, and chunks that were on their way, are part of it.

    What the frames would have been is told by a session before it, of the same seed, that keeps its prompt. Raises
    StreamDiTError where nothing has changed after 2·N chunks: such weights do not listen.
    """
    times, chunks, most = [], [], 2 + 2 * pipeline.scheme(None).num_chunks
    with Engine(pipeline, slots=1) as engine:
        for trial in range(LATENCY_TRIALS):
            kept = engine.open(PROMPTS[0], trial)
            unchanged = [kept.get(LIMIT_SECONDS).frames for _ in range(most)]
            kept.close()
            session = engine.open(PROMPTS[0], trial)
            for _ in range(2):
                session.get(LIMIT_SECONDS)
            began = time.perf_counter()
            session.change(PROMPTS[1 + trial % 2])
            chunks.append(_first_change(session, unchanged[2:]))
            times.append(time.perf_counter() - began)
            session.close()
    return {
        "prompt_to_first_changed_pixel_seconds": round(float(np.median(times)), 4),
        "prompt_to_first_changed_chunk": int(np.median(chunks)),
    }


def _first_change(session: Session, unchanged: Sequence[np.ndarray]) -> int:
    """Takes chunks until one differs from what it would have been; how many that were."""
    for count, frames in enumerate(unchanged, start=1):
        if not np.array_equal(session.get(LIMIT_SECONDS).frames, frames):
            return count
    raise StreamDiTError("bench: another prompt changed no pixel within 2·N chunks; these weights do not listen")


def recompilations(pipeline: Pipeline) -> dict[str, int]:
    """Programs that are compiled in a live engine that has served before, when sessions of other prompts, seeds and
    guidance come and go, and when these change within one. It should be 0.
    """

    def serve(engine, prompt, seed, guidance):
        session = engine.open(prompt, seed, guidance=guidance)
        session.get(LIMIT_SECONDS)
        session.change(f"{prompt}, later")
        session.guidance = guidance + 0.25
        session.get(LIMIT_SECONDS)
        return session

    with Engine(pipeline, slots=2) as engine:
        serve(engine, PROMPTS[0], 0, 2.0).close()
        with Compilations() as compilations:
            for seed, (prompt, guidance) in enumerate(zip(PROMPTS, (1.0, 0.75, 3.5)), start=1):
                other = engine.open(prompt, 10 + seed)
                serve(engine, prompt, seed, guidance).close()
                other.close()
    return {"recompilations": compilations.count}


def sessions(pipeline: Pipeline, counts: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """For each count, the frames per second of that many viewers of one engine, in sum and for each."""
    table = []
    for count in counts:
        fps = end_to_end(pipeline, seconds, count)["end_to_end_fps"]
        table.append({"sessions": count, "frames_per_second": fps, "of_each": round(fps / count, 2)})
    first = table[0]["frames_per_second"]
    return [line | {"of_the_first": round(line["frames_per_second"] / first, 3)} for line in table]
