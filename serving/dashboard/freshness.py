"""How long it takes from an accepted event to the answer of the first lookup that asked for it with `after=`.

One process knows only of events that it accepted itself. Knows nothing about what is in them.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Final

from serving.dashboard.stages import quantiles

WAITING: Final = 1024
"""Accepted positions that wait for a lookup; the oldest leave (about 150 kB)."""
KEPT: Final = 4096
WINDOW_S: Final = 60.0


class Freshness:
    """Accepted positions of `events` that nobody has asked for yet, and how long the others took (s, newest last)."""

    def __init__(self) -> None:
        self._accepted: OrderedDict[tuple[int, int], float] = OrderedDict()
        self._took: deque[tuple[float, float]] = deque(maxlen=KEPT)

    def accepted(self, last: Mapping[int, int]) -> None:
        """Note the last offset by partition of what was just acknowledged."""
        now = time.perf_counter()
        for place in last.items():
            self._accepted[place] = now
            if len(self._accepted) > WAITING:
                self._accepted.popitem(last=False)

    def asked(self, partition: int, offset: int) -> float | None:
        """Return when a position was accepted (perf_counter, s), the first time that it is asked for; else None."""
        return self._accepted.pop((partition, offset), None)

    def answered(self, since: float) -> float:
        """Note that the answer holds what was accepted then; return how long that took, s."""
        now = time.perf_counter()
        self._took.append((now, now - since))
        return now - since

    def figures(self) -> dict[str, float]:
        """Return changed_p50_ms, changed_p95_ms, changed_p99_ms and changed_n of the last minute; empty without any."""
        now = time.perf_counter()
        took = [seconds for at, seconds in self._took if at > now - WINDOW_S]
        return {**quantiles("changed", took), "changed_n": len(took)} if took else {}
