"""How fast a host is at a recipe's own Programs: measured once, kept on disk, thrown away where it no longer holds.

A profile is worth something for one program, executor, thread count, host and version, which are its key. A file that
is damaged or says it is another's is as good as none: the host is measured again.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.costs import Block, Host, Model
from runtime.integers import ExactSum
from runtime.program.executor import Executor
from runtime.program.program import Program
from runtime.program.training import CHUNK, KindSpec, TrainingProgram, chunk_lengths
from runtime.program.types import NUMPY, Type
from runtime.version import VERSION
from storage import merkle
from storage.files import make_folder, write_whole
from storage.foreign import parse_json

FOLDER = "~/.trueweight/profiles"
REPEATS = 5
BANDWIDTH, LATENCY = 125e6, 0.5e-3
"""Of a link that nobody measured: 1 Gbit/s, bytes and seconds."""
RESERVED = 2**29
"""Bytes that a worker's process takes beside arrays: Python, torch, kernels, Ray."""


@dataclass(frozen=True, kw_only=True)
class KindProfile:
    """Seconds of one micro-batch through a block of one kind, on the whole worker.

    `prepare` seconds more for the first one after the weights changed; `handed_bytes` what forward keeps for backward.
    """

    forward: float
    backward: float
    prepare: float
    handed_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostProfile:
    """What was measured on a host, by kind of block.

    `memory` bytes in all; `loss` seconds a micro-batch; `update` seconds per million elements for norm, update and
    hashes; `start` seconds that the first micro-batch takes longer than others, for plans and kernels; `bandwidth`
    bytes/s and `latency` seconds to peers; `gops` 10^9 digit operations a second; `measured` in seconds since 1970.
    """

    host: str
    cores: int
    memory: int
    kinds: tuple[KindProfile, ...]
    loss: float
    update: float
    start: float
    bandwidth: float
    latency: float
    gops: float
    program: str
    executor: str
    threads: int
    version: str
    measured: float

    def unit_seconds(self, kinds: Sequence[int]) -> float:
        """Forward and backward of one micro-batch through blocks of these kinds."""
        return sum(self.kinds[kind].forward + self.kinds[kind].backward for kind in kinds)


# ------------------------------------------------------------------------------------------------------------ measure


