"""Which pieces of a run an audit replays, and what it may have missed by not replaying the others.

Each piece has a ticket: a hash of beacon, run and piece. Integers decide what is drawn, so that it is the same
everywhere; floats only report chances. docs/sampling.md has the models, their formulas and a worked example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import ceil, comb, fsum, isfinite, lcm, prod

from storage.errors import UsageError

UNIFORM, STRATIFIED, RISK = "uniform", "stratified", "risk"
STRATEGIES = (UNIFORM, STRATIFIED, RISK)

_TICKET = b"trueweight-ticket-v1\0"
_CHAINED = b"trueweight-beacon-chained-v1\0"
_SEED = b"trueweight-beacon-seed-v1\0"


@dataclass(frozen=True, order=True)
class Piece:
    """What is audited at once: a whole segment (`worker` empty), or what a worker signed in the segment's first step.

    UsageError where `segment` is not below 2^32.
    """

    segment: int
    worker: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.segment < 1 << 32:
            raise UsageError(f"segment {self.segment}: expected 0 to 2^32 - 1; choose one of the run's segments")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A piece that may be drawn; `worker` is who is at risk with it, its stratum: a hex address or an id.

    `cost` is in steps (or micro-batches) of training; `weight` has no unit, only ratios matter. UsageError where either
    is not above 0: a candidate that cannot be drawn would be a place to cheat.
    """

    piece: Piece
    worker: str = ""
    cost: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("cost", self.cost), ("weight", self.weight)):
            if not (value > 0 and isfinite(value)):
                raise UsageError(f"{name} of {self.piece}: expected more than 0, got {value}; leave it out for 1")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was drawn from the candidates, and what it may have missed.

    `pieces` ascend. `chances` has the inclusion probability of every candidate, `cost` is the audited share of all
    candidates' cost. Probabilities are over the beacon, for a forger who chose without knowing it, and of missing every
    forged piece; a sample of no candidates misses everything.
    """

    strategy: str
    beacon: bytes
    pieces: tuple[Piece, ...]
    chances: Mapping[Piece, float]
    cost: float
    design: Quotas | Pivotal = field(repr=False)

    def miss(self, share: float) -> float:
        """The probability of missing all forged pieces, where a forger spread them blindly.

        There are ceil(share x candidates) of them, so at least one, and every set of that many candidates is as likely
        as any other. UsageError where `share` is not above 0 and at most 1.
        """
        forged = ceil(_probability("share", share) * len(self.chances))
        return self.design.miss(forged) if forged else 1.0

    def miss_worst(self, forged: int) -> float:
        """The same for the `forged` pieces that are the likeliest to be missed: the forger knows all but the beacon.

        Exact for `uniform` and `stratified`; for `risk` a bound, exact for one piece. UsageError where `forged` is not
        between 1 and the number of candidates.
        """
        if not self.chances:
            return 1.0
        if not 1 <= forged <= len(self.chances):
            raise UsageError(f"forged {forged}: expected 1 to {len(self.chances)} candidates; choose as many")
        return self.design.miss_worst(forged)

    def miss_of(self, forged: Collection[Piece]) -> float:
        """The same for exactly these pieces, whoever chose them. UsageError where one is not a candidate."""
        pieces = sorted(set(forged))
        for piece in pieces:
            if piece not in self.chances:
                raise UsageError(f"{piece}: expected a candidate; name pieces that were there to be drawn")
        return self.design.miss_of(pieces)


def draw(
    candidates: Sequence[Candidate],
    *,
    beacon: bytes,
    run: bytes,
    rate: float | None = None,
    count: int | None = None,
    strategy: str = UNIFORM,
) -> Sample:
    """A sample of `count` candidates, or of ceil(rate x candidates); all where there are no more. Order is ignored.

    Draw with a beacon that nobody knew, and nobody could choose, when the candidates were committed. `run` is its
    digest. With `uniform` each candidate is as likely as any other. With `stratified` each worker has its share, and at
    least one; where `count` is too small for that, it is uniform. With `risk` chances are proportional to weights, up
    to 1. UsageError where candidates repeat a piece, or unless one of `rate` (above 0, at most 1) and `count` (at least
    1) is given.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.piece)
    for one, other in pairwise(ordered):
        if one.piece == other.piece:
            raise UsageError(f"{one.piece}: expected every piece once, got it twice; leave one out")
    design = _design(strategy, ordered, _wanted(len(ordered), rate, count))
    drawn = design.draw(beacon, run)
    total = fsum(candidate.cost for candidate in ordered)
    audited = fsum(candidate.cost for candidate in ordered if candidate.piece in drawn)
    return Sample(
        strategy=strategy,
        beacon=beacon,
        pieces=tuple(sorted(drawn)),
        chances=design.chances(),
        cost=audited / total if ordered else 0.0,
        design=design,
    )


