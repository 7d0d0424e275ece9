"""The events of a log as arrays: what every reference ranks and learns, and which events count.

An outcome is a choice (a target) or a push away (hide, skip), by the roles that the replay itself goes by; what only
tells of the event before it is left out. Items are numbered in the order of their first choice, so the catalogue known
before an event is always 0..known. A group is what is ranked from one state: an event, or under the basket protocol a
whole invoice. Knows nothing of any model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaming.events import Rating
from streaming.replay.logs import FOLLOWS, HATED, ReplayError, ReplayLog, roles

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I8 = NDArray[np.int8]
PROTOCOLS: Final = ("line", "basket")
EXCLUDED: Final = ("seen", "invoice", "none")


class Past(NamedTuple):
    """Each event's earlier events of the same owner: order[first[i] : first[i] + before[i]], oldest first.

    order i64[m]: events by owner; first, before i64[n]: before the event's group began.
    """

    order: I64
    first: I64
    before: I64


@dataclass(frozen=True)
class Events:
    """n outcomes in order of time.

    at i64[n]: place in the log; user, item i64[n]; ts f64[n], s; value f64[n]: rating on its own scale, nan for none;
    label i8[n]: 1 chosen, 0 pushed away; start, end i64[n]: the group [start, end) of the event; known i64[n]: items
    known before the group; basket i64[n]; history, blocked: the user's earlier choices; what a slate leaves out.
    """

    at: I64
    user: I64
    item: I64
    ts: F64
    value: F64
    label: I8
    basket: I64
    start: I64
    end: I64
    known: I64
    history: Past
    blocked: Past
    users: int
    items: int
    protocol: str
    exclusion: str
    scale: tuple[float, float]

    def __len__(self) -> int:
        return len(self.at)

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Targets that were known before: bool[n]."""
        counted: NDArray[np.bool_] = (self.label == 1) & (self.item < self.known)
        return counted

    @property
    def has_baskets(self) -> bool:
        """Whether the log says which events belong together."""
        return bool((self.basket >= 0).any())

    def head(self, n: int) -> Events:
        """Return the first n events (whole groups)."""
        n = int(self.start[n]) if n < len(self) else len(self)
        return _arranged(
            self.at[:n], self.user[:n], self.item[:n], self.ts[:n], self.value[:n], self.label[:n], self.basket[:n],
            self.protocol, self.exclusion, self.scale,
        )  # fmt: skip

    def digest(self) -> str:
        """Return a name of these events and how they are judged."""
        told = hashlib.sha256(f"{self.protocol} {self.exclusion} {self.scale}".encode())
        columns = (self.user, self.item, self.ts, self.value, self.label, self.basket, self.start, self.known)
        for array in (*columns, *self.history, *self.blocked):
            told.update(np.ascontiguousarray(array).tobytes())
        return told.hexdigest()[:16]


