"""What an audit costs: seconds of replay against its share of training's seconds, the bytes it fetches, its memory.

Trains the quickstart in this process, with fewer and shorter segments (`--steps`, `--segment`), and audits it there at
several rates as `trueweight audit --rate P` does: same executor, same threads, one process. Compared are the seconds of
the steps alone on both sides, by the wall and of the processor (the thread that computes); reading and checking the
state are in the wall time of the whole audit, which is told beside them. The first step of a machine takes longer, its
kernels are loaded, so single later steps are compared too. Medians over repeats with other seeds; training is repeated
as often. A segment, a worker's units and a unit of GPT-2 small are audited in processes of their own, for their memory,
and flipped bits are pinpointed so. Units of larger models are foretold by the cost model (`--parts larger`).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
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
from runtime.families import GptConfig
from runtime.faults import Fault, faulty_builder
from runtime.feed import Batch, Feed
from runtime.groups import LocalGroup
from runtime.plan import make_plan
from runtime.profiles import measure as measure_host
from runtime.program.build import build_training_program
from runtime.recipe import Recipe, ScheduleConfig, TrainingConfig, load_recipe
from runtime.segments import History
from runtime.worker import StageWorker, worker_builder
from storage.errors import FailureError, UsageError
from storage.files import make_folder, write_whole
from storage.records import StepRecord
from storage.store import Store, open_store
from trueweight import wiring
from trueweight.auditing import Audited, Auditor, Choice, make_beacon
from trueweight.investigation import FAULTS
from verification.audit import Match
from verification.forecast import measure_rates, unit_forecast
from verification.replay import Material, Replay

RECIPE = RECIPES / "quickstart.toml"
CLOSE = 10
"""Per cent by which a replay may differ from its share of training."""
DIGESTS = 2
"""Per cent of a step that digesting what units take and give may cost."""
UNIT_SECONDS, UNIT_MEGABYTES = 60, 2000
"""What the audit of a unit of GPT-2 small may take."""
GPT2 = {
    "gpt2-small": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
"""Layers, width and heads (Radford et al. 2019, table 2; heads of 64)."""
PINPOINT = {"quickstart": 60, "gpt2-small": 300}
"""Seconds that a pinpoint may take, of the whole command."""


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


def quickstart(arguments: argparse.Namespace, steps: int) -> Recipe:
    """The quickstart of so many steps, in short segments."""
    recipe = load_recipe(RECIPE)
    training = replace(recipe.training, steps=steps, segment=arguments.segment)
    return replace(recipe, training=training, schedule=_warmed(recipe, steps))


def small() -> Recipe:
    """GPT-2 small for two steps of one micro-batch, two sequences of 1,024 tokens, each a segment."""
    recipe = load_recipe(RECIPES / "gpt2-small.toml")
    unvalidated = {"validate_every": 0, "validation_batches": TrainingConfig.validation_batches}
    training = replace(recipe.training, steps=2, segment=1, batch=2, micro_batches=1, **unvalidated)
    return replace(recipe, training=training, schedule=_warmed(recipe, 2))


def _warmed(recipe: Recipe, steps: int) -> ScheduleConfig:
    return replace(recipe.schedule, warmup=min(recipe.schedule.warmup, steps))


def trained(
    folder: Path,
    name: str,
    recipe: Recipe,
    arguments: argparse.Namespace,
    *,
    stages: int = 1,
    replicas: int = 1,
    fault: Fault | None = None,
) -> Clock:
    """The seconds of the steps of a run that is in the store of the folder afterwards, with a fault in it if any."""
    clock = Clock()
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
    blocks, micro_batches, make = len(job.program.blocks), recipe.training.micro_batches, named(arguments.executor)
    build = faulty_builder(make, [fault]) if fault else worker_builder(make, Noting)
    if fault:
        noted = folder / "store" / "runs" / name / FAULTS
        make_folder(noted.parent)
        write_whole(noted, f"{fault}\n".encode())
    Controller(
        store=store,
        job=replace(job, feed=Timed(recipe=recipe, dataset=job.feed.dataset)),
        group=LocalGroup(build),
        plan=make_plan(blocks=blocks, stages=stages, replicas=replicas, micro_batches=micro_batches),
        keys=str(folder / "keys"),
        threads=arguments.threads,
        observe=observe,
    ).run()
    gc.collect()  # a command that runs next needs the memory
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


def said(folder: Path, arguments: argparse.Namespace, *command: str, code: int = 0) -> dict[str, Any]:
    """What a command of `trueweight` says with --json, in a process of its own; FailureError unless it ends so."""
    options = ["--store", str(folder / "store"), "--threads", str(arguments.threads), "--executor", arguments.executor]
    whole = [sys.executable, "-m", "trueweight", *command, *options, "--json"]
    ended = subprocess.run(whole, capture_output=True, text=True, check=False)
    if ended.returncode != code:
        raise FailureError(f"{' '.join(whole)}: expected exit code {code}, got {ended.returncode}: {ended.stderr}")
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def unit_audit(folder: Path, name: str, worker: str, arguments: argparse.Namespace, segment: int = 1) -> dict[str, Any]:
    """What `trueweight audit` says of a worker's units, of a segment where none is named."""
    chosen = ["--unit", f"{segment}:{worker}"] if worker else ["--segments", str(segment)]
    return said(folder, arguments, "audit", name, *chosen)


