"""Unequal, slowed and killed workers: throughput against the sum of what they can do alone, recovery, overhead.

One that all but stops for a while in the middle of a step, with the step sat out and waited for.

Last, what the planner predicts of a step on hosts that measured themselves, against what the step takes.

All cases train one recipe, `quickstart`'s bigger sibling, on a Ray cluster of this machine with workers of one thread.
Step times are medians after a warm-up. A worker is slowed by stopping its process two thirds of the time.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Goal, Row, main
from runtime.actors.cluster import Cluster, joined
from runtime.actors.group import RayGroup
from runtime.actors.sites import RaySites
from runtime.actors.testing import Hosts
from runtime.controller import Changed, Controller, Elastic, Event, Job, Stepped
from runtime.executors import named
from runtime.groups import Handle, LocalGroup, WorkerGroup
from runtime.plan import Plan, make_plan
from runtime.planner import make_placement
from runtime.recipe import parse_recipe
from runtime.revision import plan_of
from runtime.worker import worker_builder
from storage.errors import FailureError
from storage.store import Store, open_store
from trueweight.wiring import prepare_job

RECIPE = """
name = "sibling"
seed = 1
[model]
family = "gpt"
layers = 8
width = 256
heads = 4
[data]
corpus = "kjv"
tokeniser = "bytes"
context = 128
[training]
steps = 1000
batch = {batch}
micro_batches = {units}
segment = 1000
[optimiser]
learning_rate = 1e-3
"""
SLOWNESS = 3.0
PERIOD = 0.01
"""Seconds in which a slowed process has its share: a slow machine is slow at everything, and never at a standstill."""
WARM = 3
SPELL_SECONDS, SPELL_SLOWNESS, SPELL_PERIOD = 15.0, 100.0, 0.5
"""How long a straggler is slow, how much, and in which seconds it has its share."""


@dataclass(kw_only=True)
class Timed:
    """What one case's steps took, and what happened."""

    seconds: list[float] = field(default_factory=list)
    told: list[tuple[float, str]] = field(default_factory=list)
    units: list[float] = field(default_factory=list)
    """When units were finished."""

    @property
    def step(self) -> float:
        """The median of the steps after the warm-up."""
        return statistics.median(self.seconds[WARM:])


class Watched(RayGroup):
    """A RayGroup that notes when calls of units are seen to be finished."""

    seen: Timed

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        """See RayGroup."""
        finished = super().wait(handles, timeout)
        self.seen.units += [time.monotonic() for _, error in finished if error is None]
        return finished


