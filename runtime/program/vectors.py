"""Known-answer vectors: small Programs with inputs and the bytes that every executor must give for them.

`vectors.json` beside this module is written by the reference executor (`python -m runtime.program.vectors FILE`) and
read by whoever implements the arithmetic, in whatever language; docs/formats.md has its fields. Inputs are Philox words
with the values that broke others mixed in, so the file can be made anew anywhere, byte for byte.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime import philox
from runtime.program import functions, optimiser, sums
from runtime.program.builder import Builder, Value
from runtime.program.executor import ArithmeticFault, Executor
from runtime.program.program import Program, decode_program, encode_program
from runtime.program.types import NUMPY, type_of
from runtime.recipe import OptimiserConfig, ScheduleConfig

FILE = Path(__file__).with_name("vectors.json")
BLOCKS = Path(__file__).with_name("block_vectors.json")
SEED = 20261123
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 2**-126, 2**-149, -(2**-149), 1.5 * 2**-126, 3.4028235e38)
"""Zeros, ties, the smallest normal and subnormal numbers, the largest finite one."""


@dataclass(frozen=True, kw_only=True)
class Vector:
    """One case: `fault` is the element at which the Program has to fault, None where it gives `outputs`."""

    name: str
    program: Program
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    fault: int | None = None


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The first place where an executor differs from a vector; bytes in hex, little-endian."""

    vector: str
    operators: tuple[str, ...]
    place: str
    expected: str
    actual: str
    operands: tuple[str, ...] = ()
    """The elements of the inputs at that place, where the inputs have the output's shape."""

    def __str__(self) -> str:
        given = f" of {', '.join(self.operands)}" if self.operands else ""
        told = self.operators if len(self.operators) <= 6 else (*self.operators[:5], f"{len(self.operators) - 5} more")
        return f"{self.vector} ({', '.join(told)}), {self.place}{given}: expected {self.expected}, got {self.actual}"


# ------------------------------------------------------------------------------------------------------------ checking


def check(executor: Executor, vector: Vector) -> Mismatch | None:
    """The first difference between what the executor gives for the vector and what it must give; None where equal."""
    try:
        handles = executor.run(vector.program, [executor.put(array) for array in vector.inputs])
        made = [executor.get(handle) for handle in handles]
    except ArithmeticFault as fault:
        if vector.fault == fault.element:
            return None
        return _mismatch(vector, "fault", _fault(vector.fault), _fault(fault.element))
    if vector.fault is not None:
        return _mismatch(vector, "fault", _fault(vector.fault), _fault(None))
    for number, (want, got) in enumerate(zip(vector.outputs, made, strict=True)):
        if type_of(got) != type_of(want):
            return _mismatch(vector, f"output {number}", str(type_of(want)), str(type_of(got)))
        expected, actual = (np.atleast_1d(array).reshape(-1) for array in (want, got))
        wrong = expected.view(np.uint8).reshape(expected.size, -1) != actual.view(np.uint8).reshape(actual.size, -1)
        if wrong.any():
            i = int(wrong.any(axis=1).argmax())
            alike = [a.reshape(-1)[i].tobytes().hex() for a in vector.inputs if a.shape == want.shape and a.ndim]
            found = _mismatch(
                vector, f"output {number}, element {i}", expected[i].tobytes().hex(), actual[i].tobytes().hex()
            )
            return replace(found, operands=tuple(alike) if len(alike) == len(vector.inputs) else ())
    return None


def _mismatch(vector: Vector, place: str, expected: str, actual: str) -> Mismatch:
    operators = tuple(name for name in vector.program.histogram if name not in ("literal", "broadcast", "reshape"))
    return Mismatch(vector=vector.name, operators=operators, place=place, expected=expected, actual=actual)


def _fault(element: int | None) -> str:
    return "no fault" if element is None else f"a fault at element {element}"


# ------------------------------------------------------------------------------------------------------------ the file


def load(*paths: Path) -> list[Vector]:
    """The vectors of files; without any those of operators and of whole blocks."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths or (FILE, BLOCKS)]
    return [_from_json(case) for file in files for case in file["vectors"]]


def text(vectors: Sequence[Vector]) -> str:
    """The file's text: one case a line."""
    lines = ",\n".join(json.dumps(_to_json(vector), sort_keys=True) for vector in vectors)
    return f'{{"format": "trueweight-vectors-1", "vectors": [\n{lines}\n]}}\n'


def _to_json(vector: Vector) -> dict[str, Any]:
    return {
        "name": vector.name,
        "program": base64.b64encode(encode_program(vector.program)).decode("ascii"),
        "inputs": [_array_to_json(array) for array in vector.inputs],
        "outputs": [_array_to_json(array) for array in vector.outputs],
        "fault": vector.fault,
    }


