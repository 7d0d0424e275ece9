"""Both halves of the state at work: profiles in this process, item rows beside it where the log is long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from infra.settings import Settings
from models.examples import HoleError
from streaming.kafka.ground import HOLE
from streaming.recovery import cuts
from streaming.recovery.apart import Advance, Apart, Here
from streaming.recovery.cuts import Cut
from streaming.recovery.generations import RecoveryError
from streaming.recovery.item_half import ItemHalf
from streaming.recovery.user_half import UserHalf
from streaming.state import Redis, RedisUserStore, live_keys
from streaming.topics import moved

APART: Final = 50_000
"""Records from which on a second process is worth its start."""


class Folding:
    """A state in memory; `users` is called directly, `items` through its process."""

    def __init__(self, settings: Settings, users: UserHalf, items: Apart | Here, advance: Advance) -> None:
        self.settings, self.users, self.items, self.advance = settings, users, items, advance
        self.lost: list[str] = []
        self._base: tuple[Path, Mapping[str, Any]] | None = None

    async def to_one_cut(self, cut: Cut, floor: Mapping[int, int]) -> None:
        """Fold rows up to the cut, and profiles to exactly the events that `examples` covers up to there.

        `floor`: offsets that are surely covered; up to them both halves fold at once.
        """
        marks = await self._both(cut, floor)
        if any(offset > marks.get(p, 0) for p, offset in self.users.at().items()) and self.users.written == 0:
            # `examples` lost its end: what came of these events is derived again, from where it ends.
            self.users = UserHalf(self.settings)
            if self._base is not None:
                self.users.load(*self._base)
        for p, end in cut.events.items():
            if marks.get(p, 0) > end:
                self.lost.append(
                    f"events[{p}] ends at {end}, `examples` covers it up to {marks[p]}: the events between are lost."
                    " Rows still count them, and will not count the next as many of this partition"
                )
        reach = {p: min(offset, cut.events[p]) for p, offset in marks.items()}
        at = await self.users.fold(reach, self.advance, self.users.folded)
        ahead = [p for p, offset in at.items() if offset > marks.get(p, 0)]
        if ahead:
            raise RecoveryError(
                f"profiles of partition {ahead[0]} are at offset {at[ahead[0]]}, `examples` covers only up to"
                f" {marks.get(ahead[0], 0)}: it lost records. `freshet snapshot list` shows what can be restored"
            )

    async def apart(self, cut: Cut) -> None:
        """Fold each half to its own offsets of the cut: what a verification compares."""
        await self._both(cut, cut.events)

    async def _both(self, cut: Cut, events: Mapping[int, int]) -> dict[int, int]:
        total = self.users.folded + sum(max(0, end - self.users.at()[p]) for p, end in cut.events.items())
        rows = asyncio.create_task(self.items.call("fold", cut.examples, cut.items, advance=self.advance))
        try:
            await self.users.fold(events, self.advance, total)
            marks: dict[int, int] = await rows
            return marks
        except HoleError as error:
            raise RecoveryError(f"{error}: `examples` lost records. {HOLE}") from error
        finally:
            if not rows.done():
                rows.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await rows

    async def write(self, generation: int, ground: str) -> None:
        """Write what changed, both halves at once."""
        await asyncio.gather(self.users.write(generation, ground), self.items.call("write", generation, ground))

    async def compare(self, generation: int) -> list[str]:
        """Name what a generation stores otherwise than it was folded here."""
        users = await self.users.compare(generation)
        rows: list[str] = await self.items.call("compare", generation)
        return users + rows

    async def load(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Begin from a snapshot whose files were checked."""
        rows = asyncio.create_task(self.items.call("load", str(folder), manifest["rows"]))
        self._base = folder, manifest["users"]
        self.users.load(*self._base)
        await rows

    async def save(self, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Write both halves' files; return (what the manifest says of each, their heads)."""
        rows = asyncio.create_task(self.items.call("save", str(folder)))
        files = self.users.save(folder)
        files += await rows
        return files, {"users": self.users.head(), "rows": await self.items.call("head")}


@contextlib.asynccontextmanager
async def folding(
    settings: Settings, records: int, advance: Advance, *, rederive: bool = False
) -> AsyncIterator[Folding]:
    """Yield an empty state into which about so many records will be folded."""
    kind = Apart if records >= APART else Here
    with kind(ItemHalf, settings, rederive=rederive) as items:
        yield Folding(settings, UserHalf(settings, rederive=rederive), items, advance)


async def covered(client: Redis, settings: Settings, ground: str) -> dict[int, int]:
    """Return the offsets that the served profiles are folded to: what came of the events below is in `examples`.

    Empty where the served state is of another log. To be asked before the end of `examples` is.
    """
    keys = await live_keys(client, settings.namespace)
    reads = await RedisUserStore(client, keys).read({p: [] for p in range(settings.partitions)})
    if any(moved(read.cluster, ground) for read in reads.values()):
        return {}
    return {p: read.applied for p, read in reads.items()}


async def now(client: Redis, settings: Settings, ground: str) -> tuple[Cut, dict[int, int]]:
    """Return where the logs end, and up to where both halves may fold at once."""
    floor = await covered(client, settings, ground)
    cut = await cuts.ends(settings)
    return cut, {p: min(offset, cut.events[p]) for p, offset in floor.items()}
