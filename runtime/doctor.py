"""Whether a host computes exactly, and how fast: every executor found on it against the known-answer vectors."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.program.builder import Builder
from runtime.program.executor import Executor
from runtime.program.program import Program
from runtime.program.vectors import Vector, check
from storage.errors import FailureError

PRODUCT = 512
ELEMENTS = 2**22
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One executor's result. `failure` is empty where it gave the bytes of all `vectors`, else says what differed.

    `product_gops` are digit multiplications and additions, 10^9 a second; `memory_gbs` is what an addition of long i32
    rows reads and writes, 10^9 bytes a second. Both are 0 for an executor that failed.
    """

    executor: str
    vectors: int
    failure: str = ""
    product_gops: float = 0.0
    memory_gbs: float = 0.0


def examine(executors: Mapping[str, Callable[[], Executor]], vectors: Sequence[Vector]) -> Iterator[Examination]:
    """The examination of each executor, made here so that one which will not start is a failure and not an end."""
    for name, build in executors.items():
        failure, rates = "", (0.0, 0.0)
        try:
            executor = build()
            wrong = next((found for found in (check(executor, vector) for vector in vectors) if found), None)
            failure = str(wrong) if wrong else ""
            rates = (0.0, 0.0) if wrong else (product_rate(executor), memory_rate(executor))
        except (FailureError, RuntimeError) as error:
            failure = str(error).strip()
        yield Examination(
            executor=name, vectors=len(vectors), failure=failure, product_gops=rates[0], memory_gbs=rates[1]
        )


def product_rate(executor: Executor) -> float:
    """10^9 operations a second in a product of two square digit matrices."""
    b = Builder()
    x = b.input("x", "i32", PRODUCT, PRODUCT)
    digits = np.arange(PRODUCT * PRODUCT, dtype=np.int32).reshape(PRODUCT, PRODUCT) % 129 - 64
    program = b.finish([b.dot(x.digit(), x.digit())])
    return 2 * PRODUCT**3 / _seconds(executor, program, digits) / 1e9


def memory_rate(executor: Executor) -> float:
    """10^9 bytes a second in an addition of i32 rows longer than any cache: one read, one written."""
    b = Builder()
    x = b.input("x", "i32", ELEMENTS)
    return 2 * 4 * ELEMENTS / _seconds(executor, b.finish([x + x]), np.ones(ELEMENTS, np.int32)) / 1e9


def _seconds(executor: Executor, program: Program, array: np.ndarray) -> float:
    """The median time of a run whose one input is on the device already; the result is fetched, so it has been made."""
    handle = executor.put(array)
    spent = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        (made,) = executor.run(program, [handle])
        executor.get(made)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent[1:])
