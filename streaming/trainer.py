"""The learner process: follows `examples`, trains in micro-batches, commits a step about once a second.

A step is one transaction: changed rows with optimiser state, dense weights, next offset (DESIGN section 3, rule 8).
Then its record goes to topic `steps` and its rows to the model's feed. After any crash it goes on exactly: state and
position come from one commit, the join window is filled again from the records that the oldest held slate came with.
How learning works is in models/learner.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD, mark_ready
from models.examples import ENTERS, CodecError, Entries, HoleError, accept, concatenate
from models.learner import Learned, Learner, Origin
from models.rows import Rows
from streaming.state import ModelStore, StoreUnavailable, append_metrics, connect, live_keys, persist
from streaming.topics import Log, Topics, TopicsError, preflight

log = logging.getLogger(__name__)

MICRO_BATCH: Final = 64
MICRO_BATCH_S: Final = 0.05
STEP_S: Final = 1.0


class TrainerError(RuntimeError):
    """The learner cannot go on; `status` says whether starting again helps."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


class StepRecord(msgspec.Struct, array_like=True):
    """One record of topic `steps`: what a recomputation needs beside `examples`.

    Entries of the records first:next, duplicates dropped, were learnt in micro-batches of these sizes; `seed` is the
    negatives' seed of the first one (later ones follow from their own first positions).
    """

    step: int
    parent: int
    first: int
    next: int
    sizes: list[int]
    seed: int
    v: int = 1