def pinpointed(folder: Path, name: str, fault: Fault, arguments: argparse.Namespace, segment: int) -> Iterator[Row]:
    """Rows of `trueweight pinpoint`; FailureError unless it finds the fault where it was put."""
    keys = str(folder / "keys")
    told = said(folder, arguments, "pinpoint", name, "--segment", str(segment), "--keys", keys, code=1)
    if (told["worker"], told.get("number")) != (fault.worker, fault.operator):
        raise FailureError(f"{name}: expected {fault}, got {told}")
    goal = Goal(relation="<=", limit=PINPOINT[name])
    yield Row(name=f"{name}: pinpoint of a flipped bit", value=told["seconds"], unit="s", goal=goal)
    yield Row(name=f"{name}: pinpoint, peak memory", value=told["peak_bytes"] / 1e6, unit="MB")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--steps", type=int, default=16, help="steps of the run")
    parser.add_argument("--segment", type=int, default=2, help="steps of a segment")
    parser.add_argument("--rates", default="0.25,0.5,1", help="shares of the segments to audit")
    parser.add_argument("--repeats", type=int, default=3, help="audits at each rate, and runs")
    parser.add_argument("--executor", default=DEFAULT, help="compiled or reference")
    parser.add_argument("--threads", type=int, default=1, help="threads of the one worker")
    parser.add_argument("--parts", default=",".join(PARTS), help="of the measurements")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The parts that were asked for."""
    parts = arguments.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"--parts {part}: expected some of {','.join(PARTS)}; correct it")
    for part in parts:
        with tempfile.TemporaryDirectory() as path:
            yield from PARTS[part](Path(path), arguments)


def units(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of digests in training, then of a segment and a worker's units."""
    recipe = quickstart(arguments, 2 * arguments.segment)
    trained(folder, "warm", recipe, arguments, stages=2, replicas=2)  # compiles
    Noting.seconds = 0.0
    spread = trained(folder, "spread", recipe, arguments, stages=2, replicas=2)
    share = 100 * Noting.seconds / sum(spread.wall)
    goal = Goal(relation="<=", limit=DIGESTS)
    yield Row(name="digests of units, 2 x 2 workers, of a step", value=share, unit="%", goal=goal)
    for worker in ("", "s0r0", "s1r1"):
        told = unit_audit(folder, "spread", worker, arguments)
        label = f"the units of {worker} of 2 x 2 workers" if worker else "a segment"
        yield Row(name=f"{label}: steps replayed", value=told["steps_replayed"], unit="steps")
        yield from _cost(label, told)


def _cost(label: str, told: dict[str, Any], seconds: float = math.inf, megabytes: float = math.inf) -> Iterator[Row]:
    """Rows of what an audit took, with goals where they are finite."""
    for name, value, unit, limit in (
        ("time", told["seconds"], "s", seconds),
        ("peak memory", told["peak_bytes"] / 1e6, "MB", megabytes),
        ("fetched", told["fetched_bytes"] / 1e6, "MB", math.inf),
    ):
        goal = Goal(relation="<=", limit=limit) if math.isfinite(limit) else None
        yield Row(name=f"{label}: {name}", value=value, unit=unit, goal=goal)


