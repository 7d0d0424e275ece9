"""What the routes work with: built by `app`, handed to every handler, closed by `app`.

Knows nothing about routes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from infra.settings import Settings
from infra.telemetry import Telemetry
from serving.keys import KeyRing
from serving.slates import Impressions
from serving.snapshot import Snapshot
from streaming.topics import Log, Topics


@dataclass(slots=True)
class Parts:
    """The resources of one API process; `clock` gives seconds since the epoch."""

    settings: Settings
    topics: Topics
    log: Log
    snapshot: Snapshot
    impressions: Impressions
    ring: KeyRing
    telemetry: Telemetry = field(default_factory=Telemetry)
    clock: Callable[[], float] = time.time
    started: float = field(default_factory=time.time)
    appending: int = 0
    log_problem: str = "not connected yet"
    warm: bool = False
