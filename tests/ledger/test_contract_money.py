"""The compiled contracts: a whole run with conservation to the wei, balances, keys, runs and bonds."""

from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from eth_abi.abi import encode
from eth_keys.datatypes import PrivateKey
from eth_utils.crypto import keccak

from ledger.port import BURN, NATIVE, Leaf, Outcome, Refused, Role, Status, Tree
from ledger.testing import (
    ALWAYS,
    CAP,
    CHAIN_END,
    DELAY,
    ENTRIES,
    HALF,
    KEYS,
    OPERATOR,
    PAYOUTS,
    POSTSTATE,
    RECORD,
    RICH,
    SECRETS,
    STEPS,
    STRANGER,
    SUBMITTER,
    TENSORS,
    UNBONDING,
    VERIFIERS,
    WHISTLERS,
    WORKERS,
    ZERO,
    Chain,
    Contract,
    World,
    delegate,
    drawn_of,
    later_beacon,
    leaf_proof,
    refused,
    signed,
    verdict_of,
)
from storage import merkle

pytestmark = pytest.mark.chain

# ---------------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("token", ["", "MockToken", "SilentToken"])
def test_a_whole_run(token: str) -> None:
    beacon = later_beacon((0, 0, 0, True), (1, 1, 0, False), (2, 1, 2, False))
    world = World(token=token, segments=2, forced_rate=HALF).begin(beacon)
    run, chain = world.run, world.chain
    true = sha256(b"the true record").digest()
    first, second = world.commit({"true": true}, {})
    assert (first.index, second.index, second.prestate) == (0, 1, POSTSTATE)
    drawn = world.draw(first)
    world.draw(second)

    # The first is a forced error, two flag it, one of the assigned says ok.
    chunks = [TENSORS["a"][at : at + 4096] for at in range(0, 10_000, 4096)]
    world.do(WHISTLERS[2], "demand", run, first, Tree.TENSOR, 2, leaf_proof(ENTRIES, 0))
    shown = leaf_proof(chunks, 2)
    args = (merkle.bytes_root(TENSORS["a"]), 2, 3, shown.data, shown.proof)
    before = world.balance(OPERATOR)
    world.do(STRANGER, "answer", run, first, *args)
    assert world.balance(OPERATOR) == before + run.flag_bond
    start = world.start(first)
    for account, ok in ((WHISTLERS[0], False), (WHISTLERS[1], False), (drawn[0], True)):
        world.seal(first, account, ok=ok)
    for account, ok in ((WHISTLERS[0], False), (drawn[0], True)):
        world.seal(second, account, ok=ok)
    chain.go(until=start + run.window // 2)
    for account, ok in ((WHISTLERS[0], False), (WHISTLERS[1], False), (drawn[0], True)):
        world.reveal(first, account, ok=ok)
    for account, ok in ((WHISTLERS[0], False), (drawn[0], True)):
        world.reveal(second, account, ok=ok)
    chain.go(until=start + run.window)
    assert world.unseal(first, true=true).forced
    assert not world.unseal(second).forced
    world.do(STRANGER, "finalise", run, first)
    assert world.state.pot == run.pot - run.jackpot  # two times a half

    # The second is forged: the court says so, and whose unit it was.
    world.judge(second, upheld=True, culprit=WORKERS[0])
    slashed = run.operator_bond + run.worker_bond
    assert world.outcome(second) == Outcome.REJECTED
    assert world.state.state == POSTSTATE
    state = world.see("segmentOf", second.name)
    assert (state.share, state.harm) == (slashed * 40 // 100, slashed * 30 // 100)
    with refused("NotAllowed"):
        world.do(STRANGER, "compensate", run, second, *PAYOUTS.proof(0))
    before = world.balance(WORKERS[1])
    world.do(STRANGER, "compensate", run, second, *PAYOUTS.proof(1))
    assert world.balance(WORKERS[1]) == before + state.harm * 101 // PAYOUTS.root[1]

    # Again, and this time the data is withheld.
    with refused("Insufficient", run.operator_bond, 0):
        world.commit()
    world.do(OPERATOR, "join", run, Role.OPERATOR, 0)
    (again,) = world.commit()
    assert (again.index, again.attempt) == (1, 1)
    world.draw(again)
    world.do(WHISTLERS[3], "demand", run, again, Tree.STEPS, 1, Leaf())
    with refused("TooEarly", chain.time + run.answer):
        world.do(STRANGER, "withheld", run, again, merkle.list_root(STEPS), 1, 3)
    chain.go(seconds=run.answer)
    before = world.balance(WHISTLERS[3])
    world.do(STRANGER, "withheld", run, again, merkle.list_root(STEPS), 1, 3)
    assert world.balance(WHISTLERS[3]) == before + run.flag_bond + run.operator_bond * 40 // 100
    world.do(OPERATOR, "join", run, Role.OPERATOR, 0)
    (third,) = world.commit()
    world.vote(third, dict.fromkeys(world.draw(third), True))
    world.unseal(third)
    world.do(STRANGER, "finalise", run, third)

    # Everybody gets what is theirs, and nothing is left but what was burnt and what the culprit would have had.
    for segment in (first, third):
        for leaf in range(len(PAYOUTS.leaves)):
            world.do(STRANGER, "claim", run, segment, *PAYOUTS.proof(leaf))
    for leaf in range(2, 5):
        world.do(STRANGER, "compensate", run, second, *PAYOUTS.proof(leaf))
    for segment in (first, second, again, third):
        for account in (*VERIFIERS[:3], *WHISTLERS[:4]):
            if world.see("verdictOf", segment.name, account).mark != bytes(28) or account in drawn_of(world, segment):
                world.do(STRANGER, "settle", run, segment, account)
    with refused("TooEarly", chain.time + run.answer + run.dispute):
        world.do(STRANGER, "close", run)
    chain.go(seconds=run.answer + run.dispute)
    world.do(STRANGER, "close", run)
    assert world.state.status == Status.CLOSED
    world.do(OPERATOR, "resign", run, Role.OPERATOR)
    for verifier in VERIFIERS[:3]:
        if not world.see("bondOf", run.id, Role.VERIFIER, verifier).releaseAt:
            world.do(verifier, "resign", run, Role.VERIFIER)
    world.do(WORKERS[0], "resign", run, Role.WORKER)
    chain.go(seconds=UNBONDING)
    for _, role, account in sorted(world.bonds):
        world.do(STRANGER, "release", run, role, account)
    for account in world.accounts - {BURN}:
        world.do(account, "withdraw", run.token, world.balance(account), account)
    dust = world.see("segmentOf", second.name).harm - world.paid[second.name]
    unclaimed = world.see("segmentOf", again.name).harm
    assert world.see("held", run.token) == world.balance(BURN) + dust + unclaimed


# ------------------------------------------------------------------------------------------------------------ balances


def selector(error: str) -> bytes:
    return keccak(f"{error}()".encode())[:4]


def test_balances_come_and_go() -> None:
    world = World()
    world.fund(STRANGER, amount=70)
    with refused("Insufficient", 71, 70):
        world.do(STRANGER, "withdraw", NATIVE, 71, STRANGER)
    with refused("Insufficient", 2**256 - 1, 70):
        world.do(STRANGER, "withdraw", NATIVE, 2**256 - 1, STRANGER)
    world.do(STRANGER, "withdraw", NATIVE, 30, WORKERS[0])
    assert world.balance(STRANGER) == world.see("held", NATIVE) == 40
    assert world.chain.evm.get_balance(WORKERS[0]) == RICH + 30
    assert (world.see("cap"), world.see("UNBONDING"), world.see("DELAY")) == (CAP, UNBONDING, DELAY)


def test_a_deposit_has_to_arrive() -> None:
    world = World(token="MockToken")
    token = world.token
    assert token is not None
    with refused("NotArrived", 5, 4):
        world.do(STRANGER, "deposit", NATIVE, 5, value=4)
    with refused("NotArrived", 0, 1):
        world.do(STRANGER, "deposit", token.address, 5, value=1)
    with refused("TransferFailed"):
        world.do(STRANGER, "deposit", WORKERS[0], 5)  # no contract
    with refused("TransferFailed"):
        world.do(STRANGER, "deposit", token.address, 5)  # not approved
    world.fund(STRANGER)
    world.chain.send(STRANGER, token, "mint", STRANGER, 50)
    world.chain.send(STRANGER, token, "approve", world.ledger.address, 50)
    world.chain.send(STRANGER, token, "setFee", 3)
    with refused("NotArrived", 50, 47):
        world.do(STRANGER, "deposit", token.address, 50)
    with refused("NotArrived", 0, 7):
        world.do(SUBMITTER, "open", world.run, RECORD, value=7)


def test_the_cap_holds_for_every_door_and_forced_money_does_not_count() -> None:
    world = World(cap=10_000)
    world.chain.deploy("Bomb", world.ledger.address, value=0)
    bomb = Contract("Bomb")
    world.chain.evm.deploy(STRANGER, bomb.code + encode(["address"], [world.ledger.address]), value=5_000)
    assert world.owned() == 5_000
    assert world.see("held", NATIVE) == 0
    world.do(STRANGER, "deposit", NATIVE, 10_000, value=10_000)
    with refused("CapExceeded", 10_000):
        world.do(STRANGER, "deposit", NATIVE, 1, value=1)
    with refused("CapExceeded", 10_000):
        world.do(SUBMITTER, "open", world.run, RECORD, value=8_330)
    world.do(STRANGER, "withdraw", NATIVE, 10_000, STRANGER)
    world.do(SUBMITTER, "open", world.run, RECORD, value=8_330)
    world = World(cap=2**256 - 1)
    world.do(STRANGER, "deposit", NATIVE, 1, value=1)


def test_a_token_that_lies_takes_nothing_away() -> None:
    world = World(token="FalseToken")
    assert world.token is not None
    world.fund(STRANGER, amount=50)
    world.chain.send(STRANGER, world.token, "setHonest", False)
    with refused("TransferFailed"):
        world.do(STRANGER, "deposit", world.token.address, 0)
    with refused("TransferFailed"):
        world.do(STRANGER, "withdraw", world.token.address, 50, STRANGER)
    assert world.balance(STRANGER) == 50


def test_a_token_cannot_reenter() -> None:
    world = World(token="HookedToken")
    chain, token, ledger = world.chain, world.token, world.ledger
    assert token is not None
    world.fund(STRANGER, amount=100)
    for inner in (
        ledger.data("withdraw", token.address, 0, token.address),
        ledger.data("deposit", token.address, 0),
        ledger.data("cancel", world.run),
    ):
        chain.send(STRANGER, token, "setHook", ledger.address, inner)
        world.do(STRANGER, "withdraw", token.address, 10, STRANGER)
        assert not chain.read(token, "succeeded")
        assert chain.read(token, "answer") == selector("ReentrancyGuardReentrantCall")
        chain.send(STRANGER, token, "approve", ledger.address, 10)
        world.do(STRANGER, "deposit", token.address, 10)
        assert chain.read(token, "answer") == selector("ReentrancyGuardReentrantCall")


def test_a_receiver_cannot_reenter_and_can_only_refuse_its_own() -> None:
    world = World()
    chain, ledger = world.chain, world.ledger
    receiver = chain.deploy("Receiver")
    world.accounts.add(receiver.address)
    chain.send(STRANGER, receiver, "act", ledger.address, ledger.data("deposit", NATIVE, 100), value=100)
    again = ledger.data("withdraw", NATIVE, 40, receiver.address)
    chain.send(STRANGER, receiver, "set", ledger.address, again, False)
    chain.send(STRANGER, receiver, "act", ledger.address, again)
    assert world.balance(receiver.address) == 60
    assert chain.read(receiver, "answer") == selector("ReentrancyGuardReentrantCall")
    chain.send(STRANGER, receiver, "set", NATIVE, b"", True)
    with refused("TransferFailed"):
        chain.send(STRANGER, receiver, "act", ledger.address, again)
    world.check()
    assert world.balance(receiver.address) == 60


# ---------------------------------------------------------------------------------------------------------------- keys


def test_a_key_belongs_to_whom_it_signed_for() -> None:
    world = World()
    until = world.chain.time + 10
    key, domain = KEYS[WORKERS[0]], world.see("DOMAIN_SEPARATOR")
    kind = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
    names = [keccak(b"Trueweight"), keccak(b"1")]
    types = ["bytes32", "bytes32", "bytes32", "uint256", "address"]
    assert domain == keccak(encode(types, [kind, *names, 1, world.ledger.address]))
    good = signed(key, domain, STRANGER, until)
    elsewhere = World(chain=Chain(chain_id=2)).see("DOMAIN_SEPARATOR")
    other = World(chain=world.chain).see("DOMAIN_SEPARATOR")
    assert len({domain, elsewhere, other}) == 3
    high_s = 2**256 - 0x14551231950B75FC4402DA1732FC9BEBF - int.from_bytes(good[32:64], "big")
    for wrong in (
        signed(key, elsewhere, STRANGER, until),
        signed(key, other, STRANGER, until),
        signed(key, domain, OPERATOR, until),
        signed(key, domain, STRANGER, until + 1),
        signed(KEYS[WORKERS[1]], domain, STRANGER, until),
        good[:32] + high_s.to_bytes(32, "big") + bytes([55 - good[64]]),
        good[:64],
        good[:64] + b"\0",
        b"",
    ):
        with refused("BadSignature"):
            world.do(STRANGER, "delegate", WORKERS[0], until, wrong)
    with refused("BadSignature"):
        world.do(STRANGER, "delegate", NATIVE, until, good[:64] + b"\x05")
    assert world.see("accountOf", WORKERS[0]) == WORKERS[0]
    world.do(STRANGER, "delegate", WORKERS[0], until, good)
    assert world.see("accountOf", WORKERS[0]) == STRANGER
    with refused("Already"):
        world.do(STRANGER, "delegate", WORKERS[0], until, good)
    with refused("Already"):
        world.do(OPERATOR, "delegate", WORKERS[0], until, signed(key, domain, OPERATOR, until))
    world.chain.go(until=until)
    with refused("TooLate", until):
        world.do(STRANGER, "delegate", WORKERS[0], until, good)


def test_a_key_acts_for_its_account_but_pays_for_itself(begun: World) -> None:
    key = WORKERS[2]
    delegate(begun, OPERATOR, key)
    begun.do(key, "commit", begun.run, [begun.commitment(0, begun.state.state)])
    segment = next(iter(begun.segments.values()))
    drawn = begun.draw(segment)
    flagger = WHISTLERS[5]
    delegate(begun, VERIFIERS[5], flagger)
    begun.fund(VERIFIERS[5])
    had = begun.balance(VERIFIERS[5])
    sealed = verdict_of(segment.name, VERIFIERS[5], True, ZERO, ZERO)
    with refused("Insufficient", 100, 0):
        begun.do(flagger, "seal", begun.run, segment, sealed)
    begun.do(flagger, "seal", begun.run, segment, sealed, value=100)
    begun.vote(segment, dict.fromkeys(drawn, True))
    begun.do(key, "unseal", begun.run, segment, SECRETS[0], ZERO, segment.record, ZERO)
    begun.do(STRANGER, "finalise", begun.run, segment)
    begun.do(STRANGER, "settle", begun.run, segment, VERIFIERS[5])
    assert begun.balance(VERIFIERS[5]) == had + 100  # what its key put up
    delegate(begun, VERIFIERS[5], WORKERS[0])
    begun.do(STRANGER, "claim", begun.run, segment, *PAYOUTS.proof(0))
    assert begun.balance(VERIFIERS[5]) == had + 200
    for refuse in ("cancel", "close"):
        with pytest.raises(Refused):
            begun.do(key, refuse, begun.run)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("term", "changed"),
    [
        ("segments", {"segments": 0}),
        ("work", {"work": 0}),
        ("verifiers", {"verifiers": 9}),
        ("shares", {"reporter_share": 51, "harmed_share": 50}),
        ("shares", {"reporter_share": 255, "harmed_share": 255}),
        ("missPenalty", {"miss_penalty": 101}),
        ("window", {"window": 1}),
        ("answer", {"answer": 0}),
        ("dispute", {"dispute": 0}),
        ("flagBond", {"flag_bond": 0}),
        ("unbonding", {"window": UNBONDING - 2 * 50 - 60 + 1}),
        ("unbonding", {"window": 2**32 - 1, "answer": 2**32 - 1, "dispute": 2**32 - 1}),
        ("operator", {"operator": NATIVE}),
        ("court", {"court": NATIVE}),
        ("beacon", {"beacon": NATIVE}),
        ("jackpot", {"jackpot": 5_001}),
        ("rate", {"rate": 0}),
        ("escrow", {"segments": 2**32 - 1, "work": 2**64 - 1, "price": 2**96 - 1}),
        ("escrow", {"segments": 1, "work": 2**32, "price": 2**96 - 1, "operator_fee": 2**96 - 1}),
    ],
)
def test_terms_that_cannot_be_kept_are_refused(term: str, changed: dict[str, Any]) -> None:
    world = World(**changed)
    with refused("BadTerms", term):
        world.do(SUBMITTER, "open", world.run, RECORD)


def test_a_run_is_opened_once_by_its_submitter_who_pays_for_it() -> None:
    world = World()
    cost = 3 * (10 * 100 + 50 + 2 * 20) + 5_000
    with refused("NotAllowed"):
        world.do(OPERATOR, "open", world.run, RECORD, value=cost)
    with refused("BadRecord", "record"):
        world.do(SUBMITTER, "open", world.run, RECORD + b"!", value=cost)
    with refused("Insufficient", cost, cost - 1):
        world.do(SUBMITTER, "open", world.run, RECORD, value=cost - 1)
    with refused("Unknown"):
        world.do(OPERATOR, "accept", world.run, CHAIN_END)
    world.do(SUBMITTER, "open", world.run, RECORD, value=cost + 5)
    assert (world.state.escrow, world.state.pot, world.balance(SUBMITTER)) == (cost - 5_000, 5_000, 5)
    with refused("Already"):
        world.do(SUBMITTER, "open", world.run, RECORD, value=cost)
    for changed in ({"price": 101}, {"salt": b"\1" * 32}, {"operator": STRANGER}):
        with refused("Unknown"):
            world.do(SUBMITTER, "cancel", replace(world.run, **changed))


def test_the_largest_terms_fit() -> None:
    amounts = dict.fromkeys(("operator_bond", "worker_bond", "verifier_bond", "flag_bond", "pot", "jackpot"), 2**96 - 1)
    rates = {"rate": ALWAYS, "forced_rate": ALWAYS, "tensors": ALWAYS}
    world = World(cap=2**256 - 1, segments=1, work=2**31, price=2**96 - 1, verifiers=8, **amounts, **rates)
    for account in (SUBMITTER, OPERATOR, *VERIFIERS[:2]):
        world.chain.evm.set_balance(account, 2**200)
        world.do(account, "deposit", NATIVE, 2**140, value=2**140)
    world.do(SUBMITTER, "open", world.run, RECORD)
    assert world.state.escrow == 2**31 * (2**96 - 1) + 50 + 8 * 20
    world.do(OPERATOR, "accept", world.run, CHAIN_END)
    world.do(VERIFIERS[0], "join", world.run, Role.VERIFIER, 0)
    assert world.see("bondOf", world.run.id, Role.VERIFIER, VERIFIERS[0]).amount == 2**96 - 1


def test_stray_bits_make_no_other_run(begun: World) -> None:
    data = bytearray(begun.ledger.data("begin", begun.run))
    data[4 + 7 * 32] = 1  # above `segments`, a u32
    with pytest.raises(RuntimeError, match="Revert"):
        begun.chain.evm.message_call(STRANGER, begun.ledger.address, calldata=bytes(data))


def test_an_open_run_can_be_had_back() -> None:
    world = World()
    world.fund(SUBMITTER)
    world.do(SUBMITTER, "open", world.run, RECORD)
    with refused("NotAllowed"):
        world.do(STRANGER, "cancel", world.run)
    with refused("WrongStatus", Status.OPEN):
        world.do(STRANGER, "close", world.run)
    names = [event.name for event in world.do(SUBMITTER, "cancel", world.run)]
    assert names == ["Cancelled", "Closed"]
    assert world.balance(SUBMITTER) == 10**6
    for function, args in (("cancel", ()), ("close", ()), ("accept", (ZERO,)), ("begin", ()), ("commit", ([],))):
        with refused("WrongStatus", Status.CLOSED):
            world.do(OPERATOR, function, world.run, *args)


def test_accept_and_begin() -> None:
    world = World()
    world.fund(SUBMITTER, OPERATOR, STRANGER)
    world.do(SUBMITTER, "open", world.run, RECORD)
    with refused("NotAllowed"):
        world.do(STRANGER, "accept", world.run, CHAIN_END)
    with refused("WrongStatus", Status.OPEN):
        world.do(STRANGER, "begin", world.run)
    (accepted,) = world.do(OPERATOR, "accept", world.run, CHAIN_END)
    block = world.chain.block + DELAY
    assert accepted.beaconBlock == block
    with refused("WrongStatus", Status.ACTIVE):
        world.do(OPERATOR, "accept", world.run, CHAIN_END)
    with refused("WrongStatus", Status.ACTIVE):
        world.do(OPERATOR, "commit", world.run, [])
    world.chain.go(blocks=DELAY)
    with refused("TooEarly", block + 1):
        world.do(STRANGER, "begin", world.run)
    world.chain.go(blocks=1)
    (rearmed,) = world.do(STRANGER, "begin", world.run)  # the mock does not know that block
    assert (rearmed.name, rearmed.blockNumber) == ("Rearmed", world.chain.block + DELAY)
    world.chain.send(STRANGER, world.beacon, "set", block, b"\1" * 32)  # too late for the first
    world.chain.send(STRANGER, world.beacon, "set", rearmed.blockNumber, b"\2" * 32)
    with refused("TooEarly", rearmed.blockNumber + 1):
        world.do(STRANGER, "begin", world.run)
    world.chain.go(blocks=DELAY + 1)
    (begun,) = world.do(STRANGER, "begin", world.run)
    assert (begun.name, begun.beacon) == ("Begun", b"\2" * 32)
    with refused("Already"):
        world.do(STRANGER, "begin", world.run)


def test_an_operator_who_vanishes_costs_the_submitter_nothing(begun: World) -> None:
    (segment,) = begun.commit()
    begun.do(SUBMITTER, "cancel", begun.run)
    with refused("WrongStatus", Status.CANCELLED):
        begun.do(OPERATOR, "commit", begun.run, [])
    begun.chain.go(seconds=500)
    with refused("StillOpen"):
        begun.do(STRANGER, "close", begun.run)
    begun.draw(segment)
    late = begun.start(segment) + 101 + 50
    begun.chain.go(until=late - 1)
    with refused("TooEarly", late):
        begun.do(STRANGER, "forfeit", begun.run, segment)
    begun.chain.go(until=late)
    with refused("TooLate", late):
        begun.unseal(segment)
    begun.do(STRANGER, "forfeit", begun.run, segment)
    begun.do(STRANGER, "close", begun.run)
    assert begun.balance(SUBMITTER) == 10**6
    assert begun.balance(BURN) == 7_000  # nobody flagged it; the harmed have 3,000
    with refused("WrongStatus", Status.CLOSED):
        begun.do(OPERATOR, "join", begun.run, Role.OPERATOR, 0)


# --------------------------------------------------------------------------------------------------------------- bonds


def test_seats_fill_up_in_order_and_come_free_again(begun: World) -> None:
    run, chain = begun.run, begun.chain
    with refused("Already"):
        begun.do(VERIFIERS[0], "join", run, Role.VERIFIER, 3)
    begun.fund(*WHISTLERS, *VERIFIERS[3:])
    for seat, error in ((64, "Full"), (2**32 - 1, "Full"), (4, "Unknown"), (1, "Already")):
        with refused(error):
            begun.do(VERIFIERS[3], "join", run, Role.VERIFIER, seat)
    fresh = [PrivateKey(n.to_bytes(32, "big")).public_key.to_address() for n in range(1000, 1061)]
    for seat, account in enumerate(fresh, start=3):
        chain.evm.set_balance(account, RICH)
        chain.send(account, begun.ledger, "join", run, Role.VERIFIER, seat, value=500)
        begun.bonds.add((run.id, Role.VERIFIER, account))
    assert begun.state.seats == 64
    begun.check()
    with refused("Full"):
        begun.do(VERIFIERS[3], "join", run, Role.VERIFIER, 64)
    begun.do(VERIFIERS[1], "resign", run, Role.VERIFIER)
    with refused("Already"):
        begun.do(VERIFIERS[3], "join", run, Role.VERIFIER, 1)
    chain.go(seconds=UNBONDING)
    begun.do(STRANGER, "release", run, Role.VERIFIER, VERIFIERS[1])
    begun.do(VERIFIERS[3], "join", run, Role.VERIFIER, 1)
    assert begun.see("seatOf", run.id, 1).account == VERIFIERS[3]


def test_a_bond_comes_back_after_unbonding_and_not_before(begun: World) -> None:
    run = begun.run
    never = 2**256 - 1
    with refused("TooEarly", never):
        begun.do(STRANGER, "release", run, Role.WORKER, WORKERS[0])
    for role, account in ((Role.WORKER, STRANGER), (Role.OPERATOR, STRANGER), (Role.VERIFIER, WORKERS[0])):
        with refused("Unknown"):
            begun.do(STRANGER, "release", run, role, account)
    with refused("Unknown"):
        begun.do(STRANGER, "resign", run, Role.WORKER)
    with refused("WrongStatus", Status.ACTIVE):
        begun.do(OPERATOR, "resign", run, Role.OPERATOR)
    begun.do(WORKERS[0], "resign", run, Role.WORKER)
    until = begun.chain.time + UNBONDING
    with refused("Already"):
        begun.do(WORKERS[0], "resign", run, Role.WORKER)
    with refused("Already"):
        begun.do(WORKERS[0], "join", run, Role.WORKER, 0)
    begun.chain.go(until=until - 1)
    with refused("TooEarly", until):
        begun.do(STRANGER, "release", run, Role.WORKER, WORKERS[0])
    begun.chain.go(until=until)
    begun.do(STRANGER, "release", run, Role.WORKER, WORKERS[0])
    assert begun.balance(WORKERS[0]) == 10**6
    with refused("Unknown"):
        begun.do(STRANGER, "release", run, Role.WORKER, WORKERS[0])
    begun.do(WORKERS[0], "join", run, Role.WORKER, 0)


def test_only_the_operator_has_an_operators_bond(begun: World) -> None:
    with refused("NotAllowed"):
        begun.do(STRANGER, "join", begun.run, Role.OPERATOR, 0, value=10_000)
    with refused("Already"):
        begun.do(OPERATOR, "join", begun.run, Role.OPERATOR, 0)
    (segment,) = begun.commit()
    begun.do(SUBMITTER, "cancel", begun.run)
    with refused("StillOpen"):
        begun.do(OPERATOR, "resign", begun.run, Role.OPERATOR)
    begun.finish(segment)
    begun.do(OPERATOR, "resign", begun.run, Role.OPERATOR)
    begun.chain.go(seconds=UNBONDING)
    begun.do(STRANGER, "release", begun.run, Role.OPERATOR, OPERATOR)
    assert begun.balance(OPERATOR) == 10**6 + 50
