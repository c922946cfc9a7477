"""The probe: reads a clip's seven roadtrip factors, so that generated video can be held against its prompt.

What a vehicle is, and where and when, is read from single frames by one convolutional trunk with a linear head per
factor; log-probabilities are averaged over FRAMES frames. Direction and speed are read from motion alone: from how
well each band of rows matches itself LAG frames later at each horizontal shift. The way the vehicle faces is no
evidence of where it drives.

    python -m streamdit_jax.evaluation.probes --out DIR

trains it on renders of the training combinations, measures it on renders of the held-out ones, and writes
DIR/probe.safetensors and DIR/probe.json.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, UInt8
from safetensors.numpy import load_file, save_file

from streamdit_jax.data.roadtrip import FACTORS, Factors, clip_factors, render
from streamdit_jax.errors import CheckpointError
from streamdit_jax.machine import hardware, versions

BUNDLED = Path(__file__).parents[1] / "bundled" / "probe" / "probe.safetensors"
MIN_FRAMES = 16  # one second: what is needed to read motion, and what it is trained on
FRAMES = 4  # frames that the trunk looks at, evenly spaced over the clip
LAG, REACH = 4, 9  # frames between which motion is read; pixels to either side
BAND, FIRST_ROW = 4, 20  # rows averaged into a band; the sky above has nothing that passes
MOTION = ("direction", "speed")
_CHUNK = 32  # clips classified at once: one compiled shape


def motion_profile(clips: Float[Array, "b f 64 64 3"]) -> Float[Array, "b k"]:
    """Correlation of every band of rows with itself LAG frames later at shifts −REACH … REACH, each in [−1, 1]."""
    bands = clips.mean(-1)[:, :, FIRST_ROW:].reshape(*clips.shape[:2], (64 - FIRST_ROW) // BAND, BAND, 64).mean(3)
    bands = bands - bands.mean(1, keepdims=True)  # what stands still is no evidence of motion
    before, after = bands[:, :-LAG, :, REACH : 64 - REACH], bands[:, LAG:]
    width = 64 - 2 * REACH
    shifted = jnp.stack([after[..., s : s + width] for s in range(2 * REACH + 1)], axis=-1)  # [b, f, band, x, shift]
    match = jnp.einsum("bfrx,bfrxs->brs", before, shifted)
    energy = jnp.einsum("bfrx,bfrx->br", before, before)[..., None] * jnp.einsum("bfrxs,bfrxs->brs", shifted, shifted)
    return (match / jnp.sqrt(energy + 1e-4)).reshape(len(clips), -1)


class Probe(nn.Module):
    """Frames [b, 64, 64, 3] in [0, 1] and motion profiles [b, k] → logits [b, values] for each factor."""

    widths: tuple[int, ...] = (24, 32, 48, 48)

    @nn.compact
    def __call__(self, frames, profile, *, features: bool = False):
        """The logits; with `features` instead what they are read from: the trunk's last map, averaged over places, and
        the hidden layer of motion, each [b, 48].
        """
        x = 2.0 * frames - 1.0
        for level, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), (1, 1) if level == 3 else (2, 2), name=f"conv_{level}")(x)
            x = nn.gelu(nn.LayerNorm(name=f"norm_{level}")(x))
        motion = nn.gelu(nn.Dense(48, name="motion")(profile))
        if features:
            return x.mean((1, 2)), motion
        x = x.reshape(len(x), -1)
        return {
            name: nn.Dense(len(values), name=name)(motion if name in MOTION else x) for name, values in FACTORS.items()
        }


def _damage(key, clips: Float[Array, "b f 64 64 3"]) -> Float[Array, "b f 64 64 3"]:
    """What a decoder or a generator may do to a clip: blur, ghosts, grain, stains, brightness and contrast ± 5 %."""
    b, f = clips.shape[:2]
    keys = jax.random.split(key, 7)
    wide = jnp.pad(clips, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (wide[:, :, :-2] + 2 * wide[:, :, 1:-1] + wide[:, :, 2:]) / 4
    blurred = (rows[:, :, :, :-2] + 2 * rows[:, :, :, 1:-1] + rows[:, :, :, 2:]) / 4
    per_clip = (b, 1, 1, 1, 1)
    clips = clips + (blurred - clips) * 1.3 * jax.random.uniform(keys[0], per_clip)
    # four frames share a latent: what moves within it leaves ghosts
    ghosts = clips.reshape(b, f // 4, 4, 64, 64, 3).mean(2).repeat(4, axis=1)
    clips = clips + (ghosts - clips) * 0.6 * jax.random.uniform(keys[6], per_clip)
    grain = 0.05 * jax.random.uniform(keys[1], per_clip) * jax.random.normal(keys[2], clips.shape)
    coarse = jax.random.normal(keys[3], (b, f, 8, 8, 3)).repeat(8, axis=2).repeat(8, axis=3)
    stains = 0.03 * jax.random.uniform(keys[4], per_clip) * coarse
    gain, offset = jnp.split(0.05 * jax.random.uniform(keys[5], (2, b, 1, 1, 1, 1), minval=-1.0), 2)
    return jnp.clip((clips - 0.5) * (1.0 + gain[0]) + 0.5 + offset[0] + grain + stains, 0.0, 1.0)


@jax.jit
def _prepare(key, clips: UInt8[Array, "b f 64 64 3"]):
    """Damaged frames for the trunk, uint8 [b, FRAMES, 64, 64, 3], and the damaged clips' motion profiles [b, k]."""
    damaged = _damage(key, clips.astype(jnp.float32) / 255.0)
    looked_at = np.linspace(0, clips.shape[1] - 1, FRAMES).round().astype(int)
    return jnp.round(damaged[:, looked_at] * 255.0).astype(jnp.uint8), motion_profile(damaged)


