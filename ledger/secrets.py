"""What operators and verifiers keep to themselves until it is time: the chain of secrets, forced errors, seals.

A chain is s_0 = keccak256(s_1), s_1 = keccak256(s_2), ... The ledger gets s_0 when the operator accepts a run, and one
further secret for each segment that is opened. With the run's beacon a secret says whether the segment had to be
committed with a false record: the operator knows beforehand, everybody else only when it is opened.
"""

import dataclasses
from collections.abc import Sequence
from hashlib import sha256

from eth_utils.crypto import keccak

from ledger.port import Account
from storage.codec import NO_DIGEST, decode, encode
from storage.errors import UsageError
from storage.merkle import list_root
from storage.records import RecordList, SegmentRecord, StepRecord

CHAIN_LENGTH = 1 << 16
"""Links of a chain: as many segments can be opened, those that are rejected later included."""

_STRIDE = 1 << 8


class Chain:
    """An operator's secrets. One costs at most 256 hashes; making the chain costs all of them, once."""

    def __init__(self, seed: bytes, length: int = CHAIN_LENGTH) -> None:
        if len(seed) != 32:
            raise ValueError(f"seed of the secrets: expected 32 bytes, got {len(seed)}")
        self.length = length
        self._kept = {length: seed}
        secret = seed
        for number in range(length - 1, -1, -1):
            secret = keccak(secret)
            if number % _STRIDE == 0:
                self._kept[number] = secret

    @property
    def end(self) -> bytes:
        """s_0, which the ledger gets with `accept`."""
        return self._kept[0]

    def secret(self, number: int) -> bytes:
        """s_number, which opens the number-th segment that is opened, counted from 1."""
        if not 0 < number <= self.length:
            raise UsageError(
                f"secret {number}: expected 1 to {self.length}; the chain is used up, so the run must be cancelled"
            )
        above = min(-(-number // _STRIDE) * _STRIDE, self.length)
        secret = self._kept[above]
        for _ in range(above - number):
            secret = keccak(secret)
        return secret


def forced(secret: bytes, beacon: bytes, index: int, attempt: int, rate: int) -> bool:
    """Whether segment `index`, committed after `attempt` rejected ones, must have a false record; of 2**32 so many."""
    ticket = keccak(secret + beacon + _word(index) + _word(attempt))
    return int.from_bytes(ticket[:4], "big") < rate


def record_seal(record: bytes, salt: bytes) -> bytes:
    """Commitment.seal: of the digest of the true SegmentRecord with `previous` zero."""
    return keccak(record + salt)


def verdict_seal(segment: bytes, account: Account, ok: bool, witness: bytes, salt: bytes) -> bytes:
    """What an account seals before it reveals its verdict on the segment of that name."""
    return keccak(segment + _word(int(account, 16)) + _word(ok) + witness + salt)


def delegation(chain_id: int, ledger: Account, account: Account, deadline: int) -> bytes:
    """The 32 bytes that a key signs to become a hot key of `account`: EIP-712, Delegate(account, deadline)."""
    domain = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
    separator = keccak(keccak(domain) + keccak(b"Trueweight") + keccak(b"1") + _word(chain_id) + _word(int(ledger, 16)))
    told = keccak(b"Delegate(address account,uint256 deadline)") + _word(int(account, 16)) + _word(deadline)
    return keccak(b"\x19\x01" + separator + keccak(told))


def committed_form(record: SegmentRecord) -> bytes:
    """The bytes of a record as they are committed: `previous` zero, for what came before may be committed again."""
    return encode(dataclasses.replace(record, previous=NO_DIGEST))


def shadow(record: SegmentRecord, steps: Sequence[bytes], secret: bytes) -> tuple[SegmentRecord, RecordList]:
    """The false record of a forced error, and the list of steps to publish with it.

    One step's gradient_root is another; which one and what it is follows from the secret. Nothing but a replay of that
    step tells: both states, losses and receipts are the true ones, and training goes on from the true poststate.
    """
    if not steps:
        raise ValueError(f"segment {record.index}: expected the steps' records, got none")
    chosen = int.from_bytes(sha256(b"step" + secret).digest(), "big") % len(steps)
    step = dataclasses.replace(decode(StepRecord, steps[chosen]), gradient_root=sha256(b"root" + secret).digest())
    items = (*steps[:chosen], encode(step), *steps[chosen + 1 :])
    listed = RecordList(items=items)
    false = dataclasses.replace(
        record,
        previous=NO_DIGEST,
        steps_root=list_root(items),
        steps_object=sha256(encode(listed)).digest(),
    )
    return false, listed


def _word(number: int) -> bytes:
    return number.to_bytes(32, "big")
