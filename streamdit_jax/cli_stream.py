"""`streamdit stream`: a prompt, and what else steers a stream, to a video file."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamdit_jax.errors import ConfigError

SHEET_COLUMNS = 16


def _switch(text: str) -> tuple[float, str]:
    seconds, colon, prompt = text.partition(":")
    try:
        at = float(seconds)
    except ValueError:
        at = -1.0
    if not colon or not 0 <= at < float("inf"):
        raise ConfigError(f'--at: {text!r} is not SECONDS:PROMPT, such as 4:"a red car drives through snow"')
    return at, prompt


def _inputs(arguments, height: int, width: int, rate: float) -> dict[str, Any]:
    """The frames of --video, and the one of --image, at the model's size and frame rate."""
    from streamdit_jax.data.video import read_video

    inputs: dict[str, Iterator[np.ndarray] | np.ndarray] = {}
    if arguments.video:
        inputs["video"] = read_video(arguments.video, height, width, rate)
    if arguments.image:
        inputs["image"] = next(read_video(arguments.image, height, width, rate))
    return inputs


def stream(arguments, enable_caches: Callable[[], Any]) -> int:
    """Runs the command; returns its exit code. enable_caches: turns compilation caches on and gives the programs of
    `pipeline.load`. Raises StreamDiTError for mistakes in what was given.
    """
    started = time.perf_counter()
    switches = sorted((_switch(text) for text in arguments.at), key=lambda switch: switch[0])
    if not arguments.seconds > 0 or arguments.seconds == float("inf"):
        raise ConfigError(f"--seconds: must be a positive number, not {arguments.seconds}")
    if not 0 <= arguments.transition <= 10_000:
        raise ConfigError(f"--transition: a number of chunks from 0 to 10000, not {arguments.transition}")
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no directory {out.parent} to write {out.name} to")

    from tqdm import tqdm

    from streamdit_jax.data.video import VideoWriter
    from streamdit_jax.evaluation.figures import contact_sheet, require_writable
    from streamdit_jax.pipeline import load

    if arguments.sheet:
        require_writable(arguments.sheet, "--sheet")
        import PIL.Image  # noqa: F401  what lacks is said before the first frame
    pipeline = load(arguments.model, programs=enable_caches())
    rate, data = pipeline.frame_rate, pipeline.config.data
    for _, prompt in switches:
        pipeline.encode_prompt(prompt)  # a prompt that is too long is found before the first frame, not in the middle
    stream = pipeline.stream(
        arguments.prompt,
        arguments.seed,
        scheme=arguments.scheme,
        guidance=arguments.guidance,
        filling=arguments.filling,
        refill=arguments.refill,
        strength=arguments.strength,
        **_inputs(arguments, data.height, data.width, rate),
    )
    wanted = max(1, round(arguments.seconds * rate))
    made, writing, kept, switched, receipts = 0, 0.0, [], [], []
    bar = tqdm(total=wanted, unit="frame", desc="filling", disable=arguments.quiet or arguments.json, file=sys.stderr)
    with bar, VideoWriter(out, rate, data.height, data.width) as writer:
        while made < wanted:
            while switches and made >= switches[0][0] * rate:
                switched.append(switches.pop(0))
                receipts.append(stream.change(switched[-1][1], arguments.transition)._asdict())
            frames = next(stream)[: wanted - made]
            if made == 0:
                first = time.perf_counter()
                bar.set_description("streaming")
            began = time.perf_counter()
            writer.write(frames)
            writing += time.perf_counter() - began
            made += len(frames)
            bar.update(len(frames))
            if arguments.sheet:
                kept.append(frames)
    ended = time.perf_counter()
    seconds = {name: round(value, 3) for name, value in {**stream.seconds, "write": writing}.items()}
    if arguments.sheet:
        prompts = [arguments.prompt, *(f"{at:g} s: {prompt}" for at, prompt in switched)]
        contact_sheet([("   |   ".join(prompts), np.concatenate(kept))], arguments.sheet, columns=SHEET_COLUMNS)
    report = {
        "out": str(out),
        "frames": made,
        "seconds": round(ended - started, 3),
        "frames_per_second": round(made / (ended - started), 2),
        "first_frame_seconds": round(first - started, 3),
        "forwards": stream.forwards,
        "parts_seconds": seconds,
        "scheme": str(stream.scheme),
        "guidance": stream.guidance,
        "seed": arguments.seed,
        "changes": [{"prompt": prompt, **receipt} for (_, prompt), receipt in zip(switched, receipts)],
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(
            f"{out}: {made} frames in {ended - started:.1f} s, {made / (ended - started):.1f} frames per second "
            f"(first frame after {first - started:.1f} s; {stream.forwards} micro steps; {parts})"
        )
    return 0
