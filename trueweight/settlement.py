"""A run on a ledger, from escrow to payout. Every step looks first what is there, so any of them can be repeated.

    open -> accept -> begin -> join -> commit -> draw -> seal -> reveal -> unseal -> finalise -> settle, claim -> close

Who plays a part is whose key is here: on an embedded chain everybody, else perhaps only the operator or a verifier, or
a hot key of theirs, which may commit, judge, open and answer, and moves none of their money.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

from ledger.payouts import Payouts, Work, payouts
from ledger.port import NATIVE, Account, Commitment, Event, Ledger, Outcome, Refused, Role, Run, Segment, Status
from ledger.rules import DELAY, NOBODY, escrow, is_opened
from ledger.secrets import Chain, committed_form, forced, record_seal, shadow, verdict_seal
from runtime.program.training import TrainingProgram
from runtime.segments import History
from storage.codec import decode, encode
from storage.errors import FailureError, UsageError
from storage.records import Receipt, SegmentRecord
from trueweight.demands import Demand, Wanted, answer_to, open_demands
from trueweight.earnings import earned
from trueweight.parties import Parties
from verification.audit import Diverged, Inconclusive, audit_segment
from verification.replay import Replay
from verification.verdicts import witness

BATCH = 8
"""Segments committed in one transaction."""

MakeReplay = Callable[[bool], Replay]
"""A replay of the run, traced or not."""


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A segment as the ledger has it."""

    segment: Segment
    record: SegmentRecord


