"""Arithmetic, comparison and selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from runtime.program import functions
from runtime.program.aten.registry import (
    RULES,
    Context,
    Operand,
    Rule,
    Unsupported,
    convert,
    promote,
    rule,
)
from runtime.program.builder import Number, Value


@rule("add")
def _add(c: Context, a: Operand, b: Operand, alpha: Number = 1) -> Operand:
    a, b = promote(a, b)
    total: Operand = a + (b if alpha == 1 else b * alpha)
    return total


@rule("sub")
def _sub(c: Context, a: Operand, b: Operand, alpha: Number = 1) -> Operand:
    a, b = promote(a, b)
    difference: Operand = a - (b if alpha == 1 else b * alpha)
    return difference


@rule("rsub")
def _rsub(c: Context, a: Operand, b: Operand, alpha: Number = 1) -> Operand:
    difference: Operand = _sub(c, b, a, alpha)
    return difference


@rule("mul")
def _mul(c: Context, a: Operand, b: Operand) -> Operand:
    a, b = promote(a, b)
    product: Operand = a * b
    return product


@rule("div")
def _div(c: Context, a: Operand, b: Operand, rounding_mode: str | None = None) -> Operand:
    if rounding_mode is not None:
        raise Unsupported(f"division with rounding_mode {rounding_mode!r}")
    if isinstance(a, Value):
        return convert(a, "f32") / (convert(b, "f32") if isinstance(b, Value) else b)
    return float(a) / convert(b, "f32") if isinstance(b, Value) else float(a) / b


@rule("pow.Tensor_Scalar")
def _pow(c: Context, x: Value, exponent: Number) -> Value:
    if 2 * exponent != int(2 * exponent) or not 0 < abs(exponent) <= 64:
        raise Unsupported(f"power {exponent}: expected a multiple of a half, not 0, up to 64")
    power, square, n = (None if exponent == int(exponent) else x.sqrt()), x, int(abs(exponent))
    while n:
        if n & 1:
            power = square if power is None else power * square
        n >>= 1
        square = square * square if n else square
    assert power is not None
    return power if exponent > 0 else 1.0 / power


RULES |= {
    "neg": lambda c, x: -x,
    "reciprocal": lambda c, x: 1.0 / x,
    "sqrt": lambda c, x: x.sqrt(),
    "rsqrt": lambda c, x: 1.0 / x.sqrt(),
    "square": lambda c, x: x * x,
    "exp": lambda c, x: functions.exp(x),
    "log": lambda c, x: functions.log(x),
    "tanh": lambda c, x: functions.tanh(x),
    "sigmoid": lambda c, x: functions.sigmoid(x),
    "erf": lambda c, x: functions.erf(x),
    "abs": lambda c, x: functions.absolute(x),
    "sign": lambda c, x: c.builder.select(x > 0, 1, c.builder.select(x < 0, -1, x)),
    "silu": lambda c, x: x * functions.sigmoid(x),
    "relu": lambda c, x: c.builder.select(x <= 0.0, 0.0, x),
    "leaky_relu": lambda c, x, slope=0.01: c.builder.select(x > 0.0, x, x * slope),
    "maximum": lambda c, a, b: functions.maximum(a, b),
    "minimum": lambda c, a, b: functions.minimum(a, b),
}


@rule("gelu")
def _gelu(c: Context, x: Value, approximate: str = "none") -> Value:
    if approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * (math.sqrt(2) * (2 / math.sqrt(math.pi)) * 0.5)
        return x * 0.5 * (functions.tanh(inner) + 1.0)
    return x * ((functions.erf(x * math.sqrt(0.5)) + 1.0) * 0.5)


@rule("clamp")
def _clamp(c: Context, x: Value, low: Operand | None = None, high: Operand | None = None) -> Value:
    x = x if low is None else c.builder.select(x < low, low, x)
    return x if high is None else c.builder.select(x > high, high, x)


def _comparison(compare: Callable[[Any, Any], Value]) -> Rule:
    def lowered(c: Context, a: Operand, b: Operand) -> Value:
        return compare(*promote(a, b))

    return lowered


RULES |= {
    "eq": _comparison(lambda a, b: a.equals(b)),
    "ne": _comparison(lambda a, b: a.equals(b) ^ True),
    "lt": _comparison(lambda a, b: a < b),
    "le": _comparison(lambda a, b: a <= b),
    "gt": _comparison(lambda a, b: a > b),
    "ge": _comparison(lambda a, b: a >= b),
    "logical_and": lambda c, a, b: convert(a, "bool") & convert(b, "bool"),
    "logical_or": lambda c, a, b: convert(a, "bool") | convert(b, "bool"),
    "logical_not": lambda c, x: convert(x, "bool") ^ True,
    "bitwise_and": lambda c, a, b: a & b,
    "bitwise_or": lambda c, a, b: a | b,
    "bitwise_xor": lambda c, a, b: a ^ b,
    "bitwise_not": lambda c, x: x ^ (True if x.dtype == "bool" else -1),
}


@rule("where.self", "where.ScalarOther", "where.ScalarSelf")
def _where(c: Context, condition: Value, a: Operand, b: Operand) -> Value:
    a, b = promote(a, b) if not _all_bool(a, b) else (a, b)
    return c.builder.select(condition, a, b)


def _all_bool(*values: Operand) -> bool:
    return all(isinstance(v, Value) and v.dtype == "bool" for v in values)
