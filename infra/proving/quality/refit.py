"""References that are fitted anew in batches: ALS and BPR of `implicit`, and EASE; user state is live where they allow.

Between two fits the item side is frozen. ALS solves the user's vector anew from the live history before every group,
EASE adds the history's rows of its item matrix; BPR has no fold-in, its user vectors are those of the last fit. An item
that came after the last fit is a miss.

    ALS   Hu, Koren, Volinsky: Collaborative filtering for implicit feedback datasets (ICDM 2008)
    EASE  B = I - P / diag(P), P = (X'X + l2 I)^-1. Steck: Embarrassingly shallow autoencoders (WWW 2019)
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from infra.proving.quality.events import Events
from infra.proving.quality.ranking import (
    Board,
    Log,
    Popularity,
    board,
    columns,
    dots,
    judge,
    learn_counts,
    popularity,
)
from infra.proving.quality.reference import Reference, Result, Setup
from streaming.replay.logs import ReplayError

EASE_ITEMS: Final = 4_000
"""Items of one EASE fit at most: the most chosen until then. A fit inverts a matrix of that size."""
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class Fitted:
    """One method between its fits: `fit` learns from events [0, until), `rank` goes through [first, last)."""

    def __init__(self, events: Events, chosen: dict[str, Any], setup: Setup) -> None:
        self.events, self.chosen, self.setup = events, chosen, setup
        # What a row of the training matrix is: a user, or where a log has baskets perhaps a basket.
        by_basket = chosen.get("rows") == "basket"
        self.row = np.where(events.basket >= 0, events.basket, events.basket.max() + 1 + events.user) if by_basket \
            else events.user  # fmt: skip
        self.window = int(chosen.get("history") or len(events))

    def matrix(self, until: int) -> Any:
        """Return the choices before `until` as a binary matrix [rows, items known]."""
        from scipy.sparse import csr_matrix

        chosen = np.flatnonzero(self.events.label[:until] == 1)
        row, item = self.row[chosen], self.events.item[chosen]
        shape = (int(row.max()) + 1, int(item.max()) + 1)
        found = csr_matrix((np.ones(len(row), np.float32), (row, item)), shape=shape)
        found.data[:] = 1.0
        found.sort_indices()
        return found

    def fit(self, until: int) -> None:
        """Learn from the first events."""
        raise NotImplementedError

    def rank(self, log: Log, first: int, last: int, out: Board, counts: Popularity) -> None:
        """Rank the events [first, last) with the frozen items and live users."""
        raise NotImplementedError


def run_fitted(kind: type[Fitted], events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank all events, fitting anew where the setup says; before the first fit popularity is offered."""
    threadpool_limits = _extra("threadpoolctl").threadpool_limits
    log, out = columns(events), board(events)
    counts = popularity(events.items, float(events.ts[0]))
    fits = (setup.fits[:1] if setup.frozen else setup.fits).tolist()
    method = kind(events, chosen, setup)
    edges = [*fits, len(events)]
    _by_popularity(log, 0, edges[0], out, counts, setup.half_life)
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore")
        for first, last in pairwise(edges):
            method.fit(first)
            # A frozen model goes through the rest in pieces, so that its users' states stay few.
            for cut in range(first, last, max(1, len(events) // 100)):
                begin = int(events.start[cut])
                end = min(cut + max(1, len(events) // 100), last)
                method.rank(log, begin, int(events.start[end]) if end < len(events) else end, out, counts)
            setup.tell(last)
    return Result(out.ranks, out.raw, {"fits": len(fits)})


@njit(cache=True)
def _by_popularity(log, first, last, board, popular, h):  # type: ignore[no-untyped-def]
    e = first
    while e < last:
        judge(log, e, board, popular, h, True)
        learn_counts(log, e, popular)
        e = log.end[e]


def _extra(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReplayError("ALS, BPR and EASE need implicit: install freshet[bench], or name others: --only") from error


def _grown(vectors: F32, n: int, rng: np.random.Generator, scale: float) -> F32:
    """Return the vectors of the last fit with small random ones for what is new."""
    new = (rng.random((n - len(vectors), vectors.shape[1]), np.float32) - np.float32(0.5)) * np.float32(scale)
    return np.concatenate((vectors, new))


class Als(Fitted):
    """implicit's ALS: 15 iterations first, 3 from the last vectors at every later fit; user vectors solved live."""

    users: F32
    items: F32

    def fit(self, until: int) -> None:
        """Go on from the last vectors."""
        module = _extra("implicit.cpu.als")
        d = int(self.chosen["factors"])
        model = module.AlternatingLeastSquares(
            factors=d, regularization=self.chosen["l2"], alpha=self.chosen["alpha"], random_state=self.setup.seed,
            iterations=15, num_threads=1,
        )  # fmt: skip
        x = self.matrix(until)
        if hasattr(self, "items"):
            rng = np.random.default_rng(until)
            model.iterations = 3
            model.user_factors = _grown(self.users, x.shape[0], rng, 0.01)
            model.item_factors = _grown(self.items, x.shape[1], rng, 0.01)
        model.fit(x, show_progress=False)
        self.users, self.items = model.user_factors, np.ascontiguousarray(model.item_factors)
        self.gram = (self.items.T @ self.items + self.chosen["l2"] * np.eye(d)).astype(np.float64)

    def rank(self, log: Log, first: int, last: int, out: Board, counts: Popularity) -> None:
        """Keep each user's normal equations, add every choice, solve before every group."""
        local, n = _local(self.events, first, last)
        d = self.items.shape[1]
        left, right, size = np.zeros((n, d, d)), np.zeros((n, d)), np.zeros(n, np.int64)
        _rank_als(log, first, last, out, counts, self.setup.half_life, local, left, right, size, self.items,
                  self.items.astype(np.float64), self.gram, float(self.chosen["alpha"]), self.window)  # fmt: skip


def _local(events: Events, first: int, last: int) -> tuple[I64, int]:
    """Return numbers 0.. of the users of [first, last), and how many there are."""
    users, local = np.unique(events.user[first:last], return_inverse=True)
    return local.astype(np.int64), len(users)


@njit(cache=True)
def _add(left, right, vector, times, alpha):  # type: ignore[no-untyped-def]
    """Add `times` (+1 or -1) a choice to normal equations; confidence 1 + alpha - 1 = alpha, as implicit has it."""
    for a in range(len(vector)):
        right[a] += times * alpha * vector[a]
        for b in range(len(vector)):
            left[a, b] += times * (alpha - 1.0) * vector[a] * vector[b]


@njit(cache=True)
def _rank_als(  # type: ignore[no-untyped-def]
    log, first, last, board, popular, h, local, left, right, size, items, items64, gram, alpha, window
):
    fitted, met = len(items), np.zeros(len(size), np.bool_)
    none = np.zeros(fitted, np.float32)
    e = first
    while e < last:
        u, n, past, u0 = local[e - first], log.known[e], log.history_before[e], log.history_first[e]
        if not met[u]:
            met[u] = True
            for p in range(max(0, past - window), past):
                x = log.item[log.history[u0 + p]]
                if x < fitted:
                    _add(left[u], right[u], items64[x], 1.0, alpha)
                    size[u] += 1
        if size[u] > 0:
            vector = np.linalg.solve(gram + left[u], right[u]).astype(np.float32)
            dots(items, none, vector, min(n, fitted), board.scores)
            board.scores[fitted:n] = -np.inf
        judge(log, e, board, popular, h, size[u] == 0)
        for j in range(e, log.end[e]):
            if log.label[j] != 1:
                continue
            if log.item[j] < fitted:
                _add(left[u], right[u], items64[log.item[j]], 1.0, alpha)
                size[u] += 1
            if past >= window:
                gone = log.item[log.history[u0 + past - window]]
                if gone < fitted:
                    _add(left[u], right[u], items64[gone], -1.0, alpha)
                    size[u] -= 1
            past += 1
        learn_counts(log, e, popular)
        e = log.end[e]


class Ease(Fitted):
    """EASE over the most chosen items, in closed form; a user's scores are the sum of their history's rows of B."""

    def fit(self, until: int) -> None:
        """Invert the Gram matrix of the most chosen items."""
        from scipy.linalg import lapack

        x = self.matrix(until)
        times = np.asarray(x.sum(axis=0)).reshape(-1)
        self.kept = np.sort(np.argsort(-times, kind="stable")[:EASE_ITEMS])
        self.place = np.full(x.shape[1], -1, np.int64)
        self.place[self.kept] = np.arange(len(self.kept))
        x = x[:, self.kept]
        gram = (x.T @ x).toarray().astype(np.float32, order="F")
        gram[np.diag_indices_from(gram)] += self.chosen["l2"]
        factor, failed = lapack.spotrf(gram, overwrite_a=1)
        inverse, failed_too = lapack.spotri(factor, overwrite_c=1)
        if failed or failed_too:
            raise ReplayError(f"EASE: the Gram matrix of {len(self.kept)} items has no inverse")
        _from_inverse(inverse)
        self.b = inverse.T  # symmetric storage is not assumed: row i are the weights from item i

    def rank(self, log: Log, first: int, last: int, out: Board, counts: Popularity) -> None:
        """Keep each user's scores, add a row of B with every choice."""
        local, n = _local(self.events, first, last)
        _rank_ease(log, first, last, out, counts, self.setup.half_life, local,
                   np.zeros((n, len(self.kept)), np.float32), np.zeros(n, np.int64), self.b, self.kept, self.place,
                   self.window)  # fmt: skip


@njit(cache=True)
def _from_inverse(p):  # type: ignore[no-untyped-def]
    """Turn the upper triangle of P = (X'X + l2 I)^-1, column-major, into B^T in place: B[i, j] = -P[i, j] / P[j, j]."""
    n = len(p)
    diagonal = np.empty(n, np.float32)
    for j in range(n):
        diagonal[j] = p[j, j]
    for j in range(n):
        for i in range(j):
            both = p[i, j]
            p[j, i] = -both / diagonal[j]  # B[i, j], stored transposed
            p[i, j] = -both / diagonal[i]  # B[j, i]
        p[j, j] = 0.0


@njit(cache=True)
def _add_row(scores, row, times):  # type: ignore[no-untyped-def]
    for y in range(len(scores)):
        scores[y] += times * row[y]


@njit(cache=True)
def _rank_ease(log, first, last, board, popular, h, local, sums, size, b, kept, place, window):  # type: ignore[no-untyped-def]  # fmt: skip
    met, fitted, one = np.zeros(len(size), np.bool_), len(place), np.float32(1.0)
    e = first
    while e < last:
        u, n, past, u0 = local[e - first], log.known[e], log.history_before[e], log.history_first[e]
        if not met[u]:
            met[u] = True
            for p in range(max(0, past - window), past):
                x = log.item[log.history[u0 + p]]
                if x < fitted and place[x] >= 0:
                    _add_row(sums[u], b[place[x]], one)
                    size[u] += 1
        if size[u] > 0:
            board.scores[:n] = -np.inf
            for y in range(len(kept)):
                board.scores[kept[y]] = sums[u, y]
        judge(log, e, board, popular, h, size[u] == 0)
        for j in range(e, log.end[e]):
            if log.label[j] != 1:
                continue
            x = log.item[j]
            if x < fitted and place[x] >= 0:
                _add_row(sums[u], b[place[x]], one)
                size[u] += 1
            if past >= window:
                gone = log.item[log.history[u0 + past - window]]
                if gone < fitted and place[gone] >= 0:
                    _add_row(sums[u], b[place[gone]], -one)
                    size[u] -= 1
            past += 1
        learn_counts(log, e, popular)
        e = log.end[e]


class Bpr(Fitted):
    """implicit's BPR: 60 epochs first, 10 from the last vectors at every later fit; no fold-in."""

    users: F32
    items: F32

    def fit(self, until: int) -> None:
        """Go on from the last vectors."""
        module = _extra("implicit.cpu.bpr")
        x, d = self.matrix(until), int(self.chosen["factors"])
        model = module.BayesianPersonalizedRanking(
            factors=d, learning_rate=self.chosen["rate"], regularization=self.chosen["l2"], iterations=60,
            num_threads=1, random_state=self.setup.seed,
        )  # fmt: skip
        if hasattr(self, "items"):
            rng = np.random.default_rng(until)
            model.iterations = 10
            model.user_factors = _grown(self.users, x.shape[0], rng, 1.0 / d)
            model.user_factors[:, d] = 1.0
            model.item_factors = _grown(self.items, x.shape[1], rng, 1.0 / d)
        model.fit(x, show_progress=False)
        self.users, self.items = model.user_factors, np.ascontiguousarray(model.item_factors)

    def rank(self, log: Log, first: int, last: int, out: Board, counts: Popularity) -> None:
        """Score with the vectors of the last fit."""
        _rank_bpr(log, first, last, out, counts, self.setup.half_life, self.users, self.items)


@njit(cache=True)
def _rank_bpr(log, first, last, board, popular, h, users, items):  # type: ignore[no-untyped-def]
    fitted = len(items)
    none = np.zeros(fitted, np.float32)
    trained = np.zeros(len(users), np.bool_)
    for u in range(len(users)):
        for k in range(users.shape[1] - 1):
            trained[u] |= users[u, k] != 0.0
    e = first
    while e < last:
        u, n = log.user[e], log.known[e]
        known = u < len(users) and trained[u]
        if known:
            dots(items, none, users[u], min(n, fitted), board.scores)
            board.scores[fitted:n] = -np.inf
        judge(log, e, board, popular, h, not known)
        learn_counts(log, e, popular)
        e = log.end[e]


def run_als(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank by ALS."""
    return run_fitted(Als, events, chosen, setup)


def run_ease(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank by EASE."""
    return run_fitted(Ease, events, chosen, setup)


def run_bpr_fitted(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank by BPR."""
    return run_fitted(Bpr, events, chosen, setup)


HISTORIES: Final = (0, 20)
"""How much of the live history is folded in: all of it, or the last 20 choices."""
REFERENCES: Final = (
    Reference(
        "als", "implicit's ALS, fitted anew from the last vectors; user vectors solved from the live history", run_als,
        tuple(
            {"factors": 64, "alpha": a, "l2": l2, "history": h, "rows": r}
            for a in (1.0, 10.0) for l2 in (1.0, 10.0, 50.0) for h in HISTORIES for r in ("user", "basket")
        ), fits=True,
    ),
    Reference(
        "bpr", "implicit's BPR, fitted anew from the last vectors; user vectors of the last fit", run_bpr_fitted,
        tuple({"factors": 32, "rate": r, "l2": l2} for r in (0.02, 0.1) for l2 in (0.01, 0.05)), fits=True,
    ),
    Reference(
        "ease", "EASE, fitted anew over the 4,000 most chosen items; live history times the item matrix", run_ease,
        tuple(
            {"l2": l2, "history": h, "rows": r}
            for l2 in (20.0, 100.0, 500.0) for h in HISTORIES for r in ("user", "basket")
        ), fits=True,
    ),
    Reference(
        "als_frozen", "ALS of the first 20 %; user vectors and popularity for new users live", run_als, (),
        fits=True, frozen=True, tuned_as="als",
    ),
    Reference(
        "ease_frozen", "EASE of the first 20 %; user histories and popularity for new users live", run_ease, (),
        fits=True, frozen=True, tuned_as="ease",
    ),
)  # fmt: skip
