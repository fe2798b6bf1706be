"""ARM, emulated: known-answer vectors, and audits of runs that were trained on this processor.

A Debian for ARM's 64-bit processors is put together below `build/arm` with apt-get and pip, and run by qemu, whose
floating point is software of its own. For each of its processors `trueweight doctor` compares every operator with the
committed vectors, and `trueweight audit` replays short runs of three model families that this machine trained, and one
with a fault, which it has to find. Seconds are an emulator's and say nothing about ARM.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.harness import Goal, Row, main
from benchmarks.local import RECIPES
from runtime.program.compiler.products import SDOT
from storage.errors import FailureError, UsageError

ROOT = Path(__file__).parents[1]
QEMU = "qemu-aarch64-static"
TORCH = "2.10.0"
"""The last on PyPI whose build for ARM runs without CUDA's libraries. No bit depends on it."""
LEFT_OUT = {"ray", "setuptools"}
"""What these commands do without."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What qemu calls a processor; what LLVM is told that it is and has, or nothing: then it has to be found out.

    `kernels` says whether digit products and SHA-256 have kernels of ours there.
    """

    name: str
    qemu: str
    llvm: str = ""
    features: str = ""
    kernels: bool = True


PROCESSORS = {
    "v8.0": Processor(name="ARMv8.0, no dot products", qemu="neoverse-n1", llvm="cortex-a72", kernels=False),
    "sdot": Processor(name="Neoverse N1, SDOT", qemu="neoverse-n1"),
    "sve": Processor(name="Neoverse V1, SDOT and SVE", qemu="max", llvm="neoverse-v1", features="+dotprod,+sha2,+sve"),
}
RUNS = ("quickstart", "llama-tiny", "digits-convnet")
SMALLER = {
    "steps": 2,
    "batch": 4,
    "micro_batches": 2,
    "segment": 1,
    "validate_every": 2,
    "validation_batches": 1,
    "warmup": 1,
}
FAULT = "kind=rate,step=1"
"""Of a second run of the first recipe."""


# ------------------------------------------------------------------------------------------------------ the emulator


class Emulator:
    """Python for ARM with what Trueweight needs, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._root, self._site, self._cache = folder / "root", folder / "site", folder / "cache"
        if shutil.which(QEMU) is None or shutil.which("apt-get") is None:
            raise UsageError(f"expected Debian with {QEMU}, got none; `apt-get install qemu-user-static`")
        done = folder / "ready"
        wanted = "\n".join(_installed())
        if not done.exists() or done.read_text() != wanted:
            done.unlink(missing_ok=True)
            for part in (self._root, self._site, folder / "debs"):
                shutil.rmtree(part, ignore_errors=True)
            self._unpack_debian(folder / "debs")
            self._install(wanted.split("\n"))
            done.write_text(wanted)

    def run(self, processor: Processor, *words: str) -> subprocess.CompletedProcess[str]:
        """Python with these arguments on a processor."""
        inside = {
            "PYTHONPATH": f"{self._site}:{ROOT}",
            "LD_LIBRARY_PATH": f"{self._site}/torch/lib",
            "XDG_CACHE_HOME": str(self._cache),
            "NUMBA_CPU_NAME": processor.llvm,
            "NUMBA_CPU_FEATURES": processor.features,
        }
        return self._python(processor.qemu, inside, *words)

    def _python(self, qemu: str, inside: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
        command = [QEMU, "-cpu", qemu, "-L", str(self._root), str(self._root / "usr/bin/python3"), *words]
        here = {name: text for name, text in os.environ.items() if name != "ETH_HASH_BACKEND"}  # as storage set it
        environment = {**here, **inside}
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)

    def _unpack_debian(self, folder: Path) -> None:
        """Python and libraries of this machine's Debian, for ARM; nothing of the system is touched."""
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        (folder / "status").touch()
        options = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "root",
            "Dir::State": str(folder),
            "Dir::State::status": str(folder / "status"),
            "Dir::Cache": str(folder / "cache"),
        }
        apt = ["apt-get", "-qq", *(word for option in options.items() for word in ("-o", "=".join(option)))]
        _call(*apt, "update")
        _call(*apt, "install", "--download-only", "--no-install-recommends", "-y", "python3", "libgomp1", "libstdc++6")
        self._root.mkdir()
        for package in sorted((folder / "cache/archives").glob("*.deb")):
            _call("dpkg-deb", "-x", str(package), str(self._root))

    def _install(self, wanted: Sequence[str]) -> None:
        """This environment's packages for ARM."""
        told = self._python("max", {}, "-c", "import sys; print(*sys.version_info[:2], sep='.')")
        python = told.stdout.strip()
        if not python:
            raise FailureError(
                f"Python for ARM did not start: {told.stderr.strip()[-400:]}; delete {self._root.parent}"
            )
        platforms = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in range(17, 37)]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--upgrade"]
        pip += [*platforms, "--platform=manylinux2014_aarch64", f"--python-version={python}", f"--target={self._site}"]
        _call(*pip, *wanted)


