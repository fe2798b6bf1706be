"""The reference executor: the executable specification, one primitive at a time in plain torch, on CPU or CUDA.

Each meaning uses only torch operations that are correctly rounded or exact. `prove` holds them against numpy and the
hardware before an executor trusts its device: torch's own `sqrt`, for one, is an ulp off on one input in six.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from runtime import memory
from runtime.program.executor import ArithmeticFault, Observer
from runtime.program.program import Op, Program
from runtime.program.types import NUMPY
from storage.errors import FailureError

Tensor = torch.Tensor
Meaning = Callable[..., Tensor]

TORCH: Mapping[str, torch.dtype] = {
    "f32": torch.float32,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}
EXACT_TERMS = 4096
"""A float32 product of digits within +-64 is exact up to this many terms: 64 * 64 * 4096 = 2^24."""


class Refused(Exception):
    """A meaning met a value outside its domain."""

    def __init__(self, reason: str, values: Tensor, bad: Tensor) -> None:
        super().__init__(reason)
        self.reason = reason
        self.element = int(bad.reshape(-1).to(torch.int8).argmax())
        self.value = float(values.reshape(-1)[self.element])


@lru_cache(maxsize=4096)
def _literal(dtype: str, bits: int, device: str) -> Tensor:
    array = np.array(bits, dtype=np.uint32).view(np.float32) if dtype == "f32" else np.array(bits, dtype=NUMPY[dtype])
    return torch.from_numpy(array.reshape(1)).reshape(()).to(device)


def _power(p: Tensor) -> Tensor:
    """2^p for -126 <= p <= 127, from bits (torch.ldexp computes a power and may be an ulp off)."""
    return ((p + 127) << 23).view(torch.float32)


def _compact(t: Tensor) -> Tensor:
    """The tensor with repeated (stride 0) axes reduced to size 1: the same values under broadcasting."""
    for axis, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(axis, 0, 1)
    return t


def _scale(x: Tensor, p: Tensor) -> Tensor:
    p = _compact(p)
    p = p.clamp(-252, 254)
    first = p.clamp(-126, 127)
    y = x * _power(first)
    rest = p - first
    return y * _power(rest) if bool(rest.any()) else y


def _rint(x: Tensor, dtype: str, bound: int) -> Tensor:
    r = torch.round(x)
    if r.numel():
        low, high = torch.aminmax(r)
        if not (bool(low > -(2.0**bound)) and bool(high < 2.0**bound)):
            raise Refused(f"expected |x| < 2^{bound}", x, ~(r.abs() < 2.0**bound))
    return r.to(TORCH[dtype])


def _sum(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.sum(dim=tuple(axes), dtype=torch.int64) if axes else x.to(torch.int64)


def _max(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.amax(dim=tuple(axes)) if axes else x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    pieces = range(0, max(a.shape[-1], 1), EXACT_TERMS)
    total: Tensor | None = None
    for i in pieces:
        part = torch.matmul(a[..., i : i + EXACT_TERMS].float(), b[..., i : i + EXACT_TERMS, :].float())
        part = part.to(torch.int32)
        total = part if total is None else total + part
    assert total is not None
    return total


def _rows_inside(index: Tensor, rows: int) -> None:
    bad = (index < 0) | (index >= rows)
    if bool(bad.any()):
        raise Refused(f"expected an index in [0, {rows})", index, bad)


def _take(data: Tensor, index: Tensor) -> Tensor:
    _rows_inside(index, data.shape[0])
    return data[index]


def scatter_add(index: Tensor, updates: Tensor, rows: int, into: Tensor | None = None) -> Tensor:
    """Zeros (in `into`, if given) with each update added to its row."""
    _rows_inside(index, rows)
    if into is None:
        into = torch.empty((rows, *updates.shape[1:]), dtype=torch.int64, device=updates.device)
    return into.zero_().index_add_(0, index, updates)


def _slice(x: Tensor, axis: int, start: int, stop: int, step: int) -> Tensor:
    return x[(*(slice(None),) * axis, slice(start, stop, step))]


MEANING: Mapping[str, Meaning] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    # float64's root, even an ulp off, cannot lie across a binary32 rounding boundary: no root of a binary32 comes
    # within 2^-51 of a midpoint
    "sqrt": lambda x: torch.sqrt(x.to(torch.float64)).to(torch.float32),
    "scale": _scale,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "shl": lambda x, amount: x << amount,
    "shr": lambda x, amount: x >> amount,
    "eq": torch.eq,
    "lt": torch.lt,
    "le": torch.le,
    "select": torch.where,
    "rint": _rint,
    "float": lambda x: x.to(torch.float32),
    "cast": lambda x, dtype: x.to(TORCH[dtype]),
    "digit": lambda x: x.clamp(-64, 64).to(torch.int8),
    "bitcast": lambda x, dtype: x.view(TORCH[dtype]),
    "sum": _sum,
    "max": _max,
    "dot": _dot,
    "take": _take,
    "scatter_add": scatter_add,
    "reshape": lambda x, shape: x.reshape(tuple(shape)),
    "transpose": lambda x, order: x.permute(tuple(order)),
    "slice": _slice,
    "concat": lambda *xs, axis: torch.cat(xs, dim=axis),
    "broadcast": lambda x, shape: x.expand(tuple(shape)),
}
"""The reference column of the operator table; `literal`, `constant` and `iota` are sources and made by the executor."""


class ReferenceExecutor:
    """Runs Programs one primitive at a time. Handles are torch tensors on `device`.

    `profile`, where given, collects seconds by operator name.
    """

    def __init__(self, device: str = "cpu", profile: dict[str, float] | None = None) -> None:
        prove(device)
        self._device = device
        self._profile = profile
        self._constants: dict[tuple[bytes, str], Tensor] = {}

    @property
    def path(self) -> str:
        """How digits are multiplied here."""
        return "float32 BLAS"

    def put(self, array: np.ndarray) -> Tensor:
        """The array on the device (shared with numpy on CPU)."""
        array = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
        if not array.flags.writeable:  # torch would warn; nothing here writes into its inputs
            array = array.copy()
        return torch.from_numpy(array).to(self._device)

    def get(self, handle: Tensor) -> np.ndarray:
        """The array of a handle, contiguous, NaN as 0x7fc00000."""
        array: np.ndarray = handle.contiguous().cpu().numpy()
        if array.dtype == np.float32 and np.isnan(array).any():
            array = np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32)).view(np.float32)
        return array

    def run(
        self, program: Program, inputs: Sequence[Tensor], observe: Observer | None = None, *, stable: int = 0
    ) -> list[Tensor]:
        """The program's outputs, each operator's output shown to `observe` in order. Nothing is kept."""
        self._check(program, inputs)
        values: dict[int, Tensor] = dict(enumerate(inputs))
        first = len(inputs)
        with torch.inference_mode():
            for number, op in enumerate(program.ops):
                started = time.perf_counter() if self._profile is not None else 0.0
                operands = [values[i] for i in op.inputs]
                if self._device == "cpu":
                    memory.require(_room(op, operands), f"operator {number} ({op.name}, {op.label or 'no label'})")
                try:
                    values[first + number] = self._apply(program, op.name, op.attributes, operands)
                except Refused as refusal:
                    raise ArithmeticFault(
                        operator=number, opcode=op.name, label=op.label,
                        element=refusal.element, value=refusal.value, reason=refusal.reason,
                    ) from None  # fmt: skip
                if self._profile is not None:
                    spent = time.perf_counter() - started
                    self._profile[op.name] = self._profile.get(op.name, 0.0) + spent
                if observe is not None:
                    changed = observe(number, self.get(values[first + number]))
                    if changed is not None:
                        values[first + number] = self.put(changed)
                for dead in program.last_use[number]:
                    del values[dead]
        return [values[i] for i in program.outputs]

    def forward(
        self, forward: Program, backward: Program, inputs: Sequence[Tensor], *, stable: int = 0
    ) -> tuple[list[Tensor], Any]:
        """The outputs of `forward`, and nothing for `backward`."""
        return self.run(forward, inputs), None

    def backward(
        self,
        forward: Program,
        backward: Program,
        inputs: Sequence[Tensor],
        saved: Any,
        sums: Sequence[np.ndarray] = (),
        *,
        stable: int = 0,
    ) -> list[Tensor]:
        """The outputs of `backward`, the last ones added to `sums`."""
        outputs = self.run(backward, inputs)
        kept = len(outputs) - len(sums)
        for total, made in zip(sums, outputs[kept:], strict=True):
            total += self.get(made).reshape(-1)
        return outputs[:kept]

    def forget(self) -> None:
        """Nothing was kept."""

    def _check(self, program: Program, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(program.inputs):
            raise ValueError(f"the program takes {len(program.inputs)} inputs, got {len(inputs)}")
        for (name, t), tensor in zip(program.inputs, inputs, strict=True):
            if tensor.dtype != TORCH[t.dtype] or tuple(tensor.shape) != t.shape:
                raise ValueError(f"input {name!r}: expected {t}, got {tensor.dtype} {list(tensor.shape)}")

    def _apply(self, program: Program, name: str, attributes: Mapping[str, Any], operands: list[Tensor]) -> Tensor:
        if name == "literal":
            return _literal(attributes["dtype"], attributes["bits"], self._device)
        if name == "iota":
            return torch.arange(attributes["size"], dtype=torch.int64, device=self._device)
        if name == "constant":
            return self._constant(program, attributes)
        return MEANING[name](*operands, **attributes)

    def _constant(self, program: Program, attributes: Mapping[str, Any]) -> Tensor:
        key = (attributes["digest"], attributes["dtype"])
        if key not in self._constants:
            array = np.frombuffer(program.constants[key[0]], dtype=NUMPY[key[1]].newbyteorder("<"))
            self._constants[key] = torch.from_numpy(array.copy()).to(self._device)
        return self._constants[key].reshape(tuple(attributes["shape"]))


def _room(op: Op, operands: Sequence[Tensor]) -> int:
    """Bytes that an operator makes: nothing where its output shares memory with an operand."""
    if op.name in ("broadcast", "transpose", "slice") or (op.name == "reshape" and operands[0].is_contiguous()):
        return 0
    digits = sum(operand.numel() for operand in operands) if op.name == "dot" else 0
    return op.type.elements * NUMPY[op.type.dtype].itemsize + 4 * digits


def _vectors() -> tuple[np.ndarray, np.ndarray]:
    """Two f32 arrays of random bit patterns and the values that broke others; large enough for all threads."""
    source = np.random.Generator(np.random.Philox(7))
    a, b = (source.integers(0, 2**32, 65536, dtype=np.uint32).view(np.float32).copy() for _ in range(2))
    special = np.array(
        [0.0, -0.0, 1.0, -1.0, 2**-126, 2**-149, -(2**-149), 3.4028235e38, np.inf, -np.inf, np.nan, 0.5, 1.5, 2.5, 3.0],
        dtype=np.float32,
    )
    pairs = np.array(np.meshgrid(special, special)).reshape(2, -1)
    a[: pairs.shape[1]], b[: pairs.shape[1]] = pairs
    return a, b


def _proofs(device: str) -> Iterator[tuple[str, np.ndarray, Tensor]]:
    """Name, numpy's result and this device's, for every primitive that computes."""
    a, b = _vectors()
    integers, shifts = (
        np.random.Generator(np.random.Philox(8 + i)).integers(-(2**63), 2**63 - 1, 65536) for i in (0, 1)
    )
    integers[:4] = [(2**24 + i) * 2**38 + s for i, s in ((1, 1), (1, -1), (3, 1), (3, -1))]  # wrong by way of float64
    powers = (shifts % 400 - 200).astype(np.int32)
    small = np.where(np.abs(a) < 2.0**31, a, np.float32(0))
    ta, tb, ti, tj, tp, ts = (torch.from_numpy(x).to(device) for x in (a, b, integers, shifts, powers, small))
    # known bits, not numpy's: on a thread that flushes subnormals numpy flushes them too
    least, halves = (
        np.array(bits, dtype=np.uint32).view(np.float32)
        for bits in ([0x00800000, 0x80800000, 0x00000006], [0x00400000, 0x80400000, 0x00000003])
    )
    yield "mul of subnormals", halves, MEANING["mul"](torch.from_numpy(least).to(device), _power(tp[:3] * 0 - 1))
    for name, of in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}.items():
        yield name, of(a, b), MEANING[name](ta, tb)
    for name, of in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "xor": np.bitwise_xor}.items():
        yield f"{name} of i64", of(integers, shifts), MEANING[name](ti, tj)
    for name, of in {"eq": np.equal, "lt": np.less, "le": np.less_equal}.items():
        yield name, of(a, b), MEANING[name](ta, tb)
    first = np.clip(powers, -126, 127)
    yield (
        "scale",
        np.ldexp(np.float32(1), first) * a * np.ldexp(np.float32(1), powers - first),
        MEANING["scale"](ta, tp),
    )
    yield "sqrt", np.sqrt(a), MEANING["sqrt"](ta)
    yield "rint", np.rint(small).astype(np.int64), MEANING["rint"](ts, "i64", 31)
    yield "float", integers.astype(np.float32), MEANING["float"](ti)
    yield "float of i32", powers.astype(np.float32), MEANING["float"](tp)
    yield "shl", integers << 5, MEANING["shl"](ti, 5)
    yield "shr", integers >> 5, MEANING["shr"](ti, 5)
    yield "cast", integers.astype(np.int32), MEANING["cast"](ti, "i32")
    yield "sum", integers.reshape(256, 256).sum(0), MEANING["sum"](ti.reshape(256, 256), (0,))
    yield "max", powers.reshape(256, 256).max(0), MEANING["max"](tp.reshape(256, 256), (0,))
    digits = np.random.Generator(np.random.Philox(9)).integers(-64, 65, (2, 48, EXACT_TERMS)).astype(np.int8)
    digits[:, 0], digits[0, 1], digits[1, 1] = 64, 64, -64
    td = torch.from_numpy(digits).to(device)
    product = digits[0].astype(np.int64) @ digits[1].astype(np.int64).T
    yield "dot", product.astype(np.int32), MEANING["dot"](td[0], td[1].T)


@cache
def prove(device: str) -> None:
    """Returns where every primitive has numpy's bytes on `device`; FailureError names the first that has not.

    numpy's elementwise binary32 operations are the processor's own instructions; the digit product is held against
    int64 sums at the largest K that one float32 product takes. NaN equals NaN: its bits are set where bytes leave.
    """
    with np.errstate(all="ignore"):
        for name, want, made in _proofs(device):
            got = made.cpu().numpy()
            if want.dtype == np.float32:  # by bits: -0 is not 0, and a thread that flushes compares subnormals as zeros
                want, got = (np.where(x != x, np.float32(np.nan), x).view(np.int32) for x in (want, got))
            wrong = want != got
            if wrong.any() or want.dtype != got.dtype:
                i = int(wrong.reshape(-1).argmax())
                raise FailureError(
                    f"the device {device!r} does not compute {name!r} exactly: element {i} of the test vector, "
                    f"expected {want.reshape(-1)[i]:#x}, got {got.reshape(-1)[i]:#x}. "
                    "Use another device, or a torch build without fast-math and flushed subnormals"
                )
