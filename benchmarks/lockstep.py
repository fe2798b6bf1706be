"""The ledger's model and its compiled contract, driven by the same random calls and compared after each.

`Compiled` is the contract in pyrevm, `Player` makes calls that are mostly sensible and often not, `Lockstep` sends them
to both. An episode has a ledger and runs of its own, so that everything can be looked at often; it ends by winding all
runs up without their operators' help, after which everybody has to have got out what was theirs.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import IntEnum
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eth_abi.abi import decode, encode
from eth_utils.crypto import keccak

from ledger import rules
from ledger.books import RunBook
from ledger.model import Model
from ledger.payouts import SumTree
from ledger.port import (
    BURN,
    NATIVE,
    Account,
    Commitment,
    Event,
    Leaf,
    Outcome,
    Refused,
    Role,
    Run,
    Segment,
    Status,
    Tree,
)
from ledger.purse import PAYABLE
from ledger.secrets import Chain, committed_form, delegation, forced, record_seal, verdict_seal
from storage import merkle
from storage.codec import encode as encode_record
from storage.errors import FailureError, UsageError
from storage.identity import Identity
from storage.records import SegmentRecord, TensorEntry

ARTIFACTS = Path(__file__).parents[1] / "ledger" / "artifacts"
CAP, UNBONDING = 10**12, 200
START = 1_000_000
DEPLOYER = "0x" + "d0" * 20
PEOPLE = [f"0x{number + 1:02x}{'ab' * 19}" for number in range(40)]
ACTIVE = PEOPLE[:8]
KEYS = [Identity(sha256(bytes([number])).digest()) for number in range(3)]
CHAIN = Chain(sha256(b"operator").digest(), 32)
ALWAYS = (1 << 32) - 1
ERRORS = (
    "Unknown", "WrongStatus", "NotAllowed", "TooEarly", "TooLate", "Insufficient", "CapExceeded", "NotArrived",
    "TransferFailed", "BadTerms", "BadRecord", "BadSignature", "BadProof", "BadSecret", "BadSeal", "Already", "Full",
    "StillOpen",
)  # fmt: skip


class Difference(FailureError):
    """Model and contract do not do the same."""


# ------------------------------------------------------------------------------------------------------- the contract


def plain(value: Any) -> Any:
    """A value as the ABI has it: structs and lists as tuples, enumerations as numbers."""
    if is_dataclass(value):
        return tuple(plain(getattr(value, item.name)) for item in fields(value))
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    if isinstance(value, IntEnum):
        return int(value)
    return value


def snake(name: str) -> str:
    """blockNumber as block_number."""
    return re.sub(r"(?<=[a-z])([A-Z])", lambda found: "_" + found[1].lower(), name).lower()


def camel(name: str) -> str:
    """block_number as blockNumber."""
    return re.sub(r"_([a-z])", lambda found: found[1].upper(), name)


def abi_type(item: dict[str, Any]) -> str:
    """The type of an ABI input, tuples written out."""
    if not item["type"].startswith("tuple"):
        return str(item["type"])
    inner = ",".join(abi_type(part) for part in item["components"])
    return f"({inner}){item['type'][5:]}"


@dataclass(frozen=True)
class Entry:
    """A function, event or error of an ABI."""

    data: dict[str, Any]

    @property
    def types(self) -> list[str]:
        """Of its inputs."""
        return [abi_type(item) for item in self.data["inputs"]]

    @property
    def outputs(self) -> list[str]:
        """The types of what a function answers."""
        return [abi_type(item) for item in self.data.get("outputs", ())]

    @property
    def hash(self) -> bytes:
        """Of its signature."""
        return keccak(f"{self.data['name']}({','.join(self.types)})".encode())


@dataclass(frozen=True)
class Contract:
    """A compiled contract: functions, events and errors by name, creation code, where it links to which library."""

    functions: dict[str, Entry]
    events: dict[str, Entry]
    errors: dict[str, Entry]
    code: bytes
    links: dict[str, list[int]]


@cache
def artifact(name: str) -> Contract:
    """What `ledger/artifacts` has under that name; UsageError where there is nothing."""
    path = ARTIFACTS / f"{name}.json"
    if not path.exists():
        raise UsageError(f"artifact {path}: expected a compiled contract, got nothing; build the contracts first")
    found = json.loads(path.read_text())

    def entries(kind: str) -> dict[str, Entry]:
        return {item["name"]: Entry(item) for item in found["abi"] if item["type"] == kind}

    code = bytes.fromhex(found["bytecode"].removeprefix("0x"))
    return Contract(entries("function"), entries("event"), entries("error"), code, found.get("links") or {})


class Compiled:
    """The contract in pyrevm, with mocks of a beacon and of a token, and the gas of each call by function."""

    def __init__(self) -> None:
        import pyrevm

        self._pyrevm = pyrevm
        env = pyrevm.Env(cfg=pyrevm.CfgEnv(chain_id=1))
        self._evm: Any = pyrevm.EVM(env=env, spec_id="CANCUN")
        self.gas: dict[str, list[int]] = {}
        ledger = artifact("Ledger")
        self.functions = ledger.functions
        self._events = {entry.hash: entry for entry in ledger.events.values()}
        self._errors = {entry.hash[:4]: entry for entry in ledger.errors.values()}
        self._selectors = {name: entry.hash[:4] for name, entry in self.functions.items()}
        self._types = {name: entry.types for name, entry in self.functions.items()}
        self._outputs = {name: item.outputs for name, item in self.functions.items()}
        self.clock(1, START)
        for account in (DEPLOYER, *PEOPLE, *map(key_account, KEYS)):
            self._evm.set_balance(account, 10**30)
        self.address = self._deploy("Ledger", encode(["uint256", "uint64"], [CAP, UNBONDING]))
        self.beacon = self._deploy("MockBeacon")
        self.token = self._deploy("MockToken")

    def _deploy(self, name: str, arguments: bytes = b"") -> Account:
        contract = artifact(name)
        code = bytearray(contract.code)
        for library, places in contract.links.items():
            address = bytes.fromhex(self._deploy(library)[2:])
            for place in places:
                code[place : place + 20] = address
        return str(self._evm.deploy(DEPLOYER, bytes(code) + arguments)).lower()

    def clock(self, block: int, time: int) -> None:
        """Sets both clocks of the chain."""
        self._block = block
        self._evm.set_block_env(self._pyrevm.BlockEnv(number=block, timestamp=time, gas_limit=2**63))

    def mock(self, sender: Account, contract: str, function: str, *args: Any) -> None:
        """A call of the mock beacon or token."""
        entry = artifact(contract).functions[function]
        to = self.beacon if contract == "MockBeacon" else self.token
        self._evm.message_call(sender, to, calldata=entry.hash[:4] + encode(entry.types, list(args)))

    def send(self, sender: Account, function: str, args: Sequence[Any], value: int) -> tuple[Event, ...]:
        """The events of a call, as `Model.send`."""
        data = self._selectors[camel(function)] + encode(self._types[camel(function)], plain(args))
        try:
            self._evm.message_call(sender, self.address, calldata=data, value=value)
        except RuntimeError as error:
            raise self._refusal(str(error), function) from None
        result = self._evm.result
        self.gas.setdefault(function, []).append(result.gas_used)
        return tuple(self._event(log) for log in result.logs if log.address.lower() == self.address)

    def view(self, function: str, *args: Any) -> Any:
        """The answer of a view; of a struct its fields in order."""
        data = self._selectors[function] + encode(self._types[function], plain(args))
        answer = self._evm.message_call(DEPLOYER, self.address, calldata=data, is_static=True)
        return plain(decode(self._outputs[function], bytes(answer))[0])

    def fields(self, function: str) -> list[str]:
        """The names of the fields of a view's struct."""
        return [snake(item["name"]) for item in self.functions[function].data["outputs"][0]["components"]]

    def _refusal(self, told: str, function: str) -> Refused:
        found = re.search(r"Revert .*output: 0x([0-9a-f]*)", told)
        output = bytes.fromhex(found[1]) if found else b""
        entry = self._errors.get(output[:4])
        if entry is None:
            return Refused(f"unnamed: {told[:200]}", call=function)
        return Refused(entry.data["name"], decode(entry.types, output[4:]), call=function)

    def _event(self, log: Any) -> Event:
        topics, data = log.data
        topics = [bytes.fromhex(topic[2:]) if isinstance(topic, str) else bytes(topic) for topic in topics]
        entry = self._events[topics[0]]
        inputs = entry.data["inputs"]
        loose = [item for item in inputs if not item["indexed"]]
        values = dict(
            zip([item["name"] for item in loose], decode([abi_type(item) for item in loose], bytes(data)), strict=True)
        )
        for item, topic in zip([item for item in inputs if item["indexed"]], topics[1:], strict=True):
            (values[item["name"]],) = decode([abi_type(item)], topic)
        args = {snake(item["name"]): plain(values[item["name"]]) for item in inputs}
        return Event(name=entry.data["name"], args=args, block=self._block)


