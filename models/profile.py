"""The user profile: its packed layout, and the fold of one partition's events into profiles, event by event.

Knows nothing about Kafka, Redis, event structs or item state. Everything decided here (dedupe, windows, voice, joins)
depends on the profile and the event alone, so any cut of a stream into micro-batches ends in the same bytes
(DESIGN section 3, rule 2).

Profile layout, version 1, little endian; n <= 50 sequence entries, d <= 256 event hashes, s <= 4 slates:

    version u8, n u8, s u8, 0 u8, d u16, 0 u16                              8 B
    counters 8 x u32 (COUNTERS), first and last effective time f64         48 B
    sequence, oldest first: item u64, time f64, weight f32, kind u8        21 n   (kind | 0x80: this entry had a voice)
    dedupe, oldest first: event hash u64, record time u32 (s)              12 d
    slates, oldest first: slate u64, record time u32 (s), shown u8         13 s
    shown items of each slate, by position: low 32 bits of the hash u32     4 each

The seen list is a value of its own: at most 4,096 low 32-bit item hashes, oldest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.examples import ACTION, CLICK, DWELL, ENTERS, HISTORY, IMPRESSION, SHOWN, SLATES, VIEW, VOICE
from models.examples import CodecError as CodecError

VERSION: Final = 1
SEQUENCE: Final = 50
DEDUPE: Final = 256
SLATE_ITEMS: Final = 24
SEEN: Final = 4096
WINDOW_S: Final = 24 * 3600
"""Record time after which an event id or a slate is forgotten, s."""
VOICE_S: Final = 3600.0
"""Event time within which a user has one voice for an item (DESIGN section 3, rule 13), s."""
HEADER_BYTES: Final = 56
COUNTERS: Final = ("click", "dwell", "rating", "action", "view", "impression", "negative", "duplicate")
_NEGATIVE, _DUPLICATE = 6, 7

APPLIED, DUPLICATE = 1, 2
"""Status of a folded event; 0 where it was not folded."""

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


@dataclass(slots=True)
class ProfileView:
    """A profile as a reader wants it: the sequence and slates newest first.

    items u64[n], times f64[n] (s), kinds u8[n], weights f32[n]; seen u32[k]; slates (hash, record time, shown u32[]).
    """

    items: U64
    times: F64
    kinds: U8
    weights: NDArray[np.float32]
    seen: U32
    counters: dict[str, int]
    first_time: float
    last_time: float
    slates: list[tuple[int, int, U32]]


class Profiles:
    """The profiles of one micro-batch's users, unpacked into arrays; `u` users.

    Made from the packed bytes the store gave (None for an unknown user), folded in place, packed again.
    Raises CodecError where bytes are foreign, truncated or of another version.
    """

    def __init__(self, packed: list[bytes | None], seen: list[bytes | None]) -> None:
        u = len(packed)
        self.exists = np.fromiter((p is not None for p in packed), np.bool_, u)
        self.counters = np.zeros((u, 8), np.uint32)
        self.times = np.zeros((u, 2))
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
        self.changed = np.zeros(u, np.bool_)
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
        bad = int(_unpack(buffer, start, *self._columns(), *self._byte_views()))
        if bad >= 0:
            head = packed[bad] or b""
            raise CodecError(
                f"profile: expected version {VERSION} with lengths that add up,"
                f" got {len(head)} bytes starting {head[:8].hex()}"
            )

    def _columns(self) -> tuple[I64, I64, I64, U8]:
        return self.n, self.d, self.s, self.slate_size

    def _byte_views(self) -> tuple[U8, ...]:
        columns = (
            self.counters, self.times, self.item, self.time, self.weight, self.kind, self.event, self.event_time,
            self.slate, self.slate_time, self.slate_items.reshape(len(self.n), -1),
        )  # fmt: skip
        return tuple(column.view(np.uint8) for column in columns)

    def pack(self, rows: I64) -> list[bytes]:
        """Return the packed bytes of these users' profiles."""
        sizes = (
            HEADER_BYTES + 21 * self.n[rows] + 12 * self.d[rows] + 13 * self.s[rows]
            + 4 * _shown_counts(self.s, self.slate_size, rows)
        )  # fmt: skip
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(sizes, out=start[1:])
        buffer = np.zeros(int(start[-1]), np.uint8)
        _pack(buffer, start, rows, *self._columns(), *self._byte_views())
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

    def fold(self, batch: EventColumns) -> Folded:
        """Fold a micro-batch in order and return what each event derives; the profiles change in place."""
        n = len(batch.kind)
        out = Folded(
            status=np.zeros(n, np.uint8), flags=np.zeros(n, np.uint8), slates=np.zeros((n, SLATES), np.uint64),
            history_length=np.zeros(n, np.uint8), history_item=np.empty((n, HISTORY), np.uint64),
            history_time=np.empty((n, HISTORY)), history_kind=np.empty((n, HISTORY), np.uint8),
        )  # fmt: skip
        out.overflow = int(
            _fold(
                batch.user, batch.kind, batch.item, batch.time, batch.record_s, batch.event, batch.weight, batch.slate,
                batch.shown_start, batch.shown,
                self.exists, self.counters, self.times, self.n, self.item, self.time, self.weight, self.kind,
                self.d, self.event, self.event_time, self.s, self.slate, self.slate_time, self.slate_size,
                self.slate_items, self.seen_n, self.seen, self.changed, self.seen_changed,
                out.status, out.flags, out.slates, out.history_length, out.history_item, out.history_time,
                out.history_kind,
            )
        )  # fmt: skip
        return out


