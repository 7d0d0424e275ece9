"""How records reach an agent: whole per-partition lists ("chunks"), or Faust's own `take_events` ("stock").

Faust spends about 60 us on each message of a stream; handing over the lists that a fetch returned costs 3 us. The
classes here override private methods of faust-streaming 0.15.3 (pinned; tests check that the names exist). Knows
nothing about what the records mean. The only module that imports faust.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import faust
from faust.assignor.partition_assignor import PartitionAssignor
from faust.streams import Stream
from faust.transport.drivers.aiokafka import Consumer
from faust.types import TP as TP

from streaming.kafka.address import client_options, servers

log = logging.getLogger(__name__)

Record = tuple[int, int, bytes]
"""(offset, record time in ms, value)"""
Batch = dict[TP, list[Record]]
"""A micro-batch: records in order by partition."""
Bounds = dict[TP, tuple[int, int]]
"""Assigned partition -> its first offset and its end."""
Seek = Callable[[Bounds, dict[TP, int]], Awaitable[dict[TP, int]]]
"""Says where to go on, given the assigned partitions and Kafka's committed offsets; only where that is elsewhere."""

QUEUED_CHUNKS = 64
REBALANCE_S = 12
"""The group waits so long for a member that sends heartbeats and does not rejoin, s; Faust's default is 60."""
GATHER_S = 0.003
"""Wait for the other partitions' chunks: most of a small micro-batch's cost is its round trips, s."""


@dataclass(slots=True)
class Chunk:
    """What one fetch returned of one partition, in the consumer generation it was fetched in."""

    tp: TP
    records: list[Any]
    generation: int


class SeekingConsumer(Consumer):  # type: ignore[misc]
    """A consumer that goes on from the offsets `app.seek_to` names, after each assignment."""

    async def perform_seek(self) -> None:
        """Seek to Kafka's committed offsets, then to the authority's."""
        await super().perform_seek()
        assigned = sorted(self.assignment())
        first, ends = await self.earliest_offsets(*assigned), await self.highwaters(*assigned)
        committed = {tp: offset for tp in assigned if (offset := self._read_offset.get(tp)) is not None}
        # Where nothing is committed Kafka's client seeks nowhere: what it read and a rebalance dropped would be lost.
        start = {tp: first[tp] for tp in assigned if not committed.get(tp)}
        offsets = start | await self.app.seek_to({tp: (first[tp], ends[tp]) for tp in assigned}, committed)
        await self.seek_wait(offsets)
        for tp, offset in offsets.items():
            # Otherwise Faust waits for the gap between its own committed offset and this one to close.
            self._read_offset[tp] = self._committed_offset[tp] = offset or None

    async def _wait_next_records(self, timeout: float) -> tuple[Any, Any]:
        if self.flow_active and not self.app.client_only and not self._get_active_partitions():
            await asyncio.sleep(0.005)  # stock sleeps a whole second under back-pressure
            return {}, set()
        result: tuple[Any, Any] = await super()._wait_next_records(timeout)
        return result


class ChunkConsumer(SeekingConsumer):
    """A consumer that hands over chunks instead of messages; one agent a topic."""

    _done: dict[TP, int]

    async def _drain_messages(self, fetcher: Any) -> None:
        self._done = {}
        try:
            while not (self._stopped.is_set() or fetcher._stopped.is_set()):
                records, _ = await self._wait_next_records(1.0)
                # Read after the fetch: before it, a rebalance in between would lose what was fetched.
                generation = self.app.consumer_generation_id
                if not records:
                    await asyncio.sleep(0)
                elif not self.flow_active:
                    await self.perform_seek()
                else:
                    for tp, found in records.items():
                        await self._hand_over(TP(tp.topic, tp.partition), found, generation)
        except self.consumer_stopped_errors:
            if not self.app.should_stop:
                raise
        except asyncio.CancelledError:
            if not self.app.should_stop:
                raise

    async def _hand_over(self, tp: TP, records: list[Any], generation: int) -> None:
        read = self._read_offset[tp]
        if read:
            records = [record for record in records if record.offset >= read]
        if not records:
            return
        self._read_offset[tp] = records[-1].offset + 1
        (channel,) = self.app.topics._topic_name_index[tp.topic]
        queue = channel.queue
        while queue.qsize() > QUEUED_CHUNKS and generation == self.app.consumer_generation_id:
            if self._stopped.is_set():
                return
            await asyncio.sleep(0.002)
        queue.put_nowait(Chunk(tp, records, generation))

    def done(self, tp: TP, following: int) -> None:
        """Say that records below `following` are dealt with: what the next commit to Kafka writes."""
        self._done[tp] = following

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> list[TP]:
        return list(getattr(self, "_done", {}))

    def _new_offset(self, tp: TP) -> int | None:
        return self._done.pop(tp, None)


