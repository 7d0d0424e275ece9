"""What a reference is: a name, a way to run over the events, a small grid to be tuned on. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.proving.quality.events import Events

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Tell = Callable[[int], None]


@dataclass
class Result:
    """What a run noted: ranks f64[n], nan where not counted; scores f64[n] of each event's item before it is learnt;
    predictions f64[n] of ratings or labels, nan for none; told: what a reader should know.
    """

    ranks: F64
    scores: F64
    told: dict[str, Any] = field(default_factory=dict)
    predictions: F64 | None = None


@dataclass(frozen=True)
class Setup:
    """What a run is given beside its parameters: where models are fitted anew, the half-life (place in the grid) of
    the popularity to fall back on, whether learning ends with the first fit.
    """

    fits: I64
    half_life: int
    seed: int = 1
    frozen: bool = False
    tell: Tell = lambda done: None


@dataclass(frozen=True)
class Reference:
    """A method to compare with; grid: the parameters it is tuned over; fits: whether it is fitted anew in batches."""

    name: str
    about: str
    run: Callable[[Events, dict[str, Any], Setup], Result]
    grid: tuple[dict[str, Any], ...]
    fits: bool = False
    hindsight: bool = False
    frozen: bool = False
    tuned_as: str = ""
    """Name of the reference whose parameters it takes over."""
    needs: str = ""
    """`baskets`, `ratings`, `negatives`: left out where the log has none."""
    ranks: bool = True


def spans(events: Events, tell: Tell, pieces: int = 100) -> Iterator[tuple[int, int]]:
    """Yield [first, last) of about a hundred pieces of whole groups, telling how far it is."""
    if n := len(events):
        begins = events.start[np.linspace(0, n - 1, pieces + 1)[:-1].astype(np.int64)]
        for first, last in pairwise(np.unique(np.append(begins, n)).tolist()):
            yield first, last
            tell(last)
