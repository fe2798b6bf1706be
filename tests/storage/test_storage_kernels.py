"""Kernels against hashlib and numpy: all lengths, any buffer, several threads, other processors, wrong machine code."""

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import kernels, merkle
from storage.native import features

MIB = 1 << 20
LENGTHS = [0, 1, 63, 64, 4095, 4096, 4097, 8192, 65535, 65536, 65537, MIB, MIB + 5, 3 * MIB]
ITEM_COUNTS = [0, 1, 15, 16, 17, 1000, 1 << 17, (1 << 17) + 5, (1 << 18) + 13]


def random_bytes(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def slow_leaf_hashes(data: bytes) -> list[bytes]:
    return [sha256(b"\x00" + data[at : at + 4096]).digest() for at in range(0, len(data), 4096)]


def needs(feature: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(feature not in features(), reason=f"this processor has no {feature}")


def planes_of(data: Any, itemsize: int) -> bytearray:
    planes = bytearray(memoryview(data).nbytes)
    kernels.shuffle(data, itemsize, planes)
    return planes


def slow_root(hashes: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if not hashes:
        return sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << (len(hashes) - 1).bit_length() - 1
    return sha256(b"\x01" + slow_root(hashes[:split]) + slow_root(hashes[split:])).digest()


FORMS = ("avx512bw", "sha", "sha2", "avx2")
"""What the kernels that hash need; sha2 is ARM's, so benchmarks/arm.py runs it."""


@pytest.fixture
def fresh() -> Iterator[None]:
    """No kernel is loaded before or after."""
    for loaded in (kernels._hashing, kernels._transposing):
        loaded.cache_clear()
    yield
    for loaded in (kernels._hashing, kernels._transposing):
        loaded.cache_clear()


def test_this_processor_has_the_kernels_it_can_have() -> None:
    """Else the tests below would pass without any."""
    assert (kernels._hashing() is not None) == bool(features() & set(FORMS))
    assert all(kernels._transposing(size, back) for size in kernels.WIDTHS for back in (False, True))


@pytest.mark.parametrize("feature", [pytest.param(name, marks=needs(name)) for name in FORMS])
def test_every_form_of_the_hash_is_right_for_any_number_of_messages(feature: str) -> None:
    """Only one of them is used on a processor."""
    kernel = kernels._compiled("hashing", partial(kernels._hashing_text, feature), 7, feature)
    assert kernel is not None
    for count in (*range(1, 36), 255, 256):
        data = random_bytes(count * 4096 + count % 3, seed=count)
        hashes = slow_leaf_hashes(data)
        assert kernels._fast_leaf_hashes(kernel, memoryview(data)) == b"".join(hashes), count
        assert kernels._fast_tree_root(kernel, b"".join(hashes)) == slow_root(hashes), count


@pytest.mark.parametrize("length", LENGTHS)
def test_hashes_and_root_equal_the_definition(length: int) -> None:
    data = random_bytes(length)
    hashes = slow_leaf_hashes(data)
    assert kernels.leaf_hashes(data) == b"".join(hashes)
    assert kernels.tree_root(b"".join(hashes)) == slow_root(hashes)
    assert merkle.bytes_root(data) == slow_root(hashes) == merkle.root(hashes)


@settings(deadline=None)
@given(st.integers(4096, 21 * 4096), st.integers(0, 2**32), st.sampled_from([4096, kernels.LARGE]))
def test_any_number_of_leaves(length: int, seed: int, large: int) -> None:
    data = random_bytes(length, seed)
    hashes = slow_leaf_hashes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LARGE", large)
        assert kernels.leaf_hashes(data) == b"".join(hashes)
        assert kernels.tree_root(b"".join(hashes)) == slow_root(hashes)


@pytest.mark.parametrize("count", [*range(1, 20), 63, 64, 65, 127, 128, 129, 1000])
def test_trees_of_every_shape(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", 4096)
    hashes = [sha256(bytes([at % 256, at // 256])).digest() for at in range(count)]
    assert kernels.tree_root(b"".join(hashes)) == slow_root(hashes)


@pytest.mark.parametrize("length", [31, 40, 64 * 32 + 1])
def test_hashes_are_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match=f"expected hashes of 32 bytes each, got {length} bytes"):
        kernels.tree_root(bytes(length))


def test_a_message_is_hashed_to_its_last_bit() -> None:
    data = bytearray(64 * 4096)
    seen = {bytes(kernels.leaf_hashes(data))}
    for at in (0, 15, 16, 62, 63, 64, 2047, 4031, 4032, 4094, 4095):
        data[at] ^= 1
        made = kernels.leaf_hashes(data)
        assert made[:32] == sha256(b"\x00" + data[:4096]).digest()
        assert made[32:64] == sha256(bytes(4097)).digest()
        seen.add(made)
    assert len(seen) == 12


@pytest.mark.parametrize("offset", [1, 3, 8, 17, 63])
def test_unaligned_buffers(offset: int) -> None:
    data = random_bytes(MIB + 100)
    part = memoryview(data)[offset : offset + MIB + 7]
    assert kernels.leaf_hashes(part) == b"".join(slow_leaf_hashes(bytes(part)))
    even = part[:MIB]
    items = bytearray(len(even) + offset)
    planes = planes_of(even, 8)
    kernels.unshuffle(planes, 8, memoryview(items)[offset:])
    assert items[offset:] == even


def test_read_only_buffers(tmp_path: Path) -> None:
    data = random_bytes(MIB)
    array = np.frombuffer(data, "<f4").reshape(512, -1)
    assert not array.flags.writeable
    assert kernels.leaf_hashes(array.data) == b"".join(slow_leaf_hashes(data))
    (tmp_path / "data").write_bytes(data)
    with (tmp_path / "data").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert kernels.leaf_hashes(mapped) == b"".join(slow_leaf_hashes(data))
        assert planes_of(mapped, 4) == np.frombuffer(data, np.uint8).reshape(-1, 4).T.tobytes()


def test_empty_and_strided_buffers() -> None:
    assert kernels.leaf_hashes(np.empty((3, 0, 2)).data) == b""
    assert planes_of(np.empty((3, 0, 2)).data, 8) == b""
    kernels.unshuffle(b"", 8, np.empty((3, 0, 2)).data)
    with pytest.raises(TypeError, match="contiguous"):
        kernels.leaf_hashes(memoryview(bytes(MIB))[::2])


@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("count", ITEM_COUNTS)
def test_byte_planes(itemsize: int, count: int) -> None:
    data = random_bytes(count * itemsize)
    planes = planes_of(data, itemsize)
    assert planes == b"".join(data[byte::itemsize] for byte in range(itemsize))
    items = bytearray(len(data))
    kernels.unshuffle(planes, itemsize, items)
    assert items == data


@settings(deadline=None)
@given(st.integers(16, 200), st.sampled_from([2, 4, 8]), st.integers(0, 2**32))
def test_byte_planes_of_any_number_of_items(count: int, itemsize: int, seed: int) -> None:
    data = random_bytes(count * itemsize, seed)
    items = bytearray(len(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LARGE", 0)
        planes = planes_of(data, itemsize)
        kernels.unshuffle(planes, itemsize, items)
    assert planes == np.frombuffer(data, np.uint8).reshape(-1, itemsize).T.tobytes()
    assert items == data


def test_byte_planes_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple of 4 bytes, got 6"):
        kernels.shuffle(bytes(6), 4, bytearray(6))
    with pytest.raises(ValueError, match="expected a multiple of 4 bytes, got 6"):
        kernels.unshuffle(bytes(6), 4, bytearray(6))
    for act in (kernels.shuffle, kernels.unshuffle):
        with pytest.raises(ValueError, match="expected room for 8 bytes, got 12"):
            act(bytes(8), 4, bytearray(12))
        with pytest.raises(ValueError, match="got a read-only one"):
            act(bytes(8), 4, memoryview(bytes(8)))


def test_threads_share_the_first_kernel_and_get_the_same(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    compiled = kernels._compiled

    def counted(name: str, *rest: object) -> kernels.Kernel | None:
        loads.append(name)
        return compiled(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_compiled", counted)
    frames = [random_bytes(MIB + seed % 3 * 4100, seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as threads:
        roots = list(threads.map(merkle.bytes_root, frames))
        planes = list(threads.map(lambda frame: planes_of(frame, 4), frames))
    assert roots == [slow_root(slow_leaf_hashes(frame)) for frame in frames]
    assert planes == [np.frombuffer(frame, np.uint8).reshape(-1, 4).T.tobytes() for frame in frames]
    tried = 3 if features() & {"avx512bw", "sha", "sha2"} else 4
    assert sorted(loads) == ["hashing"] * tried + ["transposing"]


ELSEWHERE = """
import sys
{before}
from storage import kernels, merkle
data = bytes(range(251)) * 2089
planes = bytearray(2**18 + 4)
kernels.shuffle(data[:2**18 + 4], 4, planes)
items = bytearray(len(planes))
kernels.unshuffle(planes, 4, items)
assert items == data[:2**18 + 4]
print(kernels._hashing() is not None, merkle.bytes_root(data).hex(), merkle.bytes_root(planes).hex())
"""


@pytest.mark.parametrize(
    ("environment", "before", "has_kernel"),
    [
        ({"NUMBA_CPU_NAME": "generic"}, "", False),
        ({"NUMBA_CPU_NAME": "x86-64-v2"}, "", False),
        pytest.param({"NUMBA_CPU_NAME": "x86-64-v3"}, "", True, marks=needs("avx2")),
        pytest.param({"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+sha"}, "", True, marks=needs("sha")),
        pytest.param({"NUMBA_CPU_NAME": "x86-64-v4"}, "", True, marks=needs("avx512bw")),
        ({}, "sys.modules['llvmlite.binding'] = None", False),
    ],
    ids=["generic", "x86-64-v2", "x86-64-v3", "x86-64-v3 sha", "x86-64-v4", "no LLVM"],
)
def test_other_processors_and_no_compiler_give_the_same(
    environment: dict[str, str], before: str, has_kernel: bool, tmp_path: Path
) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    made = subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(before=before)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    data = bytes(range(251)) * 2089
    planes = np.frombuffer(data[: 2**18 + 4], np.uint8).reshape(-1, 4).T.tobytes()
    roots = [slow_root(slow_leaf_hashes(part)).hex() for part in (data, planes)]
    assert made.stdout.split() == [str(has_kernel), *roots]


def flipped(kernel: kernels.Kernel, when: Callable[[tuple[int, ...]], bool]) -> kernels.Kernel:
    """The kernel, with one wrong bit in its first byte for some arguments."""

    def wrong(*arguments: int) -> int:
        made = kernel(*arguments)
        if when(arguments):
            ctypes.c_ubyte.from_address(arguments[-1]).value ^= 1
        return made

    return wrong


def test_the_quicker_of_two_kernels_is_used(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels._hashing()
    if right is None:
        pytest.skip("this processor has no kernel that hashes")

    def slow(*arguments: int) -> int:
        time.sleep(0.01)
        return right(*arguments)

    def fast(*arguments: int) -> int:
        return right(*arguments)

    for first, second in ((slow, fast), (fast, slow)):
        kernels._hashing.cache_clear()
        monkeypatch.setattr(kernels, "_right_hashing", {"avx512bw": first, "sha": second}.get)
        assert kernels._hashing() is fast
    for feature in FORMS:
        kernels._hashing.cache_clear()
        monkeypatch.setattr(kernels, "_right_hashing", {feature: fast}.get)
        assert kernels._hashing() is fast


@pytest.mark.parametrize("halve", [0, 1], ids=["leaves", "tree"])
def test_a_kernel_that_hashes_wrongly_is_not_used(halve: int, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels._hashing()
    if right is None:
        pytest.skip("this processor has no kernel that hashes")
    kernels._hashing.cache_clear()
    wrong = flipped(right, lambda arguments: arguments[1] == halve)
    monkeypatch.setattr(kernels, "_compiled", lambda *of: wrong)
    data = random_bytes(MIB)
    assert merkle.bytes_root(data) == slow_root(slow_leaf_hashes(data))
    assert kernels._hashing() is None


@pytest.mark.parametrize("back", [False, True])
def test_a_kernel_that_transposes_wrongly_is_not_used(back: bool, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels._transposing(8, back)
    assert right is not None
    kernels._transposing.cache_clear()
    monkeypatch.setattr(kernels, "_compiled", lambda *of: flipped(right, lambda arguments: True))
    data = random_bytes(MIB)
    planes = np.frombuffer(data, np.uint8).reshape(-1, 8).T.tobytes()
    items = bytearray(MIB)
    kernels.unshuffle(planes, 8, items)
    assert (planes_of(data, 8), items) == (planes, data)
    assert kernels._transposing(8, back) is None
