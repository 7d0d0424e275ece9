"""The agents of the log: inlets -> `events`, `events` -> profiles. A few lines each around the pure folds.

Delivery is at least once; effects are exactly once, because each agent's next offset lies in Redis beside the state it
belongs to and is written with it (DESIGN section 3). Two roles, each a process: "users" (inlets and the user agent;
as many as there are partitions), "items" (streaming/item_agent.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD
from streaming import consumer
from streaming.consumer import TP, Batch
from streaming.dead_letters import DeadLetters
from streaming.events import EventError, Weights, encode, parse_inlet
from streaming.learn import Dead, Embed, GapError, Outcome, Part, UserFold, decode_part, users_of
from streaming.state import RedisUserStore, persist
from streaming.supervision import Progress, leave
from streaming.topics import INLETS, Log, Record, Topics, partition_of

log = logging.getLogger(__name__)

MICRO_BATCH: Final = 1000
REFUSALS: Final = 5


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
