"""Series are named once, count what they say, and third-party loggers are rate-limited."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from infra import telemetry
from infra.telemetry import SERIES, RateLimit, Telemetry, mark_ready


def test_names_are_unique_and_follow_the_convention() -> None:
    names = [series.name for series in SERIES]
    assert len(set(names)) == len(names) > 5
    for series in SERIES:
        assert series.name.startswith("freshet_")
        assert series.help.endswith(".")
        assert series.name.endswith("_total") == (series.kind == "counter"), series
        assert (series.kind == "histogram") == bool(series.buckets), series
        assert series.kind != "histogram" or series.name.endswith("_seconds"), series


def test_exposition_holds_what_was_told() -> None:
    own = Telemetry()
    own.count(telemetry.IMPRESSIONS, 2, status="dropped")
    own.set(telemetry.SNAPSHOT_POSITION, 41, feed="items")
    own.observe(telemetry.HTTP_SECONDS, 0.004, route="/v1/events", method="POST", status="202")
    text = own.exposition().decode()
    assert 'freshet_impressions_total{status="dropped"} 2.0' in text
    assert 'freshet_snapshot_position{feed="items"} 41.0' in text
    bucket = 'freshet_http_seconds_bucket{le="0.005",method="POST",route="/v1/events",status="202"} 1.0'
    assert bucket in text


def test_a_repeating_message_is_held_back_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("infra.telemetry.time.monotonic", lambda: now)
    limit = RateLimit(burst=2, seconds=10)

    def record() -> logging.LogRecord:
        return logging.LogRecord("aiokafka", logging.WARNING, "x", 1, "node %s not ready", (1,), None)

    assert [limit.filter(record()) for _ in range(5)] == [True, True, False, False, False]
    now = 11.0
    last = record()
    assert limit.filter(last)
    assert last.getMessage() == "node 1 not ready [3 more like this since]"


def test_ready_is_told_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(telemetry.READY_FILE, raising=False)
    mark_ready()
    monkeypatch.setenv(telemetry.READY_FILE, str(tmp_path / "ready"))
    mark_ready()
    assert (tmp_path / "ready").read_text() == str(os.getpid())


def test_a_histogram_that_another_process_counted_reads_like_one_of_this_process() -> None:
    own, told = Telemetry(), Telemetry()
    seconds = [0.0004, 0.0005, 0.004, 400.0]
    for value in seconds:
        own.observe(telemetry.APPLIED_SECONDS, value, fold="user")
    counts = [0.0] * (len(telemetry.FRESH) + 1)
    for value in seconds:
        counts[sum(edge < value for edge in telemetry.FRESH)] += 1
    told.add(telemetry.APPLIED_SECONDS, [0.0] * len(counts), 0.0, fold="user")
    told.add(telemetry.APPLIED_SECONDS, counts, sum(seconds), fold="user")
    assert told.exposition() == own.exposition()


def test_a_sum_kept_elsewhere_that_begins_anew_goes_on_counting() -> None:
    own = Telemetry()
    for total in (10.0, 15.0, 3.0, 4.0):
        own.total(telemetry.FEED_BYTES, total, feed="items")
    assert 'freshet_feed_bytes_total{feed="items"} 19.0' in own.exposition().decode()


def test_a_gauge_can_be_forgotten() -> None:
    own = Telemetry()
    own.set(telemetry.TOLD_AGE, 1.0, process="users-3")
    own.forget(telemetry.TOLD_AGE, process="users-3")
    own.forget(telemetry.HELD, process="users-3", buffer="queued")
    assert "users-3" not in own.exposition().decode()
