"""What broke last: the warnings and errors of this process, and what its figures and curves tell of the others.

Bounded; knows nothing about who reads it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

KEPT: Final = 50
MOST: Final = 300
"""Characters of one line."""
WATCHED: Final = {"linear": "the linear ranker", "network": "the ranker's network", "encoder": "the encoder",
                  "values": "the predicted ratings"}  # fmt: skip
FOLLOWS: Final = dict.fromkeys(("linear", "network"), "the ranker learns faster for a while")


class News(logging.Handler):
    """The last lines, as a handler of this process's log from warnings on; `take` gives those since it was asked."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._new = 0
        self._before: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning or an error; whoever logs meets no error for that."""
        try:
            said = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit
            said = str(record.msg)
        self.tell(f"API: {said}", record.created)

    def tell(self, what: str, t: float | None = None) -> None:
        """Keep a line; the same as the last one only moves its time."""
        line = {"t": round(time.time() if t is None else t, 3), "what": what[:MOST]}
        if self._lines and self._lines[-1]["what"] == line["what"]:
            self._lines.pop()
            self._new = max(0, self._new - 1)
        self._lines.append(line)
        self._new = min(self._new + 1, KEPT)

    def last(self) -> list[dict[str, Any]]:
        """Return all lines that are kept, oldest first."""
        return list(self._lines)

    def take(self) -> list[dict[str, Any]]:
        """Return the lines since the last call, oldest first."""
        new = self.last()[len(self._lines) - self._new :] if self._new else []
        self._new = 0
        return new

    def look(self, frame: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell what a frame of figures says went wrong."""
        for part in ("users", "items"):
            at, point = frame.get(part, {}).get("t"), frame.get(part, {})
            if point.get("dead", 0) > 0:
                self.tell(f"{part} agent: {point['dead']:g} dead letters", at)
            if point.get("poisoned", 0) > 0:
                self.tell(f"{part} agent: {point['poisoned']:g} events set aside, their fold raised", at)
        learner = frame.get("learner", {})
        for name, called in WATCHED.items():
            if learner.get(f"alarm_{name}", 0) > 0:
                follows = FOLLOWS.get(name, "watched only")
                self.tell(f"drift: the losses of {called} rose; {follows}", learner.get("t"))
        here = frame.get("api", {})
        if self._change("refused", learner) > 0:
            self.tell("learner: weights were refused, see /-/models", learner.get("t"))
        changed = self._change("degraded", here)
        if changed > 0:
            self.tell(f"API: degraded: {here.get('reason') or 'answers come from the arrays in process'}")
        elif changed < 0:
            self.tell("API: no longer degraded")
        for name, said in (("shed_s", "requests a second were shed (429)"), ("errors_s", "answers a second failed")):
            if here.get(name, 0) > 0:
                self.tell(f"API: {here[name]:g} {said}")

    def _change(self, name: str, figures: Mapping[str, Any]) -> float:
        """Return by how much a figure is above what it last was; 0 at first and where it is not told."""
        if name not in figures:
            return 0.0
        now = float(figures[name])
        before, self._before[name] = self._before.get(name, now), now
        return now - before
