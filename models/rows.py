"""Item hash -> row number: an open-addressing table, append-only. Row numbers are private to one process.

A key's place is its low 32 bits, so that all keys with the same low half lie on one probe chain and can be found by
that half alone (the seen lists hold only that). Knows nothing about what the rows hold.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


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
def _add(table, keys, n, wanted, out):  # type: ignore[no-untyped-def]
    for i in range(len(wanted)):
        row = find_row(table, keys, wanted[i])
        if row < 0:
            row = n
            keys[n] = wanted[i]
            _insert(table, wanted[i], n)
            n += 1
        out[i] = row
    return n


@njit(cache=True)
def _rebuild(table, keys, n):  # type: ignore[no-untyped-def]
    for row in range(n):
        _insert(table, keys[row], row)


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


class Rows:
    """The rows of all items one process knows; shared by reference between its items and its model.

    >>> rows = Rows()
    >>> rows.add(np.array([7, 9, 7], np.uint64)).tolist(), rows.find(np.array([9, 8], np.uint64)).tolist(), rows.n
    ([0, 1, 0], [1, -1], 2)
    """

    def __init__(self, *, capacity: int = 1024) -> None:
        size = 1 << max(4, (capacity - 1).bit_length())
        self.n = 0
        self.keys: U64 = np.zeros(size, np.uint64)
        self.table: I32 = np.zeros(2 * size, np.int32)

    @property
    def capacity(self) -> int:
        """Rows that fit before the arrays grow; arrays aligned to these rows have at least this length."""
        return len(self.keys)

    def add(self, keys: U64) -> I64:
        """Return the rows of keys u64[k], giving unknown ones the next rows."""
        self._reserve(len(keys))
        out = np.empty(len(keys), np.int64)
        self.n = int(_add(self.table, self.keys, self.n, keys, out))
        return out

    def find(self, keys: U64) -> I64:
        """Return the rows of keys u64[k], -1 for unknown ones."""
        out = np.empty(len(keys), np.int64)
        _find(self.table, self.keys, keys, out)
        return out

    def _reserve(self, more: int) -> None:
        if self.n + more <= self.capacity:
            return
        size = 1 << (self.n + more).bit_length()
        keys = np.zeros(size, np.uint64)
        keys[: self.n] = self.keys[: self.n]
        self.keys, self.table = keys, np.zeros(2 * size, np.int32)
        _rebuild(self.table, self.keys, self.n)
