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

from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD
from models.examples import CodecError
from models.profile import FutureCodecError
from streaming import consumer
from streaming.consumer import TP, Batch, Bounds
from streaming.dead_letters import DeadLetters, Told
from streaming.events import Event, EventError, encode, parse_inlet, short, subject
from streaming.kafka.ground import HOLE, Ground
from streaming.learn import Dead, GapError, Outcome, Part, UserFold, decode_part, rounds, users_of
from streaming.state import RedisUserStore, persist
from streaming.supervision import TRIES, Progress, last_lines, leave, stand
from streaming.topics import INLETS, Log, Record, Topics, partition_of

log = logging.getLogger(__name__)

MICRO_BATCH: Final = 1000
REFUSALS: Final = 5


class FoldError(RuntimeError):
    """The fold of a micro-batch raised `cause`; nothing was written."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(repr(cause))
        self.cause = cause


def poison_reason(user: str, error: Exception) -> str:
    """Return why an event cannot be folded, with the next step."""
    if isinstance(error, CodecError):
        return (
            f"the stored profile of user {short(user)} cannot be read ({error}). Next: `freshet rebuild --switch` makes"
            " it again from the log, then `freshet dead-letters replay` brings this event back"
        )
    return (
        f"its fold raised {type(error).__name__} {TRIES} times, on profile and event of user {short(user)}. Next:"
        " report the traceback; with a build that has the fix, `freshet dead-letters replay` brings this event back.\n"
        + last_lines(error)
    )


class UserAgent:
    """Folds `events` into profiles: read, fold, append `examples`, commit; two Redis round trips a micro-batch."""

    def __init__(
        self, *, topics: Topics, store: RedisUserStore, log_: Log, fold: UserFold, progress: Progress, ground: Ground
    ) -> None:
        self._topics, self._store, self._log, self._progress = topics, store, log_, progress
        self._ground = ground
        self._fold = fold
        self._dead = DeadLetters(log_, topics)
        self._told = Told()

    async def offsets(self, assigned: Bounds) -> dict[TP, int]:
        """Return where each assigned partition of `events` goes on: its applied offset in Redis.

        A letter comes before its commit: who died in between has left letters from there on, which still hold.
        """
        mine = sorted(tp for tp in assigned if tp.topic == self._topics.events)
        reads = await persist("seek", lambda: self._store.read({tp.partition: [] for tp in mine}))
        for tp in mine:
            read = reads[tp.partition]
            await stand(
                self._ground, f"profiles of partition {tp.partition}", read.cluster, {tp: read.applied}, assigned
            )
            self._progress.seek(tp, read.applied)
        self._told = await self._dead.told({tp.partition: reads[tp.partition].applied for tp in mine})
        return {tp: reads[tp.partition].applied for tp in mine}

    async def run(self, batches: AsyncIterator[Batch]) -> None:
        """Fold micro-batches as they come."""
        async for batch in batches:
            await self.apply(batch)

    async def apply(self, batch: Batch) -> None:
        """Fold one micro-batch and commit it, reading again where another worker was quicker."""
        aside, letters = self._told.aside, self._told.letters
        parts = [
            decode_part(tp.topic, tp.partition, records).without(aside.get(tp.partition, frozenset()))
            for tp, records in batch.items()
        ]
        fresh = [dead for part in parts for dead in part.dead if dead.offset not in letters.get(part.partition, ())]
        await self._dead.send(fresh)
        self._progress.dead += len(fresh)
        for piece in rounds(parts):
            await self._settle(piece)

    async def _settle(self, parts: list[Part]) -> None:
        """Commit parts; where their fold raises three times, all of them but the events that make it raise."""
        error = await self._tried(parts, TRIES)
        if error is None:
            return
        if len(parts) > 1:
            for part in parts:
                await self._settle([part])
        else:
            await self._without_poison(parts[0])

    async def _without_poison(self, part: Part) -> None:
        """Commit halves of a part whose fold raises, down to the events that cannot be folded; those are set aside."""
        single = len(part.events) == 1
        error = await self._tried([part], TRIES if single else 1)
        if error is None:
            return
        if not part.events:  # nothing to set aside: what is stored beside the profiles is damaged
            leave(EXIT_AGAIN, f"events[{part.partition}]@{part.first}: {last_lines(error)}")
        if not single:
            for half in part.cut(part.offsets[len(part.offsets) // 2]):
                await self._without_poison(half)
            return
        (user,), event, at = part.subjects(), part.events[0], part.offsets[0]
        dead = Dead(self._topics.events, part.partition, at, poison_reason(user, error), encode(event))
        log.error("events[%d]@%d is set aside, of user %s: %r", part.partition, at, short(user), type(error).__name__)
        await self._dead.send([dead])
        self._progress.poisoned += 1
        self._progress.dead += 1
        await self._commit([Part(part.partition, part.first, part.next)])

    async def _tried(self, parts: list[Part], times: int) -> Exception | None:
        """Commit parts, up to so often; return what their fold raised the last time, None where all is committed."""
        raised: Exception | None = None
        for _ in range(times):
            try:
                await self._commit(parts)
                return None
            except FoldError as error:
                raised = error.cause
                log.warning("fold of %s raised: %r", [(p.partition, p.first, p.next) for p in parts], raised)
        return raised

    async def _commit(self, parts: list[Part]) -> None:
        for _ in range(REFUSALS):
            parts = await self._attempt(parts)
            if not parts:
                return
        leave(EXIT_AGAIN, f"commit refused {REFUSALS} times: another worker folds the same partition")

    async def _attempt(self, parts: list[Part]) -> list[Part]:
        """Read, fold, append, commit; return the parts whose commit was refused."""
        outcome, records, derived = self._folded(
            parts, await persist("read", lambda: self._store.read(users_of(parts)))
        )
        if derived:  # first: what `examples` covers is folded by a rebuild, which derives nothing again
            await self._log.append(self._topics.events, derived)
        if records:
            await self._log.append(self._topics.examples, records)
        refused = await persist("commit", lambda: self._store.commit(outcome.writes, self._ground.stamp))
        self._count(parts, outcome, refused)
        for part, stored in zip(parts, refused, strict=True):
            if stored is not None:
                log.warning("commit of events[%d] refused: stored %d", part.partition, stored)
        return [part for part, stored in zip(parts, refused, strict=True) if stored is not None]

    def _folded(self, parts: list[Part], reads: dict[int, Any]) -> tuple[Outcome, list[Record], list[Record]]:
        """Fold; return what came of it with the records of `examples` and of the log. Raises FoldError."""
        try:
            outcome = self._fold.fold(parts, reads)
            records: list[Record] = [(0, None, entries.to_bytes()) for entries in outcome.records]
            return outcome, records, [record_of(event, self._topics) for event in outcome.derived]
        except FutureCodecError as error:
            leave(EXIT_FOR_GOOD, str(error))
            raise
        except GapError as error:
            if self._lacks(parts, reads):
                leave(EXIT_FOR_GOOD, f"{error}. Still so right after a seek. {HOLE}")
            leave(EXIT_AGAIN, f"{error}. Starting again from what is committed")
            raise
        except Exception as error:
            raise FoldError(error) from error

    def _lacks(self, parts: list[Part], reads: dict[int, Any]) -> bool:
        """Whether the log itself has a gap: right after a seek, to an offset that Redis still holds."""
        progress = self._progress
        return any(
            (tp := TP(self._topics.events, part.partition)) in progress.fresh_after_seek
            and part.first > reads[part.partition].applied == progress.next[tp]
            for part in parts
        )

    def _count(self, parts: list[Part], outcome: Outcome, refused: list[int | None]) -> None:
        now_ms = time.time() * 1000
        for part, stored in zip(parts, refused, strict=True):
            if stored is None:
                self._progress.move(TP(self._topics.events, part.partition), part.next)
                self._progress.ages_ms += [now_ms - record_ms for record_ms in part.times[:200]]
                self._progress.kinds.update(type(event).__name__.lower() for event in part.events)
                pairs = zip(part.times[:200], part.events[:200], strict=False)
                self._progress.skews_s += [record_ms / 1000 - event.ts for record_ms, event in pairs]
        self._progress.events += outcome.applied
        self._progress.duplicates += outcome.duplicates
        self._progress.erased += outcome.erased
        self._progress.overflow += outcome.overflow


def record_of(event: Event, topics: Topics) -> Record:
    """Return the record of an event in the log: keyed by the user whose profile it is folded into."""
    user = subject(event)
    return partition_of(user, topics.partitions), user.encode(), encode(event)


class InletAgent:
    """Validates the JSON of one inlet and appends it to `events` with its source position; it has no state."""

    def __init__(self, inlet: str, *, topics: Topics, log_: Log, progress: Progress) -> None:
        self._inlet, self._topics, self._log, self._progress = inlet, topics, log_, progress
        self._dead = DeadLetters(log_, topics)

    async def offsets(self, assigned: Bounds, committed: dict[TP, int]) -> dict[TP, int]:
        """Return where to go on instead, for partitions whose committed offset is gone; what went unread is told."""
        moved: dict[TP, int] = {}
        for tp, (first, end) in assigned.items():
            at = committed.get(tp, first)
            if at < first:
                reason = (
                    f"{first - at} records, up to offset {first - 1}, were deleted by retention before a worker read"
                    " them: run workers, or raise FRESHET_RETENTION_INLETS_DAYS"
                )
                await self._dead.send([Dead(tp.topic, tp.partition, at, reason, b"")])
            elif at > end:
                log.warning("%s[%d] ends at %d, was read up to %d: it was made again", tp.topic, tp.partition, end, at)
            if not first <= at <= end:
                moved[tp] = at = first
            self._progress.seek(tp, at, markers=True)
        return moved

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
                    records.append(record_of(event, self._topics))
            await self._dead.send(dead)
            self._progress.dead += len(dead)
            if records:
                await self._log.append(self._topics.events, records)
            for tp, found in batch.items():
                self._progress.move(tp, found[-1][0] + 1)


def inlet_agents(topics: Topics, log_: Log, progress: Progress) -> dict[str, InletAgent]:
    """Return the inlet agents by topic."""
    return {topics.inlet(name): InletAgent(name, topics=topics, log_=log_, progress=progress) for name in INLETS}


def attach(app: Any, topic: str, run: Callable[[AsyncIterator[Batch]], Any]) -> None:
    """Make `run` the agent of a topic: the same body on chunks and on stock."""

    async def agent(stream: Any) -> None:
        await run(consumer.batches(stream, MICRO_BATCH))

    app.agent(consumer.bytes_topic(app, topic), name=topic, concurrency=1)(agent)
