import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from runtime.controller import Assembled, Committed, Controller, Ended, Event, Job, Ready, Stepped
from runtime.executors import reference
from runtime.groups import require_version
from runtime.integers import ExactSum
from runtime.plan import make_plan
from runtime.segments import History, free_name, head_name, run_names
from runtime.testing import check_worker_group, local_group, plan_for, tiny_job, tiny_program, train, workers_of
from runtime.version import VERSION
from runtime.worker import StageWorker
from storage import merkle
from storage.checkpoints import load_state
from storage.codec import NO_DIGEST, decode, encode
from storage.errors import Conflict, FailureError, UsageError
from storage.identity import receipt_signer_ok
from storage.objects import MemoryObjects
from storage.records import Receipt, facts_free
from storage.store import Store, memory_store
from storage.testing import FaultyObjects


@pytest.fixture(scope="module")
def reference_run() -> tuple[Ended, History]:
    """The tiny job on one worker: what every other placement must equal."""
    store = memory_store()
    ended = train(store, tiny_job(store), group=local_group(reference))
    return ended, History.open(store, "tiny")


def facts(history: History) -> list[bytes]:
    return [encode(facts_free(record)) for record in history.steps()]


def test_local_group_conforms() -> None:
    check_worker_group(local_group(reference), tiny_job(memory_store()), tiny_program())


def test_history_is_chained(reference_run: tuple[Ended, History]) -> None:
    ended, history = reference_run
    segments = history.segments()
    assert ended == Ended(status="finished", step=5, state_root=segments[-1].poststate)
    assert [(s.index, s.first_step, s.steps) for s in segments] == [(0, 0, 2), (1, 2, 2), (2, 4, 1)]
    assert segments[0].prestate == history.run.initial_state
    assert segments[0].previous == NO_DIGEST
    for first, second in pairwise(segments):
        assert first.poststate == second.prestate
    for segment in segments:
        assert merkle.list_root(history.items(segment.steps_object)) == segment.steps_root
    records = history.steps()
    assert [record.step for record in records] == list(range(5))
    assert [len(record.validation) for record in records] == [0, 4, 0, 4, 0]
    assert records[-1].loss < records[0].loss
    assert records[0].events == ("assembled 1x1: s0r0",)
    assert records[1].events == ()


@pytest.mark.parametrize(
    ("stages", "replicas", "shares", "threads"),
    [(1, 1, None, 2), (1, 2, None, 1), (2, 1, None, 1), (2, 2, (3, 1), 1), (4, 1, None, 1), (1, 5, None, 1)],
)
def test_placement_changes_no_bit(
    reference_run: tuple[Ended, History], stages: int, replicas: int, shares: tuple[int, ...] | None, threads: int
) -> None:
    store = memory_store()
    job = tiny_job(store)
    plan = plan_for(job, stages=stages, replicas=replicas, shares=shares)
    ended = train(store, job, group=local_group(reference), plan=plan, threads=threads)
    assert ended == reference_run[0]
    assert facts(History.open(store, "tiny")) == facts(reference_run[1])


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_interrupted_before_any_step_and_resumed_elsewhere(reference_run: tuple[Ended, History], step: int) -> None:
    store = memory_store()
    job = tiny_job(store)
    stopped = train(store, job, stop_before=step)
    assert (stopped.status, stopped.step) == ("interrupted", step)
    assert History.open(store, "tiny").head.status == "interrupted"
    ended = train(store, job, plan=plan_for(job, stages=2, replicas=1))
    history = History.open(store, "tiny")
    assert ended == reference_run[0]
    assert facts(history) == facts(reference_run[1])
    assert [s.poststate for s in history.segments()] == [s.poststate for s in reference_run[1].segments()]


def test_interrupted_twice_inside_one_segment(reference_run: tuple[Ended, History]) -> None:
    store = memory_store()
    job = tiny_job(store)
    train(store, job, stop_before=1)
    assert train(store, job, stop_before=1).step == 1
    assert train(store, job) == reference_run[0]


def test_events_tell_the_story() -> None:
    store = memory_store()
    job = tiny_job(store)
    seen: list[Event] = []
    Controller(store=store, job=job, group=local_group(), plan=plan_for(job), observe=seen.append).run()
    kinds = [type(event) for event in seen]
    others = [kind for kind in kinds if kind is not Committed]  # which come when their state is stored
    assert others == [Assembled, Ready, *[Stepped] * 5, Ended]
    assert [event.segment.index for event in seen if isinstance(event, Committed)] == [0, 1, 2]
    assert kinds.index(Committed) >= 4
    assert kinds[-2:] == [Committed, Ended]


