"""Topics, partitions, position tokens, and the one producer that appends to them.

Knows nothing about what the records mean. Partition of a user = murmur2(user id), computed here and passed explicitly,
because clients' default partitioners differ and a user must have one home (FAUST and PATH notes; Java's default).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, for_code
from aiokafka.partitioner import murmur2

from infra.settings import Settings
from streaming.kafka.address import client_options as client_options
from streaming.kafka.metadata import MetadataOf, uuid_text

log = logging.getLogger(__name__)

INLETS: Final = ("clicks", "dwells", "ratings", "actions", "views")
MAX_MESSAGE_BYTES: Final = 1_048_576
_ALREADY_EXISTS = 36
Record = tuple[int, bytes | None, bytes]
"""(partition, key, value)"""


LogError = KafkaError


class TopicsError(RuntimeError):
    """Topics are missing or not as this deployment expects them; the message names the next step."""


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one namespace; `partitions` is that of the log and the inlets, the others have one."""

    namespace: str = "fr"
    partitions: int = 8
    retention_inlets_days: int = 7

    @property
    def events(self) -> str:
        """The log: every event, keyed by user; partition order is the only order the folds know."""
        return f"{self.namespace}.events"

    @property
    def examples(self) -> str:
        """What the user agents derive: one partition, one total order, no user ids."""
        return f"{self.namespace}.examples"

    @property
    def items(self) -> str:
        """The catalogue, compacted, keyed by item id."""
        return f"{self.namespace}.items"

    @property
    def steps(self) -> str:
        """The learner's steps: lineage, offset ranges, micro-batch sizes, seed."""
        return f"{self.namespace}.steps"

    @property
    def dead_letters(self) -> str:
        """What could not be read, with its reason and its original bytes."""
        return f"{self.namespace}.dead-letters"

    @property
    def truth(self) -> list[str]:
        """The topics that state is folded from."""
        return [self.events, self.examples, self.items]

    def inlet(self, name: str) -> str:
        """The inlet for one type of event from any Kafka client, JSON."""
        return f"{self.namespace}.{name}"

    def inlet_of(self, topic: str) -> str:
        """The inlet's short name of a full topic name."""
        return topic.removeprefix(f"{self.namespace}.")

    def specs(self) -> dict[str, tuple[int, dict[str, str]]]:
        """Topic -> (partitions, configuration)."""
        stamped = {"message.timestamp.type": "LogAppendTime"}
        kept = {**stamped, "retention.ms": "-1"}
        inlets = {**stamped, "retention.ms": str(self.retention_inlets_days * 86_400_000)}
        return {
            self.events: (self.partitions, kept),
            self.examples: (1, kept),
            self.items: (1, {**stamped, "cleanup.policy": "compact"}),
            self.steps: (1, kept),
            self.dead_letters: (1, kept),
            **{self.inlet(name): (self.partitions, inlets) for name in INLETS},
        }


def topics_of(settings: Settings) -> Topics:
    """Return the topics of these settings."""
    return Topics(settings.namespace, settings.partitions, int(settings.retention_inlets_days))


@lru_cache(maxsize=65_536)
def partition_of(user_id: str, partitions: int) -> int:
    """Return the partition of a user: Java's default, murmur2 of the utf-8 key."""
    return int((murmur2(user_id.encode()) & 0x7FFFFFFF) % partitions)


async def create_topics(bootstrap: str, topics: Topics) -> None:
    """Create the topics that are not there and wait until the brokers know them; raises what Kafka answers."""
    admin = AIOKafkaAdminClient(**client_options(bootstrap))
    try:
        await admin.start()
        wanted = [NewTopic(n, p, 1, topic_configs=configs) for n, (p, configs) in topics.specs().items()]
        response = await admin.create_topics(wanted)
        for name, code, message in (error[:3] for error in response.topic_errors):
            if code not in (0, _ALREADY_EXISTS):
                raise for_code(code)(f"creating topic {name}: {message}")
    finally:
        await admin.close()
    for pause in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        await asyncio.sleep(pause)
        if all(partitions for partitions, _ in (await describe(bootstrap, list(topics.specs())))[1].values()):
            break


