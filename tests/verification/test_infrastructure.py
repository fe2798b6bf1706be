"""No failure of the infrastructure accuses anybody: whatever fails, wherever it does, the verdict is inconclusive."""

import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import executors
from runtime.doctor import examine
from runtime.faults import faulty_builder, parse_fault
from runtime.groups import LocalGroup
from runtime.plan import Plan
from runtime.program.executor import Executor
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.testing import plan_for, remembered, tiny_job, train
from runtime.worker import worker_builder
from storage.errors import FailureError, IntegrityError, MissingObject, UsageError
from storage.objects import MemoryObjects
from storage.remote import open_remote
from storage.store import OBJECTS, PACKS, Store, memory_store, open_store
from storage.testing.faulty import FaultyObjects
from trueweight import cli
from verification.audit import Diverged, Inconclusive, Match, Verdict, audit
from verification.pinpoint import UNAVAILABLE, pinpoint, traces_at
from verification.replay import Replay
from verification.traces import RecordedTraces, TraceProvider
from verification.units import unit_verdict

ERRORS: dict[str, Callable[[], Exception]] = {
    "missing": lambda: MissingObject("object 00 is missing in the store; fetch it", digest="00"),
    "damaged": lambda: IntegrityError("object 00 is damaged; fetch it again", digest="00"),
    "failed": lambda: FailureError("the disk is gone; mend it"),
    "unreachable": lambda: OSError(113, "No route to host"),
    "memory": MemoryError,
    "recursion": lambda: RecursionError("maximum recursion depth exceeded"),
}
MOST_CALLS = 24


@pytest.fixture(scope="module", autouse=True)
def decoded_once() -> Iterator[None]:
    """Programs are immutable: hundreds of audits of one run need not decode them hundreds of times."""
    decode = cache(TrainingProgram.decode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgram, "decode", staticmethod(decode))
        yield


class Case:
    """A run of three steps on 2 x 2 workers, and the same with a flipped bit in step 2."""

    def __init__(self, folder: Path) -> None:
        self.keys = str(folder / "keys")
        self.honest, self.forged = (memory_store(), memory_store())
        fault = parse_fault("kind=skip,step=2,worker=s1r0,micro_batch=0")
        for store, faults in ((self.honest, []), (self.forged, [fault])):
            job = tiny_job(store, steps=3)
            group = LocalGroup(faulty_builder(remembered, faults))
            train(store, job, group=group, plan=plan_for(job, stages=2, replicas=2), keys=self.keys)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


def verdict_of(store: Store, index: int = 1, replay: Any = None) -> Verdict:
    return audit(store, "tiny", lambda history, total: [index], replay=replay).verdict


def sampled(calls: int) -> list[int]:
    """At most MOST_CALLS of so many calls, evenly, the first and the last among them."""
    return sorted({round(k) for k in np.linspace(0, calls - 1, min(calls, MOST_CALLS))})


class Failing(FaultyObjects):
    """A medium whose call number `at` fails: with an error, or with other bytes or none where it is a read."""

    def __init__(self, objects: MemoryObjects, at: int, error: Callable[[], Exception] | str) -> None:
        super().__init__(objects, before=self._before)
        self._at, self._error, self._count = at, error, -1

    def _before(self, method: str, key: str) -> None:
        self._count += 1
        if self._count == self._at and not isinstance(self._error, str):
            raise self._error()

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        data = super().read(key, start, stop)
        if self._count != self._at or not isinstance(self._error, str) or not data:
            return data
        at = len(data) // 2
        return {"none": None, "short": data[:at], "flipped": data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]}[
            self._error
        ]


def accuses_nobody(verdict: Verdict, where: str) -> None:
    assert not isinstance(verdict, Diverged), f"{where}: {verdict}"
    assert isinstance(verdict, Match) or verdict.reason.strip(), where


@pytest.mark.parametrize("error", [*ERRORS, "none", "short", "flipped"])
def test_a_store_that_fails_at_any_call_is_inconclusive(case: Case, error: str) -> None:
    counted = Failing(case.honest.objects, -1, "none")  # type: ignore[arg-type]
    assert verdict_of(Store(counted)) == Match()
    inconclusive = 0
    for at in sampled(len(counted.calls)):
        objects = Failing(case.honest.objects, at, ERRORS.get(error, error))  # type: ignore[arg-type]
        try:
            verdict = verdict_of(Store(objects))
        except UsageError:
            if error != "none":
                raise
            continue  # the run's reference is not there
        accuses_nobody(verdict, f"call {at}: {counted.calls[at]}")
        inconclusive += isinstance(verdict, Inconclusive)
    assert inconclusive >= 8


