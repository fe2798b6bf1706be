"""`trueweight witness`: the machine that trained answers, over the network, what it computed in a step."""

import secrets
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime import executors
from runtime.program.training import TrainingProgram
from runtime.segments import History
from storage.codec import decode
from storage.errors import FailureError, UsageError
from storage.records import Receipt
from storage.store import Store
from trueweight import wiring
from trueweight.console import console_for, say
from trueweight.investigation import injected, witness
from verification.asking import MOST_ASKED, Question, replied
from verification.pinpoint import plan_of
from verification.traces import TraceProvider

LISTEN = "127.0.0.1:8710"


def witness_command(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run that this host's workers trained.")],
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")] = ".trueweight",
    keys: Annotated[
        str, typer.Option(metavar="DIR", help="The key of this host's workers, with which answers are signed.")
    ] = wiring.KEYS,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 is any.")] = LISTEN,
    threads: Annotated[int, typer.Option(help="Threads; 0 is all.")] = 1,
    executor: Annotated[
        str, typer.Option("--executor", help="compiled or reference: the same bytes.")
    ] = executors.DEFAULT,
) -> int:
    """Answer, for whoever has the address, what this host's workers computed in a run's steps.

    A verifier elsewhere goes on where the records end: `trueweight pinpoint RUN --witness ADDRESS` asks the accused
    worker to repeat a step, and then for calls, operators and leaves of it, which this host signs. The address holds a
    secret, since answers show parts of weights and data: give it to those who may see these. Ends with Ctrl-C.

    \b
    trueweight witness quickstart
    trueweight witness quickstart --listen 0.0.0.0:8710
    """
    console = console_for(as_json=False)
    objects = wiring.open_folder(store, create=False)
    history = History.open(objects, name)
    folder = Path(keys).expanduser()
    if not (folder / "worker.key").exists():
        raise UsageError(
            f"--keys {keys}: expected the key of this host's workers, worker.key, got none; name its folder"
        )
    host, port = _address(listen)
    answering = Answering(objects, history, keys=str(folder), threads=threads, make=executors.named(executor))
    try:
        server = WitnessServer(host, port, answering, lambda line: say(console, line))
    except OSError as error:
        raise UsageError(f"--listen {listen}: {error}; choose another address") from error
    say(console, f"answering about {name} at {server.address}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say(console, "no longer answering")
    finally:
        server.server_close()
    return 0


class Answering:
    """The traces that a question is about: those of the last step that was asked for are kept."""

    def __init__(self, store: Store, history: History, *, keys: str, threads: int, make: executors.Make) -> None:
        self._store, self._history, self._keys, self._threads, self._make = store, history, keys, threads, make
        self._program = TrainingProgram.decode(store.get(history.run.programs))
        self._last: tuple[tuple[int, int], TraceProvider] | None = None

    def __call__(self, question: Question) -> TraceProvider:
        """FailureError where it is not about a committed step of this run."""
        if question.run != self._history.run_digest:
            raise FailureError("the question is about another run; ask the host that trained it")
        about = question.segment, question.step
        if self._last is None or self._last[0] != about:
            self._last = None  # two steps are not held at a time
            self._last = about, self._replayed(*about)
        return self._last[1]

    def _replayed(self, index: int, step: int) -> TraceProvider:
        segments = self._history.segments()
        items = self._history.items(segments[index].receipts_object) if index < len(segments) else ()
        receipts = [receipt for receipt in (decode(Receipt, item) for item in items) if receipt.step == step]
        if not receipts:
            raise FailureError(f"segment {index}, step {step}: expected a step that somebody signed; see `show`")
        found = witness(
            self._store,
            self._history,
            index,
            step,
            plan_of(receipts, self._program),
            keys=self._keys,
            make=self._make,
            faults=injected(self._store, self._history.name),
            threads=self._threads,
        )
        if found is None:
            raise FailureError("the key of this host's workers is gone; put it back")
        return found


class WitnessServer(HTTPServer):
    """Listens for questions under a path that is a secret, and answers one at a time: each takes the whole machine.

    OSError where it cannot listen. `tell` is told of every question.
    """

    def __init__(
        self, host: str, port: int, traces_of: Callable[[Question], TraceProvider], tell: Callable[[str], None]
    ) -> None:
        self.path, self.traces_of, self.tell = f"/{secrets.token_urlsafe(16)}", traces_of, tell
        super().__init__((host, port), _Handler)

    @property
    def address(self) -> str:
        """Where questions go."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}{self.path}"

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (socketserver's signature)
        """Who asked did not wait for the answer, or sent no request."""
        self.tell(f"{client_address[0]}: {sys.exception() or 'gone'}")


class _Handler(BaseHTTPRequestHandler):
    server: WitnessServer
    timeout = 60

    def do_POST(self) -> None:
        """A question; see `verification.asking`."""
        length = self.headers.get("Content-Length", "")
        if not secrets.compare_digest(self.path.encode(), self.server.path.encode()):
            status, body = 404, b"nothing is answered here: take the whole address that the witness printed"
        elif not (length.isascii() and length.isdecimal() and int(length) <= MOST_ASKED):
            status, body = 413, b"expected a question of a stated, small length"
        else:
            status, body = replied(self.rfile.read(int(length)), self.server.traces_of)
            self.server.tell(f"{self.client_address[0]}: {'answered' if status == 200 else body.decode()}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        """Nothing: the path is a secret."""


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise UsageError(f"--listen {text!r}: expected HOST:PORT such as {LISTEN}; correct it")
    return host, int(port)
