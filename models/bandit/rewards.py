"""What a shown item earned: one weighted sum of what its viewer did with it, by surface.

    reward = w_click [click] + w_dwell min(log1p(seconds) / log1p(60), 1.5) + w_rating (rating + 1) / 2
             + w_action weight

A rating is a place on its scale from -1 to 1, a weight that of the event table, where it is positive. The sum is over
the kinds that a viewer did, each once; divided by the sum of the weights, so that it stays about 1 and the posterior's
probability scale holds. A view earns nothing: it says that the item was examined. Knows nothing about posteriors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.examples import ACTION, CLICK, DWELL, KIND_NAMES, RATING

DEFAULT: Final = (("*", "click", 1.0),)

F64 = NDArray[np.float64]
RewardTable = Iterable[tuple[str, str, float]]
"""Rows of (surface or `*`, kind, weight)."""


class Rewards:
    """The table of (surface, kind, weight); rows of a surface replace those of `*`, without any clicks count 1.

    >>> rewards = Rewards([("*", "click", 1), ("home", "click", 1), ("home", "dwell", 1)])
    >>> rewards.of("cart", CLICK, 0.0, 1.0), rewards.of("home", CLICK, 0.0, 1.0)
    (1.0, 0.5)
    """

    def __init__(self, table: RewardTable = ()) -> None:
        self._weights: dict[str, dict[int, float]] = {}
        for surface, kind, weight in tuple(table) or DEFAULT:
            self._weights.setdefault(surface, {})[KIND_NAMES.index(kind)] = float(weight)

    def of(self, surface: str, kind: int, value: float, weight: float) -> float:
        """Return what one event earned: kind and value as in `models.examples`, its weight as in the event table."""
        weights = self._weights.get(surface) or self._weights.get("*") or {CLICK: 1.0}
        if kind not in weights:
            return 0.0
        scale = sum(weights.values()) or 1.0
        return weights[kind] * _worth(kind, value, weight) / scale


def _worth(kind: int, value: float, weight: float) -> float:
    if kind == DWELL:
        return min(math.log1p(max(value, 0.0)) / math.log1p(60.0), 1.5)
    if kind == RATING:
        return 0.5 * (value + 1.0)
    return max(weight, 0.0) if kind == ACTION else 1.0


@lru_cache(maxsize=256)
def examination(k: int) -> F64:
    """Return how surely each of k positions is looked at where nobody says so: the discount of DCG, f64[k]."""
    usual: F64 = 1.0 / np.log2(np.arange(2.0, k + 2.0))
    usual.flags.writeable = False  # one array for everybody
    return usual
