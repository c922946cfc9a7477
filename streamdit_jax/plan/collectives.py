"""What a compiled step sends between devices, read from its optimised HLO: kind, mesh axes, count, bytes.

The bytes of one collective are those of the larger of what a device gives and what it gets: the whole of an
all-gather's result, of a reduce-scatter's operand, of what a permute sends. A ring moves (n − 1)/n of that over each
link, and twice that for an all-reduce. Bodies of loops count as often as they run; of a conditional's branches the one
that sends most. Between TPU slices hosts send what the compiler gives them: the axis "slices".
"""

import math
import re
from collections import Counter

import numpy as np

from streamdit_jax.plan.hlo import CALLED, Instruction, branches, bytes_of, computations, trips

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")

_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def groups_of(attributes: str) -> np.ndarray | None:
    """The devices that take part together, [groups, devices], of a collective's attributes; None for all together."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return np.array(re.findall(r"\{(\d+),(\d+)\}", pairs.group(1)), int).reshape(-1, 2)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = ([int(number) for number in part.split(",")] if part else None for part in iota.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return (devices if order is None else devices.transpose(order)).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        together = [name for name in sizes if f"'{name}'" in named.group(3)]
        order = [name for name in sizes if name not in together] + together
        devices = _device_ids(named.group(2), math.prod(sizes.values())).reshape(tuple(sizes.values()))
        devices = devices.transpose([list(sizes).index(name) for name in order])
        return devices.reshape(-1, math.prod(sizes[name] for name in together))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    rows = re.findall(r"\{([\d,]+)\}", listed.group(1)) if listed else []
    if not rows:
        return None
    return np.array([[int(number) for number in row.split(",")] for row in rows])


def _device_ids(text: str | None, count: int) -> np.ndarray:
    """The devices of a mesh in its order: all by number, or as "[2,128]T(1,0)" says, or one by one."""
    if not text:
        return np.arange(count)
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims, order = ([int(number) for number in part.split(",")] if part else None for part in iota.groups())
        devices = np.arange(count).reshape(dims)
        return devices if order is None else devices.transpose(order)
    return np.array(re.findall(r"\d+", text), int)


def axes_of(groups: np.ndarray | None, mesh_shape: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, as "data+fsdp"."""
    wide = [name for name, size in mesh_shape.items() if size > 1]
    if groups is None:
        return "+".join(wide)
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))  # [axes, groups, devices]
    differ = (places != places[:, :, :1]).any((1, 2))
    return "+".join(name for name, differs in zip(mesh_shape, differ) if differs)


def _sent(one: Instruction, types: dict[str, str]) -> tuple[int, int]:
    """Bytes given and bytes got of a collective, its asynchronous start included."""
    given = bytes_of(one.operands)  # some texts repeat the operands' types, others only name them
    if not given:
        names = re.findall(r"%([\w.\-]+)", one.operands)
        given = [size for name in names for size in bytes_of(types.get(name, ""))]
    got = bytes_of(one.type)
    if one.opcode.endswith("-start") and len(got) > len(given):  # (operands, results, context)
        got = got[len(given) : 2 * len(given)]
    return sum(given), sum(got)


def collectives(hlo: str, mesh_shape: dict[str, int]) -> Counter:
    """What one device sends in one run of the module: {(kind, axes, "count" | "bytes"): number}.

    hlo: text of the compiled module. mesh_shape: size of each axis in the mesh's order, whose devices are its
        partitions.
    """
    found, entry = computations(hlo)
    types = {one.name: one.type for lines in found.values() for one in lines}
    done: dict[str, Counter] = {}

    def of(name: str) -> Counter:
        if name not in done:
            done[name] = Counter()
            for instruction in found.get(name, ()):
                done[name].update(of_instruction(instruction, name))
        return done[name]

    def of_instruction(one: Instruction, within: str) -> Counter:
        kind = one.opcode.removesuffix("-start")
        if kind == "all-reduce" and within.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the TPU compiler's form of it: a fusion that keeps a slice of the sum
        if kind in KINDS:
            axes = axes_of(groups_of(one.attributes), mesh_shape)
            if not axes:  # each device by itself: an axis of one device
                return Counter()
            return Counter({(kind, axes, "count"): 1, (kind, axes, "bytes"): max(_sent(one, types))})
        if one.opcode == "send" and (transfer := _BETWEEN_SLICES.search(one.attributes)):
            kind, given = transfer.group(1).lower().replace("_", "-"), bytes_of(one.type)[0]
            return Counter({(kind, "slices", "count"): 1, (kind, "slices", "bytes"): given})
        if one.opcode.endswith(("-done", "-update")):
            return Counter()
        if ways := list(branches(one)):
            return max(map(of, ways), key=_bytes, default=Counter())
        total: Counter = Counter()
        called = dict(CALLED.findall(one.attributes))
        for role, name in called.items():
            times = trips(one, found.get(called.get("condition", ""), [])) if role == "body" else 1
            total.update({key: times * value for key, value in of(name).items()})
        return total

    return of(entry)


def _bytes(counted: Counter) -> int:
    return sum(value for (_, _, what), value in counted.items() if what == "bytes")


def summary(counted: Counter) -> dict[str, dict]:
    """{kind: {"count", "bytes", "axes": {"fsdp": {"count", "bytes"}, …}}}; what sends the most bytes first."""
    kinds: dict[str, dict] = {}
    for kind, axes in sorted({key[:2] for key in counted}):
        of_axes = {what: counted[(kind, axes, what)] for what in ("count", "bytes")}
        of_kind = kinds.setdefault(kind, {"count": 0, "bytes": 0, "axes": {}})
        of_kind["axes"][axes] = of_axes
        for what, number in of_axes.items():
            of_kind[what] += number
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"]))