class ChunkStream(Stream):  # type: ignore[misc]
    """A stream that yields micro-batches made of whole chunks."""

    async def chunk_batches(self, limit: int) -> AsyncIterator[Batch]:
        """Yield micro-batches of at most `limit` records, of all partitions that have some waiting."""
        self._finalized = True
        await self.maybe_start()
        queue, app, rest = self.channel.queue, self.app, deque[Chunk]()
        while not self.should_stop:
            try:
                if not rest:
                    rest.append(await queue.get())
                    await asyncio.sleep(GATHER_S)
                while not queue.empty() and sum(len(chunk.records) for chunk in rest) < limit:
                    rest.append(queue.get_nowait())
            except StopAsyncIteration:  # thrown in at shutdown
                return
            batch = _take(rest, limit, app.consumer_generation_id)
            if not batch:
                continue
            generation = app.consumer_generation_id
            yield batch
            if generation == app.consumer_generation_id:
                for tp, records in batch.items():
                    app.consumer.done(tp, records[-1][0] + 1)


def _take(rest: deque[Chunk], limit: int, generation: int) -> Batch:
    batch: Batch = {}
    room = limit
    while rest and room:
        chunk = rest[0]
        if chunk.generation != generation:  # of a partition that may be another's by now
            rest.popleft()
            continue
        taken = chunk.records[:room]
        batch.setdefault(chunk.tp, []).extend((r.offset, r.timestamp, r.value or b"") for r in taken)
        room -= len(taken)
        if len(taken) == len(chunk.records):
            rest.popleft()
        else:
            chunk.records = chunk.records[len(taken) :]
    return batch


async def stock_batches(stream: Any, limit: int) -> AsyncIterator[Batch]:
    """Yield micro-batches from Faust's own `take_events`: slower, all public interfaces."""
    async for events in stream.take_events(limit, within=0.01):
        batch: Batch = {}
        for event in events:
            message = event.message
            record = (message.offset, round(message.timestamp * 1000), message.value or b"")
            batch.setdefault(message.tp, []).append(record)
        yield batch


def batches(stream: Any, limit: int) -> AsyncIterator[Batch]:
    """Yield micro-batches in the form that the app was built for."""
    if isinstance(stream, ChunkStream):
        return stream.chunk_batches(limit)
    return stock_batches(stream, limit)


class MissingTopicsError(RuntimeError):
    """The broker's metadata lacks topics of this group, which were there when this process started."""


class WholeAssignor(PartitionAssignor):  # type: ignore[misc]
    """Assigns every topic of the group or none.

    Faust's own leaves out a topic that the leader's metadata lacks, as it does for a moment after a broker's start;
    nobody then reads that topic until the next rebalance, which may be never.
    """

    def assign(self, cluster: Any, member_metadata: Any) -> Any:
        """Return the assignment of each member; hands a missing topic to the app's `on_crash`."""
        topics = {topic for member in member_metadata.values() for topic in member.subscription}
        missing = sorted(topic for topic in topics if not cluster.partitions_for_topic(topic))
        if missing:
            self.app.on_missing(MissingTopicsError(f"no metadata of {', '.join(missing)}"))
        return super().assign(cluster, member_metadata)


