"""Item hash -> row number: an open-addressing table. Row numbers are private to one process.

A key's place is its low 32 bits, so that all keys with the same low half lie on one probe chain and can be found by
that half alone (the seen lists hold only that). A row is held by those who keep something in it (behaviour, catalogue,
learnt weights); one that nobody holds any more is given to the next new key. Knows nothing about what the rows hold.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

BEHAVIOUR: Final = 1
CATALOGUE: Final = 2
LEARNT: Final = 4
"""Who may hold a row: bits of `Rows.held`."""


@njit(cache=True)
def find_row(table, keys, key):  # type: ignore[no-untyped-def]
    """Return the row of a key, or -1; table i32[2^b] holds row + 1, keys u64[capacity]."""
    mask = np.int64(len(table) - 1)
    at = np.int64(key & np.uint64(0xFFFFFFFF)) & mask
    while table[at] != 0:
        row = np.int64(table[at]) - 1
        if keys[row] == key:
            return row
        at = (at + 1) & mask
    return np.int64(-1)


@njit(cache=True)
def _insert(table, key, row):  # type: ignore[no-untyped-def]
    mask = np.int64(len(table) - 1)
    at = np.int64(key & np.uint64(0xFFFFFFFF)) & mask
    while table[at] != 0:
        at = (at + 1) & mask
    table[at] = row + 1


@njit(cache=True)
def _find(table, keys, wanted, out):  # type: ignore[no-untyped-def]
    for i in range(len(wanted)):
        out[i] = find_row(table, keys, wanted[i])


@njit(cache=True)
def _add(table, keys, wanted, out, free, born, counts):  # type: ignore[no-untyped-def]
    """Find or place every key; counts i64[3]: rows ever used, free ones on the stack, births."""
    for i in range(len(wanted)):
        row = find_row(table, keys, wanted[i])
        if row < 0:
            if counts[1] > 0:
                counts[1] -= 1
                row = free[counts[1]]
            else:
                row = counts[0]
                counts[0] += 1
            keys[row] = wanted[i]
            born[row] = counts[2]
            counts[2] += 1
            _insert(table, wanted[i], row)
        out[i] = row


@njit(cache=True)
def _rebuild(table, keys, born, n):  # type: ignore[no-untyped-def]
    for row in range(n):
        if born[row] >= 0:
            _insert(table, keys[row], row)


@njit(cache=True)
def _free(table, keys, rows, free, born, counts):  # type: ignore[no-untyped-def]
    """Take rows out of the table, closing the gap in each probe chain, and lay them on the stack."""
    mask = np.int64(len(table) - 1)
    for i in range(len(rows)):
        key = keys[rows[i]]
        hole = np.int64(key & np.uint64(0xFFFFFFFF)) & mask
        while np.int64(table[hole]) - 1 != rows[i]:
            hole = (hole + 1) & mask
        at = (hole + 1) & mask
        while table[at] != 0:
            home = np.int64(keys[table[at] - 1] & np.uint64(0xFFFFFFFF)) & mask
            if ((at - home) & mask) >= ((at - hole) & mask):
                table[hole] = table[at]
                hole = at
            at = (at + 1) & mask
        table[hole] = 0
        keys[rows[i]] = 0
        born[rows[i]] = -1
        free[counts[1]] = rows[i]
        counts[1] += 1


@njit(cache=True)
def mark_low(table, keys, low, marks, value):  # type: ignore[no-untyped-def]
    """Set marks u8[capacity] to value on every row whose key's low 32 bits are among `low` u32[s]."""
    mask = np.int64(len(table) - 1)
    for i in range(len(low)):
        at = np.int64(low[i]) & mask
        while table[at] != 0:
            row = np.int64(table[at]) - 1
            if np.uint32(keys[row] & np.uint64(0xFFFFFFFF)) == low[i]:
                marks[row] = value
            at = (at + 1) & mask


@njit(cache=True)
def find_low(table, keys, low, out):  # type: ignore[no-untyped-def]
    """Fill out i64[s] with a row whose key's low 32 bits are low u32[s], -1 for none; of several, the first found."""
    mask = np.int64(len(table) - 1)
    for i in range(len(low)):
        out[i] = -1
        at = np.int64(low[i]) & mask
        while table[at] != 0:
            row = np.int64(table[at]) - 1
            if np.uint32(keys[row] & np.uint64(0xFFFFFFFF)) == low[i]:
                out[i] = row
                break
            at = (at + 1) & mask


