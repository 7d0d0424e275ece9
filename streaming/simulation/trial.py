"""Freshet in one process as a simulated world's recommender: the code that runs live, under one policy.

Profiles, items and learner are those of `streaming.replay`: every slate is logged as an impression, every outcome is
folded and learnt before the next slate. Knows nothing of Kafka, Redis or HTTP.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.bandit import Policy, RewardTable
from models.examples import Entries
from models.learner import Learner
from models.ranker import Ranker, heads
from models.recommend import Request, Slate, drawn_scores, exploring, popular, recommend, samples
from streaming.events import (
    Action,
    Click,
    Dwell,
    Event,
    Item,
    Rating,
    View,
    Weights,
    catalogue_item,
    impression,
    item_key,
)
from streaming.learn import UserFold
from streaming.replay.prequential import Replay
from streaming.simulation.people import catalogue_entry, event_of, row_of, user_id
from streaming.simulation.world import Outcome, Rows, World

TYPES: Final = {"click": Click, "dwell": Dwell, "rating": Rating, "action": Action, "view": View}
FEATURE_SHARE: Final = 0.1
"""Share of slates logged with all candidates' features: the default of the setting."""
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


class Trial(Replay):
    """A `scorecard.Recommender`: what `world` publishes and its people do, answered by `policy`, which may be changed.

    seed: the learner's; epsilon, first: shares of slots as in `Request`; rewards: rows of (surface, kind, weight).
    `seconds` holds how long each slate took to make.
    """

    def __init__(
        self, world: World, *, policy: Policy, seed: int = 1, epsilon: float = 0.1, first: float = 0.05,
        rewards: RewardTable = (),
    ) -> None:  # fmt: skip
        super().__init__(seed=seed)
        self.learner = Learner(rows=self.rows, seed=seed, rewards=rewards)
        self.world, self.policy, self.epsilon, self.first = world, policy, epsilon, first
        self.seconds: list[float] = []
        self._slates = self._events = 0
        self._offered: Slate | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Trial:
        """Return a fork that goes on from the same state.

        The ranker's arrays are views of one buffer, and the fold keeps addresses: both are made anew from their state.
        """
        other = object.__new__(type(self))
        memo[id(self)] = other
        for name, value in vars(self).items():
            if name != "fold":
                setattr(other, name, copy.deepcopy(value, memo))
        other.fold = UserFold(Weights())
        other.learner.model.ranker = Ranker()
        other.learner.model.ranker.set_state(Ranker().read_state(self.learner.model.ranker.state()))
        return other

    def publish(self, rows: Rows, now: float) -> None:
        """Set the catalogue entries of these items of the world."""
        for row in rows.tolist():
            item = msgspec.convert(catalogue_entry(self.world, row), Item)
            self.items.set_item(item_key(item), item.item_id, catalogue_item(item))

    def recommend(self, user: int, n: int, now: float) -> Rows:
        """Return the world's items of a slate drawn by the policy; nobody is shown again what they clicked."""
        self._slates += 1
        history = self._history(self.store.read_now(0, [user_id(user)]))
        began = time.perf_counter()
        self._offered = slate = recommend(self.items, self.learner.model, history, self.request(n, now))
        self.seconds.append(time.perf_counter() - began)
        return self._world_rows(slate.rows.tolist())

    def request(self, n: int, now: float) -> Request:
        """Return what is asked at `now`, under the name of the latest slate; candidates are kept as often as live."""
        name = f"trial-{self._slates}"
        return Request(
            slate_id=name, now=now, n=n, policy=self.policy, epsilon=self.epsilon, first=self.first,
            keep_candidates=samples(name, FEATURE_SHARE),
        )  # fmt: skip

    def popular(self, user: int, n: int, now: float) -> Rows:
        """Return the most popular items that the user has not clicked."""
        read = self.store.read_now(0, [user_id(user)])
        clicked = self._history(read).items
        return self._world_rows([row for row, _ in popular(self.items, self.learner.model, n, clicked, now)])

    def observe(self, user: int, outcomes: Sequence[Outcome], slate: Rows | None, now: float) -> None:
        """Learn what was shown and what came of it."""
        offered = self._offered if slate is not None else None
        events: list[Event] = []
        if offered is not None:
            shown = [self.items.ids[row] for row in offered.rows]
            told = offered.impression().to_bytes()
            events.append(impression(user_id(user), offered.request.slate_id, now, "home", shown, told))
        for outcome in outcomes:
            self._events += 1
            name = offered.request.slate_id if offered is not None else None
            said = event_of(user, outcome, slate_id=name, ts=now, event_id=f"trial-{self._events}")
            events.append(msgspec.convert(said, TYPES[said.pop("type")]))
        if events:
            self._fold(events, self.store.read_now(0, [user_id(user)]))

    def learn_entries(self, entries: Entries) -> None:
        """Let items and learner learn; a step a micro-batch, as live, so that particles are drawn anew."""
        self.items.fold(entries)
        self.learner.learn(entries)
        self.learner.model.step += 1

    def drawn_from(self, user: int, now: float, policy: Policy, most: int) -> tuple[F64, U8]:
        """Return what `policy` draws a slate of this user from: scores f64[m, S] and exploring u8[m], m <= most.

        From the first `most` candidates as they are now, by the ranker without the other heads.
        """
        self.policy = policy
        history = self._history(self.store.read_now(0, [user_id(user)]))
        request = self.request(10, now)
        request.keep_candidates = True
        slate = recommend(self.items, self.learner.model, history, request)
        rows, x = self.rows.find(slate.candidates[:most]), slate.features[:most].astype(np.float64)
        said = np.zeros((len(rows), len(heads.HEADS)))
        said[:, heads.CLICK] = self.learner.model.ranker.score(x)
        scores = drawn_scores(self.items, self.learner.model, slate.request, rows, x, said)
        return scores, exploring(self.items, rows)

    def lookup_seconds(self, users: Sequence[int], now: float, policies: Sequence[Policy], *, fresh: bool) -> F64:
        """Return seconds f64[users, policies] of one lookup each, policies by turns on one unchanged state.

        fresh: each is the first lookup since weights came, which solves and draws the last layer anew.
        """
        out = np.empty((len(users), len(policies)))
        layer = self.learner.model.last_layer
        for i, user in enumerate(users):
            history = self._history(self.store.read_now(0, [user_id(user)]))
            for k, self.policy in enumerate(policies):
                if fresh:
                    layer.set_state(layer.read_state(layer.state()))
                    self.learner.model.step += 1
                began = time.perf_counter()
                recommend(self.items, self.learner.model, history, self.request(10, now))
                out[i, k] = time.perf_counter() - began
        return out

    def _world_rows(self, rows: list[int]) -> Rows:
        found = (row_of(self.items.ids[row]) for row in rows)
        return np.array([row for row in found if row is not None], np.int64)
