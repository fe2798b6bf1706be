"""What every lowering rule shares: the table of rules, their context, element types and axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from runtime.program.builder import Builder, Number, Value

Operand = Value | Number


class Context(Protocol):
    """What a rule may ask of the lowering."""

    builder: Builder
    slices: int

    def random_words(self, elements: int) -> Value:
        """Fresh 32-bit words, i64[elements], the next operator number of this block."""


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}

DTYPE: Mapping[torch.dtype, str] = {
    torch.float32: "f32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


class Unsupported(Exception):
    """A rule exists, but not for these arguments."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operators by name, with or without the overload."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def dtype_of(dtype: torch.dtype) -> str:
    """The Program's name of a torch element type; Unsupported where it has none."""
    if dtype not in DTYPE:
        raise Unsupported(f"element type {dtype}: expected float32, int64, int32 or bool")
    return DTYPE[dtype]


def convert(x: Value, dtype: str) -> Value:
    """The value as another element type, by torch's rules for the conversions that are exact or rounded once."""
    if x.dtype == dtype:
        return x
    if dtype == "f32":
        return (x.cast("i32") if x.dtype == "bool" else x).float()
    if dtype == "bool":
        return x.equals(0) ^ True
    if x.dtype == "f32":
        raise Unsupported("float32 to integers truncates, and no operator does")
    return x.cast(dtype)


def promote(a: Operand, b: Operand) -> tuple[Operand, Operand]:
    """Both operands with the element type that torch would compute in."""
    kinds = [x.dtype if isinstance(x, Value) else "f32" if isinstance(x, float) else None for x in (a, b)]
    known = [k for k in kinds if k]
    target = next((k for k in ("f32", "i64", "i32") if k in known), "i64")
    if isinstance(a, Value):
        a = convert(a, target)
    if isinstance(b, Value):
        b = convert(b, target)
    return a, b


def axes_of(x: Value, dims: int | Sequence[int] | None) -> tuple[int, ...]:
    """Axes as torch means them: None and [] are all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(len(x.shape)))
    return tuple(sorted(d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)))
