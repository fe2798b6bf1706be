"""An audit as one HTML page that opens from disk: what was checked, what was found, and what was not checked.

Names, labels and reasons come from strangers, so markup is made by `tag` alone, which escapes whatever is not markup
already; the page runs no script and its policy forbids any. Values that are missing, of another type or not finite are
left out. A page accuses or acquits nobody: it is what one auditor says, and it ends with the commands to check it.
"""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import pairwise
from string import Template
from typing import Any

from trueweight.junit import Check, checks_of, clean, count_of, fields_of, number_of, rows_of, verdict_of, worst

CELLS = 5000
"""As many segments are drawn one by one; of more, several share a cell."""
POINTS = 300
"""A longer curve is drawn as the lowest and highest value of so many stretches."""
ROWS = 60
"""A longer table is folded."""

MARKS = {"match": "✓", "diverged": "✕", "inconclusive": "?", "unchecked": "·"}
STATES = {
    "match": "replayed: match",
    "diverged": "diverged",
    "inconclusive": "inconclusive",
    "unchecked": "not replayed",
}
LEVELS = {
    "segment": "a stretch of steps between two saved states",
    "step": "one update of the weights",
    "unit": "one micro-batch through one stage, done by one worker",
    "call": "one Program that the unit runs",
    "operator": "one primitive operation of the Program",
    "leaf": "4 KiB of the operator's result",
    "element": "one number",
}
CAUSES = {
    "software or fraud": "Done again, the work gives the same wrong bytes again. Chance does not repeat itself: either "
    "the software that did it computes something else than the recipe says, or the result was forged. A replay cannot "
    "tell which.",
    "hardware fault": "Done again by the same worker, the work gives other bytes than those it signed. A result that "
    "does not repeat points to a failing processor or memory, not to intent. The segment is wrong all the same.",
    "unavailable": "The work could not be done again by the worker that signed it, so the cause is open. That the "
    "record is wrong does not depend on it.",
    "record": "What the workers signed gives no cause for it: the records that the run was put together from say "
    "something else, so the question is to who wrote them.",
}
REPEATS = {
    "repeats": "yes, the same wrong bytes",
    "differs": "no, other bytes than those signed",
    "unavailable": "could not be tried",
}
STRATEGIES = {
    "uniform": "all that could be drawn was equally likely to be",
    "stratified": "each worker had its share of the draw",
    "risk": "what was judged riskier was likelier to be drawn",
    "stream": "each segment was drawn by itself, with the same chance, as it was committed",
}


class Html(str):
    """Text that is markup; every other text is escaped before it is put into the page."""

    __slots__ = ()


def audit_page(run: dict[str, Any], audit: dict[str, Any], divergence: dict[str, Any] | None = None) -> str:
    """The whole page, to be written as UTF-8; equal values give equal text.

    `run` is what `reports.run_report` returns, `audit` what `reports.audit_report` does, and `divergence` what
    `trueweight pinpoint --json` says.
    """
    found = Found(fields_of(run), fields_of(audit), fields_of(divergence))
    sections = [_headline(found), _divergence(found), _segments(found), _losses(found), _sample(found), _workers(found)]
    body = [
        tag("header", "Trueweight audit report: ", tag("b", tag("bdi", found.name))),
        tag("main", *sections, _facts(found), _commands(found)),
        tag(
            "footer",
            "Made by trueweight audit. This page is one auditor's word, not evidence: anyone can write a page. "
            "What counts are the run's committed records and your own replay of them. It runs no script and loads "
            "nothing.",
        ),
    ]
    resources = files("trueweight")
    return Template(resources.joinpath("page.html").read_text("utf-8")).substitute(
        title=_text(f"{found.verdict}: {found.name} - Trueweight audit"),
        style=resources.joinpath("page.css").read_text("utf-8"),
        body="\n".join(body),
    )


# ------------------------------------------------------------------------------------------------------------- markup


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; `class_` is `class`, `aria_label` is `aria-label`, an attribute that is None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{_text(children)}</{name}>")


def _text(value: object) -> Html:
    if isinstance(value, Html):
        return value
    if isinstance(value, list | tuple):
        return Html("".join(map(_text, value)))
    return Html("" if value is None else escape(clean(value)))


def _section(name: str, heading: str, *content: object) -> Html:
    title = tag("h2", heading, id=f"{name}-title")
    return tag("section", title, tag("div", *content, class_="content"), id=name, aria_labelledby=f"{name}-title")


def _terms(pairs: Iterable[tuple[str, object]]) -> Html | None:
    rows = [(tag("dt", name), tag("dd", value)) for name, value in pairs if value not in (None, "")]
    return tag("dl", rows) if rows else None


def _digest(value: object) -> Html | None:
    return None if value in (None, "") else tag("code", value, class_="digest")


def _short(value: object) -> Html | None:
    text = "" if value is None else clean(value)
    return tag("code", text[:16], title=text if len(text) > 16 else None) if text else None


