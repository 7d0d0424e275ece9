"""Prequential evaluation of a real log by the very code that runs live: rank each event's item, then learn the event.

For each row: read the profile, `recommend`, find the item's rank over the full catalogue, then fold slate and event
through `streaming.learn`, `Items.fold` and `Learner.learn`. State is in memory; record time = ts; an item is known from
its first event on. Knows nothing about Kafka, Redis or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models import metrics
from models.decay import GRID, NAMES
from models.examples import item_hash
from models.items import Items
from models.learner import Learner
from models.profile import unpack
from models.recommend import History, Request, Slate, blocked_rows, recommend
from models.retrieval import CHANNELS, ranks
from models.rows import Rows
from streaming.events import Click, Interaction, Weights, impression
from streaming.learn import Part, UserFold
from streaming.logs import ReplayError as ReplayError
from streaming.logs import ReplayLog
from streaming.state import MemoryUserStore, UserRead

Exclusion = Literal["seen", "invoice", "none"]
PERIODS: Final = 20
LENGTHS: Final = (0, 1, 2, 5, 10, 20)
"""History lengths at which a new row of the table begins, and one for longer ones."""
NEVER_SEEN: Final = np.nan
F64 = NDArray[np.float64]


@dataclass(slots=True)
class Trail:
    """What a replay noted of each event, as lists of equal length; rank nan where the item was never seen before."""

    ranks: list[float] = field(default_factory=list)
    popularity: list[F64] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    recommend_s: float = 0.0
    learn_s: float = 0.0


class Replay:
    """The whole system in one process, without transports: profiles, items, learner.

    seed: the learner's; exclusion: what a slate leaves out.
    """

    def __init__(self, *, seed: int = 1, exclusion: Exclusion = "none") -> None:
        self.rows = Rows()
        self.items = Items(rows=self.rows)
        self.learner = Learner(rows=self.rows, seed=seed)
        self.exclusion = exclusion
        self.store = MemoryUserStore()
        self.fold = UserFold(Weights())
        self.trail = Trail()
        self._offset = 0
        self._basket: dict[str, list[int]] = {}
        self._basket_name = ""

    def step(self, event: Interaction, basket: str) -> Slate:
        """Rank the event's item, then learn the event; returns the slate that was offered."""
        started = time.perf_counter()
        read = self.store.read_now(0, [event.user_id])
        history = self._history(read)
        request = self._request(event, basket)
        slate = recommend(self.items, self.learner.model, history, request)
        self.trail.recommend_s += time.perf_counter() - started
        self._note(event, history, request, slate)
        started = time.perf_counter()
        self._learn(event, slate, read)
        if basket:
            self._basket.setdefault(basket, []).append(item_hash(event.item_id))
        self.trail.learn_s += time.perf_counter() - started
        return slate

    def _history(self, read: UserRead) -> History:
        if read.profiles[0] is None:
            return History()
        view = unpack(read.profiles[0], read.seen[0])
        return History(view.items, view.times, view.kinds, view.seen)

    def _request(self, event: Interaction, basket: str) -> Request:
        exclude = self._basket.get(basket, ()) if self.exclusion == "invoice" else ()
        return Request(
            slate_id=f"replay-{self._offset}", now=event.ts, policy="greedy", keep_candidates=True,
            seen="exclude" if self.exclusion == "seen" else "include", exclude=np.array(exclude, np.uint64),
        )  # fmt: skip

    def _note(self, event: Interaction, history: History, request: Request, slate: Slate) -> None:
        trail, key = self.trail, np.uint64(item_hash(event.item_id))
        row = int(self.rows.find(np.array([key]))[0])
        trail.lengths.append(len(history.items))
        if row < 0 or self.items.popularity.weights[row, -1] == 0.0:
            trail.ranks.append(NEVER_SEEN)
            trail.popularity.append(np.full(GRID, NEVER_SEEN))
            trail.channels.append(-1)
            return
        found = np.flatnonzero(slate.candidates == key)
        trail.ranks.append(metrics.mid_rank(slate.candidate_scores, int(found[0])) if len(found) else np.inf)
        trail.channels.append(int(slate.candidate_channels[found[0]]) if len(found) else -1)
        blocked = blocked_rows(self.items, history, request)
        frame = self.items.popularity.at(event.ts)
        trail.popularity.append(
            ranks(self.items.arrays(), self.items.n, blocked, row, frame, float(self.items.n))
            if not blocked[row]
            else np.full(GRID, np.inf)
        )

    def _learn(self, event: Interaction, slate: Slate, read: UserRead) -> None:
        request = slate.request
        shown = [self.items.ids[row] for row in slate.rows]
        event.slate_id = request.slate_id
        offered = impression(
            event.user_id, request.slate_id, event.ts, request.surface, shown, slate.impression().to_bytes()
        )
        record_ms = round(event.ts * 1000)
        part = Part(
            0, self._offset, self._offset + 2, [self._offset, self._offset + 1], [record_ms, record_ms],
            [offered, event],
        )  # fmt: skip
        self._offset += 2
        outcome = self.fold.fold([part], {0: read})
        for write in outcome.writes:
            self.store.commit_now(write)
        for entries in outcome.records:
            self.items.fold(entries)
            self.learner.learn(entries)


