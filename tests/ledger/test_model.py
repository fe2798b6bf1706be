"""The model alone, path by path: what docs/ledger.md says a run, a segment, a verdict and a demand go through."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest

from ledger.model import Model
from ledger.payouts import SumTree
from ledger.port import BURN, NATIVE, Commitment, Leaf, Outcome, Refused, Role, Run, Segment, Status, Tree
from ledger.rules import DELAY
from ledger.secrets import Chain, committed_form, delegation, forced, record_seal, verdict_seal
from storage import merkle
from storage.identity import Identity
from storage.records import SegmentRecord

SUBMITTER, OPERATOR, COURT, VERIFIER, OTHER, ADA, BEN = (f"0x{number + 1:040x}" for number in range(7))
PEOPLE = (SUBMITTER, OPERATOR, COURT, VERIFIER, OTHER, ADA, BEN)
TOKEN = "0x" + "70" * 20
RICH = 100_000
ALWAYS = (1 << 32) - 1
CHAIN = Chain(sha256(b"operator").digest(), 40)
SALT = sha256(b"salt").digest()
START = sha256(b"state 0").digest()
RECORD = b"the RunRecord"


def terms(**changed: Any) -> Run:
    made = Run(
        record=sha256(RECORD).digest(),
        initial_state=START,
        submitter=SUBMITTER,
        operator=OPERATOR,
        court=COURT,
        beacon="0x" + "be" * 20,
        segments=3,
        tensors=2,
        work=10,
        price=10,
        operator_fee=7,
        verifier_fee=5,
        operator_bond=1000,
        worker_bond=200,
        verifier_bond=60,
        flag_bond=20,
        pot=150,
        jackpot=100,
        rate=ALWAYS,
        forced_rate=0,
        verifiers=1,
        reporter_share=30,
        harmed_share=50,
        miss_penalty=10,
        window=100,
        answer=50,
        dispute=80,
    )
    return replace(made, **changed)


@dataclass
class Play:
    """A run that has begun, with a verifier and two workers, and what its operator knows."""

    run: Run
    model: Model = field(default_factory=lambda: Model(lambda block: sha256(b"%d" % block).digest()))
    tree: SumTree = field(default_factory=lambda: SumTree([(ADA, 40), (BEN, 50)]))
    steps: tuple[bytes, ...] = (b"step 0", b"step 1")
    used: int = 0

    def __post_init__(self) -> None:
        for account in PEOPLE:
            self.model.send(account, "deposit", NATIVE, RICH, value=RICH)
        self.send(SUBMITTER, "open", RECORD)
        self.send(VERIFIER, "join", Role.VERIFIER, 0)
        for account in (ADA, BEN):
            self.send(account, "join", Role.WORKER, 0)
        self.send(OPERATOR, "accept", CHAIN.end)
        self.model.mine(DELAY + 1)
        self.send(OTHER, "begin")

    def send(self, sender: str, function: str, *args: Any, value: int = 0) -> Any:
        events = self.model.send(sender, function, self.run, *args, value=value)
        self.model.check()
        return events

    def refused(self, error: str, sender: str, function: str, *args: Any, value: int = 0) -> None:
        before = everything(self.model)
        with pytest.raises(Refused) as caught:
            self.model.send(sender, function, self.run, *args, value=value)
        assert caught.value.error == error
        assert everything(self.model) == before

    def balance(self, account: str) -> int:
        return int(self.model.read("balance_of", NATIVE, account))

    def commit(self, *, lie: bool | None = None) -> Segment:
        """The next segment; where its record had to be false it is, unless `lie` says otherwise."""
        book = self.model.runs[self.run.id]
        secret = CHAIN.secret(self.used + book.committed - book.opened + 1)
        due = forced(secret, book.beacon, book.committed, book.attempt, self.run.forced_rate)
        record = SegmentRecord(
            run=self.run.record,
            index=book.committed,
            first_step=0,
            steps=2,
            prestate=book.state,
            poststate=sha256(book.state).digest(),
            steps_root=merkle.list_root(self.steps),
            receipts_root=START,
            previous=START,
            steps_object=START,
            receipts_object=START,
        )
        true = sha256(committed_form(record)).digest()
        false = committed_form(replace(record, steps_object=bytes(32)))
        given = false if (due if lie is None else lie) else committed_form(record)
        seal = record_seal(true, SALT)
        commitment = Commitment(record=given, work=9, payout_root=self.tree.root, payout=90, seal=seal)
        (event,) = self.send(OPERATOR, "commit", (commitment,))
        return event.args["data"]  # type: ignore[no-any-return]

    def draw(self, segment: Segment) -> None:
        self.model.mine(DELAY + 1)
        self.send(OTHER, "draw", segment)

    def committed(self, **how: Any) -> Segment:
        segment = self.commit(**how)
        self.draw(segment)
        return segment

    def to(self, segment: Segment, seconds: int) -> None:
        """To so many seconds after the start of the segment's windows."""
        start = self.model.segments[segment.name].start
        assert start is not None
        self.model.wait(start + seconds)

    def seal(self, segment: Segment, account: str, ok: bool) -> None:
        self.send(account, "seal", segment, verdict_seal(segment.name, account, ok, START, SALT))

    def judge(self, segment: Segment, **verdicts: bool) -> None:
        """These accounts seal and reveal their verdicts, with the right witness; then the window is over."""
        accounts = {"verifier": VERIFIER, "other": OTHER, "ada": ADA}
        for name, ok in verdicts.items():
            self.seal(segment, accounts[name], ok)
        self.to(segment, 50)
        for name, ok in verdicts.items():
            self.send(accounts[name], "reveal", segment, ok, START, SALT)
        self.to(segment, 100)

    def unseal(self, segment: Segment) -> None:
        self.send(OPERATOR, "unseal", segment, *self.opening(segment))
        self.used += 1

    def opening(self, segment: Segment) -> tuple[bytes, bytes, bytes, bytes]:
        record = SegmentRecord(
            run=self.run.record,
            index=segment.index,
            first_step=0,
            steps=2,
            prestate=segment.prestate,
            poststate=segment.poststate,
            steps_root=segment.steps_root,
            receipts_root=START,
            previous=START,
            steps_object=START,
            receipts_object=START,
        )
        return CHAIN.secret(self.used + 1), START, sha256(committed_form(record)).digest(), SALT

    def outcome(self, segment: Segment) -> Outcome:
        return Outcome(self.model.read("outcome_of", self.run, segment))

    def settle(self, segment: Segment, account: str) -> int:
        return int(self.send(OTHER, "settle", segment, account)[-1].args["amount"])