def _from_json(case: dict[str, Any]) -> Vector:
    return Vector(
        name=case["name"],
        program=decode_program(base64.b64decode(case["program"])),
        inputs=tuple(map(_array_from_json, case["inputs"])),
        outputs=tuple(map(_array_from_json, case["outputs"])),
        fault=case["fault"],
    )


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    t = type_of(array)
    return {"dtype": t.dtype, "shape": t.shape, "bytes": array.tobytes().hex()}


def _array_from_json(stored: dict[str, Any]) -> np.ndarray:
    array = np.frombuffer(bytes.fromhex(stored["bytes"]), dtype=NUMPY[stored["dtype"]].newbyteorder("<"))
    return array.reshape(stored["shape"]).astype(NUMPY[stored["dtype"]])


# ------------------------------------------------------------------------------------------------------------- making


def _words(stream: int, count: int) -> np.ndarray:
    return philox.words(SEED, count, purpose=philox.DROPOUT, operator=stream)


def floats(stream: int, count: int) -> np.ndarray:
    """Random finite bit patterns, every other one of everyday size, the special values first."""
    bits = _words(stream, count)
    wild = np.where((bits >> 23) & 255 == 255, bits & np.uint32(0xBFFFFFFF), bits).astype(np.uint32).view(np.float32)
    tame = (bits.astype(np.int64) - 2**31).astype(np.float32) * np.float32(2**-29)
    mixed: np.ndarray = np.where(np.arange(count) % 2, tame, wild).astype(np.float32)
    known = np.array([*SPECIAL, *(-x for x in SPECIAL)], np.float32)[:count]
    mixed[: len(known)] = np.roll(known, stream)
    return mixed


def integers(stream: int, count: int, dtype: str) -> np.ndarray:
    """Random bit patterns as i32 or i64."""
    words = _words(stream, 2 * count)
    return words.view(NUMPY[dtype])[:count].copy()


Made = tuple[Callable[..., Sequence[Value]], tuple[np.ndarray, ...]]


def _operator_cases() -> Iterator[tuple[str, Callable[..., Sequence[Value]], tuple[np.ndarray, ...]]]:
    """Every row of the table on its own: name, what to build from the inputs, the inputs."""
    a, b = floats(1, 96), floats(2, 96)
    extreme = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, 2**-149], np.float32)
    pairs = tuple(np.array(x, np.float32) for x in np.meshgrid(extreme, extreme))
    for name in ("add", "sub", "mul", "div"):
        yield name, lambda x, y, n=name: [x.builder.op(n, [x, y])], (a, b)
        yield f"{name} of extremes", lambda x, y, n=name: [x.builder.op(n, [x, y])], pairs
    for name in ("eq", "lt", "le"):
        yield name, lambda x, y, n=name: [x.builder.op(n, [x, y])], pairs
    yield "sqrt", lambda x: [x.sqrt()], (np.abs(a),)
    powers = (np.arange(96, dtype=np.int32) - 48) * 7
    yield "scale", lambda x, p: [x.scale(p)], (a, powers)
    for dtype in ("i32", "i64"):
        x, y = integers(3, 48, dtype), integers(4, 48, dtype)
        for name in ("add", "sub", "mul", "and", "or", "xor", "eq", "lt", "le"):
            yield f"{name} of {dtype}", lambda x, y, n=name: [x.builder.op(n, [x, y])], (x, y)
        yield f"shl of {dtype}", lambda x: [x << 7], (x,)
        yield f"shr of {dtype}", lambda x: [x >> 7], (x,)
        yield f"float of {dtype}", lambda x: [x.float()], (x,)
        yield f"cast of {dtype}", lambda x: [x.cast("i32"), x.cast("i64")], (x,)
        yield f"sum of {dtype}", lambda x: [x.sum(0), x.sum(1), x.sum(0, 1)], (x.reshape(6, 8),)
        yield f"max of {dtype}", lambda x: [x.max(0), x.max(1), x.max(0, 1)], (x.reshape(6, 8),)
    bits = integers(5, 64, "i32") & 1 == 1
    yield "and, or, xor of bool", lambda x, y: [x & y, x | y, x ^ y, x.cast("i64")], (bits, np.roll(bits, 1))
    yield "select", lambda c, x, y: [c.builder.select(c, x, y)], (bits, a[:64], b[:64])
    ties = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2**23 + 1.0, -(2**22) - 0.5, 2**30, -0.0, 0.49999997], np.float32)
    yield "rint", lambda x: [x.rint("i32"), x.rint("i64")], (ties,)
    for value in (np.nan, np.inf, 2.0**31, -(2.0**31)):
        yield f"rint faults on {value}", lambda x: [x.rint("i32")], (np.array([1.0, value], np.float32),)
    yield "digit", lambda x: [x.digit().cast("i32")], (np.arange(-200, 200, 3, dtype=np.int32),)
    yield "bitcast", lambda x: [x.bits(), x.bits().from_bits()], (a,)
    yield "iota", lambda x: [x.builder.iota(8), x.builder.constant(np.arange(5, dtype=np.int32))], (a[:1],)
    yield "take", lambda x, i: [x.builder.take(x, i)], (a.reshape(12, 8), integers(6, 9, "i64") % 12)
    yield "take faults", lambda x, i: [x.builder.take(x, i)], (a[:4], np.array([0, 3, 4]))
    rows = integers(7, 24, "i64") % 5
    yield "scatter_add", lambda i, u: [i.builder.scatter_add(i, u, 6)], (rows, integers(8, 48, "i64").reshape(24, 2))
    x = a.reshape(4, 2, 12)
    yield "movement", lambda x: [x.reshape(8, 12), x.transpose(2, 0, 1), x.slice(2, 1, 12, 3), x.swap()], (x,)
    yield "concat, broadcast", lambda x: [x.builder.concat([x, x], 1), x.slice(0, 0, 1).broadcast(3, 2, 12)], (x,)


