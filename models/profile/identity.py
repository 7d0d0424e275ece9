"""The fold of events about who somebody is: erasure, alias, merge, between the others of a micro-batch, in order.

Erase ends a profile at its offset. Alias ends an anonymous profile and says what it held (`Moved`); Merge, which is
derived from that, joins it to the user's. Knows nothing about Kafka, Redis or event structs; packed.py has the
layout, folding.py folds everything else.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.profile.folding import COUNTERS, DUPLICATE, ERASED, QUIET, remember_event
from models.profile.packed import AWAY, SEEN, SEQUENCE, EventColumns, Folded, Moved, Profiles

ERASE, ALIAS, MERGE = 8, 9, 10
"""Kinds within a micro-batch, after those of models/examples.py, where they never come."""
_DUPLICATES: Final = COUNTERS.index("duplicate")


def fold(profiles: Profiles, batch: EventColumns) -> Folded:
    """Fold a micro-batch in order and return what each event derives; the profiles change in place."""
    n = len(batch.kind)
    out, at = Folded.of(n), 0
    for i in np.flatnonzero(batch.kind >= ERASE).tolist():
        profiles.fold(batch, out, at, i)
        _fold_one(profiles, batch, out, i)
        at = i + 1
    profiles.fold(batch, out, at, n)
    return out


def _fold_one(profiles: Profiles, batch: EventColumns, out: Folded, i: int) -> None:
    u, t, kind = int(batch.user[i]), float(batch.time[i]), int(batch.kind[i])
    # An erasure holds whatever its time: a clock that was set back must not undo it.
    if kind != ERASE and profiles.ended[u, 0] > 0.0 and t <= profiles.ended[u, 0]:
        out.status[i] = ERASED
        return
    profiles.changed_by[u] = i
    if kind != ERASE and batch.event[i]:
        found = int(
            remember_event(u, batch.event[i], batch.record_s[i], profiles.d, profiles.event, profiles.event_time)
        )
        if found == 1:
            profiles.counters[u, _DUPLICATES] += 1
            out.status[i] = DUPLICATE
            return
        out.overflow += found == 2
    out.status[i] = QUIET
    if kind == MERGE:
        _join(profiles, u, batch.moved[i])
        return
    if kind == ALIAS and profiles.exists[u]:
        out.moved[i] = _taken(profiles, u)
    _end(profiles, u, t)


def _end(profiles: Profiles, u: int, t: float) -> None:
    profiles.exists[u] = False
    profiles.counters[u], profiles.times[u] = 0, 0.0
    profiles.n[u] = profiles.s[u] = profiles.seen_n[u] = profiles.averse_n[u] = 0
    profiles.tally[u] = 0.0
    profiles.ended[u, 0] = max(profiles.ended[u, 0], t, np.finfo(np.float64).tiny)  # 0 would say that nothing ended it
    profiles.seen_changed[u] = True


def _taken(profiles: Profiles, u: int) -> Moved:
    # Below version 3 these are not stored: what a micro-batch holds of them depends on where it was cut.
    n, a = profiles.n[u], profiles.averse_n[u] if profiles.codec >= 3 else 0
    return Moved(
        items=profiles.item[u, :n].copy(), times=profiles.time[u, :n].copy(), weights=profiles.weight[u, :n].copy(),
        kinds=profiles.kind[u, :n].copy(), seen=profiles.seen[u, : profiles.seen_n[u]].copy(),
        counters=profiles.counters[u].copy(), first_time=float(profiles.times[u, 0]),
        last_time=float(profiles.times[u, 1]), averse=profiles.averse[u, :a].copy(),
        averse_times=profiles.averse_time[u, :a].copy(),
        tally=profiles.tally[u].copy() if profiles.codec >= 3 else np.zeros_like(profiles.tally[u]),
    )  # fmt: skip


def _join(profiles: Profiles, u: int, moved: Moved) -> None:
    """Add what another profile held: the sequences by time, the newest 50 kept; the other's items count as older."""
    n = profiles.n[u]
    order = _by_time(moved.times, profiles.time[u, :n])[-SEQUENCE:]
    for column, other in (
        (profiles.item, moved.items), (profiles.time, moved.times), (profiles.weight, moved.weights),
        (profiles.kind, moved.kinds),
    ):  # fmt: skip
        column[u, : len(order)] = np.concatenate((other, column[u, :n]))[order]
    profiles.n[u] = len(order)
    mine = profiles.seen[u, : profiles.seen_n[u]]
    seen = np.concatenate((moved.seen[~np.isin(moved.seen, mine)], mine))[-SEEN:]
    if len(seen):
        profiles.seen[u, : len(seen)] = seen
        profiles.seen_n[u], profiles.seen_changed[u] = len(seen), True
    _join_averse(profiles, u, moved)
    profiles.tally[u] += moved.tally
    profiles.counters[u] += moved.counters
    first, last = profiles.times[u].tolist() if profiles.exists[u] else (moved.first_time, moved.last_time)
    profiles.times[u] = min(first, moved.first_time), max(last, moved.last_time)
    profiles.exists[u] = True


def _join_averse(profiles: Profiles, u: int, moved: Moved) -> None:
    """Add what the other had pushed away: by time, each item at its newest, the newest 16 kept."""
    n = profiles.averse_n[u]
    order = _by_time(moved.averse_times, profiles.averse_time[u, :n])
    items = np.concatenate((moved.averse, profiles.averse[u, :n]))[order]
    times = np.concatenate((moved.averse_times, profiles.averse_time[u, :n]))[order]
    newest = [i for i, item in enumerate(items) if item not in items[i + 1 :]][-AWAY:]
    profiles.averse[u, : len(newest)], profiles.averse_time[u, : len(newest)] = items[newest], times[newest]
    profiles.averse_n[u] = len(newest)


def _by_time(theirs: NDArray[np.float64], mine: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of both sequences one after the other, merged: each keeps its order, theirs first at ties."""
    order, i, j = [], 0, 0
    while i < len(theirs) and j < len(mine):
        if theirs[i] <= mine[j]:
            order.append(i)
            i += 1
        else:
            order.append(len(theirs) + j)
            j += 1
    order += [*range(i, len(theirs)), *range(len(theirs) + j, len(theirs) + len(mine))]
    return np.array(order, np.int64)
