"""A Program made ready for fusing: literals folded, digit products gathered, what nobody needs left out.

Values keep their numbers in the Program; what is added here is numbered after them. One operator is new: `product`, a
sum of shifted digit products whose total fits i32, with `terms` (i, j, shift) over its first `lefts` operands and the
rest. What a matrix product needs of i64 arithmetic is then a cast of one i32 array.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch

from runtime.program.program import Op, Program
from runtime.program.reference import MEANING, Refused
from runtime.program.types import NUMPY, Type

ARITHMETIC = ("add", "sub", "mul", "div", "sqrt", "scale", "and", "or", "xor", "shl", "shr")
ELEMENTWISE = frozenset((*ARITHMETIC, "eq", "lt", "le", "select", "rint", "float", "cast", "digit", "bitcast"))
REDUCTIONS = frozenset(("sum", "max"))
VIEWS = frozenset(("reshape", "transpose", "slice", "broadcast"))
FAULTING = frozenset(("rint", "take", "scatter_add"))

SINKING = ELEMENTWISE - FAULTING
"""Elementwise operators that may act on the parts of a concatenation: a fault is told of the whole."""

DIGIT_PRODUCT = 64 * 64


@dataclass
class Graph:
    """Operators by value number in an order in which they can run; `literals` are values with one known element."""

    inputs: tuple[Type, ...]
    ops: dict[int, Op]
    outputs: tuple[int, ...]
    literals: dict[int, tuple[str, int]]
    program: Program
    saved: tuple[int, ...] = ()
    added: frozenset[int] = frozenset()
    types: dict[int, Type] = field(default_factory=dict)

    def users(self) -> dict[int, list[int]]:
        """The values that read each value."""
        found: dict[int, list[int]] = {}
        for value, op in self.ops.items():
            for operand in dict.fromkeys(op.inputs):
                found.setdefault(operand, []).append(value)
        return found


def make_graph(
    program: Program, *, saved: Sequence[int] = (), given: Sequence[int] = (), known: Container[int] = (), sums: int = 0
) -> Graph:
    """The graph of a Program that also keeps the values in `saved`, and is handed those in `given`.

    The last `sums` outputs are to be added to arrays; `added` are those of them that a loop can add itself. Values in
    `known` were computed before without a fault, so none of them is computed again for its fault alone.
    """
    first = len(program.inputs)
    ops = {first + number: op for number, op in enumerate(program.ops)}
    graph = Graph(
        inputs=tuple(t for _, t in program.inputs),
        ops=ops,
        outputs=program.outputs,
        literals={},
        program=program,
        saved=tuple(saved),
        added=_addable(program, sums),
        types=dict(enumerate(program.types)),
    )
    for value in given:
        ops.pop(value, None)
    _prune(graph, known)
    _spread(graph)
    _fold(graph)
    _sink(graph)
    _gather(graph)
    _prune(graph, known)
    return graph


def _addable(program: Program, sums: int) -> frozenset[int]:
    """Of the last outputs those that are rounded here and asked for once."""
    first = len(program.inputs)
    last = program.outputs[len(program.outputs) - sums :]
    return frozenset(
        v for v in last if program.outputs.count(v) == 1 and v >= first and program.ops[v - first].name == "rint"
    )


def _prune(graph: Graph, known: Container[int]) -> None:
    """Leaves out what no output needs. Operators that may fault stay: the reference would fault there too."""
    needed = {*graph.outputs, *graph.saved}
    needed |= {value for value, op in graph.ops.items() if op.name in FAULTING and value not in known}
    for value in reversed(list(graph.ops)):
        if value in needed:
            needed.update(graph.ops[value].inputs)
        else:
            del graph.ops[value]


def _fold(graph: Graph) -> None:
    for value, op in graph.ops.items():
        if op.name == "literal":
            graph.literals[value] = (op.type.dtype, op.attributes["bits"])
        elif op.inputs and all(v in graph.literals for v in op.inputs):
            if op.name in VIEWS:
                graph.literals[value] = graph.literals[op.inputs[0]]
            elif op.name in ELEMENTWISE and op.type.dtype != "i8":
                known = _evaluate(op, [graph.literals[v] for v in op.inputs])
                if known is not None:
                    graph.literals[value] = known
    for value in list(graph.literals):
        graph.ops.pop(value, None)


PARTS = 8
"""Arrays in a concatenation, at most, for operators to act on them one by one."""
SUNK = 512
"""Operators on parts in a graph, at most: a mask takes four, and a Program that is anybody's could take eightfold."""


