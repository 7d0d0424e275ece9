"""Everything learnt that scoring needs: vectors and encoder, prior mixture, ranker, values of outcomes, step number.

Knows nothing about how it is trained, stored or delivered. Dense bytes are a versioned map of named arrays; rows are
packed by `models.factors` for serving (form 1) and by `models.learner` with optimiser state (form 2): both load here.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.bandit import LastLayer
from models.decay import GRID
from models.examples import CodecError
from models.factors import DIM, ROW, Factors, fitted, pack_named, read_rows, unpack_named, whole, with_stats
from models.ranker import LAST, Calibration, Ranker
from models.rows import LEARNT, Rows
from models.values import Values

STATE_ROW: Final = np.dtype(
    [
        ("version", "u1"), ("form", "u1"), ("check", "u2"), ("bias", "<f4"), ("square", "<f4"), ("bias_square", "<f4"),
        ("vector", "<f4", (DIM,)), ("weights", "<f8", (GRID,)), ("cells", "<i4", (GRID,)),
    ]
)  # fmt: skip
"""A row as the learner stores it, 368 B: version 1, form 2; check of the id (0: not known), vector, squares, counts."""

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
STATE_FORM: Final = 2


class Model:
    """Learnt weights aligned to shared rows.

    factors: `Factors`; ranker: `Ranker`; calibration: `Calibration` of its scores; last_layer: `LastLayer` over what
    its network's last layer sees; values: `Values`; mixture f64[8], the weights of the eight popularities in the prior;
    step: int.
    """

    def __init__(self, *, rows: Rows) -> None:
        self.rows = rows
        self.factors = Factors(rows=rows)
        self.ranker = Ranker()
        self.values = Values(rows=rows)
        self.calibration = Calibration()
        self.last_layer = LastLayer(width=LAST)
        self.mixture: F64 = np.full(GRID, 1.0 / GRID)
        self.step = 0

    def dense(self) -> dict[str, Any]:
        """Return everything that is not per item, by name."""
        factors = self.factors
        return {
            "step": self.step, "mixture": self.mixture, "positions": factors.positions, "start": factors.start,
            "both": factors.both, **self.values.state(), **self.ranker.state(),
            **self.calibration.state(), **self.last_layer.state(),
        }  # fmt: skip

    def set_dense(self, values: dict[str, Any]) -> None:
        """Copy named values into the weights; of ranker and values, what was not stored keeps its birth value.

        Raises CodecError where one is missing or of another shape, and changes nothing then.
        """
        factors = self.factors
        targets: dict[str, NDArray[Any]] = {
            "mixture": self.mixture, "positions": factors.positions, "start": factors.start, "both": factors.both,
        }  # fmt: skip
        step, found = whole(values, "step"), {name: fitted(values, name, to) for name, to in targets.items()}
        ranker, judging = self.ranker.read_state(values), self.values.read_state(values)
        calibration, last_layer = self.calibration.read_state(values), self.last_layer.read_state(values)
        self.step = step
        for name, target in targets.items():
            target[...] = found[name]
        self.ranker.set_state(ranker)
        self.values.set_state(judging)
        self.calibration.numbers[:] = calibration
        self.last_layer.set_state(last_layer)

    def dense_bytes(self) -> bytes:
        """Pack everything that is not per item."""
        return pack_named(self.dense())

    def load_dense(self, data: bytes) -> None:
        """Read `dense_bytes`, or a learner's dense state, of which this is a part; raises CodecError."""
        values = unpack_named(data)
        try:
            self.set_dense(values)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise CodecError(f"dense weights: {type(error).__name__}: {error}") from error

    def pack_rows(self, rows: I64) -> list[bytes]:
        """Return what scoring needs of these rows: 136 B each, 168 B where an item has statistics."""
        return with_stats(self.factors.pack_rows(rows), self.values.stats[rows])

    def grow(self) -> None:
        """Follow the shared rows."""
        self.factors.grow()
        self.values.grow()

    def remove(self, keys: U64) -> None:
        """Forget what was learnt of the items with these hashes u64[k]."""
        rows = np.unique(self.rows.find(keys))
        rows = rows[rows >= 0]
        self.grow()
        self.factors.forget(rows)
        self.values.forget(rows)
        self.rows.release(rows, LEARNT)

    def load_rows(self, keys: U64, blobs: list[bytes]) -> I64:
        """Set rows of `keys` u64[k] from either row form and return them; raises CodecError."""
        form = STATE_FORM if blobs and blobs[0][1:2] == bytes([STATE_FORM]) else 1
        values = read_rows(blobs, STATE_ROW if form == STATE_FORM else ROW, form=form)
        rows = self.rows.add(keys)
        self.rows.hold(rows, LEARNT)
        self.grow()
        self.factors.bias[rows], self.factors.vectors[rows] = values["bias"], values["vector"]
        self.values.stats[rows] = values["stats"]
        return rows
