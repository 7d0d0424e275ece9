"""The packed layout of a user profile, and the profiles of a micro-batch unpacked into arrays.

Knows nothing about Kafka, Redis, event structs or item state.

Profile layout, version 3, little endian; n <= 50 sequence entries, d <= 256 event hashes, s <= 4 slates, a <= 16
items pushed away:

    version u8, n u8, s u8, a u8, d u16, 0 u16                              8 B
    counters 8 x u32 (COUNTERS), first and last effective time f64         48 B
    ended f64: effective time of the erasure or alias that ended it         8 B   (0: none; not in version 1)
    tally 8 x f32 (models.examples.TALLY)                                  32 B   (from version 3 on)
    sequence, oldest first: item u64, time f64, weight f32, kind u8        21 n   (kind | 0x80: this entry had a voice)
    dedupe, oldest first: event hash u64, record time u32 (s)              12 d
    slates, oldest first: slate u64, record time u32 (s)                   12 s
    pushed away, oldest first: item u64, time f64                          16 a   (from version 3 on)
    how many items each slate showed, u8                                      s
    shown items of each slate, by position: low 32 bits of the hash u32     4 each

Version 1 has no `ended`, 2 neither tally nor what was pushed away; all are read, and which is written is a setting (a
profile that was ended is at least version 2). Events at or before `ended` are ignored. An ended profile keeps its
dedupe window and nothing else, and is no profile to anybody until a later event starts it again.

The seen list is a value of its own: at most 4,096 low 32-bit item hashes, oldest first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.examples import AVERSE, HISTORY, SLATES, TALLY
from models.examples import CodecError as CodecError
from models.profile.folding import COUNTERS, fold_events

VERSION: Final = 3
SEQUENCE: Final = 50
DEDUPE: Final = 256
SLATE_ITEMS: Final = 24
SEEN: Final = 4096
AWAY: Final = 16
"""Items pushed away that a profile keeps: hidden, skipped, left at once."""
WINDOW_S: Final = 24 * 3600
"""Record time after which an event id or a slate is forgotten, s."""
HEADER_BYTES: Final = {1: 56, 2: 64, 3: 96}
"""Bytes before the sequence, by version."""
FUTURE: Final = 16
"""First bytes from the next version up to this one are later codecs, anything beyond is foreign."""

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class FutureCodecError(CodecError):
    """Bytes of a codec that a later version of Freshet wrote: nothing is wrong with them, this build is too old."""


@dataclass(slots=True)
class ProfileView:
    """A profile as a reader wants it: the sequence and slates newest first.

    items u64[n], times f64[n] (s), kinds u8[n], weights f32[n]; seen u32[k]; slates (hash, record time, shown u32[]).
    averse u64[a], averse_times f64[a] (s): items pushed away, newest first; tally f32[8] (models.examples.TALLY).
    `known` is false for an unknown user and for one whose profile ended (at `ended`, s) and who did nothing since.
    """

    known: bool
    ended: float

    items: U64
    times: F64
    kinds: U8
    weights: NDArray[np.float32]
    seen: U32
    counters: dict[str, int]
    first_time: float
    last_time: float
    slates: list[tuple[int, int, U32]]
    averse: U64
    averse_times: F64
    tally: F32


class Profiles:
    """The profiles of one micro-batch's users, unpacked into arrays; `u` users.

    Made from the packed bytes the store gave (None for an unknown user), folded in place, packed again.
    `codec` is the version that `pack` writes. Raises CodecError where bytes are foreign or truncated, FutureCodecError
    where a later version wrote them.
    """

    def __init__(self, packed: list[bytes | None], seen: list[bytes | None], *, codec: int = VERSION) -> None:
        u = len(packed)
        self.codec = codec
        self.exists = np.fromiter((p is not None for p in packed), np.bool_, u)
        self.counters = np.zeros((u, 8), np.uint32)
        self.times = np.zeros((u, 2))
        self.ended = np.zeros((u, 1))
        self.n = np.zeros(u, np.int64)
        self.item = np.empty((u, SEQUENCE), np.uint64)
        self.time = np.empty((u, SEQUENCE))
        self.weight = np.empty((u, SEQUENCE), np.float32)
        self.kind = np.empty((u, SEQUENCE), np.uint8)
        self.d = np.zeros(u, np.int64)
        self.event = np.empty((u, DEDUPE), np.uint64)
        self.event_time = np.empty((u, DEDUPE), np.uint32)
        self.s = np.zeros(u, np.int64)
        self.slate = np.empty((u, SLATES), np.uint64)
        self.slate_time = np.empty((u, SLATES), np.uint32)
        self.slate_size = np.zeros((u, SLATES), np.uint8)
        self.slate_items = np.empty((u, SLATES, SLATE_ITEMS), np.uint32)
        self.seen_n = np.fromiter((len(b) // 4 if b else 0 for b in seen), np.int64, u)
        self.seen = np.empty((u, SEEN), np.uint32)
        self.averse_n = np.zeros(u, np.int64)
        self.averse = np.empty((u, AWAY), np.uint64)
        self.averse_time = np.empty((u, AWAY))
        self.tally = np.zeros((u, len(TALLY)), np.float32)
        self.changed_by = np.empty(u, np.int64)  # the last event of the micro-batch that changed the profile
        self.changed_by.fill(-1)  # np.full takes four times as long, and lookups come here too
        self.seen_changed = np.zeros(u, np.bool_)
        self._load(packed, seen)

    def _load(self, packed: list[bytes | None], seen: list[bytes | None]) -> None:
        lists = [stored for stored in seen if stored]
        for size in map(len, lists):
            if size % 4 or size > 4 * SEEN:
                raise CodecError(f"seen list: expected at most {SEEN} hashes of 4 bytes, got {size} bytes")
        _spread(np.frombuffer(b"".join(lists), "<u4"), self.seen_n, self.seen)
        sizes = np.fromiter((len(p) if p else 0 for p in packed), np.int64, len(packed))
        start = np.zeros(len(packed) + 1, np.int64)
        np.cumsum(sizes, out=start[1:])
        buffer = np.frombuffer(b"".join(p for p in packed if p), np.uint8)
        bad = int(_unpack(buffer, start, self.exists, *self._columns(), *self._byte_views()))
        if bad >= 0:
            raise _unreadable(packed[bad] or b"")

    def _columns(self) -> tuple[I64, I64, I64, I64, U8]:
        return self.n, self.d, self.s, self.averse_n, self.slate_size

    def _byte_views(self) -> tuple[U8, ...]:
        columns = (
            self.counters, self.times, self.ended, self.item, self.time, self.weight, self.kind, self.event,
            self.event_time, self.slate, self.slate_time,
            self.slate_items.reshape(len(self.n), math.prod(self.slate_items.shape[1:])), self.averse,
            self.averse_time, self.tally,
        )  # fmt: skip
        return tuple(column.view(np.uint8) for column in columns)

    def pack(self, rows: I64) -> list[bytes]:
        """Return the packed bytes of these users' profiles."""
        versions = np.where(self.ended[rows, 0] > 0.0, max(self.codec, 2), self.codec).astype(np.uint8)
        header = np.array([0, *HEADER_BYTES.values()])[versions]
        sizes = (
            header + np.where(versions >= 3, 16 * self.averse_n[rows], 0) + 21 * self.n[rows] + 12 * self.d[rows]
            + 13 * self.s[rows] + 4 * _shown_counts(self.s, self.slate_size, rows)
        )  # fmt: skip
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(sizes, out=start[1:])
        buffer = np.zeros(int(start[-1]), np.uint8)
        _pack(buffer, start, rows, versions, *self._columns(), *self._byte_views())
        data, cuts = buffer.tobytes(), start.tolist()
        return [data[a:b] for a, b in pairwise(cuts)]

    def pack_seen(self, rows: I64) -> list[bytes]:
        """Return the packed seen lists of these users."""
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.seen_n[rows], out=start[1:])
        buffer = np.empty(int(start[-1]), np.uint32)
        _gather(buffer, rows, self.seen_n, self.seen)
        data, cuts = buffer.tobytes(), (4 * start).tolist()
        return [data[a:b] for a, b in pairwise(cuts)]

    def fold(self, batch: EventColumns, out: Folded, first: int, last: int) -> None:
        """Fold events first:last of a micro-batch, none about identity (models/identity.py), in order and in place."""
        out.overflow += int(
            fold_events(
                first, last,
                batch.user, batch.kind, batch.item, batch.time, batch.record_s, batch.event, batch.weight, batch.value,
                batch.slate, batch.shown_start, batch.shown,
                self.exists, self.counters, self.times, self.ended, self.n, self.item, self.time, self.weight,
                self.kind, self.d, self.event, self.event_time, self.s, self.slate, self.slate_time, self.slate_size,
                self.slate_items, self.seen_n, self.seen, self.averse_n, self.averse, self.averse_time, self.tally,
                self.changed_by, self.seen_changed,
                out.status, out.flags, out.slates, out.history_length, out.history_item, out.history_time,
                out.history_kind, out.history_weight, out.tally, out.averse_length, out.averse,
            )
        )  # fmt: skip


