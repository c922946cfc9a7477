"""The command line: streamdit stream | train | encode | evaluate | bench | plan | compile | serve | quantize | export |
average | figure.

A user's mistake ends in one clear line on standard error and exit code 2; with --json, standard output holds one JSON
object and nothing else.
"""

import argparse
import functools
import json
import os
import shlex
import sys
from pathlib import Path

from streamdit_jax import distributed
from streamdit_jax.clusters import Cluster
from streamdit_jax.errors import ConfigError, StreamDiTError

DEFAULT_PROMPT = "a red car drives past green hills on a sunny day"
# What the extras of setup.py bring: whoever lacks one is told which.
EXTRAS = {"matplotlib": "figures", "PIL": "figures", "starlette": "serve", "uvicorn": "serve", "websockets": "serve"}


def _enable_caches():
    """Compiled code is kept on disk, so that the second run starts within seconds, but not where others may write.
    JAX_COMPILATION_CACHE_DIR overrides where. The programs of `pipeline.load`, or None.
    """
    from streamdit_jax.programs import enable_caches

    caches = enable_caches()
    for reason in caches.refused:
        _say(reason)
    return caches.programs


def _stream(arguments) -> int:
    from streamdit_jax import cli_stream

    return cli_stream.stream(arguments, _enable_caches)


def _say(line: str) -> None:
    print(f"streamdit: {line}", file=sys.stderr, flush=True)


def _train(arguments) -> int:
    from streamdit_jax.config import from_arguments, require_trainable

    config = from_arguments(arguments.overrides)
    require_trainable(config)
    cluster = distributed.start(_say)
    first = cluster is None or cluster.process == 0
    _enable_caches()
    from streamdit_jax.training.run import train

    command = "streamdit train " + " ".join([*arguments.overrides, f"--workdir={arguments.workdir}"])
    log = functools.partial(print, file=sys.stderr, flush=True) if first else lambda _: None
    model = train(config, arguments.workdir, command, log=log)
    if first:
        print(f"{model}: trained; try: streamdit stream {DEFAULT_PROMPT!r} --model={arguments.workdir}")
    return 0


def _encode(arguments) -> int:
    import numpy as np

    from streamdit_jax.data import encode
    from streamdit_jax.pipeline import load

    cluster = distributed.start(_say) or Cluster("none", 1, 0)
    pipeline = load(arguments.model)
    data = pipeline.config.data
    report = encode.encode(
        arguments.source,
        arguments.out,
        lambda clips: np.asarray(pipeline.encode_video(distributed.over_local_devices(clips))),
        height=data.height,
        width=data.width,
        frame_rate=data.frame_rate,
        clip_frames=arguments.clip_frames or data.clip_frames,
        skip_bad=arguments.skip_bad,
        metadata={"model": pipeline.fingerprint},
        process_index=cluster.process,
        process_count=cluster.processes,
    )
    if cluster.process == 0:
        print("\n".join([str(report), *report.skipped]))
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


def _average(arguments) -> int:
    from streamdit_jax import weights
    from streamdit_jax.pipeline import find_model

    directories = [find_model(name) for name in arguments.models]
    config, parts = weights.average(directories)
    cards = [weights.load_card(directory) for directory in directories]
    origins = [
        {"model": name, "parts": {part: facts["sha256"] for part, facts in card["parts"].items()}}
        for name, card in zip(arguments.models, cards)
    ]
    weights.save_model(arguments.out, config, parts, {"command": arguments.spelled, "average_of": origins})
    print(f"{arguments.out}: the mean of {len(directories)} models, {', '.join(parts)}")
    return 0


def _quantize(arguments) -> int:
    _enable_caches()
    from streamdit_jax.evaluation import quantized

    report = quantized.run(
        arguments.model,
        arguments.out,
        prompts=arguments.prompt,
        check=arguments.check,
        chunks=arguments.chunks,
        seed=arguments.seed,
        command=arguments.spelled,
    )
    report = {"command": arguments.spelled, **report}
    print(json.dumps(report) if arguments.json else quantized.summary(report))
    return 0


def _evaluate(arguments) -> int:
    _enable_caches()
    from streamdit_jax.evaluation import evaluate

    report = evaluate.run(
        arguments.what,
        arguments.model,
        prompts=arguments.prompts,
        seconds=arguments.seconds,
        scheme=arguments.scheme,
        guidance=arguments.guidance,
        filling=arguments.filling,
        split=arguments.split,
        batch=arguments.batch,
        seed=arguments.seed,
        sheet=arguments.sheet,
        rows=arguments.row,
        table=arguments.table,
    )
    report = {"command": arguments.spelled, **report}
    print(json.dumps(report, indent=None if arguments.json else 1))
    return 0


