"""The buffer between an answer and the log: slates wait here, bounded, to be appended as impressions.

Knows nothing about HTTP; no answer waits for it; what does not fit or cannot be appended is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

Append = Callable[[Sequence[tuple[int, bytes, bytes]]], Awaitable[object]]
"""Append (partition, key, value) records; returns once all are acknowledged."""
Make = Callable[[], tuple[int, bytes, bytes]]
"""Encodes one impression as (partition, key, value), after its answer was sent."""

BATCH: Final = 100
GATHER_S: Final = 0.02
_BACK_OFF_S: Final = 0.5

log = logging.getLogger("freshet.serving")


class Impressions:
    """Slates on their way to the log, oldest first; at most `limit` wait.

    `dropped` counts what found the buffer full, `failed` what Kafka did not take; both are lost and both are told.
    """

    def __init__(self, *, append: Append, limit: int, on_change: Callable[[Impressions], None] | None = None) -> None:
        self._append = append
        self._limit = limit
        self._waiting: deque[Make] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_change = on_change
        self._sending = 0
        self.appended = self.dropped = self.failed = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, make: Make) -> bool:
        """Take a slate, or drop it where the buffer is full; never waits. Returns whether it was taken."""
        if len(self._waiting) >= self._limit:
            self.dropped += 1
            self._changed()
            return False
        self._waiting.append(make)
        self._wake.set()
        return True

    def start(self) -> None:
        """Begin to append, in a task of the running loop."""
        self._task = asyncio.create_task(self._run(), name="impressions")

    async def stop(self, drain_s: float = 2.0) -> None:
        """Append what waits for at most `drain_s`, then end; the rest counts as failed."""
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._waiting or self._sending:
                    await asyncio.sleep(0.01)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.failed += len(self._waiting)
        self._waiting.clear()
        self._changed()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            if not self._waiting:
                self._wake.clear()
            if batch:
                await self._append_batch(batch)

    async def _append_batch(self, batch: list[Make]) -> None:
        self._sending = len(batch)
        try:
            await self._append([make() for make in batch])
        except asyncio.CancelledError:
            self.failed += len(batch)
            raise
        except Exception as error:  # whatever Kafka says: the slate is lost, lookups go on
            self.failed += len(batch)
            log.warning("impressions: %d not appended (%s: %s)", len(batch), type(error).__name__, error)
            self._changed()
            await asyncio.sleep(_BACK_OFF_S)
        else:
            self.appended += len(batch)
            self._changed()
        finally:
            self._sending = 0

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)
