"""`trueweight stake`, `unstake`, `commit`, `claim`, `settle`: a run's money, from escrow to payout."""

from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from ledger.economics import judge
from ledger.port import Account, Role, Status
from runtime import controller, executors
from runtime.segments import History
from storage.errors import TrueweightError, UsageError
from trueweight import wiring
from trueweight.chains import connect
from trueweight.ledger_options import RunName, Sending, Terms, with_options
from trueweight.run_terms import settlement
from trueweight.settlement import Settlement

EARNINGS = ("part", "account", "why", "times", "amount")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (stake, unstake, commit, claim, settle):
        app.command(command.__name__)(with_options(command))


def stake(
    name: RunName,
    role: Annotated[str, typer.Option(help="worker, verifier, or operator (its bond made whole again).")] = "worker",
    *,
    at: Sending,
) -> int:
    """Put up a worker's or verifier's bond for a run, or make an operator's whole again.

    Where the run is paid in an ERC-20 what the account's balance on the ledger lacks is approved and deposited first.

    \b
    trueweight stake quickstart --role verifier
    """
    kind = _role(role, Role)
    with at.settlement(name) as (made, _):
        terms, account = made.terms, _player(made, kind)
        bonds = {Role.OPERATOR: terms.operator_bond, Role.WORKER: terms.worker_bond, Role.VERIFIER: terms.verifier_bond}
        made.join(kind, account, bonds[kind])
        bond = made.ledger.read("bond_of", terms.id, kind, account)
    return at.answer({"role": role, "account": account, "bond": bond.amount})


def unstake(
    name: RunName,
    role: Annotated[str, typer.Option(help="operator, worker or verifier.")] = "worker",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the bond can be had.")] = False,
    *,
    at: Sending,
) -> int:
    """Leave a run, and have the bond back.

    A bond can be had only after the time in which it may be slashed. The first call begins that time, one after it
    puts the bond into the account's balance; `trueweight ledger withdraw` takes it out.

    \b
    trueweight unstake quickstart --role verifier
    trueweight unstake quickstart --role verifier --wait
    """
    kind = _role(role, Role)
    with at.settlement(name) as (made, _):
        account = _player(made, kind)
        back, free = made.leave(kind, account, wait=wait)
    return at.answer({"role": role, "account": account, "returned": back, "free_at": free})


def commit(name: RunName, terms: Terms = None, *, at: Sending) -> int:
    """Commit a run's segments to its ledger, opening the escrow first where the submitter's key is here.

    `trueweight run RECIPE --ledger WHERE` does it as the segments come.

    \b
    trueweight commit quickstart
    trueweight commit quickstart --ledger https://sepolia.example.org --terms terms.toml --dry-run
    """
    with at.settlement(name, terms) as (made, _):
        made.open()
        done = made.commit()
        total = made.state.committed
    return at.answer({"run": name, "committed_now": done, "committed": total})


def claim(
    name: RunName,
    worker: Annotated[str, typer.Option(metavar="KEY", help="The worker's address; all without.")] = "",
    *,
    at: Sending,
) -> int:
    """Claim what final segments pay, and what is due for rejected ones.

    Anybody may; the amount goes to the balance of the key's account, in the run's token.

    \b
    trueweight claim quickstart
    trueweight claim quickstart --worker 0x115a...c428
    """
    with at.settlement(name) as (made, _):
        sender = made.anybody()
        done = sum(made.claim(one, sender, worker.lower() or None) for one in made.ever())
        rows = made.earnings()
    return at.answer_rows({"run": name, "claims": done, "earnings": rows}, "earnings", EARNINGS)


def settle(
    name: RunName,
    terms: Terms = None,
    threads: Annotated[int, typer.Option(help="Threads of a replay; 0 is all.")] = 1,
    executor: Annotated[str, typer.Option("--executor", help="compiled or reference.")] = executors.DEFAULT,
    *,
    at: Sending,
) -> int:
    """Settle a run: escrow, bonds, commitments, verdicts, opening, answers, finality, payouts.

    Does whatever has not been done and whose key is here, and waits for the windows between; an embedded chain's and
    anvil's clock is put forward instead. Stopped anywhere, the same command goes on. Ends with who got what and why.

    \b
    trueweight settle quickstart
    trueweight settle quickstart --ledger anvil
    trueweight settle quickstart --ledger https://sepolia.example.org --confirmations 3
    """
    with at.settlement(name, terms, threads=threads, executor=executor) as (made, _):
        if made.state.status == Status.NONE:
            judge(made.terms, made.terms.work * made.terms.price)
        for part in (made.open, made.commit, made.judge, made.finalise, made.pay, made.close):
            part()
        state, rows = made.state, made.earnings()
    told = {"run": name, "id": made.terms.id.hex(), "status": state.status.name.lower()}
    told |= {"segments": made.terms.segments, "committed": state.committed, "final": state.finalised}
    return at.answer_rows({**told, "earnings": rows}, "earnings", EARNINGS)


def committer(
    store: str, name: str, where: str, *, keys: str, tell: Callable[[str], None]
) -> Callable[[controller.Event], None]:
    """An observer that commits each segment to a ledger as it is stored. A ledger that fails stops no training."""

    def observe(event: controller.Event) -> None:
        if not isinstance(event, controller.Committed):
            return
        try:
            objects = wiring.open_folder(store, create=False)
            history = History.open(objects, name)
            with connect(objects, where, keys=keys, tell=tell) as chain:
                made = settlement(objects, history, chain, tell=tell)
                made.open()
                made.commit()
        except TrueweightError as error:
            tell(f"not committed to the ledger: {error}; later: trueweight commit {name} --ledger {where}")

    return observe


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
    keys = [parties.keys[account] for account in accounts[role] if account in parties.keys]
    if keys:
        raise UsageError(
            f"--role {name}: {keys[0]} is a hot key, and bonds are its account's; use the key of {accounts[role][0]}"
        )
    raise UsageError(f"--role {name}: expected its key in --keys, got none; `trueweight ledger key {name}`")