def chosen(piece: Piece, *, beacon: bytes, run: bytes, chance: float) -> bool:
    """Whether a piece of a stream is audited: true with `chance`, whatever is decided of the others.

    Needs no total, so it can be asked as segments are committed; the beacon may be chained to the piece's own segment.
    UsageError where `chance` is not above 0 and at most 1.
    """
    limit = _probability("chance", chance)
    return _ticket(beacon, run, piece) * limit.denominator < limit.numerator << 256


def stream_miss(chance: float, forged: int) -> float:
    """The probability that `chosen` passes over `forged` forged pieces, whichever: (1 - chance)^forged."""
    return float((1 - _probability("chance", chance)) ** forged)


def chained_beacon(run: bytes, segment: bytes) -> bytes:
    """32 bytes that follow from the run's digest and that of a SegmentRecord, the last committed one for a whole run.

    Fixed once the record is, and the same for all. Whoever writes the record may try several: docs/sampling.md.
    """
    return _hash(_CHAINED, run, segment)


def seed_beacon(seed: int) -> bytes:
    """32 bytes that follow from a seed of 64 bits. UsageError where it is no such number."""
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"seed {seed}: expected 0 to 2^64 - 1; choose a smaller one")
    return _hash(_SEED, seed.to_bytes(8, "little"))


def risk_weights(steps_done: Mapping[str, int], *, newcomer: float = 5.0, half: int = 100) -> dict[str, float]:
    """Each worker's weight from the steps it has signed: `newcomer` at none, half as far from 1 after `half`, then 1.

    weight = 1 + (newcomer - 1) half / (half + steps). The fraction is the mean of a fault rate with a Beta prior worth
    `half` observations after `steps` good ones (Laplace's rule of succession, as in BOINC's adaptive replication), over
    its mean before. A new name is never a lighter one. UsageError where `newcomer` < 1, `half` < 1 or steps < 0.
    """
    if not (newcomer >= 1 and isfinite(newcomer)) or half < 1:
        raise UsageError(f"newcomer {newcomer}, half {half}: expected at least 1 each; choose e.g. 5 and 100")
    for worker, steps in steps_done.items():
        if steps < 0:
            raise UsageError(f"steps of {worker}: expected at least 0, got {steps}; count its receipts")
    return {worker: 1 + (newcomer - 1) * half / (half + steps) for worker, steps in steps_done.items()}


