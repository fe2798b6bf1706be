"""Workers that hold a step up: others do their units again, they come back, and the bytes stay. On a virtual clock."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.controller import Changed, Controller, Elastic, Ended, Event, sent
from runtime.costs import Block, Host, Model
from runtime.fleet import VirtualClock
from runtime.groups import Handle, LocalGroup, WorkersLost
from runtime.revision import ByPlanner
from runtime.segments import History
from runtime.testing import plan_for, remembered, tiny_job, train
from runtime.worker import StageWorker, worker_builder
from storage.codec import decode, encode
from storage.errors import FailureError
from storage.records import Receipt, facts_free
from storage.store import Store, memory_store
from verification.compare import judge
from verification.replay import Replay

UNITS = ("forward", "backward", "last")
Slowness = Callable[[str, int, int], float]
"""Seconds of a call beyond the usual one, by worker, step and which of the worker's in that step it is, from 0."""


@dataclass(frozen=True)
class Later:
    """What a call gives, and when."""

    value: Any
    due: float


class TimedGroup(LocalGroup):
    """Workers in this process whose calls of units take a second each and what `slowness` adds, on a virtual clock.

    `ends` has workers that end at a moment. It is its own Membership.
    """

    def __init__(
        self,
        slowness: Slowness,
        ends: Mapping[str, float] | None = None,
        kinds: Mapping[str, type[StageWorker]] | None = None,
    ) -> None:
        super().__init__(worker_builder(remembered))
        self.kinds, self.slowness, self.ends = dict(kinds or {}), slowness, dict(ends or {})
        self.clock = VirtualClock()
        self.free: dict[str, float] = {}
        self.made: Counter[tuple[str, int]] = Counter()
        self.dead: set[str] = set()
        self.forsaken: list[tuple[str, float, float]] = []
        """Who was told to forget a step when, and when it was done with all before."""

    def start(self, configs: Mapping[str, bytes]) -> None:
        for worker, config in configs.items():
            kind = self.kinds.get(worker)
            self._workers[worker] = (worker_builder(remembered, kind) if kind else self._build)(config)

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        self._find_out()
        if worker not in self._workers:
            raise WorkersLost({worker: "it was stopped"})
        known = [arg.due for arg in args if isinstance(arg, Later)]
        begin = max([self.clock.time, self.free.get(worker, 0.0), *known])
        if method == "forsake":
            self.forsaken.append((worker, self.clock.time, self.free.get(worker, 0.0)))
        due = begin
        if method in UNITS:
            due += 1.0 + self.slowness(worker, args[0], self.made[worker, args[0]])
            self.made[worker, args[0]] += 1
        self.free[worker] = due
        value = super().call(worker, method, *map(opened, args), returns=returns)
        return Later(value, due) if returns is None else tuple(Later(one, due) for one in value)

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        self._pass(max([self.clock.time, *(handle.due for handle in handles if isinstance(handle, Later))]))
        return [opened(handle) for handle in handles]

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        first = min((handle.due for handle in handles), default=self.clock.time + timeout)
        self._pass(max(min(first, self.clock.time + timeout), self.clock.time))
        return [(number, None) for number, handle in enumerate(handles) if handle.due <= self.clock.time]

    def _pass(self, until: float) -> None:
        """Let time pass, not beyond what ends."""
        ends = [end for worker, end in self.ends.items() if worker in self._workers and worker not in self.dead]
        self.clock.time = max(self.clock.time, min([until, *ends]))
        self._find_out()
        self.clock.time = until

    def _find_out(self) -> None:
        found = {w for w, end in self.ends.items() if end <= self.clock.time and w in self._workers}
        if found:
            self.dead |= found
            raise WorkersLost(dict.fromkeys(found, "it was made to"))

    def stop(self, workers: Sequence[str] | None = None) -> None:
        super().stop(workers)

    def room(self) -> int:
        return 0

    def leaving(self) -> dict[str, str]:
        return {}


def opened(handle: Any) -> Any:
    return handle.value if isinstance(handle, Later) else handle