def create_app(
    name: str, *, kafka: str, form: str, instance: str, seek: Seek, on_crash: Callable[[str, BaseException], None]
) -> Any:
    """Return a Faust app without web server, tables, leader topic or topic declaration; nothing connects yet.

    `form` is "chunks" or "stock"; `instance` the static member id of this worker slot; `on_crash` must not return,
    for Faust would leave a crashed agent dead in a live process.
    """

    class App(faust.App):  # type: ignore[misc]
        async def _on_agent_error(self, agent: Any, exc: BaseException) -> None:
            on_crash(str(agent.name), exc)

        def _create_directories(self) -> None:
            """Faust would make folders in the working directory; no table of ours lies in one."""

    app = App(
        name, broker=";".join(f"kafka://{host}:{port}" for host, port in servers(kafka)), store="memory://",
        broker_credentials=_credentials(client_options(kafka)),
        topic_disable_leader=True, topic_allow_declare=False, consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=instance, stream_wait_empty=False, stream_buffer_maxsize=4096,
        broker_session_timeout=6, broker_heartbeat_interval=2,
        broker_rebalance_timeout=REBALANCE_S, broker_request_timeout=30, broker_commit_interval=2.8,
        web_enabled=False, PartitionAssignor=WholeAssignor, **({"Stream": ChunkStream} if form == "chunks" else {}),
    )  # fmt: skip
    app.seek_to, app.on_missing = seek, lambda error: on_crash("the group", error)
    app.transport.Consumer = ChunkConsumer if form == "chunks" else SeekingConsumer
    return app


def _credentials(options: dict[str, Any]) -> Any:
    """Return the TLS and SASL options of any client in Faust's own words."""
    context = options.get("ssl_context")
    if "sasl_mechanism" in options:
        return faust.SASLCredentials(
            username=options["sasl_plain_username"], password=options["sasl_plain_password"],
            mechanism=options["sasl_mechanism"], ssl_context=context,
        )  # fmt: skip
    return faust.SSLCredentials(context) if context else None


class Member:
    """An app as its watchdog sees it: is it in its group, do its agents live, how far do its partitions go."""

    def __init__(self, app: Any) -> None:
        self._app = app

    @property
    def crashed(self) -> str:
        """What ended the consumer, "" while it runs."""
        return repr(self._app.crash_reason) if self._app.crashed else ""

    def assignment(self) -> set[TP]:
        """The partitions that are this process's now."""
        return set(self._app.consumer.assignment())

    def ends(self) -> dict[TP, int]:
        """Return the ends of the assigned partitions as the last fetch told them."""
        ends: dict[TP, int] = {}
        for tp in self.assignment():
            try:
                ends[tp] = self._app.consumer.highwater(tp) or 0
            except (AssertionError, KeyError):  # a rebalance has moved it since: aiokafka asserts
                continue
        return ends

    def queued(self) -> int:
        """Return how many fetches wait for the agents, QUEUED_CHUNKS a topic at most (stock: messages, 4,096)."""
        channels = {channel for found in self._app.topics._topic_name_index.values() for channel in found}
        return sum(int(channel.queue.qsize()) for channel in channels)

    def dead_agents(self) -> list[str]:
        """Return the names of agents that no task runs; Faust itself does not look."""
        agents = self._app.agents.values()
        tasks = {str(agent.name): [actor.actor_task for actor in agent._actors] for agent in agents}
        return [name for name, found in tasks.items() if all(task is None or task.done() for task in found)]

    def astray(self) -> str:
        """Return what keeps this process from being a member of its group, "" where it is one.

        aiokafka waits for its user to fetch an error of the group before it goes on; Faust never does.
        """
        coordinator = self._app.consumer._thread._consumer._coordinator
        if coordinator._coordination_task.done():
            return "the task that keeps this process in its group has ended"
        if coordinator._pending_exception is not None:
            return f"the group's coordinator refused this process: {coordinator._pending_exception}"
        if coordinator.generation < 0 or coordinator._rejoin_needed_fut.done():
            return "this process is in no generation of its group: a rebalance does not end"
        return ""


def bytes_topic(app: Any, name: str) -> Any:
    """Return a topic whose records reach the agent as the bytes they are."""
    return app.topic(name, value_type=bytes, value_serializer="raw", key_type=bytes, key_serializer="raw")