def _sink(graph: Graph) -> None:
    """Has elementwise operators act on the parts of a concatenation where that makes it no larger.

    Random words are a concatenation of 8 bytes an element, and a mask of 1 byte is all that is made of them.
    """
    ops: dict[int, Op] = {}
    users = graph.users()
    joined: dict[int, Op] = {}
    """The concatenation whose elements a value has, in its order."""
    fresh, sunk = count(max(graph.types, default=0) + 1), 0

    def add(op: Op) -> int:
        number = next(fresh)
        ops[number], graph.types[number] = op, op.type
        return number

    def literal(operand: int, shape: tuple[int, ...]) -> int:
        number = next(fresh)
        graph.literals[number] = graph.literals[operand]
        graph.types[number] = Type(graph.types[operand].dtype, shape)
        return number

    def of_part(op: Op, part: int) -> int:
        shape = graph.types[part].shape
        inputs = tuple(literal(o, shape) if o in graph.literals else part for o in op.inputs)
        return add(replace(op, inputs=inputs, type=Type(op.type.dtype, shape)))

    for value, op in graph.ops.items():
        ops[value] = op
        sources = [o for o in op.inputs if o not in graph.literals]
        if op.name == "concat" and len(sources) == len(op.inputs) <= PARTS:
            joined[value] = op
        if len(sources) != 1 or sources[0] not in joined or len(users[sources[0]]) > 1:
            continue
        whole, source = joined[sources[0]], graph.types[sources[0]]
        if op.name == "reshape" or (op.name == "slice" and op.type == source):
            joined[value] = whole
        elif op.name in SINKING and _itemsize(op.type) <= _itemsize(source) and sunk + PARTS <= SUNK:
            sunk += len(whole.inputs)
            parts = tuple(of_part(op, part) for part in whole.inputs)
            joined[value] = replace(whole, inputs=parts, type=Type(op.type.dtype, whole.type.shape))
            shaped = replace(op, name="reshape", inputs=(add(joined[value]),), attributes={"shape": op.type.shape})
            del ops[value]  # it comes after what it is made of
            ops[value] = shaped
    graph.ops = ops


def _itemsize(kind: Type) -> int:
    return NUMPY[kind.dtype].itemsize


Range = tuple[int, int]
"""The least and the largest that an integer can be."""


def ranges(graph: Graph) -> dict[int, Range]:
    """Ranges of the i32 values that exponents are made of, where the operators imply one without wrapping around."""
    found: dict[int, Range] = {v: (bits, bits) for v, (dtype, bits) in graph.literals.items() if dtype == "i32"}
    for value, op in graph.ops.items():
        if op.type.dtype == "i32":
            known = _range(graph, op, found)
            if known is not None and known[0] >= -(2**31) and known[1] < 2**31:
                found[value] = known
    return found


def _range(graph: Graph, op: Op, found: dict[int, Range]) -> Range | None:
    operands = [found.get(v) for v in op.inputs]
    if op.name == "and":
        masks = [r[0] for r in operands if r is not None and r[0] == r[1] and r[0] >= 0]
        return (0, min(masks)) if masks else None
    if op.name == "select":
        return _chosen(graph, op, found)
    if any(r is None for r in operands) or not operands:
        return None
    (low, high), *others = [r for r in operands if r is not None]
    match op.name:
        case "add":
            return low + others[0][0], high + others[0][1]
        case "sub":
            return low - others[0][1], high - others[0][0]
        case "shr":
            return low >> op.attributes["amount"], high >> op.attributes["amount"]
        case "max" | "reshape" | "transpose" | "slice" | "broadcast":
            return low, high
    return None


def _chosen(graph: Graph, op: Op, found: dict[int, Range]) -> Range | None:
    """Of `select(x < c, a, x - d)` and the like: where the condition fails x is at least c."""
    condition, no = graph.ops.get(op.inputs[0]), graph.ops.get(op.inputs[2])
    first, second = (found.get(v) for v in op.inputs[1:])
    if first is None or second is None:
        return None
    if condition is not None and no is not None and condition.name == "lt" and no.name == "sub":
        limit, taken = found.get(condition.inputs[1]), found.get(no.inputs[1])
        if limit is not None and taken is not None and condition.inputs[0] == no.inputs[0]:
            second = (max(second[0], limit[0] - taken[1]), second[1])
    return min(first[0], second[0]), max(first[1], second[1])


def _evaluate(op: Op, operands: Sequence[tuple[str, int]]) -> tuple[str, int] | None:
    """What the reference makes of literals; None where it refuses, so that the run faults and not this."""
    try:
        (made,) = (MEANING[op.name](*map(tensor_of, operands), **op.attributes),)
    except Refused:
        return None
    array = made.numpy()
    return op.type.dtype, int(array.view(np.uint32) if op.type.dtype == "f32" else array)


def tensor_of(literal: tuple[str, int]) -> torch.Tensor:
    """A literal as a scalar tensor."""
    dtype, bits = literal
    if dtype == "f32":
        return torch.from_numpy(np.array([bits], np.uint32).view(np.float32)).reshape(())
    return torch.from_numpy(np.array([bits], NUMPY[dtype])).reshape(())


