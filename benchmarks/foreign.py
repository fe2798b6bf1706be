"""An anvil that is somebody's: no unlocked accounts, blocks by the clock; and a settlement on it by commands."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests
from eth_account import Account

from ledger.keys import find_key
from runtime.executors import reference
from runtime.groups import LocalGroup
from runtime.testing import plan_for, tiny_job, train
from runtime.worker import worker_builder
from storage.errors import FailureError, UsageError
from storage.store import open_store
from trueweight.chains import ROLES

ANVIL = shutil.which("anvil") or shutil.which("anvil", path="ledger/contracts/node_modules/.bin")


class ForeignNode:
    """A node with a block every `block_time` seconds, whose chain is kept in a file of `folder` and can be stopped."""

    def __init__(self, folder: Path, *, block_time: float = 1) -> None:
        if ANVIL is None:
            raise UsageError("anvil: expected it on PATH, got none; `npm ci --prefix ledger/contracts`")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [ANVIL, "--port", str(self.port), "--block-time", str(block_time), "--accounts", "1"]
        self._command += ["--state", str(folder / "state.json")]
        self.start()

    def start(self) -> None:
        """Comes back when it listens."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout
        for line in self._process.stdout:
            if b"Listening" in line:
                break
        threading.Thread(target=self._process.stdout.read, daemon=True).start()

    def stop(self) -> None:
        """Comes back when the chain is written."""
        self._process.terminate()
        self._process.wait(timeout=30)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, *params: Any) -> Any:
        """The result of a call."""
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return requests.post(self.url, json=body, timeout=10).json()["result"]

    def fill(self, keys: str) -> list[str]:
        """The accounts of all roles, which have coins now."""
        secrets = [find_key(role, Path(keys), create=True) for role in ROLES]
        accounts = [str(Account.from_key(secret).address) for secret in secrets]
        for account in accounts:
            self.ask("anvil_setBalance", account, hex(10**20))
        return accounts


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What a settlement on a foreign node took, and how it ended."""

    status: str
    segments: int
    final: int
    blocks: int
    transactions: int
    seconds: float


def settle(*, block_time: int) -> Settled:
    """Train a tiny run and settle it on a node of so slow blocks, which is stopped for a block in the middle."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        store, keys = str(folder / "store"), str(folder / "keys")
        job = tiny_job(open_store(store, create=True), steps=4)
        group = LocalGroup(worker_builder(reference))
        train(open_store(store, create=False), job, group=group, plan=plan_for(job, stages=2, replicas=2), keys=keys)
        terms = folder / "terms.toml"
        times = {"window": 22 * block_time, "answer": 12 * block_time, "dispute": 2}
        given = {"rate": 2**32 - 1, "forced_rate": 0, **times}
        terms.write_text("".join(f"{name} = {value}\n" for name, value in given.items()), encoding="utf-8")
        node = ForeignNode(folder, block_time=block_time)
        try:
            accounts = node.fill(keys)
            fixed = ["--ledger", node.url, "--store", store, "--keys", keys, "--json"]
            started = time.perf_counter()
            _run("ledger", "deploy", *fixed).communicate()
            _told(_run("commit", "tiny", "--terms", str(terms), *fixed))
            waiting = _run("settle", "tiny", *fixed)
            time.sleep(4 * block_time)
            node.stop()
            time.sleep(block_time)
            node.start()
            told = _told(waiting)
            return Settled(
                status=told["status"],
                segments=told["segments"],
                final=told["final"],
                blocks=int(node.ask("eth_blockNumber"), 16),
                transactions=sum(int(node.ask("eth_getTransactionCount", one, "latest"), 16) for one in accounts),
                seconds=time.perf_counter() - started,
            )
        finally:
            node.stop()


def _run(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "trueweight", *words], stdout=subprocess.PIPE)


def _told(process: subprocess.Popen[bytes]) -> Any:
    out, _ = process.communicate()
    if process.returncode:
        raise FailureError(f"the command ended with {process.returncode}; see its lines above")
    return json.loads(out)
