"""The arithmetic of one forward of the transformer, counted from its configuration: the numerator of every share of a
peak.

A product of [m, k] and [k, n] is 2·m·k·n FLOPs. Only products are counted: what is elementwise is memory traffic.
"""

import math
from collections.abc import Sequence

from streamdit_jax.config import Config
from streamdit_jax.models.dit import Axes, DiTConfig


def forward_flops(
    config: DiTConfig, text_tokens: int, text_widths: Sequence[int] = (), *, text_is_cached: bool = True
) -> dict[str, int]:
    """FLOPs of one forward for one stream: {"gemm", "cross_attention", "window_attention", "text", "total"} (§4.1).

    gemm: projections and feed-forward of all tokens, patches in and out, and what is done per frame. window_attention,
        cross_attention: scores and weighted values. text: projections of the text and its keys and values; 0 where
        these are cached, as they can be for as long as a prompt stays.
    text_tokens: length of the text sequence, padding included. text_widths: of each encoder's output; needed only
        where the text is not cached, the encoders having equal shares of the tokens.
    """
    width, layers = config.width, config.num_layers
    frames, tokens = config.latent[0], math.prod(config.grid)
    patch = config.patch[1] * config.patch[2] * config.latent[3]
    feed_forward = (3 if config.ffn == "swiglu" else 2) * width * config.ffn_width
    cross_projections = 2 * width * width if config.cross_attention else 0
    per_token = layers * (4 * width * width + cross_projections + feed_forward) + 2 * patch * width
    per_frame = config.time_frequencies * width + width * width
    if config.adaln == "single":
        per_frame += 6 * width * width
    else:
        per_frame += layers * 6 * width * width + 2 * width * width
    seen = sum(math.prod(config.windows[index % len(config.windows)]) for index in range(layers))
    counts = {
        "gemm": 2 * (tokens * per_token + frames * per_frame),
        "cross_attention": 4 * layers * tokens * text_tokens * width if config.cross_attention else 0,
        "window_attention": 4 * tokens * seen * width,
        "text": 0,
    }
    if config.cross_attention and not text_is_cached:
        if not text_widths or text_tokens % len(text_widths):
            raise ValueError(f"text_widths: {len(text_widths)} encoders do not share {text_tokens} tokens")
        of_each = text_tokens // len(text_widths)
        deeper = width * width if config.text_projection == "mlp" else 0
        projections = sum(of_each * (of_encoder * width + deeper) for of_encoder in text_widths)
        counts["text"] = 2 * (projections + layers * text_tokens * 2 * width * width)
        if config.pooled_text:  # one mean of the text, through one projection
            counts["text"] += 2 * width * width
    return {**counts, "total": sum(counts.values())}


def text_tokens(config: Config) -> int:
    """The text sequence that a model's transformer attends to: every encoder's, padded to the shortest limit."""
    return len(config.text) * min(of_encoder.max_tokens for of_encoder in config.text)


def of_model(config: Config, bucket: Axes | None = None, *, text_is_cached: bool = True) -> dict[str, int]:
    """`forward_flops` of a whole model's configuration, for its buffer or a smaller (frames, height, width)."""
    widths = [of_encoder.width for of_encoder in config.text]
    dit = config.dit if bucket is None else config.dit.at(bucket)
    return forward_flops(dit, text_tokens(config), widths, text_is_cached=text_is_cached)
