"""What the learner refuses of itself: values that are not finite, and losses beyond a bound of the last good version.

Losses are prequential: each list and each event is scored before it is learnt, so they say how good the weights are
that were just served. Over at least LEAST of them

    refused  if  mean loss > mean loss of the last good version + BOUND,     BOUND = log 8

that is: what people then did was, in the geometric mean, less than an eighth as likely to the model as before. A world
that changes looks the same, once: where the losses are as high again after going back to the good version, it is the
world, and they are the new measure. So the guard goes back at most once for each change. Knows no Kafka and no Redis.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from models.factors import read_rows, unpack_named
from models.learner import Learned
from models.model import STATE_FORM, STATE_ROW

log = logging.getLogger(__name__)

BOUND: Final = math.log(8.0)
LEAST: Final = {"encoder": 2048, "ranker": 256}
"""Events, and lists, that a mean is taken over at least."""


def losses_of(done: Learned) -> dict[str, tuple[float, int]]:
    """Return (summed loss, count) of each model."""
    return {"encoder": (done.encoder_loss, done.entered), "ranker": (done.ranker_loss, done.lists)}


def means(done: Learned) -> dict[str, float]:
    """Return the mean prequential loss of each model that saw enough to tell."""
    return {name: total / n for name, (total, n) in losses_of(done).items() if n >= LEAST[name]}


def unsound(rows: Sequence[bytes], dense: bytes) -> str:
    """Return which packed rows or dense weights are not finite, "" where all are; raises CodecError."""
    if rows:
        values = read_rows(list(rows), STATE_ROW, form=STATE_FORM)
        for name in values.dtype.names or ():
            if values.dtype[name].base.kind == "f" and not np.isfinite(values[name]).all():
                bad = ~np.isfinite(values[name]).reshape(len(values), -1).all(1)
                return f"{int(bad.sum())} of {len(values)} rows: {name} is not finite"
    for name, value in (unpack_named(dense) if dense else {}).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            return f"dense weights: {name} is not finite"
    return ""


class Guard:
    """Watches the losses since the last verdict; `good` are those of the last good version, by model."""

    def __init__(self) -> None:
        self.good: dict[str, float] = {}
        self._tried: set[str] = set()
        """Models whose first verdict after going back is still to come."""
        self._recent = dict.fromkeys(LEAST, (0.0, 0))

    def judge(self, done: Learned) -> str:
        """Take the losses of one step; return why they are refused, "" where they are not."""
        reason = ""
        for name, (total, n) in losses_of(done).items():
            recent, count = self._recent[name]
            self._recent[name] = recent, count = recent + total, count + n
            if not math.isfinite(recent):
                reason = f"the {name}'s loss is not finite"
            elif count >= LEAST[name]:
                self._recent[name] = (0.0, 0)
                reason = reason or self._beyond(name, recent / count)
        return reason

    def _beyond(self, name: str, mean: float) -> str:
        good, tried = self.good.get(name, math.inf), name in self._tried
        self._tried.discard(name)
        if mean <= good + BOUND:
            return ""
        if tried:  # as bad with the weights that were good: the world is another one
            log.warning("the %s's loss stays at %.2f with the weights of %.2f: it is the new measure", name, mean, good)
            self.good[name] = mean
            return ""
        return f"the {name}'s loss over the last events is {mean:.2f}, of the last good version {good:.2f}"

    def beyond(self, metrics: dict[str, float]) -> str:
        """Return why a version with these losses is refused, "" where it is not."""
        for name, good in self.good.items():
            if (mean := metrics.get(f"{name}_loss", good)) > good + BOUND and name not in self._tried:
                return f"the {name}'s loss since the last version is {mean:.2f}, of the last good one {good:.2f}"
        return ""

    def begin(self, *, tried: bool = False) -> None:
        """Begin anew; `tried`: with the weights of the last good version, which are not gone back to again."""
        self._recent, self._tried = dict.fromkeys(LEAST, (0.0, 0)), set(LEAST) if tried else set()

    def accept(self, metrics: dict[str, float]) -> None:
        """Take the losses of a version that was published as the measure."""
        self.good |= {name: metrics[f"{name}_loss"] for name in LEAST if f"{name}_loss" in metrics}
