"""Settlement from the command line: on the embedded chain, on an anvil, and on somebody's node."""

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_utils.address import to_checksum_address

from benchmarks.foreign import ANVIL, ForeignNode
from ledger import web3_ledger
from ledger.keys import PASSWORD, find_key, make_keystore, variable
from ledger.port import NATIVE, Refused
from ledger.web3_ledger import Artifact, http_node
from runtime.executors import DEFAULT
from runtime.faults import Fault, faulty_builder
from runtime.groups import LocalGroup
from runtime.segments import History
from runtime.testing import TEXT, TINY, plan_for, remembered, tiny_job, train
from storage.checkpoints import open_checkpoint
from storage.errors import UsageError
from storage.identity import load_or_create
from storage.manifest import tensor_bytes
from storage.store import open_store
from trueweight import cli
from trueweight.chains import EMBEDDED, connect
from trueweight.delegations import sign

pytestmark = pytest.mark.chain

ALWAYS = "rate = 4294967295\nforced_rate = 0\n"


class Case:
    """A run in a store, and commands about it."""

    executor = "reference"
    """Of replays: planning for the compiled one takes longer than a replay of these runs."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], fault: Fault | None = None) -> None:
        self.folder, self.capsys = folder, capsys
        self.store, self.keys = str(folder / "store"), str(folder / "keys")
        objects = open_store(self.store, create=True)
        job = tiny_job(objects, steps=4)
        group = LocalGroup(faulty_builder(remembered, [fault] if fault else []))
        train(objects, job, group=group, plan=plan_for(job, stages=2, replicas=2), keys=self.keys)
        self.worker = "0x" + find_address(self.keys)

    @classmethod
    def without_a_run(cls, folder: Path, capsys: pytest.CaptureFixture[str]) -> "Case":
        made = cls.__new__(cls)
        made.folder, made.capsys = folder, capsys
        made.store, made.keys = str(folder / "store"), str(folder / "keys")
        made("ledger", "up")
        return made

    def terms(self, text: str) -> tuple[str, str]:
        path = self.folder / "terms.toml"
        path.write_text(text, encoding="utf-8")
        return "--terms", str(path)

    def __call__(self, *words: str, code: int = 0, keys: str = "") -> Any:
        how = ("--executor", self.executor) if words[0] == "settle" else ()
        found = cli.main([*words, *how, "--store", self.store, "--keys", keys or self.keys, "--json"])
        said = self.capsys.readouterr()
        assert found == code, said.err
        return json.loads(said.out) if said.out else said.err

    def would(self, *words: str, keys: str = "") -> str:
        """What a dry run says, which changes nothing."""
        before = self("ledger", "status")
        assert cli.main([*words, "--store", self.store, "--keys", keys or self.keys, "--dry-run"]) == 0
        said = self.capsys.readouterr().out
        after = self("ledger", "status")
        assert (after["runs"], after["balances"]) == (before["runs"], before["balances"])
        return said

    def account(self, role: str) -> str:
        return str(self("ledger", "up")["accounts"][role])

    def balance(self, role: str, token: str = NATIVE) -> int:
        rows = self("ledger", "status")["balances"]
        return sum(row["balance"] for row in rows if (row["part"], row["token"]) == (role, token))


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
    case.executor = DEFAULT
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


# -------------------------------------------------------------------------------------------------------------- tokens


def token_on(case: Case, *, each: int, name: str = "MockToken") -> str:
    """A token on the embedded chain, of which every account here has so much."""
    artifact = Artifact(name)
    with connect(open_store(case.store, create=False), EMBEDDED, keys=case.keys) as chain:
        node, payer = chain.node, chain.accounts["operator"]
        made = node.transact(payer, "a token", {"data": artifact.bytecode, "value": 0})
        contract: Any = node.w3.eth.contract(made["contractAddress"], abi=artifact.abi)
        for account in chain.accounts.values():
            data = contract.encode_abi("mint", [to_checksum_address(account), each])
            node.transact(payer, "coins", {"to": made["contractAddress"], "data": data, "value": 0})
    return str(made["contractAddress"])


def test_a_run_paid_in_a_token_is_settled_as_one_in_coins(case: Case) -> None:
    token = token_on(case, each=10**18)
    terms = case.terms(ALWAYS + f'token = "{token}"\n')  # with upper-case digits, as wallets show it
    low = token.lower()
    told = case("ledger", "terms", "tiny", *terms)
    assert told["token"] == low
    said = case.would("commit", "tiny", *terms)
    assert re.search(rf"approve of {told['escrow'] + told['pot']} of token {low} by 0x\w{{40}} would take", said)
    case("commit", "tiny", *terms)
    assert case("stake", "tiny", "--role", "verifier")["bond"] == told["verifier_bond"]
    settled = case("settle", "tiny")
    assert (settled["status"], settled["final"]) == ("closed", 2)
    parts = by_part(settled)
    assert sum(parts.values()) == told["escrow"] + told["pot"]
    assert case.balance("worker", low) == parts["worker"]
    assert case.balance("worker") == 0
    assert case("ledger", "withdraw", "worker", "--token", token)["withdrawn"] == parts["worker"]
    assert case("ledger", "deposit", "worker", "5", "--token", token)["balance"] == 5
    assert case("ledger", "deposit", "worker", "7")["balance"] == 7


def test_who_has_too_little_of_a_token_is_told_how_much_it_takes(case: Case) -> None:
    token = token_on(case, each=1000)
    terms = case.terms(ALWAYS + f'token = "{token}"\n')
    assert "got 1000; send it the rest" in case("settle", "tiny", *terms, code=64)
    stranger = case.terms(ALWAYS + f'token = "{case.account("court")}"\n')
    assert "got no contract; correct its address" in case("settle", "tiny", *stranger, code=64)
    assert "40 hexadecimal digits" in case("settle", "tiny", *case.terms('token = "gold"\n'), code=64)


def test_a_token_is_approved_for_what_is_deposited_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case.without_a_run(tmp_path, capsys)
    token, silent = (token_on(case, each=100, name=name).lower() for name in ("MockToken", "SilentToken"))
    with connect(open_store(case.store, create=False), EMBEDDED, keys=case.keys) as chain:
        ledger, account = chain.deployed(), chain.accounts["worker"]
        blocks = [ledger.now()[0]]
        for amount in (10, 7, 12):  # the second is covered by the first; the third goes by way of none
            ledger.approve(account, token, amount)
            blocks.append(ledger.now()[0])
        assert [after - before for before, after in itertools.pairwise(blocks)] == [1, 0, 2]
        ledger.send(account, "deposit", token, 12)
        with pytest.raises(Refused):
            ledger.send(account, "deposit", token, 1)
        ledger.approve(account, silent, 5)  # it has no `allowance`, and its `approve` returns nothing
        ledger.send(account, "deposit", silent, 5)
        assert ledger.read("balance_of", silent, account) == 5
    assert "for gas too, got 0; send it some" in case("ledger", "deposit", "nobody-yet", "1", "--dry-run", code=64)


# ---------------------------------------------------------------------------------------------------------- delegation


def test_a_workers_earnings_are_those_of_the_account_that_it_was_delegated_by(case: Case) -> None:
    assert case("ledger", "withdraw", "payee")["withdrawn"] == 0  # its key and coins are made
    said = case.would("ledger", "delegate", "payee", "--key", "worker")
    assert re.search(r"delegate by 0x\w{40} would take [\d,]+ gas", said)
    made = case("ledger", "delegate", "payee", "--key", "worker")
    assert made["key"] == case.worker
    told = case("settle", "tiny", *case.terms(ALWAYS))
    (row,) = (row for row in told["earnings"] if row["part"] == "worker")
    assert row["account"] == made["account"]
    assert case("ledger", "withdraw", "payee")["withdrawn"] == row["amount"]
    assert "acts for nobody" in case("ledger", "delegate", "payee", "--key", "worker", code=64)
    assert "hot key" in case("unstake", "tiny", code=64)


def test_hot_keys_elsewhere_commit_judge_and_open_for_accounts_whose_keys_are_not_there(case: Case) -> None:
    """Two folders of keys, as on two machines; of the second one operator and verifier are the first one's hot keys."""
    hot = str(case.folder / "hot")
    case("ledger", "up")
    case("ledger", "up", keys=hot)
    for role in ("operator", "verifier"):
        out = str(case.folder / f"{role}.json")
        case("ledger", "sign-delegation", role, "--account", case.account(role), "--out", out, keys=hot)
        assert "expected account" in case("ledger", "delegate", "court", "--signed", out, code=64)
        case("ledger", "delegate", role, "--signed", out)
    assert case("settle", "tiny", *case.terms(ALWAYS), keys=hot)["status"] == "open"
    assert cli.main(["commit", "tiny", "--store", case.store, "--keys", hot]) == 0
    (end,) = re.findall(r"accept RUN --chain (\w{64})", case.capsys.readouterr().out)
    assert case("ledger", "accept", "tiny", "--chain", end)["bond"] > 0
    case("stake", "tiny", "--role", "verifier")
    assert "bonds are its account's" in case("stake", "tiny", "--role", "verifier", keys=hot, code=64)
    told = case("settle", "tiny", keys=hot)
    assert (told["status"], told["final"]) == ("closed", 2)
    accounts = {row["part"]: row["account"] for row in told["earnings"]}
    assert (accounts["operator"], accounts["verifier"]) == (case.account("operator"), case.account("verifier"))


