"""The compiled contracts: demands, payouts, the beacon, and what is deployed."""

import json
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256

import pyrevm
import pytest

from ledger.port import Leaf, Outcome, Refused, Tree
from ledger.rules import tensor_leaves
from ledger.testing import (
    ENTRIES,
    LEDGER,
    OPERATOR,
    PAYOUTS,
    POSTSTATE,
    STEPS,
    STRANGER,
    TENSORS,
    WHISTLERS,
    WORKERS,
    ZERO,
    Chain,
    Contract,
    Payouts,
    World,
    demand_of,
    leaf_proof,
    record_of,
    refused,
)
from storage import merkle
from storage.codec import encode as encode_record
from storage.records import TensorEntry

pytestmark = pytest.mark.chain

# ------------------------------------------------------------------------------------------------------------- demands


def test_demands_of_each_tree_and_their_answers(begun: World) -> None:
    (segment,) = begun.commit()
    begun.draw(segment)
    run = begun.run
    chunks = [TENSORS["a"][at : at + 4096] for at in range(0, 10_000, 4096)]
    cases = [
        (Tree.STATE, 1, Leaf(), ENTRIES, POSTSTATE),
        (Tree.STEPS, 2, Leaf(), STEPS, merkle.list_root(STEPS)),
        (Tree.TENSOR, 0, leaf_proof(ENTRIES, 0), chunks, merkle.bytes_root(TENSORS["a"])),
        (Tree.TENSOR, 0, leaf_proof(ENTRIES, 1), [TENSORS["b"]], merkle.bytes_root(TENSORS["b"])),
    ]
    for tree, index, entry, leaves, root in cases:
        with refused("BadProof"):
            begun.do(WHISTLERS[0], "demand", run, segment, tree, len(leaves), entry)
        (demanded,) = begun.do(WHISTLERS[0], "demand", run, segment, tree, index, entry)
        assert demanded.demand == demand_of(segment.name, root, index, len(leaves))
        with refused("Already"):
            begun.do(WHISTLERS[1], "demand", run, segment, tree, index, entry)
        shown = leaf_proof(leaves, index)
        name = (root, index, len(leaves))
        for data, proof in (
            (shown.data + b"\0", shown.proof),
            (shown.data, [*shown.proof, ZERO]),
            (shown.data, shown.proof[:-1] if shown.proof else [ZERO]),
            (leaves[index - 1] if len(leaves) > 1 else b"", shown.proof),
        ):
            with refused("BadProof"):
                begun.do(OPERATOR, "answer", run, segment, *name, data, proof)
        with refused("Unknown"):
            begun.do(OPERATOR, "answer", run, segment, root, index, len(leaves) + 1, shown.data, shown.proof)
        begun.do(OPERATOR, "answer", run, segment, *name, shown.data, shown.proof)
        with refused("Unknown"):
            begun.do(OPERATOR, "answer", run, segment, *name, shown.data, shown.proof)
        begun.do(WHISTLERS[1], "demand", run, segment, tree, index, entry)  # again, at the price of another bond
    assert begun.balance(OPERATOR) == 10**6 - 10_000 + 4 * 100


def test_a_tensor_demand_proves_its_entry() -> None:
    no_entry = b"\x06\x02" + ENTRIES[0][2:]
    entries = [
        no_entry,
        ENTRIES[0] + b"\0",
        ENTRIES[0][:-1],
        encode_record(TensorEntry(name="x", dtype="f64", shape=(1,), root=ZERO)),
        encode_record(TensorEntry(name="x", dtype="i64", shape=(2**61,), root=ZERO)),
        encode_record(TensorEntry(name="x", dtype="i8", shape=(2**63, 4), root=ZERO)),
        b"\x06\x01\xff\xff\xff\xff",
        b"\x06\x01",
        b"",
        encode_record(TensorEntry(name="x", dtype="f32", shape=(0,), root=merkle.EMPTY_ROOT)),
        encode_record(TensorEntry(name="x", dtype="f32", shape=(), root=ZERO)),
        encode_record(TensorEntry(name="x", dtype="i64", shape=(2**61 - 1,), root=ZERO)),
    ]
    world = World(tensors=len(entries)).begin()
    (segment,) = world.commit({"record": record_of(0, world.state.state, merkle.list_root(entries))})
    world.draw(segment)

    def ask(index: int, entry: Leaf) -> None:
        world.do(WHISTLERS[0], "demand", world.run, segment, Tree.TENSOR, index, entry)

    for index in range(9):
        with refused("BadRecord", "entry"):
            ask(0, leaf_proof(entries, index))
    for index in (9, 10):
        with refused("BadProof"):
            ask(index - 9, leaf_proof(entries, index))
    ask(0, leaf_proof(entries, 10))
    ask(2**52 - 1, leaf_proof(entries, 11))  # 2^64 - 8 bytes
    shown = leaf_proof(entries, 10)
    for wrong in (
        replace(shown, index=9),
        replace(shown, count=11),
        replace(shown, proof=shown.proof[:-1]),
        replace(shown, proof=(*shown.proof, ZERO)),
        replace(shown, data=entries[9]),
        replace(shown, index=2**64 - 1),
    ):
        with refused("BadProof"):
            ask(0, wrong)


