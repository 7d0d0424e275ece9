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
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol

import msgspec
import numpy as np
import xxhash
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD, mark_ready, resident_mb
from models.examples import ENTERS, CodecError, Entries, HoleError, accept, concatenate
from models.factors import sound
from models.learner import Learned, Learner, Origin
from models.model import STATE_FORM, STATE_ROW
from models.rows import Rows
from streaming.dead_letters import DeadLetters
from streaming.kafka.ground import HOLE, TRIMMED, Ground, GroundError, arrive
from streaming.kafka.reading import Reading
from streaming.learn import Dead
from streaming.recovery.generations import moved
from streaming.state import (
    Fault,
    Keys,
    ModelStore,
    StoredBytesError,
    StoreUnavailable,
    append_metrics,
    connect,
    live_keys,
    persist,
)
from streaming.supervision import TRIES, last_lines, leave
from streaming.topics import Ends, Log, Topics, TopicsError, client_options

log = logging.getLogger(__name__)

MICRO_BATCH: Final = 64
MICRO_BATCH_S: Final = 0.05
STEP_S: Final = 1.0


class TrainerError(RuntimeError):
    """The learner cannot go on; `status` says whether starting again helps."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


class LearntStore(Protocol):
    """What a learner loads from and commits to: a ModelStore, or its like in memory."""

    keys: Keys

    async def load(self) -> tuple[dict[str, bytes], list[tuple[int, bytes]]]:
        """Return (head, rows) of one moment."""

    async def commit(
        self, *, expected: int, head: Mapping[str, Any], keys: Sequence[int], values: Sequence[bytes],
        gone: Iterable[int] = (),
    ) -> int | None:  # fmt: skip
        """Delete rows `gone`, write rows and head; None, or the stored offset where it was refused."""

    async def publish_step(
        self, *, step: int, first: int, following: int, keys: Sequence[int], vectors: Sequence[bytes], dense: bytes,
        gone: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Tell readers of a step."""


class StepRecord(msgspec.Struct, array_like=True):
    """One record of topic `steps`: what a recomputation needs beside `examples`.

    Entries of the records first:next, duplicates dropped, were learnt in micro-batches of these sizes; `seed` is the
    negatives' seed of the first one (later ones follow from their own first positions). `before` is the identity of
    the parent, 0 at the beginning; `generation` is the one whose learner took the step (version 1 wrote neither).
    `gone` items left at its end; the records at the offsets `skipped` were not learnt, for that raised three times.
    """

    step: int
    parent: int
    first: int
    next: int
    sizes: list[int]
    seed: int
    v: int = 1
    before: int = 0
    generation: int = 0
    gone: int = 0
    skipped: list[int] = []

    @property
    def identity(self) -> int:
        """Name of the weights after this step, u64: it follows from the parent's and from this step's own cut."""
        cut = (self.before, self.step, self.first, self.next, self.sizes, self.seed, self.gone, self.skipped)
        return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(cut)) or 1


class LearningError(RuntimeError):
    """Learning the records [first, next) raised: what is in memory may be half changed and must be thrown away."""

    def __init__(self, first: int, following: int, cause: BaseException) -> None:
        self.first, self.next = first, following
        super().__init__(f"examples@{first}..{following - 1}: {type(cause).__name__}: {cause}")


