"""The rules of docs/ledger.md that need no books: limits, terms, times, the draw, verdicts, demanded leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from eth_utils.crypto import keccak

from ledger.port import NATIVE, Run, Segment
from storage.merkle import LEAF_BYTES

DELAY = 4
"""Blocks from an event to the block whose beacon it gets."""

UNBONDING = 21 * 24 * 3600
"""Seconds from leaving until the bond can be had, unless a ledger is made with others."""

SEATS, FLAGS, DEMANDS = 64, 32, 16
VERIFIERS = 8
NOBODY = NATIVE
RECORD_BYTES = 274

_WIDTHS = {b"f32": 4, b"i8": 1, b"i32": 4, b"i64": 8, b"bool": 1}


def wrong_term(run: Run, unbonding: int) -> str:
    """The first term that no run may have, or nothing."""
    wrong = {
        "segments": run.segments == 0,
        "work": run.work == 0,
        "verifiers": run.verifiers > VERIFIERS,
        "shares": run.reporter_share + run.harmed_share > 100,
        "missPenalty": run.miss_penalty > 100,
        "window": run.window < 2,
        "answer": run.answer == 0,
        "dispute": run.dispute == 0,
        "flagBond": run.flag_bond == 0,
        "unbonding": run.window + 2 * run.answer + run.dispute > unbonding,
        "submitter": run.submitter == NOBODY,
        "operator": run.operator == NOBODY,
        "court": run.court == NOBODY,
        "beacon": run.beacon == NOBODY,
        "jackpot": run.jackpot > run.pot,
        "rate": run.verifiers > 0 and run.rate == 0,
        "escrow": escrow(run) >= 1 << 128,
    }
    return next((term for term, bad in wrong.items() if bad), "")


def escrow(run: Run) -> int:
    """What the submitter pays for segments, without the pot."""
    return run.segments * (run.work * run.price + run.operator_fee + run.verifiers * run.verifier_fee)


def is_opened(run: Run) -> bool:
    """Whether segments of this run have to be opened before they are final."""
    return run.verifiers > 0 or run.forced_rate > 0


@dataclass(frozen=True, kw_only=True)
class Times:
    """When what may be done with a segment, in seconds; each stretch from one time to just before the next."""

    start: int
    half: int
    end: int
    opened_by: int

    @classmethod
    def of(cls, run: Run, start: int) -> "Times":
        """The times of a segment whose windows start then."""
        end = start + run.window
        return cls(start=start, half=start + run.window // 2, end=end, opened_by=end + run.answer)


def drawn(run: Run, beacon: bytes, seats: int, active: Callable[[int], bool]) -> tuple[int, ...]:
    """The seats that a segment's beacon, of 24 bytes, assigns to it: none where the segment is not audited."""
    if int.from_bytes(beacon[-4:], "big") >= run.rate or not seats:
        return ()
    found: list[int] = []
    for number in range(run.verifiers):
        first = int.from_bytes(keccak(beacon.ljust(32, b"\0") + number.to_bytes(32, "big")), "big") % seats
        around = ((first + step) % seats for step in range(seats))
        found += [seat for seat in around if seat not in found and active(seat)][:1]
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------- verdicts


class Case(Enum):
    """What became of a segment, as far as it matters to those who judged it."""

    FINAL, SILENT, FORCED, UPHELD, REJECTED, DROPPED = (auto() for _ in range(6))


class Said(Enum):
    """What an account said of it."""

    AS_OPENED, ANOTHER, NOT_OK, NOTHING = (auto() for _ in range(4))


class Ruling(Enum):
    """What it gets or loses."""

    NEITHER, FEE, SHARE, BOND, PENALTY = (auto() for _ in range(5))


_SAID = (Said.AS_OPENED, Said.ANOTHER, Said.NOT_OK, Said.NOTHING)
_TABLE = {
    Case.FINAL: (Ruling.FEE, Ruling.NEITHER, Ruling.BOND, Ruling.PENALTY),
    Case.SILENT: (Ruling.FEE, Ruling.NEITHER, Ruling.NEITHER, Ruling.PENALTY),
    Case.FORCED: (Ruling.BOND, Ruling.BOND, Ruling.SHARE, Ruling.PENALTY),
    Case.UPHELD: (Ruling.BOND, Ruling.BOND, Ruling.SHARE, Ruling.PENALTY),
    Case.REJECTED: (Ruling.NEITHER, Ruling.NEITHER, Ruling.SHARE, Ruling.NEITHER),
    Case.DROPPED: (Ruling.NEITHER, Ruling.NEITHER, Ruling.NEITHER, Ruling.NEITHER),
}


def ruling(case: Case, said: Said, assigned: bool) -> Ruling:
    """The table at ILedger.settle; only the assigned have fees and penalties."""
    found = _TABLE[case][_SAID.index(said)]
    return Ruling.NEITHER if found in (Ruling.FEE, Ruling.PENALTY) and not assigned else found


# -------------------------------------------------------------------------------------------------- records and leaves


def wrong_field(run: Run, record: bytes, index: int, state: bytes) -> str:
    """The first field in which a record cannot be segment `index` of the run after `state`, or nothing."""
    wrong = {
        "length": len(record) != RECORD_BYTES,
        "kind": record[:2] != b"\x04\x02",
        "run": record[2:34] != run.record,
        "index": int.from_bytes(record[34:38], "little") != index,
        "steps": int.from_bytes(record[46:50], "little") == 0,
        "prestate": record[50:82] != state,
        "previous": record[178:210] != bytes(32),
    }
    return next((field for field, bad in wrong.items() if bad), "")


def demand_name(segment: Segment, root: bytes, index: int, count: int) -> bytes:
    """The name of the demand for a leaf."""
    return keccak(segment.name + root + index.to_bytes(32, "big") + count.to_bytes(32, "big"))


def tensor_leaves(entry: bytes) -> tuple[bytes, int] | None:
    """(root, number of leaves) of the tensor of an encoded TensorEntry; None where it is none, or too large.

    As the contract reads it: a name of any bytes, and too large also where a later axis is 0.
    """

    def number(at: int) -> int:
        return int.from_bytes(entry[at : at + 4], "little")

    dtype = 6 + number(2)
    axes = dtype + 4 + number(dtype)
    root = axes + 4 + 8 * number(axes)
    size = _WIDTHS.get(entry[dtype + 4 : axes])
    if entry[:2] != b"\x06\x01" or len(entry) != root + 32 or size is None:
        return None
    for at in range(axes + 4, root, 8):
        size *= int.from_bytes(entry[at : at + 8], "little")
        if size >= 1 << 64:
            return None
    return entry[root:], -(-size // LEAF_BYTES)