# --------------------------------------------------------------------------------------------------------- designs


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """From each stratum a fixed number: its pieces of the smallest tickets. A uniform sample has one stratum."""

    stratum: Mapping[Piece, str]
    sizes: Mapping[str, int]
    quotas: Mapping[str, int]

    def chances(self) -> dict[Piece, float]:
        """A stratum's quota over its size, for each of its pieces."""
        chance = {name: quota / self.sizes[name] for name, quota in self.quotas.items()}
        return {piece: chance[name] for piece, name in self.stratum.items()}

    def draw(self, beacon: bytes, run: bytes) -> set[Piece]:
        """The pieces whose tickets are among their stratum's quota of smallest ones."""
        left, drawn = dict(self.quotas), set()
        for _, piece in sorted((_ticket(beacon, run, piece), piece) for piece in self.stratum):
            name = self.stratum[piece]
            if left[name]:
                left[name] -= 1
                drawn.add(piece)
        return drawn

    def miss(self, forged: int) -> float:
        """C(N - k, f) / C(N, f): a blind forger's pieces are missed by any k others with the same probability."""
        return miss_probability(len(self.stratum), sum(self.quotas.values()), forged)

    def miss_of(self, forged: Iterable[Piece]) -> float:
        """The product of C(n - f, a) / C(n, a) over strata: n pieces, a drawn, f forged."""
        return self._miss(Counter(self.stratum[piece] for piece in forged))

    def miss_worst(self, forged: int) -> float:
        """As above where each further piece is forged in the stratum that hides it best.

        Greedy is the best: the factor (n - f - a) / (n - f) of a stratum's next piece falls with f.
        """

        def entry(name: str, hidden: int) -> tuple[Fraction, str, int]:
            return -Fraction(self.sizes[name] - hidden - self.quotas[name], self.sizes[name] - hidden), name, hidden

        heap = [entry(name, 0) for name in self.sizes]
        heapify(heap)
        counts: Counter[str] = Counter()
        for _ in range(forged):
            factor, name, hidden = heappop(heap)
            if factor == 0:
                return 0.0
            counts[name] = hidden + 1
            heappush(heap, entry(name, hidden + 1))
        return self._miss(counts)

    def _miss(self, counts: Mapping[str, int]) -> float:
        return prod(miss_probability(self.sizes[name], self.quotas[name], forged) for name, forged in counts.items())