def measure(
    program: TrainingProgram,
    make: Callable[[int], Executor],
    *,
    executor: str,
    threads: int,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> HostProfile:
    """This host's profile: every kind of block, the loss and the update on made-up arrays, medians of `repeats`.

    `threads` 0 are all cores. The executor compiles first; that does not count. FailureError where the host lacks the
    memory.
    """
    from runtime.doctor import product_rate

    threads = threads or os.cpu_count() or 1
    made = make(threads)
    timer = _Timer(made, repeats, clock)
    return HostProfile(
        host=platform.node(),
        cores=os.cpu_count() or 1,
        memory=total_memory(),
        kinds=tuple(timer.kind(kind) for kind in program.kinds),
        loss=timer.loss(program.loss),
        update=timer.update(program),
        start=timer.start,
        bandwidth=BANDWIDTH,
        latency=LATENCY,
        gops=product_rate(made),
        program=program.root.hex(),
        executor=executor,
        threads=threads,
        version=VERSION,
        measured=time.time(),
    )


class _Timer:
    """Programs on one executor by the clock."""

    def __init__(self, executor: Executor, repeats: int, clock: Callable[[], float]) -> None:
        self._executor, self._repeats, self._clock = executor, repeats, clock
        self.start = 0.0
        """Seconds that the first time of everything took longer than others."""

    def kind(self, kind: KindSpec) -> KindProfile:
        """One kind of block as `StageWorker` runs it."""
        parameters = len(kind.forward.inputs) - 2  # the others are x and rng
        given = [self._executor.put(made_up(t, name)) for name, t in kind.forward.inputs]
        dy = self._executor.put(made_up(kind.forward.output_types[0], "dy"))
        forward, backward, prepare, handed = [], [], [], 0
        for number in range(self._repeats + 1):
            self._executor.forget()
            first = sum(self._pass(kind, given, dy, parameters)[:2])
            before, after, handed = self._pass(kind, given, dy, parameters)
            self.start += max(0.0, first - before - after) if not number else 0.0
            if number:  # the first compiles
                forward.append(before)
                backward.append(after)
                prepare.append(max(0.0, first - before - after))
        return KindProfile(
            forward=statistics.median(forward),
            backward=statistics.median(backward),
            prepare=statistics.median(prepare),
            handed_bytes=handed,
        )

    def _pass(self, kind: KindSpec, given: Sequence[Any], dy: Any, parameters: int) -> tuple[float, float, int]:
        """(seconds forward, seconds backward, bytes kept between them) of one micro-batch."""
        bounds, types = kind.gradient_bounds, [t for _, t in kind.forward.inputs[:parameters]]
        sums = [] if None in bounds else [np.zeros(t.elements, np.int64) for t in types]
        started = self._clock()
        (y,), saved = self._executor.forward(kind.forward, kind.backward, given, stable=parameters)
        self._executor.get(y)
        between = self._clock()
        handed = _bytes(saved)
        made = self._executor.backward(kind.forward, kind.backward, [*given, dy], saved, sums, stable=parameters)
        arrays = [self._executor.get(one) for one in made]
        if not sums:
            for t, gradient in zip(types, arrays[len(arrays) - parameters :], strict=True):
                ExactSum(np.zeros(t.elements, np.int64), bound=0).add(ExactSum(gradient.reshape(-1)))
        return between - started, self._clock() - between, handed

    def loss(self, program: Program) -> float:
        """Seconds of the loss and its gradient."""
        return self._median(program, [self._executor.put(made_up(t, name)) for name, t in program.inputs])

    def update(self, program: TrainingProgram) -> float:
        """Seconds per million elements of norm, update and hashes, on the longest chunk."""
        sizes = [math.prod(spec.shape) for spec in program.tensors]
        tensor = max(range(len(sizes)), key=lambda t: (min(sizes[t], CHUNK), -t))
        length = next(chunk_lengths(sizes[tensor]))
        total = np.full(length, 2**20, np.int64)
        weights = [np.full(length, 2**-8, np.float32) for _ in range(1 + len(program.slots))]
        hashed: list[np.ndarray] = [total, total, *weights]
        sums = self._executor.put(total)
        (exponent,) = self._executor.run(program.exponent_program(length), [sums])
        (square,) = self._executor.run(program.square_program(length), [sums, exponent])
        state = [self._executor.put(array) for array in weights]
        step = self._executor.put(np.array(1, np.int64))
        spent = self._median(program.exponent_program(length), [sums])
        spent += self._median(program.square_program(length), [sums, exponent])
        spent += self._median(program.update_program(tensor, length), [*state, sums, square, exponent, step])
        spent += self._seconds(lambda: [merkle.bytes_root(array.data) for array in hashed])
        return spent / length * 1e6

    def _median(self, program: Program, inputs: Sequence[Any]) -> float:
        return self._seconds(lambda: [self._executor.get(one) for one in self._executor.run(program, inputs)])

    def _seconds(self, action: Callable[[], object]) -> float:
        spent = []
        for _ in range(self._repeats + 1):
            started = self._clock()
            action()
            spent.append(self._clock() - started)
        usual = statistics.median(spent[1:])
        self.start += max(0.0, spent[0] - usual)
        return usual


def made_up(t: Type, name: str) -> np.ndarray:
    """An array of this type that every Program takes: small normal numbers, zeros for integers, a name's own draw."""
    if t.dtype != "f32":
        return np.zeros(t.shape, NUMPY[t.dtype])
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return (np.random.default_rng(seed).standard_normal(t.shape) * 0.02).astype(np.float32)


def _bytes(saved: Any) -> int:
    """The bytes of arrays by name, 0 for what is kept in another form."""
    return sum(int(getattr(one, "nbytes", 0)) for one in saved.values()) if isinstance(saved, Mapping) else 0


def total_memory() -> int:
    """Bytes of this host's memory, or of what its control group may have."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def fit_link(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(bytes a second, latency in seconds) of (bytes, seconds) that transfers took: a line by least squares.

    ValueError for fewer than two sizes.
    """
    sizes, seconds = np.array(samples, np.float64).reshape(-1, 2).T
    if len(set(sizes.tolist())) < 2:
        raise ValueError("a link: expected transfers of at least two sizes")
    slope, latency = np.polyfit(sizes, seconds, 1)
    return float(1 / max(slope, 1e-12)), float(max(latency, 0.0))


# -------------------------------------------------------------------------------------------------------------- cache


def profile_file(folder: Path, program: TrainingProgram, *, executor: str, threads: int) -> Path:
    """Where this host's profile is kept; `threads` are those that it runs with."""
    host = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node())[:64]
    return folder / f"{host}-{executor}-{threads}-{program.root.hex()[:16]}.json"