def everything(model: Model) -> Any:
    tables = (model.wallets, model.holdings, model.balances, model.accounts, model.runs, model.bonds, model.seats)
    more = (model.line, model.segments, model.verdicts, model.demands, model.claims)
    return [dict(table) for table in (*tables, *more)], model.events()


# -------------------------------------------------------------------------------------------------------- a good run


def test_a_run_from_its_opening_to_its_end() -> None:
    play = Play(terms())
    segments = [play.commit() for _ in range(3)]
    for segment in segments:
        play.draw(segment)
    for segment in segments[:1]:
        play.judge(segment, verifier=True)
    play.to(segments[2], 100)
    for segment in segments:
        play.unseal(segment)
        play.send(OTHER, "finalise", segment)
    assert [play.settle(segment, VERIFIER) for segment in segments] == [5, -6, -6]
    for leaf in range(2):
        play.send(OTHER, "claim", segments[0], *play.tree.prove(leaf).arguments())
    assert (play.balance(ADA), play.balance(BEN)) == (RICH - 200 + 40, RICH - 200 + 50)
    play.refused("Already", OTHER, "claim", segments[0], *play.tree.prove(0).arguments())
    assert play.balance(OPERATOR) == RICH - 1000 + 3 * 7
    play.refused("TooEarly", OTHER, "close")
    play.model.wait(play.model.time + 50 + 80)
    (closed,) = play.send(OTHER, "close")
    assert closed.args["refund"] == 3 * (100 + 7 + 5) + 150 - 3 * (90 + 7) - 5
    play.send(OPERATOR, "resign", Role.OPERATOR)
    play.model.wait(play.model.time + play.model.unbonding)
    play.send(OTHER, "release", Role.OPERATOR, OPERATOR)
    assert play.balance(OPERATOR) == RICH + 21
    assert play.balance(BURN) == 12


