"""Who did the work: secp256k1 keys, Ethereum addresses, signed receipts.

The message of a receipt is SHA-256("trueweight-receipt-v1" | 0x00 | the encoded receipt with an empty signature). A
signature is r | s | v with v in {0, 1} and s in the lower half of the order, so nobody can make a second one from it.
"""

import dataclasses
import os
import stat
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from eth_keys.backends.coincurve import CoinCurveECCBackend
from eth_keys.constants import SECPK1_N
from eth_keys.datatypes import PrivateKey, Signature
from eth_keys.exceptions import BadSignature
from eth_utils.exceptions import ValidationError

from storage.codec import encode
from storage.errors import IntegrityError, UsageError
from storage.files import file_failure, make_folder, write_whole
from storage.records import Receipt

T = TypeVar("T")

RECEIPT_DOMAIN = b"trueweight-receipt-v1\0"
_BACKEND = CoinCurveECCBackend()


class Identity:
    """A worker's key. Its address is public; the secret stays in this object and in its file."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32 or not 0 < int.from_bytes(secret, "big") < SECPK1_N:
            raise ValueError(f"key: expected 32 bytes in the range of secp256k1, got {len(secret)} bytes")
        self._key = PrivateKey(secret, backend=_BACKEND)
        self.address: bytes = self._key.public_key.to_canonical_address()

    def __repr__(self) -> str:
        return f"Identity(0x{self.address.hex()})"

    def sign(self, digest: bytes) -> bytes:
        """65 bytes over a 32-byte digest; the same digest always gets the same signature (RFC 6979)."""
        return self._key.sign_msg_hash(digest).to_bytes()


def load_or_create(path: Path | str) -> Identity:
    """The identity in the file; where there is none, a new one that is written there with mode 0600.

    Of several processes that create the same file at once, all return the same identity. UsageError where the file
    holds no key or others may read it.
    """
    path = Path(path)
    if not path.exists():
        make_folder(path.parent)
        with suppress(FileExistsError):
            write_whole(path, new_secret().hex().encode() + b"\n", mode=0o600, exclusive=True)
    return _load(path)


def new_secret() -> bytes:
    """32 random bytes in the range of secp256k1."""
    while True:
        secret = os.urandom(32)
        if 0 < int.from_bytes(secret, "big") < SECPK1_N:
            return secret


def recover(digest: bytes, signature: bytes) -> bytes:
    """The address (20 bytes) whose key signed the digest; IntegrityError where the signature is malformed."""
    try:
        if len(signature) != 65:
            raise BadSignature(f"expected 65 bytes, got {len(signature)}")
        made = Signature(signature, backend=_BACKEND)
        if made.s > SECPK1_N // 2:
            raise BadSignature("s is in the upper half of the order")
        return made.recover_public_key_from_msg_hash(digest).to_canonical_address()
    except (BadSignature, ValidationError, ValueError) as error:
        name = digest.hex()
        raise IntegrityError(f"signature over {name}: {error}; reject what it signs", digest=name) from error


def message(domain: bytes, record: Any) -> bytes:
    """The 32 bytes that are signed: SHA-256 of the domain and everything in the record but its `signature`."""
    return sha256(domain + encode(dataclasses.replace(record, signature=b""))).digest()


def sign(identity: Identity, domain: bytes, record: T) -> T:
    """The record with the identity's signature; ValueError where its `address` is another."""
    address: bytes = record.address  # type: ignore[attr-defined]
    if address != identity.address:
        raise ValueError(f"{type(record).__name__}: expected address {identity.address.hex()}, got {address.hex()}")
    return dataclasses.replace(record, signature=identity.sign(message(domain, record)))  # type: ignore[type-var]


def signed(domain: bytes, record: Any) -> bool:
    """Whether the record's `signature` is by the key of its `address`."""
    address: bytes = record.address
    try:
        return recover(message(domain, record), record.signature) == address
    except IntegrityError:
        return False


def receipt_message(receipt: Receipt) -> bytes:
    """The 32 bytes that the worker signs: everything in the receipt but the signature."""
    return message(RECEIPT_DOMAIN, receipt)


def sign_receipt(identity: Identity, receipt: Receipt) -> Receipt:
    """The receipt with the identity's signature; ValueError where it states another address."""
    return sign(identity, RECEIPT_DOMAIN, receipt)


def receipt_signer_ok(receipt: Receipt) -> bool:
    """Whether the receipt is signed by the key of the address that it states."""
    return signed(RECEIPT_DOMAIN, receipt)


def _load(path: Path) -> Identity:
    try:
        mode = path.stat().st_mode
        text = path.read_bytes()
    except OSError as error:
        raise file_failure("reading the key", path, error) from error
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"key {path}: expected mode 0600, got {stat.S_IMODE(mode):04o}; run chmod 600 on it")
    try:
        return Identity(bytes.fromhex(text.decode("ascii")))
    except ValueError:
        raise UsageError(
            f"key {path}: expected 64 hexadecimal digits of a secp256k1 key; restore the file or move it away"
        ) from None
