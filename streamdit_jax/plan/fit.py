"""Whether a step fits its devices; if not, what is over, by how much, and which keys would help."""

from typing import Any

from streamdit_jax.errors import ConfigError


def require_fit(sizes: dict[str, Any], limit: float) -> None:
    """ConfigError where arguments and temporaries take more than the share `limit` of a device's memory.

    sizes: a report, as far as it is known.
    """
    held = sizes["argument_bytes_per_device"] + sizes["temporary_bytes_per_device"]
    if held > limit * sizes["hbm_bytes_per_device"]:
        raise too_large(sizes, limit)


def too_large(sizes: dict[str, Any], limit: float, message: str = "") -> ConfigError:
    """The error of a step that does not fit. message: the compiler's own, for what `sizes` does not tell."""
    arguments, temporaries = sizes["argument_bytes_per_device"], sizes["temporary_bytes_per_device"]
    allowed = limit * sizes["hbm_bytes_per_device"]
    needed = max(arguments + temporaries, sizes.get("used_bytes_per_device", 0))
    if needed > arguments:
        parts = f"arguments {size(arguments)}, temporaries {size(needed - arguments)}"
    else:
        parts = f"arguments {size(arguments)} alone"
    name = f"training.{sizes['stage']}" if "stage" in sizes else "the streaming step"
    if needed > allowed:
        over = f"{size(needed)} of {size(allowed)} ({limit:.0%} of {size(sizes['hbm_bytes_per_device'])}) per device"
        over += f", {size(needed - allowed)} too much: {parts}"
    else:
        over = message.splitlines()[0]
    return ConfigError(f"{name} does not fit {sizes['topology']}: {over}; try {', or '.join(advice(sizes, needed))}")


def size(count: float) -> str:
    """Bytes for readers, as "7.7 GiB"."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def advice(sizes: dict[str, Any], needed: float) -> list[str]:
    """The keys that would make the larger part smaller, with what they are now; the cheapest first."""
    mesh, devices = sizes["mesh"], sizes["devices"]
    arguments = sizes["argument_bytes_per_device"]
    cut = mesh["fsdp"] * mesh["tensor"]
    more_cut = []
    if cut < devices:
        more_cut.append(f"a larger mesh.fsdp or mesh.tensor (parameters are cut in {cut} of {devices})")
    if sizes["what"] == "stream":
        activations = [f"a larger mesh.window (tokens are cut in {mesh['window']})"]
        if sizes["precision"] == "float32":
            activations.insert(0, "--precision=bfloat16")
    else:
        activations = _for_activations(sizes)
    larger = "a larger slice" if devices > 1 else "more devices"
    keys = more_cut + activations if arguments > needed - arguments else activations + more_cut
    return [*keys, f"--topology: {larger}"]


def _for_activations(sizes: dict[str, Any]) -> list[str]:
    mesh, stage = sizes["mesh"], sizes["stage"]
    shards = mesh["data"] * mesh["fsdp"]
    together = sizes["batch_size"] // (shards * sizes["accumulate"])
    keys = []
    if together > 1:
        keys.append(
            f"training.{stage}.accumulate={sizes['accumulate'] * together} or a smaller batch_size "
            f"({together} examples are on a device at once)"
        )
    else:
        keys.append(
            f"a larger mesh.window or mesh.tensor (a device has one example, whose tokens are cut in {mesh['window']} "
            f"and whose heads in {mesh['tensor']})"
        )
    if sizes["remat"] != "full":
        keys.insert(0, f"dit.remat=full (now {sizes['remat']})")
    return keys
