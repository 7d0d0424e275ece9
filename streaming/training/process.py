"""The learner process: follows `examples`, hands records to the trainer, commits a step about once a second.

A step's record goes to topic `steps` and its rows to the model's feed, after the commit; versions are written by a
thread, so that learning goes on meanwhile. Started again after any crash it appends the last step's record once more,
and tells readers of the feed up to where the model is, in case that was lost. Knows nothing of how learning works.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD, mark_ready, resident_mb
from models.examples import ENTERS, Entries
from models.learner import Learned, Learner, Sums
from models.metrics import calibration
from models.rows import Rows
from streaming.dead_letters import DeadLetters
from streaming.kafka.ground import TRIMMED, Ground, GroundError, arrive
from streaming.kafka.reading import Reading
from streaming.learn import Dead
from streaming.recovery.generations import moved
from streaming.state import (
    Delta,
    ModelStore,
    StoredBytesError,
    StoreUnavailable,
    append_metrics,
    connect,
    live_keys,
    persist,
)
from streaming.supervision import TRIES, last_lines, leave
from streaming.topics import Ends, Log, Topics, TopicsError, client_options, topics_of
from streaming.trainer import MICRO_BATCH, LearningError, Trainer, TrainerError
from streaming.training.versions import Versions, home

log = logging.getLogger(__name__)

MICRO_BATCH_S: Final = 0.05
STEP_S: Final = 1.0
LAST_S: Final = 5.0
"""How long a stop waits for a version that is being written, s."""
Tell = Callable[[dict[str, Any]], Awaitable[None]]


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
    topics = topics_of(settings)
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
    versions = Versions(home(settings, keys), store)
    trainer = Trainer(
        store=store, cluster=ground.stamp, seed=settings.seed, most=settings.max_items, versions=versions,
        rewards=settings.rewards,
    )  # fmt: skip
    try:
        await persist("load", trainer.load)
        writing = Writing(trainer, versions)
        trainer.suspect(await persist("faults", store.faults))
        place = TopicPartition(topics.examples, 0)
        reading = Reading(consumer, place, ends)
        await _resume(trainer, consumer, place, reading, producer, topics, ground)
        looking = asyncio.create_task(_look(ground))
        await _tell_place(trainer, store)
        mark_ready()
        log.info("learner runs from examples@%d, step %d", trainer.next, trainer.learner.model.step)
        switched = asyncio.create_task(moved(client, keys))
        switched.add_done_callback(lambda _: stop.set())
        await _follow(trainer, reading, Steps(producer, topics, lambda f: _metrics(client, keys, f), writing), stop)
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


async def _tell_place(trainer: Trainer, store: ModelStore) -> None:
    """Tell readers of the feed up to where the model is: whoever died between commit and feed left them behind."""
    at = trainer.next
    if at:
        await persist("feed", lambda: store.publish(Delta("step", at, at, (), (), step=trainer.steps, parts=0)))


class Writing:
    """The version that is being written, if one is: one at a time, while learning goes on."""

    def __init__(self, trainer: Trainer, versions: Versions) -> None:
        self._trainer, self._versions = trainer, versions
        self._task: asyncio.Task[None] | None = None
        trainer.made = trainer.made or time.time()

    def begin(self, now: float) -> None:
        """Make a version where one is due; raises what writing the last one raised."""
        if self._task is not None and self._task.done():
            self._task.result()
            self._task = None
        if self._task is None and self._trainer.due(now):
            self._task = asyncio.create_task(self._write(now), name="version")

    async def _write(self, now: float) -> None:
        trainer, began = self._trainer, time.monotonic()
        checkpoint = trainer.checkpoint(now)
        copied = time.monotonic() - began
        about = await persist("version", lambda: self._versions.publish(checkpoint, lambda: trainer.pin))
        trainer.published(about)
        if about.refused:
            log.error("version %d refused: %s", about.version, about.refused)
            return
        log.info(
            "version %d: %d items, %.1f MB; learning stood still for %.3f s, written after %.3f s", about.version,
            about.items, about.bytes / 1e6, copied, time.monotonic() - began,
        )  # fmt: skip

    async def end(self) -> None:
        """Wait a little for what is being written."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=LAST_S)