def _unreadable(head: bytes) -> CodecError:
    got = f"got {len(head)} bytes starting {head[:8].hex()}"
    if len(head) >= HEADER_BYTES[VERSION] and VERSION < head[0] < FUTURE:
        return FutureCodecError(
            f"profile: expected version 1 to {VERSION}, {got}: a later version of Freshet wrote it; run that one, or"
            " set FRESHET_CODEC there to what this one reads and `freshet rebuild`"
        )
    return CodecError(f"profile: expected version 1 to {VERSION} with lengths that add up, {got}")


@dataclass(slots=True)
class EventColumns:
    """A micro-batch of n events as columns; `user` is the row in Profiles; hashes are 0 where there is none.

    user i64, kind u8, item u64, time f64 (effective, s), record_s u32 (record time, whole s), event u64, weight f64,
    value f64 (models.examples), slate u64; an impression's shown items: shown[shown_start[i]:shown_start[i + 1]] u32.
    """

    user: I64
    kind: U8
    item: U64
    time: F64
    record_s: U32
    event: U64
    weight: F64
    value: F64
    slate: U64
    shown_start: I64
    shown: U32
    moved: dict[int, Moved] = field(default_factory=dict)
    """What each merge (by its place in the batch) brings."""


@dataclass(slots=True)
class Moved:
    """What an alias takes from one profile to another; counters u32[8], sequence oldest first, kinds with voice bit.

    averse u64[a], averse_times f64[a], oldest first; tally f32[8].
    """

    items: U64
    times: F64
    weights: NDArray[np.float32]
    kinds: U8
    seen: U32
    counters: U32
    first_time: float
    last_time: float
    averse: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    averse_times: F64 = field(default_factory=lambda: np.empty(0))
    tally: F32 = field(default_factory=lambda: np.zeros(len(TALLY), np.float32))


