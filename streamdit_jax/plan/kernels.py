"""A census of what a GPU runs in one step, read from the optimised HLO: kernels by kind, their bytes, what is copied.

Every instruction of the schedule is a kernel, apart from those that only name memory (parameters, tuples, bitcasts).
Its bytes are those of its operands, each once, and of its results: what a kernel moves at least if no cache holds it
from the kernel before. Of an operand that a fusion only slices, the slices count. Bodies of loops count as often as
they run; of a conditional one branch, of those with matrix products the larger only where guidance is on.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from streamdit_jax.plan.collectives import KINDS as COLLECTIVES
from streamdit_jax.plan.hlo import CALLED, Instruction, branches, bytes_of, computations, names, trips

LARGE = 2**20  # bytes from which a copy, and a weight, counts as one
LISTED = 12

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_DONE = ("-done", "-update")
_MOVES = {"copy", "transpose", "slice", "gather", "concatenate", "dynamic-slice", "dynamic-update-slice", "pad"}
_NO_WORK = _MOVES | _FREE | {"reshape", "broadcast", "iota", "reverse", "compare", "select", "clamp"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_EPILOGUE = re.compile(r'"epilogue":"(\w+)"')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([^\]}]*)')
_BATCHED = re.compile(r'lhs_batch_dim(?:ension)?s"?[:=][\[{]"?\d')
_SHAPE = re.compile(r"^\(?[a-z]+\d*[a-z0-9]*\[([\d,]*)\]")
_WEIGHT = re.compile(r"\bparams\b")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one launch does. kind: gemm | fp8_gemm | batched_gemm | cudnn | mosaic_gpu | triton | copy | elementwise |
    collective | other.

    scope: the path of the model that it computes, as JAX names it; "" where XLA does not say. result: the type that it
    writes. detail: an epilogue, or the target of a custom call. flops: of matrix products that XLA can count.
    weight: the parameter that it copies, in another order or type; "" where it copies none.
    """

    name: str
    kind: str
    scope: str
    result: str
    read: int
    written: int
    flops: int = 0
    detail: str = ""
    weight: str = ""


def kernels(hlo: str, *, guided: bool) -> Iterator[tuple[Kernel, int]]:
    """Each kernel of one run of the module, in its order, and how often it is launched there."""
    found, entry = computations(hlo)
    return _Walk(found, guided).of(entry, (), 1)


