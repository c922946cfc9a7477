"""What can be chosen of the transformer, and what cannot be (StreamDiT §4.1)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from streamdit_jax.kernels.windows import TokenOrder, Windows

Axes = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shapes and choices of the transformer. Raises ValueError, beginning with the field's name, for what cannot be
    built.

    latent: (frames, height, width, channels) of the buffer. patch: tokens per latent, (1, ph, pw): every frame has a
        level of its own.
    windows, shifted: per layer, repeated as patterns over the layers; a shifted layer moves its windows by half a
        window per axis.
    wrap: per axis, whether shifted windows wrap around (see `kernels.windows.Windows`).
    qk_norm: none | head | width. position: learned | rope | both. adaln: single | per_block. norm: layer | rms, without
        affine.
    ffn: gelu | swiglu. text_projection: linear_norm | mlp. remat: none | dots | full, for the scanned layers.
    pooled_text: the mean of the text joins the time embedding, so that a prompt reaches every modulation at once
        (chosen; not in the paper, and off in its configuration).
    dtype: auto (bfloat16 on accelerators, float32 on CPUs) | float32 | bfloat16: the type of the arithmetic, not of
        the parameters.
    quantization: none | fp8: whether the projections of self-attention and feed-forward are quantised (see
        `models.linear`), which `streamdit quantize` makes and training refuses.
    """

    latent: tuple[int, int, int, int]
    patch: Axes
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    windows: tuple[Axes, ...]
    shifted: tuple[bool, ...] = (False, True)
    wrap: tuple[bool, bool, bool] = (True, True, True)
    cross_attention: bool = True
    norm: str = "layer"
    ffn: str = "gelu"
    adaln: str = "single"
    position: str = "learned"
    qk_norm: str = "none"
    text_projection: str = "linear_norm"
    pooled_text: bool = False
    time_frequencies: int = 256
    remat: str = "full"
    dtype: str = "auto"
    quantization: str = "none"

    def __post_init__(self):
        choices = {
            "norm": ("layer", "rms"),
            "ffn": ("gelu", "swiglu"),
            "adaln": ("single", "per_block"),
            "position": ("learned", "rope", "both"),
            "qk_norm": ("none", "head", "width"),
            "text_projection": ("linear_norm", "mlp"),
            "remat": ("none", "dots", "full"),
            "dtype": ("auto", "float32", "bfloat16"),
            "quantization": ("none", "fp8"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {getattr(self, field)!r} is not one of {', '.join(allowed)}")
        for field, count in (("latent", 4), ("patch", 3), ("wrap", 3)):
            if len(getattr(self, field)) != count:
                raise ValueError(
                    f"{field}: needs {count} values, not the {len(getattr(self, field))} of {getattr(self, field)}"
                )
        for field in ("width", "num_layers", "num_heads", "ffn_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, not {getattr(self, field)}")
        if self.time_frequencies < 2 or self.time_frequencies % 2:
            raise ValueError(f"time_frequencies: must be even and positive, not {self.time_frequencies}")
        if min(self.latent) < 1:
            raise ValueError(f"latent: every size must be at least 1, not {self.latent}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} heads do not divide a width of {self.width}")
        if self.position != "learned" and self.head_dim % 2:
            raise ValueError(f"num_heads: rotary positions need an even head size, not {self.head_dim}")
        if self.patch[0] != 1:
            raise ValueError(f"patch: must be 1 along time, where every frame has its own level, not {self.patch[0]}")
        for axis, size, patch in zip(("height", "width"), self.latent[1:3], self.patch[1:]):
            if patch < 1 or size % patch:
                raise ValueError(f"patch: {patch} does not divide a latent {axis} of {size}")
        if not self.windows or any(len(window) != 3 for window in self.windows):
            raise ValueError(f"windows: needs at least one (frames, height, width), not {self.windows}")
        if self.pooled_text and not self.cross_attention:
            raise ValueError("pooled_text: needs the text that cross_attention = False leaves out")
        if not self.shifted:
            raise ValueError("shifted: needs at least one of False and True")
        if self.num_layers % self.period:
            raise ValueError(
                f"num_layers: {self.num_layers} layers do not hold whole patterns of {self.period} (windows, shifted)"
            )
        self.layer_windows()

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def grid(self) -> Axes:
        """Tokens along time, height and width."""
        return tuple(size // patch for size, patch in zip(self.latent[:3], self.patch))

    @property
    def period(self) -> int:
        """Layers after which the pattern of windows and shifts repeats."""
        return math.lcm(len(self.windows), len(self.shifted))

    @property
    def compute_dtype(self) -> jnp.dtype:
        if self.dtype == "auto":
            return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        return jnp.dtype(self.dtype)

    def at(self, bucket: Axes) -> "DiTConfig":
        """The configuration of a smaller buffer of (frames, height, width), which the same parameters serve: windows
        end where the grid does. ValueError, beginning with "latent" or "windows", where it cannot be one.
        """
        if len(bucket) != 3 or any(size > whole for size, whole in zip(bucket, self.latent)):
            raise ValueError(f"latent: {tuple(bucket)} does not fit into the model's {self.latent[:3]}")
        grid = tuple(max(1, size // patch) for size, patch in zip(bucket, self.patch))
        windows = tuple(tuple(map(min, window, grid)) for window in self.windows)
        return dataclasses.replace(self, latent=(*bucket, self.latent[3]), windows=windows)

    def layer_windows(self) -> tuple[Windows, ...]:
        """The windows of each layer of one period, over one token order that serves them all."""
        layers = []
        for index in range(self.period):
            window, shifted = self.windows[index % len(self.windows)], self.shifted[index % len(self.shifted)]
            TokenOrder(self.grid, window, window)  # raises where the window does not divide the grid
            # A window as long as its axis sees all of it already; moving it would change nothing, or cut it in two.
            shift = tuple(size // 2 if shifted and size < whole else 0 for size, whole in zip(window, self.grid))
            for axis, size, moved in zip(("time", "height", "width"), window, shift):
                if moved and size % 2:
                    raise ValueError(f"windows: a window of {size} along {axis} has no half to shift by; make it even")
            layers.append((window, shift))
        block = tuple(
            math.gcd(*(value for window, shift in layers for value in (window[axis], shift[axis]))) for axis in range(3)
        )
        order = TokenOrder(self.grid, layers[0][0], block)
        return tuple(Windows(order, window, shift, self.wrap) for window, shift in layers)
