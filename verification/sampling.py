"""Which segments an audit replays, and what it may have missed by not replaying the others."""

from hashlib import sha256
from math import comb

_DOMAIN = b"trueweight-sample-v1\0"


def sample(run: bytes, total: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` of the segments 0 .. total - 1 without repetition, ascending: all of them where there are no more.

    A function of the run's digest and the seed alone. Draw the seed after the run is committed: a trainer who
    knows it beforehand knows where to cheat.
    """

    def ticket(index: int) -> bytes:
        return sha256(_DOMAIN + run + seed.to_bytes(8, "little") + index.to_bytes(4, "little")).digest()

    return tuple(sorted(sorted(range(total), key=ticket)[:count]))


def miss_probability(total: int, sampled: int, forged: int) -> float:
    """The probability that `sampled` of `total` segments, drawn uniformly, hold none of `forged` forged ones."""
    return comb(total - forged, sampled) / comb(total, sampled)
