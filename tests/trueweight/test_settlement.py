"""Settlement over the in-memory ledger: courts, rejections, operators who go, bonds that come back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ledger.model import Model
from ledger.port import NATIVE, Event, Outcome, Role, Run, Status
from runtime.executors import reference
from runtime.faults import Fault, faulty_builder
from runtime.groups import LocalGroup
from runtime.segments import History
from runtime.testing import plan_for, tiny_job, train
from runtime.tracing import traced_builder
from runtime.worker import worker_builder
from storage.errors import UsageError
from storage.identity import load_or_create
from storage.store import Store, memory_store
from trueweight.settlement import Parties, Settlement, default_terms
from verification.replay import Replay

SUBMITTER, OPERATOR, COURT, VERIFIER, STRANGER = (f"0x{n:040x}" for n in range(1, 6))
ALWAYS = 2**32 - 1


def trained(keys: Path, fault: Fault | None) -> tuple[Store, History]:
    store = memory_store()
    job = tiny_job(store, steps=4)
    group = LocalGroup(faulty_builder(reference, [fault] if fault else []))
    train(store, job, group=group, plan=plan_for(job, stages=2, replicas=2), keys=str(keys))
    return store, History.open(store, "tiny")


class Mined(Model):
    """A model in which every call is a block of its own, as on a chain."""

    def send(self, sender: str, function: str, *args: Any, value: int = 0) -> tuple[Event, ...]:
        events = super().send(sender, function, *args, value=value)
        self.mine()
        return events


@dataclass
class Play:
    """A run and its ledger; `seen_by` are settlements of those whose keys are there."""

    store: Store
    history: History
    worker: str
    changed: dict[str, Any]
    beacon: Callable[[int], bytes] = lambda block: sha256(b"%d" % block).digest()
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = Mined(self.beacon)
        parties = {"submitter": SUBMITTER, "operator": OPERATOR, "court": COURT, "beacon": STRANGER}
        self.terms: Run = default_terms(self.history, 2, 2, **parties, **self.changed)

    def seen_by(self, *accounts: str) -> Settlement:
        def replay(traced: bool) -> Replay:
            build = traced_builder(reference) if traced else worker_builder(reference)
            return Replay(self.store, self.history.run, build=build)

        parties = Parties(
            submitter=SUBMITTER,
            operator=OPERATOR,
            court=COURT,
            verifiers=(VERIFIER,),
            workers=(self.worker,),
            secrets={account: account.encode() for account in accounts},
        )
        return Settlement(
            ledger=self.model,
            history=self.history,
            terms=self.terms,
            parties=parties,
            replay=replay,
            tell=self.told.append,
        )

    def settle(self, *accounts: str) -> Settlement:
        made = self.seen_by(*accounts)
        for part in (made.open, made.commit, made.judge, made.finalise, made.pay, made.close):
            part()
            self.model.check()
        return made

    @property
    def everybody(self) -> tuple[str, ...]:
        return SUBMITTER, OPERATOR, COURT, VERIFIER, self.worker


def earned(made: Settlement) -> dict[tuple[str, str], int]:
    return {(row["part"], row["why"]): row["amount"] for row in made.earnings()}


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Play]:
    def make(fault: Fault | None = None, **changed: Any) -> Play:
        store, history = trained(tmp_path, fault)
        worker = "0x" + load_or_create(tmp_path / "worker.key").address.hex()
        return Play(store, history, worker, {"rate": ALWAYS, "forced_rate": 0, **changed})

    return make


FORGED = Fault(kind="rate", step=1)


def test_a_rejected_segment_pays_who_flagged_it_and_is_not_committed_again(play: Callable[..., Play]) -> None:
    made = play(FORGED)
    first = made.settle(*made.everybody)
    assert first.state.finalised == 0
    assert "has to decide" in made.told[-1]
    forged = first.committed()[0]
    made.model.send(COURT, "resolve", made.terms, forged.segment, True, NATIVE)
    again = made.settle(*made.everybody)
    assert any("train the run anew" in line for line in made.told)
    assert again.state.committed == 0
    slashed = made.terms.operator_bond
    found = earned(again)
    assert found["operator", "bonds slashed"] == -slashed
    assert found["verifier", "verdicts"] == slashed * made.terms.reporter_share // 100
    harm = slashed * made.terms.harmed_share // 100
    assert harm - 8 <= found["worker", "work in rejected segments"] <= harm
    before = again.earnings()
    assert made.settle(*made.everybody).earnings() == before


def test_the_culprits_own_work_is_not_compensated(play: Callable[..., Play]) -> None:
    made = play(FORGED)
    first = made.settle(*made.everybody)
    made.model.send(COURT, "resolve", made.terms, first.committed()[0].segment, True, made.worker)
    found = earned(made.settle(*made.everybody))
    assert ("worker", "work in rejected segments") not in found
    assert found["operator", "bonds slashed"] == -(made.terms.operator_bond + made.terms.worker_bond)


def test_a_court_that_says_nothing_in_time_stops_nobody(play: Callable[..., Play]) -> None:
    made = play(FORGED)
    first = made.settle(*made.everybody)
    assert first.state.finalised == 0
    made.model.wait(made.model.now()[1] + made.terms.dispute)
    later = made.settle(*made.everybody)
    assert (later.state.finalised, later.state.status) == (2, Status.CLOSED)


def test_an_operator_that_goes_loses_its_segments_and_may_come_back(play: Callable[..., Play]) -> None:
    made = play()
    others = (SUBMITTER, VERIFIER, made.worker)
    whole = made.seen_by(*made.everybody)
    whole.open()
    whole.commit()
    first = made.settle(*others)
    assert "its operator has to open it" in made.told[-1]
    made.model.wait(made.model.now()[1] + made.terms.answer)
    assert made.settle(*made.everybody).state.finalised == 0
    assert "the time to open it is over" in made.told[-1]
    made.settle(*others)
    assert Outcome(made.model.read("outcome_of", made.terms, first.ever()[0].segment)) == Outcome.REJECTED
    assert any("did not open it in time" in line for line in made.told)
    back = made.settle(*made.everybody)
    assert any("made whole again" in line for line in made.told)
    assert (back.state.finalised, back.state.status) == (2, Status.CLOSED)
    assert len(back.ever()) == 4


def test_a_bond_comes_back_after_its_time(play: Callable[..., Play]) -> None:
    made = play()
    done = made.settle(*made.everybody)
    back, free = done.leave(Role.VERIFIER, VERIFIER, wait=False)
    assert back == 0
    assert free > made.model.now()[1]
    assert done.leave(Role.VERIFIER, VERIFIER, wait=True) == (made.terms.verifier_bond, free)
    with pytest.raises(UsageError, match="expected a bond"):
        done.leave(Role.VERIFIER, VERIFIER, wait=True)
    assert done.leave(Role.OPERATOR, OPERATOR, wait=True)[0] == made.terms.operator_bond


def test_a_beacon_that_is_forgotten_is_chosen_anew(play: Callable[..., Play]) -> None:
    made = play()
    forgotten: list[int] = []

    def beacon(block: int) -> bytes:
        if len(forgotten) < 3 and block not in forgotten:
            forgotten.append(block)
        return bytes(32) if block in forgotten else sha256(b"%d" % block).digest()

    made.model.beacon = beacon
    assert made.settle(*made.everybody).state.status == Status.CLOSED
    assert len(forgotten) == 3


def test_a_token_has_to_be_deposited_by_hand(play: Callable[..., Play]) -> None:
    made = play(token=STRANGER)
    with pytest.raises(UsageError, match="approve the ledger and deposit the rest"):
        made.settle(*made.everybody)