def _state(verdict: str, note: str = "") -> Html:
    return tag("span", f"{MARKS[verdict]} {STATES[verdict]}{note}", class_=f"state {verdict}")


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, fold: bool = True) -> Html:
    head = tag("thead", tag("tr", [tag("th", column, scope="col") for column in columns]))
    lines = [
        tag("tr", [tag("th", row[0], scope="row", style="font-weight:400"), *(tag("td", cell) for cell in row[1:])])
        for row in rows
    ]
    table = tag("table", tag("caption", tag("span", caption)), head, tag("tbody", lines))
    scrolled = tag("div", table, class_="scroll", role="region", tabindex="0", aria_label=caption)
    if not fold or len(rows) <= ROWS:
        return scrolled
    return tag("details", tag("summary", f"All {len(rows):,} lines as a table"), scrolled)


def _percent(share: float) -> str:
    if not 0 < abs(share) < 1:
        return f"{100 * share:.6g} %"
    if share < 0.0001:
        return f"{share:.1e}"
    return f"{100 * share:.3g} %" if share < 0.9995 else f"{100 * share:.6g} %"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _span(first: int | None, count: int | None) -> str:
    if first is None or not count or count < 1:
        return ""
    return f"step {first:,}" if count == 1 else f"steps {first:,} to {first + count - 1:,}"


def _unbroken(text: str) -> Html:
    return tag("span", text, class_="unbroken")


# ------------------------------------------------------------------------------------------------ what there is to tell


class Found:
    """The three reports, read: the verdict, checks by segment, the run's segments by index, who is accused."""

    def __init__(self, run: dict[str, Any], audit: dict[str, Any], divergence: dict[str, Any]) -> None:
        self.run, self.audit, self.divergence = run, audit, divergence
        self.checks = checks_of(audit)
        self.verdict = verdict_of(audit)
        self.name = clean(audit.get("run") or run.get("run") or "RUN")
        self.known = {i: row for row in rows_of(run.get("segments")) if (i := count_of(row.get("index"))) is not None}
        total = count_of(audit.get("total"))
        self.total = len(self.known) if total is None else total
        self.by_segment: dict[int, list[Check]] = defaultdict(list)
        for check in self.checks:
            self.by_segment[check.index].append(check)
        self.by_segment = dict(sorted(self.by_segment.items()))

    def state(self, index: int) -> str:
        """The worst verdict on a segment, `unchecked` without one."""
        checks = self.by_segment.get(index)
        return worst(check.verdict for check in checks) if checks else "unchecked"

    def partly(self, index: int) -> bool:
        """Whether no check covers the whole of a segment that was replayed: one worker's work, or fewer steps."""
        count = count_of(self.known.get(index, {}).get("steps")) or 0
        whole = (c.worker is None and (c.steps is None or c.steps >= count) for c in self.by_segment.get(index, ()))
        return index in self.by_segment and not any(whole)

    def steps(self, index: int) -> tuple[int | None, int | None]:
        """First step and number of steps of a segment, as far as they are known."""
        row = self.known.get(index, {})
        first, count = count_of(row.get("first_step")), count_of(row.get("steps"))
        for check in self.by_segment.get(index, ()):
            first = check.first_step if first is None else first
            count = check.steps if count is None and check.worker is None else count
        return first, count


# ------------------------------------------------------------------------------------------------------------- headline


def _headline(found: Found) -> Html:
    words = {"match": "Match", "diverged": "Diverged", "inconclusive": "Inconclusive"}
    seal = tag("div", MARKS[found.verdict], class_="seal", aria_hidden="true")
    title = tag("div", tag("p", words[found.verdict], class_="word"), tag("h1", _sentence(found), id="verdict-title"))
    rest = [
        tag("p", _meaning(found)),
        tag("h3", "Not checked"),
        tag("ul", [tag("li", line) for line in _unchecked(found)]),
    ]
    box = tag("div", seal, title, tag("div", rest, class_="rest"), class_=f"verdict {found.verdict}")
    return tag("div", box, _mixed(found), id="verdict", role="region", aria_labelledby="verdict-title")


def _sentence(found: Found) -> str:
    whole = [index for index in found.by_segment if index < found.total and not found.partly(index)]
    if found.verdict == "diverged":
        where = _where(found)
        return f"This run is not what its recipe gives: computed again, it comes out differently{where}."
    if found.verdict == "inconclusive":
        return "No verdict: the audit could not be carried through, so it neither confirms this run nor accuses anyone."
    if whole and len(whole) == found.total:
        return f"All of this run, {_many(len(whole), 'segment')}, was computed again and came out identical."
    if not whole:
        where = f"no more than parts of {len(found.by_segment):,} of {_many(found.total, 'segment')}"
        return f"What was checked came out identical, and it is a small part of this run: {where}."
    done = f"{len(whole):,} of {_many(found.total, 'segment')} of this run"
    return f"What was checked came out identical: {done} {'was' if len(whole) == 1 else 'were'} computed again."


