"""The scorecard of a simulated world: expected clicks of our slates, of popularity and of the oracle, paired.

It also plays a world against any recommender in process (`play`), without Kafka, Redis or HTTP. It knows nothing about
how slates are made or how events travel, and reads no clock.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, Protocol

import numpy as np

from streaming.simulation.world import Floats, Outcome, Rows, World, visits

BOOTSTRAP = 1000


class Means(NamedTuple):
    """Mean expected clicks of a slate, over the slates that were scored."""

    ours: float
    popular: float
    oracle: float
    slates: int


class Lead(NamedTuple):
    """Ours minus popular, clicks per slate: mean and paired 95 % interval over users."""

    mean: float
    low: float
    high: float


class Entry(NamedTuple):
    """One served slate: who asked when, and the expected clicks of the three paired slates."""

    time: float
    user: int
    ours: float
    popular: float
    oracle: float


_time = attrgetter("time")


@dataclass(slots=True)
class Scorecard:
    """All entries of one run, in order of time."""

    entries: list[Entry]

    def add(self, world: World, user: int, ours: Rows, popular: Rows, n: int, *, best: Rows | None = None) -> Entry:
        """Score the slate we served and the popular one for the same person at the same moment, before they react.

        `n` were asked for: a slate that came back shorter is scored as it is, the oracle has n (`best`, where the
        caller has asked it already).
        """
        slates = (ours, popular, world.oracle(user, n) if best is None else best)
        entry = Entry(world.now, user, *(world.expected_clicks(user, slate) for slate in slates))
        self.entries.append(entry)
        return entry

    def between(self, since: float, until: float = np.inf) -> list[Entry]:
        """The entries with since <= time < until."""
        return self.entries[bisect_left(self.entries, since, key=_time) : bisect_left(self.entries, until, key=_time)]

    def means(self, since: float = -np.inf, until: float = np.inf) -> Means:
        """Mean expected clicks per slate; NaN without a slate."""
        chosen = self.between(since, until)
        if not chosen:
            return Means(float("nan"), float("nan"), float("nan"), 0)
        ours, popular, oracle = np.array([entry[2:] for entry in chosen]).mean(axis=0).tolist()
        return Means(ours, popular, oracle, len(chosen))

    def lead(self, *, rng: np.random.Generator, since: float = -np.inf, until: float = np.inf) -> Lead:
        """Ours - popular with the 95 % percentile interval of a bootstrap over users (slates of a user go together)."""
        chosen = self.between(since, until)
        if not chosen:
            return Lead(float("nan"), float("nan"), float("nan"))
        _, index = np.unique([entry.user for entry in chosen], return_inverse=True)
        difference = np.array([entry.ours - entry.popular for entry in chosen])
        total = np.asarray(np.bincount(index, difference), np.float64)
        count = np.asarray(np.bincount(index), np.float64)
        low, high = np.percentile(_resampled(total, count, rng), [2.5, 97.5]).tolist()
        return Lead(float(difference.mean()), low, high)


def _resampled(total: Floats, count: Floats, rng: np.random.Generator) -> Floats:
    """Means of BOOTSTRAP samples of users drawn with replacement: sum of differences over sum of slates."""
    drawn = rng.integers(0, len(total), (BOOTSTRAP, len(total)))
    return np.asarray(total[drawn].sum(axis=1) / count[drawn].sum(axis=1))


class Recommender(Protocol):
    """What `play` needs: two ways to make a slate, and ears."""

    def publish(self, rows: Rows, now: float) -> None:
        """These items are out from now on."""

    def recommend(self, user: int, n: int, now: float) -> Rows:
        """Our slate."""

    def popular(self, user: int, n: int, now: float) -> Rows:
        """The popularity slate for the same person, with the same exclusions."""

    def observe(self, user: int, outcomes: Sequence[Outcome], slate: Rows | None, now: float) -> None:
        """What the person did; `slate` is None when they found the item by themselves."""


class Play:
    """A world played against a recommender in process, as far as `until` is told; `copy.deepcopy` gives a fork.

    Who comes when is drawn for `seconds` at the start; `card` holds every served slate. A recommender that changes
    draws from the same streams as before: one for each person's reactions.
    """

    def __init__(
        self, world: World, people: Recommender, *, slates_per_s: float, seconds: float, seed: int, n: int = 10,
        card: Scorecard | None = None,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng([seed, 1])
        self.world, self.people, self.n = world, people, n
        self.card = card if card is not None else Scorecard([])
        self._hands = [np.random.default_rng([seed, 2, user]) for user in range(world.users)]
        self._told = 0
        self._coming = [
            (visit.time, k, visit, 0)
            for k, visit in enumerate(visits(world, slates_per_s=slates_per_s, seconds=seconds, rng=rng))
        ]
        heapq.heapify(self._coming)

    def until(self, time: float = np.inf) -> None:
        """Play all that happens before `time`."""
        while self._coming and self._coming[0][0] < time:
            now, k, visit, step = heapq.heappop(self._coming)
            self.world.advance(now)
            if self.world.live > self._told:
                self.people.publish(np.arange(self._told, self.world.live), now)
                self._told = self.world.live
            self._one_slate(visit.user, first=step == 0)
            if step < len(visit.pauses):
                heapq.heappush(self._coming, (now + visit.pauses[step], k, visit, step + 1))

    def _one_slate(self, user: int, *, first: bool) -> None:
        world, people, rng = self.world, self.people, self._hands[user]
        if first and world.browses(rng):
            people.observe(user, world.browse(user, rng), None, world.now)
        ours, popular = people.recommend(user, self.n, world.now), people.popular(user, self.n, world.now)
        self.card.add(world, user, ours, popular, self.n)
        people.observe(user, world.react(user, ours, rng), ours, world.now)


def play(
    world: World, people: Recommender, *, slates_per_s: float, seconds: float, seed: int, n: int = 10
) -> Scorecard:
    """Play the world for `seconds` of its own time against a recommender in process; every served slate is scored."""
    played = Play(world, people, slates_per_s=slates_per_s, seconds=seconds, seed=seed, n=n)
    played.until()
    return played.card
