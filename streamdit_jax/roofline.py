"""The least time that a GPU takes for one streaming forward, and for decoding a chunk: FLOPs and bytes of each kernel.

A kernel takes at least max(FLOPs / rate of products, bytes / bandwidth), and kernels run one after the other. The rows
are the kernels of this implementation as it is designed to run, at inference, so that no statistics are saved:

- a product reads its inputs and weights once and writes its result; bias, and tanh-GELU in bfloat16, are its epilogue;
- gate + residual (+ position) + norm + scale + shift is one pass between two products (`kernels.residual_norm`); the
  attention to the text has no gate, so that its last product adds the residual, and only the norm follows;
- window attention reads queries, keys and values and writes its result; shifted windows are index arithmetic;
- the text's keys and values are there already, once per prompt;
- with fp8, what is multiplied was written as fp8 by the pass before it; weights' scales, one per output, and the bias
  join the pass behind the product, and where there was none (queries, keys and values; GELU; the attention's result)
  they are a pass of their own.

What each part then takes more than its bound, a measurement tells (`streamdit bench`); what XLA compiled moves beyond
these bytes, the census of `streamdit plan` tells.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from streamdit_jax import flops
from streamdit_jax.config import Config
from streamdit_jax.models.dit import DiTConfig
from streamdit_jax.models.tae import TAEConfig
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.timetable import Timetable

SIZES = {"float32": 4, "bfloat16": 2, "fp8": 2}  # bytes of a number between kernels; fp8 is for products alone


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches: FLOP/s of products by the type of their inputs, None where nobody measured them, and
    bytes/s of its memory.
    """

    float32: float | None
    bfloat16: float | None
    fp8: float | None
    bandwidth: float
    source: str


