"""The ledger behind a node: raw signed transactions, confirmations, refusals by name. Nothing else imports web3.

The node is anybody's: it signs nothing, knows no account, may be slow, restart, or go back on a block. A call is signed
once and the same bytes are sent again until they are in a block that enough others follow, so it can happen only once.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from importlib import resources
from types import SimpleNamespace
from typing import Any

from eth_account import Account as Accounts
from eth_account.signers.local import LocalAccount
from eth_utils.abi import function_signature_to_4byte_selector
from eth_utils.address import to_checksum_address
from web3 import EthereumTesterProvider, HTTPProvider, Web3
from web3.exceptions import (
    BadFunctionCallOutput,
    ContractCustomError,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.logs import DISCARD

from ledger.embedded import EmbeddedChain, Reverted
from ledger.port import Account, Commitment, DryRun, Event, Leaf, Outcome, Refused, Role, Run, Segment, Status, Tree
from storage.errors import FailureError, UsageError

STRUCTS: dict[str, Callable[..., Any]] = {"Run": Run, "Segment": Segment, "Commitment": Commitment, "Leaf": Leaf}
ENUMS: dict[str, Callable[[int], Any]] = {"Status": Status, "Role": Role, "Outcome": Outcome, "Tree": Tree}
ERC20 = [
    {
        "type": "function",
        "name": name,
        "stateMutability": "view" if answer else "nonpayable",
        "inputs": [{"name": f"input{n}", "type": kind} for n, kind in enumerate(inputs)],
        "outputs": [{"name": "", "type": kind} for kind in answer],
    }
    for name, inputs, answer in (
        ("balanceOf", ["address"], ["uint256"]),
        ("allowance", ["address", "address"], ["uint256"]),
        ("approve", ["address", "uint256"], []),
    )
]
"""What is asked of a token; some return nothing from `approve`, and some have no `allowance`."""
LOGS_AT_ONCE = 5_000
"""Blocks of one request for events; nodes refuse long ranges."""

REMEDIES = {
    "Insufficient": "deposit more (the first number is what is needed)",
    "TooEarly": "wait until that time, or let `trueweight settle` do it",
    "TooLate": "the time for it is over",
    "NotAllowed": "use the account whose part it is",
    "Already": "it has been done; see `trueweight ledger status`",
    "Unknown": "see `trueweight ledger status` for what there is",
    "CapExceeded": "deposit less: this ledger holds no more than its cap",
    "BadTerms": "correct that term; `trueweight ledger terms` shows them",
}


class Artifact:
    """A compiled contract of `ledger/artifacts`."""

    def __init__(self, name: str) -> None:
        data = json.loads((resources.files("ledger") / "artifacts" / f"{name}.json").read_text(encoding="utf-8"))
        self.abi: list[dict[str, Any]] = data["abi"]
        self.bytecode: str = data["bytecode"]


@dataclass(frozen=True, kw_only=True)
class Wallet:
    """Secret keys by address, to sign with; they never leave this object."""

    keys: Mapping[Account, LocalAccount]

    @classmethod
    def of(cls, secrets: Sequence[bytes]) -> "Wallet":
        """The wallet of some secrets of 32 bytes."""
        accounts = [Accounts.from_key(secret) for secret in secrets]
        return cls(keys={account.address.lower(): account for account in accounts})

    def account(self, address: Account) -> LocalAccount:
        """The key of an address; UsageError where it is not here."""
        if address not in self.keys:
            raise UsageError(f"account {address}: expected its key in --keys or the environment; see docs/settle.md")
        return self.keys[address]


class Node:
    """A chain to send transactions to.

    `confirmations` blocks must follow a transaction's own before it counts; `patience` seconds are waited for it.
    """

    def __init__(
        self,
        w3: Web3,
        wallet: Wallet,
        *,
        confirmations: int = 0,
        patience: float = 600,
        poll: float = 0.05,
        forward: Callable[[int], None] | None = None,
        dry_run: bool = False,
        observe: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.w3, self.wallet, self.observe, self.dry_run = w3, wallet, observe, dry_run
        self._confirmations, self._patience, self._poll, self._forward = confirmations, patience, poll, forward

    def now(self) -> tuple[int, int]:
        """See Ledger."""
        block = self.ask(lambda: self.w3.eth.get_block("latest"))
        return int(block["number"]), int(block["timestamp"])

    def chain_id(self) -> int:
        """The chain's number."""
        return int(self.ask(lambda: self.w3.eth.chain_id))

    def has_code(self, address: Account) -> bool:
        """Whether there is a contract at an address."""
        return bool(self.ask(lambda: self.w3.eth.get_code(to_checksum_address(address))))

    def coins(self, account: Account) -> int:
        """How much of the chain's own currency an account has."""
        return int(self.ask(lambda: self.w3.eth.get_balance(to_checksum_address(account))))

    def wait(self, until: int) -> None:
        """See Ledger."""
        if (forward := self._forward) is not None:
            self.ask(lambda: forward(until))
            if (now := self.now()[1]) < until:
                raise FailureError(f"the node's clock: expected {until} or later, got {now}; see the node's log")
            return
        told = False
        while (left := until - self.now()[1]) > 0:
            if not told:
                self.observe(f"waiting {left} s for the chain's clock")
                told = True
            time.sleep(min(max(left / 4, self._poll), 15))

    def transact(self, sender: Account, what: str, transaction: dict[str, Any]) -> Mapping[str, Any]:
        """The receipt of a transaction that succeeded; DryRun in a dry run. Raises what a refused call raises."""
        account = self.wallet.account(sender)
        transaction = {k: to_checksum_address(v) if k == "to" else v for k, v in transaction.items()}
        call: Any = {**transaction, "from": to_checksum_address(sender)}
        self._clear(account.address)
        if (have := self.coins(sender)) <= transaction["value"]:
            raise UsageError(
                f"{what}: expected more than {transaction['value']} of the chain's own currency at {sender}, for gas "
                f"too, got {have}; send it some"
            )
        gas = self.ask(lambda: self.w3.eth.estimate_gas(call))
        if self.dry_run:
            raise DryRun(f"dry run: {what} would take {gas:,} gas; nothing was sent, and later calls depend on it")
        base = int(self.ask(lambda: self.w3.eth.get_block("latest")).get("baseFeePerGas", 0))
        tip = self._tip()
        full = {
            **transaction,
            "chainId": self.chain_id(),
            "nonce": self._count(account.address, "latest"),
            "gas": gas * 5 // 4,
            "maxPriorityFeePerGas": tip,
            "maxFeePerGas": 2 * base + tip,
            "type": 2,
        }
        signed = account.sign_transaction(full)
        receipt = self._settled(what, bytes(signed.raw_transaction), signed.hash)
        if not receipt["status"]:
            self.ask(lambda: self.w3.eth.call(call, receipt["blockNumber"]))  # at its block's time
            raise FailureError(f"{what}: it was refused in block {receipt['blockNumber']}; see the node's trace")
        return receipt

    def _clear(self, address: Any) -> None:
        """Wait until nothing of the account's is under way, such as what a command that was killed had sent."""
        until, told = time.monotonic() + self._patience, False
        while self._count(address, "pending") > self._count(address, "latest"):
            if time.monotonic() > until:
                raise FailureError(f"account {address}: a transaction of its is stuck; replace it with a wallet")
            if not told:
                self.observe(f"account {address}: waiting for an earlier transaction")
                told = True
            time.sleep(max(self._poll, 0.5))

    def _count(self, address: Any, block: Any) -> int:
        return int(self.ask(lambda: self.w3.eth.get_transaction_count(address, block)))

    def _tip(self) -> int:
        try:
            return int(self.ask(lambda: self.w3.eth.max_priority_fee))
        except (FailureError, ValueError, KeyError):
            return 10**9

    def _settled(self, what: str, raw: bytes, digest: Any) -> Mapping[str, Any]:
        """Send the same bytes until their block is followed by enough others; a block that is gone is noticed."""
        until, sent_at = time.monotonic() + self._patience, -1e9
        while True:
            receipt = self._receipt(digest)
            if receipt is not None:
                if self.now()[0] >= receipt["blockNumber"] + self._confirmations:
                    return receipt
            elif time.monotonic() - sent_at > 15:
                self._broadcast(what, raw)
                sent_at = time.monotonic()
                continue
            if time.monotonic() > until:
                raise FailureError(
                    f"{what}: transaction {digest.to_0x_hex()} was not confirmed within {self._patience:g} s; the same "
                    f"command goes on from here"
                )
            time.sleep(self._poll)

    def _receipt(self, digest: Any) -> Mapping[str, Any] | None:
        try:
            return self.ask(lambda: self.w3.eth.get_transaction_receipt(digest))  # type: ignore[no-any-return]
        except TransactionNotFound:
            return None

    def _broadcast(self, what: str, raw: bytes) -> None:
        try:
            self.ask(lambda: self.w3.eth.send_raw_transaction(raw))
        except FailureError as error:
            known = re.search("already known|already imported|nonce too low|known transaction", str(error), re.I)
            if not known:
                raise FailureError(f"{what}: {error}") from error

    def ask(self, question: Callable[[], Any]) -> Any:
        """The node's answer; a node that does not answer is asked again for as long as patience lasts."""
        until, told = time.monotonic() + self._patience, False
        while True:
            try:
                return question()
            except (ContractCustomError, ContractLogicError, TransactionNotFound):
                raise
            except BadFunctionCallOutput as error:
                raise FailureError(f"the contract's answer cannot be read ({error}); check its address") from error
            except Web3RPCError as error:
                raise FailureError(f"the node answered {error.message}; see its log") from error
            except (OSError, Web3Exception) as error:  # requests' errors are OSErrors
                if time.monotonic() > until:
                    raise FailureError(f"the node does not answer ({error}); check --ledger and the node") from error
                if not told:
                    self.observe(f"the node does not answer ({type(error).__name__}); asking again")
                    told = True
                time.sleep(1)


