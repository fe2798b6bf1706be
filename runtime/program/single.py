"""One element of one operator's output, from the few elements of its operands that it depends on.

What a dispute comes down to: whoever has those elements can say whether the output is right, without the rest. The
meanings are the reference executor's; a test holds every operator of the table against it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from runtime.program.operators import OperatorError
from runtime.program.program import Op
from runtime.program.reference import MEANING
from runtime.program.types import NUMPY, Type

Read = Callable[[int, np.ndarray], np.ndarray]
"""Called with an operand's number and flat element numbers; the elements. A constant's own bytes are its operand 0."""


Meaning = Callable[[Op, Sequence[Type], int, Sequence[int], Read], np.ndarray]


def element(op: Op, types: Sequence[Type], flat: int, read: Read) -> np.ndarray:
    """The element (shape [1]) number `flat`, in C order, of an operator's output; `types` are its operands'.

    ArithmeticFault's cause, `reference.Refused`, where the operator refuses a value; IndexError for an index outside.
    """
    at = tuple(int(i) for i in np.unravel_index(flat, op.type.shape)) if op.type.shape else ()
    meaning: Meaning = _SPECIAL.get(op.name, _elementwise)
    made = meaning(op, types, flat, at, read)
    return np.asarray(made).reshape(-1)[:1]


def _one(number: int) -> np.ndarray:
    return np.array([number], np.int64)


def _flat(at: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    return _one(int(np.ravel_multi_index(tuple(at), tuple(shape))) if shape else 0)


def _applied(op: Op, *operands: np.ndarray, **attributes: object) -> np.ndarray:
    tensors = [torch.from_numpy(np.ascontiguousarray(operand)) for operand in operands]
    found: np.ndarray = MEANING[op.name](*tensors, **(attributes or op.attributes)).numpy()
    return found


def _elementwise(op: Op, types: Sequence[Type], flat: int, at: Sequence[int], read: Read) -> np.ndarray:
    return _applied(op, *(read(k, _one(flat)) for k in range(len(types))))


def _literal(op: Op, types: Sequence[Type], flat: int, at: Sequence[int], read: Read) -> np.ndarray:
    bits, dtype = op.attributes["bits"], op.attributes["dtype"]
    return np.array([bits], np.uint32).view(np.float32) if dtype == "f32" else np.array([bits], NUMPY[dtype])


def _reduced(op: Op, types: Sequence[Type], flat: int, at: Sequence[int], read: Read) -> np.ndarray:
    """The elements along the axes, gone over in one."""
    kept = iter(at)
    shape = types[0].shape
    ranges = [np.arange(size) if axis in op.attributes["axes"] else _one(next(kept)) for axis, size in enumerate(shape)]
    numbers = np.ravel_multi_index(np.meshgrid(*ranges, indexing="ij"), shape).reshape(-1) if shape else _one(0)
    return _applied(op, read(0, numbers), axes=(0,))


def _dot(op: Op, types: Sequence[Type], flat: int, at: Sequence[int], read: Read) -> np.ndarray:
    *batch, row, column = at
    terms = np.arange(types[0].shape[-1])
    left, right = (np.array([[*batch, row, k] for k in terms]), np.array([[*batch, k, column] for k in terms]))
    if not terms.size:
        return np.zeros(1, np.int32)
    a = read(0, np.ravel_multi_index(tuple(left.T), types[0].shape))
    b = read(1, np.ravel_multi_index(tuple(right.T), types[1].shape))
    return _applied(op, a.reshape(1, -1), b.reshape(-1, 1))


def _take(op: Op, types: Sequence[Type], flat: int, at: Sequence[int], read: Read) -> np.ndarray:
    data, index = types
    row = int(read(1, _flat(at[: len(index.shape)], index.shape))[0])
    if not 0 <= row < data.shape[0]:
        raise IndexError(f"take: expected an index in [0, {data.shape[0]}), got {row}")
    return read(0, _flat((row, *at[len(index.shape) :]), data.shape))


def _scatter_add(op: Op, types: Sequence[Type], flat: int, at: Sequence[int], read: Read) -> np.ndarray:
    rows = read(0, np.arange(types[0].elements))
    numbers = [_flat((int(row), *at[1:]), types[1].shape)[0] for row in np.flatnonzero(rows == at[0])]
    with np.errstate(over="ignore"):
        return read(1, np.array(numbers, np.int64)).sum(dtype=np.int64) if numbers else np.zeros(1, np.int64)


def _moved(op: Op, types: Sequence[Type], flat: int, at: Sequence[int], read: Read) -> np.ndarray:
    """Data movement: one element of one operand, as it is."""
    attributes, shape = op.attributes, types[0].shape if types else ()
    match op.name:
        case "reshape":
            return read(0, _one(flat))
        case "transpose":
            return read(0, _flat([at[attributes["order"].index(axis)] for axis in range(len(shape))], shape))
        case "slice":
            axis = attributes["axis"]
            moved = [i * attributes["step"] + attributes["start"] if n == axis else i for n, i in enumerate(at)]
            return read(0, _flat(moved, shape))
        case "broadcast":
            return read(0, _flat([0 if size == 1 else i for i, size in zip(at, shape, strict=True)], shape))
        case "concat":
            axis, rest = attributes["axis"], at[attributes["axis"]]
            for k, t in enumerate(types):
                if rest < t.shape[axis]:
                    return read(k, _flat((*at[:axis], rest, *at[axis + 1 :]), t.shape))
                rest -= t.shape[axis]
    raise OperatorError(f"{op.name}: no such movement of data")


_SPECIAL: dict[str, Meaning] = {
    "literal": _literal,
    "constant": lambda op, types, flat, at, read: read(0, _one(flat)),
    "iota": lambda op, types, flat, at, read: _one(flat),
    "sum": _reduced,
    "max": _reduced,
    "dot": _dot,
    "take": _take,
    "scatter_add": _scatter_add,
    **dict.fromkeys(("reshape", "transpose", "slice", "broadcast", "concat"), _moved),
}
