"""The half of the state that is a fold over `events`: profiles, seen lists, activity, marks; in memory.

The fold is that of the user agent; only the cuts differ, and the laws say that cuts do not matter. A half begins empty
or from a snapshot, folds up to offsets as often as asked, and writes to Redis only what changed since it last wrote.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from infra.settings import Settings
from models.profile import canonical
from streaming.dead_letters import set_aside
from streaming.kafka.ground import HOLE
from streaming.learn import GapError, Outcome, Part, UserFold, decode_part, rounds, users_of
from streaming.recovery.compare import difference, digests, same
from streaming.recovery.files import read_records, write_records
from streaming.recovery.generations import RecoveryError
from streaming.state import Keys, RedisUserStore, UserWrite, connect
from streaming.topics import read_span, topics_of
from streaming.users.memory import MemoryUserStore

Advance = Callable[[str, int, int], None]
BATCH: Final = 4096
"""Events folded at once: more than live, for nobody waits."""
WRITE: Final = 1000
"""Users written in one transaction."""


class UserHalf:
    """Every partition's users; `folded` counts the records read here, `applied` the events that changed something."""

    def __init__(self, settings: Settings, *, rederive: bool = False) -> None:
        self.settings, self.topics, self.store = settings, topics_of(settings), MemoryUserStore()
        self._fold = UserFold.of(settings, derive=rederive)
        self._touched: dict[int, dict[str, None]] = defaultdict(dict)
        self._written: dict[int, int] = {}
        self._skipped: list[str] = []
        self._derived: dict[int, list[bytes]] | None = defaultdict(list) if rederive else None
        self.folded = self.applied = 0

    def at(self) -> dict[int, int]:
        """Return the next offset of each partition."""
        return {p: self.store.applied.get(p, (0,))[0] for p in range(self.topics.partitions)}

    def count(self) -> int:
        """Return how many profiles there are."""
        return sum(kind == "profile" for kind, _, _ in self.store.values)

    @property
    def written(self) -> int:
        """How many partitions were written to Redis from here."""
        return len(self._written)

    def notes(self) -> list[str]:
        """Return what a person should know of how it went."""
        return self._skipped

    async def fold(self, ends: Mapping[int, int], advance: Advance, total: int) -> dict[int, int]:
        """Fold `events` up to `ends` and return the next offsets; `total` records are shown as the goal."""
        at = self.at()
        spans = {p: (at[p], end) for p, end in ends.items()}
        aside = await set_aside(self.settings)
        async for partition, records in read_span(self.settings.kafka, self.topics.events, spans):
            for first in range(0, len(records), BATCH):
                chosen = [(r.offset, r.timestamp, r.value or b"") for r in records[first : first + BATCH]]
                decoded = decode_part(self.topics.events, partition, chosen).without(aside.get(partition, set()))
                for (part,) in rounds([decoded]):
                    self._apply(part)
                self.folded += len(chosen)
                advance("events", self.folded, max(total, self.folded))
                await asyncio.sleep(0)
        return self.at()

    def _apply(self, part: Part) -> None:
        try:
            self._take(self._outcome(part))
        except RecoveryError:
            raise
        except Exception:  # as the user agent does: one after the other, without those that raise
            for single in _singles(part):
                try:
                    outcome = self._outcome(single)
                except RecoveryError:
                    raise
                except Exception as error:
                    self._skipped.append(f"skipped events[{part.partition}]@{single.first}: {error!r}")
                    outcome = self._outcome(Part(part.partition, single.first, single.next))
                self._take(outcome)

    def _outcome(self, part: Part) -> Outcome:
        (users,) = users_of([part]).values()
        read = self.store.read_now(part.partition, users)
        try:
            return self._fold.fold([part], {part.partition: read})
        except GapError as error:
            raise RecoveryError(
                f"events[{part.partition}] goes on at offset {part.first}, folded is up to {read.applied}: the log lost"
                f" what lies between. {HOLE}"
            ) from error

    def _take(self, outcome: Outcome) -> None:
        (write,) = outcome.writes
        refused = self.store.commit_now(write)
        if refused is not None:
            raise RecoveryError(f"events[{write.partition}]: offset {refused} where {write.expected} was expected")
        touched = self._touched[write.partition]
        touched.update(dict.fromkeys((*write.profiles, *write.seen)))
        touched.update({user: None for _, user in self.store.left})
        self.store.left.clear()
        self.applied += outcome.applied
        if self._derived is not None:
            for entries in outcome.records:
                self._derived[write.partition] += digests(entries)

    def derived(self) -> dict[int, bytes]:
        """Return the digests of the entries that were derived, joined by partition."""
        return {p: b"".join(found) for p, found in (self._derived or {}).items()}

    # -- to Redis -----------------------------------------------------------------------------------------------------

    async def write(self, generation: int, cluster: str) -> None:
        """Write what changed since the last `write` into a generation, offsets last."""
        client = connect(self.settings.redis)
        try:
            store = RedisUserStore(client, Keys(self.settings.namespace, generation))
            for partition in range(self.topics.partitions):
                await self._write_partition(store, partition, cluster)
        finally:
            await client.aclose()

    async def _write_partition(self, store: RedisUserStore, partition: int, cluster: str) -> None:
        users, get = list(self._touched.pop(partition, {})), self.store.values.get
        following, marks, _ = self.store.applied.get(partition, (0, {}, ""))
        before, active = self._written.get(partition, 0), self.store.active.get(partition, {})
        for first in range(0, max(1, len(users)), WRITE):
            chunk, last = users[first : first + WRITE], first + WRITE >= len(users)
            write = UserWrite(partition, before, following if last else before, marks)
            packed = {user: value for user in chunk if (value := get(("profile", partition, user), b""))}
            write.profiles = dict.fromkeys(chunk, b"")
            # A snapshot's may be of another codec than what is to be written.
            write.profiles |= zip(packed, canonical(list(packed.values()), self.settings.codec), strict=True)
            for user in chunk:
                write.seen[user] = get(("seen", partition, user), b"")
            write.active = {user: active[user] for user in chunk if user in active}
            (refused,) = await store.commit([write], cluster)
            if refused is not None:
                raise RecoveryError(f"partition {partition} is written by another process (offset {refused})")
        self._written[partition] = following

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> list[dict[str, Any]]:
        """Write a file of each partition into a folder and return what the manifest says of them."""
        found: dict[int, list[tuple[bytes, bytes]]] = {p: [] for p in range(self.topics.partitions)}
        for (kind, partition, user), value in self.store.values.items():
            found[partition].append((f"{kind}:{user}".encode(), value))
        for partition, users in self.store.active.items():
            found[partition] += [(f"active:{user}".encode(), at.to_bytes(8, "big")) for user, at in users.items()]
        return [write_records(folder / f"users-{p}", sorted(records)) for p, records in found.items()]

    def head(self) -> dict[str, Any]:
        """Return what the manifest says of offsets and marks, by partition."""
        return {str(p): {"next": following, "marks": marks} for p, (following, marks, _) in self.store.applied.items()}

    def load(self, folder: Path, head: Mapping[str, Any]) -> None:
        """Begin from the files of a snapshot, already checked."""
        for partition, said in ((int(p), said) for p, said in head.items()):
            self.store.applied[partition] = (said["next"], dict(said["marks"]), "")
            active: list[tuple[int, str]] = []
            for key, value in read_records(folder / f"users-{partition}"):
                kind, _, user = key.decode().partition(":")
                if kind == "active":
                    active.append((int.from_bytes(value, "big"), user))
                else:
                    self.store.values[kind, partition, user] = value
                self._touched[partition][user] = None
            self.store.active[partition] = {user: at for at, user in sorted(active)}

    # -- checks -------------------------------------------------------------------------------------------------------

    async def compare(self, generation: int) -> list[str]:
        """Name each profile, seen list, mark and activity of a generation that is not what was folded here."""
        client = connect(self.settings.redis)
        try:
            keys = Keys(self.settings.namespace, generation)
            folded = {getattr(keys, kind)(p, user): value for (kind, p, user), value in self.store.values.items()}
            stored = set[str]()
            for kind in ("profile", "seen"):
                async for name in client.scan_iter(f"{keys.prefix}:{{u*}}:{kind}:*", count=5000):
                    stored.add(name.decode())
            names, found = sorted(stored | folded.keys()), dict[str, bytes | None]()
            for first in range(0, len(names), WRITE):
                chunk = names[first : first + WRITE]
                pipe = client.pipeline(transaction=False)
                for name in chunk:
                    pipe.get(name)
                found.update(zip(chunk, await pipe.execute(), strict=True))
            reads = await RedisUserStore(client, keys).read({p: [] for p in range(self.topics.partitions)})
            active = {p: dict(await client.zrange(keys.active(p), 0, -1, withscores=True)) for p in reads}
        finally:
            await client.aclose()
        differing = [difference(n, found[n], folded.get(n)) for n in names if not same(n, found[n], folded.get(n))]
        for p, read in reads.items():
            _, marks, _ = self.store.applied.get(p, (0, {}, ""))
            if marks != read.marks:
                differing.append(f"marks of partition {p}: stored {read.marks}, folded {marks}")
            folded_active = {user.encode(): at for user, at in self.store.active.get(p, {}).items()}
            differing += [
                f"activity of {user.decode(errors='replace')} in partition {p}: stored {at}, folded"
                f" {folded_active.get(user)}"
                for user, at in active[p].items()
                if folded_active.get(user) != at
            ]
            if unknown := len(folded_active.keys() - active[p].keys()):
                self._skipped.append(
                    f"{unknown} users of partition {p} have no activity stored: folded by an older version, they stay"
                    " until their next event"
                )
        return differing


def _singles(part: Part) -> list[Part]:
    """Return a part cut into parts of one event each."""
    ends = [*part.offsets[1:], part.next]
    firsts = [part.first, *part.offsets[1:]]
    return [
        Part(part.partition, first, end, part.offsets[i : i + 1], part.times[i : i + 1], part.events[i : i + 1])
        for i, (first, end) in enumerate(zip(firsts, ends, strict=True))
    ]
