"""What every benchmark shares: rows with goals, a table for people, JSON for programs, an exit code.

A benchmark is a module of this package whose docstring's first line says what it measures, with

    def measure(arguments: argparse.Namespace) -> Iterator[Row]: ...

    if __name__ == "__main__":
        raise SystemExit(main(measure, __doc__))
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from rich.console import Console
from rich.table import Table

from storage.errors import TrueweightError, UsageError

Relation = Literal["<", "<=", "==", ">=", ">"]
Measure = Callable[[argparse.Namespace], Iterable["Row"]]
AddOptions = Callable[[argparse.ArgumentParser], None]

RELATIONS: dict[Relation, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
}
MISSED = 1  # exit code of a benchmark that ran and missed a goal
INTERRUPTED = 130  # and of one that Ctrl-C ended


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a value is held against, in the row's unit."""

    relation: Relation
    limit: float

    def met(self, value: float) -> bool:
        """Whether the value keeps to the goal; NaN never does."""
        return RELATIONS[self.relation](value, self.limit)

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. `met` is computed from it, and None where there is no goal."""

    name: str
    value: float
    unit: str
    goal: Goal | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        return None if self.goal is None else self.goal.met(self.value)

    def data(self) -> dict[str, object]:
        """The row as JSON values; a value that is not finite becomes null, as JSON has no name for it."""
        finite = self.value if abs(self.value) < float("inf") else None
        goal = None if self.goal is None else str(self.goal)
        return {"name": self.name, "value": finite, "unit": self.unit, "goal": goal, "met": self.met}


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusal is a UsageError, so that wrong use has one exit code everywhere."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; {self.format_usage().strip()}")


def main(
    measure: Measure,
    about: str | None,
    *,
    add_options: AddOptions | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs one benchmark and prints its rows. Exit code 0, 1 where a goal is missed, 64 or 70 after an error.

    Rows that were measured before an error, or before Ctrl-C (exit code 130), are printed too.
    """
    headline = first_line(about)
    parser = Parser(description=headline)
    parser.add_argument("--json", action="store_true", help="rows of name, value, unit, goal, met instead of a table")
    if add_options is not None:
        add_options(parser)
    rows: list[Row] = []
    code = 0
    try:
        given = parser.parse_args(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    try:
        rows.extend(measure(given))
    except TrueweightError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    if rows or not code:
        if given.json:
            print(json.dumps([row.data() for row in rows], indent=1))
        else:
            Console().print(table(rows, headline))
    return code or (MISSED if any(row.met is False for row in rows) else 0)


def table(rows: Iterable[Row], title: str) -> Table:
    """The rows for people, missed goals in red."""
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("measurement")
    drawn.add_column("value", justify="right")
    drawn.add_column("unit")
    drawn.add_column("goal", justify="right")
    drawn.add_column("met")
    marks = {None: "", True: "[green]yes[/green]", False: "[bold red]no[/bold red]"}
    for row in rows:
        goal = "" if row.goal is None else str(row.goal)
        drawn.add_row(row.name, f"{row.value:.6g}", row.unit, goal, marks[row.met])
    return drawn


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A benchmark as the list shows it."""

    name: str
    about: str


def benchmarks(folder: Path = Path(__file__).parent) -> list[Listed]:
    """The benchmarks in a folder by name: modules that define `measure`. They are read, not imported."""
    found = []
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body):
            found.append(Listed(name=path.stem, about=first_line(ast.get_docstring(tree))))
    return found


def first_line(text: str | None) -> str:
    """The first line of a docstring, or nothing."""
    return (text or "").strip().partition("\n")[0]
