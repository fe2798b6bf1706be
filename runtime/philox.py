"""Philox4x32-10 in integer arithmetic: the only source of randomness, a pure function of seed and counter.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The counter of element e of an operator is

    c0 = e // 4    c1 = place << 16 | operator    c2 = step    c3 = purpose << 24 | micro_batch

and the element takes word e % 4; the key is the seed's low and high 32 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

INITIAL_WEIGHTS = 0
DROPOUT = 1
DATA_ORDER = 2

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: added to the key after each round
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32_10(counter: NDArray[Any], key: NDArray[Any]) -> Words:
    """The four random words of each counter.

    counter: u32 [..., 4]; key: u32 [2]; returns u32 [..., 4]. ValueError for other shapes.
    """
    if counter.shape[-1:] != (4,) or key.shape != (2,):
        raise ValueError(f"philox: expected counter [..., 4] and key [2], got {counter.shape} and {key.shape}")
    # Whole rows of 64-bit lanes, because numpy has no 32 x 32 -> 64 bit product.
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    low_key, high_key = int(key[0]), int(key[1])
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (product1 >> HALF) ^ c1 ^ np.uint64(low_key)
        c2 = (product0 >> HALF) ^ c3 ^ np.uint64(high_key)
        c1, c3 = product1 & LOW, product0 & LOW
        low_key, high_key = (low_key + WEYL[0]) & 0xFFFFFFFF, (high_key + WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def key_of(seed: int) -> Words:
    """The key of a seed, u32 [2]: its low, then its high 32 bits."""
    return np.array((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), dtype=np.uint32)


def words(
    seed: int, count: int, *, purpose: int, step: int = 0, micro_batch: int = 0, place: int = 0, operator: int = 0
) -> Words:
    """The random words of elements 0 to count - 1, u32 [count]; ValueError where a counter field does not fit."""
    bounds = (("purpose", purpose, 8), ("step", step, 32), ("micro_batch", micro_batch, 24))
    for name, value, bits in (*bounds, ("place", place, 16), ("operator", operator, 16), ("count", count, 34)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"philox counter: expected {name} of 0 to {(1 << bits) - 1}, got {value}")
    counter = np.empty((-(-count // 4), 4), dtype=np.uint32)
    counter[:, 0] = np.arange(len(counter), dtype=np.uint64)
    counter[:, 1:] = (place << 16 | operator, step, purpose << 24 | micro_batch)
    return philox4x32_10(counter, key_of(seed)).reshape(-1)[:count]
