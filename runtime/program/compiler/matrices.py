"""What the kernels of digit products share: batches of matrices, vectors, and rows of a result."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from storage.native import I8, I32, I64, POINTER, Function

Atoms = tuple[tuple[int, int], ...]
"""Sizes and strides of the axes of a batch."""


def batch_sizes(batch: Atoms) -> tuple[int, ...]:
    """Four numbers: sizes and strides of two axes. More axes of a batch would need more."""
    joined = [a for a in batch if a[0] > 1][:2]
    first, second = [(1, 0)] * (2 - len(joined)) + joined
    return (*first, *second)


def fits(batch: Atoms) -> bool:
    """Whether a batch has no more axes than the kernels take."""
    return sum(size > 1 for size, _ in batch) <= 2


def read_sizes(f: Function, source: ir.Value, count: int) -> list[ir.Value]:
    """The first numbers of a kernel's sizes."""
    return [f.load(source, i, I64) for i in range(count)]


def matrix(f: Function, base: ir.Value, number: ir.Value, sizes: Sequence[ir.Value], offset: ir.Value) -> ir.Value:
    """Where matrix `number` of a batch begins, in bytes; `sizes` as `batch_sizes` gives them."""
    b = f.builder
    _, stride1, size2, stride2 = sizes
    outer = b.mul(b.sdiv(number, size2), stride1)
    place = b.add(offset, b.add(outer, b.mul(b.srem(number, size2), stride2)))
    return b.gep(base, [place], source_etype=I8)


def lowest(f: Function, *values: ir.Value) -> ir.Value:
    """The least of several signed integers."""
    return _folded(f, "smin", values)


def highest(f: Function, *values: ir.Value) -> ir.Value:
    """The greatest of several signed integers."""
    return _folded(f, "smax", values)


def _folded(f: Function, name: str, values: Sequence[ir.Value]) -> ir.Value:
    found = values[0]
    for value in values[1:]:
        found = f.intrinsic(f"llvm.{name}.{found.type}", found.type, [found, value])
    return found


def zeros(lanes: int) -> ir.Value:
    """A vector of i32 zeros."""
    return ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)


def splat(f: Function, value: ir.Value, lanes: int) -> ir.Value:
    """An i32 in every lane."""
    b, undefined = f.builder, ir.Constant(ir.VectorType(I32, lanes), ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, zeros(lanes))


def store_row(f: Function, values: Sequence[ir.Value], place: ir.Value, left: ir.Value, lanes: int) -> None:
    """Stores vectors of a row side by side, no more than the `left` (i32) columns that there are."""
    b = f.builder
    kind = ir.VectorType(I32, lanes)
    with b.if_else(b.icmp_signed(">=", left, I32(len(values) * lanes))) as (whole, part):
        with whole:
            for v, value in enumerate(values):
                b.store(value, f.at(place, v * lanes, I32), align=4)
        with part:
            for v, value in enumerate(values):
                lane = ir.Constant(kind, [v * lanes + j for j in range(lanes)])
                mask = b.icmp_signed("<", lane, splat(f, left, lanes))
                name = f"llvm.masked.store.v{lanes}i32.p0"
                typed = ir.FunctionType(ir.VoidType(), [kind, POINTER, I32, mask.type])
                store = f.module.globals.get(name) or ir.Function(f.module, typed, name)
                b.call(store, [value, f.at(place, v * lanes, I32), I32(4), mask])
