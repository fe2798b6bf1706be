"""Delegations: a hot key's signature that it acts for an account, made where the key is and used where the account is.

The file is JSON with `format`, `chain`, `ledger`, `account`, `key`, `deadline` (the chain's seconds) and `signature`
(65 bytes, hexadecimal) over the EIP-712 message of docs/ledger.md. It is worth nothing on another chain or contract.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledger.port import Account
from ledger.secrets import delegation
from storage.errors import IntegrityError, UsageError
from storage.files import file_failure
from storage.foreign import parse_json
from storage.identity import Identity, recover
from trueweight.chains import Connection

FORMAT = "trueweight-delegation-1"
HOUR = 3600
_REMEDY = "make it again with `trueweight ledger sign-delegation`"


@dataclass(frozen=True, kw_only=True)
class Delegation:
    """That `key` acts for `account` on one ledger, if it is sent before `deadline`."""

    chain: int
    ledger: Account
    account: Account
    key: Account
    deadline: int
    signature: bytes

    def as_json(self) -> dict[str, Any]:
        """The values of the file."""
        return {"format": FORMAT, **vars(self), "signature": self.signature.hex()}


def sign(chain: Connection, key: Account, account: Account, deadline: int) -> Delegation:
    """The delegation of a key that is here; UsageError where it already acts for somebody."""
    ledger = chain.deployed()
    owner = ledger.read("account_of", key)
    if owner != key:
        raise UsageError(f"key {key}: expected one that acts for nobody, got one of {owner}; use another key")
    number = chain.node.chain_id()
    signed = Identity(chain.secrets[key]).sign(delegation(number, ledger.address, account, deadline))
    return Delegation(
        chain=number,
        ledger=ledger.address,
        account=account,
        key=key,
        deadline=deadline,
        signature=signed[:64] + bytes([signed[64] + 27]),
    )


def read(path: Path, chain: Connection, account: Account) -> Delegation:
    """The delegation in a file, for this ledger and account; UsageError where it is for others, or no such thing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise (
            file_failure("reading", path, error)
            if isinstance(error, OSError)
            else UsageError(f"{path}: expected JSON; {_REMEDY}")
        ) from error
    try:
        told = parse_json(text)
        found = Delegation(
            chain=int(told["chain"]),
            ledger=str(told["ledger"]),
            account=str(told["account"]),
            key=str(told["key"]),
            deadline=int(told["deadline"]),
            signature=bytes.fromhex(told["signature"]),
        )
        known = told["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: expected a delegation, got a fault in {error}; {_REMEDY}") from error
    here = (FORMAT, chain.node.chain_id(), chain.deployed().address, account)
    theirs = (known, found.chain, found.ledger, found.account)
    for what, expected, got in zip(("format", "chain", "ledger", "account"), here, theirs, strict=True):
        if expected != got:
            raise UsageError(f"{path}: expected {what} {expected}, got {got}; {_REMEDY}, for this one")
    if _signer(found) != found.key:
        raise UsageError(f"{path}: the signature is not by {found.key}; {_REMEDY}")
    return found


def _signer(found: Delegation) -> Account | None:
    message = delegation(found.chain, found.ledger, found.account, found.deadline)
    try:
        bare = found.signature[:64] + bytes([max(found.signature[64] - 27, 0)])
        return "0x" + recover(message, bare).hex()
    except (IndexError, IntegrityError):
        return None
