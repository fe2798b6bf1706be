"""Lowering rules: each core ATen operator as primitives. A new operator is a few lines here, and nowhere else.

A rule takes the Lowering (builder, slices, random words) and the operator's arguments with tensors as Values. The order
of operations follows torch's own decompositions where forward and backward share values, so that they are shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from runtime.program import functions, sums
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


class Unsupported(Exception):  # noqa: N818 - becomes a UsageError where the operator's source is known
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


# arithmetic ----------------------------------------------------------------------------------------------------------


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
    if exponent in (0.5, -0.5):
        return x.sqrt() if exponent > 0 else 1.0 / x.sqrt()
    if exponent != int(exponent) or not 0 < abs(exponent) <= 64:
        raise Unsupported(f"power {exponent}: expected a half or an integer up to 64")
    power, square, n = None, x, abs(int(exponent))
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
    "silu": lambda c, x: x * functions.sigmoid(x),
    "relu": lambda c, x: c.builder.select(x <= 0.0, 0.0, x),
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


# comparison and selection --------------------------------------------------------------------------------------------


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


# reductions ----------------------------------------------------------------------------------------------------------


@rule("sum")
def _sum(c: Context, x: Value, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    axes = axes_of(x, dims)
    if x.dtype == "f32":
        return sums.row_sum(x, *axes, keep=keepdim) if axes else x
    return x.cast("i64").sum(*axes, keep=keepdim)


@rule("mean")
def _mean(c: Context, x: Value, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    return sums.row_mean(x, *axes_of(x, dims), keep=keepdim)


@rule("amax")
def _amax(c: Context, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    axes = axes_of(x, dims)
    return sums.row_max(x, *axes, keep=keepdim) if x.dtype == "f32" else x.max(*axes, keep=keepdim)


@rule("any")
def _any(c: Context, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return convert(x, "bool").cast("i32").max(*axes_of(x, dims), keep=keepdim).equals(0) ^ True


@rule("var_mean.correction")
def _var_mean(
    c: Context, x: Value, dims: Any = None, *, correction: Number = 1, keepdim: bool = False
) -> tuple[Value, Value]:
    axes = axes_of(x, dims)
    mean = sums.row_mean(x, *axes, keep=True)
    centred = x - mean
    count = math.prod(x.shape[a] for a in axes) - correction
    var = sums.row_sum(centred * centred, *axes, keep=True) / count
    kept = [n for i, n in enumerate(x.shape) if i not in axes]
    return (var, mean) if keepdim else (var.reshape(*kept), mean.reshape(*kept))


@rule("_softmax")
def _softmax(c: Context, x: Value, dim: int, half_to_float: bool = False) -> Value:
    axis = dim % len(x.shape)
    e = functions.exp(x - _finite_max(c, x, axis))
    return e / sums.row_sum(e, axis, keep=True, bound=1)


@rule("_log_softmax")
def _log_softmax(c: Context, x: Value, dim: int, half_to_float: bool = False) -> Value:
    axis = dim % len(x.shape)
    shifted = x - _finite_max(c, x, axis)
    return shifted - functions.log(sums.row_sum(functions.exp(shifted), axis, keep=True, bound=1))


def _finite_max(c: Context, x: Value, axis: int) -> Value:
    """The row maximum, 0 where a row is all -infinity, so that a wholly masked row gives 0 / 0 and not -inf - -inf."""
    high = sums.row_max(x, axis, keep=True)
    return c.builder.select(high.equals(float("-inf")), 0.0, high)


# norms ---------------------------------------------------------------------------------------------------------------


def _normalise(x: Value, axes: Sequence[int], eps: float) -> tuple[Value, Value, Value]:
    mean = sums.row_mean(x, *axes, keep=True)
    centred = x - mean
    rstd = 1.0 / (sums.row_mean(centred * centred, *axes, keep=True) + eps).sqrt()
    return centred * rstd, mean, rstd


def _affine(x: Value, weight: Value | None, bias: Value | None) -> Value:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@rule("native_layer_norm")
def _layer_norm(
    c: Context, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    axes = range(len(x.shape) - len(shape), len(x.shape))
    y, mean, rstd = _normalise(x, axes, eps)
    return _affine(y, weight, bias), mean, rstd


@rule("native_group_norm")
def _group_norm(
    c: Context, x: Value, weight: Value | None, bias: Value | None, n: int, ch: int, hw: int, groups: int, eps: float
) -> tuple[Value, Value, Value]:
    y, mean, rstd = _normalise(x.reshape(n, groups, ch // groups * hw), [2], eps)
    per_channel = (1, ch, *(1,) * (len(x.shape) - 2))
    weight, bias = (None if p is None else p.reshape(*per_channel) for p in (weight, bias))
    return _affine(y.reshape(*x.shape), weight, bias), mean.reshape(n, groups), rstd.reshape(n, groups)


@rule("native_batch_norm")
def _batch_norm(
    c: Context, x: Value, weight: Value | None, bias: Value | None,
    running_mean: Value | None, running_var: Value | None, training: bool, momentum: float, eps: float,
) -> tuple[Value, Value, Value]:  # fmt: skip
    if running_mean is not None or not training:
        raise Unsupported(
            "batch norm with running statistics is state outside the optimiser: track_running_stats=False"
        )
    axes = [i for i in range(len(x.shape)) if i != 1]
    y, mean, rstd = _normalise(x, axes, eps)
    per_channel = (1, x.shape[1], *(1,) * (len(x.shape) - 2))
    weight, bias = (None if p is None else p.reshape(*per_channel) for p in (weight, bias))
    return _affine(y, weight, bias), mean.reshape(x.shape[1]), rstd.reshape(x.shape[1])


# products ------------------------------------------------------------------------------------------------------------


RULES |= {
    "mm": lambda c, a, b: sums.matmul(a, b, c.slices),
    "bmm": lambda c, a, b: sums.matmul(a, b, c.slices),
}


@rule("addmm")
def _addmm(c: Context, bias: Value, a: Value, b: Value, *, beta: Number = 1, alpha: Number = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise Unsupported(f"addmm with beta {beta}, alpha {alpha}")
    return sums.matmul(a, b, c.slices) + bias


def _padded(c: Context, x: Value, axis: int, before: int, after: int) -> Value:
    """Zeros added (or, where negative, elements dropped) at both ends of an axis."""
    x = x.slice(axis, max(0, -before), x.shape[axis] - max(0, -after))

    def zeros(size: int) -> list[Value]:
        return [c.builder.full(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :]), 0)] if size > 0 else []

    return c.builder.concat([*zeros(before), x, *zeros(after)], axis)


def _spread(c: Context, x: Value, axis: int, stride: int) -> Value:
    """stride - 1 zeros between neighbours along an axis."""
    if stride == 1:
        return x
    size, split = x.shape[axis], axis + 1
    x = x.reshape(*x.shape[:split], 1, *x.shape[split:])
    x = _padded(c, x, split, 0, stride - 1)
    return x.reshape(*x.shape[:axis], size * stride, *x.shape[split + 1 :]).slice(axis, 0, (size - 1) * stride + 1)


def _patches(x: Value, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[Value, int, int]:
    """im2col: [N, C, H, W] -> [N * oh * ow, C * kh * kw], oh, ow."""
    n, ch, h, w = x.shape
    oh, ow = ((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip((h, w), kernel, stride, dilation, strict=True))
    taps = []
    for i in range(kernel[0]):
        rows = x.slice(2, i * dilation[0], i * dilation[0] + (oh - 1) * stride[0] + 1, stride[0])
        for j in range(kernel[1]):
            tap = rows.slice(3, j * dilation[1], j * dilation[1] + (ow - 1) * stride[1] + 1, stride[1])
            taps.append(tap.reshape(n, ch, 1, oh, ow))
    columns = x.builder.concat(taps, 2).transpose(0, 3, 4, 1, 2)
    return columns.reshape(n * oh * ow, ch * kernel[0] * kernel[1]), oh, ow


def _correlate(c: Context, x: Value, w: Value, stride: Sequence[int], dilation: Sequence[int]) -> Value:
    columns, oh, ow = _patches(x, w.shape[2:], stride, dilation)
    y = sums.matmul(columns, w.reshape(w.shape[0], math.prod(w.shape[1:])).swap(), c.slices)
    return y.reshape(x.shape[0], oh, ow, w.shape[0]).transpose(0, 3, 1, 2)


def _plain_convolution(x: Value, transposed: bool, groups: int) -> None:
    if len(x.shape) != 4 or transposed or groups != 1:
        raise Unsupported(
            f"convolution of rank {len(x.shape)}, transposed {transposed}, groups {groups}: expected 2-D plain"
        )


@rule("convolution")
def _convolution(
    c: Context, x: Value, w: Value, bias: Value | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    _plain_convolution(x, transposed, groups)
    x = _padded(c, _padded(c, x, 2, padding[0], padding[0]), 3, padding[1], padding[1])
    y = _correlate(c, x, w, stride, dilation)
    return y if bias is None else y + bias.reshape(1, bias.shape[0], 1, 1)


@rule("convolution_backward")
def _convolution_backward(
    c: Context, grad: Value, x: Value, w: Value, bias_sizes: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    mask: Sequence[bool],
) -> tuple[Value | None, Value | None, Value | None]:  # fmt: skip
    _plain_convolution(x, transposed, groups)
    dx = dw = None
    if mask[0]:
        g = grad
        for axis in (2, 3):
            i = axis - 2
            g = _spread(c, g, axis, stride[i])
            reach = dilation[i] * (w.shape[axis] - 1)
            g = _padded(c, g, axis, reach - padding[i], x.shape[axis] + padding[i] - g.shape[axis])
        o, ch, kh, kw = w.shape
        flipped = w.reshape(o, ch, kh * kw).transpose(2, 1, 0)
        flipped = c.builder.take(flipped, (kh * kw - 1) - c.builder.iota(kh * kw))
        dx = _correlate(c, g, flipped.transpose(1, 2, 0).reshape(ch, o, kh, kw), (1, 1), dilation)
    if mask[1]:
        padded = _padded(c, _padded(c, x, 2, padding[0], padding[0]), 3, padding[1], padding[1])
        columns, oh, ow = _patches(padded, w.shape[2:], stride, dilation)
        columns_of_grad = grad.transpose(1, 0, 2, 3).reshape(w.shape[0], x.shape[0] * oh * ow)
        dw = sums.matmul(columns_of_grad, columns, c.slices).reshape(*w.shape)
    return dx, dw, sums.row_sum(grad, 0, 2, 3) if mask[2] else None


# rows by index -------------------------------------------------------------------------------------------------------


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


@rule("gather")
def _gather(c: Context, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    axis = dim % len(x.shape)
    if axis != len(x.shape) - 1 or index.shape[:-1] != x.shape[:-1]:
        raise Unsupported("gather along another axis than the last, or over fewer rows")
    rows = math.prod(x.shape[:-1])
    first = (c.builder.iota(rows) * x.shape[-1]).reshape(rows, 1)
    flat = first + index.cast("i64").reshape(rows, index.shape[-1])
    return c.builder.take(x.reshape(rows * x.shape[-1]), flat).reshape(*index.shape)


@rule("scatter.value", "scatter.src")
def _scatter(c: Context, x: Value, dim: int, index: Value, value: Operand) -> Value:
    axis = dim % len(x.shape)
    if index.shape != (*x.shape[:axis], 1, *x.shape[axis + 1 :]):
        raise Unsupported("scatter of more than one element a row")
    place = c.builder.iota(x.shape[axis]).reshape(*(n if i == axis else 1 for i, n in enumerate(x.shape)))
    return c.builder.select(place.equals(index.cast("i64")), value, x)


# data movement -------------------------------------------------------------------------------------------------------


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
    spread = _spread(c, grad, axis, step)
    return _padded(c, spread, axis, low, sizes[axis] - low - spread.shape[axis])


@rule("select_backward")
def _select_backward(c: Context, grad: Value, sizes: Sequence[int], dim: int, index: int) -> Value:
    axis = dim % len(sizes)
    i = index % sizes[axis]
    return _padded(c, _unsqueeze(c, grad, axis), axis, i, sizes[axis] - i - 1)


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


@rule("cat")
def _cat(c: Context, values: Sequence[Value], dim: int = 0) -> Value:
    return c.builder.concat(values, dim % len(values[0].shape))


@rule("constant_pad_nd")
def _pad(c: Context, x: Value, pad: Sequence[int], value: Number = 0) -> Value:
    if value != 0:
        raise Unsupported(f"padding with {value}: expected 0")
    for i in range(len(pad) // 2):
        x = _padded(c, x, len(x.shape) - 1 - i, pad[2 * i], pad[2 * i + 1])
    return x


@rule("clone", "alias", "detach", "copy", "lift_fresh_copy")
def _same(c: Context, x: Value, source: Value | None = None, *ignored: Any, **also_ignored: Any) -> Value:
    return x if source is None else convert(source, x.dtype).broadcast(*x.shape)


@rule("_to_copy")
def _to_copy(c: Context, x: Value, dtype: torch.dtype | None = None, **ignored: Any) -> Value:
    return x if dtype is None else convert(x, dtype_of(dtype))


# sources -------------------------------------------------------------------------------------------------------------


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
