"""What another epsilon would have drawn from the scores that a log was served with.

A replay learns the moment an event came, the learner that served a moment later: near ties fall otherwise, and where
the best item differs an epsilon log says nothing of it. Where only the drawing changes, the log itself says which item
was the best one: a slot has the probability u / R + f [exploring] / E, or 1 - u - f more (models/bandit/policy.py). So
the replay gives R and E alone, in which the ratio hardly moves. Knows nothing of files.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from infra.settings import Settings
from models.bandit import Policy, shares
from models.items import Items
from models.recommend import Slate, exploring
from models.retrieval import NOT_FOUND

F64 = NDArray[np.float64]
REDRAWN: Final = ("greedy", "epsilon")
"""Policies that draw from one score."""
RANKS: Final = ("event_weights", "head_weights", "rewards", "feature_share", "seed")


def only_draws(present: Settings, candidate: Settings, surface: str) -> bool:
    """Return whether a candidate ranks as the present settings do, and both draw from one score."""
    same = all(getattr(present, name) == getattr(candidate, name) for name in RANKS)
    return same and present.policy_of(surface) == "epsilon" and candidate.policy_of(surface) in REDRAWN


def redrawn(logged: F64, slate: Slate, items: Items, present: Settings, candidate: Settings) -> tuple[F64, F64]:
    """Return the candidate's probabilities of the shown items f64[k] and what the present settings would have logged.

    logged f64[k]: the probabilities in the log; slate: the same one as a replay sees it.
    """
    outside = int((slate.places == NOT_FOUND).all(axis=1).sum())
    retrieved = slate.candidates[: len(slate.candidates) - outside]
    inside = np.isin(slate.items, retrieved)
    fresh = exploring(items, slate.rows).astype(np.float64)
    above = np.concatenate(([0.0], np.cumsum(inside)[:-1]))
    fresh_above = np.concatenate(([0.0], np.cumsum(fresh * inside)[:-1]))
    left = np.maximum(len(retrieved) - above, 1.0)
    unexplored = np.maximum(float(exploring(items, items.rows.find(retrieved)).sum()) - fresh_above, fresh)
    surface = slate.request.surface

    def parts(settings: Settings, policy: Policy) -> tuple[F64, F64]:
        u, first = shares(policy, settings.epsilon, settings.first_share)
        f = np.where(unexplored > 0.0, first, 0.0)
        return u / left + f * fresh / np.maximum(unexplored, 1.0), 1.0 - u - f

    chance, more = parts(present, "epsilon")
    best = logged > chance + 0.5 * more
    changed, changed_more = parts(candidate, "greedy" if candidate.policy_of(surface) == "greedy" else "epsilon")
    expected = chance + best * more
    return np.minimum(logged * ((changed + best * changed_more) / np.maximum(expected, 1e-12)), 1.0), expected
