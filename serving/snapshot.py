"""What one API process scores from: item and model arrays, loaded from Redis and kept current by the two feeds.

Deltas are written in place, between requests; only a reload swaps the reference `live` (DESIGN section 3, rule 10).
Knows nothing about HTTP or slates. Serving writes nothing here: it only reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.examples import CodecError
from models.factors import ROW, read_rows
from models.factors import sound as sound_vectors
from models.items import Items
from models.items import sound as sound_items
from models.model import STATE_FORM, STATE_ROW, Model
from models.rows import Rows
from streaming import events
from streaming.sizes import CURVES, Sizes, redis_sizes
from streaming.state import (
    Delta,
    ItemStore,
    Keys,
    ModelStore,
    Redis,
    RedisUserStore,
    StoreError,
    StoreUnavailable,
    UserRead,
    append_metrics,
    feed_top,
    live_keys,
    read_feed,
    read_metrics,
    read_user,
)  # fmt: skip

LOAD_ROWS: Final = 512
"""Rows written at once while loading: requests are answered in between."""
BLOCK_MS: Final = 500
MAX_PENDING: Final = 64
"""Parts of a model step, of about 1 MB each, that wait for its end; with more the whole model is loaded instead."""
SERVED_FORM: Final = 1
"""Form of the model rows in the feed; Redis holds the learner's."""
SIZES_S: Final = 10.0
VERSIONS_S: Final = 1.0
POINTER_S: Final = 1.0
BACK_OFF_S: Final = (0.05, 2.0)
_LAST_SEQUENCE: Final = 2**64 - 1

log = logging.getLogger("freshet.serving")


class Stale(Exception):
    """What is in process cannot be brought up to date by the feeds: load again."""


@dataclass(slots=True)
class Live:
    """One consistent set of arrays and the positions they stand for (offsets of `examples`, of `items`)."""

    items: Items
    model: Model
    items_position: int = 0
    catalogue_position: int = 0
    model_position: int = 0
    bad: dict[tuple[str, int], str] = field(default_factory=dict)
    """What could not be read, by (kind, item hash), with the reason: left out until it is written anew."""

    @classmethod
    def empty(cls, *, require_catalogue: bool = False) -> Live:
        """Return arrays that know no item."""
        rows = Rows()
        return cls(Items(rows=rows, require_catalogue=require_catalogue), Model(rows=rows))

    def apply_item(self, delta: Delta) -> bool:
        """Write a delta of the item feed in place; False where it was known already, raises Stale at a hole."""
        if delta.kind == "catalogue":
            if delta.first > self.catalogue_position:
                raise Stale(f"item feed: expected catalogue from {self.catalogue_position} on, got {delta.first}")
            if delta.next <= self.catalogue_position:
                return False  # read again after a load: its values may be older than those that were loaded
            self.set_items(delta.keys, delta.values)
            self.catalogue_position = max(self.catalogue_position, delta.next)
            return True
        if delta.kind != "rows" or not _is_next("item feed", delta, self.items_position):
            return False  # an entry that is no delta: if it was one once, the next one finds the hole
        if delta.gone:
            self.items.remove(np.asarray(delta.gone, np.uint64))
        self.set_rows(delta.keys, delta.values)
        if delta.dense:
            self.read("totals", self.items.load_totals, delta.dense)
        self.items_position = delta.next
        return True

    def apply_step(self, parts: Sequence[Delta], end: Delta) -> bool:
        """Write a whole model step in place; False where it was known already, raises Stale at a hole."""
        if not _is_next("model feed", end, self.model_position):
            return False
        if end.parts not in (-1, len(parts)):
            raise Stale(f"model feed: step {end.step} has {end.parts} parts, got {len(parts)}: the others were trimmed")
        for part in parts:
            self.set_vectors(part.keys, part.values, form=SERVED_FORM)
        if end.gone:
            self.model.remove(np.asarray(end.gone, np.uint64))
        if end.dense:
            self.read("weights", self.model.load_dense, end.dense)
        self.model_position = end.next
        return True

    def set_rows(self, keys: Sequence[int], values: Sequence[bytes]) -> None:
        """Write packed item rows; what is none is left out and noted."""
        good, blobs, wrong = sound_items(keys, values)
        self._note("item row", keys, good, wrong)
        self.items.load(np.asarray(good, np.uint64), blobs)

    def set_vectors(self, keys: Sequence[int], values: Sequence[bytes], *, form: int) -> None:
        """Write packed model rows of one form; what is none is left out and noted."""
        dtype = STATE_ROW if form == STATE_FORM else ROW
        good, blobs, wrong = sound_vectors(keys, values, dtype, form=form)
        good, blobs, wrong = _finite(good, blobs, wrong, read_rows(blobs, dtype, form=form))
        self._note("model row", keys, good, wrong)
        self.model.load_rows(np.asarray(good, np.uint64), blobs)

    def set_items(self, keys: Sequence[int], values: Sequence[bytes]) -> None:
        """Write catalogue entries (MessagePack, as in the topic `items`); what is none is left out and noted."""
        for key, value in zip(keys, values, strict=True):
            try:
                item = events.decode_item(value)
            except events.EventError as error:
                self.bad["catalogue entry", key] = f"catalogue entry {key:016x}: {error}"
                continue
            self.bad.pop(("catalogue entry", key), None)
            if events.item_key(item) == key:
                self.items.set_item(key, item.item_id, events.catalogue_item(item))

    def read(self, what: str, load: Callable[[bytes], None], data: bytes) -> None:
        """Load one value; where it cannot be read the old one stays, and it is noted."""
        try:
            load(data)
            self.bad.pop((what, 0), None)
        except CodecError as error:
            self.bad[what, 0] = str(error)

    def _note(self, kind: str, keys: Sequence[int], good: Sequence[int], wrong: Sequence[str]) -> None:
        if self.bad:
            for key in good:
                self.bad.pop((kind, key), None)
        if wrong:
            sound = set(good)
            self.bad.update(zip(((kind, key) for key in keys if key not in sound), wrong, strict=False))