def test_model_and_contract_read_an_entry_alike() -> None:
    def entry(name: bytes, dtype: bytes, *shape: int) -> bytes:
        texts = b"".join(len(text).to_bytes(4, "little") + text for text in (name, dtype))
        axes = b"".join(axis.to_bytes(8, "little") for axis in shape)
        return b"\x06\x01" + texts + len(shape).to_bytes(4, "little") + axes + b"\x05" * 32

    chain = Chain()
    proofs = chain.deploy("Proofs")

    def contracts(data: bytes) -> tuple[bytes, int] | None:
        try:
            root, leaves = chain.read(proofs, "tensor", merkle.leaf_hash(data), 1, Leaf(data=data, index=0, count=1))
        except Refused as error:
            if (error.error, error.values) != ("BadRecord", ("entry",)):
                raise
            return None
        return root, leaves

    good = entry(b"weight", b"i32", 3, 5, 1000)
    assert contracts(good) == (b"\x05" * 32, 15) == tensor_leaves(good)
    assert contracts(entry(b"\xff\xfe", b"i8", 1)) == (b"\x05" * 32, 1)  # a name is not looked at
    assert contracts(entry(b"", b"i8", 2**63, 4, 0)) is None  # too large on the way
    assert contracts(entry(b"", b"i8", 0, 2**63, 4)) == (b"\x05" * 32, 0)
    odd = [entry(b"\xff", b"i8", 1), entry(b"", b"i8", 2**63, 4, 0), entry(b"", b"i8", 0, 2**63, 4)]
    cut = [good[:size] for size in range(len(good))]
    flipped = [good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :] for at in range(len(good)) for bit in (1, 128)]
    for data in [*odd, *cut, *flipped, good + b"\0", entry(b"", b"f64", 1), entry(b"", b"", 1)]:
        assert contracts(data) == tensor_leaves(data), data.hex()


def test_demands_fill_up_and_have_their_times(begun: World) -> None:
    leaves = [b"%d" % n for n in range(20)]
    record = record_of(0, begun.state.state, steps=(20).to_bytes(4, "little"), steps_root=merkle.list_root(leaves))
    (segment,) = begun.commit({"record": record})
    begun.draw(segment)
    start, run, root = begun.start(segment), begun.run, merkle.list_root(leaves)
    for index in range(16):
        begun.do(WHISTLERS[0], "demand", run, segment, Tree.STEPS, index, Leaf())
    with refused("Full"):
        begun.do(WHISTLERS[0], "demand", run, segment, Tree.STEPS, 16, Leaf())
    for index in range(16):
        shown = leaf_proof(leaves, index)
        begun.do(OPERATOR, "answer", run, segment, root, index, 20, shown.data, shown.proof)
    begun.chain.go(until=start + 100)
    with refused("Insufficient", 100, 0):
        begun.do(STRANGER, "demand", run, segment, Tree.STEPS, 16, Leaf())
    begun.do(STRANGER, "demand", run, segment, Tree.STEPS, 16, Leaf(), value=100)  # the last second
    begun.chain.go(until=start + 101)
    with refused("TooLate", start + 101):
        begun.do(WHISTLERS[0], "demand", run, segment, Tree.STEPS, 17, Leaf())
    begun.unseal(segment)
    with refused("StillOpen"):
        begun.do(STRANGER, "finalise", begun.run, segment)
    begun.chain.go(until=start + 150)
    shown = leaf_proof(leaves, 16)
    with refused("TooLate", start + 150):
        begun.do(OPERATOR, "answer", run, segment, root, 16, 20, shown.data, shown.proof)
    begun.do(WHISTLERS[0], "withheld", run, segment, root, 16, 20)
    assert begun.balance(STRANGER) == 100 + 4_000
    assert begun.outcome(segment) == Outcome.REJECTED
    with refused("Already"):
        begun.do(OPERATOR, "answer", run, segment, root, 16, 20, shown.data, shown.proof)


