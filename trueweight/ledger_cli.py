"""`trueweight ledger`, `stake`, `commit`, `claim`, `settle`, `payout`: a run's money, from escrow to payout."""

import dataclasses
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from ledger.economics import break_even, judge, segment_detection
from ledger.payouts import Work, explain
from ledger.port import NATIVE, Account, Ledger, Role, Run, Status
from ledger.rules import escrow
from runtime import controller, executors
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.tracing import traced_builder
from runtime.worker import worker_builder
from storage.codec import decode
from storage.errors import TrueweightError, UsageError
from storage.files import file_failure
from storage.records import Receipt
from storage.store import Store
from trueweight import reports, wiring
from trueweight.chains import EMBEDDED, ROLES, Connection, connect, deployment, ledger_folder
from trueweight.console import console_for, print_json, say, teller
from trueweight.settlement import Parties, Settlement, default_terms
from verification.replay import Replay

RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name; `trueweight runs` lists them.")]
StoreFolder = Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")]
Where = Annotated[
    str,
    typer.Option("--ledger", metavar="WHERE", envvar="TRUEWEIGHT_LEDGER", help="embedded, anvil, or a node's URL."),
]
Contract = Annotated[str, typer.Option(metavar="ADDRESS", help="The ledger's contract, where no deployment is noted.")]
Keys = Annotated[str, typer.Option(metavar="DIR", help="Folder of keys: ROLE.json (keystore) or ROLE.key.")]
Terms = Annotated[Path | None, typer.Option(metavar="FILE", help="TOML with terms that differ from the defaults.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what each call would take; send nothing.")]
Confirmations = Annotated[int, typer.Option(help="Blocks to wait for after a call's own, on a node.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")]

