"""An audit as JUnit XML, for the pages on which build servers show tests; and the lenient reading of audit reports.

A case is a segment, or what one worker did in a segment. Only a match passes: what could not be replayed is an error,
and an audit that replayed nothing has a case of its own that fails.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

VERDICTS = ("match", "inconclusive", "diverged")
"""From best to worst; whatever else a report calls a verdict is inconclusive."""

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_LONGEST = 4000


# ------------------------------------------------------------------------------------- reading what may be of any shape


def clean(value: object) -> str:
    """The value as text that XML 1.0 and HTML can hold; controls, also of writing direction, are U+FFFD."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):
        return "\ufffd"
    more = len(text) - _LONGEST
    text = _UNPRINTABLE.sub("\ufffd", re.sub("\r\n?", "\n", text[:_LONGEST]))
    return f"{text} ... ({more} characters more)" if more > 0 else text


def number_of(value: object) -> float | None:
    """The value as a number that can be drawn, else None: not finite, beyond 1e100, no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(value) if -1e100 < value < 1e100 else None


def count_of(value: object) -> int | None:
    """The value as an index or a count below 2**63, else None."""
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if known and isinstance(value, int) else None


def fields_of(value: object) -> dict[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows_of(value: object) -> list[dict[str, Any]]:
    """The objects in the value where it is a list, else none."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of an audit: a segment, or what `worker` signed in the segment's first step."""

    index: int
    first_step: int | None
    steps: int | None
    worker: str | None
    verdict: str
    told: dict[str, Any]

    @property
    def title(self) -> str:
        """`segment 3`, or `segment 3, worker s0r0`."""
        return f"segment {self.index}" + ("" if self.worker is None else f", worker {self.worker}")


def checks_of(audit: dict[str, Any]) -> list[Check]:
    """The audit's lines; one that names no segment is left out, and counts in `verdict_of` all the same."""
    return [
        Check(
            index=index,
            first_step=count_of(row.get("first_step")),
            steps=count_of(row.get("steps_replayed")),
            worker=None if row.get("worker") in (None, "") else clean(row["worker"]),
            verdict=_verdict(row),
            told=row,
        )
        for row in rows_of(audit.get("segments"))
        if (index := count_of(row.get("index"))) is not None
    ]


def verdict_of(audit: dict[str, Any]) -> str:
    """The worst of the audit's own verdict and its lines'; a match of nothing is inconclusive."""
    told = [_verdict(row) for row in rows_of(audit.get("segments"))]
    return worst([_verdict(audit), *(told if checks_of(audit) else ["inconclusive", *told])])


def worst(verdicts: Iterable[str]) -> str:
    """Diverged before inconclusive before match."""
    return max(verdicts, key=VERDICTS.index)


def _verdict(row: dict[str, Any]) -> str:
    told = row.get("verdict")
    return told if isinstance(told, str) and told in VERDICTS else "inconclusive"


# ------------------------------------------------------------------------------------------------------------------ XML


def junit(audit: dict[str, Any]) -> str:
    """The audit as JUnit XML in ASCII: one suite, one case a line; equal values give equal text.

    Diverged is a failure, inconclusive an error. Segments that were not replayed are no cases.
    """
    audit = fields_of(audit)
    name = f"trueweight.audit.{clean(audit.get('run') or 'run')}"
    cases = [_case(name, check.title, check.verdict, check.told) for check in checks_of(audit)]
    shown = [check.verdict for check in checks_of(audit)]
    if not shown or verdict_of(audit) != worst(shown):
        cases.append(_case(name, "run", verdict_of(audit), audit))
        shown.append(verdict_of(audit))
    counts = {"tests": len(shown), "failures": shown.count("diverged"), "errors": shown.count("inconclusive")}
    totals = {key: str(count) for key, count in counts.items()} | _time(audit)
    top = ET.Element("testsuites", {"name": "trueweight audit", **totals})
    suite = ET.SubElement(top, "testsuite", {"name": name, **totals, "skipped": "0"})
    properties = ET.SubElement(suite, "properties")
    for key, value in _properties(audit):
        ET.SubElement(properties, "property", {"name": key, "value": clean(value)})
    suite.extend(cases)
    ET.indent(top)
    text: str = ET.tostring(top, encoding="us-ascii", xml_declaration=False).decode()
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(suite: str, title: str, verdict: str, told: dict[str, Any]) -> ET.Element:
    case = ET.Element("testcase", {"classname": suite, "name": title, **_time(told)})
    if verdict == "diverged":
        path = clean(told.get("path") or title)
        failure = ET.SubElement(case, "failure", {"type": "diverged", "message": f"diverged at {path}"})
        sides = (
            f"expected, as replayed: {clean(told.get('expected'))}\nactual, as recorded: {clean(told.get('actual'))}"
        )
        failure.text = f"path: {path}\n{sides}"
    elif verdict == "inconclusive":
        reason = clean(told.get("reason") or "nothing was replayed")
        error = ET.SubElement(case, "error", {"type": "inconclusive", "message": reason})
        error.text = f"{reason}\nThis accuses nobody, and is no match either."
    facts = [f"{key}: {clean(told[key])}" for key in _FACTS if told.get(key) is not None]
    if facts:
        ET.SubElement(case, "system-out").text = "\n".join(facts)
    return case


_FACTS = ("first_step", "steps_replayed", "worker", "prestate", "poststate", "receipts")


def _time(told: dict[str, Any]) -> dict[str, str]:
    seconds = number_of(told.get("seconds"))
    return {} if seconds is None or seconds < 0 else {"time": f"{seconds:.3f}"}


def _properties(audit: dict[str, Any]) -> Iterable[tuple[str, object]]:
    for key in ("run", "run_digest", "verdict", "replayed", "total", "planned", "seed", "fetched_bytes"):
        if audit.get(key) is not None:
            yield key, audit[key]
    sample = fields_of(audit.get("sample"))
    for key in ("strategy", "beacon", "rate", "cost"):
        if sample.get(key) is not None:
            yield f"sample.{key}", sample[key]
    for row in rows_of(audit.get("missed")):
        yield f"missed.{clean(row.get('forged_segments'))}_forged_segments", row.get("probability")
    for row in rows_of(sample.get("missed")):
        yield f"missed.share_{clean(row.get('share'))}", row.get("probability")
