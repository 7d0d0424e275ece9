"""How a worker is watched: how far each partition is folded, when it stops moving, how a process ends.

Knows nothing about what is folded.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD, FRESH, resident_mb
from streaming.kafka.ground import Ground, GroundError
from streaming.state import Keys, StoreUnavailable, append_metrics
from streaming.topics import LogError

if TYPE_CHECKING:
    from streaming.consumer import TP, Member  # the learner needs no faust

log = logging.getLogger(__name__)

TRIES: Final = 3
"""So often a fold may raise before the event or record that makes it raise is set aside."""
STALLED_S: Final = 15.0
"""A topic with records waiting whose partitions all made no progress for so long is stuck, s."""
TURN_S: Final = 120.0
"""The same for one partition while others go on: a backlog is folded one partition after the other, s."""
HUNG_S: Final = 20.0
"""An event loop that did not turn for so long hangs, s."""
LOOK_EVERY_S: Final = 2.0


def last_lines(error: BaseException, limit: int = 8) -> str:
    """Return the last lines of an error's traceback: what a dead letter tells of a fold that raised."""
    return "\n".join("".join(traceback.format_exception(error)).rstrip().splitlines()[-limit:])[-2000:]


def leave(status: int, reason: str) -> None:
    """Say why, then end this process at once: nothing may be produced or committed after what just failed."""
    log.critical("%s", reason)
    print(f"freshet: {reason}", file=sys.__stderr__, flush=True)
    os._exit(status)


async def stand(ground: Ground, what: str, stored: str, applied: Mapping[TP, int], bounds: Mapping[TP, Any]) -> None:
    """End this process for good unless what is stored belongs to the log that it would go on with."""
    try:
        await ground.check(what, stored, applied, bounds)
    except GroundError as error:
        leave(EXIT_FOR_GOOD, str(error))


