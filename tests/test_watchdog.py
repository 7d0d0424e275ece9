"""When the watchdog calls a partition stuck: a backlog that waits its turn is not, nor is one that was idle."""

from __future__ import annotations

import time

import pytest

from streaming.consumer import TP
from streaming.supervision import STALLED_S, TURN_S, Progress

A, B, INLET = TP("fr.events", 0), TP("fr.events", 1), TP("fr.clicks", 0)


@pytest.fixture
def progress() -> Progress:
    made = Progress()
    for tp in (A, B):
        made.seek(tp, 0)
    return made


def test_records_waiting_and_nobody_moves(progress: Progress) -> None:
    now = time.monotonic()
    assert progress.stalled({A: 5, B: 0}, now + STALLED_S - 1) is None
    assert progress.stalled({A: 5, B: 0}, now + STALLED_S + 1) == A
    assert progress.stalled({A: 0, B: 0}, now + STALLED_S + 1) is None


def test_a_partition_waits_its_turn_while_others_are_folded(progress: Progress) -> None:
    now = time.monotonic() + STALLED_S + 1
    progress.moved[B] = now - 1
    assert progress.stalled({A: 5, B: 9}, now) is None
    later = now + TURN_S
    progress.moved[B] = later - 1
    assert progress.stalled({A: 5, B: 9}, later) == A


def test_an_idle_partition_gets_its_whole_time_when_records_come(progress: Progress) -> None:
    idle = time.monotonic() + 3600
    assert progress.stalled({A: 0, B: 0}, idle) is None
    assert progress.stalled({A: 1, B: 0}, idle + 2) is None
    assert progress.stalled({A: 1, B: 0}, idle + 2 + STALLED_S) == A


def test_partitions_without_an_offset_of_ours_are_not_watched(progress: Progress) -> None:
    assert progress.stalled({INLET: 10_000}, time.monotonic() + 10 * TURN_S) is None


def test_lag_is_told_in_all_and_by_partition_of_the_topic(progress: Progress) -> None:
    progress.seek(INLET, 0)
    progress.move(A, 3)
    told = progress.lag({A: 5, B: 4, INLET: 7}, "fr.events")
    assert told == {"lag": 13, "lag_0": 2, "lag_1": 4}


def test_types_are_counted_since_the_last_figures_and_stay_named(progress: Progress) -> None:
    progress.kinds.update(["click", "click", "view"])
    first, then = progress.take(), progress.take()
    assert (first["events_click"], first["events_view"]) == (2, 1)
    assert (then["events_click"], then["events_view"]) == (0, 0)
