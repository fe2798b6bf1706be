"""From receipts to amounts, and from amounts to the Merkle sum tree that a segment commits to.

The work of a receipt is its micro-batches times the blocks of its stage; that of a segment is its steps times the
micro-batches of a step times the model's blocks. A key earns floor(price x work) for each receipt. Everything here is a
function of what is public, so whoever doubts an amount computes it again.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from math import floor

from ledger.port import Account
from storage.errors import UsageError
from storage.identity import receipt_signer_ok
from storage.merkle import EMPTY_ROOT
from storage.records import Receipt

SUM_LIMIT = 1 << 128

_WORKER = re.compile(r"s(\d{1,9})r\d{1,9}", re.ASCII)
"""A worker's id: its stage and its replica."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a segment's receipts are about: run digest, steps from `first_step`, micro-batches a step, blocks."""

    run: bytes
    first_step: int
    steps: int
    micro_batches: int
    blocks: int

    @property
    def units(self) -> int:
        """The work of the whole segment, in units of one micro-batch through one block."""
        return self.steps * self.micro_batches * self.blocks


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one receipt earns its key. `units` are the micro-batches that count."""

    key: Account
    step: int
    worker: str
    stage: int
    units: tuple[int, ...]
    blocks: int
    work: int
    amount: int


@dataclass(frozen=True, kw_only=True)
class Unpaid:
    """What earns nothing, and why: a whole receipt, or these micro-batches of it."""

    key: Account
    step: int
    worker: str
    units: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """That a key has an amount: what `claim` takes after run and segment."""

    leaf: int
    count: int
    key: Account
    amount: int
    proof: tuple[bytes, ...]
    sums: tuple[int, ...]

    def arguments(self) -> tuple[int, int, Account, int, tuple[bytes, ...], tuple[int, ...]]:
        """The arguments of `claim` and `compensate` in their order."""
        return self.leaf, self.count, self.key, self.amount, self.proof, self.sums


@dataclass(frozen=True, kw_only=True)
class Payouts:
    """What a segment pays: rows in the order of the receipts, and what was refused."""

    work: int
    rows: tuple[Row, ...]
    unpaid: tuple[Unpaid, ...]

    @property
    def amounts(self) -> tuple[tuple[Account, int], ...]:
        """(key, amount) by key: the leaves of the payout tree."""
        sums: dict[Account, int] = {}
        for row in self.rows:
            sums[row.key] = sums.get(row.key, 0) + row.amount
        return tuple(sorted(sums.items()))

    @property
    def tree(self) -> "SumTree":
        """The payout tree, whose root and sum the segment commits to."""
        return SumTree(self.amounts)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a key earns what it earns: its receipts, what of them earns nothing, and the proof for `claim`."""

    rows: tuple[Row, ...]
    unpaid: tuple[Unpaid, ...]
    proof: Proof
    root: bytes
    payout: int


def payouts(receipts: Iterable[Receipt], work: Work, price: int | Fraction) -> Payouts:
    """What receipts earn, in their order: of two that claim a micro-batch through the same block, the first."""
    rows, unpaid = [], []
    taken: set[tuple[int, int, int]] = set()
    for receipt in receipts:
        key = "0x" + receipt.address.hex()
        stage, reason = _stage(receipt, work)
        if reason:
            claimed = tuple(unit.micro_batch for unit in receipt.units)
            unpaid.append(Unpaid(key=key, step=receipt.step, worker=receipt.worker, units=claimed, reason=reason))
            continue
        blocks = range(receipt.bounds[stage], receipt.bounds[stage + 1])
        paid, refused = _units(receipt, work, blocks, taken)
        unpaid += [
            Unpaid(key=key, step=receipt.step, worker=receipt.worker, units=tuple(units), reason=reason)
            for reason, units in refused.items()
        ]
        done = len(paid) * len(blocks)
        if done:
            rows.append(
                Row(
                    key=key,
                    step=receipt.step,
                    worker=receipt.worker,
                    stage=stage,
                    units=tuple(paid),
                    blocks=len(blocks),
                    work=done,
                    amount=floor(price * done),
                )
            )
    return Payouts(work=work.units, rows=tuple(rows), unpaid=tuple(unpaid))


def explain(receipts: Iterable[Receipt], work: Work, price: int | Fraction, key: Account) -> Explanation:
    """Everything about one key's amount; UsageError where it earns nothing here."""
    found = payouts(receipts, work, price)
    keys = [name for name, _ in found.amounts]
    unpaid = tuple(item for item in found.unpaid if item.key == key)
    if key not in keys:
        why = "; ".join(f"step {item.step}, {item.worker}: {item.reason}" for item in unpaid) or "it signed no receipt"
        raise UsageError(
            f"key {key}: expected one that earns something in this segment, got none: {why}; see its receipts"
        )
    tree = found.tree
    return Explanation(
        rows=tuple(row for row in found.rows if row.key == key),
        unpaid=unpaid,
        proof=tree.prove(keys.index(key)),
        root=tree.root,
        payout=tree.sum,
    )


