"""Rebuild: fold `events` and `examples` again from offset 0, into the next generation of keys, or to verify this one.

Profiles are a fold over `events`, item rows over `examples` (itself truth: its order across partitions exists nowhere
else), weights over `examples` along the logged steps, catalogue entries the last record of each item. The folds are
those of the agents; only the cuts differ, and the laws say that cuts do not matter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import msgspec
import numpy as np

from infra.settings import Settings
from models.examples import CodecError, Entries, accept
from models.items import Items
from models.rows import Rows
from streaming.agents import topics_of
from streaming.events import EventError, Weights, decode_item, item_key
from streaming.item_agent import ItemAgent
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import (
    ItemStore,
    Keys,
    MemoryUserStore,
    ModelStore,
    Redis,
    RedisUserStore,
    UserStore,
    connect,
    live_keys,
    read_metrics,
)
from streaming.topics import Topics, end_offsets, preflight, read_topic, topic_end
from streaming.trainer import StepRecord, Trainer

BATCH: Final = 1000
QUIET_S: Final = 4.0
"""A worker that appended no figures for so long does not run, s."""
Advance = Callable[[str, int, int], None]
"""Progress: (what, done, of how many)."""


class RebuildError(RuntimeError):
    """A rebuild cannot begin; the message names the next step."""


@dataclass(slots=True)
class Report:
    """What a rebuild or a verification came to; `differing` names each profile and row whose bytes differ."""

    generation: int
    events: int = 0
    entries: int = 0
    profiles: int = 0
    rows: int = 0
    catalogue: int = 0
    steps: int = 0
    seconds: float = 0.0
    differing: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report with its rate, for `--json`."""
        return {**asdict(self), "events_per_s": round(self.events / max(self.seconds, 1e-9))}


async def rebuild(settings: Settings, *, advance: Advance, switch: bool = False) -> Report:
    """Fold both logs into the generation after the one that is served; raises RebuildError, TopicsError.

    `switch` then moves the pointer to it; that needs the workers to be stopped, for they write to what they began with.
    """
    topics, client = topics_of(settings), connect(settings.redis)
    try:
        cluster = f"{await preflight(settings.kafka, topics)}/{topics.partitions}"
        if switch:
            await refuse_while_workers_run(settings)
        live = await live_keys(client, settings.namespace)
        keys, began = Keys(live.namespace, live.generation + 1), time.monotonic()
        await wipe(client, keys)
        report = Report(keys.generation)
        ends = await log_ends(settings.kafka, topics)
        users = RedisUserStore(client, keys)
        await fold_users(
            settings, users, {p: ends[topics.events, p] for p in range(topics.partitions)}, report, advance, cluster
        )
        items, marks = await fold_items(settings, ends[topics.examples, 0], report, advance)
        await _write_items(settings, client, keys, items, marks, ends, cluster)
        store = ModelStore(client, keys, settings.feed_mb << 20)
        report.steps = (await fold_weights(settings, store, advance, cluster)).learner.model.step
        async for _ in client.scan_iter(f"{keys.prefix}:{{u*}}:profile:*", count=5000):
            report.profiles += 1
        report.seconds = time.monotonic() - began
        if switch:
            await client.set(keys.pointer, keys.generation)
        return report
    finally:
        await client.aclose()


async def verify(settings: Settings, *, advance: Advance) -> Report:
    """Fold both logs to where the served state says it is and compare every profile, row and entry byte for byte."""
    topics, client = topics_of(settings), connect(settings.redis)
    try:
        await preflight(settings.kafka, topics)
        await refuse_while_workers_run(settings)
        keys, began = await live_keys(client, settings.namespace), time.monotonic()
        report = Report(keys.generation)
        reads = await RedisUserStore(client, keys).read({p: [] for p in range(topics.partitions)})
        memory = MemoryUserStore()
        await fold_users(settings, memory, {p: read.applied for p, read in reads.items()}, report, advance)
        report.differing += await _compare_users(client, keys, memory, report)
        report.differing += [
            f"marks of partition {p}: stored {reads[p].marks}, folded {memory.applied[p][1]}"
            for p in reads
            if p in memory.applied and memory.applied[p][1] != reads[p].marks
        ]
        report.differing += await _compare_items(settings, client, keys, report, advance)
        report.seconds = time.monotonic() - began
        return report
    finally:
        await client.aclose()


