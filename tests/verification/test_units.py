"""Audits of one worker's units: honest ones match, a fault is found at its unit, and nobody else is named."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from runtime.executors import Make, compiled, reference
from runtime.faults import Fault, faulty_builder
from runtime.groups import LocalGroup
from runtime.segments import History
from runtime.testing import local_group, plan_for, remembered, tiny_job, train
from storage.checkpoints import Checkpoint
from storage.errors import UsageError
from storage.store import Store, memory_store
from verification.replay import Material
from verification.units import audit_unit


def trained(keys: Path, *faults: Fault, stages: int = 2, replicas: int = 2) -> Store:
    store = memory_store()
    job = tiny_job(store)
    group = LocalGroup(faulty_builder(remembered, faults)) if faults else local_group()
    train(store, job, group=group, plan=plan_for(job, stages=stages, replicas=replicas), keys=str(keys))
    return store


def found(store: Store, index: int, worker: str, make: Make = reference) -> tuple[str, int]:
    """(the path of the divergence, "" for a match; units replayed)."""
    history = History.open(store, "tiny")
    difference, units = audit_unit(history, history.segments(), index, worker, partial(make, 1))
    return difference.path if difference else "", units


def test_honest_units_match(tmp_path: Path) -> None:
    store = trained(tmp_path, stages=3)
    for index in range(3):
        for worker in ("s0r0", "s2r1") if index != 1 else ("s1r1",):
            assert found(store, index, worker) == ("", 2)
    assert found(store, 1, "s1r0", compiled) == found(store, 2, "s2r0", compiled) == ("", 2)


def test_a_unit_takes_the_memory_of_a_block(tmp_path: Path) -> None:
    """Whatever the stage, no more than one block's weights are asked for at a time."""
    store = trained(tmp_path, stages=1, replicas=1)
    history = History.open(store, "tiny")
    blocks = Material.read(store, history.run).program.blocks
    asked: list[set[str]] = []

    with pytest.MonkeyPatch.context() as patch:
        load = Checkpoint.load

        def counted(self: Checkpoint, names: Callable[[str], bool]) -> dict[str, np.ndarray]:
            arrays = load(self, names)
            asked.append({name.removeprefix("weight/") for name in arrays})
            return arrays

        patch.setattr(Checkpoint, "load", counted)
        assert found(store, 1, "s0r0") == ("", 4)
    tensors = [set(block.tensors) for block in blocks]
    assert asked == [*tensors[:-1], *reversed(tensors)]


@pytest.mark.parametrize(
    ("fault", "worker", "path"),
    [
        (Fault(kind="batch", step=2, worker="s0r1", micro_batch=3), "s0r1", "step 2/s0r1/micro-batch 3/x"),
        (Fault(kind="skip", step=2, worker="s1r0", micro_batch=0), "s1r0", "step 2/s1r0/micro-batch 0/y"),
        (Fault(kind="reuse", step=2, worker="s1r1"), "s1r1", "step 2/s1r1/gradient_root"),
        (
            Fault(kind="flip", step=2, worker="s0r0", place="micro-batch 2/block 1/backward", operator=2000, bit=3),
            "s0r0",
            "step 2/s0r0/gradient_root",
        ),
    ],
)
def test_a_fault_is_found_at_its_unit(tmp_path: Path, fault: Fault, worker: str, path: str) -> None:
    store = trained(tmp_path, fault)
    assert found(store, 1, worker)[0] == f"segment 1/{path}"
    innocent = {"s0r0": "s0r1", "s0r1": "s0r0", "s1r0": "s1r1", "s1r1": "s1r0"}[worker]
    assert found(store, 1, innocent) == ("", 2)


def test_a_worker_that_signed_nothing_is_a_usage_error(tmp_path: Path) -> None:
    store = trained(tmp_path, stages=1, replicas=1)
    with pytest.raises(UsageError, match=r"expected a worker that signed its first step \(s0r0\), got 's9r9'"):
        found(store, 1, "s9r9")