def _where(found: Found) -> str:
    path = found.audit.get("path") or next((c.told.get("path") for c in found.checks if c.verdict == "diverged"), None)
    parts = clean(path).split("/")[:2] if path else []
    if not parts:
        index = next((index for index in found.by_segment if found.state(index) == "diverged"), None)
        return "" if index is None else f", first in segment {index}"
    return f", first at {', '.join(part.replace('_', ' ') for part in parts)}"


def _meaning(found: Found) -> str:
    if found.verdict == "match":
        return (
            "A run is training cut into segments, and its recipe determines every bit. The auditor computed the chosen "
            "segments again from their recorded starting points and compared losses, gradients and weights with the "
            "record, bit by bit."
        )
    if found.verdict == "diverged":
        return (
            "The recipe determines every bit, so an honest run on sound machines comes out the same wherever it is "
            "computed. Here the record says one thing and the auditor's computation another. One audit can itself be "
            "wrong; repeat it with the commands at the end, on a machine that passes its own check."
        )
    reasons = [row.get("reason") for row in (found.audit, *(check.told for check in found.checks)) if row.get("reason")]
    reason = clean(reasons[0]) if reasons else "none"
    matched = sum(check.verdict == "match" for check in found.checks)
    others = f" What could be replayed, {matched:,} of {len(found.checks):,}, came out identical." if matched else ""
    return f"A missing file or a full memory says nothing of the run. The reason given: {reason.rstrip('.')}.{others}"


def _unchecked(found: Found) -> list[str]:
    lines = []
    inside = [index for index in found.by_segment if index < found.total]
    missing = found.total - len(inside)
    if missing:
        share = f", {_percent(missing / found.total)} of the run," if found.total > 1 else ""
        verb = "was" if missing == 1 else "were"
        lines.append(f"{_many(missing, 'segment')}{share} {verb} not replayed: {_gaps(inside, found.total)}.")
    partly = [index for index in found.by_segment if found.partly(index)]
    if partly:
        what = "one worker's work in the first step, or the steps up to a difference; see Segments"
        lines.append(f"Of {_many(len(partly), 'segment')} only a part was replayed: {what}.")
    ended = [check for check in found.checks if check.verdict == "inconclusive"]
    lines += [f"{check.title}, not to its end: {clean(check.told.get('reason') or 'no reason')}" for check in ended[:5]]
    if len(ended) > 5:
        lines.append(f"{_many(len(ended) - 5, 'more segment')}, not to the end.")
    planned = count_of(found.audit.get("planned"))
    if planned and planned > found.total:
        lines.append(
            f"{_many(planned - found.total, 'segment')} of the {planned:,} that the recipe plans: not committed yet."
        )
    lines.append("Whether recipe and data are good ones, and who owns the machines: no replay can tell.")
    return lines


def _gaps(inside: Sequence[int], total: int) -> str:
    """The indices below `total` that are not `inside`, as ranges; the first twelve of them."""
    ranges = []
    for before, after in zip([-1, *inside], [*inside, total], strict=True):
        if after - before > 1:
            ranges.append(f"{before + 1:,}" if after - before == 2 else f"{before + 1:,} to {after - 1:,}")
    more = f" and {len(ranges) - 12:,} more ranges" if len(ranges) > 12 else ""
    return ", ".join(ranges[:12]) + more


def _mixed(found: Found) -> Html | None:
    """A warning where the reports speak of different runs or contradict one another."""
    digests = {clean(report["run_digest"]) for report in (found.run, found.audit) if report.get("run_digest")}
    names = {clean(report["run"]) for report in (found.run, found.audit, found.divergence) if report.get("run")}
    lines = []
    if len(digests) > 1 or len(names) > 1:
        lines.append("The reports that this page was made from speak of different runs.")
    if found.divergence and found.verdict != "diverged":
        lines.append("A divergence was given with an audit that found none.")
    if not lines:
        return None
    return tag("p", tag("b", "? Do not rely on this page. "), " ".join(lines), class_="warning", role="note")


# ----------------------------------------------------------------------------------------------------------- divergence


def _divergence(found: Found) -> Html | None:
    if not found.divergence and found.verdict != "diverged":
        return None
    told = found.divergence or _coarse(found)
    cause = clean(told.get("cause") or "not examined")
    because = CAUSES.get(cause, "The difference was narrowed no further, so nothing is known of its cause.")
    content = [
        tag(
            "p",
            "From the whole down to the smallest part that differs. Expected is what the replay gives, actual what was "
            "recorded.",
        ),
        _path(told),
        _number(told),
        tag("h3", "Who signed it"),
        _signer(found, told),
        tag("h3", f"Cause: {cause}"),
        tag("p", because),
        _terms(
            [
                ("done again", REPEATS.get(clean(told.get("repeat")), told.get("repeat"))),
                ("reason given", told.get("reason")),
            ]
        ),
    ]
    return _section("divergence", "Where it differs", *content)