def test_a_delegation_that_was_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case.without_a_run(tmp_path, capsys)
    account = Account.from_key(find_key("payee", tmp_path / "keys", create=True)).address
    path, changed = tmp_path / "worker.json", str(tmp_path / "changed.json")
    case("ledger", "sign-delegation", "worker", "--account", account, "--out", str(path))
    told = json.loads(path.read_text(encoding="utf-8"))
    for field, value, remedy in [
        ("signature", "00" * 65, "the signature is not by"),
        ("signature", "00", "the signature is not by"),
        ("deadline", 2**40, "the signature is not by"),
        ("chain", 1, "expected chain"),
        ("ledger", "0x" + "11" * 20, "expected ledger"),
        ("format", "other", "expected format"),
        ("deadline", "soon", "expected a delegation"),
    ]:
        Path(changed).write_text(json.dumps({**told, field: value}), encoding="utf-8")
        said = case("ledger", "delegate", "payee", "--signed", changed, code=64)
        assert remedy in said
        assert "sign-delegation" in said
    assert "give one" in case("ledger", "delegate", "payee", code=64)


# -------------------------------------------------------------------------------------------------------------- demands


def a_tensor(case: Case, segment: int) -> str:
    """The name of a tensor of a segment's state with more than one leaf, or the last one."""
    objects = open_store(case.store, create=False)
    record = History.open(objects, "tiny").segments()[segment]
    tensors = open_checkpoint(objects, record.poststate).manifest.tensors
    return max(tensors, key=lambda entry: (tensor_bytes(entry), entry.name)).name


