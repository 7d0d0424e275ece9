"""What the routes work with: built by `app`, handed to every handler, closed by `app`.

Knows nothing about routes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from infra.settings import Settings
from infra.telemetry import UNREADABLE, Telemetry
from models.ranker.heads import head_weights
from serving.dashboard.freshness import Freshness
from serving.dashboard.news import News
from serving.dashboard.quality import Quality
from serving.dashboard.recent import Recent
from serving.dashboard.stages import Stages
from serving.keys import KeyRing
from serving.overload import Overload
from serving.slates import Impressions
from serving.snapshot import Snapshot
from streaming.events import short
from streaming.topics import Log, Topics

MAX_NAMED: Final = 100
log = logging.getLogger("freshet.serving")


@dataclass(slots=True)
class Parts:
    """The resources of one API process; `clock` gives seconds since the epoch."""

    settings: Settings
    topics: Topics
    log: Log
    snapshot: Snapshot
    impressions: Impressions
    ring: KeyRing
    overload: Overload
    telemetry: Telemetry = field(default_factory=Telemetry)
    clock: Callable[[], float] = time.time
    started: float = field(default_factory=time.time)
    unreadable: Counter[str] = field(default_factory=Counter)
    """Reads of profiles that no codec here reads, by user; at most MAX_NAMED users are named."""
    freshness: Freshness = field(default_factory=Freshness)
    stages: Stages = field(default_factory=Stages)
    news: News = field(default_factory=News)
    recent: Recent = field(default_factory=Recent)
    quality: Quality = field(init=False)
    log_problem: str = "not connected yet"
    warm: bool = False
    dead_letters: int | None = None
    """Records in the topic dead-letters, as last asked; None until Kafka told."""
    ends: dict[int, int] = field(default_factory=dict)
    """Ends of the partitions of `events`, as last asked."""
    head_weights: NDArray[np.float64] = field(init=False)
    """Of the sum that orders items, f64[H], by the setting."""

    def __post_init__(self) -> None:
        self.head_weights = head_weights(self.settings.head_weights)
        self.quality = Quality(self.recent, lambda: self.snapshot.live, self.clock)

    def cannot_read(self, user: str, error: Exception) -> None:
        """Count a stored profile that no codec here reads, and name its user while there is room."""
        self.telemetry.count(UNREADABLE)
        if user in self.unreadable or len(self.unreadable) < MAX_NAMED:
            if user not in self.unreadable:
                log.error("profile of %s: %s; served as unknown. Next: freshet rebuild --switch", short(user), error)
            self.unreadable[user] += 1