def test_a_refused_call_changes_nothing_not_even_what_was_sent_along() -> None:
    play = Play(terms())
    play.refused("Already", ADA, "join", Role.WORKER, 0, value=500)
    play.refused("WrongStatus", OPERATOR, "accept", CHAIN.end, value=1000)
    play.refused("NotAllowed", OTHER, "commit", ())
    with pytest.raises(ValueError, match="begin: expected a function of ILedger, payable"):
        play.model.send(OTHER, "begin", play.run, value=1)
    with pytest.raises(ValueError, match="expected one of account_of"):
        play.model.read("runs")


# ------------------------------------------------------------------------------------------------------ forced errors


def test_a_forced_error_pays_those_who_flag_it_and_costs_those_who_do_not() -> None:
    play = Play(terms(forced_rate=ALWAYS))
    segment = play.committed()
    play.judge(segment, verifier=True, other=False, ada=False)
    play.unseal(segment)
    assert play.model.segments[segment.name].forced
    play.send(OTHER, "finalise", segment)
    assert play.outcome(segment) == Outcome.FINAL
    assert play.model.runs[play.run.id].pot == 150 - 2 * 50
    assert [play.settle(segment, account) for account in (VERIFIER, OTHER, ADA)] == [-60, 50, 50]
    assert play.balance(OTHER) == RICH + 50
    play.refused("Already", OTHER, "settle", segment, OTHER)
    left = play.model.bonds[play.run.id, Role.VERIFIER, VERIFIER]
    assert (left.amount, left.left) == (0, play.model.block)


@pytest.mark.parametrize(("rate", "lie"), [(ALWAYS, False), (0, True)], ids=["not made", "made"])
def test_an_operator_that_does_not_do_what_its_secret_says_cannot_open(rate: int, lie: bool) -> None:
    play = Play(terms(forced_rate=rate))
    segment = play.committed(lie=lie)
    play.to(segment, 100)
    secret, witness, record, salt = play.opening(segment)
    play.refused("BadSeal", OPERATOR, "unseal", segment, secret, witness, record, salt)
    play.refused("BadSeal", OPERATOR, "unseal", segment, secret, witness, segment.record, salt)
    play.refused("BadSecret", OPERATOR, "unseal", segment, witness, witness, record, salt)
    play.refused("TooEarly", OTHER, "forfeit", segment)
    play.to(segment, 150)
    play.refused("TooLate", OPERATOR, "unseal", segment, secret, witness, record, salt)
    play.send(OTHER, "forfeit", segment)
    assert play.outcome(segment) == Outcome.REJECTED
    play.refused("Insufficient", OPERATOR, "commit", ())


# ---------------------------------------------------------------------------------------------------------- rejection


def test_a_segment_that_the_court_rejects_drops_those_after_it_and_pays_the_harmed() -> None:
    play = Play(terms())
    bad, after = play.commit(), play.commit()
    play.draw(bad)
    play.judge(bad, verifier=False, other=False)
    play.unseal(bad)
    play.refused("StillOpen", OTHER, "finalise", bad)
    play.refused("NotAllowed", OTHER, "resolve", bad, True, BEN)
    (event,) = play.send(COURT, "resolve", bad, True, BEN)
    assert event.args["slashed"] == 1000 + 200
    assert (play.outcome(bad), play.outcome(after)) == (Outcome.REJECTED, Outcome.DROPPED)
    assert [play.settle(bad, account) for account in (VERIFIER, OTHER)] == [180, 180]
    play.send(OTHER, "compensate", bad, *play.tree.prove(0).arguments())
    assert play.balance(ADA) == RICH - 200 + 600 * 40 // 90
    play.refused("NotAllowed", OTHER, "compensate", bad, *play.tree.prove(1).arguments())
    play.refused("NotAllowed", OTHER, "claim", bad, *play.tree.prove(0).arguments())
    assert play.balance(BURN) == 1200 - 360 - 600
    play.send(OPERATOR, "join", Role.OPERATOR, 0)
    again = play.commit()
    assert (again.index, again.attempt, again.prestate) == (0, 1, START)


