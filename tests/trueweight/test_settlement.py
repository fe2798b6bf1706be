"""Settlement over the in-memory ledger: courts, rejections, operators who go, bonds that come back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ledger.model import Model
from ledger.port import NATIVE, Event, Outcome, Refused, Role, Run, Status, Tree
from ledger.rules import escrow
from runtime.executors import reference
from runtime.faults import Fault, faulty_builder
from runtime.groups import LocalGroup
from runtime.segments import History
from runtime.testing import plan_for, remembered, tiny_job, train
from runtime.tracing import traced_builder
from runtime.worker import worker_builder
from storage.errors import UsageError
from storage.identity import load_or_create
from storage.store import OBJECTS, Store, hashed_key, memory_store
from trueweight.demands import Demand, Wanted
from trueweight.parties import Parties
from trueweight.run_terms import default_terms
from trueweight.settlement import Committed, Settlement
from verification.replay import Replay

SUBMITTER, OPERATOR, COURT, VERIFIER, STRANGER = (f"0x{n:040x}" for n in range(1, 6))
ALWAYS = 2**32 - 1


def trained(keys: Path, fault: Fault | None) -> tuple[Store, History]:
    store = memory_store()
    job = tiny_job(store, steps=4)
    group = LocalGroup(faulty_builder(remembered, [fault] if fault else []))
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

    def seen_by(self, *accounts: str, keys: Mapping[str, str] | None = None) -> Settlement:
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
            keys=keys or {},
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


@pytest.mark.parametrize("within_the_call", [False, True], ids=["before the call", "until its block"])
@pytest.mark.parametrize(("step", "lost"), [("seal", 2), ("reveal", 4)])
def test_a_verifier_that_is_too_late_ends_no_settlement(
    play: Callable[..., Play], step: str, lost: int, within_the_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replay, or the block that its transaction waits for, took until its time was over."""
    made = play(verifiers=1, window=4)
    in_time, send = Settlement._in_time, made.model.send

    def slow(settlement: Settlement, one: Committed, account: str, which: str, *rest: Any) -> bool:
        if which == step and not within_the_call:
            made.model.wait(made.model.now()[1] + lost)
        return in_time(settlement, one, account, which, *rest)

    def slow_send(sender: str, function: str, *args: Any, value: int = 0) -> tuple[Event, ...]:
        if function == step:
            assert within_the_call, "nothing is sent that is too late already"
            made.model.wait(made.model.now()[1] + lost)
        return send(sender, function, *args, value=value)

    monkeypatch.setattr(Settlement, "_in_time", slow)
    monkeypatch.setattr(made.model, "send", slow_send)
    ended = made.settle(*made.everybody)
    assert (ended.state.status, ended.state.finalised) == (Status.CLOSED, 2)
    assert [line for line in made.told if "too late" in line] == [
        f"segment {index}: too late for {VERIFIER} to {step} a verdict; its bond pays for it" for index in range(2)
    ]
    assert earned(ended)["verifier", "bond lost"] == -2 * (made.terms.verifier_bond * made.terms.miss_penalty // 100)


def test_other_refusals_of_a_verdict_end_it_while_the_segment_is_pending(
    play: Callable[..., Play], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = play(verifiers=1)
    send = made.model.send

    def refuse(sender: str, function: str, *args: Any, value: int = 0) -> tuple[Event, ...]:
        if function == "seal":
            raise Refused("Already", call=function)
        return send(sender, function, *args, value=value)

    monkeypatch.setattr(made.model, "send", refuse)
    judging = made.seen_by(*made.everybody)
    judging.open()
    judging.commit()
    with pytest.raises(Refused, match="Already"):
        judging.judge()
    pending = iter([Outcome.PENDING] * 2)  # as both segments are when it begins
    monkeypatch.setattr(Settlement, "_outcome", lambda *_: next(pending, Outcome.REJECTED))
    judging.judge()
    assert [line for line in made.told if "decided" in line] == [
        f"segment {index}: decided before {VERIFIER} could seal a verdict" for index in range(2)
    ]


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


def test_a_token_is_deposited_as_far_as_it_is_lacking(play: Callable[..., Play]) -> None:
    made = play(token=STRANGER)
    with pytest.raises(UsageError, match="got 0; send it the rest"):
        made.settle(*made.everybody)
    for account in made.everybody:
        made.model.mint(STRANGER, account, 10**18)
    made.model.send(SUBMITTER, "deposit", STRANGER, 1000)
    done = made.settle(*made.everybody)
    assert done.state.status == Status.CLOSED
    deposited = [e.args["amount"] for e in made.model.events() if e.name == "Deposited" and e.args["token"] == STRANGER]
    assert deposited[:2] == [1000, escrow(made.terms) + made.terms.pot - 1000]
    assert made.model.held(NATIVE) == 0
    assert "deposited" in made.told[0]


def test_hot_keys_do_what_they_may_and_say_what_their_accounts_have_to(play: Callable[..., Play]) -> None:
    made = play()
    hot = {OPERATOR: "0x" + "a1" * 20, VERIFIER: "0x" + "a2" * 20}
    for account, key in hot.items():
        made.model.accounts[key] = account  # as `delegate` leaves it
    there = made.seen_by(*hot.values(), keys=hot)
    made.seen_by(SUBMITTER, made.worker).open()
    there.open()
    (line,) = (line for line in made.told if "ledger accept RUN" in line)
    cold = made.seen_by(OPERATOR, VERIFIER)
    cold.accept(bytes.fromhex(line.split()[-1]))
    cold.open()
    for part in (there.open, there.commit, there.judge, there.finalise, there.pay, there.close):
        part()
        made.model.check()
    assert there.state.status == Status.CLOSED
    assert earned(there)["verifier", "verdicts"] > 0


def test_an_operator_answers_while_it_waits_and_loses_what_it_cannot_show(play: Callable[..., Play]) -> None:
    made = play(verifiers=0, window=3600, answer=7200)
    whole = made.seen_by(*made.everybody)
    whole.open()
    whole.commit()
    first, second = whole.committed()

    def ask(one: Committed, tree: Tree, index: int) -> Demand:
        wanted = Wanted.of(whole.history, whole.terms, one.record, tree, index, "")
        return whole.demand(VERIFIER, one, wanted)

    ask(first, Tree.STATE, 1)
    lost = ask(second, Tree.STEPS, 1)
    assert [str(each) for each in whole.demands()] == [
        f"segment 0: leaf 1 of {made.terms.tensors} of state",
        "segment 1: leaf 1 of 2 of steps",
    ]
    listed = second.record.steps_object
    steps = made.store.get(listed)
    made.store.objects.delete(hashed_key(OBJECTS, listed))
    made.settle(SUBMITTER, VERIFIER)
    assert "its operator has to answer it" in made.told[-1]
    made.settle(OPERATOR)
    assert any("answered with" in line for line in made.told)
    assert any("unless `trueweight ledger answer` can" in line for line in made.told)
    made.model.wait(lost.until)
    assert made.settle(OPERATOR).state.finalised == 1
    assert "the time to answer is over" in made.told[-1]
    made.settle(SUBMITTER, VERIFIER)
    assert Outcome(made.model.read("outcome_of", made.terms, second.segment)) == Outcome.REJECTED
    found = earned(whole)
    assert found["demander", "data withheld"] == made.terms.operator_bond * made.terms.reporter_share // 100
    assert found["operator", "demands answered"] == made.terms.flag_bond
    made.store.put(steps)
    assert made.settle(*made.everybody).state.status == Status.CLOSED
