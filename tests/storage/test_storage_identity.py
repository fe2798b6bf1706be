"""Worker keys: known Ethereum addresses, signatures that recover, files that stay private."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from eth_keys.constants import SECPK1_N
from hypothesis import given
from hypothesis import strategies as st

from storage.codec import NO_DIGEST
from storage.errors import IntegrityError, UsageError
from storage.identity import Identity, load_or_create, receipt_message, receipt_signer_ok, recover, sign_receipt
from storage.records import Receipt, UnitRecord

IDENTITY = Identity((1).to_bytes(32, "big"))
OTHER = Identity((2).to_bytes(32, "big"))
UNIT = UnitRecord(micro_batch=0, x=b"x" * 32, y=b"y" * 32, dy=b"d" * 32, dx=NO_DIGEST)
RECEIPT = sign_receipt(
    IDENTITY,
    Receipt(
        run=b"r" * 32,
        step=3,
        worker="s0r0",
        address=IDENTITY.address,
        bounds=(0, 2, 3),
        replicas=1,
        units=(UNIT, dataclasses.replace(UNIT, micro_batch=2)),
        gradient_root=b"g" * 32,
        exponent=120,
        reduced_root=b"r" * 32,
        square=9,
        updated_root=b"u" * 32,
        signature=b"",
    ),
)


@pytest.mark.parametrize(
    ("secret", "address"),
    [
        (f"{1:064x}", "7e5f4552091a69125d5dfcb7b8c2659029395bdf"),
        # The example of web3.js' accounts.
        (
            "4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318",
            "2c7536e3605d9c16a7a3d7b1898e529396a65c23",
        ),
    ],
)
def test_address_is_the_one_ethereum_derives(secret: str, address: str) -> None:
    identity = Identity(bytes.fromhex(secret))
    assert identity.address.hex() == address
    assert repr(identity) == f"Identity(0x{address})"


@given(st.binary(min_size=32, max_size=32), st.integers(1, SECPK1_N - 1))
def test_signature_recovers_to_its_signer(digest: bytes, secret: int) -> None:
    identity = Identity(secret.to_bytes(32, "big"))
    signature = identity.sign(digest)
    assert len(signature) == 65
    assert signature == identity.sign(digest)
    assert recover(digest, signature) == identity.address


@given(st.integers(0, 65 * 8 - 1))
def test_tampered_signature_does_not_recover_to_its_signer(bit: int) -> None:
    changed = bytearray(IDENTITY.sign(b"d" * 32))
    changed[bit // 8] ^= 1 << bit % 8
    with suppress(IntegrityError):
        assert recover(b"d" * 32, bytes(changed)) != IDENTITY.address


def test_second_signature_made_from_the_first_is_refused() -> None:
    signature = IDENTITY.sign(b"d" * 32)
    s = SECPK1_N - int.from_bytes(signature[32:64], "big")
    twin = signature[:32] + s.to_bytes(32, "big") + bytes([signature[64] ^ 1])
    with pytest.raises(IntegrityError, match="upper half of the order"):
        recover(b"d" * 32, twin)


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(65), bytes(66), b"\xff" * 65])
def test_malformed_signature_is_an_integrity_error(signature: bytes) -> None:
    with pytest.raises(IntegrityError, match=f"signature over {(b'd' * 32).hex()}"):
        recover(b"d" * 32, signature)


def test_receipt_is_signed_over_everything_else() -> None:
    assert receipt_signer_ok(RECEIPT)
    assert receipt_message(RECEIPT) == receipt_message(dataclasses.replace(RECEIPT, signature=b""))
    for change in (
        {"run": b"x" * 32},
        {"step": 4},
        {"worker": "s0r1"},
        {"address": OTHER.address},
        {"bounds": (0, 1, 3)},
        {"replicas": 2},
        {"units": (UNIT,)},
        {"gradient_root": b"x" * 32},
        {"exponent": 121},
        {"reduced_root": b"x" * 32},
        {"square": 8},
        {"updated_root": b"x" * 32},
        {"signature": b""},
        {"signature": OTHER.sign(receipt_message(RECEIPT))},
    ):
        assert not receipt_signer_ok(dataclasses.replace(RECEIPT, **change)), change


def test_nobody_signs_a_receipt_of_another_address() -> None:
    with pytest.raises(ValueError, match="expected address"):
        sign_receipt(OTHER, RECEIPT)


def test_identity_is_created_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "worker"
    created = load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create(path).address == created.address
    assert load_or_create(tmp_path / "other").address != created.address
    assert [each.name for each in path.parent.iterdir()] == ["worker"]


def test_processes_that_race_get_one_identity(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: load_or_create(tmp_path / "key").address, range(16)))
    assert len(set(made)) == 1


@pytest.mark.parametrize("text", ["", "not hex", "00" * 32, "ff" * 32, "01" * 31, "ä" * 64])
def test_file_without_a_key_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="expected 64 hexadecimal digits") as caught:
        load_or_create(path)
    assert not text or text not in str(caught.value)
    assert path.read_text(encoding="utf-8") == text


def test_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="expected mode 0600, got 0644; run chmod 600"):
        load_or_create(path)