@dataclass(kw_only=True)
class Bench:
    """A prepared job, and a cluster to train it on."""

    store: Store
    job: Job
    cpus: float
    steps: int
    kills: int
    number: int = 0

    def plan(self, *, stages: int = 1, replicas: int = 1) -> Plan:
        """A plan for the job."""
        blocks, units = len(self.job.program.blocks), self.job.program.micro_batches
        return make_plan(blocks=blocks, micro_batches=units, stages=stages, replicas=replicas)

    def train(
        self,
        group: WorkerGroup,
        plan: Plan,
        *,
        elastic: Elastic | None = None,
        watch: Callable[[Event], None] = lambda _: None,
        timed: Timed | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> Timed:
        """Train until there are enough steps: `steps` after the warm-up unless `enough` says otherwise."""
        self.number += 1
        timed = timed or Timed()
        last = time.monotonic()

        def observe(event: Event) -> None:
            nonlocal last
            if isinstance(event, Stepped):
                now = time.monotonic()
                timed.seconds.append(now - last)
                last = now
            if isinstance(event, Changed):
                timed.told.append((time.monotonic(), event.what))
            watch(event)

        done = enough or (lambda: len(timed.seconds) >= WARM + self.steps)
        Controller(
            store=self.store,
            job=replace(self.job, name=f"{self.job.name}-{self.number}"),
            group=group,
            plan=plan,
            elastic=elastic,
            observe=observe,
            stop=done,
        ).run()
        return timed

    def group(self, workers: int) -> Watched:
        """A group whose workers have a CPU each as far as there are any."""
        group = Watched(cpus=self.cpus if workers <= self.cpus else workers, executor="compiled")
        group.seen = Timed()
        return group


@contextmanager
def slowed(process: int) -> Iterator[None]:
    """A process that has a third of a processor: by a control group where this user may make one, else by signals."""
    parent = Path("/sys/fs/cgroup/cpu")
    if not os.access(parent / "cgroup.procs", os.W_OK):
        with stopped_in_turns(process):
            yield
        return
    group = parent / f"trueweight-{process}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text(f"{PERIOD * 1e6:.0f}")
        (group / "cpu.cfs_quota_us").write_text(f"{PERIOD * 1e6 / SLOWNESS:.0f}")
        (group / "cgroup.procs").write_text(str(process))
        yield
    finally:
        with suppress(OSError):  # it has ended
            (parent / "cgroup.procs").write_text(str(process))
        group.rmdir()


@contextmanager
def stopped_in_turns(process: int, slowness: float = SLOWNESS, period: float = PERIOD) -> Iterator[None]:
    """A process that runs 1 / `slowness` of each `period` seconds."""
    end = threading.Event()

    def duty() -> None:
        while not end.is_set():
            os.kill(process, signal.SIGSTOP)
            time.sleep(period * (slowness - 1) / slowness)
            os.kill(process, signal.SIGCONT)
            time.sleep(period / slowness)

    thread = threading.Thread(target=duty)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Overhead, unequal workers, a pipeline and recovery on one host; predictions on two of one CPU each."""
    parts = list(PARTS) if arguments.part == "all" else [arguments.part]
    with tempfile.TemporaryDirectory() as path:
        for cluster in (joined, two_hosts):
            chosen = [part for part in parts if (part == "prediction") == (cluster is two_hosts)]
            if chosen:
                with cluster() as found:
                    for part in chosen:
                        yield from PARTS[part](_bench(part, Path(path), found.cpus, arguments))


def _bench(part: str, folder: Path, cpus: float, arguments: argparse.Namespace) -> Bench:
    store = open_store(f"{folder}/store", create=True)
    units = 8 if part == "pipeline" else arguments.units
    recipe = parse_recipe(RECIPE.format(batch=4 * units, units=units), source="sibling")
    job = prepare_job(store, recipe, name=part, folder=folder, tell=_tell)
    return Bench(store=store, job=job, cpus=cpus, steps=arguments.steps, kills=arguments.kills)


@contextmanager
def two_hosts() -> Iterator[Cluster]:
    """A cluster of two raylets of a CPU each."""
    hosts = Hosts.start(2)
    try:
        with joined(hosts.address) as cluster:
            yield cluster
    finally:
        hosts.stop()


def overhead(bench: Bench) -> Iterator[Row]:
    """Two workers of a core against one process, and what Ray and the controller cost each unit."""
    plan = bench.plan()
    alone = bench.train(LocalGroup(worker_builder(named("compiled"))), plan).step
    one = bench.train(group := bench.group(1), plan, elastic=Elastic(membership=group)).step
    two = bench.train(group := bench.group(2), bench.plan(replicas=2), elastic=Elastic(membership=group)).step
    units = bench.job.program.micro_batches
    yield Row(name="one process, a step", value=alone, unit="s")
    yield Row(name="one Ray worker, a step", value=one, unit="s")
    yield Row(name="two Ray workers, a step", value=two, unit="s")
    yield Row(name="controller and Ray, a unit", value=1e3 * (one - alone) / units, unit="ms")
    yield Row(name="two workers against one process", value=alone / two, unit="x", goal=Goal(relation=">=", limit=1.75))


def unequal(bench: Bench) -> Iterator[Row]:
    """One of two workers slowed: against the sum of both alone, and against equal shares."""
    rates = {}
    for name, victims, plan in (
        ("fast alone", 0, bench.plan()),
        ("slow alone", 1, bench.plan()),
        ("both, as they finish", 1, bench.plan(replicas=2)),
        ("both, equal shares", 1, bench.plan(replicas=2)),
    ):
        group = bench.group(len(plan.workers))
        elastic = Elastic(membership=_Still(), fixed="equal" in name)
        rates[name] = 1 / _with_slow(bench, group, plan, elastic, victims).step
        yield Row(name=f"replicas: {name}", value=rates[name], unit="steps/s")
    best = rates["fast alone"] + rates["slow alone"]
    share = rates["both, as they finish"] / best
    yield Row(name="replicas: of the sum alone", value=share, unit="", goal=Goal(relation=">=", limit=0.9))
    yield Row(name="replicas: of the sum alone, equal shares", value=rates["both, equal shares"] / best, unit="")


def _with_slow(bench: Bench, group: Watched, plan: Plan, elastic: Elastic, victims: int) -> Timed:
    """The job trained with the last worker of the plan slowed from its first step on."""
    ending: list[Callable[[], object]] = []

    def watch(event: Event) -> None:
        if isinstance(event, Stepped) and event.record.step == 0 and victims:
            context = slowed(group.processes()[plan.workers[-1]])
            context.__enter__()
            ending.append(lambda: context.__exit__(None, None, None))

    timed = Timed()

    def enough() -> bool:
        done = len(timed.seconds) >= WARM + bench.steps
        if done and ending:
            ending.pop()()
        return done

    return bench.train(group, plan, elastic=elastic, watch=watch, timed=timed, enough=enough)


class _Still:
    """Machines that never change."""

    def room(self) -> int:
        """None."""
        return 0

    def leaving(self) -> dict[str, str]:
        """Nobody."""
        return {}


class Clocked(LocalGroup):
    """Workers in this process, with the seconds of each one's calls by method."""

    def __init__(self) -> None:
        super().__init__(worker_builder(named("compiled")))
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        """See LocalGroup."""
        began = time.monotonic()
        value = super().call(worker, method, *args, returns=returns)
        self.seconds.setdefault((worker, method), []).append(time.monotonic() - began)
        return value


def pipeline(bench: Bench) -> Iterator[Row]:
    """Two stages against (B - 1) max t + sum t + the rest, t being what a unit takes each stage in one process."""
    plan, units = bench.plan(stages=2), bench.job.program.micro_batches
    clocked = Clocked()
    bench.train(clocked, plan)
    medians = {place: statistics.median(seconds) for place, seconds in clocked.seconds.items()}
    each, rest = dict.fromkeys(plan.workers, 0.0), dict.fromkeys(plan.workers, 0.0)
    for (worker, method), seconds in medians.items():
        if method in ("forward", "last", "backward"):
            each[worker] += seconds
        elif method in ("gradients", "reduce", "squares", "update", "store", "commit"):
            rest[worker] += seconds
    bound = (units - 1) * max(each.values()) + sum(each.values()) + max(rest.values())
    step = bench.train(bench.group(2), plan, elastic=Elastic(membership=_Still())).step
    yield Row(name="two stages: a unit in the slower stage", value=max(each.values()), unit="s")
    yield Row(name="two stages: the bubble's bound, a step", value=bound, unit="s")
    yield Row(name="two stages, a step", value=step, unit="s")
    yield Row(name="two stages: of the bound", value=bound / step, unit="", goal=Goal(relation=">=", limit=0.85))


def recovery(bench: Bench) -> Iterator[Row]:
    """From SIGKILL of a replica until it is noticed, to the next finished unit, and until a new worker takes part."""
    group, kills = bench.group(2), bench.kills
    killed: list[float] = []
    timed = Timed()

    def watch(event: Event) -> None:
        joined_again = sum(what.startswith("joined") for _, what in timed.told) == len(killed)
        if isinstance(event, Stepped) and event.record.step >= WARM and joined_again and len(killed) < kills:
            killed.append(time.monotonic())
            os.kill(group.processes()[sorted(group.processes())[-1]], signal.SIGKILL)

    def enough() -> bool:
        return len([what for _, what in timed.told if what.startswith("joined")]) >= kills

    bench.train(
        group, bench.plan(replicas=2), elastic=Elastic(membership=group), watch=watch, timed=timed, enough=enough
    )
    lost = [when for when, what in timed.told if what.startswith("lost")]
    back = [when for when, what in timed.told if what.startswith("joined")]
    units = [min(t for t in group.seen.units if t > moment) - found for moment, found in zip(lost, killed, strict=True)]
    for name, values in (
        ("noticed", [one - other for one, other in zip(lost, killed, strict=True)]),
        ("next finished unit after it was noticed", units),
        ("a new worker takes part", [one - other for one, other in zip(back, killed, strict=True)]),
    ):
        goal = Goal(relation="<", limit=5) if name.startswith("next") else None
        yield Row(name=f"killed replica: {name}, median", value=statistics.median(values), unit="s")
        yield Row(name=f"killed replica: {name}, worst", value=max(values), unit="s", goal=goal)


def straggler(bench: Bench) -> Iterator[Row]:
    """One of two workers all but stops for a while: what that costs, where its units are done by the other or not."""
    done: dict[str, int] = {}
    for name, sit_out in (("sat out", True), ("waited for", False)):
        timed = _with_spell(bench, Elastic(membership=_Still(), sit_out=sit_out))
        done[name] = len(timed.seconds) - WARM - 1
        yield Row(name=f"straggler {name}: longest step", value=max(timed.seconds[WARM:]), unit="s")
        yield Row(name=f"straggler {name}: usual step", value=timed.step, unit="s")
        yield Row(name=f"straggler {name}: steps in {2 * SPELL_SECONDS:g} s", value=done[name], unit="")
        joined_again = sum(what.startswith("joined") for _, what in timed.told)
        yield Row(name=f"straggler {name}: workers that joined again", value=joined_again, unit="")
    yield Row(name="straggler: steps, sat out / waited for", value=done["sat out"] / done["waited for"], unit="x")


def _with_spell(bench: Bench, elastic: Elastic) -> Timed:
    """The job trained on two workers, the second of which is slow for a while after the warm-up."""
    group, plan = bench.group(2), bench.plan(replicas=2)
    began: list[float] = []
    end = threading.Event()

    def spell() -> None:
        with stopped_in_turns(group.processes()[plan.workers[-1]], SPELL_SLOWNESS, SPELL_PERIOD):
            end.wait(SPELL_SECONDS)

    thread = threading.Thread(target=spell)

    def watch(event: Event) -> None:
        if isinstance(event, Stepped) and event.record.step == WARM:
            began.append(time.monotonic())
            thread.start()

    def over() -> bool:
        return bool(began) and time.monotonic() - began[0] > 2 * SPELL_SECONDS

    try:
        return bench.train(group, plan, elastic=elastic, watch=watch, enough=over)
    finally:
        end.set()
        if began:
            thread.join()


def prediction(bench: Bench) -> Iterator[Row]:
    """The planner's step on one and on two hosts that measured themselves and their link, and the step that it is."""
    with tempfile.TemporaryDirectory() as folder:
        for label, count, stages in (("one host", 1, 1), ("two replicas", 2, 1), ("two stages", 2, 2)):
            group, programs = bench.group(count), bench.job.program.encode()
            sites = RaySites(
                group, program=bench.job.program, programs=programs, executor="compiled", folder=folder, tell=_tell
            )
            model = sites.model()
            placement = make_placement(model, sorted(sites.hosts(), key=lambda host: host.name)[:count], stages=stages)
            plan = plan_of(placement)
            teams = enumerate(placement.hosts)
            sites.send({plan.worker(s, r): host for s, team in teams for r, host in enumerate(team)})
            step = bench.train(group, plan, elastic=Elastic(membership=_Still())).step
            yield Row(name=f"{label}: a step as predicted", value=placement.seconds, unit="s")
            yield Row(name=f"{label}: a step", value=step, unit="s")
            yield Row(name=f"{label}: predicted / measured", value=placement.seconds / step, unit="x")


PARTS = {
    "overhead": overhead,
    "unequal": unequal,
    "pipeline": pipeline,
    "recovery": recovery,
    "straggler": straggler,
    "prediction": prediction,
}


def _tell(what: str) -> None:
    print(what, file=sys.stderr)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which part, how many steps a case, how many kills."""
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument(
        "--units", type=int, default=16, help="micro-batches a step, of 4 x 128 tokens; a pipeline's are 8"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kills", type=int, default=6)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
