"""Questions about one step, asked of the machine that trained over HTTP, and its answers.

A question is one POST to the address that the witness gave out; question and answer are records. What the answers say
of calls and operators is signed by the worker's key, and leaves are checked against that, so nobody between the two
can put words into a worker's mouth. Whoever does not answer in time, or not so that it can be read, does not answer.
"""

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from storage.codec import U32, U64, Digest, decode, encode, record
from storage.errors import FailureError, TrueweightError, UsageError
from storage.records import Receipt
from verification.traces import Answer, Reveal, TraceProvider

ASK_SECONDS = 3600.0
"""How long a witness may take: it goes through whole steps."""
MOST_ASKED, MOST_ANSWERED = 1 << 16, 1 << 28
"""Bytes of a question and of an answer."""


@record(kind=147)
class Question:
    """What a `TraceProvider` is asked, `method`, with as much of the rest as that takes."""

    run: Digest
    segment: U32
    step: U64
    method: str
    worker: str
    place: str
    value: U32
    number: U32


@record(kind=148)
class Reply:
    """The items of an answer, and the Reveal that signs them; encoded Receipts for `claims`, one item for `leaf`."""

    items: tuple[bytes, ...]
    reveal: tuple[Reveal, ...]


def answer(question: Question, traces: TraceProvider) -> Reply:
    """What a provider says; FailureError where the question is none."""
    match question.method:
        case "claims":
            claims = traces.claims()
            return Reply(items=tuple(encode(claims[worker]) for worker in sorted(claims)), reveal=())
        case "calls" | "operators":
            said: Answer = getattr(traces, question.method)(question.worker, question.place)
            return Reply(items=said.items, reveal=() if said.reveal is None else (said.reveal,))
        case "leaves":
            return Reply(items=traces.leaves(question.worker, question.place, question.value), reveal=())
        case "leaf":
            leaf = traces.leaf(question.worker, question.place, question.value, question.number)
            return Reply(items=(leaf,), reveal=())
    raise FailureError(f"question {question.method!r}: expected claims, calls, operators, leaves or leaf; update")


class AskedTraces:
    """A `TraceProvider` that asks the witness at `url` about a step of a run; UsageError for what is no address."""

    def __init__(self, url: str, *, run: bytes, segment: int, step: int) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--witness {url}: expected the address that `trueweight witness` printed; correct it")
        self._url, self._run, self._segment, self._step = url, run, segment, step

    def claims(self) -> Mapping[str, Receipt]:
        """See TraceProvider."""
        return {receipt.worker: receipt for receipt in (decode(Receipt, item) for item in self._ask("claims").items)}

    def calls(self, worker: str, scope: str) -> Answer:
        """See TraceProvider."""
        return self._signed("calls", worker, scope)

    def operators(self, worker: str, place: str) -> Answer:
        """See TraceProvider."""
        return self._signed("operators", worker, place)

    def leaves(self, worker: str, place: str, value: int) -> tuple[bytes, ...]:
        """See TraceProvider."""
        return self._ask("leaves", worker=worker, place=place, value=value).items

    def leaf(self, worker: str, place: str, value: int, number: int) -> bytes:
        """See TraceProvider."""
        items = self._ask("leaf", worker=worker, place=place, value=value, number=number).items
        if len(items) != 1:
            raise FailureError(
                f"witness at {_host(self._url)}: expected one leaf, got {len(items)}; its version may be another"
            )
        return items[0]

    def _signed(self, method: str, worker: str, place: str) -> Answer:
        reply = self._ask(method, worker=worker, place=place)
        return Answer(items=reply.items, reveal=reply.reveal[0] if reply.reveal else None)

    def _ask(self, method: str, **of: Any) -> Reply:
        question = Question(
            run=self._run,
            segment=self._segment,
            step=self._step,
            method=method,
            **{"worker": "", "place": "", "value": 0, "number": 0, **of},
        )
        return decode(Reply, post_to(self._url, encode(question)))


def post_to(url: str, body: bytes, timeout: float = ASK_SECONDS) -> bytes:
    """The body of the answer to a POST; FailureError with the reason where there is none."""
    request = urllib.request.Request(url, data=body)  # noqa: S310 (AskedTraces takes http and https alone)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
            found: bytes = response.read(MOST_ANSWERED + 1)
    except urllib.error.HTTPError as error:
        told = error.read(4096).decode("utf-8", "replace").strip()
        raise FailureError(f"witness at {_host(url)}: {told or error.reason}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise FailureError(f"witness at {_host(url)}: {error}; start `trueweight witness` there") from error
    if len(found) > MOST_ANSWERED:
        raise FailureError(f"witness at {_host(url)}: expected at most {MOST_ANSWERED} bytes, got more")
    return found


def replied(body: bytes, traces_of: Callable[[Question], TraceProvider]) -> tuple[int, bytes]:
    """(HTTP status, body) of the answer to an encoded Question: a Reply, or why there is none in words."""
    try:
        question = decode(Question, body)
    except TrueweightError as error:
        return 400, f"not a question: {error}".encode()
    try:
        return 200, encode(answer(question, traces_of(question)))
    except Exception as error:  # noqa: BLE001 (whatever it is, the other side is told that there is no answer)
        return 409, (str(error) or type(error).__name__).encode()


def _host(url: str) -> str:
    """A witness's address without the secret in it."""
    return url.split("/")[2]
