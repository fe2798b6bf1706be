"""What a ledger remembers: tables of values that never change, a journal to undo with, what must hold of it all."""

from dataclasses import dataclass
from typing import TypeVar

from ledger import rules
from ledger.port import Account, Outcome, Role, Run, Segment, Status
from ledger.rules import DEMANDS, FLAGS, NOBODY

K = TypeVar("K")
V = TypeVar("V")

Journal = list[tuple["Table[object, object]", object, object]]

_ABSENT = object()


class Table(dict[K, V]):
    """A dictionary that writes down what every change replaces."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def __setitem__(self, key: K, value: V) -> None:
        self._note(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: K) -> None:
        self._note(key)
        super().__delitem__(key)

    def _note(self, key: K) -> None:
        self._journal.append((self, key, self.get(key, _ABSENT)))  # type: ignore[arg-type]


def undo(journal: Journal) -> None:
    """Takes back all changes in the journal, the newest first, and empties it."""
    for table, key, value in reversed(journal):
        if value is _ABSENT:
            dict.pop(table, key, None)
        else:
            dict.__setitem__(table, key, value)
    journal.clear()


@dataclass(frozen=True, kw_only=True)
class RunBook:
    """A run. `base` is the block from which DELAY counts; segments below `final` are final, below `opened` opened."""

    run: Run
    status: Status
    escrow: int
    pot: int
    state: bytes = b""
    chain: bytes = b""
    base: int = 0
    beacon: bytes = b""
    seats: int = 0
    committed: int = 0
    opened: int = 0
    final: int = 0
    attempt: int = 0
    last: int = 0


@dataclass(frozen=True, kw_only=True)
class Bond:
    """What somebody has put up for a role: blocks in which it joined and left, when it can be had."""

    amount: int
    joined: int
    seat: int = 0
    left: int | None = None
    release_at: int = 0


@dataclass(frozen=True, kw_only=True)
class SegmentBook:
    """A segment. `reward` is each flag's share of the jackpot or of what was slashed, `due` what of it is still due.

    `unclaimed` is what payout or, where it was rejected, `harm` still hold for the tree's keys.
    """

    run: Run
    data: Segment
    base: int
    outcome: Outcome = Outcome.PENDING
    start: int | None = None
    beacon: bytes = b""
    assigned: tuple[int, ...] = ()
    flags: int = 0
    demands: int = 0
    opened: int | None = None
    witness: bytes | None = None
    forced: bool = False
    dismissed: bool = False
    upheld: bool = False
    culprit: Account = NOBODY
    reward: int = 0
    due: int = 0
    unclaimed: int = 0
    harm: int = 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an account said of a segment, sealed or revealed, and the flag bond that it put up for it."""

    assigned: bool
    seal: bytes = b""
    bond: int = 0
    ok: bool | None = None
    witness: bytes = b""
    settled: bool = False


@dataclass(frozen=True, kw_only=True)
class Demand:
    """An open demand for a leaf."""

    account: Account
    bond: int
    time: int


BondKey = tuple[bytes, Role, Account]


