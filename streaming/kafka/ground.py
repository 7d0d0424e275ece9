"""Whether the log is still the one that state was folded from: asked on assignment, before anything is written.

State says the epoch it was folded from and how far. Another cluster, another number of partitions, a topic that was
made again, a log that ends before what is folded or begins after it: each ends the process, with the next step.
Knows nothing of what state is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final

from streaming.topics import Log, LogError, Topics, TopicsError, moved, preflight

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
"""While it runs a process asks for the epoch this often, s."""
MISSING_S: Final = 5.0
"""A topic that is not there for so long was deleted, s."""
AT_HOME: Final = (
    "Point FRESHET_KAFKA (or FRESHET_REDIS) at the pair that belongs together. If this log is the one to go on with,"
    " `freshet rebuild --switch` folds it into the next generation"
)
ANEW: Final = "a new namespace (FRESHET_NAMESPACE), which begins empty"
REPARTITIONED: Final = (
    "The users of this log lie in the partitions of before, and no rebuild moves them. Next: with another number of"
    f" partitions, {ANEW}"
)
TRIMMED: Final = (
    "Next: `freshet rebuild --switch`, where `freshet snapshot list` (or a copy of that folder) has a snapshot that"
    f" reaches beyond what is gone: it begins from there. Without one: {ANEW}"
)
HOLE: Final = (
    "No rebuild folds over a hole. Next: `freshet snapshot restore NAME --switch` of a snapshot that ends beyond it, if"
    f" there is one; else {ANEW}"
)
Bounds = Mapping[tuple[str, int], tuple[int, int]]
"""(topic, partition) -> its first offset and its end."""


class GroundError(RuntimeError):
    """State and log do not belong together; the message says how that shows and names the next step."""


def repartitioned(stored: str, now: str) -> bool:
    """Whether the number of partitions changed under a log whose users lie where the old number put them."""
    was, is_ = stored.split("/"), now.split("/")
    return was[0] == is_[0] and was[1:2] != is_[1:2] and all(a == b for a, b in zip(was[2:3], is_[2:3], strict=False))


def next_step(stored: str, now: str) -> str:
    """Return what to do about state that was folded from another epoch."""
    return REPARTITIONED if repartitioned(stored, now) else AT_HOME


def stamped(epoch: str, codec: int) -> str:
    """Return an epoch as it is written beside state under a codec."""
    return epoch if codec > 1 else "/".join(epoch.split("/")[:2])


async def arrive(bootstrap: str, topics: Topics) -> None:
    """Check the topics as `preflight` does; a broker that just started may not know them yet. Raises TopicsError."""
    until = time.monotonic() + MISSING_S
    while True:
        try:
            await preflight(bootstrap, topics)
            return
        except TopicsError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)


class Ground:
    """The log under a process: the epoch it began with, and whether it still is that one."""

    def __init__(self, log_: Log, topics: Topics, epoch: str, *, codec: int = 2) -> None:
        self._log, self._topics, self.epoch, self._codec = log_, topics, epoch, codec

    @property
    def stamp(self) -> str:
        """What is written beside state: the epoch; with codec 1 only what the version before knows of it."""
        return stamped(self.epoch, self._codec)

    async def check(self, what: str, stored: str, applied: Mapping[tuple[str, int], int], bounds: Bounds) -> None:
        """Raise GroundError unless `what`, folded from the epoch `stored` up to `applied`, can go on from this log."""
        await self.check_epoch()
        difference = moved(stored, self.epoch)
        if difference:
            raise GroundError(f"{what}: folded from {difference}. {next_step(stored, self.epoch)}; nothing was written")
        for (topic, partition), following in applied.items():
            first, end = bounds[topic, partition]
            place = f"{topic}[{partition}]"
            if following > end:
                raise GroundError(
                    f"{what}: folded up to offset {following}, but {place} ends at {end}: the log lost its end, or"
                    " Redis is from another time. Bring that log back; or `freshet rebuild --switch` folds what is"
                    " left of it"
                )
            if following < first:
                raise GroundError(
                    f"{what}: folded up to offset {following}, but {place} begins at {first}:"
                    f" {first - following} records were deleted before they were folded. {TRIMMED}"
                )

    async def check_epoch(self) -> None:
        """Raise GroundError where the topics are others than when this process began."""
        until = time.monotonic() + MISSING_S
        while True:
            try:
                now = await self._log.epoch(self._topics)
                break
            except TopicsError as error:  # a broker that has just started may not know them yet
                if time.monotonic() > until:
                    raise GroundError(f"{error} It was there when this process began") from error
                await asyncio.sleep(0.2)
        if difference := moved(self.epoch, now):
            raise GroundError(f"under a running process, {difference}. {next_step(self.epoch, now)}")

    async def watch(self) -> None:
        """Ask each second, for ever; raises GroundError. A broker that does not answer is no reason."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.check_epoch()
            except LogError as error:
                log.debug("epoch: %s", error)
