"""The Executor seam: what runs Programs. Arrays cross it as numpy and stay on the device between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from runtime.program.program import Program
from storage.errors import FailureError

Handle = Any
"""An array in an executor's own form; only the executor that made it can read it."""

Observer = Callable[[int, np.ndarray], np.ndarray | None]
"""Called with an operator's number and its output, in order: how a traced run reports every operator.

An array that it returns takes the output's place: how faults are injected.
"""


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
    """Runs Programs to the bytes that docs/arithmetic.md defines.

    `stable` says how many inputs, the first ones, are parameters: handles that come again and again until `forget`.
    What depends on them alone an executor may keep.
    """

    def put(self, array: np.ndarray) -> Handle:
        """The array as a handle; the caller must not change it afterwards."""

    def get(self, handle: Handle) -> np.ndarray:
        """The array of a handle, contiguous, NaN as 0x7fc00000."""

    def run(
        self, program: Program, inputs: Sequence[Handle], observe: Observer | None = None, *, stable: int = 0
    ) -> list[Handle]:
        """The program's outputs; ArithmeticFault where an operator refuses a value."""

    def forward(
        self, forward: Program, backward: Program, inputs: Sequence[Handle], *, stable: int = 0
    ) -> tuple[list[Handle], Any]:
        """(the outputs of `forward`, what `backward` takes so as not to compute it again; None if nothing is kept)."""

    def backward(
        self,
        forward: Program,
        backward: Program,
        inputs: Sequence[Handle],
        saved: Any,
        sums: Sequence[np.ndarray] = (),
        *,
        stable: int = 0,
    ) -> list[Handle]:
        """The outputs of `backward`, after a `forward` on the same values returned `saved`; once for each `saved`.

        The last outputs, as many as there are `sums`, are not returned but added to these flat i64 arrays. After a
        fault the sums are worth nothing.
        """

    def forget(self) -> None:
        """The parameters have changed: drop what was kept for them."""