async def describe(bootstrap: str, names: Sequence[str]) -> tuple[str, dict[str, tuple[int, str]]]:
    """Return (cluster id, topic -> (partitions, topic id)); a missing topic has 0 partitions. Needs Kafka 2.8."""
    admin = AIOKafkaAdminClient(**client_options(bootstrap), request_timeout_ms=10_000)
    try:
        await admin.start()
        return _described(await admin._send_request(MetadataOf(names)), names)
    finally:
        await admin.close()


def _described(answer: Any, names: Sequence[str]) -> tuple[str, dict[str, tuple[int, str]]]:
    found = {name: (0 if code else len(places), uuid_text(uuid)) for code, name, uuid, _, places, *_ in answer.topics}
    return str(answer.cluster_id), {name: found.get(name, (0, "")) for name in names}


async def epoch(bootstrap: str, topics: Topics) -> str:
    """Return what state is folded from: `<cluster id>/<partitions>/<ids of events, examples, items>`.

    A topic that is deleted and made again keeps its name and begins again at offset 0, under another id. Raises
    TopicsError where a topic is missing.
    """
    return _epoch(*await describe(bootstrap, topics.truth), topics)


def _epoch(cluster: str, found: dict[str, tuple[int, str]], topics: Topics) -> str:
    if missing := [name for name, (partitions, _) in found.items() if not partitions]:
        raise TopicsError(f"no such topic: {', '.join(missing)}. `freshet up` creates the topics of a namespace.")
    return "/".join([cluster, str(found[topics.events][0]), *(found[name][1] for name in topics.truth)])


def moved(stored: str, now: str) -> str:
    """Return what differs between the epoch that state was folded from and today's, "" where nothing does.

    The version before wrote the cluster and the partitions only: what it did not write is not compared.
    """
    names = ("another cluster", "another number of partitions", "`events` was made again", "`examples` was made again",
             "`items` was made again")  # fmt: skip
    pairs = zip(names, stored.split("/"), now.split("/"), strict=False)
    return "; ".join(f"{what} (was {a}, is {b})" for what, a, b in pairs if stored and a != b)


async def end_offsets(bootstrap: str, partitions: dict[str, int]) -> dict[str, list[int]]:
    """Return topic -> its end offset by partition, for topics with that many partitions."""
    places = [TopicPartition(name, p) for name, count in partitions.items() for p in range(count)]
    consumer = AIOKafkaConsumer(**client_options(bootstrap))
    try:
        await consumer.start()
        ends = await consumer.end_offsets(places)
    finally:
        await consumer.stop()
    return {name: [ends[TopicPartition(name, p)] for p in range(count)] for name, count in partitions.items()}


class Ends:
    """Asks for the ends of partitions, over a connection of its own that stays."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._consumer: AIOKafkaConsumer | None = None

    async def __call__(self, places: Iterable[tuple[str, int]]) -> dict[Any, int]:
        """Return the end of each (topic, partition); raises LogError where the broker does not answer within 5 s."""
        try:
            if self._consumer is None:
                self._consumer = AIOKafkaConsumer(**client_options(self._bootstrap), request_timeout_ms=5000)
                await self._consumer.start()
            wanted = {TopicPartition(*place): place for place in places}
            found = await self._consumer.end_offsets(list(wanted)) if wanted else {}
        except LogError:
            await self.stop()  # a connection that is open on this side only would be asked again for ever
            raise
        return {wanted[place]: end for place, end in found.items()}

    async def stop(self) -> None:
        """Disconnect."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await consumer.stop()


async def topic_end(bootstrap: str, topic: str) -> int:
    """Return the end of a topic of one partition."""
    consumer = AIOKafkaConsumer(**client_options(bootstrap))
    try:
        await consumer.start()
        (end,) = (await consumer.end_offsets([TopicPartition(topic, 0)])).values()
        return int(end)
    finally:
        await consumer.stop()