def _installed() -> list[str]:
    """What Trueweight needs on ARM, in the versions of this environment, and torch's for ARM."""
    found: dict[str, str] = {}
    left = [Requirement("trueweight")]
    while left:
        one = left.pop()
        for text in requires(one.name) or ():
            needed = Requirement(text)
            name = canonicalize_name(needed.name)
            asked = any(
                needed.marker is None or needed.marker.evaluate({"platform_machine": "aarch64", "extra": extra})
                for extra in (one.extras or {""})
            )
            if asked and name not in {*found, *LEFT_OUT}:
                found[name] = TORCH if name == "torch" else version(name)
                left.append(needed)
    return [f"{name}=={number}" for name, number in sorted(found.items())]


def _call(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise FailureError(f"{' '.join(command)}: {done.stderr.strip()[-400:]}; run it by hand")


# ---------------------------------------------------------------------------------------------------------- the runs


def train(name: str, folder: Path, *faults: str) -> None:
    """A short run of a recipe, here, into the store `folder`/store."""
    lines = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    keys = {line: line.partition("=")[0].strip() for line in lines}
    text = "\n".join(f"{keys[line]} = {SMALLER[keys[line]]}" if keys[line] in SMALLER else line for line in lines)
    recipe = folder / f"{name}.toml"
    recipe.write_text(("faults = true\n" if faults else "") + text + "\n", encoding="utf-8")
    words = ["run", str(recipe), "--local", "--store", str(folder / "store"), "--keys", str(folder / "keys")]
    words += [word for fault in faults for word in ("--inject", fault, "--name", "faulty")]
    _call(sys.executable, "-m", "trueweight", *words)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "arm", help="where the emulated system is kept")
    parser.add_argument("--prepare", action="store_true", help="put the emulated system together, and no more")
    parser.add_argument("--processors", default=",".join(PROCESSORS), help="which, comma-separated")
    parser.add_argument("--runs", default=",".join(RUNS), help="recipes, comma-separated")


def chosen(text: str, of: Collection[str], option: str) -> list[str]:
    """The names in a list with commas; UsageError where one is none of `of`."""
    names = text.split(",")
    for name in names:
        if name not in of:
            raise UsageError(f"{option}: expected some of {','.join(of)}, got {name!r}; correct it")
    return names


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """By processor: executors that miss a vector, kernels that are not used, audits that end otherwise, seconds."""
    names = chosen(arguments.runs, RUNS, "--runs")
    processors = chosen(arguments.processors, PROCESSORS, "--processors")
    emulator = Emulator(arguments.folder.resolve())
    if arguments.prepare:
        _tell(f"an emulated ARM is ready in {arguments.folder}")
        return
    none = Goal(relation="==", limit=0)
    with TemporaryDirectory() as made:
        folder = Path(made)
        for name in names:
            train(name, folder)
        train(names[0], folder, FAULT)
        for processor in map(PROCESSORS.__getitem__, processors):
            started = time.monotonic()
            examined = examine(emulator, processor)
            missed = 2 - sum(not one["failure"] for one in examined)
            yield Row(name=f"{processor.name}: executors that miss a vector", value=missed, unit="of 2", goal=none)
            used = [examined[0]["path"] == SDOT, hashes(emulator, processor)]
            other = sum(one != processor.kernels for one in used)
            yield Row(name=f"{processor.name}: kernels against expectation", value=other, unit="of 2", goal=none)
            wanted = {**dict.fromkeys(names, (0, "match")), "faulty": (1, "diverged")}
            wrong = sum(verdict(emulator, processor, name, folder) != end for name, end in wanted.items())
            unit = f"of {len(wanted)}"
            yield Row(name=f"{processor.name}: audits with another end", value=wrong, unit=unit, goal=none)
            yield Row(name=f"{processor.name}: all that, emulated", value=time.monotonic() - started, unit="s")


def examine(emulator: Emulator, processor: Processor) -> list[dict[str, str]]:
    """What doctor says of both executors; FailureError where it says nothing."""
    done = emulator.run(processor, "-m", "trueweight", "doctor", "--vectors", "--json")
    if not done.stdout:
        raise FailureError(f"{processor.name}: doctor ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    found: list[dict[str, str]] = json.loads(done.stdout)["executors"]
    for one in found:
        _tell(f"{processor.name}: {one['executor']}, {one['path']}: {one['failure'] or 'exact'}")
    return found


def hashes(emulator: Emulator, processor: Processor) -> bool:
    """Whether SHA-256 has a kernel that hashes as hashlib does."""
    done = emulator.run(processor, "-c", "from storage import kernels; print(kernels._hashing() is not None)")
    _tell(f"{processor.name}: a kernel hashes: {done.stdout.strip() or done.stderr.strip()[-400:]}")
    return done.stdout.strip() == "True"


def verdict(emulator: Emulator, processor: Processor, name: str, folder: Path) -> tuple[int, str]:
    """Exit code and verdict of an audit of all of a run."""
    done = emulator.run(processor, "-m", "trueweight", "audit", name, "--all", "--json", "--store", f"{folder}/store")
    said = json.loads(done.stdout)["verdict"] if done.stdout else done.stderr.strip()[-400:]
    _tell(f"{processor.name}: audit of {name} ends with {done.returncode}: {said}")
    return done.returncode, said


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
