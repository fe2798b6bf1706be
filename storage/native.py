"""LLVM modules to machine code, with a cache on disk of what was compiled before.

A cached object is a file named after what it was made from: module text, processor, LLVM. It begins with a digest of
its name and its bytes, so a damaged, truncated or renamed one is compiled again and never run. Files appear by rename,
so any number of processes may share the folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from storage.errors import FailureError
from storage.files import write_whole

I1, I8, I32, I64, F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = ir.PointerType()

Address = int
"""Of a compiled kernel: (i64 first, i64 end, pointer to a table of addresses) -> i32, 0 or what it refused."""

Progress = Callable[[int], None]
"""Called after each kernel that had to be compiled, with their number so far."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: below XDG_CACHE_HOME, which is ~/.cache unless it says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "trueweight" / "kernels"


def quiet(done: int) -> None:
    """Reports nothing."""


class Function:
    """An LLVM function under construction: `builder`, arguments, and counted loops."""

    def __init__(self, name: str, arguments: Iterable[ir.Type], result: ir.Type = I32) -> None:
        self.module = ir.Module(name)
        self.module.triple = llvm.get_default_triple()
        self.function = ir.Function(self.module, ir.FunctionType(result, list(arguments)), name)
        self.builder = ir.IRBuilder(self.function.append_basic_block())
        self._loops = 0

    @property
    def arguments(self) -> Any:
        """The function's arguments."""
        return self.function.args

    @contextmanager
    def loop(
        self, start: Any, stop: Any, step: int = 1, carried: Iterable[Any] = (), vectorised: bool = False
    ) -> Iterator[tuple[ir.Value, list[Any]]]:
        """A loop over start, start + step, ... below stop (i64): yields the index and the carried values to replace.

        The body puts each carried value's next value into the list; after the loop the list holds the final ones.
        """
        b, start, stop = self.builder, index(start), index(stop)
        head, body, tail = (self.function.append_basic_block() for _ in range(3))
        initial = list(carried)
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        values: list[Any] = [b.phi(v.type) for v in initial]
        phis = list(values)
        i.add_incoming(start, before)
        for phi, value in zip(phis, initial, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", i, stop), body, tail)
        b.position_at_end(body)
        yield i, values
        i.add_incoming(b.add(i, I64(step), flags=["nsw"]), b.block)
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, b.block)
        back = b.branch(head)
        if vectorised:
            self._loops += 1
            back.set_metadata("llvm.loop", self.module.add_metadata(["vectorised", I32(self._loops)]))
        b.position_at_end(tail)
        values[:] = phis

    def intrinsic(self, name: str, result: ir.Type, arguments: Iterable[ir.Value]) -> ir.Value:
        """A call of an LLVM intrinsic by its full name."""
        arguments = list(arguments)
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.builder.call(found, arguments)

    def at(self, base: ir.Value, offset: Any, kind: ir.Type) -> ir.Value:
        """The address of element `offset` of an array of `kind`."""
        return self.builder.gep(base, [index(offset)], source_etype=kind, inbounds=True)

    def load(self, base: ir.Value, offset: Any, kind: ir.Type, align: int | None = None) -> ir.Value:
        """Element `offset` of an array."""
        return self.builder.load(self.at(base, offset, kind), typ=kind, align=align)

    def store(self, value: ir.Value, base: ir.Value, offset: Any, align: int | None = None) -> None:
        """Set element `offset` of an array."""
        self.builder.store(value, self.at(base, offset, value.type), align=align)

    def text(self) -> str:
        """The module as LLVM assembly."""
        return str(self.module)


def index(value: Any) -> Any:
    """An i64: numbers become constants."""
    return I64(value) if isinstance(value, int) else value


def entry(name: str, inner: Function, pointers: int) -> str:
    """The module of `inner`(first, end, pointers...) with a function `name` that takes the pointers from a table.

    Two functions, because only arguments can promise LLVM that arrays do not overlap.
    """
    for argument in inner.arguments[2:]:
        argument.add_attribute("noalias")
    inner.function.attributes.add("noinline")
    inner.function.linkage = "internal"
    outer = ir.Function(inner.module, ir.FunctionType(I32, [I64, I64, POINTER]), name)
    b = ir.IRBuilder(outer.append_basic_block())
    table = [b.load(b.gep(outer.args[2], [I64(i)], source_etype=POINTER), typ=POINTER) for i in range(pointers)]
    b.ret(b.call(inner.function, [outer.args[0], outer.args[1], *table]))
    return inner.text()


