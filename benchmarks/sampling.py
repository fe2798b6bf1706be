"""How often an audit misses all forged pieces of a simulated run, against the probability that its sample states.

A run has 40 segments and 6 workers that joined one after the other, so that strata and weights are uneven; a share of
its pieces is forged, spread over the run or on one worker. An interval is Clopper and Pearson's, at a level at which
all of the comparisons together raise a false alarm with a probability below 1e-3.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import product
from math import lgamma, log, log1p

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Goal, Row, main
from storage.errors import UsageError
from verification.sampling import (
    STRATEGIES,
    Candidate,
    Piece,
    chained_beacon,
    chosen,
    draw,
    risk_weights,
    stream_miss,
)

SEGMENTS, STEPS = 40, 10
JOINED = {"ada": 0, "ben": 0, "cyd": 10, "dov": 20, "eve": 30, "fay": 36}  # the first segment that a worker worked in
RATE = 0.08
SHARES = (0.01, 0.05, 0.1, 0.2)
SPREAD, ONE_WORKER = "spread", "worker"
PLACEMENTS = (SPREAD, ONE_WORKER)
STREAM = "stream"
FALSE_ALARM = 1e-3
COMPARISONS = len(SHARES) * (len(PLACEMENTS) * len(STRATEGIES) + 1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How many of `runs` audits missed everything, and the mean of the probabilities that their samples stated."""

    strategy: str
    share: float
    placement: str
    stated: float
    missed: int
    runs: int

    @property
    def interval(self) -> tuple[float, float]:
        """What the probability may be, given what was observed, at this comparison's part of the false alarm rate."""
        return clopper_pearson(self.missed, self.runs, FALSE_ALARM / COMPARISONS)

    @property
    def inside(self) -> bool:
        """Whether the stated probability is in the interval."""
        low, high = self.interval
        return low <= self.stated <= high


def candidates() -> list[Candidate]:
    """What each worker signed in each segment since it joined; weights by the steps that it had done before."""
    found = []
    for segment in range(SEGMENTS):
        done = {worker: (segment - joined) * STEPS for worker, joined in JOINED.items() if segment >= joined}
        weights = risk_weights(done)
        found += [
            Candidate(piece=Piece(segment, worker), worker=worker, cost=STEPS, weight=weight)
            for worker, weight in weights.items()
        ]
    return found


def forge(pieces: Sequence[Piece], share: float, placement: str, dice: random.Random) -> list[Piece]:
    """A share of the pieces at random, from all or from one random worker's, who may have fewer."""
    count = forged_pieces(len(pieces), share)
    if placement == ONE_WORKER:
        worker = dice.choice(sorted(JOINED))
        pieces = [piece for piece in pieces if piece.worker == worker]
    return dice.sample(pieces, min(count, len(pieces)))


def forged_pieces(total: int, share: float) -> int:
    """A share of so many pieces, rounded up."""
    return -(-total * round(share * 100) // 100)


def simulate(runs: int, seed: int) -> list[Comparison]:
    """Every strategy, share and placement over so many runs; the same forgeries and beacons for all strategies."""
    dice = random.Random(seed)
    offered = candidates()
    pieces = [candidate.piece for candidate in offered]
    missed = dict.fromkeys(product((*STRATEGIES, STREAM), SHARES, PLACEMENTS), 0)
    stated = dict.fromkeys(missed, 0.0)
    spread = {
        (strategy, share): draw(offered, beacon=b"any", run=b"any", rate=RATE, strategy=strategy).miss(share)
        for strategy, share in product(STRATEGIES, SHARES)
    }
    for number in range(runs):
        run = sha256(f"run {seed} {number}".encode()).digest()
        records = [sha256(run + bytes([segment])).digest() for segment in range(SEGMENTS)]
        beacon = chained_beacon(run, records[-1])
        forged = {key: forge(pieces, *key, dice) for key in product(SHARES, PLACEMENTS)}
        for strategy in STRATEGIES:
            sample = draw(offered, beacon=beacon, run=run, rate=RATE, strategy=strategy)
            for (share, placement), hidden in forged.items():
                key = (strategy, share, placement)
                missed[key] += set(hidden).isdisjoint(sample.pieces)
                stated[key] += spread[strategy, share] if placement == SPREAD else sample.miss_of(hidden)
        for share in SHARES:
            key, hidden = (STREAM, share, SPREAD), forged[share, SPREAD]
            missed[key] += not any(
                chosen(piece, beacon=chained_beacon(run, records[piece.segment]), run=run, chance=RATE)
                for piece in hidden
            )
            stated[key] += stream_miss(RATE, len(hidden))
    return [
        Comparison(
            strategy=strategy,
            share=share,
            placement=placement,
            stated=stated[strategy, share, placement] / runs,
            missed=missed[strategy, share, placement],
            runs=runs,
        )
        for strategy, share, placement in missed
        if (strategy, placement) != (STREAM, ONE_WORKER)
    ]


def clopper_pearson(hits: int, trials: int, alarm: float) -> tuple[float, float]:
    """The probabilities at which so few or so many hits are not too rare: each tail has at least alarm / 2."""
    low = 0.0 if hits == 0 else _bisect(lambda p: _at_most(trials - hits, trials, 1 - p) < alarm / 2)
    high = 1.0 if hits == trials else _bisect(lambda p: _at_most(hits, trials, p) >= alarm / 2)
    return low, high


def _bisect(below: Callable[[float], bool]) -> float:
    """Where a condition that holds for small probabilities ceases to."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def _at_most(hits: int, trials: int, p: float) -> float:
    """The probability of at most so many hits in independent trials, each with probability p."""
    if p in (0, 1):
        return float(p == 0 or hits == trials)
    k = np.arange(hits + 1)
    return float(np.exp(_log_ways(trials)[: hits + 1] + k * log(p) + (trials - k) * log1p(-p)).sum())


@cache
def _log_ways(trials: int) -> NDArray[np.float64]:
    """The logarithms of C(trials, k)."""
    factorials = np.array([lgamma(k + 1) for k in range(trials + 1)])
    ways: NDArray[np.float64] = factorials[-1] - factorials - factorials[::-1]
    return ways


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--runs", type=int, default=500, help="how many runs to simulate")
    parser.add_argument("--seed", type=int, default=1, help="of forgeries and beacons; a seed gives the same figures")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Stated and observed miss of each comparison, and the ends of its interval: the stated one is to lie inside."""
    if arguments.runs < 1:
        raise UsageError(f"--runs {arguments.runs}: expected at least 1; choose e.g. 500")
    outside = 0
    for found in simulate(arguments.runs, arguments.seed):
        name = f"{found.strategy} {found.share:.0%} {found.placement}"
        low, high = found.interval
        yield Row(name=f"{name}: stated", value=found.stated, unit="")
        yield Row(name=f"{name}: observed", value=found.missed / found.runs, unit=f"of {found.runs} runs")
        yield Row(name=f"{name}: from", value=low, unit="", goal=Goal(relation="<=", limit=found.stated))
        yield Row(name=f"{name}: to", value=high, unit="", goal=Goal(relation=">=", limit=found.stated))
        outside += not found.inside
    yield Row(name="stated but not inside", value=outside, unit=f"of {COMPARISONS}", goal=Goal(relation="==", limit=0))


if __name__ == "__main__":
    raise SystemExit(main(measure, __doc__, add_options=add_options))
