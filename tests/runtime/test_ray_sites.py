"""Runs placed by the planner on a Ray cluster of unequal hosts, whose profiles are made up: speeds by CPUs."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import profiles
from runtime.actors.cluster import joined
from runtime.actors.group import Pin, RayGroup, WorkerActor
from runtime.actors.sites import RaySites
from runtime.actors.testing import Hosts
from runtime.controller import Assembled, Changed, Elastic, Event, Job, Stepped, sent
from runtime.executors import reference
from runtime.groups import WorkerConfig, WorkersLost
from runtime.plan import Plan
from runtime.planner import make_placement
from runtime.revision import ByPlanner
from runtime.segments import History
from runtime.testing import plan_for, tiny_job, tiny_program, train
from storage.codec import decode, encode
from storage.errors import FailureError
from storage.store import memory_store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 12
SPEEDS = {1: 1.0, 2: 3.0, 3: 2.0, 4: 9.0}
"""How fast hosts of so many CPUs are made up to be."""
ENOUGH = 170_000
"""Bytes that do for some blocks of the tiny model and not for all; hosts of four CPUs have far less."""


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    hosts = Hosts.start(1)
    hosts.join(cpus=2, name="two")
    hosts.join(cpus=3, name="three")
    hosts.join(cpus=4, name="four")
    try:
        yield hosts
    finally:
        hosts.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A profile for each number of CPUs, as if measured."""
    program = tiny_job(memory_store(), steps=STEPS).program
    measured = profiles.measure(program, reference, executor="reference", threads=1, repeats=1)
    block = profiles.KindProfile(forward=0.5, backward=0.5, prepare=0.0, handed_bytes=0)
    for cpus, speed in SPEEDS.items():
        kind = replace(block, forward=0.5 / speed, backward=0.5 / speed)
        memory = profiles.RESERVED + (ENOUGH if cpus < 4 else 100)
        made = replace(measured, kinds=(kind,) * len(program.kinds), threads=cpus, memory=memory, loss=0.0, update=0.0)
        profiles.save(profiles.profile_file(tmp_path, program, executor="reference", threads=cpus), made)
    return tmp_path


def sites_of(group: RayGroup, job: Job, folder: Path, told: list[str]) -> RaySites:
    encoded = tiny_program(job.feed.steps)
    return RaySites(
        group, program=job.program, programs=encoded, executor="reference", folder=str(folder), tell=told.append
    )


def test_a_run_follows_the_planner_and_survives_the_loss_of_a_host(hosts: Hosts, folder: Path) -> None:
    store, told = memory_store(), list[str]()
    job = tiny_job(store, steps=STEPS)
    with joined(hosts.address) as cluster:
        group = RayGroup(cpus=cluster.cpus, silence=3.0)
        sites = sites_of(group, job, folder, told)
        reviser = ByPlanner(model=sites.model(), sites=sites)
        plan = sent(reviser, reviser.begin())
        there = {host.name: host for host in sites.hosts()}
        (head,) = set(there) - {"two", "three", "four"}
        assert {name: round(there[name].speed / there[head].speed, 3) for name in there} == {
            head: 1.0, "two": 3.0, "three": 2.0, "four": 9.0
        }  # fmt: skip
        assert all(link not in (profiles.BANDWIDTH, 0) for link in (host.bandwidth for host in there.values()))
        assert sum("Mbit/s" in line for line in told) == 4
        expected = make_placement(reviser.model, list(there.values()))
        assert (plan.bounds, plan.replicas) == (expected.bounds, expected.replicas)
        assert plan.bounds != plan_for(job, stages=len(plan.replicas)).bounds
        assert [one.host.name for one in expected.excluded if one.too_small] == ["four"]
        places = reviser.begin().places
        seen: list[dict[str, str]] = []

        def watch(event: Event) -> None:
            if isinstance(event, Assembled | Stepped):
                seen.append(dict(sites.at()))
            if isinstance(event, Stepped) and event.record.step == 2:
                hosts.leave(0)  # the fastest
            if isinstance(event, Changed):
                told.append(event.what)

        elastic = Elastic(membership=group, reviser=reviser, patience=60.0)
        ended = train(store, job, group=group, plan=plan, threads=0, elastic=elastic, watch=watch)
    other = memory_store()
    assert ended == train(other, tiny_job(other, steps=STEPS))
    assert seen[0] == places
    assert set(seen[-1].values()) == {head, "three"}
    assert told[0].startswith("measuring 4 hosts: ")
    events = [event for record in History.open(store, "tiny").steps() for event in record.events]
    assert any(what in event for event in events for what in ("lost", "back to the last checkpoint"))


