"""The state of all items as one struct of arrays, and the fold of `examples` entries into it.

The same arrays are what the item agent folds and what serving and replay score from. Behaviour (a fold over `examples`)
and catalogue (a fold over `items`) are disjoint fields of a row. Knows nothing about Kafka, Redis, users or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, Final

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.bandit import posterior
from models.bandit.posterior import expose, observe
from models.content.tokens import BUCKETS, shares, tokens
from models.content.tokens import ROOM as TOKENS
from models.decay import Popularity, add, grown
from models.examples import DWELL, ENTERS, IMPRESSION, RATING, SHOWN, VOICE, CodecError, Entries, Shown
from models.items.contexts import CONTEXTS, MOST_CONTEXT, packed_context_keys
from models.items.packed import context_words, load_rows, neighbour_words, packed, read
from models.items.transitions import K_LONG, WINDOW, ItemArrays, K, bump, follow
from models.rows import BEHAVIOUR, CATALOGUE, Rows

ROOM: Final = 256
"""Where items are too many, one in so many of the cap leaves beside those above it: not every sweep finds some."""
COUNTS: Final = ENTERS | VOICE
"""Flags of an entry that counts for its contexts."""
NEVER_FIRST: Final = np.inf
NEVER_LAST: Final = -np.inf

F64 = NDArray[np.float64]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
_NO_ROWS: Final[I64] = np.empty(0, np.int64)


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


class Items:
    """All items of one process, aligned to a shared `Rows`.

    first, last f64[capacity] (s), born f64[capacity] (published_at, s), shown and outcomes i64[capacity],
    hidden u8[capacity] (1: not to be served: deleted, id unknown, or the catalogue is required and lacks it); tokens
    i32[capacity, 24] of the catalogue entry, -1 = none, the first token_fields u8[capacity] of them of its fields.
    contexts bool[capacity]: rows that are no items but contexts, whose list C holds what was chosen under them.
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
        self.sums: F64 = np.zeros((0, len(posterior.COLUMNS)))
        self.hidden: U8 = np.zeros(0, np.uint8)
        self.tokens: I32 = np.zeros((0, TOKENS), np.int32)
        self.token_fields: U8 = np.zeros(0, np.uint8)
        self._shares: F64 = np.zeros(BUCKETS)
        self._shared_at = -np.inf
        self._described = 0
        self._ratios: F64 = np.zeros(BUCKETS)
        self._rate, self._exposed, self._rated_at = 0.05, 0, -65
        self.a_items: I32 = np.zeros((0, K), np.int32)
        self.a_weights: F64 = np.zeros((0, K))
        self.a_sums: F64 = np.zeros(0)
        self.b_items: I32 = np.zeros((0, K), np.int32)
        self.b_weights: F64 = np.zeros((0, K))
        self.b_sums: F64 = np.zeros(0)
        self.c_items: I32 = np.zeros((0, K_LONG), np.int32)
        self.c_weights: F64 = np.zeros((0, K_LONG))
        self.c_sums: F64 = np.zeros(0)
        self.contexts: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._context_rows: dict[int, int] = {}
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
        """Rows with behaviour, contexts among them: what `pack` is for."""
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
        self.sums, self.hidden = grown(self.sums, capacity), grown(self.hidden, capacity, 1)
        self.tokens, self.token_fields = grown(self.tokens, capacity, -1), grown(self.token_fields, capacity)
        self.a_items, self.b_items = grown(self.a_items, capacity, -1), grown(self.b_items, capacity, -1)
        self.a_weights, self.b_weights = grown(self.a_weights, capacity), grown(self.b_weights, capacity)
        self.a_sums, self.b_sums = grown(self.a_sums, capacity), grown(self.b_sums, capacity)
        self.c_items, self.c_weights = grown(self.c_items, capacity, -1), grown(self.c_weights, capacity)
        self.c_sums, self.contexts = grown(self.c_sums, capacity), grown(self.contexts, capacity)
        self._touched, self._named = grown(self._touched, capacity), grown(self._named, capacity)

    def arrays(self) -> ItemArrays:
        """Return the arrays that kernels read."""
        return ItemArrays(
            self.rows.table, self.rows.keys, self.popularity.weights, self.popularity.cells, self.first, self.last,
            self.a_items, self.a_weights, self.a_sums, self.b_items, self.b_weights, self.b_sums,
            self.c_items, self.c_weights, self.c_sums,
            self.tokens, self.token_fields, self.born, self.shown, self.sums,
        )  # fmt: skip

    def token_shares(self) -> F64:
        """Return each token's share of all events, f64[BUCKETS], computed anew once a 64th of them is new."""
        total = float(self.popularity.totals[-1])
        if abs(total - self._shared_at) > 16.0 + total / 64.0 or self._described > 16 + self.n // 64:
            shares(self.tokens, self.popularity.weights[:, -1], self.n, self._shares)
            self._shared_at, self._described = total, 0
        return self._shares

    def click_rates(self) -> tuple[F64, float]:
        """Return each token's log ratio of click rates f64[BUCKETS], and everybody's rate.

        Both are computed anew once a 64th of the exposures is new.
        """
        if self._exposed - self._rated_at > 64 + self._exposed // 64:
            self._rate = float(posterior.token_ratios(self.tokens, self.sums, self.n, self._ratios))
            self._rated_at = self._exposed
        return self._ratios, self._rate

    def click_log_odds(self, rows: I64) -> tuple[F64, F64]:
        """Return mean and standard deviation f64[m] of the log-odds of a click, by the items' own posteriors."""
        alpha, beta = self.click_posteriors(rows)
        mean, deviation = np.empty(len(rows)), np.empty(len(rows))
        posterior.log_odds(alpha, beta, mean, deviation)
        return mean, deviation

    def click_interval(self, rows: I64) -> tuple[F64, F64]:
        """Return the ends f64[m] of the 95 % interval of a click's probability, normal in the log-odds."""
        mean, deviation = self.click_log_odds(rows)
        low, high = (1.0 / (1.0 + np.exp(-(mean + side * 1.96 * deviation))) for side in (-1.0, 1.0))
        return low, high

    def click_posteriors(self, rows: I64) -> tuple[F64, F64]:
        """Return alpha and beta f64[m] of the Beta posteriors of rows i64[m]; see models/bandit/posterior.py."""
        alpha, beta = np.empty(len(rows)), np.empty(len(rows))
        posterior.betas(rows, self.tokens, self.sums, *self.click_rates(), alpha, beta)
        return alpha, beta

    def fold(self, entries: Entries) -> I64:
        """Fold entries in order and return the rows they changed, sorted; any cut of a stream gives equal bytes.

        An entry with VOICE adds to popularity, one with ENTERS to the neighbour lists, one with both ENTERS and SHOWN
        to the outcomes; an impression counts each shown item as shown once. Posteriors: see models/bandit/posterior.py.
        """
        entries, new, shown = self._apart(entries)
        start, keys = _keys(entries.target, entries.flags, entries.history_start, entries.history_item)
        rows = self.rows.add(keys)
        under = self._under(entries)
        exposed = self.rows.add(np.concatenate(shown)) if shown else _NO_ROWS
        slates = np.array([0, *accumulate(map(len, shown))])
        self._exposed += len(exposed)
        self.grow()
        if new:
            self._name(new)
        popularity = self.popularity
        changed: I64 = _fold(
            entries.target, entries.kind, entries.flags, entries.time, entries.value, start, rows, *under, exposed,
            slates, popularity.totals,
            popularity.total_cells, popularity.last, self.shown, self.outcomes, self.arrays(), self._touched,
            self.rows.held,
        )  # fmt: skip
        changed.sort()
        return changed

    def _under(self, entries: Entries) -> tuple[I64, I64]:
        """Return (places of entries that count, ascending, the rows of their contexts), i64[c] both.

        An entry counts for its contexts where it enters a sequence and has a voice; new contexts are taken in as far as
        there is room.
        """
        if not any(entries.extra):
            return _NO_ROWS, _NO_ROWS
        places, rows = list[int](), list[int]()
        for i, (extra, flags) in enumerate(zip(entries.extra, entries.flags.tolist(), strict=True)):
            if not extra or flags & COUNTS != COUNTS or not entries.target[i]:
                continue
            for key in packed_context_keys(extra):
                row = self._context_rows.get(key)
                if row is None and len(self._context_rows) < CONTEXTS:
                    row = int(self.rows.add(np.array([key], np.uint64))[0])
                    self.grow()
                    self._context(row, key)
                if row is not None:
                    places.append(i)
                    rows.append(row)
        return (np.array(places), np.array(rows)) if rows else (_NO_ROWS, _NO_ROWS)

    def _context(self, row: int, key: int) -> None:
        self.contexts[row] = True
        self._context_rows[key] = row

    def context_rows(self, keys: Iterable[int]) -> I64:
        """Return the rows of the contexts with these names that are known, i64[c]."""
        return np.array([row for key in keys if (row := self._context_rows.get(key)) is not None], np.int64)

    def _apart(self, entries: Entries) -> tuple[Entries, dict[int, str], list[U64]]:
        """Set entries aside that cannot be folded: two ids with one hash, and unreadable impressions.

        Returns the others, the ids by hash of rows that have none yet, and what each of the impressions showed.
        """
        rows = self.rows.find(entries.target).tolist()
        new, bad, shown = dict[int, str](), list[int](), list[U64]()
        for i, (row, text, kind) in enumerate(zip(rows, entries.ids, entries.kind.tolist(), strict=True)):
            reason, owner = "", text
            if text:
                has_id = 0 <= row < len(self.ids) and self._named[row]
                owner = self.ids[row] if has_id else new.setdefault(int(entries.target[i]), text)
            if owner != text:
                reason = f"item id {text!r} has the hash of {owner!r}: rename one"
            elif kind == IMPRESSION:
                try:
                    shown.append(Shown.from_bytes(entries.extra[i]).items)
                except CodecError as error:
                    reason = str(error)
            if reason:
                bad.append(i)
                original = entries.extra[i] if kind == IMPRESSION else text.encode()
                self.aside.append((int(entries.partition[i]), int(entries.offset[i]), reason, original))
        if not bad:
            return entries, new, shown
        keep = np.ones(len(rows), np.bool_)
        keep[bad] = False
        return entries.take(keep), new, shown

    def sweep(self, most: int) -> tuple[U64, I64]:
        """Let the least recently seen items leave where more than `most` have behaviour.

        Returns the hashes of those that left and the rows whose lists lost one of them. A function of the packed rows
        alone. Items that were shown and never acted on leave first; ties leave by hash. Contexts have their own cap.
        """
        living = self.behaving
        of_contexts = self.contexts[living]
        gone = np.concatenate(
            [
                self._oldest(living[~of_contexts], most, most // ROOM),
                self._oldest(living[of_contexts], CONTEXTS * 7 // 8, CONTEXTS // 8),
            ]
        )
        return (gone, self.remove(gone)) if len(gone) else (gone, np.empty(0, np.int64))

    def _oldest(self, rows: I64, most: int, more: int) -> U64:
        """Return the hashes of the least recently seen rows above `most`, and of so many `more`; none if none is."""
        if len(rows) <= most:
            return np.empty(0, np.uint64)
        keys: U64 = self.rows.keys[rows]
        return keys[np.lexsort((keys, self.last[rows]))[: len(rows) - most + more]]

    def remove(self, keys: U64) -> I64:
        """Forget the behaviour of the items with these hashes u64[k]; return the rows whose lists lost one of them."""
        rows = np.unique(self.rows.find(keys))
        rows = rows[rows >= 0]
        gone = np.zeros(self.rows.capacity, np.bool_)
        gone[rows] = True
        changed = np.zeros(self.rows.capacity, np.bool_)
        for items, weights in (
            (self.a_items, self.a_weights), (self.b_items, self.b_weights), (self.c_items, self.c_weights),
        ):  # fmt: skip
            items[rows] = -1
            weights[rows] = 0.0
            _forget(items, weights, gone, self.rows.n, changed)
        self.popularity.weights[rows], self.popularity.cells[rows] = 0.0, 0
        self.first[rows], self.last[rows] = NEVER_FIRST, NEVER_LAST
        self.shown[rows] = self.outcomes[rows] = 0
        self.sums[rows] = 0.0
        self.a_sums[rows] = self.b_sums[rows] = self.c_sums[rows] = 0.0
        self._named[rows] = self.contexts[rows] = False
        for key in keys.tolist():
            self._context_rows.pop(key, None)
        for row in rows.tolist():
            if row not in self.catalogue:
                self.ids[row] = ""
                self._refresh(row)
        self.rows.release(rows, BEHAVIOUR)
        return np.flatnonzero(changed)

    def _name(self, ids: dict[int, str]) -> None:
        """Give the rows of these hashes their ids, where an entry that was folded gave them one."""
        for row, text in zip(self.rows.find(np.array(list(ids), np.uint64)).tolist(), ids.values(), strict=True):
            if row >= 0:
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
        self.rows.held[row] |= CATALOGUE
        old = self.catalogue.get(row)
        for name in old.categories if old is not None else ():
            self.by_category[name].discard(row)
        self.catalogue[row] = item
        for name in () if item.deleted else item.categories:
            self.by_category.setdefault(name, set()).add(row)
        self.born[row] = item.published_at or 0.0
        self.tokens[row], self.token_fields[row] = (-1, 0) if item.deleted else tokens(item)
        self._described += 1
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
        return packed(rows, ids, self.shown, self.outcomes, self.contexts, self.arrays())

    def load(self, keys: U64, blobs: list[bytes]) -> I64:
        """Replace the behaviour of the rows of `keys` u64[k] by packed values, return the rows; raises CodecError."""
        words, start, ids = read(keys.tolist(), blobs)
        rows = self.rows.add(keys)
        neighbours = self.rows.add(words[neighbour_words(words, start)])
        self.rows.hold(rows, BEHAVIOUR)
        self.rows.hold(neighbours, BEHAVIOUR)  # a row that a list names is not given to another item
        self.grow()
        self._exposed += len(rows)  # as good as told how many exposures changed them
        load_rows(
            words, words.view(np.float64), words.view(np.int32), start, rows, neighbours, self.shown, self.outcomes,
            self.arrays(),
        )  # fmt: skip
        for at in np.flatnonzero(self.contexts[rows] | context_words(words, start)).tolist():
            self._context(int(rows[at]), int(keys[at]))
        for row, text in zip(rows.tolist(), ids, strict=True):
            if text and not self._named[row]:
                self._named[row] = True
                self.ids[row] = text
                self._refresh(row)
        return rows

    def pack_totals(self) -> bytes:
        """Return the global decayed totals: part of each commit and of each delta."""
        return self.popularity.pack_totals()

    def load_totals(self, data: bytes) -> None:
        """Read `pack_totals`."""
        self.popularity.load_totals(data)


@njit(cache=True)
def _keys(target, flags, history_start, history_item):  # type: ignore[no-untyped-def]
    """Return (start i64[n + 1], keys u64): the targets, then the newest WINDOW items of the history of each entry.

    Only of entries that have a target, and histories only of those that enter; entry i's begins at start[i].
    """
    n, named = len(target), 0
    for i in range(n):
        named += target[i] != 0
    start = np.empty(n + 1, np.int64)
    start[0] = named
    for i in range(n):
        enters = flags[i] & ENTERS != 0 and target[i] != 0
        start[i + 1] = start[i] + (min(history_start[i + 1] - history_start[i], WINDOW) if enters else 0)
    keys = np.empty(start[n], np.uint64)
    at = 0
    for i in range(n):
        if target[i] != 0:
            keys[at] = target[i]
            at += 1
        for j in range(start[i + 1] - start[i]):
            keys[start[i] + j] = history_item[history_start[i] + j]
    return start, keys


@njit(cache=True)
def _fold(target, kind, flags, time, value, start, rows, places, contexts, exposed, slates, totals, total_cells, latest, shown, outcomes, arrays, touched, held):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Fold entries one at a time, the only place where behaviour changes; returns the rows touched, unsorted.

    start, rows i64 as of `_keys`; places, contexts i64[c] as of `_under`; exposed i64[e]: rows that were shown, and
    slates i64[k + 1]: where those of each impression begin. touched bool[capacity] may mark targets already, which were
    named, and is left all false.
    """
    weights, cells, first, last = arrays.weights, arrays.cells, arrays.first, arrays.last
    at, c, slate = 0, 0, 0
    for i in range(len(target)):
        if kind[i] == IMPRESSION:
            expose(arrays.sums, exposed, slates[slate], slates[slate + 1])
            slate += 1
        if target[i] == 0:
            continue
        row, t = rows[at], time[i]
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
                arrays.sums[row, 1] += 1.0
            follow(row, rows[start[i] : start[i + 1]], arrays, touched)
        if kind[i] == DWELL:
            observe(arrays.sums, row, 2, math.log1p(max(value[i], 0.0)))
            touched[row] = True
        elif kind[i] == RATING:
            observe(arrays.sums, row, 5, 0.5 * (value[i] + 1.0))
            touched[row] = True
        while c < len(contexts) and places[c] == i:
            under = contexts[c]
            bump(arrays.c_items, arrays.c_weights, arrays.c_sums, under, row, 1.0, MOST_CONTEXT)
            last[under] = max(last[under], t)
            touched[under] = True
            c += 1
    for row in exposed:
        shown[row] += 1
        touched[row] = True
    changed = np.empty(len(rows) + len(contexts) + len(exposed), np.int64)
    n = 0
    for among in (rows, contexts, exposed):
        for row in among:
            if touched[row]:
                touched[row] = False
                held[row] |= BEHAVIOUR
                changed[n] = row
                n += 1
    return changed[:n]


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
