"""The one weighted sum that orders candidates: what each head says of an item, times what a deployment thinks of it.

    score(y) = sum_h weight_h head_h(y)

`click` is the ranker's score (a log-odds within a list); `dwell` and `rating` are predicted values, `skip`, `hide` and
`low_rating` probabilities, all five from `models/values.py`. Elementwise along the items, so that an item's score does
not depend on the others. Knows nothing about how the heads came to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

HEADS: Final[tuple[tuple[str, float], ...]] = (
    ("click", 1.0),
    ("dwell", 0.0),
    ("rating", 0.0),
    ("skip", -6.0),
    ("hide", -10.0),
    ("low_rating", 0.0),
)
"""(name, default weight), in the order of the columns. A skip and a hide push away as their event weights are to each
other; where nobody ever did either, both probabilities are 0. Weights of the rest gained on one set at most."""
NAMES: Final = tuple(name for name, _ in HEADS)
CLICK: Final = NAMES.index("click")

F64 = NDArray[np.float64]


def head_weights(table: Iterable[tuple[str, float]] = ()) -> F64:
    """Return the weights f64[H] of a table of (head, weight); heads that it does not name keep their default.

    >>> head_weights([("hide", -2)]).tolist()
    [1.0, 0.0, 0.0, -6.0, -2.0, 0.0]
    """
    given = dict(HEADS)
    for name, weight in table:
        if name not in given:
            raise ValueError(f"head_weights: expected one of {', '.join(NAMES)}, got {name!r}")
        given[name] = float(weight)
    return np.array([given[name] for name in NAMES])


DEFAULT: Final = head_weights()


def parts(heads: F64, weights: F64) -> F64:
    """Return what each head adds to the score, f64[m, H], of heads f64[m, H] and weights f64[H]."""
    return heads * weights


def total(heads: F64, weights: F64) -> F64:
    """Return the scores f64[m]: each row's parts added up, without heads of no weight."""
    score: F64 = heads[:, CLICK] * weights[CLICK]
    for h in np.flatnonzero(weights).tolist():
        if h != CLICK:
            score += heads[:, h] * weights[h]
    return score