def read_events(log: ReplayLog, *, protocol: str, exclusion: str) -> Events:
    """Return the outcomes of a log; raises ReplayError where the protocol does not fit it."""
    if protocol not in PROTOCOLS:
        raise ReplayError(f"--protocol: expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
    if exclusion not in EXCLUDED:
        raise ReplayError(f"--exclude: expected {', '.join(EXCLUDED)}, got {exclusion!r}")
    if not any(log.baskets) and (protocol == "basket" or exclusion == "invoice"):
        raise ReplayError("baskets are needed for --protocol basket and --exclude invoice: this log has none")
    each = roles(log.events)
    rows = [i for i, role in enumerate(each) if role != FOLLOWS]
    label = [0 if each[i] == HATED else 1 for i in rows]
    if protocol == "basket":  # a user's lines of a basket are one group where its first is, whatever comes between
        begins: dict[tuple[str, str], int] = {}
        keys = [(log.events[i].user_id, log.baskets[i]) for i in rows]
        grouped = [bool(key[1]) and y == 1 for key, y in zip(keys, label, strict=True)]
        place = [begins.setdefault(key, i) if g else i for i, key, g in zip(rows, keys, grouped, strict=True)]
        order = sorted(range(len(rows)), key=lambda k: (place[k], rows[k]))
        rows, label = [rows[k] for k in order], [label[k] for k in order]
    events = [log.events[i] for i in rows]
    chosen, pushed = (dict.fromkeys(e.item_id for e, y in zip(events, label, strict=True) if y == k) for k in (1, 0))
    items = {name: i for i, name in enumerate({**chosen, **pushed})}
    users = {name: i for i, name in enumerate(dict.fromkeys(event.user_id for event in events))}
    baskets = {name: i for i, name in enumerate(dict.fromkeys(name for name in log.baskets if name))}
    ratings = [event for event in events if isinstance(event, Rating)]
    return _arranged(
        np.array(rows, np.int64), np.array([users[event.user_id] for event in events], np.int64),
        np.array([items[event.item_id] for event in events], np.int64), np.array([event.ts for event in events]),
        np.array([event.value if isinstance(event, Rating) else np.nan for event in events]),
        np.array(label, np.int8), np.array([baskets.get(log.baskets[i], -1) for i in rows], np.int64),
        protocol, exclusion, ratings[0].scale if ratings else (0.0, 1.0),
    )  # fmt: skip


def _arranged(
    at: I64, user: I64, item: I64, ts: F64, value: F64, label: I8, basket: I64,
    protocol: str, exclusion: str, scale: tuple[float, float],
) -> Events:  # fmt: skip
    n = len(at)
    start, end = np.arange(n), np.arange(1, n + 1)
    if protocol == "basket" and n:
        same = (basket[1:] == basket[:-1]) & (user[1:] == user[:-1]) & (basket[1:] >= 0)
        same &= (label[1:] == 1) & (label[:-1] == 1)
        begins = np.concatenate(([0], np.flatnonzero(~same) + 1))
        group = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, n)))
        start, end = begins[group], np.append(begins[1:], n)[group]
    # Items are numbered by first choice: the largest number so far tells how many were met.
    met = np.maximum.accumulate(np.where(label == 1, item + 1, 0)) if n else np.zeros(0, np.int64)
    known = np.concatenate(([0], met))[start]
    owner = {"seen": user, "invoice": basket, "none": np.full(n, -1, np.int64)}[exclusion]
    return Events(
        at, user, item, ts, value, label, basket, start, end, known, _past(user, label == 1, start),
        _past(owner, owner >= 0, start), int(user.max(initial=-1)) + 1, int(item.max(initial=-1)) + 1,
        protocol, exclusion, scale,
    )  # fmt: skip


def _past(owner: I64, member: NDArray[np.bool_], start: I64) -> Past:
    """Return every event's earlier members of its owner; none where the owner is -1."""
    mine = np.flatnonzero(member)
    order = mine[np.argsort(owner[mine], kind="stable")]
    first = np.searchsorted(owner[order], owner)
    # Among the owner's members, those of a lower event number than the group's start.
    place = owner[order] * (len(owner) + 1) + order
    before = np.searchsorted(place, owner * (len(owner) + 1) + start) - first
    return Past(order, first, np.where(owner >= 0, before, 0))


def schedule(events: Events, most: int = 120) -> tuple[I64, str]:
    """Return where models are fitted anew, and how that is called: the finest of hourly, daily and every 1 % of the
    events that comes to at most `most` fits.
    """
    span = float(events.ts[-1] - events.ts[0]) if len(events) else 0.0
    for seconds, name in ((3600.0, "hourly"), (86400.0, "daily")):
        if 24 <= span / seconds <= most:
            ticks = events.ts[0] + seconds * np.arange(1, int(span / seconds) + 1)
            return _cuts(events, np.searchsorted(events.ts, ticks)), name
    return _cuts(events, np.linspace(0, len(events), 101)[1:-1].astype(np.int64)), "every 1 % of the events"


def _cuts(events: Events, places: I64) -> I64:
    """Return the places moved to the begin of their groups, each once, none at 0."""
    inside = places[(places > 0) & (places < len(events))]
    return np.unique(events.start[inside])