def _finite(
    keys: list[int], blobs: list[bytes], wrong: list[str], values: NDArray[Any]
) -> tuple[list[int], list[bytes], list[str]]:
    """Leave out vectors that are not finite: one of them would spoil every score it is part of."""
    fine = np.isfinite(values["vector"]).all(1) & np.isfinite(values["stats"]).all(1) & np.isfinite(values["bias"])
    if fine.all():
        return keys, blobs, wrong
    bad = [f"model row {key:016x}: its vector is not finite" for key, good in zip(keys, fine, strict=True) if not good]
    kept = np.flatnonzero(fine).tolist()
    return [keys[i] for i in kept], [blobs[i] for i in kept], wrong + bad


def _is_next(name: str, delta: Delta, position: int) -> bool:
    if delta.first > position:
        raise Stale(f"{name}: expected a delta from {position} or before, got [{delta.first}, {delta.next})")
    return delta.next > position


@dataclass(slots=True)
class FeedState:
    """How far one feed was read and what came of it."""

    last_id: str = "0-0"
    applied: int = 0
    skipped: int = 0
    at: float = 0.0
    bytes: int = 0
    pending: list[Delta] = field(default_factory=list)


class Snapshot:
    """The arrays now served, the tasks that keep them current, and the one read of a lookup."""

    def __init__(
        self, client: Redis, feeds: Redis, *, namespace: str, require_catalogue: bool = False,
        on_reload: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._client, self._feeds, self._on_reload = client, feeds, on_reload
        self._require_catalogue = require_catalogue
        self.live = Live.empty(require_catalogue=require_catalogue)
        self.item_feed, self.model_feed = FeedState(), FeedState()
        self.loaded = self.connected = False
        self.reloads = 0
        self._reason = "not loaded yet"
        self._sizes, self._resident, self._sized_at = Sizes(), dict[str, float](), -SIZES_S
        self._told, self._told_at = dict[str, Any](), -VERSIONS_S
        self._task: asyncio.Task[None] | None = None
        self._over, self._stopping = asyncio.Event(), False
        self._use(Keys(namespace))

    @property
    def behind(self) -> bool:
        """Whether answers come from arrays that may be behind: Redis does not answer, or nothing was loaded yet."""
        return not (self.loaded and self.connected)

    @property
    def degraded(self) -> bool:
        """Whether answers lack something: the arrays may be behind, or some of what Redis holds cannot be read."""
        return self.behind or bool(self.live.bad)

    @property
    def reason(self) -> str:
        """Why answers are degraded; empty where they are not."""
        if self.behind or not self.live.bad:
            return self._reason
        first = next(iter(self.live.bad.values()))
        return (
            f"{len(self.live.bad)} values in Redis cannot be read and are left out ({first}): run the build that wrote"
            " them, or `freshet rebuild --switch`"
        )

    def _use(self, keys: Keys) -> None:
        self.keys = keys
        self._users = RedisUserStore(self._client, keys)
        self._items = ItemStore(self._feeds, keys)
        self._models = ModelStore(self._feeds, keys)

    def start(self) -> None:
        """Begin to load and follow, in a task of the running loop."""
        self._task = asyncio.create_task(self._run(), name="snapshot")

    async def stop(self) -> None:
        """End the task."""
        if self._task is not None:
            self._stopping = True
            self._over.set()
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self._client.aclose()
        await self._feeds.aclose()

    async def read_user(self, partition: int, user: str) -> UserRead | None:
        """Read a profile in one round trip; None, at once while Redis is known to be gone."""
        if not self.connected:
            return None
        try:
            return await read_user(self._users, partition, user)
        except (StoreError, *StoreUnavailable) as error:
            self._lost(error)
            return None

    async def read_lag(self, ends: Mapping[int, int]) -> dict[str, int]:
        """Return how many events before `ends` (partition -> offset) a fold has not applied; raises what Redis does."""
        return {fold: sum(behind.values()) for fold, behind in (await self.read_lags(ends)).items()}

    async def read_lags(self, ends: Mapping[int, int]) -> dict[str, dict[int, int]]:
        """Return the same by partition."""
        reads = await self._users.read({p: [] for p in ends})
        marks = msgspec.json.decode((await self._items.head()).get("marks", b"{}"), type=dict[int, int])
        return {
            "user": {p: max(0, end - reads[p].applied) for p, end in ends.items()},
            "item": {p: max(0, reads[p].applied - marks.get(p, 0)) for p in ends},
        }

    async def read_metrics(self, name: str, after: str, count: int) -> list[tuple[str, dict[str, str]]]:
        """Read points of a learning curve after an id, or its newest `count` for "-"; raises what Redis raises."""
        return await read_metrics(self._feeds, self.keys.metrics(name), after=after, count=count)

    async def note(self, name: str, fields: Mapping[str, Any]) -> None:
        """Append a point to a curve of the API's own, of which about the last ten stay; raises what Redis raises."""
        await append_metrics(self._feeds, self.keys.metrics(name), fields, keep=10)

    async def versions(self, *, fresh: bool = False) -> dict[str, Any]:
        """Return the learner's versions, which one is pinned, its latest notes; at most 1 s old, or as last told.

        fresh: as of now, where Redis answers.

        {versions: oldest first, pinned: number or None, refused: how many steps and versions, notes: oldest first}.
        """
        if fresh or time.monotonic() - self._told_at > VERSIONS_S:
            self._told_at = time.monotonic()
            with contextlib.suppress(StoreError, *StoreUnavailable):
                self._told = await told_versions(self._models)
        return self._told

    async def sizes(self, partitions: int) -> tuple[Sizes, dict[str, float]]:
        """Return what Redis holds and the memory of workers and learner, MB, as they last told; at most 10 s old."""
        if time.monotonic() - self._sized_at > SIZES_S:
            self._sized_at = time.monotonic()
            with contextlib.suppress(StoreError, *StoreUnavailable):
                self._sizes = await redis_sizes(self._feeds, self.keys, partitions)
                for name in CURVES:
                    for _, fields in await read_metrics(self._feeds, self.keys.metrics(name), count=8):
                        if "rss_mb" in fields:
                            slot = f"-{fields['slot']}" if "slot" in fields else ""
                            self._resident[name + slot] = float(fields["rss_mb"])
        return self._sizes, self._resident

    async def _run(self) -> None:
        pause = BACK_OFF_S[0]
        while not self._stopping:
            began = time.monotonic()
            try:
                await self.load()
                await self._follow()
            except Stale as stale:
                log.warning("reloading: %s", stale)
                self.reloads += 1
                if self._on_reload is not None:
                    self._on_reload()
            except (StoreError, *StoreUnavailable) as error:
                self._lost(error)
            except Exception as error:  # bytes no codec reads: what was loaded stays, told at /health/ready
                log.exception("snapshot")
                self._lost(error)
            if time.monotonic() - began > BACK_OFF_S[1]:
                pause = BACK_OFF_S[0]
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACK_OFF_S[1])

    def _lost(self, error: BaseException) -> None:
        if self.connected:
            log.warning("Redis: %s: %s; answering from the arrays in process", type(error).__name__, error)
        self.connected = False
        self._reason = f"{type(error).__name__}: {error}"

    async def load(self) -> None:
        """Load everything and swap it in; raises what Redis or the codecs raise."""
        keys = await live_keys(self._feeds, self.keys.namespace)
        if keys != self.keys:
            self._use(keys)
        live = Live.empty(require_catalogue=self._require_catalogue)
        tops = [await feed_top(self._feeds, key) for key in (keys.item_feed, keys.model_feed)]
        wrong: list[str] = []
        head, rows = await self._items.load(wrong)
        await _in_pieces(rows, live.set_rows)
        await _in_pieces(await self._items.load_catalogue(wrong), live.set_items)
        if totals := head.get("totals"):
            live.read("totals", live.items.load_totals, totals)
        live.items_position = int(head.get("next", 0))
        live.catalogue_position = int(head.get("catalogue", 0))
        head, rows, pinned = await self._models.load_served(wrong)
        await _in_pieces(rows, partial(live.set_vectors, form=SERVED_FORM if pinned else STATE_FORM))
        if dense := head.get("dense"):
            live.read("weights", live.model.load_dense, dense)
        live.model_position = int(head.get("next", 0))
        live.bad.update((("key", at), problem) for at, problem in enumerate(wrong))
        for problem in list(live.bad.values())[:10]:
            log.error("left out: %s", problem)
        self.live = live
        self.item_feed = FeedState(_before(tops[0], live.items_position), at=time.time())
        self.model_feed = FeedState(_before(tops[1], live.model_position), at=time.time())
        self.loaded = self.connected = True
        self._reason = ""
        gc.collect()
        gc.freeze()
        log.info("loaded %d items, model step %d", live.items.rows.known, live.model.step)

    async def _follow(self) -> None:
        """Follow feeds and pointer until one of them fails. The client may swallow a cancellation: hence `over`."""
        self._over = asyncio.Event()
        if self._stopping:
            return
        try:
            async with asyncio.TaskGroup() as group:
                for follow in (self._follow_items, self._follow_model, self._follow_pointer):
                    group.create_task(_ending(follow, self._over))
        except* Exception as failures:
            raise _first(failures) from None

    async def _follow_items(self, over: asyncio.Event) -> None:
        feed, key = self.item_feed, self.keys.item_feed
        while not over.is_set():
            for entry_id, delta in await self._read(key, feed):
                _count(feed, entry_id, self.live.apply_item(delta))
                await asyncio.sleep(0)

    async def _follow_model(self, over: asyncio.Event) -> None:
        feed, key = self.model_feed, self.keys.model_feed
        while not over.is_set():
            for entry_id, delta in await self._read(key, feed):
                if delta.kind == "step":
                    parts = [part for part in feed.pending if part.step == delta.step]
                    feed.pending.clear()
                    _count(feed, entry_id, self.live.apply_step(parts, delta))
                else:
                    if delta.kind == "vectors":
                        feed.pending.append(delta)
                    feed.last_id = entry_id
                    if len(feed.pending) > MAX_PENDING:
                        raise Stale(f"model feed: expected the end of a step within {MAX_PENDING} parts, got none")
                await asyncio.sleep(0)

    async def _read(self, key: str, feed: FeedState) -> list[tuple[str, Delta]]:
        entries = await read_feed(self._feeds, key, feed.last_id, block_ms=BLOCK_MS, count=16)
        feed.bytes += sum(delta.size for _, delta in entries)
        self.connected, self._reason = True, ""
        return entries

    async def _follow_pointer(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await asyncio.sleep(POINTER_S)
            keys = await live_keys(self._feeds, self.keys.namespace)
            if keys != self.keys:
                raise Stale(f"generation {keys.generation} is served now, not {self.keys.generation}")

    def state(self) -> dict[str, Any]:
        """Return positions, feeds and sizes, for people to read."""
        live = self.live
        return {
            "loaded": self.loaded, "connected": self.connected, "degraded": self.degraded, "reason": self.reason,
            "generation": self.keys.generation, "reloads": self.reloads,
            "bad": len(live.bad), "bad_first": list(live.bad.values())[:10],
            "items": {"rows": live.items.rows.known, "catalogue": len(live.items.catalogue),
                      "position": live.items_position,
                      "catalogue_position": live.catalogue_position, "feed": _feed_state(self.item_feed)},
            "model": {"step": live.model.step, "position": live.model_position, "feed": _feed_state(self.model_feed)},
        }  # fmt: skip


async def told_versions(store: ModelStore) -> dict[str, Any]:
    """Return what Redis says of the learner's versions, see `Snapshot.versions`; raises what Redis raises."""
    found = sorted((msgspec.json.decode(about) for about in await store.versions()), key=lambda about: about["version"])
    names = ("pin", "refused", "notes", "step", "next")
    pin, refused, notes, step, following = await store.client.hmget(store.head_key, names)
    return {
        "versions": [{**about, "identity": f"{about['identity']:016x}"} for about in found],
        "pinned": int(pin or 0) or None, "refused": int(refused or 0), "notes": msgspec.json.decode(notes or b"[]"),
        "learnt": {"step": int(step or 0), "next": int(following or 0)},
    }  # fmt: skip


async def _ending(follow: Callable[[asyncio.Event], Awaitable[None]], over: asyncio.Event) -> None:
    try:
        await follow(over)
    finally:
        over.set()


async def _in_pieces(rows: Sequence[tuple[int, bytes]], write: Any) -> None:
    for at in range(0, len(rows), LOAD_ROWS):
        piece = rows[at : at + LOAD_ROWS]
        write([key for key, _ in piece], [value for _, value in piece])
        await asyncio.sleep(0)


def _before(top: str, position: int) -> str:
    """Return the id to read on from: before every entry that may say more than what was just loaded.

    Rows are committed less often than they are fed, so entries after `position` are wanted even where they are older
    than the load; catalogue entries are wanted from the feed's top as it was before the load.
    """
    if position == 0:
        return "0-0"
    milliseconds, _, sequence = top.partition("-")
    first, second = (int(milliseconds), int(sequence)), (position - 1, _LAST_SEQUENCE)
    return "{}-{}".format(*min(first, second))


def _count(feed: FeedState, entry_id: str, applied: bool) -> None:
    feed.last_id, feed.at = entry_id, time.time()
    if applied:
        feed.applied += 1
    else:
        feed.skipped += 1


def _feed_state(feed: FeedState) -> dict[str, Any]:
    return {"last_id": feed.last_id, "applied": feed.applied, "skipped": feed.skipped, "at": feed.at}


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    return group
