"""What a checkpoint's frames cost: hashing of leaves beside hashlib, and compression beside zstd's own level 1.

The data are weights: normal floats of two hundredths, in frames of 1 MiB that stay in the caches of no level. Rates are
10^9 bytes of the tensor a second, medians; with several threads each takes frames of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256

import numpy as np
import zstandard
from numpy.typing import NDArray

from benchmarks.harness import Row, main
from storage.frames import FRAME_BYTES, decode_frame, encode_frame, hash_frame
from storage.merkle import LEAF_BYTES

Frame = NDArray[np.uint8]
ITEMSIZE = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """How much, how often, by how many."""
    parser.add_argument("--frames", type=int, default=256, help="frames of 1 MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", default=f"1,{os.cpu_count() or 1}", help="thread counts")


def with_hashlib(frame: Frame) -> None:
    """Every leaf hashed as RFC 6962 has it, by OpenSSL."""
    begin, octets = sha256(b"\x00").copy, frame.data
    for at in range(0, len(octets), LEAF_BYTES):
        leaf = begin()
        leaf.update(octets[at : at + LEAF_BYTES])
        leaf.digest()


def rate(act: Callable[[int], object], count: int, threads: int, repeats: int) -> float:
    """10^9 bytes a second of `act` on frames 0 to `count`."""
    with ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            deque(pool.map(act, range(count)), maxlen=0)  # a save does not keep what it wrote either
            seconds.append(time.perf_counter() - started)
    return count * FRAME_BYTES / statistics.median(seconds[1:]) / 1e9


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rates by thread count, then what is stored."""
    random = np.random.default_rng(1)
    values = random.standard_normal((arguments.frames, FRAME_BYTES // ITEMSIZE), np.float32) * np.float32(0.02)
    frames: list[Frame] = list(values.view(np.uint8))
    stored = [encode_frame(frame, ITEMSIZE) for frame in frames]
    plain = [zstandard.compress(frame.data, 1) for frame in frames]
    out = np.empty((arguments.frames, FRAME_BYTES), np.uint8)
    for threads in map(int, arguments.threads.split(",")):
        measured = partial(rate, count=len(frames), threads=threads, repeats=arguments.repeats)
        label = f"{threads} thread{'s'[: threads > 1]}"
        ours = measured(lambda n: hash_frame(frames[n]))
        theirs = measured(lambda n: with_hashlib(frames[n]))
        yield Row(name=f"{label}: leaves and root", value=ours, unit="GB/s")
        yield Row(name=f"{label}: leaves by hashlib", value=theirs, unit="GB/s")
        yield Row(name=f"{label}: over hashlib", value=ours / theirs, unit="x")
        for name, act in (
            ("shuffled, compressed, decompressed and compared", lambda n: encode_frame(frames[n], ITEMSIZE)),
            ("decompressed", lambda n: decode_frame(*stored[n], ITEMSIZE, out[n])),
            ("compressed by zstd's level 1 alone", lambda n: zstandard.compress(frames[n].data, 1)),
        ):
            yield Row(name=f"{label}: {name}", value=measured(act), unit="GB/s")
    if not np.array_equal(out, values.view(np.uint8)):
        raise SystemExit("a frame was decompressed to other bytes than were compressed")
    size = len(frames) * FRAME_BYTES
    yield Row(name="stored", value=sum(len(data) for _, data in stored) / size, unit="of the bytes")
    yield Row(name="stored, zstd's level 1 alone", value=sum(map(len, plain)) / size, unit="of the bytes")


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
