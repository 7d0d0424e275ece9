"""How long lookups and their stages took since somebody last asked: exact percentiles, without reading the histograms.

`/metrics` has the same durations in buckets; going through all of those each second would hold the event loop up.
Knows nothing about what is looked up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

KEPT: Final = 4096
"""Durations of a stage that are kept; of more, the newest (130 kB a stage)."""
QUANTILES: Final = (50, 95, 99)


def quantiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return <name>_p50_ms, _p95_ms and _p99_ms of one or more durations."""
    found = 1000.0 * np.percentile(seconds, QUANTILES)
    return {f"{name}_p{q}_ms": round(ms, 2) for q, ms in zip(QUANTILES, found.tolist(), strict=True)}


class Stages:
    """Durations by stage since `take`; `lookup` is the whole answer, failures too. `failed`: answers of 5xx."""

    def __init__(self) -> None:
        self._took: dict[str, deque[float]] = {}
        self._at = time.monotonic()
        self._lookups = self._shed = self.failed = 0

    def put(self, stage: str, seconds: float) -> None:
        """Note a duration."""
        took = self._took.get(stage)
        if took is None:
            took = self._took[stage] = deque(maxlen=KEPT)
        took.append(seconds)
        self._lookups += stage == "lookup"

    def take(self, shed: int) -> dict[str, float]:
        """Return lookups_s, errors_s, shed_s and <stage>_p50_ms, _p95_ms, _p99_ms since the last call.

        shed: requests shed in all so far.
        """
        now = time.monotonic()
        passed = max(1e-3, now - self._at)
        counts = {"lookups": self._lookups, "errors": self.failed, "shed": shed - self._shed}
        figures = {f"{name}_s": round(count / passed, 1) for name, count in counts.items()}
        for stage, took in self._took.items():
            if took:
                figures |= quantiles(stage, took)
                took.clear()
        self._at, self._lookups, self.failed, self._shed = now, 0, 0, shed
        return figures
