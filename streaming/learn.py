"""The fold of events into profiles: records of `events` + stored profiles -> writes and `examples` entries.

Synchronous and pure: no clock, no I/O; knows nothing about Kafka clients or Redis. Live agents, replay and rebuild
call this same code. One `Part` is what a micro-batch holds of one partition; a micro-batch has one or more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

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
from models.profile import APPLIED, DUPLICATE, EventColumns, Folded, Profiles
from streaming.events import MAX_FUTURE_S, Event, EventError, Impression, View, Weights, decode
from streaming.state import UserRead, UserWrite

Embed = Callable[[Profiles, NDArray[np.int64]], list[bytes]]
"""Cached decayed embeddings of some rows of the profiles; see models/factors.py."""

_CONTEXT = msgspec.msgpack.Encoder()


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
    applied: int = 0
    duplicates: int = 0
    overflow: int = 0
    event_times: list[float] = field(default_factory=list)
    """Client times of the applied events, s: for freshness."""


def users_of(parts: Sequence[Part]) -> dict[int, list[str]]:
    """Return the users whose profiles a micro-batch needs, by partition, each once, in order of appearance."""
    return {part.partition: list(dict.fromkeys(event.user_id for event in part.events)) for part in parts}


class UserFold:
    """Folds micro-batches of `events` into profiles and derives their `examples` entries.

    `embed`, where given, computes the cached embeddings that are written beside each changed profile.
    """

    def __init__(self, weights: Weights, *, embed: Embed | None = None) -> None:
        self._weights, self._embed = weights, embed
        self._hashes: dict[str, int] = {}

    def fold(self, parts: Sequence[Part], reads: Mapping[int, UserRead]) -> Outcome:
        """Fold parts (one per partition) onto what was read for them; raises GapError and CodecError.

        Events below the applied offset were folded before and are dropped first; events of an inlet at or below its
        mark are the repeat of an append.
        """
        users = users_of(parts)
        profiles, rows = _profiles(users, reads)
        columns = _Columns()
        spans: list[tuple[Part, int, int, dict[str, int], int]] = []
        skipped = 0
        for part in parts:
            read, start = reads[part.partition], len(columns.kind)
            if part.first > read.applied:
                raise GapError(
                    f"events[{part.partition}]: expected offset {read.applied} next, got {part.first}:"
                    " Redis was rolled back, or the log lost records"
                )
            marks = dict(read.marks)
            for offset, record_ms, event in zip(part.offsets, part.times, part.events, strict=True):
                if offset < read.applied:
                    continue
                if event.source is not None:
                    inlet, source_partition, source_offset = event.source
                    mark = f"{inlet}:{source_partition}"
                    if source_offset < marks.get(mark, 0):
                        skipped += 1
                        continue
                    marks[mark] = source_offset + 1
                self._enter(columns, part.partition, rows[part.partition, event.user_id], offset, record_ms, event)
            spans.append((part, start, len(columns.kind), marks, read.applied))
        return self._finish(columns, profiles, users, rows, spans, skipped)

    def _finish(
        self, columns: _Columns, profiles: Profiles, users: Mapping[int, list[str]],
        rows: Mapping[tuple[int, str], int], spans: list[tuple[Part, int, int, dict[str, int], int]], skipped: int,
    ) -> Outcome:  # fmt: skip
        folded = profiles.fold(columns.arrays())
        outcome = Outcome(overflow=folded.overflow)
        outcome.applied = int((folded.status == APPLIED).sum())
        outcome.duplicates = skipped + int((folded.status == DUPLICATE).sum())
        outcome.event_times = columns.ts
        pieces = []
        for part, start, end, marks, applied in spans:
            following = max(part.next, applied)
            write = UserWrite(part.partition, applied, following, marks)
            self._pack(write, profiles, [(user, rows[part.partition, user]) for user in users[part.partition]])
            outcome.writes.append(write)
            if following > applied:
                pieces.append(columns.entries(folded, start, end, (part.partition, applied, following)))
        outcome.records = _records(pieces)
        return outcome

    def _pack(self, write: UserWrite, profiles: Profiles, users: list[tuple[str, int]]) -> None:
        changed = [(user, row) for user, row in users if profiles.changed[row]]
        picked = np.fromiter((row for _, row in changed), np.int64, len(changed))
        names = [user for user, _ in changed]
        write.profiles = dict(zip(names, profiles.pack(picked), strict=True))
        if self._embed is not None and names:
            write.embeddings = dict(zip(names, self._embed(profiles, picked), strict=True))
        seen = [(user, row) for user, row in changed if profiles.seen_changed[row]]
        packed = profiles.pack_seen(np.fromiter((row for _, row in seen), np.int64, len(seen)))
        write.seen = {user: value for (user, _), value in zip(seen, packed, strict=True)}

    def _hash(self, text: str) -> int:
        found = self._hashes.get(text)
        if found is None:
            if len(self._hashes) > 500_000:
                self._hashes.clear()
            found = self._hashes[text] = item_hash(text)
        return found

    def _enter(self, c: _Columns, partition: int, row: int, offset: int, record_ms: int, event: Event) -> None:
        record_s = record_ms / 1000
        c.partition.append(partition)
        c.user.append(row)
        c.offset.append(offset)
        c.ts.append(event.ts)
        c.time.append(min(event.ts, record_s))
        c.record_s.append(record_ms // 1000)
        c.slate.append(item_hash(event.slate_id) if event.slate_id else 0)
        c.event.append(0 if event.event_id is None else item_hash(event.event_id))
        if isinstance(event, Impression):
            c.kind.append(IMPRESSION)
            c.item.append(0)
            c.weight.append(0.0)
            c.value.append(0.0)
            c.ids.append("")
            c.extra.append(event.payload)
            c.shown += [self._hash(item) & 0xFFFFFFFF for item in event.shown]
            c.shown_start.append(len(c.shown))
            return
        kind, weight, value = (VIEW, 0.0, 0.0) if isinstance(event, View) else self._weights.of(event)
        c.kind.append(kind)
        c.item.append(self._hash(event.item_id))
        c.weight.append(weight)
        c.value.append(value)
        c.ids.append(event.item_id)
        c.extra.append(_CONTEXT.encode(event.context) if event.context else b"")
        c.shown_start.append(len(c.shown))


def _profiles(
    users: Mapping[int, list[str]], reads: Mapping[int, UserRead]
) -> tuple[Profiles, dict[tuple[int, str], int]]:
    packed: list[bytes | None] = []
    seen: list[bytes | None] = []
    rows: dict[tuple[int, str], int] = {}
    for partition, names in users.items():
        rows.update({(partition, user): len(packed) + i for i, user in enumerate(names)})
        packed += reads[partition].profiles
        seen += reads[partition].seen
    return Profiles(packed, seen), rows


def _records(pieces: list[Entries]) -> list[Entries]:
    """Join a micro-batch's pieces into one record where that fits, else cut each piece to the cap."""
    if len(pieces) > 1:
        joined = concatenate(pieces)
        if joined.size() <= MAX_RECORD_BYTES:
            return [joined]
    return [record for piece in pieces for record in split(piece)]


