"""Tables of one's own log as `freshet export` writes them: their columns, and the reader of csv, csv.gz and parquet.

One row an event, one row a shown position, one row a catalogue entry. Knows nothing of Kafka, nor of how outcomes were
joined; what a row says is checked as at the doors.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from streaming.events import Interaction, Item, parse_item, parse_object

if TYPE_CHECKING:
    from types import ModuleType

TEXT, NUMBER, WHOLE = "text", "number", "whole"
Schema = dict[str, str]
EVENTS: Final[Schema] = {
    "ts": NUMBER, "recorded": NUMBER, "user_id": TEXT, "item_id": TEXT, "kind": TEXT, "value": NUMBER,
    "scale_low": NUMBER, "scale_high": NUMBER, "slate_id": TEXT, "position": WHOLE, "surface": TEXT, "context": TEXT,
    "event_id": TEXT, "partition": WHOLE, "offset": WHOLE,
}  # fmt: skip
"""An event: kind is click, dwell, rating, view or an action's name (`action:click` for one of those names); value its
seconds, or a rating on its scale; times in seconds, `recorded` by the log's clock; context is JSON."""
SLATES: Final[Schema] = {
    "slate_id": TEXT, "ts": NUMBER, "recorded": NUMBER, "user_id": TEXT, "surface": TEXT, "policy": TEXT,
    "step": WHOLE, "position": WHOLE, "item_id": TEXT, "propensity": NUMBER, "channel": TEXT, "candidates": WHOLE,
    "viewed": WHOLE, "clicked": WHOLE, "dwell": NUMBER, "rating": NUMBER, "actions": TEXT, "reward": NUMBER,
    "first_outcome_s": NUMBER, "partition": WHOLE, "offset": WHOLE,
}  # fmt: skip
"""A shown position, from 0: its propensity given those above; candidates: how many were logged with their features, 0
where only the shown ones were; dwell in s, added up; rating: the last one, as given; actions separated by |; reward by
the table `rewards`; first_outcome_s: s from the slate to the first outcome that is more than a view."""
ITEMS: Final[Schema] = {"item_id": TEXT, "recorded": NUMBER, "entry": TEXT}
"""A catalogue entry as JSON, as of the export."""
TABLES: Final = {"slates": SLATES, "events": EVENTS, "items": ITEMS}
OTHERS: Final = ("click", "dwell", "rating", "view")
"""Kinds that are no actions."""
SUFFIXES: Final = (".parquet", ".csv.gz", ".csv")


class ExportError(ValueError):
    """An export that cannot be written or read: where, what was expected, what came, what to do."""


@dataclass(slots=True)
class Position:
    """What an evaluation needs of a shown position."""

    item_id: str
    propensity: float
    reward: float


@dataclass(slots=True)
class Served:
    """A slate of an export, its positions from the top."""

    slate_id: str
    ts: float
    user_id: str
    surface: str
    policy: str
    listed: bool
    order: tuple[float, int, int]
    positions: list[Position]