ledger_app = typer.Typer(help="The ledger: chains, contracts, terms.", no_args_is_help=True, rich_markup_mode=None)
payout_app = typer.Typer(help="What work is paid.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(ledger_app, name="ledger")
    app.add_typer(payout_app, name="payout")
    for command in (stake, unstake, commit, claim, settle):
        app.command(command.__name__)(command)


# ------------------------------------------------------------------------------------------------------------ ledger


@ledger_app.command()
def up(
    where: Where = EMBEDDED, store: StoreFolder = ".trueweight", keys: Keys = wiring.KEYS, as_json: AsJson = False
) -> int:
    """Make a chain of one's own and put the contracts on it.

    `embedded` is a chain in a file of the store, `anvil` one that runs while a command does. Both give everybody's
    account coins that are worth nothing, and keep keys for all parts in --keys.

    \b
    trueweight ledger up
    trueweight ledger up --ledger anvil
    """
    console = console_for(as_json)
    objects = wiring.open_folder(store, create=True)
    with connect(objects, where, keys=keys, tell=teller(console)) as chain:
        told = {"chain": chain.node.chain_id(), "ledger": chain.deployed().address, "beacon": chain.beacon}
        told["accounts"] = dict(chain.accounts)
    return _tell(console, told, as_json)


@ledger_app.command("deploy")
def deploy_command(
    where: Where,
    store: StoreFolder = ".trueweight",
    keys: Keys = wiring.KEYS,
    role: Annotated[str, typer.Option(help=f"Whose key pays: {', '.join(ROLES)}.")] = "operator",
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Put the contracts on a node's chain.

    Nobody has power over them afterwards, whoever deployed them included. The addresses are noted in the store.

    \b
    trueweight ledger deploy --ledger https://sepolia.example.org
    """
    console = console_for(as_json)
    objects = wiring.open_folder(store, create=True)
    with connect(
        objects, where, keys=keys, confirmations=confirmations, dry_run=dry_run, tell=teller(console)
    ) as chain:
        made = deployment(chain.node, _account(chain, role), ledger_folder(objects), teller(console))
    return _tell(console, made, as_json)


@ledger_app.command("key")
def key_command(
    role: Annotated[str, typer.Argument(metavar="ROLE", help=f"One of {', '.join(ROLES)}.")],
    keys: Keys = wiring.KEYS,
) -> int:
    """Make a key in an encrypted keystore.

    The password comes from TRUEWEIGHT_PASSWORD or is asked for. A key may also be given in TRUEWEIGHT_ROLE_KEY.

    \b
    trueweight ledger key operator
    """
    if role not in ROLES:
        raise UsageError(f"role {role}: expected one of {', '.join(ROLES)}; choose one")
    from ledger.keys import make_keystore

    print(make_keystore(role, Path(keys).expanduser()))
    return 0


@ledger_app.command()
def status(
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    as_json: AsJson = False,
) -> int:
    """Show the runs on a ledger and what the accounts here have."""
    console = console_for(as_json)
    with connect(
        wiring.open_folder(store, create=False), where, keys=keys, contract=contract, tell=teller(console)
    ) as chain:
        ledger = chain.deployed()
        block, time = ledger.now()
        found = []
        for event in ledger.events():
            if event.name == "Opened":
                state, terms = ledger.read("run_of", event.args["id"]), event.args["run"]
                row = {"run": event.args["id"].hex(), "record": terms.record.hex(), "status": state.status.name.lower()}
                row |= {"segments": terms.segments, "committed": state.committed, "final": state.finalised}
                found.append(row | {"escrow": state.escrow, "pot": state.pot})
        balances = [
            {"part": role, "account": account, "balance": ledger.read("balance_of", NATIVE, account)}
            for role, account in chain.accounts.items()
        ]
        told: dict[str, Any] = {"chain": chain.node.chain_id(), "ledger": ledger.address, "block": block, "time": time}
    told |= {"runs": found, "balances": balances}
    if as_json:
        return print_json(told)
    say(console, f"chain {told['chain']}, block {block}, ledger {ledger.address}")
    columns = ("run", "status", "segments", "committed", "final", "escrow", "pot")
    say(console, reports.table(found, {name: name for name in columns}) if found else "no runs yet")
    say(console, reports.table(balances, {"part": "part", "account": "account", "balance": "balance"}))
    return 0


@ledger_app.command("terms")
def terms_command(
    name: RunName,
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    terms: Terms = None,
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    as_json: AsJson = False,
) -> int:
    """Show a run's terms and whether cheating pays under them.

    Terms that are not on the ledger yet are the defaults with what --terms says. Where a cheat on one segment is worth
    more than what it risks they are refused (64), with the bond or rate that would do.

    \b
    trueweight ledger terms quickstart
    trueweight ledger terms quickstart --terms dear.toml
    """
    console = console_for(as_json)
    with _settlement(name, store, where, keys, contract, terms, tell=teller(console)) as made:
        found = made.terms
    told = {field.name: _shown(getattr(found, field.name)) for field in dataclasses.fields(found)}
    gain = found.work * found.price
    told |= {"escrow": escrow(found), "detection": float(segment_detection(found))}
    told |= {"break_even": int(break_even(found)), "gain": gain, "margin": float(judge(found, gain))}
    return _tell(console, told, as_json)


@ledger_app.command()
def withdraw(
    role: Annotated[str, typer.Argument(metavar="ROLE", help=f"Whose balance: {', '.join(ROLES)}.")],
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    token: Annotated[str, typer.Option(metavar="ADDRESS", help="An ERC-20; the chain's own currency without.")] = "",
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Take an account's balance out of the ledger, to the account itself."""
    console = console_for(as_json)
    with connect(
        wiring.open_folder(store, create=False),
        where,
        keys=keys,
        contract=contract,
        confirmations=confirmations,
        dry_run=dry_run,
        tell=teller(console),
    ) as chain:
        account, ledger = _account(chain, role), chain.deployed()
        coin = token.lower() or NATIVE
        amount = ledger.read("balance_of", coin, account)
        if amount:
            ledger.send(account, "withdraw", coin, amount, account)
    return _tell(console, {"account": account, "withdrawn": amount}, as_json)


# -------------------------------------------------------------------------------------------------------------- runs


def stake(
    name: RunName,
    role: Annotated[str, typer.Option(help="worker or verifier.")] = "worker",
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Put up a worker's or verifier's bond for a run.

    \b
    trueweight stake quickstart --role verifier
    """
    console, kind = console_for(as_json), _role(role, (Role.WORKER, Role.VERIFIER))
    with _settlement(
        name, store, where, keys, contract, confirmations=confirmations, dry_run=dry_run, tell=teller(console)
    ) as made:
        terms, account = made.terms, _player(made, kind)
        made.join(kind, account, terms.worker_bond if kind == Role.WORKER else terms.verifier_bond)
        bond = made.ledger.read("bond_of", terms.id, kind, account)
    return _tell(console, {"role": role, "account": account, "bond": bond.amount}, as_json)


def unstake(
    name: RunName,
    role: Annotated[str, typer.Option(help="operator, worker or verifier.")] = "worker",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the bond can be had.")] = False,
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Leave a run, and have the bond back.

    A bond can be had only after the time in which it may be slashed. The first call begins that time, one after it
    puts the bond into the account's balance; `trueweight ledger withdraw` takes it out.

    \b
    trueweight unstake quickstart --role verifier
    trueweight unstake quickstart --role verifier --wait
    """
    console, kind = console_for(as_json), _role(role, Role)
    with _settlement(
        name, store, where, keys, contract, confirmations=confirmations, dry_run=dry_run, tell=teller(console)
    ) as made:
        account = _player(made, kind)
        back, free = made.leave(kind, account, wait=wait)
    return _tell(console, {"role": role, "account": account, "returned": back, "free_at": free}, as_json)


def commit(
    name: RunName,
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    terms: Terms = None,
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Commit a run's segments to its ledger, opening the escrow first where the submitter's key is here.

    `trueweight run RECIPE --ledger WHERE` does it as the segments come.
    """
    console = console_for(as_json)
    with _settlement(
        name, store, where, keys, contract, terms, confirmations=confirmations, dry_run=dry_run, tell=teller(console)
    ) as made:
        made.open()
        done = made.commit()
        total = made.state.committed
    return _tell(console, {"run": name, "committed_now": done, "committed": total}, as_json)


def claim(
    name: RunName,
    worker: Annotated[str, typer.Option(metavar="KEY", help="The worker's address; all without.")] = "",
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Claim what final segments pay, and what is due for rejected ones.

    Anybody may; the amount goes to the key's account.
    """
    console = console_for(as_json)
    with _settlement(
        name, store, where, keys, contract, confirmations=confirmations, dry_run=dry_run, tell=teller(console)
    ) as made:
        sender = next(iter(made.parties.secrets))
        done = sum(made.claim(one, sender, worker.lower() or None) for one in made.ever())
        rows = made.earnings()
    return _earned(console, {"run": name, "claims": done, "earnings": rows}, as_json)


def settle(
    name: RunName,
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    terms: Terms = None,
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    threads: Annotated[int, typer.Option(help="Threads of a replay; 0 is all.")] = 1,
    executor: Annotated[str, typer.Option("--executor", help="compiled or reference.")] = executors.DEFAULT,
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Settle a run: escrow, bonds, commitments, verdicts, opening, finality, payouts.

    Does whatever has not been done and whose key is here, and waits for the windows between; an embedded chain's and
    anvil's clock is put forward instead. Stopped anywhere, the same command goes on. Ends with who got what and why.

    \b
    trueweight settle quickstart
    trueweight settle quickstart --ledger anvil
    trueweight settle quickstart --ledger https://sepolia.example.org --confirmations 3
    """
    console = console_for(as_json)
    with _settlement(
        name,
        store,
        where,
        keys,
        contract,
        terms,
        confirmations=confirmations,
        dry_run=dry_run,
        threads=threads,
        executor=executor,
        tell=teller(console),
    ) as made:
        if made.state.status == Status.NONE:
            judge(made.terms, made.terms.work * made.terms.price)
        for part in (made.open, made.commit, made.judge, made.finalise, made.pay, made.close):
            part()
        state, rows = made.state, made.earnings()
    told = {"run": name, "id": made.terms.id.hex(), "status": state.status.name.lower()}
    told |= {"segments": made.terms.segments, "committed": state.committed, "final": state.finalised}
    return _earned(console, told | {"earnings": rows}, as_json)


@payout_app.command("explain")
def explain_command(
    name: RunName,
    worker: Annotated[str, typer.Option(metavar="KEY", help="The worker's address.")],
    segment: Annotated[int | None, typer.Option(help="One segment; all without.")] = None,
    price: Annotated[int, typer.Option(help="Of a unit of work, where no ledger is asked.")] = 0,
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    as_json: AsJson = False,
) -> int:
    """Compute a worker's amounts from its receipts.

    With --price nothing but the store is read; else the price is the one of the terms on the ledger.

    \b
    trueweight payout explain quickstart --worker 0x115a...c428
    trueweight payout explain quickstart --worker 0x115a...c428 --segment 0 --price 1000000000000
    """
    console = console_for(as_json)
    objects = wiring.open_folder(store, create=False)
    history = History.open(objects, name)
    if not price:
        with _settlement(name, store, where, keys, contract, tell=teller(console)) as made:
            price = made.terms.price
    program = TrainingProgram.decode(objects.get(history.run.programs))
    rows: list[dict[str, Any]] = []
    for record in history.segments():
        if segment not in (None, record.index):
            continue
        receipts = [decode(Receipt, item) for item in history.items(record.receipts_object)]
        work = Work(
            run=history.run_digest,
            first_step=record.first_step,
            steps=record.steps,
            micro_batches=program.micro_batches,
            blocks=len(program.blocks),
        )
        found = explain(receipts, work, price, worker.lower())
        rows += [{"segment": record.index, **dataclasses.asdict(row)} for row in found.rows]
    total = sum(row["amount"] for row in rows)
    if as_json:
        return print_json({"run": name, "worker": worker.lower(), "price": price, "amount": total, "rows": rows})
    columns = ("segment", "step", "worker", "stage", "units", "blocks", "work", "amount")
    say(console, reports.table(rows, {name: name for name in columns}))
    say(console, f"{sum(row['work'] for row in rows)} units of work x {price} = {total}")
    return 0


@ledger_app.command()
def resolve(
    name: RunName,
    segment: Annotated[int, typer.Option(help="The segment that was flagged.")],
    upheld: Annotated[bool, typer.Option("--upheld/--dismissed", help="Whether the flags are right.")],
    culprit: Annotated[str, typer.Option(metavar="KEY", help="The worker whose unit was false, if one was.")] = "",
    where: Where = EMBEDDED,
    store: StoreFolder = ".trueweight",
    contract: Contract = "",
    keys: Keys = wiring.KEYS,
    confirmations: Confirmations = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    """Decide on a flagged segment, as the court that the terms name.

    Upheld: the segment is rejected, its operator's bond and the culprit's are slashed, and the segments after it are
    dropped. `trueweight pinpoint` finds the culprit, and a file of evidence shows it.

    \b
    trueweight ledger resolve quickstart --segment 3 --upheld --culprit 0x115a...c428
    """
    console = console_for(as_json)
    with _settlement(
        name, store, where, keys, contract, confirmations=confirmations, dry_run=dry_run, tell=teller(console)
    ) as made:
        found = [one for one in made.committed() if one.record.index == segment]
        if not found:
            raise UsageError(f"--segment {segment}: expected one below {made.state.committed}; see `ledger status`")
        made.ledger.send(made.terms.court, "resolve", made.terms, found[0].segment, upheld, culprit.lower() or NATIVE)
    return _tell(console, {"segment": segment, "upheld": upheld}, as_json)


# ------------------------------------------------------------------------------------------------------------ wiring


def committer(
    store: str, name: str, where: str, *, keys: str, tell: Callable[[str], None]
) -> Callable[[controller.Event], None]:
    """An observer that commits each segment to a ledger as it is stored. A ledger that fails stops no training."""

    def observe(event: controller.Event) -> None:
        if not isinstance(event, controller.Committed):
            return
        try:
            with _settlement(name, store, where, keys, "", tell=tell) as made:
                made.open()
                made.commit()
        except TrueweightError as error:
            tell(f"not committed to the ledger: {error}; later: trueweight commit {name} --ledger {where}")

    return observe


@contextmanager
def _settlement(
    name: str,
    store: str,
    where: str,
    keys: str,
    contract: str,
    terms: Path | None = None,
    *,
    confirmations: int = 1,
    dry_run: bool = False,
    threads: int = 1,
    executor: str = executors.DEFAULT,
    tell: Callable[[str], None],
) -> Iterator[Settlement]:
    objects = wiring.open_folder(store, create=False)
    history = History.open(objects, name)
    with connect(
        objects, where, keys=keys, contract=contract, confirmations=confirmations, dry_run=dry_run, tell=tell
    ) as chain:
        yield settlement(objects, history, chain, terms=terms, threads=threads, executor=executor, tell=tell)


def settlement(
    objects: Store,
    history: History,
    chain: Connection,
    *,
    terms: Path | None = None,
    threads: int = 1,
    executor: str = executors.DEFAULT,
    tell: Callable[[str], None],
) -> Settlement:
    """A run's settlement over a connection: under the terms that are on the ledger, else the defaults."""
    make, ledger = executors.named(executor), chain.deployed()
    found = _opened(ledger, history, chain, terms) or _terms(objects, history, chain, terms)
    has = chain.accounts

    @cache
    def replay(traced: bool) -> Replay:
        build = traced_builder(make) if traced else worker_builder(make)
        return Replay(objects, history.run, threads=threads, build=build)

    parties = Parties(
        submitter=found.submitter,
        operator=found.operator,
        court=found.court,
        verifiers=(has["verifier"],) if "verifier" in has else (),
        workers=(has["worker"],) if "worker" in has else (),
        secrets=chain.secrets,
    )
    return Settlement(ledger=ledger, history=history, terms=found, parties=parties, replay=replay, tell=tell)


def _opened(ledger: Ledger, history: History, chain: Connection, path: Path | None) -> Run | None:
    """The terms under which the run is on the ledger: those of the parties here, for anybody may open any run.

    None where it is not there, or --terms say under which terms it is to be.
    """
    opened: list[Run] = [event.args["run"] for event in ledger.events() if event.name == "Opened"]
    known = [run for run in opened if run.record == history.run_digest]
    here = set(chain.accounts.values())
    ours = [run for run in known if here & {run.submitter, run.operator, run.court}] or known
    if path is not None or not ours:
        return None
    if len(ours) > 1:
        names = ", ".join(run.id.hex()[:16] for run in ours)
        raise UsageError(f"run {history.name}: it is on the ledger as {names}; say which by its --terms FILE")
    return ours[0]


def _terms(objects: Store, history: History, chain: Connection, path: Path | None) -> Run:
    """The defaults, with the parties whose keys are here, and what the file says."""
    given: dict[str, Any] = {}
    if path is not None:
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise file_failure("reading", path, error) from error
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path}: expected TOML, got {error}; correct it") from error
    parties = {role: chain.accounts[role] for role in ("submitter", "operator", "court") if role in chain.accounts}
    chosen = {"beacon": chain.beacon, **parties, **given}
    missing = [role for role in ("submitter", "operator", "court", "beacon") if not chosen.get(role)]
    if missing:
        raise UsageError(f"terms: expected {', '.join(missing)}; name their addresses in --terms FILE")
    feed = wiring.stored_job(objects, history).feed
    return default_terms(history, feed.segments, len(feed.segment(0)), **chosen)


def _role(name: str, possible: Iterable[Role]) -> Role:
    found = {role.name.lower(): role for role in possible}
    if name not in found:
        raise UsageError(f"--role {name}: expected {', '.join(found)}; correct it")
    return found[name]


def _player(made: Settlement, role: Role) -> Account:
    """The account here that plays a role in a run; UsageError where its key is elsewhere."""
    parties = made.parties
    accounts = {Role.OPERATOR: (parties.operator,), Role.WORKER: parties.workers, Role.VERIFIER: parties.verifiers}
    for account in accounts[role]:
        if parties.has(account):
            return account
    name = role.name.lower()
    raise UsageError(f"--role {name}: expected its key in --keys, got none; `trueweight ledger key {name}`")


def _account(chain: Connection, role: str) -> Account:
    if role not in chain.accounts:
        raise UsageError(f"role {role}: expected its key in --keys ({', '.join(chain.accounts) or 'none'} are there)")
    return chain.accounts[role]


def _shown(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def _tell(console: Any, told: dict[str, Any], as_json: bool) -> int:
    if as_json:
        return print_json(told)
    for key, value in told.items():
        say(console, f"{key.replace('_', ' '):16}{value}")
    return 0


def _earned(console: Any, told: dict[str, Any], as_json: bool) -> int:
    if as_json:
        return print_json(told)
    columns = {"part": "part", "account": "account", "why": "why", "times": "times", "amount": "amount"}
    if told["earnings"]:
        say(console, reports.table(told["earnings"], columns))
    say(console, ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items() if key != "earnings"))
    return 0