class Trainer:
    """A learner between `examples` and the store: position, marks, the step under way.

    learn(records) any number of times, then step() commits what they changed; load() at the start.
    """

    def __init__(self, *, store: LearntStore, cluster: str = "", seed: int = 1, most: int = 1_000_000) -> None:
        self._store, self._cluster, self._seed, self._most = store, cluster, seed, most
        self.learner = Learner(rows=Rows(), seed=seed)
        self.marks: dict[int, int] = {}
        self.next = self.committed = 0
        self.window: Origin | None = None
        self.last_record = self.last_value = b""
        self.totals = Learned()
        self.skip: set[int] = set()
        """Offsets of records that are not learnt."""
        self.careful: list[tuple[int, int]] = []
        """Ranges [first, next) whose records are learnt one by one, to find the one that raises."""
        self._sizes: list[int] = []
        self._step_seed = 0

    async def load(self) -> None:
        """Read the last committed step, with the epoch of its log; raises StoredBytesError."""
        head, rows = await self._store.load()
        self.stored_epoch = head.get("cluster", b"").decode()
        self.learner = Learner(rows=Rows(), seed=self._seed)
        names = self._store.keys
        _, _, bad = sound([key for key, _ in rows], [value for _, value in rows], STATE_ROW, form=STATE_FORM)
        if bad:
            bucket = int(bad[0].split()[2].rstrip(":"), 16) & 0xFF
            raise StoredBytesError(names.model_rows(bucket), f"{bad[0]} ({len(bad)} such)")
        try:
            if rows:
                self.learner.load_state(np.array([key for key, _ in rows], np.uint64), [value for _, value in rows])
            if "dense" in head:
                self.learner.load_dense(head["dense"])
            self.marks = msgspec.json.decode(head.get("marks", b"{}"), type=dict[int, int])
            self.next = self.committed = int(head.get("next", 0))
            self.window = _unpack_origin(head.get("window", b""))
            self.last_record = head.get("record", b"")
            _ = self.lineage
        except (CodecError, ValueError, msgspec.MsgspecError) as error:
            raise StoredBytesError(names.model_head, f"its fields are not those of a head ({error})") from error

    def suspect(self, faults: Mapping[int, Fault]) -> None:
        """Take over what raised before: records to skip, and ranges to be careful with."""
        single = {first for first, fault in faults.items() if fault.next == first + 1}
        self.skip = {first for first in single if faults[first].count >= TRIES}
        self.careful = [(first, fault.next) for first, fault in faults.items() if first not in self.skip]

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
        """Learn records (offset, value) of `examples`, in order, as micro-batches of at most 64 entries.

        Raises LearningError where learning itself fails, TrainerError at a gap.
        """
        fresh = [(offset, value) for offset, value in records if offset >= self.next]
        at = 0
        while at < len(fresh):
            last = at + 1
            while last < len(fresh) and not (self._suspect(fresh[at][0]) or self._suspect(fresh[last][0])):
                last += 1
            first = self.next
            try:
                self._learn_together(fresh[at:last])
            except TrainerError:
                raise
            except Exception as error:
                raise LearningError(first, self.next, error) from error
            at = last

    def _suspect(self, offset: int) -> bool:
        return any(first <= offset < following for first, following in self.careful)

    def _learn_together(self, records: Sequence[tuple[int, bytes]]) -> None:
        parts: list[Entries] = []
        origin = self._origin(self.next)
        for offset, value in records:
            if offset > self.next:
                raise TrainerError(EXIT_AGAIN, f"examples: expected offset {self.next}, got {offset}")
            self.last_value = value
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

    def retrace(self, records: Sequence[tuple[int, bytes]], sizes: Sequence[int], skipped: Sequence[int] = ()) -> None:
        """Learn the records of one logged step, cut as they were cut then; `step` commits it."""
        origin, parts = self._origin(self.next), []
        self.skip.update(skipped)
        for offset, value in records:
            entries = self._accept(offset, value)
            self.next = offset + 1
            if entries is not None and len(entries):
                parts.append(entries)
        if not parts:
            return
        at, whole = 0, concatenate(parts)
        for size in sizes:
            self._learn(whole.slice(at, at + size, []), origin)
            at += size

    def _origin(self, offset: int) -> Origin:
        return Origin(offset, self.learner.stream_time, tuple(sorted(self.marks.items())))

    def _accept(self, offset: int, value: bytes) -> Entries | None:
        """Decode a record and drop what was learnt before; None where the item agent has dead-lettered it."""
        try:
            entries = accept(Entries.from_bytes(value), self.marks)
            return entries if offset not in self.skip else None
        except CodecError as error:
            log.warning("examples@%d skipped: %s", offset, error)
            return None
        except HoleError as error:
            raise TrainerError(EXIT_FOR_GOOD, f"{error}: examples lost records. {HOLE}") from error

    async def step(self, logged: StepRecord | None = None) -> StepRecord | None:
        """Commit everything since the last step in one transaction; None where nothing came. Raises TrainerError.

        `logged` is the step as it was logged, where it is taken again: the lineage goes on from that very record.
        """
        if self.next == self.committed:
            return None
        learner = self.learner
        parent, learner.model.step = learner.model.step, learner.model.step + 1
        gone = learner.let_go(learner.excess(self._most) if logged is None else logged.gone).tolist()
        rows = learner.take_changed()
        record = logged or StepRecord(
            learner.model.step, parent, self.committed, self.next, self._sizes, self._step_seed, v=2,
            before=self.lineage, generation=self._store.keys.generation, gone=len(gone),
            skipped=sorted(offset for offset in self.skip if self.committed <= offset < self.next),
        )  # fmt: skip
        self.last_record = msgspec.msgpack.encode(record)
        keys = learner.rows.keys[rows].tolist()
        head = {
            "next": str(self.next), "step": str(record.step), "dense": learner.dense_state(),
            "marks": msgspec.json.encode({str(p): o for p, o in sorted(self.marks.items())}),
            "window": _pack_origin(learner.window_origin()), "record": self.last_record, "cluster": self._cluster,
        }  # fmt: skip
        values = learner.pack_state(rows)
        stored = await persist(
            "commit",
            lambda: self._store.commit(expected=self.committed, head=head, keys=keys, values=values, gone=gone),
        )
        if stored is not None and stored != self.next:
            raise TrainerError(
                EXIT_AGAIN, f"weights: expected offset {self.committed} in Redis, found {stored}: a rollback or a twin"
            )
        self.committed, self._sizes = self.next, []
        self._published = (record, keys, rows, gone)
        return record

    async def publish(self, record: StepRecord) -> None:
        """Feed serving with the step's rows and weights."""
        _, keys, rows, gone = self._published
        model = self.learner.model
        await persist(
            "feed",
            lambda: self._store.publish_step(
                step=record.step, first=record.first, following=record.next, keys=keys, vectors=model.pack_rows(rows),
                dense=model.dense_bytes(), gone=gone,
            ),
        )  # fmt: skip

    @property
    def lineage(self) -> int:
        """Identity of the last committed step; 0 at the beginning."""
        return msgspec.msgpack.decode(self.last_record, type=StepRecord).identity if self.last_record else 0

    stored_epoch = ""
    _published: tuple[StepRecord, list[int], Any, list[int]]
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
    except StoredBytesError as error:
        _leave(EXIT_FOR_GOOD, str(error))
    except GroundError as error:
        _leave(EXIT_FOR_GOOD, str(error))
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
    await arrive(settings.kafka, topics)
    client = connect(settings.redis)
    keys = await live_keys(client, settings.namespace)
    store = ModelStore(client, keys, settings.feed_mb << 20)
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    producer, looking, ends = Log(settings.kafka), None, Ends(settings.kafka)
    consumer = AIOKafkaConsumer(
        **client_options(settings.kafka), group_id=None, enable_auto_commit=False, auto_offset_reset="none",
        fetch_max_wait_ms=100, max_partition_fetch_bytes=4 << 20,
    )  # fmt: skip
    await producer.start()
    await consumer.start()
    ground = Ground(producer, topics, await producer.epoch(topics), codec=settings.codec)
    trainer = Trainer(store=store, cluster=ground.stamp, seed=settings.seed, most=settings.max_items)
    try:
        await persist("load", trainer.load)
        trainer.suspect(await persist("faults", store.faults))
        place = TopicPartition(topics.examples, 0)
        reading = Reading(consumer, place, ends)
        await _resume(trainer, consumer, place, reading, producer, topics, ground)
        looking = asyncio.create_task(_look(ground))
        mark_ready()
        log.info("learner runs from examples@%d, step %d", trainer.next, trainer.learner.model.step)
        switched = asyncio.create_task(moved(client, keys))
        switched.add_done_callback(lambda _: stop.set())
        await _follow(trainer, reading, producer, topics, lambda fields: _metrics(client, keys, fields), stop)
        if switched.done():
            raise TrainerError(EXIT_AGAIN, f"generation {switched.result()} is served now: starting again in it")
    except LearningError as error:
        raise await _blamed(error, store, DeadLetters(producer, topics), trainer) from error
    except OffsetOutOfRangeError as error:
        await ground.check_epoch()
        raise TrainerError(
            EXIT_FOR_GOOD,
            f"examples has no offset {trainer.next} any more ({error}). {TRIMMED}",
        ) from error
    finally:
        if looking is not None:
            looking.cancel()
        await consumer.stop()
        await ends.stop()
        await producer.stop()
        await client.aclose()