def test_receipts_are_signed_and_cover_every_unit(tmp_path: Path) -> None:
    store = memory_store()
    job = tiny_job(store)
    train(store, job, plan=plan_for(job, stages=2, replicas=2, shares=(3, 1)), keys=str(tmp_path), stop_before=2)
    history = History.open(store, "tiny")
    (segment,) = history.segments()
    receipts = [decode(Receipt, item) for item in history.items(segment.receipts_object)]
    assert len(receipts) == 8
    assert all(receipt_signer_ok(receipt) and receipt.run == history.run_digest for receipt in receipts)
    for stage in (0, 1):
        units = [
            tuple(unit.micro_batch for unit in receipt.units)
            for receipt in receipts
            if receipt.step == 1 and receipt.worker.startswith(f"s{stage}")
        ]
        assert units == [(0, 1, 3), (2,)]
    first, second = ({u.micro_batch: u for r in receipts[4:] if r.worker[1] == s for u in r.units} for s in "01")
    assert all(first[m].y == second[m].x and first[m].dy == second[m].dx for m in range(4))
    assert all(first[m].dx == second[m].dy == NO_DIGEST for m in range(4))
    assert len({receipt.gradient_root for receipt in receipts}) == 8


class FaultyWorker(StageWorker):
    """Its gradient of step 3 does not fit."""

    def reduce(self, step: int, exchange: int, *bundles: object) -> object:  # type: ignore[override]
        if step == 3:
            chunk = self._layout.owned(self._id)[0]
            huge = ExactSum(np.full(self._layout.length(chunk), 2**62))
            bundles = ({chunk: huge}, {chunk: huge})
        return super().reduce(step, exchange, *bundles)  # type: ignore[arg-type]


def test_a_fault_names_step_and_place_and_leaves_the_last_checkpoint(reference_run: tuple[Ended, History]) -> None:
    store = memory_store()
    job = tiny_job(store)
    with pytest.raises(FailureError, match=r"step 3/reduce/.*: gradient overflow at element 0"):
        train(store, job, group=workers_of(FaultyWorker))
    history = History.open(store, "tiny")
    assert history.head.status == "failed"
    assert [segment.index for segment in history.segments()] == [0]
    assert load_state(store, history.position().poststate)
    assert train(store, job) == reference_run[0]


class Exploding(StageWorker):
    """Holds an infinite second moment at step 3."""

    def update(self, step: int, total: int, exponent: int, at_once: bool) -> tuple[object, ...]:
        if step == 3:
            next(array for (slot, _), array in self._slots.items() if slot == "v")[5] = np.inf
        return super().update(step, total, exponent, at_once)


def test_a_state_that_is_not_finite_is_never_committed() -> None:
    store = memory_store()
    job = tiny_job(store)
    with pytest.raises(FailureError, match=r"step 3/update/.*: v became inf at element 5"):
        train(store, job, group=workers_of(Exploding))
    assert [segment.index for segment in History.open(store, "tiny").segments()] == [0]


class FullDisk:
    """Refuses every write after the next `room`."""

    room = 10**9

    def __call__(self, method: str, key: str) -> None:
        if method in ("create", "replace"):
            self.room -= 1
            if self.room < 0:
                raise FailureError(f"writing {key}: No space left on device; free space on that disk")


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 5, 7, 9])
def test_a_full_disk_leaves_the_last_segment(reference_run: tuple[Ended, History], room: int) -> None:
    disk = FullDisk()
    store = Store(FaultyObjects(MemoryObjects(), before=disk))
    job = tiny_job(store)
    train(store, job, stop_before=2)
    disk.room = room
    with pytest.raises(FailureError, match="No space left"):
        train(store, job)
    disk.room = 10**9
    assert len(History.open(store, "tiny").segments()) == (2 if room == 9 else 1)
    assert train(store, job) == reference_run[0]


def test_a_full_disk_at_the_start_leaves_no_run() -> None:
    disk = FullDisk()
    store = Store(FaultyObjects(MemoryObjects(), before=disk))
    job = tiny_job(store)
    disk.room = 3
    with pytest.raises(FailureError, match="No space left"):
        train(store, job)
    assert run_names(store) == []


