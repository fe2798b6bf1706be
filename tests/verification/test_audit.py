import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from runtime.feed import Batch, Feed
from runtime.program.encoding import ProgramRecord
from runtime.program.training import TrainingFile
from runtime.segments import History, Position
from runtime.testing import local_group, plan_for, tiny_job, train, workers_of
from runtime.worker import StageWorker
from storage.checkpoints import load_state, open_checkpoint
from storage.codec import decode, encode
from storage.errors import UsageError
from storage.identity import Identity, sign_receipt
from storage.objects import MemoryObjects
from storage.records import Receipt, StepRecord
from storage.saving import save_state
from storage.store import CHECKPOINTS, OBJECTS, PACKS, Store, hashed_key, memory_store
from verification.audit import AuditReport, Diverged, Inconclusive, Match, audit, overall
from verification.replay import Replay
from verification.sampling import miss_probability

EVERY = lambda history, total: range(total)  # noqa: E731


def audited(store: Store, *indices: int, name: str = "tiny") -> AuditReport:
    choose = (lambda history, total: indices) if indices else EVERY
    return audit(store, name, choose, replay=lambda history: Replay(store, history.run, threads=1))


@pytest.fixture
def honest() -> Store:
    """A copy of an honest run's store."""
    copy, source = MemoryObjects(), _honest().objects
    for found in source.list(""):
        copy.create(found.key, source.read(found.key) or b"")
    return Store(copy)


_CACHE: list[Store] = []


def _honest() -> Store:
    if not _CACHE:
        store = memory_store()
        train(store, tiny_job(store))
        _CACHE.append(store)
    return _CACHE[0]


def test_an_honest_run_matches(honest: Store) -> None:
    report = audited(honest)
    assert report.verdict == Match()
    assert [segment.steps for segment in report.segments] == [2, 2, 1]
    assert [segment.verdict for segment in report.segments] == [Match()] * 3


def test_a_resumed_run_on_other_workers_matches() -> None:
    store = memory_store()
    job = tiny_job(store)
    train(store, job, stop_before=1, plan=plan_for(job, stages=2, replicas=2))
    train(store, job, stop_before=4)
    assert audited(store).verdict == Match()


def test_replay_imports_no_model_code() -> None:
    import subprocess
    import sys

    code = "import sys, verification.audit; sys.exit(any(name.startswith('runtime.models') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------- trainers that cheat in step 3


class OtherRate(StageWorker):
    """Uses the learning rate of another step in step 3."""

    def update(self, step: int, total: int, exponent: int, at_once: bool) -> tuple[object, ...]:
        return super().update(1 if step == 3 else step, total, exponent, at_once)


class Skipping(StageWorker):
    """Reports step 3 and leaves the state as it was."""

    def update(self, step: int, total: int, exponent: int, at_once: bool) -> tuple[object, ...]:
        if step != 3:
            return super().update(step, total, exponent, at_once)
        self._totals.clear()
        return self._published()


class OtherInputs(StageWorker):
    """Trains step 3 on other inputs than the ones whose digest is recorded."""

    def _forward(self, step: int, micro_batch: int, x: np.ndarray) -> object:
        other = x[:, ::-1].copy() if step == 3 and x.dtype == np.int64 else x
        return super()._forward(step, micro_batch, other)


