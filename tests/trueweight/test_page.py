import copy
import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.segments import History
from runtime.testing import tiny_job, train
from storage.store import memory_store
from trueweight import reports
from trueweight.junit import verdict_of
from trueweight.page import LEVELS, Axis, audit_page
from verification.audit import AuditReport, Diverged, SegmentAudit, audit
from verification.replay import Replay

Report = dict[str, Any]
ALWAYS = ["verdict", "segments", "loss", "sample", "workers", "run", "check"]
PAYLOAD = (
    """</script></style></title>--><img src="http://127.0.0.1:9/x" onerror="top.hacked=1"><svg onload='top.hacked=1'>"""
    """<script>top.hacked=1</script><iframe src=javascript:top.hacked=1></iframe>" onfocus=top.hacked=1 x='${x}&lt;"""
)


@pytest.fixture(scope="module")
def reported() -> tuple[Report, Report]:
    """What is said of the tiny run and of an audit of two of its three segments."""
    store = memory_store()
    train(store, tiny_job(store))
    report = audit(store, "tiny", lambda _, total: [0, 2], replay=lambda h: Replay(store, h.run, threads=1))
    return reports.run_report(History.open(store, "tiny")), reports.audit_report(report, seed=7)


@pytest.fixture
def run(reported: tuple[Report, Report]) -> Report:
    report = copy.deepcopy(reported[0])
    report["workers"] = [{"worker": f"s{i}r0", "address": f"0x{i:040x}", "steps": 5, "units": 20} for i in range(2)]
    return report


@pytest.fixture
def told(reported: tuple[Report, Report]) -> Report:
    return copy.deepcopy(reported[1]) | {
        "seconds": 1.5,
        "fetched_bytes": 2_500_000,
        "sample": {
            "strategy": "uniform",
            "beacon": "be" * 32,
            "rate": 0.5,
            "cost": 0.6,
            "missed": [{"share": share, "probability": (1 - share) ** 2} for share in (0.01, 0.1, 0.25, 0.5)],
        },
    }


def diverged(told: Report) -> Report:
    verdict = {"verdict": "diverged", "path": "segment 2/step 4/loss", "expected": "11" * 32, "actual": "22" * 32}
    return told | verdict | {"segments": [told["segments"][0], told["segments"][1] | verdict]}


def pinpointed() -> Report:
    at = ("segment 2", "step 4", "micro-batch 1, stage 1", "block 3, forward", "17 of 90", "leaf 0", "[0, 3, 17]")
    return {
        "run": "tiny",
        "segment": 2,
        "cause": "software or fraud",
        "repeat": "repeats",
        "reason": "three times the same",
        "path": [
            {"level": level, "at": place, "expected": "ee" * 32, "actual": "aa" * 32, "note": f"note on {level}"}
            for level, place in zip(LEVELS, at, strict=True)
        ],
        "worker": "s1r0",
        "address": f"0x{1:040x}",
        "signature": "51" * 65,
        "operator": "mul",
        "number": 17,
        "label": "blocks.3.attention.softmax, exp",
        "index": [0, 3, 17],
        "shape": [4, 8, 32],
        "expected": {"value": 0.12339998036623001, "bits": "0x3dfcb924"},
        "actual": {"value": 0.1234000027179718, "bits": "0x3dfcb927"},
    }


