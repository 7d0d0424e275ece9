"""The item agent: `examples` and `items` -> item rows in memory, committed each second, fed to serving at once.

A process of its own, for it folds one total order. Knows nothing about profiles.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np

from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD
from models.examples import CodecError, Entries, HoleError, accept
from models.items import CatalogueItem, Items
from models.rows import Rows
from streaming.consumer import TP, Batch
from streaming.dead_letters import DeadLetters
from streaming.events import EventError, decode_item, item_key
from streaming.learn import Dead
from streaming.state import Delta, ItemStore, persist
from streaming.supervision import Progress, leave
from streaming.topics import Log, Topics

ROWS_EVERY_S: Final = 1.0
ROWS_EVERY_ENTRIES: Final = 5000
FEED_EVERY_S: Final = 0.1
FEED_SOON_S: Final = 0.02
"""While few rows wait (FEED_FEW) they are fed this soon, s."""
FEED_FEW: Final = 100


class ItemAgent:
    """Folds `examples` and `items` into rows in memory; commits rows each second, feeds deltas within 100 ms."""

    def __init__(self, *, topics: Topics, store: ItemStore, log_: Log, progress: Progress, cluster: str) -> None:
        self._topics, self._store, self._progress = topics, store, progress
        self._cluster = f"{cluster}/{topics.partitions}"
        self._dead = DeadLetters(log_, topics)
        self._examples, self._catalogue = TP(topics.examples, 0), TP(topics.items, 0)
        self.items = Items(rows=Rows())
        self.marks: dict[int, int] = {}
        self.next = self.committed = self.fed = -1
        self.catalogue_next = 0
        self._to_commit: set[int] = set()
        self._to_feed: set[int] = set()
        self._since_commit = 0
        self._lock = asyncio.Lock()

    async def offsets(self, assigned: set[TP]) -> dict[TP, int]:
        """Load rows unless those in memory are what is committed; return where both topics go on."""
        async with self._lock:
            head = await persist("seek", self._store.head)
            if head.get("cluster", b"").decode() not in ("", self._cluster):
                leave(
                    EXIT_FOR_GOOD,
                    f"item rows were folded from cluster/partitions {head['cluster'].decode()}, this is"
                    f" {self._cluster}:"
                    " point FRESHET_KAFKA at that cluster, or rebuild into a new namespace",
                )
            if self.committed != int(head.get("next", 0)) or self.next != self.committed:
                await persist("load", self._load)
        offsets = {self._examples: self.next, self._catalogue: self.catalogue_next}
        for tp in assigned & offsets.keys():
            self._progress.seek(tp, offsets[tp])
        return {tp: offset for tp, offset in offsets.items() if tp in assigned}

    async def _load(self) -> None:
        head, rows = await self._store.load()
        self.items = Items(rows=Rows())
        if rows:
            self.items.load(np.array([key for key, _ in rows], np.uint64), [value for _, value in rows])
        if "totals" in head:
            self.items.load_totals(head["totals"])
        for key, value in await self._store.load_catalogue():
            _set_item(self.items, key, value)
        self.marks = msgspec.json.decode(head.get("marks", b"{}"), type=dict[int, int])
        self.next = self.committed = self.fed = int(head.get("next", 0))
        self.catalogue_next = int(head.get("catalogue", 0))
        self._to_commit.clear()
        self._to_feed.clear()
        self._since_commit = 0

    async def run_examples(self, batches: AsyncIterator[Batch]) -> None:
        """Fold records of `examples` as they come."""
        async for batch in batches:
            for offset, record_ms, value in batch.get(self._examples, ()):
                async with self._lock:
                    await self._fold(offset, record_ms, value)
                if self._since_commit >= ROWS_EVERY_ENTRIES:
                    await self.commit()
                await asyncio.sleep(0)

    async def _fold(self, offset: int, record_ms: int, value: bytes) -> None:
        if offset < self.next:
            return
        if offset > self.next:
            leave(
                EXIT_AGAIN,
                f"examples: expected offset {self.next}, got {offset}. Starting again from what is committed",
            )
        try:
            entries = accept(Entries.from_bytes(value), self.marks)
        except CodecError as error:
            await self._dead.send([Dead(self._topics.examples, 0, offset, str(error), value)])
            self.next = offset + 1
            return
        except HoleError as error:
            leave(EXIT_FOR_GOOD, f"{error}: examples lost records; `freshet rebuild` folds what is left")
            raise
        changed = self.items.fold(entries).tolist()
        await self._dead.send([
            Dead(self._topics.events, p, at, f"item id {text!r} has the hash of {other!r}: rename one", text.encode())
            for p, at, text, other in self.items.collisions
        ])  # fmt: skip
        self.items.collisions.clear()
        self._to_commit.update(changed)
        self._to_feed.update(changed)
        self.next = offset + 1
        self._since_commit += len(entries)
        self._progress.events += len(entries)
        self._progress.ages_ms.append(time.time() * 1000 - record_ms)

    async def run_catalogue(self, batches: AsyncIterator[Batch]) -> None:
        """Fold records of `items`: an upsert or a deletion each; serving hears of it at once."""
        async for batch in batches:
            keys: list[int] = []
            values: list[bytes] = []
            dead: list[Dead] = []
            for offset, _, value in batch.get(self._catalogue, ()):
                try:
                    item = decode_item(value)
                except EventError as error:
                    dead.append(Dead(self._topics.items, 0, offset, str(error), value))
                    continue
                keys.append(item_key(item))
                values.append(value)
            await self._dead.send(dead)
            following = batch[self._catalogue][-1][0] + 1
            async with self._lock:
                for key, value in zip(keys, values, strict=True):
                    _set_item(self.items, key, value)
                delta = Delta("catalogue", self.catalogue_next, following, keys, values)
                await persist("catalogue", partial(self._store.commit_catalogue, following, keys, values))
                await persist("feed", partial(self._store.publish, delta))
                self.catalogue_next = following
            self._progress.move(self._catalogue, following)

    async def feed(self) -> None:
        """Publish the rows that changed since the last delta."""
        async with self._lock:
            if self.next <= self.fed:
                return
            rows = np.array(sorted(self._to_feed), np.int64)
            keys = self.items.rows.keys[rows].tolist()
            delta = Delta("rows", self.fed, self.next, keys, self.items.pack(rows), self.items.pack_totals())
            await persist("feed", lambda: self._store.publish(delta))
            self._to_feed.clear()
            self.fed = self.next

    async def commit(self) -> None:
        """Commit the rows that changed since the last commit, with position, marks and totals."""
        async with self._lock:
            if self.next <= self.committed:
                return
            rows = np.array(sorted(self._to_commit), np.int64)
            head = self.head(self.next, self.marks, self.items, self._cluster)
            keys, values = self.items.rows.keys[rows].tolist(), self.items.pack(rows)
            stored = await persist(
                "commit", lambda: self._store.commit(expected=self.committed, head=head, keys=keys, values=values)
            )
            if stored is not None and stored != self.next:
                leave(
                    EXIT_AGAIN,
                    f"item rows: expected offset {self.committed} in Redis, found {stored}: a rollback or a twin",
                )
            self.committed = self.next
            self._to_commit.clear()
            self._since_commit = 0
        self._progress.move(self._examples, self.committed)

    @staticmethod
    def head(following: int, marks: dict[int, int], items: Items, cluster: str) -> dict[str, Any]:
        """Return what is committed beside the rows: next offset, marks, totals, cluster."""
        packed = msgspec.json.encode({str(p): o for p, o in sorted(marks.items())})
        return {"next": str(following), "marks": packed, "totals": items.pack_totals(), "cluster": cluster}

    async def tick(self) -> None:
        """Feed and commit in their periods, for ever."""
        committed = fed = time.monotonic()
        while True:
            await asyncio.sleep(FEED_SOON_S)
            now = time.monotonic()
            if now - fed >= FEED_EVERY_S or len(self._to_feed) <= FEED_FEW:
                await self.feed()
                fed = now
            if now - committed >= ROWS_EVERY_S:
                await self.commit()
                committed = now


def _set_item(items: Items, key: int, value: bytes) -> None:
    item = decode_item(value)
    fields = {name: getattr(item, name) for name in CatalogueItem.__struct_fields__}
    items.set_item(key, item.item_id, CatalogueItem(**fields))