async def read_topic(bootstrap: str, topic: str, ends: dict[int, int]) -> AsyncIterator[tuple[int, list[Any]]]:
    """Yield (partition, records) of a topic from its beginning up to, not including, `ends`."""
    async for found in read_span(bootstrap, topic, {p: (0, end) for p, end in ends.items()}, reset="earliest"):
        yield found


async def read_span(
    bootstrap: str, topic: str, spans: Mapping[int, tuple[int, int]], *, reset: str = "none"
) -> AsyncIterator[tuple[int, list[Any]]]:
    """Yield (partition, records) of a topic within [first, end) by partition.

    Where `first` is there no more, "none" raises what Kafka's client raises and "earliest" goes on from what is.
    """
    left = {TopicPartition(topic, p): end for p, (first, end) in spans.items() if end > first}
    if not left:
        return
    consumer = AIOKafkaConsumer(
        **client_options(bootstrap), auto_offset_reset=reset, fetch_max_bytes=16 << 20,
        max_partition_fetch_bytes=4 << 20,
    )  # fmt: skip
    try:
        await consumer.start()
        consumer.assign(list(left))
        for tp in left:
            consumer.seek(tp, spans[tp.partition][0])
        while left:
            for tp, records in (await consumer.getmany(*left, timeout_ms=1000)).items():
                wanted = records if records[-1].offset < left[tp] else [r for r in records if r.offset < left[tp]]
                if wanted:
                    yield tp.partition, wanted
                if records[-1].offset >= left[tp] - 1:
                    del left[tp]
    finally:
        await consumer.stop()


async def preflight(bootstrap: str, topics: Topics) -> str:
    """Check that all topics exist with the expected partitions; return the cluster's id. Raises TopicsError.

    A missing topic leaves a Kafka client waiting in silence, so every process asks first.
    """
    cluster, found = await describe(bootstrap, list(topics.specs()))
    wrong = [
        f"{name}: expected {partitions} partition(s), got {found[name][0] or 'no such topic'}"
        for name, (partitions, _) in topics.specs().items()
        if found[name][0] != partitions
    ]
    if wrong:
        raise TopicsError(
            "; ".join(wrong) + f". `freshet up` creates the topics of namespace {topics.namespace!r};"
            " on your own cluster create them so, or set FRESHET_NAMESPACE or FRESHET_PARTITIONS to what is there."
        )
    return cluster


