"""`trueweight witness` and `pinpoint --witness`: the host that trained answers over the network, or does not."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from runtime.executors import reference
from runtime.segments import History
from runtime.testing import TEXT, TINY
from storage.codec import decode, encode
from storage.errors import FailureError, UsageError
from storage.identity import signed
from storage.store import Store, open_store
from trueweight import cli
from trueweight.witness_cli import Answering, WitnessServer
from verification.asking import AskedTraces, Question, Reply, replied
from verification.replay import Material
from verification.testing import check_traces
from verification.traces import REVEAL_DOMAIN

FLIP = "kind=flip,step=2,worker=s1r0,place=micro-batch 2/block 2/forward,operator=700,element=3,bit=10"
COST = ("seconds", "peak_bytes", "evidence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the run `tiny`, which has a fault, and the keys of its workers."""
    folder = tmp_path_factory.mktemp("witness")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    text = TINY.replace("steps = 5", "steps = 3").replace("seed = 7", "seed = 7\nfaults = true")
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    places = ["--store", folder / "store", "--keys", folder / "keys", "--executor", "reference"]
    run = ["run", folder / "tiny.toml", "--local", "--name", "tiny", *places, "--stages", 2, "--inject", FLIP, "--json"]
    assert cli.main([str(argument) for argument in run]) == 0
    return folder


@pytest.fixture
def store(folder: Path) -> Store:
    return open_store(str(folder / "store"), create=False)


