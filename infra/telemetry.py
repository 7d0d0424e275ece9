"""The one place that names every Prometheus series, and that sets up logging; knows nothing of what is measured.

The API exposes them all. What workers, item agent and learner tell in their curves in Redis (`fr@1:metrics:<name>`) is
exposed by each API process alike (`of` = deployment): take the maximum over API processes, where of their own series
one takes the sum. A process makes one `Telemetry` and hands it on; nothing is registered at import. Durations are in
seconds and are observed for failures too: a histogram that counts successes only would flatter.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)  # fmt: skip
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
READY_FILE: Final = "FRESHET_READY_FILE"
EXIT_AGAIN: Final = 70  # exit code of a process that goes on from what is committed when it is started again
EXIT_FOR_GOOD: Final = 78  # exit code of a process that a restart cannot help; the supervisor leaves it ended
FAST: Final = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
FRESH: Final = (*FAST, 5.0, 15.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Series:
    """One series: its name, its kind, what it says, its labels, its buckets; of one process, or the same of all."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    of: Literal["process", "deployment"] = "process"


# What people see: answers, and how soon an event is felt.
HTTP_SECONDS = Series(
    "freshet_http_seconds", "histogram", "Time to answer a request, failures too.", ("route", "method", "status"), FAST
)
SLATES = Series("freshet_slates_total", "counter", "Slates served.", ("policy", "degraded"))
SLATE_SECONDS = Series("freshet_slate_seconds", "histogram", "Time of one stage of a slate.", ("stage",), FAST)
TOKEN_WAITS = Series("freshet_token_waits_total", "counter", "Lookups with after=, by outcome.", ("applied",))
APPLIED_SECONDS = Series(
    "freshet_applied_seconds", "histogram",
    "From a record's acceptance by Kafka to its commit by the user agents, or its fold by the item agent.",
    ("fold",), FRESH, "deployment",
)  # fmt: skip
CHANGED_SECONDS = Series(
    "freshet_changed_seconds", "histogram",
    "From an event's acceptance to the answer of the first lookup that asked after it, both of this process.",
    buckets=FRESH,
)  # fmt: skip

# What comes in, and what becomes of it.
EVENTS_RECEIVED = Series("freshet_events_received_total", "counter", "Events at the HTTP door.", ("type", "status"))
APPLIED = Series(
    "freshet_applied_total", "counter", "Events that the user agents applied, entries that the item agent did.",
    ("fold",), of="deployment",
)  # fmt: skip
FOLDED = Series(
    "freshet_folded_total", "counter", "Events that the user agents folded, by type, duplicates among them.",
    ("type",), of="deployment",
)  # fmt: skip
NOT_APPLIED = Series(
    "freshet_not_applied_total", "counter",
    "Events that the user agents did not apply: duplicates, dead letters, of these poisoned (their fold raised).",
    ("why",), of="deployment",
)  # fmt: skip
DEDUPE_OVERFLOW = Series(
    "freshet_dedupe_overflow_total", "counter", "Event ids that left a user's window before its 24 h were over.",
    of="deployment",
)  # fmt: skip
ERASED = Series("freshet_erased_total", "counter", "Profiles that an erasure ended.", of="deployment")
IMPRESSIONS = Series(
    "freshet_impressions_total", "counter", "Slates logged, dropped (buffer full) or failed (Kafka).", ("status",)
)  # fmt: skip
DEAD_LETTERS = Series(
    "freshet_dead_letters", "gauge", "Records in the topic dead-letters: letters and the marks of replays."
)  # fmt: skip
LETTERS = Series(
    "freshet_letters_total", "counter",
    "Dead letters that came, by the topic they are of and why: invalid, raised, profile, lost.",
    ("topic", "why"), of="deployment",
)  # fmt: skip
EVENT_SKEW = Series(
    "freshet_event_skew_seconds", "histogram", "Time of acceptance less an event's own ts: a producer's clock.", (),
    (-300.0, -60.0, -10.0, -1.0, 0.0, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0, 604800.0),
)  # fmt: skip

# How far behind, and who is silent.
LAG = Series(
    "freshet_lag_events", "gauge", "Events in the log, as Kafka last told, that a fold has not committed.",
    ("fold", "partition"), of="deployment",
)  # fmt: skip
LEARNER_LAG = Series(
    "freshet_learner_lag_records", "gauge", "Records of examples that the item agent folded and no step holds yet.",
    of="deployment",
)  # fmt: skip
FOLD_LAG = Series(
    "freshet_fold_lag_events", "gauge", "Events acknowledged by this process that a fold has not applied.", ("fold",)
)  # fmt: skip
TOLD_AGE = Series(
    "freshet_told_age_seconds", "gauge",
    "Since a process last told its figures: workers and item agent each second, the learner at each step.",
    ("process",), of="deployment",
)  # fmt: skip
SNAPSHOT_POSITION = Series(
    "freshet_snapshot_position", "gauge", "Offset in examples up to which this process's arrays are.", ("feed",)
)
SNAPSHOT_RELOADS = Series("freshet_snapshot_reloads_total", "counter", "Reloads of the arrays from Redis.", ("feed",))
SNAPSHOT_ROWS = Series("freshet_snapshot_rows", "gauge", "Rows held by this process's arrays.", ("feed",))
FEED_BYTES = Series("freshet_feed_bytes_total", "counter", "Bytes that this process read from a feed.", ("feed",))
FEED_AGE = Series("freshet_feed_age_seconds", "gauge", "Since this process last read from a feed.", ("feed",))

