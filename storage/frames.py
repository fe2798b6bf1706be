"""Frames: a tensor's bytes in pieces of 1 MiB, each hashed, shuffled, compressed and placed alone.

256 leaves are a power of two, so the Merkle roots of a tensor's frames are tree nodes of the tensor, and whoever holds
one frame can check it. In a pack a frame is a **cell**: its stored bytes, then the hashes of its leaves (the proof
tile), so that one short read gives what an inclusion proof needs and a damaged leaf can be named.
"""

import threading
from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from storage import kernels, merkle
from storage.errors import FailureError

FRAME_BYTES = merkle.CHUNK_LEAVES * merkle.LEAF_BYTES
PACK_BYTES = 32 << 20
"""A pack is written once its cells take this much."""
PACK_HEADER = b"TWPACK1\n"
PLAIN, SHUFFLED = 0, 1
"""Codecs: the bytes as they are; zstd of the bytes shuffled by element size."""
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, write_content_size=True, write_checksum=False
)
"""Level 1, told not to look for the short matches that floats have by chance: 2.5 times as fast, and smaller."""

_BLOCK_BYTES = 128 << 10
"""The most that a block of a zstd frame holds (RFC 8878 section 3.1.1.2.4)."""
_MAGIC = b"\x28\xb5\x2f\xfd"
_RLE = 1
"""The type of a block that is one byte, repeated."""
_SLICES, _SLICE_BYTES = 16, 256
"""Parts of a plane that are looked at to tell whether it is noise."""

Bytes = NDArray[np.uint8]


class Frame(NamedTuple):
    """A frame that is ready to be placed: its root, the hashes of its leaves, and how it is stored."""

    root: bytes
    tile: bytes
    codec: int
    stored: memoryview


class _Codecs(threading.local):
    """What serves one thread each: zstd's contexts, and memory that the system need not clear for every frame."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.sampler = zstandard.ZstdCompressor(compression_params=_PARAMETERS)  # a context keeps tables for one size
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)
        self.planes, self.again, self.room = np.empty((3, FRAME_BYTES), np.uint8)


_codecs = _Codecs()


def hash_frame(raw: Bytes) -> tuple[bytes, bytes]:
    """(root, hashes of the leaves) of the frame's bytes."""
    tile = kernels.leaf_hashes(raw.data)
    return kernels.tree_root(tile), tile


def encode_frame(raw: Bytes, itemsize: int) -> tuple[int, memoryview]:
    """(codec, stored bytes) from which `decode_frame` has just given the same bytes again.

    Bytes that do not shrink are stored plain. FailureError where decoding gives others: a fault of memory or library.
    """
    planes = _codecs.planes[: len(raw)].data
    kernels.shuffle(raw.data, itemsize, planes)
    noise = _noise(planes, itemsize)
    stored = _compressed(planes, noise) if noise < len(planes) else planes
    if len(stored) >= len(raw):
        return PLAIN, raw.data
    again = _codecs.again[: len(raw)]
    decode_frame(SHUFFLED, stored, itemsize, again)
    if not np.array_equal(again, raw):
        raise FailureError(
            "a frame decompressed to other bytes than were compressed, and nothing was stored of it; "
            "test this machine's memory, then run the command again"
        )
    return SHUFFLED, stored


def _noise(planes: memoryview, itemsize: int) -> int:
    """Bytes of the planes at the start that do not shrink, as far as a sample of each can tell."""
    size = len(planes) // itemsize
    step = size // _SLICES
    if step < _SLICE_BYTES:
        return 0
    for plane in range(itemsize):
        slices = np.frombuffer(planes, np.uint8, _SLICES * step, plane * size).reshape(_SLICES, step)
        sample = slices[:, :_SLICE_BYTES].tobytes()
        if len(_codecs.sampler.compress(sample)) < len(sample):
            return plane * size
    return len(planes)


def _compressed(planes: memoryview, noise: int) -> memoryview:
    """A zstd frame of the planes: raw blocks of the noise, which zstd would search in vain, and its own of the rest."""
    room = _codecs.room[: len(planes) - noise].data
    with _codecs.compressor.stream_reader(planes[noise:], size=len(room)) as reader:
        rest = room[: reader.readinto(room)]
    if len(rest) == len(room):
        return planes
    if not noise:
        return memoryview(bytes(rest))
    blocks = rest[zstandard.frame_header_size(rest) :]
    starts = range(0, noise, _BLOCK_BYTES)
    made = np.empty(len(_MAGIC) + 5 + 3 * len(starts) + noise + len(blocks), np.uint8).data
    made[:9] = _MAGIC + b"\xa0" + len(planes).to_bytes(4, "little")  # no window but the content, whose size has 4 bytes
    at = 9
    for start in starts:
        size = min(_BLOCK_BYTES, noise - start)
        made[at : at + 3] = (size << 3).to_bytes(3, "little")  # raw, and not the last
        made[at + 3 : at + 3 + size] = planes[start : start + size]
        at += 3 + size
    made[at:] = blocks
    return made


def decode_frame(codec: int, stored: bytes | memoryview, itemsize: int, out: Bytes) -> None:
    """Fill `out` with the frame; ValueError where `stored` is none of its length, before anything is allocated."""
    if codec == PLAIN:
        if len(stored) != len(out):
            raise ValueError(f"expected {len(out)} plain bytes, got {len(stored)}")
        out[:] = np.frombuffer(stored, np.uint8)
        return
    planes = _codecs.room[: len(out)].data
    try:
        told = zstandard.get_frame_parameters(stored)
        if told.content_size != len(out) or told.window_size > FRAME_BYTES:
            raise ValueError(
                f"expected a zstd frame of {len(out)} bytes and a window of at most {FRAME_BYTES}, got one of "
                f"{told.content_size} and {told.window_size}"
            )
        with _codecs.decompressor.stream_reader(stored) as reader:
            size = reader.readinto(planes)
    except zstandard.ZstdError as error:
        raise ValueError(f"expected a zstd frame: {error}") from error
    if size != len(out):
        raise ValueError(f"expected {len(out)} bytes in a zstd frame, got {size}")
    whole = _end(memoryview(stored)) + 4 * told.has_checksum
    if whole != len(stored):
        raise ValueError(f"expected a zstd frame that is {whole} bytes long, got {len(stored)}")
    kernels.unshuffle(planes, itemsize, out.data)


def _end(stored: memoryview) -> int:
    """Where the last block of a zstd frame ends, beyond `stored` where it has none."""
    at, head = zstandard.frame_header_size(stored), 0
    while not head & 1 and at <= len(stored):
        head = int.from_bytes(stored[at : at + 3], "little")
        at += 3 + (1 if head >> 1 & 3 == _RLE else head >> 3)
    return at
