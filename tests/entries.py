"""Synthetic `examples`: users who walk through items in a pattern, made for the tests of folds and learners."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from models.examples import CLICK, ENTERS, IMPRESSION, SHOWN, VIEW, VOICE, Entries, Shown, concatenate, item_hash

NAMES = [f"item-{i}" for i in range(60)]
KEYS = np.array([item_hash(name) for name in NAMES], np.uint64)


def entry(
    target: int, time: float, *, offset: int = 0, flags: int = ENTERS | VOICE, kind: int = CLICK,
    history: list[int] | None = None, slates: tuple[int, ...] = (), extra: bytes = b"",
) -> Entries:  # fmt: skip
    """Return one entry of partition 0; target and history are places in NAMES, target -1 for none."""
    past = list(history or ())
    named = (*slates, 0, 0, 0, 0)[:4]
    return Entries(
        ranges=[(0, offset, offset + 1)], partition=np.zeros(1, np.uint16), offset=np.array([offset]),
        index=np.zeros(1, np.uint16), time=np.array([time]), kind=np.array([kind], np.uint8),
        flags=np.array([flags], np.uint8), target=KEYS[[target]] if target >= 0 else np.zeros(1, np.uint64),
        weight=np.ones(1), value=np.zeros(1), slates=np.array([named], np.uint64),
        history_start=np.array([0, len(past)]), history_item=KEYS[past] if past else np.empty(0, np.uint64),
        history_time=time - 60.0 * np.arange(1.0, len(past) + 1), history_kind=np.ones(len(past), np.uint8),
        ids=[NAMES[target] if target >= 0 else ""], extra=[extra],
    )  # fmt: skip


def shown(slate: int, items: list[int], candidates: list[int], features: np.ndarray) -> bytes:
    """Return the payload of an impression of these places in NAMES; features [m, F]."""
    return Shown(
        slate, 1, KEYS[items], np.full(len(items), 0.9, np.float32), np.zeros(len(items), np.uint8),
        KEYS[candidates], features.astype(np.float16), "home", "epsilon",
    ).to_bytes()  # fmt: skip


@dataclass
class Walk:
    """A stream of `n` entries by `users` users: mostly i -> i + 1, some jumps, views and impressions; late ones too."""

    seed: int = 0
    n: int = 200
    users: int = 8
    width: int = 0
    pace: float = 600.0
    histories: dict[int, list[int]] = field(default_factory=dict)

    def entries(self) -> Entries:
        """Return the stream; impressions carry features where `width` is set."""
        rng = np.random.default_rng(self.seed)
        out, now, slates = [], 1.7e9, 0
        for offset in range(self.n):
            now += float(rng.exponential(self.pace)) if rng.random() < 0.98 else 6 * 86400.0
            user = int(rng.integers(self.users))
            past = self.histories.setdefault(user, [])
            kind = rng.random()
            if kind < 0.1:
                slates += 1
                candidates = rng.choice(len(NAMES), 20, replace=False).tolist()
                payload = shown(slates, candidates[:5], candidates, rng.normal(size=(20, self.width or 1)))
                out.append(entry(-1, now, offset=offset, flags=0, kind=IMPRESSION, extra=payload, slates=(slates,)))
                continue
            step = 1 if rng.random() < 0.7 else int(rng.integers(1, len(NAMES)))
            item = ((past[0] if past else 0) + step) % len(NAMES)
            joined = tuple(range(slates, max(slates - 4, 0), -1))
            late = now - float(rng.exponential(3000.0)) * (rng.random() < 0.1)
            if kind < 0.15:
                out.append(entry(item, late, offset=offset, flags=0, kind=VIEW, slates=joined))
                continue
            flags = ENTERS | (VOICE if rng.random() < 0.8 else 0) | (SHOWN if rng.random() < 0.3 else 0)
            out.append(entry(item, late, offset=offset, flags=flags, history=past[:20], slates=joined))
            past.insert(0, item)
        return concatenate(out)


def cuts(entries: Entries, places: list[int]) -> list[Entries]:
    """Cut entries at places into consecutive parts."""
    bounds = [0, *sorted({p for p in places if 0 < p < len(entries)}), len(entries)]
    parts = []
    for first, last in pairwise(bounds):
        offset = int(entries.offset[first])
        following = int(entries.offset[last - 1]) + 1
        parts.append(entries.slice(first, last, [(0, offset, following)]))
    return parts
