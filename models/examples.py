"""One record of the topic `examples`: what the folds of items and weights read. Pure bytes and arrays.

Knows nothing about Kafka, Redis or users: an entry carries no user id, only the position of its source event.

Record layout, version 2, little endian; `n` entries, `S` history slots and `A` averse items in all, `r` ranges. Columns
follow each other without padding, wide ones first, so that every column starts aligned to its own size:

    header   magic u8=0xE1, version u8=2, r u16, n u32, S u32, blob length u32, A u32, 0 u32         24 B
    ranges   partition i64, first i64, next i64                                                      24 r
    columns  offset i64, time f64, target u64, weight f64, value f64, slates 4 x u64                 72 n
             history items u64, history times f64                                                    16 S
             averse items u64                                                                         8 A   (not in 1)
             id length u32, extra length u32                                                          8 n
             tally 8 x f32                                                                           32 n   (not in 1)
             partition u16, index u16                                                                 4 n
             history weights f16                                                                      2 S   (not in 1)
             kind u8, flags u8, history length u8                                                     3 n
             averse length u8                                                                         1 n   (not in 1)
             history kinds u8                                                                         1 S
    blob     ids (utf-8), then extras, in entry order

Version 1 has a header of 16 B and lacks what is marked: it is read with weights 1, no averse items and an empty tally,
and an action's value is 0 in it. Which is written is a setting.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

CLICK, DWELL, RATING, ACTION, VIEW, IMPRESSION, CONTROL = range(1, 8)
KIND_NAMES: Final = ("none", "click", "dwell", "rating", "action", "view", "impression", "control")

ENTERS, VOICE, SHOWN = 1, 2, 4
"""Flags: a new entry of the sequence; adds to popularity; `slates[0]` showed the target."""

SKIPPED, HIDDEN = -1.0, -2.0
"""Values of actions of negative weight: a skip, any other; 1 is one of positive weight. A dwell's value is its seconds,
a rating's its place on its scale, from -1 to 1."""
LOW: Final = -1.0 / 3.0
"""A rating below this, in the lowest third of its scale, is a low one."""
TALLY: Final = ("ratings", "rating_sum", "dwells", "dwell_log_sum", "skips", "hides", "low_ratings", "outcomes")
"""What a user's tally sums: `rating_sum` of values, `dwell_log_sum` of log1p(seconds); a dwell with the newest item of
the sequence is no outcome of its own."""

SLATES: Final = 4
HISTORY: Final = 20
AVERSE: Final = 8
MAX_RECORD_BYTES: Final = 256 * 1024

VERSION: Final = 2
_MAGIC = 0xE1
_OVERHEAD = 48  # header and one range
_HEADER, _MORE = struct.Struct("<BBHIII"), struct.Struct("<II")
_SHOWN_MAGIC, _SHOWN_VERSION = 0xE5, 1
_SHOWN_HEADER = struct.Struct("<BBHHHQqBB")

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
U16 = NDArray[np.uint16]
U8 = NDArray[np.uint8]


class CodecError(ValueError):
    """Bytes that no codec of this build reads: foreign, truncated, or of another version."""


class HoleError(RuntimeError):
    """A record starts after the last position that was folded: something between them is missing."""


def item_hash(text: str) -> int:
    """Return the 64-bit name (xxh3) of an item or slate id; never 0, which means none."""
    return xxhash.xxh3_64_intdigest(text.encode()) or 1


