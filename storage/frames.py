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

Bytes = NDArray[np.uint8]


class Frame(NamedTuple):
    """A frame that is ready to be placed: its root, the hashes of its leaves, and how it is stored."""

    root: bytes
    tile: bytes
    codec: int
    stored: memoryview


class _Codecs(threading.local):
    """zstd's contexts, which serve one thread each."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)


_codecs = _Codecs()


def hash_frame(raw: Bytes) -> tuple[bytes, bytes]:
    """(root, hashes of the leaves) of the frame's bytes."""
    tile = kernels.leaf_hashes(raw.data)
    return kernels.tree_root(tile), tile


def encode_frame(raw: Bytes, itemsize: int) -> tuple[int, memoryview]:
    """(codec, stored bytes) from which `decode_frame` has just given the same bytes again.

    Bytes that do not shrink are stored plain. FailureError where decoding gives others: a fault of memory or library.
    """
    room = np.empty(max(len(raw) - 1, 0), np.uint8)
    with _codecs.compressor.stream_reader(kernels.shuffle(raw.data, itemsize), size=len(raw)) as reader:
        size = reader.readinto(room.data)
    if size >= len(room):
        return PLAIN, raw.data
    stored = room[:size].data
    again = np.empty_like(raw)
    decode_frame(SHUFFLED, stored, itemsize, again)
    if not np.array_equal(again, raw):
        raise FailureError(
            "a frame decompressed to other bytes than were compressed, and nothing was stored of it; "
            "test this machine's memory, then run the command again"
        )
    return SHUFFLED, stored


def decode_frame(codec: int, stored: bytes | memoryview, itemsize: int, out: Bytes) -> None:
    """Fill `out` with the frame; ValueError where `stored` is none of its length, before anything is allocated."""
    if codec == PLAIN:
        if len(stored) != len(out):
            raise ValueError(f"expected {len(out)} plain bytes, got {len(stored)}")
        out[:] = np.frombuffer(stored, np.uint8)
        return
    try:
        told = zstandard.get_frame_parameters(stored)
        if told.content_size != len(out) or told.window_size > FRAME_BYTES:
            raise ValueError(
                f"expected a zstd frame of {len(out)} bytes and a window of at most {FRAME_BYTES}, got one of "
                f"{told.content_size} and {told.window_size}"
            )
        planes = _codecs.decompressor.decompress(
            stored, max_output_size=len(out), read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"expected a zstd frame: {error}") from error
    if len(planes) != len(out):
        raise ValueError(f"expected {len(out)} bytes in a zstd frame, got {len(planes)}")
    kernels.unshuffle(planes, itemsize, out.data)
