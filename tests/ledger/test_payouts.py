"""Payouts: nothing is paid twice or lost, proofs hold, altered ones do not, no tree can promise more than its sum."""

from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.payouts import Proof, SumTree, Work, explain, payouts, sum_leaf, sum_node, verify_sum
from storage.errors import UsageError
from storage.identity import Identity, sign_receipt
from storage.merkle import EMPTY_ROOT
from storage.records import Receipt, UnitRecord

RUN = sha256(b"run").digest()
WORK = Work(run=RUN, first_step=10, steps=3, micro_batches=4, blocks=5)
ADA, BEN = Identity(sha256(b"ada").digest()), Identity(sha256(b"ben").digest())
NAMES = {"ada": "0x" + ADA.address.hex(), "ben": "0x" + BEN.address.hex()}
ZERO = bytes(32)


def receipt(who: Identity = ADA, **changed: Any) -> Receipt:
    units = changed.pop("units", (0, 1))
    made = Receipt(
        run=RUN,
        step=10,
        worker="s0r0",
        address=who.address,
        bounds=(0, 2, 5),
        replicas=1,
        units=tuple(UnitRecord(micro_batch=unit, x=ZERO, y=ZERO, dy=ZERO, dx=ZERO) for unit in units),
        gradient_root=ZERO,
        exponent=0,
        reduced_root=ZERO,
        square=0,
        updated_root=ZERO,
        signature=b"",
    )
    return sign_receipt(who, replace(made, **changed))


claims = st.lists(
    st.builds(
        lambda who, step, stage, units, worker: receipt(
            who, step=step, worker=worker or f"s{stage}r0", units=tuple(units)
        ),
        st.sampled_from([ADA, BEN]),
        st.integers(9, 13),
        st.integers(0, 2),
        st.lists(st.integers(0, 5), max_size=5),
        st.sampled_from([None, None, None, "", "s0", "s00000000001r0", "s1r0 "]),
    ),
    max_size=12,
)


@given(claims, st.fractions(min_value=0, max_value=10))
def test_every_claim_is_paid_once_or_refused_with_a_reason(receipts: list[Receipt], price: Fraction) -> None:
    found = payouts(receipts, WORK, price)
    claimed = sorted((item.step, item.worker, unit.micro_batch) for item in receipts for unit in item.units)
    answered = sorted((item.step, item.worker, unit) for item in (*found.rows, *found.unpaid) for unit in item.units)
    assert answered == claimed
    cells = [
        (row.step, unit, block) for row in found.rows for unit in row.units for block in ((0, 1), (2, 3, 4))[row.stage]
    ]
    assert len(cells) == len(set(cells)) == sum(row.work for row in found.rows) <= WORK.units
    assert found.tree.sum == sum(row.amount for row in found.rows) <= price * WORK.units
    assert all(item.reason for item in found.unpaid)


def test_a_whole_segment_earns_all_of_its_work() -> None:
    receipts = [
        receipt(who, step=step, worker=f"s{stage}r0", units=(0, 1, 2, 3))
        for step in (10, 11, 12)
        for stage, who in enumerate((ADA, BEN))
    ]
    found = payouts(receipts, WORK, 7)
    assert found.work == WORK.units == 60
    assert dict(found.amounts) == {NAMES["ada"]: 7 * 3 * 4 * 2, NAMES["ben"]: 7 * 3 * 4 * 3}
    assert found.amounts == tuple(sorted(found.amounts))
    assert not found.unpaid


NO_STAGES = "its bounds are no stages of 5 blocks"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        pytest.param({"run": sha256(b"other").digest()}, "of another run", id="run"),
        pytest.param({"step": 13}, "of a step outside the segment", id="late"),
        pytest.param({"step": 9}, "of a step outside the segment", id="early"),
        pytest.param({"bounds": (0, 2, 6)}, NO_STAGES, id="more blocks"),
        pytest.param({"bounds": (1, 5)}, NO_STAGES, id="fewer blocks"),
        pytest.param({"bounds": (0, 3, 3, 5)}, NO_STAGES, id="empty stage"),
        pytest.param({"bounds": ()}, NO_STAGES, id="no bounds"),
        pytest.param({"bounds": (0,)}, NO_STAGES, id="no stage"),
        pytest.param({"worker": "s2r0"}, "its worker has no stage", id="stage"),
        pytest.param({"worker": "ada"}, "its worker has no stage", id="worker"),
    ],
)
def test_a_receipt_that_earns_nothing(changed: dict[str, Any], reason: str) -> None:
    found = payouts([receipt(**changed)], WORK, 7)
    assert not found.rows
    assert [(item.units, item.reason) for item in found.unpaid] == [((0, 1), reason)]


@pytest.mark.parametrize("changed", [{"step": 11}, {"signature": b""}], ids=["altered", "unsigned"])
def test_a_bad_signature_earns_nothing(changed: dict[str, Any]) -> None:
    found = payouts([replace(receipt(), **changed)], WORK, 7)
    assert [item.reason for item in found.unpaid] == ["not signed by its key"]


def test_units_that_earn_nothing() -> None:
    found = payouts([receipt(units=(0, 4, 0)), receipt(BEN, units=(0, 3), worker="s0r1")], WORK, 1)
    assert [(row.key, row.units) for row in found.rows] == [(NAMES["ada"], (0,)), (NAMES["ben"], (3,))]
    assert [(item.key, item.units, item.reason) for item in found.unpaid] == [
        (NAMES["ada"], (4,), "no such micro-batch"),
        (NAMES["ada"], (0,), "claimed before"),
        (NAMES["ben"], (0,), "claimed before"),
    ]