@dataclass(slots=True)
class Shown:
    """What an impression says of its slate: shown items with propensities, and the features of its logged candidates.

    items u64[k], propensities f32[k], channels u8[k]; candidates u64[m], features f16[m, F], m = 0 where not kept.
    """

    slate: int
    step: int
    items: U64
    propensities: NDArray[np.float32]
    channels: U8
    candidates: U64
    features: NDArray[np.float16]
    surface: str = ""
    policy: str = ""

    def to_bytes(self) -> bytes:
        """Pack for the log (version 1)."""
        surface, policy = self.surface.encode()[:255], self.policy.encode()[:255]
        k, m = len(self.items), len(self.candidates)
        width = self.features.shape[1] if m else 0
        head = _SHOWN_HEADER.pack(
            _SHOWN_MAGIC, _SHOWN_VERSION, k, m, width, self.slate, self.step, len(surface), len(policy)
        )
        return b"".join(
            (
                head,
                np.ascontiguousarray(self.items, "<u8").tobytes(),
                np.ascontiguousarray(self.candidates, "<u8").tobytes(),
                np.ascontiguousarray(self.propensities, "<f4").tobytes(),
                np.ascontiguousarray(self.features, "<f2").tobytes() if m else b"",
                np.ascontiguousarray(self.channels, "u1").tobytes(),
                surface,
                policy,
            )
        )

    @staticmethod
    def check(data: bytes) -> tuple[int, int, int, int, int, str, str]:
        """Return (items, candidates, width, slate, step, surface, policy) of `to_bytes`; raises as `from_bytes`."""
        if len(data) < _SHOWN_HEADER.size or data[0] != _SHOWN_MAGIC or data[1] != _SHOWN_VERSION:
            raise CodecError(
                f"impression payload: expected version {_SHOWN_VERSION}, got {data[:2].hex() or 'nothing'}"
            )
        _, _, k, m, width, slate, step, surface_length, policy_length = _SHOWN_HEADER.unpack_from(data)
        expected = _SHOWN_HEADER.size + 13 * k + 8 * m + 2 * m * width + surface_length + policy_length
        if len(data) != expected:
            raise CodecError(f"impression payload: expected {expected} bytes, got {len(data)}")
        at = expected - surface_length - policy_length
        try:
            surface, policy = data[at : at + surface_length].decode(), data[at + surface_length :].decode()
        except UnicodeDecodeError as error:
            raise CodecError(f"impression payload: surface or policy is not utf-8 ({error})") from error
        return k, m, width, slate, step, surface, policy

    @classmethod
    def from_bytes(cls, data: bytes) -> Shown:
        """Read `to_bytes`; raises CodecError on anything else."""
        k, m, width, slate, step, surface, policy = cls.check(data)
        at = _SHOWN_HEADER.size
        items = np.frombuffer(data, "<u8", k, at)
        at += 8 * k
        candidates = np.frombuffer(data, "<u8", m, at)
        at += 8 * m
        propensities = np.frombuffer(data, "<f4", k, at)
        at += 4 * k
        features = np.frombuffer(data, "<f2", m * width, at).reshape(m, width)
        at += 2 * m * width
        channels = np.frombuffer(data, "u1", k, at)
        return cls(slate, step, items, propensities, channels, candidates, features, surface, policy)


def _empty_u64() -> U64:
    return np.empty(0, np.uint64)