class Web3Ledger:
    """See Ledger: the contract at `address` of a node's chain."""

    def __init__(self, node: Node, address: Account, since: int = 0) -> None:
        self.node, self.address, self._since = node, address, since
        self._artifact = Artifact("Ledger")
        self._contract = node.w3.eth.contract(to_checksum_address(address), abi=self._artifact.abi)
        self._errors = {
            "0x" + function_signature_to_4byte_selector(_signature(entry)).hex(): entry
            for entry in self._artifact.abi
            if entry["type"] == "error"
        }

    def send(self, sender: Account, function: str, *args: Any, value: int = 0) -> tuple[Event, ...]:
        """See Ledger."""
        what = f"{function} by {sender}"
        data = self._contract.encode_abi(_camel(function), [_to_abi(arg) for arg in args])
        transaction = {"to": self.address, "data": data, "value": value}
        with _Refusals(self._errors, what):
            receipt = self.node.transact(sender, what, transaction)
        return tuple(self._decoded(receipt["logs"]))

    def approve(self, sender: Account, token: Account, amount: int) -> None:
        """See Ledger."""
        if not self.node.has_code(token):
            raise UsageError(f"token {token}: expected an ERC-20 on this chain, got no contract; correct its address")
        coin: Any = self.node.w3.eth.contract(to_checksum_address(token), abi=ERC20)
        owner, spender = to_checksum_address(sender), to_checksum_address(self.address)
        if (have := int(self.node.ask(coin.functions.balanceOf(owner).call))) < amount:
            raise UsageError(f"account {sender}: expected {amount} of token {token}, got {have}; send it the rest")
        given = self._allowance(coin, owner, spender)
        if given >= amount:
            return
        for allowed in [0, amount] if given else [amount]:  # some tokens go from one allowance to another only by 0
            what = f"approve of {allowed} of token {token} by {sender}"
            with _Refusals(self._errors, what):
                data = coin.encode_abi("approve", [spender, allowed])
                self.node.transact(sender, what, {"to": token, "data": data, "value": 0})

    def _allowance(self, coin: Any, owner: Any, spender: Any) -> int:
        try:
            return int(self.node.ask(coin.functions.allowance(owner, spender).call))
        except (Reverted, ContractLogicError, FailureError):
            return 0

    def read(self, function: str, *args: Any) -> Any:
        """See Ledger."""
        bound = self._contract.functions[_camel(function)](*[_to_abi(arg) for arg in args])
        (entry,) = (e for e in self._artifact.abi if e["type"] == "function" and e["name"] == _camel(function))
        with _Refusals(self._errors, function):
            answer = self.node.ask(bound.call)
        return _from_abi(answer, entry["outputs"][0])

    def events(self, since: int = 0) -> tuple[Event, ...]:
        """See Ledger."""
        found: list[Event] = []
        last = self.node.now()[0]
        for first in range(max(since, self._since), last + 1, LOGS_AT_ONCE):
            found += self._decoded(self._logs(first, min(first + LOGS_AT_ONCE - 1, last)))
        return tuple(found)

    def now(self) -> tuple[int, int]:
        """See Ledger."""
        return self.node.now()

    def wait(self, until: int) -> None:
        """See Ledger."""
        self.node.wait(until)

    def _logs(self, first: int, last: int) -> Any:
        query: Any = {"address": to_checksum_address(self.address), "fromBlock": first, "toBlock": last}
        return self.node.ask(lambda: self.node.w3.eth.get_logs(query))

    def _decoded(self, logs: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
        names = {entry["name"]: entry for entry in self._artifact.abi if entry["type"] == "event"}
        for log in logs:
            if log["address"].lower() != self.address:
                continue
            for name, entry in names.items():
                made = self._contract.events[name]().process_receipt({"logs": [log]}, errors=DISCARD)
                for one in made:
                    args = {_snake(i["name"]): _from_abi(one["args"][i["name"]], i) for i in entry["inputs"]}
                    yield Event(name=name, args=args, block=int(log["blockNumber"]))


class _Refusals:
    """Turns a contract's custom error into Refused."""

    def __init__(self, errors: Mapping[str, dict[str, Any]], call: str) -> None:
        self._errors, self._call = errors, call

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        match error:
            case Reverted():
                data = f"0x{error.data.hex()}"
            case ContractCustomError() | ContractLogicError():
                data = str(error.data or error.message or "")
            case _:
                return
        entry = self._errors.get(data[:10])
        if entry is None:
            raise Refused("Error", [str(error)], call=self._call) from error
        values = Web3().codec.decode([i["type"] for i in entry["inputs"]], bytes.fromhex(data[10:]))
        raise Refused(entry["name"], values, call=self._call, remedy=REMEDIES.get(entry["name"], "")) from error


def embedded_node(path: str, wallet: Wallet, **settings: Any) -> tuple[Node, EmbeddedChain]:
    """The chain in a file, and what closes it."""
    chain = EmbeddedChain(path)

    def forward(until: int) -> None:
        if until > chain.get_block_by_number("pending")["timestamp"]:
            chain.time_travel(until)
        chain.mine_blocks(1)

    return Node(Web3(EthereumTesterProvider(chain)), wallet, forward=forward, **settings), chain


def http_node(url: str, wallet: Wallet, *, fast: bool = False, **settings: Any) -> Node:
    """The chain behind a URL; `fast` where the node lets its clock be put forward, as anvil does."""
    w3 = Web3(HTTPProvider(url, request_kwargs={"timeout": 20}))

    def forward(until: int) -> None:
        # To the second: several blocks may share one, so "so many seconds more" than the last would fall short.
        if until > w3.eth.get_block("latest")["timestamp"]:
            _ask_anvil(w3, "evm_setNextBlockTimestamp", [until])
        _ask_anvil(w3, "evm_mine", [])

    node = Node(w3, wallet, forward=forward if fast else None, **settings)
    if fast and (last := node.now()[1]) > time.time():
        # anvil's clock starts with the host's, and its blocks would be earlier than those it has loaded.
        node.ask(lambda: _ask_anvil(w3, "evm_setNextBlockTimestamp", [last]))
    return node


def _ask_anvil(w3: Web3, method: str, parameters: list[int]) -> None:
    w3.manager.request_blocking(method, parameters)  # type: ignore[arg-type]


def deploy(node: Node, sender: Account, *, cap: int, unbonding: int) -> tuple[Account, Account, int]:
    """(ledger, beacon, block) of contracts that are now on the node's chain."""
    made = []
    for name, args in (("Ledger", (cap, unbonding)), ("Beacon", ())):
        artifact = Artifact(name)
        contract = node.w3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
        data = contract.constructor(*args).data_in_transaction
        made.append(node.transact(sender, f"deploying {name}", {"data": data, "value": 0}))
    first, second = made
    return first["contractAddress"].lower(), second["contractAddress"].lower(), int(first["blockNumber"])


# ------------------------------------------------------------------------------------------------------ translation


def _camel(name: str) -> str:
    if name.isupper():
        return name
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


def _snake(name: str) -> str:
    return name if name.isupper() else re.sub("([A-Z])", lambda match: f"_{match[1].lower()}", name)


def _signature(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']}({','.join(i['type'] for i in entry['inputs'])})"


def _to_abi(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(_to_abi(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, str) and re.fullmatch("0x[0-9a-f]{40}", value):
        return to_checksum_address(value)
    if isinstance(value, IntEnum):
        return int(value)
    return [_to_abi(item) for item in value] if isinstance(value, list | tuple) else value


def _from_abi(value: Any, entry: Mapping[str, Any]) -> Any:
    kind = entry["type"]
    if kind.endswith("[]"):
        return tuple(_from_abi(item, {**entry, "type": kind[:-2]}) for item in value)
    if kind == "tuple":
        parts = entry["components"]
        items = value.values() if isinstance(value, Mapping) else value
        made = {_snake(part["name"]): _from_abi(item, part) for part, item in zip(parts, items, strict=True)}
        return STRUCTS.get(entry.get("internalType", "").rpartition(".")[2], SimpleNamespace)(**made)
    if kind == "address":
        return value.lower()
    if kind.startswith("bytes"):
        return bytes(value)
    enum = entry.get("internalType", "")
    return ENUMS[enum.rpartition(".")[2]](value) if enum.startswith("enum ") else value
