"""Matrix products and convolutions (im2col)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.program import sums
from runtime.program.aten.movement import padded, spread
from runtime.program.aten.registry import (
    RULES,
    Context,
    Unsupported,
    rule,
)
from runtime.program.builder import Number, Value

RULES |= {
    "mm": lambda c, a, b: sums.matmul(a, b, c.slices),
    "bmm": lambda c, a, b: sums.matmul(a, b, c.slices),
}


@rule("addmm")
def _addmm(c: Context, bias: Value, a: Value, b: Value, *, beta: Number = 1, alpha: Number = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise Unsupported(f"addmm with beta {beta}, alpha {alpha}")
    return sums.matmul(a, b, c.slices) + bias


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
    x = padded(c, padded(c, x, 2, padding[0], padding[0]), 3, padding[1], padding[1])
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
            g = spread(c, g, axis, stride[i])
            reach = dilation[i] * (w.shape[axis] - 1)
            g = padded(c, g, axis, reach - padding[i], x.shape[axis] + padding[i] - g.shape[axis])
        o, ch, kh, kw = w.shape
        flipped = w.reshape(o, ch, kh * kw).transpose(2, 1, 0)
        flipped = c.builder.take(flipped, (kh * kw - 1) - c.builder.iota(kh * kw))
        dx = _correlate(c, g, flipped.transpose(1, 2, 0).reshape(ch, o, kh, kw), (1, 1), dilation)
    if mask[1]:
        x = padded(c, padded(c, x, 2, padding[0], padding[0]), 3, padding[1], padding[1])
        columns, oh, ow = _patches(x, w.shape[2:], stride, dilation)
        columns_of_grad = grad.transpose(1, 0, 2, 3).reshape(w.shape[0], x.shape[0] * oh * ow)
        dw = sums.matmul(columns_of_grad, columns, c.slices).reshape(*w.shape)
    return dx, dw, sums.row_sum(grad, 0, 2, 3) if mask[2] else None
