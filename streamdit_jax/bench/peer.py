"""The PyTorch peer, in a process of its own: attention, products and a diffusers transformer of given shapes.

    python -m streamdit_jax.bench.peer < SHAPES.json        (`bench.compare.shapes`)

prints one JSON object. The transformer is diffusers' WanTransformer3DModel with random weights, compiled block by block
on GPUs. It differs from ours in what its options do not offer; `differs` in the report says in what.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

REPEATS = 10
WARM_UP = 3
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DIFFERS = [
    "one time step for all frames, where ours has one per frame",
    "RMS norm of queries and keys, and rotary positions, where ours adds learned positions",
    "keys and values of the text are computed in every forward",
]
WHOLE = "whole: every token attends to all others, where ours attends to its window"
WINDOWS = "windows: each window is a clip of its own with its share of the text tokens; no window is shifted"


def measure(shapes: dict[str, Any]) -> dict[str, Any]:
    """{"device", "dtype", "compiled", "versions", "attention", "products", "transformer", "differs", "left_out"}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, shapes["dtype"])
    torch.manual_seed(0)
    left_out: list[str] = []
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": shapes["dtype"],
        "compiled": device.type == "cuda",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "attention": attention(shapes, device, dtype, left_out),
        "products": products(shapes, device, dtype),
    }
    try:
        report["versions"]["diffusers"] = metadata.version("diffusers")
        report["transformer"] = transformer(shapes, device, dtype, left_out)
        report["differs"] = [*DIFFERS, WINDOWS, WHOLE]
    except (metadata.PackageNotFoundError, ImportError) as missing:
        left_out.append(f"transformer: diffusers cannot be imported ({missing}): pip install diffusers")
    return report | {"left_out": left_out}


def attention(shapes: dict, device: torch.device, dtype: torch.dtype, left_out: list[str]) -> dict[str, Any]:
    """scaled_dot_product_attention of all windows as a batch, forward and backward: by torch's own choice, and on GPUs
    by each backend that takes it.
    """
    frames, height, width = shapes["window"]
    size = (shapes["windows"], shapes["num_heads"], frames * height * width, shapes["head_dim"])
    query, key, value = (torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    direction = torch.randn(size, device=device, dtype=dtype)
    flops = 4 * size[0] * size[1] * size[2] ** 2 * size[3]

    def forward() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(query, key, value)

    def both() -> None:
        out = F.scaled_dot_product_attention(query, key, value)
        torch.autograd.grad(out, (query, key, value), direction)

    def timed() -> dict[str, float]:
        seconds = median_seconds(forward, device)
        backward = max(median_seconds(both, device) - seconds, 1e-9)  # its products are two and a half times as many
        return rate(seconds, flops) | {f"backward_{name}": each for name, each in rate(backward, 2.5 * flops).items()}

    report = {"shape": [size[0], size[2], size[1], size[3]], "default": timed()}
    for name, backend in BACKENDS.items() if device.type == "cuda" else ():
        try:
            with sdpa_kernel(backend):
                report[name] = timed()
        except RuntimeError as refused:
            left_out.append(f"attention by {name}: {str(refused).splitlines()[0]}")
    return report


def products(shapes: dict, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The four products of a block, [tokens, inputs] × [inputs, outputs]."""
    tokens, width, inner = shapes["tokens"], shapes["width"], shapes["ffn_width"]
    sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, inner), "down": (inner, width)}
    report = {}
    for name, (inputs, outputs) in sizes.items():
        x = torch.randn(tokens, inputs, device=device, dtype=dtype)
        weight = torch.randn(inputs, outputs, device=device, dtype=dtype)
        report[name] = rate(
            median_seconds(lambda x=x, weight=weight: x @ weight, device), 2 * tokens * inputs * outputs
        )
    return report


def transformer(shapes: dict, device: torch.device, dtype: torch.dtype, left_out: list[str]) -> dict[str, Any]:
    """One forward of windows as clips of their own, whose products are about those of ours, and of the whole buffer."""
    from diffusers import WanTransformer3DModel

    channels, (_, rows, columns) = shapes["latent"][3], shapes["patch"]
    with torch.device(device):
        model = WanTransformer3DModel(
            patch_size=tuple(shapes["patch"]),
            num_attention_heads=shapes["num_heads"],
            attention_head_dim=shapes["head_dim"],
            in_channels=channels,
            out_channels=channels,
            text_dim=shapes["width"],
            freq_dim=shapes["time_frequencies"],
            ffn_dim=shapes["ffn_width"],
            num_layers=shapes["num_layers"],
        )
    model = model.to(dtype).eval().requires_grad_(False)
    if device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True)
    frames, height, width = shapes["window"]
    count = shapes["windows"]
    clips = {
        "windows": (count, channels, frames, rows * height, columns * width),
        "whole": (1, channels, *shapes["latent"][:3]),
    }
    report: dict[str, Any] = {"parameters": sum(each.numel() for each in model.parameters())}
    for name, size in clips.items():
        latents = torch.randn(size, device=device, dtype=dtype)
        text = torch.randn(
            size[0], max(1, shapes["text_tokens"] // size[0]), shapes["width"], device=device, dtype=dtype
        )
        times = torch.full(size[:1], 500, device=device)

        @torch.no_grad()
        def forward(latents=latents, times=times, text=text) -> None:
            model(latents, times, text, return_dict=False)

        try:
            report[name] = {"latents": list(size), "ms": round(1e3 * median_seconds(forward, device), 3)}
        except torch.OutOfMemoryError:
            left_out.append(f"transformer, {name}: out of memory")
    return report


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of REPEATS calls, each waited for, after some that compile and warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        function()
    times = []
    for _ in range(REPEATS):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def rate(seconds: float, flops: float) -> dict[str, float]:
    """{"ms", "tflops"}: of so many FLOPs in so many seconds."""
    return {"ms": round(1e3 * seconds, 4), "tflops": round(flops / seconds / 1e12, 4)}


def attention_alone(shapes: dict[str, Any]) -> dict[str, Any]:
    """`attention` and its "left_out", of shapes of which it needs no more than the windows', heads and type."""
    device, left_out = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    return attention(shapes, device, getattr(torch, shapes["dtype"]), left_out) | {"left_out": left_out}


if __name__ == "__main__":
    print(json.dumps((attention_alone if "--attention" in sys.argv else measure)(json.load(sys.stdin))))
