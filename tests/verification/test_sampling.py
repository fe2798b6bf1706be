"""What is drawn is fixed, as likely as stated, and misses forged pieces as often as stated."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from hashlib import sha256
from itertools import combinations, pairwise
from math import comb, prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import main
from benchmarks.sampling import (
    COMPARISONS,
    FALSE_ALARM,
    add_options,
    candidates,
    clopper_pearson,
    measure,
    simulate,
)
from storage.errors import UsageError
from verification.sampling import (
    RISK,
    STRATEGIES,
    STRATIFIED,
    UNIFORM,
    Candidate,
    Piece,
    Sample,
    allocate,
    chained_beacon,
    chosen,
    draw,
    miss_probability,
    risk_weights,
    seed_beacon,
    stream_miss,
)

RUN = sha256(b"run").digest()
DOCUMENT = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8")


def example() -> list[Candidate]:
    """The worked example of docs/sampling.md."""
    found = []
    for segment in range(6):
        done = {
            name: (segment - first) * 25 for name, first in (("ada", 0), ("ben", 2), ("cyd", 4)) if first <= segment
        }
        for name, weight in risk_weights(done).items():
            found.append(Candidate(piece=Piece(segment, name), worker=name, cost=25, weight=weight))
    return found


def drawn(offered: Sequence[Candidate], strategy: str, *, seed: int = 7, count: int = 4) -> Sample:
    return draw(offered, beacon=seed_beacon(seed), run=RUN, count=count, strategy=strategy)


def weighted(*weights: float) -> list[Candidate]:
    return [Candidate(piece=Piece(index), weight=weight) for index, weight in enumerate(weights)]


# ------------------------------------------------------------------------------------------------------ fixed values


def test_the_documented_example() -> None:
    samples = [drawn(example(), strategy) for strategy in STRATEGIES]
    for candidate in example():
        piece = candidate.piece
        name = piece.segment.to_bytes(4, "little") + piece.worker.encode()
        parts = b"".join(len(part).to_bytes(4, "little") + part for part in (seed_beacon(7), RUN, name))
        ticket = sha256(b"trueweight-ticket-v1\0" + parts).hexdigest()[:16]
        chances = [f"{sample.chances[piece]:.4f}{' *' * (piece in sample.pieces)}" for sample in samples]
        row = [str(piece.segment), piece.worker, f"{candidate.weight:.4f}", ticket, *chances]
        assert f"| {' | '.join(row)} |" in DOCUMENT
    cyd = [Piece(4, "cyd"), Piece(5, "cyd")]
    figures: dict[str, Callable[[Sample], float]] = {
        "a tenth, `miss(0.1)`": lambda sample: sample.miss(0.1),
        "both of cyd's, `miss_of`": lambda sample: sample.miss_of(cyd),
        "the worst two, `miss_worst(2)`": lambda sample: sample.miss_worst(2),
    }
    for name, figure in figures.items():
        assert f"| {name} | {' | '.join(f'{figure(sample):.4f}' for sample in samples)} |" in DOCUMENT
    assert f"`{seed_beacon(7).hex()}`" in DOCUMENT


def test_what_is_drawn_never_changes() -> None:
    assert drawn(example(), UNIFORM).pieces == (Piece(1, "ada"), Piece(2, "ada"), Piece(3, "ben"), Piece(5, "ada"))
    assert drawn(example(), STRATIFIED).pieces == (Piece(2, "ada"), Piece(3, "ben"), Piece(5, "ada"), Piece(5, "cyd"))
    assert drawn(example(), RISK).pieces == (Piece(0, "ada"), Piece(2, "ben"), Piece(4, "ben"), Piece(4, "cyd"))
    beacon = chained_beacon(RUN, sha256(b"segment").digest())
    assert beacon.hex() == "5a0814015be3b1cd687ccbcd45da2411cbb7dcf6ff9df8c773e9e4d6e51b9d38"
    taken = [one.piece for one in example() if chosen(one.piece, beacon=beacon, run=RUN, chance=0.25)]
    assert taken == [Piece(0, "ada"), Piece(1, "ada"), Piece(2, "ada"), Piece(4, "ada")]


def test_every_input_matters() -> None:
    one, other = seed_beacon(1), seed_beacon(2)
    offered = candidates()
    drawings = {
        draw(offered, beacon=beacon, run=run, count=40, strategy=strategy).pieces
        for beacon in (one, other)
        for run in (b"run", b"other")
        for strategy in STRATEGIES
    }
    assert len(drawings) == 12
    assert chained_beacon(b"ab", b"c") != chained_beacon(b"a", b"bc")
    assert chained_beacon(b"a", b"b") != chained_beacon(b"b", b"a")


def test_a_rate_is_the_decimal_that_was_written() -> None:
    assert [len(draw(weighted(*[1] * 10), beacon=b"b", run=RUN, rate=rate).pieces) for rate in (0.1, 0.3, 0.31, 1)] == [
        1,
        3,
        4,
        10,
    ]


def test_allocation() -> None:
    assert allocate({"a": 6, "b": 4, "c": 2}, 4) == {"a": 2, "b": 1, "c": 1}
    assert allocate({"a": 90, "b": 9, "c": 1}, 10) == {"a": 8, "b": 1, "c": 1}
    assert allocate({"a": 5, "b": 5, "c": 5}, 4) == {"a": 2, "b": 1, "c": 1}
    assert allocate({"a": 3, "b": 1}, 4) == {"a": 3, "b": 1}
    assert allocate({}, 0) == {}


def test_chances_by_risk() -> None:
    assert list(drawn(weighted(3, 2, 1), RISK, count=1).chances.values()) == [1 / 2, 1 / 3, 1 / 6]
    assert list(drawn(weighted(8, 1, 1), RISK, count=2).chances.values()) == [1, 1 / 2, 1 / 2]
    assert list(drawn(weighted(8, 4, 1, 1), RISK, count=3).chances.values()) == [1, 1, 1 / 2, 1 / 2]
    assert set(drawn(weighted(1e-300, 1e300, 1), RISK, count=3).chances.values()) == {1}


def test_new_workers_weigh_more() -> None:
    assert risk_weights({"new": 0, "half": 100, "old": 10**9}) == {"new": 5, "half": 3, "old": pytest.approx(1)}
    assert risk_weights({"new": 0, "half": 30}, newcomer=3, half=30) == {"new": 3, "half": 2}


def test_too_few_for_every_worker_is_uniform() -> None:
    for seed in range(20):
        assert (
            drawn(example(), STRATIFIED, seed=seed, count=2).pieces
            == drawn(example(), UNIFORM, seed=seed, count=2).pieces
        )


def test_nothing_to_draw_from_misses_everything() -> None:
    for strategy in STRATEGIES:
        for wanted in ({"count": 3}, {"rate": 0.5}):
            sample = draw([], beacon=b"b", run=RUN, strategy=strategy, **wanted)
            assert (sample.pieces, sample.chances, sample.cost) == ((), {}, 0)
            assert sample.miss(0.1) == sample.miss_worst(1) == sample.miss_of([]) == 1


WRONG: dict[str, Callable[[], object]] = {
    "rate 0: expected more than 0 and at most 1; choose": lambda: draw([], beacon=b"b", run=RUN, rate=0),
    "rate 1.5: ": lambda: draw([], beacon=b"b", run=RUN, rate=1.5),
    "rate nan: ": lambda: draw([], beacon=b"b", run=RUN, rate=float("nan")),
    "count 0: expected at least 1; choose": lambda: draw([], beacon=b"b", run=RUN, count=0),
    "rate None, count None: expected one of them; give": lambda: draw([], beacon=b"b", run=RUN),
    "rate 0.5, count 1: ": lambda: draw([], beacon=b"b", run=RUN, count=1, rate=0.5),
    "strategy 'best': expected one of uniform, stratified, risk; choose": lambda: drawn([], "best"),
    "expected every piece once, got it twice; leave": lambda: drawn(weighted(1) * 2, UNIFORM),
    "segment -1: expected": lambda: Piece(-1),
    "cost of .*: expected more than 0, got 0; leave": lambda: Candidate(piece=Piece(0), cost=0),
    "weight of .*: expected more than 0, got inf; ": lambda: Candidate(piece=Piece(0), weight=float("inf")),
    "share 0: ": lambda: drawn(example(), UNIFORM).miss(0),
    "forged 13: expected 1 to 12 candidates; choose": lambda: drawn(example(), UNIFORM).miss_worst(13),
    "expected a candidate; name": lambda: drawn(example(), UNIFORM).miss_of([Piece(9)]),
    "chance 2: ": lambda: chosen(Piece(0), beacon=b"b", run=RUN, chance=2),
    "seed -1: expected": lambda: seed_beacon(-1),
    "newcomer 0.5, half 100: ": lambda: risk_weights({}, newcomer=0.5),
    "steps of ada: expected at least 0, got -1; ": lambda: risk_weights({"ada": -1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_use_is_told(message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WRONG[message]()


# -------------------------------------------------------------------------------------------------------- invariants


@st.composite
def offers(draws: st.DrawFn) -> list[Candidate]:
    pieces = draws(st.sets(st.tuples(st.integers(0, 9), st.sampled_from("abcde")), min_size=1, max_size=30))
    size = st.floats(1e-3, 1e3)
    return [
        Candidate(piece=Piece(segment, name), worker=name, cost=draws(size), weight=draws(size))
        for segment, name in sorted(pieces)
    ]


@settings(max_examples=200, deadline=None)
@given(
    offers(), st.sampled_from(STRATEGIES), st.integers(1, 40), st.integers(0, 1000), st.randoms(use_true_random=False)
)
def test_invariants(offered: list[Candidate], strategy: str, count: int, seed: int, dice: random.Random) -> None:
    sample = drawn(offered, strategy, seed=seed, count=count)
    names = {candidate.worker for candidate in offered}
    wanted = min(count, len(offered))
    assert len(sample.pieces) == wanted
    assert list(sample.pieces) == sorted(set(sample.pieces))
    assert sum(sample.chances.values()) == pytest.approx(wanted)
    assert set(sample.chances) == {candidate.piece for candidate in offered}
    assert all(0 < chance <= 1 for chance in sample.chances.values())
    assert {piece for piece, chance in sample.chances.items() if chance == 1} <= set(sample.pieces)
    if strategy == STRATIFIED and count >= len(names):
        assert {piece.worker for piece in sample.pieces} == names
    audited = sum(Fraction(one.cost) for one in offered if one.piece in sample.pieces)
    assert sample.cost == pytest.approx(float(audited / sum(Fraction(one.cost) for one in offered)), rel=1e-12)
    shuffled = dice.sample(offered, len(offered))
    assert drawn(shuffled, strategy, seed=seed, count=count) == sample


@settings(max_examples=100, deadline=None)
@given(offers(), st.sampled_from(STRATEGIES), st.floats(1e-6, 1))
def test_a_rate_is_kept(offered: list[Candidate], strategy: str, rate: float) -> None:
    sample = draw(offered, beacon=b"b", run=RUN, rate=rate, strategy=strategy)
    assert rate * len(offered) * (1 - 1e-12) <= len(sample.pieces) < rate * len(offered) + 1


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_allocation_is_in_proportion(sizes: dict[str, int], data: st.DataObject) -> None:
    total = sum(sizes.values())
    count = data.draw(st.integers(len(sizes), total))
    quotas = allocate(sizes, count)
    assert sum(quotas.values()) == count
    for name, size in sizes.items():
        assert 1 <= quotas[name] <= size
        assert quotas[name] <= max(1, -(-count * size // total))


# -------------------------------------------------------------------------------------------------- exact misses


def outcomes(weights: Sequence[int], count: int) -> dict[frozenset[int], Fraction]:
    """Every sample by risk and its probability: the pivotal method as its paper has it, followed along all branches."""
    total = sum(weights)
    chances = [Fraction(count * weight, total) for weight in weights]
    assert max(chances) <= 1
    found: dict[frozenset[int], Fraction] = {}

    def follow(state: list[Fraction], index: int, probability: Fraction) -> None:
        if not probability:
            return
        open_ones = [one for one in range(index) if 0 < state[one] < 1]
        if index == len(state):
            assert not open_ones
            sample = frozenset(one for one, chance in enumerate(state) if chance == 1)
            found[sample] = found.get(sample, Fraction(0)) + probability
            return
        if not open_ones or state[index] == 1:
            follow(state, index + 1, probability)
            return
        (left,) = open_ones
        x, y = state[left], state[index]
        low, high = (Fraction(0), x + y) if x + y < 1 else (x + y - 1, Fraction(1))
        wins = (x - low) / (high - low)
        for chance, one, other in ((wins, high, low), (1 - wins, low, high)):
            after = state.copy()
            after[left], after[index] = one, other
            follow(after, index + 1, probability * chance)

    follow(chances, 0, Fraction(1))
    return found


@pytest.mark.parametrize(
    ("weights", "count"), [((3, 1, 4, 1, 5, 2), 2), ((3, 1, 4, 1, 5, 2), 3), ((1,) * 7, 4), ((2, 1, 1), 2)]
)
def test_misses_by_risk_are_those_of_all_outcomes(weights: tuple[int, ...], count: int) -> None:
    by_sample = outcomes(weights, count)
    assert sum(by_sample.values()) == 1
    assert {len(one) for one in by_sample} == {count}
    sample = drawn(weighted(*weights), RISK, count=count)
    for forged in range(1, len(weights) + 1):
        misses = []
        for hidden in combinations(range(len(weights)), forged):
            exact = sum(probability for one, probability in by_sample.items() if not one & set(hidden))
            assert sample.miss_of([Piece(index) for index in hidden]) == pytest.approx(float(exact), abs=1e-14)
            misses.append(exact)
        assert sample.miss(forged / len(weights) - 1e-3) == pytest.approx(float(sum(misses) / len(misses)))
        assert sample.miss_worst(forged) >= float(max(misses)) - 1e-14
        if forged == 1:
            assert sample.miss_worst(1) == pytest.approx(float(max(misses)))


@pytest.mark.parametrize("count", [2, 3, 5, 8, 12])
def test_misses_by_strata_are_the_mean_and_the_worst_over_all_sets(count: int) -> None:
    for strategy in (UNIFORM, STRATIFIED):
        sample = drawn(example(), strategy, count=count)
        for forged in (1, 2, 4, 6):
            misses = [sample.miss_of(hidden) for hidden in combinations(sample.chances, forged)]
            assert sample.miss(forged / 12) == pytest.approx(sum(misses) / len(misses))
            assert sample.miss_worst(forged) == pytest.approx(max(misses))


def test_misses_by_strata_multiply() -> None:
    sample = drawn(example(), STRATIFIED)
    hidden = [Piece(0, "ada"), Piece(1, "ada"), Piece(3, "ben"), Piece(4, "cyd")]
    assert sample.miss_of(hidden) == pytest.approx(comb(4, 2) / comb(6, 2) * 3 / 4 * 1 / 2)


def test_misses_of_a_stream() -> None:
    assert stream_miss(0.25, 2) == 0.5625
    assert stream_miss(1, 1) == 0
    assert stream_miss(0.5, 0) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hundred_thousand_candidates_are_a_matter_of_seconds(strategy: str) -> None:
    offered = [
        Candidate(piece=Piece(index // 10, f"w{index % 10}"), worker=f"w{index % 10}", weight=1 + index / 7)
        for index in range(100_000)
    ]
    started = time.process_time()
    sample = draw(offered, beacon=b"b", run=RUN, rate=0.1, strategy=strategy)
    assert len(sample.pieces) == 10_000
    assert sample.miss(0.0001) == pytest.approx(prod((90_000 - i) / (100_000 - i) for i in range(10)))
    assert sample.miss(0.2) == 0  # 1e-1006
    assert sample.miss_of(list(sample.chances)[::10_000]) > 0.3
    assert 0.3 < sample.miss_worst(10) < 1
    assert sample.miss_worst(20_000) < 1e-150
    assert time.process_time() - started < 15


# ------------------------------------------------------------------------------------------------------ frequencies

BEACONS = 2000


@pytest.mark.parametrize(("strategy", "count"), [(UNIFORM, 4), (STRATIFIED, 4), (STRATIFIED, 7), (RISK, 2), (RISK, 5)])
def test_pieces_are_drawn_as_often_as_stated(strategy: str, count: int) -> None:
    """All intervals together raise a false alarm with a probability below 1e-3."""
    samples = [drawn(example(), strategy, seed=seed, count=count) for seed in range(BEACONS)]
    found = Counter(piece for sample in samples for piece in sample.pieces)
    for piece, chance in samples[0].chances.items():
        low, high = clopper_pearson(found[piece], BEACONS, 1e-3 / (5 * 12))
        assert low <= chance <= high, (piece, found[piece])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_pairs_are_missed_as_often_as_stated(strategy: str) -> None:
    samples = [drawn(example(), strategy, seed=seed) for seed in range(BEACONS)]
    pairs = list(combinations(samples[0].chances, 2))
    for pair in pairs:
        missed = sum(set(pair).isdisjoint(sample.pieces) for sample in samples)
        low, high = clopper_pearson(missed, BEACONS, 1e-3 / (3 * len(pairs)))
        assert low <= samples[0].miss_of(pair) <= high


def test_a_stream_chooses_as_often_as_stated() -> None:
    for chance in (0.02, 0.25, 0.9):
        beacons = (
            chained_beacon(RUN, sha256(bytes(2) + number.to_bytes(2, "little")).digest()) for number in range(BEACONS)
        )
        taken = sum(
            chosen(Piece(number), beacon=beacon, run=RUN, chance=chance) for number, beacon in enumerate(beacons)
        )
        low, high = clopper_pearson(taken, BEACONS, 1e-3 / 3)
        assert low <= chance <= high
    assert all(chosen(Piece(number), beacon=b"b", run=RUN, chance=1) for number in range(100))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_earlier_beacon_tells_nothing_about_a_later_one(strategy: str) -> None:
    """Chi-square of "drawn before" against "drawn now", one degree of freedom: above 19.5 once in 1e5 tests."""
    beacons = [seed_beacon(0)]
    for _ in range(BEACONS):
        beacons.append(chained_beacon(RUN, beacons[-1]))
    samples = [draw(example(), beacon=beacon, run=RUN, count=4, strategy=strategy).pieces for beacon in beacons]
    for candidate in example():
        history = [candidate.piece in pieces for pieces in samples]
        table = Counter(pairwise(history))
        rows, columns = Counter(history[:-1]), Counter(history[1:])
        expected = {(one, other): rows[one] * columns[other] / BEACONS for one in rows for other in columns}
        assert sum((table[cell] - mean) ** 2 / mean for cell, mean in expected.items()) < 19.5


# ------------------------------------------------------------------------------------------- stated and observed misses


def test_observed_misses_are_as_stated() -> None:
    """500 runs, 1 to 20 % forged, spread or on one worker: 28 intervals, together wrong with less than 1e-3."""
    found = simulate(500, seed=1)
    assert len(found) == COMPARISONS == 28
    assert [one for one in found if not one.inside] == []
    assert FALSE_ALARM == 1e-3
    stated = {(one.strategy, one.share, one.placement): one.stated for one in found}
    assert stated[STRATIFIED, 0.2, "worker"] < 0.1 * stated[UNIFORM, 0.2, "worker"]
    assert stated[RISK, 0.2, "worker"] < stated[UNIFORM, 0.2, "worker"]


def test_a_wrong_statement_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statement that takes the sample for half as large lies outside."""
    monkeypatch.setattr(
        "verification.sampling.miss_probability",
        lambda total, count, forged: miss_probability(total, count // 2, forged),
    )
    assert sum(not one.inside for one in simulate(200, seed=1)) > 10


def test_the_interval_is_clopper_and_pearsons() -> None:
    assert clopper_pearson(0, 10, 0.05) == (0, pytest.approx(1 - 0.025 ** (1 / 10)))
    assert clopper_pearson(10, 10, 0.05) == (pytest.approx(0.025 ** (1 / 10)), 1)
    assert clopper_pearson(4, 20, 0.05) == (pytest.approx(0.057334, abs=1e-6), pytest.approx(0.436614, abs=1e-6))


def test_the_benchmark_reports_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(measure, "about", add_options=add_options, arguments=["--json", "--runs", "20"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r'"name"', printed)) == 4 * COMPARISONS + 1
    assert "stratified 5% worker: observed" in printed
    assert main(measure, "about", add_options=add_options, arguments=["--runs", "0"]) == 64
