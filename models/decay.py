"""Decayed counts on one fixed grid of half-lives, smoothed into popularities. Knows nothing about items' ids or events.

A count of half-life H is w = sum_i exp(lambda (t_i - r)), lambda = ln 2 / H, with the reference r on a grid of time:
r = cell L, L = 30 / lambda. The cell is kept beside the count, and the count is rescaled by exp(-30 dk) when it is next
touched, dk cells later: so the bytes depend on the count's own events only, not on how the stream was cut.

Popularity is smoothed from the longest half-life down (base: an item counted n times of `total`, among `items`):

    P_h = (w_h + 5 P_longer) / (W_h + 5),    base = (n + .5) / (total + .5 items)

It is linear in the w of an item, so a whole catalogue is scored with one dot product per row (`blend`).
Cormode, Shkapenyuk, Srivastava, Xu: Forward Decay (ICDE 2009).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.examples import CodecError

HALF_LIVES: Final[tuple[float, ...]] = (120.0, 900.0, 7200.0, 86400.0, 604800.0, 2419200.0, 31536000.0, math.inf)
"""The grid, s."""
NAMES: Final = ("2min", "15min", "2h", "1d", "7d", "28d", "1y", "none")
GRID: Final = len(HALF_LIVES)
RATES: Final[NDArray[np.float64]] = np.array([math.log(2.0) / h for h in HALF_LIVES])
"""lambda of each half-life, 1/s; 0 for none."""
SMOOTHING: Final = 5.0
PRIOR_COUNT: Final = 0.5
_CELL: Final = 30.0
_LAST_CELL: Final = 24  # exp(-30 * 24) is below the smallest normal number's reach of any count
STEPS: Final[NDArray[np.float64]] = np.array([math.exp(-_CELL * k) for k in range(_LAST_CELL + 1)])
"""exp(-30 k) by k: what a count is worth k cells later."""

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@njit(cache=True)
def exp(x):  # type: ignore[no-untyped-def]
    """The one exponential of all folds (numba's, equal to math.exp; numpy's differs in the last bit)."""
    return math.exp(x)


@njit(cache=True)
def cell_of(rate, t):  # type: ignore[no-untyped-def]
    """Return the grid cell of time t for a decay rate; clipped to 32 bits."""
    return np.int32(min(max(math.floor(rate * t / 30.0), -2.0e9), 2.0e9))


@njit(cache=True)
def steps_between(cell, later):  # type: ignore[no-untyped-def]
    """Return the place in STEPS of a count kept at `cell` and read at cell `later`."""
    return min(max(np.int64(later) - np.int64(cell), np.int64(0)), np.int64(24))


@njit(cache=True)
def add(weights, cells, t):  # type: ignore[no-untyped-def]
    """Add one event at time t to the eight counts (weights f64[8], cells i32[8]) of one row."""
    for h in range(8):
        cell = cell_of(RATES[h], t)
        if weights[h] == 0.0:
            cells[h] = cell
        elif cell > cells[h]:
            weights[h] *= STEPS[steps_between(cells[h], cell)]
            cells[h] = cell
        weights[h] += exp(min(RATES[h] * t - 30.0 * cells[h], 30.0))


@njit(cache=True)
def at_time(now, totals, total_cells, cells_now, scale):  # type: ignore[no-untyped-def]
    """Fill cells_now i32[8] and scale f64[8] for time `now`, and return the decayed totals W f64[8] at that time."""
    out = np.empty(8)
    for h in range(8):
        cells_now[h] = cell_of(RATES[h], now)
        scale[h] = exp(min(max(30.0 * cells_now[h] - RATES[h] * now, -30.0), 30.0))
        dk = steps_between(total_cells[h], cells_now[h])
        out[h] = totals[h] * STEPS[dk] * scale[h]
    return out


@njit(cache=True)
def popularities(weights, cells, cells_now, scale, totals, items, out):  # type: ignore[no-untyped-def]
    """Fill out f64[8] with P_h of one row, given `at_time`'s cells, scale and decayed totals."""
    p = (weights[7] + 0.5) / (totals[7] + 0.5 * items)
    for h in range(7, -1, -1):
        dk = steps_between(cells[h], cells_now[h])
        p = (weights[h] * STEPS[dk] * scale[h] + 5.0 * p) / (totals[h] + 5.0)
        out[h] = p


