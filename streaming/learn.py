"""The fold of events into profiles: records of `events` + stored profiles -> writes and `examples` entries.

Synchronous and pure: no clock, no I/O; knows nothing about Kafka clients or Redis. Live agents, replay and rebuild
call this same code. One `Part` is what a micro-batch holds of one partition; a micro-batch has one or more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from infra.settings import Settings
from models.examples import IMPRESSION, MAX_RECORD_BYTES, VIEW, CodecError, Entries, Shown, item_hash, split
from models.profile import (
    ALIAS,
    DUPLICATE,
    ENTRIES,
    ERASE,
    ERASED,
    EVENT,
    MERGE,
    OVERFLOW,
    QUIET,
    SLATE_ITEMS,
    VERSION,
    Events,
    Moved,
    Profiles,
    Room,
    fold,
)
from streaming.events import (
    MAX_FUTURE_S,
    Alias,
    Erase,
    Event,
    EventError,
    Impression,
    Merge,
    View,
    Weights,
    decode,
    merge,
)
from streaming.state import UserRead, UserWrite

Embed = Callable[[Profiles, NDArray[np.int64]], list[bytes]]
"""Cached decayed embeddings of some rows of the profiles; see models/factors.py."""

_CONTEXT = msgspec.msgpack.Encoder()
_WEIGHTLESS = {
    Impression: (IMPRESSION, 0.0, 0.0), View: (VIEW, 0.0, 0.0), Erase: (ERASE, 0.0, 0.0), Alias: (ALIAS, 0.0, 0.0),
    Merge: (MERGE, 0.0, 0.0),
}  # fmt: skip
"""(kind, weight, value) of what has no weight."""
HASHES: Final = 65_536
"""Hashes of item ids that a fold remembers, about 10 MB; then it forgets them all."""
SWEEP: Final = 4096
"""Users beyond the cap leave a partition where its offset is a multiple of this, and only there: any cut is equal."""


class GapError(RuntimeError):
    """A partition's next record lies beyond its applied offset: the store was rolled back, or records are gone."""


@dataclass(slots=True)
class Dead:
    """A record that cannot be folded, with a reason a person can act on."""

    topic: str
    partition: int
    offset: int
    reason: str
    original: bytes


@dataclass(slots=True)
class Part:
    """Decoded records of one partition, in order: offsets, record times (ms), events; they cover `first`:`next`."""

    partition: int
    first: int
    next: int
    offsets: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    dead: list[Dead] = field(default_factory=list)

    def subjects(self) -> list[str]:
        """Return the user whose profile each event is folded into: an alias is folded into the anonymous one."""
        return [event.anonymous_id if type(event) is Alias else event.user_id for event in self.events]

    def without(self, aside: Set[int]) -> Part:
        """Return the part without the events at these offsets, which it still covers: they were set aside."""
        if not aside or aside.isdisjoint(self.offsets):
            return self
        kept = [i for i, offset in enumerate(self.offsets) if offset not in aside]
        offsets, times, events = ([column[i] for i in kept] for column in (self.offsets, self.times, self.events))
        return Part(self.partition, self.first, self.next, offsets, times, events, self.dead)  # type: ignore[arg-type]

    def cut(self, offset: int) -> tuple[Part, Part]:
        """Return what lies before an offset inside first:next, and what lies at or after it."""
        at = bisect_left(self.offsets, offset)
        before = Part(
            self.partition, self.first, offset, self.offsets[:at], self.times[:at], self.events[:at],
            [dead for dead in self.dead if dead.offset < offset],
        )  # fmt: skip
        after = Part(
            self.partition, offset, self.next, self.offsets[at:], self.times[at:], self.events[at:],
            [dead for dead in self.dead if dead.offset >= offset],
        )  # fmt: skip
        return before, after


