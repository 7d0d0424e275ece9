"""The join window: slates that wait for what their viewers do, bounded in stream time and in number.

An event joins the newest of its slates whose logged candidates hold its item. It depends on the entries alone: whoever
reads the window's records again holds what it held. Knows nothing about what is learnt of it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.bandit import Rewards
from models.examples import CLICK, ENTERS, IMPRESSION, VIEW, CodecError, Entries, Shown
from models.features import F

WINDOW_S: Final = 3600.0
"""Stream time within which an outcome joins a slate, s."""
WINDOW_SLATES: Final = 4096
"""Slates held at most: about 60 MB of logged candidates."""

U64 = NDArray[np.uint64]


@dataclass(slots=True, frozen=True)
class Origin:
    """Where a record begins: its offset in `examples`, the window's stream time (s) and the marks before it."""

    offset: int
    time: float
    marks: tuple[tuple[int, int], ...] = ()


START: Final = Origin(0, -np.inf)


@dataclass(slots=True)
class Held:
    """One slate of the join window; `listed`: features of all candidates were logged, else of the shown items only.

    settled: an outcome joined it, with which it was calibrated; hit: one of what it showed was chosen.
    """

    shown: Shown
    listed: bool
    time: float
    origin: Origin
    chosen: set[int] = field(default_factory=set)
    viewed: set[int] = field(default_factory=set)
    told: set[tuple[int, int]] = field(default_factory=set)
    """(kind, item) of what has been rewarded; what a user does again earns nothing more."""
    settled: bool = False
    hit: bool = False


class Joined(NamedTuple):
    """An outcome and its slate: the target stands at `place` of the candidates.

    first: no outcome joined the slate before; again: one of this target did.
    """

    held: Held
    target: int
    place: int
    first: bool
    again: bool


class Reward(NamedTuple):
    """What the last layer is told of a shown item: it was examined, and this is what that earned, 0 for a view."""

    held: Held
    place: int
    earned: float
    first: bool


@dataclass(slots=True)
class Joins:
    """What one micro-batch of entries came to: slates that came, outcomes that joined one, rewards, slates that left
    without an outcome, and hits: (slate, place) where one of what it showed was chosen for the first time."""

    came: list[Held] = field(default_factory=list)
    pairs: list[Joined] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)
    left: list[Held] = field(default_factory=list)
    hits: list[tuple[Held, int]] = field(default_factory=list)


class Window(OrderedDict[int, Held]):
    """Held slates by their hash, oldest first; stream_time: the latest time of an entry, s; unreadable: impressions."""

    def __init__(self) -> None:
        super().__init__()
        self.stream_time = -np.inf
        self.unreadable = 0

    def origin(self) -> Origin | None:
        """Return where the oldest slate's record begins; None where none is held."""
        return next(iter(self.values())).origin if self else None

    def join(self, entries: Entries, origin: Origin, rewards: Rewards) -> Joins:
        """Let the entries of a record that began at `origin` pass, in order."""
        out = Joins()
        each = zip(entries.kind.tolist(), entries.flags.tolist(), entries.time.tolist(), strict=True)
        for i, (kind, flags, time) in enumerate(each):
            self.stream_time = max(self.stream_time, time)
            if kind == IMPRESSION:
                try:
                    self._hold(Shown.from_bytes(entries.extra[i]), origin, out)
                except CodecError:  # the item agent dead-letters it
                    self.unreadable += 1
            elif kind <= VIEW or flags & ENTERS:
                held, place = self._find(entries.slates[i].tolist(), entries.target[i : i + 1])
                if held is None:
                    continue
                target, enters = int(entries.target[i]), bool(flags & ENTERS)
                said = float(entries.value[i]), float(entries.weight[i])
                shown_at = self._reward(held, target, kind, enters, said, rewards, out)
                if kind == VIEW:
                    held.viewed.add(target)
                elif enters:
                    out.pairs.append(Joined(held, target, place, not held.settled, target in held.chosen))
                    held.chosen.add(target)
                    held.settled = True
                    if shown_at >= 0 and not held.hit:
                        held.hit = True
                        out.hits.append((held, shown_at))
        return out

    def _hold(self, shown: Shown, origin: Origin, out: Joins) -> None:
        """Hold a slate, unless it came before or teaches nothing, and let those go that are too old or too many."""
        if shown.slate in self or len(shown.candidates) < 2 or shown.features.shape[1] != F:
            return
        listed = len(shown.candidates) != len(shown.items) or not np.array_equal(shown.candidates, shown.items)
        held = self[shown.slate] = Held(shown, listed, self.stream_time, origin)
        out.came.append(held)
        while self:
            oldest = next(iter(self.values()))
            if len(self) <= WINDOW_SLATES and oldest.time >= self.stream_time - WINDOW_S:
                break
            _, gone = self.popitem(last=False)
            if not gone.settled:
                out.left.append(gone)

    def _find(self, slates: list[int], target: U64) -> tuple[Held | None, int]:
        """Return the first of these slates whose candidates hold the target u64[1], and its place among them."""
        for slate in slates:
            held = self.get(slate) if slate else None
            if held is not None and len(found := places_of(held.shown.candidates, target)):
                return held, int(found[0])
        return None, -1

    def _reward(
        self, held: Held, target: int, kind: int, enters: bool, said: tuple[float, float], rewards: Rewards, out: Joins
    ) -> int:
        """Add what an event says of a shown item, as far as it was not said before; to choose it counts as a click.

        Returns its place in the slate, -1 for an item that was not shown.
        """
        at = places_of(held.shown.items, np.array([target], np.uint64))
        place = int(at[0]) if len(at) else -1
        kinds = [k for k in dict.fromkeys((CLICK, kind) if enters else (kind,)) if (k, target) not in held.told]
        if place < 0 or not kinds:
            return place
        first = not any(item == target for _, item in held.told)
        held.told.update((k, target) for k in kinds)
        earned = sum(rewards.of(held.shown.surface, k, *said) for k in kinds)
        out.rewards.append(Reward(held, place, earned, first))
        return place


@njit(cache=True)
def places_of(candidates, items):  # type: ignore[no-untyped-def]
    """Return where each of items u64[k] first stands among candidates u64[m], i64[k]; none where one does not."""
    out = np.empty(len(items), np.int64)
    for i in range(len(items)):
        at = 0
        while at < len(candidates) and candidates[at] != items[i]:
            at += 1
        if at == len(candidates):
            return out[:0]
        out[i] = at
    return out
