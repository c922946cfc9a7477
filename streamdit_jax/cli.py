"""The command line: streamdit stream | train | encode | evaluate | export | figure.

A user's mistake ends in one clear line on standard error and exit code 2; with --json, standard output holds one JSON
object and nothing else.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from streamdit_jax.errors import ConfigError, StreamDiTError

DEFAULT_PROMPT = "a red car drives past green hills on a sunny day"
SHEET_COLUMNS = 16
# What the extras of setup.py bring: whoever lacks one is told which.
EXTRAS = {"matplotlib": "figures", "PIL": "figures"}


def _enable_compilation_cache() -> None:
    """Compiled steps are kept on disk, so that the second run starts within seconds. JAX_COMPILATION_CACHE_DIR
    overrides where.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "streamdit_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _switch(text: str) -> tuple[float, str]:
    seconds, colon, prompt = text.partition(":")
    try:
        at = float(seconds)
    except ValueError:
        at = -1.0
    if not colon or not 0 <= at < float("inf"):
        raise ConfigError(f'--at: {text!r} is not SECONDS:PROMPT, such as 4:"a red car drives through snow"')
    return at, prompt


def _stream(arguments) -> int:
    started = time.perf_counter()
    switches = sorted((_switch(text) for text in arguments.at), key=lambda switch: switch[0])
    if not arguments.seconds > 0 or arguments.seconds == float("inf"):
        raise ConfigError(f"--seconds: must be a positive number, not {arguments.seconds}")
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no directory {out.parent} to write {out.name} to")

    import numpy as np
    from tqdm import tqdm

    from streamdit_jax.data.video import VideoWriter
    from streamdit_jax.evaluation.figures import contact_sheet
    from streamdit_jax.pipeline import load

    _enable_compilation_cache()
    pipeline = load(arguments.model)
    for _, prompt in switches:
        pipeline.encode_prompt(prompt)  # a prompt that is too long is found before the first frame, not in the middle
    stream = pipeline.stream(
        arguments.prompt,
        arguments.seed,
        scheme=arguments.scheme,
        guidance=arguments.guidance,
        filling=arguments.filling,
    )
    rate, data = pipeline.frame_rate, pipeline.config.data
    wanted = max(1, round(arguments.seconds * rate))
    made, writing, kept, switched = 0, 0.0, [], []
    bar = tqdm(total=wanted, unit="frame", desc="filling", disable=arguments.quiet or arguments.json, file=sys.stderr)
    with bar, VideoWriter(out, rate, data.height, data.width) as writer:
        while made < wanted:
            while switches and made >= switches[0][0] * rate:
                switched.append(switches.pop(0))
                stream.prompt = switched[-1][1]
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


