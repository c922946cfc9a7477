"""A PyTorch peer of the same shape, measured in a process of its own: that one imports torch, this one never does."""

import importlib.util
import json
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from streamdit_jax import flops
from streamdit_jax.bench.peaks import best_seconds
from streamdit_jax.config import Config
from streamdit_jax.errors import ConfigError, StreamDiTError
from streamdit_jax.kernels.window_attention import window_attention

LIMIT_SECONDS = 900.0


def require_peer(what: str) -> None:
    """ConfigError where torch is not installed, and for --what=train, which has no peer. Imports nothing."""
    if what == "train":
        raise ConfigError("--compare: is of streaming; leave out --what=train")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("--compare: needs PyTorch: pip install torch, and diffusers for the transformer")


def shapes(config: Config) -> dict[str, Any]:
    """What the peer is to be: the sizes of the transformer, and of its first layer's windows."""
    dit = config.dit
    frames, height, width = dit.windows[0]
    return {
        "dtype": str(dit.compute_dtype),
        "latent": list(dit.latent),
        "patch": list(dit.patch),
        "window": [frames, height, width],
        "windows": math.prod(dit.grid) // math.prod(dit.windows[0]),
        "tokens": math.prod(dit.grid),
        "width": dit.width,
        "num_layers": dit.num_layers,
        "num_heads": dit.num_heads,
        "head_dim": dit.head_dim,
        "ffn_width": dit.ffn_width,
        "time_frequencies": dit.time_frequencies,
        "text_tokens": flops.text_tokens(config) if dit.cross_attention else 1,
    }


def peer(config: Config) -> dict[str, Any]:
    """Its report (`bench.peer`). Call it before this process touches the device, whose memory may serve one process
    only. StreamDiTError with the child's last line where it fails.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "streamdit_jax.bench.peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, error = process.communicate(json.dumps(shapes(config)), timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise StreamDiTError(f"bench: the PyTorch peer was not done within {LIMIT_SECONDS:.0f} seconds") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    try:
        return json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        last = (error.strip().splitlines() or ["no message"])[-1]
        raise StreamDiTError(f"bench: the PyTorch peer ended with {process.returncode}: {last}") from None


def own_attention(config: Config) -> dict[str, Any]:
    """Our window attention of one layer, at the shape that the peer's was timed at: {"shape", "ms", "tflops"}."""
    dit = config.dit
    windows, dtype = dit.layer_windows()[0], dit.compute_dtype
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (1, math.prod(dit.grid), dit.num_heads, dit.head_dim)
    query, key, value = (jax.random.normal(each, shape, jnp.float32).astype(dtype) for each in keys)
    seconds = best_seconds(jax.jit(lambda q, k, v: window_attention(q, k, v, windows)), query, key, value)
    seen = math.prod(dit.windows[0])
    products = 4 * shape[1] * seen * dit.width
    return {
        "shape": [shape[1] // seen, seen, dit.num_heads, dit.head_dim],
        "ms": round(1e3 * seconds, 4),
        "tflops": round(products / seconds / 1e12, 4),
    }
