"""What an audit costs: seconds of replay against its share of training's seconds, the bytes it fetches, its memory.

Trains the quickstart in this process, with fewer and shorter segments (`--steps`, `--segment`), and audits it there at
several rates as `trueweight audit --rate P` does: same executor, same threads, one process. Compared are the seconds of
the steps alone on both sides, by the wall and of the processor (the thread that computes); reading and checking the
state are in the wall time of the whole audit, which is told beside them. The first step of a machine takes longer, its
kernels are loaded, so single later steps are compared too. Medians over repeats with other seeds; training is repeated
as often. A segment and a worker's units are audited in processes of their own, for their memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import Goal, Row, main
from benchmarks.local import RECIPES
from runtime.controller import Controller, Event, Stepped
from runtime.executors import DEFAULT, named
from runtime.feed import Batch, Feed
from runtime.groups import LocalGroup
from runtime.plan import make_plan
from runtime.recipe import load_recipe
from runtime.segments import History
from runtime.worker import StageWorker, worker_builder
from storage.errors import FailureError
from storage.records import StepRecord
from storage.store import Store, open_store
from trueweight import wiring
from trueweight.auditing import Audited, Auditor, Choice, make_beacon
from verification.audit import Match
from verification.replay import Replay

RECIPE = RECIPES / "quickstart.toml"
CLOSE = 10
"""Per cent by which a replay may differ from its share of training."""
DIGESTS = 2
"""Per cent of a step that digesting what units take and give may cost."""


class Clock:
    """Seconds of steps, by the wall and of the thread that computes."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def start(self) -> None:
        """A step begins."""
        self.wall.append(-time.perf_counter())
        self.processor.append(-time.thread_time())

    def stop(self) -> None:
        """It is done."""
        self.wall[-1] += time.perf_counter()
        self.processor[-1] += time.thread_time()


class Noting(StageWorker):
    """A worker that times the digests of what its units take and give."""

    seconds = 0.0

    def _note(self, step: int, micro_batch: int, **arrays: np.ndarray | None) -> None:
        started = time.perf_counter()
        super()._note(step, micro_batch, **arrays)
        Noting.seconds += time.perf_counter() - started


def trained(folder: Path, name: str, arguments: argparse.Namespace, *, steps: int, stages: int, replicas: int) -> Clock:
    """The seconds of the steps of a run that is in the store of the folder afterwards."""
    recipe, clock = load_recipe(RECIPE), Clock()
    training = replace(recipe.training, steps=steps, segment=arguments.segment)
    schedule = replace(recipe.schedule, warmup=min(recipe.schedule.warmup, steps))
    recipe = replace(recipe, training=training, schedule=schedule)
    store = open_store(str(folder / "store"), create=True)

    class Timed(Feed):
        """Its batch is asked for when a step begins."""

        def batch(self, step: int) -> Batch:
            clock.start()
            return super().batch(step)

    def observe(event: Event) -> None:
        if isinstance(event, Stepped):
            clock.stop()

    with store.writing("benchmark"):
        job = wiring.prepare_job(store, recipe, name=name, folder=RECIPE.parent, tell=lambda _: None)
    blocks, micro_batches = len(job.program.blocks), recipe.training.micro_batches
    Controller(
        store=store,
        job=replace(job, feed=Timed(recipe=recipe, dataset=job.feed.dataset)),
        group=LocalGroup(worker_builder(named(arguments.executor), Noting)),
        plan=make_plan(blocks=blocks, stages=stages, replicas=replicas, micro_batches=micro_batches),
        keys=str(folder / "keys"),
        threads=arguments.threads,
        observe=observe,
    ).run()
    return clock


def audited(store: Store, name: str, choice: Choice, arguments: argparse.Namespace) -> tuple[Audited, Clock]:
    """The audit, and the seconds of its steps; FailureError unless it matches."""
    clock = Clock()

    class Timed(Replay):
        """Its steps are timed."""

        def step(self, step: int) -> StepRecord:
            clock.start()
            record = super().step(step)
            clock.stop()
            return record

    make = named(arguments.executor)

    def replay(history: History) -> Replay:
        return Timed(history.store, history.run, threads=arguments.threads, build=worker_builder(make))

    auditor = Auditor(store=store, name=name, replay=replay, executor=partial(make, arguments.threads))
    made = auditor.run(choice)
    if made.verdict != Match():
        raise FailureError(f"an honest run: expected a match, got {made.verdict}; this machine computes wrongly")
    return made, clock


