"""References of River's reco: BiasedMF and FunkMF as rankers, and with Baseline as predictors of ratings and of labels.

As rankers they learn either the ratings themselves or, where that ranks better on the tuning part, 1 for every choice
and 0 for four items drawn uniformly. As predictors every rating (or like and hate) is predicted, then learnt, as in
River's own evaluation; a prediction is clipped to the scale.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from infra.proving.quality.events import Events
from infra.proving.quality.ranking import board, columns, dots, judge, learn_counts, popularity
from infra.proving.quality.reference import Reference, Result, Setup, spans

NEGATIVES: Final = 4
FACTORS: Final = 16


def _model(name: str, chosen: dict[str, Any], seed: int, width: float) -> Any:
    """Make a model of River; gradients are clipped to the width of the scale, or FunkMF diverges on ratings."""
    from river import optim, reco

    rate = chosen["rate"]
    if name == "Baseline":
        return reco.Baseline(optimizer=optim.SGD(rate), l2=chosen["l2"], clip_gradient=width)
    start = optim.initializers.Normal(mu=0.0, sigma=0.1, seed=seed)
    if name == "FunkMF":
        return reco.FunkMF(
            n_factors=FACTORS, optimizer=optim.SGD(rate), l2=chosen["l2"], initializer=start, clip_gradient=width
        )
    return reco.BiasedMF(
        n_factors=FACTORS, bias_optimizer=optim.SGD(rate), latent_optimizer=optim.SGD(rate), l2_bias=chosen["l2"],
        l2_latent=chosen["l2"], latent_initializer=start, clip_gradient=width,
    )  # fmt: skip


def _rank(name: str, events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank all events; the vectors of items are mirrored in a matrix, so that one product scores them all."""
    biased, sampled = name == "BiasedMF", chosen["learns"] == "choices"
    model = _model(name, chosen, setup.seed, 2.0 if sampled else events.scale[1] - events.scale[0])
    log, out = columns(events), board(events)
    counts = popularity(events.items, float(events.ts[0]))
    vectors, bias = np.zeros((events.items, FACTORS), np.float32), np.zeros(events.items, np.float32)
    rng = np.random.default_rng(setup.seed)

    def learn(user: int, item: int, y: float) -> None:
        model.learn_one(user=user, item=item, y=y)
        vectors[item] = model.i_latents[item]
        if biased:
            bias[item] = model.i_biases[item]

    labels, users, items = events.label.tolist(), events.user.tolist(), events.item.tolist()
    for first, last in spans(events, setup.tell):
        e = first
        drawn = rng.random((last - first, NEGATIVES))
        while e < last:
            end, n = int(events.end[e]), int(events.known[e])
            known = users[e] in model.u_latents
            if known:
                dots(vectors, bias, model.u_latents[users[e]].astype(np.float32), n, out.scores)
            judge(log, e, out, counts, setup.half_life, not known)
            for j in range(e, end):
                if labels[j] != 1:
                    continue
                if not sampled:
                    if np.isfinite(events.value[j]):
                        learn(users[j], items[j], float(events.value[j]))
                    continue
                learn(users[j], items[j], 1.0)
                for other in (drawn[j - first] * n).astype(np.int64).tolist():
                    if other != items[j] and n:
                        learn(users[j], other, 0.0)
            learn_counts(log, e, counts)
            e = end
    return Result(out.ranks, out.raw)


def run_biased(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank by BiasedMF."""
    return _rank("BiasedMF", events, chosen, setup)


def run_funk(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank by FunkMF."""
    return _rank("FunkMF", events, chosen, setup)


def _predict(name: str, events: Events, chosen: dict[str, Any], setup: Setup, *, labels: bool) -> Result:
    """Predict, then learn, every rating, or where `labels` 1 for chosen and 0 for pushed away."""
    model = _model(name, chosen, setup.seed, 2.0 if labels else events.scale[1] - events.scale[0])
    found = np.full(len(events), np.nan)
    y = events.label.astype(np.float64) if labels else events.value
    low, high = (-np.inf, np.inf) if labels else events.scale
    for first, last in spans(events, setup.tell):
        for e in range(first, last):
            if np.isnan(y[e]):
                continue
            user, item = int(events.user[e]), int(events.item[e])
            found[e] = min(max(model.predict_one(user=user, item=item), low), high)
            model.learn_one(user=user, item=item, y=float(y[e]))
    none = np.full(len(events), np.nan)
    return Result(none, found if labels else none, predictions=None if labels else found)


def _predictor(name: str, about: str, *, labels: bool) -> Reference:
    told = "labels" if labels else "ratings"
    short = {"BiasedMF": "river_biased_mf", "FunkMF": "river_funk_mf", "Baseline": "river_baseline"}[name]
    return Reference(
        f"{short}_{told}", f"{about}, on the {told} themselves",
        lambda events, chosen, setup: _predict(name, events, chosen, setup, labels=labels),
        tuple({"rate": r, "l2": l2} for r in (0.005, 0.01, 0.025, 0.05, 0.1) for l2 in (0.0, 0.02, 0.1)),
        needs="negatives" if labels else "ratings", ranks=False,
    )  # fmt: skip


GRID: Final = tuple(
    {"learns": what, "rate": r, "l2": l2}
    for what in ("choices", "ratings")
    for r in (0.01, 0.03, 0.1)
    for l2 in (0.0, 0.02)
)
REFERENCES: Final = (
    Reference("river_biased_mf", "River's reco.BiasedMF as a ranker, learnt live", run_biased, GRID),
    Reference("river_funk_mf", "River's reco.FunkMF as a ranker, learnt live", run_funk, GRID),
    *(
        _predictor(name, f"River's reco.{name}", labels=labels)
        for labels in (False, True)
        for name in ("BiasedMF", "FunkMF", "Baseline")
    ),
)