def test_hosts_that_cannot_measure_themselves_are_left_out(
    hosts: Hosts, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    job = tiny_job(memory_store())
    with joined(hosts.address) as cluster:
        group = RayGroup(cpus=cluster.cpus)
        sites = RaySites(
            group, program=job.program, programs=b"", executor="reference", folder=str(folder), tell=told.append
        )
        with pytest.raises(FailureError, match=r"no host could be measured .*; look at `ray status`"):
            sites.model()
        assert sum("is left out: " in line for line in told) == 4
        late = sites_of(group, job, folder, told)
        with pytest.raises(FailureError, match=r"it did not measure itself in 0 s"):
            late.model(seconds=0.0)


def test_a_host_that_joins_is_measured_and_used_and_a_lost_worker_replaced(hosts: Hosts, folder: Path) -> None:
    hosts.leave(2)
    hosts.leave(0)
    store, told = memory_store(), list[str]()
    job = tiny_job(store, steps=STEPS)
    with joined(hosts.address) as cluster:
        group = RayGroup(cpus=cluster.cpus, silence=3.0)
        sites = sites_of(group, job, folder, told)
        reviser = ByPlanner(model=sites.model(), sites=sites)
        plan = sent(reviser, reviser.begin())

        def watch(event: Event) -> None:
            if isinstance(event, Changed):
                told.append(event.what)
            if not isinstance(event, Stepped):
                return
            match event.record.step:
                case 1:
                    hosts.join(cpus=2, name="two")
                    until(lambda: any(host.name == "two" for host in sites.hosts()))
                case 2 | 6:  # it was asked for before this step
                    until(lambda: "two" in sites.at().values())
                case 4:
                    (worker,) = (worker for worker, host in sites.at().items() if host == "two")
                    os.kill(group.processes()[worker], signal.SIGKILL)

        elastic = Elastic(membership=group, reviser=reviser, patience=60.0)
        ended = train(store, job, group=group, plan=plan, threads=0, elastic=elastic, watch=watch)
    other = memory_store()
    assert ended == train(other, tiny_job(other, steps=STEPS))
    moved = [what for what in told if what.startswith("moved: ")]
    assert len(moved) == 2
    assert all("two" in what.partition(", now ")[2] for what in moved)
    assert [what for what in told if what.startswith("lost s")]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what other processes do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


class Telling(WorkerActor):
    """An actor that fails with what it was told."""

    def open(self, config: bytes, executor: str) -> None:
        node = ray_node()
        raise FailureError(f"{decode(WorkerConfig, config).threads} threads on {node}")


def ray_node() -> str:
    return WorkerActor().version()[3]


def test_a_pinned_worker_has_its_node_to_itself_and_fails_with_it(hosts: Hosts) -> None:
    with joined(hosts.address) as cluster:
        group = RayGroup(cpus=cluster.cpus, actor=Telling)
        node = hosts.nodes[1].node_id
        for asked, has in ((0, 3), (2, 2)):
            group.pin({"s0r0": Pin(node=node, cpus=3)})
            plan = Plan(bounds=(0, 1), replicas=(1,), units=((0,),))
            config = WorkerConfig(worker="s0r0", plan=plan, programs=b"", seed=1, keys="", threads=asked)
            with pytest.raises(WorkersLost, match=f"{has} threads on {node}"):
                group.start({"s0r0": encode(config)})
        assert set(group.failed) == {node}
