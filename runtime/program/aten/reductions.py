"""Sums, means, maxima, softmax and norms: every sum is an integer sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from runtime.program import functions, sums
from runtime.program.aten.registry import (
    Context,
    Unsupported,
    axes_of,
    convert,
    dtype_of,
    rule,
)
from runtime.program.builder import Number, Value


@rule("sum")
def _sum(c: Context, x: Value, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    axes = axes_of(x, dims)
    x = x if dtype is None else convert(x, dtype_of(dtype))
    if x.dtype == "f32":
        return sums.row_sum(x, *axes, keep=keepdim) if axes else x
    return x.cast("i64").sum(*axes, keep=keepdim)


@rule("mean")
def _mean(c: Context, x: Value, dims: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Value:
    x = x if dtype is None else convert(x, dtype_of(dtype))
    return sums.row_mean(x, *axes_of(x, dims), keep=keepdim)


@rule("amax")
def _amax(c: Context, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    axes = axes_of(x, dims)
    if x.dtype != "f32":
        return x.max(*axes, keep=keepdim)
    # processors differ in the sign of the NaN they make, and one with a sign would be the smallest element
    return sums.row_max(c.builder.select(x.equals(x), x, float("nan")), *axes, keep=keepdim)


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


@rule("var.correction")
def _var(c: Context, x: Value, dims: Any = None, *, correction: Number = 1, keepdim: bool = False) -> Value:
    var: Value = _var_mean(c, x, dims, correction=correction, keepdim=keepdim)[0]
    return var


@rule("linalg_vector_norm")
def _vector_norm(c: Context, x: Value, order: Number = 2, dims: Any = None, keepdim: bool = False, **_: Any) -> Value:
    if order != 2:
        raise Unsupported(f"norm of order {order}: expected 2")
    return sums.row_sum(x * x, *axes_of(x, dims), keep=keepdim).sqrt()


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