def test_flags_that_the_court_dismisses_cost_their_bonds() -> None:
    play = Play(terms())
    segment = play.committed()
    play.judge(segment, verifier=True, other=False)
    play.unseal(segment)
    play.send(COURT, "resolve", segment, False, NATIVE)
    play.refused("Already", COURT, "resolve", segment, True, NATIVE)
    play.send(OTHER, "finalise", segment)
    assert [play.settle(segment, account) for account in (VERIFIER, OTHER)] == [5, -20]


def test_a_silent_court_costs_nobody_who_judged() -> None:
    play = Play(terms())
    segment = play.committed()
    play.judge(segment, verifier=False, other=True)
    play.unseal(segment)
    play.model.wait(play.model.time + 80)
    play.refused("TooLate", COURT, "resolve", segment, True, NATIVE)
    play.send(OTHER, "finalise", segment)
    assert [play.settle(segment, account) for account in (VERIFIER, OTHER)] == [0, 0]
    assert play.balance(OTHER) == RICH


def test_without_verifiers_and_forced_errors_nothing_is_drawn_or_opened() -> None:
    play = Play(terms(verifiers=0))
    segment = play.commit()
    play.refused("BadTerms", OTHER, "draw", segment)
    play.judge(segment, other=False)
    play.refused("BadTerms", OPERATOR, "unseal", segment, *play.opening(segment))
    play.send(COURT, "resolve", segment, True, NATIVE)
    assert play.outcome(segment) == Outcome.REJECTED


# ------------------------------------------------------------------------------------------------------------ demands


def leaf_of(items: tuple[bytes, ...], place: int) -> tuple[bytes, int, int, bytes, tuple[bytes, ...]]:
    hashes = [merkle.leaf_hash(item) for item in items]
    return merkle.root(hashes), place, len(items), items[place], merkle.inclusion_proof(hashes, place)


def test_a_demand_that_is_answered_costs_its_bond() -> None:
    play = Play(terms())
    segment = play.committed()
    play.send(OTHER, "demand", segment, Tree.STEPS, 1, Leaf())
    play.refused("Already", BEN, "demand", segment, Tree.STEPS, 1, Leaf())
    play.refused("BadProof", BEN, "demand", segment, Tree.STEPS, 2, Leaf())
    root, index, count, data, proof = leaf_of(play.steps, 1)
    play.refused("BadProof", OTHER, "answer", segment, root, index, count, b"another", proof)
    play.send(BEN, "answer", segment, root, index, count, data, proof)
    assert (play.balance(OTHER), play.balance(OPERATOR)) == (RICH - 20, RICH - 1000 + 20)
    play.refused("Unknown", OTHER, "withheld", segment, root, index, count)


def test_a_demand_that_is_not_answered_rejects_the_segment() -> None:
    play = Play(terms())
    segment = play.committed()
    play.send(OTHER, "demand", segment, Tree.STEPS, 1, Leaf())
    play.send(BEN, "demand", segment, Tree.STATE, 0, Leaf())
    root = segment.steps_root
    play.refused("TooEarly", OTHER, "withheld", segment, root, 1, 2)
    play.to(segment, 100)
    play.unseal(segment)
    play.refused("StillOpen", OTHER, "finalise", segment)
    play.send(ADA, "withheld", segment, root, 1, 2)
    assert play.outcome(segment) == Outcome.REJECTED
    assert play.balance(OTHER) == RICH + 300
    play.send(ADA, "withheld", segment, segment.poststate, 0, 2)
    assert play.balance(BEN) == RICH - 200
    assert play.model.runs[play.run.id].opened == 0


