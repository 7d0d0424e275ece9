"""A recommender that knows every item, the law of a click and what people like on the whole, but no single person.

What each likes it learns from what they looked at, clicked or not: a Gaussian around the mean taste, as in

    log p(taste | log) = log N(taste; mean, covariance) + sum_i d_i log P(click_i | taste),  d_i = exp(-age_i / drift_s)

and the best slate under its mode is what it shows. So its regret is what not knowing people costs: what a recommender
that also has to learn the items can hardly go below. Knows nothing of Freshet's models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from streaming.simulation.world import Floats, Outcome, Rows, World

REMEMBERED: Final = 60
"""Items that a person looked at last, of which it knows."""
STEPS: Final = 6
"""Of Newton's method."""
LEAST: Final = 1e-3
"""Added to the variances of the taste."""


class Looked(NamedTuple):
    """An item that a person looked at: the other log-odds of a click, and whether it came."""

    item: int
    others: float
    clicked: bool
    time: float


class Informed:
    """A `scorecard.Recommender` in the confidence of `world`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mean: Floats = np.asarray(world.taste.mean(0))
        covariance = np.cov(world.taste.T) + LEAST * np.eye(len(self.mean))
        self.precision: Floats = np.asarray(np.linalg.inv(covariance), np.float64)
        self._looked: list[deque[Looked]] = [deque(maxlen=REMEMBERED) for _ in range(world.users)]

    def publish(self, rows: Rows, now: float) -> None:
        """Nothing is news."""

    def recommend(self, user: int, n: int, now: float) -> Rows:
        """Return the n best items that the person has not clicked, were their taste what the log says."""
        rows = np.arange(self.world.live)
        rows = rows[~np.isin(rows, list(self.world.clicked[user]))]
        odds = self._others(rows) + self.world.parameters.gain * (self.world.vectors[rows] @ self.taste(user))
        return rows[np.argsort(-odds, kind="stable")[:n]]

    def popular(self, user: int, n: int, now: float) -> Rows:
        """Return the first items: nobody asks for them."""
        return np.arange(n)

    def observe(self, user: int, outcomes: Sequence[Outcome], slate: Rows | None, now: float) -> None:
        """Remember what the person looked at."""
        clicked = {outcome.item for outcome in outcomes if outcome.kind == "click"}
        rows = np.array(list(dict.fromkeys(outcome.item for outcome in outcomes)), np.int64)
        for item, others in zip(rows.tolist(), self._others(rows).tolist(), strict=True):
            self._looked[user].append(Looked(item, others, item in clicked, now))

    def taste(self, user: int) -> Floats:
        """Return the most probable taste of a person f64[dims]."""
        looked, p, found = self._looked[user], self.world.parameters, self.mean.copy()
        if not looked:
            return found
        vectors = p.gain * self.world.vectors[[seen.item for seen in looked]]
        others, clicks = np.array([seen.others for seen in looked]), np.array([seen.clicked for seen in looked])
        weights = np.exp(-(self.world.now - np.array([seen.time for seen in looked])) / p.drift_s)
        for _ in range(STEPS):
            chance = 1.0 / (1.0 + np.exp(-(others + vectors @ found)))
            slope = self.precision @ (found - self.mean) + vectors.T @ (weights * (chance - clicks))
            curvature = self.precision + (vectors * (weights * chance * (1.0 - chance))[:, None]).T @ vectors
            found -= np.linalg.solve(curvature, slope)
        return found

    def _others(self, rows: Rows) -> Floats:
        """Return the log-odds of a click f64[k] but for person and taste."""
        world, p = self.world, self.world.parameters
        aged = np.log(2.0) * np.maximum(0.0, world.now - world.published[rows]) / world.shelf[rows]
        return np.asarray(p.base + world.appeal[rows] - np.minimum(aged, p.floor))
