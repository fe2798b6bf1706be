"""Faults put into tiny runs: how many are found by a full audit and located exactly, and how many honest runs accused.

Faults are drawn at random: kind, step, worker, place, operator, element, bit. One that makes the run stop (a NaN that
the arithmetic refuses) or changes no fact of the run leaves nothing to find; it is counted, and another one is drawn.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from itertools import count
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import numpy as np

from benchmarks.harness import Goal, Row, main
from runtime.executors import BY_NAME
from runtime.faults import KINDS, Fault, faulty_builder, random_fault
from runtime.groups import LocalGroup
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.testing import local_group, plan_for, tiny_job, train
from runtime.worker import worker_builder
from storage.errors import TrueweightError
from storage.records import StepRecord, facts_free
from storage.store import Store, memory_store
from trueweight.investigation import investigate
from verification.audit import Diverged, Match, audit
from verification.evidence import check_evidence, make_evidence
from verification.pinpoint import HARDWARE, RECORD, SOFTWARE, Finding
from verification.replay import Replay

T = TypeVar("T")
CRASHED, MASKED, EXACT = "crashed", "masked", "exact"


class Result(NamedTuple):
    """What became of one fault; `outcome` is `exact`, `crashed`, `masked`, or what was said instead."""

    fault: Fault
    outcome: str
    evidence: str
    """What checking the evidence proved: `element`, `chain` without a recomputation, `none` without evidence."""
    seconds: float
    """Of the pinpoint, after the audit."""


def exact(fault: Fault, finding: Finding, plan: Plan, program: TrainingProgram) -> str:
    """`exact`, or how the finding differs from where the fault was put."""
    element, last = finding.element, finding.path[-1].at
    call = next((level.at for level in finding.path if level.level == "call"), "")
    start = f"step {fault.step}/micro-batch {fault.micro_batch}/"
    first = plan.stages[plan.place(fault.worker)[0]][0]
    mine = min(plan.taken(fault.worker))
    names = program.kind_of(first).forward.inputs
    places = {
        "batch": call == f"{start}block 0/forward, input x",
        "skip": call.startswith(start) and element is None,
        "reuse": call == f"step {fault.step}/gradient",
        "copy": call == f"step {fault.step}/gradient",
        "rate": call.startswith(f"step {fault.step}/update/") and element is not None,
        "stale": call in {f"step {fault.step}/micro-batch {mine}/block {first}/forward, input {n}" for n, _ in names},
        "receipt": last.endswith(f"/step {fault.step}/receipt of {fault.worker}"),
        "transient": f"step {fault.step}, " in finding.path[1].at if len(finding.path) > 1 else False,
    }
    cause = {"receipt": RECORD, "transient": HARDWARE}.get(fault.kind, SOFTWARE)
    if (finding.worker, finding.cause) != (fault.worker, cause):
        return f"{finding.cause} of {finding.worker}: {finding.reason} {last}"
    if fault.kind in places:
        return EXACT if places[fault.kind] else f"at {call or last}"
    assert element is not None, finding
    flat = int(np.ravel_multi_index(element.index, element.shape)) if element.shape else 0
    right = call == fault.where and element.number == fault.operator
    if not right or flat != fault.element % max(int(np.prod(element.shape)), 1):
        return f"at {call}, operator {element.number}, element {flat}"
    return EXACT


def one(fault: Fault, *, plan: Plan, executor: str, keys: str, steps: int) -> Result:
    """A run with a fault, audited from end to end and investigated."""
    store = memory_store()
    job, make = tiny_job(store, steps=steps), BY_NAME[executor]
    try:
        train(store, job, group=LocalGroup(faulty_builder(make, [fault])), plan=plan, keys=keys)
    except TrueweightError:
        return Result(fault, CRASHED, "", 0)
    history = History.open(store, job.name)
    found = full_audit(store, job.name, executor)
    if isinstance(found, Match):
        other = memory_store()
        train(other, tiny_job(other, steps=steps), group=local_group(BY_NAME["reference"]), plan=plan)
        same = facts(history) == facts(History.open(other, job.name))
        return Result(fault, MASKED if same else "missed", "", 0)
    if not isinstance(found, Diverged):
        return Result(fault, f"{found}", "", 0)
    started = time.perf_counter()
    finding, narrowing, traces = investigate(store, history, found, make=make, keys=keys, faults=[fault])
    seconds = time.perf_counter() - started
    evidence = "none"
    if narrowing is not None and "receipt" in narrowing.answers:
        shown = check_evidence(make_evidence(finding, narrowing, traces.state if traces else None))
        evidence = "element" if shown.proven else "chain"
    return Result(fault, exact(fault, finding, plan, job.program), evidence, seconds)


def facts(history: History) -> list[StepRecord]:
    """What an audit compares of a run."""
    return [facts_free(step) for step in history.steps()]


def full_audit(store: Store, name: str, executor: str) -> object:
    """The verdict of an audit of every segment."""
    make = BY_NAME[executor]

    def replay(history: History) -> Replay:
        return Replay(store, history.run, build=worker_builder(make))

    return audit(store, name, lambda _, total: range(total), replay=replay).verdict


def drawn(seed: int, kinds: Sequence[str], steps: int) -> tuple[str, Result]:
    """(what was drawn, what became of it)."""
    draw, job = random.Random(seed), tiny_job(memory_store(), steps=steps)
    plan = plan_for(job, stages=draw.randint(1, 3), replicas=draw.randint(1, 2))
    kind, executor = draw.choice(kinds), draw.choice(list(BY_NAME))
    if kind == "copy":
        plan = plan_for(job, stages=draw.randint(1, 3), replicas=2)
    fault = random_fault(job.program, plan, first=0, stop=steps, seed=seed, kinds=[kind])
    with tempfile.TemporaryDirectory() as keys:
        result = one(fault, plan=plan, executor=executor, keys=keys, steps=steps)
    return f"{seed} {plan.shape} {executor}: {fault}", result


def honest(seed: int, steps: int) -> bool:
    """Whether an honest run on a random topology and executor matches an audit by a random executor."""
    draw = random.Random(seed)
    store = memory_store()
    job = tiny_job(store, steps=steps)
    plan = plan_for(job, stages=draw.randint(1, 4), replicas=draw.randint(1, 3))
    with tempfile.TemporaryDirectory() as keys:
        train(store, job, group=local_group(BY_NAME[draw.choice(list(BY_NAME))]), plan=plan, keys=keys)
    return isinstance(full_audit(store, job.name, draw.choice(list(BY_NAME))), Match)


def in_order(pool: Executor, jobs: int, act: Callable[[int], T], first: int) -> Iterator[T]:
    """What `act` makes of `first`, `first + 1` and so on, some of which are made ahead."""
    seeds = count(first)
    ahead = deque(pool.submit(act, next(seeds)) for _ in range(2 * jobs))
    try:
        while True:
            ahead.append(pool.submit(act, next(seeds)))
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--faults", type=int, default=20, help="faults that leave something to find")
    parser.add_argument("--honest", type=int, default=20, help="honest runs")
    parser.add_argument("--seed", type=int, default=1, help="of the first fault; the next ones follow")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of faults, such as flip,ulp")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Counts by outcome, evidence, seconds of a pinpoint, and false alarms."""
    results: list[Result] = []
    good: list[bool] = []
    kinds, steps, jobs = arguments.kinds.split(","), arguments.steps, arguments.jobs
    effective: list[Result] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for said, result in in_order(pool, jobs, partial(drawn, kinds=kinds, steps=steps), arguments.seed):
            if len(effective) == arguments.faults:
                break
            results.append(result)
            if result.outcome not in (CRASHED, MASKED):
                effective.append(result)
            print(f"{said}: {result.outcome}, evidence {result.evidence}", file=sys.stderr, flush=True)
        for fine in in_order(pool, jobs, partial(honest, steps=steps), arguments.seed):
            if len(good) == arguments.honest:
                break
            good.append(fine)
            print(f"honest run {len(good)}: {'match' if fine else 'ACCUSED'}", file=sys.stderr, flush=True)
    for kind in kinds:
        found = [result for result in effective if result.fault.kind == kind]
        if found:
            located = sum(result.outcome == EXACT for result in found)
            yield Row(name=f"{kind}: located exactly of {len(found)}", value=located, unit="", goal=_all(len(found)))
    located = sum(result.outcome == EXACT for result in effective)
    yield Row(name="located exactly", value=located / max(len(effective), 1), unit="", goal=_all(1))
    for outcome in (CRASHED, MASKED):
        yield Row(name=f"drawn and {outcome}", value=sum(r.outcome == outcome for r in results), unit="")
    for evidence in ("element", "chain", "none"):
        count = sum(result.evidence == evidence for result in effective)
        yield Row(name=f"evidence checked, {evidence}", value=count, unit="")
    seconds = [result.seconds for result in effective if result.seconds]
    yield Row(name="pinpoint, median", value=statistics.median(seconds) if seconds else float("nan"), unit="s")
    yield Row(name=f"false alarms in {len(good)} honest runs", value=good.count(False), unit="", goal=_all(0))


def _all(count: int) -> Goal:
    return Goal(relation="==", limit=count)


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
