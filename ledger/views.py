"""What the views of ILedger say, from the model's books: objects with the fields of its structs, zero where unknown."""

from types import SimpleNamespace

from eth_utils.crypto import keccak

from ledger import rules
from ledger.books import Bond, Books, Verdict
from ledger.port import Account, Outcome, Refused, Role, Run, Segment, Status
from ledger.rules import NOBODY
from ledger.secrets import forced

ZERO = bytes(32)


class Views(Books):
    """The views of ILedger that only look things up."""

    def run_of(self, run: bytes) -> SimpleNamespace:
        """RunState of the run of that id."""
        book = self.runs.get(run)
        if book is None:
            zero = dict.fromkeys(("committed", "finalised", "opened", "attempt", "last", "seats", "escrow", "pot"), 0)
            blank = {"state": ZERO, "chain": ZERO, "beacon": ZERO, "beacon_block": 0}
            return SimpleNamespace(status=Status.NONE, begun=False, **zero, **blank)
        return SimpleNamespace(
            status=book.status,
            begun=bool(book.beacon),
            seats=book.seats,
            committed=book.committed,
            finalised=book.final,
            opened=book.opened,
            attempt=book.attempt,
            last=book.last,
            beacon_block=book.base + rules.DELAY if book.base else 0,
            escrow=book.escrow,
            pot=book.pot,
            state=book.state or ZERO,
            chain=book.chain or ZERO,
            beacon=book.beacon or ZERO,
        )

    def bond_of(self, run: bytes, role: Role, account: Account) -> SimpleNamespace:
        """Bond of an account for a role."""
        bond = self.bonds.get((run, role, account))
        shown = bond or Bond(amount=0, joined=0)
        return SimpleNamespace(
            amount=shown.amount, release_at=shown.release_at, seat=shown.seat, exists=bond is not None
        )

    def seat_of(self, run: bytes, seat: int) -> SimpleNamespace:
        """Seat: who has it, from which block and to which."""
        account = self.seats.get((run, seat), NOBODY)
        bond = self.bonds.get((run, Role.VERIFIER, account)) or Bond(amount=0, joined=0)
        return SimpleNamespace(account=account, joined=bond.joined, left=bond.left or 0)

    def segment_of(self, segment: bytes) -> SimpleNamespace:
        """SegmentState of the segment of that name; a dropped one is still Pending here."""
        book = self.segments.get(segment)
        if book is None:
            times = dict.fromkeys(("flags", "demands", "rearmed", "drawn_at", "opened_at", "drawn", "share", "harm"), 0)
            said = dict.fromkeys(("by_court", "forced", "dismissed"), False)
            blank = {"beacon": ZERO[:24], "witness": ZERO, "culprit": NOBODY}
            return SimpleNamespace(outcome=Outcome.UNKNOWN, **said, **times, **blank)
        return SimpleNamespace(
            outcome=Outcome.PENDING if book.outcome == Outcome.DROPPED else book.outcome,
            by_court=book.upheld,
            forced=book.forced,
            dismissed=book.dismissed,
            flags=book.flags,
            demands=book.demands,
            rearmed=0 if book.base == book.data.block_number else book.base,
            drawn_at=(book.start or 0) if book.run.verifiers else 0,
            opened_at=book.opened or 0,
            beacon=book.beacon or ZERO[:24],
            drawn=sum(1 << seat for seat in book.assigned),
            witness=book.witness or ZERO,
            share=book.reward,
            harm=book.harm,
            culprit=book.culprit,
        )

    def verdict_of(self, segment: bytes, account: Account) -> SimpleNamespace:
        """Verdict of an account on the segment of that name."""
        found = self.verdicts.get((segment, account)) or Verdict(assigned=False, seal=ZERO)
        mark = found.seal or ZERO if found.ok is None else keccak(found.witness)
        return SimpleNamespace(
            mark=mark[:28],
            assigned=found.assigned,
            revealed=found.ok is not None,
            ok=bool(found.ok),
            settled=found.settled,
        )

    def demand_of(self, demand: bytes) -> SimpleNamespace:
        """Demand of that name: who made it, and until when the operator may answer."""
        for (segment, name), found in self.demands.items():
            if name == demand:
                return SimpleNamespace(account=found.account, until=found.time + self.segments[segment].run.answer)
        return SimpleNamespace(account=NOBODY, until=0)

    def assigned_of(self, run: Run, segment: Segment) -> tuple[Account, ...]:
        """Who was drawn for a segment and still has the bond, by seat."""
        book = self.segments.get(segment.name)
        if book is None or book.data.run != run.id:
            raise Refused("Unknown", call="assigned_of")
        accounts = [self.seats[run.id, seat] for seat in sorted(book.assigned) if (run.id, seat) in self.seats]
        bonds = [self.bonds[run.id, Role.VERIFIER, account] for account in accounts]
        return tuple(
            account for account, bond in zip(accounts, bonds, strict=True) if bond.joined < segment.block_number
        )

    def claimed(self, segment: bytes, leaf: int) -> bool:
        """Whether a leaf has been claimed or compensated."""
        return (segment, leaf) in self.claims

    def forced(self, run: Run, index: int, attempt: int, secret: bytes) -> bool:
        """Whether with this secret the segment has to be a forced error."""
        book = self.runs.get(run.id)
        if book is None:
            raise Refused("Unknown", call="forced")
        return forced(secret, book.beacon or ZERO, index, attempt, run.forced_rate)