class _Walk:
    """Follows a module's schedule. A value's origin is a parameter of weights by name, the origins of a tuple's
    elements, or None.
    """

    def __init__(self, found: dict[str, list[Instruction]], guided: bool):
        self.found, self.guided = found, guided
        self.types = {one.name: one.type for lines in found.values() for one in lines}

    def of(self, computation: str, given: Sequence[Any], times: int) -> Iterator[tuple[Kernel, int]]:
        origins: dict[str, Any] = {}
        for one in self.found.get(computation, ()):
            inputs = [origins.get(name) for name in names(one.operands)]
            if one.opcode == "parameter":
                origins[one.name] = _parameter(one, given)
            elif one.opcode == "tuple":
                origins[one.name] = inputs
            elif one.opcode == "get-tuple-element":
                whole, index = inputs[0], re.search(r"index=(\d+)", one.attributes)
                origins[one.name] = whole[int(index.group(1))] if isinstance(whole, list) else None
            elif one.opcode == "bitcast":
                origins[one.name] = inputs[0]
            elif one.opcode == "while":
                origins[one.name] = inputs[0]  # weights are carried through a loop unchanged
                called = dict(CALLED.findall(one.attributes))
                runs = trips(one, self.found.get(called["condition"], []))
                yield from self.of(called["body"], inputs, times * runs)
            elif one.opcode == "conditional":
                yield from self._choice(one, inputs[1:], times)
            elif one.opcode in ("call", "async-start"):
                for _, name in CALLED.findall(one.attributes):
                    yield from self.of(name, inputs, times)
            elif one.opcode not in _FREE and not one.opcode.endswith(_DONE):
                yield self._kernel(one, inputs), times

    def _choice(self, one: Instruction, inputs: list[Any], times: int) -> Iterator[tuple[Kernel, int]]:
        ways = [list(self.of(name, [given], times)) for name, given in zip(branches(one), inputs)]
        ways.sort(key=lambda way: sum(count * (kernel.read + kernel.written) for kernel, count in way))
        multiply = all(any(kernel.flops for kernel, _ in way) for way in ways)
        return iter(ways[0 if multiply and not self.guided else -1])

    def _kernel(self, one: Instruction, inputs: list[Any]) -> Kernel:
        calls = dict(CALLED.findall(one.attributes)).get("calls")
        inside = self.found.get(calls, []) if one.opcode == "fusion" else []
        kind, detail, product = self._kind(one, inside)
        read, written = self._moved(one, inside)
        weight = self._copied_weight(one, inputs, kind)
        scope = _SCOPE.search(one.attributes)
        scope = scope.group(1).split(";")[0] if scope else ""
        flops = _flops(product, self.types) if product else 0
        return Kernel(one.name, kind, scope, _results(one)[0], read, written, flops, detail, weight)

    def _kind(self, one: Instruction, inside: list[Instruction]) -> tuple[str, str, Instruction | None]:
        """Kind, detail, and the matrix product that it is, if any."""
        if one.opcode.removesuffix("-start") in COLLECTIVES:
            return "collective", one.opcode.removesuffix("-start"), None
        if one.opcode == "custom-call":
            target = _TARGET.search(one.attributes).group(1)
            if target.startswith("__cublas"):
                epilogue = _EPILOGUE.search(one.attributes)
                detail = epilogue.group(1) if epilogue else "DEFAULT"
                return self._product(one, target.endswith("$f8")), detail, one
            if target.startswith("__cudnn"):
                return "cudnn", target, None
            if "mosaic" in target:
                return "mosaic_gpu", target, None
            return ("triton" if "triton" in target else "other"), target, None
        product = next((each for each in inside if each.opcode == "dot"), one if one.opcode == "dot" else None)
        if product:
            operands = [self.types.get(name, "") for name in names(product.operands)]
            return self._product(product, all(type_.startswith("f8") for type_ in operands)), "fusion", product
        opcodes = {each.opcode for each in inside} or {one.opcode}
        return ("copy" if opcodes <= _NO_WORK and opcodes & _MOVES else "elementwise"), "", None

    def _product(self, one: Instruction, eight_bits: bool) -> str:
        if _BATCHED.search(one.attributes):
            return "batched_gemm"
        return "fp8_gemm" if eight_bits else "gemm"

    def _moved(self, one: Instruction, inside: list[Instruction]) -> tuple[int, int]:
        """Bytes read and written, without what is only scratch."""
        operands = dict.fromkeys(names(one.operands))  # what is read twice is held by the caches
        sizes = [sum(bytes_of(self.types.get(name, ""))) for name in operands]
        written = sum(map(sum, map(bytes_of, _results(one))))
        if inside:
            places = {each.name: int(each.operands) for each in inside if each.opcode == "parameter"}
            of_operand = dict(zip(operands, sizes))
            order = names(one.operands)
            sizes, seen = [], set()
            for name, place in places.items():
                if place < len(order) and order[place] not in seen:
                    seen.add(order[place])
                    sizes.append(min(of_operand[order[place]], _read_of(name, inside, self.types)))
            root = _root(inside)
            if root.opcode == "dynamic-update-slice":  # in place: the update is written, and nothing else
                written = sum(bytes_of(self.types[names(root.operands)[1]]))
        return sum(sizes), written

    def _copied_weight(self, one: Instruction, inputs: list[Any], kind: str) -> str:
        """The weight that comes out as large as it went in, or a large part of which is only moved."""
        if kind not in ("copy", "elementwise"):
            return ""
        largest = max(_results(one), key=_numbers)
        for name, origin in zip(names(one.operands), inputs):
            type_ = self.types.get(name, "")
            if not isinstance(origin, str) or sum(bytes_of(type_)) < LARGE:
                continue
            if _numbers(largest) >= _numbers(type_) or (kind == "copy" and sum(bytes_of(largest)) >= LARGE):
                return origin
        return ""


def _parameter(one: Instruction, given: Sequence[Any]) -> Any:
    index = int(one.operands)
    if index < len(given):
        return given[index]
    scope = _SCOPE.search(one.attributes)
    return scope.group(1).replace("\\'", "'") if scope and _WEIGHT.search(scope.group(1)) else None


def _results(one: Instruction) -> list[str]:
    """The types of what a kernel leaves; what a library takes as scratch beside it is none of it."""
    each = re.findall(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\]", one.type) or [one.type]
    if one.opcode == "custom-call" and len(each) > 1:
        each = [type_ for type_ in each if not re.match(r"[su]8\[\d*\]$", type_)] or each[:1]
    return each


def _root(inside: list[Instruction]) -> Instruction:
    by_name, root = {each.name: each for each in inside}, inside[-1]
    while root.opcode in ("bitcast", "reshape"):
        root = by_name[names(root.operands)[0]]
    return root


def _read_of(name: str, inside: list[Instruction], types: dict[str, str]) -> int:
    """Bytes that a fusion reads of its parameter: the slices, where nothing else is taken of it."""
    read = 0
    for user in inside:
        operands = names(user.operands)
        if name not in operands:
            continue
        if user.opcode == "bitcast":
            read += _read_of(user.name, inside, types)
        elif user.opcode in _SLICES and operands[0] == name:
            read += sum(bytes_of(user.type))
        elif not (user.opcode == "dynamic-update-slice" and operands[0] == name):
            return sum(bytes_of(types[name]))
    return read


