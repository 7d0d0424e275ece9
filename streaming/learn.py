"""The fold of events into profiles: records of `events` + stored profiles -> writes and `examples` entries.

Synchronous and pure: no clock, no I/O; knows nothing about Kafka clients or Redis. Live agents, replay and rebuild
call this same code. One `Part` is what a micro-batch holds of one partition; a micro-batch has one or more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from infra.settings import Settings
from models.examples import (
    IMPRESSION,
    MAX_RECORD_BYTES,
    VIEW,
    CodecError,
    Entries,
    Shown,
    concatenate,
    item_hash,
    split,
)
from models.profile import (
    ALIAS,
    APPLIED,
    DUPLICATE,
    ERASE,
    ERASED,
    MERGE,
    QUIET,
    VERSION,
    EventColumns,
    Folded,
    Profiles,
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
_MOST: Final = 65_504.0
"""The greatest float16."""
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
                Shown.from_bytes(event.payload)
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
    """

    def __init__(
        self, weights: Weights, *, embed: Embed | None = None, codec: int = VERSION, keep: int = 0, derive: bool = True
    ) -> None:
        self._weights, self._embed, self._codec, self._keep, self._derive = weights, embed, codec, keep, derive
        self._hashes: dict[str, int] = {}

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
        users = users_of(parts)
        profiles, rows = _profiles(users, reads, self._codec)
        columns = _Columns()
        spans: list[tuple[Part, int, int, dict[str, int], int]] = []
        skipped = 0
        for part in parts:
            read, start = reads[part.partition], len(columns.events)
            if part.first > read.applied:
                raise GapError(
                    f"events[{part.partition}]: expected offset {read.applied} next, got {part.first}:"
                    " Redis was rolled back, or the log lost records"
                )
            if self._keep and max(part.first, read.applied) // SWEEP < (part.next - 1) // SWEEP:
                raise ValueError(f"part {part.first}:{part.next} reaches over a multiple of {SWEEP}; see rounds()")
            marks = dict(read.marks)
            kept, repeats = _unfolded(part, read.applied, marks)
            skipped += repeats
            columns.add(part, kept, rows[part.partition])
            spans.append((part, start, len(columns.events), marks, read.applied))
        columns.read(self._weights, self._hash)
        return self._finish(columns, profiles, users, rows, spans, skipped)

    def _finish(
        self, columns: _Columns, profiles: Profiles, users: Mapping[int, list[str]],
        rows: Mapping[int, dict[str, int]], spans: list[tuple[Part, int, int, dict[str, int], int]], skipped: int,
    ) -> Outcome:  # fmt: skip
        folded = fold(profiles, columns.arrays)
        outcome = Outcome(overflow=folded.overflow)
        counts = np.bincount(folded.status, minlength=QUIET + 1).tolist()
        outcome.applied, outcome.erased = counts[APPLIED] + counts[QUIET], counts[ERASED]
        outcome.duplicates = skipped + counts[DUPLICATE]
        outcome.event_times = columns.ts
        pieces = []
        for part, start, end, marks, applied in spans:
            following = max(part.next, applied)
            write = UserWrite(part.partition, applied, following, marks)
            if following > applied and following % SWEEP == 0:
                write.keep = self._keep
            self._pack(write, profiles, rows[part.partition], columns.offset)
            outcome.writes.append(write)
            outcome.derived += [
                merge(columns.events[i].user_id, float(columns.arrays.time[i]), (part.partition, offset), moved)
                for i, moved in folded.moved.items()
                if start <= i < end and (offset := int(columns.offset[i])) >= 0
            ]
            if following > applied and self._derive:
                version = 2 if self._codec >= 3 else 1
                pieces.append(columns.entries(folded, start, end, (part.partition, applied, following), version))
        outcome.records = _records(pieces)
        return outcome

    def _pack(self, write: UserWrite, profiles: Profiles, rows: Mapping[str, int], offsets: NDArray[np.int64]) -> None:
        users, all_rows = list(rows), np.fromiter(rows.values(), np.int64, len(rows))
        touched = profiles.changed_by[all_rows] >= 0
        picked, names = all_rows[touched], list(compress(users, touched.tolist()))
        write.profiles = dict(zip(names, profiles.pack(picked), strict=True))
        write.active = dict(zip(names, offsets[profiles.changed_by[picked]].tolist(), strict=True))
        if self._embed is not None and names:
            write.embeddings = dict(zip(names, self._embed(profiles, picked), strict=True))
            for name in compress(names, (~profiles.exists[picked]).tolist()):
                write.embeddings[name] = b""
        acted = profiles.seen_changed[picked]
        write.seen = dict(zip(compress(names, acted.tolist()), profiles.pack_seen(picked[acted]), strict=True))

    def _hash(self, text: str) -> int:
        found = self._hashes.get(text)
        if found is None:
            if len(self._hashes) >= HASHES:
                self._hashes.clear()
            found = self._hashes[text] = item_hash(text)
        return found


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


def _profiles(
    users: Mapping[int, list[str]], reads: Mapping[int, UserRead], codec: int
) -> tuple[Profiles, dict[int, dict[str, int]]]:
    packed: list[bytes | None] = []
    seen: list[bytes | None] = []
    rows: dict[int, dict[str, int]] = {}
    for partition, names in users.items():
        rows[partition] = {user: row for row, user in enumerate(names, len(packed))}
        packed += reads[partition].profiles
        seen += reads[partition].seen
    return Profiles(packed, seen, codec=codec), rows