class Trainer:
    """A learner between `examples` and the store: position, marks, the step under way.

    learn(records) any number of times, then step() commits what they changed; load() at the start.
    """

    def __init__(self, *, store: ModelStore, cluster: str = "", seed: int = 1) -> None:
        self._store, self._cluster, self._seed = store, cluster, seed
        self.learner = Learner(rows=Rows(), seed=seed)
        self.marks: dict[int, int] = {}
        self.next = self.committed = 0
        self.window: Origin | None = None
        self.last_record = b""
        self.totals = Learned()
        self._sizes: list[int] = []
        self._step_seed = 0

    async def load(self) -> None:
        """Read the last committed step; raises TrainerError where it belongs to another cluster."""
        head, rows = await self._store.load()
        if head.get("cluster", b"").decode() not in ("", self._cluster):
            raise TrainerError(
                EXIT_FOR_GOOD,
                f"weights were learnt from cluster/partitions {head['cluster'].decode()}, this is {self._cluster}:"
                " point FRESHET_KAFKA at that cluster, or rebuild into a new namespace",
            )
        self.learner = Learner(rows=Rows(), seed=self._seed)
        if rows:
            self.learner.load_state(np.array([key for key, _ in rows], np.uint64), [value for _, value in rows])
        if "dense" in head:
            self.learner.load_dense(head["dense"])
        self.marks = msgspec.json.decode(head.get("marks", b"{}"), type=dict[int, int])
        self.next = self.committed = int(head.get("next", 0))
        self.window = _unpack_origin(head.get("window", b""))
        self.last_record = head.get("record", b"")

    def begin_refill(self) -> int:
        """Return the offset from which `refill` wants records; `next` where the window was empty."""
        if self.window is None:
            return self.next
        self._resumed = (self.learner.stream_time, dict(self.marks))
        self.learner.stream_time, self.marks = self.window.time, dict(self.window.marks)
        return self.window.offset

    def refill(self, offset: int, value: bytes) -> None:
        """Let a record below `next` pass through the join window only."""
        origin = self._origin(offset)
        entries = self._accept(offset, value)
        if entries is not None:
            self.learner.refill(entries, origin)

    def end_refill(self) -> None:
        """Go on from the committed position."""
        if self.window is not None:
            self.learner.stream_time, self.marks = self._resumed

    def learn(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Learn records (offset, value) of `examples`, in order, as micro-batches of at most 64 entries."""
        parts: list[Entries] = []
        origin = self._origin(self.next)
        for offset, value in records:
            if offset < self.next:
                continue
            if offset > self.next:
                raise TrainerError(EXIT_AGAIN, f"examples: expected offset {self.next}, got {offset}")
            entries = self._accept(offset, value)
            self.next = offset + 1
            if entries is not None and len(entries):
                parts.append(entries)
        if parts:
            self._micro_batches(concatenate(parts), origin)

    def _micro_batches(self, entries: Entries, origin: Origin) -> None:
        for first in range(0, len(entries), MICRO_BATCH):
            self._learn(entries.slice(first, min(first + MICRO_BATCH, len(entries)), []), origin)

    def _learn(self, part: Entries, origin: Origin) -> None:
        if not self._sizes:
            self._step_seed = self.learner.step_seed(part)
        self._sizes.append(len(part))
        learned = self.learner.learn(part, origin)
        for name in Learned.__slots__:
            setattr(self.totals, name, getattr(self.totals, name) + getattr(learned, name))

    def retrace(self, records: Sequence[tuple[int, bytes]], sizes: Sequence[int]) -> None:
        """Learn the records of one logged step, cut as they were cut then; `step` commits it."""
        origin, parts = self._origin(self.next), []
        for offset, value in records:
            entries = self._accept(offset, value)
            self.next = offset + 1
            if entries is not None and len(entries):
                parts.append(entries)
        at = 0
        for size in sizes:
            self._learn(concatenate(parts).slice(at, at + size, []), origin)
            at += size

    def _origin(self, offset: int) -> Origin:
        return Origin(offset, self.learner.stream_time, tuple(sorted(self.marks.items())))

    def _accept(self, offset: int, value: bytes) -> Entries | None:
        """Decode a record and drop what was learnt before; None where the item agent has dead-lettered it."""
        try:
            return accept(Entries.from_bytes(value), self.marks)
        except CodecError as error:
            log.warning("examples@%d skipped: %s", offset, error)
            return None
        except HoleError as error:
            raise TrainerError(EXIT_FOR_GOOD, f"{error}: examples lost records") from error

    async def step(self) -> StepRecord | None:
        """Commit everything since the last step in one transaction; None where nothing came. Raises TrainerError."""
        if self.next == self.committed:
            return None
        learner = self.learner
        parent, learner.model.step = learner.model.step, learner.model.step + 1
        rows = learner.take_changed()
        record = StepRecord(learner.model.step, parent, self.committed, self.next, self._sizes, self._step_seed)
        self.last_record = msgspec.msgpack.encode(record)
        keys = learner.rows.keys[rows].tolist()
        head = {
            "next": str(self.next), "step": str(record.step), "dense": learner.dense_state(),
            "marks": msgspec.json.encode({str(p): o for p, o in sorted(self.marks.items())}),
            "window": _pack_origin(learner.window_origin()), "record": self.last_record, "cluster": self._cluster,
        }  # fmt: skip
        values = learner.pack_state(rows)
        stored = await persist(
            "commit", lambda: self._store.commit(expected=self.committed, head=head, keys=keys, values=values)
        )
        if stored is not None and stored != self.next:
            raise TrainerError(
                EXIT_AGAIN, f"weights: expected offset {self.committed} in Redis, found {stored}: a rollback or a twin"
            )
        self.committed, self._sizes = self.next, []
        self._published = (record, keys, rows)
        return record

    async def publish(self, record: StepRecord) -> None:
        """Feed serving with the step's rows and weights."""
        _, keys, rows = self._published
        model = self.learner.model
        await persist(
            "feed",
            lambda: self._store.publish_step(
                step=record.step, first=record.first, following=record.next, keys=keys, vectors=model.pack_rows(rows),
                dense=model.dense_bytes(),
            ),
        )  # fmt: skip

    _published: tuple[StepRecord, list[int], Any]
    _resumed: tuple[float, dict[int, int]]


def _pack_origin(origin: Origin | None) -> bytes:
    return b"" if origin is None else msgspec.msgpack.encode((origin.offset, origin.time, origin.marks))


def _unpack_origin(data: bytes) -> Origin | None:
    if not data:
        return None
    offset, at, marks = msgspec.msgpack.decode(data, type=tuple[int, float, tuple[tuple[int, int], ...]])
    return Origin(offset, at, marks)


def run(settings: Settings) -> None:
    """Run the learner until SIGTERM or SIGINT; exits with 70 to be started again, with 78 where that cannot help."""
    os.nice(max(0, 10 - os.nice(0)))
    warm()
    import uvloop

    try:
        uvloop.run(_main(settings))
    except TopicsError as error:
        _leave(EXIT_FOR_GOOD, str(error))
    except TrainerError as error:
        _leave(error.status, str(error))
    except KafkaError as error:
        _leave(EXIT_AGAIN, f"Kafka: {type(error).__name__}: {error}")


def warm() -> None:
    """Import torch and load the compiled kernels before the process calls itself ready."""
    empty = Entries(
        ranges=[], partition=np.zeros(1, np.uint16), offset=np.zeros(1, np.int64), index=np.zeros(1, np.uint16),
        time=np.ones(1), kind=np.ones(1, np.uint8), flags=np.full(1, ENTERS, np.uint8), target=np.ones(1, np.uint64),
        weight=np.ones(1), value=np.zeros(1), slates=np.zeros((1, 4), np.uint64),
        history_start=np.zeros(2, np.int64), ids=["warm"], extra=[b""],
    )  # fmt: skip
    Learner(rows=Rows()).learn(Entries.from_bytes(empty.to_bytes()))


def _leave(status: int, reason: str) -> NoReturn:
    log.critical("%s", reason)
    raise SystemExit(status)


async def _main(settings: Settings) -> None:
    topics = Topics(settings.namespace, settings.partitions, int(settings.retention_inlets_days))
    cluster = await preflight(settings.kafka, topics)
    client = connect(settings.redis)
    keys = await live_keys(client, settings.namespace)
    store = ModelStore(client, keys, settings.feed_mb << 20)
    trainer = Trainer(store=store, cluster=f"{cluster}/{topics.partitions}", seed=settings.seed)
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    producer = Log(settings.kafka)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka, group_id=None, enable_auto_commit=False, auto_offset_reset="none",
        fetch_max_wait_ms=100, max_partition_fetch_bytes=4 << 20,
    )  # fmt: skip
    await producer.start()
    await consumer.start()
    try:
        await persist("load", trainer.load)
        place = TopicPartition(topics.examples, 0)
        await _resume(trainer, consumer, place, producer, topics)
        mark_ready()
        log.info("learner runs from examples@%d, step %d", trainer.next, trainer.learner.model.step)
        await _follow(trainer, consumer, place, producer, topics, lambda fields: _metrics(client, keys, fields), stop)
    except OffsetOutOfRangeError as error:
        raise TrainerError(
            EXIT_FOR_GOOD, f"examples has no offset {trainer.next} any more ({error}): rebuild into a new generation"
        ) from error
    finally:
        await consumer.stop()
        await producer.stop()
        await client.aclose()


