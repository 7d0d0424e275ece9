"""What is read and written of users, and the store of users in this process: what replay and rebuild fold into.

The same conformance suite holds for it and for the store in Redis (streaming/state.py). Knows nothing about Redis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from typing import Final, Protocol

LEAVING: Final = 16_384
"""Users of a partition that leave at once, at most: where the cap was lowered the rest follows, sweep by sweep."""


@dataclass(slots=True)
class UserRead:
    """What one call read of a partition: its next offset, and the users' values as of that offset."""

    applied: int
    marks: dict[str, int]
    profiles: list[bytes | None]
    seen: list[bytes | None]
    cluster: str = ""


@dataclass(slots=True)
class UserWrite:
    """What a micro-batch commits to a partition: `expected` -> `next`; profiles, seen lists, embeddings by user.

    An empty value deletes. `active` is the offset of the last event that changed each profile; where `keep` is not 0
    the least recently active users beyond it leave, after the values are written.
    """

    partition: int
    expected: int
    next: int
    marks: dict[str, int]
    profiles: dict[str, bytes] = field(default_factory=dict)
    seen: dict[str, bytes] = field(default_factory=dict)
    embeddings: dict[str, bytes] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)
    keep: int = 0


class UserStore(Protocol):
    """Profiles by partition, read and committed in whole micro-batches, with compare-and-set on the next offset."""

    async def read(self, wanted: Mapping[int, Sequence[str]]) -> dict[int, UserRead]:
        """Read applied, marks, profiles and seen lists of these users of these partitions."""

    async def commit(self, writes: Sequence[UserWrite], cluster: str = "") -> list[int | None]:
        """Apply each write whose `expected` is what is stored; None where it was, else the stored offset."""


class MemoryUserStore:
    """Profiles in this process: what replay folds into."""

    def __init__(self) -> None:
        self.applied: dict[int, tuple[int, dict[str, int], str]] = {}
        self.values: dict[tuple[str, int, str], bytes] = {}
        self.active: dict[int, dict[str, int]] = {}
        self.left: list[tuple[int, str]] = []
        """(partition, user) of who left by the cap; who must know empties it."""

    async def read(self, wanted: Mapping[int, Sequence[str]]) -> dict[int, UserRead]:
        """Read applied, marks, profiles and seen lists of these users of these partitions."""
        return {p: self.read_now(p, users) for p, users in wanted.items()}

    def read_now(self, partition: int, users: Sequence[str]) -> UserRead:
        """`read` of one partition, without a loop to wait on."""
        following, marks, cluster = self.applied.get(partition, (0, {}, ""))
        get = self.values.get
        return UserRead(
            following, dict(marks), [get(("profile", partition, u)) for u in users],
            [get(("seen", partition, u)) for u in users], cluster,
        )  # fmt: skip

    async def commit(self, writes: Sequence[UserWrite], cluster: str = "") -> list[int | None]:
        """Apply each write whose `expected` is what is stored; None where it was, else the stored offset."""
        return [self.commit_now(write, cluster) for write in writes]

    def commit_now(self, write: UserWrite, cluster: str = "") -> int | None:
        """`commit` of one write, without a loop to wait on."""
        p, stored = write.partition, self.applied.get(write.partition, (0, {}, ""))[0]
        if stored != write.expected:
            return stored
        for name, values in (("profile", write.profiles), ("seen", write.seen), ("embedding", write.embeddings)):
            for user, value in values.items():
                self._set((name, p, user), value)
        active = self.active.setdefault(p, {})
        for user, offset in sorted(write.active.items(), key=itemgetter(1)):
            active.pop(user, None)  # so that the order of the keys is that of the offsets
            if write.profiles.get(user):
                active[user] = offset
        for user in list(islice(active, min(max(len(active) - write.keep, 0), LEAVING))) if write.keep else ():
            del active[user]
            self.left.append((p, user))
            for name in ("profile", "seen", "embedding"):
                self._set((name, p, user), b"")
        self.applied[p] = (write.next, dict(write.marks), cluster)
        return None

    def _set(self, key: tuple[str, int, str], value: bytes) -> None:
        if value:
            self.values[key] = value
        else:
            self.values.pop(key, None)
