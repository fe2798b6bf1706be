"""Which ledger a command talks to: the embedded chain of a store, an anvil that it starts, or somebody's node.

web3 and py-evm are imported where they are used, for they take a second.

A store in a folder keeps its chains in `ledger/`: `chain.jsonl` (embedded), `anvil.json`, and `deployments.json` with
the contracts' addresses by chain.
"""

import ctypes
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ledger.port import Account
from storage.errors import FailureError, UsageError
from storage.files import make_folder, write_whole
from storage.store import Store
from trueweight.wiring import store_folder

if TYPE_CHECKING:
    from ledger.web3_ledger import Node, Wallet, Web3Ledger

EMBEDDED, ANVIL = "embedded", "anvil"
ROLES = ("submitter", "operator", "court", "verifier", "worker")
CAP = 10**24
UNBONDING = 14 * 86_400
ANVIL_KEY = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
"""Of anvil's first account, which is the same everywhere and worth nothing."""
POCKET = 10**21
"""What an account is given on a chain whose coins are worthless."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A chain with the contracts on it; `ledger` is None where none have been deployed."""

    node: "Node"
    ledger: "Web3Ledger | None"
    beacon: Account
    accounts: Mapping[str, Account]
    """Of the roles whose keys are here."""
    secrets: Mapping[Account, bytes]

    def deployed(self) -> "Web3Ledger":
        """The ledger; UsageError where there is none."""
        if self.ledger is None:
            raise UsageError("ledger: no contracts on this chain; `trueweight ledger deploy`, or give --contract")
        return self.ledger