class SlowDisk:
    """Holds every pack up until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, method: str, key: str) -> None:
        if method == "create" and key.startswith("packs/"):
            assert self.go.wait(60)


def test_training_goes_on_while_a_segment_is_stored(reference_run: tuple[Ended, History]) -> None:
    disk = SlowDisk()
    disk.go.set()
    store = Store(FaultyObjects(MemoryObjects(), before=disk))
    job = tiny_job(store)
    train(store, job, stop_before=0)
    disk.go.clear()
    seen: list[Event] = []

    def observe(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Stepped) and event.record.step == 3:
            assert not any(isinstance(one, Committed) for one in seen)
            disk.go.set()  # before the second segment's state is copied the first one's is waited for

    history = History.open(store, "tiny")
    ended = Controller(
        store=store, job=job, group=local_group(), plan=plan_for(job), history=history, observe=observe
    ).run()
    assert ended == reference_run[0]
    assert [event.segment.index for event in seen if isinstance(event, Committed)] == [0, 1, 2]


def test_a_fault_after_a_full_segment_still_commits_it() -> None:
    disk = SlowDisk()
    store = Store(FaultyObjects(MemoryObjects(), before=disk))
    disk.go.set()
    job = tiny_job(store)
    train(store, job, stop_before=0)
    disk.go.clear()

    class Faulty(StageWorker):
        def reduce(self, step: int, exchange: int, *bundles: object) -> object:  # type: ignore[override]
            if step == 2:
                disk.go.set()
                raise FailureError("a host is gone; start another")
            return super().reduce(step, exchange, *bundles)  # type: ignore[arg-type]

    with pytest.raises(FailureError, match="a host is gone"):
        train(store, job, group=workers_of(Faulty))
    assert [segment.index for segment in History.open(store, "tiny").segments()] == [0]


def test_a_fault_beside_a_save_that_fails_still_marks_the_run() -> None:
    full = False

    def before(method: str, key: str) -> None:
        if full and method == "create" and key.startswith("packs/"):
            raise FailureError(f"writing {key}: disk full; free space")

    store = Store(FaultyObjects(MemoryObjects(), before=before))
    job = tiny_job(store)
    train(store, job, stop_before=0)

    class Faulty(StageWorker):
        def reduce(self, step: int, exchange: int, *bundles: object) -> object:  # type: ignore[override]
            nonlocal full
            full = step >= 1  # the save of the first segment fails, and so does the step behind which it runs
            if step == 2:
                raise FailureError("a host is gone; start another")
            return super().reduce(step, exchange, *bundles)  # type: ignore[arg-type]

    with pytest.raises(FailureError, match=r"a host is gone|disk full"):
        train(store, job, group=workers_of(Faulty))
    history = History.open(store, "tiny")
    assert (history.head.status, history.segments()) == ("failed", [])


def test_two_controllers_of_one_run_cannot_overwrite_each_other() -> None:
    store = memory_store()
    job = tiny_job(store)
    train(store, job, stop_before=1)
    slow = History.open(store, "tiny")
    train(store, job, stop_before=3)
    with pytest.raises(Conflict, match="another process moved it"):
        Controller(store=store, job=job, group=local_group(), plan=plan_for(job), history=slow).run()
    assert len(History.open(store, "tiny").segments()) == 1


def test_names_of_runs() -> None:
    store = memory_store()
    job = tiny_job(store)
    train(store, job, stop_before=0)
    assert free_name(store, "tiny") == "tiny-2"
    assert free_name(store, "other") == "other"
    with pytest.raises(UsageError, match="run 'tiny' exists already"):
        History.start(store, History.open(store, "tiny").run)
    with pytest.raises(UsageError, match=r"run 'other': expected one of the store's runs \(tiny\)"):
        History.open(store, "other")
    with pytest.raises(UsageError, match="run name 'a/b'"):
        head_name("a/b")


def test_a_state_of_other_tensors_is_refused() -> None:
    from runtime.transition import assemble, restore

    job = tiny_job(memory_store())
    crew = assemble(
        local_group(),
        plan=make_plan(blocks=len(job.program.blocks), micro_batches=4),
        program=job.program,
        programs=tiny_program(),
        seed=1,
        keys="",
        threads=0,
    )
    with pytest.raises(FailureError, match="expected the tensors of the run's programs"):
        restore(crew, {"weight/unknown": np.zeros(3, np.float32)})


def test_a_worker_of_another_version_is_refused_by_name() -> None:
    require_version("s0r1", "host-7", VERSION)
    with pytest.raises(FailureError, match=f"worker s1r0 on host host-7: expected Trueweight {VERSION} .* got 0.0.9"):
        require_version("s1r0", "host-7", "0.0.9")


def test_version_is_the_projects() -> None:
    import tomllib

    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project.get("version", VERSION) == VERSION


def test_job_is_the_same_whoever_prepares_it() -> None:
    one, two = tiny_job(memory_store()), tiny_job(memory_store())
    assert isinstance(one, Job)
    assert (one.data, one.programs, one.program.root) == (two.data, two.programs, two.program.root)


TRAIN = """
from runtime.testing import tiny_job, train
from storage.store import memory_store
store = memory_store()
print(train(store, tiny_job(store)).state_root.hex())
"""


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"])
def test_instruction_set_changes_no_bit(reference_run: tuple[Ended, History], variable: str) -> None:
    value = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}[variable]
    environment = {**os.environ, variable: value}
    done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == reference_run[0].state_root.hex(), done.stderr