class Reader(HTMLParser):
    """A page as a browser without scripts sees it: elements, text by section, and whether all tags are closed."""

    EMPTY = ("meta", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    def ids(self) -> list[str]:
        return [found["id"] or "" for _, found in self.elements if not (found.get("id") or "-title").endswith("-title")]


def harmless(page: str) -> Reader:
    """The page read, after checking that it holds no markup but its own."""
    page.encode("utf-8")
    read = Reader(page)
    own = "html head meta title link style body header main footer section h1 h2 h3 p div span b i bdi code small"
    own += " ul ol li dl dt dd table caption thead tbody tr th td details summary figure figcaption"
    own += " svg rect line path pre mark"
    assert {tag for tag, _ in read.elements} <= set(own.split())
    for _, attributes in read.elements:
        assert not [
            key for key in attributes if key.startswith("on") or key in ("src", "srcdoc", "action", "xlink:href")
        ]
        assert attributes.get("href", "data:,") == "data:,"
        assert not re.search(r"url|expression|[^\w:.% -]", attributes.get("style") or "")
    assert page.count("<style>") == page.count("</style>") == 1
    return read


# ------------------------------------------------------------------------------------------------------------- content


def test_a_match_says_what_was_not_checked(run: Report, told: Report) -> None:
    read = harmless(audit_page(run, told))
    assert read.ids() == ALWAYS
    assert "What was checked came out identical: 2 of 3 segments of this run were computed again." in read.text
    assert "1 segment, 33.3 % of the run, was not replayed: 1." in read.text
    cells = [found["title"] for found in read.all("span") if "title" in found]
    assert cells == [
        "segment 0, steps 0 to 1, replayed: match",
        "segment 1, steps 2 to 3, not replayed",
        "segment 2, step 4, replayed: match",
    ]
    for key in ("run_digest", "recipe", "data", "program", "initial_state", "state"):
        assert run[key] in read.text
    for fact in (
        "uniform: all that could be drawn",
        "be" * 32,
        "60 % of the run's computation",
        "1.5 s",
        "2.5 MB",
        "0x" + "0" * 39 + "1",
    ):
        assert fact in read.text
    assert "10 % of the work" in read.text
    assert "81 %" in read.text
    assert "trueweight audit --segments 0,2 tiny" in read.text
    assert len(read.all("figure")) == 2


def test_a_complete_audit_says_so(run: Report, told: Report) -> None:
    every = [{**told["segments"][0], "index": index} for index in range(3)]
    read = harmless(audit_page(run, told | {"segments": every}))
    assert "All of this run, 3 segments, was computed again and came out identical." in read.text
    assert "not replayed:" not in read.text
    assert "trueweight audit --all tiny" in read.text


def test_a_divergence_is_a_path_to_a_number_and_its_signer(run: Report, told: Report) -> None:
    read = harmless(audit_page(run, diverged(told), pinpointed()))
    assert read.ids() == ["verdict", "divergence", *ALWAYS[1:]]
    assert "it comes out differently, first at segment 2, step 4." in read.text
    for level, meaning in LEVELS.items():
        assert f"{level} " in read.text
        assert f" - {meaning}" in read.text
        assert f"note on {level}" in read.text
    assert "2 of its 32 bits, underlined; sign, exponent and fraction" in read.text
    assert len(read.all("mark")) == 4
    for fact in ("0x3dfcb924", "0x3dfcb927", "mul, number 17", "[0, 3, 17] of an array of 4 x 8 x 32", "51" * 65):
        assert fact in read.text
    assert "Cause: software or fraud" in read.text
    assert "s1r0 ✕ diverged at what it signed" in read.text
    assert "Do not rely on this page" not in read.text
    assert "trueweight pinpoint --segment 2 tiny" in read.text


def test_a_divergence_that_was_not_narrowed_shows_where_it_stops(run: Report, told: Report) -> None:
    read = harmless(audit_page(run, diverged(told)))
    assert "leaf not narrowed down to" in read.text
    assert "step not narrowed down to" not in read.text
    assert "11" * 32 in read.text
    partial = {
        key: value for key, value in pinpointed().items() if key in ("run", "segment", "cause", "path", "worker")
    }
    read = harmless(audit_page(run, diverged(told), partial | {"cause": "record", "path": partial["path"][:2]}))
    assert "unit not narrowed down to" in read.text
    assert "The element" not in read.text
    assert "What the workers signed gives no cause for it" in read.text


def test_bits_of_another_width_are_compared_from_the_right(run: Report, told: Report) -> None:
    sides = {"expected": {"value": 3, "bits": "0x03"}, "actual": {"value": -1, "bits": "0xffff"}}
    read = harmless(audit_page(run, diverged(told), pinpointed() | sides))
    assert "14 of its 16 bits" in read.text
    assert "exponent" not in read.text


def test_reports_of_different_runs_are_not_to_be_relied_on(run: Report, told: Report) -> None:
    for other in (
        (run | {"run_digest": "00" * 32}, told, None),
        (run, diverged(told), pinpointed() | {"run": "another"}),
        (run, told, pinpointed()),
    ):
        assert "Do not rely on this page" in harmless(audit_page(*other)).text


def test_a_part_of_a_segment_is_no_segment(run: Report, told: Report) -> None:
    lines = [told["segments"][0] | {"worker": "s0r0"}, told["segments"][1] | {"worker": "s1r0"}]
    read = harmless(audit_page(run, told | {"segments": lines}))
    assert "it is a small part of this run: no more than parts of 2 of 3 segments." in read.text
    assert "Of 2 segments only a part was replayed" in read.text
    assert len(read.all("span", class_="cell match part")) == 3
    assert "what s1r0 signed in the first step" in read.text
    assert f"trueweight audit --unit {lines[0]['index']}:s0r0,{lines[1]['index']}:s1r0 tiny" in read.text
    lines = [told["segments"][0] | {"steps_replayed": 1}, told["segments"][1], told["segments"][1] | {"index": 7}]
    read = harmless(audit_page(run, told | {"segments": lines}))
    assert "What was checked came out identical: 1 of 3 segments of this run was computed again." in read.text
    assert "Of 1 segment only a part was replayed" in read.text


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"segments": []}, "inconclusive"),
        ({"verdict": "MATCH"}, "inconclusive"),
        ({"verdict": "diverged"}, "diverged"),
        ({"verdict": "inconclusive", "reason": "object 12ab is missing"}, "inconclusive"),
        ({"segments": [{"index": 0, "verdict": "match"}, {"index": 1, "verdict": "diverged"}]}, "diverged"),
        ({"segments": [{"index": 0, "verdict": "match"}, {"index": -1, "verdict": "no such"}]}, "inconclusive"),
    ],
)
def test_only_a_match_looks_like_one(run: Report, told: Report, change: Report, verdict: str) -> None:
    read = harmless(audit_page(run, told | change))
    assert read.all("div", class_=f"verdict {verdict}")
    assert "came out identical:" not in read.text
    assert change.get("reason", "") in read.text


