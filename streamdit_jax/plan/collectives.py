"""What a compiled step sends between devices, read from its optimised HLO: kind, mesh axes, count, bytes.

The bytes of one collective are those of the larger of what a device gives and what it gets: the whole of an
all-gather's result, of a reduce-scatter's operand, of what a permute sends. A ring moves (n − 1)/n of that over each
link, and twice that for an all-reduce. Bodies of loops count as often as they run; of a conditional's branches the one
that sends most. Between TPU slices hosts send what the compiler gives them: the axis "slices".
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of the others the name ends with them: bf16, f32, s4, f8e4m3fn
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRIPS = re.compile(r"known_trip_count\D+(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO. type: of its result. operands, attributes: what stands within and after its parentheses."""

    name: str
    opcode: str
    type: str
    operands: str
    attributes: str


def bytes_of(type_: str) -> list[int]:
    """Bytes of each array in an HLO type such as "(bf16[2,3]{1,0}, f32[])"."""
    sizes = []
    for kind, shape in _ARRAY.findall(type_):
        bits = _BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            if digits is None:
                continue
            bits = int(digits.group())
        sizes.append(math.ceil(math.prod(int(size) for size in shape.split(",") if size) * bits / 8))
    return sizes


def _instruction(line: str) -> Instruction | None:
    named = _INSTRUCTION.match(line)
    if named is None:
        return None
    rest = line[named.end() :]
    found = _OPCODE.search(" " + rest)
    if found is None:
        return None
    start, depth = found.end() - 1, 1
    end = start
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return Instruction(named.group(1), found.group(1), rest[: found.start()].strip(), rest[start : end - 1], rest[end:])


def computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of an HLO module by name, and the name of its entry."""
    found: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            current = header.group(2) or header.group(4)
            found[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line.strip())):
            found[current].append(instruction)
    return found, entry


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
        if branches := list(_branches(one)):
            return max(map(of, branches), key=_bytes, default=Counter())
        total: Counter = Counter()
        called = dict(_CALLED.findall(one.attributes))
        for role, name in called.items():
            times = _trips(one, found.get(called.get("condition", ""), [])) if role == "body" else 1
            total.update({key: times * value for key, value in of(name).items()})
        return total

    return of(entry)


def _bytes(counted: Counter) -> int:
    return sum(value for (_, _, what), value in counted.items() if what == "bytes")


def _branches(one: Instruction) -> Iterator[str]:
    if one.opcode == "conditional":
        if several := _BRANCHES.search(one.attributes):
            yield from re.findall(r"%?([\w.\-]+)", several.group(1))
        yield from (name for role, name in _CALLED.findall(one.attributes) if role.endswith("_computation"))


def _trips(loop: Instruction, condition: list[Instruction]) -> int:
    """How often a loop runs: as XLA says, or the constant that its condition compares with; 1 where neither tells."""
    if known := _TRIPS.search(loop.attributes):
        return int(known.group(1))
    constants = [int(one.operands) for one in condition if one.opcode == "constant" and one.operands.strip().isdigit()]
    return max(constants, default=1)


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