def _composition_cases() -> Iterator[tuple[str, Callable[..., Sequence[Value]], tuple[np.ndarray, ...]]]:
    """Sums, products and functions, where operators meet."""
    everyday = floats(9, 128)[1::2]
    for name in ("exp", "log", "tanh", "sigmoid", "erf"):
        yield name, lambda x, n=name: [getattr(functions, n)(x)], (everyday,)
    yield "normal", lambda x: [functions.normal(x)], (np.linspace(-0.9999, 0.9999, 33).astype(np.float32),)
    huge_and_tiny = np.concatenate([[3e38], np.full(40, 1e-3), [2**-149, -0.0]]).astype(np.float32)
    none = np.full(8, 2**-120, np.float32)
    for name, row in (("random", floats(10, 96)[1::2]), ("one huge", huge_and_tiny), ("below 2^-100", none)):
        yield f"row sum, {name}", lambda x: [sums.row_sum(x, 0), sums.row_max(x, 0), sums.exponent(x, 0)], (row,)
    for slices, k in ((2, 1), (2, 37), (2, 4097), (3, 37)):
        shape = (1, k) if k > 100 else (3, k)
        left = floats(11, 2 * shape[0] * k)[1::2].reshape(shape)
        right = floats(12, 2 * k * 2)[1::2].reshape(k, 2)
        yield f"product of K = {k}, {slices} slices", lambda x, y, s=slices: [sums.matmul(x, y, s)], (left, right)
    yield "grid", lambda x: [sums.to_grid(x, 1), sums.from_grid(sums.to_grid(x, 1))], (everyday,)


def _cases() -> Iterator[tuple[str, Program, tuple[np.ndarray, ...]]]:
    for name, build, inputs in (*_operator_cases(), *_composition_cases()):
        b = Builder()
        values = [b.input(f"x{i}", type_of(array).dtype, *array.shape) for i, array in enumerate(inputs)]
        yield name, b.finish(build(*values)), inputs
    n = 24
    w, m, v = (floats(20 + i, 2 * n)[1::2] for i in range(3))
    gradient = integers(23, n, "i64") >> 14
    scalars = (np.array(10**9, np.int64), np.array(130, np.int32), np.array(3, np.int64))
    for kind, slots in (("adamw", (m, np.abs(v))), ("sgd", (m,))):
        program = optimiser.update_program(
            n, micro_batches=4, steps=8, decay=True, optimiser=OptimiserConfig(kind=kind), schedule=ScheduleConfig()
        )
        yield f"update, {kind}", program, (w, *slots, gradient, *scalars)
    yield "exponent", optimiser.exponent_program(n, 4), (gradient,)
    yield "square", optimiser.square_program(n, 4), (gradient, np.array(140, np.int32))


def make(executor: Executor) -> list[Vector]:
    """Every vector, answered by `executor`."""
    made = []
    for name, program, inputs in _cases():
        outputs: tuple[np.ndarray, ...] = ()
        fault = None
        try:
            handles = executor.run(program, [executor.put(array) for array in inputs])
            outputs = tuple(executor.get(handle) for handle in handles)
        except ArithmeticFault as error:
            fault = error.element
        made.append(Vector(name=name, program=program, inputs=inputs, outputs=outputs, fault=fault))
    return made


if __name__ == "__main__":
    from runtime.executors import reference

    Path(sys.argv[1]).write_text(text(make(reference(1))), encoding="utf-8")
