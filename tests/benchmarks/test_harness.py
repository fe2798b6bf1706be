"""The benchmark harness: goals, rows, output, exit codes, the list."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import Goal, Relation, Row, benchmarks, main
from storage.errors import FailureError, UsageError


def two_rows(_: argparse.Namespace) -> Iterator[Row]:
    yield Row(name="worst relative error", value=0.001, unit="1", goal=Goal(relation="<", limit=0.002))
    yield Row(name="step", value=12.5, unit="ms")


def one_miss(arguments: argparse.Namespace) -> Iterator[Row]:
    yield Row(name="distinct roots", value=arguments.roots, unit="roots", goal=Goal(relation="==", limit=1))


def roots_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--roots", type=int, default=2)


def refused(_: argparse.Namespace) -> list[Row]:
    raise UsageError("recipe: expected a file, got nothing; name one")


def test_json_rows_have_exactly_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(two_rows, "Two rows.", arguments=["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "worst relative error", "value": 0.001, "unit": "1", "goal": "< 0.002", "met": True},
        {"name": "step", "value": 12.5, "unit": "ms", "goal": None, "met": None},
    ]


def test_the_table_names_every_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(two_rows, "Two rows.\n\nMore.", arguments=[]) == 0
    printed = capsys.readouterr().out
    assert "Two rows." in printed
    assert "More." not in printed
    for word in ("worst relative error", "0.001", "< 0.002", "yes", "12.5", "ms"):
        assert word in printed


def test_a_missed_goal_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(one_miss, "Roots.", add_options=roots_option, arguments=[]) == 1
    assert main(one_miss, "Roots.", add_options=roots_option, arguments=["--roots", "1"]) == 0
    assert "no" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(FailureError("no disk; free some"), 70), (KeyboardInterrupt(), 130)])
def test_rows_before_an_error_are_kept(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def half(_: argparse.Namespace) -> Iterator[Row]:
        yield Row(name="first", value=1, unit="s")
        raise error

    assert main(half, "Half.", arguments=["--json"]) == code
    told = capsys.readouterr()
    assert [row["name"] for row in json.loads(told.out)] == ["first"]
    assert ("no disk" in told.err) == (code == 70)


def test_errors_keep_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(refused, "Refused.", arguments=[]) == 64
    assert main(one_miss, "Roots.", add_options=roots_option, arguments=["--roots", "many"]) == 64
    assert main(two_rows, "Two rows.", arguments=["--colour"]) == 64
    said = capsys.readouterr()
    assert said.out == ""
    assert "name one" in said.err


@given(st.floats(), st.sampled_from(["<", "<=", "==", ">=", ">"]), st.floats(allow_nan=False))
def test_met_is_computed_from_the_value(value: float, relation: Relation, limit: float) -> None:
    row = Row(name="x", value=value, unit="1", goal=Goal(relation=relation, limit=limit))
    expected = {
        "<": value < limit,
        "<=": value <= limit,
        "==": value == limit,
        ">=": value >= limit,
        ">": value > limit,
    }
    assert row.met is expected[relation]
    assert json.loads(json.dumps(row.data(), allow_nan=False))["met"] is expected[relation]


def test_a_value_that_is_not_a_number_misses_every_goal() -> None:
    for relation in ("<", "<=", "==", ">=", ">"):
        assert Row(name="x", value=math.nan, unit="1", goal=Goal(relation=relation, limit=0)).met is False


def test_the_list_holds_modules_with_a_measurement(tmp_path: Path) -> None:
    (tmp_path / "speed.py").write_text('"""How fast.\n\nLong."""\ndef measure(arguments): ...\n')
    (tmp_path / "library.py").write_text('"""Not one."""\ndef other(): ...\n')
    assert [(entry.name, entry.about) for entry in benchmarks(tmp_path)] == [("speed", "How fast.")]


def test_every_benchmark_here_says_what_it_measures() -> None:
    listed = benchmarks()
    assert all(entry.about for entry in listed)
    assert not {"harness", "baseline", "__main__"} & {entry.name for entry in listed}
