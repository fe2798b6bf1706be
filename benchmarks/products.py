"""A product of two slices by this processor's path beside three calls of oneDNN's int8 product and one float32 product.

Packing, quantisation and rescaling are left out on every side: rates of the multiplications alone, one thread, in 10^9
operations a second; three digit products of 2 M K N operations each for the first two. Then a mask of random words.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Row, main
from runtime.program import sums
from runtime.program.builder import Builder
from runtime.program.compiler.executor import CompiledExecutor
from runtime.program.random import PURPOSE_DROPOUT, RNG_WORDS, words

SHAPES = ((1, 1024, 768, 3072), (1, 512, 128, 384), (12, 512, 512, 64))
"""Batch, M, K, N: a feed-forward layer of GPT-2 small, of the quickstart, and attention weights times values."""
REPEATS = 9


def rate(operations: float, seconds: Callable[[], float]) -> float:
    """The median rate of several runs after one that warms up."""
    return operations / statistics.median([seconds() for _ in range(REPEATS + 1)][1:]) / 1e9


def timed(action: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(_arguments: argparse.Namespace) -> Iterator[Row]:
    """Rates for each shape, and once more for a causal left operand, which only our path takes advantage of."""
    torch.set_num_threads(1)
    profile: dict[str, float] = {}
    executor = CompiledExecutor(1, profile=profile)
    random = np.random.default_rng(1)
    for batch, m, k, n in SHAPES:
        left, right = (random.standard_normal(shape).astype(np.float32) for shape in ((batch, m, k), (batch, k, n)))
        digits = [torch.from_numpy(random.integers(-64, 65, v.shape).astype(np.int8)) for v in (left, right)]
        floats = [torch.from_numpy(v) for v in (left, right)]
        label, operations = f"{batch} x {m} x {k} x {n}", 2.0 * batch * m * k * n
        ours = rate(3 * operations, partial(product_seconds, executor, profile, left, right))
        yield Row(name=f"{label}: {executor.path}", value=ours, unit="GOP/s")
        if m == k:
            causal = rate(3 * operations, partial(product_seconds, executor, profile, np.tril(left), right))
            yield Row(name=f"{label}: {executor.path}, causal zeros on the left", value=causal, unit="GOP/s")
        int8 = rate(3 * operations, partial(timed, partial(three_products, *digits)))
        yield Row(name=f"{label}: oneDNN int8, three calls", value=int8, unit="GOP/s")
        float32 = rate(operations, partial(timed, partial(torch.matmul, *floats)))
        yield Row(name=f"{label}: float32 BLAS", value=float32, unit="GFLOP/s")
    yield from masks()


def masks() -> Iterator[Row]:
    """Dropout's mask of an attention of GPT-2 small beside torch's dropout of as many ones, which it multiplies too."""
    count = 2 * 12 * 1024 * 1024
    b = Builder()
    drawn = words(b.input("rng", "i64", RNG_WORDS), count, purpose=PURPOSE_DROPOUT, operator=3)
    program, executor = b.finish([drawn < round(0.9 * 2**32)]), CompiledExecutor(1)
    rng, ones = executor.put(np.array([1, 0, 0, 0, 1, 0])), torch.ones(count)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: executor.run(program, [rng]),
        "torch's dropout": lambda: torch.nn.functional.dropout(ones, 0.1),
    }
    for side, act in sides.items():
        seconds = statistics.median([timed(act) for _ in range(REPEATS + 1)][1:])
        yield Row(name=f"a mask of {count:,} elements, {side}", value=seconds / count * 1e9, unit="ns an element")


def product_seconds(
    executor: CompiledExecutor, profile: dict[str, float], left: NDArray[np.float32], right: NDArray[np.float32]
) -> float:
    """The seconds that the executor's product of two slices took, without what comes before and after it."""
    b = Builder()
    program = b.finish([sums.matmul(b.input("x", "f32", *left.shape), b.input("y", "f32", *right.shape))])
    profile.clear()
    executor.run(program, [executor.put(left), executor.put(right)])
    return profile["products"]


def three_products(left: torch.Tensor, right: torch.Tensor) -> None:
    """oneDNN's int8 product of every matrix of a batch, three times."""
    for _ in range(3):
        for p, q in zip(left, right, strict=True):
            torch._int_mm(p, q)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__))
