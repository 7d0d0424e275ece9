"""`freshet export`: the topic `events` to its end as of now, as tables of events, of shown positions and of items.

Two readings of the log: the first looks for erasures, the second writes, partition after partition, so that a table
depends on the log alone. Memory holds the users and waiting slates of one partition (labels.py) and one batch of rows.
A file appears under its name once it is whole. Knows nothing of how tables are read again.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol

from infra.evaluating.labels import Counts, Erasures, Labels, Row
from infra.settings import Settings
from streaming.events import EventError, Item, decode_item, to_builtins
from streaming.replay.exports import NUMBER, SUFFIXES, TABLES, TEXT, ExportError, Schema, arrow
from streaming.topics import Topics, end_offsets, preflight, read_topic, topics_of

ROWS: Final = 50_000
"""Rows that wait at most until they are written."""
Advance = Callable[[str, int, int], None]


class Table(Protocol):
    """What rows are written to."""

    def write(self, rows: list[Row]) -> None:
        """Append rows."""

    def close(self) -> None:
        """End the file."""


class _Csv:
    def __init__(self, path: Path, schema: Schema, *, zipped: bool) -> None:
        self._names = list(schema)
        self._file: IO[str] = (gzip.open if zipped else open)(path, "wt", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self._names)

    def write(self, rows: list[Row]) -> None:
        names = self._names
        self._writer.writerows([["" if row[n] is None else row[n] for n in names] for row in rows])

    def close(self) -> None:
        self._file.close()


class _Parquet:
    def __init__(self, path: Path, schema: Schema) -> None:
        self._arrow, parquet = arrow()
        kinds = {NUMBER: self._arrow.float64(), TEXT: self._arrow.string()}
        self._schema = self._arrow.schema([(n, kinds.get(kind, self._arrow.int64())) for n, kind in schema.items()])
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, rows: list[Row]) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


class Files:
    """The tables that are written, each under a name of its own until all are whole; readable by the owner alone."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths, self.written = paths, dict.fromkeys(paths, 0)
        self._partial = {what: path.with_name(path.name + ".partial") for what, path in paths.items()}
        self._tables: dict[str, Table] = {}
        self._waiting: dict[str, list[Row]] = {what: [] for what in paths}

    def __enter__(self) -> Files:
        for what, path in self.paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial, schema = self._partial[what], TABLES[what]
            partial.unlink(missing_ok=True)
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            self._tables[what] = (
                _Parquet(partial, schema) if path.suffix == ".parquet"
                else _Csv(partial, schema, zipped=path.suffix == ".gz")
            )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        try:
            for what in self._tables if kind is None else ():
                self._flush(what)
        finally:
            for table in self._tables.values():
                table.close()
        for what, partial in self._partial.items():
            if kind is None:
                partial.replace(self.paths[what])
            else:
                partial.unlink(missing_ok=True)

    def add(self, what: str, rows: Iterable[Row]) -> None:
        """Append rows to a table, if it is one of those that are written."""
        if what in self._waiting:
            self._waiting[what] += rows
            if len(self._waiting[what]) >= ROWS:
                self._flush(what)

    def _flush(self, what: str) -> None:
        rows = self._waiting[what]
        self._tables[what].write(rows)
        self.written[what] += len(rows)
        self._waiting[what] = []


