"""Prequential evaluation of a real log by the very code that runs live: rank each event's item, then learn the event.

For each row: read the profile, `recommend`, find the item's rank over the full catalogue, then fold slate and event
through `streaming.learn`, `Items.fold` and `Learner.learn`. State is in memory; record time = ts; an item is known from
its first event on, and so is its catalogue entry: it is set when that event is folded, by the call that is made live.
A catalogue known beforehand would let a slate hold items that nobody chose yet. Knows nothing of Kafka, Redis or HTTP.

Protocol `line` takes every row for itself; `basket` asks what a basket will hold before it begins: one slate at its
first row's time, in which every row of it is ranked and nothing of it is left out, then all rows are learnt, in order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from infra.settings import EVENT_WEIGHTS, Weight
from models import metrics
from models.decay import GRID
from models.examples import Entries, item_hash
from models.items import Items, context_keys
from models.learner import Learner
from models.profile import unpack
from models.ranker.heads import head_weights
from models.recommend import NONE, History, Request, Slate, blocked_rows, recommend, samples, score_items
from models.retrieval import CHANNELS, NOT_FOUND, ranks
from models.rows import Rows
from streaming.events import Click, Event, Interaction, Weights, catalogue_item, impression, item_key
from streaming.learn import Part, UserFold
from streaming.replay.catalogue import Catalogue
from streaming.replay.logs import HATED, TARGET, ReplayError, ReplayLog, roles
from streaming.replay.report import report
from streaming.state import MemoryUserStore, UserRead

Exclusion = Literal["seen", "invoice", "none"]
Protocol = Literal["line", "basket"]
NEVER_SEEN: Final = np.nan
NOWHERE: Final = np.full(len(CHANNELS), NOT_FOUND)
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The settings that a replay sees, as in infra/settings.py; by default all candidates of each slate are logged."""

    event_weights: tuple[Weight, ...] = EVENT_WEIGHTS
    head_weights: tuple[tuple[str, float], ...] = ()
    rewards: tuple[tuple[str, str, float], ...] = ()
    feature_share: float = 1.0
    first_share: float = 0.0


DEFAULTS: Final = Chosen()


