"""Model and compiled contract do the same on 10,000 random calls, and nothing of either is left out."""

import argparse

import pytest

from benchmarks.ledger import drive, measure
from benchmarks.lockstep import Difference, Lockstep
from storage.errors import UsageError

pytestmark = pytest.mark.chain


@pytest.mark.slow
def test_model_and_contract_go_in_lock_step() -> None:
    tally = drive(10_000, seed=7)
    assert tally.missing == []


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Lockstep("noticed")
    played.play(20)
    monkeypatch.setattr("ledger.rules.DELAY", 3)
    with pytest.raises(Difference, match="the calls before"):
        played.play(400)


def test_steps_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="--steps 0: expected at least 1"):
        next(measure(argparse.Namespace(steps=0, seed=1, foreign=False)))