# ------------------------------------------------------------------------------------------------------------ players


def key_account(key: Identity) -> Account:
    """The address of a key."""
    return "0x" + key.address.hex()


@dataclass(frozen=True)
class State:
    """A state with its tensors' bytes: what demands ask for."""

    tensors: tuple[bytes, ...]
    entries: tuple[bytes, ...]

    @property
    def root(self) -> bytes:
        """What a segment commits to."""
        return merkle.list_root(self.entries)


@cache
def states() -> tuple[State, ...]:
    """Some states of two tensors; in the last one the operator commits to what is no TensorEntry."""
    made = []
    for number in range(4):
        tensors = tuple(bytes([number, place]) * (2000 + 3000 * place) for place in range(2))
        entries = [
            encode_record(
                TensorEntry(name=f"t{place}", dtype="i32", shape=(len(data) // 4,), root=merkle.bytes_root(data))
            )
            for place, data in enumerate(tensors)
        ]
        made.append(State(tensors, tuple(entries)))
    return (*made, State((b"", b""), (made[0].entries[0] + b"x", made[0].entries[1].replace(b"i32", b"f64"))))


@dataclass(frozen=True)
class Made:
    """What the operator knows of a segment that it commits."""

    commitment: Commitment
    true: bytes
    salt: bytes
    tree: SumTree
    steps: tuple[bytes, ...]
    state: State


@dataclass(frozen=True)
class Call:
    """A call to be sent."""

    sender: Account
    function: str
    args: tuple[Any, ...]
    value: int = 0


@dataclass
class Opinion:
    """A verdict that somebody has sealed, or would have."""

    ok: bool
    witness: bytes
    salt: bytes


@dataclass
class Player:
    """Everybody at once: knows the model's books and all secrets, and makes a next call."""

    dice: random.Random
    model: Model
    beacon: Account
    token: Account
    functions: dict[str, Entry]
    runs: list[Run] = field(default_factory=list)
    records: dict[bytes, bytes] = field(default_factory=dict)
    used: Counter[bytes] = field(default_factory=Counter)
    made: dict[bytes, Made] = field(default_factory=dict)
    opinions: dict[bytes, Opinion] = field(default_factory=dict)
    focus: Any = None
    faithful: bool = False
    built: list[Made] = field(default_factory=list)
    asked: dict[tuple[bytes, bytes], tuple[bytes, int, int]] = field(default_factory=dict)

    def next(self) -> Call:
        """A call: what some segment waits for, or for the function that the dice say, and now and then altered."""
        while True:
            name = self._waited_for() if self.dice.random() < 0.6 else self.dice.choice(NAMES)
            call = self.call(name)
            if call is not None:
                return self._altered(call)

    def call(self, function: str, run: Run | None = None) -> Call | None:
        """A sensible call of a function, about one run where it is given."""
        runs, self.runs = self.runs, [run] if run else self.runs
        call: Call | None = getattr(self, f"_{function}")()
        self.runs = runs
        return call

    def _waited_for(self) -> str:
        """The function of which a pending segment, which `some_segment` finds from now on, has most need."""
        self.focus = None
        self.focus = book = self.some_segment(Outcome.PENDING)
        if book is None:
            return self.dice.choice(["open", "accept", "begin", "join", "commit", "commit"])
        if book.start is None:
            early = self.model.block <= book.base + rules.DELAY
            return self.dice.choice(NAMES) if early and self.dice.random() < 0.8 else "draw"
        times = rules.Times.of(book.run, book.start)
        if self.model.time < times.half:
            return self.dice.choice(["seal", "seal", "seal", "demand", "answer"])
        if self.model.time < times.end:
            return self.dice.choice(["reveal", "reveal", "reveal", "demand", "answer"])
        if rules.is_opened(book.run) and book.opened is None:
            return self.dice.choice(["unseal", "unseal", "unseal", "answer", "forfeit"])
        if book.flags and not book.forced and not book.dismissed:
            return self.dice.choice(["resolve", "resolve", "finalise"])
        return self.dice.choice(["finalise", "finalise", "resolve", "answer", "withheld"])

    def learn(self, call: Call, events: Sequence[Event]) -> None:
        """What a call that was not refused tells."""
        if call.function == "open":
            self.runs.append(call.args[0])
            self.records[call.args[0].id] = call.args[1]
        if call.function == "unseal":
            self.used[call.args[0].id] += 1
        if call.function == "demand":
            told = events[-1].args
            self.asked[told["segment"], told["demand"]] = told["root"], told["index"], told["count"]
        if call.function == "commit":
            for event, given in zip(events, call.args[1], strict=True):
                made = next(
                    made
                    for made in self.built
                    if made.commitment.seal == given.seal or made.commitment.record == given.record
                )
                self.made[event.args["segment"]] = made

    # -- who, what, when

    def _someone(self) -> Account:
        return self.dice.choice(ACTIVE)

    def _bytes(self) -> bytes:
        return self.dice.randbytes(32)

    def _to_begin(self, book: RunBook) -> bool:
        return book.status == Status.ACTIVE and not book.beacon

    def _rarely(self, run: Run | None) -> Run | None:
        return run if self.dice.random() < 0.1 else None

    def _some_run(self, *statuses: Status) -> Run | None:
        fitting = [run for run in self.runs if not statuses or self.model.runs[run.id].status in statuses]
        return self.dice.choice(fitting) if fitting else None

    def some_segment(self, *outcomes: Outcome, where: Callable[[Any], bool] = bool) -> Any:
        """The book of one of the newest segments with such an outcome, if there is one."""
        if self.focus is not None and (self.faithful or self.dice.random() < 0.8):
            found = self.model.segments[self.focus.data.name]
            if found.outcome in outcomes and where(found):
                return found
        fitting = [book for book in self.model.segments.values() if book.outcome in outcomes and where(book)]
        return self.dice.choice(fitting[-12:]) if fitting else None

    def edges(self) -> list[int]:
        """The times at which something begins or ends."""
        found = []
        for book in self.model.segments.values():
            if book.outcome == Outcome.PENDING and book.start is not None:
                times = rules.Times.of(book.run, book.start)
                ends = [times.end if book.opened is None else book.opened, times.end]
                found += [times.half, times.end, times.opened_by, *(end + book.run.dispute for end in ends)]
        found += [
            demand.time + self.model.segments[name].run.answer for (name, _), demand in self.model.demands.items()
        ]
        found += [bond.release_at for bond in self.model.bonds.values() if bond.left is not None]
        found += [
            book.last + book.run.answer + book.run.dispute
            for book in self.model.runs.values()
            if book.status in (Status.ACTIVE, Status.CANCELLED)
        ]
        return sorted(edge for edge in found if edge > self.model.time)

    def _altered(self, call: Call) -> Call:
        if self.dice.random() < 0.06:
            call = replace(call, sender=self.dice.choice([*ACTIVE, *map(key_account, KEYS)]))
        if self.dice.random() < 0.12 and call.args:
            args = list(call.args)
            place = self.dice.randrange(len(args))
            inputs = self.functions[camel(call.function)].data["inputs"]
            args[place] = self._mutated(args[place], inputs[place])
            call = replace(call, args=tuple(args))
        if call.function in PAYABLE - {"deposit"} and self.dice.random() < 0.1:
            call = replace(call, value=self.dice.choice([1, 50, 2000]))
        return call

    def _mutated(self, value: Any, item: dict[str, Any]) -> Any:
        """Another value of the same ABI type."""
        dice, kind = self.dice, item["type"]
        if kind.endswith("[]"):
            inner = {**item, "type": kind[:-2]}
            items = list(value)
            action = dice.randrange(3) if items else 2
            if action == 0:
                items.pop(dice.randrange(len(items)))
            elif action == 1:
                place = dice.randrange(len(items))
                items[place] = self._mutated(items[place], inner)
            elif items or inner["type"] == "bytes32":
                items.append(items[0] if items else self._bytes())
            return tuple(items)
        if kind == "tuple":
            place = dice.randrange(len(item["components"]))
            name = fields(value)[place].name
            return replace(value, **{name: self._mutated(getattr(value, name), item["components"][place])})
        if item["name"] == "token":
            return dice.choice([NATIVE, self.token])
        if item["name"] == "beacon":
            return NATIVE
        if kind == "address":
            return dice.choice([*PEOPLE[:10], NATIVE])
        if kind == "bool":
            return not value
        if kind == "bytes32":
            return dice.choice([bytes(32), self._bytes(), bytes([value[0] ^ 1]) + value[1:]])
        if kind == "bytes":
            flipped = bytearray(value or b"\0")
            flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
            return dice.choice([bytes(flipped), value[:-1], value + b"\0", b""])
        if kind == "uint8" and isinstance(value, (Role, Tree)):
            return type(value)(dice.randrange(3))
        bits = int(kind.removeprefix("uint"))
        return dice.choice([0, max(value - 1, 0), min(value + 1, 2**bits - 1), 2**bits - 1])

    # -- money

    def _deposit(self) -> Call:
        token = self.dice.choice([NATIVE, NATIVE, self.token])
        room = CAP - self.model.holdings.get(token, 0)
        amount = self.dice.choice([0, 1, 5000, 5000, 200_000, room + 1])
        if self.dice.random() < 0.02:
            amount = room
        sent = amount if token == NATIVE else 0
        if self.dice.random() < 0.1:
            sent += 1
        return Call(self.dice.choice([*ACTIVE, key_account(KEYS[0])]), "deposit", (token, amount), sent)

    def _withdraw(self) -> Call:
        token, account = self.dice.choice([NATIVE, self.token]), self._someone()
        has = self.model.balance_of(token, account)
        to = self.dice.choice([account, self._someone(), self.beacon, self.model.address])
        return Call(account, "withdraw", (token, self.dice.choice([has, has + 1, has // 7, 0]), to))

    def _delegate(self) -> Call:
        key, account = self.dice.choice(KEYS[:2]), self._someone()
        deadline = self.model.time + self.dice.choice([0, 1, 1, 50])
        message = delegation(self.model.chain_id, self.model.address, account, deadline)
        signature = key.sign(message)
        last = signature[64] + self.dice.choice([27, 27, 27, 0])
        return Call(account, "delegate", (key_account(key), deadline, signature[:64] + bytes([last])))

    # -- runs

    def _open(self) -> Call | None:
        if len(self.runs) >= 4 and self.dice.random() < 0.9:
            return None
        if self.dice.random() < 0.2 and self.runs:
            run = self.runs[0]
            return Call(run.submitter, "open", (run, self.records[run.id]))
        run, record = self.terms()
        return Call(run.submitter, "open", (run, record))

    def terms(self) -> tuple[Run, bytes]:
        """Terms of a run, and its record; short windows, and often nothing where something could be."""
        dice = self.dice
        record = b"run" + self._bytes()
        sampled = dice.choice([0, 0, 1, 2, 8])
        operator = self._someone()
        run = Run(
            record=sha256(record).digest(),
            initial_state=states()[0].root,
            submitter=self._someone(),
            operator=operator,
            token=dice.choice([NATIVE, NATIVE, self.token]),
            court=self._someone(),
            beacon=self.beacon,
            segments=dice.randint(1, 5),
            tensors=2,
            work=12,
            price=dice.choice([0, 3]),
            operator_fee=5,
            verifier_fee=7,
            operator_bond=dice.choice([0, 1000, 1001]),
            worker_bond=dice.choice([0, 101]),
            verifier_bond=dice.choice([0, 61]),
            flag_bond=dice.choice([1, 20]),
            pot=dice.choice([0, 150, 150]),
            jackpot=dice.choice([0, 77, 77]),
            rate=dice.choice([ALWAYS, ALWAYS, 1 << 31, 0]),
            forced_rate=dice.choice([0, 0, 1 << 31, ALWAYS]),
            verifiers=sampled,
            reporter_share=dice.choice([0, 33, 50]),
            harmed_share=dice.choice([0, 30, 50]),
            miss_penalty=dice.choice([0, 10, 100]),
            window=dice.choice([11, 40]),
            answer=dice.choice([7, 15]),
            dispute=dice.choice([9, 20]),
            salt=self._bytes(),
        )
        return run, record

    def _accept(self) -> Call | None:
        run = self._some_run(Status.OPEN) or self._rarely(self._some_run())
        return Call(run.operator, "accept", (run, CHAIN.end)) if run else None

    def _begin(self) -> Call | None:
        waiting = [run for run in self.runs if self._to_begin(self.model.runs[run.id])]
        run = self.dice.choice(waiting) if waiting else self._rarely(self._some_run())
        return Call(self._someone(), "begin", (run,)) if run else None

    def _join(self) -> Call | None:
        run = self._some_run(Status.OPEN, Status.ACTIVE)
        if run is None:
            return None
        role = self.dice.choice([Role.WORKER, Role.VERIFIER, Role.VERIFIER, Role.VERIFIER, Role.OPERATOR])
        sender = run.operator if role == Role.OPERATOR else self.dice.choice([*ACTIVE, key_account(KEYS[0])])
        book = self.model.runs[run.id]
        free = [seat for seat in range(book.seats) if (run.id, seat) not in self.model.seats]
        seat = self.dice.choice([*free, book.seats, book.seats, book.seats + 1, 0, 64])
        return Call(sender, "join", (run, role, seat))

    def _resign(self) -> Call | None:
        return self._with_bond("resign")

    def _release(self) -> Call | None:
        return self._with_bond("release")

    def _with_bond(self, function: str) -> Call | None:
        left = function == "release"
        there = [key for key, bond in self.model.bonds.items() if left == (bond.left is not None)]
        there = there or list(self.model.bonds)
        if not there:
            return None
        name, role, account = self.dice.choice(there)
        run = self.model.runs[name].run
        return Call(account, function, (run, role, account) if left else (run, role))

    def _cancel(self) -> Call | None:
        run = self._some_run(Status.OPEN, Status.ACTIVE)
        return Call(run.submitter, "cancel", (run,)) if run else None

    def _close(self) -> Call | None:
        run = self._some_run(Status.CANCELLED) or self._rarely(self._some_run())
        return Call(self._someone(), "close", (run,)) if run else None

    # -- segments

    def _commit(self) -> Call | None:
        begun = [run for run in self.runs if self.model.runs[run.id].beacon]
        run = self.dice.choice(begun) if begun else self._some_run()
        if run is None or (self.model.runs[run.id].status != Status.ACTIVE and self.dice.random() < 0.9):
            return None
        book = self.model.runs[run.id]
        if book.committed == run.segments and self.dice.random() < 0.9:
            return None
        count = min(self.dice.choice([1, 1, 2]), max(run.segments - book.committed, self.dice.randrange(2)))
        self.built = []
        state = book.state or run.initial_state
        for index in range(book.committed, book.committed + count):
            self.built.append(self._build(run, index, state))
            state = self.built[-1].state.root
        return Call(self._of_operator(run), "commit", (run, tuple(made.commitment for made in self.built)))

    def _build(self, run: Run, index: int, prestate: bytes) -> Made:
        dice, book = self.dice, self.model.runs[run.id]
        number = self.used[run.id] + index - book.opened + 1
        due = forced(CHAIN.secret(number), book.beacon, index, book.attempt, run.forced_rate)
        steps = tuple(self._bytes() for _ in range(dice.choice([1, 2, 20])))
        state = dice.choice(states())
        record = SegmentRecord(
            run=run.record,
            index=index,
            first_step=0,
            steps=len(steps),
            prestate=prestate,
            poststate=state.root,
            steps_root=merkle.list_root(steps),
            receipts_root=self._bytes(),
            previous=bytes(32),
            steps_object=self._bytes(),
            receipts_object=self._bytes(),
        )
        false = committed_form(replace(record, steps_object=self._bytes()))
        given = false if due != (dice.random() < 0.07) else committed_form(record)
        work = dice.choice([run.work, run.work // 2])
        limit = work * run.price
        amounts = sorted({self._someone(), key_account(KEYS[1]), self._someone()})
        tree = SumTree([(key, limit // len(amounts)) for key in amounts] if dice.random() < 0.9 else [])
        true, salt = sha256(committed_form(record)).digest(), self._bytes()
        commitment = Commitment(
            record=given, work=work, payout_root=tree.root, payout=tree.sum, seal=record_seal(true, salt)
        )
        return Made(commitment, true, salt, tree, steps, state)

    def _of_operator(self, run: Run) -> Account:
        keys = [key for key, account in self.model.accounts.items() if account == run.operator]
        return self.dice.choice([run.operator, run.operator, *keys])

    def _draw(self) -> Call | None:
        book = self.some_segment(Outcome.PENDING, where=lambda book: book.start is None)
        return book and Call(self._someone(), "draw", (book.run, book.data))

    def _unseal(self) -> Call | None:
        book = self.some_segment(Outcome.PENDING, where=lambda book: book.opened is None)
        if book is None or book.data.name not in self.made:
            return None
        run, made = book.run, self.made[book.data.name]
        secret = CHAIN.secret(self.used[run.id] + 1)
        # The witness is a function of the true record, so that verifiers can know it.
        return Call(self._of_operator(run), "unseal", (run, book.data, secret, made.true, made.true, made.salt))

    def _forfeit(self) -> Call | None:
        book = self.some_segment(Outcome.PENDING, where=lambda book: book.opened is None)
        return book and Call(self._someone(), "forfeit", (book.run, book.data))

    def _finalise(self) -> Call | None:
        book = self.some_segment(
            Outcome.PENDING, where=lambda book: book.data.index == self.model.runs[book.run.id].final
        )
        return book and Call(self._someone(), "finalise", (book.run, book.data))

    def _resolve(self) -> Call | None:
        book = self.some_segment(Outcome.PENDING, where=lambda book: book.flags > 0) or (
            self.some_segment(Outcome.PENDING) if self.dice.random() < 0.3 else None
        )
        if book is None:
            return None
        culprit = self.dice.choice([NATIVE, self._someone(), key_account(KEYS[1]), key_account(KEYS[1])])
        return Call(book.run.court, "resolve", (book.run, book.data, self.dice.random() < 0.6, culprit))

    # -- verdicts

    def _seal(self) -> Call | None:
        book = self.some_segment(Outcome.PENDING)
        if book is None:
            return None
        segment = book.data
        drawn = [self.model.seats.get((book.run.id, seat)) for seat in book.assigned]
        sender = self.dice.choice([*filter(None, drawn), *filter(None, drawn), self._someone(), key_account(KEYS[0])])
        account = self.model.account_of(sender)
        made = self.made.get(segment.name)
        witness = made.true if made and self.dice.random() < 0.7 else self._bytes()
        opinion = Opinion(self.dice.random() < 0.5, witness, self._bytes())
        return Call(sender, "seal", (book.run, segment, self.sealed(segment, account, opinion)))

    def sealed(self, segment: Segment, account: Account, opinion: Opinion) -> bytes:
        """The seal of an opinion, which is remembered."""
        seal = verdict_seal(segment.name, account, opinion.ok, opinion.witness, opinion.salt)
        self.opinions[seal] = opinion
        return seal

    def _reveal(self) -> Call | None:
        waiting = [
            (name, account)
            for (name, account), verdict in self.model.verdicts.items()
            if verdict.ok is None and self.model.segments[name].outcome == Outcome.PENDING
        ]
        if not waiting:
            return None
        name, account = self.dice.choice(waiting)
        book, seal = self.model.segments[name], self.model.verdicts[name, account].seal
        opinion = self.opinions.get(seal, Opinion(True, seal, seal))
        return Call(account, "reveal", (book.run, book.data, opinion.ok, opinion.witness, opinion.salt))

    def _settle(self) -> Call | None:
        book = self.some_segment(*Outcome) if self.dice.random() < 0.2 else self.some_segment(*OVER)
        if book is None:
            return None
        accounts = [account for name, account in self.model.verdicts if name == book.data.name]
        drawn = [self.model.seats.get((book.run.id, seat)) for seat in book.assigned]
        account = self.dice.choice([*accounts, *filter(None, drawn), self._someone()])
        return Call(self._someone(), "settle", (book.run, book.data, account))

    # -- demands

    def _demand(self) -> Call | None:
        book = self.some_segment(Outcome.PENDING)
        made = self.made.get(book.data.name) if book else None
        if made is None:
            return None
        tree = self.dice.choice(list(Tree))
        count = len(made.steps) if tree == Tree.STEPS else 2
        entry = Leaf()
        if tree == Tree.TENSOR:
            place = self.dice.randrange(2)
            hashes = [merkle.leaf_hash(item) for item in made.state.entries]
            proof = merkle.inclusion_proof(hashes, place)
            entry = Leaf(data=made.state.entries[place], index=place, count=2, proof=proof)
            count = -(-len(made.state.tensors[place]) // merkle.LEAF_BYTES)
        index = self.dice.choice([*range(count), count])
        return Call(self._someone(), "demand", (book.run, book.data, tree, index, entry))

    def _answer(self) -> Call | None:
        found = self._some_demand(pending=True)
        if found is None:
            return None
        book, root, index, count = found
        made = self.made[book.data.name]
        trees = [made.steps, made.state.entries, *map(_leaves, made.state.tensors)]
        items = next((items for items in trees if merkle.list_root(items) == root and len(items) == count), None)
        if items is None:
            return None
        proof = merkle.inclusion_proof([merkle.leaf_hash(item) for item in items], index)
        sender = self.dice.choice([book.run.operator, self._someone()])
        return Call(sender, "answer", (book.run, book.data, root, index, count, items[index], proof))

    def _withheld(self) -> Call | None:
        found = self._some_demand(pending=self.dice.random() < 0.7)
        if found is None:
            return None
        book, root, index, count = found
        return Call(self._someone(), "withheld", (book.run, book.data, root, index, count))

    def _some_demand(self, *, pending: bool) -> Any:
        open_ones = [
            (name, demand)
            for name, demand in self.model.demands
            if pending == (self.model.segments[name].outcome == Outcome.PENDING)
        ]
        return self.demanded(*self.dice.choice(open_ones)) if open_ones else None

    def demanded(self, name: bytes, demand: bytes) -> tuple[Any, bytes, int, int]:
        """(segment's book, root, index, count) of a demand."""
        return self.model.segments[name], *self.asked[name, demand]

    # -- payouts

    def _claim(self) -> Call | None:
        return self._leaf("claim", Outcome.FINAL)

    def _compensate(self) -> Call | None:
        return self._leaf("compensate", Outcome.REJECTED)

    def _leaf(self, function: str, outcome: Outcome) -> Call | None:
        book = self.some_segment(*(list(Outcome) if self.dice.random() < 0.1 else [outcome]))
        made = self.made.get(book.data.name) if book else None
        if made is None or not made.tree.amounts:
            return None
        proof = made.tree.prove(self.dice.randrange(len(made.tree.amounts)))
        return Call(self._someone(), function, (book.run, book.data, *proof.arguments()))


def _leaves(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[start : start + merkle.LEAF_BYTES] for start in range(0, len(data), merkle.LEAF_BYTES))


OVER = (Outcome.FINAL, Outcome.REJECTED, Outcome.DROPPED)
WEIGHTS = {
    "deposit": 2, "withdraw": 2, "delegate": 1, "open": 3, "accept": 3, "begin": 3, "join": 6, "resign": 2,
    "release": 2, "cancel": 1, "close": 2, "commit": 8, "draw": 8, "unseal": 8, "forfeit": 2, "finalise": 6,
    "resolve": 5, "seal": 12, "reveal": 12, "settle": 10, "demand": 5, "answer": 5, "withheld": 4,
    "claim": 5, "compensate": 4,
}  # fmt: skip
NAMES = [name for name, weight in WEIGHTS.items() for _ in range(weight)]


# ----------------------------------------------------------------------------------------------------------- lockstep


class Lockstep:
    """Model and contract, the same calls to both; Difference where they do not do the same."""

    def __init__(self, seed: str) -> None:
        self.dice = random.Random(seed)
        self.contract = Compiled()
        self._beacons: dict[int, bytes] = {}
        self.model = Model(
            lambda block: self._beacons.get(block, bytes(32)),
            cap=CAP,
            unbonding=UNBONDING,
            address=self.contract.address,
            time=START,
        )
        beacon, token = self.contract.beacon, self.contract.token
        self.model.refusing.add(beacon)
        self.token = token
        self.player = Player(self.dice, self.model, beacon, token, self.contract.functions)
        self.log: list[str] = []
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.steps = 0
        fee = self.dice.choice([0, 0, 0, 1])
        self.model.fees[token] = fee
        self.contract.mock(DEPLOYER, "MockToken", "setFee", fee)
        for account in ACTIVE[:7]:
            self.model.mint(token, account, 10**7)
            self.contract.mock(DEPLOYER, "MockToken", "mint", account, 10**7)
        for account in (*ACTIVE, *map(key_account, KEYS)):
            self.contract.mock(account, "MockToken", "approve", self.contract.address, 2**255)
        for account in ACTIVE:
            self.both(Call(account, "deposit", (NATIVE, 50_000), 50_000))
            if account in ACTIVE[:7]:
                self.both(Call(account, "deposit", (token, 50_000)))

    def play(self, steps: int) -> None:
        """So many calls, and time passes in between."""
        while self.steps < steps:
            if self.dice.random() < 0.25:
                self.pass_time()
            self.both(self.player.next())
            if self.dice.random() < 0.02:
                self.crowd()
            if self.dice.random() < 0.03:
                self.story()
            if self.steps % 40 == 0:
                self.look()
        self.look()

    def pass_time(self) -> None:
        """A few blocks, and often to one of the next edges of what is going on, or just beside it."""
        edges = self.player.edges()
        seconds = self.dice.choice([0, 0, 1, 3])
        if edges and self.dice.random() < 0.5:
            edge = edges[min(int(self.dice.expovariate(2)), len(edges) - 1)]
            seconds = max(edge - self.model.time + self.dice.choice([-1, 0, 0, 1]), 0)
        self.mine(self.dice.choice([0, 1, 1, 5]), seconds)

    def mine(self, blocks: int, seconds: int, forgetful: float = 0.1) -> None:
        """Moves both clocks; some blocks have no beacon."""
        for block in range(self.model.block, self.model.block + blocks):
            if self.dice.random() >= forgetful:
                self._beacons[block] = self.dice.randbytes(32)
                self.contract.mock(DEPLOYER, "MockBeacon", "set", block, self._beacons[block])
        self.model.mine(blocks, seconds)
        self.contract.clock(self.model.block, self.model.time)

    def both(self, call: Call) -> tuple[Event, ...] | None:
        """The events of a call, the same from both; None where both refuse it for the same reason."""
        self.steps += 1
        self.log.append(f"{self.model.block} {self.model.time} {call.sender[:6]} {call.function} {call.value}")
        balances = dict(self.model.balances)
        got = self._result(lambda: self.contract.send(call.sender, call.function, call.args, call.value))
        expected = self._result(lambda: self.model.send(call.sender, call.function, *call.args, value=call.value))
        self.log[-1] += f" -> {expected if isinstance(expected, str) else 'done'}"
        if isinstance(expected, str) or isinstance(got, str):
            self._same(call.function, expected, got, call)
            self.refused[str(expected).partition("(")[0]] += 1
            return None
        told = [(event.name, {name: plain(value) for name, value in event.args.items()}) for event in expected]
        self._same(call.function, told, [(event.name, dict(event.args)) for event in got], call)
        self.done[call.function] += 1
        for key, balance in self.model.balances.items():
            if balances.get(key) != balance:
                self._same(f"balance of {key}", balance, self.contract.view("balanceOf", *key), call)
        self.player.learn(call, expected)
        return expected

    def look(self) -> None:
        """All balances, what is held, all outcomes, all structs; and the model's invariants."""
        self.model.check()
        model = self.model
        runs, segments = model.runs.values(), model.segments.values()
        views: list[tuple[str, Iterable[tuple[Any, ...]]]] = [
            ("balanceOf", model.balances),
            ("held", [(NATIVE,), (self.token,)]),
            ("runOf", [(name,) for name in model.runs]),
            ("seatOf", [(book.run.id, seat) for book in runs for seat in range(book.seats + 1)]),
            ("bondOf", model.bonds),
            ("segmentOf", [(name,) for name in model.segments]),
            ("outcomeOf", [(book.run, book.data) for book in segments]),
            ("assignedOf", [(book.run, book.data) for book in segments]),
            ("verdictOf", model.verdicts),
            ("demandOf", [(demand,) for _, demand in model.demands]),
            ("claimed", model.claims),
        ]
        for function, asked in views:
            for args in asked:
                self._view(function, *args)

    def _view(self, function: str, *args: Any) -> None:
        expected, got = self.model.read(snake(function), *args), self.contract.view(function, *args)
        if isinstance(expected, SimpleNamespace):
            expected = tuple(getattr(expected, name) for name in self.contract.fields(function))
        self._same(f"{function} of {args}", plain(expected), got)

    def crowd(self) -> None:
        """Many at once, for the limits of flags and demands."""
        book = self.player.some_segment(Outcome.PENDING, where=lambda book: book.start is not None)
        if book is None or self.model.time >= book.start + book.run.window // 2:
            return
        run, segment = book.run, book.data
        made = self.player.made[segment.name]
        if len(made.steps) > rules.DEMANDS:
            for index in range(rules.DEMANDS + 1):
                self.both(Call(ACTIVE[index % 8], "demand", (run, segment, Tree.STEPS, index, Leaf()), 2000))
        if run.token == NATIVE and self.dice.random() < 0.3:
            opinion = Opinion(False, bytes(32), bytes(32))
            for account in PEOPLE:
                seal = self.player.sealed(segment, account, opinion)
                self.both(Call(account, "seal", (run, segment, seal), 100))
            self.mine(1, book.start + run.window // 2 - self.model.time)
            for account in PEOPLE:
                self.both(Call(account, "reveal", (run, segment, False, bytes(32), bytes(32))))

    def story(self) -> None:
        """A run with verifiers and its first segments from beginning to end, in order and with nothing altered."""
        dice, (terms, record) = self.dice, self.player.terms()
        run = replace(terms, verifiers=dice.choice([1, 2]), rate=ALWAYS, window=40, operator_bond=1000)
        run = replace(run, forced_rate=dice.choice([0, 0, 1 << 31, ALWAYS]), verifier_bond=61, pot=90, jackpot=77)
        if self.both(Call(run.submitter, "open", (run, record))) is None:
            return
        for seat, account in enumerate(dice.sample(ACTIVE, 3)):
            self.both(Call(account, "join", (run, Role.VERIFIER, seat)))
        worker = key_account(KEYS[1])
        self.both(Call(worker, "join", (run, Role.WORKER, 0), 0 if run.token != NATIVE else run.worker_bond))
        self._do("delegate")
        self.both(Call(run.operator, "accept", (run, CHAIN.end)))
        self.mine(rules.DELAY + 1, 0, forgetful=0)
        self.both(Call(DEPLOYER, "begin", (run,)))
        self.player.faithful = True
        for _ in range(dice.choice([1, 2])):
            self._chapter(run)
        self.player.faithful = False

    def _chapter(self, run: Run) -> None:
        """The run's next segment."""
        dice = self.dice
        self._do("commit", run=run)
        found = self.model.line.get((run.id, self.model.runs[run.id].final))
        if found is None:
            return
        book = self.player.focus = self.model.segments[found]
        self.mine(rules.DELAY + 1, 0, forgetful=0)
        self._do("draw")
        self._do("seal", dice.choice([1, 4, 8]))
        self.mine(1, run.window // 2)
        self._do("reveal", dice.choice([1, 4, 8]))
        self.mine(1, run.window - run.window // 2)
        self._do("unseal")
        self._do("resolve", dice.choice([0, 1, 1]))
        self.mine(1, run.dispute)
        self._do("finalise")
        if dice.random() < 0.1:
            self._come_back(run)
        self._do("claim")
        self._do("compensate", 3)
        if dice.random() < 0.2:
            return
        for seat in range(3):
            self.both(Call(DEPLOYER, "settle", (run, book.data, self.model.seats.get((run.id, seat), DEPLOYER))))
        self._do("settle", 4)

    def _come_back(self, run: Run) -> None:
        """Its verifiers leave, get their bonds and take their seats again: nothing earlier concerns the new bonds."""
        there = [(seat, account) for (name, seat), account in self.model.seats.items() if name == run.id]
        for _, account in there:
            self.both(Call(account, "resign", (run, Role.VERIFIER)))
        self.mine(1, UNBONDING)
        for seat, account in there:
            self.both(Call(DEPLOYER, "release", (run, Role.VERIFIER, account)))
            self.both(Call(account, "join", (run, Role.VERIFIER, seat)))

    def _do(self, function: str, times: int = 1, run: Run | None = None) -> None:
        for _ in range(times):
            call = self.player.call(function, run)
            if call is not None:
                self.both(call)

    def wind_up(self) -> None:
        """Ends all runs though no operator does anything any more: everybody gets out what is theirs."""
        for run in self.player.runs:
            if self.model.runs[run.id].status in (Status.OPEN, Status.ACTIVE):
                self._must(Call(run.submitter, "cancel", (run,)))
            while self.model.runs[run.id].committed > self.model.runs[run.id].final:
                self._end_of(self.model.segments[self.model.line[run.id, self.model.runs[run.id].final]])
            if self.model.runs[run.id].status == Status.CANCELLED:
                self.mine(1, run.answer + run.dispute)
                self._must(Call(DEPLOYER, "close", (run,)))
        for name, demand in list(self.model.demands):
            book, root, index, count = self.player.demanded(name, demand)
            self._must(Call(DEPLOYER, "withheld", (book.run, book.data, root, index, count)))
        for book in list(self.model.segments.values()):
            self._pay_all(book)
        for (name, role, account), bond in list(self.model.bonds.items()):
            if bond.left is None:
                self._must(Call(account, "resign", (self.model.runs[name].run, role)))
        self.mine(1, UNBONDING)
        for name, role, account in list(self.model.bonds):
            self._must(Call(DEPLOYER, "release", (self.model.runs[name].run, role, account)))
        for (token, account), balance in list(self.model.balances.items()):
            if account not in (BURN, NATIVE):
                self._must(Call(account, "withdraw", (token, balance, account)))
        self.look()
        for token in (NATIVE, self.token):
            dust = sum(book.unclaimed for book in self.model.segments.values() if book.run.token == token)
            stuck = sum(self.model.balance_of(token, account) for account in (BURN, NATIVE)) + dust
            self._same("what is left", stuck, self.model.held(token))

    def _end_of(self, book: Any) -> None:
        run, segment = book.run, book.data
        if book.start is None:
            self.mine(rules.DELAY + 1, 0, forgetful=0)
            self._must(Call(DEPLOYER, "draw", (run, segment)))
            return
        self.mine(1, max(0, book.start + run.window + run.answer - self.model.time))
        waiting = [demand for name, demand in self.model.demands if name == segment.name]
        if waiting:
            _, root, index, count = self.player.demanded(segment.name, waiting[0])
            self._must(Call(DEPLOYER, "withheld", (run, segment, root, index, count)))
        elif rules.is_opened(run) and book.opened is None:
            self._must(Call(DEPLOYER, "forfeit", (run, segment)))
        else:
            self.mine(1, run.dispute)
            self._must(Call(DEPLOYER, "finalise", (run, segment)))

    def _pay_all(self, book: Any) -> None:
        run, segment = book.run, book.data
        for (name, account), verdict in list(self.model.verdicts.items()):
            if name == segment.name and not verdict.settled:
                self._must(Call(DEPLOYER, "settle", (run, segment, account)))
        tree = self.player.made[segment.name].tree
        if (tree.root, tree.sum) != (segment.payout_root, segment.payout):
            return
        function = "claim" if book.outcome == Outcome.FINAL else "compensate"
        for leaf in range(len(tree.amounts)):
            if book.outcome == Outcome.DROPPED or (segment.name, leaf) in self.model.claims:
                continue
            proof = tree.prove(leaf)
            guilty = book.culprit != NATIVE and self.model.account_of(proof.key) == self.model.account_of(book.culprit)
            if not guilty:
                self._must(Call(DEPLOYER, function, (run, segment, *proof.arguments())))
        if book.outcome == Outcome.FINAL:
            self._same("unclaimed", 0, self.model.segments[segment.name].unclaimed)

    def _must(self, call: Call) -> None:
        if self.both(call) is None:
            raise self._difference(f"{call.function} is refused at the end", "done", self.log[-1])

    def _result(self, send: Callable[[], tuple[Event, ...]]) -> tuple[Event, ...] | str:
        try:
            return send()
        except Refused as error:
            return f"{error.error}{tuple(plain(value) for value in error.values)}"

    def _same(self, what: str, expected: Any, got: Any, call: Call | None = None) -> None:
        if expected != got:
            raise self._difference(f"{what}{f' of {call}' if call else ''}", expected, got)

    def _difference(self, what: str, expected: Any, got: Any) -> Difference:
        last = "\n  ".join(self.log[-25:])
        return Difference(f"{what}:\n model    {expected}\n contract {got}\nthe calls before:\n  {last}")
