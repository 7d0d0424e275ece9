"""How a slate is drawn from what is believed of its candidates, slot by slot, with the probability of each choice.

    greedy         the best mean
    epsilon        the best mean, but a share epsilon of the slots uniformly over the eligible
    softmax        in proportion to exp(score / TEMPERATURE)
    ucb            the best upper confidence bound, mean + BOUND deviations in log-odds (LinUCB)
    thompson       the best under a draw of the last layer, and of each item's own posterior, narrowed by SCALE
    thompson-item  the best under a draw of each item's posterior, without the ranker

At each slot an item is chosen among those that no slot above took:

    P(item | above) = u / R + f policy(item | above, still exploring) + (1 - u - f) policy(item | above)

R items are left; f = 0 where none of them is still exploring: first impressions go to those of them that the policy
itself would show, so that they cost little. u is epsilon, or UNIFORM for what draws otherwise, so that everything
eligible has support, and 0 for greedy. A Thompson policy draws one of a fixed number of particles, the
same for every slate that a state of the model serves, and takes the item that is best under it: so its probability is
the share of the particles that agree, exactly, and not an estimate of it. Lu and Van Roy: Ensemble
sampling (NeurIPS 2017); Li et al.: A contextual-bandit approach to personalized news article recommendation (WWW 2010).
Randomness is an argument. Knows nothing about where scores come from.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.bandit.last_layer import PARTICLES, SCALE
from models.factors import mix64

Policy = Literal["greedy", "epsilon", "softmax", "ucb", "thompson", "thompson-item"]
POLICIES: Final[tuple[Policy, ...]] = ("greedy", "epsilon", "softmax", "ucb", "thompson", "thompson-item")
UNIFORM: Final = 0.01
"""Share of slots that softmax, ucb and Thompson policies draw uniformly over the eligible."""
TEMPERATURE: Final = 0.3
BOUND: Final = SCALE
"""Standard deviations that `ucb` adds."""
SAMPLES: Final[dict[Policy, int]] = {"thompson": PARTICLES, "thompson-item": PARTICLES}
"""Particles of the policies that draw from a posterior; the others have one score."""
_NORMALS: Final = 8192

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


def item_samples(mean: F64, deviation: F64, keys: U64, step: int) -> F64:
    """Return f64[m, PARTICLES]: N(mean, (SCALE deviation)^2) by item and particle, fixed for hashes u64[m] and a step.

    mean f64[m], or f64[m, PARTICLES] where each particle has its own.
    """
    out = np.empty((len(keys), PARTICLES))
    out[:] = mean if mean.ndim == 2 else mean[:, None]
    _shake(keys, _normals(step), SCALE * deviation, out)
    return out


@lru_cache(maxsize=2)
def _normals(step: int) -> F64:
    """Return the normal numbers of a step, their mean 0 and variance 1 exactly."""
    drawn = np.random.Generator(np.random.Philox(key=step)).standard_normal(_NORMALS)
    exact: F64 = (drawn - drawn.mean()) / drawn.std()
    return exact


@njit(cache=True)
def _shake(keys, normals, deviation, out):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(normals) - 1)
    for i in range(len(keys)):
        for s in range(out.shape[1]):
            at = mix64(keys[i] + np.uint64(s) * np.uint64(0x9E3779B97F4A7C15)) & mask
            out[i, s] += deviation[i] * normals[at]


def shares(policy: Policy, epsilon: float, first: float) -> tuple[float, float]:
    """Return (u, f): the shares of slots drawn uniformly, and for first impressions."""
    if policy == "greedy":
        return 0.0, 0.0
    uniform = epsilon if policy == "epsilon" else UNIFORM
    return uniform, min(first, 1.0 - uniform)


def draw(
    scores: F64, policy: Policy, n: int, rng: np.random.Generator, *, epsilon: float, first: float, exploring: U8
) -> tuple[I64, F32]:
    """Draw up to n of m candidates; returns (places i64[k], the propensity of each given those above, f32[k]).

    scores f64[m, S]: S equally likely draws of the scores; exploring u8[m].
    """
    uniform, share = shares(policy, epsilon, first)
    k = min(n, len(scores))
    places = np.full(k, -1, np.int64)
    return _slate(scores, policy == "softmax", rng.random((k, 2)), uniform, share, exploring, places)  # type: ignore[no-any-return]


def propensities(scores: F64, policy: Policy, slate: I64, *, epsilon: float, first: float, exploring: U8) -> F32:
    """Return f32[k]: how probable each position of a given slate (places i64[k]) was, given those above."""
    uniform, share = shares(policy, epsilon, first)
    chances = np.zeros((len(slate), 2))
    _, out = _slate(scores, policy == "softmax", chances, uniform, share, exploring, slate.copy())
    return out  # type: ignore[no-any-return]


@njit(cache=True)
def _tops(scores, mask, k):  # type: ignore[no-untyped-def]
    """Return i64[S, k]: the k best places of each draw in the mask, best first, ties by place, -1 beyond them."""
    m, draws = scores.shape
    out, values = np.full((draws, k), -1, np.int64), np.empty(k)
    for s in range(draws):
        size = 0
        for i in range(m):
            x = scores[i, s]
            if not mask[i] or (size == k and x <= values[k - 1]):
                continue
            at = size if size < k else k - 1
            while at > 0 and values[at - 1] < x:
                values[at], out[s, at] = values[at - 1], out[s, at - 1]
                at -= 1
            values[at], out[s, at] = x, i
            size = min(size + 1, k)
    return out


@njit(cache=True)
def _nth(left, n):  # type: ignore[no-untyped-def]
    """Return the n-th place that is left."""
    for i in range(len(left)):
        if left[i]:
            if n == 0:
                return i
            n -= 1
    return -1


@njit(cache=True)
def _count(tops, at, left, votes):  # type: ignore[no-untyped-def]
    """Fill votes f64[m] with how many draws have each place as their best one left; `at` i64[S] are moved there."""
    votes[:] = 0.0
    for s in range(len(tops)):
        while not left[tops[s, at[s]]]:
            at[s] += 1
        votes[tops[s, at[s]]] += 1.0


@njit(cache=True)
def _weigh(scores, mask, left, votes):  # type: ignore[no-untyped-def]
    """Fill votes f64[m] with exp(score / TEMPERATURE) of the places in the mask that are left, the greatest one 1."""
    top = -np.inf
    for i in range(len(left)):
        if left[i] and mask[i]:
            top = max(top, scores[i, 0])
    for i in range(len(left)):
        votes[i] = math.exp((scores[i, 0] - top) / TEMPERATURE) if left[i] and mask[i] else 0.0


@njit(cache=True)
def _pick(votes, share):  # type: ignore[no-untyped-def]
    """Return the place at a share in [0, 1) of the votes, counted by place."""
    reach, place = share * votes.sum(), -1
    for i in range(len(votes)):
        if votes[i] > 0.0:
            place = i
            reach -= votes[i]
            if reach < 0.0:
                break
    return place


@njit(cache=True)
def _slate(scores, soft, chances, uniform, share, exploring, places):  # type: ignore[no-untyped-def]
    """Draw the places that are -1 by chances f64[k, 2]; returns all places and their propensities."""
    m, k = len(scores), len(places)
    out = np.empty(k, np.float32)
    if k == 0:
        return places, out
    left, everything = np.ones(m, np.bool_), np.ones(m, np.uint8)
    fresh = 0
    for i in range(m):
        fresh += exploring[i] != 0
    votes, first_votes = np.zeros(m), np.zeros(m)
    tops = first_tops = np.empty((0, 0), np.int64)
    if not soft:
        tops = _tops(scores, everything, k)
        if share > 0.0 and fresh > 0:
            first_tops = _tops(scores, exploring, k)
    at, first_at = np.zeros(scores.shape[1], np.int64), np.zeros(scores.shape[1], np.int64)
    for slot in range(k):
        f = share if fresh > 0 else 0.0
        if soft:
            _weigh(scores, everything, left, votes)
            if f > 0.0:
                _weigh(scores, exploring, left, first_votes)
        else:
            _count(tops, at, left, votes)
            if f > 0.0:
                _count(first_tops, first_at, left, first_votes)
        place = places[slot]
        if place < 0:
            kind, where = chances[slot]
            if kind < uniform:
                place = _nth(left, int(where * (m - slot)))
            else:
                place = _pick(first_votes if kind < uniform + f else votes, where)
            places[slot] = place
        p = uniform / (m - slot) + (1.0 - uniform - f) * votes[place] / votes.sum()
        if exploring[place]:
            p += f * first_votes[place] / first_votes.sum() if f > 0.0 else 0.0
            fresh -= 1
        out[slot] = p
        left[place] = False
    return places, out


@njit(cache=True)
def explored(scores, candidates):  # type: ignore[no-untyped-def]
    """Return u8[k]: 1 where a candidate f32[m] that was left scored higher than the one taken, of scores f32[k]."""
    out, taken = np.zeros(len(scores), np.uint8), np.zeros(len(candidates), np.bool_)
    for k in range(len(scores)):
        best, mine = scores[k], -1
        for i in range(len(candidates)):
            if not taken[i]:
                best = max(best, candidates[i])
                if mine < 0 and candidates[i] == scores[k]:
                    mine = i
        out[k] = best > scores[k]
        if mine >= 0:
            taken[mine] = True
    return out
