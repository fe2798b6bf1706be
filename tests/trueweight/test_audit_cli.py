"""`trueweight audit`: what is drawn and replayed, where, beside what, and how it is told."""

import dataclasses
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from math import comb
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from runtime.executors import reference
from runtime.faults import Fault, faulty_builder
from runtime.groups import LocalGroup
from runtime.segments import History, head_name
from runtime.testing import plan_for, remembered, tiny_job, train
from runtime.worker import worker_builder
from storage.errors import FailureError
from storage.objects import MemoryObjects
from storage.remote import FsspecObjects
from storage.store import CHECKPOINTS, Store, memory_store, open_store
from trueweight import audit_cli, forecasting
from trueweight.auditing import Auditor, ReadObjects, make_beacon, unit_candidates
from trueweight.cli import main
from trueweight.following import Follower
from verification.audit import Diverged, Inconclusive, Match
from verification.replay import Replay
from verification.sampling import Candidate, Piece, chained_beacon, chosen, draw, seed_beacon

SKIP = Fault(kind="skip", step=2, worker="s1r1", micro_batch=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an honest run, `tiny`, and one whose worker s1r1 left a micro-batch out in step 2, `faulty`."""
    folder = tmp_path_factory.mktemp("trained")
    store = open_store(str(folder / "store"), create=True)
    keys = str(folder / "home" / ".trueweight" / "keys")
    for name, group in (("tiny", None), ("faulty", LocalGroup(faulty_builder(remembered, [SKIP])))):
        job = tiny_job(store, name=name)
        train(store, job, plan=plan_for(job, stages=2, replicas=2), keys=keys, group=group)
    return folder / "store"


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run that was stopped after three steps; its worker had no key."""
    folder = tmp_path_factory.mktemp("keyless")
    store = open_store(str(folder), create=True)
    train(store, tiny_job(store), stop_before=3)
    return folder


@pytest.fixture
def told(trained: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The JSON of an audit with these options, whose exit code is `code`."""

    def run(name: str, *options: object, code: int = 0, store: object = trained) -> Any:
        fixed = ("--store", str(store), "--executor", "reference", "--json")
        capsys.readouterr()
        assert main(["audit", name, *map(str, options), *fixed]) == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def copied(folder: Path, status: str = "finished") -> Store:
    """A copy of the store in memory, in which the honest run has that status."""
    source, copy = open_store(str(folder), create=False).objects, MemoryObjects()
    for found in source.list(""):
        copy.create(found.key, source.read(found.key) or b"")
    store = Store(copy)
    History.open(store, "tiny").mark(status)
    return store


def history_of(folder: Path, name: str = "tiny") -> History:
    return History.open(open_store(str(folder), create=False), name)


# ------------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rate 0.5 --sample 2", "got --sample and --rate; drop the others"),
        ("--all --unit 0:s0r0", "got --all and --unit; drop the others"),
        ("--all --seed 3", "--seed: expected --rate 0.1 with it; add that, or drop --seed"),
        ("--segments 1 --strategy risk --units", "or drop --strategy and --units"),
        ("--rate 1.5", "--rate 1.5: expected more than 0 and at most 1"),
        ("--sample 0", "--sample 0: expected at least 1"),
        ("--rate 0.5 --strategy even", "--strategy 'even': expected one of uniform, stratified, risk; choose one"),
        ("--beacon chained --seed 4", "--seed 4: expected --beacon seed with it"),
        ("--beacon xyz", "--beacon 'xyz': expected bytes in hex, `seed` or `chained`; correct it"),
        ("--seed 18446744073709551616", "--seed 18446744073709551616: expected 0 to 2^64 - 1"),
        ("--unit s0r0", "--unit 's0r0': expected a segment and a worker such as 3:s0r1; correct it"),
        ("--unit 0:s9r9", "expected a worker that signed its first step (s0r0, s0r1, s1r0, s1r1), got 's9r9'"),
        ("--unit 7:s0r0", "segment 7: expected one of the run's 3 committed segments"),
        ("--segments 7", "--segments 7: expected segments below 3"),
        ("--poll 1", "--poll: expected --follow with it"),
        ("--keep-going", "--keep-going: expected --follow with it"),
        ("--follow", "--follow: expected --rate R"),
        ("--follow --rate 0.5 --poll 0", "a --poll above 0"),
        ("--follow --rate 0.5 --units", "whole segments"),
        ("--unit 0:s0r0 --workers 2", "--workers 2: expected at least 1, and segments"),
        ("--workers 0", "--workers 0: expected at least 1"),
        ("--dry-run --follow --rate 0.5", "--dry-run: expected only what to audit"),
        ("--dry-run --workers 2", "--dry-run: expected only what to audit"),
        ("--dry-run --unit 7:s0r0", "segment 7: expected one of the run's 3 committed segments"),
        ("--html absent/report.html", "expected a folder to write it in, got none; make the folder first"),
    ],
)
def test_options_that_do_not_go_together(
    trained: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert main(["audit", "tiny", "--store", str(trained), "--executor", "reference", *options.split()]) == 64
    assert message in capsys.readouterr().err


def test_segments_are_drawn_as_the_sample_says(trained: Path, told: Callable[..., Any]) -> None:
    history = history_of(trained)
    assert history.head.segment is not None
    beacons = {
        "--seed 5": seed_beacon(5),
        "--beacon chained": chained_beacon(history.run_digest, history.head.segment),
        "--beacon 0xabcd": bytes.fromhex("abcd"),
    }
    for option, beacon in beacons.items():
        report = told("tiny", "--rate", "0.3", *option.split())
        offered = [Candidate(piece=Piece(index)) for index in range(3)]
        drawn = draw(offered, beacon=beacon, run=history.run_digest, rate=0.3)
        assert report["sample"]["pieces"] == [str(piece.segment) for piece in drawn.pieces]
        assert [row["index"] for row in report["segments"]] == [piece.segment for piece in drawn.pieces]
        assert report["sample"]["beacon"] == beacon.hex()
        assert report["sample"]["missed"][0] == {"share": 0.01, "forged": 1, "probability": pytest.approx(2 / 3)}
        steps = sum(row["steps_replayed"] for row in report["segments"])
        assert (report["steps"], report["steps_replayed"], report["sample"]["cost"]) == (5, steps, steps / 5)
        assert 1e5 < report["fetched_bytes"] < 1e7
        assert report["seconds"] > 0
        assert report["peak_bytes"] > 1e7


def test_a_fresh_seed_draws_the_same_again(told: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    first = told("tiny")
    assert first["sample"]["count"] == 1
    again = told("tiny", "--sample", "1", "--seed", first["seed"])
    assert again["sample"] == first["sample"]


@pytest.mark.parametrize("strategy", ["uniform", "stratified", "risk"])
def test_units_are_drawn_by_every_strategy(trained: Path, told: Callable[..., Any], strategy: str) -> None:
    count = 4 if strategy == "stratified" else 2
    report = told("tiny", "--sample", count, "--units", "--strategy", strategy, "--seed", "3")
    history = history_of(trained)
    offered = unit_candidates(history, history.segments())
    assert len(offered) == 12
    drawn = draw(offered, beacon=seed_beacon(3), run=history.run_digest, count=count, strategy=strategy)
    assert report["sample"]["pieces"] == [f"{piece.segment}:{piece.worker}" for piece in drawn.pieces]
    assert [row["verdict"] for row in report["segments"]] == ["match"] * count
    if strategy == "stratified":
        assert {row["worker"] for row in report["segments"]} == {"s0r0", "s0r1", "s1r0", "s1r1"}
    assert (report["sample"]["of"], report["sample"]["candidates"], report["units_replayed"]) == (
        "units",
        12,
        2 * count,
    )
    assert (report["replayed"], report["total"], report["planned"]) == (0, 3, 3)
    assert report["sample"]["cost"] == pytest.approx(count / 4 / 5)
    assert report["sample"]["missed"][2]["probability"] == pytest.approx(comb(10, count) / comb(12, count))


def test_a_dry_run_draws_as_the_audit_does_and_says_what_it_takes(
    told: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trained: Path,
) -> None:
    monkeypatch.setattr(forecasting, "FOLDER", str(tmp_path))
    for options in (("--rate", "0.5"), ("--rate", "0.3", "--strategy", "stratified")):
        foreseen = told("tiny", *options, "--seed", "5", "--dry-run")
        made = told("tiny", *options, "--seed", "5")
        assert [(row["segment"], row.get("worker")) for row in foreseen["pieces"]] == [
            (row["index"], row.get("worker")) for row in made["segments"]
        ]
        assert foreseen["of"] == made["sample"]["candidates"]
        pieces = sum(row["seconds"] for row in foreseen["pieces"])
        assert foreseen["seconds"] == pytest.approx(foreseen["start"] + pieces)
        assert foreseen["start"] > 0
        units = [row["units"] for row in foreseen["pieces"] if "units" in row]
        assert units == [row["units_replayed"] for row in made["segments"] if "units_replayed" in row]
    assert len(list(tmp_path.iterdir())) == 1  # the profile is kept
    assert main(["audit", "tiny", "--store", str(trained), "--executor", "reference", "--dry-run", "--seed", "5"]) == 0
    said = capsys.readouterr().out
    assert "would take" in said
    assert "the same draw: --seed 5" in said


def test_newcomers_weigh_more(trained: Path) -> None:
    history = history_of(trained)
    weights = {(c.piece.segment, c.piece.worker): c.weight for c in unit_candidates(history, history.segments())}
    assert weights[0, "s0r0"] == 5
    assert weights[1, "s0r0"] == pytest.approx(1 + 4 * 100 / 102)
    assert weights[2, "s1r1"] == pytest.approx(1 + 4 * 100 / 104)


def test_units_of_workers_without_keys_cannot_be_drawn(keyless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in (("--units", "expected receipts, got none"), ("--unit=0:s0r0", "(nobody)")):
        assert main(["audit", "tiny", "--store", str(keyless), "--executor", "reference", option]) == 64
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- units, pinpoint


def test_a_unit_of_an_honest_and_of_a_faulty_worker(told: Callable[..., Any]) -> None:
    report = told("faulty", "--unit", "1:s1r0,0:s1r1,0:s0r1")
    assert [(row["index"], row["worker"]) for row in report["segments"]] == [(0, "s0r1"), (0, "s1r1"), (1, "s1r0")]
    assert report["sample"]["missed"] == report["missed"] == []
    report = told("faulty", "--unit", "1:s1r1", code=1)
    assert report["path"] == "segment 1/step 2/s1r1/micro-batch 1/y"
    assert report["segments"][0]["address"].startswith("0x")
    assert report["segments"][0]["seconds"] > 0


def test_a_unit_that_cannot_be_replayed_is_inconclusive(
    trained: Path, told: Callable[..., Any], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    segments = history_of(copy).segments()
    (copy / f"{CHECKPOINTS}{segments[0].poststate.hex()}").unlink()
    report = told("tiny", "--unit", "0:s0r0,1:s0r0", code=2, store=copy)
    assert [row["verdict"] for row in report["segments"]] == ["match", "inconclusive"]
    assert segments[0].poststate.hex() in report["reason"]
    receipts = segments[1].receipts_object.hex()
    (copy / "objects" / receipts[:2] / receipts[2:]).unlink()
    for options in (("--unit", "1:s0r0"), ("--strategy", "risk")):
        assert receipts in told("tiny", *options, code=2, store=copy)["reason"]


def test_a_receipt_that_was_not_committed_to_accuses_the_record(trained: Path, told: Callable[..., Any]) -> None:
    store = open_store(str(trained), create=False)
    history = History.open(store, "tiny")
    made = History.start(store, dataclasses.replace(history.run, name="moved"))
    position = dataclasses.replace(history.position(), index=0, first_step=0, prestate=history.run.initial_state)
    first = history.segments()[0]
    items = {"steps": history.items(first.steps_object), "receipts": history.items(first.receipts_object)}
    made.commit(dataclasses.replace(position, poststate=first.poststate, **items), "running")
    report = told("moved", "--unit", "0:s0r0", code=1)
    assert report["path"] == "segment 0/step 0/receipt of s0r0"
    store.swap(head_name("moved"), store.read(head_name("moved")), None)


def test_a_divergence_is_pinpointed_and_everything_is_written(
    trained: Path,
    told: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    html, xml = tmp_path / "report.html", tmp_path / "report.xml"
    report = told("faulty", "--unit", "1:s1r1", "--pinpoint", "--html", html, "--junit", xml, code=1)
    found = report["divergence"]
    assert (found["worker"], found["segment"], found["cause"]) == ("s1r1", 1, "unavailable")
    assert found["path"][2]["at"] == "s1r1, micro-batch 1, forward: y"
    page = html.read_text("utf-8")
    assert found["signature"] in page
    assert "chosen by the auditor" in page
    assert f"{report['fetched_bytes'] / 1e6:,.1f} MB" in page
    suite = ET.parse(xml).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "1", "0")
    lines: list[str] = []
    audit_cli.print_audit(lines.append, report)
    assert "  path: segment 1/step 2/s1r1/micro-batch 1/y" in lines
    assert any(line.startswith("signed by worker s1r1 0x") for line in lines)


def test_a_match_is_told_to_people(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    options = ["--strategy", "risk", "--sample", "1", "--seed", "2", "--pinpoint", "--html", str(html)]
    assert main(["audit", "tiny", *options, "--store", str(trained), "--executor", "reference"]) == 0
    out = capsys.readouterr().out
    assert "replayed what 1 receipt of first steps say: 2 units" in out
    assert "cost: 0.25 of 5 steps (5.0%), " in out
    assert "drew 1 of 12 units with --sample 1 --strategy risk --seed 2" in out
    assert "10%" in out
    assert out.endswith("verdict: match\n")
    assert "risk: what was judged riskier" in html.read_text("utf-8")


def test_others_replay_where_they_are_asked_for(
    trained: Path, told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def spread(**given: Any) -> Iterator[Any]:
        asked.append(given)
        yield from ()

    monkeypatch.setattr("verification.actors.spread", spread)
    report = told("tiny", "--segments", "0,2", "--workers", "3", "--address", "10.0.0.1:6379", code=2)
    assert report["reason"] == "segment 0: no verifier came back with it"
    assert (report["fetched_bytes"], report["peak_bytes"]) == (None, None)
    (given,) = asked
    assert callable(given.pop("observe"))
    assert given == {
        "store_url": str(trained),
        "name": "tiny",
        "indexes": [0, 2],
        "executor": "reference",
        "threads": 1,
        "workers": 3,
        "address": "10.0.0.1:6379",
    }


# ----------------------------------------------------------------------------------------------------- stores elsewhere


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(trained: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(trained)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_over_the_web_and_a_server_that_goes_away(
    web: ThreadingHTTPServer, told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{web.server_port}"
    here, there = (told("tiny", "--segments", "1", **where) for where in ({}, {"store": url}))
    assert (there["verdict"], there["fetched_bytes"]) == ("match", here["fetched_bytes"])

    monkeypatch.setitem(FsspecObjects.__init__.__kwdefaults__, "deadline", 0.1)
    monkeypatch.setattr("storage.remote._FIRST_PAUSE", 0.01)
    load = Replay.load

    def loading(self: Replay, state: bytes) -> None:
        web.shutdown()
        web.server_close()
        load(self, state)

    monkeypatch.setattr(Replay, "load", loading)
    report = told("tiny", "--segments", "0,1", code=2, store=url)
    assert [row["verdict"] for row in report["segments"]] == ["match", "inconclusive"]
    assert "then run the command again" in report["reason"]
    assert report["missed"] == report["sample"]["missed"] == []


def test_an_audit_cannot_write() -> None:
    objects = MemoryObjects()
    objects.create("a", b"123")
    reading = ReadObjects(objects)
    assert (reading.read("a", 1), reading.read("b"), reading.fetched, str(reading)) == (b"23", None, 2, "memory://")
    assert [found.key for found in reading.list("")] == ["a"]
    assert reading.find("a") == objects.find("a")
    for act in (reading.create, reading.replace):
        with pytest.raises(FailureError, match="expected an audit to write nothing"):
            act("c", b"")
    with pytest.raises(FailureError, match="a in memory"):
        reading.delete("a")


# ------------------------------------------------------------------------------------------------------------ following


def follower(store: Store, *, rate: float = 1.0, seed: int = 1, **given: Any) -> tuple[Follower, list[str]]:
    """A follower of `tiny` that waits for nothing and is never stopped, and what it is going to tell."""
    lines: list[str] = []

    def replay(history: History) -> Replay:
        return Replay(history.store, history.run, build=worker_builder(reference))

    settings = {"keep_going": False, "wait": lambda: None, "stop": lambda: False} | given
    looks, wait = iter(range(20)), settings["wait"]
    settings["wait"] = lambda: (next(looks), wait())  # ends what would wait for ever
    auditor = Auditor(store=store, name="tiny", replay=replay, executor=partial(reference, 1))
    made = Follower(auditor=auditor, rate=rate, beacon=make_beacon(None, seed), tell=lines.append, **settings)
    return made, lines


def test_a_run_is_followed_while_it_is_written() -> None:
    store = memory_store()
    job = tiny_job(store)
    stops = iter((4, None))
    train(store, job, stop_before=1)
    following, lines = follower(store, wait=lambda: train(store, job, stop_before=next(stops)))
    audited = following.run()
    assert audited.verdict == Match()
    assert [segment.index for segment in audited.report.segments] == [0, 1, 2]
    assert (audited.report.total, audited.report.planned, audited.replayed, audited.steps) == (3, 3, 5, 5)
    assert [line.split(":")[0] for line in lines] == [
        "the run is interrupted; waiting for it to go on",
        "segment 0, steps 0 to 1",
        "segment 1, steps 2 to 3",
        "segment 2, steps 4 to 4",
    ]


def test_what_a_stream_takes_is_a_function_of_beacon_run_and_rate(trained: Path) -> None:
    store = copied(trained)
    run = History.open(store, "tiny").run_digest
    taken = {
        seed: [i for i in range(3) if chosen(Piece(i), beacon=seed_beacon(seed), run=run, chance=0.3)]
        for seed in range(40)
    }
    nothing = next(seed for seed, expected in taken.items() if not expected)
    verdict = follower(store, rate=0.3, seed=nothing)[0].run().verdict
    assert isinstance(verdict, Inconclusive)
    assert "the draw took none of 3" in verdict.reason
    one = next(seed for seed, expected in taken.items() if expected == [1])
    audited = follower(store, rate=0.3, seed=one)[0].run()
    assert [segment.index for segment in audited.report.segments] == [1]
    assert audited.selection is not None
    assert audited.selection.miss(0.2) == pytest.approx(0.7)
    assert audited.selection.miss(0.5) == pytest.approx(0.49)


def test_following_from_the_command_line(
    trained: Path, told: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    history = history_of(trained)
    assert history.head.segment is not None
    digests = [segment.previous for segment in history.segments()[1:]] + [history.head.segment]
    run = history.run_digest
    expected = [
        index
        for index, digest in enumerate(digests)
        if chosen(Piece(index), beacon=chained_beacon(run, digest), run=run, chance=0.5)
    ]
    # The run's bytes, and with them the draw, follow from a new key: one run in eight has none of its segments taken.
    code = 0 if expected else 2
    report = told("tiny", "--follow", "--rate", "0.5", "--beacon", "chained", code=code)
    assert [row["index"] for row in report["segments"]] == expected
    assert (report["sample"]["strategy"], report["sample"]["beacon"]) == ("stream", None)

    report = told("faulty", "--follow", "--rate", "1", "--seed", "1", code=1)
    assert [row["verdict"] for row in report["segments"]] == ["match", "diverged"]
    assert report["total"] == 2


def test_ctrl_c_ends_it_with_a_summary(
    keyless: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_cli, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    options = ["--follow", "--rate", "1", "--store", str(keyless), "--executor", "reference"]
    assert main(["audit", "tiny", *options]) == 0
    out = capsys.readouterr().out
    assert "segment 0, steps 0 to 1: match (2 steps in " in out
    assert "the run has committed 1 of the 3 segments of its recipe" in out
    assert "drew 1 of 1 segments with --rate 1 --follow --seed " in out
    assert out.endswith("verdict: match\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_stopped_in_the_middle_of_a_segment(trained: Path) -> None:
    store = copied(trained)
    stops = iter([False, False, False, False, True])
    following, lines = follower(store, stop=lambda: next(stops, True))
    audited = following.run()
    assert audited.report.total == len(audited.report.segments) == 1
    assert lines[-1] == "stopped; what was being replayed does not count"
    assert audited.verdict == Match()


class Flaky:
    """Objects that cannot be read `failing` times, from the read number `after` on."""

    def __init__(self, objects: MemoryObjects, *, after: int, failing: int) -> None:
        self.objects, self.after, self.failing = objects, after, failing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objects, name)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        self.after -= 1
        if self.after < 0 < self.failing:
            self.failing -= 1
            raise FailureError("no answer; check the network")
        return self.objects.read(key, start, stop)


@pytest.mark.parametrize(("after", "failing"), [(0, 3), (30, 1)])
def test_a_store_that_fails_for_a_while(trained: Path, after: int, failing: int) -> None:
    store = copied(trained)
    assert isinstance(store.objects, MemoryObjects)
    flaky: Any = Flaky(store.objects, after=after, failing=failing)
    following, lines = follower(Store(flaky))
    audited = following.run()
    assert (audited.verdict, audited.whole, flaky.failing) == (Match(), True, 0)
    assert any("no answer" in line for line in lines)


def test_a_store_that_stays_away_is_inconclusive(trained: Path) -> None:
    store = copied(trained, "running")
    assert isinstance(store.objects, MemoryObjects)
    flaky: Any = Flaky(store.objects, after=10**6, failing=10**6)
    following, lines = follower(
        Store(flaky), wait=lambda: setattr(flaky, "after", min(flaky.after, 0)), stop=lambda: flaky.after < -3
    )
    verdict = following.run().verdict
    assert isinstance(verdict, Inconclusive)
    assert "no answer" in verdict.reason
    assert sum("trying again until it can be read" in line for line in lines) == 1


@pytest.mark.parametrize("change", ["gone", "anew", "back"])
def test_a_history_that_was_rewritten_is_inconclusive(trained: Path, change: str) -> None:
    store = copied(trained, "running")

    def rewrite() -> None:
        now, other = store.read(head_name("tiny")), History.open(store, "tiny")
        if change == "back":
            other.head = dataclasses.replace(other.head, segment=None, partial=None)
            other.mark("interrupted")
        else:
            store.swap(head_name("tiny"), now, None)
        if change == "anew":
            History.start(store, dataclasses.replace(other.run, version="other"))

    following, _ = follower(store, rate=1e-9, wait=rewrite)
    verdict = following.run().verdict
    assert isinstance(verdict, Inconclusive)
    words = {"gone": "the run is gone", "anew": "begun anew", "back": "another history"}
    assert words[change] in verdict.reason


def test_a_divergence_ends_it_and_a_machine_is_not_used_again(trained: Path) -> None:
    store = open_store(str(trained), create=False)
    following, lines = follower(store, keep_going=True)
    following.auditor = dataclasses.replace(following.auditor, name="faulty")
    audited = following.run()
    assert isinstance(audited.verdict, Diverged)
    assert [type(segment.verdict) for segment in audited.report.segments] == [Match, Diverged, Match]
    assert "diverged at segment 1/step 2/loss" in lines[1]
