"""The agents: inlets -> log, log -> profiles, examples -> item rows. A few lines each around the pure folds.

Delivery is at least once; effects are exactly once, because each agent's next offset lies in Redis beside the state it
belongs to and is written with it (DESIGN section 3). Two roles, each a process: "users" (inlets and the user agent;
as many as there are partitions), "items" (the item agent).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np

from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD
from models.examples import CodecError, Entries, HoleError, accept
from models.items import CatalogueItem, Items
from models.rows import Rows
from streaming import consumer
from streaming.consumer import TP, Batch
from streaming.events import EventError, Weights, decode_item, encode, item_key, parse_inlet
from streaming.learn import Dead, Embed, GapError, Outcome, Part, UserFold, decode_part, users_of
from streaming.state import Delta, ItemStore, Keys, RedisUserStore, StoreUnavailable, append_metrics, persist
from streaming.topics import INLETS, Log, Record, Topics, partition_of

log = logging.getLogger(__name__)

MICRO_BATCH: Final = 1000
REFUSALS: Final = 5
ROWS_EVERY_S: Final = 1.0
ROWS_EVERY_ENTRIES: Final = 5000
FEED_EVERY_S: Final = 0.1
FEED_SOON_S: Final = 0.02
"""While few rows wait (FEED_FEW) they are fed this soon, s."""
FEED_FEW: Final = 100
STALLED_S: Final = 15.0
"""A topic with records waiting whose partitions all made no progress for so long is stuck, s."""
TURN_S: Final = 120.0
"""The same for one partition while others go on: a backlog is folded one partition after the other, s."""


def leave(status: int, reason: str) -> None:
    """Say why, then end this process at once: nothing may be produced or committed after what just failed."""
    log.critical("%s", reason)
    print(f"freshet: {reason}", file=sys.__stderr__, flush=True)
    os._exit(status)


class Progress:
    """How far each partition is folded here and when it last moved: what the watchdog and the metrics read."""

    def __init__(self) -> None:
        self.next: dict[TP, int] = {}
        self.moved: dict[TP, float] = {}
        self.waits_since: dict[TP, float] = {}
        self.fresh_after_seek: set[TP] = set()
        self.events = self.duplicates = self.dead = self.overflow = 0
        self.ages_ms: list[float] = []

    def seek(self, tp: TP, offset: int) -> None:
        """Note an assignment."""
        self.next[tp], self.moved[tp] = offset, time.monotonic()
        self.fresh_after_seek.add(tp)

    def move(self, tp: TP, offset: int) -> None:
        """Note a commit."""
        self.next[tp], self.moved[tp] = offset, time.monotonic()
        self.fresh_after_seek.discard(tp)

    def stalled(self, ends: Mapping[TP, int], now: float) -> TP | None:
        """Return a partition with records waiting, by the topics' ends, that is stuck at monotonic time `now`."""
        last: dict[str, float] = {}
        for tp, moved in self.moved.items():
            last[tp.topic] = max(last.get(tp.topic, 0.0), moved)
        for tp, end in ends.items():
            if end <= self.next.get(tp, end):
                self.waits_since[tp] = now
                continue
            waited = now - max(self.moved[tp], self.waits_since.get(tp, 0.0))
            if waited >= (TURN_S if now - last[tp.topic] < STALLED_S else STALLED_S):
                return tp
        return None

    def take(self) -> dict[str, float]:
        """Return the figures since the last call."""
        ages = np.sort(np.array(self.ages_ms or [0.0]))
        figures = {
            "t": round(time.time(), 3), "events": self.events, "duplicates": self.duplicates, "dead": self.dead,
            "dedupe_overflow": self.overflow, "applied_p50_ms": round(float(ages[len(ages) // 2]), 2),
            "applied_p99_ms": round(float(ages[int(len(ages) * 0.99)]), 2),
        }  # fmt: skip
        self.events = self.duplicates = self.dead = self.overflow = 0
        self.ages_ms = []
        return figures


class DeadLetters:
    """Appends what cannot be read to `dead-letters`, with its source position, reason and original bytes."""

    def __init__(self, log_: Log, topics: Topics) -> None:
        self._log, self._topics = log_, topics

    async def send(self, dead: Sequence[Dead]) -> None:
        """Append and wait for the acknowledgement."""
        records: list[Record] = [
            (0, f"{d.topic}:{d.partition}:{d.offset}".encode(), msgspec.msgpack.encode({
                "topic": d.topic, "partition": d.partition, "offset": d.offset, "reason": d.reason,
                "original": d.original[:256 * 1024], "at": time.time(),
            }))
            for d in dead
        ]  # fmt: skip
        for letter in dead:
            log.warning("dead letter %s[%d]@%d: %s", letter.topic, letter.partition, letter.offset, letter.reason)
        if records:
            await self._log.append(self._topics.dead_letters, records)


class UserAgent:
    """Folds `events` into profiles: read, fold, append `examples`, commit; two Redis round trips a micro-batch."""

    def __init__(
        self, *, topics: Topics, store: RedisUserStore, log_: Log, weights: Weights, progress: Progress,
        cluster: str, embed: Embed | None = None,
    ) -> None:  # fmt: skip
        self._topics, self._store, self._log, self._progress = topics, store, log_, progress
        self._cluster = f"{cluster}/{topics.partitions}"
        self._fold = UserFold(weights, embed=embed)
        self._dead = DeadLetters(log_, topics)

    async def offsets(self, assigned: set[TP]) -> dict[TP, int]:
        """Return where each assigned partition of `events` goes on: its applied offset in Redis."""
        mine = sorted(tp for tp in assigned if tp.topic == self._topics.events)
        reads = await persist("seek", lambda: self._store.read({tp.partition: [] for tp in mine}))
        for tp in mine:
            read = reads[tp.partition]
            if read.cluster and read.cluster != self._cluster:
                leave(
                    EXIT_FOR_GOOD,
                    f"profiles of partition {tp.partition} were folded from cluster/partitions {read.cluster}, this is"
                    f" {self._cluster}: point FRESHET_KAFKA at that cluster, or rebuild into a new namespace",
                )
            self._progress.seek(tp, read.applied)
        return {tp: reads[tp.partition].applied for tp in mine}

    async def run(self, batches: AsyncIterator[Batch]) -> None:
        """Fold micro-batches as they come."""
        async for batch in batches:
            await self.apply(batch)

    async def apply(self, batch: Batch) -> None:
        """Fold one micro-batch and commit it, reading again where another worker was quicker."""
        parts = [decode_part(tp.topic, tp.partition, records) for tp, records in batch.items()]
        await self._dead.send([dead for part in parts for dead in part.dead])
        self._progress.dead += sum(len(part.dead) for part in parts)
        for _ in range(REFUSALS):
            parts = await self._attempt(parts)
            if not parts:
                return
        leave(EXIT_AGAIN, f"commit refused {REFUSALS} times: another worker folds the same partition")

    async def _attempt(self, parts: list[Part]) -> list[Part]:
        """Read, fold, append, commit; return the parts whose commit was refused."""
        outcome = self._folded(parts, await persist("read", lambda: self._store.read(users_of(parts))))
        if outcome.records:
            records: list[Record] = [(0, None, entries.to_bytes()) for entries in outcome.records]
            await self._log.append(self._topics.examples, records)
        refused = await persist("commit", lambda: self._store.commit(outcome.writes, self._cluster))
        self._count(parts, outcome, refused)
        for part, stored in zip(parts, refused, strict=True):
            if stored is not None:
                log.warning("commit of events[%d] refused: stored %d", part.partition, stored)
        return [part for part, stored in zip(parts, refused, strict=True) if stored is not None]

    def _folded(self, parts: list[Part], reads: dict[int, Any]) -> Outcome:
        try:
            return self._fold.fold(parts, reads)
        except GapError as error:
            tps = {TP(self._topics.events, part.partition) for part in parts}
            if tps & self._progress.fresh_after_seek:
                leave(
                    EXIT_FOR_GOOD,
                    f"{error}. Still so right after a seek: `freshet rebuild` folds what is left",
                )
            leave(EXIT_AGAIN, f"{error}. Starting again from what is committed")
            raise

    def _count(self, parts: list[Part], outcome: Outcome, refused: list[int | None]) -> None:
        now_ms = time.time() * 1000
        for part, stored in zip(parts, refused, strict=True):
            if stored is None:
                self._progress.move(TP(self._topics.events, part.partition), part.next)
                self._progress.ages_ms += [now_ms - record_ms for record_ms in part.times[:200]]
        self._progress.events += outcome.applied
        self._progress.duplicates += outcome.duplicates
        self._progress.overflow += outcome.overflow


class InletAgent:
    """Validates the JSON of one inlet and appends it to `events` with its source position; it has no state."""

    def __init__(self, inlet: str, *, topics: Topics, log_: Log) -> None:
        self._inlet, self._topics, self._log = inlet, topics, log_
        self._dead = DeadLetters(log_, topics)

    async def run(self, batches: AsyncIterator[Batch]) -> None:
        """Append micro-batches; Kafka's own commit follows the acknowledgement."""
        async for batch in batches:
            records: list[Record] = []
            dead: list[Dead] = []
            for tp, found in batch.items():
                for offset, _, value in found:
                    try:
                        event = parse_inlet(self._inlet, value, (self._inlet, tp.partition, offset))
                    except EventError as error:
                        dead.append(Dead(tp.topic, tp.partition, offset, str(error), value))
                        continue
                    partition = partition_of(event.user_id, self._topics.partitions)
                    records.append((partition, event.user_id.encode(), encode(event)))
            await self._dead.send(dead)
            if records:
                await self._log.append(self._topics.events, records)


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


async def watch(app: Any, progress: Progress, reachable: Callable[[], Any]) -> None:
    """End a process that has records waiting and makes no progress, unless the broker is out of reach."""
    while True:
        await asyncio.sleep(2.0)
        now = time.monotonic()
        ends = {tp: app.consumer.highwater(tp) or 0 for tp in app.consumer.assignment()}
        stuck = progress.stalled(ends, now)
        if stuck is None:
            continue
        if await reachable():
            leave(
                EXIT_AGAIN, f"{stuck.topic}[{stuck.partition}]: no progress at {progress.next[stuck]} of {ends[stuck]}"
            )
        progress.waits_since = dict.fromkeys(ends, now)


async def report(name: str, slot: int, app: Any, progress: Progress, client: Any, keys: Keys) -> None:
    """Append this process's figures to its learning curve each second."""
    while True:
        await asyncio.sleep(1.0)
        lag = sum(max(0, (app.consumer.highwater(tp) or 0) - offset) for tp, offset in progress.next.items())
        try:
            await append_metrics(client, keys.metrics(name), {**progress.take(), "lag": lag, "slot": slot})
        except StoreUnavailable as error:
            log.debug("metrics: %s", error)


def inlet_agents(topics: Topics, log_: Log) -> dict[str, InletAgent]:
    """Return the inlet agents by topic."""
    return {topics.inlet(name): InletAgent(name, topics=topics, log_=log_) for name in INLETS}


def attach(app: Any, topic: str, run: Callable[[AsyncIterator[Batch]], Any]) -> None:
    """Make `run` the agent of a topic: the same body on chunks and on stock."""

    async def agent(stream: Any) -> None:
        await run(consumer.batches(stream, MICRO_BATCH))

    app.agent(consumer.bytes_topic(app, topic), name=topic, concurrency=1)(agent)


def topics_of(settings: Settings) -> Topics:
    """Return the topics of these settings."""
    return Topics(settings.namespace, settings.partitions, int(settings.retention_inlets_days))
