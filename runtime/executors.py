"""The executors by name: the one place of the runtime that imports them."""

import os
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from time import monotonic
from typing import TYPE_CHECKING

from runtime.program.executor import Executor
from storage.errors import FailureError, UsageError

if TYPE_CHECKING:
    from runtime.program.vectors import Vector

Make = Callable[[int], Executor]
"""Makes an executor on this machine's CPU with so many threads, 0 for torch's own choice."""


def reference(threads: int) -> Executor:
    """The reference executor: the executable specification, one primitive at a time."""
    from runtime.program.reference import ReferenceExecutor

    _set_threads(threads)
    return ReferenceExecutor()


def compiled(threads: int) -> Executor:
    """The compiled executor: the same bytes from fused loops and exact products; kernels are kept on disk.

    FailureError where it misses a known-answer vector on this host's processor.
    """
    from runtime.program.compiler.executor import CompiledExecutor

    threads = threads or os.cpu_count() or 1
    _set_threads(torch_threads(threads))
    executor = CompiledExecutor(threads, progress=Announced())
    proven(executor)
    return executor


def torch_threads(threads: int) -> int:
    """Threads of torch's own beside a compiled executor with so many: one where it leaves torch no products.

    OpenMP's threads spin for a while after each operator, on the cores that the executor's threads would use.
    """
    from runtime.program.compiler import products

    return threads if products.chosen() in products.PATHS else 1


class Announced:
    """Says on stderr every few seconds that kernels are being compiled."""

    def __init__(self, every: float = 5.0, clock: Callable[[], float] = monotonic) -> None:
        self._every, self._clock = every, clock
        self._next = clock() + every

    def __call__(self, done: int) -> None:
        """Called after each kernel."""
        if self._clock() >= self._next:
            self._next = self._clock() + self._every
            sys.stderr.write(f"compiling kernels for this processor: {done} so far; they are kept for the next time\n")
            sys.stderr.flush()


@cache
def _vectors() -> "list[Vector]":
    from runtime.program.vectors import FILE, load

    return load(FILE)


def proven(executor: Executor) -> None:
    """Returns where the executor gives every known-answer vector's bytes; FailureError names the first it misses."""
    from runtime.program.vectors import check

    for vector in _vectors():
        wrong = check(executor, vector)
        if wrong is not None:
            raise FailureError(
                f"the compiled executor does not compute exactly on this processor: {wrong}. "
                "See `trueweight doctor`, and use --executor reference here"
            )


DEFAULT = "compiled"
BY_NAME: Mapping[str, Make] = {"compiled": compiled, "reference": reference}


def named(name: str) -> Make:
    """What makes the executor of that name; UsageError listing the names where there is none."""
    if name not in BY_NAME:
        raise UsageError(f"executor {name!r}: expected one of {', '.join(BY_NAME)}; correct --executor")
    return BY_NAME[name]


def found() -> Mapping[str, Callable[[], Executor]]:
    """Every executor that this host could run, by name, not yet made: making one proves its device."""
    import torch

    from runtime.program.reference import ReferenceExecutor

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    on_cpu = {f"{name} on cpu": partial(make, 1) for name, make in BY_NAME.items()}
    return on_cpu | {f"reference on {device}": partial(ReferenceExecutor, device) for device in gpus}


def _set_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
