"""Under which terms a run is on a ledger, or will be: what was opened, else the defaults with what a file says."""

import re
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from ledger.port import Account, Ledger, Run
from runtime import executors
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.tracing import traced_builder
from runtime.worker import worker_builder
from storage.errors import UsageError
from storage.files import file_failure
from storage.store import Store
from trueweight import wiring
from trueweight.chains import Connection
from trueweight.parties import Parties
from trueweight.settlement import Settlement
from verification.replay import Replay

_KINDS = get_type_hints(Run)
_PARTIES = ("submitter", "operator", "court", "beacon")


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
    """A run's settlement over a connection: under the terms that are on the ledger, else the defaults.

    Where a key here is somebody's hot key, the part is that account's.
    """
    make, ledger = executors.named(executor), chain.deployed()
    owners = {role: str(ledger.read("account_of", key)) for role, key in chain.accounts.items()}
    found = _opened(ledger, history, set(owners.values()), terms) or _terms(objects, history, chain, owners, terms)

    @cache
    def replay(traced: bool) -> Replay:
        build = traced_builder(make) if traced else worker_builder(make)
        return Replay(objects, history.run, threads=threads, build=build)

    parties = Parties(
        submitter=found.submitter,
        operator=found.operator,
        court=found.court,
        verifiers=(owners["verifier"],) if "verifier" in owners else (),
        workers=(owners["worker"],) if "worker" in owners else (),
        secrets=chain.secrets,
        keys={owner: chain.accounts[role] for role, owner in owners.items() if owner != chain.accounts[role]},
    )
    return Settlement(ledger=ledger, history=history, terms=found, parties=parties, replay=replay, tell=tell)


def _opened(ledger: Ledger, history: History, here: set[Account], path: Path | None) -> Run | None:
    """The terms under which the run is on the ledger: those of the parties here, for anybody may open any run.

    None where it is not there, or --terms say under which terms it is to be.
    """
    opened: list[Run] = [event.args["run"] for event in ledger.events() if event.name == "Opened"]
    known = [run for run in opened if run.record == history.run_digest]
    ours = [run for run in known if here & {run.submitter, run.operator, run.court}] or known
    if path is not None or not ours:
        return None
    if len(ours) > 1:
        names = ", ".join(run.id.hex()[:16] for run in ours)
        raise UsageError(f"run {history.name}: it is on the ledger as {names}; say which by its --terms FILE")
    return ours[0]


def _terms(
    objects: Store, history: History, chain: Connection, owners: Mapping[str, Account], path: Path | None
) -> Run:
    """The defaults, with the parties whose keys are here, and what the file says."""
    given = read_terms(path) if path else {}
    here = {role: owners[role] for role in ("submitter", "operator", "court") if role in owners}
    chosen = {"beacon": chain.beacon, **here, **given}
    missing = [role for role in _PARTIES if not chosen.get(role)]
    if missing:
        raise UsageError(f"terms: expected {', '.join(missing)}; name their addresses in --terms FILE")
    feed = wiring.stored_job(objects, history).feed
    return default_terms(history, feed.segments, len(feed.segment(0)), **chosen)


def read_terms(path: Path) -> dict[str, Any]:
    """The terms in a TOML file, as Run takes them; UsageError naming the one that is none."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise file_failure("reading", path, error) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: expected TOML, got {error}; correct it") from error
    unknown = sorted(set(given) - set(_KINDS))
    if unknown:
        raise UsageError(f"terms: expected keys of `trueweight ledger terms`, got {', '.join(unknown)}; correct them")
    return {name: _term(name, value) for name, value in given.items()}


def _term(name: str, value: Any) -> Any:
    kind, expected = _KINDS[name], "a number that is 0 or more"
    if kind is int and type(value) is int and value >= 0:
        return value
    if kind is not int:
        digits = 64 if kind is bytes else 40
        expected = f"0x and {digits} hexadecimal digits, in quotes"
        if isinstance(value, str) and re.fullmatch(rf"(?:0x)?[0-9a-fA-F]{{{digits}}}", value):
            bare = value.removeprefix("0x").lower()
            return bytes.fromhex(bare) if kind is bytes else f"0x{bare}"
    raise UsageError(f"terms: {name}: expected {expected}, got {value!r}; correct it in --terms FILE")


def default_terms(history: History, segments: int, steps: int, **chosen: Any) -> Run:
    """Terms for a run of so many segments of so many steps; `chosen` are the parties and whatever else is other.

    A unit of work is worth 10^12 of the smallest unit; everything else follows from a segment's pay.
    """
    program = TrainingProgram.decode(history.store.get(history.run.programs))
    work = steps * program.micro_batches * len(program.blocks)
    price = chosen.pop("price", 10**12)
    pay = work * price
    state = len(program.tensors) * (1 + len(program.slots))
    known = {
        "record": history.run_digest,
        "initial_state": history.run.initial_state,
        "segments": segments,
        "tensors": state,
        "work": work,
        "price": price,
        "operator_fee": pay // 10,
        "verifier_fee": pay * 3 // 2,
        "operator_bond": pay * 40,
        "worker_bond": pay * 4,
        "verifier_bond": pay * 15,
        "flag_bond": pay,
        "pot": pay * 24,
        "jackpot": pay * 12,
        "rate": 2**30,
        "forced_rate": 2**32 // 10,
        "verifiers": 1,
        "reporter_share": 30,
        "harmed_share": 20,
        "miss_penalty": 10,
        "window": 7_200,
        "answer": 3_600,
        "dispute": 86_400,
    }
    return Run(**(known | chosen))
