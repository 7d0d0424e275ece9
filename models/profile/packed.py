"""The packed layout of a user profile, and the profiles of a micro-batch unpacked into records.

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

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.examples import AVERSE, HISTORY, SLATES, TALLY, Entries
from models.examples import CodecError as CodecError
from models.profile.folding import AWAYS, COUNTERS, ENTRIES, OVERFLOW, SLOTS, fold_events

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

PROFILE: Final = np.dtype(
    [
        ("counters", np.uint32, len(COUNTERS)), ("times", np.float64, 2), ("ended", np.float64),
        ("tally", np.float32, len(TALLY)),
        ("n", np.int64), ("d", np.int64), ("s", np.int64), ("averse_n", np.int64), ("seen_n", np.int64),
        ("changed_by", np.int64), ("exists", np.bool_), ("seen_changed", np.bool_),
        ("item", np.uint64, SEQUENCE), ("time", np.float64, SEQUENCE), ("weight", np.float32, SEQUENCE),
        ("kind", np.uint8, SEQUENCE),
        ("event", np.uint64, DEDUPE), ("event_time", np.uint32, DEDUPE),
        ("slate", np.uint64, SLATES), ("slate_time", np.uint32, SLATES), ("slate_size", np.uint8, SLATES),
        ("slate_items", np.uint32, (SLATES, SLATE_ITEMS)),
        ("averse", np.uint64, AWAY), ("averse_time", np.float64, AWAY),
        ("seen", np.uint32, SEEN),
    ], align=True,
)  # fmt: skip
"""A profile while it is folded: what is stored, `changed_by`: the last event of the micro-batch that changed it, -1 for
none, and whether its seen list changed. It begins as the stored header does behind its lengths."""
EVENT: Final = np.dtype(
    [
        ("user", np.int64), ("offset", np.int64), ("item", np.uint64), ("event", np.uint64), ("slate", np.uint64),
        ("time", np.float64), ("weight", np.float64), ("value", np.float64), ("shown_start", np.int64),
        ("shown_n", np.int64), ("record_s", np.uint32), ("partition", np.uint16), ("kind", np.uint8),
    ], align=True,
)  # fmt: skip
"""An event of a micro-batch: `user` is the row in Profiles; hashes are 0 where there is none; `time` is the effective
one, s, record_s the record's in whole seconds; value as in models.examples; of an impression the place of its items in
`Events.shown`."""
ROOM: Final = 256
"""Users whose records a fold keeps the memory of, 5 MB: numpy takes its time over records of so many fields."""
_SIZE: Final = PROFILE.itemsize
_SEEN: Final[int] = PROFILE.fields["seen"][1]  # type: ignore[index]
_SIZES: Final[int] = PROFILE.fields["slate_size"][1]  # type: ignore[index]
_SHOWN: Final[int] = PROFILE.fields["slate_items"][1]  # type: ignore[index]
_ENDED: Final[int] = PROFILE.fields["ended"][1]  # type: ignore[index]
_COLUMNS: Final = tuple(
    (PROFILE.fields[name][1], PROFILE[name].base.itemsize, of)  # type: ignore[index]
    for of, names in enumerate((
        ("item", "time", "weight", "kind"), ("event", "event_time"), ("slate", "slate_time"), ("averse", "averse_time")
    ))
    for name in names
)  # fmt: skip
"""What follows the stored header, in order: place in PROFILE, width, which of the lengths n, d, s, a counts it."""
_LARGEST: Final = HEADER_BYTES[VERSION] + 21 * SEQUENCE + 12 * DEDUPE + (13 + 4 * SLATE_ITEMS) * SLATES + 16 * AWAY

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_NO_WEIGHTS: Final = np.empty(0, np.float16)


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


class Room:
    """Memory for the records of u users."""

    def __init__(self, u: int = ROOM) -> None:
        self.rows: NDArray[Any] = np.empty(u, PROFILE)
        self.bytes = self.rows.view(np.uint8)


class Profiles:
    """The profiles of one micro-batch's users, unpacked into `rows`, records of PROFILE[u]; their columns by name.

    Made from the packed bytes the store gave (None for an unknown user), folded in place, packed again.
    `codec` is the version that `pack` writes; `room` is where they may lie, None: in memory of their own. Raises
    CodecError where bytes are foreign or truncated, FutureCodecError where a later version wrote them.
    """

    def __init__(
        self, packed: list[bytes | None], seen: list[bytes | None], *, codec: int = VERSION, room: Room | None = None
    ) -> None:
        stored, u = packed + seen, len(packed)
        self.codec = codec
        room = room if room is not None and u <= ROOM else Room(u)
        self.rows, self._bytes = room.rows[:u], room.bytes
        buffer = np.frombuffer(b"".join([value for value in stored if value]), np.uint8)
        lengths = np.array([-1 if value is None else len(value) for value in stored], np.int64)
        bad = int(_unpack(buffer, lengths, self.rows, self._bytes))
        if bad >= len(packed):
            size = lengths[bad]
            raise CodecError(f"seen list: expected at most {SEEN} hashes of 4 bytes, got {size} bytes")
        if bad >= 0:
            raise _unreadable(packed[bad] or b"")

    def __getattr__(self, column: str) -> NDArray[Any]:
        if column not in PROFILE.names:  # type: ignore[operator]
            raise AttributeError(column)
        found: NDArray[Any] = self.rows[column]
        return found

    def pack(self, rows: Sequence[int] | I64) -> list[bytes]:
        """Return the packed bytes of these users' profiles."""
        buffer, start = np.empty(len(rows) * _LARGEST, np.uint8), np.zeros(len(rows) + 1, np.int64)
        _pack(self.rows, self._bytes, np.asarray(rows, np.int64), self.codec, buffer, start)
        cuts = start.tolist()
        data = buffer[: cuts[-1]].tobytes()
        return [data[a:b] for a, b in pairwise(cuts)]

    def changes(self) -> list[tuple[int, int, bool, bytes, bytes | None]]:
        """Return of each profile that changed its row, what changed it last, whether it is one, its bytes.

        And those of its seen list, None where that did not change.
        """
        u = len(self.rows)
        buffer, found = np.empty(u * (_LARGEST + 4 * SEEN), np.uint8), np.empty((u, 6), np.int64)
        k = _pack_changed(self.rows, self._bytes, self.codec, buffer, found)
        return [
            (row, by, exists > 0, buffer[a:b].tobytes(), buffer[b:c].tobytes() if c >= b else None)
            for row, by, exists, a, b, c in found[:k].tolist()
        ]

    def fold(self, batch: Events, out: Folded, first: int, last: int) -> None:
        """Fold events first:last of a micro-batch, none about identity (models/identity.py), in order and in place."""
        made = out.made
        fold_events(
            first, last, batch.rows, batch.shown, self.rows, out.counts, out.source, made.partition, made.offset,
            made.time, made.kind, made.flags, made.target, made.weight, made.value, made.slates, made.history_start,
            made.history_item, made.history_time, made.history_kind, out.history_weight, made.tally,
            made.averse_start, made.averse,
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
class Events:
    """A micro-batch: rows, records of EVENT[n]; shown u64: the items of its impressions."""

    rows: NDArray[Any]
    shown: U64
    identities: Sequence[int] = ()
    """The places of those about identity (models/identity.py)."""
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
    """What n folded events derive: counts i64[7] (ENTRIES and so on), and of each entry its event, source i64[n].

    `made` has room for n entries; history_weight f32: theirs, none greater than a float16 can be.
    """

    counts: I64
    source: I64
    made: Entries
    history_weight: F32
    moved: dict[int, Moved] = field(default_factory=dict)
    """What each alias (by its place in the batch) took from its anonymous profile."""

    @classmethod
    def of(cls, n: int) -> Folded:
        """Return room for n events."""
        made = Entries(
            ranges=[], partition=np.empty(n, np.uint16), offset=np.empty(n, np.int64), index=np.zeros(n, np.uint16),
            time=np.empty(n), kind=np.empty(n, np.uint8), flags=np.empty(n, np.uint8), target=np.empty(n, np.uint64),
            weight=np.empty(n), value=np.empty(n), slates=np.empty((n, SLATES), np.uint64),
            history_start=np.zeros(n + 1, np.int64), history_item=np.empty(n * HISTORY, np.uint64),
            history_time=np.empty(n * HISTORY), history_kind=np.empty(n * HISTORY, np.uint8),
            history_weight=_NO_WEIGHTS, tally=np.empty((n, len(TALLY)), np.float32),
            averse_start=np.zeros(n + 1, np.int64), averse=np.empty(n * AVERSE, np.uint64),
        )  # fmt: skip
        return cls(np.zeros(OVERFLOW + 1, np.int64), np.empty(n, np.int64), made, np.empty(n * HISTORY, np.float32))

    def entries(self, ranges: list[tuple[int, int, int]], ids: list[str], extra: list[bytes], version: int) -> Entries:
        """Return the entries that were made, with what only the events know of them."""
        made, counts = self.made, self.counts.tolist()
        n, slots, away = counts[ENTRIES], counts[SLOTS], counts[AWAYS]
        made.ranges, made.ids, made.extra, made.version = ranges, ids, extra, version
        made.history_item, made.history_time = made.history_item[:slots], made.history_time[:slots]
        made.history_kind, made.averse = made.history_kind[:slots], made.averse[:away]
        made.history_weight = self.history_weight[:slots].astype(np.float16)
        return made if n == len(made) else made.slice(0, n, ranges)


def unpack(profile: bytes | None, seen: bytes | None) -> ProfileView:
    """Read one packed profile and seen list for a reader; an unknown user reads as an empty profile."""
    one = Profiles([profile], [seen]).rows[0]
    n, s, a = one["n"], one["s"], one["averse_n"]
    hashes, times, sizes, items = one["slate"], one["slate_time"], one["slate_size"], one["slate_items"]
    return ProfileView(
        known=bool(one["exists"]),
        ended=float(one["ended"]),
        items=one["item"][:n][::-1],
        times=one["time"][:n][::-1],
        kinds=one["kind"][:n][::-1] & np.uint8(0x7F),
        weights=one["weight"][:n][::-1],
        seen=one["seen"][: one["seen_n"]],
        counters=dict(zip(COUNTERS, one["counters"].tolist(), strict=True)),
        first_time=float(one["times"][0]),
        last_time=float(one["times"][1]),
        slates=[(int(hashes[i]), int(times[i]), items[i, : sizes[i]]) for i in range(s - 1, -1, -1)],
        averse=one["averse"][:a][::-1],
        averse_times=one["averse_time"][:a][::-1],
        tally=one["tally"],
    )


def canonical(profiles: list[bytes], codec: int = VERSION) -> list[bytes]:
    """Return packed profiles as one version writes them; two stores are compared by the newest."""
    read = Profiles(list(profiles), [None] * len(profiles), codec=codec)
    return read.pack(np.arange(len(profiles)))


@njit(cache=True)
def _unpack(buffer, lengths, profiles, raw):  # type: ignore[no-untyped-def]  # fmt: skip
    """Read packed profiles, then seen lists (lengths -1: none), into records; `raw` are their bytes.

    Returns the first value that cannot be read, or -1.
    """
    users, end = len(profiles), 0
    for u in range(users):
        p, row = profiles[u], u * _SIZE
        at, end = end, end + max(lengths[u], 0)
        p.n = p.d = p.s = p.averse_n = 0
        p.changed_by, p.exists, p.seen_changed = -1, lengths[u] >= 0, False
        raw[row : row + 88] = 0
        if at == end:
            continue
        version = buffer[at]
        if end - at < 56 or version < 1 or version > 3:
            return u
        header = 56 if version == 1 else 64 if version == 2 else 96
        p.n, p.s = buffer[at + 1], buffer[at + 2]
        p.averse_n = buffer[at + 3] if version == 3 else 0
        p.d = buffer[at + 4] + 256 * np.int64(buffer[at + 5])
        if p.n > 50 or p.s > 4 or p.d > 256 or p.averse_n > 16:
            return u
        if end - at < header + 21 * p.n + 12 * p.d + 13 * p.s + 16 * p.averse_n:
            return u
        raw[row : row + header - 8] = buffer[at + 8 : at + header]
        if version >= 2:
            over, lives = False, False
            for j in range(8):
                over |= raw[row + _ENDED + j] != 0
                lives |= raw[row + _ENDED - 8 + j] != 0
            p.exists = lives or not over
        at += header
        counts = (p.n, p.d, p.s, p.averse_n)
        for column in range(len(_COLUMNS)):
            to, width, of = _COLUMNS[column]
            size = width * counts[of]
            raw[row + to : row + to + size] = buffer[at : at + size]
            at += size
        raw[row + _SIZES : row + _SIZES + p.s] = buffer[at : at + p.s]
        at += p.s
        for j in range(p.s):
            size = 4 * np.int64(p.slate_size[j])
            if size > 96 or at + size > end:
                return u
            to = row + _SHOWN + 96 * j
            raw[to : to + size] = buffer[at : at + size]
            at += size
        if at != end:
            return u
    for u in range(users):
        size = max(lengths[users + u], 0)
        if size % 4 or size > 16384:
            return users + u
        to = u * _SIZE + _SEEN
        raw[to : to + size] = buffer[end : end + size]
        profiles[u].seen_n = size // 4
        end += size
    return -1


@njit(cache=True)
def _pack_one(profiles, raw, u, codec, buffer, at):  # type: ignore[no-untyped-def]  # fmt: skip
    """Write record u as a packed profile at a place of the buffer, the inverse of _unpack; return where it ends."""
    p, row = profiles[u], u * _SIZE
    version = max(codec, 2) if p.ended > 0.0 else codec
    header = 56 if version == 1 else 64 if version == 2 else 96
    kept = p.averse_n if version >= 3 else 0
    buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3] = version, p.n, p.s, kept
    buffer[at + 4], buffer[at + 5], buffer[at + 6], buffer[at + 7] = p.d % 256, p.d // 256, 0, 0
    buffer[at + 8 : at + header] = raw[row : row + header - 8]
    at += header
    counts = (p.n, p.d, p.s, kept)
    for column in range(len(_COLUMNS)):
        to, width, of = _COLUMNS[column]
        size = width * counts[of]
        buffer[at : at + size] = raw[row + to : row + to + size]
        at += size
    buffer[at : at + p.s] = raw[row + _SIZES : row + _SIZES + p.s]
    at += p.s
    for j in range(p.s):
        shown = 4 * np.int64(p.slate_size[j])
        to = row + _SHOWN + 96 * j
        buffer[at : at + shown] = raw[to : to + shown]
        at += shown
    return at


@njit(cache=True)
def _pack(profiles, raw, rows, codec, buffer, start):  # type: ignore[no-untyped-def]  # fmt: skip
    """Write records as packed profiles; start i64[k + 1]: where each begins in the buffer."""
    for i in range(len(rows)):
        start[i + 1] = _pack_one(profiles, raw, rows[i], codec, buffer, start[i])


@njit(cache=True)
def _pack_changed(profiles, raw, codec, buffer, found):  # type: ignore[no-untyped-def]  # fmt: skip
    """Write the records that changed; found i64[k, 6]: row, by what, exists, begin, end, end of the seen list or -1."""
    k = at = 0
    for u in range(len(profiles)):
        p = profiles[u]
        if p.changed_by < 0:
            continue
        end = _pack_one(profiles, raw, u, codec, buffer, at)
        found[k, 0], found[k, 1], found[k, 2] = u, p.changed_by, p.exists
        found[k, 3], found[k, 4], found[k, 5] = at, end, -1
        at = end
        if p.seen_changed:
            at, seen = end + 4 * p.seen_n, u * _SIZE + _SEEN
            buffer[end:at] = raw[seen : seen + at - end]
            found[k, 5] = at
        k += 1
    return k
