"""What the commands about a ledger share: their options, as groups, and how they answer.

A command takes a group as one parameter and is registered through `with_options`, which shows the group's fields as
options of their own.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from ledger.port import Account
from runtime import executors
from runtime.segments import History
from storage.errors import UsageError
from storage.store import Store
from trueweight import reports, wiring
from trueweight.chains import EMBEDDED, ROLES, Connection, connect
from trueweight.console import console_for, print_json, say, teller
from trueweight.run_terms import settlement
from trueweight.settlement import Settlement

RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name; `trueweight runs` lists them.")]
Terms = Annotated[Path | None, typer.Option(metavar="FILE", help="TOML with terms that differ from the defaults.")]
Token = Annotated[str, typer.Option(metavar="ADDRESS", help="An ERC-20; the chain's own currency without.")]
SegmentIndex = Annotated[int, typer.Option(help="The segment's index.")]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which ledger, over which store, with which keys."""

    where: Annotated[
        str,
        typer.Option("--ledger", metavar="WHERE", envvar="TRUEWEIGHT_LEDGER", help="embedded, anvil, or a node's URL."),
    ] = EMBEDDED
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")] = ".trueweight"
    contract: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="The ledger's contract, where none is noted; @BLOCK: not before that."),
    ] = ""
    keys: Annotated[str, typer.Option(metavar="DIR", help="Folder of keys: ROLE.json (keystore) or ROLE.key.")] = (
        wiring.KEYS
    )
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")] = False

    @cached_property
    def console(self) -> Console:
        """Where people read."""
        return console_for(self.as_json)

    def tell(self, line: str) -> None:
        """Progress, for people."""
        teller(self.console)(line)

    def open_store(self, *, create: bool = False) -> Store:
        """The store."""
        return wiring.open_folder(self.store, create=create)

    @contextmanager
    def connect(self, objects: Store, *, also: Iterable[str] = ()) -> Iterator[Connection]:
        """The chain; `also` are names of keys beside those of the roles."""
        sending = self._sending()
        with connect(
            objects, self.where, keys=self.keys, contract=self.contract, also=also, tell=self.tell, **sending
        ) as chain:
            yield chain

    @contextmanager
    def settlement(
        self,
        name: str,
        terms: Path | None = None,
        *,
        threads: int = 1,
        executor: str = executors.DEFAULT,
        also: Iterable[str] = (),
    ) -> Iterator[tuple[Settlement, Connection]]:
        """A run's settlement and its chain."""
        objects = self.open_store()
        history = History.open(objects, name)
        with self.connect(objects, also=also) as chain:
            yield (
                settlement(objects, history, chain, terms=terms, threads=threads, executor=executor, tell=self.tell),
                chain,
            )

    def _sending(self) -> dict[str, Any]:
        return {}

    def answer(self, told: dict[str, Any]) -> int:
        """Exit code 0, once the values are shown, one a line."""
        if self.as_json:
            return print_json(told)
        for key, value in told.items():
            say(self.console, f"{key.replace('_', ' '):16}{value}")
        return 0

    def answer_rows(self, told: dict[str, Any], rows: str, columns: Iterable[str]) -> int:
        """Exit code 0, once `told[rows]` is shown as a table and the other values on one line."""
        if self.as_json:
            return print_json(told)
        if told[rows]:
            say(self.console, reports.table(told[rows], {name: name.replace("_", " ") for name in columns}))
        others = (f"{key.replace('_', ' ')} {value}" for key, value in told.items() if key != rows)
        say(self.console, ", ".join(others))
        return 0


@dataclass(frozen=True, kw_only=True)
class Sending(Place):
    """A place, and how calls are sent to it."""

    confirmations: Annotated[int, typer.Option(help="Blocks to wait for after a call's own, on a node.")] = 1
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what each call would take; send nothing.")] = False

    def _sending(self) -> dict[str, Any]:
        return {"confirmations": self.confirmations, "dry_run": self.dry_run}


def with_options(command: Callable[..., int]) -> Callable[..., int]:
    """The command as typer reads it: each parameter that is a group of options as the group's fields."""
    parameters = list(inspect.signature(command).parameters.values())
    groups: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}
    shown: list[inspect.Parameter] = []
    for each in parameters:
        if each.name not in groups:
            shown.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[each.name], include_extras=True)
        for field in fields(groups[each.name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            kind = inspect.Parameter.KEYWORD_ONLY
            shown.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))

    @wraps(command)
    def run(**given: Any) -> int:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def key_name(name: str) -> str:
    """The name of a key; UsageError where it can be none."""
    if not re.fullmatch("[a-z][a-z0-9-]{0,30}", name):
        raise UsageError(f"key {name}: expected {', '.join(ROLES)}, or lower-case letters, digits and '-'; choose one")
    return name


def account_of(chain: Connection, role: str) -> Account:
    """The account of a key here; UsageError where there is none of that name."""
    if role not in chain.accounts:
        there = ", ".join(chain.accounts) or "none"
        raise UsageError(
            f"key {role}: expected it in --keys ({there} are there) or the environment; `trueweight ledger key {role}` "
            f"makes one"
        )
    return chain.accounts[role]