@njit(cache=True)
def blend(mixture, scale, totals, items, out):  # type: ignore[no-untyped-def]
    """Fill out f64[9] so that sum_h mixture_h P_h of a row = sum_h out_h (w_h exp(-30 dk_h)) + out_8."""
    carried = 0.0
    for h in range(8):
        carried += mixture[h]
        out[h] = carried * scale[h] / (totals[h] + 5.0)
        carried *= 5.0 / (totals[h] + 5.0)
    base = totals[7] + 0.5 * items
    out[7] += carried / base
    out[8] = carried * 0.5 / base


@njit(cache=True)
def scan(n, weights, cells, cells_now, blends, out):  # type: ignore[no-untyped-def]
    """Fill out f32[c, n] with c blended popularities (blends f64[c, 9]) of the first n rows; no exponential per row."""
    if len(blends) == 3:
        _scan3(n, weights, cells, cells_now, blends, out)
        return
    for i in range(n):
        for j in range(len(blends)):
            p = blends[j, 8]
            for h in range(8):
                p += blends[j, h] * weights[i, h] * STEPS[steps_between(cells[i, h], cells_now[h])]
            out[j, i] = p


@njit(cache=True)
def _scan3(n, weights, cells, cells_now, blends, out):  # type: ignore[no-untyped-def]
    """`scan` of three blends in one pass."""
    for i in range(n):
        a, b, c = blends[0, 8], blends[1, 8], blends[2, 8]
        for h in range(8):
            w = weights[i, h]
            if w != 0.0:
                if cells[i, h] != cells_now[h]:
                    w *= STEPS[steps_between(cells[i, h], cells_now[h])]
                a += blends[0, h] * w
                b += blends[1, h] * w
                c += blends[2, h] * w
        out[0, i], out[1, i], out[2, i] = a, b, c


class Popularity:
    """Eight decayed counts per row, and their totals; rows are the caller's.

    weights f64[capacity, 8], cells i32[capacity, 8]; totals f64[8], total_cells i32[8]; last f64[1], latest time, s.
    """

    def __init__(self) -> None:
        self.weights: F64 = np.zeros((0, GRID))
        self.cells: I32 = np.zeros((0, GRID), np.int32)
        self.totals: F64 = np.zeros(GRID)
        self.total_cells: I32 = np.zeros(GRID, np.int32)
        self.last: F64 = np.full(1, -1e300)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` rows."""
        self.weights = grown(self.weights, capacity)
        self.cells = grown(self.cells, capacity)

    def at(self, now: float) -> tuple[I32, F64, F64, float]:
        """Return (cells, scale, decayed totals, time): how rows are read at `now`, or at the last event if later."""
        time = max(now, float(self.last[0]))
        cells, scale = np.empty(GRID, np.int32), np.empty(GRID)
        return cells, scale, at_time(time, self.totals, self.total_cells, cells, scale), time

    def pack_totals(self) -> bytes:
        """Return the totals as 104 bytes: f64[8], i32[8], last f64."""
        return self.totals.tobytes() + self.total_cells.tobytes() + self.last.tobytes()

    def load_totals(self, data: bytes) -> None:
        """Read `pack_totals`; raises CodecError on other bytes, and changes nothing then."""
        if len(data) != 104:
            raise CodecError(f"totals of decayed counts: expected 104 bytes, got {len(data)}")
        totals, last = np.frombuffer(data, "<f8", GRID, 0), np.frombuffer(data, "<f8", 1, 96)
        if not (np.isfinite(totals).all() and (totals >= 0).all() and np.isfinite(last).all()):
            raise CodecError(f"totals of decayed counts: expected finite numbers from 0 on, got {totals}, {last}")
        self.totals[:], self.last[:] = totals, last
        self.total_cells[:] = np.frombuffer(data, "<i4", GRID, 64)


def grown(array: NDArray[Any], capacity: int, fill: float = 0) -> NDArray[Any]:
    """Return the array with its first axis at `capacity`, new places filled; itself where it is large enough."""
    if len(array) >= capacity:
        return array
    out = np.full((capacity, *array.shape[1:]), fill, array.dtype)
    out[: len(array)] = array
    return out