class LessWork(StageWorker):
    """Claims the gradient of step 3 and trains on half of it."""

    def update(self, step: int, total: int, exponent: int, at_once: bool) -> tuple[object, ...]:
        if step == 3:
            self._totals = {c: self._executor.put(self._executor.get(h) // 2) for c, h in self._totals.items()}
        return super().update(step, total, exponent, at_once)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherBatch(Feed):
    """Trains step 3 on the batch of step 4, and says so."""

    def batch(self, step: int) -> Batch:
        return super().batch(4 if step == 3 else step)


@pytest.mark.parametrize(
    ("kind", "field"),
    [(OtherRate, "state_root"), (Skipping, "state_root"), (LessWork, "state_root"), (OtherInputs, "loss")],
)
def test_a_cheating_worker_diverges_at_its_step(kind: type[StageWorker], field: str) -> None:
    store = memory_store()
    job = tiny_job(store)
    train(store, job, group=workers_of(kind), plan=plan_for(job, stages=2, replicas=2))
    report = audited(store)
    assert isinstance(report.verdict, Diverged)
    assert report.verdict.path == f"segment 1/step 3/{field}"
    assert report.verdict.expected != report.verdict.actual
    assert [type(segment.verdict) for segment in report.segments] == [Match, Diverged, Match]
    assert [segment.steps for segment in report.segments] == [2, 2, 1]


def test_another_batch_diverges_at_its_step() -> None:
    store = memory_store()
    job = tiny_job(store)
    feed = OtherBatch(recipe=job.feed.recipe, dataset=job.feed.dataset)
    train(store, dataclasses.replace(job, feed=feed))
    assert isinstance(found := audited(store).verdict, Diverged)
    assert found.path == "segment 1/step 3/data"


# -------------------------------------------------------------------------------------------- records that were edited

Edit = Callable[[StepRecord], StepRecord]


def rewritten(store: Store, edit: Edit, *, poststate: bytes | None = None) -> History:
    """A second run in the store with the honest one's objects and records, step 3 edited, all hashed again."""
    honest = History.open(store, "tiny")
    made = History.start(store, dataclasses.replace(honest.run, name="edited"))
    prestate = honest.run.initial_state
    for segment in honest.segments():
        records = [decode(StepRecord, item) for item in honest.items(segment.steps_object)]
        records = [edit(record) if record.step == 3 else record for record in records]
        position = Position(
            index=segment.index,
            first_step=segment.first_step,
            prestate=prestate,
            poststate=segment.poststate,
            steps=tuple(encode(record) for record in records),
        )
        if poststate is not None and segment.index == 1:
            position = dataclasses.replace(position, poststate=poststate)
        prestate = made.commit(position, "running").poststate
    return made


def flipped(root: bytes) -> bytes:
    return bytes([root[0] ^ 1]) + root[1:]


EDITS: dict[str, Edit] = {
    "step": lambda record: dataclasses.replace(record, step=2),
    "data": lambda record: dataclasses.replace(record, data=flipped(record.data)),
    "units": lambda record: dataclasses.replace(record, units=record.units + 1),
    "loss": lambda record: dataclasses.replace(record, loss=record.loss - 1),
    "gradient_root": lambda record: dataclasses.replace(record, gradient_root=flipped(record.gradient_root)),
    "state_root": lambda record: dataclasses.replace(record, state_root=flipped(record.state_root)),
    "validation": lambda record: dataclasses.replace(record, validation=(0, *record.validation[1:])),
    "receipts_root": lambda record: dataclasses.replace(record, receipts_root=flipped(record.receipts_root)),
}


@pytest.mark.parametrize("field", EDITS)
def test_every_edited_field_is_found(honest: Store, field: str) -> None:
    rewritten(honest, EDITS[field])
    verdict = audited(honest, 1, name="edited").verdict
    assert isinstance(verdict, Diverged)
    expected = {"step": "segment 1/step 3/step"}.get(field, f"segment 1/step 3/{field}")
    assert verdict.path == expected


def test_an_edited_poststate_is_found_and_cannot_be_gone_on_from(honest: Store) -> None:
    rewritten(honest, lambda record: record, poststate=bytes(32))
    assert isinstance(found := audited(honest, 1, name="edited").verdict, Diverged)
    assert found.path == "segment 1/poststate"
    assert isinstance(found := audited(honest, 2, name="edited").verdict, Inconclusive)
    assert f"checkpoint {bytes(32).hex()} is missing" in found.reason


def test_another_initial_state_is_found(honest: Store) -> None:
    store = honest
    run = dataclasses.replace(History.open(store, "tiny").run, name="other", initial_state=bytes(32))
    history = History.start(store, run)
    source = History.open(store, "tiny")
    first = source.segments()[0]
    position = Position(
        index=0,
        first_step=0,
        prestate=bytes(32),
        poststate=first.poststate,
        steps=source.items(first.steps_object),
    )
    history.commit(position, "running")
    assert isinstance(found := audited(store, name="other").verdict, Diverged)
    assert found.path == "run/initial_state"


def test_another_program_root_is_found(honest: Store) -> None:
    run = dataclasses.replace(History.open(honest, "tiny").run, name="other", program_root=bytes(32))
    History.start(honest, run)
    assert isinstance(found := audited(honest, name="other").verdict, Diverged)
    assert found.path == "run/program_root"


def test_a_receipt_that_its_worker_did_not_sign_is_found(tmp_path: object) -> None:
    store = memory_store()
    job = tiny_job(store)
    train(store, job, keys=str(tmp_path), stop_before=2)
    assert audited(store).segments[0].receipts == 2
    history = History.open(store, "tiny")
    (segment,) = history.segments()
    receipts = [decode(Receipt, item) for item in history.items(segment.receipts_object)]
    forger = Identity(bytes(31) + b"\x07")
    forged = sign_receipt(forger, dataclasses.replace(receipts[1], address=forger.address))
    stolen = dataclasses.replace(forged, address=receipts[1].address)
    made = History.start(store, dataclasses.replace(history.run, name="forged"))
    items = tuple(encode(dataclasses.replace(receipt, run=made.run_digest)) for receipt in (receipts[0], stolen))
    position = Position(
        index=0,
        first_step=0,
        prestate=segment.prestate,
        poststate=segment.poststate,
        steps=history.items(segment.steps_object),
        receipts=items,
    )
    made.commit(position, "running")
    assert isinstance(found := audited(store, name="forged").verdict, Diverged)
    assert found.path == "segment 0/step 0/receipt of s0r0"


# --------------------------------------------------------------------------------------------------- what is not there


def needed(store: Store) -> dict[str, tuple[str, bytes]]:
    """(key, what an error has to name) of the files that an audit of segment 1 reads, by what they are."""
    history = History.open(store, "tiny")
    first, second, _ = history.segments()
    (pack,) = open_checkpoint(store, first.poststate).manifest.packs
    dataset = tiny_job(store).feed.dataset.record
    assert history.head.segment is not None
    objects = {
        "run": history.run_digest,
        "recipe": history.run.recipe,
        "programs": history.run.programs,
        "data": history.run.data,
        "shard": dataset.training[0].object,
        "segment": history.head.segment,
        "steps": second.steps_object,
        "receipts": second.receipts_object,
    }
    files = {kind: (hashed_key(OBJECTS, digest), digest) for kind, digest in objects.items()}
    files["checkpoint"] = CHECKPOINTS + first.poststate.hex(), first.poststate
    return {**files, "frame": (hashed_key(PACKS, pack), pack)}


KINDS = ("run", "recipe", "programs", "data", "shard", "segment", "steps", "receipts", "checkpoint", "frame")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["flip", "lose"])
def test_a_damaged_object_is_named_and_accuses_nobody(honest: Store, kind: str, harm: str) -> None:
    key, digest = needed(honest)[kind]
    if harm == "flip":
        data = honest.objects.read(key)
        assert data is not None
        at = len(data) - 1 if kind != "frame" else 12
        honest.objects.replace(key, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        honest.objects.delete(key)
    verdict = audited(honest, 1).verdict
    assert isinstance(verdict, Inconclusive)
    assert digest.hex() in verdict.reason


def test_no_memory_is_inconclusive(honest: Store) -> None:
    def failing(config: bytes) -> object:
        raise MemoryError

    verdict = audit(honest, "tiny", EVERY, replay=lambda h: Replay(honest, h.run, build=failing)).verdict
    assert verdict == Inconclusive(reason="MemoryError")


def test_a_match_says_how_much_of_the_recipe_is_committed() -> None:
    store = memory_store()
    train(store, tiny_job(store), stop_before=4)
    report = audited(store)
    assert (report.verdict, report.total, report.planned) == (Match(), 2, 3)


def test_a_run_without_a_segment_is_inconclusive() -> None:
    store = memory_store()
    train(store, tiny_job(store), stop_before=1, group=local_group())
    verdict = audited(store).verdict
    assert verdict == Inconclusive(reason="the run has not committed a segment yet")


def test_an_unknown_run_is_a_usage_error(honest: Store) -> None:
    with pytest.raises(UsageError, match="run 'gone'"):
        audited(honest, name="gone")


def test_divergence_outweighs_everything() -> None:
    diverged = Diverged(path="p", expected="1", actual="2")
    assert overall([Match(), Inconclusive(reason="r"), diverged]) == diverged
    assert overall([Match(), Inconclusive(reason="r")]) == Inconclusive(reason="r")
    assert overall([Match()]) == Match()


def test_the_chance_of_missing_forged_segments() -> None:
    assert miss_probability(10, 1, 1) == 0.9
    assert miss_probability(10, 10, 1) == 0
    assert miss_probability(10, 9, 2) == 0
    assert miss_probability(10, 2, 2) == pytest.approx(28 / 45)


# ----------------------------------------------------------------------------------------------- records nobody trained


def test_a_segment_beyond_the_recipe_diverges(honest: Store) -> None:
    history = History.open(honest, "tiny")
    position = history.position()
    history.commit(position, "finished")
    verdict = audited(honest).verdict
    assert isinstance(verdict, Diverged)
    assert verdict.path == f"segment {position.index}/steps"


def test_a_malformed_program_is_inconclusive(honest: Store) -> None:
    history = History.open(honest, "tiny")
    file = decode(TrainingFile, honest.get(history.run.programs))
    record = decode(ProgramRecord, file.programs[0])
    header = dataclasses.replace(record.header, outputs=(10**6,))
    programs = (encode(dataclasses.replace(record, header=header)), *file.programs[1:])
    forged = honest.put(encode(dataclasses.replace(file, programs=programs)))
    history.run = dataclasses.replace(history.run, programs=forged)
    head = dataclasses.replace(history.head, run=honest.put(encode(history.run)), segment=None, partial=None)
    honest.swap("runs/tiny", honest.read("runs/tiny"), encode(head))
    verdict = audited(honest).verdict
    assert isinstance(verdict, Inconclusive)
    assert "outputs (1000000,)" in verdict.reason


def test_a_checkpoint_of_other_shapes_is_inconclusive(honest: Store) -> None:
    history = History.open(honest, "tiny")
    first = history.segments()[0]
    arrays = load_state(honest, first.poststate)
    name = next(name for name, array in arrays.items() if array.ndim == 2)
    root = save_state(honest, {**arrays, name: arrays[name].reshape(-1)})
    segments = [dataclasses.replace(first, poststate=root)]
    segments += [dataclasses.replace(history.segments()[1], prestate=root, previous=honest.put(encode(segments[0])))]
    head = dataclasses.replace(history.head, segment=honest.put(encode(segments[1])))
    honest.swap("runs/tiny", honest.read("runs/tiny"), encode(head))
    verdict = audited(honest, 1).verdict
    assert isinstance(verdict, Inconclusive)
    assert name in verdict.reason
