"""Settlement from the command line: on the embedded chain, on an anvil, and on somebody's node."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from eth_account import Account

from ledger.keys import PASSWORD, find_key, make_keystore, variable
from runtime.executors import reference
from runtime.faults import Fault, faulty_builder
from runtime.groups import LocalGroup
from runtime.segments import History
from runtime.testing import TEXT, TINY, plan_for, tiny_job, train
from storage.errors import UsageError
from storage.identity import load_or_create
from storage.store import open_store
from trueweight import cli

pytestmark = pytest.mark.chain

ALWAYS = "rate = 4294967295\nforced_rate = 0\n"
ANVIL = shutil.which("anvil") or shutil.which("anvil", path="ledger/contracts/node_modules/.bin")


class Case:
    """A run in a store, and commands about it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], fault: Fault | None = None) -> None:
        self.folder, self.capsys = folder, capsys
        self.store, self.keys = str(folder / "store"), str(folder / "keys")
        objects = open_store(self.store, create=True)
        job = tiny_job(objects, steps=4)
        group = LocalGroup(faulty_builder(reference, [fault] if fault else []))
        train(objects, job, group=group, plan=plan_for(job, stages=2, replicas=2), keys=self.keys)
        self.worker = "0x" + find_address(self.keys)

    def terms(self, text: str) -> tuple[str, str]:
        path = self.folder / "terms.toml"
        path.write_text(text, encoding="utf-8")
        return "--terms", str(path)

    def __call__(self, *words: str, code: int = 0) -> Any:
        found = cli.main([*words, "--store", self.store, "--keys", self.keys, "--json"])
        said = self.capsys.readouterr()
        assert found == code, said.err
        return json.loads(said.out) if said.out else said.err


def find_address(keys: str) -> str:
    return load_or_create(Path(keys) / "worker.key").address.hex()


@pytest.fixture
def case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(tmp_path, capsys)


def by_part(told: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in told["earnings"]:
        found[row["part"]] = found.get(row["part"], 0) + row["amount"]
    return found


def test_a_run_is_settled_by_commands_that_see_one_chain(case: Case) -> None:
    terms = case("ledger", "terms", "tiny", *case.terms(ALWAYS))
    told = case("settle", "tiny", *case.terms(ALWAYS))
    assert (told["status"], told["segments"], told["final"]) == ("closed", 2, 2)
    parts = by_part(told)
    assert parts["worker"] == terms["segments"] * terms["work"] * terms["price"]
    assert parts["operator"] == terms["segments"] * terms["operator_fee"]
    assert parts["verifier"] == terms["segments"] * terms["verifier_fee"]
    assert sum(parts.values()) == terms["escrow"] + terms["pot"]
    assert case("settle", "tiny")["earnings"] == told["earnings"]  # again, and nothing more happens
    assert case("claim", "tiny")["claims"] == 0
    explained = case("payout", "explain", "tiny", "--worker", case.worker)
    assert explained["amount"] == parts["worker"]
    price = str(terms["price"])
    offline = case("payout", "explain", "tiny", "--worker", case.worker, "--price", price, "--segment", "1")
    assert {row["segment"] for row in offline["rows"]} == {1}
    status = case("ledger", "status")
    assert {row["part"]: row["balance"] for row in status["balances"]} == {"court": 0, **parts}
    assert case("ledger", "withdraw", "worker")["withdrawn"] == parts["worker"]
    assert case("ledger", "withdraw", "worker")["withdrawn"] == 0


def test_steps_one_at_a_time_and_a_dry_run(case: Case) -> None:
    case("ledger", "up")
    fixed = ("--store", case.store, "--keys", case.keys)
    assert cli.main(["commit", "tiny", "--dry-run", *fixed, *case.terms(ALWAYS)]) == 0
    assert re.search(r"open by 0x\w{40} would take 1\d\d,\d\d\d gas", case.capsys.readouterr().out)
    assert case("ledger", "status")["runs"] == []
    assert case("commit", "tiny", *case.terms(ALWAYS)) == {"run": "tiny", "committed_now": 2, "committed": 2}
    assert case("commit", "tiny")["committed_now"] == 0
    assert case("stake", "tiny", "--role", "verifier")["bond"] > 0
    assert "correct it" in case("stake", "tiny", "--role", "judge", code=64)
    assert case("settle", "tiny")["final"] == 2


def test_a_forced_error_is_found_by_the_replay_and_pays_its_finder(case: Case) -> None:
    terms = case("ledger", "terms", "tiny", *case.terms("rate = 4294967295\nforced_rate = 4294967295\n"))
    told = case("settle", "tiny", *case.terms("rate = 4294967295\nforced_rate = 4294967295\n"))
    assert by_part(told)["verifier"] == 2 * terms["jackpot"]
    assert told["final"] == 2


def test_a_forged_segment_waits_for_its_court_and_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, capsys, Fault(kind="rate", step=1))
    told = case("settle", "tiny", *case.terms(ALWAYS))
    assert (told["status"], told["committed"], told["final"]) == ("active", 2, 0)
    case("ledger", "resolve", "tiny", "--segment", "0", "--upheld", "--culprit", case.worker)
    assert case("ledger", "status")["runs"][0]["committed"] == 0
    assert "expected one below 0" in case("ledger", "resolve", "tiny", "--segment", "0", "--upheld", code=64)


