"""The axes that loops run over, and views of arrays in memory.

A dimension of a value is a tuple of axes, outermost first: several where a reshape joined them, none where its size is
1, and None where the value repeats along it, so that any axes will do. Reshapes and transposes of values inside a loop
then cost nothing: they only say otherwise which axes make up which dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Axis = int
Dim = tuple[Axis, ...] | None
Dims = tuple[Dim, ...]
Atom = tuple[int, int]  # size, stride in elements


class Axes:
    """Axes by number: with sizes, split in two on demand, made equal to one another on demand."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._same: dict[Axis, Axis] = {}
        self._parts: dict[Axis, tuple[Axis, Axis]] = {}

    def new(self, size: int) -> Axis:
        """A new axis."""
        self._sizes.append(size)
        return len(self._sizes) - 1

    def size(self, axis: Axis) -> int:
        """The size of an axis."""
        return self._sizes[axis]

    def sizes(self, axes: Sequence[Axis]) -> int:
        """The product of sizes."""
        return math.prod(self._sizes[a] for a in axes)

    def save(self) -> tuple[dict[Axis, Axis], dict[Axis, tuple[Axis, Axis]]]:
        """What `restore` takes."""
        return dict(self._same), dict(self._parts)

    def restore(self, saved: tuple[dict[Axis, Axis], dict[Axis, tuple[Axis, Axis]]]) -> None:
        """As it was at `save`; axes made since stay unused."""
        self._same, self._parts = saved

    def leaves(self, axes: Sequence[Axis]) -> tuple[Axis, ...]:
        """The axes as they are now: representatives, whole ones replaced by their parts."""
        found: list[Axis] = []
        for axis in axes:
            while axis in self._same:
                axis = self._same[axis]
            found += self.leaves(self._parts[axis]) if axis in self._parts else (axis,)
        return tuple(found)

    def split(self, axis: Axis, inner: int) -> None:
        """Cuts a leaf into an outer and an inner part."""
        self._parts[axis] = (self.new(self._sizes[axis] // inner), self.new(inner))

    def unify(self, a: Sequence[Axis], b: Sequence[Axis]) -> bool:
        """Makes two dimensions of equal size the same axes; False where neither division refines the other."""
        left, right = list(self.leaves(a)), list(self.leaves(b))
        while left and right:
            x, y = left[-1], right[-1]
            n, m = self._sizes[x], self._sizes[y]
            if x == y or n == m:
                if x != y:
                    self._same[y] = x
                left.pop()
                right.pop()
            elif n % m == 0 and n > m:
                self.split(x, m)
                left[-1:] = self.leaves((x,))
                left = list(self.leaves(left))
            elif m % n == 0 and m > n:
                self.split(y, n)
                right[-1:] = self.leaves((y,))
                right = list(self.leaves(right))
            else:
                return False
            left, right = list(self.leaves(left)), list(self.leaves(right))
        return not left and not right

    def cut(self, axes: Sequence[Axis], atoms: Sequence[Atom]) -> bool:
        """Splits axes so that each lies within one atom; False where they straddle."""
        left, sizes = list(self.leaves(axes)), [n for n, _ in atoms if n > 1]
        while left and sizes:
            x, n = left[-1], sizes[-1]
            size = self._sizes[x]
            if size == n:
                left.pop()
                sizes.pop()
            elif size > n and size % n == 0:
                self.split(x, n)
                left = list(self.leaves(left))
            elif n > size and n % size == 0:
                left.pop()
                sizes[-1] = n // size
            else:
                return False
        return not left and not sizes

    def strides(self, axes: Sequence[Axis], atoms: Sequence[Atom]) -> dict[Axis, int]:
        """The stride of each leaf of a dimension whose elements lie in memory as `atoms`; `cut` has to hold."""
        found: dict[Axis, int] = {}
        rest = [(n, s) for n, s in atoms if n > 1]
        for axis in reversed(self.leaves(axes)):
            n, stride = rest[-1]
            size = self._sizes[axis]
            found[axis] = stride
            rest[-1:] = [(n // size, stride * size)] if n > size else []
        return found


@dataclass(frozen=True)
class View:
    """Elements of a buffer by strides: `dims` has the atoms of each dimension, outermost first."""

    buffer: int
    offset: int
    dims: tuple[tuple[Atom, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions."""
        return tuple(math.prod(n for n, _ in atoms) for atoms in self.dims)

    def concrete(self, dim: int) -> bool:
        """Whether elements differ along a dimension."""
        return any(n > 1 and s for n, s in self.dims[dim])

    @property
    def elements(self) -> int:
        """The number of different elements that it shows."""
        return math.prod(n for atoms in self.dims for n, s in atoms if s)

    def strided(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(shape, strides) where every dimension has one stride; None where one has not."""
        strides = []
        for atoms in self.dims:
            joined = join([a for a in atoms if a[0] != 1])
            if len(joined) > 1:
                return None
            strides.append(joined[0][1] if joined else 0)
        return self.shape, tuple(strides)


def contiguous(buffer: int, shape: Sequence[int]) -> View:
    """The whole of a buffer in row-major order."""
    stride, dims = 1, []
    for n in reversed(shape):
        dims.append(((n, stride),))
        stride *= n
    return View(buffer, 0, tuple(reversed(dims)))


def join(atoms: Sequence[Atom]) -> list[Atom]:
    """Atoms with neighbours joined that lie behind one another in memory."""
    made: list[Atom] = []
    for n, s in atoms:
        if made and made[-1][1] == n * s:
            made[-1] = (made[-1][0] * n, s)
        else:
            made.append((n, s))
    return made


def reshape_view(view: View, shape: Sequence[int]) -> View | None:
    """The view under another shape; None where its atoms do not fit together to the new dimensions, or are none."""
    if 0 in shape:
        return None
    rest = [list(a) for atoms in view.dims for a in atoms if a[0] != 1]
    dims: list[tuple[Atom, ...]] = []
    for size in reversed(shape):
        atoms: list[Atom] = []
        missing = size
        while missing > 1:
            if not rest:
                return None
            n, s = rest[-1]
            if n <= missing and missing % n == 0:
                atoms.append((n, s))
                rest.pop()
                missing //= n
            elif n > missing and n % missing == 0:
                atoms.append((missing, s))
                rest[-1] = [n // missing, s * missing]
                missing = 1
            else:
                return None
        dims.append(tuple(join(atoms[::-1])))
    return None if rest else replace(view, dims=tuple(reversed(dims)))


def slice_view(view: View, axis: int, start: int, stop: int, step: int) -> View | None:
    """Part of a dimension; None where the dimension lies in memory in several strides."""
    atoms = join([a for a in view.dims[axis] if a[0] != 1])
    if len(atoms) > 1:
        return None
    stride = atoms[0][1] if atoms else 0
    size = len(range(start, stop, step))
    dims = (*view.dims[:axis], ((size, stride * step),), *view.dims[axis + 1 :])
    return View(view.buffer, view.offset + start * stride, dims)


def reshape_dims(axes: Axes, dims: Dims, old: Sequence[int], new: Sequence[int]) -> Dims | None:
    """The same axes as dimensions of another shape; None where a repeated dimension is taken apart or straddles."""
    rest: list[tuple[Axis | None, int]] = []
    for dim, size in zip(dims, old, strict=True):
        if dim is None:
            rest.append((None, size))
        else:
            rest += [(a, axes.size(a)) for a in axes.leaves(dim)]
    rest = [(a, n) for a, n in rest if n != 1]
    made: list[Dim] = []
    for size in reversed(new):
        taken: list[Axis | None] = []
        missing = size
        while missing > 1:
            if not rest:
                return None
            axis, n = rest[-1]
            if n <= missing and missing % n == 0:
                taken.append(axis)
                rest.pop()
                missing //= n
            elif axis is None and n % missing == 0:
                taken.append(None)
                rest[-1] = (None, n // missing)
                missing = 1
            elif axis is not None and n % missing == 0:
                axes.split(axis, missing)
                rest[-1:] = [(a, axes.size(a)) for a in axes.leaves((axis,))]
            else:
                return None
        if any(a is None for a in taken):
            if not all(a is None for a in taken):
                return None
            made.append(None)
        else:
            made.append(tuple(a for a in reversed(taken) if a is not None))
    return None if rest else tuple(reversed(made))
