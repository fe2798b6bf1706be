"""`trueweight ledger`: chains, contracts, keys, balances, terms. `register` adds everything that is about money.

Commands about a run's way are in `settle_cli`, those about what is in dispute in `dispute_cli`, about amounts in
`payout_cli`.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ledger.economics import break_even, judge, segment_detection
from ledger.port import NATIVE, Ledger, Role
from ledger.rules import escrow
from storage.errors import UsageError
from storage.files import file_failure, write_whole
from trueweight import delegations, dispute_cli, payout_cli, reports, settle_cli, wiring
from trueweight.chains import ANVIL, EMBEDDED, ROLES, address, deployment, ledger_folder, number
from trueweight.console import print_json, say
from trueweight.ledger_options import Place, RunName, Sending, Terms, Token, account_of, key_name, with_options
from trueweight.settle_cli import committer

__all__ = ["committer", "ledger_app", "register"]

ledger_app = typer.Typer(help="The ledger: chains, contracts, terms.", no_args_is_help=True, rich_markup_mode=None)
KeyName = Annotated[str, typer.Argument(metavar="ROLE", help=f"Whose key: {', '.join(ROLES)}, or a name of yours.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(ledger_app, name="ledger")
    app.add_typer(payout_cli.app, name="payout")
    settle_cli.register(app)


# ------------------------------------------------------------------------------------------------- chains, contracts


@ledger_app.command()
@with_options
def up(*, at: Place) -> int:
    """Make a chain of one's own and put the contracts on it.

    `embedded` is a chain in a file of the store, `anvil` one that runs while a command does. Both give everybody's
    account coins that are worth nothing, and keep keys for all parts in --keys.

    \b
    trueweight ledger up
    trueweight ledger up --ledger anvil
    """
    with at.connect(at.open_store(create=True)) as chain:
        told = {"chain": chain.node.chain_id(), "ledger": chain.deployed().address, "beacon": chain.beacon}
        told["accounts"] = dict(chain.accounts)
    return at.answer(told)


@ledger_app.command("deploy")
@with_options
def deploy_command(
    role: Annotated[str, typer.Option(help=f"Whose key pays: {', '.join(ROLES)}.")] = "operator", *, at: Sending
) -> int:
    """Put the contracts on a node's chain.

    Nobody has power over them afterwards, whoever deployed them included. The addresses are noted in the store.

    \b
    trueweight ledger deploy --ledger https://sepolia.example.org
    """
    if at.where in (EMBEDDED, ANVIL):
        raise UsageError(
            f"--ledger {at.where}: expected a node's URL; `trueweight ledger up` deploys on one's own chains"
        )
    objects = at.open_store(create=True)
    with at.connect(objects) as chain:
        made = deployment(chain.node, account_of(chain, role), ledger_folder(objects), at.tell)
    return at.answer(made)


@ledger_app.command("key")
def key_command(role: KeyName, keys: Annotated[str, typer.Option(metavar="DIR", help="Folder.")] = wiring.KEYS) -> int:
    """Make a key in an encrypted keystore.

    The password comes from TRUEWEIGHT_PASSWORD or is asked for. A key may also be given in TRUEWEIGHT_ROLE_KEY. Names
    beside the roles are for accounts that hot keys act for; see `trueweight ledger delegate`.

    \b
    trueweight ledger key operator
    trueweight ledger key payee
    """
    from ledger.keys import make_keystore

    print(make_keystore(key_name(role), Path(keys).expanduser()))
    return 0


@ledger_app.command()
@with_options
def status(*, at: Place) -> int:
    """Show the runs on a ledger and what the accounts here have, in the chain's own currency and the runs' tokens.

    \b
    trueweight ledger status
    trueweight ledger status --ledger https://sepolia.example.org --json
    """
    with at.connect(at.open_store()) as chain:
        ledger = chain.deployed()
        block, time = ledger.now()
        found = _runs(ledger)
        tokens = dict.fromkeys((NATIVE, *(row["token"] for row in found)))
        balances = [
            {"part": role, "account": account, "token": token, "balance": balance}
            for token in tokens
            for role, account in chain.accounts.items()
            if (balance := ledger.read("balance_of", token, account)) or token == NATIVE
        ]
        told: dict[str, Any] = {"chain": chain.node.chain_id(), "ledger": ledger.address, "block": block, "time": time}
    told |= {"runs": found, "balances": balances}
    if at.as_json:
        return print_json(told)
    say(at.console, f"chain {told['chain']}, block {block}, ledger {ledger.address}")
    columns = ("run", "status", "segments", "committed", "final", "escrow", "pot")
    say(at.console, reports.table(found, {name: name for name in columns}) if found else "no runs yet")
    shown = ("part", "account", *(["token"] if len(tokens) > 1 else []), "balance")
    say(at.console, reports.table(balances, {name: name for name in shown}))
    return 0


def _runs(ledger: Ledger) -> list[dict[str, Any]]:
    found = []
    for event in ledger.events():
        if event.name == "Opened":
            state, terms = ledger.read("run_of", event.args["id"]), event.args["run"]
            row = {"run": event.args["id"].hex(), "record": terms.record.hex(), "status": state.status.name.lower()}
            row |= {"segments": terms.segments, "committed": state.committed, "final": state.finalised}
            found.append(row | {"escrow": state.escrow, "pot": state.pot, "token": terms.token})
    return found


@ledger_app.command("terms")
@with_options
def terms_command(name: RunName, terms: Terms = None, *, at: Place) -> int:
    """Show a run's terms and whether cheating pays under them.

    Terms that are not on the ledger yet are the defaults with what --terms says. Where a cheat on one segment is worth
    more than what it risks they are refused (64), with the bond or rate that would do.

    \b
    trueweight ledger terms quickstart
    trueweight ledger terms quickstart --terms dear.toml
    """
    with at.settlement(name, terms) as (made, _):
        found = made.terms
    told = {field.name: _shown(getattr(found, field.name)) for field in dataclasses.fields(found)}
    gain = found.work * found.price
    told |= {"escrow": escrow(found), "detection": float(segment_detection(found))}
    told |= {"break_even": int(break_even(found)), "gain": gain, "margin": float(judge(found, gain))}
    return at.answer(told)


def _shown(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


# ----------------------------------------------------------------------------------------------------------- balances


@ledger_app.command()
@with_options
def deposit(
    role: KeyName,
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="In the smallest unit.")],
    token: Token = "",
    *,
    at: Sending,
) -> int:
    """Put money into an account's balance on the ledger, from which escrows and bonds are paid.

    The other commands take what they need by themselves. An ERC-20 is approved first, for this amount only.

    \b
    trueweight ledger deposit verifier 1000000000000000
    trueweight ledger deposit submitter 5000000 --token 0x1c7d4b196cb0c7b01d743fbc6116a902379c7238
    """
    coin, much = _token(token), number(amount, "AMOUNT")
    with at.connect(at.open_store(), also=(key_name(role),)) as chain:
        account, ledger = account_of(chain, role), chain.deployed()
        if coin != NATIVE:
            ledger.approve(account, coin, much)
        ledger.send(account, "deposit", coin, much, value=much if coin == NATIVE else 0)
        balance = ledger.read("balance_of", coin, account)
    return at.answer({"account": account, "deposited": much, "balance": balance})


@ledger_app.command()
@with_options
def withdraw(role: KeyName, token: Token = "", *, at: Sending) -> int:
    """Take an account's balance out of the ledger, to the account itself.

    \b
    trueweight ledger withdraw worker
    trueweight ledger withdraw worker --token 0x1c7d4b196cb0c7b01d743fbc6116a902379c7238
    """
    coin = _token(token)
    with at.connect(at.open_store(), also=(key_name(role),)) as chain:
        account, ledger = account_of(chain, role), chain.deployed()
        amount = ledger.read("balance_of", coin, account)
        if amount:
            ledger.send(account, "withdraw", coin, amount, account)
    return at.answer({"account": account, "withdrawn": amount})


def _token(text: str) -> str:
    return address(text, "--token") if text else NATIVE


# --------------------------------------------------------------------------------------------------------------- keys


@ledger_app.command()
@with_options
def delegate(
    role: KeyName,
    key: Annotated[str, typer.Option(metavar="ROLE", help="The hot key, where it is here too.")] = "",
    signed: Annotated[Path | None, typer.Option(metavar="FILE", help="What `ledger sign-delegation` wrote.")] = None,
    *,
    at: Sending,
) -> int:
    """Let a hot key act for an account, whose own key stays elsewhere.

    A hot key commits, seals, reveals, opens and answers for its account, and what its receipts earn is the account's;
    it moves none of the account's money. A key has one account for ever.

    \b
    trueweight ledger delegate payee --key worker
    trueweight ledger delegate payee --signed worker.delegation.json --ledger https://sepolia.example.org
    """
    if bool(key) == (signed is not None):
        raise UsageError("delegate: expected --key ROLE or --signed FILE, and not both; give one")
    names = [key_name(each) for each in (role, key) if each]
    with at.connect(at.open_store(), also=names) as chain:
        account, ledger = account_of(chain, role), chain.deployed()
        if signed is None:
            hot = account_of(chain, key)
            made = delegations.sign(chain, hot, account, ledger.now()[1] + delegations.HOUR)
        else:
            made = delegations.read(signed, chain, account)
        ledger.send(account, "delegate", made.key, made.deadline, made.signature)
    return at.answer({"account": account, "key": made.key})


@ledger_app.command("sign-delegation")
@with_options
def sign_delegation(
    role: KeyName,
    account: Annotated[str, typer.Option(metavar="ADDRESS", help="The account that the key is to act for.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")],
    hours: Annotated[int, typer.Option(min=1, help="How long it may be used.")] = 24,
    *,
    at: Place,
) -> int:
    """Sign, with a hot key, that it is an account's. Nothing is sent; the account does that with `ledger delegate`.

    \b
    trueweight ledger sign-delegation worker --account 0x5aae...beaed --out worker.delegation.json
    """
    owner = address(account, "--account")
    with at.connect(at.open_store(), also=(key_name(role),)) as chain:
        hot = account_of(chain, role)
        made = delegations.sign(chain, hot, owner, chain.deployed().now()[1] + hours * delegations.HOUR)
    data = json.dumps(made.as_json(), indent=2) + "\n"
    try:
        write_whole(out, data.encode())
    except OSError as error:
        raise file_failure("writing", out, error) from error
    return at.answer({"file": str(out), "account": owner, "key": hot, "deadline": made.deadline})


@ledger_app.command()
@with_options
def accept(
    name: RunName,
    chain_end: Annotated[
        str, typer.Option("--chain", metavar="DIGEST", help="As `commit` says where the hot key is; else this key's.")
    ] = "",
    *,
    at: Sending,
) -> int:
    """Accept a run as its operator, with the bond, for segments that a hot key elsewhere will open.

    `trueweight commit` accepts by itself where the operator's own key also opens the segments.

    \b
    trueweight ledger accept quickstart --chain 7d3f...90ab
    """
    end = re.fullmatch("(?:0x)?([0-9a-fA-F]{64})", chain_end)
    if chain_end and not end:
        raise UsageError(f"--chain {chain_end}: expected 64 hexadecimal digits; copy what `trueweight commit` said")
    with at.settlement(name) as (made, _):
        made.accept(bytes.fromhex(end[1]) if end else made.chain_end)
        bond = made.ledger.read("bond_of", made.terms.id, Role.OPERATOR, made.terms.operator)
    return at.answer({"run": name, "operator": made.terms.operator, "bond": bond.amount})


dispute_cli.register(ledger_app)
