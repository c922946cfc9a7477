"""The transformer in NumPy, float64: written from StreamDiT §4.1 without regard to speed; `models.dit` equals it."""

import math

import jax
import numpy as np


def velocity(params, config, latents, levels, text):
    """The velocity of one example, [frames, height, width, channels], by layers whose one window is the whole grid.

    params: with its layers as a tuple (`unstack`). levels: [frames]. text: per encoder sequence [s, width] and mask
    [s] or [frames, s].
    """
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    frames, heads, dim = config.grid[0], config.num_heads, config.head_dim

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(x, kind=config.norm, p=None):
        centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return x if p is None else x * p["scale"] + p.get("bias", 0)

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def qk_norm(x, p):
        if config.qk_norm == "none":
            return x
        axes = -1 if config.qk_norm == "head" else (-2, -1)
        return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * p["norm"]["scale"]

    def attend(q, k, v, seen):
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        weights = np.exp(scores) * seen
        return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)

    def split(x, parts):
        return np.moveaxis(x.reshape(len(x), parts, heads, dim), 1, 0)

    _, ph, pw = config.patch
    f, h, w, c = config.latent
    x = latents.reshape(f, h // ph, ph, w // pw, pw, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, ph * pw * c)
    places = np.stack(np.meshgrid(*map(np.arange, config.grid), indexing="ij"), -1).reshape(-1, 3)
    frame_of = places[:, 0]
    x = dense(p["patch_embedding"], x)
    half = config.time_frequencies // 2
    angles = 1000 * levels[:, None] * 10_000.0 ** (-np.arange(half) / half)
    time = dense(p["time_embedding"]["linear_1"], np.concatenate([np.cos(angles), np.sin(angles)], -1))
    time = dense(p["time_embedding"]["linear_2"], silu(time))
    sequence = []
    for index, (tokens, _) in enumerate(text):
        of_encoder = p[f"text_projection_{index}"]
        hidden = dense(of_encoder["linear_1"], tokens)
        linear_norm = config.text_projection == "linear_norm"
        sequence.append(
            norm(hidden, "layer", of_encoder["norm"]) if linear_norm else dense(of_encoder["linear_2"], gelu(hidden))
        )
    sequence, seen = np.concatenate(sequence), np.concatenate([mask for _, mask in text], axis=-1)
    by_frame = np.broadcast_to(seen, (frames, len(sequence)))
    if config.pooled_text:
        time = time + dense(p["pooled_text"], np.stack([sequence[mask].mean(0) for mask in by_frame]))

    for layer in p["blocks"]:
        if config.adaln == "single":
            modulation = dense(p["time_projection"], silu(time)).reshape(frames, 6, -1) + layer["modulation"]["table"]
        else:
            modulation = dense(layer["modulation"]["linear"], silu(time)).reshape(frames, 6, -1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = np.moveaxis(modulation[frame_of], 1, 0)
        if config.position in ("learned", "both"):
            tables = layer["position"]
            x = x + tables["frame"][places[:, 0]] + tables["row"][places[:, 1]] + tables["column"][places[:, 2]]
        attention = layer["self_attention"]
        q, k, v = split(dense(attention["qkv"], norm(x) * (1 + scale_1) + shift_1), 3)
        q, k = qk_norm(q, attention.get("query_norm")), qk_norm(k, attention.get("key_norm"))
        if config.position in ("rope", "both"):
            q, k = (wan_rotation(x, places) for x in (q, k))
        x = x + gate_1 * dense(attention["out"], attend(q, k, v, 1))
        cross = layer["cross_attention"]
        [q] = split(dense(cross["query"], norm(x, p=layer["cross_norm"])), 1)
        k, v = split(dense(cross["key_value"], sequence), 2)
        q, k = qk_norm(q, cross.get("query_norm")), qk_norm(k, cross.get("key_norm"))
        x = x + dense(cross["out"], attend(q, k, v, by_frame[frame_of]))
        hidden, ffn = norm(x) * (1 + scale_2) + shift_2, layer["feed_forward"]
        up = dense(ffn["up"], hidden)
        up = gelu(up) if config.ffn == "gelu" else up * silu(dense(ffn["gate"], hidden))
        x = x + gate_2 * dense(ffn["down"], up)

    if config.adaln == "single":
        final = time[:, None] + p["final_modulation"]["table"]
    else:
        final = dense(p["final_modulation"]["linear"], silu(time)).reshape(frames, 2, -1)
    shift, scale = np.moveaxis(final[frame_of], 1, 0)
    x = dense(p["velocity"], norm(x) * (1 + scale) + shift)
    return x.reshape(f, h // ph, w // pw, ph, pw, c).transpose(0, 1, 3, 2, 4, 5).reshape(f, h, w, c)


def wan_rotation(x, places, theta=10_000.0):
    """Wan 2.1's rope for [tokens, heads, dim]: neighbouring channels as complex numbers, turned by their place."""
    dim = x.shape[-1]
    turns = []
    for axis, size in enumerate((dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6))):
        frequencies = 1.0 / np.power(theta, np.arange(0, size, 2, dtype=np.float64) / size)
        turns.append(np.exp(1j * np.outer(places[:, axis], frequencies)))
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    turned = pairs * np.concatenate(turns, axis=-1)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
