"""Off-policy evaluation beside hand-worked examples, sums over all possible logs, closed forms, and obp where it is.

obp (Open Bandit Pipeline, `pip install freshet[ope]`) is no part of the development set, for it brings pandas and
scikit-learn; its test skips where it is absent. Nothing else here leans on it.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from infra.proving.coverage import MISMATCHES, _place, draw, measure, world
from models import ope

F64 = NDArray[np.float64]
BY_HAND = ope.Logged(
    reward=np.array([1.0, 0.0, 1.0, 0.0]),
    logging=np.array([0.5, 0.5, 0.2, 0.4]),
    evaluation=np.array([0.25, 1.0, 0.8, 0.4]),  # weights .5, 2, 4, 1
    model=np.array([0.5, 0.25, 0.5, 0.0]),
    expected=np.array([0.4, 0.3, 0.5, 0.2]),
)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def weighted_log(n: int = 4000, seed: int = 3, *, sigma: float = 0.7) -> ope.Logged:
    draws = np.random.default_rng(seed)
    return ope.Logged(
        (draws.random(n) < 0.02).astype(np.float64), np.full(n, 0.05),
        np.minimum(0.05 * np.exp(sigma * draws.standard_normal(n) - sigma**2 / 2), 1.0),
    )  # fmt: skip


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "clip", "by_hand"),
    [
        ("ips", None, (0.5 + 4.0) / 4),
        ("snips", None, (0.5 + 4.0) / (0.5 + 2.0 + 4.0 + 1.0)),
        ("clipped", 3.0, (0.5 + 3.0) / 4),
        ("clipped", None, (0.5 + 2.0) / 4),  # at the root of 4 rows
        ("dr", None, ((0.4 + 0.25) + (0.3 - 0.5) + (0.5 + 2.0) + 0.2) / 4),
    ],
)
def test_values_by_hand(name: str, clip: float | None, by_hand: float) -> None:
    assert ope.value(name, BY_HAND, clip=clip) == pytest.approx(by_hand)
    assert ope.estimate(name, BY_HAND, rng=rng(), clip=clip, draws=10).value == pytest.approx(by_hand)


def every_log(n: int) -> list[tuple[float, list[int], list[float]]]:
    """All logs of n rows with two items: probability, items, clicks."""
    cells = [(0.7 * 0.8, 0, 0.0), (0.7 * 0.2, 0, 1.0), (0.3 * 0.4, 1, 0.0), (0.3 * 0.6, 1, 1.0)]
    return [
        (math.prod(c[0] for c in rows), [c[1] for c in rows], [c[2] for c in rows])
        for rows in itertools.product(cells, repeat=n)
    ]


def test_expectation_over_every_possible_log_is_the_truth() -> None:
    """IPS and doubly robust (with a wrong model) are unbiased, clipped IPS too low by no more than it says."""
    logging, evaluation, rates, model = (np.array(x) for x in ([0.7, 0.3], [0.1, 0.9], [0.2, 0.6], [0.9, 0.3]))
    truth = float(evaluation @ rates)
    mean = dict.fromkeys(("ips", "dr", "clipped"), 0.0)
    for probability, items, clicks in every_log(3):
        log = ope.Logged(
            np.array(clicks), logging[items], evaluation[items], model[items], np.full(3, float(evaluation @ model))
        )
        for name in mean:
            mean[name] += probability * ope.value(name, log, clip=2.0)
    assert mean["ips"] == pytest.approx(truth, abs=1e-12)
    assert mean["dr"] == pytest.approx(truth, abs=1e-12)
    lost = float(evaluation[1] - 2.0 * logging[1])  # weight 3, clipped at 2
    assert mean["clipped"] == pytest.approx(truth - lost * rates[1])
    assert truth - lost <= mean["clipped"] < truth


def test_snips_does_not_see_a_constant_error_of_the_propensities_and_ips_does() -> None:
    log = weighted_log()
    wrong = replace(log, logging=log.logging * 0.5)
    assert ope.value("snips", wrong) == pytest.approx(ope.value("snips", log))
    assert ope.value("ips", wrong) == pytest.approx(2 * ope.value("ips", log))
    assert any("propensities" in warning for warning in ope.overlap(wrong).warnings)
    assert not ope.overlap(log).warnings


def test_replay_of_a_uniform_log_is_the_mean_of_the_rows_that_match() -> None:
    """Li et al. 2011: uniform log, deterministic policy: exactly the matching rows, whatever the random numbers."""
    draws = np.random.default_rng(0)
    item, reward = draws.integers(0, 5, 3000), (draws.random(3000) < 0.3).astype(np.float64)
    log = ope.Logged(reward, np.full(3000, 0.2), (item == 2).astype(np.float64))
    told = ope.estimate("replay", log, rng=rng())
    assert told.rows == (item == 2).sum()
    assert told.value == pytest.approx(reward[item == 2].mean())


def test_replay_of_any_log_draws_the_evaluation_policy() -> None:
    draws = np.random.default_rng(0)
    logging, evaluation = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    item = draws.choice(3, size=200_000, p=logging)
    log = ope.Logged((item == 1).astype(np.float64), logging[item], evaluation[item])
    told = ope.estimate("replay", log, rng=rng(), draws=10)
    assert told.rows == pytest.approx(200_000 / 5.0, rel=0.02)  # 1 / largest weight
    assert told.value == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / told.rows))


def test_cross_fitted_rates_by_hand() -> None:
    draws = np.random.default_rng(1)
    cell, reward, fold = draws.integers(0, 6, 300), draws.random(300), draws.integers(0, 3, 300)
    stratum = np.array([0, 0, 0, 1, 1, 1])
    rates = ope.cross_fitted_rates(cell, stratum, reward, fold, strength=10.0)
    for f, c in itertools.product(range(3), range(6)):
        mine = [r for r, k, g in zip(reward, cell, fold, strict=True) if g != f and k == c]
        around = [r for r, k, g in zip(reward, cell, fold, strict=True) if g != f and stratum[k] == stratum[c]]
        assert rates[f, c] == pytest.approx((sum(mine) + 10.0 * np.mean(around)) / (len(mine) + 10.0))


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clicks", [0, 1, 5, 46, 69])
def test_gamma_interval_of_unweighted_clicks_is_the_exact_poisson_one(clicks: int) -> None:
    """Garwood 1936, by chi-square quantiles; none of 10,000: 3.69 above."""
    low, high = ope.gamma_interval(clicks / 1e4, clicks / 1e8, 1e-4)
    assert low * 1e4 == pytest.approx(chi2.ppf(0.025, 2 * clicks) / 2 if clicks else 0.0)
    assert high * 1e4 == pytest.approx(chi2.ppf(0.975, 2 * clicks + 2) / 2)


def test_variance_is_that_of_repeated_logs() -> None:
    """The delta method, the spread of the bootstrap and the true spread over 400 logs agree."""
    draws = np.random.default_rng(5)
    rates, flat, policy = world("strong", draws)
    for name in ("ips", "snips", "dr"):
        values, variances, widths = [], [], []
        for _ in range(400):
            log = draw(flat, rates * 10, 4000, "flat", draws)
            logged = ope.Logged(
                log.click, log.propensity, policy[log.item], rates[log.item], np.full(4000, float(rates @ policy))
            )
            told = ope.estimate(name, logged, rng=draws, draws=200)
            values.append(told.value)
            variances.append(told.variance)
            widths.append(told.bootstrap[1] - told.bootstrap[0])
        spread = float(np.std(values))
        assert math.sqrt(np.mean(variances)) == pytest.approx(spread, rel=0.12)
        assert np.mean(widths) / (2 * 1.96) == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize("name", ["ips", "snips", "clipped"])
def test_rows_of_a_cluster_are_one_observation(name: str) -> None:
    """Every row twice in one cluster tells what the rows tell once; taken as separate rows it would tell more."""
    log = weighted_log()
    n = len(log.reward)
    reward, logging, evaluation = (np.repeat(x, 2) for x in (log.reward, log.logging, log.evaluation))
    twice = ope.Logged(reward, logging, evaluation)
    together = replace(twice, cluster=np.repeat(np.arange(n), 2))
    one, two, apart = (ope.estimate(name, x, rng=rng(), clip=20.0, draws=500) for x in (log, together, twice))
    assert two.value == pytest.approx(one.value)
    assert two.variance == pytest.approx(one.variance)
    assert two.bootstrap == pytest.approx(one.bootstrap)
    assert two.bernstein == pytest.approx(one.bernstein)
    assert apart.variance == pytest.approx(one.variance / 2, rel=0.01)
    assert ope.overlap(together).effective_sample_size == pytest.approx(ope.overlap(log).effective_sample_size)


def test_bernstein_interval_by_its_equation() -> None:
    values = np.array([0.0, 0.0, 1.0, 3.0])
    low, high = ope.bernstein_interval(values, 4.0, 0.9)
    log = math.log(4 / 0.1)  # two-sided: d / 2 each, 2 / (d / 2)
    half = math.sqrt(2 * 2.0 * log / 4) + 7 * 4.0 * log / (3 * 3)
    assert (low, high) == pytest.approx((1.0 - half, 1.0 + half))


def test_bernstein_bound_is_what_the_caller_knows() -> None:
    log = weighted_log()
    known = ope.estimate("ips", log, rng=rng(), weight_bound=50.0)
    assert known.bernstein_bound == 50.0
    assert known.bernstein[1] > ope.estimate("ips", log, rng=rng()).bernstein[1]
    with pytest.raises(ope.OpeError, match="at least the largest weight"):
        ope.estimate("ips", log, rng=rng(), weight_bound=1.0)


@settings(max_examples=60, deadline=None)
@given(
    clicks=st.lists(st.integers(0, 299), max_size=12, unique=True), sigma=st.floats(0.0, 2.0),
    seed=st.integers(0, 1000), name=st.sampled_from(ope.ESTIMATORS),
)  # fmt: skip
def test_intervals_hold_the_value_whatever_the_log(clicks: list[int], sigma: float, seed: int, name: str) -> None:
    log = weighted_log(300, seed, sigma=sigma)
    reward = np.zeros(300)
    reward[clicks] = 1.0
    log = replace(log, reward=reward, model=np.full(300, 0.01), expected=np.full(300, 0.01))
    told = ope.estimate(name, log, rng=np.random.default_rng(seed), draws=50)
    if told.rows:
        assert told.low <= told.value <= told.high <= told.cautious[1]
        assert told.bernstein[0] <= max(told.value, 0.0) <= told.bernstein[1]
        assert math.isfinite(told.high)
        assert told.high > 0.0  # no click seen is not a rate of 0


def test_difference_of_symmetric_intervals_is_the_textbook_one() -> None:
    def symmetric(value: float, half: float) -> ope.Estimate:
        return ope.Estimate(value, value - half, value + half, 0.0, (0, 0), (0, 0), (0, 0), 1.0, 1000)

    assert ope.difference(symmetric(0.5, 0.03), symmetric(0.4, 0.04)) == pytest.approx((0.05, 0.15))


@pytest.mark.slow
def test_coverage_of_the_headline_and_what_bootstraps_miss() -> None:
    """120 logs a setting with a known truth: `freshet bench ope` in small; bounds are four standard errors wide."""
    low = 0.95 - 4 * math.sqrt(0.95 * 0.05 / 120)
    report = measure(repetitions=120, rows=(2_000,), mismatches=MISMATCHES[:3], seed=3)
    for setting in report["settings"]:
        for name in ("ips", "snips", "dr"):
            row = setting["estimators"][name]
            assert row["headline"]["coverage"] >= low, (setting["mismatch"], name)
            assert row["bernstein"]["coverage"] >= row["headline"]["coverage"] - 0.02
    peaked = report["settings"][2]["estimators"]["snips"]
    assert peaked["bootstrap"]["coverage"] < 0.9 < peaked["headline"]["coverage"]
    assert peaked["bootstrap"]["above"] > peaked["bootstrap"]["below"]  # it ends too low
    # clicks where the log hardly looks: only the cautious one
    hidden = measure(repetitions=60, rows=(10_000,), mismatches=("hidden",))["settings"][0]["estimators"]["snips"]
    assert hidden["headline"]["coverage"] < 0.85
    assert hidden["cautious"]["coverage"] >= 0.9


def test_noise_of_both_logs_is_in_the_interval_of_a_difference() -> None:
    """Two logs of one policy differ by noise alone: the interval holds 0 in 95 %, either log's own would not."""
    draws = np.random.default_rng(2)
    flat = np.full(34, 1 / 34)
    held, alone = [], []
    for _ in range(400):
        first, second = (ope.on_policy(draw(flat, flat * 0.34, 5000, "", draws).click, rng=draws, draws=10)
                         for _ in range(2))  # fmt: skip
        held.append(_place(0.0, ope.difference(first, second)) == 0)
        alone.append(_place(second.value, (first.low, first.high)) == 0)
    assert 0.92 <= np.mean(held) <= 0.99
    assert np.mean(alone) < 0.9


