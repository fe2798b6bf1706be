"""Gas of single transactions, against the snapshot ledger/contracts/gas.json."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from eth_abi.abi import encode

from ledger.port import NATIVE, Account, Role, Tree
from ledger.testing import (
    CHAIN_END,
    DELAY,
    ENTRIES,
    EPOCH,
    GAS,
    HALF,
    KEYS,
    OPERATOR,
    PAYOUTS,
    RECORD,
    STRANGER,
    SUBMITTER,
    TENSORS,
    VERIFIERS,
    WHISTLERS,
    WORKERS,
    ZERO,
    Chain,
    Contract,
    World,
    abi_type,
    delegate,
    drawn_of,
    later_beacon,
    leaf_proof,
    verdict_of,
)
from storage import merkle

pytestmark = pytest.mark.chain

# ----------------------------------------------------------------------------------------------------------------- gas


class SlowChain(Chain):
    """Transactions on py-evm, which counts gas as a node does; pyrevm keeps what an earlier call has touched warm."""

    def __init__(self) -> None:
        from eth_tester import EthereumTester, PyEVMBackend

        # A time of its own, since zeros in calldata are cheaper.
        genesis = PyEVMBackend.generate_genesis_params(overrides={"timestamp": EPOCH})
        self.tester = EthereumTester(PyEVMBackend(genesis_parameters=genesis))
        self.errors = {}
        rich, *known = self.tester.get_accounts()  # of some of the same keys
        for account, key in KEYS.items():
            if account not in {rich.lower(), *map(str.lower, known)}:
                self.tester.add_account(key.to_hex())
                self.tester.send_transaction({"from": rich, "to": account, "value": 10**19, "gas": 21_000})

    @property
    def time(self) -> int:
        return int(self.tester.get_block_by_number("pending")["timestamp"])

    @property
    def block(self) -> int:
        return int(self.tester.get_block_by_number("pending")["number"])

    def go(self, *, blocks: int = 0, seconds: int = 0, until: int = 0) -> None:
        if blocks:
            self.tester.mine_blocks(blocks)
        until = max(until, self.time + seconds)
        if until > self.time:
            self.tester.time_travel(until)

    def deploy(self, name: str, *args: Any, value: int = 0) -> Contract:
        contract = Contract(name)
        types = [abi_type(item) for item in contract.entries.get("", {}).get("inputs", ())]
        receipt = self._transact({"from": STRANGER, "data": contract.code + encode(types, args), "value": value})
        contract.address = receipt["contract_address"].lower()
        return contract

    def send(self, sender: Account, contract: Contract, function: str, *args: Any, value: int = 0) -> list[Any]:
        data = contract.data(function, *args)
        receipt = self._transact({"from": sender, "to": contract.address, "data": data, "value": value})
        self.gas = receipt["gas_used"]
        logs = [log for log in receipt["logs"] if log["address"].lower() == contract.address]
        logs = [SimpleNamespace(topics=log["topics"], data=(0, bytes.fromhex(log["data"][2:]))) for log in logs]
        return [self._event(contract, log) for log in logs]

    def _transact(self, sent: dict[str, Any]) -> dict[str, Any]:
        sent = sent | {"data": "0x" + sent["data"].hex(), "gas": 16_000_000}
        receipt: dict[str, Any] = self.tester.get_transaction_receipt(self.tester.send_transaction(sent))
        assert receipt["status"] == 1
        return receipt

    def _call(self, sender: Account, to: Account, data: bytes, value: int, *, static: bool = False) -> bytes:
        sent = {"from": sender, "to": to, "data": "0x" + data.hex(), "value": value, "gas": 16_000_000}
        return bytes.fromhex(self.tester.call(sent)[2:])


class Meter(World):
    """A world that measures and does not add up."""

    def __init__(self) -> None:
        self.measured: dict[str, int] = {}
        super().__init__(chain=SlowChain(), segments=40, forced_rate=HALF)

    def check(self) -> None:
        pass

    def measure(self, label: str, sender: Account, function: str, *args: Any, value: int = 0) -> list[Any]:
        found = self.do(sender, function, *args, value=value)
        self.measured[label] = self.chain.gas
        return found


def measured() -> dict[str, int]:
    """Gas of single transactions, each where it costs what it usually does."""
    world = Meter()
    run, chain = world.run, world.chain
    world.fund(SUBMITTER, OPERATOR, *VERIFIERS[:3], WHISTLERS[0])
    world.measure("deposit, first", WORKERS[2], "deposit", NATIVE, 10_000, value=10_000)
    world.measure("deposit", WORKERS[2], "deposit", NATIVE, 10_000, value=10_000)
    world.measure("withdraw", WORKERS[2], "withdraw", NATIVE, 5_000, WORKERS[2])
    delegate(world, WORKERS[2], WORKERS[1])
    world.measured["delegate"] = chain.gas
    cost = 40 * 1_090 + 5_000
    world.measure("open, value sent", SUBMITTER, "open", run, RECORD, value=cost)
    (accepted,) = world.measure("accept", OPERATOR, "accept", run, CHAIN_END)
    world.measure("join as worker, value sent", WORKERS[0], "join", run, Role.WORKER, 0, value=1_000)
    world.measure("join as verifier, value sent", VERIFIERS[0], "join", run, Role.VERIFIER, 0, value=500)
    for seat in (1, 2):
        world.do(VERIFIERS[seat], "join", run, Role.VERIFIER, seat)
    wanted = [(0, 0, 0, False), (1, 1, 0, True), (2, 2, 0, False), (3, 2, 1, False)]
    chain.send(STRANGER, world.beacon, "set", accepted.beaconBlock, later_beacon(*wanted))
    chain.go(blocks=DELAY + 1)
    world.measure("begin", STRANGER, "begin", run)
    chain.go(blocks=1)
    (first,) = world.commit()
    world.measured["commit, first"] = chain.gas
    (second,) = world.commit({"true": b"\1" * 32})
    world.measured["commit one"] = chain.gas
    third, *_ = world.commit(*[{}] * 8)
    world.measured["commit eight, each"] = -(-chain.gas // 8)
    for segment in (first, second, third):
        chain.send(STRANGER, world.beacon, "set", segment.block_number + DELAY, b"\xdb" * 32)
    chain.go(blocks=DELAY + 1)
    for label, segment in (("draw two of three", first), ("", second), ("", third)):
        world.measure(label, STRANGER, "draw", run, segment)
    drawn = drawn_of(world, first)
    sealed = [verdict_of(first.name, account, True, b"\2" * 32, ZERO) for account in drawn]
    world.measure("seal, assigned", drawn[0], "seal", run, first, sealed[0])
    flags = [verdict_of(s.name, WHISTLERS[0], False, b"\2" * 32, ZERO) for s in (first, second, third)]
    for label, segment, flag in zip(("seal, with a bond", "", ""), (first, second, third), flags, strict=True):
        world.measure(label, WHISTLERS[0], "seal", run, segment, flag)
    entry = leaf_proof(ENTRIES, 0)
    chunks = [TENSORS["a"][at : at + 4096] for at in range(0, 10_000, 4096)]
    shown = leaf_proof(chunks, 0)
    world.measure("demand a leaf of a tensor", WHISTLERS[0], "demand", run, first, Tree.TENSOR, 0, entry)
    args = (merkle.bytes_root(TENSORS["a"]), 0, 3, shown.data, shown.proof)
    world.measure("answer with 4,096 bytes", OPERATOR, "answer", run, first, *args)
    chain.go(until=world.start(first) + 50)
    world.measure("reveal, ok", drawn[0], "reveal", run, first, True, b"\2" * 32, ZERO)
    for label, segment in (("reveal a flag", second), ("", third)):
        world.measure(label, WHISTLERS[0], "reveal", run, segment, False, b"\2" * 32, ZERO)
    chain.go(until=world.start(third) + 101)
    world.unseal(first)
    world.measured["unseal"] = chain.gas
    world.unseal(second, true=b"\1" * 32)
    world.unseal(third)
    world.measure("finalise, first", STRANGER, "finalise", run, first)
    world.measure("finalise a forced error", STRANGER, "finalise", run, second)
    for label, leaf in (("claim, new account and word", 3), ("claim, new account", 4), ("claim", 1)):
        world.measure(label, STRANGER, "claim", run, first, *PAYOUTS.proof(leaf))
    world.measure("settle a fee", STRANGER, "settle", run, first, drawn[0])
    world.measure("settle a jackpot", STRANGER, "settle", run, second, WHISTLERS[0])
    found = chain.send(STRANGER, world.court, "resolve", world.ledger.address, run, third, True, WORKERS[0])
    world.measured["resolve, upheld"] = chain.gas
    assert found == []
    world.measure("compensate", STRANGER, "compensate", run, third, *PAYOUTS.proof(1))
    world.do(OPERATOR, "join", run, Role.OPERATOR, 0)
    (again,) = world.commit()
    world.draw(again, b"\xdb" * 24)
    world.vote(again, {})
    world.unseal(again)
    world.measure("finalise", STRANGER, "finalise", run, again)
    del world.measured[""]
    return world.measured


@pytest.mark.slow
def test_gas_is_that_of_the_snapshot() -> None:
    """To write it again: python tests/ledger/test_contract_gas.py."""
    assert measured() == json.loads(GAS.read_text())


if __name__ == "__main__":
    GAS.write_text(json.dumps(measured(), indent=1) + "\n")
