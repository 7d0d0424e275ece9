"""The state of all items as one struct of arrays: decayed popularity, neighbours, exposure, catalogue fields.

The same arrays are what the item agent folds and what serving and replay score from. Behaviour (a fold over `examples`)
and catalogue (a fold over `items`) are disjoint fields of a row. Knows nothing about Kafka, Redis, users or models.

Row, version 1, little endian, in 8-byte words; neighbours by item hash, row numbers never leave the process:

    word 0       version | a << 8 | b << 16 | id length << 32
    words 1-8    decayed counts f64; 9-12 their cells 8 x i32; 13, 14 first and last event time f64 (s)
    words 15, 16 times shown, outcomes of showing u64; 17, 18 sums of the rows of A and B f64
    then         a hashes u64, a weights f64, b hashes u64, b weights f64, the id in utf-8
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.decay import Popularity, add, grown
from models.examples import ENTERS, IMPRESSION, SHOWN, VOICE, CodecError, Entries, Shown
from models.rows import BEHAVIOUR, CATALOGUE, Rows
from models.transitions import WINDOW, K, follow

VERSION: Final = 1
_FIXED: Final = 19
ROOM: Final = 256
"""Where items are too many, one in so many of the cap leaves beside those above it: not every sweep finds some."""
NEVER_FIRST: Final = np.inf
NEVER_LAST: Final = -np.inf

F64 = NDArray[np.float64]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]


class CatalogueItem(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Catalogue fields of an item; `deleted` is a record that says so, never a missing one."""

    title: str = ""
    text: str = ""
    categories: list[str] = []
    tags: list[str] = []
    provider: str = ""
    published_at: float | None = None
    image: str = ""
    audio: str = ""
    attributes: dict[str, Any] = {}
    deleted: bool = False


class ItemArrays(NamedTuple):
    """The arrays of an Items as kernels take them; valid until the next fold, load or set_item."""

    table: I32
    keys: U64
    weights: F64
    cells: I32
    first: F64
    last: F64
    a_items: I32
    a_weights: F64
    a_sums: F64
    b_items: I32
    b_weights: F64
    b_sums: F64