def run(
    log: ReplayLog,
    *,
    exclusion: Exclusion,
    seed: int = 1,
    progress: Callable[[int, Replay], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Replay a log and return the report; `progress` is told every 100 events."""
    warm()
    replay = Replay(seed=seed, exclusion=exclusion)
    done = 0
    for done, (event, basket) in enumerate(zip(log.events, log.baskets, strict=True), 1):
        replay.step(event, basket)
        if progress is not None and done % 100 == 0:
            progress(done, replay)
        if stop():
            break
    return report(log, replay.trail, replay.learner, done)


def warm() -> None:
    """Compile what a replay calls, so that compiling is not measured."""
    replay = Replay(exclusion="seen")
    for i in range(4):
        replay.step(Click(user_id=f"u{i % 2}", item_id=f"i{i % 3}", ts=1e9 + i), "basket")


def report(log: ReplayLog, trail: Trail, learner: Learner, done: int) -> dict[str, Any]:
    """Return the figures of a replay: overall, beside every popularity, over time, by history length, by channel."""
    rank = np.array(trail.ranks)
    seen = ~np.isnan(rank)
    popularity = np.array(trail.popularity).reshape(-1, GRID)
    names = {user: i for i, user in enumerate(dict.fromkeys(event.user_id for event in log.events[:done]))}
    users = np.array([names[event.user_id] for event in log.events[:done]])
    alone = {name: metrics.summary(popularity[seen, h]) for h, name in enumerate(NAMES)}
    best = max(range(GRID), key=lambda h: alone[NAMES[h]]["ndcg@10"])
    lead = metrics.ndcg(rank[seen]) - metrics.ndcg(popularity[seen, best])
    low, high = metrics.user_bootstrap(lead, users[seen], np.random.default_rng(0), draws=400)
    return {
        "events": done,
        "users": len(names),
        "items": len({event.item_id for event in log.events[:done]}),
        "learn_us_per_event": round(1e6 * trail.learn_s / max(done, 1), 1),
        "recommend_us_per_request": round(1e6 * trail.recommend_s / max(done, 1), 1),
        "metrics": metrics.summary(rank[seen]),
        "baseline": {"popularity": {**alone[NAMES[best]], "half_life": NAMES[best]}, "half_lives": alone},
        "lead": {"ndcg@10": float(lead.mean()) if len(lead) else 0.0, "low": low, "high": high},
        "never_seen_share": float((~seen).mean()),
        "retrieved_share": float(np.isfinite(rank[seen]).mean()) if seen.any() else 0.0,
        "over_time": _over_time(log, rank, popularity[:, best], done),
        "by_history_length": _by_length(rank, popularity[:, best], np.array(trail.lengths)),
        "by_channel": _by_channel(rank, np.array(trail.channels)),
        "bad_rows": {"count": log.bad, "first": log.bad_rows},
        "dropped_rows": log.dropped,
        "weights": {
            "mixture": dict(zip(NAMES, learner.model.mixture.round(4).tolist(), strict=True)),
            "ranker": learner.model.ranker.named(),
        },
    }


def _pair(rank: F64, baseline: F64) -> dict[str, Any]:
    return {
        "events": len(rank), **metrics.summary(rank),
        "popularity": {"ndcg@10": metrics.summary(baseline)["ndcg@10"]},
    }  # fmt: skip


def _over_time(log: ReplayLog, rank: F64, baseline: F64, done: int) -> list[dict[str, Any]]:
    cuts = np.linspace(0, done, min(PERIODS, done) + 1).astype(int)
    out = []
    for first, last in pairwise(cuts.tolist()):
        part = np.arange(first, last)[~np.isnan(rank[first:last])]
        out.append({"until": log.events[last - 1].ts, **_pair(rank[part], baseline[part])})
    return out


def _by_length(rank: F64, baseline: F64, lengths: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
    out = {}
    for first, following in zip(LENGTHS, (*LENGTHS[1:], None), strict=True):
        inside = (lengths >= first) & (lengths < (following or np.inf)) & ~np.isnan(rank)
        last = following - 1 if following else None
        name = f"{first}+" if last is None else str(first) if last == first else f"{first}-{last}"
        out[name] = _pair(rank[inside], baseline[inside])
    return out


def _by_channel(rank: F64, channels: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Share of the seen targets that each channel brought (the one that ranked it highest), and of the hits."""
    seen, hit = ~np.isnan(rank), rank < 10
    return {
        name: {
            "found_share": float((channels[seen] == c).mean()) if seen.any() else 0.0,
            "hit_share": float((channels[hit] == c).mean()) if hit.any() else 0.0,
        }
        for c, name in enumerate(CHANNELS)
    }


def plot(result: dict[str, Any], path: str) -> None:
    """Draw NDCG@10 over the stream, ours beside the best popularity, into a picture file."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReplayError("--plot: needs matplotlib; install freshet[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    periods = [period for period in result["over_time"] if period["events"]]
    events = np.cumsum([period["events"] for period in periods])
    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    axis.plot(events, [period["ndcg@10"] for period in periods], label="Freshet", linewidth=2)
    name = result["baseline"]["popularity"]["half_life"]
    axis.plot(events, [period["popularity"]["ndcg@10"] for period in periods], label=f"popularity, {name}")
    axis.set(xlabel="events", ylabel="NDCG@10", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