_HOPPER = (
    "bfloat16: 790 TFLOP/s, large products measured on an H200; float32: half of it, as the data sheet has TF32 to "
    "bf16; fp8: 1.4 PFLOP/s, the upper end of cuBLASLt's 1.1 to 1.4 on Hopper; bandwidth: NVIDIA's data sheet"
)
RATES = {
    "h100": Rates(395e12, 790e12, 1400e12, 3.35e12, _HOPPER),
    "h200": Rates(395e12, 790e12, 1400e12, 4.8e12, _HOPPER),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel. kind: gemm | fp8_gemm | attention | cross_attention | convolution | elementwise | copy.

    count: how often it runs. flops, read, written: of one run; products only, and bytes. inputs: the type that its
    products multiply, a field of Rates.
    """

    name: str
    kind: str
    count: int
    flops: int
    read: int
    written: int
    inputs: str

    def seconds(self, rates: Rates) -> float:
        """The least time of all its runs."""
        of_products = self.flops / getattr(rates, self.inputs)
        return self.count * max(of_products, (self.read + self.written) / rates.bandwidth)

    def bound_by(self, rates: Rates) -> str:
        """flops | bytes: which of the two takes longer."""
        of_products = self.flops / getattr(rates, self.inputs)
        return "flops" if of_products > (self.read + self.written) / rates.bandwidth else "bytes"


class _Rows:
    """Makes rows for activations of one type."""

    def __init__(self, precision: str):
        if precision not in SIZES:
            raise ValueError(f"precision: {precision!r} is not one of {', '.join(SIZES)}")
        self.size = SIZES[precision]
        self.inputs = "float32" if precision == "float32" else "bfloat16"

    def gemm(self, name: str, rows: int, inputs: int, outputs: int, count: int = 1, *, fp8: bool = False) -> Row:
        """[rows, inputs] × [inputs, outputs]; the bias is read, and with fp8 the scale of each output."""
        size = 1 if fp8 else self.size
        read = (rows + outputs) * inputs * size + outputs * (self.size + 4 * fp8)
        kind, multiplied = ("fp8_gemm", "fp8") if fp8 else ("gemm", self.inputs)
        return Row(name, kind, count, 2 * rows * inputs * outputs, read, rows * outputs * self.size, multiplied)

    def attention(self, name: str, kind: str, count: int, queries: int, keys: int, seen: int, width: int) -> Row:
        """Each of the queries sees `seen` of the keys, in all heads together `width` wide."""
        read = (queries + 2 * keys) * width * self.size
        return Row(name, kind, count, 4 * queries * seen * width, read, queries * width * self.size, self.inputs)

    def moved(self, name: str, kind: str, count: int, read: int, written: int) -> Row:
        """What multiplies no matrices; read and written in bytes."""
        return Row(name, kind, count, 0, read, written, self.inputs)


def forward(config: DiTConfig, text_tokens: int, precision: str = "bfloat16", batch: int = 1) -> tuple[Row, ...]:
    """The kernels of one forward, for `batch` streams; a guided stream counts twice. Their products are those of
    `flops.forward_flops`.

    precision: float32 | bfloat16 | fp8, the last for the projections of self-attention and the feed-forward's.
    """
    make, fp8 = _Rows(precision), precision == "fp8"
    frames, tokens = batch * config.latent[0], batch * math.prod(config.grid)
    patch = config.patch[1] * config.patch[2] * config.latent[3]
    pixels = 4 * tokens * patch
    return (
        make.moved("latents to patches", "copy", 1, pixels, tokens * patch * make.size),
        make.gemm("patch_embedding", tokens, patch, config.width),
        *_of_time(config, make, frames),
        *_norms(config, make, tokens, frames, fp8),
        *_self_attention(config, make, tokens, fp8),
        *(_cross_attention(config, make, tokens, batch * text_tokens, text_tokens) if config.cross_attention else ()),
        *_feed_forward(config, make, tokens, fp8),
        make.gemm("velocity", tokens, config.width, patch),
        make.moved("patches to latents", "copy", 1, tokens * patch * make.size, pixels),
    )


def _of_time(config: DiTConfig, make: _Rows, frames: int) -> Iterator[Row]:
    width = config.width
    yield make.gemm("time_embedding 1", frames, config.time_frequencies, width)
    yield make.gemm("time_embedding 2", frames, width, width)
    if config.adaln == "single":
        yield make.gemm("time_projection", frames, width, 6 * width)
    else:
        yield make.gemm("modulation", frames, width, 6 * width, config.num_layers)
        yield make.gemm("final_modulation", frames, width, 2 * width)


def _norms(config: DiTConfig, make: _Rows, tokens: int, frames: int, fp8: bool) -> Iterator[Row]:
    """The passes between products: hidden states come in and go out beside what is normalised."""
    layers, hidden = config.num_layers, tokens * config.width * make.size
    modulation = 3 * frames * config.width * make.size
    learned = config.position != "rope"
    tables = sum(config.grid) * config.width * make.size if learned else 0
    multiplied = hidden // make.size if fp8 else hidden

    def norm(name: str, count: int, reads: int, kept: bool, normalised: int, more: int = 0) -> Row:
        return make.moved(name, "elementwise", count, reads * hidden + modulation + more, kept * hidden + normalised)

    yield norm("first norm", 1, 1, learned, multiplied, tables)
    if layers > 1:
        yield norm("norm before self-attention", layers - 1, 2, True, multiplied, tables)
    if config.cross_attention:
        yield norm("norm before cross-attention", layers, 2, True, hidden)
        yield norm("norm before feed-forward", layers, 1, False, multiplied)
    else:
        yield norm("norm before feed-forward", layers, 2, True, multiplied)
    yield norm("final norm", 1, 2, False, hidden)


def _self_attention(config: DiTConfig, make: _Rows, tokens: int, fp8: bool) -> Iterator[Row]:
    width, layers, hidden = config.width, config.num_layers, tokens * config.width * make.size
    yield make.gemm("qkv", tokens, width, 3 * width, layers, fp8=fp8)
    if fp8:
        yield make.moved("query, key and value", "elementwise", layers, 3 * hidden, 3 * hidden)
    elif config.qk_norm != "none" or config.position != "learned":
        yield make.moved("query and key", "elementwise", layers, 2 * hidden, 2 * hidden)
    windows = Counter(math.prod(config.windows[index % len(config.windows)]) for index in range(layers))
    for seen, count in windows.items():
        yield make.attention(f"window attention to {seen}", "attention", count, tokens, tokens, seen, width)
    if fp8:
        yield make.moved("attention to fp8", "elementwise", layers, hidden, hidden // make.size)
    yield make.gemm("out", tokens, width, width, layers, fp8=fp8)


def _cross_attention(config: DiTConfig, make: _Rows, tokens: int, keys: int, seen: int) -> Iterator[Row]:
    width, layers, hidden = config.width, config.num_layers, tokens * config.width * make.size
    yield make.gemm("cross query", tokens, width, width, layers)
    if config.qk_norm != "none":
        yield make.moved("cross query norm", "elementwise", layers, hidden, hidden)
    yield make.attention("cross-attention", "cross_attention", layers, tokens, keys, seen, width)
    out = make.gemm("cross out", tokens, width, width, layers)
    yield dataclasses.replace(out, read=out.read + hidden)


def _feed_forward(config: DiTConfig, make: _Rows, tokens: int, fp8: bool) -> Iterator[Row]:
    width, layers, inner = config.width, config.num_layers, config.ffn_width
    ways = 2 if config.ffn == "swiglu" else 1
    yield make.gemm("up" if ways == 1 else "up and gate", tokens, width, ways * inner, layers, fp8=fp8)
    if fp8 or ways == 2:
        read, size = ways * tokens * inner * make.size, 1 if fp8 else make.size
        yield make.moved("gelu" if ways == 1 else "swiglu", "elementwise", layers, read, tokens * inner * size)
    yield make.gemm("down", tokens, inner, width, layers, fp8=fp8)


def decoder(config: TAEConfig, latent: Sequence[int], precision: str = "float32") -> tuple[Row, ...]:
    """The kernels that decode one chunk of latents [frames, height, width, …], with the state of the chunk before.

    A residual block is one pass (norm, SiLU, the neighbouring frames side by side) and one convolution with bias and
    residual. Depth to space is a copy.
    """
    make, rows = _Rows(precision), []
    frames, height, width = latent[:3]
    places, channels = frames * height * width, config.widths[-1]
    pixels = places * math.prod(config.compression) * 3
    rows.append(make.gemm("in", places, config.latent_channels, channels))
    for level in reversed(range(len(config.factors))):
        channels, taps, factors = config.widths[level], config.kernel_time, config.factors[level]
        x = places * channels * make.size
        past = (taps - 1) * x // frames
        if config.blocks[level]:
            inputs, count = taps * channels, config.blocks[level]
            rows.append(make.moved(f"norm {level}", "elementwise", count, x + past, taps * x + past))
            read = (taps + 1) * x + 9 * inputs * channels * make.size
            products = 2 * places * 9 * inputs * channels
            rows.append(Row(f"convolution {level}", "convolution", count, products, read, x, make.inputs))
        onto = 3 if level == 0 else config.widths[level - 1]
        name = "head" if level == 0 else f"out {level}"
        if level == 0:
            rows.append(make.moved("last norm", "elementwise", 1, x, x))
        outputs = math.prod(factors) * onto
        rows.append(make.gemm(name, places, channels, outputs))
        rows.append(make.moved(f"depth to space {level}", "copy", 1, *(2 * [places * outputs * make.size])))
        frames, places = frames * factors[0], places * math.prod(factors)
    read = pixels * make.size
    if config.linear_skip:
        coarse = math.prod(latent[:3])
        rows.append(make.gemm("skip", coarse, config.latent_channels, 3 * math.prod(config.compression)))
        read *= 2
    rows.append(make.moved("to bytes", "elementwise", 1, read, pixels))
    return tuple(rows)


def bound(rows: Sequence[Row], rates: Rates) -> dict[str, Any]:
    """The rows and their sums as JSON: {"ms", "flops", "read_bytes", "written_bytes", "kinds", "rows"}; all runs of a
    kernel together.
    """
    kinds: dict[str, Counter] = defaultdict(Counter)
    listed = []
    for row in rows:
        sums = {
            "count": row.count,
            "flops": row.count * row.flops,
            "read_bytes": row.count * row.read,
            "written_bytes": row.count * row.written,
        }
        milliseconds = 1e3 * row.seconds(rates)
        kinds[row.kind].update(sums | {"ms": milliseconds})
        listed.append({"name": row.name, "kind": row.kind, **sums, "ms": milliseconds, "by": row.bound_by(rates)})
    total = sum(kinds.values(), Counter())
    rounded = [each | {"ms": round(each["ms"], 3)} for each in (total, *kinds.values(), *listed)]
    return {**rounded[0], "kinds": dict(zip(kinds, rounded[1:])), "rows": rounded[1 + len(kinds) :]}


def streaming(config: Config, rates: Rates, precision: str = "bfloat16") -> dict[str, Any]:
    """The bounds of a model's streaming loop as its sampling has it: forward, decoder, frames per second, and the wait
    for the first frame.

    Forward and decoder share one device, so a chunk takes the time of its s forwards and of its decoding; while they
    overlap neither runs faster. The first frame waits for the forwards of the filling and of a chunk. The decoder
    computes in the transformer's type, fp8 being bfloat16 for it.
    """
    decoding = "float32" if precision == "float32" else "bfloat16"
    scheme, guided = PartitionScheme.parse(config.sampling.scheme), config.sampling.guidance != 1
    chunk = scheme.chunk_size, *config.dit.latent[1:]
    of_forward = bound(forward(config.dit, flops.text_tokens(config), precision, 1 + guided), rates)
    of_decoder = bound(decoder(config.tae, chunk, decoding), rates)
    frames = scheme.chunk_size * config.tae.compression[0]
    until_frames = Timetable(scheme, config.sampling.filling, config.tae.compression[0]).steps_until_frames(0)
    denoising = scheme.micro_steps * of_forward["ms"]
    return {
        "scheme": str(scheme),
        "guidance": config.sampling.guidance,
        "precision": precision,
        "decoder_precision": decoding,
        "rates": dataclasses.asdict(rates),
        "frames_per_chunk": frames,
        "forwards_per_chunk": scheme.micro_steps,
        "denoise_fps": round(1e3 * frames / denoising, 2),
        "end_to_end_fps": round(1e3 * frames / (denoising + of_decoder["ms"]), 2),
        "first_frame_ms": round(until_frames * of_forward["ms"] + of_decoder["ms"], 1),
        "decoder_share": round(of_decoder["ms"] / (denoising + of_decoder["ms"]), 4),
        "forward": of_forward,
        "decoder": of_decoder,
    }
