"""Off-policy evaluation: what another policy would have earned, told from a log with true propensities.

Arrays in, figures with intervals out: replay, IPS, SNIPS, clipped IPS, doubly robust. Every estimator is a ratio of
sums over rows, sum a / sum b, so that value, variance and all intervals are written once. Knows nothing of where a log
comes from, nor of how a policy's probabilities were made. Rewards lie in [0, top]; others are to be scaled by the
caller.

The headline interval is a gamma interval, for clicks are rare: the sampling distribution of a weighted count of few
events is skewed, so normal and bootstrap intervals end too low (measured: `freshet bench ope`, DECISIONS.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Interval = tuple[float, float]

ESTIMATORS: Final = ("replay", "ips", "snips", "clipped", "dr")
HEADLINE: Final = "snips"
"""What a verdict is made of: as true as IPS, insensitive to a constant error of the propensities, needs no model."""
FEWEST: Final = 500.0
"""Below this effective sample size there is no number, only `no overlap`."""
AGREES, DISAGREES, NO_OVERLAP = "agrees", "disagrees", "no overlap"


class OpeError(ValueError):
    """A log that cannot be evaluated: where, what was expected, what came, what to do."""


@dataclass(frozen=True, slots=True)
class Logged:
    """Rows of a log as arrays of one length n, checked when made; raises OpeError.

    reward: f64[n] in [0, top]; logging: probability f64[n] in (0, 1] with which the logging policy showed the row's
    item (given its position); evaluation: the evaluation policy's, f64[n] in [0, 1]; model, expected: for doubly robust
    only, a reward model's prediction for the row's item and its mean under the evaluation policy, f64[n] in [0, top],
    each from a fit that did not see the row (cross-fitting); cluster: i64[n], rows that belong together and are drawn
    together: a slate, a user.
    """

    reward: F64
    logging: F64
    evaluation: F64
    model: F64 | None = None
    expected: F64 | None = None
    cluster: I64 | None = None
    top: float = 1.0

    def __post_init__(self) -> None:
        n = len(self.reward)
        if not n:
            raise OpeError("log: expected at least one row, got none")
        if (self.model is None) != (self.expected is None):
            raise OpeError("doubly robust: expected both model and expected, got one of them")
        bounds = {"reward": (0.0, self.top), "logging": (0.0, 1.0), "evaluation": (0.0, 1.0),
                  "model": (0.0, self.top), "expected": (0.0, self.top)}  # fmt: skip
        for name, (least, most) in bounds.items():
            values: F64 | None = getattr(self, name)
            if values is None:
                continue
            if values.shape != (n,):
                raise OpeError(f"{name}: expected {n} values, one a row, got shape {values.shape}")
            # a hair above the bound is rounding of what sums to it, not a wrong probability
            wrong = ~((values >= least) & (values <= most * (1.0 + 1e-9)))
            if name == "logging":
                wrong |= values == 0.0
            if wrong.any():
                where = int(np.argmax(wrong))
                wanted = f"{'(' if name == 'logging' else '['}{least:g}, {most:g}]"
                raise OpeError(f"{name}: expected values in {wanted}, got {values[where]!r} in row {where}")
        if self.cluster is not None and self.cluster.shape != (n,):
            raise OpeError(f"cluster: expected {n} ids, one a row, got shape {self.cluster.shape}")

    @property
    def weight(self) -> F64:
        """Importance weights evaluation / logging, f64[n]."""
        return self.evaluation / self.logging


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far a log can speak for the evaluation policy.

    effective_sample_size: (sum w)^2 / sum w^2 (Kish: Survey Sampling, 1965), w summed over clusters; mean_weight: 1 up
    to noise where all is supported; unsupported: share of what the evaluation policy shows that the log never shows;
    clipped: share of weight above `clip`, at most by which (times top) clipped IPS is too low; warnings: for people.
    """

    effective_sample_size: float
    largest_weight: float
    mean_weight: float
    unsupported: float
    clip: float
    clipped: float
    warnings: tuple[str, ...]

    @property
    def enough(self) -> bool:
        """Whether estimates may be shown."""
        return self.effective_sample_size >= FEWEST


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimator's value with its intervals at one level.

    low, high: the headline one (`gamma_interval`); cautious: the same with the largest weight as jump, which also holds
    where most clicks lie on what the log hardly shows; bootstrap: percentiles over clusters; bernstein: holds for every
    n if no weight can exceed `bernstein_bound`; variance: of the value (delta method); rows: those that it used.
    """

    value: float
    low: float
    high: float
    variance: float
    cautious: Interval
    bootstrap: Interval
    bernstein: Interval
    bernstein_bound: float
    rows: int


@dataclass(frozen=True, slots=True)
class _Terms:
    """An estimator as sum a / sum b: a, b f64[n]; weight f64[n] of a reward; spread: upper - lower bound of a."""

    a: F64
    b: F64
    weight: F64
    spread: float
    bound: float
    cluster: I64 | None


def overlap(logged: Logged, *, clip: float | None = None, unsupported: float | None = None) -> Overlap:
    """Return what can be said of the log's support, with warnings; `unsupported` where the caller knows it.

    Otherwise it is 1 - mean w, where that is beyond two standard errors.
    """
    w, n = logged.weight, len(logged.reward)
    limit = _clip(logged, clip)
    mean = float(w.mean())
    error = float(w.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    missing = (max(0.0, 1.0 - mean) if mean + 2.0 * error < 1.0 else 0.0) if unsupported is None else unsupported
    ess = _kish(_sums(w, logged.cluster))
    clipped = float((w - np.minimum(w, limit)).sum() / w.sum()) if w.sum() > 0.0 else 0.0
    told = []
    if ess < FEWEST:
        told.append(f"effective sample size {ess:,.0f} of {n:,} rows, below {FEWEST:g}: these rows say nothing certain")
    if missing > 0.01:
        told.append(
            f"{missing:.1%} of what the evaluation policy shows was never shown in the log: estimates leave it out"
        )
    if w.max() * 20 > w.sum():
        told.append(f"one row has {w.max() / w.sum():.0%} of all weight ({w.max():,.0f}): the estimate hangs on it")
    if abs(mean - 1.0) > max(3.0 * error, 0.01 + missing):
        told.append(f"weights average {mean:.3f}, expected 1 +- {error:.3f}: propensities may not be what was logged")
    return Overlap(ess, float(w.max()), mean, missing, limit, clipped, tuple(told))


def value(name: str, logged: Logged, *, clip: float | None = None) -> float:
    """Return an estimator's value alone; `replay`, which draws rows, is not among them."""
    if name == "replay":
        raise OpeError("replay draws rows: ask estimate() for it")
    terms = _terms(name, logged, clip, None, None)
    total = float(terms.b.sum())
    return float(terms.a.sum()) / total if total > 0.0 else 0.0


