"""Secrets: the chain, forced errors and their shadow records, seals as the contract computes them."""

from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

import pytest
from eth_abi.abi import encode as abi
from eth_account.messages import encode_typed_data
from eth_utils.crypto import keccak

from ledger.secrets import Chain, committed_form, delegation, forced, record_seal, shadow, verdict_seal
from storage.codec import decode, encode
from storage.errors import UsageError
from storage.merkle import list_root
from storage.records import RecordList, SegmentRecord, StepRecord

SEED = sha256(b"seed").digest()
ONE, TWO = (sha256(bytes([number])).digest() for number in range(2))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_each_secret_hashes_to_the_one_before(length: int) -> None:
    chain = Chain(SEED, length)
    secrets = [chain.end, *(chain.secret(number) for number in range(1, length + 1))]
    assert all(keccak(after) == before for before, after in pairwise(secrets))
    assert secrets[-1] == SEED
    with pytest.raises(UsageError, match=f"secret {length + 1}: expected 1 to {length}"):
        chain.secret(length + 1)
    with pytest.raises(UsageError):
        chain.secret(0)


def test_a_whole_chain() -> None:
    chain = Chain(SEED)
    assert chain.length == 65_536
    assert keccak(chain.secret(1)) == chain.end
    with pytest.raises(ValueError, match="expected 32 bytes, got 3"):
        Chain(b"abc")


def test_forced_errors_come_at_their_rate_and_are_what_the_contract_computes() -> None:
    rate = 1 << 30
    hits = 0
    for index in range(400):
        ticket = keccak(abi(["bytes32", "bytes32", "uint32", "uint32"], [ONE, TWO, index, 3]))
        due = forced(ONE, TWO, index, 3, rate)
        assert due == (int.from_bytes(ticket[:4], "big") < rate)
        hits += due
    assert 60 < hits < 140
    assert not forced(ONE, TWO, 0, 0, 0)


def test_seals_are_what_the_contract_computes() -> None:
    account = "0x" + "ab" * 20
    assert record_seal(ONE, TWO) == keccak(abi(["bytes32", "bytes32"], [ONE, TWO]))
    sealed = keccak(abi(["bytes32", "address", "bool", "bytes32", "bytes32"], [ONE, account, True, TWO, SEED]))
    assert verdict_seal(ONE, account, True, TWO, SEED) == sealed


def test_the_message_of_a_delegation_is_that_of_eip_712() -> None:
    ledger, account = "0x" + "1e" * 20, "0x" + "ab" * 20
    message = encode_typed_data(
        {"name": "Trueweight", "version": "1", "chainId": 31337, "verifyingContract": ledger},
        {"Delegate": [{"name": "account", "type": "address"}, {"name": "deadline", "type": "uint256"}]},
        {"account": account, "deadline": 99},
    )
    assert delegation(31337, ledger, account, 99) == keccak(b"\x19\x01" + message.header + message.body)


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number,
        data=ONE,
        loss=1,
        units=2,
        gradient_root=ONE,
        state_root=TWO,
        validation=(),
        events=(),
        receipts_root=ONE,
    )


def test_a_shadow_record_differs_in_one_gradient_and_nothing_that_goes_on() -> None:
    steps = tuple(encode(step(number)) for number in range(5))
    true = SegmentRecord(
        run=ONE,
        index=3,
        first_step=0,
        steps=5,
        prestate=ONE,
        poststate=TWO,
        steps_root=list_root(steps),
        receipts_root=ONE,
        previous=ONE,
        steps_object=TWO,
        receipts_object=TWO,
    )
    false, listed = shadow(true, steps, SEED)
    assert false.previous == bytes(32)
    assert (false.steps_root, false.steps_object) == (list_root(listed.items), sha256(encode(listed)).digest())
    assert encode(replace(false, steps_root=true.steps_root, steps_object=true.steps_object)) == committed_form(true)
    assert len(committed_form(true)) == 274
    changed = [place for place, item in enumerate(listed.items) if item != steps[place]]
    assert len(changed) == 1
    altered = decode(StepRecord, listed.items[changed[0]])
    assert altered.gradient_root != ONE
    assert replace(altered, gradient_root=ONE) == step(changed[0])
    assert shadow(true, steps, SEED) == (false, listed)
    assert isinstance(listed, RecordList)
    assert {shadow(true, steps, bytes([n]) * 32)[1].items for n in range(20)} != {listed.items}
    with pytest.raises(ValueError, match="expected the steps' records, got none"):
        shadow(true, (), SEED)
