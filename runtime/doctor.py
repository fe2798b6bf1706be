"""Whether a host computes exactly, and how fast: every executor found on it against the known-answer vectors."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.program.builder import Builder
from runtime.program.executor import Executor
from runtime.program.program import Program
from runtime.program.vectors import Vector, check
from storage.errors import FailureError

PRODUCT = 1024
CACHED = 2**15
ELEMENTS = 2**22
CHAIN = 100
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One executor's result. `failure` is empty where it gave the bytes of all `vectors`, else says what differed.

    `path` is how digits are multiplied, the fastest exact way measured here. `product_gops` are digit multiplications
    and additions, 10^9 a second, and `float_gflops` those of a float32 product by this host's BLAS, which nothing exact
    uses: what they compare with. `elementwise_gflops` are binary32 operations in a fused loop, `memory_gbs` is what an
    addition of long i32 rows reads and writes, 10^9 bytes a second. All are 0 for an executor that failed, or where
    nothing was measured.
    """

    executor: str
    vectors: int
    failure: str = ""
    path: str = ""
    product_gops: float = 0.0
    float_gflops: float = 0.0
    elementwise_gflops: float = 0.0
    memory_gbs: float = 0.0


def examine(
    executors: Mapping[str, Callable[[], Executor]], vectors: Sequence[Vector], *, measured: bool = True
) -> Iterator[Examination]:
    """The examination of each executor, made here so that one which will not start is a failure and not an end."""
    for name, build in executors.items():
        try:
            executor = build()
            wrong = next((found for found in (check(executor, vector) for vector in vectors) if found), None)
            if wrong is None:
                exact = Examination(executor=name, vectors=len(vectors), path=getattr(executor, "path", ""))
                yield _measured(exact, executor) if measured else exact
                continue
            failure = str(wrong)
        except (FailureError, RuntimeError) as error:
            failure = str(error).strip()
        yield Examination(executor=name, vectors=len(vectors), failure=failure)


def _measured(exact: Examination, executor: Executor) -> Examination:
    return replace(
        exact,
        product_gops=product_rate(executor),
        float_gflops=float_rate(),
        elementwise_gflops=elementwise_rate(executor),
        memory_gbs=memory_rate(executor),
    )


def product_rate(executor: Executor) -> float:
    """10^9 operations a second in a product of two square digit matrices."""
    b = Builder()
    x = b.input("x", "i32", PRODUCT, PRODUCT)
    digits = np.arange(PRODUCT * PRODUCT, dtype=np.int32).reshape(PRODUCT, PRODUCT) % 129 - 64
    program = b.finish([b.dot(x.digit(), x.digit())])
    return 2 * PRODUCT**3 / _seconds(executor, program, digits) / 1e9


def float_rate() -> float:
    """10^9 operations a second in a float32 product by torch on the CPU, with as many threads as it is set to."""
    import torch

    x = torch.ones(PRODUCT, PRODUCT)
    return 2 * PRODUCT**3 / _median(lambda: x @ x) / 1e9


def elementwise_rate(executor: Executor) -> float:
    """10^9 operations a second in a chain of f32 multiplications and additions on an array that fits the cache."""
    b = Builder()
    value = x = b.input("x", "f32", CACHED)
    for _ in range(CHAIN):
        value = value * x + 1.0
    return 2 * CHAIN * CACHED / _seconds(executor, b.finish([value]), np.full(CACHED, 0.5, np.float32)) / 1e9


def memory_rate(executor: Executor) -> float:
    """10^9 bytes a second in an addition of i32 rows longer than any cache: one read, one written."""
    b = Builder()
    x = b.input("x", "i32", ELEMENTS)
    return 2 * 4 * ELEMENTS / _seconds(executor, b.finish([x + x]), np.ones(ELEMENTS, np.int32)) / 1e9


def _seconds(executor: Executor, program: Program, array: np.ndarray) -> float:
    """The median time of a run whose one input is on the device already; the result is fetched, so it has been made."""
    handle = executor.put(array)
    return _median(lambda: executor.get(executor.run(program, [handle])[0]))


def _median(action: Callable[[], object]) -> float:
    spent = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        action()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:])