def estimate(
    name: str, logged: Logged, *, rng: np.random.Generator, clip: float | None = None,
    weight_bound: float | None = None, extra_variance: float = 0.0, level: float = 0.95, draws: int = 1000,
) -> Estimate:  # fmt: skip
    """Return one of ESTIMATORS with its intervals.

    replay   rows accepted with probability w / max w are draws of the evaluation policy (Li, Chu, Langford, Wang: WSDM
             2011; for a uniform log and a deterministic policy it is their method, else rejection sampling)
    ips      sum w r / n (Horvitz and Thompson 1952)
    snips    sum w r / sum w (Swaminathan and Joachims: NIPS 2015); bias O(1/n)
    clipped  sum min(w, clip) r / n: biased downwards, by at most top x the clipped share of weight; clip: sqrt(n) by
             default (Ionides: JCGS 2008), at which the bias fades as n grows
    dr       sum (expected + w (r - model)) / n (Dudik, Langford, Li: ICML 2011)

    weight_bound: what no weight can exceed, for the Bernstein interval; by default the largest one in the log, which
    the next row may exceed. extra_variance: of a value whose evaluation probabilities are themselves estimated.
    """
    terms = _terms(name, logged, clip, weight_bound, rng)
    return _estimate(terms, logged.top, rng, extra_variance, level, draws)


def on_policy(
    reward: F64, *, rng: np.random.Generator, cluster: I64 | None = None, top: float = 1.0, level: float = 0.95,
    draws: int = 1000,
) -> Estimate:  # fmt: skip
    """Return the mean of rewards f64[n] that the policy in question earned itself, with the same intervals."""
    ones = np.ones(len(reward))
    logged = Logged(reward, ones, ones, cluster=cluster, top=top)
    return estimate("ips", logged, rng=rng, level=level, draws=draws)


def difference(first: Estimate, second: Estimate) -> Interval:
    """Return the interval of first - second, of independent logs, from the intervals of both; noise of both is in it.

    low = d - sqrt((v1 - low1)^2 + (high2 - v2)^2), high likewise: keeps their skew, which a common standard error
    loses.
    Zou and Donner: Construction of confidence limits about effect measures (Statistics in Medicine 27, 2008), "MOVER".
    """
    d = first.value - second.value
    return (
        d - math.hypot(first.value - first.low, second.high - second.value),
        d + math.hypot(first.high - first.value, second.value - second.low),
    )


