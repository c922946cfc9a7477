"""What each command of the command line takes, and the help that it prints. What they do is in cli.py."""

import argparse
from collections.abc import Callable, Mapping

FILLINGS = ("uniform", "ramp", "doubling")  # as `partition.FILLINGS`, which would bring JAX along
DEFAULT_PROMPT = "a red car drives past green hills on a sunny day"


def make_parser(runs: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser of all commands; `arguments.run` is the function of the command's name in `runs`."""
    parser = argparse.ArgumentParser(
        prog="streamdit", description="Real-time, endless text-to-video.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=runs[name])
        return added

    def refill(added):
        text = "how long after a change of prompt the buffer is filled anew, as 2:0.875; 0 for never"
        added.add_argument("--refill", metavar="CHUNKS[:STRENGTH]", help=text)

    def sampling(added):
        added.add_argument(
            "--model", default="roadtrip", help="a bundled model's name, or a directory that train wrote"
        )
        added.add_argument("--scheme", help="partition scheme, such as N8c2s2; the model's own by default")
        added.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none")
        added.add_argument("--seed", type=int, default=0)
        added.add_argument("--json", action="store_true", help="one JSON object on standard output")

    stream = command("stream", "stream a prompt to a video file")
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
    stream.add_argument("--filling", choices=FILLINGS, help="how the buffer is filled")
    refill(stream)
    stream.add_argument("--sheet", metavar="FILE.png", help="also write a strip of frames")
    stream.add_argument("--quiet", action="store_true", help="no progress bar")
    sampling(stream)

    train = command("train", "train the stages of a configuration")
    train.add_argument("--workdir", required=True, help="gets data, checkpoints, metrics, samples and the model")
    train.epilog = "--config=FILE.py names the configuration; --config.a.b=VALUE overrides a field of it."

    encode = command("encode", "turn videos or records of pixels into records of latents")
    encode.add_argument("source", help="a folder of videos with captions, or records of pixels")
    encode.add_argument("out", help="a directory that does not exist yet")
    encode.add_argument("--model", default="roadtrip")
    encode.add_argument("--clip-frames", type=int, help="frames of a clip; the model's own by default")
    encode.add_argument("--skip-bad", action="store_true", help="leave out videos that do not decode, and say so")

    export = command("export", "copy a model, in another precision and with reports on its card")
    export.add_argument("model", help="a bundled model's name, or a directory that train wrote")
    export.add_argument("out", help="the directory to write; a model there is replaced")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    export.add_argument("--report", action="append", default=[], help="a JSON report of `streamdit evaluate`")

    average = command("average", "the mean of the weights of models of one shape, such as fine-tuned ones")
    average.add_argument("out", help="the directory to write; a model there is replaced")
    average.add_argument("models", nargs="+", metavar="model", help="a bundled model's name, or a directory")

    quantize = command("quantize", "quantise a model for fp8 inference, and measure what that costs")
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

    evaluate = command("evaluate", "measure what a model makes: PSNR, and what a probe reads in streams")
    evaluate.add_argument("what", choices=("autoencoder", "streams", "long", "switch", "samplers"))
    evaluate.add_argument("--prompts", type=int, help="clips or prompts; 10 to 100, by what is measured")
    evaluate.add_argument("--seconds", type=float, help="where a stream is judged, or switched; 8, or 60 for long")
    evaluate.add_argument(
        "--split", choices=("held_out", "seen", "both"), help="combinations that training never saw, or did see"
    )
    evaluate.add_argument("--batch", type=int, default=8, help="streams in one forward")
    evaluate.add_argument("--filling", choices=FILLINGS, help="how buffers are filled")
    refill(evaluate)
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

    bench = command("bench", "measure the streaming loop, or the training step, on this machine")
    bench.add_argument("--what", choices=("stream", "forward", "train"), default="stream")
    bench.add_argument("--model", help="a bundled model's name, or a directory that train wrote")
    bench.add_argument("--precision", choices=("auto", "float32", "bfloat16", "bf16", "fp8"), default="auto")
    bench.add_argument("--scheme", help="partition scheme, such as N8c2s2; the configuration's own by default")
    bench.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none")
    bench.add_argument("--filling", choices=FILLINGS, help="how the buffer is filled")
    bench.add_argument("--seconds", type=float, default=60.0, help="how long the loop runs end to end")
    bench.add_argument("--sessions", default="1,2,4", help="numbers of sessions in one batch")
    bench.add_argument("--compare", action="store_true", help="also time a PyTorch model of the same shape")
    bench.add_argument("--json", action="store_true", help="one JSON object on one line")
    bench.epilog = "--config=FILE.py instead of --model: random weights; --config.a.b=VALUE overrides a field of it."

    plan = command("plan", "compile a configuration's step for devices that need not be there")
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

    serve = command("serve", "serve live streams, and a page to steer them by, until Ctrl-C")
    serve.add_argument("--model", default="roadtrip", help="a bundled model's name, or a directory that train wrote")
    serve.add_argument("--scheme", help="partition scheme, such as N8c2s2; the model's own by default")
    serve.add_argument("--filling", choices=FILLINGS, help="how a stream's buffer is filled")
    refill(serve)
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; beyond this machine only with --token")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one; what it is, is printed")
    serve.add_argument("--token", help="what viewers must know; the environment's STREAMDIT_TOKEN otherwise")
    serve.add_argument("--origin", action="append", default=[], help="a site whose pages may connect, too")
    serve.add_argument("--max-sessions", type=int, default=4, help="how many may watch at once")
    serve.add_argument("--idle-seconds", type=float, default=600.0, help="how long a viewer may do nothing")

    ahead = command("compile", "compile a model's programs before they are needed, as for a container image")
    ahead.add_argument("--model", default="roadtrip", help="a bundled model's name, or a directory that train wrote")
    ahead.add_argument("--scheme", help="partition scheme, such as N8c2s2; the model's own by default")
    ahead.add_argument("--filling", choices=FILLINGS, help="how a stream's buffer is filled")
    ahead.add_argument("--sessions", type=int, default=1, help="for `streamdit serve --max-sessions` of that number")
    ahead.add_argument("--json", action="store_true", help="one JSON object on one line")

    figure = command("figure", "draw schemes' levels over frames and micro steps, or training's curves")
    figure.add_argument("schemes", nargs="*")
    figure.add_argument(
        "--curves", nargs="+", metavar="RUN/STAGE", help="stages of training, each with a metrics.jsonl"
    )
    figure.add_argument("--out", default="figure.png")
    return parser