# -- overlap ----------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    seen = ope.overlap(BY_HAND, clip=3.0, unsupported=0.25)
    assert seen.effective_sample_size == pytest.approx(7.5**2 / (0.25 + 4 + 16 + 1))
    assert (seen.largest_weight, seen.unsupported) == (4.0, 0.25)
    assert seen.clipped == pytest.approx(1.0 / 7.5)
    assert not seen.enough
    assert ope.verdict(seen, (-1.0, 1.0)) == ope.NO_OVERLAP
    said = " ".join(seen.warnings)
    assert "effective sample size 3 of 4" in said
    assert "25.0% of what the evaluation policy shows" in said
    assert "one row has 53% of all weight" in said


def test_what_was_never_shown_is_seen_in_the_weights() -> None:
    """The evaluation policy shows two items alike, the log only one of them: half of its weight is nowhere."""
    log = ope.Logged(np.zeros(2000), np.ones(2000), np.full(2000, 0.5))
    assert ope.overlap(log).unsupported == pytest.approx(0.5)
    assert ope.overlap(weighted_log()).unsupported == 0.0


def test_verdicts() -> None:
    seen = ope.overlap(weighted_log())
    assert seen.enough
    assert ope.verdict(seen, (-0.1, 0.2)) == ope.AGREES
    assert ope.verdict(seen, (0.1, 0.2)) == ope.DISAGREES
    assert ope.verdict(seen, None) == ope.NO_OVERLAP