class Pseudonyms:
    """Names for users: a keyed hash whose key is made here and ends with the process."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def hide(self, row: Row) -> Row:
        """Return the row with its user renamed and without the event's id, which an app may make of a user's."""
        name = hashlib.blake2b(row["user_id"].encode(), key=self._key, digest_size=12).hexdigest()
        hidden = {**row, "user_id": name}
        if "event_id" in hidden:
            hidden["event_id"] = None
        return hidden


def places(what: list[str], form: str | None, out: Path | None) -> dict[str, Path]:
    """Return the file of each table; raises ExportError."""
    unknown = [name for name in what if name not in TABLES]
    if not what or unknown:
        raise ExportError(f"export: expected one or more of {', '.join(TABLES)}, got {', '.join(unknown) or 'none'}")
    if form not in (None, "csv", "csv.gz", "parquet"):
        raise ExportError(f"--format: expected csv, csv.gz or parquet, got {form!r}")
    named = next((suffix for suffix in SUFFIXES if out is not None and out.name.endswith(suffix)), None)
    if named is None:
        folder = out or Path("freshet-export")
        return {name: folder / f"{name}.{form or 'csv'}" for name in dict.fromkeys(what)}
    assert out is not None
    if len(set(what)) > 1:
        raise ExportError(f"--out: expected a folder for {len(set(what))} tables, got the file {out}")
    if form is not None and named != f".{form}":
        raise ExportError(f"--out: expected a name that ends in .{form}, as --format says, got {out.name}")
    return {what[0]: out}


async def export(
    settings: Settings, paths: dict[str, Path], *, since: float = 0.0, pseudonyms: bool = False, advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    """Write the tables and return what they hold; raises ExportError, TopicsError. `since`: s, by the log's clock."""
    topics = topics_of(settings)
    await preflight(settings.kafka, topics)
    counts, hide = Counts(), Pseudonyms().hide if pseudonyms else None
    with Files(paths) as files:
        if {"slates", "events"} & paths.keys():
            await _labels(settings, topics, files, since, hide, counts, advance)
        if "items" in paths:
            await _items(settings, topics, files, advance)
    told = asdict(counts)
    return {
        "files": {what: {"path": str(path), "rows": files.written[what]} for what, path in paths.items()},
        "since": since, "pseudonyms": pseudonyms, **told,
    }  # fmt: skip


async def _labels(
    settings: Settings, topics: Topics, files: Files, since: float, hide: Callable[[Row], Row] | None, counts: Counts,
    advance: Advance,
) -> None:  # fmt: skip
    ends = (await end_offsets(settings.kafka, {topics.events: topics.partitions}))[topics.events]
    total, done = sum(ends), 0
    erasures = Erasures()
    async for _, records in read_topic(settings.kafka, topics.events, dict(enumerate(ends))):
        for record in records:
            erasures.look(record.offset, record.timestamp, record.value)
        done += len(records)
        advance("erasures", done, total)
    gone, before = erasures.found(), 0

    def wanted(rows: list[Row]) -> list[Row]:
        kept = [row for row in rows if row["recorded"] >= since]
        return kept if hide is None else [hide(row) for row in kept]

    for partition, end in enumerate(ends):
        labels: Labels | None = None
        async for _, records in read_topic(settings.kafka, topics.events, {partition: end}):
            labels = labels or Labels(settings, partition, records[0].offset, gone, counts)
            told, closed = labels.take([(r.offset, r.timestamp, r.value) for r in records])
            files.add("events", wanted(told))
            files.add("slates", wanted(closed))
            advance("labels", before + records[-1].offset + 1, total)
        if labels is not None:
            files.add("slates", wanted(labels.end()))
        before += end


async def _items(settings: Settings, topics: Topics, files: Files, advance: Advance) -> None:
    """Write the last word on each item; the whole catalogue lies in memory, as it does in every API process."""
    (end,) = (await end_offsets(settings.kafka, {topics.items: 1}))[topics.items]
    found: dict[str, tuple[float, Item]] = {}
    async for _, records in read_topic(settings.kafka, topics.items, {0: end}):
        for record in records:
            with contextlib.suppress(EventError, TypeError):  # what cannot be read is among the dead letters
                item = decode_item(record.value)
                found.pop(item.item_id, None)
                if not item.deleted:
                    found[item.item_id] = record.timestamp / 1000, item
        advance("items", records[-1].offset + 1, end)
    files.add("items", _entries(found))


def _entries(found: dict[str, tuple[float, Item]]) -> Iterator[Row]:
    for item_id, (recorded, item) in found.items():
        yield {"item_id": item_id, "recorded": recorded, "entry": json.dumps(to_builtins(item), ensure_ascii=False)}
