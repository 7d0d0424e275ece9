"""Posteriors and policies: what is learnt is the batch solution, what is drawn has the propensity that is logged."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.bandit import BOUND, POLICIES, LastLayer, Policy, draw, item_samples, propensities, shares
from models.bandit import last_layer as layer_module
from models.bandit import posterior as p
from models.bandit.last_layer import FORGETTING, PARTICLES, RIDGE, SCALE
from models.content.tokens import BUCKETS

F64 = NDArray[np.float64]
ASKED = {"epsilon": 0.1, "first": 0.05}


def candidates(policy: Policy, m: int = 12, seed: int = 0) -> tuple[F64, NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    draws = 16 if policy.startswith("thompson") else 1
    return rng.normal(0.0, 1.0, (m, draws)), (rng.random(m) < 0.3).astype(np.uint8)


# ---- propensities


@pytest.mark.parametrize("policy", POLICIES)
def test_slates_come_as_often_as_their_propensities_say(policy: Policy) -> None:
    """First two slots: a chi-square of what was drawn against the probabilities, given the slot above."""
    scores, exploring = candidates(policy)
    m, times = len(scores), 20_000
    rng = np.random.default_rng(11)
    counts, first = np.zeros((m, m)), np.zeros(m)
    for _ in range(times):
        places, chance = draw(scores, policy, 2, rng, exploring=exploring, **ASKED)
        assert len(set(places.tolist())) == 2
        first[places[0]] = chance[0]
        counts[places[0], places[1]] += 1
    expected = np.zeros((m, m))
    for a in range(m):
        for b in range(m):
            if a != b:
                both = propensities(scores, policy, np.array([a, b]), exploring=exploring, **ASKED)
                expected[a, b] = times * float(both.astype(float).prod())
    assert expected.sum() == pytest.approx(times, rel=1e-5)
    assert not counts[expected == 0.0].any()
    seen = expected > 0.0
    if policy == "greedy":
        assert seen.sum() == 1
        return
    large = expected > 5.0
    x = float(((counts[large] - expected[large]) ** 2 / expected[large]).sum())
    x += (counts[seen & ~large].sum() - expected[seen & ~large].sum()) ** 2 / max(expected[seen & ~large].sum(), 1.0)
    freedom = int(large.sum())
    assert x < freedom + 4.5 * math.sqrt(2.0 * freedom)
    drawn = np.flatnonzero(first)
    np.testing.assert_allclose(first[drawn], expected[drawn].sum(1) / times, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(POLICIES), st.integers(1, 30), st.integers(1, 12), st.integers(0, 10_000), st.floats(0, 0.5))
def test_the_probabilities_of_a_slot_add_up_to_one(policy: Policy, m: int, n: int, seed: int, first: float) -> None:
    scores, exploring = candidates(policy, m, seed)
    asked = {"epsilon": 0.1, "first": first}
    places, chance = draw(scores, policy, n, np.random.default_rng(seed), exploring=exploring, **asked)
    assert len(places) == len(set(places.tolist())) == min(n, m)
    np.testing.assert_array_equal(propensities(scores, policy, places, exploring=exploring, **asked), chance)
    for slot in range(len(places)):
        above = places[:slot].tolist()
        total = 0.0
        for other in range(m):
            if other not in above:
                total += propensities(scores, policy, np.array([*above, other]), exploring=exploring, **asked)[slot]
        assert total == pytest.approx(1.0, abs=1e-5)


def test_everything_eligible_has_support_and_greedy_has_none_beside_the_best() -> None:
    for policy in POLICIES:
        scores, exploring = candidates(policy)
        worst = np.array([int(scores.max(1).argmin())])
        chance = propensities(scores, policy, worst, epsilon=0.1, first=0.0, exploring=exploring)[0]
        assert chance == (0.0 if policy == "greedy" else pytest.approx(shares(policy, 0.1, 0.0)[0] / 12, rel=1e-3)) or (
            policy == "softmax"
        )
    assert shares("greedy", 0.3, 0.2) == (0.0, 0.0)
    assert shares("epsilon", 0.8, 0.5) == pytest.approx((0.8, 0.2))


def test_first_impressions_get_their_share_and_no_more() -> None:
    scores = np.zeros((50, 1))
    scores[:40] = 5.0  # what is exploring would never come first
    exploring = (np.arange(50) >= 40).astype(np.uint8)
    rng, shown = np.random.default_rng(3), 0
    for _ in range(2000):
        places, _ = draw(scores, "epsilon", 10, rng, epsilon=0.0, first=0.05, exploring=exploring)
        shown += int((places >= 40).sum())
    assert shown / 20_000 == pytest.approx(0.05, abs=0.006)
    scores[45] = 1.0  # they go to the best of what is exploring
    for policy in ("epsilon", "softmax"):
        chance = propensities(scores, policy, np.array([45]), epsilon=0.0, first=0.05, exploring=exploring)[0]
        assert chance == pytest.approx(0.05 if policy == "epsilon" else 0.05 * 0.75 + 0.01 / 50, abs=0.004)
    first, _ = draw(scores, "ucb", 10, np.random.default_rng(4), epsilon=0.0, first=0.99, exploring=exploring)
    assert first[0] == 45
    nothing, _ = draw(np.empty((0, 1)), "softmax", 5, rng, epsilon=0.0, first=0.05, exploring=np.zeros(0, np.uint8))
    assert len(nothing) == 0
    none, chance = draw(scores, "epsilon", 5, rng, epsilon=0.0, first=0.05, exploring=np.zeros(50, np.uint8))
    assert none.tolist() == [0, 1, 2, 3, 4]
    assert chance.tolist() == [1.0] * 5


def test_particles_are_a_function_of_item_and_step() -> None:
    keys = np.random.default_rng(4).integers(1, 2**63, 400).astype(np.uint64)
    mean, deviation = np.linspace(-1, 1, 400), np.full(400, 0.5)
    one = item_samples(mean, deviation, keys, 7)
    np.testing.assert_array_equal(item_samples(mean[::-1], deviation, keys[::-1], 7)[::-1], one)
    assert not np.array_equal(item_samples(mean, deviation, keys, 8), one)
    noise = (one - mean[:, None]) / (SCALE * 0.5)
    assert noise.mean() == pytest.approx(0.0, abs=0.03)
    assert noise.std() == pytest.approx(1.0, abs=0.03)
    correlations = np.asarray(np.corrcoef(noise.T))
    assert np.abs(correlations[np.triu_indices(PARTICLES, 1)]).max() < 0.3


# ---- last layer


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_the_last_layer_is_the_batch_solution(seed: int, slates: int) -> None:
    """Discounted ridge regression written out: every contribution with g to the power of the slates since."""
    rng, d, k = np.random.default_rng(seed), 5, 3
    layer = LastLayer(width=d)
    rows: list[tuple[int, F64, float, float]] = []  # (slate, phi, weight, reward)
    for slate in range(1, slates + 1):
        phi, expected, examined = rng.normal(size=(k, d)), rng.random(k) * 0.3, rng.random(k)
        layer.expose(phi, expected, examined)
        rows += [(slate, phi[i], examined[i], -examined[i] * expected[i]) for i in range(k)]
        for i in range(k):
            if rng.random() < 0.4:
                layer.succeed(phi[i], expected[i], examined[i], 1.0)
                rows.append((slate, phi[i], 1.0 - examined[i], 1.0 - (1.0 - examined[i]) * expected[i]))
            elif rng.random() < 0.3:
                layer.succeed(phi[i], expected[i], examined[i], 0.5, first=False)
                rows.append((slate, phi[i], 0.0, 0.5))
    kept = FORGETTING**slates
    precision = (kept + (1.0 - kept)) * RIDGE * np.eye(d)  # what is forgotten of the ridge comes back
    b = np.zeros(d)
    for slate, phi_i, weight, reward in rows:
        since = FORGETTING ** (slates - slate)
        precision += since * weight * np.outer(phi_i, phi_i)
        b += since * reward * phi_i
    np.testing.assert_allclose(np.tril(layer.precision), np.tril(precision), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.mean(), np.linalg.solve(precision, b), rtol=1e-8, atol=1e-12)
    phi = rng.normal(size=(4, d))
    covariance = layer.numbers[1] * np.linalg.inv(precision)
    np.testing.assert_allclose(layer.deviations(phi) ** 2, np.einsum("ij,jk,ik->i", phi, covariance, phi), rtol=1e-8)


def test_ten_million_updates_lose_nothing() -> None:
    """The state of a stream of one repeated slate has a closed form; compiled calls only, three features."""
    layer, phi = LastLayer(width=3), np.array([[0.5, -1.0, 2.0]])
    expected, examined, times = np.array([0.1]), np.array([0.7]), 10_000_000
    for _ in range(times // 100_000):
        _repeat(layer, phi, expected, examined, 100_000)
    total = (1.0 - FORGETTING**times) / (1.0 - FORGETTING)
    exact = RIDGE * np.eye(3) + 0.7 * total * np.outer(phi[0], phi[0])
    np.testing.assert_allclose(np.tril(layer.precision), np.tril(exact), rtol=1e-7)
    np.testing.assert_allclose(layer.b, -0.07 * total * phi[0], rtol=1e-7)
    assert np.isfinite(layer.particles(1)).all()


def _repeat(layer: LastLayer, phi: F64, expected: F64, examined: F64, times: int) -> None:
    for _ in range(times):
        layer_module._expose(layer.precision, layer.b, layer.numbers, phi, expected, examined, FORGETTING, RIDGE, 1e-3)


def test_particles_have_the_posterior_mean_and_spread_and_their_step() -> None:
    rng, layer = np.random.default_rng(5), LastLayer(width=6)
    for _ in range(200):
        layer.expose(rng.normal(size=(10, 6)), np.full(10, 0.1), np.full(10, 0.5))
        layer.succeed(rng.normal(size=6), 0.1, 0.5, 1.0)
    phi = rng.normal(size=(30, 6))
    draws = np.concatenate([phi @ layer.particles(step) for step in range(200)], axis=1)
    np.testing.assert_allclose(draws.mean(1), phi @ layer.mean(), atol=4.0 * float(draws.std()) / math.sqrt(12_800))
    np.testing.assert_allclose(draws.std(1), SCALE * layer.deviations(phi), rtol=0.05)
    np.testing.assert_array_equal(layer.particles(3), layer.particles(3))


def test_a_stored_layer_goes_on_alike_and_what_is_not_finite_is_left_out() -> None:
    rng, layer = np.random.default_rng(6), LastLayer(width=4)
    layer.expose(rng.normal(size=(3, 4)), np.full(3, 0.2), np.ones(3))
    before = layer.state()["layer_precision"].copy()
    layer.expose(np.full((1, 4), np.nan), np.array([0.2]), np.ones(1))
    layer.succeed(np.full(4, np.inf), 0.2, 0.5, 1.0)
    np.testing.assert_array_equal(layer.state()["layer_precision"], before)
    other = LastLayer(width=4)
    other.set_state(other.read_state(layer.state()))
    np.testing.assert_array_equal(other.particles(2), layer.particles(2))
    assert other.slates == 1
    wider = LastLayer(width=5)  # features came since: it begins anew
    wider.set_state(wider.read_state(layer.state()))
    assert wider.slates == 0


# ---- item posteriors


def test_moments_of_log_odds() -> None:
    """Against draws of the Beta itself."""
    rng = np.random.default_rng(7)
    for a, b in ((1.0, 19.0), (0.4, 3.0), (40.0, 400.0), (5.5, 6.0)):
        mean, deviation = np.empty(1), np.empty(1)
        p.log_odds(np.array([a]), np.array([b]), mean, deviation)
        x = np.clip(rng.beta(a, b, 400_000), 1e-300, 1.0 - 1e-16)
        odds = np.log(x / (1.0 - x))
        assert mean[0] == pytest.approx(odds.mean(), abs=6 * odds.std() / 632)
        assert deviation[0] == pytest.approx(odds.std(), rel=0.01)


def test_a_posterior_follows_its_exposures_and_forgets() -> None:
    sums, rows = np.zeros((3, 8)), np.array([0, 1, 2])
    p.expose(sums, rows, 0, 3)
    np.testing.assert_allclose(sums[:, 0], 1.0 / np.log2([2.0, 3.0, 4.0]))
    for _ in range(5000):
        p.expose(sums, rows, 0, 1)
        sums[0, 1] += 1.0
    assert sums[0, 0] == pytest.approx(1.0 / (1.0 - p.FORGETTING), rel=1e-3)
    for _ in range(2000):
        p.expose(sums, rows, 0, 1)
    assert sums[0, 1] / sums[0, 0] < 0.02  # two thousand exposures without success: what was is forgotten


def test_a_new_item_starts_from_what_alike_items_earned() -> None:
    tokens = np.full((4, 24), -1, np.int32)
    tokens[[0, 2], 0], tokens[[1, 3], 0] = 7, 9
    sums = np.zeros((4, 8))
    sums[0, :2], sums[1, :2] = (400.0, 80.0), (400.0, 4.0)
    ratios, alpha, beta = np.zeros(BUCKETS), np.empty(4), np.empty(4)
    rate = p.token_ratios(tokens, sums, 4, ratios)
    p.betas(np.arange(4), tokens, sums, ratios, rate, alpha, beta)
    expected = alpha / (alpha + beta)
    assert expected[2] > 4.0 * expected[3]
    assert expected[0] == pytest.approx(0.2, abs=0.02)
    np.testing.assert_allclose((alpha + beta)[2:], p.STRENGTH)
    np.testing.assert_allclose((alpha + beta)[:2], 400.0 + p.STRENGTH)


def test_dwells_and_ratings_of_a_new_item_start_from_alike_items() -> None:
    tokens = np.full((5, 24), -1, np.int32)
    tokens[[0, 2], 0], tokens[[1, 3], 0] = 7, 9
    sums = np.zeros((5, 8))
    sums[0, 2:4], sums[1, 2:4] = (80.0, 320.0), (80.0, 80.0)  # mean log dwells 4 and 1, of everybody 2.5
    said = [p.alike_mean(tokens, sums, 5, row, 2, 2.5) for row in range(5)]
    assert said == pytest.approx([3.7, 1.3, 3.7, 1.3, 2.5])
    assert p.alike_mean(tokens, sums, 5, 0, 5, 0.5) == 0.5  # nobody rated


def test_normal_gamma_is_the_textbook_posterior() -> None:
    """Murphy (2007), equations 85 to 89, with kappa 2 and alpha 1, beta 1."""
    x = np.array([1.0, 2.5, 0.5, 4.0])
    found = p.normal_gamma(4.0, float(x.sum()), float((x**2).sum()), 1.5)
    beta_n = 1.0 + 0.5 * float(((x - x.mean()) ** 2).sum()) + 2.0 * 4.0 * (x.mean() - 1.5) ** 2 / (2.0 * 6.0)
    alpha_n = 1.0 + 2.0
    assert found.mean == pytest.approx((2.0 * 1.5 + x.sum()) / 6.0)
    assert found.deviation**2 == pytest.approx(beta_n / (alpha_n * 6.0))
    assert p.normal_gamma(0.0, 0.0, 0.0, 1.5).mean == 1.5
    assert p.normal_gamma(1.0, 3.0, 9.0, 1.5).deviation > found.deviation


def test_the_bound_is_stated_in_deviations() -> None:
    assert 0.0 < BOUND <= 3.0