def detectable(ends: Interval, *, level: float = 0.95, power: float = 0.8) -> float:
    """Return the smallest true difference that such data find with this power, from the interval of a difference.

    (1 + z' / z) x half its width: (z + z') standard errors where it is symmetric (Lehr: Statistics in Medicine 11,
    1992); where it is skewed its width says more than a standard error of few clicks.
    """
    return (1.0 + _z(power) / _z((1.0 + level) / 2.0)) * (ends[1] - ends[0]) / 2.0


def verdict(seen: Overlap, ends: Interval | None) -> str:
    """Return AGREES where the interval of the difference holds 0, DISAGREES, or NO_OVERLAP."""
    if not seen.enough or ends is None:
        return NO_OVERLAP
    return AGREES if ends[0] <= 0.0 <= ends[1] else DISAGREES


def gamma_interval(value: float, variance: float, jump: float, level: float = 0.95) -> Interval:
    """Return the interval of a weighted count of rare events, value >= 0.

    low is a quantile of the gamma distribution of mean `value` and this variance, high of that of mean value + jump and
    variance + jump^2: what would be were one more event to come. For jump = value / count it is the exact Poisson
    interval. Fay and Feuer: Confidence intervals for directly standardized rates (Statistics in Medicine 16, 1997) take
    the largest weight as jump, which is `cautious` and up to ten times wider; the headline takes the mean weight under
    the evaluation policy, sum w^2 / sum w, in the spirit of Tiwari, Clegg, Zou (Statistical Methods in Medical
    Research 15, 2006), who take the mean one.

    >>> low, high = gamma_interval(0.005, 0.005 / 10_000, 1 / 10_000)    # 50 clicks of 10,000: 37.1 and 65.9
    >>> round(low * 10_000, 1), round(high * 10_000, 1)
    (37.1, 65.9)
    """
    tail = (1.0 - level) / 2.0
    at = max(value, 0.0)
    low = _gamma_quantile(tail, at, variance) if at > 0.0 else 0.0
    return min(low, value), _gamma_quantile(1.0 - tail, at + jump, variance + jump * jump)


def bernstein_interval(values: F64, spread: float, level: float = 0.95) -> Interval:
    """Return the interval of the mean of independent values f64[n] whose range is `spread`; valid for every n.

    mean -+ (sqrt(2 V ln(4/d) / n) + 7 spread ln(4/d) / (3 (n - 1))), d = 1 - level, both sides together.
    Maurer and Pontil: Empirical Bernstein bounds and sample variance penalization (COLT 2009), theorem 4.
    """
    n, mean = len(values), float(values.mean())
    if n < 2:
        return -math.inf, math.inf
    log = math.log(4.0 / (1.0 - level))
    half = math.sqrt(2.0 * float(values.var(ddof=1)) * log / n) + 7.0 * spread * log / (3.0 * (n - 1))
    return mean - half, mean + half


def cross_fitted_rates(cell: I64, stratum: I64, reward: F64, fold: I64, *, strength: float = 100.0) -> F64:
    """Return mean rewards f64[folds, cells], each from the rows outside its fold: a reward model for doubly robust.

    cell: i64[n] of each row (item and position); stratum: i64[cells] of each cell (position), towards whose mean few
    rows are drawn: (sum r + strength x mean of stratum) / (count + strength).
    Cross-fitting: Chernozhukov et al., Econometrics Journal 21 (2018).
    """
    cells, strata, folds = len(stratum), int(stratum.max()) + 1, int(fold.max()) + 1
    out = np.empty((folds, cells))
    for f in range(folds):
        seen = fold != f
        count = np.bincount(cell[seen], minlength=cells)
        total = np.bincount(cell[seen], reward[seen], minlength=cells)
        rows = np.bincount(stratum, count, minlength=strata)
        mean = np.bincount(stratum, total, minlength=strata) / np.maximum(rows, 1.0)
        out[f] = (total + strength * mean[stratum]) / (count + strength)
    return out


def _gamma_quantile(p: float, mean: float, variance: float) -> float:
    if variance <= 0.0:
        return mean
    return float(gammaincinv(mean * mean / variance, p)) * variance / mean