# --------------------------------------------------------------------------------------------------- keys and tokens


def signature(model: Model, key: Identity, account: str, deadline: int) -> bytes:
    signed = key.sign(delegation(model.chain_id, model.address, account, deadline))
    return signed[:64] + bytes([signed[64] + 27])


def test_a_key_acts_for_its_account_and_moves_only_its_own_money() -> None:
    play, key = Play(terms()), Identity(sha256(b"key").digest())
    model, hot = play.model, "0x" + key.address.hex()
    model.send(OPERATOR, "delegate", hot, model.time + 1, signature(model, key, OPERATOR, model.time + 1))
    assert model.read("account_of", hot) == OPERATOR
    for error, account, deadline in [("TooLate", ADA, model.time), ("Already", ADA, model.time + 1)]:
        with pytest.raises(Refused, match=error):
            model.send(account, "delegate", hot, deadline, signature(model, key, account, deadline))
    with pytest.raises(Refused, match="BadSignature"):
        model.send(ADA, "delegate", hot, model.time + 1, signature(model, key, BEN, model.time + 1))
    segment = play.committed()
    seal = verdict_seal(segment.name, OPERATOR, True, START, SALT)
    play.refused("Insufficient", hot, "seal", segment, seal)
    play.send(hot, "seal", segment, seal, value=25)
    assert (play.balance(hot), play.balance(OPERATOR)) == (5, RICH - 1000)
    play.to(segment, 100)
    play.send(hot, "unseal", segment, *play.opening(segment))
    play.send(hot, "finalise", segment)
    assert play.settle(segment, OPERATOR) == 0
    assert play.balance(OPERATOR) == RICH - 1000 + 7 + 20


def test_a_token_that_keeps_a_fee_is_refused_and_a_cap_holds() -> None:
    model = Model(lambda block: bytes(32), cap=1000)
    model.mint(TOKEN, ADA, 500)
    model.fees[TOKEN] = 1
    with pytest.raises(Refused, match=r"NotArrived\(100, 99\)"):
        model.send(ADA, "deposit", TOKEN, 100)
    model.fees[TOKEN] = 0
    model.send(ADA, "deposit", TOKEN, 500)
    with pytest.raises(Refused, match="TransferFailed"):
        model.send(ADA, "deposit", TOKEN, 1)
    with pytest.raises(Refused, match=r"CapExceeded\(1000\)"):
        model.send(ADA, "deposit", NATIVE, 1001, value=1001)
    with pytest.raises(Refused, match=r"Insufficient\(501, 500\)"):
        model.send(ADA, "withdraw", TOKEN, 501, BEN)
    model.send(ADA, "withdraw", TOKEN, 500, BEN)
    assert model.wallets[TOKEN, BEN] == 500
    assert model.read("held", TOKEN) == 0
    model.check()


# --------------------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize(
    ("term", "changed"),
    [
        ("segments", {"segments": 0}),
        ("work", {"work": 0}),
        ("verifiers", {"verifiers": 9}),
        ("shares", {"reporter_share": 60, "harmed_share": 41}),
        ("missPenalty", {"miss_penalty": 101}),
        ("window", {"window": 1}),
        ("answer", {"answer": 0}),
        ("dispute", {"dispute": 0}),
        ("flagBond", {"flag_bond": 0}),
        ("unbonding", {"dispute": 1 << 31}),
        ("submitter", {"submitter": NATIVE}),
        ("operator", {"operator": NATIVE}),
        ("court", {"court": NATIVE}),
        ("beacon", {"beacon": NATIVE}),
        ("jackpot", {"jackpot": 151}),
        ("rate", {"rate": 0}),
        ("escrow", {"price": 1 << 95, "work": 1 << 63}),
    ],
)
def test_terms_that_no_run_may_have(term: str, changed: dict[str, Any]) -> None:
    run, model = terms(**changed), Model(lambda block: bytes(32))
    with pytest.raises(Refused, match=rf"BadTerms\({term}\)"):
        model.send(run.submitter, "open", run, RECORD)
    assert not model.runs


