"""What one API process counts and holds itself: the part `api` of a frame.

Rates and percentiles are those since the last frame, read from the process's own histograms (percentiles within a
bucket's width), so that `/metrics` and the dashboard cannot disagree. Knows nothing about what the figures are of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry

from infra.telemetry import HTTP_SECONDS, REQUESTS_SHED, SLATE_SECONDS
from serving.parts import Parts

LOOKUP_ROUTE: Final = "/v1/recommendations/{user_id}"
Edges = dict[float, float]


class Since:
    """Counts and histograms of a registry, each time those since the time before."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._last: dict[str, Edges] = {}
        self._at = time.monotonic()

    def take(self) -> dict[str, float]:
        """Return lookups_s, errors_s, shed_s and the p50, p95, p99 (ms) of lookups and of the stages of a slate."""
        found = self._read()
        now, passed = time.monotonic(), max(1e-3, time.monotonic() - self._at)
        fresh = {
            name: {edge: count - self._last.get(name, {}).get(edge, 0.0) for edge, count in edges.items()}
            for name, edges in found.items()
        }
        self._last, self._at = found, now
        rates = {
            f"{said}_s": round(fresh.get(name, {}).get(math.inf, 0.0) / passed, 1)
            for said, name in (("lookups", "lookup"), ("errors", "errors"), ("shed", "shed"))
        }
        quantiles = {
            f"{name}_p{q}_ms": round(1000 * _quantile(sorted(edges.items()), q / 100), 2)
            for name, edges in fresh.items()
            if name not in ("errors", "shed") and edges.get(math.inf, 0.0) > 0
            for q in (50, 95, 99)
        }
        return rates | quantiles

    def _read(self) -> dict[str, Edges]:
        """Return cumulative counts by upper edge, by what they are of; a plain count has the one edge inf."""
        out: dict[str, Edges] = {}

        def count(name: str, edge: float, value: float) -> None:
            edges = out.setdefault(name, {})
            edges[edge] = edges.get(edge, 0.0) + value

        for family in self._registry.collect():
            if family.name not in _READ:
                continue
            for sample in family.samples:
                labels, name = sample.labels, sample.name
                if name == f"{HTTP_SECONDS.name}_bucket" and labels["route"] == LOOKUP_ROUTE:
                    count("lookup", float(labels["le"]), sample.value)
                elif name == f"{HTTP_SECONDS.name}_count" and labels["status"].startswith("5"):
                    count("errors", math.inf, sample.value)
                elif name == f"{SLATE_SECONDS.name}_bucket":
                    count(labels["stage"], float(labels["le"]), sample.value)
                elif name == REQUESTS_SHED.name:
                    count("shed", math.inf, sample.value)
        return out


_READ: Final = {HTTP_SECONDS.name, SLATE_SECONDS.name, REQUESTS_SHED.name.removesuffix("_total")}


def _quantile(edges: Sequence[tuple[float, float]], q: float) -> float:
    """The q-quantile (s) of cumulative buckets (edge, count), linear within a bucket, at most the last finite edge."""
    wanted, below, left = q * edges[-1][1], 0.0, 0.0
    for edge, count in edges:
        if count >= wanted:
            if math.isinf(edge) or count == below:
                return left
            return left + (edge - left) * (wanted - below) / (count - below)
        below, left = count, edge
    return left


def here_of(parts: Parts) -> Callable[[], Mapping[str, Any]]:
    """Return what reads the figures of one API process."""
    since = Since(parts.telemetry.registry)

    def here() -> dict[str, Any]:
        served, snapshot = parts.snapshot.live, parts.snapshot
        held = {"items": int(served.items.eligible.sum()), "step": served.model.step, "degraded": snapshot.degraded}
        reason = {"reason": snapshot.reason} if snapshot.degraded else {}
        delay = round(1000 * parts.overload.delay_s, 3)
        return {**held, **reason, "loop_delay_ms": delay, **since.take(), **parts.freshness.figures()}

    return here
