"""Counter-based random numbers: Philox4x32-10 in integer operators (Salmon et al., SC'11, section 3.3).

The `rng` input of a Program is i64[6]: key low, key high, step, micro-batch, place (block or tensor), first element.
Counter words: element // 4; place << 16 | operator; step; purpose << 24 | micro-batch. Element e takes word e % 4.
"""

from __future__ import annotations

from runtime.program.builder import Value

RNG_WORDS = 6
PURPOSE_WEIGHTS, PURPOSE_DROPOUT = 0, 1

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def words(rng: Value, elements: int, *, purpose: int, operator: int) -> Value:
    """One 32-bit word an element, as i64[elements] in [0, 2^32)."""
    k0, k1, step, micro_batch, place, first = (rng.slice(0, i, i + 1) for i in range(RNG_WORDS))
    count = -(-elements // 4)
    b = rng.builder
    c0 = (b.iota(count) + (first >> 2)) & _MASK
    c1, c2, c3 = (
        v.broadcast(count)
        for v in (((place << 16) | operator) & _MASK, step & _MASK, (micro_batch & 0xFFFFFF) | (purpose << 24))
    )
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    table = b.concat([c.reshape(count, 1) for c in (c0, c1, c2, c3)], axis=1)
    return table.reshape(4 * count).slice(0, 0, elements)


def uniform(word: Value) -> Value:
    """(u >> 8) * 2^-24 in [0, 1) as f32."""
    return (word >> 8).float().scale(-24)


def symmetric(word: Value) -> Value:
    """Odd multiples of 2^-24 in (-1, 1) as f32, symmetric about 0."""
    return (((word >> 8) << 1) + (1 - 2**24)).float().scale(-24)