@dataclass(slots=True)
class Folded:
    """What n folded events derive: status and flags u8[n], slates u64[n, 4], histories [n, 20] newest first.

    tally f32[n, 8] and averse u64[n, 8] (newest first): the user's before the event.
    """

    status: U8
    flags: U8
    slates: U64
    history_length: U8
    history_item: U64
    history_time: F64
    history_kind: U8
    history_weight: F32
    tally: F32
    averse_length: U8
    averse: U64
    overflow: int = 0
    """Event ids that left the dedupe window because a user had more than 256 of them in it."""
    moved: dict[int, Moved] = field(default_factory=dict)
    """What each alias (by its place in the batch) took from its anonymous profile."""

    @classmethod
    def of(cls, n: int) -> Folded:
        """Return room for n events."""
        return cls(
            status=np.zeros(n, np.uint8), flags=np.zeros(n, np.uint8), slates=np.zeros((n, SLATES), np.uint64),
            history_length=np.zeros(n, np.uint8), history_item=np.empty((n, HISTORY), np.uint64),
            history_time=np.empty((n, HISTORY)), history_kind=np.empty((n, HISTORY), np.uint8),
            history_weight=np.empty((n, HISTORY), np.float32), tally=np.zeros((n, len(TALLY)), np.float32),
            averse_length=np.zeros(n, np.uint8), averse=np.empty((n, AVERSE), np.uint64),
        )  # fmt: skip


def unpack(profile: bytes | None, seen: bytes | None) -> ProfileView:
    """Read one packed profile and seen list for a reader; an unknown user reads as an empty profile."""
    one = Profiles([profile], [seen])
    n, s, a = int(one.n[0]), int(one.s[0]), int(one.averse_n[0])
    slates = [
        (int(one.slate[0, i]), int(one.slate_time[0, i]), one.slate_items[0, i, : one.slate_size[0, i]])
        for i in reversed(range(s))
    ]
    return ProfileView(
        known=bool(one.exists[0]),
        ended=float(one.ended[0, 0]),
        items=one.item[0, :n][::-1],
        times=one.time[0, :n][::-1],
        kinds=one.kind[0, :n][::-1] & np.uint8(0x7F),
        weights=one.weight[0, :n][::-1],
        seen=one.seen[0, : int(one.seen_n[0])],
        counters=dict(zip(COUNTERS, one.counters[0].tolist(), strict=True)),
        first_time=float(one.times[0, 0]),
        last_time=float(one.times[0, 1]),
        slates=slates,
        averse=one.averse[0, :a][::-1],
        averse_times=one.averse_time[0, :a][::-1],
        tally=one.tally[0],
    )


def canonical(profiles: list[bytes], codec: int = VERSION) -> list[bytes]:
    """Return packed profiles as one version writes them; two stores are compared by the newest."""
    read = Profiles(list(profiles), [None] * len(profiles), codec=codec)
    return read.pack(np.arange(len(profiles)))


@njit(cache=True)
def _spread(flat, lengths, lists):  # type: ignore[no-untyped-def]  # fmt: skip
    at = 0
    for u in range(len(lengths)):
        lists[u, : lengths[u]] = flat[at : at + lengths[u]]
        at += lengths[u]