class Log:
    """The producer: idempotent, acks=all, records of one call to one partition in one batch and in order."""

    def __init__(self, bootstrap: str, *, linger_ms: int = 0) -> None:
        self.bootstrap, self._linger_ms = bootstrap, linger_ms
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect."""
        producer = AIOKafkaProducer(
            **client_options(self.bootstrap), acks="all", enable_idempotence=True, linger_ms=self._linger_ms,
            max_request_size=MAX_MESSAGE_BYTES, max_batch_size=262_144, request_timeout_ms=30_000,
        )  # fmt: skip
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        self._producer = producer

    async def ping(self) -> None:
        """Ask the cluster for its topics; raises LogError where it does not answer."""
        if self._producer is None:
            raise LogError("not connected")
        await self._producer.client.fetch_all_metadata()

    @property
    def broken(self) -> bool:
        """Whether its sending ended for good, as an idempotent producer's does at an error that it cannot place.

        Only a new producer helps then: `stop`, `start`.
        """
        task = None if self._producer is None else self._producer._sender.sender_task
        return task is not None and task.done()

    async def epoch(self, topics: Topics) -> str:
        """Return `epoch` over the connection that is there; raises LogError, TopicsError."""
        if self._producer is None:
            raise LogError("not connected")
        client = self._producer.client
        return _epoch(
            *_described(await client.send(client.get_random_node(), MetadataOf(topics.truth)), topics.truth), topics
        )

    async def stop(self) -> None:
        """Send what is pending and disconnect."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            await producer.stop()
        except asyncio.CancelledError:  # whoever waits has no more time: what is pending is lost, nothing stays open
            self._producer = producer
            await self.drop()
            raise

    async def drop(self) -> None:
        """Disconnect at once; what is pending fails with LogError, and may or may not have been stored."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        if producer._sender.sender_task is not None:
            producer._sender.sender_task.cancel()
        producer._message_accumulator.fail_all(LogError("the connection was given up"))
        await producer.client.close()
        await producer.stop()

    async def append(self, topic: str, records: Iterable[Record]) -> dict[int, int]:
        """Append records; return partition -> highest offset once every one is acknowledged by all replicas."""
        futures = await self.submit(topic, records)
        last: dict[int, int] = {}
        for metadata, count in await asyncio.gather(*futures):
            last[metadata.partition] = max(last.get(metadata.partition, -1), metadata.offset + count - 1)
        return last

    async def submit(self, topic: str, records: Iterable[Record]) -> list[asyncio.Future[tuple[Any, int]]]:
        """Hand records over in order and return futures of their acknowledgements."""
        if self._producer is None:
            raise LogError("not connected")
        by_partition: dict[int, list[tuple[bytes | None, bytes]]] = defaultdict(list)
        for partition, key, value in records:
            by_partition[partition].append((key, value))
        futures: list[asyncio.Future[tuple[Any, int]]] = []
        for partition, pairs in by_partition.items():
            if len(pairs) == 1:
                key, value = pairs[0]
                future = await self._producer.send(topic, value=value, key=key, partition=partition)
                futures.append(_counting(future, 1))
                continue
            futures += await self._send_batches(topic, partition, pairs)
        return futures

    async def _send_batches(
        self, topic: str, partition: int, pairs: list[tuple[bytes | None, bytes]]
    ) -> list[asyncio.Future[tuple[Any, int]]]:
        producer = self._producer
        assert producer is not None
        futures: list[asyncio.Future[tuple[Any, int]]] = []
        at = 0
        while at < len(pairs):
            batch, count = producer.create_batch(), 0
            while at < len(pairs) and batch.append(key=pairs[at][0], value=pairs[at][1], timestamp=None) is not None:
                at, count = at + 1, count + 1
            if not count:  # larger than a batch: alone it may still pass the broker's limit
                key, value = pairs[at]
                future, at, count = await producer.send(topic, value=value, key=key, partition=partition), at + 1, 1
            else:
                future = await producer.send_batch(batch, topic, partition=partition)
            futures.append(_counting(future, count))
        return futures


def _counting(future: asyncio.Future[Any], count: int) -> asyncio.Future[tuple[Any, int]]:
    """Return the acknowledgement with its count; one that nobody waits for any more may fail in peace."""
    task = asyncio.ensure_future(_counted(future, count))
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


async def _counted(future: asyncio.Future[Any], count: int) -> tuple[Any, int]:
    try:
        return await future, count
    except asyncio.CancelledError:
        if future.cancelled():  # by the client's own ending: to us a failed delivery, not a word to end
            raise LogError("the producer gave the record up") from None
        raise


class TokenError(ValueError):
    """A position token that this deployment did not write."""


def encode_token(offsets: dict[int, int]) -> str:
    """Return the position token of `events`: base64url of {partition: highest offset}."""
    text = json.dumps({str(p): o for p, o in sorted(offsets.items())}, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@dataclass(frozen=True, slots=True)
class Position:
    """What a token says: offsets of `events` by partition, or one record of an inlet."""

    events: dict[int, int]
    inlet: tuple[str, int, int] | None = None


def decode_token(token: str) -> Position:
    """Read a position token, or `<inlet>:<partition>:<offset>`; raises TokenError."""
    wrong = TokenError(f"after: expected a position token or <inlet>:<partition>:<offset>, got {token[:60]!r}")
    if ":" in token:
        inlet, _, rest = token.partition(":")
        partition, _, offset = rest.partition(":")
        if inlet not in INLETS or not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,19}", rest):
            raise wrong
        return Position({}, (inlet, int(partition), int(offset)))
    try:
        loaded = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
        return Position({int(p): int(o) for p, o in loaded.items()})
    except (ValueError, binascii.Error, AttributeError, TypeError, RecursionError) as error:
        raise wrong from error
