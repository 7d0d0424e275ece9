"""How far a step of learning moved what is learnt, and at which rates: read off the learner, which it never changes.

    gradient_norm          of the ranker, both models' in one: root mean square of its norm over the step's lists
    gradient_norm_encoder  the same over the touched items, of the gradient of an item's vector
    vector_drift           mean over touched items of 1 - cos(vector after, vector before), of `vector_drift_n` items
    rate_<part>            mean learning rate, of the encoder that of the touched items

Gradients are what Adagrad's sums of squares grew by, so nothing is computed twice; what a float32 rounds away is not in
them. Items are compared with what they were when last touched: SLOTS of them are remembered, by hash (.5 MB).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from models.encoder import RATE
from models.factors import DIM

if TYPE_CHECKING:
    from models.learner import Learned, Learner
    from models.ranker import Ranker

SLOTS: Final = 2048

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


class Motion:
    """What items and ranker were at the last steps: keys u64[SLOTS], vectors f32[SLOTS, 64], squares f32[SLOTS]."""

    def __init__(self) -> None:
        self._keys: U64 = np.zeros(SLOTS, np.uint64)
        self._vectors: F32 = np.zeros((SLOTS, DIM), np.float32)
        self._squares: F32 = np.zeros(SLOTS, np.float32)
        self._ranker: Ranker | None = None
        self._total = 0.0

    def step(self, learner: Learner, rows: I64, done: Learned) -> dict[str, float]:
        """Return the figures of a step that changed distinct rows i64[k] and learnt `done`; unknown ones not."""
        ranker, squares = learner.model.ranker, learner.encoder.squares[rows]
        figures = ranker.rates() | {"scorer": float(ranker.scorer == "network")}
        if len(rows):
            figures["rate_encoder"] = float((RATE / np.sqrt(squares)).mean())
            figures |= self._items(learner.rows.keys[rows], learner.model.factors.vectors[rows], squares)
        same, before = ranker is self._ranker, self._total
        self._ranker, self._total = ranker, ranker.square_sum()
        if same and done.lists and self._total >= before:  # it falls where an alarm or a new birth lowers the squares
            figures["gradient_norm"] = math.sqrt((self._total - before) / done.lists)
        return {name: float(f"{value:.5g}") for name, value in figures.items() if math.isfinite(value)}

    def _items(self, keys: U64, vectors: F32, squares: F32) -> dict[str, float]:
        slots = (keys & np.uint64(SLOTS - 1)).astype(np.int64)
        known = self._keys[slots] == keys
        at, figures = slots[known], dict[str, float]()
        if len(at):
            now, then = vectors[known], self._vectors[at]
            lengths = np.linalg.norm(now, axis=1) * np.linalg.norm(then, axis=1)
            cosines = np.einsum("ij,ij->i", now, then) / np.maximum(lengths, 1e-12)
            grown = np.maximum(squares[known] - self._squares[at], 0.0)
            figures = {
                "vector_drift": max(0.0, 1.0 - float(cosines.mean())), "vector_drift_n": float(len(at)),
                "gradient_norm_encoder": math.sqrt(DIM * float(grown.mean())),
            }  # fmt: skip
        self._keys[slots], self._vectors[slots], self._squares[slots] = keys, vectors, squares
        return figures