def _coarse(found: Found) -> dict[str, Any]:
    """The divergence as far as the audit itself has narrowed it."""
    rows = [found.audit, *(check.told for check in found.checks)]
    row = next((row for row in rows if row.get("verdict") == "diverged"), {})
    parts = [part for part in clean(row.get("path") or "").split("/") if part]
    path: list[dict[str, Any]] = [{"level": part.split(" ")[0], "at": part} for part in parts]
    if path:
        path[-1] |= {"expected": row.get("expected"), "actual": row.get("actual")}
    return {"path": path}


def _path(told: dict[str, Any]) -> Html:
    rows = rows_of(told.get("path"))
    lines = [_stop(row, last=row is rows[-1]) for row in rows]
    reached = [list(LEVELS).index(name) for row in rows if (name := clean(row.get("level"))) in LEVELS]
    beyond = list(LEVELS)[max(reached, default=-1) + 1 :]
    lines += [tag("li", tag("b", name), " not narrowed down to", class_="beyond") for name in beyond]
    return tag("ol", lines, class_="path", aria_label="Path to the difference, outermost first")


def _stop(row: dict[str, Any], *, last: bool) -> Html:
    level = clean(row.get("level") or "")
    head = [
        tag("b", level),
        " ",
        tag("bdi", row.get("at")),
        tag("span", f" - {LEVELS[level]}", class_="soft") if level in LEVELS else None,
    ]
    values = [(name, row.get(name)) for name in ("expected", "actual") if row.get(name) not in (None, "")]
    pair = [[tag("span", name), _digest(value)] for name, value in values]
    note = row.get("note")
    return tag(
        "li",
        head,
        tag("div", pair, class_="pair") if pair else None,
        tag("div", note, class_="soft") if note is not None else None,
        class_="last" if last else None,
    )


def _number(told: dict[str, Any]) -> Html | None:
    """The operator and the one number that differs, with its bits side by side."""
    index, shape = (_indices(told.get(key)) for key in ("index", "shape"))
    number = told.get("number")
    operator = (
        None
        if told.get("operator") is None
        else [tag("code", told["operator"]), f", number {clean(number)}" if number is not None else None]
    )
    place = f"[{index}]" + (f" of an array of {shape.replace(', ', ' x ')}" if shape else "") if index else None
    facts = _terms([("operator", operator), ("part of the model", told.get("label")), ("element", place)])
    expected, actual = fields_of(told.get("expected")), fields_of(told.get("actual"))
    if not expected and not actual:
        return tag("div", tag("h3", "The operator"), facts) if facts else None
    bits = [_bits(side.get("bits")) for side in (expected, actual)]
    width = max((len(one) for one in bits if one), default=0)
    padded = [one.rjust(width, "0") if one else None for one in bits]
    decimal = isinstance(expected.get("value"), float) or isinstance(actual.get("value"), float)
    rows = [
        (name, _value(side.get("value")), _value(side.get("bits")), _bit_row(mine, other, decimal=decimal))
        for name, side, mine, other in zip(
            ("expected, as replayed", "actual, as recorded"), (expected, actual), padded, reversed(padded), strict=True
        )
    ]
    apart = sum(a != b for a, b in zip(padded[0] or "", padded[1] or "", strict=False))
    caption = (
        f"The number that differs: {apart} of its {width} bits, underlined"
        if all(padded)
        else "The number that differs"
    )
    if decimal and width == 32:
        caption += "; sign, exponent and fraction of a binary32 number"
    return tag(
        "div", tag("h3", "The element"), facts, _table(caption, ("", "value", "bits", "bit by bit"), rows, fold=False)
    )


def _indices(value: object) -> str:
    return ", ".join(clean(item) for item in value[:32]) if isinstance(value, list | tuple) else ""


def _value(value: object) -> Html | None:
    return None if value is None else tag("code", repr(value) if isinstance(value, float) else value)


def _bits(value: object) -> str | None:
    """Binary digits of `0x...` of at most 64 bits, four for each digit."""
    digits = value[2:] if isinstance(value, str) and value[:2] == "0x" else ""
    if not 0 < len(digits) <= 16 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        return None
    return f"{int(digits, 16):0{4 * len(digits)}b}"


def _bit_row(mine: str | None, other: str | None, *, decimal: bool) -> Html | None:
    if mine is None:
        return None
    cuts = [0, 1, 9, 32] if decimal and len(mine) == 32 else [*range(0, len(mine), 8), len(mine)]
    shown = [bit if other is None or bit == other[i] else tag("mark", bit) for i, bit in enumerate(mine)]
    return tag("code", [tag("span", shown[a:b]) for a, b in pairwise(cuts)], class_="bits")


def _signer(found: Found, told: dict[str, Any]) -> Html:
    worker, address = told.get("worker") or None, told.get("address") or None
    if worker is None and address is None:
        return tag("p", "Not narrowed down to a worker; the segment's receipts name who took part.")
    signed = [row for row in rows_of(found.run.get("workers")) if address is not None and row.get("address") == address]
    units = sum(count_of(row.get("units")) or 0 for row in signed)
    return tag(
        "div",
        _terms(
            [
                ("worker", None if worker is None else tag("bdi", worker)),
                ("address", _digest(address)),
                ("signature", _digest(told.get("signature"))),
                ("in this run", f"this address signed {_many(units, 'unit')} of work" if signed else None),
            ]
        ),
        tag(
            "p",
            "The address is accountable for what it signed. Which person owns it, a signature does not say.",
            class_="soft",
        ),
    )


