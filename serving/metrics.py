"""What `GET /metrics` answers: this process's own series, and those of processes that have no port of their own.

Workers, item agent and learner tell their figures in curves in Redis; each scrape reads what is new there, so that
every API process exposes the same of them. Counters count from the start of this process on. Knows nothing about how
the figures came to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from infra.settings import POLICIES
from infra.telemetry import (
    APPLIED,
    APPLIED_SECONDS,
    BAD,
    BUFFER_BOUND,
    BUFFER_USED,
    CALIBRATION,
    CONTENT_TYPE,
    DEAD_LETTERS,
    DEDUPE_OVERFLOW,
    DEGRADED_SECONDS,
    DRIFT_ALARMS,
    ERASED,
    FEED_AGE,
    FEED_BYTES,
    FOLD_LAG,
    FOLDED,
    FRESH,
    GRADIENT_NORM,
    HELD,
    IMPRESSIONS,
    ITEMS,
    KEPT,
    KEPT_BOUND,
    LAG,
    LEARNER_LAG,
    LEARNING_RATE,
    LEARNT,
    LETTERS,
    LOOP_DELAY,
    LOSS,
    MODEL_REFUSED,
    MODEL_STEP,
    NOT_APPLIED,
    PREQUENTIAL,
    PROCESS_BYTES,
    QUALITY,
    REACHABLE,
    READY,
    REDIS_BYTES,
    REQUESTS_SHED,
    SNAPSHOT_POSITION,
    SNAPSHOT_RELOADS,
    SNAPSHOT_ROWS,
    TOKEN_WAITS,
    TOLD_AGE,
    UNREADABLE,
    VECTOR_DRIFT,
    WORLD,
    Series,
    Telemetry,
    resident_mb,
)  # fmt: skip
from models.bandit import FIRST
from serving.introspect import buffers, not_ready
from serving.parts import Parts
from streaming.dead_letters import newest
from streaming.state import StoreError, StoreUnavailable
from streaming.topics import LogError

PAGE: Final = 100
"""Points of a curve read at a stretch: lookups go in between."""
GONE_S: Final = 900.0
"""A worker that told nothing for so long, while others do, was scaled away and is no longer named, s."""
TICK_S: Final = 0.25
LETTERS_S: Final = 5.0
LETTERS_MOST: Final = 500
"""Records read at one scrape; of more only the newest are counted by reason."""
CURVES: Final = ("users", "items", "learner", "world")
AWAY: Final = (StoreError, *StoreUnavailable)

Labels = dict[str, str]
COUNTED: Final[dict[str, dict[str, tuple[Series, Labels]]]] = {
    "users": {
        "events": (APPLIED, {"fold": "user"}),
        "duplicates": (NOT_APPLIED, {"why": "duplicate"}),
        "dead": (NOT_APPLIED, {"why": "dead"}),
        "poisoned": (NOT_APPLIED, {"why": "poisoned"}),
        "dedupe_overflow": (DEDUPE_OVERFLOW, {}),
        "erased": (ERASED, {}),
    },
    "items": {"events": (APPLIED, {"fold": "item"})},
    "learner": {
        "events": (LEARNT, {"what": "events"}),
        "joined": (LEARNT, {"what": "joined"}),
        "lists": (LEARNT, {"what": "lists"}),
        "shown": (CALIBRATION, {"what": "shown"}),
        "shown_predicted": (CALIBRATION, {"what": "predicted"}),
        "shown_chosen": (CALIBRATION, {"what": "chosen"}),
        **{f"alarm_{part}": (DRIFT_ALARMS, {"part": part}) for part in ("linear", "network", "encoder", "values")},
    },
}
"""By curve and name: what each point adds to a counter."""
OUTCOMES: Final = {
    f"{what}_{policy}": {"what": what, "policy": policy}
    for what in ("slates", "hits", "ndcg", "reward")
    for policy in POLICIES
}
"""The same of the learner's outcomes by policy, where it tells them."""
LATEST: Final[dict[str, dict[str, tuple[Series, Labels]]]] = {
    "learner": {
        "encoder_loss": (LOSS, {"part": "encoder"}),
        "ranker_loss": (LOSS, {"part": "ranker"}),
        "click_loss": (LOSS, {"part": "click"}),
        "gradient_norm": (GRADIENT_NORM, {"part": "ranker"}),
        "gradient_norm_encoder": (GRADIENT_NORM, {"part": "encoder"}),
        "vector_drift": (VECTOR_DRIFT, {}),
    },
    "world": {
        "ours": (WORLD, {"slate": "ours"}),
        "popular": (WORLD, {"slate": "popular"}),
        "oracle": (WORLD, {"slate": "best"}),
    },
}
"""By curve and name: what the newest point says."""
BUFFERS: Final = ("queued", "rows_to_commit", "rows_to_feed", "window")
FROM_ZERO: Final[tuple[tuple[Series, str, tuple[str, ...]], ...]] = (
    (IMPRESSIONS, "status", ("appended", "dropped", "failed")),
    (REQUESTS_SHED, "reason", ("appending", "bodies", "delay", "lag", "lists")),
    (SNAPSHOT_RELOADS, "feed", ("all",)),
    (TOKEN_WAITS, "applied", ("true", "false")),
)
"""Counters of this process that are told as 0 before they count: the first of a kind would else be no increase."""
FOLDS: Final = {"users": "user", "items": "item"}