@contextmanager
def connect(
    store: Store,
    where: str,
    *,
    keys: str,
    contract: str = "",
    confirmations: int = 1,
    dry_run: bool = False,
    also: Iterable[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Connection]:
    """A connection to the embedded chain, to an anvil that ends with it, or to the node at a URL.

    On the first two every key is made where it is missing, contracts are deployed and accounts are filled. `also` are
    names of keys beside those of the roles.
    """
    from eth_account import Account as Accounts

    from ledger.embedded import FAUCET_KEY
    from ledger.keys import find_key
    from ledger.web3_ledger import Wallet, Web3Ledger

    folder, own = Path(keys).expanduser(), where in (EMBEDDED, ANVIL)
    if not own and not where.startswith(("http://", "https://")):
        raise UsageError(f"--ledger {where}: expected embedded, anvil or the URL of a node; correct it")
    found = {role: find_key(role, folder, create=own) for role in dict.fromkeys((*ROLES, *also))}
    secrets = {role: secret for role, secret in found.items() if secret is not None}
    accounts = {role: str(Accounts.from_key(secret).address).lower() for role, secret in secrets.items()}
    faucet = {EMBEDDED: FAUCET_KEY, ANVIL: ANVIL_KEY}.get(where)
    wallet = Wallet.of([*secrets.values(), *([faucet] if faucet else [])])
    with _node(store, where, wallet, confirmations=confirmations, dry_run=dry_run, tell=tell) as node:
        home = ledger_folder(store)
        known = _deployments(home).get(str(node.chain_id()), {}) if home else {}
        if known and faucet is not None and not node.has_code(known["ledger"]):
            known = {}  # a chain that was thrown away, and begun anew
        if faucet is not None and not dry_run:
            payer = str(Accounts.from_key(faucet).address).lower()
            for account in accounts.values():
                if not node.coins(account):
                    tell(f"a gift of {POCKET} to {account}")
                    node.transact(payer, "a gift", {"to": account, "value": POCKET})
            known = known or deployment(node, payer, home, tell)
        if contract:
            known = {"beacon": known.get("beacon", ""), **_given(node, contract)}
        ledger = Web3Ledger(node, known["ledger"], known.get("block", 0)) if known else None
        yield Connection(
            node=node,
            ledger=ledger,
            beacon=known.get("beacon", ""),
            accounts=accounts,
            secrets={accounts[role]: secret for role, secret in secrets.items()},
        )


def _given(node: "Node", contract: str) -> dict[str, Any]:
    """The deployment that --contract ADDRESS or ADDRESS@BLOCK names; events are looked for from that block on."""
    found, _, block = contract.partition("@")
    ledger, first = address(found, "--contract"), number(block or "0", "--contract ADDRESS@BLOCK")
    if not node.has_code(ledger):
        raise UsageError(
            f"--contract {contract}: expected a contract on chain {node.chain_id()}, got none there; correct it, or "
            f"`trueweight ledger deploy`"
        )
    return {"ledger": ledger, "block": first}


def number(text: str, option: str) -> int:
    """A number as it is written here; UsageError naming the option where it is none."""
    if not re.fullmatch("[0-9]{1,78}", text):
        raise UsageError(f"{option}: expected a number in decimal digits, got {text!r}; correct it")
    return int(text)


def address(text: str, option: str) -> Account:
    """An address as it is written here; UsageError naming the option where it is none."""
    if not re.fullmatch("0x[0-9a-fA-F]{40}", text):
        raise UsageError(f"{option} {text}: expected 0x and 40 hexadecimal digits; correct it")
    return text.lower()


def ledger_folder(store: Store) -> Path | None:
    """Where a store keeps what belongs to its ledgers; None for a store without a folder."""
    folder = store_folder(store)
    return folder / "ledger" if folder else None


def deployment(node: "Node", payer: Account, home: Path | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Contracts newly deployed on the node's chain, noted for later commands."""
    from ledger.web3_ledger import deploy

    ledger, beacon, block = deploy(node, payer, cap=CAP, unbonding=UNBONDING)
    made = {"ledger": ledger, "beacon": beacon, "block": block}
    tell(f"contracts deployed: ledger {ledger}, beacon {beacon}")
    if home:
        make_folder(home)
        write_whole(
            home / "deployments.json",
            json.dumps({**_deployments(home), str(node.chain_id()): made}, indent=2).encode() + b"\n",
        )
    return made


def _deployments(home: Path) -> dict[str, Any]:
    path = home / "deployments.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except ValueError as error:
        raise FailureError(f"{path}: not JSON ({error}); delete it and give --contract") from error


@contextmanager
def _node(
    store: Store, where: str, wallet: "Wallet", *, confirmations: int, dry_run: bool, tell: Callable[[str], None]
) -> Iterator["Node"]:
    from ledger.web3_ledger import embedded_node, http_node

    if where not in (EMBEDDED, ANVIL):
        yield http_node(where, wallet, confirmations=confirmations, poll=1, dry_run=dry_run, observe=tell)
        return
    home = ledger_folder(store)
    if home is None:
        raise UsageError(f"--ledger {where}: expected a store in a folder, which keeps the chain; give a node's URL")
    make_folder(home)
    if where == EMBEDDED:
        node, chain = embedded_node(str(home / "chain.jsonl"), wallet, dry_run=dry_run, observe=tell)
        try:
            yield node
        finally:
            chain.close()
        return
    with anvil(home / "anvil.json") as url:
        yield http_node(url, wallet, fast=True, patience=60, dry_run=dry_run, observe=tell)


PR_SET_PDEATHSIG = 1
"""prctl(2)."""


def _ending_with_parent() -> Callable[[], object] | None:
    """What a child does to get SIGTERM when the thread that started it ends, even by SIGKILL; Linux alone knows how."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def anvil(state: Path) -> Iterator[str]:
    """An anvil of our own, whose chain is kept in a file; its URL."""
    program = shutil.which("anvil") or shutil.which("anvil", path="ledger/contracts/node_modules/.bin")
    if program is None:
        raise UsageError("--ledger anvil: expected anvil on PATH, got none; `npm install -g @foundry-rs/anvil`")
    log = state.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "--port", "0", "--state", str(state)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_ending_with_parent(),  # noqa: PLW1509 (a system call, which takes no lock of a thread)
        )
    try:
        until = time.monotonic() + 60
        while (found := re.search(rb"Listening on (\S+:\d+)", log.read_bytes())) is None:
            if process.poll() is not None or time.monotonic() > until:
                raise FailureError(f"{program}: expected it to listen within 60 s, got no such line; see {log}")
            time.sleep(0.1)
        yield f"http://{found[1].decode()}"
    finally:
        process.terminate()
        process.wait(timeout=60)
