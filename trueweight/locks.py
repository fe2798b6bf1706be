"""Lock files: the roots that a recipe must give on any machine, published beside it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from storage.errors import FailureError, UsageError
from storage.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Lock:
    """In hex: the recipe's digest, and the roots of the data, the programs and the state after the last step."""

    recipe: str
    data: str
    program: str
    state: str


def read_lock(path: Path) -> Lock:
    """The lock in a TOML file; UsageError where there is none or it lacks a key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return Lock(**{field.name: str(values[field.name]) for field in fields(Lock)})
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"lock {path}: expected a file with recipe, data, program and state roots, got {type(error).__name__} "
            f"({error}); write one with `trueweight lock RUN {path}`"
        ) from error


def write_lock(path: Path, lock: Lock, *, name: str) -> None:
    """Write the lock of a finished run."""
    lines = [
        f"# What the recipe {name!r} gives, whatever the machine: compare with `trueweight run RECIPE --lock FILE`."
    ]
    lines += [f'{field.name} = "{getattr(lock, field.name)}"' for field in fields(Lock)]
    write_whole(path, ("\n".join(lines) + "\n").encode())


def check_lock(lock: Lock, found: Mapping[str, str], path: Path) -> None:
    """FailureError naming the first root of `found` that the lock has otherwise."""
    for key, value in found.items():
        expected = getattr(lock, key)
        if value != expected:
            raise FailureError(f"lock {path}: expected the {key} root {expected}, got {value}; {_REMEDIES[key]}")


_REMEDIES = {
    "recipe": "use the published recipe, or write a lock of your own with `trueweight lock`",
    "data": "the source of the data has changed: compare the installed packages with constraints.txt",
    "program": "the lowering gave another program: install the versions in constraints.txt",
    "state": "this machine computes other bytes: audit the run on another one to see which is wrong",
}
