"""What tests of the compiled contracts share: an EVM, a ledger with a run, and a sum of all that it owes."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyrevm
from eth_abi.abi import decode, encode
from eth_keys.datatypes import PrivateKey
from eth_utils.crypto import keccak

from ledger.port import BURN, NATIVE, Account, Commitment, Leaf, Outcome, Refused, Role, Run, Segment
from storage import merkle
from storage.codec import encode as encode_record
from storage.records import TensorEntry

LEDGER = Path(__file__).parent
GAS = LEDGER / "contracts" / "gas.json"
EPOCH = 1_800_000_000
UNBONDING, CAP, DELAY = 1000, 10**15, 4
ALWAYS, HALF = 2**32 - 1, 2**31
KEYS = {key.public_key.to_address(): key for key in (PrivateKey(n.to_bytes(32, "big")) for n in range(1, 53))}
PEOPLE: list[Account] = list(KEYS)
SUBMITTER, OPERATOR, STRANGER = PEOPLE[:3]
VERIFIERS, WORKERS, WHISTLERS = PEOPLE[3:9], PEOPLE[9:12], PEOPLE[12:52]
RICH = 10**12
RECORD = b"the run's record"
ZERO = bytes(32)


# ----------------------------------------------------------------------------------------------------------- the chain


def plain(value: Any) -> Any:
    """A value as the ABI has it: structs as tuples, enumerations as numbers."""
    if is_dataclass(value):
        return tuple(plain(getattr(value, item.name)) for item in fields(value))
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return int(value) if isinstance(value, IntEnum) else value


def abi_type(item: dict[str, Any]) -> str:
    """The type of an ABI item as it stands in a signature."""
    kind = str(item["type"])
    return f"({','.join(map(abi_type, item['components']))}){kind[5:]}" if kind.startswith("tuple") else kind


def named(item: dict[str, Any], value: Any) -> Any:
    """A decoded value, structs with their fields' names."""
    if item["type"] != "tuple":
        return value
    parts = zip(item["components"], value, strict=True)
    return SimpleNamespace(**{part["name"]: named(part, inner) for part, inner in parts})


def words(*types: str) -> Callable[..., bytes]:
    """keccak256(abi.encode(...)) of values of these types."""
    return lambda *values: keccak(encode(types, values))


class Contract:
    """A deployed contract's ABI and address."""

    def __init__(self, name: str) -> None:
        data = json.loads((LEDGER / "artifacts" / f"{name}.json").read_text())
        self.code = bytes.fromhex(data["bytecode"][2:])
        self.size = len(data["deployedBytecode"]) // 2 - 1
        self.address = ""
        self.entries: dict[str, dict[str, Any]] = {}
        self.by_hash: dict[bytes, dict[str, Any]] = {}
        for item in data["abi"]:
            types = ",".join(map(abi_type, item.get("inputs", ())))
            digest = keccak(f"{item.get('name')}({types})".encode())
            self.by_hash[digest if item["type"] == "event" else digest[:4]] = item
            if item["type"] in ("function", "constructor"):
                self.entries[item.get("name", "")] = item | {"selector": digest[:4]}

    def data(self, function: str, *args: Any) -> bytes:
        """Calldata of a call."""
        entry = self.entries[function]
        return bytes(entry["selector"]) + encode([abi_type(i) for i in entry["inputs"]], plain(args))


