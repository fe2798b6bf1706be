"""The compiled contracts: segments from commitment to their end, and verdicts on them."""

from hashlib import sha256

import pytest
from eth_abi.abi import encode
from eth_utils.crypto import keccak

from ledger.port import NATIVE, Leaf, Outcome, Role, Tree
from ledger.testing import (
    ALWAYS,
    CHAIN_END,
    DELAY,
    OPERATOR,
    PAYOUTS,
    POSTSTATE,
    SECRETS,
    STRANGER,
    SUBMITTER,
    UNBONDING,
    VERIFIERS,
    WHISTLERS,
    WORKERS,
    ZERO,
    World,
    delegate,
    record_of,
    refused,
    verdict_of,
)

pytestmark = pytest.mark.chain

# ------------------------------------------------------------------------------------------------------------ segments


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("kind", {"kind": b"\x04\x01"}),
        ("kind", {"kind": b"\x05\x02"}),
        ("length", {"previous": ZERO + b"\0"}),
        ("length", {"previous": b""}),
        ("run", {"run": b"\1" * 32}),
        ("index", {"index": b"\1\0\0\0"}),
        ("index", {"index": b"\0\0\0\1"}),
        ("steps", {"steps": b"\0\0\0\0"}),
        ("prestate", {"prestate": POSTSTATE}),
        ("previous", {"previous": b"\0" * 31 + b"\1"}),
    ],
)
def test_a_false_record_is_refused(begun: World, field: str, changed: dict[str, bytes]) -> None:
    fields_of = {"position": 0, "prestate": begun.state.state, **changed}
    record = record_of(**fields_of)
    with refused("BadRecord", field):
        begun.commit({"record": record})


def test_a_commitment_keeps_to_the_terms(begun: World) -> None:
    for field, changed in (
        ("work", {"work": 11}),
        ("work", {"work": 2**64 - 1}),
        ("payout", {"payout": 1_001}),
        ("payout", {"payout": 2**128 - 1}),
        ("payout", {"work": 0, "payout": 1}),
    ):
        with refused("BadRecord", field):
            begun.commit(changed)
    with refused("NotAllowed"):
        begun.do(SUBMITTER, "commit", begun.run, [begun.commitment(0, begun.state.state)])
    with refused("Full"):
        begun.commit({}, {}, {}, {})
    with refused("BadRecord", "prestate"):
        begun.do(OPERATOR, "commit", begun.run, [begun.commitment(n, begun.state.state) for n in range(2)])
    segments = begun.commit({}, {"work": 0, "payout": 0}, {})
    assert [segment.index for segment in segments] == [0, 1, 2]
    assert [segment.steps for segment in segments] == [3, 3, 3]
    with refused("Full"):
        begun.commit({})


def python_draw(beacon: bytes, seats: int, active: set[int], verifiers: int) -> list[int]:
    drawn: list[int] = []
    for r in range(verifiers):
        first = int.from_bytes(keccak(encode(["bytes24", "uint256"], [beacon, r])), "big") % seats
        for tried in range(seats):
            seat = (first + tried) % seats
            if seat in active and seat not in drawn:
                drawn.append(seat)
                break
    return drawn


def test_the_draw_is_the_beacons_and_nobody_elses() -> None:
    world = World(segments=40, verifiers=3).begin()
    run, chain = world.run, world.chain
    world.fund(*VERIFIERS[3:])
    world.do(VERIFIERS[3], "join", run, Role.VERIFIER, 3)
    chain.go(blocks=1)
    world.do(VERIFIERS[4], "join", run, Role.VERIFIER, 4)  # in the segment's block: too late
    world.do(VERIFIERS[1], "resign", run, Role.VERIFIER)  # in it: gone
    segments = world.commit(*[{}] * 20)
    chain.go(blocks=1)
    world.do(VERIFIERS[2], "resign", run, Role.VERIFIER)  # after it: still there
    for n, segment in enumerate(segments):
        beacon = sha256(bytes([n])).digest()[:24]
        seats = python_draw(beacon, 5, {0, 2, 3}, 3)
        assert world.draw(segment, beacon) == [VERIFIERS[seat] for seat in seats]
        assert list(world.see("assignedOf", run, segment)) == [VERIFIERS[seat] for seat in sorted(seats)]
    with refused("Already"):
        world.draw(segments[0])


