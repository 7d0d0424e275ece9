"""One policy's log judged by another's probabilities, beside what that one earned in its own log.

Arrays in, a report out; knows nothing of files and terminals. `judge` takes any `ope.Logged` (one's own slates with a
candidate's probabilities too); `compare` makes one of two logs of bandits, the evaluation policy being how often the
target log shows each item at each position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infra.evaluating.open_bandit import BanditLog
from models import ope

F64 = NDArray[np.float64]
FOLDS: Final = 5
"""Of cross-fitting."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What the estimators say of a log; without overlap there are no estimates."""

    overlap: ope.Overlap
    estimates: dict[str, ope.Estimate]
    left_out: dict[str, str]


def judge(
    logged: ope.Logged, *, rng: np.random.Generator, clip: float | None = None, unsupported: float | None = None,
    estimators: Sequence[str] = ope.ESTIMATORS, extra_variance: dict[str, float] | None = None, draws: int = 1000,
) -> Judged:  # fmt: skip
    """Return the estimates that the log supports, and why the others are left out."""
    seen = ope.overlap(logged, clip=clip, unsupported=unsupported)
    found, left_out = dict[str, ope.Estimate](), dict[str, str]()
    for name in estimators:
        if not seen.enough:
            left_out[name] = f"effective sample size {seen.effective_sample_size:.0f}, expected {ope.FEWEST:g} or more"
        elif name == "dr" and logged.model is None:
            left_out[name] = "no reward model"
        else:
            extra = (extra_variance or {}).get(name, 0.0)
            told = ope.estimate(name, logged, rng=rng, clip=clip, extra_variance=extra, draws=draws)
            if told.rows < ope.FEWEST:
                left_out[name] = f"{told.rows} rows match, expected {ope.FEWEST:g} or more"
            else:
                found[name] = told
    return Judged(seen, found, left_out)


def frequencies(log: BanditLog, positions: int, items: int, counts: F64 | None = None) -> F64:
    """Return how often each item was shown at each position, f64[positions, items], each position summing to 1 (or 0).

    counts f64[n]: how often each row is taken, for the bootstrap.
    """
    shown = np.bincount(log.position * items + log.item, counts, minlength=positions * items).reshape(positions, items)
    shares: F64 = shown / np.maximum(shown.sum(axis=1, keepdims=True), 1.0)
    return shares


class Source:
    """The log that is judged: its rows as `ope.Logged` under any policy f64[positions, items]."""

    def __init__(self, log: BanditLog, positions: int, items: int, rng: np.random.Generator) -> None:
        self.log, self.items = log, items
        self.cell = log.position * items + log.item
        self.shown = np.bincount(self.cell, minlength=positions * items).reshape(positions, items)
        self.fold = rng.permutation(len(self.cell)) % min(FOLDS, len(self.cell))
        stratum = np.repeat(np.arange(positions), items)
        self.rates = ope.cross_fitted_rates(self.cell, stratum, log.click, self.fold).reshape(-1, positions, items)
        model = self.rates[self.fold, log.position, log.item]
        zero = np.zeros(len(self.cell))
        self.plain = ope.Logged(log.click, log.propensity, zero, model, zero, log.slate)

    def under(self, policy: F64) -> ope.Logged:
        """Return the rows with this policy's probabilities."""
        expected = (self.rates * policy).sum(axis=2)[self.fold, self.log.position]
        return replace(self.plain, evaluation=policy.ravel()[self.cell], expected=np.minimum(expected, 1.0))

    def unsupported(self, policy: F64) -> float:
        """Return the share of what this policy shows, positions as in the log, that the log never shows there."""
        rows = self.shown.sum(axis=1)
        return float(((policy * (self.shown == 0)).sum(axis=1) * rows).sum() / rows.sum())