class Books:
    """All tables of a ledger at `address`, which takes at most `limit` of one token.

    `wallets` is who has what outside: (token, account) to amount. `holdings` is what came in and has not gone out.
    """

    def __init__(self, address: Account, limit: int) -> None:
        self.address, self.limit = address, limit
        self._journal: Journal = []
        self.wallets: Table[tuple[Account, Account], int] = Table(self._journal)
        self.holdings: Table[Account, int] = Table(self._journal)
        self.balances: Table[tuple[Account, Account], int] = Table(self._journal)
        self.accounts: Table[Account, Account] = Table(self._journal)
        self.runs: Table[bytes, RunBook] = Table(self._journal)
        self.bonds: Table[BondKey, Bond] = Table(self._journal)
        self.seats: Table[tuple[bytes, int], Account] = Table(self._journal)
        self.line: Table[tuple[bytes, int], bytes] = Table(self._journal)
        self.segments: Table[bytes, SegmentBook] = Table(self._journal)
        self.verdicts: Table[tuple[bytes, Account], Verdict] = Table(self._journal)
        self.demands: Table[tuple[bytes, bytes], Demand] = Table(self._journal)
        self.claims: Table[tuple[bytes, int], bool] = Table(self._journal)

    def held(self, token: Account) -> int:
        """What the ledger owes, in all, of a token: the sum in docs/ledger.md."""
        runs = {name for name, book in self.runs.items() if book.run.token == token}
        segments = {name for name, book in self.segments.items() if book.data.run in runs}
        return (
            sum(amount for (paid_in, _), amount in self.balances.items() if paid_in == token)
            + sum(self.runs[name].escrow + self.runs[name].pot for name in runs)
            + sum(bond.amount for (run, _, _), bond in self.bonds.items() if run in runs)
            + sum(self.segments[name].due + self.segments[name].unclaimed for name in segments)
            + sum(verdict.bond for (name, _), verdict in self.verdicts.items() if name in segments)
            + sum(demand.bond for (name, _), demand in self.demands.items() if name in segments)
        )

    def check(self) -> None:
        """Asserts every invariant of docs/ledger.md."""
        for token in {paid_in for paid_in, _ in self.balances} | set(self.holdings):
            held = self.held(token)
            assert held == self.holdings.get(token, 0), f"{token}: {held} owed, {self.holdings.get(token, 0)} counted"
            assert held <= min(self.limit, self.wallets.get((token, self.address), 0)), f"{token}: not solvent"
        assert all(amount >= 0 for table in (self.balances, self.wallets) for amount in table.values()), "a debt"
        for bond in self.bonds.values():
            assert bond.amount >= 0, "a bond below zero"
        for name, book in self.runs.items():
            self._check_run(name, book)
        for name, segment in self.segments.items():
            self._check_segment(name, segment)

    def _check_run(self, name: bytes, book: RunBook) -> None:
        run = book.run
        assert book.escrow >= 0, "an escrow below zero"
        assert 0 <= book.pot <= run.pot, "a pot out of its bounds"
        assert book.final <= book.committed <= run.segments, "segments out of order"
        if rules.is_opened(run):
            assert book.final <= book.opened <= book.committed, "opened segments out of order"
        for index in range(book.committed):
            found = self.segments[self.line[name, index]]
            assert found.outcome == (Outcome.FINAL if index < book.final else Outcome.PENDING), "a gap in the line"
            before = self.segments[self.line[name, index - 1]].data.poststate if index else run.initial_state
            assert found.data.prestate == before, "states that do not follow"
        end = self.segments[self.line[name, book.committed - 1]].data.poststate if book.committed else run.initial_state
        assert book.state in (end, b"" if book.status in (Status.OPEN, Status.CLOSED) else end), (
            "another state than the last segment's"
        )

    def _check_segment(self, name: bytes, book: SegmentBook) -> None:
        run = book.run
        assert book.unclaimed >= 0, "more claimed than there is"
        assert book.outcome in (Outcome.FINAL, Outcome.REJECTED) or not book.unclaimed + book.due, "paid before its end"
        assert book.flags <= FLAGS, "too many flags"
        assert book.demands == sum(named == name for named, _ in self.demands) <= DEMANDS, "demands miscounted"
        verdicts = [verdict for (named, _), verdict in self.verdicts.items() if named == name]
        assert book.flags == sum(verdict.ok is False for verdict in verdicts), "flags miscounted"
        open_flags = sum(verdict.ok is False and not verdict.settled for verdict in verdicts)
        assert book.due == book.reward * open_flags, "a reporter's share is missing"
        if book.outcome == Outcome.PENDING:
            assert not any(verdict.settled for verdict in verdicts), "settled before its end"
        if book.outcome == Outcome.FINAL and rules.is_opened(run):
            assert book.opened is not None, "final without having been opened"
