"""Checkpoints beside PyTorch's distributed ones (DCP), torch.save and safetensors: saves, stalls, loads, bytes.

One state for all: GPT-2's weights with AdamW's moments, float32, on one disk, from one process. A save ends when its
bytes are on the disk (fsync); ours also hashes every leaf, compresses, and decompresses what it compressed. A load
finds its files in the page cache, a cold one on the disk, and ends when every page of its result has been touched;
ours hashes every byte again. DCP and ours load into memory that is there already, safetensors maps its file, torch
makes its own. Sides take turns, in another order each round; values are medians over the rounds, ratios medians of the
rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.harness import Goal, Row, main
from storage.checkpoints import load_state, open_checkpoint
from storage.errors import FailureError, UsageError
from storage.saves import Saver
from storage.saving import save_state
from storage.store import memory_store, open_store

Array = NDArray[np.float32]
State = Mapping[str, Array]
Result = TypeVar("Result")

BUILD = Path(__file__).parents[1] / "build"
DISK = "disk alone"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The dimensions of a GPT-2."""

    layers: int
    width: int
    vocabulary: int
    context: int


SCALES = {
    "small": Scale(layers=2, width=256, vocabulary=8192, context=256),
    "full": Scale(layers=12, width=768, vocabulary=50257, context=1024),
}


# ------------------------------------------------------------------------------------------------------- the state


def shapes_of(scale: Scale) -> dict[str, tuple[int, ...]]:
    """The parameters of a GPT-2 under the names of its published checkpoints; linear layers are input by output."""
    width = scale.width
    norm = {"weight": (width,), "bias": (width,)}
    linear = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (scale.vocabulary, width),
        "wpe.weight": (scale.context, width),
    }
    for layer in range(scale.layers):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.{part}": shape for part, shape in norm.items()}
        for name, shape in linear.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
    return shapes | {f"ln_f.{part}": shape for part, shape in norm.items()}


def make_state(scale: Scale, seed: int = 1) -> dict[str, Array]:
    """Weights from N(0, 0.02), first moments Gaussian times lognormal, second moments squares of Gaussians."""
    random = np.random.default_rng(seed)
    state: dict[str, Array] = {}
    for name, shape in shapes_of(scale).items():
        weight, m, v, spread = (random.standard_normal(shape, np.float32) for _ in range(4))
        weight *= np.float32(0.02)
        m *= np.exp(spread, out=spread) * np.float32(1e-5)
        v *= np.float32(1e-4)
        state |= {f"weight/{name}": weight, f"m/{name}": m, f"v/{name}": np.square(v, out=v)}
    return state


def nudge(arrays: Iterator[Array]) -> None:
    """Changes nearly every element, and nothing about how well the bytes compress."""
    for array in arrays:
        array *= np.float32(1 + 2**-10)


def check(side: str, loaded: Mapping[str, NDArray[np.generic]], state: State) -> None:
    """FailureError unless the arrays are the state's, byte for byte."""
    for name in loaded.keys() | state.keys():
        if name not in loaded or name not in state or loaded[name].shape != state[name].shape:
            raise FailureError(f"{side}: expected the state's tensors, got a difference in {name}; report it")
        if not np.array_equal(loaded[name].view(np.uint32), state[name].view(np.uint32)):
            raise FailureError(f"{side}: expected the saved bytes of {name}, got others; report it")


# ------------------------------------------------------------------------------------------------------- the sides


class Side(ABC):
    """One way to store a state in a folder that is not there yet, durably."""

    name: str

    @abstractmethod
    def save(self, folder: Path, state: State) -> None:
        """Stores the state."""

    @abstractmethod
    def load(self, folder: Path) -> dict[str, Array]:
        """The state that was stored last."""


class Ours(Side):
    """A local store. `room` is the state that it loads into."""

    def __init__(self, name: str, room: State, *, compress: bool) -> None:
        self.name, self._room, self._compress = name, room, compress
        self.root: bytes | None = None

    def save(self, folder: Path, state: State) -> None:
        """See Side."""
        self.root = None
        self.save_again(folder, state)

    def save_again(self, folder: Path, state: State) -> None:
        """Stores the state on top of the one that was stored last."""
        store = open_store(str(folder), create=True)
        with store.writing("benchmark"):
            self.root = save_state(store, state, base=self.root, compress=self._compress)

    def load(self, folder: Path) -> dict[str, Array]:
        """See Side."""
        return load_state(open_store(str(folder), create=False), self._last, room=self._room)

    def load_one(self, folder: Path, name: str) -> dict[str, Array]:
        """One tensor of the state that was stored last."""
        return open_checkpoint(open_store(str(folder), create=False), self._last).load(
            lambda found: found == name, self._room
        )

    @property
    def _last(self) -> bytes:
        if self.root is None:
            raise ValueError(f"{self.name}: expected a saved state, got none")
        return self.root


