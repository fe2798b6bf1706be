"""Types of the arrays that a Program computes: an element type and a fixed shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DTYPES: tuple[str, ...] = ("f32", "i8", "i32", "i64", "bool")
"""Element types in the order of their encoding. ``i8`` is reserved for balanced base-128 digits, |d| <= 64."""

NUMPY: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "i8": np.dtype(np.int8),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
}

MAX_ELEMENTS = 2**40
MAX_AXES = 32
"""What arrays of numpy and torch can have, and manifests take."""


@dataclass(frozen=True)
class Type:
    """An element type and a shape; ``shape == ()`` is a scalar."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown element type {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if len(self.shape) > MAX_AXES:
            raise ValueError(f"a shape of {len(self.shape)} axes: expected at most {MAX_AXES}")
        if any(not 0 <= size <= MAX_ELEMENTS for size in self.shape) or self.elements > MAX_ELEMENTS:
            raise ValueError(f"shape {list(self.shape)} is negative or larger than 2^40 elements")

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def type_of(array: np.ndarray) -> Type:
    """The Type of a numpy array; raises ValueError for an element type that Programs do not have."""
    for name, dtype in NUMPY.items():
        if array.dtype == dtype:
            return Type(name, tuple(array.shape))
    raise ValueError(f"arrays of {array.dtype} have no place in a Program: expected one of {', '.join(DTYPES)}")
