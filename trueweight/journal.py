"""A run's diary beside its store: events as JSON lines, metrics as Parquet. Read by people, never by a run."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.controller import Committed, Ended, Event, Ready, Stepped
from storage.files import file_failure, make_folder, write_whole
from storage.records import LOSS_BITS, StepRecord

METRICS = pa.schema(
    [
        ("step", pa.int64()),
        ("loss", pa.float64()),
        ("validation_loss", pa.float64()),
        ("validation_accuracy", pa.float64()),
        ("seconds", pa.float64()),
        ("items_per_second", pa.float64()),
    ]
)


def mean_loss(record: StepRecord) -> float:
    """The step's training loss per micro-batch: what people plot."""
    return record.loss / (record.units << LOSS_BITS)


def validation_loss(record: StepRecord) -> float | None:
    """The validation loss per batch, None where the step has none."""
    return record.validation[0] / (record.validation[3] << LOSS_BITS) if record.validation else None


def validation_accuracy(record: StepRecord) -> float | None:
    """The share of validation targets that the model found, None where the step has none."""
    return record.validation[1] / max(record.validation[2], 1) if record.validation else None


class Journal:
    """Observer of a controller: writes `events.jsonl` at once and `metrics.parquet` at every commit.

    `items` is how many tokens (or images) a step sees. Raises FailureError naming the file where the disk fails.
    """

    def __init__(self, folder: Path, *, items: int, clock: Callable[[], float] = monotonic) -> None:
        self._folder = folder
        self._items = items
        self._clock = clock
        self._since = clock()
        self._rows: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        """Take note of one event."""
        self._append({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **plain_event(event)})
        if isinstance(event, Ready):
            self._rows = [row for row in self._known() if row["step"] < event.step]
            self._since = self._clock()
        elif isinstance(event, Stepped):
            self._rows.append(self._row(event.record))
        elif isinstance(event, Committed | Ended):
            self._write_metrics()

    def _row(self, record: StepRecord) -> dict[str, Any]:
        now = self._clock()
        seconds, self._since = now - self._since, now
        return {
            "step": record.step,
            "loss": mean_loss(record),
            "validation_loss": validation_loss(record),
            "validation_accuracy": validation_accuracy(record),
            "seconds": seconds,
            "items_per_second": self._items / seconds if seconds > 0 else None,
        }

    def _append(self, line: dict[str, Any]) -> None:
        path = self._folder / "events.jsonl"
        make_folder(self._folder)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise file_failure("writing", path, error) from error

    def _known(self) -> list[dict[str, Any]]:
        path = self._folder / "metrics.parquet"
        try:
            return list(pq.read_table(path, schema=METRICS).to_pylist()) if path.exists() else []
        except (OSError, pa.ArrowException):
            return []  # a diary that cannot be read is begun again; the run itself is in the store

    def _write_metrics(self) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=METRICS), sink)
        write_whole(self._folder / "metrics.parquet", sink.getvalue().to_pybytes())


def plain_event(event: Event) -> dict[str, Any]:
    """The event as JSON values: its kind first, records as objects, digests in hex."""
    return {"event": type(event).__name__.lower(), **plain(event)}


def plain(value: Any) -> Any:
    """Records and events as JSON values."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value
