"""Outcomes joined to the slates that showed them, each once: the labels of an export.

Records of one partition go through the very fold that makes `examples` (streaming/learn.py): it drops what was applied
before, names the slates that an event may belong to (by its slate id, else the newest of the user's last four that
shows the item) and says what enters a sequence. The state is a function of the partition's records alone, so neither
restarts nor rebalances nor how the log is read change a label. Knows nothing of files.

Bounds, by partition: an outcome joins within WINDOW_S of stream time after its slate, as in models/window.py; at most
HELD slates wait; profiles are kept for as many users as the deployment keeps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from infra.settings import Settings
from models.bandit import Rewards
from models.examples import ACTION, CLICK, DWELL, ENTERS, RATING, VIEW, Entries, Shown, concatenate
from models.retrieval import CHANNELS
from models.window import WINDOW_S
from streaming.events import Action, Alias, Dwell, Erase, Event, Impression, Interaction, Rating, decode
from streaming.learn import UserFold, decode_part, rounds, users_of
from streaming.replay.exports import OTHERS
from streaming.state import MemoryUserStore

HELD: Final = 50_000
"""Slates of a partition that wait for outcomes at most, about 300 MB at ten positions; more are closed early."""
Row = dict[str, Any]


@dataclass(slots=True)
class Label:
    """What came of one shown position."""

    viewed: int = 0
    clicked: int = 0
    dwell: float | None = None
    rating: float | None = None
    actions: list[str] = field(default_factory=list)
    reward: float = 0.0
    first: float | None = None


@dataclass(slots=True)
class Waiting:
    """A slate that waits for outcomes: its event, what its payload says, where it lies, since when (s) it waits."""

    event: Impression
    shown: Shown
    offset: int
    recorded: float
    since: float
    labels: dict[int, Label]
    told: set[tuple[int, int]] = field(default_factory=set)
    """(kind, place) of what has been rewarded: doing it again earns nothing more."""


@dataclass(slots=True)
class Counts:
    """What an export came to. early: slates closed before their window ended, for there were too many."""

    records: int = 0
    events: int = 0
    slates: int = 0
    outcomes: int = 0
    joined: int = 0
    duplicates: int = 0
    erased: int = 0
    unreadable: int = 0
    early: int = 0


class Erasures:
    """Who asked to be forgotten: records of theirs below an offset are left out, also those of ids that became theirs.

    Filled from the whole log before anything is written, since an erasure comes after what it erases.
    """

    def __init__(self) -> None:
        self._erased: dict[str, tuple[int, int]] = {}
        self._aliases: list[tuple[int, str, str, int]] = []

    def look(self, offset: int, record_ms: int, value: bytes) -> None:
        """Take note of a record that erases or aliases; others cost a search in their bytes."""
        if b"erase" not in value and b"alias" not in value:
            return
        try:
            event = decode(value)
        except ValueError:
            return
        if isinstance(event, Erase):
            self._erased[event.user_id] = offset, record_ms
        elif isinstance(event, Alias):
            self._aliases.append((record_ms, event.anonymous_id, event.user_id, offset))

    def found(self) -> dict[str, int]:
        """Return user -> the offset in its partition below which nothing of it is told."""
        erased = dict(self._erased)
        for record_ms, anonymous, user, offset in sorted(self._aliases, reverse=True):
            by = erased.get(user)
            if by is not None and by[1] >= record_ms and erased.get(anonymous, (0, 0))[0] <= offset:
                erased[anonymous] = offset, by[1]
        return {user: offset for user, (offset, _) in erased.items()}


class Labels:
    """The join of one partition: records in, rows of `events` and of `slates` out, each as soon as it is certain."""

    def __init__(self, settings: Settings, partition: int, first: int, gone: Mapping[str, int], counts: Counts) -> None:
        self.partition, self.counts = partition, counts
        self._gone, self._rewards = gone, Rewards(settings.rewards)
        self._fold, self._store = UserFold.of(settings), MemoryUserStore()
        self._store.applied[partition] = first, {}, ""
        self._held: OrderedDict[int, Waiting] = OrderedDict()
        self._stream_time = -math.inf

    def take(self, records: Sequence[tuple[int, int, bytes]]) -> tuple[list[Row], list[Row]]:
        """Fold (offset, record time in ms, value) of the next records; return rows of events and of closed slates."""
        part = decode_part("events", self.partition, records)
        part.first = self._store.applied[self.partition][0]
        self.counts.records += len(records)
        self.counts.unreadable += len(part.dead)
        known = dict(zip(part.offsets, zip(part.times, part.events, strict=True), strict=True))
        told: list[Row] = []
        closed: list[Row] = []
        for parts in rounds([part]):
            wanted = users_of(parts)
            outcome = self._fold.fold(parts, {p: self._store.read_now(p, users) for p, users in wanted.items()})
            for write in outcome.writes:
                self._store.commit_now(write)
            self._store.left.clear()
            self.counts.duplicates += outcome.duplicates
            if outcome.records:
                self._join(concatenate(outcome.records), known, told, closed)
        return told, closed

    def end(self) -> list[Row]:
        """Return the rows of the slates that still wait: the log ends before their window does."""
        rows = [row for waiting in self._held.values() for row in self._rows(waiting)]
        self._held.clear()
        return rows

    def _join(
        self, entries: Entries, known: Mapping[int, tuple[int, Event]], told: list[Row], closed: list[Row]
    ) -> None:
        each = zip(entries.offset.tolist(), entries.kind.tolist(), entries.time.tolist(), strict=True)
        for i, (offset, kind, time) in enumerate(each):
            self._stream_time = max(self._stream_time, time)
            closed += self._let_go()
            record_ms, event = known[offset]
            if offset < self._gone.get(event.user_id, -1):
                self.counts.erased += 1
            elif isinstance(event, Impression):
                self._hold(event, offset, record_ms / 1000)
                closed += self._let_go()
            elif kind <= VIEW:
                assert not isinstance(event, Alias)
                self.counts.events += 1
                told.append(event_row(event, record_ms / 1000, self.partition, offset))  # type: ignore[arg-type]
                self._label(entries, i, event)  # type: ignore[arg-type]

    def _let_go(self) -> Iterator[Row]:
        while self._held:
            waiting = next(iter(self._held.values()))
            late = waiting.since < self._stream_time - WINDOW_S
            if not late and len(self._held) <= HELD:
                return
            self.counts.early += not late
            self._held.popitem(last=False)
            yield from self._rows(waiting)

    def _hold(self, event: Impression, offset: int, recorded: float) -> None:
        shown = Shown.from_bytes(event.payload)
        if shown.slate in self._held or len(event.shown) != len(shown.items):
            return
        self._held[shown.slate] = Waiting(event, shown, offset, recorded, self._stream_time, {})

    def _label(self, entries: Entries, i: int, event: Interaction) -> None:
        """Join an event to the first of its slates that is held and shows its item."""
        more = int(entries.kind[i]) != VIEW
        self.counts.outcomes += more
        for slate in entries.slates[i].tolist():
            waiting = self._held.get(slate) if slate else None
            if waiting is None or event.item_id not in waiting.event.shown:
                continue
            place = waiting.event.shown.index(event.item_id)
            label = waiting.labels.setdefault(place, Label())
            self._tell(waiting, label, place, entries, i, event)
            if more:
                self.counts.joined += 1
                after = max(0.0, float(entries.time[i]) - waiting.event.ts)
                label.first = after if label.first is None else min(label.first, after)
            return

    def _tell(
        self, waiting: Waiting, label: Label, place: int, entries: Entries, i: int, event: Interaction
    ) -> None:  # fmt: skip
        kind, value, weight = int(entries.kind[i]), float(entries.value[i]), float(entries.weight[i])
        if kind == VIEW:
            label.viewed = 1
        elif kind == CLICK:
            label.clicked = 1
        elif kind == DWELL and isinstance(event, Dwell):
            label.dwell = (label.dwell or 0.0) + event.seconds
        elif kind == RATING and isinstance(event, Rating):
            label.rating = event.value
        elif kind == ACTION and isinstance(event, Action) and event.name not in label.actions:
            label.actions.append(event.name)
        # as models/window.py: to choose an item counts as a click
        for earning in dict.fromkeys((CLICK, kind) if entries.flags[i] & ENTERS else (kind,)):
            if (earning, place) not in waiting.told:
                waiting.told.add((earning, place))
                label.reward += self._rewards.of(waiting.shown.surface, earning, value, weight)

    def _rows(self, waiting: Waiting) -> Iterator[Row]:
        self.counts.slates += 1
        event, shown = waiting.event, waiting.shown
        listed = len(shown.candidates) if shown.candidates.tolist() != shown.items.tolist() else 0
        pairs = zip(event.shown, shown.propensities.tolist(), shown.channels.tolist(), strict=True)
        for position, (item_id, propensity, channel) in enumerate(pairs):
            label = waiting.labels.get(position) or Label()
            yield {
                "slate_id": event.slate_id, "ts": event.ts, "recorded": waiting.recorded, "user_id": event.user_id,
                "surface": shown.surface, "policy": shown.policy, "step": shown.step, "position": position,
                "item_id": item_id, "propensity": propensity,
                "channel": CHANNELS[channel] if channel < len(CHANNELS) else str(channel), "candidates": listed,
                "viewed": label.viewed, "clicked": label.clicked, "dwell": label.dwell, "rating": label.rating,
                "actions": "|".join(label.actions) or None, "reward": label.reward, "first_outcome_s": label.first,
                "partition": self.partition, "offset": waiting.offset,
            }  # fmt: skip


def event_row(event: Interaction, recorded: float, partition: int, offset: int) -> Row:
    """Return an event as a row of the table `events`."""
    low, high = event.scale if isinstance(event, Rating) else (None, None)
    value = event.value if isinstance(event, Rating) else event.seconds if isinstance(event, Dwell) else None
    kind = type(event).__name__.lower()
    if isinstance(event, Action):
        kind = f"action:{event.name}" if event.name in OTHERS else event.name
    return {
        "ts": event.ts, "recorded": recorded, "user_id": event.user_id, "item_id": event.item_id, "kind": kind,
        "value": value, "scale_low": low, "scale_high": high, "slate_id": event.slate_id, "position": event.position,
        "surface": event.surface,
        "context": msgspec.json.encode(event.context).decode() if event.context else None,
        "event_id": event.event_id, "partition": partition, "offset": offset,
    }  # fmt: skip
