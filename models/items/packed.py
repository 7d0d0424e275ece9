"""The packed row of an item: its layout by version, reading and writing many rows at once.

Row, version 3, little endian, in 8-byte words; neighbours by item hash, row numbers never leave the process:

    word 0       version | a << 8 | b << 16 | c << 24 | id length << 32
    words 1-8    decayed counts f64; 9-12 their cells 8 x i32; 13, 14 first and last event time f64 (s)
    words 15, 16 times shown, outcomes of showing u64; 17-19 sums of the rows of A, B and C f64
    words 20-27  sums of exposures, dwells and ratings f64 (models/bandit/posterior.py)
    then         a hashes u64, a weights f64, b hashes u64, b weights f64, c hashes u64, c weights f64, the id in utf-8

A c of 128 and more says that the row is a context (see `contexts`): its C, c - 128 long, is what was chosen under it.
Version 2 had no words 20-27, version 1 neither them nor C: no length of it, no sum. All are read, 3 is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.examples import CodecError
from models.items.transitions import K_LONG, ItemArrays, K

VERSION: Final = 3
_FIXED: Final = 28
"""Words before the lists; version 2 had 20, version 1 had 19."""
_HEADS: Final = {1: 19, 2: 20, 3: _FIXED}
_ODD: Final = "item row {:016x}: expected finite counts and weights from 0 on, sums of exposures below 1e9, got others"

F64 = NDArray[np.float64]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


def packed(rows: I64, ids: list[bytes], shown: I64, outcomes: I64, contexts: Bools, arrays: ItemArrays) -> list[bytes]:
    """Return the packed bytes of these rows, with these ids (empty where no event told one)."""
    start = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(_sizes(rows, arrays), out=start[1:])
    words = np.zeros(int(start[-1]), np.uint64)
    lengths = np.fromiter(map(len, ids), np.uint64, len(ids))
    _pack(
        words, words.view(np.float64), words.view(np.int32), start, rows, lengths, shown, outcomes, contexts, arrays,
    )  # fmt: skip
    data, cuts = words.tobytes(), (8 * start).tolist()
    return [data[a:b] + text for a, b, text in zip(cuts[:-1], cuts[1:], ids, strict=True)]


def read(keys: Sequence[int], blobs: Sequence[bytes]) -> tuple[U64, I64, list[str]]:
    """Return packed rows as (words u64[w], start i64[n + 1] of each, ids); raises CodecError at the first bad one."""
    words, start = _joined(blobs, [_words(key, blob) for key, blob in zip(keys, blobs, strict=True)])
    if len(bad := np.flatnonzero(_odd(words, words.view(np.float64), start))):
        raise CodecError(_ODD.format(keys[bad[0]]))
    ends = (8 * np.diff(start)).tolist()
    return words, start, [blob[end:].decode() for blob, end in zip(blobs, ends, strict=True)]


def _joined(blobs: Sequence[bytes], sizes: Sequence[int]) -> tuple[U64, I64]:
    start = np.zeros(len(blobs) + 1, np.int64)
    np.cumsum(np.array(sizes, np.int64), out=start[1:])
    data = b"".join(blob[: 8 * size] for blob, size in zip(blobs, sizes, strict=True))
    return np.frombuffer(data, np.uint64), start


def sound(keys: Sequence[int], blobs: Sequence[bytes]) -> tuple[list[int], list[bytes], list[str]]:
    """Return the item rows that `Items.load` reads, and what is wrong with each of the others."""
    good: list[int] = []
    values: list[bytes] = []
    bad: list[str] = []
    sizes: list[int] = []
    for key, blob in zip(keys, blobs, strict=True):
        try:
            sizes.append(_words(key, blob))
        except CodecError as error:
            bad.append(str(error))
            continue
        good.append(key)
        values.append(blob)
    words, start = _joined(values, sizes)
    odd = _odd(words, words.view(np.float64), start).tolist()
    bad += [_ODD.format(key) for key, wrong in zip(good, odd, strict=True) if wrong]
    return (
        [key for key, wrong in zip(good, odd, strict=True) if not wrong],
        [value for value, wrong in zip(values, odd, strict=True) if not wrong], bad,
    )  # fmt: skip


def _words(key: int, blob: bytes) -> int:
    head = _HEADS.get(blob[0], 0) if blob else 0
    if not head or len(blob) < 8 * head:
        got = f"{len(blob)} bytes that begin with {blob[:2].hex() or 'nothing'}"
        raise CodecError(f"item row {key:016x}: expected version 1 to {VERSION}, got {got}")
    size = head + 2 * (blob[1] + blob[2] + (blob[3] & 127))
    expected = 8 * size + int.from_bytes(blob[4:8], "little")
    if len(blob) != expected or blob[1] > K or blob[2] > K or blob[3] & 127 > K_LONG or (blob[3] and blob[0] == 1):
        raise CodecError(f"item row {key:016x}: expected {expected} bytes, got {len(blob)}")
    try:
        blob[8 * size :].decode()
    except UnicodeDecodeError as error:
        raise CodecError(f"item row {key:016x}: its id is not utf-8 ({error})") from error
    return size


@njit(cache=True)
def _odd(words, floats, start):  # type: ignore[no-untyped-def]
    """Return bool[n]: a count, sum or weight of the packed row is negative or not finite, and a logarithm is taken.

    Sums of exposures, dwells and ratings forget as they grow: none is ever near 1e9; they are added up over all rows.
    """
    out = np.zeros(len(start) - 1, np.bool_)
    for i in range(len(out)):
        at = start[i]
        a, b, c, head = _counts(words[at])
        after = head + 2 * a + 2 * b
        for first, last in (
            (1, 9), (17, head), (head + a, head + 2 * a), (head + 2 * a + b, after), (after + c, after + 2 * c),
        ):  # fmt: skip
            for k in range(at + first, at + last):
                if not 0.0 <= floats[k] < np.inf:
                    out[i] = True
        for k in range(at + 20, at + head):
            if floats[k] >= 1e9:
                out[i] = True
    return out


@njit(cache=True)
def _length(items, row):  # type: ignore[no-untyped-def]
    n = np.int64(0)
    while n < items.shape[1] and items[row, n] >= 0:
        n += 1
    return n


@njit(cache=True)
def _sizes(rows, arrays):  # type: ignore[no-untyped-def]
    out = np.empty(len(rows), np.int64)
    for i in range(len(rows)):
        row = rows[i]
        out[i] = 28 + 2 * (_length(arrays.a_items, row) + _length(arrays.b_items, row) + _length(arrays.c_items, row))
    return out


@njit(cache=True)
def _counts(word):  # type: ignore[no-untyped-def]
    """Return the lengths of the three lists and the words before them, off a row's first word."""
    version = np.int64(word) & 255
    head = np.int64(28) if version == 3 else np.int64(18) + version
    return np.int64(word >> np.uint64(8)) & 255, np.int64(word >> np.uint64(16)) & 255, np.int64(word >> np.uint64(24)) & 127, head  # noqa: E501  # fmt: skip


