"""`python -m benchmarks`: the list of benchmarks, with `--json` as rows of name and about."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from benchmarks.harness import benchmarks


def main() -> None:
    """Prints what there is to run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Lists the benchmarks.")
    parser.add_argument("--json", action="store_true", help="rows of name and about instead of a table")
    listed = benchmarks()
    if parser.parse_args().json:
        print(json.dumps([{"name": entry.name, "about": entry.about} for entry in listed], indent=1))
        return
    table = Table()
    table.add_column("name")
    table.add_column("what it measures")
    for entry in listed:
        table.add_row(entry.name, entry.about)
    Console().print(table)
    print("run one: python -m benchmarks.NAME [--json]")


if __name__ == "__main__":
    main()