def test_demanded_leaves_are_shown_with_proofs_from_the_store(case: Case) -> None:
    case("commit", "tiny", *case.terms(ALWAYS))
    bond = case("ledger", "terms", "tiny")["flag_bond"]
    asked = ("ledger", "demand", "tiny", "--segment")
    assert "would take" in case.would(*asked, "0", "--tree", "state")
    case(*asked, "0", "--tree", "state", "--leaf", "1")
    case(*asked, "1", "--tree", "steps", "--leaf", "1", "--by", "worker")
    made = case(*asked, "1", "--tree", "tensor", "--tensor", a_tensor(case, 1))
    assert (made["tree"], made["leaf"], made["bond"]) == ("tensor", 0, bond)
    assert made["by"] == case.account("verifier")
    rows = case("ledger", "demands", "tiny")["demands"]
    assert [(row["segment"], row["tree"], row["leaf"]) for row in rows] == [
        (0, "state", 1),
        (1, "steps", 1),
        (1, "tensor", 0),
    ]
    assert re.search(r"answer by 0x\w{40} would take", case.would("ledger", "answer", "tiny"))
    assert len(case("ledger", "answer", "tiny", "--segment", "1")["answered"]) == 2
    assert len(case("ledger", "demands", "tiny")["demands"]) == 1
    told = case("settle", "tiny")  # answers the last one
    assert (told["status"], told["final"]) == ("closed", 2)
    (row,) = (row for row in told["earnings"] if row["why"] == "demands answered")
    assert (row["times"], row["amount"]) == (3, 3 * bond)
    assert case("ledger", "answer", "tiny")["answered"] == []