@pytest.fixture(scope="module")
def honest() -> tuple[Ended, list[bytes]]:
    """The tiny job on one worker: what every other crew must equal."""
    store = memory_store()
    return train(store, tiny_job(store)), facts(store)


def facts(store: Store) -> list[bytes]:
    return [encode(facts_free(record)) for record in History.open(store, "tiny").steps()]


def trained(
    group: TimedGroup,
    *,
    stages: int = 1,
    replicas: int = 3,
    keys: str = "",
    steps: int = 5,
    reviser: ByPlanner | None = None,
) -> tuple[tuple[Ended, list[bytes]], Store, list[str]]:
    """((how the tiny job ended, its facts), its store, what happened to its workers)."""
    store, told = memory_store(), []
    job = tiny_job(store, steps=steps)

    def observe(event: Event) -> None:
        if isinstance(event, Changed):
            told.append(event.what)

    ended = Controller(
        store=store,
        job=job,
        group=group,
        plan=sent(reviser, reviser.begin()) if reviser else plan_for(job, stages=stages, replicas=replicas),
        elastic=Elastic(membership=group, clock=group.clock, patience=1.0, sit_out=True, reviser=reviser),
        keys=keys,
        observe=observe,
    ).run()
    return (ended, facts(store)), store, told


def once(worker: str, seconds: float, others: float = 0.0) -> Slowness:
    """A worker's first call in step 1 takes so much longer, and what others do again of it so much."""

    def slowness(of: str, step: int, nth: int) -> float:
        if step != 1:
            return 0.0
        return (seconds if nth == 0 else 0.0) if of == worker else (others if nth == 2 else 0.0)

    return slowness