@dataclass(slots=True)
class EventColumns:
    """A micro-batch of n events as columns; `user` is the row in Profiles; hashes are 0 where there is none.

    user i64, kind u8, item u64, time f64 (effective, s), record_s u32 (record time, whole s), event u64, weight f64,
    slate u64; an impression's shown items are shown[shown_start[i]:shown_start[i + 1]] u32.
    """

    user: I64
    kind: U8
    item: U64
    time: F64
    record_s: U32
    event: U64
    weight: F64
    slate: U64
    shown_start: I64
    shown: U32


@dataclass(slots=True)
class Folded:
    """What n folded events derive: status and flags u8[n], slates u64[n, 4], histories [n, 20] newest first."""

    status: U8
    flags: U8
    slates: U64
    history_length: U8
    history_item: U64
    history_time: F64
    history_kind: U8
    overflow: int = 0
    """Event ids that left the dedupe window because a user had more than 256 of them in it."""


def unpack(profile: bytes | None, seen: bytes | None) -> ProfileView:
    """Read one packed profile and seen list for a reader; an unknown user reads as an empty profile."""
    one = Profiles([profile], [seen])
    n, s = int(one.n[0]), int(one.s[0])
    slates = [
        (int(one.slate[0, i]), int(one.slate_time[0, i]), one.slate_items[0, i, : one.slate_size[0, i]])
        for i in reversed(range(s))
    ]
    return ProfileView(
        items=one.item[0, :n][::-1],
        times=one.time[0, :n][::-1],
        kinds=one.kind[0, :n][::-1] & np.uint8(0x7F),
        weights=one.weight[0, :n][::-1],
        seen=one.seen[0, : int(one.seen_n[0])],
        counters=dict(zip(COUNTERS, one.counters[0].tolist(), strict=True)),
        first_time=float(one.times[0, 0]),
        last_time=float(one.times[0, 1]),
        slates=slates,
    )


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
def _unpack(buffer, start, n, d, s, slate_size, counters, times, item, time, weight, kind, event, event_time, slate, slate_time, slate_items):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Read packed profiles into rows; all columns are byte views. Returns the first bad row, or -1."""
    for u in range(len(n)):
        at, end = start[u], start[u + 1]
        if at == end:
            continue
        if end - at < 56 or buffer[at] != 1:
            return u
        n[u], s[u] = buffer[at + 1], buffer[at + 2]
        d[u] = buffer[at + 4] + 256 * np.int64(buffer[at + 5])
        if n[u] > 50 or s[u] > 4 or d[u] > 256 or end - at < 56 + 21 * n[u] + 12 * d[u] + 13 * s[u]:
            return u
        counters[u, :] = buffer[at + 8 : at + 40]
        times[u, :] = buffer[at + 40 : at + 56]
        at += 56
        for column, width, count in (
            (item, 8, n[u]), (time, 8, n[u]), (weight, 4, n[u]), (kind, 1, n[u]),
            (event, 8, d[u]), (event_time, 4, d[u]), (slate, 8, s[u]), (slate_time, 4, s[u]),
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
def _pack(buffer, start, rows, n, d, s, slate_size, counters, times, item, time, weight, kind, event, event_time, slate, slate_time, slate_items):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Write rows as packed profiles, the inverse of _unpack."""
    for i in range(len(rows)):
        u, at = rows[i], start[i]
        buffer[at], buffer[at + 1], buffer[at + 2] = 1, n[u], s[u]
        buffer[at + 4], buffer[at + 5] = d[u] % 256, d[u] // 256
        buffer[at + 8 : at + 40] = counters[u, :]
        buffer[at + 40 : at + 56] = times[u, :]
        at += 56
        for column, width, count in (
            (item, 8, n[u]), (time, 8, n[u]), (weight, 4, n[u]), (kind, 1, n[u]),
            (event, 8, d[u]), (event_time, 4, d[u]), (slate, 8, s[u]), (slate_time, 4, s[u]),
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


@njit(cache=True)
def _drop_first(row, n):  # type: ignore[no-untyped-def]  # fmt: skip
    for j in range(n - 1):
        row[j] = row[j + 1]


@njit(cache=True)
def _remember_event(u, event, record_s, d, events, event_time):  # type: ignore[no-untyped-def]  # fmt: skip
    """Enter an event id in the dedupe window; 0 = entered, 1 = known, 2 = entered and the oldest left early."""
    expired = 0
    while expired < d[u] and event_time[u, expired] + 86400 < record_s:
        expired += 1
    if expired:
        for j in range(expired, d[u]):
            events[u, j - expired] = events[u, j]
            event_time[u, j - expired] = event_time[u, j]
        d[u] -= expired
    for j in range(d[u]):
        if events[u, j] == event:
            return 1
    full = d[u] == 256
    if full:
        _drop_first(events[u], 256)
        _drop_first(event_time[u], 256)
        d[u] -= 1
    events[u, d[u]] = event
    event_time[u, d[u]] = record_s
    d[u] += 1
    return 2 if full else 0


@njit(cache=True)
def _remember_slate(u, slate, record_s, shown, s, slates, slate_time, slate_size, slate_items):  # type: ignore[no-untyped-def]  # fmt: skip
    """Enter a slate as the newest; the oldest leaves when there are four."""
    if s[u] == 4:
        for j in range(3):
            slates[u, j] = slates[u, j + 1]
            slate_time[u, j] = slate_time[u, j + 1]
            slate_size[u, j] = slate_size[u, j + 1]
            slate_items[u, j] = slate_items[u, j + 1]
        s[u] = 3
    j = s[u]
    slates[u, j], slate_time[u, j] = slate, record_s
    size = min(len(shown), 24)
    slate_size[u, j] = size
    slate_items[u, j, :size] = shown[:size]
    s[u] += 1


@njit(cache=True)
def _shows(u, j, low, slate_size, slate_items):  # type: ignore[no-untyped-def]  # fmt: skip
    for q in range(slate_size[u, j]):  # noqa: SIM110 - numba has no any()
        if slate_items[u, j, q] == low:
            return True
    return False


@njit(cache=True)
def _join(u, explicit, low, record_s, s, slates, slate_time, slate_size, slate_items, out):  # type: ignore[no-untyped-def]  # fmt: skip
    """List the slates this outcome may belong to: the named or newest showing one first. True if it showed it."""
    first, shown = -1, False
    for j in range(s[u] - 1, -1, -1):
        if slate_time[u, j] + 86400 < record_s:
            break
        if explicit != 0:
            if slates[u, j] == explicit:
                first, shown = j, _shows(u, j, low, slate_size, slate_items)
                break
        elif _shows(u, j, low, slate_size, slate_items):
            first, shown = j, True
            break
    k = 0
    if explicit != 0:
        out[0] = explicit
        k = 1
        if first < 0:
            # A slate the profile no longer knows: the client says it was shown there.
            shown = True
    elif first >= 0:
        out[0] = slates[u, first]
        k = 1
    for j in range(s[u] - 1, -1, -1):
        if k == 4 or slate_time[u, j] + 86400 < record_s:
            break
        if j != first and slates[u, j] != explicit:
            out[k] = slates[u, j]
            k += 1
    return shown


@njit(cache=True)
def _voice(u, item, t, n, items, times, kinds):  # type: ignore[no-untyped-def]  # fmt: skip
    """True unless the sequence remembers a voice of this user for this item within an hour of event time."""
    for j in range(n[u]):  # noqa: SIM110 - numba has no all()
        if items[u, j] == item and kinds[u, j] & 0x80 and abs(times[u, j] - t) < 3600.0:
            return False
    return True


@njit(cache=True)
def _remember_seen(u, low, seen_n, seen):  # type: ignore[no-untyped-def]  # fmt: skip
    for j in range(seen_n[u]):
        if seen[u, j] == low:
            return False
    if seen_n[u] == 4096:
        _drop_first(seen[u], 4096)
        seen_n[u] -= 1
    seen[u, seen_n[u]] = low
    seen_n[u] += 1
    return True


@njit(cache=True)
def _fold(user, kind, item, time, record_s, event, weight, slate, shown_start, shown, exists, counters, times, n, items, seq_time, seq_weight, seq_kind, d, events, event_time, s, slates, slate_time, slate_size, slate_items, seen_n, seen, changed, seen_changed, status, flags, out_slates, history_length, history_item, history_time, history_kind):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Fold events in order, one at a time; the only place where a profile changes."""
    overflow = 0
    for i in range(len(user)):
        u, t, low = user[i], time[i], np.uint32(item[i] & np.uint64(0xFFFFFFFF))
        if kind[i] == IMPRESSION:
            status[i] = 1
            out_slates[i, 0] = slate[i]
            if exists[u]:  # an impression creates no profile
                _remember_slate(u, slate[i], record_s[i], shown[shown_start[i] : shown_start[i + 1]], s, slates, slate_time, slate_size, slate_items)  # noqa: E501  # fmt: skip
                counters[u, kind[i] - 1] += 1
                changed[u] = True
            continue
        changed[u] = True
        if event[i] != 0:
            found = _remember_event(u, event[i], record_s[i], d, events, event_time)
            if found == 1:
                counters[u, _DUPLICATE] += 1
                status[i] = 2
                continue
            overflow += found == 2
        status[i] = 1
        counters[u, kind[i] - 1] += 1
        if not exists[u]:
            exists[u] = True
            times[u, 0], times[u, 1] = t, t
        times[u, 0], times[u, 1] = min(times[u, 0], t), max(times[u, 1], t)
        if _join(u, slate[i], low, record_s[i], s, slates, slate_time, slate_size, slate_items, out_slates[i]):
            flags[i] |= SHOWN
        if kind[i] == VIEW:
            continue
        if weight[i] < 0.0:
            counters[u, _NEGATIVE] += 1
        last = n[u] - 1
        k = min(n[u], 20)
        history_length[i] = k
        for j in range(k):
            history_item[i, j] = items[u, last - j]
            history_time[i, j] = seq_time[u, last - j]
            history_kind[i, j] = seq_kind[u, last - j] & 0x7F
        if _remember_seen(u, low, seen_n, seen):
            seen_changed[u] = True
        if kind[i] != CLICK and last >= 0 and items[u, last] == item[i]:
            seq_weight[u, last] += np.float32(weight[i])
            seq_kind[u, last] = kind[i] | (seq_kind[u, last] & 0x80)
            continue
        if (kind[i] == DWELL or kind[i] == ACTION) and not weight[i] > 0.0:
            continue
        flags[i] |= ENTERS
        voice = _voice(u, item[i], t, n, items, seq_time, seq_kind)
        if voice:
            flags[i] |= VOICE
        if n[u] == 50:
            _drop_first(items[u], 50)
            _drop_first(seq_time[u], 50)
            _drop_first(seq_weight[u], 50)
            _drop_first(seq_kind[u], 50)
            n[u] -= 1
        items[u, n[u]], seq_time[u, n[u]], seq_weight[u, n[u]] = item[i], t, np.float32(weight[i])
        seq_kind[u, n[u]] = kind[i] | (0x80 if voice else 0)
        n[u] += 1
    return overflow