class Progress:
    """How far each partition is folded here and when it last moved: what the watchdog and the metrics read."""

    def __init__(self) -> None:
        self.next: dict[TP, int] = {}
        self.moved: dict[TP, float] = {}
        self.waits_since: dict[TP, float] = {}
        self.fresh_after_seek: set[TP] = set()
        self.markers: set[TP] = set()
        self.events = self.duplicates = self.dead = self.overflow = self.poisoned = 0
        self.erased = 0
        self.ages_ms: list[float] = []
        self.kinds: Counter[str] = Counter()
        """Events folded by their type, repeats among them."""
        self.held: dict[str, int] = {}
        """What buffers of this process hold, and what it keeps in memory: written by the agents, told with the rest."""
        self.skews_s: list[float] = []
        """By how much the record's time is ahead of what its producer's clock said, s."""

    def assign(self, assigned: Iterable[TP]) -> None:
        """Forget partitions that are another's now."""
        kept = set(assigned)
        for known in (self.next, self.moved, self.waits_since):
            for tp in known.keys() - kept:
                del known[tp]
        self.fresh_after_seek &= kept

    def seek(self, tp: TP, offset: int, *, markers: bool = False) -> None:
        """Note an assignment; `markers`: clients write there, and a transaction ends in an offset without a record."""
        self.next[tp], self.moved[tp] = offset, time.monotonic()
        self.fresh_after_seek.add(tp)
        (self.markers.add if markers else self.markers.discard)(tp)

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
            if end - (tp in self.markers) <= self.next.get(tp, end):
                self.waits_since[tp] = now
                continue
            waited = now - max(self.moved[tp], self.waits_since.get(tp, 0.0))
            if waited >= (TURN_S if now - last[tp.topic] < STALLED_S else STALLED_S):
                return tp
        return None

    def lag(self, ends: Mapping[TP, int], topic: str) -> dict[str, int]:
        """Return how many records wait, by the topics' ends: `lag` of all, `lag_<p>` of each partition of `topic`."""
        waiting = {tp: max(0, end - self.next.get(tp, end)) for tp, end in ends.items()}
        each = {f"lag_{tp.partition}": count for tp, count in sorted(waiting.items()) if tp.topic == topic}
        return {"lag": sum(waiting.values()), **each}

    def take(self) -> dict[str, Any]:
        """Return the figures since the last call; `applied_buckets` counts ages by the buckets of FRESH."""
        buckets = np.bincount(np.searchsorted(FRESH, np.array(self.ages_ms) / 1000), minlength=len(FRESH) + 1)
        ages = np.sort(np.array(self.ages_ms or [0.0]))
        skews = np.array(self.skews_s or [0.0])
        skews = skews[np.argsort(np.abs(skews))]  # by size, either way: a clock ahead matters as much as one behind
        figures = {
            "t": round(time.time(), 3), "events": self.events, "duplicates": self.duplicates, "dead": self.dead,
            "poisoned": self.poisoned, "dedupe_overflow": self.overflow,
            "applied_p50_ms": round(float(ages[len(ages) // 2]), 2),
            "applied_p95_ms": round(float(ages[int(len(ages) * 0.95)]), 2),
            "applied_p99_ms": round(float(ages[int(len(ages) * 0.99)]), 2), "erased": self.erased,
            "applied_buckets": " ".join(map(str, buckets)), "applied_sum_ms": round(sum(self.ages_ms), 1),
            "skew_p50_s": round(float(skews[len(skews) // 2]), 3),
            "skew_p99_s": round(float(skews[int(len(skews) * 0.99)]), 3), "rss_mb": resident_mb(),
            **{f"events_{kind}": count for kind, count in self.kinds.items()}, **self.held,
        }  # fmt: skip
        self.kinds = Counter(dict.fromkeys(self.kinds, 0))  # a type that was seen once is told as 0 from then on
        self.events = self.duplicates = self.dead = self.overflow = self.poisoned = 0
        self.erased, self.ages_ms, self.skews_s = 0, [], []
        return figures


class Watchdog:
    """Ends a process that no longer does its work: whatever the cause, a new one goes on from what is committed.

    `ends` asks the broker, over a connection of its own, for the ends of partitions, `store` asks Redis for an answer;
    where one of them is away, standing still is nobody's fault.
    """

    def __init__(
        self, member: Member, progress: Progress, ends: Callable[[set[TP]], Awaitable[dict[TP, int]]],
        store: Callable[[], Awaitable[Any]],
    ) -> None:  # fmt: skip
        self._member, self._progress, self._ends, self._store = member, progress, ends, store
        self._since: dict[str, tuple[float, float]] = {}

    async def watch(self) -> None:
        """Look every two seconds, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if reason := await self.wrong():
                leave(EXIT_AGAIN, reason)

    async def wrong(self) -> str:
        """Return what is wrong, "" where nothing is."""
        if self._member.crashed:
            return f"the consumer crashed: {self._member.crashed}"
        assigned, now = self._member.assignment(), time.monotonic()
        for name in self._member.dead_agents():
            if self._lasts(f"no task runs the agent of {name}", now) >= LOOK_EVERY_S:
                return f"no task runs the agent of {name}"
        try:
            ends = await self._ends(assigned)
            await self._store()
        except (LogError, *StoreUnavailable) as error:
            log.info("Kafka or Redis is away (%s)", error)
            self._progress.waits_since = dict.fromkeys(self._progress.next, now)
            self._since.clear()
            return ""
        astray = self._member.astray()
        if astray and self._lasts(astray, now) >= STALLED_S:
            return f"{astray} ({STALLED_S:.0f} s)"
        ends = {tp: end for tp, end in ends.items() if tp in self._progress.next}
        stuck = self._progress.stalled(ends, now)
        if stuck is not None:
            return f"{stuck.topic}[{stuck.partition}]: no progress at {self._progress.next[stuck]} of {ends[stuck]}"
        return ""

    def _lasts(self, state: str, now: float) -> float:
        """For how long each look has found this state, s."""
        first, last = self._since.get(state, (now, now))
        if now - last > 3 * LOOK_EVERY_S:
            first = now
        self._since[state] = (first, now)
        return now - first


class LoopGuard(threading.Thread):
    """Ends the process when its event loop has not turned for HUNG_S: a loop that hangs cannot watch itself."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name="loop-guard", daemon=True)
        self._loop, self._turned = loop, time.monotonic()

    def run(self) -> None:
        """Ask the loop each second for a sign of life; the process was stopped itself where even this thread slept."""
        looked = time.monotonic()
        while True:
            try:
                self._loop.call_soon_threadsafe(self._turn)
            except RuntimeError:  # the loop is closed: the process ends in order
                return
            time.sleep(1.0)
            now = time.monotonic()
            if now - looked > 5.0:
                self._turned = now
            looked = now
            if now - self._turned > HUNG_S:
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
                leave(EXIT_AGAIN, f"the event loop has not turned for {HUNG_S:.0f} s")

    def _turn(self) -> None:
        self._turned = time.monotonic()


async def report(
    name: str, slot: int, member: Member, progress: Progress, client: Any, keys: Keys, topic: str
) -> None:  # fmt: skip
    """Append this process's figures to its learning curve each second; `topic` is the one whose partitions it tells."""
    while True:
        await asyncio.sleep(1.0)
        figures = {**progress.take(), **progress.lag(member.ends(), topic), "slot": slot, "queued": member.queued()}
        try:
            await append_metrics(client, keys.metrics(name), figures)
        except StoreUnavailable as error:
            log.debug("metrics: %s", error)