def test_a_straggler_holds_nobody_up_and_comes_back(honest: tuple[Ended, list[bytes]], tmp_path: Path) -> None:
    group = TimedGroup(once("s0r1", 60.0))
    result, store, told = trained(group, keys=str(tmp_path))
    assert result == honest
    assert told[0] == "s0r1 sits out step 1: 3.5 s late with last, others need 1.0 s for all that is left"
    assert group.clock.time < 30
    receipts = [
        decode(Receipt, item)
        for segment in History.open(store, "tiny").segments()
        for item in History.open(store, "tiny").items(segment.receipts_object)
    ]
    for step in range(5):
        mine = [receipt for receipt in receipts if receipt.step == step]
        assert sorted(unit.micro_batch for receipt in mine for unit in receipt.units) == [0, 1, 2, 3]
    assert {len([r for r in receipts if r.step == step]) for step in (0, 1)} == {3, 2}
    history = History.open(store, "tiny")

    def replay(plan: Any) -> Replay:
        return Replay(store, history.run, build=worker_builder(remembered), plan=plan)

    assert all(judge(history, step // 2, step, replay).agrees for step in range(5))


def test_who_is_done_within_the_step_takes_part_in_it_again(honest: tuple[Ended, list[bytes]]) -> None:
    group = TimedGroup(once("s0r1", 6.0, others=2.5))
    result, store, told = trained(group)
    assert result == honest
    assert [what.split(":")[0] for what in told][:2] == ["s0r1 sits out step 1", "joined s0r2"]
    assert History.open(store, "tiny").steps()[1].events == tuple(told[:2])
    (forsaken,) = group.forsaken
    assert forsaken[1] >= forsaken[2]  # with nothing before it that might be added to the sums afterwards


def test_who_comes_back_later_takes_the_state_from_its_peers(honest: tuple[Ended, list[bytes]]) -> None:
    group = TimedGroup(once("s0r1", 7.0))
    result, store, told = trained(group)
    assert result == honest
    assert [what.split(":")[0] for what in told] == ["s0r1 sits out step 1", "joined s0r2"]
    assert any("joined s0r2" in record.events for record in History.open(store, "tiny").steps()[2:])


def test_who_does_not_come_back_is_given_up(honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.stragglers.FIRST_PATIENCE", 8.0)
    group = TimedGroup(once("s0r1", 1e6))
    result, _, told = trained(group)
    assert result == honest
    assert told[1].startswith("s0r1, which sat out step 1, is given up after ")
    assert "s0r1" not in group._workers


def test_who_is_lost_while_it_sits_out_is_not_waited_for(honest: tuple[Ended, list[bytes]]) -> None:
    for victims in (["s0r1"], ["s0r2"], ["s0r1", "s0r2"]):
        group = TimedGroup(once("s0r1", 1e6), dict.fromkeys(victims, 7.75))
        result, _, told = trained(group)
        assert result == honest
        assert told[0].startswith("s0r1 sits out step 1")
        assert sum(what.startswith("lost") for what in told) == len(victims)


class LostAt(TimedGroup):
    """`victims` are lost once `method` has been called in step 1, and found out with the next call or result."""

    def __init__(self, slowness: Slowness, method: str, victims: Sequence[str]) -> None:
        super().__init__(slowness)
        self.method, self.victims = method, victims

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        made = super().call(worker, method, *args, returns=returns)
        if method == self.method and self.made["s0r0", 1] and not self.ends:
            self.ends = dict.fromkeys(self.victims, self.clock.time)
        return made


@pytest.mark.parametrize(
    "method", ["regroup", "gradients", "reduce", "squares", "update", "store", "receipt", "commit"]
)
@pytest.mark.parametrize("victims", [["s0r1"], ["s0r0"], ["s0r2"], ["s0r0", "s0r2"]], ids="+".join)
def test_who_is_lost_in_the_exchange_of_a_step_that_another_sits_out_changes_no_bit(
    honest: tuple[Ended, list[bytes]], method: str, victims: list[str]
) -> None:
    """In steps with one worker left an update must not be in place: it is done again from the state before."""
    replicas = 3 if "s0r2" in victims else 2
    group = LostAt(once("s0r1", 8.0), method, victims)
    if method == "commit" and "s0r0" in victims:  # who sits out does not hold what is the state by then: nobody does
        with pytest.raises(FailureError, match="stage 0: every replica was lost"):
            trained(group, replicas=replicas)
        return
    result, _, told = trained(group, replicas=replicas)
    assert result == honest, told
    assert told[0].startswith("s0r1 sits out step 1")
    assert sum(what.startswith("lost") for what in told) == len(victims)


class LateReduce(TimedGroup):
    """In step 1 a worker is lost in the exchange, and what waited for its sums runs after it was done again without."""

    stale: tuple[Any, ...] = ()

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        if method == "reduce" and args[0] == 1 and worker == "s0r0" and not self.stale:
            self.stale = tuple(map(opened, args))
            self.ends = {"s0r1": self.clock.time}
            return Later(None, self.clock.time)
        if method == "squares" and self.stale and "s0r1" not in self._workers:
            LocalGroup.call(self, "s0r0", "reduce", *self.stale)
        return super().call(worker, method, *args, returns=returns)


def test_sums_of_an_exchange_that_was_begun_in_vain_are_not_looked_at(honest: tuple[Ended, list[bytes]]) -> None:
    group = LateReduce(lambda worker, step, nth: 0.0)
    result, _, told = trained(group, replicas=2)
    assert group.stale
    assert told == ["lost s0r1: it was made to"]
    assert result == honest


def test_who_comes_back_is_given_units_again(honest: tuple[Ended, list[bytes]], tmp_path: Path) -> None:
    group = TimedGroup(once("s0r1", 60.0))
    _, store, told = trained(group, replicas=2, keys=str(tmp_path), steps=40)
    assert [what.split(":")[0] for what in told] == ["s0r1 sits out step 1", "joined s0r1"]
    history = History.open(store, "tiny")
    items = [item for segment in history.segments() for item in history.items(segment.receipts_object)]
    counts = [len(receipt.units) for receipt in (decode(Receipt, item) for item in items) if receipt.worker == "s0r1"]
    assert counts[-1] == 2  # of four


@pytest.mark.parametrize("seconds", [1.0, 3.5])
def test_nobody_sits_out_where_doing_it_again_would_take_as_long(
    honest: tuple[Ended, list[bytes]], seconds: float
) -> None:
    group = TimedGroup(once("s0r1", seconds))
    result, _, told = trained(group, replicas=2)
    assert (result, told) == (honest, [])


def test_a_straggler_alone_in_its_stage_is_waited_for(honest: tuple[Ended, list[bytes]]) -> None:
    group = TimedGroup(once("s1r0", 15.0))
    result, _, told = trained(group, stages=2, replicas=1)
    assert (result, told) == (honest, [])


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 2)], ids=["1x3", "2x2", "3x2"])
def test_whoever_is_slow_or_lost_when_changes_no_bit(honest: tuple[Ended, list[bytes]], shape: tuple[int, int]) -> None:
    (stages, replicas), sat = shape, 0
    for seed in range(6):
        draw = random.Random(f"{shape} {seed}")

        def slowness(worker: str, step: int, nth: int, draw: random.Random = draw) -> float:
            return draw.choice([4.0, 8.0, 15.0]) if draw.random() < 0.2 else draw.random() / 4

        ends = {f"s{draw.randrange(stages)}r{replicas - 1}": draw.uniform(10.0, 60.0)} if seed % 2 else {}
        result, _, told = trained(TimedGroup(slowness, ends), stages=stages, replicas=replicas)
        assert result == honest, told
        sat += sum("sits out" in what for what in told)
    assert sat >= 6


