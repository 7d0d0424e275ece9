"""Alarms: when a model's prequential loss has risen for good, by ADWIN.

A watch takes the mean of every 8 losses into River's ADWIN. What ADWIN keeps is its own affair and is not stored; the
means since its last reset are, at most 1,024, and fill a new one, so that a restart goes on bit for bit. It is reset
at an alarm and when 1,024 have come. A loss that falls is no alarm. Knows nothing about what is done on an alarm.
Bifet, Gavalda: Learning from time-changing data with adaptive windowing (SDM 2007).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.examples import CodecError
from models.factors import fitted

MEAN_OF: Final = 8
MOST: Final = 1024
SURE: Final = 0.002
"""ADWIN's delta: the chance of an alarm where nothing changed."""

F64 = NDArray[np.float64]


class Watch:
    """One model's losses under watch: learn(loss) says whether that was an alarm.

    inputs: means since the last reset; alarms: how many so far; count and sum: of the losses since the last mean.
    """

    def __init__(self) -> None:
        self.alarms = self.count = 0
        self.sum = 0.0
        self._reset()

    def learn(self, loss: float, count: int = 1) -> bool:
        """Take the summed loss of `count` examples; returns whether the loss has risen for good."""
        self.sum, self.count = self.sum + loss, self.count + count
        if self.count < MEAN_OF:
            return False
        mean, self.sum, self.count = self.sum / self.count, 0.0, 0
        if len(self.inputs) >= MOST:
            self._reset()
        risen = self._add(mean)
        self.inputs.append(mean)
        if risen:
            self._reset()
            self.alarms += 1
        return risen

    def _reset(self) -> None:
        from river.drift import ADWIN  # takes seconds the first time: as a watch is made, not as it learns

        self.inputs: list[float] = []
        self._adwin: Any = ADWIN(delta=SURE, clock=1)

    def _add(self, mean: float) -> bool:
        before = self._adwin.estimation
        self._adwin.update(mean)
        return bool(self._adwin.drift_detected) and self._adwin.estimation > before

    def state(self) -> F64:
        """Return everything as f64[4 + n]: alarms, count, sum, n and the means since the last reset."""
        return np.array([self.alarms, self.count, self.sum, len(self.inputs), *self.inputs])

    def set_state(self, values: F64) -> None:
        """Take over what `read_state` found, and fill a new ADWIN with it."""
        self.alarms, self.count, self.sum = int(values[0]), int(values[1]), float(values[2])
        self._reset()
        for mean in values[4:].tolist():
            self._add(mean)
            self.inputs.append(mean)


def read_state(values: dict[str, Any], name: str) -> F64 | None:
    """Return what `Watch.state` stored under a name, None where nothing was; raises CodecError."""
    if name not in values:
        return None
    stored = np.asarray(values[name], object)
    found: F64 = fitted(values, name, np.empty(stored.shape))
    if found.ndim != 1 or len(found) < 4 or len(found) != 4 + found[3] or len(found) > 4 + MOST or found.min() < 0:
        raise CodecError(f"dense weights: {name}: expected the state of a watch, got {found.shape}")
    return found