class Distributed(Side):
    """DCP as a single process uses it. `room` is the state dict that it loads into."""

    def __init__(self, name: str, room: State, *, threads: int) -> None:
        self.name, self._room, self._threads = name, room, threads

    def save(self, folder: Path, state: State) -> None:
        """See Side."""
        with quiet():
            save(tensors(state), storage_writer=FileSystemWriter(folder, thread_count=self._threads), no_dist=True)

    def load(self, folder: Path) -> dict[str, Array]:
        """See Side."""
        return self._load(folder, self._room)

    def load_one(self, folder: Path, name: str) -> dict[str, Array]:
        """One tensor."""
        return self._load(folder, {name: self._room[name]})

    def _load(self, folder: Path, room: State) -> dict[str, Array]:
        with quiet():
            load(tensors(room), storage_reader=FileSystemReader(folder), no_dist=True)
        return dict(room)


class OneFile(Side):
    """A single file, synced."""

    def __init__(
        self, name: str, write: Callable[[Path, State], object], read: Callable[[Path], Mapping[str, torch.Tensor]]
    ) -> None:
        self.name, self._write, self._read = name, write, read

    def save(self, folder: Path, state: State) -> None:
        """See Side."""
        folder.mkdir()
        self._write(folder / "state", state)
        sync(folder / "state")

    def load(self, folder: Path) -> dict[str, Array]:
        """See Side."""
        return {name: tensor.numpy() for name, tensor in self._read(folder / "state").items()}


def torch_save() -> OneFile:
    """torch's own file."""
    return OneFile(
        "torch.save",
        lambda path, state: torch.save(tensors(state), path),
        lambda path: torch.load(path, weights_only=True, mmap=False),
    )


def safetensors_file() -> OneFile:
    """A safetensors file; loading maps it into memory, and copies nothing."""
    return OneFile(
        "safetensors",
        lambda path, state: safetensors.torch.save_file(tensors(state), path),
        safetensors.torch.load_file,
    )


class Disk:
    """No format: the same bytes in files of 32 MiB, each written from where it lies and synced."""

    name = DISK

    def save(self, folder: Path, state: State) -> None:
        """Stores the bytes."""
        folder.mkdir()
        for number, array in enumerate(state.values()):
            octets = array.reshape(-1).view(np.uint8).data
            for at in range(0, len(octets), 32 << 20):
                path = folder / f"{number}-{at}"
                path.write_bytes(octets[at : at + (32 << 20)])
                sync(path)


def tensors(state: State) -> dict[str, torch.Tensor]:
    """The state as torch sees it, in the same memory."""
    return {name: torch.from_numpy(array) for name, array in state.items()}


def sync(path: Path) -> None:
    """The file is on the disk."""
    file = os.open(path, os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what DCP says about having no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


# ------------------------------------------------------------------------------------------------------- measuring


class Times:
    """Seconds by what was done and by whom, one a round."""

    def __init__(self) -> None:
        self._wall: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._processor: dict[tuple[str, str], list[float]] = defaultdict(list)

    def take(self, what: str, who: str, action: Callable[[], Result]) -> Result:
        """The action's result. Nobody's bytes but its own are on their way to the disk meanwhile."""
        os.sync()
        processor, wall = time.process_time(), time.perf_counter()
        result = action()
        self._wall[what, who].append(time.perf_counter() - wall)
        self._processor[what, who].append(time.process_time() - processor)
        return result

    def wall(self, what: str, who: str) -> float:
        """The median."""
        return statistics.median(self._wall[what, who])

    def processor(self, what: str, who: str) -> float:
        """The median of what all threads together spent on processors."""
        return statistics.median(self._processor[what, who])

    def ratio(self, one: tuple[str, str], other: tuple[str, str]) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(p / q for p, q in zip(self._wall[one], self._wall[other], strict=True))


class Round:
    """What one round does with each side, and what it found."""

    def __init__(self, folder: Path, state: State, name: str) -> None:
        self.folder, self.state, self.one = folder, state, name
        self.times = Times()
        self.stored: dict[str, list[int]] = defaultdict(list)
        self._saver = Saver(memory_store())

    def visit(self, side: Side | Disk) -> None:
        """Save, load, delete; what only some sides can do in between."""
        nudge(iter(self.state.values()))
        folder = self.folder / "state"
        self.times.take("save", side.name, lambda: side.save(folder, self.state))
        self.stored[side.name].append(size_of(folder))
        if isinstance(side, Side):
            for what, prepare in (("cold load", chill), ("load", warm)):
                prepare(folder)
                loaded = self.times.take(what, side.name, lambda: touched(side.load(folder)))
                check(side.name, loaded, self.state)
                del loaded
        if isinstance(side, Ours | Distributed):
            part = self.times.take("load one", side.name, lambda: touched(side.load_one(folder, self.one)))
            check(side.name, part, {self.one: self.state[self.one]})
        if isinstance(side, Ours):
            self._save_half(side, folder)
        shutil.rmtree(folder)

    def copy(self, what: str) -> None:
        """What training waits for before a save of ours."""
        flat = {name: [array.reshape(-1)] for name, array in self.state.items()}
        shapes = {name: array.shape for name, array in self.state.items()}
        copies = self.times.take(what, "Saver.copy", lambda: self._saver.copy(flat, shapes))
        check("Saver.copy", copies, self.state)

    def close(self) -> None:
        """Ends what this started."""
        self._saver.close()

    def _save_half(self, side: Ours, folder: Path) -> None:
        nudge(array for number, array in enumerate(self.state.values()) if number % 2)
        before = size_of(folder)
        self.times.take("save half", side.name, lambda: side.save_again(folder, self.state))
        self.stored[f"{side.name}, half of the tensors frozen: added"].append(size_of(folder) - before)
        check(side.name, side.load(folder), self.state)


def warm(folder: Path) -> None:
    """The folder's files are in the page cache: ours are written past it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):  # in little memory: a large buffer would leave pages to whoever loads next
                    pass


def chill(folder: Path) -> None:
    """The folder's files are on the disk, and not in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def touched(loaded: dict[str, Array]) -> dict[str, Array]:
    """The arrays, once an element of each page has been read: a mapped file is only then in memory."""
    for array in loaded.values():
        array.reshape(-1)[::1024].sum()
    return loaded


def size_of(folder: Path) -> int:
    """The bytes in the folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=3, help="how often each side saves and loads")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where to write, below a folder of its own")
    parser.add_argument("--scale", default="full", help=f"the model: {' or '.join(SCALES)}")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rates of saving and loading, what training waits for, a tensor alone, and bytes."""
    if arguments.scale not in SCALES:
        raise UsageError(f"--scale {arguments.scale}: expected one of {', '.join(SCALES)}; choose one")
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds}: expected 1 or more; correct it")
    scale = SCALES[arguments.scale]
    state = make_state(scale)
    room = {name: np.full_like(array, np.nan) for name, array in state.items()}
    sides: list[Side | Disk] = [
        Ours("ours", room, compress=True),
        Distributed("DCP", room, threads=1),
        torch_save(),
        safetensors_file(),
        Ours("ours, plain", room, compress=False),
        Distributed("DCP, 2 threads", room, threads=2),
        Disk(),
    ]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="checkpoint-", dir=arguments.folder) as name:
        rounds = Round(Path(name), state, f"weight/h.{(scale.layers - 1) // 2}.mlp.c_fc.weight")
        rounds.copy("first copy")
        for number in range(arguments.rounds):
            first = number % len(sides)
            for side in sides[first:] + sides[:first]:
                rounds.visit(side)
            rounds.copy("copy")
        rounds.close()
    yield from report(rounds, [side.name for side in sides])


