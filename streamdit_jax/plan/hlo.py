"""The text of an optimised HLO module, read: computations, their instructions, and the bytes of types."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of the others the name ends with them: bf16, f32, s4, f8e4m3fn
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
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


def names(operands: str) -> list[str]:
    """The instructions that operands name, in order."""
    return re.findall(r"%([\w.\-]+)", operands)


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


def branches(one: Instruction) -> Iterator[str]:
    """The computations that a conditional chooses among, in the order of its operands."""
    if one.opcode == "conditional":
        if several := _BRANCHES.search(one.attributes):
            yield from re.findall(r"%?([\w.\-]+)", several.group(1))
        yield from (name for role, name in CALLED.findall(one.attributes) if role.endswith("_computation"))


def trips(loop: Instruction, condition: list[Instruction]) -> int:
    """How often a loop runs: as XLA says, or the constant that its condition compares with; 1 where neither tells."""
    if known := _TRIPS.search(loop.attributes):
        return int(known.group(1))
    constants = [int(one.operands) for one in condition if one.opcode == "constant" and one.operands.strip().isdigit()]
    return max(constants, default=1)
