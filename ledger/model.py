"""The ledger in plain Python: the executable form of docs/ledger.md, and the back end of tests.

`ledger.books` has what it remembers and its invariants, `ledger.purse` the money and what calls share, `ledger.rules`
what needs no books. A refused call changes nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from eth_utils.crypto import keccak

from ledger import payouts, rules
from ledger.books import Bond, BondKey, Demand, RunBook, SegmentBook, Verdict
from ledger.port import (
    BURN,
    Account,
    Commitment,
    Leaf,
    Outcome,
    Refused,
    Role,
    Run,
    Segment,
    Status,
    Tree,
)
from ledger.purse import Purse
from ledger.rules import DEMANDS, FLAGS, NOBODY, SEATS, Case, Ruling, Said, Times
from ledger.secrets import forced, record_seal, verdict_seal
from storage import merkle

NEVER = (1 << 256) - 1
NO_BEACON = bytes(32)


class Model(Purse):
    """A `Ledger` in memory: the state machines of docs/ledger.md, one method a function of ILedger."""

    # --------------------------------------------------------------------------------------------------------- runs

    def open(self, run: Run, record: bytes) -> None:
        """None -> Open: the submitter pays for all segments and the pot."""
        self._receive(run.token)
        self._require(self.sender == run.submitter, "NotAllowed")
        term = rules.wrong_term(run, self.unbonding)
        self._require(not term, "BadTerms", term)
        self._require(sha256(record).digest() == run.record, "BadRecord", "record")
        self._require(run.id not in self.runs, "Already")
        escrow = rules.escrow(run)
        self._take(run.token, escrow + run.pot)
        self.runs[run.id] = RunBook(run=run, status=Status.OPEN, escrow=escrow, pot=run.pot)
        self._emit("Opened", id=run.id, run=run, record=record)

    def accept(self, run: Run, chain: bytes) -> None:
        """Open -> Active: the operator puts up its bond."""
        self._receive(run.token)
        self._run(run, Status.OPEN)
        self._require(self.sender == run.operator, "NotAllowed")
        self._take(run.token, run.operator_bond)
        self.bonds[run.id, Role.OPERATOR, self.sender] = Bond(amount=run.operator_bond, joined=self.block)
        self._change(self.runs, run.id, status=Status.ACTIVE, chain=chain, base=self.block, state=run.initial_state)
        self._emit("Accepted", id=run.id, chain=chain, beacon_block=self.block + rules.DELAY)

    def begin(self, run: Run) -> None:
        """Fixes the run's beacon, or another block for it where that one has been forgotten."""
        book = self._run(run, Status.ACTIVE)
        self._require(not book.beacon, "Already")
        beacon = self._beacon(book.base)
        if beacon == NO_BEACON:
            self._rearm(self.runs, run.id)
            return
        self._change(self.runs, run.id, beacon=beacon)
        self._emit("Begun", id=run.id, beacon=beacon)

    def join(self, run: Run, role: Role, seat: int) -> None:
        """One bond a role and account, until it is released; the operator tops its own up."""
        self._receive(run.token)
        if role == Role.OPERATOR:
            self._top_up(run)
            seat = 0
        else:
            book = self._run(run, Status.OPEN, Status.ACTIVE)
            self._require((run.id, role, self.sender) not in self.bonds, "Already")
            seat = self._take_seat(run, book, seat) if role == Role.VERIFIER else 0
            amount = run.verifier_bond if role == Role.VERIFIER else run.worker_bond
            self._take(run.token, amount)
            self.bonds[run.id, role, self.sender] = Bond(amount=amount, joined=self.block, seat=seat)
        self._emit("Joined", id=run.id, role=role, account=self.sender, seat=seat)

    def resign(self, run: Run, role: Role) -> None:
        """The bond can be had after UNBONDING; an operator's only when all it does for the run is done."""
        book = self._run(run)
        if role == Role.OPERATOR:
            over = book.status in (Status.CANCELLED, Status.CLOSED) or book.final == run.segments
            self._require(over, "WrongStatus", book.status)
            self._require(book.committed == book.final, "StillOpen")
        bond = self.bonds.get((run.id, role, self.sender))
        self._require(bond is not None, "Unknown")
        self._require(bond is not None and bond.left is None, "Already")
        self._leave(run, role, self.sender)

    def release(self, run: Run, role: Role, account: Account) -> None:
        """What is left of the bond goes into its owner's balance, and the seat is free."""
        self._run(run)
        key = (run.id, role, account)
        bond = self._known(self.bonds.get(key))
        self._require(bond.left is not None, "TooEarly", NEVER)
        self._require(self.time >= bond.release_at, "TooEarly", bond.release_at)
        del self.bonds[key]
        if role == Role.VERIFIER:
            del self.seats[run.id, bond.seat]
        self._credit(run.token, account, bond.amount)
        self._emit("Released", id=run.id, role=role, account=account, amount=bond.amount)

    def cancel(self, run: Run) -> None:
        """Open -> Closed, or Active -> Cancelled, where what is pending goes on."""
        book = self._run(run, Status.OPEN, Status.ACTIVE)
        self._require(self.sender == run.submitter, "NotAllowed")
        self._emit("Cancelled", id=run.id)
        if book.status == Status.OPEN:
            self._refund(run)
        else:
            self._change(self.runs, run.id, status=Status.CANCELLED, last=self.time)

    def close(self, run: Run) -> None:
        """Active or Cancelled -> Closed: what is left goes back to the submitter."""
        book = self._run(run, Status.ACTIVE, Status.CANCELLED)
        over = book.status == Status.CANCELLED or book.final == run.segments
        self._require(over, "WrongStatus", book.status)
        self._require(book.committed == book.final, "StillOpen")
        self._from(book.last + run.answer + run.dispute)
        self._refund(run)

    # ----------------------------------------------------------------------------------------------------- segments

    def commit(self, run: Run, batch: Sequence[Commitment]) -> None:
        """The next segments, each from the state at which the one before ended."""
        book = self._run(run, Status.ACTIVE)
        self._require(bool(book.beacon), "WrongStatus", book.status)
        self._operators(run)
        bond = self._bond_of_operator(run)
        whole = bond is not None and bond.left is None and bond.amount == run.operator_bond
        self._require(whole, "Insufficient", run.operator_bond, bond.amount if bond else 0)
        self._require(book.committed + len(batch) <= run.segments, "Full")
        for commitment in batch:
            self._commit(run, self.runs[run.id], commitment)

    def draw(self, run: Run, segment: Segment) -> None:
        """Assigns verifiers and starts the windows; or another block, where that of the beacon has been forgotten."""
        book = self._segment(run, segment, Outcome.PENDING)
        self._require(run.verifiers > 0, "BadTerms", "verifiers")
        self._require(book.start is None, "Already")
        beacon = self._beacon(book.base)[:24]
        if beacon == NO_BEACON[:24]:
            self._rearm(self.segments, segment.name)
            return
        seats = rules.drawn(run, beacon, segment.seats, lambda seat: self._active(run, segment, seat))
        self._change(self.segments, segment.name, start=self.time, beacon=beacon, assigned=seats)
        verifiers = tuple(self.seats[run.id, seat] for seat in seats)
        self._emit("Drawn", segment=segment.name, beacon=beacon.ljust(32, b"\0"), verifiers=verifiers)

    def unseal(
        self, run: Run, segment: Segment, secret: bytes, witness: bytes, sealed_record: bytes, seal_salt: bytes
    ) -> None:
        """Opens the next segment: the secret says whether its record had to be false, the seal whether it is."""
        book = self._segment(run, segment, Outcome.PENDING)
        self._operators(run)
        state = self.runs[run.id]
        self._unopened(run, segment, book)
        times = self._times(run, book)
        self._within(times.end, times.opened_by)
        self._require(keccak(secret) == state.chain, "BadSecret")
        self._require(record_seal(sealed_record, seal_salt) == segment.seal, "BadSeal")
        due = forced(secret, state.beacon, segment.index, segment.attempt, run.forced_rate)
        self._require(due == (sealed_record != segment.record), "BadSeal")
        self._change(self.runs, run.id, chain=secret, opened=segment.index + 1)
        self._change(self.segments, segment.name, opened=self.time, witness=witness, forced=due)
        self._emit("Unsealed", segment=segment.name, secret=secret, witness=witness, forced=due, record=sealed_record)

    def forfeit(self, run: Run, segment: Segment) -> None:
        """Rejects the first segment that is not opened, when it is too late to open it."""
        book = self._segment(run, segment, Outcome.PENDING)
        self._unopened(run, segment, book)
        self._from(self._times(run, book).opened_by)
        self._reject(run, segment)

    def finalise(self, run: Run, segment: Segment) -> None:
        """The next segment is final: payout and fee leave the escrow, and a forced error's jackpot the pot."""
        book = self._segment(run, segment, Outcome.PENDING)
        state = self.runs[run.id]
        self._require(segment.index == state.final, "StillOpen")
        self._from(self._times(run, book).end)
        self._require(not rules.is_opened(run) or book.opened is not None, "StillOpen")
        self._require(not book.demands, "StillOpen")
        if book.flags and not book.forced and not book.dismissed:
            self._require(self.time >= self._court(run, book)[1], "StillOpen")
        reward = min(run.jackpot, state.pot) >> (book.flags - 1) if book.forced and book.flags else 0
        due = reward * book.flags
        self._change(
            self.runs,
            run.id,
            escrow=state.escrow - segment.payout - run.operator_fee,
            pot=state.pot - due,
            final=segment.index + 1,
            last=self.time,
        )
        self._change(
            self.segments, segment.name, outcome=Outcome.FINAL, unclaimed=segment.payout, reward=reward, due=due
        )
        self._credit(run.token, run.operator, run.operator_fee)
        self._emit("Finalised", id=run.id, index=segment.index, segment=segment.name)

    def resolve(self, run: Run, segment: Segment, upheld: bool, culprit: Account) -> None:
        """The court's answer on a segment that was flagged and is no forced error."""
        book = self._segment(run, segment, Outcome.PENDING)
        self._require(self.sender == run.court, "NotAllowed")
        self._require(book.flags > 0 and not book.forced, "NotAllowed")
        self._require(not book.dismissed, "Already")
        self._within(*self._court(run, book))
        if upheld:
            self._reject(run, segment, culprit=culprit, upheld=True)
        else:
            self._change(self.segments, segment.name, dismissed=True)
            self._emit("Dismissed", segment=segment.name)

    def outcome_of(self, run: Run, segment: Segment) -> Outcome:
        """What has become of a segment."""
        book = self.segments.get(segment.name)
        return book.outcome if book is not None and book.data.run == run.id else Outcome.UNKNOWN

    # ----------------------------------------------------------------------------------------------------- verdicts

    def seal(self, run: Run, segment: Segment, verdict: bytes) -> None:
        """A sealed verdict of the caller's account; who was not assigned puts up a bond, the caller's money."""
        self._receive(run.token)
        book = self._segment(run, segment, Outcome.PENDING)
        key = (segment.name, self.account_of(self.sender))
        self._require(key not in self.verdicts, "Already")
        times = self._times(run, book)
        self._within(times.start, times.half)
        self._require(verdict != bytes(32), "BadSeal")
        assigned = self._assigned(run, book, key[1]) is not None
        bond = 0 if assigned else run.flag_bond
        self._take(run.token, bond)
        self.verdicts[key] = Verdict(seal=verdict, assigned=assigned, bond=bond)
        self._emit("Sealed", segment=segment.name, account=key[1], verdict=verdict)

    def reveal(self, run: Run, segment: Segment, ok: bool, witness: bytes, salt: bytes) -> None:
        """The verdict itself. One that is not ok is a flag; there is always room for those of the assigned."""
        book = self._segment(run, segment, Outcome.PENDING)
        account = self.account_of(self.sender)
        verdict = self._known(self.verdicts.get((segment.name, account)))
        self._require(verdict.ok is None, "Already")
        times = self._times(run, book)
        self._within(times.half, times.end)
        self._require(verdict_seal(segment.name, account, ok, witness, salt) == verdict.seal, "BadSeal")
        self._change(self.verdicts, (segment.name, account), ok=ok, witness=witness)
        if not ok:
            room = FLAGS if verdict.assigned else FLAGS - run.verifiers
            self._require(book.flags < room, "Full")
            self._change(self.segments, segment.name, flags=book.flags + 1)
        self._emit("Revealed", segment=segment.name, account=account, ok=ok, witness=witness)

    def settle(self, run: Run, segment: Segment, account: Account) -> None:
        """Pays or penalises an account for its verdict, or for none, by the table in ILedger."""
        book = self._segment(run, segment, Outcome.FINAL, Outcome.REJECTED, Outcome.DROPPED)
        verdict = self.verdicts.get((segment.name, account))
        if verdict is None:
            self._require(self._assigned(run, book, account) is not None, "Unknown")
            verdict = Verdict(assigned=True)
        self._require(not verdict.settled, "Already")
        found = rules.ruling(_case(book), _said(book, verdict), verdict.assigned)
        self.verdicts[segment.name, account] = replace(verdict, bond=0, settled=True)
        lost, earned = self._lost(run, book, verdict, account, found), 0
        if found == Ruling.FEE and self.runs[run.id].status != Status.CLOSED:
            earned = run.verifier_fee
            self._change(self.runs, run.id, escrow=self.runs[run.id].escrow - earned)
        elif found == Ruling.SHARE:
            earned = book.reward
            self._change(self.segments, segment.name, due=book.due - earned)
        back = verdict.bond - (0 if verdict.assigned else lost)
        self._credit(run.token, account, earned + back)
        self._credit(run.token, BURN, lost)
        self._emit("Settled", segment=segment.name, account=account, amount=earned - lost)

    # ------------------------------------------------------------------------------------------------------ demands

    def demand(self, run: Run, segment: Segment, tree: Tree, index: int, entry: Leaf) -> None:
        """Demands a leaf of a pending segment's trees, within its window."""
        self._receive(run.token)
        book = self._segment(run, segment, Outcome.PENDING)
        root, count = self._tree(run, segment, tree, entry)
        name = rules.demand_name(segment, root, index, count)
        self._require((segment.name, name) not in self.demands, "Already")
        times = self._times(run, book)
        self._within(times.start, times.end)
        self._require(index < count, "BadProof")
        self._require(book.demands < DEMANDS, "Full")
        self._take(run.token, run.flag_bond)
        self.demands[segment.name, name] = Demand(account=self.sender, bond=run.flag_bond, time=self.time)
        self._change(self.segments, segment.name, demands=book.demands + 1)
        self._emit(
            "Demanded",
            segment=segment.name,
            demand=name,
            account=self.sender,
            tree=tree,
            root=root,
            index=index,
            count=count,
        )

    def answer(
        self,
        run: Run,
        segment: Segment,
        root: bytes,
        index: int,
        count: int,
        data: bytes,
        proof: Sequence[bytes],
    ) -> None:
        """Shows a leaf that was demanded; the bond is the operator's, whoever shows it."""
        book = self._segment(run, segment, Outcome.PENDING)
        name = rules.demand_name(segment, root, index, count)
        found = self._known(self.demands.get((segment.name, name)))
        self._within(found.time, found.time + run.answer)
        shown = merkle.verify_inclusion(merkle.leaf_hash(data), index, count, proof, root)
        self._require(shown, "BadProof")
        self._drop_demand(book, name)
        self._credit(run.token, run.operator, found.bond)
        self._emit("Answered", segment=segment.name, demand=name, data=data)

    def withheld(self, run: Run, segment: Segment, root: bytes, index: int, count: int) -> None:
        """Rejects a segment with a demand not answered in time; of one rejected or dropped, gives the bond back."""
        book = self._segment(run, segment, Outcome.PENDING, Outcome.REJECTED, Outcome.DROPPED)
        name = rules.demand_name(segment, root, index, count)
        found = self._known(self.demands.get((segment.name, name)))
        share = 0
        if book.outcome == Outcome.PENDING:
            self._from(found.time + run.answer)
            share = self._reject(run, segment, demanders=1)
        self._drop_demand(self.segments[segment.name], name)
        self._credit(run.token, found.account, found.bond + share)
        self._emit("Refunded", segment=segment.name, demand=name, account=found.account, amount=found.bond + share)

    # ------------------------------------------------------------------------------------------------------ payouts

    def claim(
        self,
        run: Run,
        segment: Segment,
        leaf: int,
        count: int,
        key: Account,
        amount: int,
        proof: Sequence[bytes],
        sums: Sequence[int],
    ) -> None:
        """Pays a leaf of a final segment's payout tree to the key's account."""
        self._segment(run, segment, Outcome.FINAL)
        self._pay_leaf("Claimed", run, segment, _proof(leaf, count, key, amount, proof, sums), amount)

    def compensate(
        self,
        run: Run,
        segment: Segment,
        leaf: int,
        count: int,
        key: Account,
        amount: int,
        proof: Sequence[bytes],
        sums: Sequence[int],
    ) -> None:
        """Pays a leaf's part of what was slashed for a rejected segment, but not to the culprit."""
        book = self._segment(run, segment, Outcome.REJECTED)
        guilty = book.culprit != NOBODY and self.account_of(key) == self.account_of(book.culprit)
        self._require(not guilty, "NotAllowed")
        part = book.harm * amount // segment.payout if segment.payout else 0
        self._pay_leaf("Compensated", run, segment, _proof(leaf, count, key, amount, proof, sums), part)

    # ------------------------------------------------------------------------------------------------ runs, inside

    def _run(self, run: Run, *wanted: Status) -> RunBook:
        book = self.runs.get(run.id)
        if book is None:
            raise Refused("Unknown", call=self._call)
        self._require(not wanted or book.status in wanted, "WrongStatus", book.status)
        return book

    def _operators(self, run: Run) -> None:
        self._require(run.operator in (self.sender, self.account_of(self.sender)), "NotAllowed")

    def _bond_of_operator(self, run: Run) -> Bond | None:
        return self.bonds.get((run.id, Role.OPERATOR, run.operator))

    def _top_up(self, run: Run) -> None:
        self._run(run, Status.ACTIVE)
        self._require(self.sender == run.operator, "NotAllowed")
        bond = self._bond_of_operator(run) or Bond(amount=0, joined=self.block)
        self._require(bond.left is None and bond.amount < run.operator_bond, "Already")
        self._take(run.token, run.operator_bond - bond.amount)
        self.bonds[run.id, Role.OPERATOR, self.sender] = replace(bond, amount=run.operator_bond)

    def _take_seat(self, run: Run, book: RunBook, seat: int) -> int:
        self._require(seat < SEATS, "Full")
        self._require(seat <= book.seats, "Unknown")
        self._require((run.id, seat) not in self.seats, "Already")
        self.seats[run.id, seat] = self.sender
        self._change(self.runs, run.id, seats=max(book.seats, seat + 1))
        return seat

    def _leave(self, run: Run, role: Role, account: Account) -> None:
        release_at = self.time + self.unbonding
        self._change(self.bonds, (run.id, role, account), left=self.block, release_at=release_at)
        self._emit("Left", id=run.id, role=role, account=account, release_at=release_at)

    def _refund(self, run: Run) -> None:
        book = self.runs[run.id]
        rest = book.escrow + book.pot
        self._change(self.runs, run.id, status=Status.CLOSED, escrow=0, pot=0)
        self._credit(run.token, run.submitter, rest)
        self._emit("Closed", id=run.id, refund=rest)

    # -------------------------------------------------------------------------------------------- segments, inside

    def _segment(self, run: Run, segment: Segment, *wanted: Outcome) -> SegmentBook:
        """The book of a segment of this run with one of the wanted outcomes."""
        self._run(run)
        outcome = self.outcome_of(run, segment)
        self._require(outcome != Outcome.UNKNOWN, "Unknown")
        if outcome not in wanted:
            self._require(Outcome.PENDING not in wanted, "Already")
            self._require(outcome != Outcome.PENDING, "StillOpen")
            self._require(False, "NotAllowed")
        return self.segments[segment.name]

    def _commit(self, run: Run, book: RunBook, given: Commitment) -> None:
        field = rules.wrong_field(run, given.record, book.committed, book.state)
        self._require(not field, "BadRecord", field)
        self._require(given.work <= run.work, "BadRecord", "work")
        self._require(given.payout <= given.work * run.price, "BadRecord", "payout")
        segment = Segment(
            run=run.id,
            index=book.committed,
            attempt=book.attempt,
            steps=int.from_bytes(given.record[46:50], "little"),
            record=sha256(given.record).digest(),
            prestate=given.record[50:82],
            poststate=given.record[82:114],
            steps_root=given.record[114:146],
            payout_root=given.payout_root,
            payout=given.payout,
            work=given.work,
            seal=given.seal,
            time=self.time,
            block_number=self.block,
            seats=book.seats,
        )
        start = None if run.verifiers else self.time
        self.segments[segment.name] = SegmentBook(run=run, data=segment, base=self.block, start=start)
        self.line[run.id, segment.index] = segment.name
        self._change(self.runs, run.id, committed=segment.index + 1, state=segment.poststate)
        self._emit("Committed", id=run.id, index=segment.index, segment=segment.name, data=segment, record=given.record)

    def _times(self, run: Run, book: SegmentBook) -> Times:
        if book.start is None:
            raise Refused("TooEarly", (NEVER,), call=self._call, remedy="draw the segment first")
        return Times.of(run, book.start)

    def _court(self, run: Run, book: SegmentBook) -> tuple[int, int]:
        """Between which times the court decides."""
        start = book.opened if rules.is_opened(run) else self._times(run, book).end
        if start is None:
            raise Refused("TooEarly", (NEVER,), call=self._call, remedy="wait until the operator opens the segment")
        return start, start + run.dispute

    def _unopened(self, run: Run, segment: Segment, book: SegmentBook) -> None:
        """That this is the first segment that is not opened."""
        self._require(rules.is_opened(run), "BadTerms", "unseal")
        self._require(book.opened is None, "Already")
        self._require(segment.index == self.runs[run.id].opened, "StillOpen")

    def _active(self, run: Run, segment: Segment, seat: int) -> bool:
        account = self.seats.get((run.id, seat))
        bond = self.bonds[run.id, Role.VERIFIER, account] if account else None
        if bond is None or bond.joined >= segment.block_number:
            return False
        return bond.left is None or bond.left > segment.block_number

    def _assigned(self, run: Run, book: SegmentBook, account: Account) -> Bond | None:
        """The bond with which an account was assigned to a segment, where it was and still has it."""
        bond = self.bonds.get((run.id, Role.VERIFIER, account))
        there = bond is not None and bond.seat in book.assigned and bond.joined < book.data.block_number
        return bond if there else None

    def _reject(
        self, run: Run, segment: Segment, *, culprit: Account = NOBODY, upheld: bool = False, demanders: int = 0
    ) -> int:
        """Rejects a segment and drops those after it; what each of those who flagged or demanded has of the slash."""
        guilty = {culprit, self.account_of(culprit)} - {NOBODY}
        bonds = [(run.id, Role.OPERATOR, run.operator), *((run.id, Role.WORKER, account) for account in guilty)]
        slashed = sum(self._slash(key) for key in bonds)
        book = self.segments[segment.name]
        reporters = book.flags + demanders
        reward = slashed * run.reporter_share // 100 // reporters if reporters else 0
        harm = slashed * run.harmed_share // 100 if segment.payout else 0
        self._credit(run.token, BURN, slashed - reward * reporters - harm)
        self._change(
            self.segments,
            segment.name,
            outcome=Outcome.REJECTED,
            culprit=culprit,
            upheld=upheld,
            reward=reward,
            due=reward * book.flags,
            harm=harm,
            unclaimed=harm,
        )
        self._drop_after(run, segment)
        self._emit("Rejected", id=run.id, index=segment.index, segment=segment.name, culprit=culprit, slashed=slashed)
        return reward

    def _drop_after(self, run: Run, segment: Segment) -> None:
        """The run goes on from the rejected segment's prestate."""
        book = self.runs[run.id]
        for index in range(segment.index + 1, book.committed):
            self._change(self.segments, self.line[run.id, index], outcome=Outcome.DROPPED)
        self._change(
            self.runs,
            run.id,
            committed=segment.index,
            opened=min(book.opened, segment.index),
            state=segment.prestate,
            attempt=book.attempt + 1,
        )

    def _slash(self, key: BondKey) -> int:
        bond = self.bonds.get(key)
        if bond is None:
            return 0
        self.bonds[key] = replace(bond, amount=0)
        return bond.amount

    def _lost(self, run: Run, book: SegmentBook, verdict: Verdict, account: Account, found: Ruling) -> int:
        """What an account loses; a verifier that loses any of its bond has left."""
        if found not in (Ruling.BOND, Ruling.PENALTY):
            return 0
        if not verdict.assigned:
            return verdict.bond
        bond = self._assigned(run, book, account)
        if bond is None:
            return 0
        share = 100 if found == Ruling.BOND else run.miss_penalty
        lost = min(run.verifier_bond * share // 100, bond.amount)
        if lost:
            self._change(self.bonds, (run.id, Role.VERIFIER, account), amount=bond.amount - lost)
            if bond.left is None:
                self._leave(run, Role.VERIFIER, account)
        return lost

    def _tree(self, run: Run, segment: Segment, tree: Tree, entry: Leaf) -> tuple[bytes, int]:
        """(root, number of leaves) of a tree that the segment commits to."""
        if tree == Tree.STEPS:
            return segment.steps_root, segment.steps
        if tree == Tree.STATE:
            return segment.poststate, run.tensors
        leaf = merkle.leaf_hash(entry.data)
        shown = merkle.verify_inclusion(leaf, entry.index, entry.count, entry.proof, segment.poststate)
        self._require(shown and entry.count == run.tensors, "BadProof")
        found = rules.tensor_leaves(entry.data)
        if found is None:
            raise Refused("BadRecord", ("entry",), call=self._call)
        return found

    def _drop_demand(self, book: SegmentBook, name: bytes) -> None:
        segment = book.data.name
        del self.demands[segment, name]
        self._change(self.segments, segment, demands=book.demands - 1)

    def _pay_leaf(self, event: str, run: Run, segment: Segment, proof: payouts.Proof, amount: int) -> None:
        self._require((segment.name, proof.leaf) not in self.claims, "Already")
        self._require(payouts.verify_sum(proof, segment.payout_root, segment.payout), "BadProof")
        self.claims[segment.name, proof.leaf] = True
        self._change(self.segments, segment.name, unclaimed=self.segments[segment.name].unclaimed - amount)
        account = self.account_of(proof.key)
        self._credit(run.token, account, amount)
        self._emit(event, segment=segment.name, leaf=proof.leaf, key=proof.key, account=account, amount=amount)


def _proof(
    leaf: int, count: int, key: Account, amount: int, proof: Sequence[bytes], sums: Sequence[int]
) -> payouts.Proof:
    return payouts.Proof(leaf=leaf, count=count, key=key, amount=amount, proof=tuple(proof), sums=tuple(sums))


def _case(book: SegmentBook) -> Case:
    if book.outcome == Outcome.DROPPED:
        return Case.DROPPED
    if book.outcome == Outcome.REJECTED:
        return Case.UPHELD if book.upheld else Case.REJECTED
    if book.forced:
        return Case.FORCED
    return Case.SILENT if book.flags and not book.dismissed else Case.FINAL


def _said(book: SegmentBook, verdict: Verdict) -> Said:
    if verdict.ok is None:
        return Said.NOTHING
    if not verdict.ok:
        return Said.NOT_OK
    return Said.AS_OPENED if verdict.witness == book.witness else Said.ANOTHER
