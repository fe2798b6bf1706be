"""Verifiers as Ray actors: segments side by side and, where there are more actors than segments, micro-batches too.

A verifier opens the store by its URL, reads what the run committed to and needs nothing of who trained. It is given
bytes and answers with bytes. Whatever becomes of it, its segment goes to another once and is inconclusive after that.
"""

import math
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from runtime.actors.cluster import Cluster, joined
from runtime.actors.group import START_SECONDS, RayGroup, cpus_each
from runtime.executors import named
from runtime.groups import require_version
from runtime.plan import make_plan
from runtime.segments import History
from runtime.version import VERSION
from runtime.worker import worker_builder
from storage.codec import U32, U64, decode, encode, record
from storage.errors import FailureError, UsageError
from storage.records import SegmentRecord
from storage.store import open_store
from verification.audit import Diverged, Inconclusive, Match, SegmentAudit, Verdict, audit_segment, printable
from verification.replay import Material, Replay

TRIES = 2
"""How many verifiers a segment is handed to before it is inconclusive."""


@record(kind=128)
class VerifierConfig:
    """All that a verifier is started with. With `replicas` above 1 it has workers of its own, on `cpus`/100 CPUs."""

    store: str
    run: str
    executor: str
    threads: U32
    replicas: U32
    cpus: U32


@record(kind=129)
class SegmentResult:
    """A SegmentAudit. `found` is empty for a match, (reason) where inconclusive, (path, expected, actual) diverged."""

    index: U32
    first_step: U64
    steps: U32
    prestate: str
    poststate: str
    receipts: U64
    record: str
    found: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.found) not in (0, 1, 3):
            raise ValueError(f"segment {self.index}: expected 0, 1 or 3 parts of a verdict, got {len(self.found)}")


@record(kind=130)
class Opened:
    """A verifier's answer to `open`: its version, its host, and why it cannot work, "" where it can."""

    version: str
    host: str
    failure: str


def encode_audit(result: SegmentAudit) -> bytes:
    """The audit of a segment as bytes; `decode_audit` gives it again."""
    match result.verdict:
        case Diverged(path=path, expected=expected, actual=actual):
            found: tuple[str, ...] = (path, expected, actual)
        case Inconclusive(reason=reason):
            found = (reason,)
        case Match():
            found = ()
    return encode(
        SegmentResult(
            index=result.index,
            first_step=result.first_step,
            steps=result.steps,
            prestate=result.prestate,
            poststate=result.poststate,
            receipts=result.receipts,
            record=result.record,
            found=found,
        )
    )


def decode_audit(data: bytes) -> SegmentAudit:
    """The audit of a segment from its bytes; IntegrityError where they are none."""
    made = decode(SegmentResult, data)
    verdict: Verdict = Match()
    if len(made.found) == 1:
        verdict = Inconclusive(reason=made.found[0])
    elif made.found:
        path, expected, actual = made.found
        verdict = Diverged(path=path, expected=expected, actual=actual)
    return SegmentAudit(
        index=made.index,
        first_step=made.first_step,
        steps=made.steps,
        prestate=made.prestate,
        poststate=made.poststate,
        receipts=made.receipts,
        verdict=verdict,
        record=made.record,
    )