def _dimensions(type_: str) -> list[int]:
    found = _SHAPE.match(type_.strip())
    return [int(size) for size in found.group(1).split(",") if size] if found else []


def _numbers(type_: str) -> int:
    return math.prod(_dimensions(type_))


def _flops(product: Instruction, types: dict[str, str]) -> int:
    """2·m·k·n of a matrix product, batches included."""
    contracted = _CONTRACTED.search(product.attributes)
    left = _dimensions(types.get(names(product.operands)[0], ""))
    if contracted is None or not left:
        return 0
    axes = [int(axis) for axis in re.findall(r"\d+", contracted.group(1))]
    return 2 * _numbers(product.type) * math.prod(left[axis] for axis in axes)


def census(hlo: str, *, guided: bool, layers: int) -> dict[str, Any]:
    """The kernels of one step as a plan reports them.

    launches: of all kinds. per_layer: of those within the `layers` blocks. kinds: {kind: {"count", "read_bytes",
    "written_bytes", "flops"}}. epilogues: of matrix products, {kind: {epilogue: count}}. calls: custom calls that are
    none, {target: count}. copies: of more than a MiB, {"count", "bytes", "of": {operation: count}}. weight_copies:
    {"count", "bytes", "of": the first few by name}. largest: kernels without products that move most, alike ones
    together. arrays: the largest results.
    """
    every = list(kernels(hlo, guided=guided))
    outside = sum(count for kernel, count in every if kernel.scope and not _within_blocks(kernel.scope))
    launches = sum(count for _, count in every)
    kinds: dict[str, Counter] = defaultdict(Counter)
    epilogues: dict[str, Counter] = defaultdict(Counter)
    calls, alike = Counter(), defaultdict(Counter)
    for kernel, count in every:
        moved = {"count": count, "read_bytes": count * kernel.read, "written_bytes": count * kernel.written}
        kinds[kernel.kind].update(moved | {"flops": count * kernel.flops})
        if kernel.flops:
            epilogues[kernel.kind][kernel.detail] += count
        elif kernel.kind in ("cudnn", "mosaic_gpu", "triton", "other"):
            calls[kernel.detail] += count
        if not kernel.flops:
            alike[kernel.kind, _operation(kernel.scope), kernel.result].update(moved)
    copies = [
        (kernel, count) for kernel, count in every if kernel.kind == "copy" and kernel.read + kernel.written > LARGE
    ]
    of_weights = [(kernel, count) for kernel, count in every if kernel.weight]
    largest = sorted(alike.items(), key=lambda item: -item[1]["read_bytes"] - item[1]["written_bytes"])
    return {
        "launches": launches,
        "per_layer": round((launches - outside) / layers, 2),
        "kinds": {kind: dict(moved) for kind, moved in sorted(kinds.items(), key=lambda item: -item[1]["count"])},
        "epilogues": {kind: dict(counted.most_common()) for kind, counted in epilogues.items()},
        "calls": dict(calls.most_common()),
        "copies": _sum(copies) | {"of": dict(_operations(copies).most_common(LISTED))},
        "weight_copies": _sum(of_weights) | {"of": [kernel.weight for kernel, _ in of_weights][:LISTED]},
        "largest": [
            {"kind": kind, "operation": operation, "result": result, **moved}
            for (kind, operation, result), moved in largest[:LISTED]
        ],
        "arrays": _arrays(every),
    }


def _within_blocks(scope: str) -> bool:
    return "._blocks/" in scope or "/blocks/" in scope


def _operation(scope: str) -> str:
    """A scope's last parts: the module, and what it does."""
    return "/".join(scope.split("/")[-2:])


def _sum(counted: list[tuple[Kernel, int]]) -> dict[str, int]:
    return {
        "count": sum(count for _, count in counted),
        "bytes": sum(count * (kernel.read + kernel.written) for kernel, count in counted),
    }


def _operations(counted: list[tuple[Kernel, int]]) -> Counter:
    total: Counter = Counter()
    for kernel, count in counted:
        total[_operation(kernel.scope)] += count
    return total


def _arrays(every: list[tuple[Kernel, int]]) -> list[dict[str, Any]]:
    total: Counter = Counter()
    for kernel, count in every:
        total[kernel.result] += count
    largest = sorted(total, key=lambda type_: -sum(bytes_of(type_)))[:LISTED]
    return [{"type": type_, "bytes": sum(bytes_of(type_)), "count": total[type_]} for type_ in largest]
