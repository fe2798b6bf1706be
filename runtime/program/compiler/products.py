"""Integer products by the fastest exact path on this processor: a kernel of ours, oneDNN, or float32 BLAS.

All give the same integers: digits are within +-64, where oneDNN's int8 products are exact on every path and float32
products are up to 4096 terms. On x86, and on ARM with dot products, there is a kernel of ours (`quads`, `pairs`);
elsewhere which one runs is measured once a process. It says nothing about the result.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from runtime.program.compiler import pairs, quads
from runtime.program.reference import MEANING

Tensor = torch.Tensor
Path = Callable[[Tensor, Tensor], Tensor]

VNNI, SDOT, PAIRS = "VNNI kernel", "SDOT kernel", "16-bit pairs kernel"
PROBE = (256, 512, 256)


def _int8(a: Tensor, b: Tensor) -> Tensor:
    """oneDNN's int8 product, a matrix of the batch at a time."""
    if 0 in (*a.shape, *b.shape):
        return MEANING["dot"](a, b)
    made = [torch._int_mm(x, y) for x, y in zip(a, b, strict=True)]
    return torch.stack(made) if len(made) != 1 else made[0].unsqueeze(0)


def _float32(a: Tensor, b: Tensor) -> Tensor:
    """float32 products of digits, 4096 terms at a time."""
    return MEANING["dot"](a, b)


PATHS: Mapping[str, Path] = {"oneDNN int8": _int8, "float32 BLAS": _float32}
"""The paths that any processor has, each [batch, M, K] x [batch, K, N] of i8 -> i32."""


@cache
def rates() -> Mapping[str, float]:
    """10^9 operations a second of each general path here, measured on one product of PROBE's size."""
    m, k, n = PROBE
    a, b = torch.ones(1, m, k, dtype=torch.int8), torch.ones(1, k, n, dtype=torch.int8)
    found = {}
    for name, path in PATHS.items():
        spent = []
        for _ in range(6):
            started = time.perf_counter()
            path(a, b)
            spent.append(time.perf_counter() - started)
        found[name] = 2 * math.prod(PROBE) / statistics.median(spent[1:]) / 1e9
    return found


@cache
def chosen() -> str:
    """The name of the path that products take here."""
    if quads.lanes():
        return VNNI if quads.biased() else SDOT
    return PAIRS if pairs.lanes() else fallback()


def fallback() -> str:
    """The faster of the general paths here."""
    measured = rates()
    return max(measured, key=lambda name: measured[name])


def general(lefts: Sequence[Tensor], rights: Sequence[Tensor], terms: Sequence[tuple[int, int, int]]) -> Tensor:
    """The sum of shifted digit products, i32 [batch, M, N], on a general path."""
    path = PATHS[fallback()]
    total: Tensor | None = None
    for i, j, shift in terms:
        part = path(lefts[i], rights[j]) << shift
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