def rounds(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yield a micro-batch in pieces of which none reaches over a multiple of SWEEP; most are one piece."""
    left = list(parts)
    while left:
        now, later = [], []
        for part in left:
            end = (part.first // SWEEP + 1) * SWEEP
            if part.next > end:
                part, rest = part.cut(end)
                later.append(rest)
            now.append(part)
        yield now
        left = later


def decode_part(topic: str, partition: int, records: Sequence[tuple[int, int, bytes]]) -> Part:
    """Decode records (offset, record time in ms, value) of one partition; what cannot be read becomes a Dead."""
    part = Part(partition, records[0][0], records[-1][0] + 1)
    for offset, record_ms, value in records:
        try:
            event = decode(value)
            if event.ts > record_ms / 1000 + MAX_FUTURE_S:
                expected = f"at most {MAX_FUTURE_S:.0f} s after its record's time, {record_ms / 1000}"
                raise EventError("$.ts", expected, str(event.ts))
            if isinstance(event, Impression):
                Shown.check(event.payload)
        except (EventError, CodecError) as error:
            part.dead.append(Dead(topic, partition, offset, str(error), value))
            continue
        part.offsets.append(offset)
        part.times.append(record_ms)
        part.events.append(event)
    return part


@dataclass(slots=True)
class Outcome:
    """What folding a micro-batch came to."""

    writes: list[UserWrite] = field(default_factory=list)
    records: list[Entries] = field(default_factory=list)
    """Records for `examples`, in order, each within its byte cap."""
    derived: list[Merge] = field(default_factory=list)
    """Events for the log, of other users than those folded: appended before the commit, known by their source."""
    applied: int = 0
    duplicates: int = 0
    erased: int = 0
    """Events that lie before the erasure or alias that ended their profile."""
    overflow: int = 0
    event_times: list[float] = field(default_factory=list)
    """Client times of the applied events, s: for freshness."""


def users_of(parts: Sequence[Part]) -> dict[int, list[str]]:
    """Return the users whose profiles a micro-batch needs, by partition, each once, in order of appearance."""
    return {part.partition: list(dict.fromkeys(part.subjects())) for part in parts}


class UserFold:
    """Folds micro-batches of `events` into profiles and derives their `examples` entries.

    `embed`, where given, computes the cached embeddings that are written beside each changed profile; `codec` is the
    version of the profiles written, and from 3 on version 2 of `examples` is; `keep` is how many users a partition
    keeps, 0: all; without `derive` there are no entries for `examples` (a rebuild finds them there).
    Folds one micro-batch at a time: the memory in which profiles are unpacked is kept for the next.
    """

    def __init__(
        self, weights: Weights, *, embed: Embed | None = None, codec: int = VERSION, keep: int = 0, derive: bool = True
    ) -> None:
        self._weights, self._embed, self._codec, self._keep, self._derive = weights, embed, codec, keep, derive
        self._hashes, self._room = _Hashes(), Room()

    @classmethod
    def of(cls, settings: Settings, *, embed: Embed | None = None, derive: bool = True) -> UserFold:
        """Return the fold of a deployment: the same in its agents, its rebuild and its verification."""
        keep = -(-settings.max_users // settings.partitions)
        return cls(Weights(settings.event_weights), embed=embed, codec=settings.codec, keep=keep, derive=derive)

    def fold(self, parts: Sequence[Part], reads: Mapping[int, UserRead]) -> Outcome:
        """Fold parts (one per partition) onto what was read for them; raises GapError and CodecError.

        Where users are capped no part may reach over a multiple of SWEEP: `rounds` cuts them.
        Events below the applied offset were folded before and are dropped first; events of an inlet at or below its
        mark are the repeat of an append.
        """
        outcome = Outcome()
        batch = _Batch(self._weights, self._hashes)
        packed: list[bytes | None] = []
        seen: list[bytes | None] = []
        owners: list[tuple[UserWrite, str]] = []
        covered: list[tuple[int, int, int]] = []
        for part in parts:
            read = reads[part.partition]
            applied, following = read.applied, max(part.next, read.applied)
            if part.first > applied:
                raise GapError(
                    f"events[{part.partition}]: expected offset {applied} next, got {part.first}:"
                    " Redis was rolled back, or the log lost records"
                )
            if self._keep and max(part.first, applied) // SWEEP < (part.next - 1) // SWEEP:
                raise ValueError(f"part {part.first}:{part.next} reaches over a multiple of {SWEEP}; see rounds()")
            write = UserWrite(part.partition, applied, following, dict(read.marks))
            if following > applied:
                covered.append((part.partition, applied, following))
                write.keep = self._keep if following % SWEEP == 0 else 0
            outcome.writes.append(write)
            kept, repeats = _unfolded(part, applied, write.marks)
            outcome.duplicates += repeats
            subjects = part.subjects()
            rows = {user: row for row, user in enumerate(dict.fromkeys(subjects), len(owners))}
            owners += [(write, user) for user in rows]
            packed += read.profiles
            seen += read.seen
            batch.add(part, kept, [rows[user] for user in subjects])
        self._finish(outcome, batch, Profiles(packed, seen, codec=self._codec, room=self._room), owners, covered)
        return outcome

    def _finish(
        self, outcome: Outcome, batch: _Batch, profiles: Profiles, owners: Sequence[tuple[UserWrite, str]],
        covered: list[tuple[int, int, int]],
    ) -> None:  # fmt: skip
        events = batch.columns()
        folded = fold(profiles, events)
        counts = folded.counts.tolist()
        outcome.applied, outcome.erased = counts[ENTRIES] + counts[QUIET], counts[ERASED]
        outcome.duplicates += counts[DUPLICATE]
        outcome.overflow = counts[OVERFLOW]
        outcome.event_times = batch.ts
        for i, moved in folded.moved.items():
            if batch.offsets[i] >= 0:
                position = int(events.rows["partition"][i]), batch.offsets[i]
                outcome.derived.append(merge(batch.events[i].user_id, float(events.rows["time"][i]), position, moved))
        self._pack(profiles, owners, batch.offsets)
        if covered and self._derive:
            made = [batch.events[i] for i in folded.source[: counts[ENTRIES]].tolist()]
            ids = ["" if type(event) is Impression else event.item_id for event in made]
            entries = folded.entries(covered, ids, [_extra(event) for event in made], 2 if self._codec >= 3 else 1)
            outcome.records = _records(entries)

    def _pack(self, profiles: Profiles, owners: Sequence[tuple[UserWrite, str]], offsets: Sequence[int]) -> None:
        changes = profiles.changes()
        for row, changed_by, _, profile, seen in changes:
            write, user = owners[row]
            write.profiles[user], write.active[user] = profile, offsets[changed_by]
            if seen is not None:
                write.seen[user] = seen
        if self._embed is not None and changes:
            embeddings = self._embed(profiles, np.array([row for row, *_ in changes]))
            for (row, _, exists, *_), embedding in zip(changes, embeddings, strict=True):
                write, user = owners[row]
                write.embeddings[user] = embedding if exists else b""


def _unfolded(part: Part, applied: int, marks: dict[str, int]) -> tuple[list[int] | None, int]:
    """Choose the events that were not folded before, None for all of them, and move the inlets' marks on.

    Also returns how many were the repeat of an append.
    """
    if part.first >= applied and not any(event.source for event in part.events):
        return None, 0
    kept: list[int] = []
    repeats = 0
    for i, (offset, event) in enumerate(zip(part.offsets, part.events, strict=True)):
        if offset < applied:
            continue
        if event.source is not None:
            inlet, source_partition, source_offset = event.source
            mark = f"{inlet}:{source_partition}"
            if source_offset < marks.get(mark, 0):
                repeats += 1
                continue
            marks[mark] = source_offset + 1
        kept.append(i)
    return kept, repeats


def _records(entries: Entries) -> list[Entries]:
    """Return a micro-batch's entries as one record where that fits, else those of each partition cut to the cap."""
    if entries.size() <= MAX_RECORD_BYTES:
        return [entries]
    records, first = [], 0
    for covered in entries.ranges:
        last = first + int(np.count_nonzero(entries.partition == covered[0]))
        records += split(entries.slice(first, last, [covered]))
        first = last
    return records


class _Hashes(dict[str, int]):
    """Hashes of item ids, made as they are asked for."""

    def __missing__(self, text: str) -> int:
        if len(self) >= HASHES:
            self.clear()
        found = self[text] = item_hash(text)
        return found


class _Batch:
    """What the fold and the entries need out of the events of a micro-batch, a part at a time."""

    def __init__(self, weights: Weights, hashes: _Hashes) -> None:
        self._weights, self._hashes = weights, hashes
        self.events: list[Event] = []
        self.ts: list[float] = []
        self.offsets: list[int] = []
        self._rows: list[tuple[int, int, int, int, int, float, float, float, int, int, int, int, int]] = []
        self._shown: list[int] = []
        self._identities: list[int] = []
        self._moved: dict[int, Moved] = {}

    def add(self, part: Part, kept: Sequence[int] | None, users: Sequence[int]) -> None:
        """Append the events of a part, all or those at `kept`; `users` are the rows of all its events' users."""
        events, times, offsets, rows = part.events, part.times, part.offsets, users
        if kept is not None:
            events, times, offsets, rows = ([column[i] for i in kept] for column in (events, times, offsets, users))  # type: ignore[assignment]
        hashes, weigh, shown, partition = self._hashes, self._weights.of, self._shown, part.partition
        for user, event, offset, record_ms in zip(rows, events, offsets, times, strict=True):
            kind, weight, value = _WEIGHTLESS.get(type(event)) or weigh(event)  # type: ignore[arg-type]
            time, recorded = event.ts, record_ms / 1000
            if time > recorded or kind == ERASE:
                # An erasure ends what was known when it was recorded, also where the clock of its sender was behind.
                time = recorded
            item = first = size = 0
            if kind < IMPRESSION:
                item = hashes[event.item_id]  # type: ignore[union-attr]
            elif kind == IMPRESSION:
                first, size = len(shown), min(len(event.shown), SLATE_ITEMS)  # type: ignore[union-attr]
                shown += [hashes[name] for name in event.shown[:size]]  # type: ignore[union-attr]
            else:
                self._identities.append(len(self._rows))
                if kind == MERGE:
                    self._moved[len(self._rows)] = event.moved()  # type: ignore[union-attr]
            self._rows.append((
                user, offset, item, item_hash(event.event_id) if event.event_id is not None else 0,
                item_hash(event.slate_id) if event.slate_id else 0, time, weight, value, first, size,
                record_ms // 1000 & 0xFFFF_FFFF, partition, kind,
            ))  # fmt: skip
        self.events += events
        self.offsets += offsets
        self.ts += [event.ts for event in events]

    def columns(self) -> Events:
        """Return the events as the fold takes them."""
        rows, shown = np.array(self._rows, EVENT), np.array(self._shown, np.uint64)
        return Events(rows, shown, self._identities, self._moved)


def _extra(event: Event) -> bytes:
    if type(event) is Impression:
        return event.payload
    return _CONTEXT.encode(event.context) if event.context else b""