@dataclass(frozen=True, kw_only=True)
class Pivotal:
    """A fixed number, each piece with the chance `shares[piece] / whole`: the pivotal method (Deville and Tille 1998).

    Pieces come in turn to a duel with who is left over from the duels before. If both chances are less than 1 together,
    the winner goes on with both; else it is drawn, and the loser goes on with the rest. `shares` ascend by piece and
    add up to a multiple of `whole`.
    """

    shares: Mapping[Piece, int]
    whole: int

    def chances(self) -> dict[Piece, float]:
        """Each piece's share of the whole."""
        return {piece: share / self.whole for piece, share in self.shares.items()}

    def draw(self, beacon: bytes, run: bytes) -> set[Piece]:
        """Those who end with a chance of 1; a duel is decided by the ticket of who comes to it."""
        drawn: set[Piece] = set()
        left: Piece | None = None
        for piece, duel in self._duels():
            left_wins = _ticket(beacon, run, piece) * duel.total < duel.left << 256
            winner, loser = (left, piece) if left_wins else (piece, left)
            if duel.draws and winner:
                drawn.add(winner)
            left = loser if duel.draws else winner
        return drawn

    def miss(self, forged: int) -> float:
        """C(N - k, f) / C(N, f), as for any fixed number."""
        return miss_probability(len(self.shares), sum(self.shares.values()) // self.whole, forged)

    def miss_of(self, forged: Iterable[Piece]) -> float:
        """By the probabilities that none of these is drawn yet and who is left over is honest, or forged."""
        forgeries = frozenset(forged)
        honest, hidden = 1.0, 0.0
        for piece, duel in self._duels():
            stays = duel.left / duel.total
            match duel.draws, piece in forgeries:
                case True, True:
                    honest, hidden = 0.0, honest * stays
                case True, False:
                    hidden *= 1 - stays
                case False, True:
                    honest, hidden = honest * stays, hidden + honest * (1 - stays)
                case False, False:
                    honest, hidden = honest + hidden * (1 - stays), hidden * stays
        return honest + hidden

    def miss_worst(self, forged: int) -> float:
        """An upper bound: the product of 1 - chance over the smallest chances; 0 where so many cannot all be missed.

        A duel never raises the mean of the product over any set of pieces, and at the end that is the miss.
        """
        if forged > len(self.shares) - sum(self.shares.values()) // self.whole:
            return 0.0
        return prod(1 - share / self.whole for share in sorted(self.shares.values())[:forged])

    def _duels(self) -> Iterator[tuple[Piece, _Duel]]:
        """Each piece with the duel that it comes to; how much is left over does not depend on who wins."""
        left = 0
        for piece, share in self.shares.items():
            both = left + share
            if both < self.whole:
                yield piece, _Duel(left=left, total=both, draws=False)
            else:
                yield piece, _Duel(left=self.whole - share, total=2 * self.whole - both, draws=True)
            left = both % self.whole


@dataclass(frozen=True, kw_only=True)
class _Duel:
    """Who is left over wins `left` times in `total`; `draws` if the winner is drawn."""

    left: int
    total: int
    draws: bool


def _design(strategy: str, ordered: Sequence[Candidate], count: int) -> Quotas | Pivotal:
    if strategy not in STRATEGIES:
        raise UsageError(f"strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}; choose one")
    if strategy == RISK:
        return _pivotal(ordered, count)
    sizes = Counter(candidate.worker for candidate in ordered)
    split = strategy == STRATIFIED and len(sizes) <= count
    stratum = {candidate.piece: candidate.worker if split else "" for candidate in ordered}
    sizes = Counter(stratum.values())
    return Quotas(stratum=stratum, sizes=sizes, quotas=allocate(sizes, count))


def allocate(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` in proportion to the sizes, at least one each, by largest remainders; the first name wins a tie.

    At least as many as there are names, and no more than the sizes' sum. No name gets more than its size.
    """
    rest, quotas = dict(sizes), {}
    left, total = count, sum(sizes.values())
    while small := [name for name, size in rest.items() if left * size < total]:
        # One is more than their share: the others divide what is left.
        for name in small:
            total -= rest.pop(name)
            quotas[name] = 1
        left -= len(small)
    for name, size in rest.items():
        quotas[name] = left * size // total
    spare = count - sum(quotas.values())
    for name in sorted(rest, key=lambda name: (-(left * rest[name] % total), name))[:spare]:
        quotas[name] += 1
    return quotas


def _pivotal(ordered: Sequence[Candidate], count: int) -> Pivotal:
    """Chances in proportion to weights; who would have more than 1 has 1, and the others share the rest."""
    if count == len(ordered):
        return Pivotal(shares={candidate.piece: 1 for candidate in ordered}, whole=1)
    exact = [Fraction(candidate.weight) for candidate in ordered]
    scale = lcm(*(weight.denominator for weight in exact))
    weights = [weight.numerator * (scale // weight.denominator) for weight in exact]
    rest, left = sum(weights), count
    for weight in sorted(weights, reverse=True):
        if left * weight < rest:
            break
        rest, left = rest - weight, left - 1
    shares = {candidate.piece: min(left * weight, rest) for candidate, weight in zip(ordered, weights, strict=True)}
    return Pivotal(shares=shares, whole=rest)


def _wanted(total: int, rate: float | None, count: int | None) -> int:
    """How many of `total` candidates to draw."""
    if (rate is None) == (count is None):
        raise UsageError(f"rate {rate}, count {count}: expected one of them; give either")
    if count is None:
        return ceil(_probability("rate", rate or 0) * total)
    if count < 1:
        raise UsageError(f"count {count}: expected at least 1; choose how many pieces to replay")
    return min(count, total)


def _probability(name: str, value: float) -> Fraction:
    """The decimal that was written, not the float next to it: a tenth of ten is one."""
    if not 0 < value <= 1:
        raise UsageError(f"{name} {value}: expected more than 0 and at most 1; choose one such as 0.1")
    return Fraction(str(value))


# --------------------------------------------------------------------------------------------------------- tickets


def _ticket(beacon: bytes, run: bytes, piece: Piece) -> int:
    name = piece.segment.to_bytes(4, "little") + piece.worker.encode()
    return int.from_bytes(_hash(_TICKET, beacon, run, name), "big")


def _hash(domain: bytes, *parts: bytes) -> bytes:
    """SHA-256 of a domain and parts, each after its length, so that no two lists of parts have the same bytes."""
    return sha256(domain + b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest()


# -------------------------------------------------------------------------------------------------- whole segments


def miss_probability(total: int, sampled: int, forged: int) -> float:
    """The probability that `sampled` of `total` segments, drawn uniformly, hold none of `forged` forged ones."""
    return comb(total - forged, sampled) / comb(total, sampled)
