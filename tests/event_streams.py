"""Streams of events for the tests: one user's or many, with repeats, slates and late arrivals, all from a seed."""

from __future__ import annotations

import numpy as np

from models.examples import Shown, item_hash
from streaming.events import Action, Click, Dwell, Event, Rating, View, encode, impression

T0 = 1_750_000_000.0


def shown_payload(slate_id: str, items: list[str], candidates: int = 0) -> bytes:
    """Return the payload of a slate that showed these items."""
    k = len(items)
    return Shown(
        slate=item_hash(slate_id), step=1, items=np.array([item_hash(i) for i in items], np.uint64),
        propensities=np.full(k, 0.5, np.float32), channels=np.zeros(k, np.uint8),
        candidates=np.arange(1, candidates + 1, dtype=np.uint64),
        features=np.ones((candidates, 3 if candidates else 0), np.float16), surface="home", policy="epsilon",
    ).to_bytes()  # fmt: skip


def one_event(rng: np.random.Generator, i: int, users: int, items: int) -> Event:
    """Return event number i: mostly clicks; some repeat an earlier id, some arrive late, some are impressions."""
    user, item = f"user-{rng.integers(users)}", f"item-{rng.integers(items)}"
    ts = T0 + i * 7.0 - (rng.random() < 0.05) * float(rng.integers(10_000))
    event_id = f"e{i if rng.random() > 0.1 else rng.integers(i + 1)}"
    slate = f"slate-{rng.integers(40)}" if rng.random() < 0.2 else None
    kind = rng.random()
    if kind < 0.5:
        return Click(user_id=user, item_id=item, ts=ts, event_id=event_id, slate_id=slate)
    if kind < 0.6:
        return Dwell(user_id=user, item_id=item, ts=ts, event_id=event_id, seconds=float(rng.integers(60)))
    if kind < 0.7:
        return Rating(user_id=user, item_id=item, ts=ts, value=float(rng.integers(1, 6)), context={"device": "phone"})
    if kind < 0.8:
        return Action(user_id=user, item_id=item, ts=ts, event_id=event_id, name=("like", "skip", "other")[i % 3])
    if kind < 0.9:
        return View(user_id=user, item_id=item, ts=ts, event_id=event_id, slate_id=slate)
    items_shown = [f"item-{j}" for j in rng.permutation(items)[:5]]
    return impression(user, f"slate-{i % 40}", ts, "home", items_shown, shown_payload(f"slate-{i % 40}", items_shown))


def records(seed: int, n: int, *, users: int = 5, items: int = 12) -> list[tuple[int, int, bytes]]:
    """Return n records (offset, record time in ms, value) of one partition."""
    rng = np.random.default_rng(seed)
    return [(i, round((T0 + i * 7.0 + 0.25) * 1000), encode(one_event(rng, i, users, items))) for i in range(n)]
