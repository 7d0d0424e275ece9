"""Reads one partition, and notices when records wait there and none comes; knows nothing of what they say.

aiokafka's fetching ends in silence at an error that it does not know (uvloop has one of its own for a connection that
was reset), and waits 40 s for an answer on a connection that is open on this side only.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from aiokafka.errors import KafkaError

SILENT_S: Final = 5.0
"""After so long without a record the broker is asked whether some wait, over another connection, s."""


class SilenceError(KafkaError):  # type: ignore[misc]
    """Records wait in the partition and this process is not given them: only a new consumer helps."""


class Reading:
    """Reads `place` = (topic, partition) with a consumer that is assigned to it; `ends` asks for ends of partitions."""

    def __init__(
        self, consumer: Any, place: Any, ends: Callable[[Iterable[Any]], Awaitable[dict[Any, int]]],
        *, silent_s: float = SILENT_S,
    ) -> None:  # fmt: skip
        self._consumer, self._place, self._ends, self._silent_s = consumer, place, ends, silent_s
        self._heard, self._waiting = time.monotonic(), 0

    def at_end(self, following: int) -> bool:
        """Whether, for all that the last fetch knew, there is nothing from `following` on."""
        return self._consumer.highwater(self._place) in (None, following)

    async def get(self, following: int, *, timeout_ms: int, max_records: int | None = None) -> list[Any]:
        """Return the next records, `following` being the offset that is wanted first; raises SilenceError.

        A record must have waited through two questions, SILENT_S apart: one that has just come is not missing.
        """
        found = await self._consumer.getmany(self._place, timeout_ms=timeout_ms, max_records=max_records)
        records: list[Any] = found.get(self._place, [])
        now = time.monotonic()
        if records:
            self._heard, self._waiting = now, 0
        elif now - self._heard >= self._silent_s:
            self._heard = now
            if following < self._waiting:
                raise SilenceError(
                    f"{self._place.topic}[{self._place.partition}]: {self._waiting - following} records wait from"
                    f" {following} on, and none came for {2 * self._silent_s:g} s"
                )
            try:
                self._waiting = (await self._ends([self._place]))[self._place]
            except KafkaError:  # the broker is away: nothing to be had from anybody
                self._waiting = 0
        return records