@pytest.fixture
def server(folder: Path, store: Store) -> Iterator[WitnessServer]:
    """A witness on this host."""
    told: list[str] = []
    history = History.open(store, "tiny")
    answering = Answering(store, history, keys=str(folder / "keys"), threads=1, make=reference)
    with WitnessServer("127.0.0.1", 0, answering, told.append) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def pinpointed(capsys: pytest.CaptureFixture[str], folder: Path, *options: object) -> dict[str, Any]:
    """What `pinpoint --json` says of the run."""
    arguments = ["pinpoint", "tiny", "--store", folder / "store", "--executor", "reference", "--json", *options]
    assert cli.main([str(argument) for argument in arguments]) == 1
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_a_witness_elsewhere_is_as_good_as_the_key_here(
    folder: Path, server: WitnessServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = pinpointed(capsys, folder, "--keys", folder / "keys")
    evidence = tmp_path / "evidence"
    there = pinpointed(capsys, folder, "--keys", tmp_path, "--witness", server.address, "--evidence", evidence)
    assert {k: v for k, v in here.items() if k not in COST} == {k: v for k, v in there.items() if k not in COST}
    assert (there["worker"], there["number"], there["cause"]) == ("s1r0", 700, "software or fraud")
    assert cli.main(["evidence", "check", str(evidence)]) == 0
    assert "proven here" in capsys.readouterr().out


def test_who_does_not_answer_is_unavailable(
    folder: Path, server: WitnessServer, capsys: pytest.CaptureFixture[str]
) -> None:
    told = pinpointed(capsys, folder, "--witness", f"{server.address}x")
    assert (told["cause"], told["worker"]) == ("unavailable", "s1r0")
    assert "take the whole address that the witness printed" in told["reason"]
    server.server_close()
    told = pinpointed(capsys, folder, "--witness", server.address)
    assert told["cause"] == "unavailable"
    assert told["reason"].endswith("start `trueweight witness` there")
    assert server.path not in json.dumps(told)


def test_answers_of_another_are_not_the_workers(
    folder: Path,
    store: Store,
    server: WitnessServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An answer to another question, or one that nobody signed, convicts nobody."""
    ask = AskedTraces._ask

    def unsigned(self: AskedTraces, method: str, **of: Any) -> Reply:
        return replace(ask(self, method, **of), reveal=())

    def stale(self: AskedTraces, method: str, **of: Any) -> Reply:
        return ask(self, "calls" if method == "operators" else method, **{**of, "place": "micro-batch 1/"})

    for forged in (unsigned, stale):
        monkeypatch.setattr(AskedTraces, "_ask", forged)
        told = pinpointed(capsys, folder, "--witness", server.address)
        assert (told["cause"], told["reason"]) == (
            "unavailable",
            "s1r0 does not answer: its answer is not signed by the key of its receipt",
        )


def test_asked_traces_conform(store: Store, server: WitnessServer) -> None:
    history = History.open(store, "tiny")
    traces = AskedTraces(server.address, run=history.run_digest, segment=1, step=2)
    program = Material.read(store, history.run).program
    place = "micro-batch 0/block 2/forward"
    answers = check_traces(
        traces, workers=["s0r0", "s1r0"], worker="s1r0", place=place, program=program.kind_of(2).forward, step=2
    )
    assert all(answer.reveal and signed(REVEAL_DOMAIN, answer.reveal) for answer in answers)


def question(store: Store, **of: Any) -> Question:
    run = History.open(store, "tiny").run_digest
    asked = Question(run=run, segment=1, step=2, method="claims", worker="", place="", value=0, number=0)
    return replace(asked, **of)


def test_questions_that_have_no_answer(store: Store, folder: Path) -> None:
    answering = Answering(store, History.open(store, "tiny"), keys=str(folder / "keys"), threads=1, make=reference)

    def said(**of: Any) -> tuple[int, str]:
        status, body = replied(encode(question(store, **of)), answering)
        return status, "" if status == 200 else body.decode()

    assert said() == (200, "")
    assert said(run=bytes(32)) == (409, "the question is about another run; ask the host that trained it")
    for of in ({"segment": 9}, {"step": 1}, {"step": 99}):
        status, told = said(**of)
        assert (status, told.partition(": ")[2]) == (409, "expected a step that somebody signed; see `show`")
    for of in ({"method": "state"}, {"method": "calls", "worker": "s9r9"}, {"method": "leaf", "place": "nowhere"}):
        assert said(**of)[0] == 409
    for body in (b"", b"x" * 99, encode(question(store))[:-1]):
        assert replied(body, answering)[0] == 400


def test_a_server_that_is_sent_nonsense_goes_on(store: Store, server: WitnessServer) -> None:
    where = urlsplit(server.address)
    for path, body, headers, status in (
        ("/", b"", {}, 404),
        (where.path, b"junk", {}, 400),
        (where.path, b"", {"Content-Length": "999999999"}, 413),
        (where.path, b"", {"Content-Length": "\u0664"}, 413),
    ):
        connection = HTTPConnection(where.hostname or "", where.port, timeout=30)
        connection.putrequest("POST", path)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name, value.encode("utf-8"))
        connection.endheaders(body)
        assert connection.getresponse().status == status
        connection.close()
    claims = AskedTraces(server.address, run=question(store).run, segment=1, step=2).claims()
    assert sorted(claims) == ["s0r0", "s1r0"]


def test_bad_addresses_are_usage_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="expected the address that `trueweight witness` printed"):
        AskedTraces("ftp://there", run=bytes(32), segment=0, step=0)
    both = ["pinpoint", "tiny", "--store", str(folder / "store"), "--no-ask", "--witness", "http://there"]
    assert cli.main(both) == UsageError.exit_code
    assert "drop the other" in capsys.readouterr().err
    for options, told in (
        (("--listen", "nowhere"), "expected HOST:PORT"),
        (("--keys", str(folder)), "expected the key of this host's workers"),
    ):
        assert cli.main(["witness", "tiny", "--store", str(folder / "store"), *options]) == UsageError.exit_code
        assert told in capsys.readouterr().err


def test_the_command_answers_until_it_is_interrupted(folder: Path, store: Store) -> None:
    places = ["--store", str(folder / "store"), "--keys", str(folder / "keys"), "--listen", "127.0.0.1:0"]
    command = [sys.executable, "-m", "trueweight", "witness", "tiny", *places, "--executor", "reference"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        address = running.stdout.readline().rpartition(" ")[2].strip()
        traces = AskedTraces(address, run=question(store).run, segment=1, step=2)
        answer = traces.calls("s1r0", "micro-batch 2/")
        assert answer.reveal is not None
        with pytest.raises(FailureError, match="no call at"):
            traces.leaves("s1r0", "micro-batch 2/block 9/forward", 0)
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=60)
    assert (running.returncode, rest.splitlines()[-1]) == (0, "no longer answering")


def test_a_reply_is_read_as_it_was_written() -> None:
    reply = Reply(items=(b"one", b""), reveal=())
    assert decode(Reply, encode(reply)) == reply