def pinpoint_quickstart(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of a flipped bit in the quickstart, in its second segment's last step."""
    step = 2 * arguments.segment - 1
    fault = Fault(
        kind="flip", step=step, worker="s0r0", place="micro-batch 0/block 1/forward", operator=39, element=100, bit=20
    )
    trained(folder, "quickstart", quickstart(arguments, step + 1), arguments, fault=fault)
    yield from pinpointed(folder, "quickstart", fault, arguments, 1)


def gpt2_small(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of one unit of GPT-2 small, after the initial state and after a checkpoint, and of a flipped bit in one."""
    trained(folder, "honest", small(), arguments)
    for segment in (0, 1):
        told = unit_audit(folder, "honest", "s0r0", arguments, segment)
        yield from _cost(f"a unit of gpt2-small, segment {segment}", told, UNIT_SECONDS, UNIT_MEGABYTES)
    fault = Fault(
        kind="flip", step=1, worker="s0r0", place="micro-batch 0/block 5/forward", operator=39, element=5000, bit=20
    )
    trained(folder, "gpt2-small", small(), arguments, fault=fault)
    yield from pinpointed(folder, "gpt2-small", fault, arguments, 1)


def larger(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of one unit of GPT-2's four sizes by the cost model; of the smallest beside the audit itself."""
    recipe = small()
    trained(folder, "honest", recipe, arguments)
    foreseen = said(folder, arguments, "audit", "honest", "--unit", "1:s0r0", "--dry-run")
    told = unit_audit(folder, "honest", "s0r0", arguments)
    ratio = foreseen["seconds"] / told["seconds"]
    yield Row(name="a unit of gpt2-small: forecast / measured", value=ratio, unit="x")
    foreseen = said(folder, arguments, "audit", "honest", "--segments", "1", "--dry-run")
    ratio = foreseen["seconds"] / said(folder, arguments, "audit", "honest", "--segments", "1")["seconds"]
    yield Row(name="a segment of gpt2-small: forecast / measured", value=ratio, unit="x")
    store, make = open_store(str(folder / "store"), create=False), named(arguments.executor)
    dataset = Material.read(store, History.open(store, "honest").run).feed.dataset
    for name, (layers, width, heads) in GPT2.items():
        assert isinstance(recipe.model, GptConfig)
        model = replace(recipe.model, layers=layers, width=width, heads=heads)
        program = build_training_program(replace(recipe, model=model), dataset)
        profile = measure_host(program, make, executor=arguments.executor, threads=arguments.threads, repeats=2)
        found = measure_rates(make(arguments.threads), program, recipe.seed)
        whole = range(len(program.blocks))
        made = unit_forecast(program, profile, found, blocks=whole, micro_batches=1, stored=True)
        elements = sum(math.prod(spec.shape) for spec in program.tensors)
        yield Row(name=f"{name}: weights", value=elements / 1e6, unit="M")
        yield Row(name=f"a unit of {name}: forecast", value=made.seconds, unit="s")
        yield Row(name=f"a unit of {name}: memory, at most", value=made.memory / 1e6, unit="MB")
        yield Row(name=f"a unit of {name}: read, raw", value=made.read / 1e6, unit="MB")


def rates(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows of training and of audits at each rate."""
    steps = arguments.steps
    recipe = quickstart(arguments, steps)
    trained(folder, "warm", recipe, arguments)  # compiles
    runs = [trained(folder, f"run{n}", recipe, arguments) for n in range(arguments.repeats)]
    store = open_store(str(folder / "store"), create=False)
    size = sum(found.size for found in store.objects.list(""))
    yield Row(name=f"training, {steps} steps", value=median(sum(run.wall) for run in runs), unit="s")
    yield Row(name=f"the store of {arguments.repeats + 1} equal runs", value=size / 1e6, unit="MB")
    for rate in map(float, arguments.rates.split(",")):
        choices = [Choice(rate=rate, beacon=make_beacon(None, seed)) for seed in range(arguments.repeats)]
        made = [audited(store, "run0", choice, arguments) for choice in choices]
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


PARTS = {
    "rates": rates,
    "units": units,
    "quickstart": pinpoint_quickstart,
    "gpt2-small": gpt2_small,
    "larger": larger,
}
"""The measurements by name."""


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