def renders(split: str, seed: int, num_clips: int, first: int = 0) -> tuple[np.ndarray, list[Factors]]:
    """Clips first … first + num_clips − 1 of a split, uint8 [num_clips, MIN_FRAMES, 64, 64, 3], and their factors."""
    drawn = [clip_factors(index, seed, split) for index in range(first, first + num_clips)]
    return np.stack([render(factors, clip, MIN_FRAMES) for factors, clip in drawn]), [factors for factors, _ in drawn]


def _labels(factors: list[Factors]) -> dict[str, np.ndarray]:
    return {
        name: np.array([values.index(getattr(clip, name)) for clip in factors], np.int32)
        for name, values in FACTORS.items()
    }


def train_probe(
    seed: int,
    steps: int = 1200,
    num_clips: int = 3072,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Trains on renders of the training split, all drawn from `seed`. Returns the probe's parameters."""
    import optax  # needed for training only; reading a clip does without

    model, key = Probe(), jax.random.key(seed)
    frames, profiles, factors = [], [], []
    for first in range(0, num_clips, _CHUNK):
        clips, drawn = renders("train", seed, min(_CHUNK, num_clips - first), first)
        chunk = _prepare(jax.random.fold_in(key, first), clips)
        frames.append(np.asarray(chunk[0]))
        profiles.append(np.asarray(chunk[1]))
        factors += drawn
        if first % 1024 == 0:
            log(f"rendered {len(factors)} of {num_clips} clips")
    frames, profiles, labels = np.concatenate(frames), np.concatenate(profiles), _labels(factors)

    blank = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, profiles.shape[1]))
    params = jax.jit(model.init)(jax.random.fold_in(key, num_clips), *blank)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps, learning_rate / 100)
    optimizer = optax.adamw(schedule, weight_decay=0.02)

    @jax.jit
    def step(params, state, frames, profiles, labels):
        def loss(params):
            logits = model.apply(params, frames.astype(jnp.float32) / 255.0, profiles)
            terms = [optax.softmax_cross_entropy_with_integer_labels(logits[name], labels[name]) for name in FACTORS]
            return sum(terms).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for count in range(steps):
        chosen = rng.integers(num_clips, size=batch_size)
        seen = frames[chosen, rng.integers(FRAMES, size=batch_size)]
        batch = {name: places[chosen] for name, places in labels.items()}
        params, state, value = step(params, state, seen, profiles[chosen], batch)
        if count % 100 == 0 or count == steps - 1:
            log(f"step {count}: loss {float(value):.4f}")
    return params


def _looked_at(clips: Float[Array, "b f 64 64 3"]) -> tuple[Array, Array]:
    """The FRAMES frames of each clip that the trunk sees [b·FRAMES, 64, 64, 3], and each one's motion profile."""
    b, f = clips.shape[:2]
    frames = clips[:, np.linspace(0, f - 1, FRAMES).round().astype(int)].reshape(b * FRAMES, 64, 64, 3)
    return frames, motion_profile(clips).repeat(FRAMES, axis=0)


@jax.jit
def _probabilities(params, clips):
    logits = Probe().apply(params, *_looked_at(clips.astype(jnp.float32) / 255.0))
    means = {name: jax.nn.log_softmax(x).reshape(len(clips), FRAMES, -1).mean(1) for name, x in logits.items()}
    return {name: jax.nn.softmax(x) for name, x in means.items()}


@jax.jit
def _features(params, clips):
    trunk, motion = Probe().apply(params, *_looked_at(clips.astype(jnp.float32) / 255.0), features=True)
    return jnp.concatenate([trunk, motion], axis=-1).reshape(len(clips), FRAMES, -1).mean(1)


def _in_chunks(read: Callable, params: dict, clips) -> list:
    """`read` of every chunk of _CHUNK clips, the last one padded; ValueError for clips of another shape or type."""
    clips = np.asarray(clips)
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[2:] != (64, 64, 3) or clips.shape[1] < MIN_FRAMES:
        raise ValueError(
            f"clips: the probe reads uint8 [b, frames ≥ {MIN_FRAMES}, 64, 64, 3], not {clips.dtype} {list(clips.shape)}"
        )
    parts = []
    for first in range(0, len(clips), _CHUNK):
        part = clips[first : first + _CHUNK]
        padded = np.concatenate([part, np.zeros((_CHUNK - len(part), *part.shape[1:]), np.uint8)])
        values, count = jax.device_get(read(params, padded)), len(part)
        parts.append(jax.tree.map(lambda leaf, count=count: leaf[:count], values))
    return parts