@dataclass(slots=True)
class Trail:
    """What a replay noted of each target, as lists of equal length; rank nan where the item was never seen before.

    events: their places in the log; lengths: entries of the user's sequence before; earlier: the item's targets before.
    judged: (place in the log, score) of every target and every hated item, where the log has hated ones.
    rated: (place in the log, ratings, sum of their squared errors in values from -1 to 1), each before it was learnt.
    """

    events: list[int] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)

    ranks: list[float] = field(default_factory=list)
    popularity: list[F64] = field(default_factory=list)
    places: list[NDArray[np.uint16]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    earlier: list[int] = field(default_factory=list)
    rated: list[tuple[int, int, float]] = field(default_factory=list)
    slates: int = 0
    recommend_s: float = 0.0
    learn_s: float = 0.0
    calibrated: list[tuple[F64, F64]] = field(default_factory=list)
    """Of slates that the calibration learnt: probabilities before, and what was chosen."""


class Replay:
    """The whole system in one process, without transports: profiles, items, learner.

    seed: the learner's; exclusion: what a slate leaves out; judging: also score each event's item by itself; catalogue:
    what is said of the items; chosen: settings other than the defaults.
    """

    def __init__(
        self, *, seed: int = 1, exclusion: Exclusion = "none", judging: bool = False,
        catalogue: Catalogue | None = None, chosen: Chosen = DEFAULTS,
    ) -> None:  # fmt: skip
        self.undescribed = dict((catalogue or Catalogue()).items)
        """Catalogue entries of items that no event was folded of yet."""
        self.rows = Rows()
        self.items = Items(rows=self.rows)
        self.learner = Learner(rows=self.rows, seed=seed, rewards=chosen.rewards)
        self.exclusion, self.judging = exclusion, judging
        self.store = MemoryUserStore()
        self.fold = UserFold(Weights(chosen.event_weights))
        self.chosen, self._weights = chosen, head_weights(chosen.head_weights)
        self.trail = Trail()
        self._offset = 0
        self._basket: dict[str, list[int]] = {}
        self._events_of: Counter[str] = Counter()

    def step(self, event: Interaction, basket: str, place: int = 0) -> Slate:
        """Rank the item of the log's event at `place`, then learn the event; returns the slate that was offered."""
        exclude = self._basket.setdefault(basket, []) if self.exclusion == "invoice" and basket else []
        slate = self.offer([event], [place], np.array(exclude, np.uint64))
        exclude.append(item_hash(event.item_id))
        return slate

    def offer(self, events: Sequence[Interaction], places: Sequence[int], exclude: NDArray[np.uint64] = NONE) -> Slate:
        """Make one slate at the first event's time, rank each event's item in it, then learn the events in order.

        The events are one user's, at `places` of the log; `exclude` u64[e] are items that the slate leaves out.
        """
        started = time.perf_counter()
        read = self.store.read_now(0, [events[0].user_id])
        history = self._history(read)
        request = self._request(events[0], exclude)
        slate = recommend(self.items, self.learner.model, history, request)
        self.trail.recommend_s += time.perf_counter() - started
        self.trail.slates += 1
        self.trail.events += places
        for event, place in zip(events, places, strict=True):
            self._note(event, history, request, slate)
            if self.judging:
                self._judge(event, place, history, request)
        started = time.perf_counter()
        self._learn(events, slate, read)
        self.trail.learn_s += time.perf_counter() - started
        return slate

    def follow(self, event: Interaction, place: int, *, hated: bool) -> None:
        """Learn an event that is no target; one that was hated is scored before."""
        read = self.store.read_now(0, [event.user_id])
        if hated:
            self._judge(event, place, self._history(read), self._request(event, NONE))
        started = time.perf_counter()
        self._fold([event], read)
        self._describe(event.item_id)
        self.trail.learn_s += time.perf_counter() - started

    def _judge(self, event: Interaction, place: int, history: History, request: Request) -> None:
        key = np.array([item_hash(event.item_id)], np.uint64)
        score = score_items(self.items, self.learner.model, history, request, key)
        self.trail.judged.append((place, float(score[0])))

    def _history(self, read: UserRead) -> History:
        if read.profiles[0] is None:
            return History()
        view = unpack(read.profiles[0], read.seen[0])
        return History.of(view)

    def _request(self, event: Interaction, exclude: NDArray[np.uint64]) -> Request:
        slate_id = f"replay-{self._offset}"
        return Request(
            slate_id=slate_id, now=event.ts, policy="greedy",
            keep_candidates=samples(slate_id, self.chosen.feature_share),
            seen="exclude" if self.exclusion == "seen" else "include", exclude=exclude,
            context=context_keys(event.context or {}), first=self.chosen.first_share, weights=self._weights,
        )  # fmt: skip

    def _note(self, event: Interaction, history: History, request: Request, slate: Slate) -> None:
        trail, key = self.trail, np.uint64(item_hash(event.item_id))
        row = int(self.rows.find(np.array([key]))[0])
        trail.lengths.append(len(history.items))
        trail.earlier.append(self._events_of[event.item_id])
        self._events_of[event.item_id] += 1
        if row < 0 or self.items.popularity.weights[row, -1] == 0.0:
            trail.ranks.append(NEVER_SEEN)
            trail.popularity.append(np.full(GRID, NEVER_SEEN))
            trail.places.append(NOWHERE)
            return
        found = np.flatnonzero(slate.candidates == key)
        trail.ranks.append(metrics.mid_rank(slate.candidate_scores, int(found[0])) if len(found) else np.inf)
        trail.places.append(slate.places[found[0]].copy() if len(found) else NOWHERE)  # a view would keep all of them
        blocked = blocked_rows(self.items, history, request)
        frame = self.items.popularity.at(request.now)
        trail.popularity.append(
            ranks(self.items.arrays(), self.items.n, blocked, row, frame, float(self.items.n))
            if not blocked[row]
            else np.full(GRID, np.inf)
        )

    def _learn(self, events: Sequence[Interaction], slate: Slate, read: UserRead) -> None:
        request, first = slate.request, events[0]
        shown = [self.items.ids[row] for row in slate.rows]
        offered = impression(
            first.user_id, request.slate_id, first.ts, request.surface, shown, slate.impression().to_bytes()
        )
        for event in events:
            event.slate_id = request.slate_id
        self._fold([offered, *events], read)
        for event in events:
            self._describe(event.item_id)

    def _fold(self, events: list[Event], read: UserRead) -> None:
        first, following = self._offset, self._offset + len(events)
        times = [round(event.ts * 1000) for event in events]
        part = Part(0, first, following, list(range(first, following)), times, events)
        self._offset = following
        outcome = self.fold.fold([part], {0: read})
        for write in outcome.writes:
            self.store.commit_now(write)
        for entries in outcome.records:
            self.learn_entries(entries)

    def learn_entries(self, entries: Entries) -> None:
        """Let items and learner learn; what measures a late learner holds entries back here."""
        self.items.fold(entries)
        learned = self.learner.learn(entries)
        if learned.rated:
            self.trail.rated.append((self.trail.events[-1], learned.rated, learned.rating_error))
        self.trail.calibrated += learned.calibrated

    def _describe(self, item_id: str) -> None:
        """Set the catalogue entry of an item whose first event was folded."""
        item = self.undescribed.get(item_id)
        if item is None:
            return
        key = item_key(item)
        if self.rows.find(np.array([key], np.uint64))[0] >= 0:
            self.items.set_item(key, item_id, catalogue_item(item))
            del self.undescribed[item_id]


def run(
    log: ReplayLog,
    *,
    exclusion: Exclusion,
    protocol: Protocol = "line",
    seed: int = 1,
    progress: Callable[[int, Replay], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    make: Callable[..., Replay] = Replay,
) -> dict[str, Any]:
    """Replay a log and return the report; `progress` is told every 100 events, `make` makes the replay."""
    warm()
    each = roles(log.events)
    replay = make(seed=seed, exclusion=exclusion, judging=HATED in each, catalogue=log.catalogue)
    done = 0
    for rows in _groups(log, each, protocol):
        first = rows[0]
        if each[first] != TARGET:
            replay.follow(log.events[first], first, hated=each[first] == HATED)
        elif protocol == "basket":
            replay.offer([log.events[i] for i in rows], rows)
        else:
            replay.step(log.events[first], log.baskets[first], first)
        told, done = done, done + len(rows)
        if progress is not None and done // 100 > told // 100:
            progress(done, replay)
        if stop():
            break
    return report(log, replay.trail, replay.learner, done)


def _groups(log: ReplayLog, each: Sequence[int], protocol: Protocol) -> Iterator[list[int]]:
    """Yield the rows that are taken together, where the first is: one, or all targets of a user's basket."""
    if protocol == "basket" and not any(log.baskets):
        raise ReplayError("--protocol basket: expected rows with a basket, got none (csv: --columns basket=NAME)")
    groups: dict[tuple[str, str] | int, list[int]] = {}
    for i, (event, basket, role) in enumerate(zip(log.events, log.baskets, each, strict=True)):
        together = protocol == "basket" and basket and role == TARGET
        groups.setdefault((event.user_id, basket) if together else i, []).append(i)
    yield from groups.values()


def warm() -> None:
    """Compile what a replay calls, so that compiling is not measured."""
    replay = Replay(exclusion="seen")
    for i in range(4):
        replay.step(Click(user_id=f"u{i % 2}", item_id=f"i{i % 3}", ts=1e9 + i), "basket")
