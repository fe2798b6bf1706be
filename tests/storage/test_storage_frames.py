"""Frames beside zstd itself: raw blocks of noise and zstd's blocks of the rest are a frame that any decoder reads."""

from itertools import product

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import frames
from storage.frames import FRAME_BYTES, PLAIN, SHUFFLED, Bytes, decode_frame, encode_frame

PLANES = ("noise", "few values", "zeros", "noise with a gap", "counting")

ALONE = zstandard.ZstdCompressor(compression_params=frames._PARAMETERS)
"""zstd, asked about all planes: what leaving it out for noise must not lose anything against."""


def plane(kind: str, size: int, random: np.random.Generator) -> Bytes:
    made = random.integers(0, 256, size, np.uint8)
    if kind == "few values":
        return made % 8 + 60
    if kind == "counting":  # each value as often as any other, and yet no noise
        return np.arange(size).astype(np.uint8)
    if kind == "zeros":
        return np.zeros_like(made)
    if kind == "noise with a gap":
        made[size // 3 : size // 2] = 0
    return made


def frame_of(kinds: tuple[str, ...], items: int, seed: int = 1) -> Bytes:
    random = np.random.default_rng(seed)
    return np.ascontiguousarray(np.stack([plane(kind, items, random) for kind in kinds]).T).reshape(-1)


def checked(raw: Bytes, itemsize: int) -> tuple[int, int]:
    """(codec, length) after both decoders gave the bytes again."""
    codec, stored = encode_frame(raw, itemsize)
    out = np.empty_like(raw)
    decode_frame(codec, bytes(stored), itemsize, out)
    assert np.array_equal(out, raw)
    if codec == SHUFFLED:
        assert zstandard.decompress(stored) == raw.reshape(-1, itemsize).T.tobytes()
        assert len(stored) < len(raw)
    return codec, len(stored)


@pytest.mark.parametrize("kinds", [*product(PLANES, repeat=2), ("noise",), ("zeros",), ("noise with a gap",)])
@pytest.mark.parametrize("size", [FRAME_BYTES, FRAME_BYTES - 1000, 300_000, 40_000])
def test_planes_of_every_kind(kinds: tuple[str, ...], size: int) -> None:
    raw = frame_of(kinds, size // len(kinds))
    codec, stored = checked(raw, len(kinds))
    assert (codec == PLAIN) == (set(kinds) == {"noise"})
    assert stored <= 1.001 * len(ALONE.compress(raw.reshape(-1, len(kinds)).T.tobytes())) + 16


def test_weights_are_raw_blocks_and_compressed_exponents() -> None:
    raw = np.random.default_rng(1).standard_normal(FRAME_BYTES // 4, np.float32).view(np.uint8)
    codec, stored = encode_frame(raw, 4)
    heads, at = [], 9
    while not heads or not heads[-1] & 1:
        heads.append(int.from_bytes(stored[at : at + 3], "little"))
        at += 3 + (heads[-1] >> 3)
    assert codec == SHUFFLED
    assert [(head >> 1 & 3, head >> 3) for head in heads[:6]] == [(0, 128 << 10)] * 6
    assert {head >> 1 & 3 for head in heads[6:] if head >> 3} == {2}
    assert zstandard.get_frame_parameters(stored).window_size == FRAME_BYTES
    assert checked(raw, 4)[1] < 0.84 * len(raw)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 2, 4, 8]), st.lists(st.sampled_from(PLANES), min_size=8, max_size=8),
    st.integers(0, FRAME_BYTES // 8), st.integers(0, 2**32),
)  # fmt: skip
def test_frames_of_any_length(itemsize: int, kinds: list[str], items: int, seed: int) -> None:
    checked(frame_of(tuple(kinds[:itemsize]), items, seed), itemsize)