class _Columns:
    """Columns of a micro-batch while it is read event by event; plain lists, because appending to them is cheapest."""

    def __init__(self) -> None:
        self.partition: list[int] = []
        self.user: list[int] = []
        self.offset: list[int] = []
        self.ts: list[float] = []
        self.time: list[float] = []
        self.record_s: list[int] = []
        self.kind: list[int] = []
        self.item: list[int] = []
        self.event: list[int] = []
        self.weight: list[float] = []
        self.value: list[float] = []
        self.slate: list[int] = []
        self.shown: list[int] = []
        self.shown_start: list[int] = [0]
        self.ids: list[str] = []
        self.extra: list[bytes] = []
        self._made: EventColumns | None = None

    def arrays(self) -> EventColumns:
        """Return the columns as arrays."""
        self._made = EventColumns(
            user=np.array(self.user, np.int64), kind=np.array(self.kind, np.uint8),
            item=np.array(self.item, np.uint64), time=np.array(self.time, np.float64),
            record_s=np.array(self.record_s, np.uint32), event=np.array(self.event, np.uint64),
            weight=np.array(self.weight, np.float64), slate=np.array(self.slate, np.uint64),
            shown_start=np.array(self.shown_start, np.int64), shown=np.array(self.shown, np.uint32),
        )  # fmt: skip
        return self._made

    def entries(self, folded: Folded, start: int, end: int, covered: tuple[int, int, int]) -> Entries:
        """Return the entries of the applied events among start:end, which cover this range of their partition."""
        made = self._made
        assert made is not None
        rows = start + np.flatnonzero(folded.status[start:end] == APPLIED)
        lengths = folded.history_length[rows].astype(np.int64)
        begin = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=begin[1:])
        filled = np.arange(folded.history_item.shape[1]) < lengths[:, None]
        return Entries(
            ranges=[covered],
            partition=np.full(len(rows), covered[0], np.uint16),
            offset=np.array(self.offset, np.int64)[rows],
            index=np.zeros(len(rows), np.uint16),
            time=made.time[rows],
            kind=made.kind[rows],
            flags=folded.flags[rows],
            target=made.item[rows],
            weight=made.weight[rows],
            value=np.array(self.value, np.float64)[rows],
            slates=folded.slates[rows],
            history_start=begin,
            history_item=folded.history_item[rows][filled],
            history_time=folded.history_time[rows][filled],
            history_kind=folded.history_kind[rows][filled],
            ids=[self.ids[i] for i in rows],
            extra=[self.extra[i] for i in rows],
        )