def _stage(receipt: Receipt, work: Work) -> tuple[int, str]:
    """(stage, "") of a receipt that may be paid; (0, reason) of another."""
    bounds, named = receipt.bounds, _WORKER.fullmatch(receipt.worker)
    if receipt.run != work.run:
        return 0, "of another run"
    if not work.first_step <= receipt.step < work.first_step + work.steps:
        return 0, "of a step outside the segment"
    if not receipt_signer_ok(receipt):
        return 0, "not signed by its key"
    if bounds[:1] != (0,) or bounds[-1] != work.blocks or list(bounds) != sorted(set(bounds)):
        return 0, f"its bounds are no stages of {work.blocks} blocks"
    if named is None or int(named[1]) >= len(bounds) - 1:
        return 0, "its worker has no stage"
    return int(named[1]), ""


def _units(
    receipt: Receipt, work: Work, blocks: range, taken: set[tuple[int, int, int]]
) -> tuple[list[int], dict[str, list[int]]]:
    """The micro-batches that count, which are `taken` from now on, and those that do not by reason."""
    paid: list[int] = []
    refused: dict[str, list[int]] = {}
    for unit in receipt.units:
        number = unit.micro_batch
        cells = {(receipt.step, number, block) for block in blocks}
        if number >= work.micro_batches:
            refused.setdefault("no such micro-batch", []).append(number)
        elif not taken.isdisjoint(cells):
            refused.setdefault("claimed before", []).append(number)
        else:
            taken |= cells
            paid.append(number)
    return paid, refused


# ----------------------------------------------------------------------------------------------------------- the tree


class SumTree:
    """The Merkle sum tree over (key, amount), in the shape of RFC 6962 section 2.1."""

    def __init__(self, amounts: Sequence[tuple[Account, int]]) -> None:
        self.amounts = tuple(amounts)
        level = [(sum_leaf(number, key, amount), amount) for number, (key, amount) in enumerate(self.amounts)]
        self._levels = [level]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            level = [sum_node(left, right) for left, right in pairs] + level[len(level) & ~1 :]
            self._levels.append(level)

    @property
    def root(self) -> bytes:
        """What a segment commits to; the root of no tree where nobody earns anything."""
        return self._levels[-1][0][0] if self.amounts else EMPTY_ROOT

    @property
    def sum(self) -> int:
        """The sum of all amounts."""
        return sum(amount for _, amount in self.amounts)

    def prove(self, leaf: int) -> Proof:
        """The proof of one leaf; IndexError where there is none of that number."""
        if not 0 <= leaf < len(self.amounts):
            raise IndexError(f"payout leaf: expected a number below {len(self.amounts)}, got {leaf}")
        siblings = [
            level[leaf >> height ^ 1]
            for height, level in enumerate(self._levels[:-1])
            if leaf >> height ^ 1 < len(level)
        ]
        key, amount = self.amounts[leaf]
        return Proof(
            leaf=leaf,
            count=len(self.amounts),
            key=key,
            amount=amount,
            proof=tuple(digest for digest, _ in siblings),
            sums=tuple(amount for _, amount in siblings),
        )


def sum_leaf(leaf: int, key: Account, amount: int) -> bytes:
    """H(0x00 | leaf u32 | key | amount u128), big-endian."""
    return sha256(b"\x00" + leaf.to_bytes(4, "big") + bytes.fromhex(key[2:]) + amount.to_bytes(16, "big")).digest()


def sum_node(left: tuple[bytes, int], right: tuple[bytes, int]) -> tuple[bytes, int]:
    """(H(0x01 | left | its sum u128 | right | its sum u128), the sum of both)."""
    data = b"".join(digest + amount.to_bytes(16, "big") for digest, amount in (left, right))
    return sha256(b"\x01" + data).digest(), left[1] + right[1]


def verify_sum(proof: Proof, root: bytes, payout: int) -> bool:
    """Whether the key has the amount in the tree with this root and sum.

    A node's hash covers the sums of its children, so amounts that can be proved never add up to more than `payout`.
    """
    place, count = proof.leaf, proof.count
    if not 0 <= place < count or len(proof.proof) != len(proof.sums):
        return False
    node = sum_leaf(proof.leaf, proof.key, proof.amount), proof.amount
    siblings = iter(zip(proof.proof, proof.sums, strict=True))
    while count > 1:
        if place ^ 1 < count:
            sibling = next(siblings, None)
            if sibling is None or node[1] + sibling[1] >= SUM_LIMIT:
                return False
            node = sum_node(sibling, node) if place & 1 else sum_node(node, sibling)
        place >>= 1
        count = (count + 1) >> 1
    return next(siblings, None) is None and node == (root, payout)
