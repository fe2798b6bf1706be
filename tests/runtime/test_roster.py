"""Workers that are lost, come and leave, in this process: whatever happens at whichever call, the bytes stay."""

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

from runtime.clock import WallClock
from runtime.controller import Assembled, Changed, Controller, Elastic, Ended, Event, Stepped, sent
from runtime.costs import Block, Host, Model
from runtime.executors import reference
from runtime.groups import Handle, LocalGroup, ValueLost, WorkerConfig, WorkersLost
from runtime.places import StepFault
from runtime.plan import Plan
from runtime.program.training import CHUNK, BlockSpec
from runtime.revision import ByPlanner, Reviser, Revision, Standing
from runtime.roster import bring
from runtime.segments import History
from runtime.shards import make_layout
from runtime.simulation import Load, program_of
from runtime.testing import local_group, plan_for, remembered, tiny_job, train
from runtime.transition import Crew
from runtime.worker import StageWorker, worker_builder
from storage.codec import decode, encode
from storage.errors import FailureError
from storage.records import Receipt, facts_free
from storage.store import Store, memory_store
from verification.compare import judge
from verification.replay import Replay
from verification.units import audit_unit

FAST = {"patience": 2.0}


class LossyGroup(LocalGroup):
    """Workers in this process, some of which are lost at a call: at once, or found out when their results are due.

    `lose` gives the workers that go with the call of that number, `lose_in` one that goes with the next call of a
    method after that. It is its own Membership.
    """

    def __init__(
        self,
        lose: Mapping[int, Sequence[str]] | None = None,
        *,
        places: int = 4,
        late: bool = False,
        values: Sequence[int] = (),
        kind: type[StageWorker] = StageWorker,
        lose_in: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(worker_builder(remembered, kind))
        self.lose, self.places, self.late, self.values = dict(lose or {}), places, late, set(values)
        self.lose_in = dict(lose_in or {})
        self.calls = 0
        self.dead: dict[str, str] = {}
        self.going: dict[str, str] = {}
        self.gone_values = 0

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        self.calls += 1
        if self.dead and (victim := self.lose_in.pop(method, None)):
            self.dead[victim] = "it was made to"
        for victim in self.lose.pop(self.calls, ()):
            if victim in self._workers:
                self.dead[victim] = "it was made to"
        if not self.late:
            self._find_out()
        if worker in self.dead or any(isinstance(arg, Lost) for arg in args):
            return Unmade() if returns is None else (Unmade(),) * returns
        value = super().call(worker, method, *args, returns=returns)
        if self.calls in self.values and method in ("forward", "last", "backward"):
            self.gone_values += 1
            return Lost() if returns is None else (*value[:-1], Lost())
        return value

    def get(self, handles: Sequence[Handle]) -> list[Any]:
        self._find_out()
        if any(isinstance(handle, Lost) for handle in handles):
            raise ValueLost("a value is gone")
        return super().get(handles)

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        self._find_out()
        return [(n, ValueLost("gone") if isinstance(handle, Unmade) else None) for n, handle in enumerate(handles)]

    def _find_out(self) -> None:
        if found := {worker: why for worker, why in self.dead.items() if worker in self._workers}:
            raise WorkersLost(found)

    def stop(self, workers: Sequence[str] | None = None) -> None:
        super().stop(workers)
        self.dead = {} if workers is None else self.dead

    def room(self) -> int:
        return max(self.places - len(self._workers), 0)

    def leaving(self) -> Mapping[str, str]:
        return {worker: why for worker, why in self.going.items() if worker in self._workers}


class Lost:
    """What is left of a value that went with its host."""


class Unmade(Lost):
    """What comes of a call that could not be made."""


@pytest.fixture(scope="module")
def honest() -> tuple[Ended, list[bytes]]:
    """The tiny job on one worker: what every other crew must equal."""
    store = memory_store()
    ended = train(store, tiny_job(store))
    return ended, facts(store)


def facts(store: Store) -> list[bytes]:
    return [encode(facts_free(record)) for record in History.open(store, "tiny").steps()]


def elastic(
    group: LossyGroup,
    *,
    stages: int = 1,
    replicas: int = 2,
    grow: bool = False,
    keys: str = "",
    between: Any = None,
    fixed: bool = False,
    clock: WallClock | None = None,
) -> tuple[Ended, Store, list[Event]]:
    """The tiny job on workers that may change."""
    store = memory_store()
    job = tiny_job(store)
    seen: list[Event] = []

    def observe(event: Event) -> None:
        seen.append(event)
        if between:
            between(event)

    ended = Controller(
        store=store,
        job=job,
        group=group,
        plan=plan_for(job, stages=stages, replicas=replicas),
        elastic=Elastic(membership=group, grow=grow, fixed=fixed, patience=2.0, clock=clock or WallClock()),
        keys=keys,
        observe=observe,
    ).run()
    return ended, store, seen


def calls_of(**plan: int) -> int:
    """How many calls an undisturbed run makes."""
    group = LossyGroup(places=0)
    elastic(group, **plan)
    return group.calls


SHAPES = ({"stages": 1, "replicas": 3}, {"stages": 2, "replicas": 2}, {"stages": 3, "replicas": 2})


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when due"])
@pytest.mark.parametrize("shape", SHAPES, ids=["1x3", "2x2", "3x2"])
def test_a_worker_lost_at_any_call_changes_no_bit(
    honest: tuple[Ended, list[bytes]], shape: dict[str, int], late: bool
) -> None:
    draw = random.Random(f"{shape} {late}")
    for number in sorted(draw.sample(range(1, calls_of(**shape)), 3)):
        victim = f"s{draw.randrange(shape['stages'])}r{draw.randrange(shape['replicas'])}"
        group = LossyGroup({number: [victim]}, late=late, places=shape["stages"] * shape["replicas"])
        ended, store, seen = elastic(group, **shape)
        assert ended == honest[0], f"{victim} lost at call {number}"
        assert facts(store) == honest[1]
        assert any(isinstance(event, Changed | Assembled) and victim in str(event) for event in seen)


@pytest.mark.parametrize("method", ["regroup", "commit", "store", "receipt"])
def test_another_worker_lost_while_a_loss_is_dealt_with(honest: tuple[Ended, list[bytes]], method: str) -> None:
    group = LossyGroup({60: ["s0r1"]}, lose_in={method: "s0r2"}, places=0)
    ended, store, seen = elastic(group, replicas=3)
    assert (ended, facts(store)) == honest
    assert len([event for event in seen if isinstance(event, Changed)]) == 2


def test_values_that_go_with_a_host_are_made_again(honest: tuple[Ended, list[bytes]]) -> None:
    for seed in range(4):
        numbers = random.Random(seed).sample(range(20, 400), 40)
        group = LossyGroup(values=numbers)
        ended, store, _ = elastic(group, stages=3, replicas=1)
        assert (ended, facts(store)) == honest
        assert group.gone_values > 3


def test_all_replicas_of_a_stage_lost_is_back_to_the_last_checkpoint(honest: tuple[Ended, list[bytes]]) -> None:
    group = LossyGroup({260: ["s1r0", "s1r1"]}, places=4)
    ended, store, seen = elastic(group, stages=2, replicas=2)
    assert (ended, facts(store)) == honest
    steps = [event.record.step for event in seen if isinstance(event, Stepped)]
    assert len(steps) > 5
    assert sorted(set(steps)) == list(range(5))
    told = [event for record in History.open(store, "tiny").steps() for event in record.events]
    assert any(event.startswith("back to the last checkpoint: stage 1") for event in told)


def test_without_room_a_lost_stage_is_an_error_and_the_run_can_go_on(honest: tuple[Ended, list[bytes]]) -> None:
    group = LossyGroup({250: ["s0r0"]}, places=0)
    store = memory_store()
    job = tiny_job(store)
    plan = plan_for(job, stages=2)
    short = Elastic(membership=group, patience=0.1)
    with pytest.raises(FailureError, match="stage 0: every replica was lost"):
        Controller(store=store, job=job, group=group, plan=plan, elastic=short).run()
    assert train(store, job) == honest[0]


def test_lost_workers_are_replaced_and_hosts_that_join_are_used(
    honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.roster.LOOK_SECONDS", 0.0)
    group = LossyGroup({30: ["s0r1"]}, places=3)

    def slowly(event: Event) -> None:
        if isinstance(event, Stepped):
            settle(group)

    ended, store, seen = elastic(group, replicas=2, grow=True, between=slowly)
    assert (ended, facts(store)) == honest
    told = [event.what for event in seen if isinstance(event, Changed)]
    assert told[0] == "lost s0r1: it was made to"
    assert told.count("joined s0r1") == 1
    assert "joined s0r2" in told


class AtOnce(WallClock):
    """What is done beside is done before anything else."""

    def beside(self, act: Callable[[], None]) -> "Future[None]":
        made: Future[None] = Future()
        try:
            act()
        except FailureError as error:
            made.set_exception(error)
        else:
            made.set_result(None)
        return made


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    """Workers are looked for all the time, are there at once, and take one tensor of the state at a time."""
    for name in ("LOOK_SECONDS", "ASK_SECONDS", "REST_SECONDS", "WINDOW_BYTES"):
        monkeypatch.setattr(f"runtime.roster.{name}", 0)
    return AtOnce()


@pytest.mark.parametrize("stages", [1, 2])
def test_who_comes_within_a_step_takes_units_of_it(
    honest: tuple[Ended, list[bytes]], eager: WallClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, stages: int
) -> None:
    monkeypatch.setattr("runtime.roster.WINDOW_BYTES", 2**28)
    group = LossyGroup(places=0)

    def grow(event: Event) -> None:
        if isinstance(event, Stepped) and event.record.step == 1:
            group.places = stages + 1  # asked for before step 2, there when its first units are under way

    ended, store, _ = elastic(
        group, stages=stages, replicas=1, grow=True, keys=str(tmp_path), clock=eager, between=grow
    )
    assert (ended, facts(store)) == honest
    history = History.open(store, "tiny")
    (joined,) = history.steps()[2].events
    assert joined.startswith("joined s")
    receipts = [
        decode_receipt(item) for segment in history.segments() for item in history.items(segment.receipts_object)
    ]
    new = {(receipt.step, receipt.worker): receipt for receipt in receipts}[2, joined.split()[1]]
    assert new.units
    assert new.replicas == 2

    def replay(plan: Plan | None) -> Replay:
        return Replay(store, history.run, build=worker_builder(reference), plan=plan)

    for step in range(5):
        assert judge(history, step // 2, step, replay).agrees


class LateLoss(LossyGroup):
    """Workers are lost when the state after step 2 has been made, and there is room for another from then on."""

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        if method == "receipt" and args[1] == 2 and not self.places:
            self.dead, self.places = dict.fromkeys(("s0r1", "s0r2"), "it was made to"), 2
        return super().call(worker, method, *args, returns=returns)


def test_who_comes_while_a_step_is_gone_through_again_takes_the_state_before_it(
    honest: tuple[Ended, list[bytes]], eager: WallClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.roster.WINDOW_BYTES", 2**28)
    monkeypatch.setattr("runtime.work.DEPTH", 1)
    ended, store, _ = elastic(LateLoss(places=0, late=True), replicas=3, clock=eager)
    assert (ended, facts(store)) == honest
    events = History.open(store, "tiny").steps()[2].events
    assert events == ("lost s0r1: it was made to", "lost s0r2: it was made to", "joined s0r1")


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when due"])
@pytest.mark.parametrize("shape", SHAPES, ids=["1x3", "2x2", "3x2"])
def test_losses_and_joins_at_any_call_change_no_bit(
    honest: tuple[Ended, list[bytes]], eager: WallClock, shape: dict[str, int], late: bool
) -> None:
    draw = random.Random(f"{shape} {late} and joins")
    lose: dict[int, list[str]] = {}
    for serial in range(4):  # also some of those that came for others, before they take part or after
        place = f"s{draw.randrange(shape['stages'])}r{draw.randrange(shape['replicas'])}"
        lose.setdefault(draw.randrange(1, calls_of(**shape)), []).append(f"{place}.{serial}" if serial else place)
    group = LossyGroup(lose, late=late, places=shape["stages"] * shape["replicas"] + 1)
    ended, store, seen = elastic(group, **shape, grow=True, clock=eager)
    assert (ended, facts(store)) == honest, lose
    assert any(isinstance(event, Changed) and event.what.startswith("joined") for event in seen)


class Stillborn(LossyGroup):
    """The first worker that is asked for dies while it is started."""

    def start(self, configs: Mapping[str, bytes]) -> None:
        if "s0r1.1" in configs:
            raise WorkersLost({"s0r1.1": "it died at once"})
        super().start(configs)


def test_a_worker_that_dies_while_it_is_started_takes_no_other_with_it(
    honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.roster.LOOK_SECONDS", 0.0)
    group = Stillborn(places=3)
    ended, store, seen = elastic(group, replicas=1, grow=True, between=lambda _: settle(group))
    assert (ended, facts(store)) == honest
    told = [event.what for event in seen if isinstance(event, Changed)]
    assert told[0].startswith("a worker for stage 0 did not come up: worker s0r1.1 was lost")
    assert "joined s0r1" in told


def settle(group: LossyGroup) -> None:
    """Give a worker that is being started the time to come up."""
    import time

    time.sleep(0.3)


def test_a_host_that_leaves_is_let_go_between_steps(
    honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.roster.LOOK_SECONDS", 0.0)
    group = LossyGroup(places=0)

    def leave(event: Event) -> None:
        if isinstance(event, Stepped) and event.record.step == 1:
            group.going = {"s0r0": "host a is leaving", "s1r0": "host a is leaving", "s1r1": "host b is leaving"}

    ended, store, seen = elastic(group, stages=2, replicas=2, between=leave)
    assert (ended, facts(store)) == honest
    told = [event.what for event in seen if isinstance(event, Changed)]
    assert told == ["left s0r0: host a is leaving", "left s1r1: host b is leaving"]  # a stage keeps its last one
    assert History.open(store, "tiny").steps()[2].events == tuple(told)


class Leaving(LossyGroup):
    """In step 2 hosts say that they leave."""

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        if method == "last" and args[0] == 2:
            self.going = {"s0r0": "host a is leaving", "s1r0": "host a is leaving", "s1r1": "host b is leaving"}
        return super().call(worker, method, *args, returns=returns)


def test_a_host_that_leaves_before_a_long_step_ends_is_let_go_within_it(
    honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.roster.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("runtime.roster.NOTICE_SECONDS", -1.0)
    ended, store, seen = elastic(Leaving(places=0), stages=2, replicas=2)
    assert (ended, facts(store)) == honest
    told = [event.what for event in seen if isinstance(event, Changed)]
    assert told == [  # a stage keeps its last one
        "lost s0r0: host a is leaving, before the step's end",
        "lost s1r1: host b is leaving, before the step's end",
    ]
    assert History.open(store, "tiny").steps()[2].events == tuple(told)


def test_receipts_of_a_disturbed_step_cover_every_unit_once(tmp_path: Any) -> None:
    group = LossyGroup({150: ["s1r1"]}, places=0)
    _, store, _ = elastic(group, stages=2, replicas=2, keys=str(tmp_path))
    history = History.open(store, "tiny")
    items = [item for segment in history.segments() for item in history.items(segment.receipts_object)]
    for step in range(5):
        mine = [receipt for receipt in map(decode_receipt, items) if receipt.step == step]
        for stage in "01":
            team = [receipt for receipt in mine if receipt.worker[1] == stage]
            assert sorted(unit.micro_batch for receipt in team for unit in receipt.units) == [0, 1, 2, 3]
            assert {receipt.replicas for receipt in team} == {len(team)}

    def replay(plan: Plan | None) -> Replay:
        return Replay(store, history.run, build=worker_builder(reference), plan=plan)

    assert len({receipt.worker for receipt in map(decode_receipt, items)}) == 4
    for step in range(5):  # what each worker signed is what a replay of its units gives
        assert judge(history, step // 2, step, replay).agrees
    for worker in ("s0r0", "s0r1", "s1r0"):
        assert audit_unit(history, history.segments(), 1, worker, partial(reference, 1))[0] is None


def decode_receipt(item: bytes) -> Receipt:
    return decode(Receipt, item)


class Sick(StageWorker):
    """Fails at everything where it began as `s0r1` and last; gives what nobody can use where it began as `s1r0`."""

    everywhere = False

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._first = self._id

    def last(self, step: int, micro_batch: int, x: np.ndarray, target: np.ndarray) -> tuple[int, np.ndarray | None]:
        if self.everywhere or self._first == "s0r1":
            raise StepFault("a bit is wrong here")
        loss, dx = super().last(step, micro_batch, x, target)
        return loss, dx if self._first != "s1r0" or dx is None else dx[:-1]


class Hopeless(Sick):
    everywhere = True


class TellingGroup(LossyGroup):
    """Its workers' faults come out when their results are due, as Ray's do."""

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        try:
            return super().call(worker, method, *args, returns=returns)
        except FailureError as error:
            if isinstance(error, WorkersLost):
                raise
            return Told(error) if returns is None else (Told(error),) * returns

    def wait(self, handles: Sequence[Handle], timeout: float) -> list[tuple[int, FailureError | None]]:
        finished = super().wait(handles, timeout)
        return [(n, handles[n].error if isinstance(handles[n], Told) else error) for n, error in finished]


class Told:
    """A fault that is told later."""

    def __init__(self, error: FailureError) -> None:
        self.error = error


def test_a_worker_that_fails_alone_is_dismissed(honest: tuple[Ended, list[bytes]]) -> None:
    ended, store, seen = elastic(TellingGroup(kind=Sick, places=0), replicas=3)
    assert (ended, facts(store)) == honest
    assert [event.what for event in seen if isinstance(event, Changed)] == ["lost s0r1: dismissed: a bit is wrong here"]


def test_whoever_gave_a_wrong_shape_is_dismissed(honest: tuple[Ended, list[bytes]]) -> None:
    ended, store, seen = elastic(TellingGroup(kind=Sick, places=0), stages=2, replicas=2)
    assert (ended, facts(store)) == honest
    (told,) = [event.what for event in seen if isinstance(event, Changed)]
    assert told.startswith("lost s1r0: it gave dy as float32 [0, 8, 8], expected f32[1, 8, 8]")


def test_a_unit_that_fails_everywhere_is_the_runs_own_fault() -> None:
    with pytest.raises(StepFault, match="a bit is wrong here"):
        elastic(TellingGroup(kind=Hopeless, places=0), replicas=3)


class Unsound(StageWorker):
    """Gives a joiner other bytes than the state has."""

    def give(self, key: str, tensor: int) -> np.ndarray:
        array = super().give(key, tensor).copy()
        array[0] += 1
        return array


def test_state_from_a_peer_is_verified(honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.roster.LOOK_SECONDS", 0.0)
    group = LossyGroup(places=2, kind=Unsound)
    ended, store, seen = elastic(group, replicas=1, grow=True, between=lambda _: settle(group))
    assert (ended, facts(store)) == honest
    assert not any("joined" in event.what for event in seen if isinstance(event, Changed))
    assert len([event for event in seen if isinstance(event, Assembled)]) == 1


def test_what_has_been_long_on_its_way_is_not_kept() -> None:
    store = memory_store()
    job = tiny_job(store)
    plan = plan_for(job)
    config = WorkerConfig(worker="s0r0", plan=plan, programs=store.get(job.programs), seed=7, keys="", threads=1)
    worker: StageWorker = worker_builder(reference)(encode(config))
    old, new = np.zeros_like(worker.give("weight", 0)), np.ones_like(worker.give("weight", 0))
    assert worker.take(3, "weight", 0, new)
    assert worker.take(2, "weight", 0, old) == ()
    assert worker.give("weight", 0).all()
    assert worker.take(3, "weight", 1, np.zeros_like(worker.give("weight", 1)))


def test_workers_that_may_not_change_end_the_run() -> None:
    store = memory_store()
    job = tiny_job(store)
    with pytest.raises(WorkersLost, match="worker s0r1 was lost"):
        Controller(store=store, job=job, group=LossyGroup({40: ["s0r1"]}), plan=plan_for(job, replicas=2)).run()
    assert train(store, job, group=local_group()).status == "finished"


# ----------------------------------------------------------------------------------------------------- other plans


class Hosted(LossyGroup):
    """Workers on hosts by name, which may come and go: its own Sites, too. A host that `fails` starts no worker."""

    def __init__(self, *hosts: str, lose: Mapping[int, Sequence[str]] | None = None, **options: Any) -> None:
        super().__init__(lose, places=0, **options)
        self.there = {name: Host(name=name, speed=1.0, memory=2**30, bandwidth=1e9, latency=0.0) for name in hosts}
        self.sent: dict[str, str] = {}
        self.fails: set[str] = set()

    def start(self, configs: Mapping[str, bytes]) -> None:
        for worker in configs:
            if self.sent[worker] in self.fails:
                raise WorkersLost({worker: "it did not come up"})
            assert self.sent[worker] not in self.at().values(), "a host takes one worker"
        super().start(configs)

    def hosts(self) -> Sequence[Host]:
        return [host for name, host in self.there.items() if name not in self.fails]

    def at(self) -> Mapping[str, str]:
        return {worker: self.sent[worker] for worker in self._workers}

    def send(self, workers: Mapping[str, str]) -> None:
        self.sent |= workers


class Scripted:
    """A reviser that changes over to the next of some placements (`bounds` and hosts) as often as it is asked."""

    def __init__(self, group: Hosted, *script: tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]) -> None:
        self.sites = group
        self.script = list(script)

    def begin(self) -> Revision:
        bounds, hosts = self.script[0]
        return self._revision(bounds, hosts)

    def revise(self, standing: Standing) -> Revision | None:
        if len(self.script) > 1:
            self.script.pop(0)
        bounds, hosts = self.script[0]
        used = {host for team in hosts for host in team}
        same = standing.plan.bounds == bounds and used == set(standing.hosts.values())
        if same or not used <= {host.name for host in self.sites.hosts()}:
            return None
        return self._revision(bounds, hosts)

    @staticmethod
    def _revision(bounds: tuple[int, ...], hosts: tuple[tuple[str, ...], ...]) -> Revision:
        units = tuple(tuple(m % len(team) for m in range(4)) for team in hosts)
        plan = Plan(bounds=bounds, replicas=tuple(map(len, hosts)), units=units)
        return Revision(plan=plan, hosts=hosts, told=f"moved: to {bounds}")


def revised(group: Hosted, reviser: Reviser, *, keys: str = "", between: Any = None) -> tuple[Ended, Store, list[str]]:
    """The tiny job by a reviser: how it ended, its store and what was told of the workers."""
    store = memory_store()
    job = tiny_job(store)
    told: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Changed):
            told.append(event.what)
        if between:
            between(event)

    ended = Controller(
        store=store,
        job=job,
        group=group,
        plan=sent(reviser, reviser.begin()),
        elastic=Elastic(membership=group, patience=2.0, reviser=reviser),
        keys=keys,
        observe=observe,
    ).run()
    return ended, store, told


SCRIPT = (  # the embedding is tied to the head: blocks 0 and 3 hold one tensor
    ((0, 1, 4), (("a",), ("b",))),
    ((0, 3, 4), (("a",), ("b",))),  # blocks change sides
    ((0, 2, 4), (("b",), ("a",))),  # and so do hosts
    ((0, 4), (("b", "a"),)),  # one stage
    ((0, 1, 2, 4), (("c",), ("a",), ("b",))),  # a third host
)


def patient(event: Event) -> None:
    """Let workers come up that are being started."""
    if isinstance(event, Stepped):
        sleep(0.3)


def test_other_bounds_in_every_step_change_no_bit(honest: tuple[Ended, list[bytes]], tmp_path: Path) -> None:
    group = Hosted("a", "b", "c")
    ended, store, told = revised(group, Scripted(group, *SCRIPT), keys=str(tmp_path), between=patient)
    assert (ended, facts(store)) == honest
    assert told == [f"moved: to {bounds}" for bounds, _ in SCRIPT[1:]]
    history = History.open(store, "tiny")
    assert [record.events[-1:] for record in history.steps()][1:3] == [(one,) for one in told[1:3]]
    items = [item for segment in history.segments() for item in history.items(segment.receipts_object)]
    bounds = {(receipt.step, receipt.bounds) for receipt in map(decode_receipt, items)}
    assert {found for _, found in bounds} == {bounds for bounds, _ in SCRIPT[1:]}

    def replay(plan: Plan | None) -> Replay:
        return Replay(store, history.run, build=worker_builder(reference), plan=plan)

    for step in range(5):  # what each worker signed is what a replay of its units gives
        assert judge(history, step // 2, step, replay).agrees


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when due"])
@pytest.mark.parametrize("seed", range(4))
def test_workers_lost_while_blocks_move_change_no_bit(honest: tuple[Ended, list[bytes]], seed: int, late: bool) -> None:
    """One is lost at some call of a run whose bounds change in every step, another at a call of the change itself."""
    counted = Hosted("a", "b", "c", "d")
    revised(counted, Scripted(counted, *PAIRS))
    draw = random.Random(seed)
    lose = {draw.randrange(1, counted.calls): [draw.choice(["s0r0", "s0r1", "s1r0", "s1r1"])]}
    method = ["give", "take", "regroup", "forward"][seed]
    group = Hosted("a", "b", "c", "d", lose=lose, late=late, lose_in={method: draw.choice(["s0r0", "s1r1"])})
    ended, store, _ = revised(group, Scripted(group, *PAIRS), between=patient)
    assert (ended, facts(store)) == honest


PAIRS = (
    ((0, 1, 4), (("a", "b"), ("c", "d"))),
    ((0, 3, 4), (("a", "b"), ("c", "d"))),
    ((0, 2, 4), (("c", "d"), ("a", "b"))),
    ((0, 1, 4), (("a", "b"), ("c", "d"))),
    ((0, 2, 4), (("a", "b"), ("c", "d"))),
)


def planner_of(group: Hosted) -> ByPlanner:
    """Follows the planner for the tiny model: four blocks of a second each."""
    program = tiny_job(memory_store()).program
    model = Model(
        blocks=tuple(Block(work=1.0, input_bytes=0, tensors=tuple(block.tensors)) for block in program.blocks),
        elements={spec.name: int(np.prod(spec.shape)) for spec in program.tensors},
        slots=len(program.slots),
        micro_batches=program.micro_batches,
    )
    return ByPlanner(model=model, sites=group)


def test_hosts_that_join_leave_and_are_lost_have_the_plan_made_anew(
    honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.roster.LOOK_SECONDS", 0.0)
    group = Hosted("a", "b")
    extra = Host(name="c", speed=2.0, memory=2**30, bandwidth=1e9, latency=0.0)

    def happen(event: Event) -> None:
        patient(event)
        if isinstance(event, Stepped) and event.record.step == 0:
            group.there["c"] = extra
        if isinstance(event, Stepped) and event.record.step == 2:
            del group.there["a"]
            group.going = {worker: "host a is leaving" for worker, host in group.at().items() if host == "a"}
        if isinstance(event, Stepped) and event.record.step == 3:
            del group.there["b"]
            group.dead |= {worker: "its host is gone" for worker, host in group.at().items() if host == "b"}

    ended, store, told = revised(group, planner_of(group), between=happen)
    assert (ended, facts(store)) == honest
    assert "c" in told[0]
    assert told[0].startswith("moved: blocks 0-3 on a, b, now 0-3 on")
    assert set(group.sent.values()) == {"a", "b", "c"}
    assert [what for what in told if what.startswith("left")]
    assert [what for what in told if what.startswith("lost")]


def test_a_lost_stage_begins_again_with_a_plan_for_the_hosts_there_are(honest: tuple[Ended, list[bytes]]) -> None:
    group = Hosted("a", "b", "c", lose={250: ["s1r0"]})
    small = Host(name="a", speed=1.0, memory=2**30, bandwidth=1e9, latency=0.0)
    group.there = {"a": small, "b": replace(small, name="b")}
    reviser = Scripted(group, ((0, 2, 4), (("a",), ("b",))))

    def happen(event: Event) -> None:
        if group.dead:
            group.there["c"] = replace(small, name="c")
            group.there.pop("b", None)
            reviser.script = [((0, 1, 4), (("c",), ("a",)))]

    ended, store, _ = revised(group, reviser, between=happen)
    assert (ended, facts(store)) == honest
    told = [event for record in History.open(store, "tiny").steps() for event in record.events]
    assert any(event.startswith("back to the last checkpoint: stage 1") for event in told)
    assert group.sent["s0r0"] in ("a", "c")


def test_a_host_that_starts_no_worker_is_done_without(
    honest: tuple[Ended, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.roster.REST_SECONDS", 0.0)
    group = Hosted("a", "b", "c")
    fail_from_the_first_start(group, "c")
    script = (SCRIPT[0], ((0, 2, 4), (("a",), ("c",))), ((0, 3, 4), (("a",), ("b",))))
    ended, store, told = revised(group, Scripted(group, *script), between=patient)
    assert (ended, facts(store)) == honest
    assert told[0].startswith("a worker for stage 1 did not come up")
    assert told[1:] == ["moved: to (0, 3, 4)"]


def test_a_run_begins_without_a_host_that_starts_no_worker(honest: tuple[Ended, list[bytes]]) -> None:
    group = Hosted("a", "b")
    reviser = planner_of(group)
    assert set(reviser.begin().places.values()) == {"a", "b"}
    first = fail_from_the_first_start(group, "b")
    ended, store, told = revised(group, reviser)
    assert (ended, facts(store)) == honest
    assert (told, first) == ([], ["b"])
    assert "back to the last checkpoint: worker" in History.open(store, "tiny").steps()[0].events[0]


def fail_from_the_first_start(group: Hosted, bad: str) -> list[str]:
    """From the first time that a worker is to be started on a host it is known to fail: the hosts that did."""
    failed: list[str] = []
    started = group.start

    def start(configs: Mapping[str, bytes]) -> None:
        if bad in [group.sent[worker] for worker in configs]:
            group.fails.add(bad)
            failed.append(bad)
        started(configs)

    group.start = start  # type: ignore[method-assign]
    return failed


class Noting(LocalGroup):
    """Workers that are only names: who takes which tensor."""

    def __init__(self) -> None:
        super().__init__(bytes)
        self.taken: list[tuple[str, str, int]] = []

    def call(self, worker: str, method: str, *args: Any, returns: int | None = None) -> Any:
        if method == "take":
            self.taken.append((worker, *args[1:3]))
        return (b"root",)


def test_who_held_nothing_is_given_all() -> None:
    whole = program_of(Load(weights=2 * CHUNK, blocks=2))
    names = tuple(spec.name for spec in whole.tensors)
    blocks = (BlockSpec(kind=0, tensors=()), BlockSpec(kind=0, tensors=names))
    program = replace(whole, header=replace(whole.header, blocks=blocks))
    plan = Plan(bounds=(0, 1, 2), replicas=(1, 1), units=((0,), (0,)))
    group, keys = Noting(), ("weight", *whole.slots)
    layout = make_layout(plan, program)
    roots = {(key, chunk): b"root" for key in keys for chunk in layout.owners}
    crew = Crew(group=group, program=program, layout=layout, keys=keys, members={"s0r0": "a", "s1r0": "b"}, roots=roots)
    bring(crew, plan, {"s0r0": "b", "s1r0": "a"})
    assert sorted(group.taken) == sorted(("a", key, tensor) for key in keys for tensor in range(len(names)))
    assert crew.members == {"s0r0": "b", "s1r0": "a"}