def _z(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def _clip(logged: Logged, clip: float | None) -> float:
    if clip is not None and not clip > 0.0:
        raise OpeError(f"clip: expected a weight above 0, got {clip!r}")
    return math.sqrt(len(logged.reward)) if clip is None else clip


def _terms(
    name: str, logged: Logged, clip: float | None, weight_bound: float | None, rng: np.random.Generator | None
) -> _Terms:
    w, r, top = logged.weight, logged.reward, logged.top
    ones, bound = np.ones(len(r)), float(w.max())
    if weight_bound is not None:
        if weight_bound < bound:
            raise OpeError(f"weight_bound: expected at least the largest weight, {bound:g}, got {weight_bound:g}")
        bound = weight_bound
    match name:
        case "ips":
            return _Terms(w * r, ones, w, bound * top, bound, logged.cluster)
        case "snips":
            return _Terms(w * r, w, w, bound * top, bound, logged.cluster)
        case "clipped":
            limit = _clip(logged, clip)
            cut = np.minimum(w, limit)
            return _Terms(cut * r, ones, cut, min(bound, limit) * top, min(bound, limit), logged.cluster)
        case "dr":
            if logged.model is None or logged.expected is None:
                raise OpeError(
                    "doubly robust: expected predictions of a reward model, got none; give model and expected"
                )
            most = max(float(logged.model.max()), float(logged.expected.max()))
            a = logged.expected + w * (r - logged.model)
            return _Terms(a, ones, w, bound * (top + most) + most, bound, logged.cluster)
        case "replay":
            assert rng is not None
            kept = np.flatnonzero(rng.random(len(r)) * float(w.max()) < w)
            some = np.ones(len(kept))
            return _Terms(r[kept], some, some, top, 1.0, None if logged.cluster is None else logged.cluster[kept])
    raise OpeError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {name!r}")


def _estimate(
    terms: _Terms, top: float, rng: np.random.Generator, extra_variance: float, level: float, draws: int
) -> Estimate:
    a, b = _sums(terms.a, terms.cluster), _sums(terms.b, terms.cluster)
    total, n = float(b.sum()), len(b)
    if total <= 0.0:  # no weight at all: nothing is known but the range
        return Estimate(math.nan, 0.0, top, math.inf, (0.0, top), (0.0, top), (0.0, top), terms.bound, 0)
    at = float(a.sum()) / total
    variance = float(((a - at * b) ** 2).sum()) / total**2 * n / max(n - 1, 1) + extra_variance
    usual = float((terms.weight**2).sum()) / (float(terms.weight.sum()) or 1.0)
    (low, high), cautious = (
        gamma_interval(at, variance, top * weight / total, level) for weight in (usual, float(terms.weight.max()))
    )
    return Estimate(
        at, low, min(high, max(top, at)), variance, (cautious[0], min(cautious[1], max(top, at))),
        _bootstrap(a, b, rng, level, draws),
        _bernstein(a, b, terms, top, level), terms.bound, len(terms.a),
    )  # fmt: skip


def _sums(values: F64, cluster: I64 | None) -> F64:
    """Sums over clusters; each row is its own where there are none."""
    if cluster is None:
        return values
    _, of = np.unique(cluster, return_inverse=True)
    return np.bincount(of, values).astype(np.float64)


def _kish(w: F64) -> float:
    squares = float((w * w).sum())
    return float(w.sum()) ** 2 / squares if squares > 0.0 else 0.0


def _bootstrap(a: F64, b: F64, rng: np.random.Generator, level: float, draws: int) -> Interval:
    """Percentiles of sum a / sum b, clusters drawn again with replacement.

    Equal clusters are drawn as one cell of a multinomial: the same distribution, and few cells where rewards are rare.
    """
    cells, counts = np.unique(a + 1j * b, return_counts=True)
    share, out = counts / counts.sum(), []
    for start in range(0, draws, 100):
        drawn = rng.multinomial(len(a), share, size=min(100, draws - start)).astype(np.float64)
        below = drawn @ cells.imag
        out.append(np.divide(drawn @ cells.real, below, out=np.zeros(len(drawn)), where=below > 0.0))
    low, high = np.quantile(np.concatenate(out), ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)


def _bernstein(a: F64, b: F64, terms: _Terms, top: float, level: float) -> Interval:
    """Of the mean per row; a denominator that varies shares the error probability: both ends hold together."""
    n, rows = len(a), len(terms.a)
    most = rows if terms.cluster is None else int(np.bincount(np.unique(terms.cluster, return_inverse=True)[1]).max())
    size = 1 if terms.cluster is None else most  # rows of the largest cluster: its sum's range is that much wider
    constant = float(terms.b.min()) == float(terms.b.max()) == 1.0
    shared = level if constant else (1.0 + level) / 2.0
    scale = n / rows
    low, high = (end * scale for end in bernstein_interval(a, terms.spread * size, shared))
    if not constant:
        below, above = (end * scale for end in bernstein_interval(b, terms.bound * size, shared))
        low, high = max(low, 0.0) / above, high / below if below > 0.0 else top
    return max(low, 0.0), min(high, top)
