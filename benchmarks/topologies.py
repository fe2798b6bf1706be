"""One recipe over topologies, thread counts and instruction sets: how many final roots there are, and the times.

Each case is a whole `trueweight run` in a process of its own, on a new store. All must end with the same state root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import Goal, Row, main
from benchmarks.local import RECIPES
from storage.errors import FailureError


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments and environment that no bit may depend on."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


LOCAL = ("--local", "--threads", "1")
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
PLAIN = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"}
CASES = (
    Case(name="in-process, 1 thread", arguments=LOCAL),
    Case(name="in-process, 2 threads", arguments=("--local", "--threads", "2")),
    Case(name="in-process, 2 stages x 2 replicas", arguments=(*LOCAL, "--stages", "2", "--replicas", "2")),
    Case(name="in-process, AVX2", arguments=LOCAL, environment=AVX2),
    Case(name="in-process, SSE4.1", arguments=LOCAL, environment=PLAIN),
    Case(name="Ray, 1 x 1", arguments=()),
    Case(name="Ray, 2 replicas", arguments=("--replicas", "2")),
    Case(name="Ray, 2 replicas, shares 3:1", arguments=("--replicas", "2", "--shares", "3,1")),
    Case(name="Ray, 2 stages", arguments=("--stages", "2")),
    Case(name="Ray, 2 stages x 2 replicas", arguments=("--stages", "2", "--replicas", "2")),
)


def run_case(case: Case, recipe: Path) -> tuple[str, float]:
    """The final state root and the seconds of the whole command; FailureError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trueweight", "run", str(recipe), "--json", "--store", f"{folder}/store"]
        started = time.monotonic()
        command += case.arguments
        environment = {**os.environ, **case.environment}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        seconds = time.monotonic() - started
    if done.returncode:
        raise FailureError(f"{case.name}: exit code {done.returncode}: {done.stderr.strip()[-400:]}; run it by hand")
    return json.loads(done.stdout)["state"], seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--recipe", type=Path, default=RECIPES / "quickstart.toml", help="the recipe to train")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds of each case, then the number of distinct roots."""
    roots = set()
    for case in CASES:
        root, seconds = run_case(case, arguments.recipe)
        roots.add(root)
        print(f"{case.name}: {root[:16]} in {seconds:.0f} s", file=sys.stderr, flush=True)
        yield Row(name=case.name, value=seconds, unit="s")
    yield Row(name="distinct final roots", value=len(roots), unit="", goal=Goal(relation="==", limit=1))


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