def cached(
    program: TrainingProgram,
    make: Callable[[int], Executor],
    *,
    executor: str,
    threads: int,
    folder: Path,
    refresh: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> HostProfile:
    """This host's profile as kept in `folder`; measured and kept where there is none that holds, or with `refresh`."""
    threads = threads or os.cpu_count() or 1
    path = profile_file(folder, program, executor=executor, threads=threads)
    found = None if refresh else load(path, program, executor=executor, threads=threads)
    if found is not None:
        return found
    tell(f"measuring {len(program.kinds)} kinds of block with the {executor} executor and {threads} threads")
    made = measure(program, make, executor=executor, threads=threads)
    save(path, made)
    return made


def save(path: Path, profile: HostProfile) -> None:
    """Keep a profile, with a digest of it; FailureError where the file cannot be written."""
    make_folder(path.parent)
    body = asdict(profile)
    write_whole(path, json.dumps({"profile": body, "sha256": _digest(body)}, indent=2).encode())


def load(path: Path, program: TrainingProgram, *, executor: str, threads: int) -> HostProfile | None:
    """The kept profile of this host for these; None where there is none, or one that is damaged or another's."""
    try:
        profile = _read(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    key = (platform.node(), program.root.hex(), executor, threads, VERSION, os.cpu_count() or 1)
    found = (profile.host, profile.program, profile.executor, profile.threads, profile.version, profile.cores)
    return profile if found == key and len(profile.kinds) == len(program.kinds) else None


def latest(folder: Path) -> HostProfile | None:
    """This host's profile that was measured last, whatever of; None where none is kept."""
    found = []
    with suppress(OSError):
        for path in folder.expanduser().glob("*.json"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                found.append(_read(path))
    mine = [profile for profile in found if (profile.host, profile.version) == (platform.node(), VERSION)]
    return max(mine, key=lambda profile: profile.measured, default=None)


def _read(path: Path) -> HostProfile:
    """The profile in a file; OSError, ValueError, TypeError or KeyError where there is none that is whole."""
    given = parse_json(path.read_bytes())
    if given["sha256"] != _digest(given["profile"]):
        raise ValueError("expected the digest of the profile, got another")
    return _decoded(given["profile"])


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _decoded(body: Mapping[str, Any]) -> HostProfile:
    """The profile in these JSON values; ValueError or TypeError where they are none."""
    kinds = tuple(KindProfile(**kind) for kind in body["kinds"])
    profile = HostProfile(**{**body, "kinds": kinds})
    parts: tuple[HostProfile | KindProfile, ...] = (profile, *kinds)
    for part in parts:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.type is str:
                good = isinstance(value, str)
            elif field.name == "kinds":
                good = True
            else:
                number = isinstance(value, int if field.type is int else int | float) and not isinstance(value, bool)
                good = number and math.isfinite(value) and value >= 0
            if not good:
                raise ValueError(f"a profile with {field.name} = {value!r}")
    return profile


# ---------------------------------------------------------------------------------------------------------------- use


def make_model(program: TrainingProgram, profile: HostProfile) -> Model:
    """The program's costs where speed 1 is this profile's host with its threads."""
    kinds = [block.kind for block in program.blocks]
    parts = [_block(kind, times) for kind, times in zip(program.kinds, profile.kinds, strict=True)]
    return Model(
        blocks=tuple(
            dataclasses.replace(parts[kind], tensors=tuple(dict.fromkeys(block.tensors)))
            for kind, block in zip(kinds, program.blocks, strict=True)
        ),
        elements={spec.name: math.prod(spec.shape) for spec in program.tensors},
        slots=len(program.slots),
        micro_batches=program.micro_batches,
        loss=profile.loss,
        update=profile.update / 1e6,
    )


def _block(kind: KindSpec, times: KindProfile) -> Block:
    *_, (_, x), _ = kind.forward.inputs
    return Block(
        work=times.forward + times.backward,
        prepare=times.prepare,
        input_bytes=_size(x),
        handed_bytes=times.handed_bytes,
        working_bytes=peak_bytes(kind.backward),
    )


def peak_bytes(program: Program) -> int:
    """The most bytes of values that a Program has at one time, one operator after another; fused it takes less."""
    sizes = [_size(t) for t in program.types]
    first = len(program.inputs)
    now = most = 0
    for number, dead in enumerate(program.last_use):
        now += sizes[first + number]
        most = max(most, now)
        now -= sum(sizes[value] for value in dead if value >= first)
    return most


def _size(t: Type) -> int:
    return t.elements * NUMPY[t.dtype].itemsize


def host_of(profile: HostProfile) -> Host:
    """The profile's host for the planner, at speed 1."""
    memory = max(profile.memory - RESERVED, 0)
    return Host(name=profile.host, speed=1.0, memory=memory, bandwidth=profile.bandwidth, latency=profile.latency)
