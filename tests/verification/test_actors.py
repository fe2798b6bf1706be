"""Verifiers as actors: the local verdicts, and no accusation whatever becomes of one."""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.actors.cluster import Cluster, joined
from runtime.testing import tiny_job, train, workers_of
from runtime.worker import StageWorker
from storage.errors import IntegrityError, UsageError
from storage.store import open_store
from verification.actors import VerifierActor, audit_on, decode_audit, encode_audit, spread
from verification.audit import AuditReport, Diverged, Inconclusive, Match, SegmentAudit, audit

EVERY = lambda history, total: range(total)  # noqa: E731


class OtherRate(StageWorker):
    """Uses the learning rate of another step in step 3."""

    def update(self, step: int, total: int, exponent: int, at_once: bool) -> tuple[object, ...]:
        return super().update(1 if step == 3 else step, total, exponent, at_once)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with an honest run `tiny` and `forged`, which cheats in step 3."""
    path = tmp_path_factory.mktemp("verifiers") / "store"
    store = open_store(str(path), create=True)
    job = tiny_job(store)
    train(store, job)
    train(store, dataclasses.replace(job, name="forged"), group=workers_of(OtherRate))
    return str(path)


RESULT = SegmentAudit(
    index=3, first_step=6, steps=2, prestate="ab", poststate="cd", receipts=4, verdict=Match(), record="ef"
)


@pytest.mark.parametrize(
    "verdict", [Match(), Inconclusive(reason="r"), Diverged(path="segment 3", expected="1", actual="2")]
)
def test_an_audit_crosses_as_bytes(verdict: Any) -> None:
    result = dataclasses.replace(RESULT, verdict=verdict)
    assert decode_audit(encode_audit(result)) == result
    with pytest.raises(IntegrityError):
        decode_audit(encode_audit(result)[:-1])


# ------------------------------------------------------------------------------------------- audit with any spread


def with_spread(folder: str, results: Any) -> AuditReport:
    return audit(open_store(folder, create=False), "tiny", EVERY, spread=results)


@functools.cache
def local(folder: str) -> AuditReport:
    return audit(open_store(folder, create=False), "tiny", EVERY)


def test_results_in_any_order_are_reported_by_index(folder: str) -> None:
    expected = local(folder)
    report = with_spread(folder, lambda history, indexes: reversed(expected.segments))
    assert report == expected
    assert report.verdict == Match()
    assert report.planned == 3


def test_a_segment_that_never_came_back_is_inconclusive(folder: str) -> None:
    first, *_ = local(folder).segments
    report = with_spread(folder, lambda history, indexes: [first, first])
    assert [type(segment.verdict) for segment in report.segments] == [Match, Inconclusive, Inconclusive]
    assert report.verdict == Inconclusive(reason="segment 1: no verifier came back with it")


def test_verifiers_that_break_off_leave_the_rest_inconclusive(folder: str) -> None:
    first, *_ = local(folder).segments

    def broken(history: object, indexes: object) -> Iterator[SegmentAudit]:
        yield first
        raise ConnectionError("the head is gone")

    report = with_spread(folder, broken)
    assert [type(segment.verdict) for segment in report.segments] == [Match, Inconclusive, Inconclusive]
    assert report.verdict == Inconclusive(reason="segment 1: ConnectionError: the head is gone")


def test_an_audit_of_another_record_does_not_count(folder: str) -> None:
    """A store that shows its verifiers another history than the one who asked."""
    found = [dataclasses.replace(segment, record="00" * 32) for segment in local(folder).segments]
    report = with_spread(folder, lambda history, indexes: found)
    assert {type(segment.verdict) for segment in report.segments} == {Inconclusive}
    assert "an audit of 0000" in report.segments[0].verdict.reason  # type: ignore[union-attr]


def test_a_wrong_address_is_the_users(folder: str) -> None:
    def spreading(history: object, indexes: Any) -> Iterator[SegmentAudit]:
        return spread(
            store_url=folder,
            name="tiny",
            indexes=indexes,
            executor="reference",
            threads=1,
            workers=2,
            address="ray://elsewhere:10001",
            observe=lambda _: None,
        )

    with pytest.raises(UsageError, match="Ray address"):
        with_spread(folder, spreading)


# ----------------------------------------------------------------------------------------------------- on a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with joined() as cluster:
            yield cluster


class Killed(VerifierActor):
    """A verifier whose host runs out of memory with segment 1, wherever that is."""

    def audit(self, index: int) -> bytes:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().audit(index)


class KilledOnce(VerifierActor):
    """The first verifier that meets segment 1 dies of it."""

    def audit(self, index: int) -> bytes:
        assert self._history is not None
        marker = Path(str(self._history.store)).parent / "killed"
        if index == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().audit(index)


class Old(VerifierActor):
    """A verifier on a host with another installation."""

    def version(self) -> str:
        return "0.0.9"


class Late(VerifierActor):
    """A verifier that does not come up."""

    def open(self, config: bytes) -> bytes:
        time.sleep(60)
        return super().open(config)


def on(
    cluster: Cluster,
    folder: str,
    *,
    name: str = "tiny",
    indexes: tuple[int, ...] = (0, 1, 2),
    lines: list[str] | None = None,
    **options: Any,
) -> AuditReport:
    told = [] if lines is None else lines
    settings: dict[str, Any] = {"workers": 2, "executor": "reference", "threads": 1, "store_url": folder, **options}
    return audit(
        open_store(folder, create=False),
        name,
        lambda history, total: indexes,
        spread=lambda history, indexes: audit_on(
            cluster, name=history.name, indexes=indexes, observe=told.append, **settings
        ),
    )


@pytest.mark.ray
def test_verifiers_give_the_local_report(cluster: Cluster, folder: str) -> None:
    lines: list[str] = []
    assert on(cluster, folder, lines=lines) == local(folder)
    assert any("segment 2: match, verifier v" in line for line in lines)


@pytest.mark.ray
def test_micro_batches_in_parallel_give_the_same_bytes(cluster: Cluster, folder: str) -> None:
    report = on(cluster, folder, name="forged", indexes=(1,), workers=2)
    assert report.verdict == audit(open_store(folder, create=False), "forged", lambda history, total: [1]).verdict
    assert isinstance(report.verdict, Diverged)
    assert report.verdict.path == "segment 1/step 3/state_root"


@pytest.mark.ray
def test_a_verifier_that_dies_twice_with_a_segment_is_named(cluster: Cluster, folder: str) -> None:
    report = on(cluster, folder, actor=Killed, indexes=(0, 1))
    assert [type(segment.verdict) for segment in report.segments] == [Match, Inconclusive]
    assert isinstance(report.verdict, Inconclusive)
    assert report.verdict.reason.count("verifier v") == 2
    assert "on host " in report.verdict.reason


@pytest.mark.ray
def test_a_segment_is_handed_to_another_verifier_once(cluster: Cluster, folder: str) -> None:
    lines: list[str] = []
    report = on(cluster, folder, actor=KilledOnce, workers=1, lines=lines)
    assert report == local(folder)
    assert sum(line.startswith("segment 1: given to") for line in lines) == 2


@pytest.mark.ray
def test_verifiers_that_cannot_work_say_why(cluster: Cluster, folder: str, tmp_path: Path) -> None:
    for options, reason in (
        ({"actor": Old}, r"expected Trueweight"),
        ({"store_url": str(tmp_path / "nothing")}, "no store at"),
        ({"actor": Late, "timeout": 2.0}, "expected to start within 2 s"),
    ):
        report = on(cluster, folder, **options)
        assert {type(segment.verdict) for segment in report.segments} == {Inconclusive}
        assert isinstance(report.verdict, Inconclusive)
        assert reason in report.verdict.reason
        assert "verifier v0" in report.verdict.reason