def test_another_plan_in_the_same_step_does_not_pay_a_block_twice() -> None:
    found = payouts([receipt(units=(0,)), receipt(BEN, bounds=(0, 5), units=(0, 1))], WORK, 1)
    assert [(row.units, row.work) for row in found.rows] == [((0,), 2), ((1,), 5)]


def test_amounts_are_rounded_down_receipt_by_receipt() -> None:
    found = payouts([receipt(units=(0,)), receipt(units=(1,), worker="s0r1")], WORK, Fraction(3, 4))
    assert [row.amount for row in found.rows] == [1, 1]


def test_an_explanation_lets_anybody_compute_the_amount_again() -> None:
    receipts = [receipt(), receipt(BEN, worker="s1r0", units=(0, 9)), receipt(step=11)]
    found = explain(receipts, WORK, 7, NAMES["ben"])
    assert [(row.step, row.worker, row.stage, row.units, row.blocks, row.work, row.amount) for row in found.rows] == [
        (10, "s1r0", 1, (0,), 3, 3, 21)
    ]
    assert [item.units for item in found.unpaid] == [(9,)]
    assert found.proof.key == NAMES["ben"]
    assert found.proof.amount == sum(row.amount for row in found.rows)
    assert verify_sum(found.proof, found.root, found.payout)
    with pytest.raises(UsageError, match="step 10, s0r0: of another run"):
        explain([receipt(run=ZERO)], WORK, 7, NAMES["ada"])
    with pytest.raises(UsageError, match="it signed no receipt"):
        explain(receipts, WORK, 7, "0x" + "00" * 20)


# --------------------------------------------------------------------------------------------------------- the tree

amounts = st.lists(
    st.tuples(st.integers(0, 2**160 - 1).map(lambda number: f"0x{number:040x}"), st.integers(0, 2**100)),
    min_size=1,
    max_size=20,
)


@given(amounts, st.data())
def test_every_leaf_has_a_proof_and_altered_ones_have_none(listed: list[tuple[str, int]], data: st.DataObject) -> None:
    tree = SumTree(listed)
    proof = tree.prove(data.draw(st.integers(0, len(listed) - 1)))
    assert verify_sum(proof, tree.root, tree.sum)
    siblings = proof.proof
    altered = [
        replace(proof, amount=proof.amount + 1),
        replace(proof, leaf=proof.leaf + 1),
        replace(proof, leaf=proof.count),
        replace(proof, key="0x" + "ee" * 20 if proof.key != "0x" + "ee" * 20 else "0x" + "ef" * 20),
        replace(proof, proof=(*siblings, ZERO), sums=(*proof.sums, 0)),
        replace(proof, proof=(*siblings, ZERO)),
    ]
    if siblings:
        sums = proof.sums
        altered += [
            replace(proof, proof=siblings[1:], sums=sums[1:]),
            replace(proof, proof=(ZERO, *siblings[1:])),
            replace(proof, sums=(sums[0] + 1, *sums[1:])),
            replace(proof, amount=proof.amount + 1, sums=(sums[0] - 1, *sums[1:])) if sums[0] else proof,
        ]
    assert not any(verify_sum(item, tree.root, tree.sum) for item in altered if item != proof)
    assert not verify_sum(proof, tree.root, tree.sum + 1)


@given(amounts, st.data())
def test_a_tree_cannot_promise_more_than_its_sum(listed: list[tuple[str, int]], data: st.DataObject) -> None:
    """Whatever sums the maker of a tree writes into its nodes: the leaves that can be proved add up to no more."""
    level = [(sum_leaf(place, key, amount), amount) for place, (key, amount) in enumerate(listed)]
    levels = [level]
    while len(level) > 1:
        honest = [sum_node(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
        level = honest + level[len(level) & ~1 :]
        lie = data.draw(st.integers(0, len(level) - 1))
        level[lie] = (level[lie][0], data.draw(st.integers(0, 2**100)))
        levels.append(level)
    root, total = levels[-1][0]
    proved = 0
    for place, (key, amount) in enumerate(listed):
        siblings = [
            here[place >> height ^ 1] for height, here in enumerate(levels[:-1]) if place >> height ^ 1 < len(here)
        ]
        proof = Proof(
            leaf=place,
            count=len(listed),
            key=key,
            amount=amount,
            proof=tuple(digest for digest, _ in siblings),
            sums=tuple(given for _, given in siblings),
        )
        proved += amount if verify_sum(proof, root, total) else 0
    assert proved <= total


def test_a_sum_that_does_not_fit_is_refused() -> None:
    most = (1 << 128) - 1
    keys = "0x" + "11" * 20, "0x" + "22" * 20
    left, right = (sum_leaf(place, key, most) for place, key in enumerate(keys))
    root, total = sum_node((left, most), (right, most))
    proof = Proof(leaf=0, count=2, key=keys[0], amount=most, proof=(right,), sums=(most,))
    assert not verify_sum(proof, root, total)
    assert not verify_sum(proof, root, total - (1 << 128))


def test_nobody_earns_anything() -> None:
    tree = SumTree([])
    assert (tree.root, tree.sum) == (EMPTY_ROOT, 0)
    with pytest.raises(IndexError, match="expected a number below 0"):
        tree.prove(0)


def test_the_encoding_is_what_the_contract_hashes() -> None:
    key = "0x" + "ab" * 20
    leaf = sha256(b"\x00" + bytes([0, 0, 0, 7]) + b"\xab" * 20 + bytes(15) + b"\x09").digest()
    assert sum_leaf(7, key, 9) == leaf
    node = sha256(b"\x01" + leaf + bytes(15) + b"\x09" + ZERO + bytes(14) + b"\x01\x00").digest()
    assert sum_node((leaf, 9), (ZERO, 256)) == (node, 265)
