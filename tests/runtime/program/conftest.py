"""What the tests of Programs share: evaluating a composition on arrays, and the values that break arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from runtime.program.builder import Builder, Value
from runtime.program.reference import ReferenceExecutor
from runtime.program.types import type_of

Compute = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def quiet_tracing() -> None:
    """Torch writes its traces to a logger of level DEBUG that pytest's handler would collect for every test."""
    logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread; tests that ask for two say so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def executor() -> ReferenceExecutor:
    return ReferenceExecutor()


@pytest.fixture(scope="session")
def run_program(executor: ReferenceExecutor) -> Compute:
    """run_program(program, *arrays) -> arrays."""

    def run(program: Any, *arrays: np.ndarray) -> list[np.ndarray]:
        return [executor.get(h) for h in executor.run(program, [executor.put(a) for a in arrays])]

    return run


@pytest.fixture(scope="session")
def compute(run_program: Compute) -> Compute:
    """compute(function of Values, *arrays) -> what the reference executor makes of it: an array, or a list of them."""

    def compute(function: Callable[..., Any], *arrays: np.ndarray) -> Any:
        b = Builder()
        made = function(*(b.input(f"x{i}", type_of(a).dtype, *a.shape) for i, a in enumerate(arrays)))
        single = isinstance(made, Value)
        found = run_program(b.finish([made] if single else list(made)), *arrays)
        return found[0] if single else found

    return compute


@pytest.fixture(scope="session")
def hard_floats() -> Callable[[int, int], np.ndarray]:
    """hard_floats(count, seed): binary32 values of random bit patterns, a quarter from a list that breaks things."""
    bits = [
        0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x00800001,  # around 2^-126
        0x3F800000, 0xBF800000, 0x3F7FFFFF, 0x3F800001, 0x3F000000, 0x3FC00000, 0x40200000, 0xC0200000,  # 1, ties
        0x4B000000, 0x4B000001, 0x4AFFFFFF, 0x4B7FFFFF, 0x4B800001, 0x5F000000, 0xDF000000, 0x5EFFFFFF,  # 2^23, 2^63
        0x7F7FFFFF, 0xFF7FFFFF, 0x7F000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001,  # largest, NaN
    ]  # fmt: skip

    def hard_floats(count: int, seed: int) -> np.ndarray:
        source = np.random.default_rng(seed)
        found = source.integers(0, 2**32, count, dtype=np.uint32)
        found[::4] = source.choice(np.array(bits, dtype=np.uint32), len(found[::4]))
        near = source.integers(0, 2**32, len(found[1::4]), dtype=np.uint32) & np.uint32(0x807FFFFF)
        found[1::4] = near | (source.integers(120, 134, len(near), dtype=np.uint32) << np.uint32(23))
        return found.view(np.float32)

    return hard_floats
