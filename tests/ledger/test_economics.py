"""Economics: the worked numbers of the page, and what a bond or rate at the limit does."""

import doctest
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger import economics
from ledger.economics import RATE, Assumptions
from ledger.port import Run
from storage.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "ledger-economics.md"

TERMS = Run(
    record=bytes(32),
    initial_state=bytes(32),
    submitter="0x01",
    operator="0x02",
    court="0x03",
    beacon="0x04",
    segments=10,
    tensors=1,
    work=100,
    price=2,
    operator_fee=5,
    verifier_fee=7,
    operator_bond=10_000,
    worker_bond=0,
    verifier_bond=100,
    flag_bond=10,
    pot=500,
    jackpot=100,
    rate=RATE // 4,
    forced_rate=RATE // 8,
    verifiers=2,
    reporter_share=25,
    harmed_share=25,
    miss_penalty=10,
    window=10,
    answer=10,
    dispute=10,
)

shares = st.fractions(min_value=0, max_value=1, max_denominator=20)
assumptions = st.builds(Assumptions, honest=shares, coverage=shares, colludes=st.booleans(), recommits=st.booleans())
terms = st.builds(
    lambda **changed: replace(TERMS, **changed),
    operator_bond=st.integers(0, 10**6),
    rate=st.integers(1, RATE - 1),
    verifiers=st.integers(0, 8),
    reporter_share=st.integers(0, 50),
    harmed_share=st.integers(0, 50),
)


def test_the_numbers_of_the_page() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.REPORT_NDIFF)
    assert result.failed == 0
    assert result.attempted > 15


def test_detection_counts_all_ways_to_draw() -> None:
    half = Assumptions(coverage=Fraction(1, 2))
    missed = Fraction(comb(6, 4), comb(8, 4))
    assert economics.detection(TERMS, 8, 2, half) == Fraction(1, 4) * (1 - missed**2)


@given(terms, assumptions, st.integers(1, 30))
def test_no_part_of_a_segment_tempts_where_the_whole_does_not(run: Run, held: Assumptions, units: int) -> None:
    whole = economics.detection(run, units, units, held)
    assert whole == economics.segment_detection(run, held)
    chances = [economics.detection(run, units, false, held) for false in range(units + 1)]
    assert chances == sorted(chances)
    assert all(chance * units >= whole * false for false, chance in enumerate(chances))


@given(terms, assumptions, st.integers(1, 10**6))
def test_the_remedies_are_the_smallest_that_would_do(run: Run, held: Assumptions, gain: int) -> None:
    bond = economics.smallest_bond(run, gain, held)
    rate = economics.smallest_rate(run, gain, held)
    if bond is not None:
        assert economics.break_even(replace(run, operator_bond=bond), held) >= gain
        assert not bond or economics.break_even(replace(run, operator_bond=bond - 1), held) < gain
    if rate is not None:
        assert economics.break_even(replace(run, rate=rate), held) >= gain
        assert economics.break_even(replace(run, rate=rate - 1), held) < gain
    if economics.break_even(run, held) < gain:
        with pytest.raises(UsageError, match=f"a cheat that saves {gain}"):
            economics.judge(run, gain, held)
    else:
        assert economics.judge(run, gain, held) >= 1


def test_without_verifiers_nothing_is_found_and_no_bond_would_do() -> None:
    with pytest.raises(UsageError, match="take verifiers and a rate above 0"):
        economics.judge(replace(TERMS, verifiers=0), 1)


def test_many_segments_at_once_are_no_better_than_one() -> None:
    chance, bond, saved = Fraction(1, 10), 1000, Fraction(100)
    for segments in range(1, 40):
        gain = sum(saved * (1 - chance) ** (place + 1) for place in range(segments))
        loss = bond * (1 - (1 - chance) ** segments)
        assert gain / loss == saved * (1 - chance) / chance / bond


@pytest.mark.parametrize("share", [Fraction(-1), Fraction(2)])
def test_a_share_out_of_range_is_refused(share: Fraction) -> None:
    with pytest.raises(UsageError, match="honest: expected a share from 0 to 1"):
        Assumptions(honest=share)


def test_false_units_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="false units: expected 0 to 4, got 5"):
        economics.detection(TERMS, 4, 5)
