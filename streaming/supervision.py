"""How a worker is watched: how far each partition is folded, when it stops moving, how a process ends.

Knows nothing about what is folded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from infra.telemetry import EXIT_AGAIN
from streaming.consumer import TP
from streaming.state import Keys, StoreUnavailable, append_metrics

log = logging.getLogger(__name__)

STALLED_S: Final = 15.0
"""A topic with records waiting whose partitions all made no progress for so long is stuck, s."""
TURN_S: Final = 120.0
"""The same for one partition while others go on: a backlog is folded one partition after the other, s."""


def leave(status: int, reason: str) -> None:
    """Say why, then end this process at once: nothing may be produced or committed after what just failed."""
    log.critical("%s", reason)
    print(f"freshet: {reason}", file=sys.__stderr__, flush=True)
    os._exit(status)


class Progress:
    """How far each partition is folded here and when it last moved: what the watchdog and the metrics read."""

    def __init__(self) -> None:
        self.next: dict[TP, int] = {}
        self.moved: dict[TP, float] = {}
        self.waits_since: dict[TP, float] = {}
        self.fresh_after_seek: set[TP] = set()
        self.events = self.duplicates = self.dead = self.overflow = 0
        self.ages_ms: list[float] = []

    def seek(self, tp: TP, offset: int) -> None:
        """Note an assignment."""
        self.next[tp], self.moved[tp] = offset, time.monotonic()
        self.fresh_after_seek.add(tp)

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
            if end <= self.next.get(tp, end):
                self.waits_since[tp] = now
                continue
            waited = now - max(self.moved[tp], self.waits_since.get(tp, 0.0))
            if waited >= (TURN_S if now - last[tp.topic] < STALLED_S else STALLED_S):
                return tp
        return None

    def take(self) -> dict[str, float]:
        """Return the figures since the last call."""
        ages = np.sort(np.array(self.ages_ms or [0.0]))
        figures = {
            "t": round(time.time(), 3), "events": self.events, "duplicates": self.duplicates, "dead": self.dead,
            "dedupe_overflow": self.overflow, "applied_p50_ms": round(float(ages[len(ages) // 2]), 2),
            "applied_p99_ms": round(float(ages[int(len(ages) * 0.99)]), 2),
        }  # fmt: skip
        self.events = self.duplicates = self.dead = self.overflow = 0
        self.ages_ms = []
        return figures


async def watch(app: Any, progress: Progress, reachable: Callable[[], Any]) -> None:
    """End a process that has records waiting and makes no progress, unless the broker is out of reach."""
    while True:
        await asyncio.sleep(2.0)
        now = time.monotonic()
        ends = {tp: app.consumer.highwater(tp) or 0 for tp in app.consumer.assignment()}
        stuck = progress.stalled(ends, now)
        if stuck is None:
            continue
        if await reachable():
            leave(
                EXIT_AGAIN, f"{stuck.topic}[{stuck.partition}]: no progress at {progress.next[stuck]} of {ends[stuck]}"
            )
        progress.waits_since = dict.fromkeys(ends, now)


async def report(name: str, slot: int, app: Any, progress: Progress, client: Any, keys: Keys) -> None:
    """Append this process's figures to its learning curve each second."""
    while True:
        await asyncio.sleep(1.0)
        lag = sum(max(0, (app.consumer.highwater(tp) or 0) - offset) for tp, offset in progress.next.items())
        try:
            await append_metrics(client, keys.metrics(name), {**progress.take(), "lag": lag, "slot": slot})
        except StoreUnavailable as error:
            log.debug("metrics: %s", error)