class Chain:
    """An EVM with clocks that stand still unless moved; each call is a transaction of its own."""

    def __init__(self, spec: str = "CANCUN", chain_id: int = 1) -> None:
        self.evm: Any = pyrevm.EVM(env=pyrevm.Env(cfg=pyrevm.CfgEnv(chain_id=chain_id)), spec_id=spec)
        self.block, self.time, self.gas = 100, EPOCH, 0
        self.errors: dict[bytes, dict[str, Any]] = {}
        self.go()
        for account in PEOPLE:
            self.evm.set_balance(account, RICH)

    def go(self, *, blocks: int = 0, seconds: int = 0, until: int = 0) -> None:
        """Put the clocks forward."""
        self.block, self.time = self.block + blocks, max(self.time + seconds, until)
        self.evm.set_block_env(pyrevm.BlockEnv(number=self.block, timestamp=self.time))

    def deploy(self, name: str, *args: Any, value: int = 0) -> Contract:
        """A new contract, by a stranger."""
        contract = Contract(name)
        types = [abi_type(item) for item in contract.entries.get("", {}).get("inputs", ())]
        contract.address = self.evm.deploy(STRANGER, contract.code + encode(types, args), value=value).lower()
        self.errors |= {key: item for key, item in contract.by_hash.items() if item["type"] == "error"}
        return contract

    def send(self, sender: Account, contract: Contract, function: str, *args: Any, value: int = 0) -> list[Any]:
        """The events of a call, each with its `name`; Refused where it reverts."""
        self._call(sender, contract.address, contract.data(function, *args), value)
        logs = [log for log in self.evm.result.logs if log.address.lower() == contract.address]
        return [self._event(contract, log) for log in logs]

    def read(self, contract: Contract, function: str, *args: Any) -> Any:
        """The answer of a view."""
        output = self._call(STRANGER, contract.address, contract.data(function, *args), 0, static=True)
        items = contract.entries[function]["outputs"]
        values = decode([abi_type(item) for item in items], output)
        found = [named(item, value) for item, value in zip(items, values, strict=True)]
        return found[0] if len(found) == 1 else found

    def _call(self, sender: Account, to: Account, data: bytes, value: int, *, static: bool = False) -> bytes:
        try:
            output: bytes = self.evm.message_call(sender, to, calldata=data, value=value, is_static=static)
        except RuntimeError as error:
            found = re.search(r"Revert .*output: 0x([0-9a-f]*)", str(error))
            raise self.refusal(bytes.fromhex(found[1]) if found else b"") from None
        self.gas = self.evm.result.gas_used
        return output

    def refusal(self, output: bytes) -> Refused:
        """The error that a revert's data are."""
        entry = self.errors.get(output[:4])
        if entry is None:
            return Refused(output[:4].hex() or "nothing")
        return Refused(entry["name"], decode([abi_type(item) for item in entry["inputs"]], output[4:]))

    def _event(self, contract: Contract, log: Any) -> Any:
        topics, data = [bytes.fromhex(topic.removeprefix("0x")) for topic in log.topics], bytes(log.data[1])
        entry = contract.by_hash[topics[0]]
        values = iter(decode([abi_type(i) for i in entry["inputs"] if not i["indexed"]], data))
        indexed = iter(topics[1:])
        found = {
            item["name"]: decode([abi_type(item)], next(indexed))[0] if item["indexed"] else named(item, next(values))
            for item in entry["inputs"]
        }
        return SimpleNamespace(**{**found, "name": entry["name"]})


# ----------------------------------------------------------------------------------------------------------- the world


@dataclass(frozen=True)
class Payouts:
    """A payout tree: (key, amount) by leaf."""

    leaves: tuple[tuple[Account, int], ...]

    def _levels(self) -> list[list[tuple[bytes, int]]]:
        level = [
            (
                sha256(b"\0" + n.to_bytes(4, "big") + bytes.fromhex(key[2:]) + amount.to_bytes(16, "big")).digest(),
                amount,
            )
            for n, (key, amount) in enumerate(self.leaves)
        ]
        levels = [level]
        while len(level) > 1:
            level = [_sum_node(*level[i : i + 2]) for i in range(0, len(level), 2)]
            levels.append(level)
        return levels

    @property
    def root(self) -> tuple[bytes, int]:
        """(root, sum) of the tree."""
        return self._levels()[-1][0] if self.leaves else (ZERO, 0)

    def proof(self, leaf: int) -> tuple[int, int, Account, int, list[bytes], list[int]]:
        """What claim takes after run and segment."""
        place, siblings = leaf, []
        for level in self._levels()[:-1]:
            if place ^ 1 < len(level):
                siblings.append(level[place ^ 1])
            place //= 2
        key, amount = self.leaves[leaf]
        return leaf, len(self.leaves), key, amount, [item[0] for item in siblings], [item[1] for item in siblings]


def _sum_node(left: tuple[bytes, int], *right: tuple[bytes, int]) -> tuple[bytes, int]:
    if not right:
        return left
    parts = [digest + amount.to_bytes(16, "big") for digest, amount in (left, *right)]
    return sha256(b"\1" + b"".join(parts)).digest(), left[1] + right[0][1]


TENSORS = {"a": b"a" * 10_000, "b": b"b" * 4096}
ENTRIES = [
    encode_record(TensorEntry(name=name, dtype="i8", shape=(len(data),), root=merkle.bytes_root(data)))
    for name, data in TENSORS.items()
]
STEPS = [b"step 0", b"step 1", b"step 2"]
POSTSTATE = merkle.list_root(ENTRIES)
PAYOUTS = Payouts(tuple((WORKERS[n % 3] if n < 3 else f"0x{n:040x}", 100 + n) for n in range(5)))
SECRETS = [sha256(b"last").digest()]
for _ in range(20):
    SECRETS.insert(0, keccak(SECRETS[0]))
