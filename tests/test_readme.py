"""What README and docs tell people to type is what the programs take."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks.harness import benchmarks
from trueweight.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMAND = re.compile(r"(?:^|-m |`)(trueweight|benchmarks\.?\w*|make)((?: [^`#\n|]*)?)", re.MULTILINE)


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, program, arguments) of every command in a code block or code span, patterns such as [--x N] left out."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = [
            *re.findall(r"```bash\n(.*?)```", text, re.DOTALL),
            *re.findall(r"^    (?=\S)(.*)$", text, re.MULTILINE),
        ]
        code += re.findall(r"`((?:python -m )?(?:trueweight|benchmarks|make) [^`]*)`", text)
        for block in code:
            for program, rest in COMMAND.findall(block):
                if "[" not in rest and "..." not in rest and "…" not in rest:
                    found.append((page.name, program, shlex.split(rest)))
    return found


def test_there_are_commands() -> None:
    assert sum(program == "trueweight" for _, program, _ in commands()) > 12


@pytest.mark.parametrize(("page", "program", "arguments"), commands())
def test_a_documented_command_exists(page: str, program: str, arguments: list[str]) -> None:
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert next(a for a in arguments if "=" not in a) in targets
    elif program.startswith("benchmarks"):
        known = {f"benchmarks.{one.name}" for one in benchmarks()} | {"benchmarks"}
        assert program in known
    elif arguments and arguments[0] not in ("--help", "COMMAND"):
        group = typer.main.get_command(app)
        command = group.commands[arguments[0]]  # type: ignore[attr-defined]
        given = [{"N": "1", "S": "1", "R": "1"}.get(a, a) for a in arguments[1:]]
        while hasattr(command, "commands") and given and not given[0].startswith("-"):
            command = command.commands[given.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {a for a in given if a.startswith("--")} <= options | {"--help"}, page
        if given and "--help" not in given:
            command.make_context(arguments[0], given)