async def _resume(trainer: Trainer, consumer: Any, place: TopicPartition, producer: Log, topics: Topics) -> None:
    """Place the consumer, refill the join window, and append the last step's record again in case it was lost."""
    end = (await consumer.end_offsets([place]))[place]
    if end < trainer.next:
        raise TrainerError(
            EXIT_FOR_GOOD, f"examples ends at {end}, the weights were learnt up to {trainer.next}: another log"
        )
    consumer.assign([place])
    offset = trainer.begin_refill()
    consumer.seek(place, offset)
    while offset < trainer.next:
        for record in (await consumer.getmany(place, timeout_ms=500)).get(place, ()):
            if record.offset < trainer.next:
                trainer.refill(record.offset, record.value)
            offset = record.offset + 1
    trainer.end_refill()
    consumer.seek(place, trainer.next)
    if trainer.last_record:
        await producer.append(topics.steps, [(0, None, trainer.last_record)])


async def _follow(
    trainer: Trainer, consumer: Any, place: TopicPartition, producer: Log, topics: Topics,
    tell: Callable[[dict[str, Any]], Awaitable[None]], stop: asyncio.Event,
) -> None:  # fmt: skip
    """Learn until told to stop: gather records for 50 ms or 64 entries, step every second."""
    stepped = time.monotonic()
    while not stop.is_set():
        started = time.monotonic()
        fetched = await consumer.getmany(place, timeout_ms=int(1000 * MICRO_BATCH_S), max_records=MICRO_BATCH)
        records = [(record.offset, record.value) for record in fetched.get(place, ())]
        while records and not stop.is_set():
            size, count = 0, 0
            while count < len(records) and size < 24 * 1024 * MICRO_BATCH:
                size += len(records[count][1])
                count += 1
            trainer.learn(records[:count])
            del records[:count]
            if time.monotonic() - stepped >= STEP_S:
                await _step(trainer, producer, topics, tell)
                stepped = time.monotonic()
            await asyncio.sleep(0)
        if time.monotonic() - stepped >= STEP_S:
            await _step(trainer, producer, topics, tell)
            stepped = time.monotonic()
        if consumer.highwater(place) in (None, trainer.next):
            await asyncio.sleep(max(0.0, MICRO_BATCH_S - (time.monotonic() - started)))
    await _step(trainer, producer, topics, tell)


async def _step(
    trainer: Trainer, producer: Log, topics: Topics, tell: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    record = await trainer.step()
    if record is None:
        return
    await producer.append(topics.steps, [(0, None, trainer.last_record)])
    await trainer.publish(record)
    done, trainer.totals = trainer.totals, Learned()
    await tell(
        {
            "t": round(time.time(), 3), "step": record.step, "events": done.entered, "joined": done.joined,
            "lists": done.lists, "encoder_loss": round(done.encoder_loss / max(done.entered, 1), 4),
            "ranker_loss": round(done.ranker_loss / max(done.lists, 1), 4), "next": record.next,
        }
    )  # fmt: skip


async def _metrics(client: Any, keys: Any, fields: dict[str, Any]) -> None:
    try:
        await append_metrics(client, keys.metrics("learner"), fields)
    except StoreUnavailable as error:
        log.debug("metrics: %s", error)