CHAIN_END = keccak(SECRETS[0])
seal_of = words("bytes32", "bytes32")
verdict_of = words("bytes32", "address", "bool", "bytes32", "bytes32")
forced_hash = words("bytes32", "bytes32", "uint32", "uint32")
demand_of = words("bytes32", "bytes32", "uint64", "uint64")


def leaf_proof(items: Sequence[bytes], index: int) -> Leaf:
    """An item and its proof in the tree of all."""
    hashes = [merkle.leaf_hash(item) for item in items]
    return Leaf(data=items[index], index=index, count=len(items), proof=merkle.inclusion_proof(hashes, index))


def record_of(position: int, prestate: bytes, poststate: bytes = POSTSTATE, **changed: Any) -> bytes:
    """A SegmentRecord by hand, so that each field can be wrong."""
    at = {"kind": b"\x04\x02", "run": sha256(RECORD).digest(), "index": position.to_bytes(4, "little")} | {
        "first": (3 * position).to_bytes(8, "little"),
        "steps": len(STEPS).to_bytes(4, "little"),
        "prestate": prestate,
        "poststate": poststate,
        "steps_root": merkle.list_root(STEPS),
        "receipts_root": b"\x07" * 32,
        "previous": ZERO,
        "steps_object": b"\x08" * 32,
        "receipts_object": b"\x09" * 32,
    }
    return b"".join((at | changed).values())