def _bench(arguments) -> int:
    _enable_caches()
    from streamdit_jax.bench.run import run

    report = run(
        arguments.overrides,
        arguments.model,
        what=arguments.what,
        precision=arguments.precision,
        scheme=arguments.scheme,
        guidance=arguments.guidance,
        filling=arguments.filling,
        seconds=arguments.seconds,
        sessions=arguments.sessions,
        peer=arguments.compare,
    )
    report = {"command": arguments.spelled, **report}
    print(json.dumps(report, indent=None if arguments.json else 1))
    return 0


def _plan(arguments) -> int:
    if arguments.roofline:
        return _roofline(arguments)
    from streamdit_jax.plan.topology import only_describe

    only_describe(arguments.topology)
    from streamdit_jax.plan.report import run
    from streamdit_jax.plan.table import table

    report = run(
        arguments.overrides,
        arguments.topology,
        what=arguments.what,
        stage=arguments.stage,
        bucket=arguments.bucket,
        slices=arguments.slices,
        precision=arguments.precision,
        limit=arguments.limit,
        effort=arguments.effort,
    )
    report = {"command": arguments.spelled, **report}
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def _roofline(arguments) -> int:
    from streamdit_jax.plan.report import roofline_of
    from streamdit_jax.plan.table import roofline_table

    report = roofline_of(arguments.overrides, arguments.topology, precision=arguments.precision)
    report = {"command": arguments.spelled, **report}
    print(json.dumps(report) if arguments.json else roofline_table(report))
    return 0


def _compile(arguments) -> int:
    from streamdit_jax import cli_compile

    report = cli_compile.compile_ahead(
        arguments.model,
        _enable_caches(),
        scheme=arguments.scheme,
        filling=arguments.filling,
        sessions=arguments.sessions,
    )
    print(json.dumps(report) if arguments.json else cli_compile.summary(report))
    return 0


def _serve(arguments) -> int:
    programs = _enable_caches()
    from streamdit_jax.serving.command import serve

    serve(
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        token=arguments.token or os.environ.get("STREAMDIT_TOKEN"),
        origins=arguments.origin,
        sessions=arguments.max_sessions,
        idle_seconds=arguments.idle_seconds,
        scheme=arguments.scheme,
        filling=arguments.filling,
        programs=programs,
    )
    return 0


