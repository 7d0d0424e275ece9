"""Full-catalogue ranks and what is made of them, calibration, bootstrap over users. Knows nothing about models.

A target's rank is the number of items above it plus half of those that tie with it (0 = first, inf = not retrieved): a
model that scores everything alike gets the middle, not the top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def mid_rank(scores: F64 | NDArray[np.float32], place: int) -> float:
    """Return the 0-based mid-rank of `place` among scores [m].

    >>> mid_rank(np.array([1.0, 3.0, 1.0]), 0)
    1.5
    """
    mine = scores[place]
    return float((scores > mine).sum() + 0.5 * ((scores == mine).sum() - 1))


def hit_rate(ranks: F64, k: int = 10) -> F64:
    """Return 1 where the target is among the first k, else 0, for ranks f64[n]."""
    return (ranks < k).astype(np.float64)


def ndcg(ranks: F64, k: int = 10) -> F64:
    """Return 1 / log2(rank + 2) within the first k, else 0, for ranks f64[n] (0-based)."""
    return np.where(ranks < k, 1.0 / np.log2(np.minimum(ranks, k) + 2.0), 0.0)


def mrr(ranks: F64, k: int = 10) -> F64:
    """Return 1 / (rank + 1) within the first k, else 0, for ranks f64[n] (0-based)."""
    return np.where(ranks < k, 1.0 / (np.minimum(ranks, k) + 1.0), 0.0)


def summary(ranks: F64, k: int = 10) -> dict[str, float]:
    """Return the means of all three over ranks f64[n]; zeros for none."""
    if not len(ranks):
        return {f"hit_rate@{k}": 0.0, f"ndcg@{k}": 0.0, f"mrr@{k}": 0.0}
    return {
        f"hit_rate@{k}": float(hit_rate(ranks, k).mean()),
        f"ndcg@{k}": float(ndcg(ranks, k).mean()),
        f"mrr@{k}": float(mrr(ranks, k).mean()),
    }


def auc(scores: F64, liked: NDArray[np.bool_]) -> float:
    """Return the share of pairs (liked, not liked) of which the liked one scores higher, ties one half; scores f64[n].

    nan where there is no such pair.

    >>> auc(np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False]))
    0.625
    """
    positive, negative = int(liked.sum()), int((~liked).sum())
    if not positive or not negative:
        return float("nan")
    _, of, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - 0.5 * (counts - 1.0)  # mean 1-based rank of each distinct score
    return float((ranks[of][liked].sum() - 0.5 * positive * (positive + 1)) / (positive * negative))


def user_auc(scores: F64, liked: NDArray[np.bool_], users: I64) -> tuple[float, int]:
    """Return the mean of the users' own `auc`, users i64[n] who have both kinds, and how many those are."""
    order = np.argsort(users, kind="stable")
    cuts = np.flatnonzero(np.diff(users[order])) + 1
    found = np.array([auc(scores[part], liked[part]) for part in np.split(order, cuts) if len(part)])
    found = found[~np.isnan(found)]
    return (float(found.mean()) if len(found) else float("nan")), len(found)


def calibration(slates: Sequence[tuple[F64, F64]], bins: int = 20) -> dict[str, Any]:
    """Return how true the probabilities of shown items came: slates of (probabilities f64[k], chosen f64[k], 1 or 0).

    ece: sum over bins of equal mass of their share x |mean probability - share chosen|; log_loss: mean, in nats; of
    each bin what was predicted and what was chosen. None where there is nothing.
    Naeini, Cooper, Hauskrecht: Obtaining well calibrated probabilities using Bayesian binning (AAAI 2015).
    """
    p, chosen = (np.concatenate([np.empty(0), *(slate[i] for slate in slates)]) for i in (0, 1))
    if not len(p):
        return {"shown": 0, "chosen_share": None, "ece": None, "log_loss": None, "bins": []}
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    table = [{"predicted": float(p[part].mean()), "chosen": float(chosen[part].mean())} for part in parts]
    ece = sum(
        len(part) / len(p) * abs(row["predicted"] - row["chosen"]) for part, row in zip(parts, table, strict=True)
    )
    sure = np.clip(p, 1e-12, 1.0 - 1e-12)
    loss = -(chosen * np.log(sure) + (1.0 - chosen) * np.log1p(-sure)).mean()
    return {
        "shown": len(p), "chosen_share": float(chosen.mean()), "ece": float(ece), "log_loss": float(loss),
        "bins": table,
    }  # fmt: skip


def user_bootstrap(
    values: F64, users: I64, rng: np.random.Generator, *, draws: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Return the interval of the mean of values f64[n] when whole users i64[n] are drawn again with replacement.

    Paired comparisons pass the differences of two systems on the same events. (nan, nan) for no values.
    """
    if not len(values):
        return (float("nan"), float("nan"))
    _, of = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(of, values), np.bincount(of).astype(np.float64)
    means = np.empty(draws)
    for i in range(draws):
        picked = rng.integers(0, len(sums), len(sums))
        means[i] = sums[picked].sum() / counts[picked].sum()
    low, high = np.quantile(means, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)