@njit(cache=True)
def _gather(flat, rows, lengths, lists):  # type: ignore[no-untyped-def]  # fmt: skip
    at = 0
    for u in rows:
        flat[at : at + lengths[u]] = lists[u, : lengths[u]]
        at += lengths[u]


@njit(cache=True)
def _shown_counts(s: I64, slate_size: U8, rows: I64) -> I64:
    counts = np.zeros(len(rows), np.int64)
    for i in range(len(rows)):
        for j in range(s[rows[i]]):
            counts[i] += slate_size[rows[i], j]
    return counts


@njit(cache=True)
def _unpack(buffer, start, exists, n, d, s, a, slate_size, counters, times, ended, item, time, weight, kind, event, event_time, slate, slate_time, slate_items, averse, averse_time, tally):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Read packed profiles into rows; all columns are byte views. Returns the first bad row, or -1."""
    for u in range(len(n)):
        at, end = start[u], start[u + 1]
        if at == end:
            continue
        version = buffer[at]
        if end - at < 56 or version < 1 or version > 3:
            return u
        header = 56 if version == 1 else 64 if version == 2 else 96
        a[u] = buffer[at + 3] if version == 3 else 0
        n[u], s[u] = buffer[at + 1], buffer[at + 2]
        d[u] = buffer[at + 4] + 256 * np.int64(buffer[at + 5])
        if n[u] > 50 or s[u] > 4 or d[u] > 256 or a[u] > 16:
            return u
        if end - at < header + 21 * n[u] + 12 * d[u] + 13 * s[u] + 16 * a[u]:
            return u
        counters[u, :] = buffer[at + 8 : at + 40]
        times[u, :] = buffer[at + 40 : at + 56]
        if version >= 2:
            ended[u, :] = buffer[at + 56 : at + 64]
            over, lives = False, False
            for j in range(8):
                over |= ended[u, j] != 0
                lives |= times[u, 8 + j] != 0
            exists[u] = lives or not over
        if version == 3:
            tally[u, :] = buffer[at + 64 : at + 96]
        at += header
        for column, width, count in (
            (item, 8, n[u]), (time, 8, n[u]), (weight, 4, n[u]), (kind, 1, n[u]),
            (event, 8, d[u]), (event_time, 4, d[u]), (slate, 8, s[u]), (slate_time, 4, s[u]),
            (averse, 8, a[u]), (averse_time, 8, a[u]),
        ):  # fmt: skip
            column[u, : width * count] = buffer[at : at + width * count]
            at += width * count
        for j in range(s[u]):
            slate_size[u, j] = buffer[at + j]
        at += s[u]
        for j in range(s[u]):
            size = 4 * np.int64(slate_size[u, j])
            if size > 96 or at + size > end:
                return u
            slate_items[u, 96 * j : 96 * j + size] = buffer[at : at + size]
            at += size
        if at != end:
            return u
    return -1


@njit(cache=True)
def _pack(buffer, start, rows, versions, n, d, s, a, slate_size, counters, times, ended, item, time, weight, kind, event, event_time, slate, slate_time, slate_items, averse, averse_time, tally):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Write rows as packed profiles, the inverse of _unpack."""
    for i in range(len(rows)):
        u, at = rows[i], start[i]
        buffer[at], buffer[at + 1], buffer[at + 2] = versions[i], n[u], s[u]
        buffer[at + 4], buffer[at + 5] = d[u] % 256, d[u] // 256
        buffer[at + 8 : at + 40] = counters[u, :]
        buffer[at + 40 : at + 56] = times[u, :]
        at += 56
        if versions[i] >= 2:
            buffer[at : at + 8] = ended[u, :]
            at += 8
        kept = np.int64(0)
        if versions[i] >= 3:
            kept = a[u]
            buffer[start[i] + 3] = kept
            buffer[at : at + 32] = tally[u, :]
            at += 32
        for column, width, count in (
            (item, 8, n[u]), (time, 8, n[u]), (weight, 4, n[u]), (kind, 1, n[u]),
            (event, 8, d[u]), (event_time, 4, d[u]), (slate, 8, s[u]), (slate_time, 4, s[u]),
            (averse, 8, kept), (averse_time, 8, kept),
        ):  # fmt: skip
            buffer[at : at + width * count] = column[u, : width * count]
            at += width * count
        for j in range(s[u]):
            buffer[at + j] = slate_size[u, j]
        at += s[u]
        for j in range(s[u]):
            size = 4 * np.int64(slate_size[u, j])
            buffer[at : at + size] = slate_items[u, 96 * j : 96 * j + size]
            at += size