def _spread(graph: Graph) -> None:
    """Sums and maxima over axes of one element are no more than another shape or type."""
    ops: dict[int, Op] = {}
    fresh = max(graph.types, default=0) + 1
    for value, op in graph.ops.items():
        ops[value] = op
        if op.name not in REDUCTIONS:
            continue
        source = graph.types[op.inputs[0]]
        if any(source.shape[axis] != 1 for axis in op.attributes["axes"]):
            continue
        operand = op.inputs[0]
        if source.dtype != op.type.dtype:
            cast = Type(op.type.dtype, source.shape)
            del ops[value]
            ops[fresh] = Op(name="cast", inputs=(operand,), attributes={"dtype": cast.dtype}, type=cast, label=op.label)
            graph.types[fresh] = cast
            operand, fresh = fresh, fresh + 1
        shape = {"shape": op.type.shape}
        ops[value] = Op(name="reshape", inputs=(operand,), attributes=shape, type=op.type, label=op.label)
    graph.ops = ops


# ------------------------------------------------------------------------------------------------------------ products

Term = tuple[int, int, int]  # left digits, right digits, shift


def _gather(graph: Graph) -> None:
    """Every sum of shifted digit products becomes casts of as few i32 `product`s as hold it."""
    linear: dict[int, list[Term]] = {}
    for value, op in graph.ops.items():
        if op.name == "dot":
            linear[value] = [(op.inputs[0], op.inputs[1], 0)]
        elif op.type.dtype == "i64" and all(v in linear for v in op.inputs):
            if op.name == "cast":
                linear[value] = linear[op.inputs[0]]
            elif op.name == "shl":
                linear[value] = [(a, b, s + op.attributes["amount"]) for a, b, s in linear[op.inputs[0]]]
            elif op.name == "add":
                linear[value] = linear[op.inputs[0]] + linear[op.inputs[1]]
    users = graph.users()
    roots = {
        v for v in linear if v in (*graph.outputs, *graph.saved) or any(user not in linear for user in users.get(v, ()))
    } - set(graph.literals)
    ops: dict[int, Op] = {}
    fresh = max(graph.types, default=0) + 1
    for value, op in graph.ops.items():
        if value not in roots:
            ops[value] = op
            continue
        parts: list[int] = []
        for terms, shift in _groups(graph, linear[value]):
            chain = [_product(op, terms)]
            if op.type.dtype == "i64":
                chain.append(_plain("cast", chain[-1], op, "i64", dtype="i64"))
            if shift:
                chain.append(_plain("shl", chain[-1], op, "i64", amount=shift))
            for link in chain:
                inputs = link.inputs if link.name == "product" else (fresh - 1,)
                ops[fresh] = Op(
                    name=link.name, inputs=inputs, attributes=link.attributes, type=link.type, label=op.label
                )
                graph.types[fresh] = link.type
                fresh += 1
            parts.append(fresh - 1)
        while len(parts) > 1:
            ops[fresh] = Op(name="add", inputs=(parts[0], parts[1]), attributes={}, type=op.type, label=op.label)
            graph.types[fresh] = op.type
            parts[:2] = [fresh]
            fresh += 1
        ops[value] = Op(
            name="reshape", inputs=(parts[0],), attributes={"shape": op.type.shape}, type=op.type, label=op.label
        )
    graph.ops = ops


def _plain(name: str, source: Op, root: Op, made: str, **attributes: Any) -> Op:
    return Op(name=name, inputs=(), attributes=attributes, type=Type(made, source.type.shape), label=root.label)


def _product(root: Op, terms: Sequence[Term]) -> Op:
    lefts = list(dict.fromkeys(a for a, _, _ in terms))
    rights = list(dict.fromkeys(b for _, b, _ in terms))
    attributes = {
        "lefts": len(lefts),
        "terms": tuple((lefts.index(a), rights.index(b), s) for a, b, s in terms),
    }
    inputs = (*lefts, *rights)
    made = Type("i32", root.type.shape)
    return Op(name="product", inputs=inputs, attributes=attributes, type=made, label=root.label)


def _groups(graph: Graph, terms: Sequence[Term]) -> list[tuple[list[Term], int]]:
    """Terms in groups that fit i32, with the shift of each group; equal K within a group."""
    groups: list[tuple[list[Term], int]] = []
    lengths = sorted({graph.types[a].shape[-1] for a, _, _ in terms}, reverse=True)
    for k in lengths:
        rest = sorted((t for t in terms if graph.types[t[0]].shape[-1] == k), key=lambda t: -t[2])
        while rest:
            taken = 1
            while taken < len(rest) and _bound(rest[: taken + 1], k) < 2**31:
                taken += 1
            while 0 < taken < len(rest) and rest[taken - 1][2] == rest[taken][2] and taken > 1:
                taken -= 1  # a level of equal shifts stays together where it can
            base = rest[taken - 1][2]
            groups.append(([(a, b, s - base) for a, b, s in rest[:taken]], base))
            rest = rest[taken:]
    return groups


def _bound(terms: Sequence[Term], k: int) -> int:
    base = min(s for _, _, s in terms)
    return sum(DIGIT_PRODUCT * k << (s - base) for _, _, s in terms)