# ------------------------------------------------------------------------------------------------------------- segments


def _segments(found: Found) -> Html:
    if not found.total and not found.checks:
        return _section("segments", "Segments", tag("p", "The run has committed no segment yet."))
    each = max(1, -(-found.total // CELLS))
    cells = -(-found.total // each)
    size = "large" if cells <= 40 else "medium" if cells <= 400 else "small"
    inside = Counter(found.state(index) for index in found.by_segment if index < found.total)
    inside["unchecked"] = found.total - sum(inside.values())
    states = "; ".join(f"{count:,} {STATES[state]}" for state, count in sorted(inside.items()) if count)
    parts = any(found.partly(index) and found.state(index) == "match" for index in found.by_segment)
    content = [
        tag("p", f"{_many(found.total, 'segment')}, in the order of training: {states}."),
        tag("div", _cells(found, cells, each), class_=f"timeline {size}", role="img", aria_label=f"Timeline: {states}"),
        _legend([*inside], size, parts=parts),
        tag("p", f"Each cell stands for {each:,} segments and shows the worst.", class_="soft") if each > 1 else None,
        _segment_table(found),
    ]
    return _section("segments", "Segments", *content)


def _cells(found: Found, cells: int, each: int) -> list[Html]:
    checked: dict[int, list[int]] = defaultdict(list)
    for index in found.by_segment:
        checked[index // each].append(index)
    order = ("unchecked", "match", "inconclusive", "diverged")
    made = []
    for cell in range(cells):
        inside = checked.get(cell, [])
        state = max((found.state(index) for index in inside), key=order.index, default="unchecked")
        part = " part" if inside and state == "match" and all(found.partly(index) for index in inside) else ""
        first, last = cell * each, min((cell + 1) * each, found.total) - 1
        steps = _span(*found.steps(first)) if each == 1 else ""
        title = f"segment {first}" if each == 1 else f"segments {first} to {last}"
        label = [MARKS[state], tag("small", first) if cells <= 40 else None]
        made.append(
            tag(
                "span",
                label,
                class_=f"cell {state}{part}",
                title=", ".join(filter(None, (title, steps, STATES[state]))),
            )
        )
    return made


def _legend(states: Iterable[str], size: str, *, parts: bool) -> Html:
    size = "small" if size == "small" else "medium"
    shown = [
        (state, state, STATES[state]) for state in ("match", "diverged", "inconclusive", "unchecked") if state in states
    ]
    if parts:
        shown.append(("match part", "match", "replayed in part: match"))
    return tag(
        "ul",
        [
            tag(
                "li",
                tag(
                    "span",
                    tag("span", MARKS[state], class_=f"cell {kind}"),
                    class_=f"timeline {size}",
                    aria_hidden="true",
                ),
                name,
            )
            for kind, state, name in shown
        ],
        class_="legend",
    )


def _segment_table(found: Found) -> Html:
    rows: list[Sequence[object]] = []
    for index in sorted({*found.known, *found.by_segment}):
        row = found.known.get(index, {})
        span = _span(*found.steps(index)).removeprefix("steps ").removeprefix("step ")
        for check in found.by_segment.get(index, [None]):
            told = row if check is None else check.told
            state = _state("unchecked" if check is None else check.verdict)
            what, after = _replayed(check), _short(told.get("poststate"))
            rows.append(
                (index, _unbroken(span), state, what, _unbroken(_both_losses(row)), told.get("receipts"), after)
            )
    columns = ("segment", "steps", "verdict", "replayed", "loss", "receipts", "state after it")
    return _table("Segments: verdicts and recorded states", columns, rows)


def _both_losses(row: dict[str, Any]) -> str:
    losses = (number_of(row.get(key)) for key in ("first_loss", "last_loss"))
    return " to ".join(f"{loss:.4g}" for loss in losses if loss is not None)


def _replayed(check: Check | None) -> object:
    if check is None:
        return None
    if check.worker is not None:
        return ["what ", tag("bdi", check.worker), " signed in the first step"]
    return None if check.steps is None else _many(check.steps, "step")


# --------------------------------------------------------------------------------------------------------------- curves


Point = tuple[float, float | None]
"""A place on the x axis and a value, None where there is none that can be drawn."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a plot by the name of its style; `dots` marks its points."""

    name: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from `low` to `high`, which differ, as per mille of a side of the plot."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float], pad: float = 0.0) -> "Axis":
        """An axis with all values on it; 0 to 1 over none."""
        known = list(values)
        low, high = min(known, default=0.0), max(known, default=1.0)
        room = (high - low) * pad
        if not high - low > 1e-9 * max(abs(low), abs(high)):
            room = max(abs(high) / 2, 0.5)
        return cls(low=low - room, high=high + room)

    def place(self, value: float) -> float:
        """0 at `low`, 1000 at `high`; values beyond are at the edge."""
        return min(max(1000 * (value - self.low) / (self.high - self.low), 0.0), 1000.0)

    def ticks(self, count: int, *, whole: bool = False) -> list[float]:
        """About `count` round values on the axis."""
        rough = (self.high - self.low) / count
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough * 0.999)
        step = max(step, 1.0) if whole else step
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, first + 2 * count + 2) if k * step <= self.high]


def _losses(found: Found) -> Html:
    rows = [(step, row) for row in rows_of(found.run.get("losses")) if (step := count_of(row.get("step"))) is not None]
    rows.sort(key=lambda pair: pair[0])
    training: list[Point] = [(float(step), number_of(row.get("loss"))) for step, row in rows]
    validation: list[Point] = [
        (float(step), number_of(row["validation_loss"])) for step, row in rows if "validation_loss" in row
    ]
    values = [value for _, value in (*training, *validation) if value is not None]
    if not values:
        return _section("loss", "Loss", tag("p", "The run has recorded no loss that can be drawn."))
    x, y = Axis.over(place for place, _ in training), Axis.over(values, 0.06)
    curves = [
        Curve(name="training", points=training),
        Curve(name="validation", points=validation, dots=len(validation) <= 60),
    ]
    told = [
        f"{curve.name} {_ends(curve.points)}" for curve in curves if any(value is not None for _, value in curve.points)
    ]
    lost = sum(value is None for _, value in (*training, *validation))
    plot = _plot(
        curves,
        x,
        y,
        "Loss by step: " + "; ".join(told),
        "step",
        "loss",
        [*_bands(found, x), *_hits(found, x)],
        _flags(found, x),
    )
    caption = [
        "Loss as the run recorded it: ",
        "; ".join(told),
        ". Shaded and marked on the axis: the steps that were replayed, taller if inconclusive, tallest if diverged.",
        f" {_many(lost, 'value')} not finite or missing, left out." if lost else None,
    ]
    legend = tag(
        "ul",
        [tag("li", _swatch(curve.name), curve.name) for curve in curves if curve.points],
        class_="legend",
        aria_hidden="true",
    )
    return _section("loss", "Loss", tag("figure", legend, plot, tag("figcaption", caption)))


def _swatch(name: str) -> Html:
    line = tag("path", d="M0 5H30", class_=name, fill="none")
    return tag("svg", line, viewBox="0 0 30 10", aria_hidden="true")


def _ends(points: Sequence[Point]) -> str:
    known = [(place, value) for place, value in points if value is not None]
    return f"{known[0][1]:.4g} at step {known[0][0]:,.0f} to {known[-1][1]:.4g} at step {known[-1][0]:,.0f}"


def _covered(found: Found, x: Axis) -> list[tuple[str, float, float]]:
    """State and extent, half a step to either side, of neighbouring segments that were replayed."""
    spans: list[tuple[str, float, float]] = []
    for index in found.by_segment:
        first, count = found.steps(index)
        if first is None or not count:
            continue
        done = [1 if check.worker is not None else check.steps or 1 for check in found.by_segment[index]]
        state, start, end = found.state(index), x.place(first - 0.5), x.place(first + min(max(done), count) - 0.5)
        if spans and spans[-1][0] == state and spans[-1][2] == start:
            state, start, _ = spans.pop()
        spans.append((state, start, end))
    return spans


def _bands(found: Found, x: Axis) -> list[Html]:
    """Shades over the steps that were replayed, and marks on the axis: taller for worse, wide enough to be seen."""
    spans = _covered(found, x)
    shades = [_rect(start, end, f"band {state}") for state, start, end in spans]
    heights = {"match": 15, "inconclusive": 35, "diverged": 60}
    return shades + [
        _rect(start, max(end, start + 2), f"mark {state}", height=heights[state]) for state, start, end in spans
    ]


def _flags(found: Found, x: Axis) -> list[Html]:
    spans = _covered(found, x)
    if len(spans) > 16:
        return []
    return [
        tag("span", MARKS[state], class_=f"flag {state}", style=f"left:{(start + end) / 20:.2f}%", aria_hidden="true")
        for state, start, end in spans
    ]


def _hits(found: Found, x: Axis) -> list[Html]:
    """What a pointer over a segment is told."""
    made = []
    for index, row in sorted(found.known.items())[:400]:
        first, count = found.steps(index)
        if first is not None and count:
            losses = _both_losses(row)
            text = f"segment {index}, {_span(first, count)}: {STATES[found.state(index)]}"
            title = tag("title", text, f", loss {losses}" if losses else "")
            made.append(_rect(x.place(first - 0.5), x.place(first + count - 0.5), "hit", title))
    return made


def _rect(start: float, end: float, style: str, *children: object, height: int = 1000) -> Html:
    width = f"{max(end - start, 0):.1f}"
    return tag("rect", *children, x=f"{start:.1f}", y=1000 - height, width=width, height=height, class_=style)


def _plot(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    label: str,
    x_unit: str,
    y_unit: str,
    under: Sequence[Html] = (),
    over: Sequence[Html] = (),
    *,
    share: bool = False,
) -> Html:
    """The curves over two axes, as wide as the page: the lines are stretched, their widths and the text are not."""
    across, up = x.ticks(5, whole=not share), y.ticks(4 if share else 5)
    grid = [_line(0, 1000 - y.place(value), 1000, 1000 - y.place(value), "grid") for value in up]
    marks = [_line(x.place(value), 1000, x.place(value), 985, "axis") for value in across]
    frame = [_line(0, 0, 0, 1000, "axis"), _line(0, 1000, 1000, 1000, "axis")]
    drawn = [
        tag(
            "svg",
            grid,
            under,
            frame,
            marks,
            [_drawn(curve, x, y) for curve in curves],
            viewBox="0 0 1000 1000",
            preserveAspectRatio="none",
            role="img",
            aria_label=label,
        )
    ]
    drawn += [
        tag(
            "span",
            _tick(value, up, share=share),
            class_="tick y",
            style=f"bottom:{y.place(value) / 10:.2f}%",
            aria_hidden="true",
        )
        for value in up
    ]
    drawn += [
        tag(
            "span",
            _tick(value, across, share=share),
            class_="tick x",
            style=f"left:{x.place(value) / 10:.2f}%",
            aria_hidden="true",
        )
        for value in across
    ]
    drawn += [
        tag("span", x_unit, class_="unit x", aria_hidden="true"),
        tag("span", y_unit, class_="unit y", aria_hidden="true"),
        *over,
    ]
    return tag("div", drawn, class_="plot short" if share else "plot")


def _tick(value: float, ticks: Sequence[float], *, share: bool) -> str:
    if share:
        return f"{100 * value:.4g} %"
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    if step <= 0 or not 1e-5 < step < 1e9 or abs(value) >= 1e9:
        return f"{value:.4g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step * 1.0001)))}f}"


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=style)


