"""How soon a surge of a topic shows in what is served: shares of the slots by topic, and a test that stays honest.

Knows nothing of how slates are made, of HTTP or of clocks; time comes with each slate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaming.simulation import titles
from streaming.simulation.world import Rows

BASE_S: Final = 60.0
"""The share before a surge is that of the slates served this long before it."""
FEWEST: Final = 30
"""Slates that each side of the comparison needs."""
LATEST: Final = 100
"""Slates over which the share of now is told."""
SURE: Final = 4.0
"""Standard errors that the share must be above its base. So many, because it is looked at after each slate: 120 plays
of five minutes without a surge (3, 25 and 60 slates a second, tastes that stand still) had no false alarm."""
MARGIN: Final = 0.01
"""And at least this much above it, as a share of all slots."""
KEEP: Final = 8000

TOPICS: Final = len(titles.TOPICS)
Floats = NDArray[np.float64]


class Served(NamedTuple):
    """One slate: when, to whom, and which share of its slots each topic has, ours and in the best slate there is."""

    time: float
    user: int
    ours: Floats
    best: Floats


@dataclass(slots=True)
class Share:
    """Mean share of a topic over slates, with its standard error, slates of a person taken together; O(1) a slate."""

    slates: int = 0
    total: float = 0.0
    squares: float = 0.0  # sum over people of (their sum)^2,
    crossed: float = 0.0  # of their sum times their number of slates,
    numbers: float = 0.0  # of that number^2
    people: dict[int, tuple[float, int]] = field(default_factory=dict)

    def add(self, user: int, share: float) -> None:
        """Count a slate in."""
        one, n = self.people.get(user, (0.0, 0))
        self.people[user] = (one + share, n + 1)
        self.slates += 1
        self.total += share
        self.squares += (one + share) ** 2 - one**2
        self.crossed += (one + share) * (n + 1) - one * n
        self.numbers += 2 * n + 1

    @property
    def mean(self) -> float:
        """Share of all slots; NaN without a slate."""
        return self.total / self.slates if self.slates else np.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for fewer than two people."""
        people = len(self.people)
        if people < 2:
            return np.inf
        off = max(0.0, self.squares - 2 * self.mean * self.crossed + self.mean**2 * self.numbers)
        return float(np.sqrt(off * people / (people - 1))) / self.slates


class Watched(NamedTuple):
    """A surge as far as it shows: share of slots before it, and s from its beginning until it was noticed."""

    topic: int
    began: float
    base: float  # NaN where too few slates were served before it
    noticed: float | None


class Trend:
    """The slates of the last minutes by topic, and the surge that is watched.

    A surge is noticed at the first slate for which, over all slates served since it began (FEWEST at least), its
    share of the slots is above that of the BASE_S before it by SURE standard errors of the difference and by MARGIN.
    Slates of one person are alike, so the errors are those of sums over people. Where the share rises for another
    reason (the first minute of learning), that counts as noticed too.
    """

    def __init__(self) -> None:
        self._slates: deque[Served] = deque(maxlen=KEEP)
        self._before, self._since = Share(), Share()
        self.watched: Watched | None = None

    def begin(self, topic: int, now: float) -> None:
        """Watch a surge that begins now; an earlier one is watched no longer."""
        self._before, self._since = Share(), Share()
        for slate in self._slates:
            if slate.time >= now - BASE_S:
                self._before.add(slate.user, float(slate.ours[topic]))
        self.watched = Watched(topic, now, self._before.mean if self._before.slates >= FEWEST else np.nan, None)

    def end(self) -> None:
        """Watch nothing."""
        self.watched = None

    def add(self, now: float, user: int, ours: Sequence[int] | Rows, best: Sequence[int] | Rows) -> None:
        """Take in a served slate and the best one for the same person: the topic of each slot."""
        slate = Served(now, user, _shares(ours), _shares(best))
        self._slates.append(slate)
        watched = self.watched
        if watched is None or watched.noticed is not None or np.isnan(watched.base):
            return
        self._since.add(user, float(slate.ours[watched.topic]))
        error = float(np.hypot(self._since.error, self._before.error))
        if self._since.slates >= FEWEST and self._since.mean - watched.base > max(MARGIN, SURE * error):
            self.watched = watched._replace(noticed=now - watched.began)

    def shares(self) -> tuple[Floats, Floats]:
        """Return each topic's share of the slots of the LATEST slates, ours and the best; NaN where there is none."""
        latest = list(islice(reversed(self._slates), LATEST))
        if not latest:
            return np.full(TOPICS, np.nan), np.full(TOPICS, np.nan)
        return np.mean([slate.ours for slate in latest], axis=0), np.mean([slate.best for slate in latest], axis=0)


def _shares(topics: Sequence[int] | Rows) -> Floats:
    return np.bincount(np.asarray(topics, np.int64), minlength=TOPICS) / max(1, len(topics))