def _train(arguments) -> int:
    from streamdit_jax.config import from_arguments

    config = from_arguments(arguments.overrides)
    _enable_compilation_cache()
    from streamdit_jax.training.run import train

    command = "streamdit train " + " ".join([*arguments.overrides, f"--workdir={arguments.workdir}"])
    model = train(config, arguments.workdir, command, log=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{model}: trained; try: streamdit stream {DEFAULT_PROMPT!r} --model={arguments.workdir}")
    return 0


def _encode(arguments) -> int:
    import numpy as np

    from streamdit_jax.data import encode
    from streamdit_jax.pipeline import load

    pipeline = load(arguments.model)
    data = pipeline.config.data
    report = encode.encode(
        arguments.source,
        arguments.out,
        lambda clips: np.asarray(pipeline.encode_video(clips)),
        height=data.height,
        width=data.width,
        frame_rate=data.frame_rate,
        clip_frames=arguments.clip_frames or data.clip_frames,
        skip_bad=arguments.skip_bad,
        metadata={"model": pipeline.fingerprint},
    )
    print(report)
    return 0


def _export(arguments) -> int:
    from streamdit_jax import weights
    from streamdit_jax.pipeline import find_model

    directory = find_model(arguments.model)
    described = weights.load_card(directory)
    card = dict(described.get("card", {}))
    for name in arguments.report:
        try:
            report = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as mistake:
            raise ConfigError(f"--report: {name} is no JSON report that evaluate wrote ({mistake})") from None
        card.setdefault("metrics", {})[Path(name).stem] = report
    parts = {part: weights.load_part(directory, described, part) for part in described["parts"]}
    weights.save_model(arguments.out, described["config"], parts, card, dtype=arguments.dtype)
    size = sum(path.stat().st_size for path in Path(arguments.out).iterdir())
    print(f"{arguments.out}: {', '.join(parts)} in {arguments.dtype}, {size / 1e6:.1f} MB")
    return 0


def _evaluate(arguments) -> int:
    _enable_compilation_cache()
    from streamdit_jax.evaluation import evaluate

    report = evaluate.run(
        arguments.what,
        arguments.model,
        prompts=arguments.prompts,
        seconds=arguments.seconds,
        scheme=arguments.scheme,
        guidance=arguments.guidance,
        seed=arguments.seed,
        sheet=arguments.sheet,
    )
    print(json.dumps(report, indent=None if arguments.json else 1))
    return 0


def _figure(arguments) -> int:
    from streamdit_jax.evaluation.figures import draw_levels

    draw_levels(arguments.schemes, arguments.out)
    print(arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="streamdit", description="Real-time, endless text-to-video.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    def sampling(added):
        added.add_argument(
            "--model", default="roadtrip", help="a bundled model's name, or a directory that train wrote"
        )
        added.add_argument("--scheme", help="partition scheme, such as N8c2s2; the model's own by default")
        added.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none")
        added.add_argument("--seed", type=int, default=0)
        added.add_argument("--json", action="store_true", help="one JSON object on standard output")

    stream = command("stream", _stream, "stream a prompt to a video file")
    stream.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT)
    stream.add_argument("--out", default="stream.mp4")
    stream.add_argument("--seconds", type=float, default=8.0)
    stream.add_argument(
        "--at", action="append", default=[], metavar="SECONDS:PROMPT", help="switch the prompt mid-stream"
    )
    stream.add_argument("--filling", choices=("uniform", "ramp"), help="how the buffer is filled")
    stream.add_argument("--sheet", metavar="FILE.png", help="also write a strip of frames")
    stream.add_argument("--quiet", action="store_true", help="no progress bar")
    sampling(stream)

    train = command("train", _train, "train the stages of a configuration")
    train.add_argument("--workdir", required=True, help="gets data, checkpoints, metrics, samples and the model")
    train.epilog = "--config=FILE.py names the configuration; --config.a.b=VALUE overrides a field of it."

    encode = command("encode", _encode, "turn videos or records of pixels into records of latents")
    encode.add_argument("source", help="a folder of videos with captions, or records of pixels")
    encode.add_argument("out", help="a directory that does not exist yet")
    encode.add_argument("--model", default="roadtrip")
    encode.add_argument("--clip-frames", type=int, help="frames of a clip; the model's own by default")
    encode.add_argument("--skip-bad", action="store_true", help="leave out videos that do not decode, and say so")

    export = command("export", _export, "copy a model, in another precision and with reports on its card")
    export.add_argument("model", help="a bundled model's name, or a directory that train wrote")
    export.add_argument("out", help="the directory to write; a model there is replaced")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    export.add_argument("--report", action="append", default=[], help="a JSON report of `streamdit evaluate`")

    evaluate = command("evaluate", _evaluate, "measure an autoencoder's fidelity, or what a probe sees in streams")
    evaluate.add_argument("what", choices=("autoencoder", "streams"))
    evaluate.add_argument("--prompts", type=int, default=100, help="held-out clips or prompts")
    evaluate.add_argument("--seconds", type=float, default=8.0, help="where a stream is judged")
    evaluate.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet of the first ones")
    sampling(evaluate)

    figure = command("figure", _figure, "draw a scheme's levels over frames and micro steps")
    figure.add_argument("schemes", nargs="+")
    figure.add_argument("--out", default="levels.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 for a mistake in what was given."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        arguments.overrides = rest
    elif rest:
        parser.error(f"unknown argument {rest[0]}")
    try:
        return arguments.run(arguments)
    except StreamDiTError as mistake:
        print(f"streamdit: {mistake}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] == "streamdit_jax":
            raise
        extra = EXTRAS.get(missing.name.split(".")[0], "train")
        print(
            f"streamdit: {arguments.command} needs {missing.name}: pip install 'streamdit_jax[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("streamdit: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