def _figure(arguments) -> int:
    from streamdit_jax.evaluation.figures import draw_curves, draw_levels

    if arguments.curves and arguments.schemes:
        raise ConfigError("--curves: draws training stages; give schemes or stages, not both")
    (draw_curves if arguments.curves else draw_levels)(arguments.curves or arguments.schemes, arguments.out)
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
    stream.add_argument(
        "--transition", type=int, default=0, metavar="CHUNKS", help="chunks over which --at interpolates; 0 switches"
    )
    stream.add_argument("--video", metavar="FILE", help="a video to start from: its frames steer the stream's")
    stream.add_argument("--image", metavar="FILE", help="a picture to start from")
    stream.add_argument(
        "--strength", type=float, default=0.6, help="how far to leave them behind: 0 keeps them, 1 forgets them"
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

    average = command("average", _average, "the mean of the weights of models of one shape, such as fine-tuned ones")
    average.add_argument("out", help="the directory to write; a model there is replaced")
    average.add_argument("models", nargs="+", metavar="model", help="a bundled model's name, or a directory")

    quantize = command("quantize", _quantize, "quantise a model for fp8 inference, and measure what that costs")
    quantize.add_argument("--model", default="roadtrip", help="a bundled model's name, or a directory that train wrote")
    quantize.add_argument("--out", required=True, help="the directory to write; a model there is replaced")
    quantize.add_argument(
        "--prompt", action="append", default=[], help="a prompt to calibrate with; repeat it, one at least"
    )
    quantize.add_argument(
        "--check", action="append", default=[], metavar="PROMPT", help="a prompt to measure with; repeat it"
    )
    quantize.add_argument("--chunks", type=int, default=8, help="chunks that leave the buffer for each prompt")
    quantize.add_argument("--seed", type=int, default=0)
    quantize.add_argument("--json", action="store_true", help="one JSON object on one line")

    evaluate = command("evaluate", _evaluate, "measure what a model makes: PSNR, and what a probe reads in streams")
    evaluate.add_argument("what", choices=("autoencoder", "streams", "long", "switch", "samplers"))
    evaluate.add_argument("--prompts", type=int, help="clips or prompts; 10 to 100, by what is measured")
    evaluate.add_argument("--seconds", type=float, help="where a stream is judged, or switched; 8, or 60 for long")
    evaluate.add_argument(
        "--split", choices=("held_out", "seen", "both"), help="combinations that training never saw, or did see"
    )
    evaluate.add_argument("--batch", type=int, default=8, help="streams in one forward")
    evaluate.add_argument("--filling", choices=("uniform", "ramp"), help="how buffers are filled")
    evaluate.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet of the first ones")
    evaluate.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="MODEL:SCHEME:GUIDANCE[:FILLING]",
        help="samplers: a line of the table; repeat it",
    )
    evaluate.add_argument("--table", metavar="FILE.md", help="samplers: also write the table as Markdown")
    sampling(evaluate)

    bench = command("bench", _bench, "measure the streaming loop, or the training step, on this machine")
    bench.add_argument("--what", choices=("stream", "forward", "train"), default="stream")
    bench.add_argument("--model", help="a bundled model's name, or a directory that train wrote")
    bench.add_argument("--precision", choices=("auto", "float32", "bfloat16", "bf16", "fp8"), default="auto")
    bench.add_argument("--scheme", help="partition scheme, such as N8c2s2; the configuration's own by default")
    bench.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none")
    bench.add_argument("--filling", choices=("uniform", "ramp"), help="how the buffer is filled")
    bench.add_argument("--seconds", type=float, default=60.0, help="how long the loop runs end to end")
    bench.add_argument("--sessions", default="1,2,4", help="numbers of sessions in one batch")
    bench.add_argument("--compare", action="store_true", help="also time a PyTorch model of the same shape")
    bench.add_argument("--json", action="store_true", help="one JSON object on one line")
    bench.epilog = "--config=FILE.py instead of --model: random weights; --config.a.b=VALUE overrides a field of it."

    plan = command("plan", _plan, "compile a configuration's step for devices that need not be there")
    plan.add_argument(
        "--topology", required=True, help="v5e:4x4, v5p:8x8x4, v6e:16x16, tpu7x:4x4x4, h100:8, h200:8, or cpu:8"
    )
    plan.add_argument("--what", choices=("train", "stream"), default="train")
    plan.add_argument(
        "--roofline", action="store_true", help="compile nothing: what streaming takes at least on one h100 or h200"
    )
    plan.add_argument("--stage", help="the stage of training; the configuration's last one by default")
    plan.add_argument("--bucket", help="one of the stage's buckets; its own shape by default")
    plan.add_argument("--slices", type=int, help="TPU slices of that topology; mesh.slices by default")
    plan.add_argument("--precision", choices=("auto", "float32", "bfloat16", "fp8"), default="auto")
    plan.add_argument("--limit", type=float, default=0.95, help="share of a device's memory that the step may take")
    plan.add_argument("--effort", type=float, default=-1.0, help="of the compiler, from -1 (quick) to 1; runs have 0")
    plan.add_argument("--json", action="store_true", help="one JSON object on one line")
    plan.epilog = "--config=FILE.py names the configuration; --config.a.b=VALUE overrides a field of it."

    serve = command("serve", _serve, "serve live streams, and a page to steer them by, until Ctrl-C")
    serve.add_argument("--model", default="roadtrip", help="a bundled model's name, or a directory that train wrote")
    serve.add_argument("--scheme", help="partition scheme, such as N8c2s2; the model's own by default")
    serve.add_argument("--filling", choices=("uniform", "ramp"), help="how a stream's buffer is filled")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; beyond this machine only with --token")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one; what it is, is printed")
    serve.add_argument("--token", help="what viewers must know; the environment's STREAMDIT_TOKEN otherwise")
    serve.add_argument("--origin", action="append", default=[], help="a site whose pages may connect, too")
    serve.add_argument("--max-sessions", type=int, default=4, help="how many may watch at once")
    serve.add_argument("--idle-seconds", type=float, default=600.0, help="how long a viewer may do nothing")

    ahead = command("compile", _compile, "compile a model's programs before they are needed, as for a container image")
    ahead.add_argument("--model", default="roadtrip", help="a bundled model's name, or a directory that train wrote")
    ahead.add_argument("--scheme", help="partition scheme, such as N8c2s2; the model's own by default")
    ahead.add_argument("--filling", choices=("uniform", "ramp"), help="how a stream's buffer is filled")
    ahead.add_argument("--sessions", type=int, default=1, help="for `streamdit serve --max-sessions` of that number")
    ahead.add_argument("--json", action="store_true", help="one JSON object on one line")

    figure = command("figure", _figure, "draw schemes' levels over frames and micro steps, or training's curves")
    figure.add_argument("schemes", nargs="*")
    figure.add_argument(
        "--curves", nargs="+", metavar="RUN/STAGE", help="stages of training, each with a metrics.jsonl"
    )
    figure.add_argument("--out", default="figure.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 for a mistake in what was given."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.spelled = shlex.join(["streamdit", *(sys.argv[1:] if argv is None else argv)])
    if arguments.command in ("train", "bench", "plan"):
        arguments.overrides = rest
    elif rest:
        parser.error(f"unknown argument {rest[0]}")
    try:
        return arguments.run(arguments)
    except StreamDiTError as mistake:
        print(f"streamdit: {mistake}", file=sys.stderr)
        return distributed.leave(2)
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