def test_a_beacon_that_is_forgotten_is_chosen_anew() -> None:
    beacons: dict[int, bytes] = {}
    model = Model(lambda block: beacons.get(block, bytes(32)))
    run = terms(pot=0, jackpot=0, price=0, operator_fee=0, verifier_fee=0, operator_bond=0)
    model.send(SUBMITTER, "open", run, RECORD)
    model.send(OPERATOR, "accept", run, CHAIN.end)
    with pytest.raises(Refused, match="TooEarly"):
        model.send(OTHER, "begin", run)
    model.mine(DELAY + 1)
    (event,) = model.send(OTHER, "begin", run)
    assert (event.name, event.args["block_number"]) == ("Rearmed", model.block + DELAY)
    beacons[model.block + DELAY] = START
    model.mine(DELAY + 1)
    (event,) = model.send(OTHER, "begin", run)
    assert event.args["beacon"] == START
    assert model.runs[run.id].status == Status.ACTIVE


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model, run: model.balances.__setitem__((NATIVE, ADA), 10**9),
        lambda model, run: model.runs.__setitem__(run, replace(model.runs[run], committed=1)),
        lambda model, run: model.runs.__setitem__(run, replace(model.runs[run], escrow=-1)),
        lambda model, run: model.holdings.__setitem__(NATIVE, 0),
    ],
    ids=["balance", "line", "escrow", "holdings"],
)
def test_the_invariants_notice_wrong_books(spoil: Callable[[Model, bytes], None]) -> None:
    play = Play(terms())
    spoil(play.model, play.run.id)
    with pytest.raises((AssertionError, KeyError)):
        play.model.check()


# --------------------------------------------------------------------------------------------------------------- views


def test_views_answer_zero_for_what_is_unknown_as_the_contract_does() -> None:
    model, run = Model(lambda block: bytes(32)), terms()
    read = model.read
    assert (read("run_of", run.id).status, read("run_of", run.id).state) == (Status.NONE, bytes(32))
    assert (read("bond_of", run.id, Role.WORKER, ADA).exists, read("seat_of", run.id, 0).account) == (False, NATIVE)
    assert (read("segment_of", run.id).outcome, read("verdict_of", run.id, ADA).mark) == (Outcome.UNKNOWN, bytes(28))
    assert (read("demand_of", run.id).until, read("claimed", run.id, 0)) == (0, False)
    assert (read("cap"), read("UNBONDING"), read("DELAY")) == (model.limit, model.unbonding, DELAY)


def test_views_follow_a_run() -> None:
    play = Play(terms())
    segment = play.committed()
    play.seal(segment, VERIFIER, False)
    read, run = play.model.read, play.run
    assert read("assigned_of", run, segment) == (VERIFIER,)
    assert read("run_of", run.id).committed == 1
    assert read("segment_of", segment.name).drawn == 1
    assert read("verdict_of", segment.name, VERIFIER).assigned
    assert read("forced", run, 0, 0, START) is False
    for function, args in [("forced", (0, 0, START)), ("assigned_of", (segment,))]:
        with pytest.raises(Refused, match="Unknown"):
            read(function, terms(forced_rate=ALWAYS), *args)
    play.send(OTHER, "demand", segment, Tree.STEPS, 1, Leaf())
    demand = play.model.events()[-1].args["demand"]
    assert (read("demand_of", demand).account, read("demand_of", demand).until) == (OTHER, play.model.time + 50)
    assert play.model.now() == (play.model.block, play.model.time)
    assert play.model.events(play.model.block) == tuple(
        event for event in play.model.events() if event.block == play.model.block
    )