class Rows:
    """The rows of all items one process knows; shared by reference between its items and its model.

    held u8[capacity] (bits of BEHAVIOUR, CATALOGUE, LEARNT), born i64[capacity] (number of the birth, -1 = free).

    >>> rows = Rows()
    >>> rows.add(np.array([7, 9, 7], np.uint64)).tolist(), rows.find(np.array([9, 8], np.uint64)).tolist(), rows.n
    ([0, 1, 0], [1, -1], 2)
    """

    def __init__(self, *, capacity: int = 1024) -> None:
        size = 1 << max(4, (capacity - 1).bit_length())
        self.keys: U64 = np.zeros(size, np.uint64)
        self.table: I32 = np.zeros(2 * size, np.int32)
        self.held: U8 = np.zeros(size, np.uint8)
        self.born: I64 = np.full(size, -1, np.int64)
        self._free: I64 = np.zeros(size, np.int64)
        self._counts: I64 = np.zeros(3, np.int64)

    @property
    def n(self) -> int:
        """Rows that were ever in use: all that holds something lies below."""
        return int(self._counts[0])

    @property
    def known(self) -> int:
        """Keys that have a row."""
        return int(self._counts[0] - self._counts[1])

    @property
    def births(self) -> int:
        """How often a key was given a row."""
        return int(self._counts[2])

    @property
    def capacity(self) -> int:
        """Rows that fit before the arrays grow; arrays aligned to these rows have at least this length."""
        return len(self.keys)

    def add(self, keys: U64) -> I64:
        """Return the rows of keys u64[k], giving unknown ones a free row or the next one."""
        self._reserve(len(keys))
        out = np.empty(len(keys), np.int64)
        _add(self.table, self.keys, keys, out, self._free, self.born, self._counts)
        return out

    def find(self, keys: U64) -> I64:
        """Return the rows of keys u64[k], -1 for unknown ones."""
        out = np.empty(len(keys), np.int64)
        _find(self.table, self.keys, keys, out)
        return out

    def find_low(self, low: U32) -> I64:
        """Return the rows of the keys whose low 32 bits are low u32[s], -1 for unknown ones."""
        out = np.empty(len(low), np.int64)
        find_low(self.table, self.keys, low, out)
        return out

    def spare(self) -> int:
        """Return the row that the next new key will be given: blank in every array, like an item nobody knows."""
        self._reserve(1)
        return int(self._free[self._counts[1] - 1]) if self._counts[1] else self.n

    def hold(self, rows: I64, who: int) -> None:
        """Say that `who` keeps something in these rows."""
        self.held[rows] |= who

    def release(self, rows: I64, who: int) -> I64:
        """Say that `who` keeps nothing in these distinct rows any more; return those that are free now."""
        self.held[rows] &= 255 - who
        empty = rows[np.equal(self.held[rows], 0)]
        _free(self.table, self.keys, empty, self._free, self.born, self._counts)
        return empty

    def held_by(self, who: int) -> I64:
        """Return the rows that `who` keeps something in, ascending."""
        return np.flatnonzero(self.held[: self.n] & who)

    def born_since(self, births: int) -> I64:
        """Return the rows that were given to a key after so many births, ascending."""
        if births >= self.births:
            return np.empty(0, np.int64)
        if self.births == self.n:  # no row was ever given twice
            return np.arange(births, self.n)
        return np.flatnonzero(self.born[: self.n] >= births)

    def _reserve(self, more: int) -> None:
        if self.known + more <= self.capacity:
            return
        size = 1 << (self.known + more).bit_length()
        self.keys, self.held = _wider(self.keys, size, 0), _wider(self.held, size, 0)
        self.born, self._free = _wider(self.born, size, -1), _wider(self._free, size, 0)
        self.table = np.zeros(2 * size, np.int32)
        _rebuild(self.table, self.keys, self.born, self.n)


def _wider(array: NDArray[Any], size: int, fill: int) -> NDArray[Any]:
    out = np.full(size, fill, array.dtype)
    out[: len(array)] = array
    return out
