"""Runs on a Ray cluster of four hosts' processes that are killed, stopped, slowed and joined at random: one final root.

Each run trains one small recipe, in replicas or stages, while a seeded schedule sends SIGKILL and SIGSTOP to workers,
raylets and the controller, takes hosts away and brings others, and slows some down. A killed controller is followed by
`trueweight resume`. Every run must end with the root that one process gives. What was done, and when, is told on
stderr; the same seed draws the same schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Goal, Row, main
from runtime.actors.testing import Hosts
from storage.errors import FailureError

HOSTS = 4
KINDS = {
    "kill worker": 4,
    "stop worker": 2,
    "kill raylet": 2,
    "stop raylet": 1,
    "kill controller": 1,
    "host leaves": 1,
    "host joins": 2,
    "slow worker": 2,
}
SHAPES = (
    ("--replicas", "3"),
    ("--replicas", "0"),
    ("--replicas", "2", "--stages", "2"),
    ("--stages", "2"),
    ("--auto",),
)
RECIPE = """
name = "chaos"
seed = 3
[model]
family = "gpt"
layers = 3
width = 64
heads = 2
[data]
corpus = "kjv"
tokeniser = "bytes"
context = 64
[training]
steps = {steps}
batch = 24
micro_batches = 6
segment = 10
[optimiser]
learning_rate = 1e-3
"""
HASTE = 0.2
"""How often a disturbance comes before a step was done since the last: a run that may never come up cannot."""
RUN_SECONDS = 900.0
"""When a run is taken for stuck."""


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)


@dataclass(kw_only=True)
class Run:
    """One run under a schedule drawn from a seed."""

    seed: int
    recipe: Path
    folder: Path
    hosts: Hosts
    began: float = field(default_factory=time.monotonic)
    later: list[tuple[float, Any]] = field(default_factory=list)
    did: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.shape = self.draw.choice(SHAPES)
        self.store = str(self.folder / f"store-{self.seed}")

    def tell(self, what: str) -> None:
        """Note what was done, and when."""
        self.did.append(what)
        print(f"run {self.seed} {time.monotonic() - self.began:6.1f} s: {what}", file=sys.stderr, flush=True)

    def controller(self) -> subprocess.Popen[bytes]:
        """`trueweight run`, or `resume` where the run has begun."""
        verb = ["run", str(self.recipe)]
        if self._begun():
            verb = ["resume", "chaos"]
        command = [sys.executable, "-m", "trueweight", *verb, "--address", self.hosts.address, "--json"]
        command += ["--store", self.store, "--keys", str(self.folder / "keys"), *self.shape]
        log = (self.folder / f"log-{self.seed}").open("ab")
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)

    def _begun(self) -> bool:
        done = subprocess.run(
            [sys.executable, "-m", "trueweight", "runs", "--json", "--store", self.store],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode == 0 and bool(json.loads(done.stdout)["runs"])

    def go(self) -> str:
        """The final root."""
        self.tell(f"starts {' '.join(self.shape)} on {1 + len(self.hosts.nodes)} hosts")
        process = self.controller()
        due, hasty, done = time.monotonic() + self.draw.uniform(8, 14), False, 0
        while True:
            now = time.monotonic()
            if now - self.began > RUN_SECONDS:
                process.kill()
                raise FailureError(f"run {self.seed} is stuck after {RUN_SECONDS:.0f} s; its log: {self._log()}")
            if (code := process.poll()) is not None:
                if code == 0:
                    assert process.stdout
                    for _, act in self.later:
                        act()
                    return str(json.loads(process.stdout.read())["state"])
                if code != -signal.SIGKILL:
                    raise FailureError(f"run {self.seed} left with {code}; its log: {self._log()}")
                process = self.controller()
            for moment in [moment for moment in self.later if moment[0] <= now]:
                self.later.remove(moment)
                moment[1]()
            if now >= due and (hasty or self.steps() > done):
                done, hasty = self.steps(), self.draw.random() < HASTE
                self.disturb(process)
                due = now + self.draw.uniform(1.5, 6)
            time.sleep(0.1)

    def steps(self) -> int:
        """How many steps were done so far, again and again included."""
        path = Path(self.store) / "runs" / "chaos" / "events.jsonl"
        return path.read_text().count('"event": "stepped"') if path.exists() else 0

    def disturb(self, controller: subprocess.Popen[bytes]) -> None:
        """One thing that goes wrong, or one more host."""
        kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
        draw, now, hosts = self.draw.random(), time.monotonic(), self.hosts
        workers, nodes = hosts.workers(), hosts.nodes
        worker = workers[int(draw * len(workers))] if workers else None
        at = int(draw * len(nodes))
        if kind == "host joins" or (not nodes and ("raylet" in kind or "host" in kind)):
            if len(nodes) < HOSTS:
                self.tell("host joins")
                hosts.join()
        elif kind == "kill controller":
            self.tell(kind)
            controller.kill()
        elif "worker" in kind and worker:
            self.tell(f"{kind} {worker.pid}")
            self._hurt(worker, kind, now)
        elif kind == "host leaves":
            self.tell(kind)
            hosts.leave(at)
            self.later.append((now + 4, self._rejoin))
        elif kind == "kill raylet":
            self.tell(f"{kind} {hosts.raylets()[at].pid}")
            hosts.raylets()[at].kill()
            hosts.forget(at)
            self.later.append((now + 4, self._rejoin))
        elif kind == "stop raylet":
            raylet = hosts.raylets()[at]
            self.tell(f"{kind} {raylet.pid}")
            _signal(raylet, signal.SIGSTOP)
            self.later.append((now + 3 + 5 * draw, lambda: _signal(raylet, signal.SIGCONT)))

    def _hurt(self, worker: psutil.Process, kind: str, now: float) -> None:
        if kind == "kill worker":
            _signal(worker, signal.SIGKILL)
        elif kind == "stop worker":
            _signal(worker, signal.SIGSTOP)
            self.later.append((now + 12, lambda: _signal(worker, signal.SIGCONT)))
        else:  # a third of its time for six seconds
            for third in range(10):
                self.later.append((now + 0.6 * third, lambda: _signal(worker, signal.SIGSTOP)))
                self.later.append((now + 0.6 * third + 0.4, lambda: _signal(worker, signal.SIGCONT)))

    def _rejoin(self) -> None:
        # A raylet that was stopped too long ends itself: its host is gone as well.
        for at, raylet in reversed(list(enumerate(self.hosts.nodes))):
            if raylet.all_processes["raylet"][0].process.poll() is not None:
                self.hosts.forget(at)
        while len(self.hosts.nodes) < HOSTS - 1:
            self.tell("host joins")
            self.hosts.join()

    def _log(self) -> str:
        return (self.folder / f"log-{self.seed}").read_text()[-1500:]

    def repeated(self) -> tuple[int, int]:
        """(steps done more than once though no stage was lost and no controller killed, those for these reasons)."""
        path = Path(self.store) / "runs" / "chaos" / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()]
        seen: set[int] = set()
        back = lost = 0
        allowed = False
        for event in events:
            if event["event"] == "ready":
                allowed = True
            if event["event"] == "stepped":
                step = event["record"]["step"]
                if step in seen:
                    back, lost = back + allowed, lost + (not allowed)
                seen.add(step)
        return lost, back


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """One row a run: whether its root is the one root; then the sums."""
    with tempfile.TemporaryDirectory(prefix="trueweight-chaos-") as name:
        folder = Path(name)
        recipe = folder / "chaos.toml"
        recipe.write_text(RECIPE.format(steps=arguments.steps))
        expected = _alone(recipe, folder)
        equal = lost = back = done = 0
        for seed in range(arguments.seed, arguments.seed + arguments.runs):
            hosts = Hosts.start(HOSTS)
            try:
                run = Run(seed=seed, recipe=recipe, folder=folder, hosts=hosts)
                began = time.monotonic()
                root = run.go()
                seconds = time.monotonic() - began
                run.tell(f"ends with {root[:16]}: {'the one root' if root == expected else 'ANOTHER ROOT'}")
            finally:
                hosts.stop()
            equal, done = equal + (root == expected), done + len(run.did) - 2
            more = run.repeated()
            lost, back = lost + more[0], back + more[1]
            yield Row(name=f"run {seed}: {len(run.did) - 2} disturbances", value=seconds, unit="s")
        yield Row(name="disturbances", value=done, unit="")
        yield Row(
            name="runs with the one root", value=equal, unit="runs", goal=Goal(relation="==", limit=arguments.runs)
        )
        yield Row(name="steps lost while a replica lived", value=lost, unit="steps", goal=Goal(relation="==", limit=0))
        yield Row(name="steps repeated from a checkpoint", value=back, unit="steps")


def _alone(recipe: Path, folder: Path) -> str:
    """The root that one process gives."""
    done = subprocess.run(
        [sys.executable, "-m", "trueweight", "run", str(recipe), "--local", "--json", "--store", str(folder / "alone"),
         "--keys", str(folder / "keys")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise FailureError(f"the undisturbed run failed: {done.stderr[-800:]}")
    return str(json.loads(done.stdout)["state"])


def add_options(parser: argparse.ArgumentParser) -> None:
    """How many runs, from which seed on, of how many steps."""
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    raise SystemExit(main(measure, __doc__, add_options=add_options))