def test_training_commits_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY, encoding="utf-8")
    fixed = ("--store", str(tmp_path / "store"), "--keys", str(tmp_path / "keys"), "--json")
    assert cli.main(["run", str(recipe), "--local", "--ledger", "embedded", *fixed]) == 0
    capsys.readouterr()
    assert cli.main(["ledger", "status", *fixed]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["committed"] == 3
    (tmp_path / "store" / "ledger" / "chain.jsonl").write_text('{"raw": "0x00"}\n{}\n', encoding="utf-8")
    assert cli.main(["run", str(recipe), "--local", "--ledger", "embedded", "--name", "other", *fixed]) == 0
    assert "not committed to the ledger" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- bad input, keys


def test_bad_input_ends_with_the_remedy(case: Case) -> None:
    assert "correct it" in case("settle", "tiny", "--ledger", "mainnet", code=64)
    assert "correct them" in case("settle", "tiny", *case.terms("prize = 3\n"), code=64)
    assert "correct it" in case("settle", "tiny", *case.terms("rate = \n"), code=64)
    assert "operator_bond" in case("settle", "tiny", *case.terms("operator_bond = 1\n"), code=64)
    stranger = ("--worker", "0x" + "11" * 20, "--price", "1")
    assert "signed no receipt" in case("payout", "explain", "tiny", *stranger, code=64)


def test_keys_come_from_the_environment_a_keystore_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, "of the test")
    address = make_keystore("operator", tmp_path)
    secret = find_key("operator", tmp_path)
    assert secret
    assert (tmp_path / "operator.json").stat().st_mode & 0o777 == 0o600
    assert secret.hex() not in (tmp_path / "operator.json").read_text()
    with pytest.raises(UsageError, match="expected no such file"):
        make_keystore("operator", tmp_path)
    monkeypatch.setenv(PASSWORD, "another")
    with pytest.raises(UsageError, match="does not open"):
        find_key("operator", tmp_path)
    monkeypatch.setenv(variable("operator"), "0x" + secret.hex())
    assert find_key("operator", tmp_path) == secret
    monkeypatch.setenv(variable("operator"), "none")
    with pytest.raises(UsageError, match="64 hexadecimal"):
        find_key("operator", tmp_path)
    assert find_key("verifier", tmp_path) is None
    assert find_key("verifier", tmp_path, create=True) == find_key("verifier", tmp_path)
    assert address.startswith("0x")


# ---------------------------------------------------------------------------------------------------- other chains


@pytest.mark.skipif(ANVIL is None, reason="no anvil: npm ci --prefix ledger/contracts")
def test_the_same_settlement_on_an_anvil_of_our_own(case: Case) -> None:
    told = case("settle", "tiny", "--ledger", "anvil", *case.terms(ALWAYS))
    again = case("settle", "tiny", "--ledger", "anvil")
    assert told["final"] == 2
    assert told["earnings"] == again["earnings"]


class Node:
    """An anvil that is somebody's: no unlocked accounts, blocks by the clock."""

    def __init__(self, folder: Path) -> None:
        assert ANVIL is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [ANVIL, "--port", str(self.port), "--block-time", "1", "--state", str(folder / "state.json")]
        self._command += ["--accounts", "1"]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout
        for line in self._process.stdout:
            if b"Listening" in line:
                break
        threading.Thread(target=self._process.stdout.read, daemon=True).start()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, *params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return requests.post(self.url, json=body, timeout=10).json()["result"]

    def fill(self, keys: str) -> None:
        for role in ("submitter", "operator", "court", "verifier", "worker"):
            secret = find_key(role, Path(keys), create=True)
            assert secret
            self.ask("anvil_setBalance", Account.from_key(secret).address, hex(10**20))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.stop()


@pytest.mark.skipif(ANVIL is None, reason="no anvil: npm ci --prefix ledger/contracts")
@pytest.mark.slow
def test_settlement_on_a_node_of_somebody_with_a_restart_in_the_middle(case: Case, node: Node) -> None:
    node.fill(case.keys)
    assert "no contracts" in case("commit", "tiny", "--ledger", node.url, code=64)
    made = case("ledger", "deploy", "--ledger", node.url)
    assert re.fullmatch("0x[0-9a-f]{40}", made["ledger"])
    terms = case.terms(ALWAYS + "window = 4\nanswer = 15\ndispute = 2\n")
    assert case("commit", "tiny", "--ledger", node.url, *terms)["committed"] == 2
    node.stop()
    command = [sys.executable, "-m", "trueweight", "settle", "tiny", "--ledger", node.url, "--json"]
    waiting = subprocess.Popen([*command, "--store", case.store, "--keys", case.keys], stdout=subprocess.PIPE)
    time.sleep(4)
    node.start()  # the command asked until then
    out, _ = waiting.communicate(timeout=200)
    told = json.loads(out)
    assert (told["status"], told["final"]) == ("closed", 2)
    assert History.open(open_store(case.store, create=False), "tiny").segments()[1].poststate


@pytest.mark.skipif(ANVIL is None, reason="no anvil: npm ci --prefix ledger/contracts")
@pytest.mark.slow
def test_a_block_that_is_gone_takes_nothing_with_it(case: Case, node: Node) -> None:
    """While a call waits for confirmations, and after a command has gone by."""
    node.fill(case.keys)
    waiting = threading.Timer(2.5, lambda: node.ask("anvil_reorg", 2, []))
    waiting.start()
    made = case("ledger", "deploy", "--ledger", node.url, "--confirmations", "3")
    waiting.join()
    assert len(node.ask("eth_getCode", made["ledger"], "latest")) > 1000
    terms = case.terms(ALWAYS)
    assert case("commit", "tiny", "--ledger", node.url, "--confirmations", "0", *terms)["committed"] == 2
    node.ask("anvil_reorg", 1, [])
    assert case("commit", "tiny", "--ledger", node.url, "--confirmations", "1")["committed"] == 2
