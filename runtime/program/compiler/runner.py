"""Runs a list of kernels without Python in between, on one thread or on several that meet after each kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from llvmlite import ir

from storage.native import I32, I64, POINTER, Function, Library, entry

Runner = Callable[[int, int, int, int, int], int]
"""(steps, how many, threads, barrier, times) -> 0, or what a kernel refused; addresses of i64 arrays, 0 for no times.

A step is four i64: a kernel's address, its first and end row on this thread, its table. `times` gets nanoseconds: at
the start and after each step. `barrier` is one i64, 0 at the start, the same for all threads.
"""

PATIENCE = 1024
"""Looks at the barrier before the thread offers its processor to others."""


def make_runner(library: Library) -> Runner:
    """The runner, compiled."""
    (address,) = library.add([("runner", _text())])
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
    )
    return kind(address)


def _text() -> str:
    f = Function("runner", [POINTER, I64, I64, POINTER, POINTER])
    steps, count, threads, barrier, times = f.arguments
    b = f.builder
    bad = b.alloca(I32)
    b.store(I32(0), bad)
    timed = b.icmp_unsigned("!=", b.ptrtoint(times, I64), I64(0))
    clock = b.alloca(ir.ArrayType(I64, 2))
    with b.if_then(timed):
        _note(f, clock, times, I64(0))
    with f.loop(0, count) as (i, _):
        step = f.at(steps, b.mul(i, I64(4)), I64)
        first, end = f.load(step, 1, I64), f.load(step, 2, I64)
        with b.if_then(b.icmp_signed("<", first, end)):
            kernel = b.load(step, typ=POINTER)
            table = b.load(f.at(step, 3, I64), typ=POINTER)
            call = ir.FunctionType(I32, [I64, I64, POINTER])
            made = b.call(_Typed(kernel, call), [first, end, table])
            b.store(b.or_(b.load(bad, typ=I32), made), bad)
        with b.if_then(b.icmp_signed(">", threads, I64(1))):
            _meet(f, barrier, b.mul(b.add(i, I64(1)), threads))
        with b.if_then(timed):
            _note(f, clock, times, b.add(i, I64(1)))
    b.ret(b.load(bad, typ=I32))
    return f.text()


class _Typed:
    """A pointer to be called: llvmlite wants to know its function type."""

    def __init__(self, pointer: ir.Value, function_type: ir.FunctionType) -> None:
        self.function_type, self.type = function_type, pointer.type
        self._pointer = pointer
        self.get_reference = pointer.get_reference


def _meet(f: Function, barrier: ir.Value, expected: ir.Value) -> None:
    """Returns when every thread has come here."""
    b = f.builder
    b.atomic_rmw("add", barrier, I64(1), "seq_cst")
    spin, done = f.function.append_basic_block(), f.function.append_basic_block()
    before = b.block
    b.branch(spin)
    b.position_at_end(spin)
    looks = b.phi(I64)
    looks.add_incoming(I64(1), before)
    arrived = b.load_atomic(barrier, "acquire", 8, typ=I64)
    with b.if_then(b.icmp_unsigned("==", b.and_(looks, I64(PATIENCE - 1)), I64(0))):
        name = "sched_yield"
        yielding = f.module.globals.get(name) or ir.Function(f.module, ir.FunctionType(I32, []), name)
        b.call(yielding, [])
    looks.add_incoming(b.add(looks, I64(1)), b.block)
    b.cbranch(b.icmp_signed("<", arrived, expected), spin, done)
    b.position_at_end(done)


def _note(f: Function, clock: ir.Value, times: ir.Value, place: ir.Value) -> None:
    b = f.builder
    name = "clock_gettime"
    found = f.module.globals.get(name) or ir.Function(f.module, ir.FunctionType(I32, [I32, POINTER]), name)
    b.call(found, [I32(0), clock])
    seconds, rest = f.load(clock, 0, I64), f.load(clock, 1, I64)
    f.store(b.add(b.mul(seconds, I64(10**9)), rest), times, place)


def clear(operator: str, dtype: str) -> str:
    """A module `clear`(first, end; array) that sets elements to what a sum or maximum starts with."""
    kind = I64 if dtype == "i64" else I32
    f = Function("clear_body", [I64, I64, POINTER])
    with f.loop(*f.arguments[:2]) as (i, _):
        f.store(kind(0 if operator == "sum" else -(2 ** (kind.width - 1))), f.arguments[2], i)
    f.builder.ret(I32(0))
    return entry("clear", f, 1)


def combine(operator: str, dtype: str, parts: int) -> str:
    """A module `combine`(first, end; array, others...) that adds other threads' sums, or takes their maxima."""
    kind = I64 if dtype == "i64" else I32
    f = Function("combine_body", [I64, I64, *[POINTER] * parts])
    arrays = f.arguments[2:]
    with f.loop(*f.arguments[:2]) as (i, _):
        total = f.load(arrays[0], i, kind)
        for other in arrays[1:]:
            more = f.load(other, i, kind)
            total = (
                f.builder.add(total, more)
                if operator == "sum"
                else f.intrinsic(f"llvm.smax.{kind}", kind, [total, more])
            )
        f.store(total, arrays[0], i)
    f.builder.ret(I32(0))
    return entry("combine", f, parts)