# What stands in the way.
READY = Series("freshet_ready", "gauge", "1 where this process is ready, 0 where /health/ready says why not.")
REACHABLE = Series(
    "freshet_reachable", "gauge", "1 where Kafka or Redis answers this process, 0 where not.", ("server",)
)  # fmt: skip
DEGRADED_SECONDS = Series(
    "freshet_degraded_seconds_total", "counter", "Time for which this process's answers lacked something."
)  # fmt: skip
REQUESTS_SHED = Series(
    "freshet_requests_shed_total", "counter", "Requests answered 429 because of load, by what was full.", ("reason",)
)  # fmt: skip
LOOP_DELAY = Series("freshet_loop_delay_seconds", "gauge", "How late this process's event loop is, smoothed.")
BUFFER_USED = Series("freshet_buffer_used", "gauge", "What a buffer of this process holds.", ("buffer",))
BUFFER_BOUND = Series("freshet_buffer_bound", "gauge", "What a buffer of this process may hold.", ("buffer",))
HELD = Series(
    "freshet_held", "gauge", "What a buffer of a worker, the item agent or the learner holds, as it last told.",
    ("process", "buffer"), of="deployment",
)  # fmt: skip
PROCESS_BYTES = Series(
    "freshet_process_bytes", "gauge", "Resident memory of a process, as it last told; api: of the one that answers.",
    ("process",),
)  # fmt: skip
REDIS_BYTES = Series(
    "freshet_redis_bytes", "gauge", "Estimate of what Redis holds by kind; total: all of it, whoever's.", ("kind",),
    of="deployment",
)  # fmt: skip
KEPT = Series(
    "freshet_kept", "gauge", "Users, items with behaviour and learnt items that Redis keeps.", ("what",),
    of="deployment",
)  # fmt: skip
KEPT_BOUND = Series(
    "freshet_kept_bound", "gauge", "How many of them may be kept (max_users, max_items).", ("what",), of="deployment"
)  # fmt: skip
BAD = Series("freshet_snapshot_bad", "gauge", "Values in Redis that this process cannot read and leaves out.")
UNREADABLE = Series(
    "freshet_profiles_unreadable_total", "counter", "Reads of a profile whose bytes no codec here reads."
)  # fmt: skip

# Learning.
MODEL_STEP = Series(
    "freshet_model_step", "gauge", "Step of the weights: served, learnt, newest version, pinned (0: none).", ("what",)
)  # fmt: skip
MODEL_REFUSED = Series(
    "freshet_model_refused", "gauge", "Steps and versions that the learner's guard refused.", of="deployment"
)  # fmt: skip
LEARNT = Series(
    "freshet_learnt_total", "counter",
    "What the learner took in: events, outcomes joined to a slate, lists trained on.", ("what",), of="deployment",
)  # fmt: skip
LOSS = Series(
    "freshet_learner_loss", "gauge",
    "Prequential mean loss of the last step, each event before it is learnt: encoder, ranker, click (log loss).",
    ("part",), of="deployment",
)  # fmt: skip
CALIBRATION = Series(
    "freshet_calibration_total", "counter",
    "Items of slates that were judged: how many were shown, the clicks predicted of them, how many were chosen.",
    ("what",), of="deployment",
)  # fmt: skip
DRIFT_ALARMS = Series(
    "freshet_drift_alarms_total", "counter", "Alarms of the learner's drift detectors, by what they watch.", ("part",),
    of="deployment",
)  # fmt: skip
PREQUENTIAL = Series(
    "freshet_prequential_total", "counter",
    "Served slates by the policy that drew them: how many, hits (something shown was chosen), sums of NDCG and reward.",
    ("what", "policy"), of="deployment",
)  # fmt: skip
LEARNING_RATE = Series(
    "freshet_learning_rate", "gauge", "Learning rate that a part of the learner has chosen.", ("part",), of="deployment"
)  # fmt: skip
GRADIENT_NORM = Series(
    "freshet_gradient_norm", "gauge", "Root mean square norm of the gradients of the last step.", ("part",),
    of="deployment",
)  # fmt: skip
VECTOR_DRIFT = Series(
    "freshet_vector_drift", "gauge", "Mean cosine distance by which the last step moved the vectors it touched.",
    of="deployment",
)  # fmt: skip