def report(rounds: Round, sides: list[str]) -> Iterator[Row]:
    """The rows of all rounds."""
    times, logical = rounds.times, sum(array.nbytes for array in rounds.state.values())
    yield Row(name="state", value=logical / 1e6, unit="MB")
    for side in sides:
        yield Row(name=f"save, {side}", value=logical / 1e9 / times.wall("save", side), unit="GB/s")
    yield ratio(times, "save: time of ours / DCP", ("save", "ours"), ("save", "DCP"), 1)
    for side in sides:
        yield Row(name=f"save, {side}: processor time", value=times.processor("save", side), unit="s")
    yield Row(name="stall, Saver.copy, first call", value=times.wall("first copy", "Saver.copy"), unit="s")
    yield Row(name="stall, Saver.copy, later calls", value=times.wall("copy", "Saver.copy"), unit="s")
    yield Row(name="stall, DCP's save", value=times.wall("save", "DCP"), unit="s")
    yield ratio(times, "stall: time of later Saver.copy / DCP's save", ("copy", "Saver.copy"), ("save", "DCP"), 0.2)
    loading = [side for side in sides if side != DISK]
    for side in loading:
        yield Row(name=f"load, {side}", value=logical / 1e9 / times.wall("load", side), unit="GB/s")
    yield ratio(times, "load: time of ours / DCP", ("load", "ours"), ("load", "DCP"), 1)
    for side in loading:
        yield Row(name=f"cold load, {side}", value=logical / 1e9 / times.wall("cold load", side), unit="GB/s")
    yield ratio(times, "cold load: time of ours / DCP", ("cold load", "ours"), ("cold load", "DCP"), 1)
    for side in loading:
        yield Row(name=f"load, {side}: processor time", value=times.processor("load", side), unit="s")
    for side in ("ours", "DCP"):
        yield Row(name=f"load one tensor, {side}", value=1e3 * times.wall("load one", side), unit="ms")
    yield ratio(times, "load: time of ours, one tensor / all", ("load one", "ours"), ("load", "ours"), 0.05)
    for what, sizes in rounds.stored.items():
        if what != DISK:
            yield Row(name=f"stored, {what}", value=statistics.median(sizes) / 1e6, unit="MB")
    yield Row(name="stored: ours / state", value=statistics.median(rounds.stored["ours"]) / logical, unit="x")
    yield Row(name="save, ours, half of the tensors frozen", value=times.wall("save half", "ours"), unit="s")


def ratio(times: Times, name: str, one: tuple[str, str], other: tuple[str, str], limit: float) -> Row:
    """A ratio of times with its goal."""
    return Row(name=name, value=times.ratio(one, other), unit="x", goal=Goal(relation="<=", limit=limit))


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