def _drawn(curve: Curve, x: Axis, y: Axis) -> list[Html]:
    points = [(x.place(a), None if b is None else 1000 - y.place(b)) for a, b in _thinned(curve.points)]
    line, pen = [], "M"
    for place, value in points:
        if value is not None:
            line.append(f"{pen}{place:.1f} {value:.1f}" + ("h0" if pen == "M" else ""))
        pen = "M" if value is None else "L"
    dots = [f"M{place:.1f} {value:.1f}h0" for place, value in points if value is not None] if curve.dots else []
    styles = ((line, curve.name), (dots, f"{curve.name} dots"))
    return [tag("path", d=Html("".join(parts)), class_=style) for parts, style in styles if parts]


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """The lowest and highest value of every stretch, in their order, where there are too many points to draw."""
    if len(points) <= 2 * POINTS:
        return points
    kept: list[Point] = []
    for part in range(POINTS):
        stretch = points[len(points) * part // POINTS : len(points) * (part + 1) // POINTS]
        known = [(value, place) for place, value in stretch if value is not None]
        if known:
            kept += sorted({(min(known)[1], min(known)[0]), (max(known)[1], max(known)[0])})
        else:
            kept.append((stretch[0][0], None))
    return kept


# ------------------------------------------------------------------------------------------------- sample, workers, run


def _sample(found: Found) -> Html:
    told, audit = fields_of(found.audit.get("sample")), found.audit
    strategy = None if told.get("strategy") is None else clean(told["strategy"])
    drawn = strategy is not None or audit.get("seed") is not None
    rate, cost = number_of(told.get("rate")), number_of(told.get("cost"))
    seconds, fetched = number_of(audit.get("seconds")), number_of(audit.get("fetched_bytes"))
    facts = _terms(
        [
            ("strategy", strategy and (f"{strategy}: {STRATEGIES[strategy]}" if strategy in STRATEGIES else strategy)),
            ("beacon", _digest(told.get("beacon"))),
            ("seed", _digest(audit.get("seed"))),
            ("rate", None if rate is None else _percent(rate)),
            ("cost", None if cost is None else f"{_percent(cost)} of the run's computation"),
            ("took", None if seconds is None else f"{seconds:,.1f} s"),
            ("fetched", None if fetched is None else f"{fetched / 1e6:,.1f} MB"),
        ]
    )
    how = (
        "What to replay was drawn at random. That counts only if it was drawn after the run was committed: who knows "
        "the draw before knows where to cheat."
        if drawn
        else "What to replay was chosen by the auditor, not drawn at random; figures are those of a draw of as many."
    )
    return _section("sample", "The sample", tag("p", how), facts, _missed(found))


def _missed(found: Found) -> list[object]:
    """Table and curve of the probability that the sample held none of the forged work."""
    told, total = rows_of(fields_of(found.audit.get("sample")).get("missed")), found.total
    rows: list[tuple[str, float, float]] = []
    if told:
        known = ((number_of(row.get("share")), number_of(row.get("probability"))) for row in told)
        rows = [
            (f"{_percent(share)} of the work", share, chance)
            for share, chance in known
            if share is not None and chance is not None
        ]
    else:
        for row in rows_of(found.audit.get("missed")):
            count, chance = count_of(row.get("forged_segments")), number_of(row.get("probability"))
            if count is not None and chance is not None and total:
                rows.append((_many(count, "segment"), count / total, chance))
    if not rows:
        return [tag("p", "What such a sample would have missed is not known.")]
    rows.sort(key=lambda row: row[1])
    table = _table(
        "If so much of the run had been forged, the probability that this audit did not see it",
        ("forged", "missed with probability"),
        [(name, _percent(chance)) for name, _, chance in rows],
    )
    if len(rows) < 3:
        return [table]
    curve = Curve(name="training", points=[(share, chance) for _, share, chance in rows], dots=len(rows) <= 60)
    x, y = Axis.over([0.0, *(share for _, share, _ in rows)]), Axis.over([0.0, 1.0, *(chance for _, _, chance in rows)])
    plot = _plot(
        [curve],
        x,
        y,
        "Probability of having missed forged work, by its share; the table has the values",
        "share of the work that is forged",
        "missed with probability",
        share=True,
    )
    return [table, tag("figure", plot)]


def _workers(found: Found) -> Html:
    rows = rows_of(found.run.get("workers"))
    if not rows:
        return _section(
            "workers", "Workers", tag("p", "Nobody signed for this run: workers without keys sign nothing.")
        )
    whole = sum(count_of(row.get("units")) or 0 for row in rows)
    accused = (found.divergence.get("worker"), found.divergence.get("address"))
    lines = []
    for row in rows:
        units = count_of(row.get("units")) or 0
        share = units / whole if whole else 0.0
        bar = tag("span", tag("i", style=f"width:{100 * share:.1f}%"), class_="bar", aria_hidden="true")
        named = None not in accused and (row.get("worker"), row.get("address")) == accused
        name = [tag("bdi", row.get("worker")), [" ", _state("diverged", " at what it signed")] if named else None]
        lines.append((name, _digest(row.get("address")), row.get("steps"), row.get("units"), [_percent(share), bar]))
    columns = ("worker", "address", "steps", "units", "share of the units")
    intro = tag(
        "p",
        "A unit is one micro-batch through one stage of the model. After each step a worker signs for its units "
        "with the key of its address.",
    )
    return _section("workers", "Workers", intro, _table("What each worker signed for", columns, lines))


def _facts(found: Found) -> Html:
    run = found.run
    digests = (
        ("run digest", run.get("run_digest") or found.audit.get("run_digest")),
        *((name, run.get(key)) for name, key in (("recipe", "recipe"), ("data", "data"), ("program root", "program"))),
        *((name, run.get(key)) for name, key in (("initial state", "initial_state"), ("last state", "state"))),
    )
    terms = _terms(
        [
            ("run", tag("bdi", found.name)),
            *((key, run.get(key)) for key in ("status", "steps")),
            ("segments", f"{found.total:,}"),
            *((name, _digest(value)) for name, value in digests),
            *((key, run.get(key)) for key in ("engine", "version")),
        ]
    )
    return _section(
        "run",
        "The run",
        tag("p", "SHA-256 digests fix what was trained, on what, and what came out. A click selects a digest."),
        terms,
    )


def _commands(found: Found) -> Html:
    name = shlex.quote(found.name)
    name = f"-- {name}" if name.startswith("-") else name
    indices = [index for index in found.by_segment if index < found.total]
    every = len(indices) == found.total or not indices or len(indices) > 40
    units = [f"{check.index}:{check.worker}" for check in found.checks if check.worker is not None]
    if units and len(units) == len(found.checks) <= 40:
        every, chosen = False, f"--unit {shlex.quote(','.join(units))}"
    else:
        chosen = "--all" if every else f"--segments {','.join(map(str, indices))}"
    blocks = [
        ("See whether your machine computes exactly:", "trueweight doctor"),
        (
            f"Replay {'all segments' if every else 'the same'}, from a store that holds the run:",
            f"trueweight audit {chosen} {name}",
        ),
        ("Draw a sample of your own:", f"trueweight audit --sample 2 {name}"),
        ("Compare the digests above with your copy of the run:", f"trueweight show {name}"),
    ]
    if found.verdict == "diverged":
        first = next((index for index in found.by_segment if found.state(index) == "diverged"), None)
        narrowed = f"trueweight pinpoint {'' if first is None else f'--segment {first} '}{name}"
        blocks.insert(2, ("Narrow the difference down to the element and its signer:", narrowed))
    content = [[tag("p", say), tag("pre", tag("code", command))] for say, command in blocks]
    where = tag(
        "p", "Add --store with the store's folder or URL. A replay runs none of the submitter's code.", class_="soft"
    )
    return _section("check", "Check it yourself", *content, where)
