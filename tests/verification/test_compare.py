"""Diffs of two runs: none between honest ones whatever the placement, else the first place and who signed there."""

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from runtime.executors import reference
from runtime.faults import faulty_builder, parse_fault
from runtime.groups import LocalGroup
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.testing import plan_for, remembered, tiny_job, train
from runtime.worker import worker_builder
from storage.checkpoints import load_state
from storage.codec import decode, encode
from storage.errors import UsageError
from storage.store import CHECKPOINTS, PACKS, Store, hashed_key, memory_store
from verification.compare import Comparison, Differ, Equal, Incomparable, Place, compare, judge
from verification.replay import Replay

STEPS = 3  # two in segment 0, one in segment 1
FLIPPED = "kind=flip,step=2,worker=s0r0,place=micro-batch 2/block 1/backward,operator=2000,element=1,bit=3"
LATE = "kind=transient,step=2,worker=s1r0,place=micro-batch 2/block 2/forward,operator=700,element=3,bit=10"
UPDATED = "kind=ulp,step=2,worker=s0r1,place=update/block000.position/0,operator=40,element=5,bit=0"
FAULTS = [
    (FLIPPED, "gradient", None, 0),
    ("kind=flip,step=2,worker=s1r1,place=micro-batch 1/loss,operator=300,element=2,bit=12", "backward", 1, 2),
    (UPDATED, "update", None, 0),
    (LATE, "forward", 2, 2),
    ("kind=batch,step=2,worker=s0r1,micro_batch=3", "forward", 3, 0),
    ("kind=skip,step=2,worker=s1r0,micro_batch=0", "forward", 0, 2),
    ("kind=reuse,step=2,worker=s0r0", "gradient", None, 0),
    ("kind=rate,step=2,worker=s1r1", "update", None, 2),
    ("kind=stale,step=2,worker=s1r0", "forward", 0, 2),
    ("kind=copy,step=2,worker=s1r1", "gradient", None, 2),
]


def trained(
    keys: Path | None,
    *faults: str,
    stages: int = 2,
    replicas: int = 2,
    stop: int | None = None,
    begun: Store | None = None,
) -> Store:
    """The tiny run, from where a copy of `begun` stands."""
    store = without(begun) if begun else memory_store()
    job = tiny_job(store, steps=STEPS)
    group = LocalGroup(faulty_builder(remembered, [parse_fault(text) for text in faults]))
    plan = plan_for(job, stages=stages, replicas=replicas)
    train(store, job, group=group, plan=plan, keys=str(keys) if keys else "", stop_before=stop)
    return store


def without(store: Store, *keys: str) -> Store:
    """A copy of a store without some of its objects."""
    copy = memory_store()
    held = store.objects._held  # type: ignore[attr-defined]
    copy.objects._held.update({key: value for key, value in held.items() if key not in keys})  # type: ignore[attr-defined]
    return copy


def diff(a: Store, b: Store) -> Comparison:
    return compare(a, "tiny", b, "tiny")


def difference(a: Store, b: Store) -> Differ:
    outcome = diff(a, b).outcome
    assert isinstance(outcome, Differ), outcome
    return outcome


def reason(a: Store, b: Store) -> str:
    outcome = diff(a, b).outcome
    assert isinstance(outcome, Incomparable), outcome
    return outcome.reason


