"""Verification finds and locates every flipped bit; repair mends it; proofs show what they claim and nothing else."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from storage import merkle, proofs
from storage.checking import Finding, detection, verify, verify_sample
from storage.checkpoints import load_state, open_checkpoint
from storage.codec import decode, encode, record_digest
from storage.errors import Conflict, FailureError, UsageError
from storage.objects import MemoryObjects
from storage.proofs import FalseProof, check, prove, read_proof
from storage.records import Pin, RecordList, SegmentRecord
from storage.saving import save_state
from storage.store import Store
from storage.transfer import copy, repair

NOISE = np.random.default_rng(5)
STATE = {
    "plain": NOISE.integers(-128, 128, 5000).astype(np.int8),  # does not shrink: stored as it is
    "zeros": np.zeros((40, 30), np.float32),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 2), np.float32),
}


def filled() -> Store:
    """A small store: a checkpoint, an object with a record, two references, one of them with a past."""
    store = Store(MemoryObjects())
    root = save_state(store, STATE)
    store.swap("pins/state", None, pin(root))
    store.swap("pins/records", None, store.put(encode(RecordList(items=(b"a record",)))))
    store.swap("pins/records", store.read("pins/records"), store.put(encode(RecordList(items=(b"another",)))))
    return store


def pin(root: bytes) -> bytes:
    return encode(Pin(state=root))


def pinned(store: Store) -> bytes:
    return decode(Pin, store.read("pins/state") or b"").state


def duplicate(store: Store) -> Store:
    made = MemoryObjects()
    for found in store.objects.list(""):
        made.create(found.key, store.objects.read(found.key) or b"")
    return Store(made)


def flip(store: Store, key: str, bit: int) -> None:
    data = bytearray(store.objects.read(key) or b"")
    data[bit // 8] ^= 1 << bit % 8
    store.objects.replace(key, bytes(data))


def located(store: Store, bit: int, finding: Finding) -> bool:
    """Whether a finding in the pack names the tensor and leaf that the bit belongs to."""
    root = pinned(store)
    manifest = open_checkpoint(store, root).manifest
    at = bit // 8
    for frame, row in enumerate(manifest.frames):
        start, stored = int(row["offset"]), int(row["offset"]) + int(row["size"])
        tensor, number = manifest.tensor_of(frame)
        name, first = manifest.tensors[tensor].name, number * merkle.CHUNK_LEAVES
        if start <= at < stored + int(manifest.tiles[frame]):
            if finding.tensor is None:  # a bit of zstd's header that no decoder looks at
                return int(row["codec"]) == 1 and load_state(store, root)[name].tobytes() == STATE[name].tobytes()
            if finding.tensor != name:
                return False
            if at >= stored:
                return finding.leaf == first + (at - stored) // 32
            leaf = first + (at - start) // merkle.LEAF_BYTES if int(row["codec"]) == 0 else None
            return leaf is None or finding.leaf == leaf
    return finding.tensor is None  # the header of the pack


def test_every_flipped_bit_is_found_and_located() -> None:
    store = filled()
    assert verify(store).findings == []
    (pack,) = [found.key for found in store.objects.list("packs/")]
    last = bits_of(store, pack)
    chosen = [(pack, bit) for bit in range(last) if bit % 73 == 0 or bit < 512 or bit > last - 3000]
    for found in store.objects.list(""):
        # all of references and objects, of the long manifest a bit a byte (test_storage_manifest.py has them all)
        step = 8 if found.key.startswith("checkpoints/") else 1
        chosen += [(found.key, bit) for bit in range(0, 8 * found.size, step) if found.key != pack]
    for key, bit in chosen:
        flip(store, key, bit)
        findings = verify(store).findings
        assert [finding.key for finding in findings] == [key], (key, bit)
        assert findings[0].kind == "damaged"
        if key == pack:
            assert located(store, bit, findings[0]), (bit, findings[0])
        flip(store, key, bit)
    assert verify(store).findings == []


def bits_of(store: Store, key: str) -> int:
    found = store.objects.find(key)
    assert found is not None
    return 8 * found.size


def test_repair_mends_every_file() -> None:
    good = filled()
    for found in list(good.objects.list("")):
        for harm in ("flip", "lose"):
            store = duplicate(good)
            if harm == "flip":
                flip(store, found.key, 100)
            elif found.key.startswith("refs/"):
                continue  # a reference that is gone is a reference that never was
            else:
                store.objects.delete(found.key)
            told = repair(store, good)
            assert told.failed == []
            if "000000000001" not in found.key or "state" in found.key:
                assert [one.key for one in told.mended] == (
                    [found.key] if still_needed(good, found.key) or harm == "flip" else []
                )
            assert verify(store).findings == []
            for name in good.names(""):
                assert store.read(name) == good.read(name)


def still_needed(store: Store, key: str) -> bool:
    """Whether a reference leads to it: the object of the superseded value is garbage, and garbage may go."""
    from storage.reachable import reachable

    return key in set(reachable(store).keys())


def test_repair_from_a_store_that_packed_otherwise() -> None:
    store, other = filled(), Store(MemoryObjects())
    root = save_state(other, STATE, compress=False)
    (pack,) = [found.key for found in store.objects.list("packs/")]
    flip(store, pack, 1000)
    told = repair(store, other)
    assert [one.key for one in told.mended] == [pack]
    assert verify(store).findings == []
    assert load_state(store, root)["plain"].tobytes() == STATE["plain"].tobytes()


def test_two_checkpoints_that_share_a_pack_are_mended_from_a_store_that_packed_otherwise() -> None:
    store, other = Store(MemoryObjects()), Store(MemoryObjects())
    changed = STATE | {"scalar": np.array(8, np.int64)}
    first = save_state(store, STATE, compress=False)
    second = save_state(store, changed, base=first, compress=False)
    for name, root in (("pins/first", first), ("pins/second", second)):
        store.swap(name, None, pin(root))
    shared = {*open_checkpoint(store, first).manifest.packs} & {*open_checkpoint(store, second).manifest.packs}
    (pack,) = [f"packs/{digest.hex()[:2]}/{digest.hex()[2:]}" for digest in shared]
    flip(store, pack, 1000)
    save_state(other, STATE)
    told = repair(store, other)  # which lacks the second state, so that nothing may be dropped for it
    assert {one.key for one, _ in told.failed} == {pack}
    assert store.objects.find(pack) is not None
    save_state(other, changed)
    assert repair(store, other).failed == []
    assert verify(store).findings == []
    assert store.objects.find(pack) is None
    assert load_state(store, first)["scalar"] == 7
    assert load_state(store, second)["scalar"] == 8


def test_garbage_loses_its_packs_before_it_goes_itself() -> None:
    store = filled()
    garbage = save_state(store, {"x": NOISE.integers(-128, 128, 9000).astype(np.int8)})
    (digest,) = open_checkpoint(store, garbage).manifest.packs
    store.objects.delete(f"packs/{digest.hex()[:2]}/{digest.hex()[2:]}")
    assert verify(store).findings == []
    store.swap("pins/needed", None, pin(garbage))
    assert [one.kind for one in verify(store).findings] == ["missing"]


def test_what_the_other_store_has_not_is_told() -> None:
    store = filled()
    key = next(found.key for found in store.objects.list("objects/"))
    flip(store, key, 3)
    told = repair(store, Store(MemoryObjects()))
    assert [(one.key, "is missing in" in why) for one, why in told.failed] == [(key, True)]
    other = filled()
    flip(other, key, 5)
    assert "is damaged" in repair(store, other).failed[0][1]


def test_a_missing_pack_is_one_finding_and_a_lost_checkpoint_names_its_reference() -> None:
    store = filled()
    (pack,) = [found.key for found in store.objects.list("packs/")]
    store.objects.delete(pack)
    assert [(one.key, one.kind) for one in verify(store).findings] == [(pack, "missing")]
    root = pinned(store)
    store.objects.delete(f"checkpoints/{root.hex()}")
    assert [one.kind for one in verify(store).findings] == ["missing"]


def test_a_sample_finds_damage_as_often_as_it_says() -> None:
    store = Store(MemoryObjects())
    state = {f"t{at}": NOISE.integers(-128, 128, 4096).astype(np.int8) for at in range(20)}
    store.swap("pins/a", None, pin(save_state(store, state)))
    (pack,) = [found.key for found in store.objects.list("packs/")]
    assert verify_sample(store, 50, 1).findings == []
    flip(store, pack, 8 * 5000)  # one leaf of twenty
    found = sum(bool(verify_sample(store, 10, seed).findings) for seed in range(200))
    assert abs(found / 200 - detection(1 / 20, 10)) < 0.12
    assert verify_sample(store, 10, 3).findings == verify_sample(store, 10, 3).findings
    assert detection(0.01, 459) >= 0.99 > detection(0.01, 458)
    assert verify_sample(Store(MemoryObjects()), 10, 1).leaves == 0


def test_a_copy_of_a_damaged_store_is_refused() -> None:
    store, target = filled(), Store(MemoryObjects())
    key = next(found.key for found in store.objects.list("packs/"))
    flip(store, key, 77)
    with pytest.raises(FailureError, match=r"pack .* is damaged"):
        copy(store, target)
    assert target.names("") == []
    flip(store, key, 77)
    assert copy(store, target).references == ["pins/records", "pins/state"]
    store.swap("pins/state", store.read("pins/state"), pin(save_state(store, {"x": np.zeros(3, np.float32)})))
    with pytest.raises(Conflict, match="another history"):
        copy(store, target)


def test_a_copy_leans_on_no_pack_but_its_own() -> None:
    source, target = filled(), Store(MemoryObjects())
    root = save_state(target, STATE, compress=False)  # garbage there, under the same root
    (other,) = [found.key for found in target.objects.list("packs/")]
    copy(source, target)
    target.objects.delete(other)
    assert verify(target).findings == []
    assert load_state(target, root)["plain"].tobytes() == STATE["plain"].tobytes()


# ------------------------------------------------------------------------------------------------------------- proofs


@pytest.fixture(scope="module")
def big() -> tuple[Store, bytes, dict[str, np.ndarray]]:
    """A state whose tensors have several frames, the last one short."""
    state = {
        "a": NOISE.standard_normal((700, 1000)).astype(np.float32),
        "b": NOISE.integers(-(2**62), 2**62, (3, 50_001)),
        "c": np.array([True, False, True]),
        "d": np.array(np.nan, np.float32),
        "e": np.zeros((2, 0), np.float32),
    }
    store = Store(MemoryObjects())
    return store, save_state(store, state), state


def test_any_element_can_be_proved_from_a_few_kilobytes(big: tuple[Store, bytes, dict[str, np.ndarray]]) -> None:
    store, root, state = big
    checkpoint = open_checkpoint(store, root)
    for name, array in state.items():
        for flat in {0, array.size // 2, array.size - 1, 262_143 % max(array.size, 1)} if array.size else ():
            index = tuple(int(at) for at in np.unravel_index(flat, array.shape))
            text = json.dumps(prove(checkpoint, name, index))
            assert len(text) < 12_000
            shown = check(read_proof(text))
            assert (shown.state_root, shown.entry.name, shown.index) == (root, name, index)
            assert np.array(shown.value, array.dtype).tobytes() == array[index].tobytes()
    leaves = [merkle.leaf_hash(state["a"].tobytes()[at : at + 4096]) for at in range(0, state["a"].nbytes, 4096)]
    proof = prove(checkpoint, "a", (699, 999))
    assert proof["leaf_path"] == [one.hex() for one in merkle.inclusion_proof(leaves, len(leaves) - 1)]


def test_a_proof_binds_the_segment(big: tuple[Store, bytes, dict[str, np.ndarray]]) -> None:
    store, root, _ = big
    some = bytes(32)
    segment = SegmentRecord(
        run=some, index=3, first_step=0, steps=1, prestate=some, poststate=root, steps_root=some, receipts_root=some,
        previous=some, steps_object=some, receipts_object=some,
    )  # fmt: skip
    shown = check(prove(open_checkpoint(store, root), "c", (1,), segment))
    assert (shown.segment, shown.segment_digest) == (segment, record_digest(segment))


def forged(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(proof: dict[str, Any]) -> dict[str, Any]:
        change(proof)
        return proof

    return apply


def nudge(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another value": lambda p: p["element"].update(value=1.0),
    "other bits": lambda p: p["element"].update(bits="00000000"),
    "another index": lambda p: p["element"].update(index=[0, 1]),
    "another leaf": lambda p: p["leaf"].update(bytes=nudge(p["leaf"]["bytes"])),
    "a short leaf": lambda p: p["leaf"].update(bytes=p["leaf"]["bytes"][:-2]),
    "another leaf index": lambda p: p["leaf"].update(index=1),
    "another leaf count": lambda p: p["leaf"].update(count=p["leaf"]["count"] - 1),
    "another sibling": lambda p: p["leaf_path"].__setitem__(0, nudge(p["leaf_path"][0])),
    "a sibling less": lambda p: p["leaf_path"].pop(),
    "a sibling more": lambda p: p["leaf_path"].append("00" * 32),
    "another name": lambda p: p["tensor"].update(name="b"),
    "another dtype": lambda p: p["tensor"].update(dtype="i32"),
    "another shape": lambda p: p["tensor"].update(shape=[1000, 700]),
    "another tensor root": lambda p: p["tensor"].update(root=nudge(p["tensor"]["root"])),
    "another place of the tensor": lambda p: p.update(tensor_index=1),
    "another number of tensors": lambda p: p.update(tensor_count=4),
    "another sibling of the tensor": lambda p: p["tensor_path"].__setitem__(0, nudge(p["tensor_path"][0])),
    "another state": lambda p: p.update(state_root=nudge(p["state_root"])),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_proof_is_refused(
    big: tuple[Store, bytes, dict[str, np.ndarray]], change: Callable[[dict[str, Any]], object]
) -> None:
    store, root, _ = big
    proof = json.loads(json.dumps(prove(open_checkpoint(store, root), "a", (0, 0))))
    assert check(proof)
    change(proof)
    with pytest.raises(UsageError, match=r"proof refused|proof: expected") as caught:
        check(proof)
    assert isinstance(caught.value, FalseProof)


MALFORMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no format": lambda p: p.pop("format"),
    "another format": lambda p: p.update(format="trueweight-proof-9"),
    "no leaf": lambda p: p.pop("leaf"),
    "an index that is no number": lambda p: p["element"].update(index=["0", "0"]),
    "a path that is no list": lambda p: p.update(leaf_path=3),
    "digits that are no hexadecimal": lambda p: p["leaf"].update(bytes="xy"),
    "a negative length": lambda p: p["tensor"].update(shape=[-1, 5]),
    "a segment that is none": lambda p: p.update(segment="00"),
    "a count that is no number": lambda p: p.update(tensor_count=None),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_proof_is_a_usage_error(
    big: tuple[Store, bytes, dict[str, np.ndarray]], change: Callable[[dict[str, Any]], object]
) -> None:
    store, root, _ = big
    proof = json.loads(json.dumps(prove(open_checkpoint(store, root), "a", (0, 0))))
    change(proof)
    with pytest.raises(UsageError):
        check(proof)


def test_text_that_is_no_proof() -> None:
    for text in ("", "[]", "{", '"x"'):
        with pytest.raises(UsageError, match=r"proof: expected"):
            read_proof(text)
    assert proofs.FORMAT == "trueweight-proof-1"
