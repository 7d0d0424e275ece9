"""The fold of events about who somebody is: erasure, alias, merge, between the others of a micro-batch, in order.

Erase ends a profile at its offset. Alias ends an anonymous profile and says what it held (`Moved`); Merge, which is
derived from that, joins it to the user's. Knows nothing about Kafka, Redis or event structs; packed.py has the
layout, folding.py folds everything else.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.profile.folding import COUNTERS, DUPLICATE, ERASED, OVERFLOW, QUIET, remember_event
from models.profile.packed import AWAY, SEEN, SEQUENCE, Events, Folded, Moved, Profiles

ERASE, ALIAS, MERGE = 8, 9, 10
"""Kinds within a micro-batch, after those of models/examples.py, where they never come."""
_DUPLICATES: Final = COUNTERS.index("duplicate")


def fold(profiles: Profiles, batch: Events) -> Folded:
    """Fold a micro-batch in order and return what each event derives; the profiles change in place."""
    n = len(batch.rows)
    out, at = Folded.of(n), 0
    for i in batch.identities:
        profiles.fold(batch, out, at, i)
        _fold_one(profiles, batch, out, i)
        at = i + 1
    profiles.fold(batch, out, at, n)
    return out


def _fold_one(profiles: Profiles, batch: Events, out: Folded, i: int) -> None:
    event = batch.rows[i]
    u, t, kind = int(event["user"]), float(event["time"]), int(event["kind"])
    p = profiles.rows[u]
    # An erasure holds whatever its time: a clock that was set back must not undo it.
    if kind != ERASE and p["ended"] > 0.0 and t <= p["ended"]:
        out.counts[ERASED] += 1
        return
    p["changed_by"] = i
    if kind != ERASE and event["event"]:
        found = int(remember_event(profiles.rows, u, event["event"], event["record_s"]))
        if found == 1:
            p["counters"][_DUPLICATES] += 1
            out.counts[DUPLICATE] += 1
            return
        out.counts[OVERFLOW] += found == 2
    out.counts[QUIET] += 1
    if kind == MERGE:
        _join(p, batch.moved[i])
        return
    if kind == ALIAS and p["exists"]:
        out.moved[i] = _taken(p, profiles.codec)
    _end(p, t)


def _end(p: np.void, t: float) -> None:
    p["exists"] = False
    p["counters"], p["times"], p["tally"] = 0, 0.0, 0.0
    p["n"] = p["s"] = p["seen_n"] = p["averse_n"] = 0
    p["ended"] = max(p["ended"], t, np.finfo(np.float64).tiny)  # 0 would say that nothing ended it
    p["seen_changed"] = True


def _taken(p: np.void, codec: int) -> Moved:
    # Below version 3 these are not stored: what a micro-batch holds of them depends on where it was cut.
    n, a = p["n"], p["averse_n"] if codec >= 3 else 0
    first, last = p["times"].tolist()
    return Moved(
        items=p["item"][:n].copy(), times=p["time"][:n].copy(), weights=p["weight"][:n].copy(),
        kinds=p["kind"][:n].copy(), seen=p["seen"][: p["seen_n"]].copy(), counters=p["counters"].copy(),
        first_time=first, last_time=last, averse=p["averse"][:a].copy(), averse_times=p["averse_time"][:a].copy(),
        tally=p["tally"].copy() if codec >= 3 else np.zeros_like(p["tally"]),
    )  # fmt: skip


def _join(p: np.void, moved: Moved) -> None:
    """Add what another profile held: the sequences by time, the newest 50 kept; the other's items count as older."""
    n = p["n"]
    order = _by_time(moved.times, p["time"][:n])[-SEQUENCE:]
    for name, other in (
        ("item", moved.items), ("time", moved.times), ("weight", moved.weights), ("kind", moved.kinds),
    ):  # fmt: skip
        p[name][: len(order)] = np.concatenate((other, p[name][:n]))[order]
    p["n"] = len(order)
    mine = p["seen"][: p["seen_n"]]
    seen = np.concatenate((moved.seen[~np.isin(moved.seen, mine)], mine))[-SEEN:]
    if len(seen):
        p["seen"][: len(seen)] = seen
        p["seen_n"], p["seen_changed"] = len(seen), True
    _join_averse(p, moved)
    p["tally"] += moved.tally
    p["counters"] += moved.counters
    first, last = p["times"].tolist() if p["exists"] else (moved.first_time, moved.last_time)
    p["times"] = min(first, moved.first_time), max(last, moved.last_time)
    p["exists"] = True


def _join_averse(p: np.void, moved: Moved) -> None:
    """Add what the other had pushed away: by time, each item at its newest, the newest 16 kept."""
    n = p["averse_n"]
    order = _by_time(moved.averse_times, p["averse_time"][:n])
    items = np.concatenate((moved.averse, p["averse"][:n]))[order]
    times = np.concatenate((moved.averse_times, p["averse_time"][:n]))[order]
    newest = [i for i, item in enumerate(items) if item not in items[i + 1 :]][-AWAY:]
    p["averse"][: len(newest)], p["averse_time"][: len(newest)] = items[newest], times[newest]
    p["averse_n"] = len(newest)


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
