import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from runtime.actors.cluster import Cluster, joined, require_listener
from runtime.actors.group import RayGroup, WorkerActor, cpus_each
from runtime.clock import WallClock
from runtime.controller import Changed, Elastic, Event, Stepped
from runtime.segments import History
from runtime.testing import check_worker_group, plan_for, tiny_job, tiny_program, train
from storage.errors import FailureError, UsageError
from storage.store import memory_store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with joined() as cluster:
            yield cluster


class OldActor(WorkerActor):
    """An actor on a host with another installation."""

    def version(self) -> tuple[str, str, int, str]:
        return "0.0.9", "host-7", 0, ""


class FailingActor(WorkerActor):
    """An actor whose worker meets a fault in step 2 and dies in step 3."""

    def call(self, method: str, returns: int | None, *args: object) -> object:
        if method == "reduce" and args[0] == 2:
            raise FailureError("step 2: operator 5 (div) expected a finite number at element 9")
        if method == "reduce" and args[0] == 0 and len(args) == 1:
            os._exit(1)
        return super().call(method, returns, *args)


class DyingActor(WorkerActor):
    """An actor whose host goes away in step 1."""

    def call(self, method: str, returns: int | None, *args: object) -> object:
        if method == "reduce" and args[0] == 1:
            os._exit(1)
        return super().call(method, returns, *args)


def test_ray_group_conforms(cluster: Cluster) -> None:
    check_worker_group(RayGroup(cpus=cluster.cpus), tiny_job(memory_store()), tiny_program())