def probabilities(params: dict, clips: UInt8[np.ndarray, "b f 64 64 3"]) -> dict[str, Float[np.ndarray, "b v"]]:
    """How likely each value of each factor is, in FACTORS' order; ValueError for clips of another shape or type."""
    none = {name: np.zeros((0, len(values)), np.float32) for name, values in FACTORS.items()}
    return jax.tree.map(lambda *parts: np.concatenate(parts), none, *_in_chunks(_probabilities, params, clips))


def features(params: dict, clips: UInt8[np.ndarray, "b f 64 64 3"]) -> Float[np.ndarray, "b 96"]:
    """What the probe sees in a clip before it decides: the trunk's last map, averaged over places and over FRAMES
    frames (48 numbers), and the hidden layer that reads the motion profile (48). ValueError as `probabilities`.
    """
    return np.concatenate([np.zeros((0, 96), np.float32), *_in_chunks(_features, params, clips)])


def classify(params: dict, clips: UInt8[np.ndarray, "b f 64 64 3"]) -> dict[str, tuple[list[str], np.ndarray]]:
    """For each factor the likeliest value of each clip, and its probability (float32 [b])."""
    read = probabilities(params, clips)
    return {name: ([FACTORS[name][k] for k in p.argmax(-1)], p.max(-1)) for name, p in read.items()}


def right(
    params: dict, clips: UInt8[np.ndarray, "b f 64 64 3"], factors: Sequence[Factors]
) -> dict[str, Bool[np.ndarray, "b"]]:
    """Which clips' values are read as `factors` says, for each factor; ValueError when the counts differ."""
    if len(clips) != len(factors):
        raise ValueError(f"factors: {len(factors)} were given for {len(clips)} clips; give one for each clip")
    read, true = probabilities(params, clips), _labels(factors)
    return {name: read[name].argmax(-1) == true[name] for name in FACTORS}


def accuracy(params: dict, clips: UInt8[np.ndarray, "b f 64 64 3"], factors: Sequence[Factors]) -> dict[str, float]:
    """The share of clips whose value is read as `factors` says, for each factor; ValueError when the counts differ."""
    return {name: float(np.mean(of_clips)) for name, of_clips in right(params, clips, factors).items()}


def save_probe(params: dict, path: Path) -> None:
    """Writes the parameters as safetensors."""
    flat = flatten_dict(jax.device_get(params["params"]), sep="/")
    save_file({name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}, path)


@lru_cache(maxsize=2)
def load_probe(path: Path = BUNDLED) -> dict:
    """Reads the parameters that `save_probe` wrote: the probe that ships with the package by default.

    CheckpointError names a file that is missing, damaged or not a probe.
    """
    try:
        flat = load_file(path)
    except Exception as mistake:
        raise CheckpointError(f"{path}: cannot be read as a probe ({mistake})") from mistake
    bands = (64 - FIRST_ROW) // BAND * (2 * REACH + 1)
    frames, profile = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32), jax.ShapeDtypeStruct((1, bands), jnp.float32)
    expected = flatten_dict(jax.eval_shape(Probe().init, jax.random.key(0), frames, profile)["params"], sep="/")
    if {name: value.shape for name, value in flat.items()} != {name: value.shape for name, value in expected.items()}:
        raise CheckpointError(
            f"{path}: holds other tensors than a probe has; train one with streamdit_jax.evaluation.probes"
        )
    return {"params": unflatten_dict(flat, sep="/")}


def main(arguments: list[str] | None = None) -> None:
    """Trains, measures and writes the probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory to write probe.safetensors and probe.json to"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--clips", type=int, default=3072, help="clips to render for training")
    parser.add_argument("--held-out-clips", type=int, default=1024, help="clips of held-out combinations to measure on")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    params = train_probe(args.seed, args.steps, args.clips, log=print)
    trained = time.perf_counter() - began
    clips, factors = renders("held_out", args.seed + 1, args.held_out_clips)
    damaged = [
        jnp.round(255.0 * _damage(jax.random.key(first), clips[first : first + _CHUNK].astype(np.float32) / 255.0))
        for first in range(0, len(clips), _CHUNK)
    ]
    damaged = np.concatenate(damaged).astype(np.uint8)
    card = {
        "what": "reads the seven factors of a 64x64 roadtrip clip",
        "command": f"python -m streamdit_jax.evaluation.probes --out DIR --seed {args.seed} --steps {args.steps} "
        f"--clips {args.clips} --held-out-clips {args.held_out_clips}",
        "accuracy_held_out_combinations": accuracy(params, clips, factors),
        "accuracy_held_out_combinations_damaged": accuracy(params, damaged, factors),
        "held_out_clips": args.held_out_clips,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "seconds_rendering_and_training": round(trained, 1),
        "hardware": hardware(),
        "versions": versions() | {"optax": metadata.version("optax")},
        "date": datetime.date.today().isoformat(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_probe(params, args.out / "probe.safetensors")
    (args.out / "probe.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