class VerifierActor:
    """A verifier in a process of its own; it raises nothing, so nothing but bytes crosses."""

    def __init__(self) -> None:
        self._history: History | None = None
        self._segments: list[SegmentRecord] = []
        self._replay: Replay | None = None

    def version(self) -> str:
        """The Trueweight version here."""
        return VERSION

    def open(self, config: bytes) -> bytes:
        """Open the store and make ready to replay the run of an encoded VerifierConfig; an encoded Opened."""
        failure = ""
        try:
            require_version("verifier", socket.gethostname(), self.version())
            self._open(decode(VerifierConfig, config))
        except Exception as error:  # noqa: BLE001 (whatever it is, this verifier cannot work)
            failure = _told(error)
        return encode(Opened(version=self.version(), host=socket.gethostname(), failure=failure))

    def _open(self, config: VerifierConfig) -> None:
        store = open_store(config.store, create=False)
        history = History.open(store, config.run)
        material = Material.read(store, history.run)
        if material.program_root != history.run.program_root:
            raise FailureError(f"run {config.run}: its record states another program root than its Programs have")
        program, make = material.program, named(config.executor)
        replicas = min(config.replicas, program.micro_batches)
        group = RayGroup(cpus=config.cpus / 100, executor=config.executor) if replicas > 1 else None
        plan = make_plan(blocks=len(program.blocks), micro_batches=program.micro_batches, replicas=replicas)
        self._replay = Replay(
            store,
            history.run,
            threads=config.threads,
            build=worker_builder(make),
            plan=plan,
            group=group,
            material=material,
        )
        self._history, self._segments = history, history.segments()

    def audit(self, index: int) -> bytes:
        """The encoded audit of a segment."""
        assert self._history is not None
        assert self._replay is not None
        return encode_audit(audit_segment(self._history, self._replay, self._segments, index))


def spread(
    *,
    store_url: str,
    name: str,
    indexes: Sequence[int],
    executor: str,
    threads: int,
    workers: int,
    address: str | None,
    observe: Callable[[str], None],
) -> Iterator[SegmentAudit]:
    """The audits of some segments of a run, each as soon as it is there, by `workers` actors of a Ray cluster.

    The cluster is the one at `address`, else at RAY_ADDRESS, else one that ends with this. `store_url` is opened by
    every actor where it runs. Raises UsageError for what the user has to change, FailureError without a cluster.
    """
    if workers < 1:
        raise UsageError(f"verifiers: expected at least 1 worker, got {workers}; ask for more")
    named(executor)
    url = store_url if "://" in store_url else str(Path(store_url).expanduser().absolute())
    with joined(address) as cluster:
        observe(f"Ray {'started' if cluster.started else 'joined'} at {cluster.address}: {cluster.cpus:g} CPUs")
        yield from audit_on(
            cluster,
            store_url=url,
            name=name,
            indexes=indexes,
            executor=executor,
            threads=threads,
            workers=workers,
            observe=observe,
        )


def audit_on(
    cluster: Cluster,
    *,
    store_url: str,
    name: str,
    indexes: Sequence[int],
    executor: str,
    threads: int,
    workers: int,
    observe: Callable[[str], None],
    actor: type[VerifierActor] = VerifierActor,
    timeout: float = START_SECONDS,
) -> Iterator[SegmentAudit]:
    """See `spread`, on a cluster that this process is connected to; verifiers come up within `timeout` seconds."""
    if not indexes:
        return
    verifiers = min(workers, len(indexes))
    share = cpus_each(cluster.cpus, workers)
    replicas = workers // verifiers
    config = VerifierConfig(
        store=store_url,
        run=name,
        executor=executor,
        threads=threads,
        replicas=replicas,
        cpus=math.ceil(100 * share * replicas),
    )
    # A verifier that has workers of its own only leads them.
    remote = ray.remote(actor).options(
        num_cpus=share if replicas == 1 else 0, scheduling_strategy="SPREAD", max_restarts=0
    )
    crew = _Crew(start=remote.remote, config=encode(config), timeout=timeout, observe=observe, waiting=deque(indexes))
    try:
        yield from crew.run(verifiers)
    finally:
        crew.stop()


@dataclass(eq=False)
class _Verifier:
    """One actor: what it was last asked, and on which host it is."""

    name: str
    actor: Any
    index: int | None = None
    host: str = "a host that it did not name"

    def __str__(self) -> str:
        return f"{self.name} on {self.host}"


