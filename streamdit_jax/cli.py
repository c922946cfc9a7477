"""The command line: streamdit stream | train | encode | evaluate | bench | plan | compile | serve | quantize | export |
average | figure.

A user's mistake ends in one clear line on standard error and exit code 2; with --json, standard output holds one JSON
object and nothing else.
"""

import functools
import json
import os
import shlex
import sys
from pathlib import Path

from streamdit_jax import distributed
from streamdit_jax.cli_arguments import DEFAULT_PROMPT, make_parser
from streamdit_jax.clusters import Cluster
from streamdit_jax.errors import ConfigError, StreamDiTError

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

    directory = weights.find_model(arguments.model)
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

    directories = [weights.find_model(name) for name in arguments.models]
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
        refill=arguments.refill,
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
        refill=arguments.refill,
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


RUNS = {
    "stream": _stream,
    "train": _train,
    "encode": _encode,
    "export": _export,
    "average": _average,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "bench": _bench,
    "plan": _plan,
    "serve": _serve,
    "compile": _compile,
    "figure": _figure,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 for a mistake in what was given."""
    parser = make_parser(RUNS)
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