def arrow() -> tuple[ModuleType, ModuleType]:
    """Return pyarrow and pyarrow.parquet; raises ExportError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ExportError('parquet: needs pyarrow; install "freshet[parquet]", or take csv') from error
    return pyarrow, pyarrow.parquet


def find(log: Path, what: str) -> Path | None:
    """Return the file of one table: `log` itself, or what lies in the folder `log`, or beside it; None for none."""
    if log.is_file() and log.name.startswith(what):
        return log
    folder = log if log.is_dir() else log.parent
    found = [folder / (what + suffix) for suffix in SUFFIXES if (folder / (what + suffix)).is_file()]
    if len(found) > 1:
        raise ExportError(f"{folder}: expected one table of {what}, got {', '.join(p.name for p in found)}")
    return found[0] if found else None


def rows(path: Path, schema: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:row, column -> value, None for an empty one) of a table; raises ExportError."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file; `freshet export` writes one")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, schema)
        return
    try:
        with _open(path) as lines:
            reader = csv.DictReader(lines)
            _check_columns(path, schema, reader.fieldnames or [])
            for row in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in row.values() or None in row:
                    raise ExportError(f"{where}: expected {len(schema)} columns, got another number; export again")
                yield where, {name: _value(where, name, kind, row[name]) for name, kind in schema.items()}
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ExportError(f"{path}: expected a csv file that `freshet export` wrote, got {error}") from error


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open("rt", encoding="utf-8", newline="")


def _parquet_rows(path: Path, schema: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow, parquet = arrow()
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, schema, file.schema_arrow.names)
            at = 0
            for batch in file.iter_batches(columns=list(schema)):
                for row in batch.to_pylist():
                    at += 1
                    yield f"{path.name}:{at}", row
    except pyarrow.ArrowException as error:
        raise ExportError(f"{path}: expected a parquet file that `freshet export` wrote, got {error}") from error


def _check_columns(path: Path, schema: Schema, names: Sequence[str]) -> None:
    if missing := [name for name in schema if name not in names]:
        raise ExportError(
            f"{path}: expected the columns of `freshet export`, {', '.join(missing)} among them, got"
            f" {', '.join(names)[:200] or 'nothing'}"
        )


def _value(where: str, name: str, kind: str, text: str) -> Any:
    if text == "" or kind == TEXT:
        return text or None
    try:
        number = int(text) if kind == WHOLE else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ExportError(f"{where}: {name}: expected a {kind} number, got {text[:40]!r}")
    return number


def event_of(row: dict[str, Any]) -> Interaction:
    """Return the event of a row; raises EventError."""
    kind, value = row["kind"], row["value"]
    names = ("user_id", "item_id", "ts", "event_id", "slate_id", "position", "surface")
    given = {name: row[name] for name in names if row[name] is not None}
    if row["context"]:
        given["context"] = msgspec.json.decode(row["context"])
    if kind == "rating":
        given |= {"value": value, "scale": (row["scale_low"], row["scale_high"])}
    elif kind == "dwell":
        given["seconds"] = value
    elif kind not in OTHERS:
        return parse_object({**given, "type": "action", "name": (kind or "").removeprefix("action:")})
    return parse_object({**given, "type": kind})


def events(path: Path, reject: Callable[[str, str], None]) -> Iterator[tuple[tuple[float, int, int], Interaction]]:
    """Yield ((recorded, partition, offset), event) of a table of events; `reject` is told of rows that are none."""
    for where, row in rows(path, EVENTS):
        try:
            event = event_of(row)
        except (ValueError, TypeError) as error:
            reject(where, str(error))
            continue
        yield (row["recorded"], row["partition"], row["offset"]), event


def slates(path: Path) -> Iterator[Served]:
    """Yield the slates of a table, whose positions lie together; raises ExportError."""
    held: Served | None = None
    for where, row in rows(path, SLATES):
        order = row["recorded"], row["partition"], row["offset"]
        if held is None or held.order != order:
            if held is not None:
                yield held
            held = Served(
                row["slate_id"] or "", row["ts"], row["user_id"] or "", row["surface"] or "", row["policy"] or "",
                bool(row["candidates"]), order, [],
            )  # fmt: skip
        if row["position"] != len(held.positions) or not row["item_id"] or not 0.0 < (row["propensity"] or 0.0) <= 1.0:
            raise ExportError(
                f"{where}: expected position {len(held.positions)} of slate {held.slate_id}, an item and its propensity"
                f" in (0, 1], got {row['position']}, {row['item_id']!r}, {row['propensity']!r}"
            )
        held.positions.append(Position(row["item_id"], float(row["propensity"]), float(row["reward"] or 0.0)))
    if held is not None:
        yield held


def items(path: Path) -> Iterator[tuple[float, Item]]:
    """Yield (recorded, catalogue entry) of a table of items; raises ExportError."""
    for where, row in rows(path, ITEMS):
        try:
            yield row["recorded"], parse_item((row["entry"] or "").encode())
        except ValueError as error:
            raise ExportError(f"{where}: {error}") from error