def test_a_draw_waits_and_is_armed_again_where_its_block_is_forgotten(begun: World) -> None:
    (segment,) = begun.commit()
    run, block = begun.run, segment.block_number + DELAY
    begun.chain.go(blocks=DELAY)
    with refused("TooEarly", block + 1):
        begun.do(STRANGER, "draw", run, segment)
    begun.chain.go(blocks=1)
    (rearmed,) = begun.do(STRANGER, "draw", run, segment)
    assert (rearmed.name, rearmed.blockNumber) == ("Rearmed", begun.chain.block + DELAY)
    begun.chain.send(STRANGER, begun.beacon, "set", block, b"\1" * 32)
    for function, args in (
        ("seal", (b"\1" * 32,)),
        ("unseal", (SECRETS[0], ZERO, segment.record, ZERO)),
        ("forfeit", ()),
        ("finalise", ()),
        ("demand", (Tree.STATE, 0, Leaf())),
    ):
        with refused("TooEarly"):
            begun.do(OPERATOR, function, run, segment, *args)
    begun.chain.go(blocks=DELAY + 1)
    begun.chain.send(STRANGER, begun.beacon, "set", rearmed.blockNumber, b"\2" * 32)
    (drawn,) = begun.do(STRANGER, "draw", run, segment)
    assert drawn.beacon == b"\2" * 24 + bytes(8)


def test_a_segment_that_is_not_drawn_has_no_verifiers_and_goes_on() -> None:
    world = World(rate=10).begin()
    (segment,) = world.commit()
    assert world.draw(segment, b"\0" * 20 + b"\0\0\0\x0a") == []
    world.vote(segment, {})
    world.unseal(segment)
    world.do(STRANGER, "finalise", world.run, segment)
    world = World(rate=11).begin()
    (segment,) = world.commit()
    assert len(world.draw(segment, b"\0" * 20 + b"\0\0\0\x0a")) == 2


def test_without_verifiers_and_forced_errors_nothing_is_opened() -> None:
    world = World(verifiers=0, rate=0).begin()
    (segment,) = world.commit()
    for function, args in (("draw", ()), ("forfeit", ()), ("unseal", (ZERO, ZERO, ZERO, ZERO))):
        with refused("BadTerms"):
            world.do(OPERATOR, function, world.run, segment, *args)
    end = segment.time + 101
    with refused("TooEarly", end):
        world.do(STRANGER, "finalise", world.run, segment)
    world.vote(segment, {WHISTLERS[0]: False})
    with refused("StillOpen"):
        world.do(STRANGER, "finalise", world.run, segment)
    world.chain.go(until=end + 59)
    with refused("StillOpen"):
        world.do(STRANGER, "finalise", world.run, segment)
    world.chain.go(until=end + 60)
    with refused("TooLate", end + 60):
        world.judge(segment, upheld=True)
    world.do(STRANGER, "finalise", world.run, segment)
    world.do(STRANGER, "settle", world.run, segment, WHISTLERS[0])
    assert world.balance(WHISTLERS[0]) == 10**6  # a court that says nothing costs a flag nothing


def test_opening_is_in_time_in_order_and_true(begun: World) -> None:
    first, second = begun.commit({}, {"true": b"\1" * 32})
    begun.draw(first)
    begun.draw(second)
    end = begun.start(first) + 101
    begun.chain.go(until=end - 1)
    with refused("TooEarly", end):
        begun.unseal(first, secret=SECRETS[0])
    begun.chain.go(until=end)
    with refused("StillOpen"):
        begun.unseal(second, secret=SECRETS[0])
    with refused("StillOpen"):
        begun.do(STRANGER, "forfeit", begun.run, second)
    with refused("NotAllowed"):
        begun.do(STRANGER, "unseal", begun.run, first, SECRETS[0], ZERO, first.record, ZERO)
    for secret in (SECRETS[1], ZERO, CHAIN_END):
        with refused("BadSecret"):
            begun.unseal(first, secret=secret)
    with refused("BadSeal"):
        begun.unseal(first, secret=SECRETS[0], true=b"\1" * 32)
    with refused("BadSeal"):
        begun.do(OPERATOR, "unseal", begun.run, first, SECRETS[0], ZERO, first.record, b"\1" * 32)
    begun.unseal(first)
    with refused("Already"):
        begun.unseal(first, secret=SECRETS[1])
    with refused("Already"):
        begun.do(STRANGER, "forfeit", begun.run, first)
    with refused("BadSeal"):  # false, and no forced error
        begun.unseal(second, secret=SECRETS[1], true=b"\1" * 32)
    with refused("StillOpen"):
        begun.do(STRANGER, "finalise", begun.run, second)
    begun.do(STRANGER, "finalise", begun.run, first)
    with refused("StillOpen"):
        begun.do(STRANGER, "finalise", begun.run, second)
    begun.chain.go(seconds=50)
    begun.do(STRANGER, "forfeit", begun.run, second)
    assert begun.outcome(second) == Outcome.REJECTED


