"""The one place that names every Prometheus series, and that sets up logging; knows nothing of what is measured.

The API exposes them; workers and learner tell their curves in Redis (`fr@1:metrics:<name>`), where the page reads them.
A process makes one `Telemetry` and hands it on; nothing is registered at import. Durations are in seconds and are
observed for failures too: a histogram that counts successes only would flatter.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
READY_FILE: Final = "FRESHET_READY_FILE"
EXIT_AGAIN: Final = 70  # exit code of a process that goes on from what is committed when it is started again
EXIT_FOR_GOOD: Final = 78  # exit code of a process that a restart cannot help; the supervisor leaves it ended
FAST: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Series:
    """One series: its name, its kind, what it says, its labels, its buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


HTTP_SECONDS = Series(
    "freshet_http_seconds", "histogram", "Time to answer a request, failures too.", ("route", "method", "status"), FAST
)
EVENTS_RECEIVED = Series("freshet_events_received_total", "counter", "Events at the HTTP door.", ("type", "status"))
SLATES = Series("freshet_slates_total", "counter", "Slates served.", ("policy", "degraded"))
SLATE_SECONDS = Series("freshet_slate_seconds", "histogram", "Time of one stage of a slate.", ("stage",), FAST)
IMPRESSIONS = Series(
    "freshet_impressions_total", "counter", "Slates logged, dropped (buffer full) or failed (Kafka).", ("status",)
)  # fmt: skip
TOKEN_WAITS = Series("freshet_token_waits_total", "counter", "Lookups with after=, by outcome.", ("applied",))
SNAPSHOT_POSITION = Series(
    "freshet_snapshot_position", "gauge", "Offset in examples up to which this process's arrays are.", ("feed",)
)
SNAPSHOT_RELOADS = Series("freshet_snapshot_reloads_total", "counter", "Reloads of the arrays from Redis.", ("feed",))
SNAPSHOT_ROWS = Series("freshet_snapshot_rows", "gauge", "Rows held by this process's arrays.", ("feed",))
REQUESTS_SHED = Series(
    "freshet_requests_shed_total", "counter", "Requests answered 429 because of load, by what was full.", ("reason",)
)  # fmt: skip
FOLD_LAG = Series(
    "freshet_fold_lag_events", "gauge", "Events acknowledged by this process that a fold has not applied.", ("fold",)
)  # fmt: skip
LOOP_DELAY = Series("freshet_loop_delay_seconds", "gauge", "How late this process's event loop is, smoothed.")
BUFFER_USED = Series("freshet_buffer_used", "gauge", "What a buffer of this process holds.", ("buffer",))
BUFFER_BOUND = Series("freshet_buffer_bound", "gauge", "What a buffer of this process may hold.", ("buffer",))
PROCESS_BYTES = Series("freshet_process_bytes", "gauge", "Resident memory of a process, as it last told.", ("process",))
REDIS_BYTES = Series(
    "freshet_redis_bytes", "gauge", "Estimate of what Redis holds by kind; total: all of it, whoever's.", ("kind",)
)  # fmt: skip
KEPT = Series("freshet_kept", "gauge", "Users, items with behaviour and learnt items that Redis keeps.", ("what",))
KEPT_BOUND = Series("freshet_kept_bound", "gauge", "How many of them may be kept (max_users, max_items).", ("what",))
MODEL_STEP = Series(
    "freshet_model_step", "gauge", "Step of the weights: served, learnt, newest version, pinned (0: none).", ("what",)
)  # fmt: skip
MODEL_REFUSED = Series("freshet_model_refused", "gauge", "Steps and versions that the learner's guard refused.")
BAD = Series("freshet_snapshot_bad", "gauge", "Values in Redis that this process cannot read and leaves out.")
UNREADABLE = Series(
    "freshet_profiles_unreadable_total", "counter", "Reads of a profile whose bytes no codec here reads."
)  # fmt: skip
DEAD_LETTERS = Series(
    "freshet_dead_letters", "gauge", "Records in the topic dead-letters: letters and the marks of replays."
)  # fmt: skip
EVENT_SKEW = Series(
    "freshet_event_skew_seconds", "histogram", "Time of acceptance less an event's own ts: a producer's clock.", (),
    (-300.0, -60.0, -10.0, -1.0, 0.0, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0, 604800.0),
)  # fmt: skip

SERIES: Final = tuple(value for value in list(globals().values()) if isinstance(value, Series))


class Telemetry:
    """The series of one process; each appears once it was touched."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}

    def count(self, series: Series, n: float = 1, **labels: str) -> None:
        """Add `n` to a counter."""
        metric = self._counters.get(series.name)
        if metric is None:
            metric = Counter(series.name, series.help, series.labels, registry=self.registry)
            self._counters[series.name] = metric
        (metric.labels(**labels) if labels else metric).inc(n)

    def set(self, series: Series, value: float, **labels: str) -> None:
        """Set a gauge."""
        metric = self._gauges.get(series.name)
        if metric is None:
            metric = Gauge(series.name, series.help, series.labels, registry=self.registry)
            self._gauges[series.name] = metric
        (metric.labels(**labels) if labels else metric).set(value)

    def observe(self, series: Series, seconds: float, **labels: str) -> None:
        """Put a duration into a histogram."""
        metric = self._histograms.get(series.name)
        if metric is None:
            metric = Histogram(series.name, series.help, series.labels, registry=self.registry, buckets=series.buckets)
            self._histograms[series.name] = metric
        (metric.labels(**labels) if labels else metric).observe(seconds)

    def exposition(self) -> bytes:
        """What `/metrics` answers, in the text format (CONTENT_TYPE)."""
        return generate_latest(self.registry)


class RateLimit(logging.Filter):
    """Lets through at most `burst` records of one message template per `seconds`, and then says how many it held back.

    Kafka's client logs about ten lines a second for as long as a broker is away.
    """

    def __init__(self, *, burst: int = 3, seconds: float = 30.0) -> None:
        super().__init__()
        self.burst, self.seconds = burst, seconds
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        key = (record.name, record.levelno, str(record.msg)[:80])
        now = time.monotonic()
        since, count = self._seen.get(key, (now, 0))
        if now - since > self.seconds:
            if count > self.burst:
                record.msg = f"{record.getMessage()} [{count - self.burst} more like this since]"
                record.args = ()
            since, count = now, 0
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] = (since, count + 1)
        return count < self.burst


def configure_logging(level: str = "info") -> None:
    """One line per record on standard error; third-party clients from warnings on, and rate-limited."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    limit = RateLimit()
    handler.addFilter(lambda record: not _foreign(record.name) or limit.filter(record))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("aiokafka", "kafka", "faust", "mode", "asyncio", "uvicorn", "httpx", "httpcore", "numba"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _foreign(name: str) -> bool:
    return name.split(".", 1)[0] in ("aiokafka", "kafka", "faust", "mode")


def resident_mb() -> float:
    """Return the memory that this process holds, MB."""
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def mark_ready() -> None:
    """Tell the supervisor, if there is one, that this process does its work now (assigned, loaded, listening)."""
    if path := os.environ.get(READY_FILE):
        Path(path).write_text(str(os.getpid()))
