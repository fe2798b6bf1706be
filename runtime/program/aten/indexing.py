"""Rows and elements by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from runtime.program import sums
from runtime.program.aten.registry import (
    Context,
    Operand,
    Unsupported,
    rule,
)
from runtime.program.builder import Value


@rule("embedding")
def _embedding(c: Context, weight: Value, index: Value, *ignored: Any) -> Value:
    return c.builder.take(weight, index.cast("i64"))


@rule("embedding_dense_backward")
def _embedding_backward(
    c: Context, grad: Value, index: Value, rows: int, padding: int = -1, scale_by_frequency: bool = False
) -> Value:
    if padding >= 0 or scale_by_frequency:
        raise Unsupported("embedding with padding_idx or scale_grad_by_freq")
    count, width = math.prod(index.shape), grad.shape[-1]
    return sums.add_rows(index.cast("i64").reshape(count), grad.reshape(count, width), rows)


@rule("index_put")
def _index_put(c: Context, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Value:
    if len(indices) != 1 or indices[0] is None or not accumulate:
        raise Unsupported("index_put: expected accumulate=True and one index, of the first axis")
    count = math.prod(indices[0].shape)
    updates = values.broadcast(*indices[0].shape, *x.shape[1:]).reshape(count, *x.shape[1:])
    return x + sums.add_rows(indices[0].reshape(count), updates, x.shape[0])


@rule("index.Tensor")
def _index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    if len(indices) != 1 or indices[0] is None or indices[0].dtype == "bool":
        raise Unsupported("index: expected one integer index, of the first axis")
    return c.builder.take(x, indices[0].cast("i64"))


def _elements(c: Context, x: Value, dim: int, index: Value) -> tuple[Value, Value, tuple[int, ...]]:
    """`x` with axis `dim` last, flat; the places in it that `index` along that axis means; the order back."""
    axis, rank = dim % len(x.shape), len(x.shape)
    order = (*(i for i in range(rank) if i != axis), axis)
    x, index = x.transpose(*order), index.cast("i64").transpose(*order)
    if index.shape[:-1] != x.shape[:-1]:
        raise Unsupported(f"an index of shape {list(index.shape)} over rows of shape {list(x.shape)}")
    rows = math.prod(x.shape[:-1])
    inside = c.builder.take(c.builder.iota(x.shape[-1]), index)  # or a fault: not an element of the next row
    first = (c.builder.iota(rows) * x.shape[-1]).reshape(*x.shape[:-1], 1)
    return x.reshape(x.type.elements), first + inside, tuple(order.index(i) for i in range(rank))


@rule("gather")
def _gather(c: Context, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    flat, places, back = _elements(c, x, dim, index)
    return c.builder.take(flat, places).transpose(*back)


@rule("scatter_add")
def _scatter_add(c: Context, x: Value, dim: int, index: Value, source: Value) -> Value:
    flat, places, back = _elements(c, x, dim, index)
    if source.shape != index.shape:
        raise Unsupported(f"a source of shape {list(source.shape)} for an index of shape {list(index.shape)}")
    order = sorted(range(len(back)), key=back.__getitem__)
    count = places.type.elements
    updates = source.transpose(*order).reshape(count)
    added = flat + sums.add_rows(places.reshape(count), updates, flat.shape[0])
    return added.reshape(*(x.shape[i] for i in order)).transpose(*back)


@rule("scatter.value", "scatter.src")
def _scatter(c: Context, x: Value, dim: int, index: Value, value: Operand) -> Value:
    axis = dim % len(x.shape)
    if index.shape != (*x.shape[:axis], 1, *x.shape[axis + 1 :]):
        raise Unsupported("scatter of more than one element a row")
    place = c.builder.iota(x.shape[axis]).reshape(*(n if i == axis else 1 for i, n in enumerate(x.shape)))
    return c.builder.select(place.equals(index.cast("i64")), value, x)
