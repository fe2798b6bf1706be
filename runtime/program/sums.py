"""Exact sums and products as compositions of integer operators (docs/arithmetic.md, rule R2)."""

from __future__ import annotations

import math

from runtime.program.builder import Value
from runtime.program.operators import MAX_DOT_LENGTH

GRADIENT_BITS = 44
"""Gradients, losses and whatever is summed over micro-batches are integers on the grid 2^-44."""

SUM_BITS = 24
NORM_BITS = 15
TINY_EXPONENT = 26
"""Rows whose largest biased exponent is below this, all |x| < 2^-100, count as zeros with e = 0."""


def exponent(x: Value, *axes: int) -> Value:
    """e with |x| < 2^e for every element of the row over `axes` (kept as size 1), i32; 0 for rows below 2^-100."""
    return row_scale((x.bits() & 0x7FFFFFFF).max(*axes, keep=True) >> 23)


def row_scale(biased: Value) -> Value:
    """e = E - 126 for a row's largest biased exponent E (i32), and 0 where E < 26."""
    return biased.builder.select(biased < TINY_EXPONENT, 0, biased - 126)


def row_sum(x: Value, *axes: int, keep: bool = False, bound: int | None = None) -> Value:
    """The sum of f32 rows over `axes`: quantised to 24 bits, added as integers, rounded once.

    `bound` is an e with |x| < 2^e that holds by construction (1 for softmax terms); it saves looking for the maximum.
    """
    axes = tuple(sorted(axis % len(x.shape) for axis in axes))
    if math.prod(x.shape[a] for a in axes) == 0:
        return (
            x.builder.full("f32", [1 if a in axes else n for a, n in enumerate(x.shape)], 0.0)
            if keep
            else (x.builder.full("f32", [n for a, n in enumerate(x.shape) if a not in axes], 0.0))
        )
    e = x.builder.literal("i32", bound) if bound is not None else exponent(x, *axes)
    total = x.scale(SUM_BITS - e).rint("i32").sum(*axes, keep=True)
    result = total.float().scale(e - SUM_BITS)
    return result if keep else result.reshape(*(n for a, n in enumerate(x.shape) if a not in axes))


def row_mean(x: Value, *axes: int, keep: bool = False) -> Value:
    """The exact row sum divided by the number of terms."""
    return row_sum(x, *axes, keep=keep) / math.prod(x.shape[a] for a in axes)


def row_max(x: Value, *axes: int, keep: bool = False) -> Value:
    """The largest element of f32 rows in the total order of bit patterns: -0 < +0, order-free."""
    return _ordered(_ordered(x.bits()).max(*axes, keep=keep)).from_bits()


def _ordered(bits: Value) -> Value:
    """Bit patterns as i32 in the order of the numbers they stand for; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def digits(x: Value, axis: int, slices: int) -> tuple[list[Value], Value, int]:
    """Balanced base-128 digits of f32 rows along `axis`, lowest first, their exponents e, and the bits b = 7 s - 1."""
    bits = 7 * slices - 1
    e = exponent(x, axis)
    q = x.scale(bits - e).rint("i32")
    found = []
    for _ in range(slices - 1):
        high = (q + 64) >> 7
        found.append((q - (high << 7)).digit())
        q = high
    return [*found, q.digit()], e, bits


def matmul(a: Value, b: Value, slices: int = 2) -> Value:
    """f32 [..., M, K] times [..., K, N] by exact digit products; leading axes broadcast like numpy's.

    The common factor 128^(s-1) of the digit sums stays in the power: `scale` rounds an integer once whatever the split.
    """
    left, ea, bits = digits(a, len(a.shape) - 1, slices)
    right, eb, _ = digits(b, len(b.shape) - 2, slices)
    total: Value | None = None
    for i, low in enumerate(left):
        for j, high in enumerate(right):
            if i + j >= slices - 1:
                term = _dot(low, high) << (7 * (i + j - slices + 1)) if i + j >= slices else _dot(low, high)
                total = term if total is None else total + term
    assert total is not None
    return total.float().scale((ea + eb) - (2 * bits - 7 * (slices - 1)))


def _dot(a: Value, b: Value) -> Value:
    """Digit product as i64, over leading axes broadcast and K cut where int32 could overflow."""
    batch = _leading(a.shape[:-2], b.shape[:-2])
    a, b = a.broadcast(*batch, *a.shape[-2:]), b.broadcast(*batch, *b.shape[-2:])
    k, rank = a.shape[-1], len(a.shape)
    limit = MAX_DOT_LENGTH // 2
    parts = [
        a.builder.dot(a.slice(rank - 1, i, min(i + limit, k)), b.slice(rank - 2, i, min(i + limit, k))).cast("i64")
        for i in range(0, max(k, 1), limit)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _leading(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(max(x, y) for x, y in zip(a, b, strict=True))


def to_grid(x: Value, terms: int) -> Value:
    """f32 as integers on the grid 2^-44 (i64), a fault where `terms` such numbers could leave 64 bits."""
    return x.scale(GRADIENT_BITS).rint("i64", bound=63 - max(0, (terms - 1).bit_length()))


def from_grid(x: Value) -> Value:
    """Integers on the grid 2^-44 rounded once to f32."""
    return x.float().scale(-GRADIENT_BITS)


def add_rows(index: Value, updates: Value, rows: int) -> Value:
    """f32 [rows, ...] in which each update (f32) is added to its row, exactly, on the grid 2^-44."""
    return from_grid(updates.builder.scatter_add(index, to_grid(updates, max(1, index.shape[0])), rows))