async def _blamed(error: LearningError, store: ModelStore, dead: DeadLetters, trainer: Trainer) -> TrainerError:
    """Note what raised, set a record aside whose third time it is, and return how the process is to end."""
    text = last_lines(error.__cause__ or error)
    count = 1 + await persist("fault", lambda: store.blamed(error.first))
    if count >= TRIES and error.next == error.first + 1:  # the letter first: none would skip the record untold
        reason = f"learning it raised {count} times: {text}"
        await dead.send([Dead(dead.topics.examples, 0, error.first, reason, trainer.last_value)])
    await persist("fault", lambda: store.blame(error.first, error.next, text))
    return TrainerError(EXIT_AGAIN, f"{error} ({count} of {TRIES} times before a record is set aside)")


async def _look(ground: Ground) -> None:
    """End the process where the topics are others than when it began."""
    try:
        await ground.watch()
    except GroundError as error:
        leave(EXIT_FOR_GOOD, str(error))


async def _resume(
    trainer: Trainer, consumer: Any, place: TopicPartition, reading: Reading, producer: Log, topics: Topics,
    ground: Ground,
) -> None:  # fmt: skip
    """Place the consumer, refill the join window, and append the last step's record again in case it was lost."""
    first, end = (await consumer.beginning_offsets([place]))[place], (await consumer.end_offsets([place]))[place]
    await ground.check("weights", trainer.stored_epoch, {place: trainer.next}, {place: (first, end)})
    consumer.assign([place])
    offset = trainer.begin_refill()
    if offset < first:
        raise GroundError(
            f"weights: the join window goes back to offset {offset}, but {place.topic}[0] begins at {first}. {TRIMMED}"
        )
    consumer.seek(place, offset)
    while offset < trainer.next:
        for record in await reading.get(offset, timeout_ms=500):
            if record.offset < trainer.next:
                trainer.refill(record.offset, record.value)
            offset = record.offset + 1
    trainer.end_refill()
    consumer.seek(place, trainer.next)
    if trainer.last_record:
        await producer.append(topics.steps, [(0, None, trainer.last_record)])


async def _follow(
    trainer: Trainer, reading: Reading, producer: Log, topics: Topics,
    tell: Callable[[dict[str, Any]], Awaitable[None]], stop: asyncio.Event,
) -> None:  # fmt: skip
    """Learn until told to stop: gather records for 50 ms or 64 entries, step every second."""
    stepped = time.monotonic()
    while not stop.is_set():
        started = time.monotonic()
        fetched = await reading.get(trainer.next, timeout_ms=int(1000 * MICRO_BATCH_S), max_records=MICRO_BATCH)
        records = [(record.offset, record.value) for record in fetched]
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
        if reading.at_end(trainer.next):
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
            "window": len(trainer.learner.window), "learnt_items": trainer.learner.rows.known, "gone": record.gone,
            "rss_mb": resident_mb(),
        }
    )  # fmt: skip


async def _metrics(client: Any, keys: Any, fields: dict[str, Any]) -> None:
    try:
        await append_metrics(client, keys.metrics("learner"), fields)
    except StoreUnavailable as error:
        log.debug("metrics: %s", error)
