"""What follows what: two bounded neighbour lists per item, folded event by event. Knows nothing about ids or time.

On event x after h0 (newest), h1, ...: for p < window add r^p to (h_p -> x) and sym r^p to (x -> h_p).

    A: window 1; B: window 5, r .8, sym .3; K 30 each; no decay; self-transitions skipped.

A full list replaces its smallest weight by the fresh one. The sum of a row counts everything ever added to it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

K: Final = 30
WINDOW: Final = 5
FADE: Final = np.array([0.8**p for p in range(WINDOW)])
BACKWARD: Final = 0.3


@njit(cache=True)
def bump(items, weights, sums, row, item, weight):  # type: ignore[no-untyped-def]
    """Add weight to (row -> item) in one list: items i32[n, K] (-1 = free), weights f64[n, K], sums f64[n]."""
    sums[row] += weight
    least = 0
    for k in range(items.shape[1]):
        if items[row, k] == item:
            weights[row, k] += weight
            return
        if items[row, k] < 0:
            items[row, k] = item
            weights[row, k] = weight
            return
        if weights[row, k] < weights[row, least]:
            least = k
    items[row, least] = item
    weights[row, least] = weight


@njit(cache=True)
def follow(x, history, a_items, a_weights, a_sums, b_items, b_weights, b_sums, touched):  # type: ignore[no-untyped-def]
    """Fold one event: row x after rows history[0], history[1], ... (newest first); marks the rows it changes."""
    touched[x] = True
    for p in range(min(len(history), 5)):
        h = history[p]
        if h == x:
            continue
        touched[h] = True
        if p == 0:
            bump(a_items, a_weights, a_sums, h, x, 1.0)
        bump(b_items, b_weights, b_sums, h, x, FADE[p])
        bump(b_items, b_weights, b_sums, x, h, 0.3 * FADE[p])


@njit(cache=True)
def weight_of(items, weights, row, item):  # type: ignore[no-untyped-def]
    """Return the weight of (row -> item), 0 where it is not in the list."""
    for k in range(items.shape[1]):
        if items[row, k] == item:
            return weights[row, k]
        if items[row, k] < 0:
            return 0.0
    return 0.0