@pytest.fixture(scope="module", autouse=True)
def decoded_once() -> Iterator[None]:
    """Every worker of every run decodes the same Programs, which takes longer than a step of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgram, "decode", cache(TrainingProgram.decode))
        yield


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def first(keys: Path) -> Store:
    """The run after one step."""
    return trained(keys, stop=1)


@pytest.fixture(scope="module")
def second(keys: Path, first: Store) -> Store:
    """After two."""
    return trained(keys, stop=2, begun=first)


@pytest.fixture(scope="module")
def honest(keys: Path, second: Store) -> Store:
    return trained(keys, begun=second)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return trained(tmp_path_factory.mktemp("other"), stages=1, replicas=1)


@pytest.fixture(scope="module")
def faulty(keys: Path, second: Store) -> Store:
    return trained(keys, FLIPPED, begun=second)


# ------------------------------------------------------------------------------------------------------------- equal


def test_runs_on_other_placements_are_equal(honest: Store, alone: Store, first: Store, second: Store) -> None:
    same = diff(honest, honest)
    assert (same.outcome, same.steps, same.lengths, same.notes) == (Equal(), STEPS, (STEPS, STEPS), ())
    boundaries = 4 * (2 + 2 + 2)  # micro-batches times x and y of each stage, dx and dy between them
    assert same.units == STEPS * (boundaries + 4 * 5)  # and five sums a worker
    for one, two in ((honest, alone), (alone, honest)):
        found = diff(one, two)
        assert (found.outcome, found.steps, found.units) == (Equal(), STEPS, STEPS * 4 * 2)
    moved = trained(None, stages=3, replicas=1, begun=second)
    found = diff(honest, moved)
    assert (found.outcome, found.units) == (Equal(), 2 * (boundaries + 4 * 5))
    assert found.notes[0].startswith("units were not compared: run B: the step has no receipts")


def test_other_stages_share_some_boundaries(honest: Store, keys: Path, second: Store) -> None:
    three = trained(keys, stages=3, replicas=1, begun=second)
    assert diff(honest, three).units == 3 * 4 * 6 + 2 * 4 * 5
    found = difference(three, trained(keys, LATE, begun=second))
    assert found.unit is not None
    assert (found.unit.micro_batch, found.unit.field, found.unit.blocks) == (2, "y", range(2, 4))
    assert [[one.split(" ")[0] for one in signers] for signers in found.unit.signers] == [["s2r0"], ["s1r0"]]


def test_runs_of_other_lengths_are_compared_as_far_as_both_go(
    honest: Store, faulty: Store, first: Store, keys: Path
) -> None:
    found = diff(honest, first)
    assert (found.outcome, found.steps, found.lengths) == (Equal(), 1, (STEPS, 1))
    assert found.notes == ("A has 3 steps, B 1: compared the first 1",)
    assert diff(first, faulty).outcome == Equal()
    broken = difference(trained(keys, FLIPPED.replace("step=2", "step=0"), stop=1), honest)
    assert (broken.step, broken.state) == (0, ())
    assert "end at other steps of this segment" in broken.reason
    assert reason(honest, trained(keys, stop=0)) == "run B has not done a step yet"


# ------------------------------------------------------------------------------------------------------------ differ


@pytest.mark.parametrize(("text", "direction", "micro_batch", "block"), FAULTS)
def test_a_fault_is_named_with_step_unit_and_both_signers(
    honest: Store,
    first: Store,
    second: Store,
    keys: Path,
    text: str,
    direction: str,
    micro_batch: int | None,
    block: int,
) -> None:
    fault = parse_fault(text)
    remembers = fault.kind in ("reuse", "stale")  # the step before
    other = trained(keys, text, begun=first if remembers else second)
    found = difference(honest, other)
    assert found.unit is not None
    assert (found.step, found.segment, found.unit.direction) == (2, 1, direction)
    assert (found.unit.micro_batch, found.unit.blocks) == (micro_batch, range(block, block + 2))
    assert found.path.startswith("segment 1/step 2/")
    for signers in found.unit.signers:
        assert [one.split(" 0x")[0] for one in signers] == [fault.worker]
    assert [place.level for place in found.state] == ["state", "tensor", "leaf", "element"]
    assert found.reason == ""
    assert difference(other, honest).path == found.path


def test_a_receipt_that_somebody_else_signed_is_named(honest: Store, second: Store, keys: Path) -> None:
    found = difference(honest, trained(keys, "kind=receipt,step=2,worker=s0r1", begun=second))
    assert found.path == "segment 1/step 2/receipt of s0r1"
    assert found.levels[-1].a.startswith("s0r1 0x")
    assert found.levels[-1].b.startswith("not signed by 0x")


def test_a_fault_under_another_plan_is_narrowed_to_what_both_signed(alone: Store, keys: Path, second: Store) -> None:
    found = difference(alone, trained(keys, LATE, begun=second))
    assert found.unit is not None
    assert (found.step, found.unit.micro_batch, found.unit.field, found.unit.blocks) == (2, 2, "y", range(4))
    assert [[one.split(" ")[0] for one in signers] for signers in found.unit.signers] == [["s0r0"], ["s0r0", "s1r0"]]
    update = difference(alone, trained(keys, UPDATED, begun=second))
    assert (update.step, update.unit) == (2, None)
    assert "between the boundaries that they share" in update.reason
    assert "no receipts" in difference(alone, trained(None, UPDATED, begun=second)).reason


def test_the_element_of_the_state_is_told_with_values_and_bits(honest: Store, faulty: Store) -> None:
    found = difference(honest, faulty)
    state, tensor, leaf, element = found.state
    roots = [bytes.fromhex(root) for root in (state.a, state.b)]
    arrays = [load_state(store, root) for store, root in zip((honest, faulty), roots, strict=True)]
    name = tensor.at.partition(",")[0]
    assert name == min(name for name in arrays[0] if not np.array_equal(arrays[0][name], arrays[1][name]))
    index = tuple(json.loads(element.at))
    for array, shown in zip((arrays[0][name], arrays[1][name]), (element.a, element.b), strict=True):
        assert shown == f"{array[index].item()} (0x{array[index].view(np.uint32):08x})"
    assert leaf.at.startswith("leaf 0 of ")


def test_only_the_frame_that_differs_is_read(honest: Store, faulty: Store) -> None:
    packs = [key for key in faulty.objects._held if key.startswith(PACKS)]  # type: ignore[attr-defined]
    reads: list[int] = []
    read = faulty.objects.read

    def counted(key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        data = read(key, start, stop)
        reads.append(len(data or b"") if key in packs else 0)
        return data

    faulty.objects.read = counted  # type: ignore[method-assign]
    try:
        assert difference(honest, faulty).state
    finally:
        faulty.objects.read = read  # type: ignore[method-assign]
    assert sum(map(bool, reads)) == 1


def test_other_recipes_name_their_keys(honest: Store) -> None:
    other = memory_store()
    train(other, tiny_job(other, steps=2), stop_before=1)
    found = difference(honest, other)
    assert found.path == "recipe/training.steps"
    assert found.levels == (Place(level="recipe", at="training.steps", a="3", b="2"),)


def test_names_in_recipes_are_no_difference(honest: Store) -> None:
    other = memory_store()
    job = tiny_job(other, steps=STEPS)
    recipe = dataclasses.replace(job.feed.recipe, name="another", faults=True)
    other.put(recipe.canonical())
    train(other, dataclasses.replace(job, feed=dataclasses.replace(job.feed, recipe=recipe)), stop_before=1)
    found = diff(honest, other)
    assert found.outcome == Equal()
    assert [note for note in found.notes if "changes no bit" in note and note.startswith(("name", "faults"))]


def test_another_version_of_a_program_names_the_operator(honest: Store) -> None:
    other = memory_store()
    job = tiny_job(other, steps=STEPS)
    number = job.program.header.kinds[1].backward
    program = job.program.programs[number]
    ops = list(program.ops)
    ops[7] = dataclasses.replace(ops[7], label="of another version")
    programs = list(job.program.programs)
    programs[number] = dataclasses.replace(program, ops=tuple(ops))
    header = dataclasses.replace(job.program.header, programs=tuple(one.root for one in programs))
    changed = TrainingProgram(header=header, programs=tuple(programs))
    train(other, dataclasses.replace(job, program=changed, programs=other.put(changed.encode())), stop_before=0)
    found = difference(honest, other)
    assert found.path == "program/block 2, backward/operator 7"  # the last block of that kind is the first to go back
    assert found.levels[-1].a.startswith(f"{ops[7].name} of ")
    assert found.levels[-1].b.endswith("(of another version)")


@pytest.mark.parametrize(
    ("field", "path"), [("data", "data"), ("initial_state", "initial_state"), ("engine", "engine")]
)
def test_other_data_or_initial_state(honest: Store, field: str, path: str) -> None:
    other = memory_store()
    other.objects._held.update(honest.objects._held)  # type: ignore[attr-defined]
    run = History.open(honest, "tiny").run
    values = {"data": encode(decode_data(honest, run.data)), "engine": "deepspeed"}
    value = other.put(values["data"]) if field == "data" else values.get(field, bytes(32))
    History.start(other, dataclasses.replace(run, name="other", **{field: value}))
    found = compare(honest, "tiny", other, "other").outcome
    assert isinstance(found, Differ)
    assert found.path == path
    if field == "data":
        assert found.levels[-1] == Place(level="dataset", at="vocab", a="256", b="255")
    if field == "initial_state":
        assert "checkpoint" in found.reason


def decode_data(store: Store, digest: bytes) -> object:
    from runtime.data import DatasetRecord

    return dataclasses.replace(decode(DatasetRecord, store.get(digest)), vocab=255)


# -------------------------------------------------------------------------------------------------------- incomplete


def test_what_is_missing_is_no_difference(honest: Store, faulty: Store) -> None:
    history = History.open(honest, "tiny")
    last = history.segments()[-1]
    for digest in (last.steps_object, last.receipts_object, history.head.segment, history.run_digest):
        assert digest is not None
        told = reason(honest, without(honest, hashed_key("objects/", digest)))
        assert digest.hex() in told
    broken = History.open(faulty, "tiny").segments()[1]
    receipts = difference(honest, without(faulty, hashed_key("objects/", broken.receipts_object)))
    assert (receipts.step, receipts.unit) == (2, None)
    assert broken.receipts_object.hex() in receipts.reason
    state = difference(honest, without(faulty, CHECKPOINTS + broken.poststate.hex()))
    assert state.unit is not None
    assert broken.poststate.hex() in state.reason
    with pytest.raises(UsageError, match="expected one of the store's runs"):
        compare(honest, "tiny", faulty, "gone")


def test_a_poststate_that_is_not_the_last_steps_is_a_difference(honest: Store) -> None:
    other = without(honest)
    good = History.open(honest, "tiny")
    history = History.start(other, dataclasses.replace(good.run, name="other"))
    items = good.items(good.segments()[0].steps_object)
    history.commit(dataclasses.replace(history.position(), steps=items), "interrupted")
    found = compare(honest, "tiny", other, "other").outcome
    assert isinstance(found, Differ)
    assert (found.path, found.segment, found.step) == ("segment 0/poststate", 0, None)
    assert [place.level for place in found.state] == ["state", "tensor", "leaf", "element"]


# --------------------------------------------------------------------------------------------------------- judgement


def test_a_replay_here_says_which_run_is_right(honest: Store, faulty: Store) -> None:
    def judged(store: Store) -> tuple[bool, str]:
        history = History.open(store, "tiny")

        def make(plan: Plan | None) -> Replay:
            return Replay(store, history.run, build=worker_builder(reference), plan=plan)

        found = judge(history, 1, 2, make)
        return found.agrees, found.fact.path if found.fact else ""

    assert judged(honest) == (True, "")
    assert judged(faulty) == (False, "segment 1/step 2/gradient_root")
