"""Data movement, and arrays that come from nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from runtime.program.aten.registry import (
    DTYPE,
    Context,
    Unsupported,
    axes_of,
    convert,
    dtype_of,
    rule,
)
from runtime.program.builder import Number, Value


def padded(c: Context, x: Value, axis: int, before: int, after: int) -> Value:
    """Zeros added (or, where negative, elements dropped) at both ends of an axis."""
    x = x.slice(axis, max(0, -before), x.shape[axis] - max(0, -after))

    def zeros(size: int) -> list[Value]:
        return [c.builder.full(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :]), 0)] if size > 0 else []

    return c.builder.concat([*zeros(before), x, *zeros(after)], axis)


def spread(c: Context, x: Value, axis: int, stride: int) -> Value:
    """stride - 1 zeros between neighbours along an axis."""
    if stride == 1:
        return x
    size, split = x.shape[axis], axis + 1
    x = x.reshape(*x.shape[:split], 1, *x.shape[split:])
    x = padded(c, x, split, 0, stride - 1)
    return x.reshape(*x.shape[:axis], size * stride, *x.shape[split + 1 :]).slice(axis, 0, (size - 1) * stride + 1)


@rule("view", "_unsafe_view", "reshape")
def _view(c: Context, x: Value, shape: Sequence[int]) -> Value:
    known = math.prod(n for n in shape if n != -1)
    return x.reshape(*(x.type.elements // max(known, 1) if n == -1 else n for n in shape))


@rule("expand")
def _expand(c: Context, x: Value, shape: Sequence[int], implicit: bool = False) -> Value:
    missing = len(shape) - len(x.shape)
    return x.broadcast(*(x.shape[i - missing] if n == -1 else n for i, n in enumerate(shape)))


@rule("unsqueeze")
def _unsqueeze(c: Context, x: Value, dim: int) -> Value:
    axis = dim % (len(x.shape) + 1)
    return x.reshape(*x.shape[:axis], 1, *x.shape[axis:])


@rule("squeeze")
def _squeeze(c: Context, x: Value, dims: Any = None) -> Value:
    axes = axes_of(x, dims)
    return x.reshape(*(n for i, n in enumerate(x.shape) if not (n == 1 and i in axes)))


@rule("permute")
def _permute(c: Context, x: Value, order: Sequence[int]) -> Value:
    return x.transpose(*(axis % len(x.shape) for axis in order))


@rule("transpose.int", "t")
def _transpose(c: Context, x: Value, a: int = -2, b: int = -1) -> Value:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return x.transpose(*order)


@rule("select.int")
def _select_int(c: Context, x: Value, dim: int, index: int) -> Value:
    axis, i = dim % len(x.shape), index % x.shape[dim]
    return x.slice(axis, i, i + 1).reshape(*x.shape[:axis], *x.shape[axis + 1 :])


def _bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    low, high, _ = slice(start, end).indices(size)
    return low, max(low, high)


@rule("slice.Tensor")
def _slice(c: Context, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    return x.slice(dim % len(x.shape), *_bounds(x.shape[dim], start, end), step)


@rule("slice_backward")
def _slice_backward(c: Context, grad: Value, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Value:
    axis = dim % len(sizes)
    low, _ = _bounds(sizes[axis], start, end)
    grad = spread(c, grad, axis, step)
    return padded(c, grad, axis, low, sizes[axis] - low - grad.shape[axis])


@rule("select_backward")
def _select_backward(c: Context, grad: Value, sizes: Sequence[int], dim: int, index: int) -> Value:
    axis = dim % len(sizes)
    i = index % sizes[axis]
    return padded(c, _unsqueeze(c, grad, axis), axis, i, sizes[axis] - i - 1)


@rule("slice_scatter")
def _slice_scatter(
    c: Context, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    axis = dim % len(x.shape)
    low, high = _bounds(x.shape[axis], start, end)
    if step != 1:
        raise Unsupported("slice_scatter with a step")
    parts = [x.slice(axis, 0, low), source, x.slice(axis, high, x.shape[axis])]
    return c.builder.concat([p for p in parts if p.shape[axis]] or [source], axis)


@rule("split_with_sizes")
def _split(c: Context, x: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    axis, starts = dim % len(x.shape), accumulate(sizes, initial=0)
    return [x.slice(axis, start, start + size) for start, size in zip(starts, sizes, strict=False)]


@rule("repeat")
def _repeat(c: Context, x: Value, times: Sequence[int]) -> Value:
    shape = (*(1,) * (len(times) - len(x.shape)), *x.shape)
    tiles = x.reshape(*(n for size in shape for n in (1, size)))
    tiles = tiles.broadcast(*(n for pair in zip(times, shape, strict=True) for n in pair))
    return tiles.reshape(*(t * size for t, size in zip(times, shape, strict=True)))


@rule("cat")
def _cat(c: Context, values: Sequence[Value], dim: int = 0) -> Value:
    return c.builder.concat(values, dim % len(values[0].shape))


@rule("constant_pad_nd")
def _pad(c: Context, x: Value, pad: Sequence[int], value: Number = 0) -> Value:
    if value != 0:
        raise Unsupported(f"padding with {value}: expected 0")
    for i in range(len(pad) // 2):
        x = padded(c, x, len(x.shape) - 1 - i, pad[2 * i], pad[2 * i + 1])
    return x


@rule("clone", "alias", "detach", "copy", "lift_fresh_copy")
def _same(c: Context, x: Value, source: Value | None = None, *ignored: Any, **also_ignored: Any) -> Value:
    return x if source is None else convert(source, x.dtype).broadcast(*x.shape)


@rule("_to_copy")
def _to_copy(c: Context, x: Value, dtype: torch.dtype | None = None, **ignored: Any) -> Value:
    return x if dtype is None else convert(x, dtype_of(dtype))


def _number_type(value: Number, dtype: torch.dtype | None) -> str:
    if dtype is not None:
        return dtype_of(dtype)
    return "bool" if isinstance(value, bool) else "i64" if isinstance(value, int) else "f32"


@rule("full")
def _full(c: Context, shape: Sequence[int], value: Number, dtype: torch.dtype | None = None, **ignored: Any) -> Value:
    return c.builder.full(_number_type(value, dtype), shape, value)


@rule("full_like")
def _full_like(c: Context, x: Value, value: Number, dtype: torch.dtype | None = None, **ignored: Any) -> Value:
    return c.builder.full(x.dtype if dtype is None else dtype_of(dtype), x.shape, value)


@rule("scalar_tensor")
def _scalar_tensor(c: Context, value: Number, dtype: torch.dtype | None = None, **ignored: Any) -> Value:
    return c.builder.literal(_number_type(value, dtype), value)


@rule("empty.memory_format", "empty_permuted")
def _empty(c: Context, shape: Sequence[int], *ignored: Any, dtype: torch.dtype | None = None, **also: Any) -> Value:
    """Only ever filled by the next operator, or never read (batch norm's reserve of bytes): zeros of a type we have."""
    return c.builder.full(DTYPE.get(dtype or torch.float32, "i64"), shape, 0)


@rule("arange.start_step")
def _arange(c: Context, start: int, end: int, step: int = 1, dtype: torch.dtype | None = None, **ignored: Any) -> Value:
    if not all(isinstance(v, int) for v in (start, end, step)):
        raise Unsupported("arange of floats: compute the table once and register it as a buffer")
    return convert(c.builder.iota(len(range(start, end, step))) * step + start, _number_type(0, dtype))


@rule("bernoulli.p")
def _bernoulli(c: Context, x: Value, p: float) -> Value:
    """1.0 where the element's word is below p * 2^32, the integer threshold, and 0.0 elsewhere."""
    word = c.random_words(x.type.elements)
    return c.builder.select(word < round(p * 2**32), 1.0, 0.0).reshape(*x.shape)