def test_a_forced_error_has_to_be_false() -> None:
    world = World(forced_rate=ALWAYS).begin()
    (segment,) = world.commit()  # sealed as true
    world.draw(segment)
    world.vote(segment, {})
    assert world.see("forced", world.run, 0, 0, SECRETS[0])
    with refused("BadSeal"):
        world.unseal(segment)
    world = World(forced_rate=ALWAYS).begin()
    (segment,) = world.commit({"true": b"\1" * 32})
    drawn = world.draw(segment)
    world.vote(segment, {WHISTLERS[0]: False, WHISTLERS[1]: False, WHISTLERS[2]: False, drawn[0]: True})
    assert world.unseal(segment, true=b"\1" * 32).forced
    with refused("NotAllowed"):
        world.judge(segment, upheld=True)
    world.do(STRANGER, "finalise", world.run, segment)
    for account in WHISTLERS[:3]:
        world.do(STRANGER, "settle", world.run, segment, account)
        assert world.balance(account) == 10**6 + 2_000 // 4
        with refused("Already"):
            world.do(STRANGER, "settle", world.run, segment, account)
    assert world.state.pot == 5_000 - 3 * 500
    world.do(STRANGER, "settle", world.run, segment, drawn[0])
    assert world.see("bondOf", world.run.id, Role.VERIFIER, drawn[0]).amount == 0


def test_jackpots_end_where_the_pot_ends() -> None:
    world = World(forced_rate=ALWAYS, pot=3_000, segments=4, verifiers=0, rate=0).begin()
    for left in (1_000, 0, 0):
        (segment,) = world.commit({"true": b"\1" * 32})
        world.vote(segment, {WHISTLERS[0]: False})
        world.unseal(segment, true=b"\1" * 32)
        world.do(STRANGER, "finalise", world.run, segment)
        world.do(STRANGER, "settle", world.run, segment, WHISTLERS[0])
        assert world.state.pot == left
    assert world.balance(WHISTLERS[0]) == 10**6 + 3_000


def test_the_court_decides_once_in_time_and_only_on_flags(begun: World) -> None:
    first, second, third = begun.commit({}, {}, {})
    for segment in (first, second, third):
        begun.draw(segment)
    for segment in (first, second):
        begun.seal(segment, WHISTLERS[0], ok=False)
    begun.chain.go(until=begun.start(first) + 50)
    for segment in (first, second):
        begun.reveal(segment, WHISTLERS[0], ok=False)
    begun.chain.go(until=begun.start(first) + 101)
    with refused("NotAllowed"):
        begun.do(STRANGER, "resolve", begun.run, first, True, NATIVE)
    with refused("TooEarly"):
        begun.judge(first, upheld=True)
    with refused("NotAllowed"):
        begun.judge(third, upheld=True)
    for segment in (first, second, third):
        begun.unseal(segment)
    with refused("StillOpen"):
        begun.do(STRANGER, "finalise", begun.run, first)
    opened = begun.chain.time
    begun.chain.go(until=opened + 59)
    begun.judge(first, upheld=False)
    with refused("Already"):
        begun.judge(first, upheld=True)
    begun.chain.go(until=opened + 60)
    with refused("TooLate", opened + 60):
        begun.judge(second, upheld=True)
    for segment in (first, second, third):
        begun.do(STRANGER, "finalise", begun.run, segment)
    with refused("Already"):
        begun.judge(first, upheld=True)
    begun.do(STRANGER, "settle", begun.run, first, WHISTLERS[0])
    begun.do(STRANGER, "settle", begun.run, second, WHISTLERS[0])
    assert begun.balance(WHISTLERS[0]) == 10**6 - 100  # dismissed once, once the court was silent