@njit(cache=True)
def context_words(words, start):  # type: ignore[no-untyped-def]
    """Return bool[n]: the packed row is a context."""
    out = np.zeros(len(start) - 1, np.bool_)
    for i in range(len(out)):
        out[i] = words[start[i]] & np.uint64(1 << 31) != 0
    return out


@njit(cache=True)
def _write(words, floats, at, keys, items, weights, row):  # type: ignore[no-untyped-def]
    """Write one list of a row at a word: its hashes, its weights; returns the word after it."""
    n = _length(items, row)
    for k in range(n):
        words[at + k] = keys[items[row, k]]
        floats[at + n + k] = weights[row, k]
    return at + 2 * n


@njit(cache=True)
def _read(floats, at, n, neighbours, first, items, weights, row):  # type: ignore[no-untyped-def]
    """Set one list of a row, n long, from the word `at` and the rows from `first`; returns the word after it."""
    items[row, :] = -1
    weights[row, :] = 0.0
    for k in range(n):
        items[row, k] = neighbours[first + k]
        weights[row, k] = floats[at + n + k]
    return at + 2 * n


@njit(cache=True)
def _pack(words, floats, halves, start, rows, id_lengths, shown, outcomes, contexts, arrays):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        row, at = rows[i], start[i]
        a, b, c = _length(arrays.a_items, row), _length(arrays.b_items, row), _length(arrays.c_items, row)
        flag = 128 if contexts[row] else 0
        words[at] = np.uint64(3 | a << 8 | b << 16 | (c | flag) << 24) | (id_lengths[i] << np.uint64(32))
        for h in range(8):
            floats[at + 1 + h] = arrays.weights[row, h]
            halves[2 * (at + 9) + h] = arrays.cells[row, h]
        floats[at + 13], floats[at + 14] = arrays.first[row], arrays.last[row]
        words[at + 15], words[at + 16] = np.uint64(shown[row]), np.uint64(outcomes[row])
        floats[at + 17], floats[at + 18] = arrays.a_sums[row], arrays.b_sums[row]
        floats[at + 19] = arrays.c_sums[row]
        floats[at + 20 : at + 28] = arrays.sums[row]
        after = _write(words, floats, at + 28, arrays.keys, arrays.a_items, arrays.a_weights, row)
        after = _write(words, floats, after, arrays.keys, arrays.b_items, arrays.b_weights, row)
        _write(words, floats, after, arrays.keys, arrays.c_items, arrays.c_weights, row)


@njit(cache=True)
def neighbour_words(words, start):  # type: ignore[no-untyped-def]
    """Return the places of all neighbour hashes, A before B before C, row after row."""
    out = np.empty(len(words), np.int64)
    n = 0
    for i in range(len(start) - 1):
        a, b, c, head = _counts(words[start[i]])
        at = start[i] + head
        for length in (a, b, c):
            for k in range(length):
                out[n + k] = at + k
            n += length
            at += 2 * length
    return out[:n]


@njit(cache=True)
def load_rows(words, floats, halves, start, rows, neighbours, shown, outcomes, arrays):  # type: ignore[no-untyped-def]
    """Set rows i64[n] from packed words; neighbours i64 are the rows of `neighbour_words`."""
    n = 0
    for i in range(len(rows)):
        row, at = rows[i], start[i]
        a, b, c, head = _counts(words[at])
        for h in range(8):
            arrays.weights[row, h] = floats[at + 1 + h]
            arrays.cells[row, h] = halves[2 * (at + 9) + h]
        arrays.first[row], arrays.last[row] = floats[at + 13], floats[at + 14]
        shown[row], outcomes[row] = np.int64(words[at + 15]), np.int64(words[at + 16])
        arrays.a_sums[row], arrays.b_sums[row] = floats[at + 17], floats[at + 18]
        arrays.c_sums[row] = floats[at + 19] if head > 19 else 0.0
        for j in range(8):
            arrays.sums[row, j] = floats[at + 20 + j] if head > 20 else 0.0
        after = _read(floats, at + head, a, neighbours, n, arrays.a_items, arrays.a_weights, row)
        after = _read(floats, after, b, neighbours, n + a, arrays.b_items, arrays.b_weights, row)
        _read(floats, after, c, neighbours, n + a + b, arrays.c_items, arrays.c_weights, row)
        n += a + b + c