def _records(pieces: list[Entries]) -> list[Entries]:
    """Join a micro-batch's pieces into one record where that fits, else cut each piece to the cap."""
    if len(pieces) > 1:
        joined = concatenate(pieces)
        if joined.size() <= MAX_RECORD_BYTES:
            return [joined]
    return [record for piece in pieces for record in split(piece)]


class _Columns:
    """Columns of a micro-batch, filled a part at a time: comprehensions over events are the cheapest way to them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.user: list[int] = []
        self._offset: list[int] = []
        self._record_ms: list[int] = []

    def add(self, part: Part, kept: list[int] | None, rows: Mapping[str, int]) -> None:
        """Append the events of a part, all or those at `kept`; `rows` are its users' in the profiles."""
        events, offsets, times, users = part.events, part.offsets, part.times, part.subjects()
        if kept is not None:
            events, offsets, times, users = ([c[i] for i in kept] for c in (events, offsets, times, users))  # type: ignore[assignment]
        self.events += events
        self._offset += offsets
        self._record_ms += times
        self.user += [rows[user] for user in users]

    def read(self, weights: Weights, hashed: Callable[[str], int]) -> None:
        """Read what the fold and the entries need out of the events."""
        events = self.events
        meanings = [_WEIGHTLESS.get(type(event)) or weights.of(event) for event in events]  # type: ignore[arg-type]
        kinds = [kind for kind, _, _ in meanings]
        kind, record_ms = np.array(kinds, np.uint8), np.array(self._record_ms, np.int64)
        shown: list[int] = []
        shown_start = np.zeros(len(events) + 1, np.int64)
        for i in np.flatnonzero(kind == IMPRESSION).tolist():
            shown += [hashed(item) & 0xFFFFFFFF for item in events[i].shown]  # type: ignore[union-attr]
            shown_start[i + 1] = len(events[i].shown)  # type: ignore[union-attr]
        self.ids = ["" if k >= IMPRESSION else e.item_id for k, e in zip(kinds, events, strict=True)]  # type: ignore[union-attr]
        self.ts = [event.ts for event in events]
        self.offset = np.array(self._offset, np.int64)
        self.value = np.array([value for _, _, value in meanings], np.float64)
        # An erasure ends what was known when it was recorded, also where the clock of its sender was behind.
        time = np.where(kind == ERASE, record_ms / 1000, np.minimum(np.array(self.ts, np.float64), record_ms / 1000))
        self.arrays = EventColumns(
            user=np.array(self.user, np.int64),
            kind=kind,
            item=np.array([hashed(text) if text else 0 for text in self.ids], np.uint64),
            time=time,
            record_s=(record_ms // 1000).astype(np.uint32),
            event=np.array([0 if e.event_id is None else item_hash(e.event_id) for e in events], np.uint64),
            weight=np.array([weight for _, weight, _ in meanings], np.float64),
            value=self.value,
            slate=np.array([item_hash(e.slate_id) if e.slate_id else 0 for e in events], np.uint64),
            shown_start=np.cumsum(shown_start),
            shown=np.array(shown, np.uint32),
            moved={i: events[i].moved() for i in np.flatnonzero(kind == MERGE).tolist()},  # type: ignore[union-attr]
        )

    def entries(
        self, folded: Folded, start: int, end: int, covered: tuple[int, int, int], version: int
    ) -> Entries:  # fmt: skip
        """Return the entries of the applied events among start:end, which cover this range of their partition."""
        made, events = self.arrays, self.events
        rows = start + np.flatnonzero(folded.status[start:end] == APPLIED)
        lengths = folded.history_length[rows].astype(np.int64)
        begin = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=begin[1:])
        filled = np.arange(folded.history_item.shape[1]) < lengths[:, None]
        away = folded.averse_length[rows].astype(np.int64)
        averse_start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(away, out=averse_start[1:])
        return Entries(
            ranges=[covered],
            partition=np.full(len(rows), covered[0], np.uint16),
            offset=self.offset[rows],
            index=np.zeros(len(rows), np.uint16),
            time=made.time[rows],
            kind=made.kind[rows],
            flags=folded.flags[rows],
            target=made.item[rows],
            weight=made.weight[rows],
            value=self.value[rows],
            slates=folded.slates[rows],
            history_start=begin,
            history_item=folded.history_item[rows][filled],
            history_time=folded.history_time[rows][filled],
            history_kind=folded.history_kind[rows][filled],
            ids=[self.ids[i] for i in rows.tolist()],
            extra=[_extra(events[i]) for i in rows.tolist()],
            history_weight=np.clip(folded.history_weight[rows][filled], -_MOST, _MOST).astype(np.float16),
            tally=folded.tally[rows],
            averse_start=averse_start,
            averse=folded.averse[rows][np.arange(folded.averse.shape[1]) < away[:, None]],
            version=version,
        )


def _extra(event: Event) -> bytes:
    if isinstance(event, Impression):
        return event.payload
    return _CONTEXT.encode(event.context) if event.context else b""