class Items:
    """All items of one process, aligned to a shared `Rows`.

    first, last f64[capacity] (s), born f64[capacity] (published_at, s), shown and outcomes i64[capacity],
    hidden u8[capacity] (1: not to be served: deleted, id unknown, or the catalogue is required and lacks it).
    """

    def __init__(self, *, rows: Rows, require_catalogue: bool = False) -> None:
        self.rows = rows
        self.require_catalogue = require_catalogue
        self.popularity = Popularity()
        self.first: F64 = np.zeros(0)
        self.last: F64 = np.zeros(0)
        self.born: F64 = np.zeros(0)
        self.shown: I64 = np.zeros(0, np.int64)
        self.outcomes: I64 = np.zeros(0, np.int64)
        self.hidden: U8 = np.zeros(0, np.uint8)
        self.a_items: I32 = np.zeros((0, K), np.int32)
        self.a_weights: F64 = np.zeros((0, K))
        self.a_sums: F64 = np.zeros(0)
        self.b_items: I32 = np.zeros((0, K), np.int32)
        self.b_weights: F64 = np.zeros((0, K))
        self.b_sums: F64 = np.zeros(0)
        self._touched: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._named: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.ids: list[str] = []
        self.aside: list[tuple[int, int, str, bytes]] = []
        """(source partition, offset, reason, bytes) of entries that were not folded; who folds empties it."""
        self.catalogue: dict[int, CatalogueItem] = {}
        self.by_category: dict[str, set[int]] = {}
        self.grow()

    @property
    def n(self) -> int:
        """Number of rows, free ones among them, which are hidden and blank."""
        return self.rows.n

    @property
    def behaving(self) -> I64:
        """Rows with behaviour: what `pack` is for, and what a cap counts."""
        return self.rows.held_by(BEHAVIOUR)

    @property
    def eligible(self) -> NDArray[np.bool_]:
        """bool[n]: may be served."""
        return np.equal(self.hidden[: self.n], 0)

    def grow(self) -> None:
        """Follow the shared rows: every array reaches their capacity."""
        capacity = self.rows.capacity
        if len(self.ids) < self.rows.n:
            self.ids.extend([""] * (self.rows.n - len(self.ids)))
        if len(self.first) >= capacity:
            return
        self.popularity.grow(capacity)
        self.first = grown(self.first, capacity, NEVER_FIRST)
        self.last = grown(self.last, capacity, NEVER_LAST)
        self.born = grown(self.born, capacity)
        self.shown, self.outcomes = grown(self.shown, capacity), grown(self.outcomes, capacity)
        self.hidden = grown(self.hidden, capacity, 1)
        self.a_items, self.b_items = grown(self.a_items, capacity, -1), grown(self.b_items, capacity, -1)
        self.a_weights, self.b_weights = grown(self.a_weights, capacity), grown(self.b_weights, capacity)
        self.a_sums, self.b_sums = grown(self.a_sums, capacity), grown(self.b_sums, capacity)
        self._touched, self._named = grown(self._touched, capacity), grown(self._named, capacity)

    def arrays(self) -> ItemArrays:
        """Return the arrays that kernels read."""
        return ItemArrays(
            self.rows.table, self.rows.keys, self.popularity.weights, self.popularity.cells, self.first, self.last,
            self.a_items, self.a_weights, self.a_sums, self.b_items, self.b_weights, self.b_sums,
        )  # fmt: skip

    def fold(self, entries: Entries) -> I64:
        """Fold entries in order and return the rows they changed, sorted; any cut of a stream gives equal bytes.

        An entry with VOICE adds to popularity, one with ENTERS to the neighbour lists, one with both ENTERS and SHOWN
        to the outcomes; an impression counts each shown item as shown once.
        """
        entries, shown = self._apart(entries)
        targets = self.rows.add(entries.target[entries.target != 0])
        start, keys = _recent(entries.history_start, entries.history_item, entries.flags, entries.target)
        history = self.rows.add(keys)
        exposed = self.rows.add(np.concatenate(shown)) if shown else None
        self.grow()
        self._name(entries, targets)
        popularity = self.popularity
        _fold(
            entries.target, targets, entries.flags, entries.time, start, history, popularity.weights, popularity.cells,
            popularity.totals, popularity.total_cells, popularity.last, self.first, self.last, self.outcomes,
            self.a_items, self.a_weights, self.a_sums, self.b_items, self.b_weights, self.b_sums, self._touched,
        )  # fmt: skip
        if exposed is not None:
            np.add.at(self.shown, exposed, 1)
            self._touched[exposed] = True
        changed = np.flatnonzero(self._touched)
        self._touched[changed] = False
        self.rows.hold(changed, BEHAVIOUR)
        return changed

    def _apart(self, entries: Entries) -> tuple[Entries, list[U64]]:
        """Set entries aside that cannot be folded; return the others, and what each of their impressions showed.

        Those whose id is not that of the row their hash names (two ids with one hash), and unreadable impressions.
        """
        rows, kinds = self.rows.find(entries.target).tolist(), entries.kind.tolist()
        keep, shown = np.ones(len(rows), np.bool_), []
        named: dict[int, str] = {}
        for i, (key, row, text, kind) in enumerate(zip(entries.target.tolist(), rows, entries.ids, kinds, strict=True)):
            reason, owner = "", text
            if text:
                has_id = 0 <= row < len(self.ids) and self._named[row]
                owner = self.ids[row] if has_id else named.setdefault(key, text)
            if owner != text:
                reason = f"item id {text!r} has the hash of {owner!r}: rename one"
            elif kind == IMPRESSION:
                try:
                    shown.append(Shown.from_bytes(entries.extra[i]).items)
                except CodecError as error:
                    reason = str(error)
            if reason:
                keep[i] = False
                original = entries.extra[i] if kind == IMPRESSION else text.encode()
                self.aside.append((int(entries.partition[i]), int(entries.offset[i]), reason, original))
        return entries.take(keep), shown

    def sweep(self, most: int) -> tuple[U64, I64]:
        """Let the least recently seen items leave where more than `most` have behaviour.

        Returns the hashes of those that left and the rows whose lists lost one of them. A function of the packed rows
        alone. Items that were shown and never acted on leave first; ties leave by hash.
        """
        living = self.behaving
        if len(living) <= most:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        order = np.lexsort((self.rows.keys[living], self.last[living]))
        gone = self.rows.keys[living[order[: len(living) - most + most // ROOM]]]
        return gone, self.remove(gone)

    def remove(self, keys: U64) -> I64:
        """Forget the behaviour of the items with these hashes u64[k]; return the rows whose lists lost one of them."""
        rows = np.unique(self.rows.find(keys))
        rows = rows[rows >= 0]
        gone = np.zeros(self.rows.capacity, np.bool_)
        gone[rows] = True
        changed = np.zeros(self.rows.capacity, np.bool_)
        for items, weights in ((self.a_items, self.a_weights), (self.b_items, self.b_weights)):
            items[rows] = -1
            weights[rows] = 0.0
            _forget(items, weights, gone, self.rows.n, changed)
        self.popularity.weights[rows], self.popularity.cells[rows] = 0.0, 0
        self.first[rows], self.last[rows] = NEVER_FIRST, NEVER_LAST
        self.shown[rows] = self.outcomes[rows] = 0
        self.a_sums[rows] = self.b_sums[rows] = 0.0
        self._named[rows] = False
        for row in rows.tolist():
            if row not in self.catalogue:
                self.ids[row] = ""
                self._refresh(row)
        self.rows.release(rows, BEHAVIOUR)
        return np.flatnonzero(changed)

    def _name(self, entries: Entries, targets: I64) -> None:
        at = 0
        rows = targets.tolist()
        for key, text in zip(entries.target.tolist(), entries.ids, strict=True):
            if key:
                row = rows[at]
                at += 1
                if text and not self._named[row]:
                    self._set_id(row, text)

    def _set_id(self, row: int, text: str) -> None:
        self.ids[row] = text
        self._named[row] = self._touched[row] = True
        self._refresh(row)

    def _refresh(self, row: int) -> None:
        item = self.catalogue.get(row)
        absent = item is None and self.require_catalogue
        self.hidden[row] = not self.ids[row] or absent or (item is not None and item.deleted)

    def set_item(self, key: int, text: str, item: CatalogueItem) -> int:
        """Set the catalogue fields of the item with hash `key` and id `text`, and return its row."""
        row = int(self.rows.add(np.array([key], np.uint64))[0])
        self.grow()
        self.rows.hold(np.array([row]), CATALOGUE)
        old = self.catalogue.get(row)
        for name in old.categories if old is not None else ():
            self.by_category[name].discard(row)
        self.catalogue[row] = item
        for name in () if item.deleted else item.categories:
            self.by_category.setdefault(name, set()).add(row)
        self.born[row] = item.published_at or 0.0
        self.ids[row] = text
        self._refresh(row)
        return row

    def title(self, row: int) -> str:
        """Return a row's title, or its id where the catalogue has none."""
        item = self.catalogue.get(row)
        return (item.title if item is not None else "") or self.ids[row]

    def pack(self, rows: I64) -> list[bytes]:
        """Return the packed bytes of these rows: behaviour and id, by the module's layout."""
        # An id that only the catalogue told is not behaviour: `items` and `examples` have no common order.
        ids = [self.ids[row].encode() if self._named[row] else b"" for row in rows.tolist()]
        sizes = _sizes(rows, self.a_items, self.b_items)
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(sizes, out=start[1:])
        words = np.zeros(int(start[-1]), np.uint64)
        _pack(
            words, words.view(np.float64), words.view(np.int32), start, rows,
            np.fromiter(map(len, ids), np.uint64, len(ids)), self.rows.keys,
            self.popularity.weights, self.popularity.cells, self.first, self.last, self.shown, self.outcomes,
            self.a_items, self.a_weights, self.a_sums, self.b_items, self.b_weights, self.b_sums,
        )  # fmt: skip
        data, cuts = words.tobytes(), (8 * start).tolist()
        return [data[a:b] + text for a, b, text in zip(cuts[:-1], cuts[1:], ids, strict=True)]

    def load(self, keys: U64, blobs: list[bytes]) -> I64:
        """Replace the behaviour of the rows of `keys` u64[k] by packed values, return the rows; raises CodecError."""
        sizes = np.fromiter((_words(key, blob) for key, blob in zip(keys.tolist(), blobs, strict=True)), np.int64)
        start = np.zeros(len(blobs) + 1, np.int64)
        np.cumsum(sizes, out=start[1:])
        data = b"".join(blob[: 8 * size] for blob, size in zip(blobs, sizes.tolist(), strict=True))
        words = np.frombuffer(data, np.uint64)
        if len(bad := np.flatnonzero(_odd(words, words.view(np.float64), start))):
            raise CodecError(_ODD.format(int(keys[bad[0]])))
        rows = self.rows.add(keys)
        at = _neighbour_words(words, start)
        neighbours = self.rows.add(words[at])
        self.rows.hold(rows, BEHAVIOUR)
        self.rows.hold(neighbours, BEHAVIOUR)  # a row that a list names is not given to another item
        self.grow()
        _load(
            words, words.view(np.float64), words.view(np.int32), start, rows, neighbours,
            self.popularity.weights, self.popularity.cells, self.first, self.last, self.shown, self.outcomes,
            self.a_items, self.a_weights, self.a_sums, self.b_items, self.b_weights, self.b_sums,
        )  # fmt: skip
        for row, blob, size in zip(rows.tolist(), blobs, sizes.tolist(), strict=True):
            if len(blob) > 8 * size and not self._named[row]:
                self._named[row] = True
                self.ids[row] = blob[8 * size :].decode()
                self._refresh(row)
        return rows

    def pack_totals(self) -> bytes:
        """Return the global decayed totals: part of each commit and of each delta."""
        return self.popularity.pack_totals()

    def load_totals(self, data: bytes) -> None:
        """Read `pack_totals`."""
        self.popularity.load_totals(data)


def _words(key: int, blob: bytes) -> int:
    if len(blob) < 8 * _FIXED or blob[0] != VERSION:
        got = f"{len(blob)} bytes that begin with {blob[:2].hex() or 'nothing'}"
        raise CodecError(f"item row {key:016x}: expected version {VERSION}, got {got}")
    size = _FIXED + 2 * (blob[1] + blob[2])
    expected = 8 * size + int.from_bytes(blob[4:8], "little")
    if len(blob) != expected or blob[1] > K or blob[2] > K:
        raise CodecError(f"item row {key:016x}: expected {expected} bytes, got {len(blob)}")
    try:
        blob[8 * size :].decode()
    except UnicodeDecodeError as error:
        raise CodecError(f"item row {key:016x}: its id is not utf-8 ({error})") from error
    return size


_ODD: Final = "item row {:016x}: expected finite counts and weights from 0 on, got others"


def sound(keys: Sequence[int], blobs: Sequence[bytes]) -> tuple[list[int], list[bytes], list[str]]:
    """Return the item rows that `Items.load` reads, and what is wrong with each of the others."""
    good: list[int] = []
    values: list[bytes] = []
    bad: list[str] = []
    start = [0]
    for key, blob in zip(keys, blobs, strict=True):
        try:
            start.append(start[-1] + _words(key, blob))
        except CodecError as error:
            bad.append(str(error))
            continue
        good.append(key)
        values.append(blob)
    data = b"".join(blob[: 8 * (b - a)] for blob, a, b in zip(values, start[:-1], start[1:], strict=True))
    words = np.frombuffer(data, np.uint64)
    odd = _odd(words, words.view(np.float64), np.array(start, np.int64)).tolist()
    bad += [_ODD.format(key) for key, wrong in zip(good, odd, strict=True) if wrong]
    return (
        [key for key, wrong in zip(good, odd, strict=True) if not wrong],
        [value for value, wrong in zip(values, odd, strict=True) if not wrong], bad,
    )  # fmt: skip


@njit(cache=True)
def _odd(words, floats, start):  # type: ignore[no-untyped-def]
    """Return bool[n]: a count, sum or weight of the packed row is negative or not finite, and a logarithm is taken."""
    out = np.zeros(len(start) - 1, np.bool_)
    for i in range(len(out)):
        at = start[i]
        a, b = _counts(words[at])
        for first, last in ((1, 9), (17, 19), (19 + a, 19 + 2 * a), (19 + 2 * a + b, 19 + 2 * a + 2 * b)):
            for k in range(at + first, at + last):
                if not 0.0 <= floats[k] < np.inf:
                    out[i] = True
    return out


@njit(cache=True)
def _recent(history_start, history_item, flags, target):  # type: ignore[no-untyped-def]
    """Return (start i64[n + 1], the newest WINDOW items of the history of each entry that enters)."""
    n = len(history_start) - 1
    start = np.zeros(n + 1, np.int64)
    for i in range(n):
        enters = flags[i] & ENTERS != 0 and target[i] != 0
        start[i + 1] = start[i] + (min(history_start[i + 1] - history_start[i], WINDOW) if enters else 0)
    keys = np.empty(start[n], np.uint64)
    for i in range(n):
        for j in range(start[i + 1] - start[i]):
            keys[start[i] + j] = history_item[history_start[i] + j]
    return start, keys


@njit(cache=True)
def _fold(target, targets, flags, time, start, history, weights, cells, totals, total_cells, latest, first, last, outcomes, a_items, a_weights, a_sums, b_items, b_weights, b_sums, touched):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Fold entries one at a time; the only place where behaviour changes (exposure apart)."""
    at = 0
    for i in range(len(target)):
        if target[i] == 0:
            continue
        row, t = targets[at], time[i]
        at += 1
        if flags[i] & VOICE:
            add(weights[row], cells[row], t)
            add(totals, total_cells, t)
            latest[0] = max(latest[0], t)
            touched[row] = True
        if flags[i] & ENTERS:
            first[row], last[row] = min(first[row], t), max(last[row], t)
            if flags[i] & SHOWN:
                outcomes[row] += 1
            follow(
                row, history[start[i] : start[i + 1]], a_items, a_weights, a_sums, b_items, b_weights, b_sums, touched
            )


@njit(cache=True)
def _forget(items, weights, gone, n, changed):  # type: ignore[no-untyped-def]
    """Take the gone out of lists i32[n, K], the others keep their order; marks the rows that lost some."""
    for row in range(n):
        kept = 0
        for k in range(items.shape[1]):
            item = items[row, k]
            if item < 0:
                break
            if gone[item]:
                changed[row] = True
                continue
            if kept != k:
                items[row, kept], weights[row, kept] = item, weights[row, k]
            kept += 1
        for k in range(kept, items.shape[1]):
            if items[row, k] < 0:
                break
            items[row, k], weights[row, k] = -1, 0.0


@njit(cache=True)
def _length(items, row):  # type: ignore[no-untyped-def]
    n = np.int64(0)
    while n < items.shape[1] and items[row, n] >= 0:
        n += 1
    return n


@njit(cache=True)
def _sizes(rows, a_items, b_items):  # type: ignore[no-untyped-def]
    out = np.empty(len(rows), np.int64)
    for i in range(len(rows)):
        out[i] = 19 + 2 * (_length(a_items, rows[i]) + _length(b_items, rows[i]))
    return out


@njit(cache=True)
def _counts(word):  # type: ignore[no-untyped-def]
    """Return the lengths of both lists, off a row's first word."""
    return np.int64(word >> np.uint64(8)) & 255, np.int64(word >> np.uint64(16)) & 255


@njit(cache=True)
def _pack(words, floats, halves, start, rows, id_lengths, keys, weights, cells, first, last, shown, outcomes, a_items, a_weights, a_sums, b_items, b_weights, b_sums):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    for i in range(len(rows)):
        row, at = rows[i], start[i]
        a, b = _length(a_items, row), _length(b_items, row)
        words[at] = np.uint64(1) | np.uint64(a << 8) | np.uint64(b << 16) | (id_lengths[i] << np.uint64(32))
        for h in range(8):
            floats[at + 1 + h] = weights[row, h]
            halves[2 * (at + 9) + h] = cells[row, h]
        floats[at + 13], floats[at + 14] = first[row], last[row]
        words[at + 15], words[at + 16] = np.uint64(shown[row]), np.uint64(outcomes[row])
        floats[at + 17], floats[at + 18] = a_sums[row], b_sums[row]
        after = at + 19
        for k in range(a):
            words[after + k] = keys[a_items[row, k]]
            floats[after + a + k] = a_weights[row, k]
        after += 2 * a
        for k in range(b):
            words[after + k] = keys[b_items[row, k]]
            floats[after + b + k] = b_weights[row, k]


@njit(cache=True)
def _neighbour_words(words, start):  # type: ignore[no-untyped-def]
    """Return the places of all neighbour hashes, A before B, row after row."""
    out = np.empty(len(words), np.int64)
    n = 0
    for i in range(len(start) - 1):
        a, b = _counts(words[start[i]])
        at = start[i] + 19
        for k in range(a):
            out[n + k] = at + k
        n += a
        for k in range(b):
            out[n + k] = at + 2 * a + k
        n += b
    return out[:n]


@njit(cache=True)
def _load(words, floats, halves, start, rows, neighbours, weights, cells, first, last, shown, outcomes, a_items, a_weights, a_sums, b_items, b_weights, b_sums):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    n = 0
    for i in range(len(rows)):
        row, at = rows[i], start[i]
        a, b = _counts(words[at])
        for h in range(8):
            weights[row, h] = floats[at + 1 + h]
            cells[row, h] = halves[2 * (at + 9) + h]
        first[row], last[row] = floats[at + 13], floats[at + 14]
        shown[row], outcomes[row] = np.int64(words[at + 15]), np.int64(words[at + 16])
        a_sums[row], b_sums[row] = floats[at + 17], floats[at + 18]
        after = at + 19
        a_items[row, :] = -1
        b_items[row, :] = -1
        a_weights[row, :] = 0.0
        b_weights[row, :] = 0.0
        for k in range(a):
            a_items[row, k] = neighbours[n + k]
            a_weights[row, k] = floats[after + a + k]
        n += a
        after += 2 * a
        for k in range(b):
            b_items[row, k] = neighbours[n + k]
            b_weights[row, k] = floats[after + b + k]
        n += b