class Hosted(TimedGroup):
    """Workers on hosts of their own: its own Sites, too."""

    def __init__(self, slowness: Slowness, hosts: str) -> None:
        super().__init__(slowness)
        self.there = [Host(name=name, speed=1.0, memory=2**30, bandwidth=1e9, latency=0.0) for name in hosts]
        self.sent: dict[str, str] = {}

    def hosts(self) -> Sequence[Host]:
        return self.there

    def at(self) -> Mapping[str, str]:
        return {worker: self.sent[worker] for worker in self._workers}

    def send(self, workers: Mapping[str, str]) -> None:
        self.sent |= workers


def planner_of(group: Hosted) -> ByPlanner:
    """Follows the planner for the tiny model on the group's hosts."""
    job = tiny_job(memory_store())
    model = Model(
        blocks=tuple(Block(work=0.25, input_bytes=0, tensors=tuple(block.tensors)) for block in job.program.blocks),
        elements={spec.name: int(np.prod(spec.shape)) for spec in job.program.tensors},
        slots=len(job.program.slots),
        micro_batches=job.program.micro_batches,
    )
    return ByPlanner(model=model, sites=group)


@pytest.mark.parametrize("seconds", [8.0, 1e6])
def test_a_planner_does_without_the_host_of_a_straggler_for_a_while(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr("runtime.roster.REST_SECONDS", 6.0)
    store = memory_store()
    group = Hosted(once("s0r1", seconds), "ab")
    (ended, _), _, told = trained(group, steps=9, reviser=planner_of(group))
    assert ended == train(store, tiny_job(store, steps=9))
    assert told[0].startswith("s0r1 sits out step 1: ")
    moved = "moved: blocks 0-3 on a, now 0-3 on a, b, saves 50% of a step"
    assert told[1:] == [moved] * (seconds < 10)


class Odd(StageWorker):
    """In step 1 it says that it made something else."""

    def _note(self, step: int, micro_batch: int, **arrays: np.ndarray | None) -> None:
        if step == 1:
            arrays["y"] = np.zeros(3)
        super()._note(step, micro_batch, **arrays)


@pytest.mark.parametrize(("seconds", "others"), [(6.0, 2.5), (7.0, 0.0)], ids=["within the step", "after it"])
def test_what_was_done_twice_is_compared(
    honest: tuple[Ended, list[bytes]], tmp_path: Path, seconds: float, others: float
) -> None:
    for kind in (StageWorker, Odd):
        group = TimedGroup(once("s0r1", seconds, others), kinds={"s0r1": kind})
        result, store, told = trained(group, keys=str(tmp_path))
        assert result == honest
        found = [what for what in told if "audit the segment" in what]
        assert len(found) == (kind is Odd), told
        if found:
            assert found[0].startswith("s0r1 and s0r")
            assert "made another y of micro-batch " in found[0]
            (step,) = [record.step for record in History.open(store, "tiny").steps() if found[0] in record.events]
            assert (step == 1) == bool(others)