async def _follow(trainer: Trainer, reading: Reading, steps: Steps, stop: asyncio.Event) -> None:
    """Learn until told to stop: gather records for 50 ms or 64 entries, step every second and at a control."""
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
            if trainer.control is not None or time.monotonic() - stepped >= STEP_S:
                await steps.take(trainer)
                stepped = time.monotonic()
            records = [(offset, value) for offset, value in records if offset >= trainer.next]
            await asyncio.sleep(0)
        if time.monotonic() - stepped >= STEP_S:
            await steps.take(trainer)
            stepped = time.monotonic()
        if reading.at_end(trainer.next):
            await asyncio.sleep(max(0.0, MICRO_BATCH_S - (time.monotonic() - started)))
    await steps.take(trainer)
    await steps.writing.end()


class Steps:
    """What becomes of a step once it is committed: logged, fed, told; then a version, where one is due."""

    def __init__(self, producer: Log, topics: Topics, tell: Tell, writing: Writing) -> None:
        self._producer, self._topics, self._tell, self.writing = producer, topics, tell, writing

    async def take(self, trainer: Trainer) -> None:
        """Take a step, and those of the control records that stand at its end."""
        while (record := await trainer.step()) is not None:
            await self._producer.append(self._topics.steps, [(0, None, trainer.last_record)])
            await trainer.publish(record)
            if record.note:
                log.info("examples@%d, step %d: %s", record.first, record.step, record.note)
            done = trainer.done
            await self._tell(
                {
                    "t": round(time.time(), 3), "step": record.step, "events": done.entered, "joined": done.joined,
                    "lists": done.lists, "encoder_loss": round(done.encoder_loss / max(done.entered, 1), 4),
                    "ranker_loss": round(done.ranker_loss / max(done.lists, 1), 4), "alarms": done.alarms,
                    **judged(done), "next": record.next,
                    "window": len(trainer.learner.window), "learnt_items": trainer.learner.rows.known,
                    "gone": record.gone, "rss_mb": resident_mb(), "refused": trainer.refused,
                    **told_sums(done.sums), **trainer.moved,
                }
            )  # fmt: skip
            self.writing.begin(time.time())


def told_sums(sums: Sums) -> dict[str, float]:
    """Return what a step says of served slates: by policy, and slates, hits, ndcg_sum and reward of all of them."""
    total = Sums()
    for name, amount in sums.items():
        if (what := name.partition("_")[0]) != "alarm":
            total.put("ndcg_sum" if what == "ndcg" else what, amount)
    return {name: round(amount, 5) for name, amount in (total | sums).items()}


def judged(done: Learned) -> dict[str, float]:
    """Return how many shown items were judged since the last step, the clicks predicted of them, those that came.

    Those that came later, of slates judged before, are among them: the probability is that of being chosen at all.
    click_loss: the mean log loss, of what a slate's first outcome says.
    """
    if not done.calibrated and not done.chosen_since:
        return {}
    figures = calibration(done.calibrated)
    chosen = sum(float(chosen.sum()) for _, chosen in done.calibrated) + done.chosen_since
    told = {
        "shown": figures["shown"], "shown_chosen": chosen,
        "shown_predicted": round(sum(float(before.sum()) for before, _ in done.calibrated), 5),
    }  # fmt: skip
    return told | ({"click_loss": round(figures["log_loss"], 5)} if figures["shown"] else {})


async def _metrics(client: Any, keys: Any, fields: dict[str, Any]) -> None:
    try:
        await append_metrics(client, keys.metrics("learner"), fields)
    except StoreUnavailable as error:
        log.debug("metrics: %s", error)