def test_a_segment_whose_data_are_not_shown_in_time_is_lost(case: Case) -> None:
    terms = case("ledger", "terms", "tiny", *case.terms(ALWAYS))
    case("commit", "tiny", *case.terms(ALWAYS))
    case("ledger", "demand", "tiny", "--segment", "0", "--tree", "tensor", "--tensor", a_tensor(case, 0))
    packs = Path(case.store) / "packs"
    packs.rename(packs.with_name("elsewhere"))
    said = case("ledger", "answer", "tiny", code=70)
    assert "expected its data in the store" in said
    assert case("ledger", "withheld", "tiny")["withheld"] == []
    assert re.search(r"withheld by 0x\w{40} would take|may answer before", case.would("ledger", "withheld", "tiny"))
    assert len(case("ledger", "withheld", "tiny", "--wait")["withheld"]) == 1
    packs.with_name("elsewhere").rename(packs)
    assert case("ledger", "status")["runs"][0]["committed"] == 0
    share = terms["operator_bond"] * terms["reporter_share"] // 100
    assert case.balance("verifier") == terms["flag_bond"] + share
    assert case("stake", "tiny", "--role", "operator")["bond"] == terms["operator_bond"]
    told = case("settle", "tiny")  # the operator commits them again
    assert (told["status"], told["final"]) == ("closed", 2)
    assert {row["why"]: row["amount"] for row in told["earnings"]}["data withheld"] == share


def test_a_demand_for_what_there_is_not_is_no_call(case: Case) -> None:
    case("commit", "tiny", *case.terms(ALWAYS))
    for words, remedy in [
        ("2 --tree state", "expected one below 2"),
        ("0 --tree oak", "expected state, steps, tensor"),
        ("0 --tree steps --leaf 2", "expected one below 2"),
        ("0 --tree steps --leaf -1", "expected one below 2"),
        ("0 --tree tensor", "expected --tensor NAME"),
        ("0 --tree state --tensor x", "expected --tensor NAME"),
        ("0 --tree tensor --tensor weight/nothing", "choose one"),
        ("0 --tree state --by Nobody", "choose one"),
    ]:
        assert remedy in case("ledger", "demand", "tiny", "--segment", *words.split(), code=64)
    assert case("ledger", "demands", "tiny")["demands"] == []


# ----------------------------------------------------------------------------------------------------- bad input, keys


