"""How fairly what was shown is spread: coverage, Gini, entropy of categories, exposure by provider, category, channel.

Over the slots of the last 15 minutes of this process, against the items that may be served. Measured in a thread, at
most once in five seconds; every ten seconds a point of history while something is served. Knows nothing about users.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.items import CatalogueItem
from serving.dashboard.recent import Recent, Slots, channel_shares
from serving.snapshot import Live

FRESH_S: Final = 5.0
POINT_S: Final = 10.0
POINTS: Final = 90
NAMED: Final = 50
"""Providers and categories that are named, those shown most first."""
SAMPLED: Final = 20_000
"""Items of the catalogue that its own shares are counted over; of more, every so many-th."""

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def gini(counts: F64) -> float:
    """Return how unevenly counts f64[n] are spread: 0 where all are equal, (n - 1) / n where one has everything.

        G = 2 sum_i i x_(i) / (n sum x) - (n + 1) / n

    0 where there is nothing.
    """
    n, total = len(counts), float(counts.sum())
    if not n or total <= 0.0:
        return 0.0
    ordered = np.sort(counts)
    return float(2.0 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n)


def entropy(shares: Iterable[float], kinds: int) -> float:
    """Return the entropy of shares over that of `kinds` equal ones: 0 to 1; 0 where there is but one kind."""
    if kinds < 2:
        return 0.0
    return min(1.0, -sum(p * math.log(p) for p in shares if p > 0.0) / math.log(kinds))


def spread(entries: Iterable[tuple[CatalogueItem | None, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the weights of items by provider and by category; an item of several categories counts in part for each.

    "" is what has none.
    """
    providers, categories = defaultdict[str, float](float), defaultdict[str, float](float)
    for entry, weight in entries:
        providers[entry.provider if entry is not None else ""] += weight
        names = entry.categories if entry is not None and entry.categories else [""]
        for name in names:
            categories[name] += weight / len(names)
    return providers, categories


def measured(live: Live, slots: Slots, keys: NDArray[np.uint64], counts: I64, rows: I64) -> dict[str, Any]:
    """Return the figures of a window, its distinct items being keys u64[k], shown counts i64[k] times, at rows i64[k].

    Only reads, so that it may run in a thread while rows are written.
    """
    items = live.items
    eligible = np.flatnonzero(items.eligible)
    may = np.zeros(items.rows.capacity, np.bool_)
    may[eligible] = True
    known = rows >= 0
    exposed = np.zeros(items.rows.capacity)
    exposed[rows[known]] = counts[known]
    shown = int((exposed[eligible] > 0).sum())
    catalogue, shown_of = items.catalogue, zip(rows[known].tolist(), counts[known].tolist(), strict=True)
    providers, categories = spread((catalogue.get(row), count) for row, count in shown_of)
    sample = eligible[:: 1 + len(eligible) // SAMPLED].tolist()
    all_providers, all_categories = spread((catalogue.get(row), 1.0) for row in sample)
    total = max(float(counts[known].sum()), 1.0)
    return {
        "window_s": round(slots.seconds, 1), "slates": slots.slates, "slots": len(slots.items),
        "coverage": {"value": round(shown / max(len(eligible), 1), 5), "shown": shown, "eligible": len(eligible)},
        "gini": round(gini(exposed[eligible]), 5),
        "entropy": round(entropy((c / total for c in categories.values()), len(all_categories)), 5),
        "providers": _shares("provider", providers, all_providers, total, len(sample)),
        "categories": _shares("category", categories, all_categories, total, len(sample)),
        "channels": channel_shares(slots, np.ones(len(slots.items), np.bool_)),
    }  # fmt: skip


def _shares(
    what: str, shown: Mapping[str, float], there: Mapping[str, float], total: float, sampled: int
) -> list[dict[str, Any]]:
    names = sorted(shown.keys() | there.keys(), key=lambda name: (-shown.get(name, 0.0), -there.get(name, 0.0), name))
    return [
        {
            what: name, "share": round(shown.get(name, 0.0) / total, 5),
            "catalogue_share": round(there.get(name, 0.0) / max(sampled, 1), 5), "slots": round(shown.get(name, 0.0)),
        }
        for name in names[:NAMED]
    ]  # fmt: skip


@dataclass(slots=True)
class Measured:
    """The last figures, when they were measured (s), and their history."""

    figures: dict[str, Any] = field(default_factory=dict)
    at: float = -math.inf
    history: deque[list[float]] = field(default_factory=lambda: deque(maxlen=POINTS))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Quality:
    """The figures of one process, and what measures on while nobody looks; `live` gives the arrays now served."""

    def __init__(self, recent: Recent, live: Callable[[], Live], clock: Callable[[], float]) -> None:
        self._recent, self._live, self._clock = recent, live, clock
        self._last = Measured()

    async def told(self) -> dict[str, Any]:
        """Return the figures of the last 15 minutes, at most five seconds old, and their history."""
        figures = await self._measure()
        return {**figures, "history": list(self._last.history)}

    async def watch(self) -> None:
        """Add a point to the history every ten seconds in which something was served."""
        seen = 0
        while True:
            await asyncio.sleep(POINT_S)
            if self._recent.slots == seen:
                continue
            seen = self._recent.slots
            figures = await self._measure()
            point = [round(self._last.at, 1), figures["coverage"]["value"], figures["gini"], figures["entropy"]]
            self._last.history.append(point)

    async def _measure(self) -> dict[str, Any]:
        last, now = self._last, self._clock()
        async with last.turn:
            if now - last.at < FRESH_S and last.figures:
                return last.figures
            live, slots = self._live(), self._recent.window(now)
            keys, counts = await asyncio.to_thread(_distinct, slots.items)
            rows = live.items.rows.find(keys)
            last.figures = await asyncio.to_thread(measured, live, slots, keys, counts, rows)
            last.at = now
            return last.figures


def _distinct(items: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], I64]:
    keys, counts = np.unique(items, return_counts=True)
    return keys, counts.astype(np.int64)