def compare(
    source: BanditLog, target: BanditLog, *, seed: int = 1, clip: float | None = None,
    estimators: Sequence[str] = ope.ESTIMATORS, draws: int = 1000, policy_draws: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Estimate the target policy's click rate from the source's log, and hold it against the target's own; a report.

    draws: of the bootstrap of each estimate; policy_draws: of the target log, for the noise of its frequencies.
    """
    rng = np.random.default_rng(seed)
    positions = int(max(source.position.max(), target.position.max())) + 1
    items = int(max(source.item.max(), target.item.max())) + 1
    rows = Source(source, positions, items, rng)
    policy = frequencies(target, positions, items)
    logged = rows.under(policy)
    names = [name for name in estimators if name != "replay"]
    noise = _policy_noise(rows, target, policy.shape, clip, names, policy_draws, rng)
    judged = judge(
        logged, rng=rng, clip=clip, unsupported=rows.unsupported(policy), estimators=estimators,
        # replay accepts rows by the same weights that SNIPS takes means with
        extra_variance=noise | {"replay": noise.get("snips", 0.0)}, draws=draws,
    )  # fmt: skip
    own = ope.on_policy(target.click, rng=rng, cluster=target.slate, draws=draws)
    return {"from": source.policy, "to": target.policy, **_report(judged, own, noise), "logged": {
        "from": _counts(source), "to": _counts(target),
    }}  # fmt: skip


def _policy_noise(
    rows: Source, target: BanditLog, shape: tuple[int, ...], clip: float | None, names: Sequence[str], draws: int,
    rng: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """Variance of each value for the target's frequencies are themselves estimates: bootstrap of the target log."""
    n, values = len(target.item), {name: list[float]() for name in names}
    for _ in range(draws):
        taken = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        logged = rows.under(frequencies(target, shape[0], shape[1], taken))
        for name in names:
            values[name].append(ope.value(name, logged, clip=clip))
    return {name: float(np.var(found, ddof=1)) for name, found in values.items()}


def _report(judged: Judged, own: ope.Estimate, noise: dict[str, float]) -> dict[str, Any]:
    seen, found = judged.overlap, judged.estimates
    ends = {name: ope.difference(told, own) for name, told in found.items()}
    head = ends.get(ope.HEADLINE)
    least = None if head is None else ope.detectable(head)
    nothing = {"value": None, "low": None, "high": None}
    return {
        "verdict": ope.verdict(seen, ends.get(ope.HEADLINE)),
        "headline": ope.HEADLINE,
        "level": 0.95,
        "effective_sample_size": seen.effective_sample_size,
        "estimates": {name: estimate_report(told, noise.get(name)) for name, told in found.items()}
        | {name: {**nothing, "reason": why} for name, why in judged.left_out.items()},
        "on_policy": estimate_report(own, None),
        "difference": {
            name: {
                "value": found[name].value - own.value, "low": low, "high": high,
                "verdict": ope.verdict(seen, (low, high)),
            }
            for name, (low, high) in ends.items()
        } | {name: {**nothing, "reason": why} for name, why in judged.left_out.items()},
        "detectable": {
            "difference": least, "relative": least / own.value if least is not None and own.value > 0.0 else None,
            "power": 0.8,
        },
        "overlap": {
            "largest_weight": seen.largest_weight, "mean_weight": seen.mean_weight, "unsupported": seen.unsupported,
            "clip": seen.clip, "clipped": seen.clipped, "warnings": list(seen.warnings),
        },
    }  # fmt: skip


def estimate_report(told: ope.Estimate, policy_variance: float | None) -> dict[str, Any]:
    """Return an estimate as plain values; policy_variance: the part of its variance from estimated frequencies."""
    out: dict[str, Any] = {
        "value": told.value, "low": told.low, "high": told.high, "rows": told.rows,
        "standard_error": told.variance**0.5, "cautious": list(told.cautious),
        "bootstrap": list(told.bootstrap), "bernstein": list(told.bernstein),
        "bernstein_bound": told.bernstein_bound,
    }  # fmt: skip
    if policy_variance is not None:
        out["policy_variance_share"] = policy_variance / told.variance if told.variance > 0.0 else 0.0
    return out


def _counts(log: BanditLog) -> dict[str, Any]:
    return {
        "rows": len(log.click), "clicks": int(log.click.sum()), "click_rate": float(log.click.mean()),
        "slates": int(log.slate.max()) + 1,
    }  # fmt: skip
