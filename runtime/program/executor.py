"""The Executor seam: what runs Programs. Arrays cross it as numpy and stay on the device between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from runtime.program.program import Program
from storage.errors import FailureError

Handle = Any
"""An array in an executor's own form; only the executor that made it can read it."""

Observer = Callable[[int, np.ndarray], None]
"""Called with an operator's number and its output, in order: how a traced run reports every operator."""


class ArithmeticFault(FailureError):
    """An operator met a value that the arithmetic refuses (NaN, infinity, out of range, index outside)."""

    def __init__(self, *, operator: int, opcode: str, label: str, element: int, value: float, reason: str) -> None:
        self.operator, self.opcode, self.label = operator, opcode, label
        self.element, self.value = element, value
        self.reason = reason
        where = f"operator {operator} ({opcode}{', ' + label if label else ''})"
        super().__init__(f"{where}: {reason} at element {element}: got {value!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        keywords = {k: getattr(self, k) for k in ("operator", "opcode", "label", "element", "value", "reason")}
        return (_rebuild, (keywords,))


def _rebuild(keywords: dict[str, Any]) -> ArithmeticFault:
    return ArithmeticFault(**keywords)


class Executor(Protocol):
    """Runs Programs to the bytes that docs/arithmetic.md defines."""

    def put(self, array: np.ndarray) -> Handle:
        """The array as a handle; the caller must not change it afterwards."""

    def get(self, handle: Handle) -> np.ndarray:
        """The array of a handle, contiguous, NaN as 0x7fc00000."""

    def run(self, program: Program, inputs: Sequence[Handle], observe: Observer | None = None) -> list[Handle]:
        """The program's outputs; ArithmeticFault where an operator refuses a value."""
