"""A run's committed history: segments linked by digests, below one Head that moves by compare-and-swap.

Objects are written first, then the records that name them, then the Head. A process that dies anywhere leaves
objects that nothing names, and a Head that names only what is there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from storage import merkle
from storage.codec import NO_DIGEST, decode, encode
from storage.errors import Conflict, IntegrityError, UsageError
from storage.records import Head, Partial, RecordList, RunRecord, SegmentRecord, StepRecord
from storage.store import Store

MOST_SEGMENTS = 2**20
"""Segments of a run: the chain may be anybody's, and is read from its newest link to the first."""
RUNNING, INTERRUPTED, FAILED, FINISHED = "running", "interrupted", "failed", "finished"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: `steps` and `receipts` are what the open segment has so far.

    `prestate` is the state root that the open segment starts from, `poststate` the one after the steps so far.
    """

    index: int
    first_step: int
    prestate: bytes
    poststate: bytes
    steps: tuple[bytes, ...] = ()
    receipts: tuple[bytes, ...] = ()

    @property
    def next_step(self) -> int:
        """The step to do next."""
        return self.first_step + len(self.steps)

    @property
    def closed(self) -> "Position":
        """The position once the open segment is committed."""
        return Position(
            index=self.index + 1, first_step=self.next_step, prestate=self.poststate, poststate=self.poststate
        )

    def after(self, record: StepRecord, receipts: Sequence[bytes]) -> "Position":
        """The position one step on."""
        return replace(
            self,
            steps=(*self.steps, encode(record)),
            receipts=(*self.receipts, *receipts),
            poststate=record.state_root,
        )


@dataclass(kw_only=True)
class History:
    """One run in a store. Every method that writes either moves the Head or changes nothing that anybody can see."""

    store: Store
    name: str
    run: RunRecord
    run_digest: bytes
    head: Head
    _seen: bytes = field(repr=False)

    # ---------------------------------------------------------------------------------------------------- open

    @classmethod
    def start(cls, store: Store, run: RunRecord) -> "History":
        """A new run of the name in its record; UsageError where there is one already."""
        name = run.name
        digest = store.put(encode(run))
        head = Head(run=digest, segment=None, partial=None, status=RUNNING)
        try:
            store.swap(head_name(name), None, encode(head))
        except Conflict:
            raise taken(name) from None
        return cls(store=store, name=name, run=run, run_digest=digest, head=head, _seen=encode(head))

    @classmethod
    def open(cls, store: Store, name: str) -> "History":
        """The run of that name; UsageError listing the runs where there is none."""
        data = store.read(head_name(name))
        if data is None:
            known = ", ".join(run_names(store)) or "none"
            raise UsageError(f"run {name!r}: expected one of the store's runs ({known}); see `trueweight runs`")
        head = decode(Head, data)
        run = decode(RunRecord, store.get(head.run))
        return cls(store=store, name=name, run=run, run_digest=head.run, head=head, _seen=data)

    # ---------------------------------------------------------------------------------------------------- read

    def segments(self) -> list[SegmentRecord]:
        """The committed segments, first to last; IntegrityError naming the object where the chain does not hold."""
        chain: list[SegmentRecord] = []
        digest = self.head.segment
        while digest is not None:
            segment = decode(SegmentRecord, self.store.get(digest))
            expected = chain[-1].index - 1 if chain else min(segment.index, MOST_SEGMENTS - 1)
            if segment.run != self.run_digest or segment.index != expected:
                raise IntegrityError(
                    f"segment object {digest.hex()}: expected segment {expected} of run {self.name}, got segment "
                    f"{segment.index} of {segment.run.hex()}; audit the run from another copy of the store",
                    digest=digest.hex(),
                )
            chain.append(segment)
            digest = segment.previous if segment.index else None
        return chain[::-1]

    def steps(self) -> list[StepRecord]:
        """Every recorded step, those of an unfinished segment included."""
        items = [item for segment in self.segments() for item in self.items(segment.steps_object)]
        return [decode(StepRecord, item) for item in (*items, *self.position().steps)]

    def items(self, digest: bytes) -> tuple[bytes, ...]:
        """The encoded records of a RecordList object."""
        return decode(RecordList, self.store.get(digest)).items

    def position(self) -> Position:
        """Where the run stands: after the partial segment, else after the last segment, else at its initial state."""
        position = self._last_boundary()
        if self.head.partial is None:
            return position
        partial = decode(Partial, self.store.get(self.head.partial))
        return replace(position, poststate=partial.state, steps=partial.steps, receipts=partial.receipts)

    def _last_boundary(self) -> Position:
        if self.head.segment is None:
            root = self.run.initial_state
            return Position(index=0, first_step=0, prestate=root, poststate=root)
        last = decode(SegmentRecord, self.store.get(self.head.segment))
        after = last.first_step + last.steps
        return Position(index=last.index + 1, first_step=after, prestate=last.poststate, poststate=last.poststate)

    # --------------------------------------------------------------------------------------------------- write

    def commit(self, position: Position, status: str) -> SegmentRecord:
        """Close the open segment, whose poststate is in the store: its record."""
        segment = SegmentRecord(
            run=self.run_digest,
            index=position.index,
            first_step=position.first_step,
            steps=len(position.steps),
            prestate=position.prestate,
            poststate=position.poststate,
            steps_root=merkle.list_root(position.steps),
            receipts_root=merkle.list_root(position.receipts),
            previous=self.head.segment or NO_DIGEST,
            steps_object=self.store.put(encode(RecordList(items=position.steps))),
            receipts_object=self.store.put(encode(RecordList(items=position.receipts))),
        )
        digest = self.store.put(encode(segment))
        self._move(Head(run=self.run_digest, segment=digest, partial=None, status=status))
        return segment

    def pause(self, position: Position) -> None:
        """Leave the run inside a segment, with the state after its last step in the store."""
        partial = Partial(
            index=position.index,
            first_step=position.first_step,
            state=position.poststate,
            steps=position.steps,
            receipts=position.receipts,
        )
        self._move(replace(self.head, partial=self.store.put(encode(partial)), status=INTERRUPTED))

    def mark(self, status: str) -> None:
        """Change the run's status and nothing else."""
        if self.head.status != status:
            self._move(replace(self.head, status=status))

    def _move(self, head: Head) -> None:
        data = encode(head)
        try:
            self.store.swap(head_name(self.name), self._seen, data)
        except Conflict as error:
            raise Conflict(
                f"run {self.name}: another process moved it while this one was at work ({error}); nothing was "
                f"overwritten: see `trueweight show {self.name}`"
            ) from error
        self.head, self._seen = head, data


def head_name(name: str) -> str:
    """The reference of a run's Head; UsageError where the name is not one word."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"run name {name!r}: expected letters, digits, '_', '.', '-'; choose another --name")
    return f"runs/{name}"


def run_names(store: Store) -> list[str]:
    """The names of the store's runs, ascending."""
    return [name.removeprefix("runs/") for name in store.names("runs/")]


def free_name(store: Store, wanted: str) -> str:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, ... that no run has."""
    names = set(run_names(store))
    number, name = 2, wanted
    while name in names:
        name, number = f"{wanted}-{number}", number + 1
    return name


def taken(name: str) -> UsageError:
    """The error for a run name that is in use."""
    return UsageError(f"run {name!r} exists already; choose another --name, or `trueweight resume {name}`")