class FailingExecutor:
    """An executor whose call number `at` fails, counted over all of its methods."""

    def __init__(self, executor: Executor, at: int, error: Callable[[], Exception]) -> None:
        self._executor, self._at, self._error, self.count = executor, at, error, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._executor, name)

        def call(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count - 1 == self._at:
                raise self._error()
            return method(*args, **options)

        return call


@pytest.mark.parametrize("error", ["failed", "unreachable", "memory", "recursion"])
def test_an_executor_that_fails_at_any_call_is_inconclusive(case: Case, error: str) -> None:
    made: list[FailingExecutor] = []

    def at(number: int) -> Verdict:
        def make(threads: int) -> Any:
            made.append(FailingExecutor(executors.reference(threads), number, ERRORS[error]))
            return made[-1]

        return verdict_of(case.honest, 1, lambda history: Replay(case.honest, history.run, build=worker_builder(make)))

    assert at(-1) == Match()
    for number in sampled(made[0].count)[::3]:
        verdict = at(number)
        assert isinstance(verdict, Inconclusive), f"call {number}: {verdict}"
        assert verdict.reason.startswith(("segment 1: ", "MemoryError", "FailureError")), verdict


# ----------------------------------------------------------------------------------------------- units and pinpoint


@pytest.mark.parametrize("error", ["damaged", "unreachable", "memory", "recursion"])
def test_a_unit_audit_that_fails_anywhere_is_inconclusive(case: Case, error: str) -> None:
    def at(objects: Any) -> Verdict:
        store = Store(objects)
        history = History.open(case.honest, "tiny")
        segments = history.segments()
        history.store = store
        return unit_verdict(history, segments, 1, "s1r0", partial(executors.reference, 1)).verdict

    counted = Failing(case.honest.objects, -1, "none")  # type: ignore[arg-type]
    assert at(counted) == Match()
    verdicts = [
        at(Failing(case.honest.objects, k, ERRORS[error]))  # type: ignore[arg-type]
        for k in sampled(len(counted.calls))
    ]
    assert {type(verdict) for verdict in verdicts} == {Inconclusive}


@pytest.mark.parametrize("error", ["failed", "memory"])
def test_a_unit_audit_whose_executor_fails_at_any_call_is_inconclusive(case: Case, error: str) -> None:
    history = History.open(case.honest, "tiny")
    made: list[FailingExecutor] = []

    def at(number: int) -> Verdict:
        def make() -> Any:
            made.append(FailingExecutor(executors.reference(1), number, ERRORS[error]))
            return made[-1]

        return unit_verdict(history, history.segments(), 1, "s1r0", make).verdict

    assert at(-1) == Match()
    assert {type(at(number)) for number in sampled(made[0].count)} == {Inconclusive}


class FailingTraces(RecordedTraces):
    """Recorded answers, of which number `at` fails."""

    def __init__(self, known: RecordedTraces, at: int, error: Callable[[], Exception]) -> None:
        super().__init__(known)
        self._at, self._error, self.count = at, error, 0

    def _known(self, method: str, *question: Any) -> Any:
        self.count += 1
        if self.count - 1 == self._at:
            raise self._error()
        return super()._known(method, *question)


def test_pinpoint_names_nobody_for_a_failure(case: Case) -> None:
    from trueweight.investigation import witness

    store, history = case.forged, History.open(case.forged, "tiny")
    found = verdict_of(store)
    assert isinstance(found, Diverged)
    program = TrainingProgram.decode(store.get(history.run.programs))
    fault = parse_fault("kind=skip,step=2,worker=s1r0,micro_batch=0")
    sides: dict[str, RecordedTraces] = {}

    def ours(index: int, step: int, plan: Plan) -> TraceProvider:
        from runtime.tracing import traced_builder

        def replay() -> Replay:
            return Replay(store, history.run, build=traced_builder(executors.reference), plan=plan)

        return sides.setdefault("ours", RecordedTraces(traces_at(history, index, step, replay)))

    def theirs(index: int, step: int, plan: Plan) -> TraceProvider | None:
        made = witness(store, history, index, step, plan, keys=case.keys, make=executors.reference, faults=[fault])
        return sides.setdefault("theirs", RecordedTraces(made))

    right, _ = pinpoint(history, found, program, ours=ours, theirs=theirs)
    assert (right.cause, right.worker) == ("software or fraud", "s1r0")
    known: dict[str, Any] = {side: lambda *_, side=side: sides[side] for side in ("ours", "theirs")}
    for side in ("ours", "theirs"):
        counted = FailingTraces(sides[side], -1, MemoryError)
        assert pinpoint(history, found, program, **{**known, side: lambda *_, c=counted: c})[0] == right
        assert counted.count >= 2
        for at in range(counted.count):
            for error in ERRORS.values():
                failing = FailingTraces(sides[side], at, error)
                finding, _ = pinpoint(history, found, program, **{**known, side: lambda *_, f=failing: f})
                assert finding.cause == UNAVAILABLE, (side, at, finding)
                assert finding.reason
                assert finding.worker in ("", "s1r0")
                assert ("does not answer" in finding.reason) == (side == "theirs"), finding.reason
    for side in ("ours", "theirs"):

        def gone(*_: Any) -> TraceProvider:
            raise OSError(113, "No route to host")

        finding, _ = pinpoint(history, found, program, **{**known, side: gone})
        assert (finding.cause, finding.worker) == (UNAVAILABLE, "")


# ------------------------------------------------------------------------------------------------------ real stores


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Path:
    """The honest run in a folder."""
    path = tmp_path / "store"
    for found in case.honest.objects.list(""):
        target = path / found.key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(case.honest.objects.read(found.key) or b"")
    (path / "trueweight-store").write_bytes(b"trueweight-store 2\n")
    return path


class Server(ThreadingHTTPServer):
    """The files of a folder, until so many requests have been answered; then every answer is cut or refused."""

    def __init__(self, folder: Path, answers: int, how: str) -> None:
        self.left, self.how = answers, how
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.server.left -= 1
        if self.server.left >= 0:
            super().do_GET()
        elif self.server.how == "refuse":
            self.send_error(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"half")


@pytest.mark.parametrize("how", ["refuse", "cut"])
def test_a_server_that_stops_half_way_is_inconclusive(folder: Path, how: str) -> None:
    whole = Server(folder, 10**6, how)
    try:
        assert verdict_of(Store(open_remote(whole.url))) == Match()
    finally:
        whole.close()
    needed = 10**6 - whole.left
    for answers in (needed // 3, needed // 2, needed - 1):
        server = Server(folder, answers, how)
        try:
            verdict = verdict_of(Store(open_remote(server.url, deadline=0.1, wait=lambda _: None)))
        finally:
            server.close()
        assert isinstance(verdict, Inconclusive), f"{answers} of {needed} answers: {verdict}"
        assert verdict.reason.strip()


@pytest.mark.parametrize("below", [OBJECTS, PACKS, "checkpoints/"])
def test_a_replica_with_rotten_bytes_is_inconclusive(folder: Path, below: str) -> None:
    for path in (folder / below).rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 0x10
            path.write_bytes(data)
    verdict = verdict_of(open_store(str(folder), create=False))
    assert isinstance(verdict, Inconclusive)
    assert "damaged" in verdict.reason or "refused" in verdict.reason


@pytest.mark.parametrize("name", ["compiled", "reference"])
def test_an_executor_that_fails_the_doctor_is_inconclusive(
    case: Case, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.program import reference

    if name == "compiled":
        monkeypatch.setattr("runtime.program.vectors.check", lambda executor, vector: f"{vector.name}: a wrong byte")
    else:
        monkeypatch.setitem(reference.MEANING, "sqrt", lambda x: x.sqrt())  # type: ignore[arg-type]
        monkeypatch.setattr(reference, "prove", reference.prove.__wrapped__)
    make = executors.named(name)
    (told,) = examine({name: lambda: make(1)}, [])
    verdict = verdict_of(case.honest, 1, lambda history: Replay(case.honest, history.run, build=worker_builder(make)))
    assert isinstance(verdict, Inconclusive)
    assert "exactly" in verdict.reason
    assert " ".join(told.failure.split()) == verdict.reason


@pytest.mark.parametrize("error", [*ERRORS, "flipped"])
def test_the_command_line_ends_with_2(
    case: Case, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(folder: str, *, create: bool) -> Store:
        key = History.open(case.honest, "tiny").run.programs.hex()

        def before(method: str, path: str) -> None:
            if method == "read" and path.endswith(key[2:]) and error in ERRORS:
                raise ERRORS[error]()

        def changed(path: str, data: bytes) -> bytes:
            return data[:-1] + bytes([data[-1] ^ 1]) if path.endswith(key[2:]) and error == "flipped" else data

        return Store(FaultyObjects(case.honest.objects, before=before, changed=changed))

    monkeypatch.setattr("trueweight.wiring.open_folder", opened)
    assert cli.main(["audit", "tiny", "--segments", "1", "--executor", "reference", "--threads", "1"]) == 2
    assert "inconclusive" in capsys.readouterr().out