async def refuse_while_workers_run(settings: Settings) -> None:
    """Raise RebuildError while a worker writes: each appends its figures to its learning curve every second."""
    client = connect(settings.redis)
    try:
        keys = await live_keys(client, settings.namespace)
        deadline = time.monotonic() + QUIET_S
        while True:
            running = [role for role in ("users", "items") if await _age_s(client, keys.metrics(role)) < QUIET_S]
            if not running:
                return
            if time.monotonic() > deadline:
                raise RebuildError(
                    f"the workers of namespace {settings.namespace!r} still run and write ({', '.join(running)}): end"
                    " `freshet up` (Ctrl-C) and call this again, it starts what it needs; on your own servers stop"
                    " the workers only"
                )
            await asyncio.sleep(0.3)
    finally:
        await client.aclose()


async def _age_s(client: Redis, curve: str) -> float:
    """Seconds, by Redis's own clock, since a process appended to its curve; infinite where none ever did."""
    points = await read_metrics(client, curve, count=1)
    seconds, micros = await client.time()
    return seconds + micros / 1e6 - int(points[0][0].split("-")[0]) / 1000 if points else float("inf")


async def log_ends(kafka: str, topics: Topics) -> dict[tuple[str, int], int]:
    """Return the end of each partition of the log, `examples` and `items`."""
    ends = await end_offsets(kafka, {topics.events: topics.partitions, topics.examples: 1, topics.items: 1})
    return {(topic, partition): end for topic, found in ends.items() for partition, end in enumerate(found)}


async def fold_users(
    settings: Settings, store: UserStore, ends: dict[int, int], report: Report, advance: Advance, cluster: str = ""
) -> None:
    """Fold `events` up to `ends` into a store that is empty, with the fold of the user agent."""
    topics, fold, total = topics_of(settings), UserFold(Weights(settings.event_weights)), sum(ends.values())
    async for partition, records in read_topic(settings.kafka, topics.events, ends):
        for at in range(0, len(records), BATCH):
            chosen = [(r.offset, r.timestamp, r.value or b"") for r in records[at : at + BATCH]]
            part = decode_part(topics.events, partition, chosen)
            outcome = fold.fold([part], await store.read(users_of([part])))
            (refused,) = await store.commit(outcome.writes, cluster)
            if refused is not None:
                raise RebuildError(f"partition {partition} is written by another process (offset {refused})")
            report.events += len(chosen)
            report.entries += outcome.applied
            advance("events", report.events, total)


async def fold_items(settings: Settings, end: int, report: Report, advance: Advance) -> tuple[Items, dict[int, int]]:
    """Fold `examples` up to `end` and return the rows with the marks of the source partitions."""
    items, marks = Items(rows=Rows()), dict[int, int]()
    done = 0
    async for _, records in read_topic(settings.kafka, topics_of(settings).examples, {0: end}):
        for record in records:
            try:
                items.fold(accept(Entries.from_bytes(record.value or b""), marks))
            except CodecError:  # the item agent sent it to the dead letters
                continue
        done += len(records)
        advance("examples", done, end)
    report.rows = items.n
    return items, marks


async def _catalogue(settings: Settings, end: int) -> dict[int, bytes]:
    entries: dict[int, bytes] = {}
    async for _, records in read_topic(settings.kafka, topics_of(settings).items, {0: end}):
        for record in records:
            try:
                entries[item_key(decode_item(record.value or b""))] = record.value
            except EventError:
                continue
    return entries


async def _write_items(
    settings: Settings, client: Redis, keys: Keys, items: Items, marks: dict[int, int],
    ends: dict[tuple[str, int], int], cluster: str,
) -> None:  # fmt: skip
    topics, store = topics_of(settings), ItemStore(client, keys, settings.feed_mb << 20)
    rows = np.arange(items.n)
    head = ItemAgent.head(ends[topics.examples, 0], marks, items, cluster)
    await store.commit(expected=0, head=head, keys=items.rows.keys[rows].tolist(), values=items.pack(rows))
    catalogue = await _catalogue(settings, ends[topics.items, 0])
    await store.commit_catalogue(ends[topics.items, 0], [*catalogue], [*catalogue.values()])


