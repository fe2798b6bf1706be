"""A ledger's clock, events and money: who is owed what, how it comes in, how it goes out, who acts for whom.

A function of ILedger is a method of the same name in snake case; `send` calls it, with the sender in `self.sender` and
what was sent along in `self.value`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ledger import rules
from ledger.books import Table, undo
from ledger.port import NATIVE, Account, Event, Refused
from ledger.rules import NOBODY
from ledger.secrets import delegation
from ledger.views import Views
from storage.errors import IntegrityError, UsageError
from storage.identity import recover

Beacon = Callable[[int], bytes]
"""The beacon of a block: 32 bytes, zero where it is not there yet or is forgotten."""

PAYABLE = frozenset({"deposit", "open", "accept", "join", "seal", "demand"})
FUNCTIONS = PAYABLE | {
    "withdraw", "delegate", "begin", "resign", "release", "cancel", "close", "commit", "draw", "unseal", "forfeit",
    "finalise", "resolve", "reveal", "settle", "answer", "withheld", "claim", "compensate",
}  # fmt: skip
VIEWS = frozenset({
    "balance_of", "account_of", "outcome_of", "held", "cap", "run_of", "bond_of", "seat_of", "segment_of", "verdict_of",
    "demand_of", "assigned_of", "claimed", "forced",
})  # fmt: skip


class Purse(Views):
    """The part of the model that knows nothing of runs.

    `beacon` answers for every run's beacon. A token in `fees` keeps so much of what is sent to the ledger; accounts in
    `refusing` take no native currency. Blocks come by `mine` and `wait` alone.
    """

    def __init__(
        self,
        beacon: Beacon,
        *,
        cap: int = 1 << 128,
        unbonding: int = rules.UNBONDING,
        chain_id: int = 1,
        address: Account = "0x" + "1e" * 20,
        block: int = 1,
        time: int = 1,
    ) -> None:
        super().__init__(address, cap)
        self.beacon, self.unbonding, self.chain_id = beacon, unbonding, chain_id
        self.block, self.time = block, time
        self.sender, self.value, self._call = NOBODY, 0, ""
        self.fees: dict[Account, int] = {}
        self.refusing: set[Account] = {address}
        self._events: list[Event] = []

    # ----------------------------------------------------------------------------------------------------- the seam

    def send(self, sender: Account, function: str, *args: Any, value: int = 0) -> tuple[Event, ...]:
        """The events of a call; Refused, and nothing has changed, where it is refused."""
        if function not in FUNCTIONS or (value and function not in PAYABLE):
            raise ValueError(
                f"{function}: expected a function of ILedger, payable where value is sent; see ledger/model.py"
            )
        before = len(self._events)
        self.sender, self.value, self._call = sender, value, function
        if value:
            self._add(self.wallets, (NATIVE, self.address), value)
        try:
            getattr(self, function)(*args)
        except Refused:
            undo(self._journal)
            del self._events[before:]
            raise
        self._journal.clear()
        return tuple(self._events[before:])

    def approve(self, sender: Account, token: Account, amount: int) -> None:
        """See Ledger; here a deposit takes without being let."""
        if (have := self.wallets.get((token, sender), 0)) < amount:
            raise UsageError(f"account {sender}: expected {amount} of token {token}, got {have}; send it the rest")

    def read(self, function: str, *args: Any) -> Any:
        """The answer of a view."""
        if function in ("UNBONDING", "DELAY"):
            return self.unbonding if function == "UNBONDING" else rules.DELAY
        if function not in VIEWS:
            raise ValueError(f"{function}: expected one of {', '.join(sorted(VIEWS))}")
        return getattr(self, function)(*args)

    def events(self, since: int = 0) -> tuple[Event, ...]:
        """All events from block `since` on."""
        return tuple(event for event in self._events if event.block >= since)

    def now(self) -> tuple[int, int]:
        """(block, time)."""
        return self.block, self.time

    def wait(self, until: int) -> None:
        """Puts the clock forward, by one block."""
        self.mine(seconds=max(until - self.time, 0))

    def mine(self, blocks: int = 1, seconds: int = 0) -> None:
        """So many blocks and seconds pass."""
        self.block += blocks
        self.time += seconds

    def mint(self, token: Account, account: Account, amount: int) -> None:
        """Gives somebody a token outside the ledger."""
        self.wallets[token, account] = self.wallets.get((token, account), 0) + amount
        self._journal.clear()

    # ----------------------------------------------------------------------------------------------------- balances

    def balance_of(self, token: Account, account: Account) -> int:
        """What the account can withdraw."""
        return self.balances.get((token, account), 0)

    def cap(self) -> int:
        """How much of one token the ledger takes."""
        return self.limit

    def deposit(self, token: Account, amount: int) -> None:
        """Token: it must arrive whole. Native currency: what was sent along must be the amount."""
        if token == NATIVE:
            self._require(amount == self.value, "NotArrived", amount, self.value)
            self._deposit(token, amount)
            return
        self._require(not self.value, "NotArrived", 0, self.value)
        fee = self.fees.get(token, 0)
        self._require(self.wallets.get((token, self.sender), 0) >= amount >= fee, "TransferFailed")
        arrived = amount - fee
        self._add(self.wallets, (token, self.sender), -amount)
        self._add(self.wallets, (token, self.address), arrived)
        self._require(arrived >= amount, "NotArrived", amount, arrived)
        self._deposit(token, amount)

    def withdraw(self, token: Account, amount: int, to: Account) -> None:
        """Takes from the caller's balance alone."""
        self._take(token, amount)
        taken = to not in self.refusing if token == NATIVE else to != NOBODY
        self._require(taken, "TransferFailed")
        self._add(self.holdings, token, -amount)
        self._add(self.wallets, (token, self.address), -amount)
        self._add(self.wallets, (token, to), amount)
        self._emit("Withdrawn", token=token, account=self.sender, to=to, amount=amount)

    def delegate(self, key: Account, deadline: int, signature: bytes) -> None:
        """A key has one account for ever."""
        self._require(self.time < deadline, "TooLate", deadline)
        message = delegation(self.chain_id, self.address, self.sender, deadline)
        self._require(_signer(message, signature) == key, "BadSignature")
        self._require(key not in self.accounts, "Already")
        self.accounts[key] = self.sender
        self._emit("Delegated", account=self.sender, key=key)

    def account_of(self, key: Account) -> Account:
        """Whose hot key this is; the key itself where it is nobody's."""
        return self.accounts.get(key, key)

    # ---------------------------------------------------------------------------------------------- what calls share

    def _require(self, holds: bool, error: str, *args: Any) -> None:
        if not holds:
            raise Refused(error, args, call=self._call)

    def _known(self, found: Any) -> Any:
        self._require(found is not None, "Unknown")
        return found

    def _emit(self, event: str, **args: Any) -> None:
        self._events.append(Event(name=event, args=args, block=self.block))

    def _from(self, start: int) -> None:
        self._require(self.time >= start, "TooEarly", start)

    def _within(self, start: int, stop: int) -> None:
        self._from(start)
        self._require(self.time < stop, "TooLate", stop)

    def _change(self, table: Table[Any, Any], key: object, **fields: Any) -> None:
        table[key] = replace(table[key], **fields)

    def _add(self, table: Table[Any, int], key: object, amount: int) -> None:
        if amount:
            table[key] = table.get(key, 0) + amount

    def _credit(self, token: Account, account: Account, amount: int) -> None:
        self._add(self.balances, (token, account), amount)

    def _take(self, token: Account, amount: int) -> None:
        got = self.balance_of(token, self.sender)
        self._require(got >= amount, "Insufficient", amount, got)
        self._credit(token, self.sender, -amount)

    def _receive(self, token: Account) -> None:
        """What was sent along, which only a run in native currency takes."""
        if self.value:
            self._require(token == NATIVE, "NotArrived", 0, self.value)
            self._deposit(token, self.value)

    def _deposit(self, token: Account, amount: int) -> None:
        self._require(self.holdings.get(token, 0) + amount <= self.limit, "CapExceeded", self.limit)
        self._add(self.holdings, token, amount)
        self._credit(token, self.sender, amount)
        self._emit("Deposited", token=token, account=self.sender, amount=amount)

    def _beacon(self, base: int) -> bytes:
        self._require(self.block > base + rules.DELAY, "TooEarly", base + rules.DELAY + 1)
        return self.beacon(base + rules.DELAY)

    def _rearm(self, table: Table[bytes, Any], name: bytes) -> None:
        self._change(table, name, base=self.block)
        self._emit("Rearmed", name=name, block_number=self.block + rules.DELAY)


def _signer(message: bytes, signature: bytes) -> Account | None:
    if len(signature) != 65 or signature[64] not in (27, 28):
        return None
    try:
        return "0x" + recover(message, signature[:64] + bytes([signature[64] - 27])).hex()
    except IntegrityError:
        return None
