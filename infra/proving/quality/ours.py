"""Freshet itself on the bench, by the code of the replay; and with its reading or its learning held back.

A delay is stream time. Of the user state: a slate is made from the profile as it was that long ago, while everything is
learnt at once. Of learning: items and weights learn an entry that long after its event, while profiles are fresh.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from infra.proving.quality.events import Events
from infra.proving.quality.reference import Result, Tell
from models.examples import Entries
from models.recommend import History, Slate
from streaming.events import Interaction
from streaming.replay.logs import ReplayLog
from streaming.replay.prequential import Exclusion, Protocol, Replay, run
from streaming.state import UserRead

CODE: Final = (
    "models", "streaming/learn.py", "streaming/events.py", "streaming/state.py", "streaming/replay",
)  # fmt: skip
DELAYS: Final = {"0": 0.0, "1s": 1.0, "1min": 60.0, "1h": 3600.0, "6h": 21600.0, "1d": 86400.0}


class Delayed(Replay):
    """A replay whose slates read profiles of `reading` s ago and whose items and weights learn `learning` s late."""

    def __init__(self, *, reading: float = 0.0, learning: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self._reading, self._learning = reading, learning
        self._now, self._user = 0.0, ""
        self._newest: dict[str, float] = {}
        self._histories: dict[str, deque[tuple[float, History]]] = {}
        self._ids: list[str] = []
        self._queue: deque[tuple[float, Entries, list[str]]] = deque()

    def offer(self, events: Sequence[Interaction], *rest: Any, **more: Any) -> Slate:
        """Learn what is due, then as ever."""
        self._at(events)
        return super().offer(events, *rest, **more)

    def follow(self, event: Interaction, *rest: Any, **more: Any) -> None:
        """Learn what is due, then as ever."""
        self._at([event])
        super().follow(event, *rest, **more)

    def _at(self, events: Sequence[Interaction]) -> None:
        self._now, self._user = events[0].ts, events[0].user_id
        self._ids = [event.item_id for event in events]
        while self._queue and self._queue[0][0] <= self._now - self._learning:
            _, entries, ids = self._queue.popleft()
            super().learn_entries(entries)
            for item_id in ids:
                self._describe(item_id)

    def learn_entries(self, entries: Entries) -> None:
        """Queue what items and weights would learn now."""
        self._newest[self._user] = self._now
        if self._learning > 0.0:
            self._queue.append((self._now, entries, self._ids))
        else:
            super().learn_entries(entries)

    def _history(self, read: UserRead) -> History:
        """Return what was known of the user `reading` s ago."""
        fresh = super()._history(read)
        if self._reading <= 0.0:
            return fresh
        held = self._histories.setdefault(self._user, deque([(-np.inf, History())]))
        since = self._newest.get(self._user, -np.inf)
        if since > held[-1][0]:
            held.append((since, fresh))
        else:
            held[-1] = (since, fresh)  # of events of one time only the state after the last counts
        while len(held) > 1 and held[1][0] <= self._now - self._reading:
            held.popleft()
        return held[0][1]


def run_ours(
    log: ReplayLog, events: Events, *, seed: int, tell: Tell, reading: float = 0.0, learning: float = 0.0
) -> Result:
    """Replay the events of a log and return what was noted of them; told: the replay's own report."""
    until = int(events.at.max(initial=-1)) + 1
    part = replace(log, events=log.events[:until], baskets=log.baskets[:until])
    made: list[Replay] = []

    def make(**options: Any) -> Replay:
        made.append(
            Delayed(reading=reading, learning=learning, **options) if reading or learning else Replay(**options)
        )
        return made[0]

    report = run(
        part, exclusion=cast(Exclusion, events.exclusion), protocol=cast(Protocol, events.protocol), seed=seed,
        make=make, progress=lambda done, _: tell(done),
    )  # fmt: skip
    trail = made[0].trail
    ranks, scores = np.full(until, np.nan), np.full(until, np.nan)
    ranks[trail.events] = trail.ranks
    if trail.judged:
        places, values = zip(*trail.judged, strict=True)
        scores[list(places)] = values
    told = {name: value for name, value in report.items() if name not in ("over_time", "lead", "bad_rows")}
    result = Result(ranks[events.at], scores[events.at], told, _rated(events, made[0], until))
    unknown = int((np.isnan(result.ranks) & events.counted).sum())
    told["unknown_to_ours"] = unknown  # counted as misses: the event set is that of what was chosen before
    return result


def _rated(events: Events, replay: Replay, until: int) -> NDArray[np.float64] | None:
    """Return predictions f64[n] of ratings that err as ours did (the replay notes squared errors), None for none."""
    if not replay.trail.rated or any(count != 1 for _, count, _ in replay.trail.rated):
        return None
    error = np.full(until, np.nan)
    for place, _, squared in replay.trail.rated:
        error[place] = 0.5 * (events.scale[1] - events.scale[0]) * squared**0.5
    predictions: NDArray[np.float64] = events.value + error[events.at]
    return predictions