@dataclass(slots=True)
class Entries:
    """Decoded entries in log order, as columns; see the module's layout for types.

    `ranges` are (source partition, first, next): the events this record covers, also where no entry came of them.
    Histories are the sequence before the event, newest first, at most 20: `history_start[i]:history_start[i + 1]`;
    averse items likewise, at most 8. history_weight f16[S], tally f32[n, 8]: before the event. `version`: of the bytes,
    as read or to be written.
    """

    ranges: list[tuple[int, int, int]]
    partition: U16
    offset: I64
    index: U16
    time: F64
    kind: U8
    flags: U8
    target: U64
    weight: F64
    value: F64
    slates: U64
    history_start: I64
    history_item: U64 = field(default_factory=_empty_u64)
    history_time: F64 = field(default_factory=lambda: np.empty(0))
    history_kind: U8 = field(default_factory=lambda: np.empty(0, np.uint8))
    ids: list[str] = field(default_factory=list)
    extra: list[bytes] = field(default_factory=list)
    history_weight: F16 = field(default=None)  # type: ignore[arg-type]
    tally: F32 = field(default=None)  # type: ignore[arg-type]
    averse_start: I64 = field(default=None)  # type: ignore[arg-type]
    averse: U64 = field(default_factory=_empty_u64)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.history_weight is None:
            self.history_weight = np.ones(len(self.history_item), np.float16)
        if self.tally is None:
            self.tally = np.zeros((len(self.offset), len(TALLY)), np.float32)
        if self.averse_start is None:
            self.averse_start = np.zeros(len(self.offset) + 1, np.int64)

    def __len__(self) -> int:
        return len(self.offset)

    def sizes(self) -> I64:
        """Return the bytes that each entry adds to a record, i64[n]."""
        blobs = (len(a.encode()) + len(b) for a, b in zip(self.ids, self.extra, strict=True))
        more = 33 + 2 * np.diff(self.history_start) + 8 * np.diff(self.averse_start) if self.version > 1 else 0
        return 87 + 17 * np.diff(self.history_start) + more + np.fromiter(blobs, np.int64, len(self))

    def size(self) -> int:
        """Return the bytes of this as one record."""
        n, slots, away = len(self.offset), len(self.history_item), len(self.averse)
        blobs = len("".join(self.ids).encode()) + sum(map(len, self.extra))
        more = 8 + 33 * n + 2 * slots + 8 * away if self.version > 1 else 0
        return 16 + 24 * len(self.ranges) + 87 * n + 17 * slots + more + blobs

    def to_bytes(self) -> bytes:
        """Pack as one record of `version`; the bytes depend on the entries and ranges alone."""
        ids = [text.encode() for text in self.ids]
        blob = b"".join(ids) + b"".join(self.extra)
        lengths, first = np.diff(self.history_start), self.version == 1
        head = _HEADER.pack(_MAGIC, self.version, len(self.ranges), len(self), int(lengths.sum()), len(blob))
        value = np.where(self.kind == ACTION, 0.0, self.value) if first else self.value
        return b"".join(
            (
                head,
                b"" if first else _MORE.pack(len(self.averse), 0),
                np.asarray(self.ranges, "<i8").tobytes(),
                self.offset.astype("<i8", copy=False).tobytes(),
                self.time.astype("<f8", copy=False).tobytes(),
                self.target.astype("<u8", copy=False).tobytes(),
                self.weight.astype("<f8", copy=False).tobytes(),
                value.astype("<f8", copy=False).tobytes(),
                self.slates.astype("<u8", copy=False).tobytes(),
                self.history_item.astype("<u8", copy=False).tobytes(),
                self.history_time.astype("<f8", copy=False).tobytes(),
                b"" if first else self.averse.astype("<u8", copy=False).tobytes(),
                np.fromiter(map(len, ids), "<u4", len(ids)).tobytes(),
                np.fromiter(map(len, self.extra), "<u4", len(ids)).tobytes(),
                b"" if first else self.tally.astype("<f4", copy=False).tobytes(),
                self.partition.astype("<u2", copy=False).tobytes(),
                self.index.astype("<u2", copy=False).tobytes(),
                b"" if first else self.history_weight.astype("<f2", copy=False).tobytes(),
                self.kind.tobytes(),
                self.flags.tobytes(),
                lengths.astype(np.uint8).tobytes(),
                b"" if first else np.diff(self.averse_start).astype(np.uint8).tobytes(),
                self.history_kind.tobytes(),
                blob,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Entries:
        """Read one record; raises CodecError where magic, version or any length is not what the layout says."""
        if len(data) < _HEADER.size or data[0] != _MAGIC or not 1 <= data[1] <= VERSION:
            raise CodecError(f"examples record: expected version 1 or {VERSION}, got {data[:2].hex() or 'nothing'}")
        _, version, r, n, slots, blob_length = _HEADER.unpack_from(data)
        at, away = _HEADER.size, 0
        fixed = at + 24 * r + 87 * n + 17 * slots
        if version > 1:
            away = _MORE.unpack_from(data, at)[0] if len(data) >= at + _MORE.size else 0
            at += _MORE.size
            fixed += _MORE.size + 33 * n + 2 * slots + 8 * away
        if len(data) != fixed + blob_length:
            raise CodecError(f"examples record: expected {fixed + blob_length} bytes, got {len(data)}")

        def column(kind: str, count: int) -> NDArray[Any]:
            nonlocal at
            values: NDArray[Any] = np.frombuffer(data, kind, count, at)
            at += values.nbytes
            return values

        def later(kind: str, count: int, absent: float = 0.0) -> NDArray[Any]:
            return column(kind, count) if version > 1 else np.full(count, absent, kind)

        ranges = column("<i8", 3 * r).reshape(r, 3).tolist()
        offset, time, target = column("<i8", n), column("<f8", n), column("<u8", n)
        weight, value, slates = column("<f8", n), column("<f8", n), column("<u8", SLATES * n).reshape(n, SLATES)
        history_item, history_time, averse = column("<u8", slots), column("<f8", slots), later("<u8", away)
        id_length, extra_length = column("<u4", n), column("<u4", n)
        tally = later("<f4", len(TALLY) * n).reshape(n, len(TALLY))
        partition, index, history_weight = column("<u2", n), column("<u2", n), later("<f2", slots, 1.0)
        kind, flags, lengths = column("u1", n), column("u1", n), column("u1", n)
        averse_lengths, history_kind = later("u1", n), column("u1", slots)
        start, averse_start = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
        np.cumsum(lengths, dtype=np.int64, out=start[1:])
        np.cumsum(averse_lengths, dtype=np.int64, out=averse_start[1:])
        blobs = int(id_length.sum(dtype=np.int64) + extra_length.sum(dtype=np.int64))
        if start[-1] != slots or averse_start[-1] != away or blobs != blob_length:
            raise CodecError("examples record: the lengths of its entries do not add up to the record's own")
        try:
            ids = [part.decode() for part in _cut(data, at, id_length.tolist())]
        except UnicodeDecodeError as error:
            raise CodecError(f"examples record: an item id is not utf-8 ({error})") from error
        extra = _cut(data, at + int(id_length.sum(dtype=np.int64)), extra_length.tolist())
        return cls(
            ranges=[(int(p), int(a), int(b)) for p, a, b in ranges],
            partition=partition, offset=offset, index=index, time=time, kind=kind, flags=flags, target=target,
            weight=weight, value=value, slates=slates, history_start=start, history_item=history_item,
            history_time=history_time, history_kind=history_kind, ids=ids, extra=extra, history_weight=history_weight,
            tally=tally, averse_start=averse_start, averse=averse, version=version,
        )  # fmt: skip

    def take(self, keep: NDArray[np.bool_]) -> Entries:
        """Return the entries where `keep` is true, with the same ranges."""
        if keep.all():
            return self
        rows = np.flatnonzero(keep)
        lengths, away = np.diff(self.history_start), np.diff(self.averse_start)
        slots = np.repeat(keep, lengths)
        return Entries(
            ranges=self.ranges,
            partition=self.partition[rows], offset=self.offset[rows], index=self.index[rows], time=self.time[rows],
            kind=self.kind[rows], flags=self.flags[rows], target=self.target[rows], weight=self.weight[rows],
            value=self.value[rows], slates=self.slates[rows], history_start=_starts(lengths[rows]),
            history_item=self.history_item[slots], history_time=self.history_time[slots],
            history_kind=self.history_kind[slots],
            ids=[self.ids[i] for i in rows], extra=[self.extra[i] for i in rows],
            history_weight=self.history_weight[slots], tally=self.tally[rows], averse_start=_starts(away[rows]),
            averse=self.averse[np.repeat(keep, away)], version=self.version,
        )  # fmt: skip

    def slice(self, first: int, last: int, ranges: list[tuple[int, int, int]]) -> Entries:
        """Return entries first:last under other ranges, sharing the columns."""
        a, b = int(self.history_start[first]), int(self.history_start[last])
        c, d = int(self.averse_start[first]), int(self.averse_start[last])
        return Entries(
            ranges=ranges,
            partition=self.partition[first:last], offset=self.offset[first:last], index=self.index[first:last],
            time=self.time[first:last], kind=self.kind[first:last], flags=self.flags[first:last],
            target=self.target[first:last], weight=self.weight[first:last], value=self.value[first:last],
            slates=self.slates[first:last], history_start=self.history_start[first : last + 1] - a,
            history_item=self.history_item[a:b], history_time=self.history_time[a:b],
            history_kind=self.history_kind[a:b], ids=self.ids[first:last], extra=self.extra[first:last],
            history_weight=self.history_weight[a:b], tally=self.tally[first:last],
            averse_start=self.averse_start[first : last + 1] - c, averse=self.averse[c:d], version=self.version,
        )  # fmt: skip


def _starts(lengths: I64) -> I64:
    start = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=start[1:])
    return start


def _cut(data: bytes, at: int, lengths: Sequence[int]) -> list[bytes]:
    parts = []
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    return parts


def concatenate(parts: Iterable[Entries]) -> Entries:
    """Join entries in order; their ranges are chained per source partition."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    ranges: dict[int, tuple[int, int]] = {}
    for part in parts:
        for partition, first, following in part.ranges:
            ranges[partition] = (ranges.get(partition, (first, 0))[0], following)
    columns: dict[str, object] = {}
    for name in (f.name for f in fields(Entries)):
        if name in ("ranges", "history_start", "averse_start", "version"):
            continue
        values = [getattr(part, name) for part in parts]
        columns[name] = list(chain(*values)) if isinstance(values[0], list) else np.concatenate(values)
    starts = {
        name: _starts(np.concatenate([np.diff(getattr(part, name)) for part in parts]))
        for name in ("history_start", "averse_start")
    }
    version = max(part.version for part in parts)
    return Entries(ranges=[(p, a, b) for p, (a, b) in ranges.items()], version=version, **starts, **columns)  # type: ignore[arg-type]


def accept(entries: Entries, marks: MutableMapping[int, int]) -> Entries:
    """Drop entries that `marks` (source partition -> next offset) says were folded, then move the marks on.

    Raises HoleError where the record begins after the mark: something before it never arrived. Re-delivered
    records, of a crash, a zombie or a retry, change nothing (DESIGN section 3, rule 4).
    """
    keep = np.ones(len(entries), bool)
    for partition, first, following in entries.ranges:
        mark = marks.get(partition, 0)
        if first > mark:
            raise HoleError(f"examples: expected events[{partition}] from offset {mark} or earlier, got {first}")
        if mark > first:
            keep &= (entries.partition != partition) | (entries.offset >= mark)
        marks[partition] = max(mark, following)
    return entries.take(keep)


def split(entries: Entries, limit: int = MAX_RECORD_BYTES) -> list[Entries]:
    """Cut entries of one source partition into records of at most `limit` bytes; their ranges stay contiguous.

    The entries of one event stay together; an event over the limit becomes a record of its own.
    """
    if len(entries) <= 1 or entries.size() <= limit:
        return [entries]
    ((partition, first, following),) = entries.ranges
    parts, start, size = [], 0, 0
    for i, added in enumerate(entries.sizes().tolist()):
        if i > start and size + added + _OVERHEAD > limit and entries.offset[i] != entries.offset[i - 1]:
            cut = int(entries.offset[i])
            parts.append(entries.slice(start, i, [(partition, first, cut)]))
            first, start, size = cut, i, 0
        size += added
    parts.append(entries.slice(start, len(entries), [(partition, first, following)]))
    return parts
