import math
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trueweight.junit import clean, count_of, junit, number_of, verdict_of

MATCH = {"index": 0, "first_step": 0, "steps_replayed": 2, "prestate": "aa", "poststate": "bb", "verdict": "match"}
DIVERGED = {**MATCH, "index": 1, "verdict": "diverged", "path": "segment 1/step 3/loss", "expected": "1", "actual": "2"}
INCONCLUSIVE = {**MATCH, "index": 2, "verdict": "inconclusive", "reason": "object cc is gone"}


def audit(*segments: dict[str, Any], verdict: str = "match", **more: Any) -> dict[str, Any]:
    return {"run": "tiny", "run_digest": "dd" * 32, "verdict": verdict, "segments": list(segments), "total": 9, **more}


def suite(told: dict[str, Any]) -> ET.Element:
    """The one suite, after checking it against the shape that build servers read."""
    text = junit(told)
    assert text.isascii()
    top = ET.fromstring(text)
    assert top.tag == "testsuites"
    (only,) = top
    assert only.tag == "testsuite"
    assert set(only.attrib) <= {"name", "tests", "failures", "errors", "skipped", "time"}
    assert [child.tag for child in only] == ["properties"] + ["testcase"] * (len(only) - 1)
    cases = only.findall("testcase")
    for case in cases:
        assert {"name", "classname"} <= set(case.attrib) <= {"name", "classname", "time"}
        assert [child.tag for child in case] in (
            [*([outcome] if outcome else []), *out]
            for outcome in ("", "failure", "error")
            for out in ([], ["system-out"])
        )
        assert all(set(child.attrib) == {"message", "type"} for child in case if child.tag != "system-out")
    counts = {"tests": len(cases), "failures": len(only.findall("*/failure")), "errors": len(only.findall("*/error"))}
    for element in (top, only):
        assert {key: int(element.attrib[key]) for key in counts} == counts
    for property_ in only.findall("properties/property"):
        assert set(property_.attrib) == {"name", "value"}
    return only


def test_a_segment_is_a_case_and_only_a_match_passes() -> None:
    found = suite(audit(MATCH, DIVERGED, INCONCLUSIVE, verdict="diverged", seconds=12.3456))
    assert found.attrib == {
        "name": "trueweight.audit.tiny", "tests": "3", "failures": "1", "errors": "1", "skipped": "0", "time": "12.346"
    }  # fmt: skip
    first, second, third = found.findall("testcase")
    assert [case.attrib["name"] for case in (first, second, third)] == ["segment 0", "segment 1", "segment 2"]
    assert [child.tag for child in first] == ["system-out"]
    failure, error = second.find("failure"), third.find("error")
    assert failure is not None
    assert error is not None
    assert failure.attrib["message"] == "diverged at segment 1/step 3/loss"
    assert "expected, as replayed: 1\nactual, as recorded: 2" in (failure.text or "")
    assert error.attrib["message"] == "object cc is gone"


def test_a_worker_of_a_segment_is_a_case() -> None:
    found = suite(audit({**MATCH, "worker": "s0r0"}, {**MATCH, "worker": "s1r0"}))
    assert [case.attrib["name"] for case in found.findall("testcase")] == [
        "segment 0, worker s0r0",
        "segment 0, worker s1r0",
    ]


def test_properties_hold_digest_and_sample() -> None:
    sample = {
        "strategy": "uniform",
        "beacon": "ee",
        "rate": 0.1,
        "cost": 0.2,
        "missed": [{"share": 0.01, "probability": 0.9}],
    }
    missed = [{"forged_segments": 1, "probability": 0.5}]
    found = suite(audit(MATCH, sample=sample, missed=missed, seed=2**64 - 1, fetched_bytes=5))
    told = {item.attrib["name"]: item.attrib["value"] for item in found.findall("properties/property")}
    assert told["run_digest"] == "dd" * 32
    assert (told["seed"], told["fetched_bytes"]) == (str(2**64 - 1), "5")
    assert (told["sample.strategy"], told["sample.beacon"], told["sample.rate"], told["sample.cost"]) == (
        "uniform", "ee", "0.1", "0.2"
    )  # fmt: skip
    assert (told["missed.1_forged_segments"], told["missed.share_0.01"]) == ("0.5", "0.9")


@pytest.mark.parametrize(
    ("told", "failures", "errors"),
    [
        ({}, 0, 1),
        (audit(), 0, 1),
        (audit(verdict="inconclusive", reason="the run has not committed a segment yet"), 0, 1),
        (audit(verdict="diverged", path="run/program_root", expected="1", actual="2"), 1, 0),
        (audit(MATCH, verdict="diverged", path="run/program_root"), 1, 0),
        (audit(MATCH, verdict="inconclusive"), 0, 1),
        (audit({**MATCH, "verdict": "Match"}), 0, 1),
        (audit({**MATCH, "verdict": None}), 0, 1),
        (audit({**MATCH, "index": "zero"}), 0, 1),
        (audit(MATCH, {**DIVERGED, "index": -1}), 1, 0),
        (audit(DIVERGED), 1, 0),
    ],
)
def test_nothing_else_passes(told: dict[str, Any], failures: int, errors: int) -> None:
    found = suite(told)
    assert (found.attrib["failures"], found.attrib["errors"]) == (str(failures), str(errors))


def test_characters_that_xml_cannot_hold_are_replaced() -> None:
    hostile = "a\0\x1b[31m\ud800\ufffe\u202e<&\"']]></failure>é🜂\n"
    found = suite(audit({**DIVERGED, "path": hostile, "worker": hostile}, run=hostile, verdict="diverged"))
    (case,) = found.findall("testcase")
    seen = "a\ufffd\ufffd[31m\ufffd\ufffd\ufffd<&\"']]></failure>é🜂\n"
    assert case.attrib["name"] == f"segment 1, worker {seen}"
    assert found.attrib["name"] == f"trueweight.audit.{seen}"
    assert case.findtext("failure", "").startswith(f"path: {seen}")


@settings(deadline=None)
@given(st.text(st.characters(codec=None), max_size=50))
def test_cleaned_text_survives_xml(text: str) -> None:
    element = ET.Element("x", {"a": clean(text)})
    element.text = clean(text)
    read = ET.fromstring(ET.tostring(element, encoding="us-ascii"))
    assert (read.text or "", read.attrib["a"]) == (clean(text), clean(text))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("index", "verdict", "worker", "reason", "path", "seconds", "first_step", "steps_replayed", "receipts")
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6) | VALUES, max_size=3) | VALUES


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("run", "verdict", "seconds", "sample", "missed"), VALUES) | {"segments": ROWS}
    )
)
def test_any_values_give_a_valid_suite(told: dict[str, Any]) -> None:
    found = suite(told)
    passes = int(found.attrib["failures"]) + int(found.attrib["errors"]) == 0
    assert passes == (verdict_of(told) == "match")
    assert junit(told) == junit(told)


def test_numbers_that_cannot_be_drawn_are_none() -> None:
    assert [number_of(value) for value in (True, math.nan, math.inf, 10**400, 1e101, "1", None)] == [None] * 7
    assert [number_of(value) for value in (3, -0.5)] == [3.0, -0.5]
    assert [count_of(value) for value in (True, -1, 2**63, 1.0, "1")] == [None] * 5
    assert count_of(7) == 7
    assert clean(10**5000) == "\ufffd"
    assert clean("x" * 5000) == "x" * 4000 + " ... (1000 characters more)"
