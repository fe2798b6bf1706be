"""`trueweight audit --dry-run`: what would be replayed, and what it would take on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from runtime.executors import Make
from runtime.profiles import FOLDER, HostProfile, cached
from runtime.segments import History
from storage.errors import FailureError, UsageError
from storage.records import SegmentRecord
from storage.store import Store
from trueweight.auditing import Choice, candidates, select
from trueweight.reports import table
from verification.forecast import Forecast, Rates, measure_rates, segment_forecast, unit_forecast
from verification.replay import Material
from verification.sampling import Piece
from verification.units import committed, first_receipt, stage_of


def forecast_report(
    store: Store, name: str, choice: Choice, *, make: Make, executor: str, threads: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The draw that an audit would make and its cost by this machine's profile, which is measured where there is none.

    UsageError where the run, a segment or a worker does not exist, or nothing is committed; FailureError where the
    store lacks something.
    """
    history = History.open(store, name)
    segments = history.segments()
    if not segments:
        raise UsageError(f"run {name}: expected a committed segment, got none yet; wait for the first one")
    selection = select(choice, history, candidates(choice, history, segments))
    began = perf_counter()
    material, executing = Material.read(store, history.run), make(threads)
    start = perf_counter() - began
    program, feed = material.program, material.feed
    profile = cached(program, make, executor=executor, threads=threads, folder=Path(FOLDER).expanduser(), tell=tell)
    rates = measure_rates(executing, program, feed.recipe.seed)
    rows: list[dict[str, Any]] = []
    forecasts: list[Forecast] = []
    for piece in selection.pieces:
        if piece.worker:
            units, made = _unit(history, segments, piece, material, profile, rates)
            what = {"worker": piece.worker, "units": units}
        else:
            made = segment_forecast(program, profile, rates, feed=feed, index=piece.segment)
            what = {"steps": segments[piece.segment].steps}
        forecasts.append(made)
        rows.append({"segment": piece.segment, **what, **asdict(made)})
    return {
        "run": name,
        "executor": executor,
        "threads": profile.threads,
        "seed": selection.seed,
        "beacon": selection.beacon.hex() or None,
        "start": start + profile.start,
        "pieces": rows,
        "of": selection.candidates,
        "seconds": start + profile.start + sum(made.seconds for made in forecasts),
        "memory": max((made.memory for made in forecasts), default=0),
        "read": sum(made.read for made in forecasts),
    }


def _unit(
    history: History,
    segments: Sequence[SegmentRecord],
    piece: Piece,
    material: Material,
    profile: HostProfile,
    rates: Rates,
) -> tuple[int, Forecast]:
    """(how many micro-batches a worker signed for, what they take)."""
    receipt = first_receipt(history, committed(history, segments, piece.segment), piece.worker)
    blocks = stage_of(receipt, material.program)
    if blocks is None:
        raise FailureError(
            f"segment {piece.segment}, worker {piece.worker}: expected a receipt of a stage of the run's programs, got "
            f"another; audit it, it says why"
        )
    units = len(receipt.units)
    return units, unit_forecast(
        material.program, profile, rates, blocks=blocks, micro_batches=units, stored=piece.segment > 0
    )


def print_forecast(tell: Callable[[str], None], told: dict[str, Any]) -> None:
    """The forecast for people."""
    columns = {"segment": "segment", "worker": "worker", "units": "units", "steps": "steps", "seconds": "seconds"}
    present = {key: head for key, head in columns.items() if any(key in row for row in told["pieces"])}
    tell(table(told["pieces"], present))
    tell(
        f"would take {told['seconds']:.1f} s, {told['start']:.1f} of them to begin (executor {told['executor']}, "
        f"threads {told['threads']}), at most {told['memory'] / 1e9:.2f} GB of memory, and read "
        f"{told['read'] / 1e6:.0f} MB of state before compression"
    )
    if told["seed"] is not None:
        tell(f"the same draw: --seed {told['seed']}")