@dataclass(kw_only=True)
class _Crew:
    """Verifiers at work. `waiting` are the segments that nobody has, `blamed` why each came back without a result."""

    start: Callable[[], Any]
    config: bytes
    timeout: float
    observe: Callable[[str], None]
    waiting: deque[int]
    asked: dict[Any, _Verifier] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    blamed: dict[int, list[str]] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)
    started: int = 0

    def run(self, verifiers: int) -> Iterator[SegmentAudit]:
        """Every segment's audit, in the order in which they end."""
        for _ in range(verifiers):
            self._begin()
        while self.waiting or any(verifier.index is not None for verifier in self.asked.values()):
            if not self.asked:
                break
            opening = any(verifier.index is None for verifier in self.asked.values())
            ready, _ = ray.wait(list(self.asked), num_returns=1, timeout=self.timeout if opening else None)
            if not ready:
                self._give_up_on_late_ones()
            for reference in ready:
                yield from self._answered(reference)
        for index in self.waiting:
            yield self._lost(index, self.blamed.get(index, []) + self.unfit)

    def stop(self) -> None:
        """End every verifier."""
        for verifier in self.asked.values():
            ray.kill(verifier.actor)
        self.asked = {}

    def _begin(self) -> None:
        verifier = _Verifier(f"verifier v{self.started}", self.start())
        self.started += 1
        self.asked[verifier.actor.open.remote(self.config)] = verifier

    def _answered(self, reference: Any) -> Iterator[SegmentAudit]:
        verifier = self.asked.pop(reference)
        try:
            result = self._result(verifier, ray.get(reference))
            if result is not None and result.index != verifier.index:
                raise FailureError(f"expected segment {verifier.index}, got segment {result.index}")
        except (RayError, FailureError) as error:
            ray.kill(verifier.actor)
            yield from self._failed(verifier, _told(error))
            return
        if result is not None:
            self.observe(f"segment {result.index}: {type(result.verdict).__name__.lower()}, {verifier}")
            yield result
        self._next(verifier)

    def _result(self, verifier: _Verifier, data: bytes) -> SegmentAudit | None:
        """The audit that it was asked for; None where it was to open. FailureError where it is unfit."""
        if verifier.index is not None:
            return decode_audit(data)
        answer = decode(Opened, data)
        verifier.host = f"host {printable(answer.host)}"
        require_version(verifier.name, answer.host, answer.version)
        if answer.failure:
            raise FailureError(answer.failure)
        return None

    def _next(self, verifier: _Verifier) -> None:
        if not self.waiting:
            ray.kill(verifier.actor)
            return
        verifier.index = self.waiting.popleft()
        self.tries[verifier.index] = self.tries.get(verifier.index, 0) + 1
        self.observe(f"segment {verifier.index}: given to {verifier}")
        self.asked[verifier.actor.audit.remote(verifier.index)] = verifier

    def _failed(self, verifier: _Verifier, why: str) -> Iterator[SegmentAudit]:
        """Its segment goes back once, another takes its place; one that cannot begin is not replaced."""
        told = f"{verifier}: {why}"
        self.observe(told)
        if verifier.index is None:
            self.unfit.append(told)
            return
        blamed = self.blamed.setdefault(verifier.index, [])
        blamed.append(told)
        if self.tries[verifier.index] < TRIES:
            self.waiting.append(verifier.index)
        else:
            yield self._lost(verifier.index, blamed)
        if self.waiting:
            self._begin()

    def _give_up_on_late_ones(self) -> None:
        late = {reference: verifier for reference, verifier in self.asked.items() if verifier.index is None}
        for reference, verifier in late.items():
            del self.asked[reference]
            ray.kill(verifier.actor)
            self.unfit.append(
                f"{verifier.name}: expected to start within {self.timeout:g} s, got no answer; free CPUs (`ray "
                f"status`) or ask for fewer workers"
            )
            self.observe(self.unfit[-1])

    def _lost(self, index: int, reasons: Sequence[str]) -> SegmentAudit:
        reason = "; ".join(dict.fromkeys(reasons)) or "no verifier took it"
        return SegmentAudit(
            index=index,
            first_step=0,
            steps=0,
            prestate="",
            poststate="",
            receipts=0,
            verdict=Inconclusive(reason=f"segment {index}: {reason}"),
        )


def _told(error: BaseException) -> str:
    """An error in one line, with its class where it is not one of ours."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = printable(" ".join(lines[:2])) or type(error).__name__
    return text if isinstance(error, FailureError | UsageError) else f"{type(error).__name__}: {text}"