AT_HWCAP = 16
HWCAP = {"+sha2": 6, "+dotprod": 20}
"""LLVM's names of bits that Linux sets (its arch/arm64/include/uapi/asm/hwcap.h)."""


@cache
def processor() -> tuple[str, str]:
    """(name, features) of the processor that code is made for: this host's, or the one in NUMBA_CPU_NAME."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name = os.environ.get("NUMBA_CPU_NAME", "")
    if name and name != "host":
        return name, os.environ.get("NUMBA_CPU_FEATURES", "")
    return llvm.get_host_cpu_name(), ",".join(filter(None, [llvm.get_host_cpu_features().flatten(), *_untold()]))


def _untold() -> list[str]:
    """What this host has and LLVM does not tell: ARM's dot products, by the kernel's own word (getauxval(3))."""
    if sys.platform != "linux" or platform.machine() != "aarch64":
        return []
    has = ctypes.CDLL(None).getauxval(ctypes.c_ulong(AT_HWCAP))
    return [name for name, bit in HWCAP.items() if has >> bit & 1]


LEVELS = {"x86-64-v3": ("avx2",), "x86-64-v4": ("avx2", "avx512bw")}
"""What kernels ask of the processors that stand for a level of instruction sets."""


@cache
def features() -> frozenset[str]:
    """The instruction sets that code may use, by LLVM's names.

    An explicit processor name promises those of its level, if it is one, and of NUMBA_CPU_FEATURES.
    """
    name, text = processor()
    basic = ("sse2",) if llvm.get_default_triple().startswith("x86_64") else ()
    return frozenset((*basic, *LEVELS.get(name, ()), *(part[1:] for part in text.split(",") if part.startswith("+"))))


@cache
def _compiler() -> llvm.TargetMachine:
    return _machine()


def _machine() -> llvm.TargetMachine:
    """A new one each time: an engine owns what it is given."""
    name, text = processor()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=text, opt=3, jit=True, codemodel="jitdefault")


def compile_object(text: str) -> bytes:
    """Machine code of a module: vectorised, with no contraction, reassociation or fast-math of any kind."""
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    options.loop_interleaving = options.loop_unrolling = True
    builder = llvm.create_pass_builder(_compiler(), options)
    builder.getModulePassManager().run(module, builder)
    made: bytes = _compiler().emit_object(module)
    return made


class Library:
    """Compiled functions by module text. `folder` holds the compiled objects, None keeps them in memory only."""

    def __init__(self, folder: Path | None = None, progress: Progress = quiet) -> None:
        processor()
        self._progress = progress
        self._folder = private(folder) if folder is not None else None
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
        self._entries: dict[str, Address] = {}
        self.compiled = 0

    def add(self, modules: Iterable[tuple[str, str]]) -> list[Address]:
        """The address of each (name, text) in order. A text that was added before costs nothing."""
        wanted = [(name, text, self._key(text)) for name, text in modules]
        fresh = {key: text.replace(f'@"{name}"', f'@"{key}"') for name, text, key in wanted if key not in self._entries}
        for key, text in fresh.items():
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(self._object(key, text)))
        if fresh:
            self._engine.finalize_object()
        for key in fresh:
            self._entries[key] = self._engine.get_function_address(key)
        return [self._entries[key] for _, _, key in wanted]

    def _key(self, text: str) -> str:
        made_from = "\0".join((text, *processor(), llvm.get_default_triple(), str(llvm.llvm_version_info)))
        return hashlib.sha256(made_from.encode()).hexdigest()

    def _object(self, key: str, text: str) -> bytes:
        path = self._folder / f"{key}.o" if self._folder is not None else None
        found = _read(path, key) if path is not None else None
        if found is None:
            found = compile_object(text)
            self.compiled += 1
            self._progress(self.compiled)
            if path is not None:
                _write(path, _digest(key, found) + found)
        return found


def _digest(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + code).digest()


def _read(path: Path, key: str) -> bytes | None:
    """The object in a file, None where there is none or its bytes are not what was written under this key."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[32:] if data[:32] == _digest(key, data[32:]) else None


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except FailureError:
        return  # a full disk costs the next process a compilation, and this one nothing


def private(folder: Path) -> Path | None:
    """The folder, made if need be; None where others could put code into it or nothing can be kept there."""
    folder = folder.expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    theirs = found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if theirs or not os.access(folder, os.W_OK) else folder
