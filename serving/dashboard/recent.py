"""What this process served lately: the newest slates whole, and of every shown slot enough to count by.

Bounded: SLATES slates (about 5 kB each), SLOTS slots of 18 B (4.7 MB), USERS ids. Only tracked slates come here, those
that an app shows. Knows nothing about what is made of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bandit import explored
from models.recommend import Slate
from models.retrieval import CHANNELS

SLATES: Final = 200
EVERY_S: Final = 0.1
"""Of slates that come faster than this only one is kept whole."""
SLOTS: Final = 262_144
USERS: Final = 2000
WINDOW_S: Final = 900.0
_EXPLORED, _FIRST = 1, 2

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


class Kept(NamedTuple):
    """One slate: shown items u64[k] and the m candidates they were drawn from, by hash; `number` counts all served."""

    number: int
    at: float
    slate_id: str
    user: str
    surface: str
    policy: str
    step: int
    degraded: bool
    ms: dict[str, float]
    items: U64
    scores: F32
    channels: U8
    propensities: F32
    explored: U8
    reasons: list[str]
    candidates: U64
    candidate_scores: F32
    candidate_channels: U8


class Slots(NamedTuple):
    """Shown slots of the last `seconds`: item hashes u64[s], channels u8[s], whether explored bool[s]; of how many
    slates."""

    items: U64
    channels: U8
    explored: NDArray[np.bool_]
    slates: int
    seconds: float

    def counts(self, keys: U64) -> I64:
        """Return how many slots each of distinct items u64[k] has, i64[k]; one pass, which lookups wait for."""
        order = np.argsort(keys, kind="stable")
        counts = np.zeros(len(keys), np.int64)
        if len(keys):
            ordered = keys[order]
            at = np.minimum(np.searchsorted(ordered, self.items), len(keys) - 1)
            counts[order] = np.bincount(at[ordered[at] == self.items], minlength=len(keys))
        return counts


class Recent:
    """The slates and slots that this process served last."""

    def __init__(self, *, slots: int = SLOTS) -> None:
        self.kept: deque[Kept] = deque(maxlen=SLATES)
        self.users: OrderedDict[str, None] = OrderedDict()
        self.served = self.slots = 0
        self._items: U64 = np.zeros(slots, np.uint64)
        self._times: F64 = np.full(slots, -np.inf)
        self._channels: U8 = np.zeros(slots, np.uint8)
        self._marks: U8 = np.zeros(slots, np.uint8)
        self._kept_at = -np.inf

    def add(self, slate: Slate, user: str, at: float, ms: dict[str, float], *, degraded: bool) -> None:
        """Take in a slate that was served at a time, s; `ms` of its stages."""
        marks = explored(slate.scores, slate.candidate_scores)
        self.served += 1
        self.users[user] = None
        self.users.move_to_end(user)
        if len(self.users) > USERS:
            self.users.popitem(last=False)
        if not 0.0 <= at - self._kept_at < EVERY_S:
            self._kept_at = at
            request = slate.request
            self.kept.append(Kept(
                self.served, at, request.slate_id, user, request.surface, request.policy, slate.step, degraded, ms,
                slate.items, slate.scores, slate.channels, slate.propensities, marks, slate.reasons, slate.candidates,
                slate.candidate_scores, slate.candidate_channels,
            ))  # fmt: skip
        marks = marks.copy()
        marks[:1] |= _FIRST
        size, k = len(self._items), len(marks)
        first = self.slots % size
        self.slots += k
        for begin, end, to in ((0, min(k, size - first), first), (size - first, k, 0)):
            if end > begin:
                place = slice(to, to + end - begin)
                self._items[place], self._times[place] = slate.items[begin:end], at
                self._channels[place], self._marks[place] = slate.channels[begin:end], marks[begin:end]

    def window(self, now: float) -> Slots:
        """Return the slots of the last 15 minutes, or of as long as there is room for; a copy."""
        inside = np.flatnonzero(self._times > now - WINDOW_S)
        marks = self._marks[inside]
        seconds = max(0.0, now - float(self._times[inside].min())) if len(inside) else 0.0
        return Slots(
            self._items[inside], self._channels[inside], (marks & _EXPLORED) > 0, int((marks & _FIRST > 0).sum()),
            seconds,
        )  # fmt: skip


def channel_shares(window: Slots, mine: Any) -> list[dict[str, Any]]:
    """Return the slots of a window that are `mine` bool[s] by channel, most first, and their shares of them."""
    counts = np.bincount(window.channels[mine], minlength=len(CHANNELS))
    total = max(int(counts.sum()), 1)
    order = np.argsort(-counts, kind="stable")
    return [
        {"channel": CHANNELS[at], "slots": int(counts[at]), "share": round(int(counts[at]) / total, 5)}
        for at in order.tolist()
        if counts[at]
    ]
