"""What follows what: three bounded neighbour lists per item, folded event by event. Knows nothing about ids or time.

On event x after h0 (newest), h1, ...: for p < window add r^p to (h_p -> x) and sym r^p to (x -> h_p).

    A: window 1, K 30; B: window 5, r .8, sym .3, K 30; C: window 20, r .95, sym .5, K 60; self-transitions skipped.

A full list replaces its smallest weight by the fresh one. The sum of a row counts everything ever added to it; where it
passes the list's bound the whole row is halved, so that a row forgets at the rate of its own events and no number grows
for ever. C is read as a cosine: weight / sqrt((sum + 10) (n_y + 10)), n_y the events of y.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

K: Final = 30
K_LONG: Final = 60
NEAR: Final = 5
WINDOW: Final = 20
FADE: Final = np.array([0.8**p for p in range(NEAR)])
FADE_LONG: Final = np.array([0.95**p for p in range(WINDOW)])
MOST_A: Final = 1_000.0
MOST_B: Final = 4_000.0
MOST_C: Final = 20_000.0
"""Sums at which a row is halved: about 1,000 events of an item."""


F64 = NDArray[np.float64]
U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


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
    c_items: I32
    c_weights: F64
    c_sums: F64
    tokens: I32
    token_fields: NDArray[np.uint8]
    born: F64
    shown: I64
    sums: F64


@njit(cache=True)
def _least(values):  # type: ignore[no-untyped-def]
    """Return the place of the first smallest value; four running minima, as each comparison would wait for the last."""
    a, b, c, d = values[0], values[0], values[0], values[0]
    k = 0
    while k + 3 < len(values):
        a, b = min(a, values[k]), min(b, values[k + 1])
        c, d = min(c, values[k + 2]), min(d, values[k + 3])
        k += 4
    while k < len(values):
        a = min(a, values[k])
        k += 1
    smallest = min(min(a, b), min(c, d))
    at = 0
    while values[at] != smallest:
        at += 1
    return at


@njit(cache=True)
def bump(items, weights, sums, row, item, weight, most):  # type: ignore[no-untyped-def]
    """Add weight to (row -> item) in one list: items i32[n, K] (-1 = free), weights f64[n, K], sums f64[n]."""
    sums[row] += weight
    if sums[row] > most:
        sums[row] *= 0.5
        for k in range(items.shape[1]):
            weights[row, k] *= 0.5
    size = items.shape[1]
    at = size
    for k in range(size):  # two passes: the first reads no weights, and ends early as a rule
        if items[row, k] == item:
            weights[row, k] += weight
            return
        if items[row, k] < 0:
            at = k
            break
    if at == size:
        at = _least(weights[row])
    items[row, at] = item
    weights[row, at] = weight


@njit(cache=True)
def follow(x, history, arrays, touched):  # type: ignore[no-untyped-def]
    """Fold one event: row x after rows history[0], history[1], ... (newest first); marks the rows it changes."""
    a_items, a_weights, a_sums = arrays.a_items, arrays.a_weights, arrays.a_sums
    b_items, b_weights, b_sums = arrays.b_items, arrays.b_weights, arrays.b_sums
    c_items, c_weights, c_sums = arrays.c_items, arrays.c_weights, arrays.c_sums
    touched[x] = True
    for p in range(min(len(history), 20)):
        h = history[p]
        if h == x:
            continue
        touched[h] = True
        if p == 0:
            bump(a_items, a_weights, a_sums, h, x, 1.0, MOST_A)
        if p < 5:
            bump(b_items, b_weights, b_sums, h, x, FADE[p], MOST_B)
            bump(b_items, b_weights, b_sums, x, h, 0.3 * FADE[p], MOST_B)
        bump(c_items, c_weights, c_sums, h, x, FADE_LONG[p], MOST_C)
        bump(c_items, c_weights, c_sums, x, h, 0.5 * FADE_LONG[p], MOST_C)


@njit(cache=True)
def cosine(weight, total, count):  # type: ignore[no-untyped-def]
    """Return the cosine of a weight of C, given its row's sum and how often the neighbour was counted."""
    return weight / math.sqrt((total + 10.0) * (count + 10.0))
