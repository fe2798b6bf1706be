"""Sums of int64 arrays that are exact whatever the order, or an error (docs/arithmetic.md, gradients)."""

from collections.abc import Sequence

import numpy as np

from runtime.places import StepFault

LIMIT = 2**63


class ExactSum:
    """A flat int64 sum modulo 2**64, with what it takes to tell whether the true sum fits.

    `bound` is the sum of the parts' largest magnitudes. While it is below 2**63 no element can have left the range, and
    nothing more is kept. From there on `carry` counts the wraps of each element, so the verdict is a property of
    the total and never of the order in which parts arrived.
    """

    __slots__ = ("bound", "carry", "value")

    def __init__(self, value: np.ndarray, *, bound: int | None = None, carry: np.ndarray | None = None) -> None:
        self.value = value
        self.bound = _magnitude(value) if bound is None else bound
        self.carry = carry

    def takes(self, bound: int) -> bool:
        """Whether a part of magnitudes up to `bound` may be added to `value` directly; if so it is counted in."""
        if self.bound + bound >= LIMIT:
            return False
        self.bound += bound
        return True

    def add(self, part: "ExactSum") -> None:
        """Add another sum of the same size in place; `part` is left as it is."""
        self.bound += part.bound
        if self.bound < LIMIT:
            self.value += part.value
            return
        before = self.value
        self.value = before + part.value
        wrapped = _negative(before ^ self.value) & _negative(part.value ^ self.value)
        carry = np.where(wrapped, np.where(part.value < 0, -1, 1), 0)
        for known in (self.carry, part.carry):
            carry = carry if known is None else carry + known
        self.carry = carry

    def part(self, span: slice) -> "ExactSum":
        """The sum over a range of elements: a view, to be read only."""
        return ExactSum(self.value[span], bound=self.bound, carry=None if self.carry is None else self.carry[span])

    def total(self) -> np.ndarray:
        """The true sum; StepFault naming the first element whose magnitude reaches 2**63 (a gradient of 2**19)."""
        if self.carry is not None:
            outside = np.flatnonzero((self.carry != 0) | (self.value == -LIMIT))
            if outside.size:
                raise StepFault(
                    f"gradient overflow at element {outside[0]}: expected a sum below 2^19 in magnitude; lower the "
                    f"recipe's learning rate or scale of the loss and start a new run"
                )
        return self.value


def sum_exactly(parts: Sequence[ExactSum], room: np.ndarray) -> ExactSum:
    """The sum of the parts in `room`, int64 of their size; a single part itself."""
    if len(parts) == 1:
        return parts[0]
    room.fill(0)
    total = ExactSum(room, bound=0)
    for part in parts:
        total.add(part)
    return total


def open_arrays(sums: Sequence[ExactSum], bounds: Sequence[int | None]) -> list[np.ndarray]:
    """The arrays of different sums to which parts of magnitudes up to these bounds may be added directly, counted in.

    None of them where one could leave its range, or has a part without a bound.
    """
    known = [bound for bound in bounds if bound is not None]
    if len(known) < len(bounds) or not all(total.takes(bound) for total, bound in zip(sums, known, strict=True)):
        return []
    return [total.value for total in sums]


def _magnitude(value: np.ndarray) -> int:
    return max(int(value.max()), -int(value.min())) if value.size else 0


def _negative(value: np.ndarray) -> np.ndarray:
    return value < 0