# ------------------------------------------------------------------------------------------------------------- payouts


def test_a_leaf_is_paid_once_and_as_it_stands(begun: World) -> None:
    (segment,) = begun.commit()
    run, good = begun.run, PAYOUTS.proof(2)
    with refused("StillOpen"):
        begun.do(STRANGER, "claim", run, segment, *good)
    begun.finish(segment)
    leaf, count, key, amount, proof, sums = good
    for wrong in (
        (leaf, count, key, amount + 1, proof, sums),
        (leaf, count, key, 2**128 - 1, proof, sums),
        (leaf, count, STRANGER, amount, proof, sums),
        (leaf + 1, count, key, amount, proof, sums),
        (leaf, 6, key, amount, proof, sums[:-1]),
        (leaf, 2, key, amount, proof, sums),
        (leaf, 0, key, amount, proof, sums),
        (leaf, 2**32 - 1, key, amount, proof, sums),
        (leaf, count, key, amount, proof[:-1], sums[:-1]),
        (leaf, count, key, amount, [*proof, ZERO], [*sums, 0]),
        (leaf, count, key, amount, proof, [sums[0] + 1, *sums[1:]]),
        (leaf, count, key, amount, proof, [2**128 - 1, *sums[1:]]),
        (leaf, count, key, amount, [], []),
    ):
        with refused("BadProof"):
            begun.do(STRANGER, "claim", run, segment, *wrong)
    begun.do(STRANGER, "claim", run, segment, *good)
    assert begun.see("claimed", segment.name, 2)
    with refused("Already"):
        begun.do(STRANGER, "claim", run, segment, *good)
    with refused("NotAllowed"):
        begun.do(STRANGER, "compensate", run, segment, *PAYOUTS.proof(1))
    with refused("Unknown"):
        begun.do(STRANGER, "claim", replace(run, price=1), segment, *PAYOUTS.proof(1))
    with refused("Unknown"):
        begun.do(STRANGER, "claim", run, replace(segment, payout=10**6), *PAYOUTS.proof(1))


def test_a_tree_whose_sums_lie_pays_no_more_than_its_root() -> None:
    """The operator commits to 510 for leaves of 510 and 1,000: only paths whose sums agree can be shown."""
    small, large = (STRANGER, 510), (WORKERS[0], 1_000)
    leaves = Payouts((small, large))
    left, right = leaves._levels()[0]
    lie = sha256(b"\1" + left[0] + left[1].to_bytes(16, "big") + right[0] + (0).to_bytes(16, "big")).digest()
    world = World().begin()
    (segment,) = world.commit({"payout_root": lie, "payout": 510})
    world.finish(segment)
    world.do(STRANGER, "claim", world.run, segment, 0, 2, *small, [right[0]], [0])
    for sums in ([510], [0], [2**128 - 490]):
        with refused("BadProof"):
            world.do(STRANGER, "claim", world.run, segment, 1, 2, *large, [left[0]], sums)


def test_a_single_leaf_and_many() -> None:
    chain = Chain()
    proofs = chain.deploy("Proofs")
    for count in (*range(1, 18), 33, 300):
        tree = Payouts(tuple((f"0x{n + 1:040x}", n * n) for n in range(count)))
        root, total = tree.root
        for leaf in range(count) if count < 33 else (0, 1, 31, count - 1):
            _, _, key, amount, proof, sums = tree.proof(leaf)
            assert chain.read(proofs, "pays", root, total, leaf, count, key, amount, proof, sums)
            for other in {count - 1, count + 1, 2 * count} - {count}:
                same = chain.read(proofs, "pays", root, total, leaf, other, key, amount, proof, sums)
                assert same == (other > leaf and _path(leaf, other) == _path(leaf, count))
            if proof:
                assert not chain.read(proofs, "pays", root, total + 1, leaf, count, key, amount, proof, sums)
                assert not chain.read(proofs, "pays", root, total, leaf, count, key, amount, proof[:-1], sums[:-1])