def test_ray_gives_the_same_root_as_this_process(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.started
    here, there = memory_store(), memory_store()
    ended = train(here, tiny_job(here))
    job = tiny_job(there)
    plan = plan_for(job, stages=2, replicas=2, shares=(3, 1))
    assert train(there, job, group=RayGroup(cpus=cluster.cpus), plan=plan, keys=str(tmp_path)) == ended
    history = History.open(there, "tiny")
    assert len(history.items(history.segments()[0].receipts_object)) == 8


class SlowActor(WorkerActor):
    """In step 2 the first unit takes s0r1 three seconds, and the third and later ones take s0r0 five."""

    slept = 0

    def call(self, method: str, returns: int | None, *args: object) -> object:
        if method == "last" and args[0] == 2:
            self.slept += 1
            place = getattr(self._worker, "_id", "")
            if (place == "s0r1" and self.slept == 1) or (place == "s0r0" and self.slept == 3):
                time.sleep(3.0 if place == "s0r1" else 5.0)
        return super().call(method, returns, *args)


def test_a_straggler_sits_out_and_joins_again_within_the_step(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.work.GRACE", 0.5)
    store = memory_store()
    job = tiny_job(store)
    group = RayGroup(cpus=cluster.cpus, actor=SlowActor)
    plan, elastic = plan_for(job, replicas=2), Elastic(membership=group, sit_out=True)
    ended = train(store, job, group=group, plan=plan, elastic=elastic, keys=str(tmp_path))
    other = memory_store()
    assert ended == train(other, tiny_job(other))
    events = History.open(store, "tiny").steps()[2].events
    assert events[0].startswith("s0r1 sits out step 2: ")
    assert events[-1].startswith("joined s0r")


class IdleActor(WorkerActor):
    """An actor without a worker."""

    def open(self, config: bytes, executor: str) -> None:
        del config, executor


def test_a_start_that_waits_for_a_cpu_can_be_called_off(cluster: Cluster) -> None:
    group = RayGroup(cpus=cluster.cpus, actor=IdleActor)
    first = [f"s0r{n}" for n in range(int(cluster.cpus))]
    group.start(dict.fromkeys(first, b""))
    late = WallClock().beside(partial(group.start, {"late": b""}))
    with pytest.raises(TimeoutError):
        late.result(timeout=1.0)
    group.stop(["late"])
    with pytest.raises(FailureError, match="late"):
        late.result(timeout=30.0)
    assert sorted(group.processes()) == first
    group.stop()


def test_another_version_is_refused_by_name(cluster: Cluster) -> None:
    group = RayGroup(cpus=cluster.cpus, actor=OldActor)
    with pytest.raises(FailureError, match=r"worker s0r0 on host host-7: expected Trueweight .* got 0\.0\.9"):
        group.start({"s0r0": b""})
    group.stop()


def test_a_workers_error_comes_out_as_it_was(cluster: Cluster) -> None:
    store = memory_store()
    job = tiny_job(store)
    group = RayGroup(cpus=cluster.cpus, actor=FailingActor)
    with pytest.raises(FailureError, match="step 2: operator 5") as caught:
        train(store, job, group=group, plan=plan_for(job, stages=2))
    assert type(caught.value) is FailureError
    assert [segment.index for segment in History.open(store, "tiny").segments()] == [0]


def test_a_lost_worker_is_a_failure_and_the_run_can_go_on(cluster: Cluster) -> None:
    store = memory_store()
    job = tiny_job(store)
    with pytest.raises(FailureError, match=r"worker s0r\d was lost"):
        train(store, job, group=RayGroup(cpus=cluster.cpus, actor=DyingActor), plan=plan_for(job, replicas=2))
    other = memory_store()
    assert train(store, job) == train(other, tiny_job(other))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_elastic_run_goes_on_without_a_process(cluster: Cluster, how: signal.Signals) -> None:
    store = memory_store()
    job = tiny_job(store)
    group = RayGroup(cpus=cluster.cpus, silence=3.0)
    told: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, Stepped) and event.record.step == 1:
            os.kill(group.processes()["s0r1"], how)
        if isinstance(event, Changed):
            told.append(event.what)

    plan = plan_for(job, replicas=2)
    ended = train(store, job, group=group, plan=plan, elastic=Elastic(membership=group), watch=watch)
    other = memory_store()
    assert ended == train(other, tiny_job(other))
    assert told[0].startswith("lost s0r1: ")
    assert History.open(store, "tiny").steps()[2].events[0] == told[0]


def test_an_elastic_run_that_loses_a_stage_goes_back_to_its_checkpoint(cluster: Cluster) -> None:
    store = memory_store()
    job = tiny_job(store)
    group = RayGroup(cpus=cluster.cpus)
    killed = []

    def watch(event: Event) -> None:
        if isinstance(event, Stepped) and event.record.step == 3 and not killed:
            killed.append(group.processes()["s1r0"])
            os.kill(killed[0], signal.SIGKILL)

    ended = train(store, job, group=group, plan=plan_for(job, stages=2), elastic=Elastic(membership=group), watch=watch)
    other = memory_store()
    assert ended == train(other, tiny_job(other))
    assert any(
        "back to the last checkpoint" in e for record in History.open(store, "tiny").steps() for e in record.events
    )


def test_workers_that_find_no_cpu_are_not_waited_for_for_ever(cluster: Cluster) -> None:
    group = RayGroup(cpus=1e6, timeout=1.0)
    with pytest.raises(FailureError, match=r"expected to start within 1 s on 1 CPUs each, got"):
        group.start({f"s0r{replica}": b"" for replica in range(int(cluster.cpus) + 1)})
    group.stop()


def test_cpus_are_shared_among_workers() -> None:
    assert cpus_each(2, 1) == 1
    assert cpus_each(2, 4) == 0.5
    assert cpus_each(2, 3) == 0.6666
    assert cpus_each(64, 4) == 1


def test_a_cluster_that_is_not_there_is_refused_in_time() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        pytest.raises(FailureError, match=f"Ray cluster at 127.0.0.1:{port}: expected an answer"),
        joined(f"127.0.0.1:{port}", timeout=2),
    ):
        pass


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:port", "ray://host:10001"])
def test_addresses_of_other_kinds_are_usage_errors(address: str) -> None:
    with pytest.raises(UsageError, match="Ray address"), joined(address, timeout=1):
        pass


def test_default_ports_of_urls() -> None:
    with pytest.raises(FailureError, match="expected an answer"):
        require_listener("http://127.0.0.1", 1)
