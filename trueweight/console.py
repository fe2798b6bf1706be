"""Where commands write: people read stdout, or stderr where stdout is for a program."""

import json
import os
from collections.abc import Callable
from typing import Any

from rich.console import Console


def console_for(as_json: bool) -> Console:
    """Where people read: stderr when stdout is for a program."""
    return Console(stderr=as_json)


def say(console: Console, line: str) -> None:
    """Write a line as it is: no markup, no wrapping."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def teller(console: Console) -> Callable[[str], None]:
    """`say` for one console."""
    return lambda line: say(console, line)


def tell_from_signal(line: str) -> None:
    """Past every buffer: a signal may have interrupted the code that is filling one."""
    os.write(2, f"\n{line}\n".encode())


def writer(console: Console) -> Callable[[str], None]:
    """Writes pieces of a log as they are, escapes included."""

    def write(piece: str) -> None:
        console.file.write(piece)
        console.file.flush()

    return write


def print_json(value: dict[str, Any]) -> int:
    """Exit code 0, once the value is on stdout."""
    print(as_json(value))
    return 0


def as_json(value: dict[str, Any]) -> str:
    """The value as people and programs read it."""
    return json.dumps(value, indent=2)