def test_infinite_and_missing_losses_leave_a_gap(run: Report, told: Report) -> None:
    run["losses"] = [{"step": step, "loss": 3.0 - step / 10} for step in range(6)]
    run["losses"][2]["loss"] = math.nan
    run["losses"][3]["loss"] = math.inf
    del run["losses"][4]["loss"]
    read = harmless(audit_page(run, told))
    line = read.all("path", class_="training")[1]
    assert (line["d"] or "").count("M") == 2
    assert "3 values not finite or missing" in read.text
    assert not re.search(r"\b(nan|inf)\b", read.text)
    run["losses"] = [{"step": 0, "loss": math.nan}]
    assert "no loss that can be drawn" in harmless(audit_page(run, told)).text


@pytest.mark.parametrize("count", [1, 40, 41, 400, 5000, 12_345])
def test_runs_of_any_length(run: Report, told: Report, count: int) -> None:
    row, line = run["segments"][0], told["segments"][0]
    run["segments"] = [row | {"index": i, "first_step": 2 * i} for i in range(count)]
    run["losses"] = [{"step": step, "loss": 5.0 + math.sin(step)} for step in range(2 * count)]
    told |= {"total": count, "segments": [line | {"index": i, "first_step": 2 * i} for i in range(0, count, 3)]}
    page = audit_page(run, told)
    read = harmless(page)
    cells = [found for found in read.all("span") if (found.get("class") or "").startswith("cell ") and "title" in found]
    assert len(cells) == min(count, -(-count // -(-count // 5000)))
    assert ("Each cell stands for 3 segments" in read.text) == (count > 5000)
    assert len(page) < 60_000 + 1_100 * count
    curve = read.all("path", class_="training")[1]
    assert 0 < len(curve["d"] or "") < 20 * 700


def test_a_spike_survives_the_thinning(run: Report, told: Report) -> None:
    run["losses"] = [{"step": step, "loss": 9.0 if step == 77_777 else 1.0} for step in range(100_000)]
    curve = harmless(audit_page(run, told)).all("path", class_="training")[1]
    assert min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", curve["d"] or "")) < 100


def test_equal_reports_give_equal_pages(run: Report, told: Report) -> None:
    again = {key: copy.deepcopy(told[key]) for key in reversed(told)}
    assert audit_page(run, diverged(told), pinpointed()) == audit_page(
        copy.deepcopy(run), diverged(again), pinpointed()
    )


@pytest.mark.parametrize("name", ["a run's; rm -rf /", "--store=x"])
def test_a_name_is_quoted_in_commands(run: Report, told: Report, name: str) -> None:
    told["run"] = run["run"] = name
    text = harmless(audit_page(run, told)).text
    assert {"--store=x": "0,2 -- --store=x\n"}.get(name, "0,2 'a run'\"'\"'s; rm -rf /'") in text.replace(
        "Draw", "\nDraw"
    )


@settings(deadline=None)
@given(st.floats(-1e99, 1e99), st.floats(-1e99, 1e99), st.integers(2, 8), st.booleans())
def test_ticks_are_few_and_on_the_axis(a: float, b: float, count: int, whole: bool) -> None:
    axis = Axis.over([a, b], 0.05)
    ticks = axis.ticks(count, whole=whole)
    assert len(ticks) <= 2 * count + 2
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    assert all(0 <= axis.place(value) <= 1000 for value in (a, b, *ticks))


def test_an_audited_divergence_is_told_from_the_audit_itself(run: Report) -> None:
    verdict = Diverged(path="segment 1/step 3/state_root", expected="11", actual="22")
    line = SegmentAudit(index=1, first_step=2, steps=2, prestate="aa", poststate="bb", receipts=0, verdict=verdict)
    report = AuditReport(run="tiny", run_digest=run["run_digest"], total=3, segments=(line,), verdict=verdict)
    text = harmless(audit_page(run, reports.audit_report(report, seed=None))).text
    assert "first at segment 1, step 3." in text
    assert "chosen by the auditor, not drawn at random" in text
    assert "state_root not narrowed" not in text


# ------------------------------------------------------------------------------------------------------------ strangers


def poisoned(value: Any, keep: tuple[str, ...] = ()) -> Any:
    """The value with every string replaced, except those under the names to keep."""
    if isinstance(value, dict):
        return {key: item if key in keep else poisoned(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, keep) for item in value]
    return PAYLOAD if isinstance(value, str) else value


@pytest.mark.parametrize("keep", [(), ("verdict", "level", "strategy", "bits", "run_digest")])
def test_strangers_write_text_only(run: Report, told: Report, keep: tuple[str, ...]) -> None:
    reports = (poisoned(value, keep) for value in (run, diverged(told), pinpointed()))
    read = harmless(audit_page(*reports))
    assert read.text.count(PAYLOAD) > 30


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.just(PAYLOAD)
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """The value with any of its parts left out or replaced by anything."""
    fate = draw(st.integers(0, 12))
    if fate == 0:
        return draw(VALUES)
    if isinstance(value, dict):
        return {key: draw(mutated(item)) for key, item in value.items() if draw(st.integers(0, 12))}
    if isinstance(value, list):
        return [draw(mutated(item)) for item in value]
    return value


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_values_break_the_page(reported: tuple[Report, Report], data: st.DataObject) -> None:
    run = data.draw(mutated(reported[0]))
    told = data.draw(mutated(diverged(reported[1])))
    divergence = data.draw(st.none() | mutated(pinpointed()))
    page = audit_page(run, told, divergence)
    read = harmless(page)
    assert [name for name in read.ids() if name != "divergence"] == ALWAYS
    assert bool(read.all("div", class_="verdict match")) == (isinstance(told, dict) and verdict_of(told) == "match")
    assert audit_page(run, told, divergence) == page


@pytest.mark.parametrize("nothing", [{}, None, [], "run", 3])
def test_nothing_gives_a_page(nothing: Any) -> None:
    read = harmless(audit_page(nothing, nothing, nothing))
    assert read.ids() == ALWAYS
    assert read.all("div", class_="verdict inconclusive")


# --------------------------------------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
VENDORS = (".google.com", ".googleapis.com")
"""Whom the browser itself asks for updates, in vain here."""

HARNESS = """<!doctype html><meta charset="utf-8"><body><pre id="out"></pre><script>
const cases = %s, found = [];
function colour(text) {
  const c = text.match(/[\\d.]+/g).map(Number);
  return {rgb: c.slice(0, 3), alpha: c.length > 3 ? c[3] : 1};
}
function light(rgb) {
  const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrasts(doc, view) {
  const low = [], walk = doc.createTreeWalker(doc.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || element.closest('svg') || !element.getClientRects().length) continue;
    let under = element;
    const clear = e => colour(view.getComputedStyle(e).backgroundColor).alpha < 1;
    while (under.parentElement && clear(under)) under = under.parentElement;
    const style = view.getComputedStyle(element);
    if (style.fontSize === '0px') continue;
    const [a, b] = [light(colour(style.color).rgb), light(colour(view.getComputedStyle(under).backgroundColor).rgb)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([ratio, style.color, element.className, walk.currentNode.data.slice(0, 40)]);
  }
  return low;
}
async function measure([width, html]) {
  const frame = document.createElement('iframe');
  frame.style = `width:${width}px;height:900px;border:0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.srcdoc = html;
  document.body.append(frame);
  await loaded;
  const doc = frame.contentDocument, view = frame.contentWindow;
  await new Promise(done => setTimeout(done, 50));
  found.push({
    width: doc.documentElement.clientWidth, wide: Math.max(doc.documentElement.scrollWidth, doc.body.scrollWidth),
    ids: [...doc.querySelectorAll('[id]')].map(e => e.id).filter(id => !id.endsWith('-title')),
    scripts: doc.querySelectorAll('script, iframe, img, object, [onerror], [onload]').length,
    dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
    paper: view.getComputedStyle(doc.body).backgroundColor,
    tall: [...doc.querySelectorAll('.plot > svg')].map(e => e.getBoundingClientRect().height),
    low: contrasts(doc, view),
  });
  frame.remove();
}
(async () => {
  for (const one of cases) await measure(one);
  document.getElementById('out').textContent = JSON.stringify({found, hacked: window.hacked === 1});
})();
</script>"""


@dataclasses.dataclass(frozen=True)
class Browser:
    """A headless browser with a profile of its own that resolves no names."""

    folder: Path

    def load(self, page: Path, *options: str) -> tuple[str, list[str], set[str]]:
        """The page's DOM after a while, what its console said, and the URLs that were asked for."""
        log = self.folder / "net.json"
        resolve = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
        mode = ("--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", resolve, *quiet)
        where = (f"--user-data-dir={self.folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr")
        ended = subprocess.run(
            [str(CHROMIUM), *mode, *where, *options, "--virtual-time-budget=20000", "--dump-dom", page.as_uri()],
            capture_output=True,
            check=True,
            timeout=120,
        )
        said = [line for line in ended.stderr.decode("utf-8", "replace").splitlines() if ":CONSOLE" in line]
        asked = {
            event["params"]["url"]
            for event in json.loads(log.read_text("utf-8"))["events"]
            if "url" in event.get("params", {})
        }
        return (
            ended.stdout.decode("utf-8"),
            said,
            {url for url in asked if not (urlsplit(url).hostname or "").endswith(VENDORS)},
        )

    def measure(self, cases: list[tuple[int, str]], *options: str) -> tuple[list[dict[str, Any]], bool]:
        """What the harness finds in each page at its width, and whether any page ran a script."""
        harness = self.folder / "harness.html"
        harness.write_text(
            HARNESS % json.dumps(cases).replace("</", "<\\/").replace("<!--", "<\\!--"), encoding="utf-8"
        )
        dom, said, asked = self.load(harness, *options)
        assert (said, asked) == ([], set())
        (out,) = re.findall(r'<pre id="out">(.+?)</pre>', dom, re.DOTALL)
        told = json.loads(out)
        return told["found"], told["hacked"]


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


@pytest.fixture
def pages(run: Report, told: Report) -> dict[str, str]:
    many = run | {"segments": [run["segments"][0] | {"index": i, "first_step": 2 * i, "steps": 2} for i in range(1500)]}
    lines = [told["segments"][0] | {"index": i, "first_step": 2 * i} for i in range(0, 1500, 7)]
    lines[3] |= {"verdict": "inconclusive", "reason": "no memory"}
    hostile = [poisoned(value, ("verdict", "level", "bits")) for value in (run, diverged(told), pinpointed())]
    return {
        "match": audit_page(run, told),
        "diverged": audit_page(run, diverged(told), pinpointed()),
        "many": audit_page(many, told | {"total": 1500, "segments": lines}),
        "hostile": audit_page(*hostile),
        "empty": audit_page({}, {}),
    }


@in_browser
def test_a_browser_opens_the_file_and_asks_for_nothing(browser: Browser, pages: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for name, page in pages.items():
        path.write_text(page, encoding="utf-8")
        dom, said, asked = browser.load(path)
        assert (said, asked) == ([], set()), name
        assert [found for found in re.findall(r'id="(\w+)"', dom) if found != "divergence"] == ALWAYS
        assert "Trueweight audit report" in dom
    path.write_text(
        '<!doctype html><img src="http://127.0.0.1:9/x"><script>console.error("no")</script>', encoding="utf-8"
    )
    _, said, asked = browser.load(path)
    assert asked == {"http://127.0.0.1:9/x"}, "the browser no longer says what it asks for"
    assert len(said) == 1


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_can_be_read(browser: Browser, pages: dict[str, str], scheme: str) -> None:
    cases = [(width, page) for page in pages.values() for width in (320, 390, 1280)]
    found, hacked = browser.measure(cases, f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    assert not hacked
    assert len(found) == len(cases)
    for (width, _), seen in zip(cases, found, strict=True):
        assert seen["dark"] == (scheme == "dark")
        assert 0 < seen["width"] <= width
        assert seen["wide"] <= seen["width"], f"{width} px: the page is wider than its window"
        assert [name for name in seen["ids"] if name != "divergence"] == ALWAYS
        assert seen["scripts"] == 0
        assert all(height > 100 for height in seen["tall"])
        assert seen["low"] == []
    assert len({seen["paper"] for seen in found}) == 1


@in_browser
def test_the_harness_sees_what_it_looks_for(browser: Browser, pages: dict[str, str]) -> None:
    page = pages["match"]
    pale, wide = (page.replace("</style>", f"{rule}</style>") for rule in ("dt {color: #ccc}", "dl {width: 500px}"))
    found, _ = browser.measure([(390, pale), (390, wide)], "--blink-settings=preferredColorScheme=1")
    assert len(found[0]["low"]) == page.count("<dt>")
    assert found[1]["wide"] > found[1]["width"]


@in_browser
def test_escaping_holds_without_the_policy(browser: Browser, pages: dict[str, str]) -> None:
    bare, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", pages["hostile"])
    assert count == 1
    found, hacked = browser.measure([(1280, bare)])
    assert not hacked
    assert found[0]["scripts"] == 0
    live = bare.replace("<body>", "<body><svg onload='top.hacked=1'></svg>")
    assert browser.measure([(1280, live)])[1], "the harness no longer sees a script that runs"
    guarded = pages["hostile"].replace("<body>", "<body><svg onload='top.hacked=1'></svg>")
    path = browser.folder / "guarded.html"
    path.write_text(guarded, encoding="utf-8")
    assert any("Content Security Policy" in line for line in browser.load(path)[1])