def _path(index: int, count: int) -> list[bool]:
    """Where the siblings of a leaf stand, from the leaf upwards: on the left or not."""
    if count <= 1:
        return []
    split = 1 << (count - 1).bit_length() - 1
    if index < split:
        return [*_path(index, split), False]
    return [*_path(index - split, count - split), True]


def test_inclusion_proofs_are_those_of_storage() -> None:
    chain = Chain()
    proofs = chain.deploy("Proofs")
    for count in (*range(1, 20), 64, 65):
        items = [bytes([n]) * (n % 70) for n in range(count)]
        root = merkle.list_root(items)
        for index in range(count):
            shown = leaf_proof(items, index)
            ask = [root, shown.data, index, count, shown.proof]
            assert chain.read(proofs, "includes", *ask)
            for wrong in (
                [root, shown.data, index, count, (*shown.proof, ZERO)],
                [root, shown.data + b"\0", index, count, shown.proof],
                [root, shown.data, index + count, count, shown.proof],
                [root, shown.data, index, 0, shown.proof],
                [merkle.EMPTY_ROOT, shown.data, index, count, shown.proof],
            ):
                assert not chain.read(proofs, "includes", *wrong)
            for other in (count - 1, count + 1, 2**64 - 1):
                same = other > index and _path(index, other) == _path(index, count)
                assert chain.read(proofs, "includes", root, shown.data, index, other, shown.proof) == same


# -------------------------------------------------------------------------------------------------------------- beacon


def test_the_beacon_remembers_8191_blocks_and_never_knows_the_present() -> None:
    chain = Chain("PRAGUE")
    beacon = chain.deploy("Beacon")
    chain.go(blocks=20_000)
    history = "0x0000f90827f1c53a10cb7a02335b175320002935"
    # Stands for EIP-2935's contract: what is in the slot of that number.
    chain.evm.insert_account_info(history, pyrevm.AccountInfo(code=bytes.fromhex("6000355460005260206000f3")))
    for age in (257, 5_000, 8_191):
        chain.evm.insert_account_storage(history, chain.block - age, age)
    for block in (chain.block, chain.block + 1, 2**64 - 1, 0):
        assert chain.read(beacon, "beaconOf", block) == ZERO
    for age in (1, 256):
        assert chain.read(beacon, "beaconOf", chain.block - age) == chain.evm.block_hash(chain.block - age) != ZERO
    for age in (257, 5_000, 8_191):
        assert chain.read(beacon, "beaconOf", chain.block - age) == age.to_bytes(32, "big")
    without = Chain()
    beacon = without.deploy("Beacon")
    without.go(blocks=20_000)
    assert without.read(beacon, "beaconOf", without.block - 300) == ZERO


def test_all_fit_into_a_block_and_have_no_way_to_change() -> None:
    for name in ("Ledger", "Proofs", "Beacon"):
        contract = Contract(name)
        assert contract.size <= 24_576
        data = json.loads((LEDGER / "artifacts" / f"{name}.json").read_text())
        opcodes = set(opcodes_of(bytes.fromhex(data["deployedBytecode"][2:])))
        assert not opcodes & {0xF2, 0xF4, 0xFF}  # callcode, delegatecall, selfdestruct


def test_artifacts_are_of_these_sources() -> None:
    """The bytes themselves: python ledger/contracts/build.py --check."""
    for path in (LEDGER / "artifacts").glob("*.json"):
        for name, digest in json.loads(path.read_text())["sources"].items():
            if name.startswith("src/"):
                assert sha256((LEDGER / "contracts" / name).read_bytes()).hexdigest() == digest, (path.name, name)


def opcodes_of(code: bytes) -> Iterable[int]:
    at = 0
    while at < len(code):
        yield code[at]
        at += 1 + max(0, code[at] - 0x5F) * (code[at] <= 0x7F)
