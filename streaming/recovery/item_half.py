"""The half of the state that is a fold over `examples`: item rows, totals, marks; beside them the catalogue.

The fold is that of the item agent. Knows nothing about users; runs in a process of its own where the log is long, so
every method is a coroutine that takes and returns plain values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from infra.settings import Settings
from models.items import ItemFold, Items, PoisonError
from streaming.events import EventError, decode_item, item_key
from streaming.item_agent import ItemAgent
from streaming.recovery.compare import differences, digests
from streaming.recovery.files import read_records, write_records
from streaming.recovery.generations import RecoveryError
from streaming.state import ItemStore, Keys, connect
from streaming.supervision import TRIES
from streaming.topics import read_span, topics_of

Advance = Callable[[str, int, int], None]
WRITE: Final = 1000
"""Rows written in one transaction."""


class ItemHalf:
    """Item rows and catalogue entries as of offsets of `examples` and `items`."""

    def __init__(self, settings: Settings, *, rederive: bool = False) -> None:
        self.settings, self.topics = settings, topics_of(settings)
        self.state = ItemFold(most=settings.max_items)
        self.catalogue: dict[int, bytes] = {}
        self.catalogue_next = self._began = self._written = 0
        self._touched: set[int] | None = None
        """Hashes of the rows changed since the last write; None before the first, which writes all."""
        self._listed: set[int] = set()
        self._skipped: dict[int, str] = {}
        self._base: tuple[str, Mapping[str, Any]] | None = None
        self._kept: dict[int, list[bytes]] | None = defaultdict(list) if rederive else None

    @property
    def items(self) -> Items:
        """The items as they are folded now."""
        return self.state.items

    async def fold(self, end: int, items_end: int, advance: Advance) -> dict[int, int]:
        """Fold `examples` up to `end` and `items` up to `items_end`; return the marks of the source partitions.

        A record whose fold raises is skipped, as the item agent does the third time: from the beginning again, for
        what is in memory is half changed.
        """
        while True:
            try:
                await self._fold(end, advance)
                break
            except PoisonError as error:
                self._skipped[error.offset] = str(error)
                await self._begin_again(self.state.skip | {error.offset})
        spans = {0: (self.catalogue_next, items_end)}
        async for _, records in read_span(self.settings.kafka, self.topics.items, spans):
            for record in records:
                try:
                    key = item_key(decode_item(record.value or b""))
                except EventError:  # the item agent sent it to the dead letters
                    continue
                self.catalogue[key] = record.value
                self._listed.add(key)
        self.catalogue_next = max(self.catalogue_next, items_end)
        return dict(self.state.marks)

    async def _fold(self, end: int, advance: Advance) -> None:
        state = self.state
        async for _, records in read_span(self.settings.kafka, self.topics.examples, {0: (state.next, end)}):
            for record in records:
                folded = state.fold(record.value or b"")
                if self._kept is not None and folded.entries is not None:
                    for digest, p in zip(digests(folded.entries), folded.entries.partition.tolist(), strict=True):
                        self._kept[p].append(digest)
                if self._touched is not None:
                    rows = np.concatenate((folded.changed, folded.moved))
                    self._touched.update(self.items.rows.keys[rows].tolist(), folded.gone.tolist())
            advance("examples", state.next - self._began, end - self._began)

    async def _begin_again(self, skip: set[int]) -> None:
        if self._touched is not None:
            raise RecoveryError("a record that cannot be folded came while catching up: call it again")
        self.state = ItemFold(most=self.settings.max_items)
        self.state.skip = skip
        if self._kept is not None:
            self._kept.clear()
        if self._base is not None:
            await self.load(*self._base)

    async def count(self) -> tuple[int, int]:
        """Return (rows, catalogue entries)."""
        return len(self.items.behaving), len(self.catalogue)

    async def notes(self) -> list[str]:
        """Return what a person should know of how it went."""
        return [f"skipped {text}" for text in self._skipped.values()]

    async def kept(self) -> dict[int, bytes]:
        """Return the digests of the entries that `examples` holds, joined by source partition."""
        return {p: b"".join(found) for p, found in (self._kept or {}).items()}

    def _packed(self) -> Iterator[tuple[int, bytes]]:
        rows = self.items.behaving
        yield from zip(self.items.rows.keys[rows].tolist(), self.items.pack(rows), strict=True)

    # -- to Redis -----------------------------------------------------------------------------------------------------

    async def write(self, generation: int, cluster: str) -> None:
        """Write what changed since the last `write` into a generation, the head last."""
        client = connect(self.settings.redis)
        try:
            store = ItemStore(client, Keys(self.settings.namespace, generation), self.settings.feed_mb << 20)
            items, rows, gone = self.items, self.items.behaving, list[int]()
            if self._touched is not None:
                living = items.rows.keys[rows]
                gone = sorted(self._touched - set(living.tolist()))
                rows = rows[np.isin(living, np.array(sorted(self._touched), np.uint64))]
            for first in range(0, max(1, len(rows)), WRITE):
                chunk, last = rows[first : first + WRITE], first + WRITE >= len(rows)
                head = ItemAgent.head(self.state.next if last else self._written, self.state.marks, items, cluster)
                keys, values = items.rows.keys[chunk].tolist(), items.pack(chunk)
                refused = await store.commit(expected=self._written, head=head, keys=keys, values=values, gone=gone)
                if refused is not None:
                    raise RecoveryError(f"item rows are written by another process (offset {refused})")
                gone = []
            self._written, self._touched = self.state.next, set()
            listed = sorted(self._listed)
            for first in range(0, max(1, len(listed)), WRITE):
                keys = listed[first : first + WRITE]
                await store.commit_catalogue(self.catalogue_next, keys, [self.catalogue[key] for key in keys])
            self._listed.clear()
        finally:
            await client.aclose()

    # -- snapshots ----------------------------------------------------------------------------------------------------

    async def save(self, folder: str) -> list[dict[str, Any]]:
        """Write the files of rows and catalogue and return what the manifest says of them."""
        rows = sorted((key.to_bytes(8, "big"), value) for key, value in self._packed())
        catalogue = sorted((key.to_bytes(8, "big"), value) for key, value in self.catalogue.items())
        return [write_records(Path(folder) / "items", rows), write_records(Path(folder) / "catalogue", catalogue)]

    async def head(self) -> dict[str, Any]:
        """Return what the manifest says of offsets, marks and totals."""
        return {
            "examples": self.state.next, "items": self.catalogue_next,
            "marks": {str(p): offset for p, offset in sorted(self.state.marks.items())},
            "totals": self.items.pack_totals().hex(),
        }  # fmt: skip

    async def load(self, folder: str, head: Mapping[str, Any]) -> None:
        """Begin from the files of a snapshot, already checked."""
        self._base, found = (folder, head), list(read_records(Path(folder) / "items"))
        if found:
            keys = np.array([int.from_bytes(key, "big") for key, _ in found], np.uint64)
            self.items.load(keys, [value for _, value in found])
        self.items.load_totals(bytes.fromhex(head["totals"]))
        self.state.marks = {int(p): offset for p, offset in head["marks"].items()}
        self.state.next = self._began = head["examples"]
        if not self.catalogue_next:
            self.catalogue = {int.from_bytes(k, "big"): v for k, v in read_records(Path(folder) / "catalogue")}
            self.catalogue_next = head["items"]
            self._listed.update(self.catalogue)

    # -- checks -------------------------------------------------------------------------------------------------------

    async def skip_faults(self, generation: int) -> None:
        """Skip the records that a generation's item agent has set aside."""
        client = connect(self.settings.redis)
        try:
            faults = await ItemStore(client, Keys(self.settings.namespace, generation)).faults()
        finally:
            await client.aclose()
        self.state.skip |= {offset for offset, fault in faults.items() if fault.count >= TRIES}

    async def compare(self, generation: int) -> list[str]:
        """Name each row, catalogue entry, mark and total of a generation that is not what was folded here."""
        client = connect(self.settings.redis)
        try:
            store = ItemStore(client, Keys(self.settings.namespace, generation))
            head, rows = await store.load()
            catalogue = await store.load_catalogue()
        finally:
            await client.aclose()
        differing = differences("item row", dict(rows), dict(self._packed()))
        totals = self.items.pack_totals()
        if head.get("totals", totals) != totals:
            differing.append("totals of the item rows")
        if msgspec.json.decode(head.get("marks", b"{}"), type=dict[int, int]) != self.state.marks:
            differing.append("marks of the item rows")
        return differing + differences("catalogue entry", dict(catalogue), self.catalogue)