def test_what_follows_a_rejected_segment_is_dropped_and_what_precedes_stays() -> None:
    world = World(segments=6, verifiers=1).begin()
    segments = world.commit({}, {}, {}, {})
    drawn = [world.draw(segment)[0] for segment in segments]
    for segment in segments:
        world.seal(segment, WHISTLERS[0], ok=False)
    world.do(WHISTLERS[1], "demand", world.run, segments[3], Tree.STATE, 1, Leaf())
    world.chain.go(until=world.start(segments[0]) + 50)
    for segment in segments[1:]:
        world.reveal(segment, WHISTLERS[0], ok=False)
    world.chain.go(until=world.start(segments[0]) + 101)
    for segment in segments:
        world.unseal(segment)
    world.judge(segments[2], upheld=True)
    world.do(OPERATOR, "join", world.run, Role.OPERATOR, 0)
    (again,) = world.commit()
    assert (again.index, again.attempt) == (2, 1)
    outcomes = [world.outcome(segment) for segment in (*segments, again)]
    assert outcomes == [Outcome.PENDING, Outcome.PENDING, Outcome.REJECTED, Outcome.DROPPED, Outcome.PENDING]
    world.judge(segments[1], upheld=True)  # an earlier one, later: the new one falls with it
    outcomes = [world.outcome(segment) for segment in (*segments, again)]
    assert outcomes == [Outcome.PENDING, Outcome.REJECTED, Outcome.REJECTED, Outcome.DROPPED, Outcome.DROPPED]
    assert (world.state.committed, world.state.opened, world.state.attempt) == (1, 1, 2)
    world.do(STRANGER, "finalise", world.run, segments[0])
    for function, args in (("draw", ()), ("finalise", ()), ("forfeit", ()), ("seal", (b"\1" * 32,))):
        with refused("Already"):
            world.do(STRANGER, function, world.run, again, *args)
    with refused("Already"):
        world.judge(segments[3], upheld=True)
    with refused("NotAllowed"):
        world.do(STRANGER, "claim", world.run, segments[3], *PAYOUTS.proof(0))
    before = world.balance(WHISTLERS[1])
    world.do(STRANGER, "withheld", world.run, segments[3], POSTSTATE, 1, 2)
    assert world.balance(WHISTLERS[1]) == before + 100
    with refused("Unknown"):
        world.do(STRANGER, "withheld", world.run, segments[3], POSTSTATE, 1, 2)
    world.do(STRANGER, "settle", world.run, segments[3], WHISTLERS[0])
    world.do(STRANGER, "settle", world.run, segments[3], drawn[3])
    assert world.see("bondOf", world.run.id, Role.VERIFIER, drawn[3]).amount == 500


def test_a_culprit_cannot_hide_behind_a_new_account(begun: World) -> None:
    (segment,) = begun.commit()
    begun.draw(segment)
    begun.vote(segment, {WHISTLERS[0]: False})
    begun.unseal(segment)
    delegate(begun, STRANGER, WORKERS[0])  # after the fact, to an account without a bond
    begun.do(WORKERS[0], "resign", begun.run, Role.WORKER)
    begun.judge(segment, upheld=True, culprit=WORKERS[0])
    assert begun.see("bondOf", begun.run.id, Role.WORKER, WORKERS[0]).amount == 0
    with refused("NotAllowed"):
        begun.do(STRANGER, "compensate", begun.run, segment, *PAYOUTS.proof(0))


# ------------------------------------------------------------------------------------------------------------ verdicts


def test_a_verdict_is_sealed_then_revealed_in_its_time(begun: World) -> None:
    (segment,) = begun.commit()
    drawn = begun.draw(segment)
    start, account = begun.start(segment), WHISTLERS[0]
    with refused("BadSeal"):
        begun.do(account, "seal", begun.run, segment, ZERO)
    begun.seal(segment, account, ok=False)
    assert begun.balance(account) == 10**6 - 100
    begun.seal(segment, drawn[0], ok=True)
    assert begun.balance(drawn[0]) == 10**6 - 500
    with refused("Already"):
        begun.seal(segment, account, ok=True)
    with refused("TooEarly", start + 50):
        begun.reveal(segment, account, ok=False)
    begun.chain.go(until=start + 49)
    copied = verdict_of(segment.name, account, False, b"\2" * 32, ZERO)
    begun.do(WHISTLERS[1], "seal", begun.run, segment, copied)  # the last second; a copy of another's
    begun.chain.go(until=start + 50)
    with refused("TooLate", start + 50):
        begun.seal(segment, WHISTLERS[2], ok=False)
    with refused("Unknown"):
        begun.reveal(segment, WHISTLERS[2], ok=False)
    begun.reveal(segment, account, ok=False)
    with refused("BadSeal"):
        begun.reveal(segment, WHISTLERS[1], ok=False)
    with refused("Already"):
        begun.reveal(segment, account, ok=False)
    for changed in ((False, b"\2" * 32, ZERO), (True, ZERO, ZERO), (True, b"\2" * 32, b"\1" * 32)):
        with refused("BadSeal"):
            begun.do(drawn[0], "reveal", begun.run, segment, *changed)
    begun.chain.go(until=start + 101)
    with refused("TooLate", start + 101):
        begun.reveal(segment, drawn[0], ok=True)