def unit_audit(folder: Path, name: str, worker: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `trueweight audit --unit --json` says in a process of its own."""
    options = ["--store", str(folder / "store"), "--threads", str(arguments.threads), "--executor", arguments.executor]
    command = [sys.executable, "-m", "trueweight", "audit", name, *options, "--json"]
    chosen = ["--unit", f"1:{worker}"] if worker else ["--segments", "1"]
    ended = subprocess.run([*command, *chosen], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise FailureError(f"{' '.join(command)}: expected a match, got {ended.returncode}: {ended.stderr}")
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--steps", type=int, default=16, help="steps of the run")
    parser.add_argument("--segment", type=int, default=2, help="steps of a segment")
    parser.add_argument("--rates", default="0.25,0.5,1", help="shares of the segments to audit")
    parser.add_argument("--repeats", type=int, default=3, help="audits at each rate, and runs")
    parser.add_argument("--executor", default=DEFAULT, help="compiled or reference")
    parser.add_argument("--threads", type=int, default=1, help="threads of the one worker")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Training, audits by rate, then a segment and a worker's units."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        yield from rates(folder, arguments)
        Noting.seconds = 0.0
        spread = trained(folder, "spread", arguments, steps=2 * arguments.segment, stages=2, replicas=2)
        share = 100 * Noting.seconds / sum(spread.wall)
        goal = Goal(relation="<=", limit=DIGESTS)
        yield Row(name="digests of units, 2 x 2 workers, of a step", value=share, unit="%", goal=goal)
        for worker in ("", "s0r0", "s1r1"):
            told = unit_audit(folder, "spread", worker, arguments)
            label = f"the units of {worker} of 2 x 2 workers" if worker else "a segment"
            yield Row(name=f"{label}: steps replayed", value=told["steps_replayed"], unit="steps")
            yield Row(name=f"{label}: time", value=told["seconds"], unit="s")
            yield Row(name=f"{label}: peak memory", value=told["peak_bytes"] / 1e6, unit="MB")
            yield Row(name=f"{label}: fetched", value=told["fetched_bytes"] / 1e6, unit="MB")


def rates(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of training and of audits at each rate."""
    steps = arguments.steps
    runs = [
        trained(folder, f"run{n}", arguments, steps=steps, stages=1, replicas=1) for n in range(arguments.repeats + 1)
    ][1:]  # the first compiles
    store = open_store(str(folder / "store"), create=False)
    size = sum(found.size for found in store.objects.list(""))
    yield Row(name=f"training, {steps} steps", value=median(sum(run.wall) for run in runs), unit="s")
    yield Row(name=f"the store of {arguments.repeats + 1} equal runs", value=size / 1e6, unit="MB")
    for rate in map(float, arguments.rates.split(",")):
        choices = [Choice(rate=rate, beacon=make_beacon(None, seed)) for seed in range(arguments.repeats)]
        made = [audited(store, "run1", choice, arguments) for choice in choices]
        share = made[0][0].replayed / steps
        for label, of in (("", "wall"), (" of the processor", "processor")):
            replays, trainings = ([getattr(clock, of) for clock in clocks] for clocks in ([c for _, c in made], runs))
            ratio = median(map(sum, replays)) / (share * median(map(sum, trainings)))
            single = [median(second for run in runs_ for second in run[1:]) for runs_ in (replays, trainings)]
            yield Row(name=f"rate {rate:g}: replay / ({share:g} x training), s{label}", value=ratio, unit="x")
            goal = Goal(relation="<=", limit=CLOSE)
            yield Row(name=f"rate {rate:g}: apart by, s{label}", value=100 * abs(ratio - 1), unit="%", goal=goal)
            yield Row(name=f"rate {rate:g}: a later step, s{label}", value=single[0] / single[1], unit="x")
        yield Row(name=f"rate {rate:g}: the whole audit", value=median(one.seconds for one, _ in made), unit="s")
        fetched = median(one.fetched or 0 for one, _ in made)
        yield Row(name=f"rate {rate:g}: fetched", value=fetched / 1e6, unit="MB")
        yield Row(name=f"rate {rate:g}: fetched / store", value=100 * fetched / size, unit="%")


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