def test_detectable_difference_is_found_in_four_of_five() -> None:
    draws = np.random.default_rng(4)

    def one(rate: float) -> ope.Estimate:
        return ope.on_policy((draws.random(20_000) < rate).astype(np.float64), rng=draws, draws=10)

    least = ope.detectable(ope.difference(one(0.02), one(0.02)))
    found = [_place(0.0, ope.difference(one(0.02 + least), one(0.02))) != 0 for _ in range(300)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.1)


# -- errors -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"logging": np.array([0.5, 0.0, 0.2, 0.4])}, r"logging: expected values in \(0, 1\], got .*0\.0.* in row 1"),
    ({"logging": np.array([0.5, 0.5, 1.5, 0.4])}, "logging: .* in row 2"),
    ({"evaluation": np.array([0.5, 0.5, 0.5, np.nan])}, "evaluation: .*nan.* in row 3"),
    ({"reward": np.array([-1.0, 0.0, 0.0, 0.0])}, r"reward: expected values in \[0, 1\]"),
    ({"evaluation": np.ones(3)}, "evaluation: expected 4 values, one a row"),
    ({"cluster": np.zeros(3, np.int64)}, "cluster: expected 4 ids"),
    ({"expected": None}, "both model and expected"),
    ({"reward": np.empty(0)}, "at least one row"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said[:24] for _, said in WRONG])