class World:
    """A ledger with a run, and what the test knows of it: enough to add up all that the ledger owes after each call."""

    def __init__(self, *, chain: Chain | None = None, token: str = "", cap: int = CAP, **terms: Any) -> None:
        self.chain = chain or Chain()
        self.ledger = self.chain.deploy("Ledger", cap, UNBONDING)
        self.beacon = self.chain.deploy("MockBeacon")
        self.court = self.chain.deploy("MockCourt")
        self.token = self.chain.deploy(token) if token else None
        self.run = Run(**{**self._terms(), **terms})
        self.secrets = iter(SECRETS)
        self.runs, self.segments = {self.run.id: self.run}, dict[bytes, Segment]()
        self.bonds: set[tuple[bytes, Role, Account]] = set()
        self.verdicts: set[tuple[bytes, Account]] = set()
        self.demands: dict[bytes, int] = {}
        self.paid: dict[bytes, int] = {}
        self.accounts = {BURN, SUBMITTER, OPERATOR}
        self.gas: dict[str, int] = {}

    def _terms(self) -> dict[str, Any]:
        return {
            "record": sha256(RECORD).digest(),
            "initial_state": b"\x01" * 32,
            "submitter": SUBMITTER,
            "operator": OPERATOR,
            "token": self.token.address if self.token else NATIVE,
            "court": self.court.address,
            "beacon": self.beacon.address,
            "segments": 3,
            "tensors": len(ENTRIES),
            "work": 10,
            "price": 100,
            "operator_fee": 50,
            "verifier_fee": 20,
            "operator_bond": 10_000,
            "worker_bond": 1_000,
            "verifier_bond": 500,
            "flag_bond": 100,
            "pot": 5_000,
            "jackpot": 2_000,
            "rate": ALWAYS,
            "forced_rate": 0,
            "verifiers": 2,
            "reporter_share": 40,
            "harmed_share": 30,
            "miss_penalty": 10,
            "window": 101,
            "answer": 50,
            "dispute": 60,
        }

    # calls

    def do(self, sender: Account, function: str, *args: Any, value: int = 0) -> list[Any]:
        """A call of the ledger; what it owes is added up afterwards."""
        found = self.chain.send(sender, self.ledger, function, *args, value=value)
        self._note(found)
        self.check()
        return found

    def see(self, function: str, *args: Any) -> Any:
        """The answer of a view of the ledger."""
        return self.chain.read(self.ledger, function, *args)

    def judge(self, segment: Segment, *, upheld: bool, culprit: Account = NATIVE) -> None:
        """The court's answer."""
        args = (self.ledger.address, self.run, segment, upheld, culprit)
        self.chain.send(STRANGER, self.court, "resolve", *args)
        self.check()

    def balance(self, account: Account) -> int:
        """What the ledger owes an account, in the run's token."""
        return int(self.see("balanceOf", self.run.token, account))

    def fund(self, *accounts: Account, amount: int = 10**6) -> None:
        """Deposits, one for each account."""
        for account in accounts:
            self.accounts.add(account)
            if self.token:
                self.chain.send(account, self.token, "mint", account, amount)
                self.chain.send(account, self.token, "approve", self.ledger.address, amount)
            self.do(account, "deposit", self.run.token, amount, value=0 if self.token else amount)

    def _note(self, found: Iterable[Any]) -> None:
        for event in found:
            if event.name == "Committed":
                segment = Segment(
                    **{
                        snake.name: value
                        for snake, value in zip(fields(Segment), vars(event.data).values(), strict=True)
                    }
                )
                assert segment.name == event.segment
                self.segments[segment.name] = segment
            elif event.name == "Joined":
                self.bonds.add((event.id, Role(event.role), event.account))
                self.accounts.add(event.account)
            elif event.name == "Deposited":
                self.accounts.add(event.account)
            elif event.name == "Accepted":
                self.bonds.add((event.id, Role.OPERATOR, self.runs[event.id].operator))
            elif event.name == "Sealed":
                self.verdicts.add((event.segment, event.account))
                self.accounts.add(event.account)
            elif event.name == "Demanded":
                self.demands[event.demand] = self.run.flag_bond
            elif event.name in ("Claimed", "Compensated"):
                self.paid[event.segment] = self.paid.get(event.segment, 0) + event.amount
                self.accounts.add(event.account)

    def owed(self) -> int:
        """All that the ledger owes, from its views and from what was ever entered."""
        owed = sum(self.balance(account) for account in self.accounts)
        for run in self.runs:
            state = self.see("runOf", run)
            owed += state.escrow + state.pot
        owed += sum(self.see("bondOf", *bond).amount for bond in self.bonds)
        owed += sum(bond for demand, bond in self.demands.items() if int(self.see("demandOf", demand).account, 16))
        flags: dict[bytes, int] = {}
        for name, account in self.verdicts:
            verdict = self.see("verdictOf", name, account)
            if not verdict.settled:
                owed += 0 if verdict.assigned else self.run.flag_bond
                flags[name] = flags.get(name, 0) + (verdict.revealed and not verdict.ok)
        for name, segment in self.segments.items():
            state = self.see("segmentOf", name)
            owed += state.share * flags.get(name, 0)
            if state.outcome == Outcome.FINAL:
                owed += segment.payout - self.paid.get(name, 0)
            elif state.outcome == Outcome.REJECTED:
                owed += state.harm - self.paid.get(name, 0)
        return int(owed)

    def check(self) -> None:
        """The ledger owes what it says it holds, and has it."""
        held = self.see("held", self.run.token)
        assert self.owed() == held
        assert self.owned() >= held

    def owned(self) -> int:
        """What the ledger has of the run's token."""
        if self.token:
            return int(self.chain.read(self.token, "balanceOf", self.ledger.address))
        return int(self.chain.evm.get_balance(self.ledger.address))

    # a run's course

    def begin(self, beacon: bytes = b"\xbe" * 32) -> "World":
        """Open, accepted, begun, with three verifiers who have joined before."""
        self.fund(SUBMITTER, OPERATOR, *VERIFIERS[:3], *WORKERS, *WHISTLERS[:4])
        self.do(SUBMITTER, "open", self.run, RECORD)
        (accepted,) = self.do(OPERATOR, "accept", self.run, CHAIN_END)
        for seat, verifier in enumerate(VERIFIERS[:3]):
            self.do(verifier, "join", self.run, Role.VERIFIER, seat)
        self.do(WORKERS[0], "join", self.run, Role.WORKER, 0)
        self.chain.send(STRANGER, self.beacon, "set", accepted.beaconBlock, beacon)
        self.chain.go(blocks=DELAY + 1)
        self.do(STRANGER, "begin", self.run)
        return self

    @property
    def state(self) -> Any:
        """The run, as it is stored."""
        return self.see("runOf", self.run.id)

    def commitment(self, index: int, prestate: bytes, **changed: Any) -> Commitment:
        """A commitment to segment `index`; `record` is the record, `true` the digest that is sealed."""
        record = changed.pop("record", None) or record_of(index, prestate)
        true = changed.pop("true", None) or sha256(record).digest()
        root, payout = PAYOUTS.root
        given = {"work": 10, "payout_root": root, "payout": payout, "seal": seal_of(true, ZERO)}
        return Commitment(**{"record": record, **given, **changed})

    def commit(self, *changes: dict[str, Any]) -> list[Segment]:
        """The next segments, one for each of `changes` (one where there are none)."""
        state, batch = self.state, []
        prestate = state.state
        for n, changed in enumerate(changes or ({},)):
            batch.append(self.commitment(state.committed + n, prestate, **changed))
            prestate = batch[-1].record[82:114]
        names = [event.segment for event in self.do(OPERATOR, "commit", self.run, batch)]
        return [self.segments[name] for name in names]

    def draw(self, segment: Segment, beacon: bytes = b"\xdb" * 24) -> list[Account]:
        """Draws a segment with this beacon; who was assigned."""
        self.chain.send(STRANGER, self.beacon, "set", segment.block_number + DELAY, beacon[:24] + b"\x11" * 8)
        self.chain.go(blocks=max(0, segment.block_number + DELAY + 1 - self.chain.block))
        (drawn,) = self.do(STRANGER, "draw", self.run, segment)
        return list(drawn.verifiers)

    def seal(self, segment: Segment, account: Account, *, ok: bool, witness: bytes = b"\x02" * 32) -> None:
        """A sealed verdict."""
        self.do(account, "seal", self.run, segment, verdict_of(segment.name, account, ok, witness, ZERO))

    def reveal(self, segment: Segment, account: Account, *, ok: bool, witness: bytes = b"\x02" * 32) -> None:
        """A verdict that was sealed by `seal`."""
        self.do(account, "reveal", self.run, segment, ok, witness, ZERO)

    def vote(self, segment: Segment, verdicts: dict[Account, bool]) -> None:
        """Sealed and revealed verdicts; afterwards the window is over."""
        start = self.start(segment)
        for account, ok in verdicts.items():
            self.seal(segment, account, ok=ok)
        self.chain.go(until=start + self.run.window // 2)
        for account, ok in verdicts.items():
            self.reveal(segment, account, ok=ok)
        self.chain.go(until=start + self.run.window)

    def start(self, segment: Segment) -> int:
        """When a segment's windows start."""
        return int(self.see("segmentOf", segment.name).drawnAt) if self.run.verifiers else segment.time

    def unseal(self, segment: Segment, *, true: bytes = b"", secret: bytes = b"") -> Any:
        """Opens a segment with the next secret; `true` is the digest that was sealed."""
        secret = secret or next(self.secrets)
        args = (secret, b"\x02" * 32, true or segment.record, ZERO)
        return self.do(OPERATOR, "unseal", self.run, segment, *args)[0]

    def finish(self, segment: Segment, verdicts: dict[Account, bool] | None = None) -> Segment:
        """From committed to opened and final, with these verdicts and none but the silent court."""
        self.draw(segment)
        self.vote(segment, verdicts or {})
        self.unseal(segment)
        self.do(STRANGER, "finalise", self.run, segment)
        return segment

    def outcome(self, segment: Segment) -> Outcome:
        """What became of a segment."""
        return Outcome(self.see("outcomeOf", self.run, segment))


def refused(error: str, *values: Any) -> Any:
    """The ledger refuses with this error, and with these values where some are given."""
    return _Refusal(error, values)


class _Refusal:
    def __init__(self, error: str, values: tuple[Any, ...]) -> None:
        self.error, self.values = error, values

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if error is None:
            raise AssertionError(f"expected {self.error}, and it was done")
        if not isinstance(error, Refused):
            return False
        assert (error.error, error.values if self.values else ()) == (self.error, self.values)
        return True


def drawn_of(world: World, segment: Segment) -> tuple[Account, ...]:
    """Who is assigned to a segment."""
    return tuple(world.see("assignedOf", world.run, segment))


def later_beacon(*wanted: tuple[int, int, int, bool]) -> bytes:
    """A beacon of the run for which secret n makes (index, attempt) a forced error or not, with forced_rate HALF."""
    for n in itertools.count():
        beacon = n.to_bytes(32, "big")
        if n and all(
            (int.from_bytes(forced_hash(SECRETS[secret], beacon, index, attempt)[:4], "big") < HALF) == forced
            for secret, index, attempt, forced in wanted
        ):
            return beacon
    raise AssertionError


def signed(key: PrivateKey, domain: bytes, account: Account, deadline: int) -> bytes:
    """A key's signature that delegates it."""
    kind = keccak(b"Delegate(address account,uint256 deadline)")
    message = keccak(encode(["bytes32", "address", "uint256"], [kind, account, deadline]))
    signature = key.sign_msg_hash(keccak(b"\x19\x01" + domain + message))
    numbers: bytes = signature.r.to_bytes(32, "big") + signature.s.to_bytes(32, "big")
    return numbers + bytes([27 + signature.v])


def delegate(world: World, account: Account, key: Account) -> None:
    """Makes `key` a hot key of the account."""
    until = world.chain.time + 1
    signature = signed(KEYS[key], world.see("DOMAIN_SEPARATOR"), account, until)
    world.do(account, "delegate", key, until, signature)
