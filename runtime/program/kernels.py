"""How a chain of elementwise operators becomes one loop: the CPU column of the operator table, compiled by Numba.

A kernel runs over a two-dimensional iteration space. Each input is read in one of four ways: `full` (an element each),
`row` (one an outer index), `column` (one an inner index), `one` (the same everywhere). Between loads and stores there
are only the table's operations in the Program's order: no fast-math, no contraction (LLVM fuses nothing unless asked),
integers cut back to their width after every operation, because Numba would widen them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
from numba.extending import intrinsic

from runtime.program.program import Op
from runtime.program.types import Type

SCALAR = {"f32": "np.float32", "i8": "np.int8", "i32": "np.int32", "i64": "np.int64", "bool": "np.bool_"}

Writer = Callable[[str, Sequence[str], Mapping[str, Any], Type], list[str]]
"""(target, operands, attributes, output type) -> statements that set the target."""


def _infix(sign: str) -> Writer:
    def write(target: str, operands: Sequence[str], attributes: Mapping[str, Any], t: Type) -> list[str]:
        a, b = operands
        return [f"{target} = {SCALAR[t.dtype]}({a} {sign} {b})"]

    return write


def _shift(sign: str) -> Writer:
    def write(target: str, operands: Sequence[str], attributes: Mapping[str, Any], t: Type) -> list[str]:
        return [f"{target} = {SCALAR[t.dtype]}({operands[0]} {sign} np.int64({attributes['amount']}))"]

    return write


def _compare(sign: str) -> Writer:
    return lambda target, operands, attributes, t: [f"{target} = {operands[0]} {sign} {operands[1]}"]


def _scale(target: str, operands: Sequence[str], attributes: Mapping[str, Any], t: Type) -> list[str]:
    x, p = operands
    return [
        f"{target}p = min(max({p}, np.int32(-252)), np.int32(254))",
        f"{target}f = min(max({target}p, np.int32(-126)), np.int32(127))",
        f"{target}r = np.int32({target}p - {target}f)",
        f"{target} = {x} * np.int32(({target}f + 127) << 23).view(np.float32)",
        f"{target} = {target} * np.int32(({target}r + 127) << 23).view(np.float32)",
    ]


def _rint(target: str, operands: Sequence[str], attributes: Mapping[str, Any], t: Type) -> list[str]:
    return [
        f"{target}r = np.rint({operands[0]})",
        f"bad |= not (abs({target}r) < np.float32({2.0 ** attributes['bound']!r}))",
        f"{target} = {SCALAR[t.dtype]}({target}r)",
    ]


def _bitcast(target: str, operands: Sequence[str], attributes: Mapping[str, Any], t: Type) -> list[str]:
    other = SCALAR["i32" if t.dtype == "f32" else "f32"]
    return [f"{target} = {other}({operands[0]}).view({SCALAR[t.dtype]})"]


def _simple(form: str) -> Writer:
    return lambda target, operands, attributes, t: [f"{target} = {form.format(*operands, t=SCALAR[t.dtype])}"]


STATEMENTS: Mapping[str, Writer] = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "sqrt": _simple("np.sqrt({0})"),
    "scale": _scale,
    "and": _infix("&"),
    "or": _infix("|"),
    "xor": _infix("^"),
    "shl": _shift("<<"),
    "shr": _shift(">>"),
    "eq": _compare("=="),
    "lt": _compare("<"),
    "le": _compare("<="),
    "select": _simple("select({0}, {1}, {2})"),
    "rint": _rint,
    "float": _simple("np.float32({0})"),
    "cast": _simple("{t}({0})"),
    "digit": _simple("np.int8(min(max({0}, np.int32(-64)), np.int32(64)))"),
    "bitcast": _bitcast,
}
"""The compiled column of the operator table; what moves, reduces or multiplies arrays is not a loop of this kind."""


@dataclass(frozen=True)
class Load:
    """One operand from outside the kernel: how it is read, or the bits of a literal."""

    how: str  # full, row, column, one, literal
    dtype: str
    bits: int = 0


def source(ops: Sequence[Op], operands: Sequence[Sequence[int]], loads: Sequence[Load], stores: Sequence[int]) -> str:
    """The Python source of a kernel.

    Values are numbered: `loads` first, then `ops` in order; `operands[k]` are the values that op k reads and `stores`
    the values that are written out, each to a flat array. The kernel returns whether a `rint` met what it refuses.
    """
    arrays = [f"a{k}" for k, load in enumerate(loads) if load.how != "literal"]
    lines = ["def kernel(rows, cols, " + ", ".join([*arrays, *(f"o{v}" for v in stores)]) + "):", "    bad = False"]
    lines += [f"    v{k} = {_literal(load)}" for k, load in enumerate(loads) if load.how == "literal"]
    lines += [f"    v{k} = a{k}[0]" for k, load in enumerate(loads) if load.how == "one"]
    lines += ["    for i in range(rows):", "        base = i * cols"]
    lines += [f"        v{k} = a{k}[i]" for k, load in enumerate(loads) if load.how == "row"]
    lines += ["        for j in range(cols):"]
    lines += [f"            v{k} = a{k}[base + j]" for k, load in enumerate(loads) if load.how == "full"]
    lines += [f"            v{k} = a{k}[j]" for k, load in enumerate(loads) if load.how == "column"]
    for number, (op, values) in enumerate(zip(ops, operands, strict=True)):
        target, names = f"v{len(loads) + number}", [f"v{v}" for v in values]
        lines += [f"            {line}" for line in STATEMENTS[op.name](target, names, op.attributes, op.type)]
    lines += [f"            o{v}[base + j] = v{v}" for v in stores]
    return "\n".join([*lines, "    return bad", ""])


def _literal(load: Load) -> str:
    if load.dtype == "f32":
        signed = load.bits - 2**32 if load.bits >= 2**31 else load.bits
        return f"np.int32({signed}).view(np.float32)"
    return f"{SCALAR[load.dtype]}({load.bits})"


@intrinsic
def _select(context: Any, condition: Any, yes: Any, no: Any) -> Any:
    """LLVM's select: no branch, so a loop that uses it can become vector instructions."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return yes(condition, yes, no), emit


@cache
def compiled(text: str) -> Callable[..., bool]:
    """The kernel of a source, compiled once a process; equal chains have equal sources."""
    scope: dict[str, Any] = {"select": _select}
    exec(f"import numpy as np\n{text}", scope)  # noqa: S102 - our own text: names and numbers only
    kernel: Callable[..., bool] = numba.njit(error_model="numpy")(scope["kernel"])
    return kernel