@dataclass(kw_only=True)
class Settlement:
    """One run of a store on one ledger, under `terms`."""

    ledger: Ledger
    history: History
    terms: Run
    parties: Parties
    replay: MakeReplay
    tell: Callable[[str], None] = lambda _: None
    _program: TrainingProgram = field(init=False)
    _witnesses: dict[bytes, bytes] = field(init=False, default_factory=dict)
    _seen: list[Event] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._program = TrainingProgram.decode(self.history.store.get(self.history.run.programs))

    # ------------------------------------------------------------------------------------------------- what is there

    @property
    def state(self) -> Any:
        """The ledger's RunState."""
        return self.ledger.read("run_of", self.terms.id)

    def ever(self) -> list[Committed]:
        """All segments that were ever committed, rejected and dropped ones too, in that order."""
        return [
            Committed(segment=event.args["data"], record=decode(SegmentRecord, event.args["record"]))
            for event in self._events()
            if event.name == "Committed" and event.args["id"] == self.terms.id
        ]

    def committed(self) -> list[Committed]:
        """The segments of the run that are pending or final, in order."""
        found, stop = {one.record.index: one for one in self.ever()}, self.state.committed
        return [found[index] for index in sorted(found) if index < stop]

    def payouts(self, record: SegmentRecord) -> Payouts:
        """What the receipts of a segment earn."""
        receipts = [decode(Receipt, item) for item in self.history.items(record.receipts_object)]
        return payouts(receipts, self._work(record), self.terms.price)

    def _work(self, record: SegmentRecord) -> Work:
        return Work(
            run=self.history.run_digest,
            first_step=record.first_step,
            steps=record.steps,
            micro_batches=self._program.micro_batches,
            blocks=len(self._program.blocks),
        )

    def _do(self, sender: Account, function: str, *args: Any, value: int = 0) -> None:
        self.ledger.send(sender, function, self.terms, *args, value=value)

    def _cover(self, account: Account, need: int) -> int:
        """What has to be sent along so that the account's balance covers `need`; an ERC-20 is deposited beforehand."""
        token = self.terms.token
        missing = max(need - int(self.ledger.read("balance_of", token, account)), 0)
        if token == NATIVE or not missing:
            return missing
        self.ledger.approve(account, token, missing)
        self.ledger.send(account, "deposit", token, missing)
        self.tell(f"{account} deposited {missing} of token {token}")
        return 0

    # --------------------------------------------------------------------------------------------------------- opening

    def open(self) -> None:
        """Escrow by the submitter, the operator's bond and chain of secrets, the run's beacon, everybody's bonds."""
        terms, parties = self.terms, self.parties
        if self.state.status == Status.NONE:
            if not parties.has(terms.submitter):
                raise UsageError(f"run {self.history.name}: not on the ledger; its submitter opens it first")
            need = escrow(terms) + terms.pot
            self._do(terms.submitter, "open", encode(self.history.run), value=self._cover(terms.submitter, need))
            self.tell(f"escrow opened by the submitter: {need} for {terms.segments} segments")
        if self.state.status == Status.OPEN and parties.has(terms.operator):
            self.accept(self.chain_end)
        elif self.state.status == Status.OPEN and parties.acts(terms.operator):
            end = self.chain_end.hex()
            self.tell(f"its operator's account has to accept the run: trueweight ledger accept RUN --chain {end}")
        while self.state.status == Status.ACTIVE and not self.state.begun:
            self._await_block(self.state.beacon_block)
            self._do(self.anybody(), "begin")
        for role, accounts, bond in (
            (Role.WORKER, parties.workers, terms.worker_bond),
            (Role.VERIFIER, parties.verifiers, terms.verifier_bond),
        ):
            for account in accounts:
                self.join(role, account, bond)

    def accept(self, chain: bytes) -> None:
        """The operator's bond; `chain` is the end of the chain of secrets of the key that will open the segments."""
        operator, bond = self.terms.operator, self.terms.operator_bond
        self._do(operator, "accept", chain, value=self._cover(operator, bond))
        self.tell(f"accepted by the operator, bond {bond}")

    def leave(self, role: Role, account: Account, *, wait: bool) -> tuple[int, int]:
        """(what came back of an account's bond, when it can be had); the clock of that is begun where it was not."""
        bond = self.ledger.read("bond_of", self.terms.id, role, account)
        if not bond.exists:
            raise UsageError(
                f"{role.name.lower()} {account}: expected a bond in this run, got none; `trueweight stake` puts one up"
            )
        if not bond.release_at:
            self._do(account, "resign", role)
            bond = self.ledger.read("bond_of", self.terms.id, role, account)
        if wait:
            self.ledger.wait(bond.release_at)
        if self.ledger.now()[1] < bond.release_at:
            return 0, bond.release_at
        self._do(account, "release", role, account)
        return bond.amount, bond.release_at

    def join(self, role: Role, account: Account, bond: int) -> None:
        """Put an account's bond up, unless it has been; an operator's is made whole again."""
        known = self.ledger.read("bond_of", self.terms.id, role, account)
        if role == Role.OPERATOR:
            bond -= known.amount
        if not self.parties.has(account) or (known.exists and (role != Role.OPERATOR or not bond)):
            return
        seat = self.state.seats if role == Role.VERIFIER else 0
        self._do(account, "join", role, seat, value=self._cover(account, bond))
        if role == Role.OPERATOR:
            self.tell(f"the operator's bond made whole again: {bond} more")
        else:
            self.tell(f"{role.name.lower()} {account} joined, bond {bond}")

    @property
    def chain_end(self) -> bytes:
        """The end of the chain of secrets of the operator's key that is here, its own or a hot one."""
        return self._chain.end

    @cached_property
    def _chain(self) -> Chain:
        return Chain(self.parties.secret(self.terms.operator, b"chain", self.terms.id))

    def anybody(self) -> Account:
        """Somebody whose key is here, for what anybody may do; UsageError where there is no key."""
        for account in self.parties.secrets:
            return account
        raise UsageError(
            "keys: expected one in --keys to send transactions with, got none; `trueweight ledger key ROLE`"
        )

    def _await_block(self, number: int) -> None:
        """Wait until the block is there and another on it."""
        while (now := self.ledger.now())[0] <= number:
            self.ledger.wait(now[1] + 1)

    # ------------------------------------------------------------------------------------------------------ committing

    def commit(self) -> int:
        """Commit what the store has and the ledger has not; how many segments that were.

        A segment that the court rejected is not committed again as it was.
        """
        records, operator = self.history.segments()[: self.terms.segments], self.terms.operator
        done = 0
        while self.state.status == Status.ACTIVE and (first := self.state.committed) < len(records):
            if self._condemned(records[first]):
                self.tell(f"segment {first} was rejected by the court as the store has it; train the run anew")
                break
            if not self.parties.acts(operator):
                self.tell(f"segment {first}: its operator has to commit it")
                break
            self.join(Role.OPERATOR, operator, self.terms.operator_bond)
            batch = [self._commitment(record) for record in records[first : first + BATCH]]
            self._do(self.parties.key(operator), "commit", batch)
            done += len(batch)
            self.tell(f"segments {first} to {first + len(batch) - 1} committed")
        return done

    def _condemned(self, record: SegmentRecord) -> bool:
        digest = sha256(committed_form(record)).digest()
        return any(one.segment.record == digest and self._segment(one).by_court for one in self.ever())

    def _commitment(self, record: SegmentRecord) -> Commitment:
        state, found = self.state, self.payouts(record)
        true = committed_form(record)
        shown = true
        if self.terms.forced_rate and self._forced(record.index, state):
            steps = self.history.items(record.steps_object)
            false, listed = shadow(record, steps, self._secret(record.index, state))
            self.history.store.put(encode(listed))
            shown = encode(false)
        return Commitment(
            record=shown,
            work=found.work,
            payout_root=found.tree.root,
            payout=found.tree.sum,
            seal=record_seal(sha256(true).digest(), self._salt(record.index, state.attempt)),
        )

    def _secret(self, index: int, state: Any) -> bytes:
        """The secret with which a segment will be opened: one for every segment opened before it."""
        names = {one.segment.name for one in self.ever()}
        opened = sum(event.name == "Unsealed" and event.args["segment"] in names for event in self._events())
        return self._chain.secret(opened + index - state.opened + 1)

    def _events(self) -> Sequence[Event]:
        """All events; those of the newest block seen are read again, for it may have had more."""
        last = self._seen[-1].block if self._seen else 0
        self._seen = [event for event in self._seen if event.block < last]
        self._seen += self.ledger.events(last)
        return self._seen

    def _forced(self, index: int, state: Any) -> bool:
        return forced(self._secret(index, state), state.beacon, index, state.attempt, self.terms.forced_rate)

    def _salt(self, index: int, attempt: int) -> bytes:
        return self.parties.secret(
            self.terms.operator, b"seal", self.terms.id, index.to_bytes(4, "big") + attempt.to_bytes(4, "big")
        )

    # -------------------------------------------------------------------------------------------------------- verdicts

    def judge(self) -> None:
        """Draw beacons and verifiers, replay as the verifiers whose keys are here, seal and reveal their verdicts."""
        pending = [one for one in self.committed() if self._outcome(one) == Outcome.PENDING]
        if self.terms.verifiers:
            for one in pending:
                self._draw(one)
        revealed = [(one, found) for one in pending for found in self._seal(one)]
        for one, (account, ok, seen, salt) in revealed:
            start = self._start(one)
            if self._verdict(one, account).revealed:
                continue
            self._watch(start + self.terms.window // 2)
            if self._in_time(one, account, "reveal", start + self.terms.window, ok, seen, salt):
                self.tell(f"segment {one.record.index}: {account} reveals {'match' if ok else 'diverged'}")

    def _draw(self, one: Committed) -> None:
        while not self._segment(one).drawn_at:
            self._await_block((self._segment(one).rearmed or one.segment.block_number) + DELAY)
            self._do(self.anybody(), "draw", one.segment)

    def _seal(self, one: Committed) -> list[tuple[Account, bool, bytes, bytes]]:
        """(account, ok, witness, salt) of each verdict that is sealed."""
        mine = [account for account in self._assigned(one) if self.parties.acts(account)]
        if not mine or self.ledger.now()[1] >= self._start(one) + self.terms.window:
            return []
        records = [known.record for known in self.committed()]
        audited = audit_segment(self.history, self.replay(False), records, one.record.index, lambda _: None)
        if isinstance(audited.verdict, Inconclusive):
            self.tell(f"segment {one.record.index}: inconclusive, so no verdict: {audited.verdict.reason}")
            return []
        ok = not isinstance(audited.verdict, Diverged)
        found = []
        for account in mine:
            seen, salt = self._witness(one), self.parties.secret(account, b"verdict", one.segment.name)
            sealed = verdict_seal(one.segment.name, account, ok, seen, salt)
            known = any(self._verdict(one, account).mark)
            until = self._start(one) + self.terms.window // 2
            if not known and (known := self._in_time(one, account, "seal", until, sealed)):
                self.tell(f"segment {one.record.index}: {account} seals a verdict")
            if known:
                found.append((account, ok, seen, salt))
        return found

    def _in_time(self, one: Committed, account: Account, step: str, until: int, *args: Any) -> bool:
        """Seal or reveal a verdict; False, and told, where its time is over or the segment is decided by then."""
        late = self.ledger.now()[1] >= until
        try:
            if not late:
                self._do(self.parties.key(account), step, one.segment, *args)
                return True
        except Refused as refused:
            late = refused.error == "TooLate"
            if not late and self._outcome(one) == Outcome.PENDING:
                raise
        why = f"too late for {account} to {step} a verdict; its bond pays for it"
        self.tell(f"segment {one.record.index}: {why if late else f'decided before {account} could {step} a verdict'}")
        return False

    def _witness(self, one: Committed) -> bytes:
        if one.segment.name not in self._witnesses:
            beacon = self._segment(one).beacon
            self._witnesses[one.segment.name] = witness(self.history, one.record, beacon, lambda: self.replay(True))
        return self._witnesses[one.segment.name]

    def _segment(self, one: Committed) -> Any:
        return self.ledger.read("segment_of", one.segment.name)

    def _verdict(self, one: Committed, account: Account) -> Any:
        return self.ledger.read("verdict_of", one.segment.name, account)

    def _assigned(self, one: Committed) -> tuple[Account, ...]:
        return self.ledger.read("assigned_of", self.terms, one.segment) if self.terms.verifiers else ()

    def _outcome(self, one: Committed) -> Outcome:
        return self._outcome_of(one.segment)

    def _outcome_of(self, segment: Segment) -> Outcome:
        return Outcome(self.ledger.read("outcome_of", self.terms, segment))

    def _start(self, one: Committed) -> int:
        return int(self._segment(one).drawn_at) if self.terms.verifiers else one.segment.time

    # ------------------------------------------------------------------------------------------------------- finishing

    def finalise(self) -> None:
        """Open all that is pending, then finalise what can be; waits for the windows, but not for the court.

        All are opened first: a segment that waits for its court does not stop the operator's clock for those after it.
        """
        pending = [one for one in self.committed() if self._outcome(one) == Outcome.PENDING]
        for one in pending:
            self._watch(self._closed(one))
            if is_opened(self.terms) and not self._segment(one).opened_at and not self._opening(one):
                return
        for one in pending:
            if not self._shown(one):
                return
            index, state = one.record.index, self._segment(one)
            judged = (state.opened_at or self._closed(one)) + self.terms.dispute
            if state.flags and not state.forced and not state.dismissed and self.ledger.now()[1] < judged:
                self.tell(f"segment {index}: flagged by {state.flags}; the court {self.terms.court} has to decide")
                return
            self._do(self.anybody(), "finalise", one.segment)
            self.tell(f"segment {index} is final")

    def _closed(self, one: Committed) -> int:
        """When the time for verdicts is over, and the operator's begins."""
        return self._start(one) + self.terms.window

    def _opening(self, one: Committed) -> bool:
        """Open a segment; False where that cannot be done. One whose operator let its time go by is lost."""
        index, mine = one.record.index, self.parties.acts(self.terms.operator)
        late = self.ledger.now()[1] >= self._closed(one) + self.terms.answer
        if late and mine:
            self.tell(f"segment {index}: the time to open it is over; anybody else's `trueweight settle` rejects it")
        elif late:
            self._do(self.anybody(), "forfeit", one.segment)
            self.tell(f"segment {index} is rejected: its operator did not open it in time")
        elif mine:
            self._unseal(one)
        else:
            self.tell(f"segment {index}: its operator has to open it")
        return mine and not late

    def _unseal(self, one: Committed) -> None:
        index, attempt = one.record.index, one.segment.attempt
        true = sha256(committed_form(self.history.segments()[index])).digest()
        secret, seen = self._secret(index, self.state), self._witness(one) if self._assigned(one) else bytes(32)
        self._do(
            self.parties.key(self.terms.operator), "unseal", one.segment, secret, seen, true, self._salt(index, attempt)
        )
        was = "; it was a forced error" if self._segment(one).forced else ""
        self.tell(f"segment {index} opened by the operator{was}")

    # --------------------------------------------------------------------------------------------------------- demands

    def demands(self) -> list[Demand]:
        """The demands for data that wait for an answer, or for the bond that was put up to come back."""
        events = self._events()
        return [found for one in self.ever() for found in open_demands(self.ledger, events, one.segment, one.record)]

    def demand(self, account: Account, one: Committed, wanted: Wanted) -> Demand:
        """Demand a leaf of a pending segment, for a flag bond of the account's; draws first if need be."""
        if self.terms.verifiers:
            self._draw(one)
        value = self._cover(account, self.terms.flag_bond)
        self._do(account, "demand", one.segment, wanted.tree, wanted.index, wanted.entry, value=value)
        found = open_demands(self.ledger, self._events(), one.segment, one.record)
        return next(each for each in found if (each.tree, each.index) == (wanted.tree, wanted.index))

    def answer(self, demand: Demand) -> None:
        """Show what was demanded; FailureError where the store has not got it."""
        self._show(demand, *answer_to(self.history, demand))

    def _show(self, demand: Demand, data: bytes, proof: tuple[bytes, ...]) -> None:
        operator = self.terms.operator
        sender = self.parties.key(operator) if self.parties.acts(operator) else self.anybody()
        self._do(sender, "answer", demand.segment, demand.root, demand.index, demand.count, data, proof)
        self.tell(f"{demand}: answered with {len(data)} bytes")

    def withhold(self, demand: Demand) -> None:
        """Reject the segment of a demand that was not answered in time; of one rejected already, the bond goes back."""
        self._do(self.anybody(), "withheld", demand.segment, demand.root, demand.index, demand.count)
        self.tell(f"{demand}: the segment is rejected, and the bond is back with {demand.account}")

    def _shown(self, one: Committed) -> bool:
        """Answer what is demanded of a segment, or reject it where that came too late; False where it cannot go on."""
        mine = self.parties.acts(self.terms.operator)
        for found in open_demands(self.ledger, self._events(), one.segment, one.record):
            late = self.ledger.now()[1] >= found.until
            if late and mine:
                self.tell(f"{found}: the time to answer is over; anybody else's `trueweight settle` rejects it")
            elif late:
                self.withhold(found)
            elif mine and self._answered(found):
                continue
            elif not mine:
                self.tell(f"{found}: its operator has to answer it before {found.until}")
            return False
        return True

    def _answered(self, demand: Demand) -> bool:
        try:
            shown = answer_to(self.history, demand)
        except FailureError as error:
            self.tell(f"{error}; the segment is lost at {demand.until} unless `trueweight ledger answer` can")
            return False
        self._show(demand, *shown)
        return True

    def _watch(self, until: int) -> None:
        """Wait, and as the operator answer what is demanded meanwhile."""
        while (now := self.ledger.now()[1]) < until:
            if not self.parties.acts(self.terms.operator):
                self.ledger.wait(until)
                continue
            for found in self.demands():
                if now < found.until and self._outcome_of(found.segment) == Outcome.PENDING:
                    self._answered(found)
            self.ledger.wait(min(until, now + max(self.terms.answer // 3, 1)))

    # ---------------------------------------------------------------------------------------------------------- paying

    def pay(self) -> None:
        """Settle all verdicts, claim the work of final segments, and what the workers of rejected ones are due."""
        who = self.anybody()
        for one in self.ever():
            if self._outcome(one) == Outcome.PENDING:
                continue
            for account in self._judges(one):
                if not self._verdict(one, account).settled:
                    self._do(who, "settle", one.segment, account)
            self.claim(one, who)

    def _judges(self, one: Committed) -> list[Account]:
        """Who was assigned, and who sealed a verdict."""
        name = one.segment.name
        sealed = [e.args["account"] for e in self._events() if e.name == "Sealed" and e.args["segment"] == name]
        return list(dict.fromkeys([*self._assigned(one), *sealed]))

    def claim(self, one: Committed, sender: Account, key: Account | None = None) -> int:
        """Claim for every key, or one, what a final segment pays or a rejected one owes; how many claims that were."""
        final, done = self._outcome(one) == Outcome.FINAL, 0
        if not final and not self._segment(one).harm:
            return 0
        tree = self.payouts(one.record).tree
        for leaf, (name, _) in enumerate(tree.amounts):
            if key not in (None, name) or self.ledger.read("claimed", one.segment.name, leaf):
                continue
            if final or not self._guilty(one, name):
                self._do(sender, "claim" if final else "compensate", one.segment, *tree.prove(leaf).arguments())
                done += 1
        return done

    def _guilty(self, one: Committed, key: Account) -> bool:
        culprit = self._segment(one).culprit
        accounts = {self.ledger.read("account_of", each) for each in (key, culprit)}
        return culprit != NOBODY and len(accounts) == 1

    def close(self) -> None:
        """The rest of the escrow back to the submitter, once every segment is final."""
        state = self.state
        if state.status != Status.ACTIVE or state.finalised < self.terms.segments:
            return
        self.ledger.wait(state.last + self.terms.answer + self.terms.dispute)
        self._do(self.terms.submitter if self.parties.has(self.terms.submitter) else self.anybody(), "close")
        self.tell("run closed: what was left is the submitter's again")

    # --------------------------------------------------------------------------------------------------------- telling

    def earnings(self) -> list[dict[str, Any]]:
        """Who got what and why, from the ledger's events: rows of account, part, why, times, amount."""
        return earned(self.terms, {one.segment.name for one in self.ever()}, self._events())
