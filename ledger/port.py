"""The `Ledger` seam and what goes through it: terms, segments, events, refusals.

Names, fields and meanings are those of `contracts/src/ILedger.sol`; a back end is the in-memory model, the embedded
chain, or a node behind a URL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

from eth_utils.crypto import keccak

from storage.errors import FailureError

Account = str
"""An address, 0x and 40 lower-case hex digits."""

NATIVE = "0x" + "00" * 20
"""The token that is the chain's own currency."""

BURN = "0x" + "00" * 18 + "dead"
"""Whose balance is what was burnt."""


class Status(IntEnum):
    """Of a run."""

    NONE, OPEN, ACTIVE, CANCELLED, CLOSED = range(5)


class Role(IntEnum):
    """For which a bond is put up."""

    OPERATOR, WORKER, VERIFIER = range(3)


class Outcome(IntEnum):
    """Of a segment."""

    UNKNOWN, PENDING, FINAL, REJECTED, DROPPED = range(5)


class Tree(IntEnum):
    """Whose leaves an operator has to show."""

    STATE, STEPS, TENSOR = range(3)


def words(record: Any) -> bytes:
    """abi.encode of a struct of static types: a word of 32 bytes for each field, in order."""
    return b"".join(_word(getattr(record, field.name)) for field in fields(record))


def _word(value: bytes | str | int) -> bytes:
    if isinstance(value, bytes):
        return value.ljust(32, b"\0")
    return (int(value, 16) if isinstance(value, str) else value).to_bytes(32, "big")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The terms of a run: struct Run, field by field. bytes32 are bytes, addresses strings, numbers integers."""

    record: bytes
    initial_state: bytes
    submitter: Account
    operator: Account
    token: Account = NATIVE
    court: Account
    beacon: Account
    segments: int
    tensors: int
    work: int
    price: int
    operator_fee: int
    verifier_fee: int
    operator_bond: int
    worker_bond: int
    verifier_bond: int
    flag_bond: int
    pot: int
    jackpot: int
    rate: int
    forced_rate: int
    verifiers: int
    reporter_share: int
    harmed_share: int
    miss_penalty: int
    window: int
    answer: int
    dispute: int
    salt: bytes = bytes(32)

    @cached_property
    def id(self) -> bytes:
        """The run's name on the ledger."""
        return keccak(words(self))


@dataclass(frozen=True, kw_only=True)
class Commitment:
    """struct Commitment: what the operator gives for a segment."""

    record: bytes
    work: int
    payout_root: bytes
    payout: int
    seal: bytes


@dataclass(frozen=True, kw_only=True)
class Segment:
    """struct Segment: a committed segment."""

    run: bytes
    index: int
    attempt: int
    steps: int
    record: bytes
    prestate: bytes
    poststate: bytes
    steps_root: bytes
    payout_root: bytes
    payout: int
    work: int
    seal: bytes
    time: int
    block_number: int
    seats: int

    @cached_property
    def name(self) -> bytes:
        """The segment's name on the ledger."""
        return keccak(words(self))


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """struct Leaf: a leaf of a tree of RFC 6962 and its proof."""

    data: bytes = b""
    index: int = 0
    count: int = 0
    proof: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened: the event's name and its arguments by name (snake case, structs as above)."""

    name: str
    args: Mapping[str, Any]
    block: int


class Refused(FailureError):
    """The ledger refused a call: the contract's error by name, with its arguments."""

    def __init__(self, error: str, args: Sequence[Any] = (), *, call: str = "", remedy: str = "") -> None:
        self.error, self.values = error, tuple(args)
        told = ", ".join(str(value) for value in self.values)
        super().__init__(f"{call or 'the call'}: the ledger answered {error}({told}); {remedy or 'see docs/ledger.md'}")


class DryRun(Exception):
    """A call that would have been made; nothing was sent, so what comes after it cannot be told."""


class Ledger(Protocol):
    """A ledger as its users see it. Functions have the names of ILedger in snake case; arguments are as above."""

    def send(self, sender: Account, function: str, *args: Any, value: int = 0) -> tuple[Event, ...]:
        """Make a call that changes something and wait until it is settled; its events. Refused where it is refused."""

    def approve(self, sender: Account, token: Account, amount: int) -> None:
        """Let the ledger take so much of an ERC-20 of the sender's, as `deposit` does; UsageError where it has less."""

    def read(self, function: str, *args: Any) -> Any:
        """The answer of a view."""

    def events(self, since: int = 0) -> tuple[Event, ...]:
        """All events from block `since` on, in order."""

    def now(self) -> tuple[int, int]:
        """(number, time in seconds) of the newest block."""

    def wait(self, until: int) -> None:
        """Come back when the chain's clock has reached `until`; an embedded chain's is put forward."""
