"""The item agent: `examples` and `items` -> item rows in memory, committed each second, fed to serving at once.

A process of its own, for it folds one total order. Knows nothing about profiles.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np

from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD
from models.examples import CodecError, HoleError
from models.items import Folded, ItemFold, Items, PoisonError, sound
from models.rows import BEHAVIOUR
from streaming.consumer import TP, Batch, Bounds
from streaming.dead_letters import DeadLetters
from streaming.events import EventError, catalogue_item, decode_item, item_key
from streaming.kafka.ground import HOLE, Ground
from streaming.learn import Dead
from streaming.state import Delta, ItemStore, StoredBytesError, persist
from streaming.supervision import TRIES, Progress, last_lines, leave, stand
from streaming.topics import Log, Topics

ROWS_EVERY_S: Final = 1.0
ROWS_AT_MOST: Final = 20_000
"""Rows that wait for a commit at most, 35 MB at their usual size: Redis stands still for one transaction no longer."""
FEED_EVERY_S: Final = 0.1
FEED_SHARE: Final = 0.25
"""Share of the time that feeding may take, short of one feed a second: a backlog is folded, not fed away."""
FEED_SOON_S: Final = 0.02
"""While few rows wait (FEED_FEW) they are fed this soon, s."""
FEED_FEW: Final = 100

log = logging.getLogger(__name__)


class ItemAgent:
    """Folds `examples` and `items` into rows in memory; commits rows each second, feeds deltas within 100 ms."""

    def __init__(
        self, *, topics: Topics, store: ItemStore, log_: Log, progress: Progress, ground: Ground,
        most: int = 1_000_000,
    ) -> None:  # fmt: skip
        self._topics, self._store, self._progress = topics, store, progress
        self._ground = ground
        self._dead = DeadLetters(log_, topics)
        self._examples, self._catalogue = TP(topics.examples, 0), TP(topics.items, 0)
        self._most = most
        self.state = ItemFold(most=most)
        self.committed = self.fed = -1
        self.catalogue_next = 0
        self._to_commit: set[int] = set()
        self._to_feed: set[int] = set()
        self._gone_to_commit: set[int] = set()
        self._gone_to_feed: set[int] = set()
        self._lock = asyncio.Lock()

    @property
    def items(self) -> Items:
        """The items as they are folded now."""
        return self.state.items

    @property
    def next(self) -> int:
        """The offset in `examples` up to which they are folded."""
        return self.state.next

    async def offsets(self, assigned: Bounds) -> dict[TP, int]:
        """Load rows unless those in memory are what is committed; return where both topics go on."""
        async with self._lock:
            head = await persist("seek", self._store.head)
            applied = {self._examples: int(head.get("next", 0)), self._catalogue: int(head.get("catalogue", 0))}
            applied = {tp: offset for tp, offset in applied.items() if tp in assigned}
            await stand(self._ground, "item rows", head.get("cluster", b"").decode(), applied, assigned)
            if self.committed != int(head.get("next", 0)) or self.next != self.committed:
                try:
                    await persist("load", self._load)
                except StoredBytesError as error:
                    leave(EXIT_FOR_GOOD, str(error))
        offsets = {self._examples: self.next, self._catalogue: self.catalogue_next}
        for tp in assigned.keys() & offsets.keys():
            self._progress.seek(tp, offsets[tp])
        return {tp: offset for tp, offset in offsets.items() if tp in assigned}

    async def _load(self) -> None:
        self.state, self.catalogue_next = await load_items(self._store, self._most)
        faults = await self._store.faults()
        self.state.skip = {offset for offset, fault in faults.items() if fault.count >= TRIES}
        self.committed = self.fed = self.state.next
        for changes in (self._to_commit, self._to_feed, self._gone_to_commit, self._gone_to_feed):
            changes.clear()
        # Whoever died between the commit and the feed of catalogue entries left serving behind: it finds the hole.
        await self._store.publish(Delta("catalogue", self.catalogue_next, self.catalogue_next, (), ()))

    async def run_examples(self, batches: AsyncIterator[Batch]) -> None:
        """Fold records of `examples` as they come."""
        async for batch in batches:
            for offset, record_ms, value in batch.get(self._examples, ()):
                async with self._lock:
                    await self._fold(offset, record_ms, value)
                if len(self._to_commit) >= ROWS_AT_MOST:
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
            folded = self.state.fold(value)
        except HoleError as error:
            leave(EXIT_FOR_GOOD, f"{error}: examples lost records. {HOLE}")
            raise
        except PoisonError as error:
            await self._poisoned(error, value)
            raise
        dead = [Dead(self._topics.events, p, at, reason, original) for p, at, reason, original in folded.aside]
        if folded.unread:
            dead.append(Dead(self._topics.examples, 0, offset, folded.unread, value))
        await self._dead.send(dead)
        self._note(folded)
        self._progress.ages_ms.append(time.time() * 1000 - record_ms)
        self._progress.held = {
            "rows_to_commit": len(self._to_commit), "rows_to_feed": len(self._to_feed), "rows": self.items.rows.known,
        }  # fmt: skip

    def _note(self, folded: Folded) -> None:
        """Remember what the next commit and the next delta have to tell."""
        changed = folded.changed.tolist()
        self._to_commit.update(changed)
        self._to_feed.update(changed)
        if len(folded.gone):
            gone = folded.gone.tolist()
            held = self.items.rows.held
            for rows in (self._to_commit, self._to_feed):
                rows.intersection_update([row for row in rows if held[row] & BEHAVIOUR])
            self._to_commit.update(folded.moved.tolist())  # serving drops the gone from its lists by itself
            self._gone_to_commit.update(gone)
            self._gone_to_feed.update(gone)
            log.info("%d items left, %d rows lost a neighbour", len(gone), len(folded.moved))
        self._progress.events += len(folded.entries) if folded.entries is not None else 0

    async def _poisoned(self, error: PoisonError, value: bytes) -> None:
        """End this process, whose memory is half changed; after the third time the record is skipped."""
        text = last_lines(error.__cause__ or error)
        count = 1 + await persist("fault", partial(self._store.blamed, error.offset))
        if count >= TRIES:  # the letter first: killed in between, the next sends it again; none would skip it untold
            reason = f"its fold into items raised {count} times: {text}"
            await self._dead.send([Dead(self._topics.examples, 0, error.offset, reason, value)])
        await persist("fault", partial(self._store.blame, error.offset, error.offset + 1, text))
        leave(EXIT_AGAIN, f"{error} ({count} of {TRIES} times before it is set aside)")

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
                commit = partial(self._store.commit_catalogue, following, keys, values, expected=self.catalogue_next)
                if (stored := await persist("catalogue", commit)) is not None:
                    leave(
                        EXIT_AGAIN,
                        f"catalogue: expected offset {self.catalogue_next} in Redis, found {stored}: a rollback or a"
                        " twin",
                    )
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
            delta = Delta(
                "rows", self.fed, self.next, keys, self.items.pack(rows), self.items.pack_totals(),
                gone=sorted(self._gone_to_feed),
            )  # fmt: skip
            await persist("feed", lambda: self._store.publish(delta))
            self._to_feed.clear()
            self._gone_to_feed.clear()
            self.fed = self.next

    async def commit(self) -> None:
        """Commit the rows that changed since the last commit, with position, marks and totals."""
        async with self._lock:
            if self.next <= self.committed:
                return
            rows = np.array(sorted(self._to_commit), np.int64)
            head = self.head(self.next, self.state.marks, self.items, self._ground.stamp)
            keys, values = self.items.rows.keys[rows].tolist(), self.items.pack(rows)
            gone = sorted(self._gone_to_commit)
            stored = await persist(
                "commit",
                lambda: self._store.commit(expected=self.committed, head=head, keys=keys, values=values, gone=gone),
            )
            if stored is not None and stored != self.next:
                leave(
                    EXIT_AGAIN,
                    f"item rows: expected offset {self.committed} in Redis, found {stored}: a rollback or a twin",
                )
            self.committed = self.next
            self._to_commit.clear()
            self._gone_to_commit.clear()
        self._progress.move(self._examples, self.committed)

    @staticmethod
    def head(following: int, marks: dict[int, int], items: Items, cluster: str) -> dict[str, Any]:
        """Return what is committed beside the rows: next offset, marks, totals, cluster."""
        packed = msgspec.json.encode({str(p): o for p, o in sorted(marks.items())})
        return {"next": str(following), "marks": packed, "totals": items.pack_totals(), "cluster": cluster}

    async def tick(self) -> None:
        """Feed and commit in their periods, for ever."""
        committed = fed = time.monotonic()
        pause = FEED_EVERY_S
        while True:
            await asyncio.sleep(FEED_SOON_S)
            now = time.monotonic()
            if now - fed >= pause or len(self._to_feed) <= FEED_FEW:
                await self.feed()
                fed = now
                pause = min(max(FEED_EVERY_S, (time.monotonic() - now) / FEED_SHARE), ROWS_EVERY_S)
            if now - committed >= ROWS_EVERY_S:
                await self.commit()
                committed = now


async def load_items(store: ItemStore, most: int) -> tuple[ItemFold, int]:
    """Read the items as they were committed, and the next offset of the catalogue; raises StoredBytesError."""
    state = ItemFold(most=most)
    head, rows = await store.load()
    _, _, bad = sound([key for key, _ in rows], [value for _, value in rows])
    if bad:
        raise StoredBytesError(store.row_key(int(bad[0].split()[2].rstrip(":"), 16)), f"{bad[0]} ({len(bad)} such)")
    if rows:
        state.items.load(np.array([key for key, _ in rows], np.uint64), [value for _, value in rows])
    for key, value in await store.load_catalogue():
        try:
            _set_item(state.items, key, value)
        except (EventError, msgspec.MsgspecError) as error:
            raise StoredBytesError(f"{store.keys.item_catalogue(key & 255)} field {key:016x}", str(error)) from error
    try:
        if "totals" in head:
            state.items.load_totals(head["totals"])
        state.marks = msgspec.json.decode(head.get("marks", b"{}"), type=dict[int, int])
        state.next = int(head.get("next", 0))
        return state, int(head.get("catalogue", 0))
    except (ValueError, CodecError, msgspec.MsgspecError) as error:
        raise StoredBytesError(store.head_key, f"its fields are not those of a head ({error})") from error


def _set_item(items: Items, key: int, value: bytes) -> None:
    item = decode_item(value)
    items.set_item(key, item.item_id, catalogue_item(item))