def test_errors_say_where_expected_and_got(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ope.OpeError, match=said):
        replace(BY_HAND, **change)


def test_errors_of_estimators() -> None:
    with pytest.raises(ope.OpeError, match="reward model"):
        ope.value("dr", weighted_log())
    with pytest.raises(ope.OpeError, match="expected one of replay, ips"):
        ope.value("magic", weighted_log())
    with pytest.raises(ope.OpeError, match="clip: expected a weight above 0"):
        ope.value("clipped", weighted_log(), clip=0.0)


# -- another implementation -------------------------------------------------------------------------------------------


def test_values_equal_those_of_open_bandit_pipeline() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # obp 0.4 is from 2021
        other = pytest.importorskip("obp.ope", reason="obp is not here: pip install freshet[ope]")
    draws = np.random.default_rng(8)
    n, items, positions = 5000, 12, 3
    logging = draws.dirichlet(np.ones(items), size=n)
    policy = draws.dirichlet(np.ones(items), size=positions)
    action = np.array([draws.choice(items, p=p) for p in logging])
    position = draws.integers(0, positions, n)
    reward = (draws.random(n) < 0.1).astype(np.float64)
    model = draws.random((n, items, positions))
    each = np.arange(n)
    pscore, action_dist = logging[each, action], np.repeat(policy.T[None], n, axis=0)
    log = ope.Logged(
        reward, pscore, policy[position, action], model[each, action, position],
        (model[each, :, position] * policy[position]).sum(axis=1),
    )  # fmt: skip
    given_them = {"reward": reward, "action": action, "pscore": pscore, "action_dist": action_dist,
                  "position": position}  # fmt: skip
    assert ope.value("ips", log) == pytest.approx(
        other.InverseProbabilityWeighting().estimate_policy_value(**given_them)
    )
    assert ope.value("snips", log) == pytest.approx(
        other.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**given_them)
    )
    assert ope.value("dr", log) == pytest.approx(
        other.DoublyRobust().estimate_policy_value(**given_them, estimated_rewards_by_reg_model=model)
    )
    best = np.zeros((n, items, positions))
    best[:, 3, :] = 1.0
    same = ope.Logged(reward, np.full(n, 1 / items), best[each, action, position])
    assert ope.estimate("replay", same, rng=rng(), draws=10).value == pytest.approx(
        other.ReplayMethod().estimate_policy_value(reward=reward, action=action, action_dist=best, position=position)
    )