def test_bad_input_ends_with_the_remedy(case: Case) -> None:
    assert "correct it" in case("settle", "tiny", "--ledger", "mainnet", code=64)
    assert "ledger up" in case("ledger", "deploy", "--ledger", "embedded", code=64)
    assert "correct it" in case("ledger", "status", "--contract", "0x12", code=64)
    assert "got none there" in case("ledger", "status", "--contract", "0x" + "12" * 20, code=64)
    assert "correct it" in case("settle", "tiny", *case.terms("price = -1\n"), code=64)
    assert "decimal digits" in case("ledger", "deposit", "worker", "1.5", code=64)
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


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ForeignNode]:
    made = ForeignNode(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def fast_node(tmp_path: Path) -> Iterator[ForeignNode]:
    """Its clock runs ahead of the host's, so it cannot be started again."""
    made = ForeignNode(tmp_path, block_time=0.4)
    yield made
    made.stop()


@pytest.mark.skipif(ANVIL is None, reason="no anvil: npm ci --prefix ledger/contracts")
@pytest.mark.slow
def test_settlement_on_a_node_of_somebody_with_a_restart_in_the_middle(case: Case, node: ForeignNode) -> None:
    node.fill(case.keys)
    assert "no contracts" in case("commit", "tiny", "--ledger", node.url, code=64)
    made = case("ledger", "deploy", "--ledger", node.url)
    assert re.fullmatch("0x[0-9a-f]{40}", made["ledger"])
    terms = case.terms(ALWAYS + "window = 4\nanswer = 30\ndispute = 2\n")
    assert case("commit", "tiny", "--ledger", node.url, *terms)["committed"] == 2
    node.stop()
    command = [sys.executable, "-m", "trueweight", "settle", "tiny", "--ledger", node.url, "--json"]
    waiting = subprocess.Popen([*command, "--store", case.store, "--keys", case.keys], stdout=subprocess.PIPE)
    time.sleep(4)
    node.start()  # the command asked until then
    out, _ = waiting.communicate(timeout=200)
    assert (waiting.returncode, bool(out)) == (0, True)
    told = json.loads(out)
    assert (told["status"], told["final"]) == ("closed", 2)
    assert History.open(open_store(case.store, create=False), "tiny").segments()[1].poststate


@pytest.mark.skipif(ANVIL is None, reason="no anvil: npm ci --prefix ledger/contracts")
@pytest.mark.slow
def test_a_call_whose_block_came_too_late_is_refused_by_name(case: Case, fast_node: ForeignNode) -> None:
    """The node's estimate was right when it was asked; the call's block was made after the deadline."""
    node, told = fast_node, []
    node.fill(case.keys)
    case("ledger", "deploy", "--ledger", node.url)
    with connect(open_store(case.store, create=False), node.url, keys=case.keys, confirmations=0) as chain:
        ledger, account = chain.deployed(), chain.accounts["operator"]
        node.ask("evm_setIntervalMining", 0)
        deadline = chain.node.now()[1] + 60
        made = sign(chain, chain.accounts["worker"], account, deadline)

        def send() -> None:
            try:
                ledger.send(account, "delegate", made.key, deadline, made.signature)
            except Refused as refused:
                told.append((refused.error, refused.values))

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        for _ in range(300):
            if int(node.ask("txpool_status")["pending"], 16):
                break
            time.sleep(0.1)
        node.ask("evm_setNextBlockTimestamp", deadline)
        node.ask("evm_mine")
        sending.join(timeout=30)
    assert told == [("TooLate", (deadline,))]


@pytest.mark.skipif(ANVIL is None, reason="no anvil: npm ci --prefix ledger/contracts")
@pytest.mark.slow
def test_a_block_that_is_gone_takes_nothing_with_it(
    case: Case, fast_node: ForeignNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a call waits for confirmations, and after a command has gone by."""
    node = fast_node
    monkeypatch.setattr(web3_ledger, "http_node", lambda *given, **more: http_node(*given, **more | {"poll": 0.1}))
    accounts, reorganised = node.fill(case.keys), threading.Event()
    node.ask("anvil_mine", hex(3))  # what is taken back below is there from the start

    def reorganise() -> None:
        """Once a transaction is in a block, which takes three more to be confirmed."""
        while not any(int(node.ask("eth_getTransactionCount", account, "latest"), 16) for account in accounts):
            time.sleep(0.05)
        node.ask("anvil_reorg", 2, [])
        reorganised.set()

    waiting = threading.Thread(target=reorganise, daemon=True)
    waiting.start()
    made = case("ledger", "deploy", "--ledger", node.url, "--confirmations", "3")
    assert reorganised.wait(30)
    assert len(node.ask("eth_getCode", made["ledger"], "latest")) > 1000
    terms = case.terms(ALWAYS)
    assert case("commit", "tiny", "--ledger", node.url, "--confirmations", "0", *terms)["committed"] == 2
    node.ask("anvil_reorg", 1, [])
    assert case("commit", "tiny", "--ledger", node.url, "--confirmations", "1")["committed"] == 2
