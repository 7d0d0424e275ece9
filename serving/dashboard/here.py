"""What one API process counts and holds itself: the part `api` of a frame. Knows nothing about who watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serving.parts import Parts


def here_of(parts: Parts) -> Callable[[], Mapping[str, Any]]:
    """Return what reads the figures of one API process; rates and percentiles are those since it was last read."""

    def here() -> dict[str, Any]:
        served, snapshot = parts.snapshot.live, parts.snapshot
        held = {"items": int(served.items.eligible.sum()), "step": served.model.step, "degraded": snapshot.degraded}
        reason = {"reason": snapshot.reason} if snapshot.degraded else {}
        delay = round(1000 * parts.overload.delay_s, 3)
        took = parts.stages.take(sum(parts.overload.shed.values()))
        return {**held, **reason, "loop_delay_ms": delay, **took, **parts.freshness.figures()}

    return here