# What is shown, and to whom it is told.
ITEMS = Series(
    "freshet_items", "gauge", "Items that may be served, and of these those still shown for their first times.",
    ("state",), of="deployment",
)  # fmt: skip
QUALITY = Series(
    "freshet_quality", "gauge",
    "Of what this process served in the last 15 minutes: coverage, gini, entropy of categories, explored; 0 to 1.",
    ("measure",),
)  # fmt: skip
VIEWERS = Series("freshet_viewers", "gauge", "Pages that follow this process's live figures.")
WORLD = Series(
    "freshet_world_clicks", "gauge", "With simulated people: clicks to expect of a slate, ours, popular and the best.",
    ("slate",), of="deployment",
)  # fmt: skip

SERIES: Final = tuple(value for value in list(globals().values()) if isinstance(value, Series))


class ToldHistogram:
    """A histogram whose durations another process observed and counted by bucket."""

    def __init__(self, series: Series) -> None:
        self._series = series
        self._counts: dict[tuple[str, ...], list[float]] = {}
        self._seconds: dict[tuple[str, ...], float] = {}

    def add(self, labels: tuple[str, ...], counts: Sequence[float], seconds: float) -> None:
        """Add counts by bucket, the last beyond all edges, and the sum of what was counted."""
        before = self._counts.get(labels, [0.0] * (len(self._series.buckets) + 1))
        self._counts[labels] = [have + more for have, more in zip(before, counts, strict=True)]
        self._seconds[labels] = self._seconds.get(labels, 0.0) + seconds

    def describe(self) -> list[Metric]:
        """Tell the registry the name."""
        return [HistogramMetricFamily(self._series.name, self._series.help, labels=self._series.labels)]

    def collect(self) -> Iterator[Metric]:
        """Yield the one family."""
        family = HistogramMetricFamily(self._series.name, self._series.help, labels=self._series.labels)
        edges = [*map(floatToGoString, self._series.buckets), "+Inf"]
        for labels, counts in self._counts.items():
            cumulative = itertools.accumulate(counts)
            family.add_metric(labels, list(zip(edges, cumulative, strict=True)), self._seconds[labels])
        yield family


class Telemetry:
    """The series of one process; each appears once it was touched."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # two lines in five, which nobody asks for
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._told: dict[str, ToldHistogram] = {}
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}

    def count(self, series: Series, n: float = 1, **labels: str) -> None:
        """Add `n` to a counter."""
        metric = self._counters.get(series.name)
        if metric is None:
            metric = Counter(series.name, series.help, series.labels, registry=self.registry)
            self._counters[series.name] = metric
        (metric.labels(**labels) if labels else metric).inc(n)

    def total(self, series: Series, value: float, **labels: str) -> None:
        """Bring a counter up to a sum kept elsewhere, which may begin anew at 0."""
        place = (series.name, tuple(labels.values()))
        before = self._totals.get(place, 0.0)
        self._totals[place] = value
        self.count(series, value - before if value >= before else value, **labels)

    def set(self, series: Series, value: float, **labels: str) -> None:
        """Set a gauge."""
        metric = self._gauges.get(series.name)
        if metric is None:
            metric = Gauge(series.name, series.help, series.labels, registry=self.registry)
            self._gauges[series.name] = metric
        (metric.labels(**labels) if labels else metric).set(value)

    def forget(self, series: Series, **labels: str) -> None:
        """Take a gauge of these labels out, where it is."""
        if (metric := self._gauges.get(series.name)) is not None:
            metric.remove(*(labels[name] for name in series.labels))

    def observe(self, series: Series, seconds: float, **labels: str) -> None:
        """Put a duration into a histogram."""
        metric = self._histograms.get(series.name)
        if metric is None:
            metric = Histogram(series.name, series.help, series.labels, registry=self.registry, buckets=series.buckets)
            self._histograms[series.name] = metric
        (metric.labels(**labels) if labels else metric).observe(seconds)

    def add(self, series: Series, counts: Sequence[float], seconds: float, **labels: str) -> None:
        """Add what another process observed: durations by bucket, the last beyond all edges, and their sum."""
        metric = self._told.get(series.name)
        if metric is None:
            metric = self._told[series.name] = ToldHistogram(series)
            self.registry.register(metric)
        metric.add(tuple(labels[name] for name in series.labels), counts, seconds)

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


def quantile(edges: Sequence[tuple[float, float]], q: float) -> float:
    """The q-quantile (s) of cumulative buckets (edge, count), linear within one, at most the last finite edge."""
    wanted, below, left = q * edges[-1][1], 0.0, 0.0
    for edge, count in edges:
        if count >= wanted:
            if math.isinf(edge) or count == below:
                return left
            return left + (edge - left) * (wanted - below) / (count - below)
        below, left = count, edge
    return left


def _foreign(name: str) -> bool:
    return name.split(".", 1)[0] in ("aiokafka", "kafka", "faust", "mode")


def resident_mb() -> float:
    """Return the memory that this process holds, MB."""
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def mark_ready() -> None:
    """Tell the supervisor, if there is one, that this process does its work now (assigned, loaded, listening)."""
    if path := os.environ.get(READY_FILE):
        Path(path).write_text(str(os.getpid()))