class Exposition:
    """The handler of `GET /metrics`, and how far it has read the curves."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}
        self._told: dict[str, float] = {}
        self._turn = asyncio.Lock()
        self._letters: int | None = None

    async def answer(self, parts: Parts, request: Request) -> Response:
        """GET /metrics: Prometheus text."""
        async with self._turn:  # two scrapes at once would count the same points twice
            _set_own(parts)
            await _set_shown(parts)
            await _set_sizes(parts)
            await _set_versions(parts)
            with contextlib.suppress(*AWAY):
                await _set_lag(parts)
                for curve in CURVES:
                    await self._read(parts, curve)
            await self._count_letters(parts)
            self._set_ages(parts)
            return Response(parts.telemetry.exposition(), media_type=CONTENT_TYPE)

    async def _read(self, parts: Parts, curve: str) -> None:
        """Take what a curve says since the last scrape; at first only its newest points, and nothing is counted."""
        if curve not in self._last:
            await self._begin(parts, curve)
            return
        while True:
            points = await parts.snapshot.read_metrics(curve, self._last[curve], PAGE)
            for identifier, fields in points:
                _count(parts.telemetry, curve, fields)
                self._note(parts.telemetry, curve, identifier, fields)
            if len(points) < PAGE:
                return
            await asyncio.sleep(0)

    async def _begin(self, parts: Parts, curve: str) -> None:
        for series, labels in COUNTED.get(curve, {}).values():
            parts.telemetry.count(series, 0, **labels)
        if curve in FOLDS:
            parts.telemetry.add(APPLIED_SECONDS, [0.0] * (len(FRESH) + 1), 0.0, fold=FOLDS[curve])
        self._last[curve] = "0-0"
        for identifier, fields in await parts.snapshot.read_metrics(curve, "-", PAGE):
            self._note(parts.telemetry, curve, identifier, fields)

    def _note(self, telemetry: Telemetry, curve: str, identifier: str, fields: Mapping[str, str]) -> None:
        """Remember a point, and set what its figures are the newest of."""
        self._last[curve] = identifier
        process = f"{curve}-{fields['slot']}" if curve == "users" and "slot" in fields else curve
        self._told[process] = int(identifier.partition("-")[0]) / 1000
        for name, (series, labels) in LATEST.get(curve, {}).items():
            if name in fields:
                telemetry.set(series, float(fields[name]), **labels)
        for name, value in fields.items():
            if curve == "learner" and name.startswith("rate_"):
                telemetry.set(LEARNING_RATE, float(value), part=name.removeprefix("rate_"))
        for name in BUFFERS:
            if name in fields:
                telemetry.set(HELD, float(fields[name]), process=process, buffer=name)

    async def _count_letters(self, parts: Parts) -> None:
        """Read the dead letters that came since the last scrape, if any did, and count them by their reason."""
        end, before = parts.dead_letters, self._letters
        if end is None or end == before:
            return
        if before is not None and end > before:
            try:
                async with asyncio.timeout(LETTERS_S):
                    found, now = await newest(parts.settings, min(end - before, LETTERS_MOST))
                    if now > end:  # more came since Kafka was asked: these would push the first ones out
                        found, now = await newest(parts.settings, min(now - before, LETTERS_MOST))
                    end = now
            except (TimeoutError, OSError, RuntimeError, LogError):
                return  # the next scrape tries again
            for letter in found:
                parts.telemetry.count(LETTERS, topic=parts.topics.inlet_of(letter.topic), why=letter.why)
        self._letters = end

    def _set_ages(self, parts: Parts) -> None:
        now = parts.clock()
        newest = max((at for name, at in self._told.items() if name.startswith("users")), default=0.0)
        for process, at in list(self._told.items()):
            if process.startswith("users") and newest - at > GONE_S:
                del self._told[process]
                parts.telemetry.forget(TOLD_AGE, process=process)
                parts.telemetry.forget(HELD, process=process, buffer="queued")
            else:
                parts.telemetry.set(TOLD_AGE, max(0.0, now - at), process=process)


def _count(telemetry: Telemetry, curve: str, fields: Mapping[str, str]) -> None:
    """Add what one point counted."""
    for name, (series, labels) in COUNTED.get(curve, {}).items():
        if name in fields:
            telemetry.count(series, float(fields[name]), **labels)
    for name, value in fields.items():
        if curve == "users" and name.startswith("events_"):
            telemetry.count(FOLDED, float(value), type=name.removeprefix("events_"))
        elif curve == "learner" and name in OUTCOMES:
            telemetry.count(PREQUENTIAL, float(value), **OUTCOMES[name])
    if curve in FOLDS and (buckets := fields.get("applied_buckets")):
        counts, milliseconds = [float(count) for count in buckets.split()], float(fields["applied_sum_ms"])
        telemetry.add(APPLIED_SECONDS, counts, milliseconds / 1000, fold=FOLDS[curve])


def _set_own(parts: Parts) -> None:
    """Put what this process knows of itself into the gauges."""
    snapshot, telemetry = parts.snapshot, parts.telemetry
    telemetry.set(READY, not not_ready(parts))
    telemetry.set(REACHABLE, snapshot.connected, server="redis")
    telemetry.set(REACHABLE, not parts.log_problem, server="kafka")
    telemetry.count(DEGRADED_SECONDS, 0)
    telemetry.count(UNREADABLE, 0)
    for series, label, values in FROM_ZERO:
        for value in values:
            telemetry.count(series, 0, **{label: value})
    telemetry.set(SNAPSHOT_POSITION, snapshot.live.items_position, feed="items")
    telemetry.set(SNAPSHOT_POSITION, snapshot.live.model_position, feed="model")
    telemetry.set(SNAPSHOT_ROWS, snapshot.live.items.rows.known, feed="items")
    for name, feed in (("items", snapshot.item_feed), ("model", snapshot.model_feed)):
        telemetry.total(FEED_BYTES, feed.bytes, feed=name)
        if feed.at:
            telemetry.set(FEED_AGE, max(0.0, time.time() - feed.at), feed=name)
    telemetry.set(BAD, len(snapshot.live.bad))
    if parts.dead_letters is not None:
        telemetry.set(DEAD_LETTERS, parts.dead_letters)
    telemetry.set(LOOP_DELAY, parts.overload.delay_s)
    for fold, behind in parts.overload.lag.items():
        telemetry.set(FOLD_LAG, behind, fold=fold)
    for name, held in buffers(parts).items():
        telemetry.set(BUFFER_USED, held["used"], buffer=name)
        telemetry.set(BUFFER_BOUND, held["bound"], buffer=name)


async def _set_shown(parts: Parts) -> None:
    """Put into the gauges what may be shown, and how what was shown is spread."""
    telemetry, items = parts.telemetry, parts.snapshot.live.items
    eligible = items.eligible[: items.n]
    telemetry.set(ITEMS, int(eligible.sum()), state="eligible")
    telemetry.set(ITEMS, int((items.shown[: items.n][eligible] < FIRST).sum()), state="exploring")
    quality = await parts.quality.told()
    if quality["slots"]:
        telemetry.set(QUALITY, quality["coverage"]["value"], measure="coverage")
        telemetry.set(QUALITY, quality["gini"], measure="gini")
        telemetry.set(QUALITY, quality["entropy"], measure="entropy")
        telemetry.set(QUALITY, float(parts.recent.window(parts.clock()).explored.mean()), measure="explored")


async def _set_lag(parts: Parts) -> None:
    """Put into the gauges how far the folds are behind the log; raises what Redis raises."""
    for fold, behind in (await parts.snapshot.read_lags(parts.ends)).items():
        for partition, events in behind.items():
            parts.telemetry.set(LAG, events, fold=fold, partition=str(partition))


async def _set_sizes(parts: Parts) -> None:
    """Put what processes and Redis hold into the gauges."""
    telemetry, kept = parts.telemetry, parts.settings
    sizes, resident = await parts.snapshot.sizes(kept.partitions)
    for process, megabytes in {**resident, "api": resident_mb()}.items():
        telemetry.set(PROCESS_BYTES, megabytes * 1e6, process=process)
    for kind, size in sizes.bytes.items():
        telemetry.set(REDIS_BYTES, size, kind=kind)
    bounds = {"users": kept.max_users, "items": kept.max_items, "learnt": kept.max_items}
    for what, count in {"users": sizes.users, "items": sizes.items, "learnt": sizes.learnt}.items():
        telemetry.set(KEPT, count, what=what)
        telemetry.set(KEPT_BOUND, bounds[what], what=what)


async def _set_versions(parts: Parts) -> None:
    """Put into the gauges which weights are served, how far the learner is, and what its guard refused."""
    telemetry, told = parts.telemetry, await parts.snapshot.versions()
    telemetry.set(MODEL_STEP, parts.snapshot.live.model.step, what="served")
    if told:
        published = [about["version"] for about in told["versions"] if not about["refused"]]
        telemetry.set(MODEL_STEP, told["learnt"]["step"], what="learnt")
        telemetry.set(MODEL_STEP, max(published, default=0), what="version")
        telemetry.set(MODEL_STEP, told["pinned"] or 0, what="pinned")
        telemetry.set(MODEL_REFUSED, told["refused"])
        telemetry.set(LEARNER_LAG, max(0, parts.snapshot.live.items_position - told["learnt"]["next"]))


async def watch_degraded(parts: Parts) -> None:
    """Count the time for which answers lack something, for as long as this process runs."""
    looked = time.monotonic()
    while True:
        await asyncio.sleep(TICK_S)
        now = time.monotonic()
        if parts.snapshot.degraded:
            parts.telemetry.count(DEGRADED_SECONDS, now - looked)
        looked = now