async def fold_weights(settings: Settings, store: ModelStore, advance: Advance, cluster: str = "") -> Trainer:
    """Learn `examples` again along the logged steps into an empty store: bit for bit on one CPU and torch build.

    What came after the last logged step is left to the learner.
    """
    topics, trainer = topics_of(settings), Trainer(store=store, cluster=cluster, seed=settings.seed)
    steps: list[StepRecord] = []
    logged = {0: await topic_end(settings.kafka, topics.steps)}
    async for _, records in read_topic(settings.kafka, topics.steps, logged):
        steps += [msgspec.msgpack.decode(record.value, type=StepRecord) for record in records]
    waiting: list[tuple[int, bytes]] = []
    at, end = 0, steps[-1].next if steps else 0
    async for _, records in read_topic(settings.kafka, topics.examples, {0: end}):
        waiting += [(record.offset, record.value or b"") for record in records]
        while at < len(steps) and waiting and waiting[-1][0] + 1 >= steps[at].next:
            step, at = steps[at], at + 1
            if step.next <= trainer.next:  # appended again after a crash
                continue
            count = step.next - trainer.next
            trainer.retrace(waiting[:count], step.sizes)
            del waiting[:count]
            await trainer.step()
            advance("weights", trainer.next, end)
    return trainer


async def wipe(client: Redis, keys: Keys) -> None:
    """Delete every key of a generation."""
    names = [name async for name in client.scan_iter(f"{keys.prefix}:*", count=5000)]
    for at in range(0, len(names), 1000):
        await client.unlink(*names[at : at + 1000])


async def _compare_users(client: Redis, keys: Keys, memory: MemoryUserStore, report: Report) -> list[str]:
    folded = {getattr(keys, kind)(p, user): value for (kind, p, user), value in memory.values.items()}
    stored = {
        name.decode()
        for kind in ("profile", "seen")
        for name in [n async for n in client.scan_iter(f"{keys.prefix}:{{u*}}:{kind}:*", count=5000)]
    }
    report.profiles = sum(kind == "profile" for kind, _, _ in memory.values)
    names = sorted(stored | folded.keys())
    found: dict[str, bytes | None] = {}
    for at in range(0, len(names), 1000):
        chunk = names[at : at + 1000]
        pipe = client.pipeline(transaction=False)
        for name in chunk:
            pipe.get(name)
        found.update(zip(chunk, await pipe.execute(), strict=True))
    return [_difference(name, found[name], folded.get(name)) for name in names if found[name] != folded.get(name)]


async def _compare_items(settings: Settings, client: Redis, keys: Keys, report: Report, advance: Advance) -> list[str]:
    store = ItemStore(client, keys)
    head, rows = await store.load()
    items, marks = await fold_items(settings, int(head.get("next", 0)), report, advance)
    folded = dict(zip(items.rows.keys[: items.n].tolist(), items.pack(np.arange(items.n)), strict=True))
    differing = _differences("item row", dict(rows), folded)
    if head.get("totals", items.pack_totals()) != items.pack_totals():
        differing.append("totals of the item rows")
    if msgspec.json.decode(head.get("marks", b"{}"), type=dict[int, int]) != marks:
        differing.append("marks of the item rows")
    catalogue = await _catalogue(settings, int(head.get("catalogue", 0)))
    report.catalogue = len(catalogue)
    return differing + _differences("catalogue entry", dict(await store.load_catalogue()), catalogue)


def _differences(what: str, stored: dict[int, bytes], folded: dict[int, bytes]) -> list[str]:
    return [
        _difference(f"{what} {key:016x}", stored.get(key), folded.get(key))
        for key in sorted(stored.keys() | folded.keys())
        if stored.get(key) != folded.get(key)
    ]


def _difference(name: str, stored: bytes | None, folded: bytes | None) -> str:
    if stored is None or folded is None:
        return f"{name}: {'missing in the store' if stored is None else 'not in the log'}"
    at = next(
        (i for i, (a, b) in enumerate(zip(stored, folded, strict=False)) if a != b), min(len(stored), len(folded))
    )
    return f"{name}: stored {len(stored)} bytes, folded {len(folded)}, first difference at byte {at}"