def test_flags_fill_up_but_not_for_the_assigned(begun: World) -> None:
    (segment,) = begun.commit()
    drawn = begun.draw(segment)
    begun.fund(*WHISTLERS[4:])
    for account in (*WHISTLERS, *drawn):
        begun.seal(segment, account, ok=False)
    begun.chain.go(until=begun.start(segment) + 50)
    for account in WHISTLERS[:30]:
        begun.reveal(segment, account, ok=False)
    with refused("Full"):
        begun.reveal(segment, WHISTLERS[30], ok=False)
    for account in drawn:
        begun.reveal(segment, account, ok=False)
    assert begun.see("segmentOf", segment.name).flags == 32
    begun.chain.go(until=begun.start(segment) + 101)
    begun.unseal(segment)
    begun.judge(segment, upheld=True)
    for account in (*WHISTLERS, *drawn):
        begun.do(STRANGER, "settle", begun.run, segment, account)
    assert begun.balance(WHISTLERS[0]) == 10**6 + 4_000 // 32
    assert begun.balance(WHISTLERS[30]) == 10**6


# By outcome, of an assigned verifier: ok as opened, ok with another witness, not ok, nothing revealed.
TABLE = {
    "final": (20, 0, None, -50),
    "dismissed": (20, 0, -500, -50),
    "court silent": (20, 0, 0, -50),
    "forced": (-500, -500, 2_000 >> 3, -50),
    "rejected by the court": (-500, -500, 1_000, -50),
    "withheld": (0, 0, 800, 0),
    "forfeited": (0, 0, 1_000, 0),
    "dropped": (0, 0, 0, 0),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_a_verdict_wins_and_loses(case: str) -> None:
    forced = {"forced_rate": ALWAYS} if case == "forced" else {}
    world = World(verifiers=8, **forced)
    world.begin()
    run, chain = world.run, world.chain
    for seat, account in enumerate(WHISTLERS[10:15], start=3):
        world.fund(account)
        world.do(account, "join", run, Role.VERIFIER, seat)
    chain.go(blocks=1)
    changed = {"true": b"\1" * 32} if case == "forced" else {}
    earlier, segment = world.commit(changed, changed)
    if case == "dropped":
        world.draw(earlier)
    else:
        earlier, segment = segment, earlier
    drawn = world.draw(segment)
    assert len(drawn) == 8
    right, other, flag, flag_2, silent, *_ = drawn
    votes = {right: (True, 2), other: (True, 3)} | {WHISTLERS[0]: (True, 2), WHISTLERS[1]: (True, 3)}
    if case != "final":
        votes |= {flag: (False, 2), flag_2: (False, 4), WHISTLERS[2]: (False, 2), WHISTLERS[3]: (False, 2)}
    start = world.start(segment)
    for account, (ok, witness) in votes.items():
        world.seal(segment, account, ok=ok, witness=bytes([witness]) * 32)
    world.seal(segment, silent, ok=True)
    chain.go(until=start + 50)
    for account, (ok, witness) in votes.items():
        world.reveal(segment, account, ok=ok, witness=bytes([witness]) * 32)
    if case == "withheld":
        world.do(STRANGER, "demand", run, segment, Tree.STATE, 0, Leaf(), value=100)
        chain.go(seconds=50)
        world.do(STRANGER, "withheld", run, segment, POSTSTATE, 0, 2)
    chain.go(until=start + 101)
    if case != "withheld":
        with refused("StillOpen"):
            world.do(STRANGER, "settle", run, segment, right)
    if case == "dropped":
        chain.go(until=start + 151)
        world.do(STRANGER, "forfeit", run, earlier)
    elif case == "forfeited":
        chain.go(until=start + 151)
        world.do(STRANGER, "forfeit", run, segment)
    elif case != "withheld":
        world.unseal(segment, true=changed.get("true", b""))
        if case in ("dismissed", "rejected by the court"):
            world.judge(segment, upheld=case != "dismissed")
        if case == "court silent":
            chain.go(seconds=60)
        if case != "rejected by the court":
            world.do(STRANGER, "finalise", run, segment)
    as_opened, another, flagged, missed = TABLE[case]
    expected = {right: as_opened, other: another, silent: missed}
    # Others have no fee, and a fifth of the bond to lose.
    expected |= {WHISTLERS[0]: min(as_opened, 0) // 5, WHISTLERS[1]: another // 5}
    if flagged is not None:
        others = flagged // 5 if flagged < 0 else flagged
        expected |= {flag: flagged, flag_2: flagged, WHISTLERS[2]: others, WHISTLERS[3]: others}
    for account, amount in expected.items():
        (*_, settled) = world.do(STRANGER, "settle", run, segment, account)
        assert settled.amount == amount, (account, expected)
        with refused("Already"):
            world.do(STRANGER, "settle", run, segment, account)
    with refused("Unknown"):
        world.do(STRANGER, "settle", run, segment, STRANGER)


def test_a_verifier_who_loses_is_out(begun: World) -> None:
    first, second = begun.commit({}, {})
    drawn = begun.draw(first)
    missing = drawn[0]
    begun.vote(first, {drawn[1]: True})
    begun.unseal(first)
    begun.do(STRANGER, "finalise", begun.run, first)
    left, settled = begun.do(STRANGER, "settle", begun.run, first, missing)
    assert (left.name, left.releaseAt, settled.amount) == ("Left", begun.chain.time + UNBONDING, -50)
    with refused("Already"):
        begun.do(missing, "resign", begun.run, Role.VERIFIER)
    begun.chain.go(blocks=1)
    (third,) = begun.commit()
    assert missing not in begun.draw(third)
    assert second.seats == 3


def test_resigning_does_not_save_a_verifiers_bond(begun: World) -> None:
    (segment,) = begun.commit()
    drawn = begun.draw(segment)
    begun.do(drawn[0], "resign", begun.run, Role.VERIFIER)
    begun.vote(segment, {drawn[0]: True, WHISTLERS[0]: False})
    begun.unseal(segment)
    begun.judge(segment, upheld=True)
    begun.do(STRANGER, "settle", begun.run, segment, drawn[0])
    begun.chain.go(seconds=UNBONDING)
    begun.do(STRANGER, "release", begun.run, Role.VERIFIER, drawn[0])
    assert begun.balance(drawn[0]) == 10**6 - 500


def test_a_new_bond_does_not_pay_for_what_an_old_one_missed(begun: World) -> None:
    (segment,) = begun.commit()
    drawn = begun.draw(segment)
    begun.seal(segment, drawn[1], ok=True)
    begun.vote(segment, {})
    begun.unseal(segment)
    begun.do(STRANGER, "finalise", begun.run, segment)
    for account in drawn:
        begun.do(account, "resign", begun.run, Role.VERIFIER)
    begun.chain.go(seconds=UNBONDING, blocks=1)
    for account in drawn:
        begun.do(STRANGER, "release", begun.run, Role.VERIFIER, account)
        begun.do(account, "join", begun.run, Role.VERIFIER, VERIFIERS.index(account))
    with refused("Unknown"):
        begun.do(STRANGER, "settle", begun.run, segment, drawn[0])
    (settled,) = begun.do(STRANGER, "settle", begun.run, segment, drawn[1])
    assert settled.amount == 0


def test_after_closing_there_are_no_fees(begun: World) -> None:
    (segment,) = begun.commit()
    drawn = begun.draw(segment)
    begun.vote(segment, dict.fromkeys(drawn, True))
    begun.unseal(segment)
    begun.do(STRANGER, "finalise", begun.run, segment)
    begun.do(STRANGER, "settle", begun.run, segment, drawn[0])
    begun.do(SUBMITTER, "cancel", begun.run)
    begun.chain.go(seconds=110)
    begun.do(STRANGER, "close", begun.run)
    (settled,) = begun.do(STRANGER, "settle", begun.run, segment, drawn[1])
    assert settled.amount == 0
    begun.do(STRANGER, "claim", begun.run, segment, *PAYOUTS.proof(4))
