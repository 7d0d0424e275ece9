"""`freshet bench quality`: references beside computation by hand, the event set, cache, intervals, keys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from infra.cli import app
from infra.proving.quality import compare, online, ours, refit, river_rating, run
from infra.proving.quality.cache import Cache, code_of
from infra.proving.quality.events import Events, read_events, schedule
from infra.proving.quality.reference import Result, Setup
from infra.proving.quality.show import plot, show
from infra.terminal import console
from models import metrics
from streaming.events import Action, Click, Rating
from streaming.replay.logs import ReplayError, ReplayLog
from streaming.replay.prequential import Replay

RANKING = [name for name, (method, _) in run.REFERENCES.items() if method.ranks]
JUDGED = (("line", "none"), ("line", "seen"), ("line", "invoice"), ("basket", "invoice"), ("basket", "seen"))


def log_of(rows: list[tuple[str, str, float, str]], hated: frozenset[int] = frozenset()) -> ReplayLog:
    """Rows of (user, item, ts, basket); those whose number is in `hated` are hidden, not chosen."""
    log = ReplayLog()
    for i, (user, item, ts, basket) in enumerate(rows):
        log.events.append(
            Action(user_id=user, item_id=item, ts=ts, name="hide") if i in hated
            else Click(user_id=user, item_id=item, ts=ts)
        )  # fmt: skip
        log.baskets.append(basket)
    return log


def small(seed: int = 3, n: int = 300) -> ReplayLog:
    """Few users, skewed items, baskets of up to five lines, a tenth of the items pushed away."""
    rng = np.random.default_rng(seed)
    rows = [(f"u{rng.integers(7)}", f"i{int(rng.zipf(1.6)) % 25}", 1e9 + 500.0 * t, f"b{t // 15}") for t in range(n)]
    rows = [(user, item, ts, f"{basket}-{user}") for user, item, ts, basket in rows]
    return log_of(rows, frozenset(np.flatnonzero(rng.random(n) < 0.1).tolist()))


def planted(n: int = 2500, seed: int = 0, *, ratings: bool = False, hates: bool = False) -> ReplayLog:
    """Two tastes, each with forty items of its own, some far more liked than others; nobody changes sides.

    With ratings everyone meets all items, and rates those of their taste high; with hates they push the others away.
    """
    rng, log = np.random.default_rng(seed), ReplayLog()
    for t in range(n):
        user, ts = int(rng.integers(60)), 1e9 + 60.0 * t
        side = user % 2
        wrong = (ratings or hates) and rng.random() < 0.4
        item = 2 * int(40 * rng.random() ** 2.5) + (1 - side if wrong else side)
        names: dict[str, Any] = {"user_id": f"u{user}", "item_id": f"i{item}", "ts": ts}
        if ratings:
            value = float(np.clip(4.5 - 2.5 * wrong + rng.normal(0, 0.4), 1.0, 5.0))
            log.events.append(Rating(**names, value=value, scale=(1.0, 5.0)))
        else:
            log.events.append(Action(**names, name="hide") if wrong else Click(**names))
        log.baskets.append("")
    return log


def setup_of(events: Events, **more: Any) -> Setup:
    return Setup(schedule(events)[0], 3, **more)


def groups(events: Events) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in sorted(set(zip(events.start.tolist(), events.end.tolist(), strict=True)))]


# -- by hand ----------------------------------------------------------------------------------------------------------


class Hand:
    """The protocol once more, over plain lists: what was chosen before a group, what its slate leaves out."""

    def __init__(self, log: ReplayLog, events: Events) -> None:
        self.rows = [(log.events[i], log.baskets[i]) for i in events.at.tolist()]
        self.exclusion = events.exclusion

    def before(self, first: int) -> tuple[list[Any], list[str], set[str]]:
        past = self.rows[:first]
        chosen = [event for event, _ in past if isinstance(event, Click)]
        event, basket = self.rows[first]
        out = {
            "none": set[str](), "seen": {e.item_id for e, _ in past if e.user_id == event.user_id},
            "invoice": {e.item_id for e, b in past if b == basket},
        }[self.exclusion]  # fmt: skip
        return chosen, sorted({e.item_id for e in chosen}), out

    def rank(self, first: int, at: int, scores: dict[str, float]) -> float:
        """Mid-rank of row `at` of the group that begins at `first`; nan: never seen or no target; inf: left out."""
        _, catalogue, out = self.before(first)
        event = self.rows[at][0]
        if not isinstance(event, Click) or event.item_id not in catalogue:
            return np.nan
        if event.item_id in out:
            return np.inf
        mine = scores[event.item_id]
        others = [scores[item] for item in catalogue if item not in out and item != event.item_id]
        return sum(s > mine + 1e-9 for s in others) + 0.5 * sum(abs(s - mine) <= 1e-9 for s in others)


@pytest.mark.parametrize(("protocol", "exclusion"), JUDGED)
def test_popularity_is_ranked_as_by_hand(protocol: str, exclusion: str) -> None:
    log = small()
    events = read_events(log, protocol=protocol, exclusion=exclusion)
    got = online.run_popularity(events, {"half_life": "2h"}, setup_of(events)).ranks
    hand, want = Hand(log, events), np.full(len(events), np.nan)
    for first, last in groups(events):
        chosen, catalogue, _ = hand.before(first)
        now = hand.rows[first][0].ts
        scores = {}
        for item in catalogue:
            mine = [e for e in chosen if e.item_id == item]
            p = (len(mine) + 0.5) / (len(chosen) + 0.5 * len(catalogue) + 0.5)
            for h in (31536000.0, 2419200.0, 604800.0, 86400.0, 7200.0):
                p = (sum(0.5 ** ((now - e.ts) / h) for e in mine) + 5.0 * p) / (
                    sum(0.5 ** ((now - e.ts) / h) for e in chosen) + 5.0
                )
            scores[item] = p
        for at in range(first, last):
            want[at] = hand.rank(first, at, scores)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.isnan(got), ~events.counted)


@pytest.mark.parametrize("protocol", ["line", "basket"])
def test_item_knn_is_ranked_as_by_hand(protocol: str) -> None:
    log = small()
    events = read_events(log, protocol=protocol, exclusion="none")
    got = online.run_knn(events, {"window": 4, "decay": 0.8}, setup_of(events)).ranks
    hand = Hand(log, events)
    checked = 0
    for first, last in groups(events):
        chosen, catalogue, _ = hand.before(first)
        together: dict[tuple[str, str], float] = {}
        lists: dict[str, list[str]] = {}
        for event in chosen:
            history = lists.setdefault(event.user_id, [])
            for p, other in enumerate(history[::-1][:4]):
                if other != event.item_id:
                    for pair in ((other, event.item_id), (event.item_id, other)):
                        together[pair] = together.get(pair, 0.0) + 0.8**p
            history.append(event.item_id)
        times = {item: sum(e.item_id == item for e in chosen) for item in catalogue}
        mine = lists.get(hand.rows[first][0].user_id, [])[::-1][:4]
        scores = {
            y: sum(
                0.8**p * together.get((h, y), 0.0) / np.sqrt((times[h] + 10.0) * (times[y] + 10.0))
                for p, h in enumerate(mine)
            )
            for y in catalogue
        }
        for at in range(first, last):
            item = hand.rows[at][0].item_id
            alone = sum(abs(scores[y] - scores.get(item, -1.0)) < 1e-6 for y in catalogue) == 1
            if mine and alone and events.counted[at]:  # ties go by popularity, tested above
                assert got[at] == hand.rank(first, at, scores)
                checked += 1
    assert checked > 100


def test_ease_is_the_closed_form_with_live_histories() -> None:
    log = small()
    events = read_events(log, protocol="line", exclusion="none")
    until = 200
    setup = Setup(np.array([until]), 3)
    got = refit.run_ease(events, {"l2": 5.0, "history": 3, "rows": "user"}, setup).ranks
    hand = Hand(log, events)
    chosen, catalogue, _ = hand.before(until)
    users = sorted({e.user_id for e in chosen})
    x = np.zeros((len(users), len(catalogue)))
    for event in chosen:
        x[users.index(event.user_id), catalogue.index(event.item_id)] = 1.0
    inverse = np.linalg.inv(x.T @ x + 5.0 * np.eye(len(catalogue)))
    b = -inverse / np.diag(inverse)
    np.fill_diagonal(b, 0.0)
    checked = 0
    for at in range(until, len(events)):
        event = hand.rows[at][0]
        mine = [e.item_id for e, _ in hand.rows[:at] if e.user_id == event.user_id and isinstance(e, Click)][-3:]
        known = [catalogue.index(item) for item in mine if item in catalogue]
        if not isinstance(event, Click) or event.item_id not in catalogue or not known:
            continue
        scores = sum(b[i] for i in known)
        target = scores[catalogue.index(event.item_id)]
        if (abs(scores - target) < 1e-5).sum() == 1:
            assert got[at] == (scores > target).sum()
            checked += 1
    assert checked > 40


def test_als_folds_in_as_implicit_does() -> None:
    events = read_events(planted(600), protocol="line", exclusion="none")
    method = refit.Als(events, {"factors": 8, "alpha": 10.0, "l2": 1.0, "history": 0}, setup_of(events))
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        method.fit(500)
        model = AlternatingLeastSquares(factors=8, regularization=1.0, alpha=10.0, num_threads=1)
        model.item_factors, model.user_factors = method.items, method.users
        user = int(events.user[500])
        told = model.recalculate_user(0, method.matrix(500)[user])
    # The live history counts a repeat again, so the user is one who chose nothing twice.
    mine = np.unique(events.item[:500][events.user[:500] == user])
    left, right = method.gram.copy(), np.zeros(8)
    vectors = method.items.astype(np.float64)
    for item in mine:
        refit._add(left, right, vectors[item], 1.0, 10.0)
    np.testing.assert_allclose(np.linalg.solve(left, right), told, rtol=2e-3, atol=2e-4)


def test_river_scores_all_items_as_its_own_prediction_does() -> None:
    events = read_events(planted(400), protocol="line", exclusion="none")
    chosen = {"learns": "choices", "rate": 0.05, "l2": 0.0}
    scores = river_rating.run_biased(events, chosen, setup_of(events)).scores
    model = river_rating._model("BiasedMF", chosen, 1, 2.0)
    rng = np.random.default_rng(1)
    from infra.proving.quality.reference import spans

    checked = 0
    for first, last in spans(events, lambda done: None):
        uniform = rng.random((last - first, river_rating.NEGATIVES))
        for e in range(first, last):
            user, item, n = int(events.user[e]), int(events.item[e]), int(events.known[e])
            if user in model.u_latents and item < n:
                # River adds the mean of what it learnt, the same for all items.
                want = model.predict_one(user=user, item=item) - model.global_mean.get() - model.u_biases[user]
                assert scores[e] == pytest.approx(want, abs=1e-4)
                checked += 1
            model.learn_one(user=user, item=item, y=1.0)
            for other in (uniform[e - first] * n).astype(int).tolist():
                if other != item and n:
                    model.learn_one(user=user, item=other, y=0.0)
    assert checked > 200


# -- fairness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclusion", ["none", "seen"])
def test_ours_and_the_references_count_the_same_events(exclusion: str) -> None:
    log = small(n=150)
    events = read_events(log, protocol="line", exclusion=exclusion)
    mine = ours.run_ours(log, events, seed=1, tell=lambda done: None)
    np.testing.assert_array_equal(np.isnan(mine.ranks), ~events.counted)
    assert mine.told["unknown_to_ours"] == 0
    theirs = online.run_popularity(events, {}, setup_of(events))
    if exclusion == "seen":  # what a user chose before is a miss for everyone
        seen = [
            any(events.user[k] == events.user[i] and events.item[k] == events.item[i] for k in range(i))
            for i in range(len(events))
        ]
        for ranks in (mine.ranks, theirs.ranks):
            assert np.isinf(ranks[np.array(seen) & events.counted]).all()
    judged = ~np.isnan(mine.scores)
    assert judged.all()  # chosen and pushed away, each before it is learnt


def test_the_error_of_our_ratings_is_the_replays_own() -> None:
    log = planted(200, ratings=True)
    events = read_events(log, protocol="line", exclusion="none")
    mine = ours.run_ours(log, events, seed=1, tell=lambda done: None)
    told = compare.rmse_figures(events, mine)
    assert told["rating_rmse"] == pytest.approx(mine.told["rating_rmse"])
    assert told["ratings"] == mine.told["ratings"] > 190


def test_an_item_that_came_after_the_fit_is_a_miss_and_a_user_without_history_gets_popularity() -> None:
    rows = [(f"u{t % 6}", f"i{t % 8}", 1e9 + t, "") for t in range(100)]
    rows += [("u1", "new", 1e9 + 100, ""), ("u2", "new", 1e9 + 101, ""), ("stranger", "i3", 1e9 + 102, "")]
    log = log_of(rows)
    events = read_events(log, protocol="line", exclusion="none")
    setup = Setup(np.array([100]), 3)
    popular = online.run_popularity(events, {"half_life": "1d"}, setup).ranks
    for name in ("als", "ease", "bpr"):
        method = run.REFERENCES[name][0]
        ranks = method.run(events, method.grid[0], setup).ranks
        assert np.isnan(ranks[100]), name  # never seen by anyone
        assert ranks[101] == np.inf, name  # seen by popularity, not by the last fit
        assert popular[101] < 9
        assert ranks[102] == popular[102], name


@pytest.mark.parametrize("name", RANKING)
def test_every_reference_beats_chance_on_a_planted_stream(name: str) -> None:
    events = read_events(planted(), protocol="line", exclusion="none")
    method = run.REFERENCES[name][0]
    since = len(events) // 5
    setup = Setup(np.array([since]), 7, frozen=True) if method.frozen else setup_of(events)
    grid = method.grid or run.REFERENCES[method.tuned_as][0].grid
    result = method.run(events, grid[0], setup)
    ranks, counts = compare.judged(events, result, since)
    chance = metrics.ndcg(np.arange(80.0)).mean()
    low = compare.figures(events, result, since)["ndcg@10_interval"][0]
    assert low > 1.5 * chance
    assert np.isfinite(ranks[counts]).mean() > 0.9


def test_a_model_that_diverges_does_not_shine() -> None:
    events = read_events(planted(800), protocol="line", exclusion="none")
    with np.errstate(all="ignore"):
        result = online.run_isgd(events, {"factors": 32, "rate": 50.0, "l2": 0.0}, setup_of(events))
    ranks, counts = compare.judged(events, result, 0)
    late = counts & (np.arange(len(events)) > 400)
    assert not np.isfinite(result.scores[late]).all()
    assert metrics.ndcg(ranks[late]).mean() < 0.1


def test_predictors_of_ratings_and_labels() -> None:
    rated = read_events(planted(ratings=True), protocol="line", exclusion="none")
    spread = float(np.std(rated.value))
    liked = read_events(planted(hates=True), protocol="line", exclusion="none")
    for short in ("river_biased_mf", "river_funk_mf", "river_baseline"):
        method = run.REFERENCES[f"{short}_ratings"][0]
        result = method.run(rated, {"rate": 0.025, "l2": 0.0}, setup_of(rated))
        told = compare.rmse_figures(rated, result)
        error = (result.predictions - rated.value) ** 2  # type: ignore[operator]
        if short == "river_baseline":  # what is planted lies in the pairs: biases alone can only not be far off
            assert np.sqrt(error.mean()) < 1.3 * spread
        else:
            assert error[-500:].mean() < error[:500].mean(), short
        if short == "river_biased_mf":
            assert np.sqrt(error[-500:].mean()) < 0.9 * spread
        assert told["rating_rmse_interval"][0] < told["rating_rmse"] < told["rating_rmse_interval"][1]
        result = run.REFERENCES[f"{short}_labels"][0].run(liked, {"rate": 0.05, "l2": 0.0}, setup_of(liked))
        assert compare.auc_figures(liked, result)["auc"] > (0.6 if short == "river_biased_mf" else 0.45), short


def test_the_schedule_fits_the_span() -> None:
    def told(seconds: float, n: int = 400) -> tuple[int, str]:
        log = log_of([(f"u{t % 5}", f"i{t % 9}", 1e9 + seconds * t / n, "") for t in range(n)])
        fits, name = schedule(read_events(log, protocol="line", exclusion="none"))
        return len(fits), name

    assert told(2 * 86400.0) == (47, "hourly")
    assert told(60 * 86400.0) == (59, "daily")
    assert told(900 * 86400.0) == (99, "every 1 % of the events")
    assert told(3600.0) == (99, "every 1 % of the events")


# -- freshness --------------------------------------------------------------------------------------------------------


def test_a_delay_shorter_than_the_gaps_changes_nothing_and_a_long_one_takes_what_was_learnt() -> None:
    first = np.random.default_rng(3).integers(0, 6, 600)
    # Each user chooses one of six at random, then always its partner: who does not know the one cannot tell the other.
    log = log_of(
        [(f"u{t % 5}", f"i{2 * first[t % 5 + 5 * (t // 10)] + t // 5 % 2}", 1e9 + 30.0 * t, "") for t in range(600)]
    )
    events = read_events(log, protocol="line", exclusion="none")

    def ranks(**delay: float) -> Any:
        found = ours.run_ours(log, events, seed=1, tell=lambda done: None, **delay).ranks
        return np.where(np.isnan(found), np.inf, found)[events.counted]

    fresh = ranks()
    np.testing.assert_array_equal(ranks(reading=1.0), fresh)
    np.testing.assert_array_equal(ranks(learning=1.0), fresh)
    # Users come every 150 s: a profile of 200 s ago lacks the newest item.
    late = metrics.ndcg(ranks(reading=200.0)).mean()
    assert late < 0.8 * metrics.ndcg(fresh).mean()
    assert np.isinf(ranks(learning=1e9)).all()


def test_a_held_back_history_is_an_earlier_one() -> None:
    replay = ours.Delayed(reading=100.0)
    seen: list[tuple[float, list[float]]] = []
    plain = Replay._history
    try:
        for t, item in ((0, "a"), (50, "b"), (120, "c"), (160, "d"), (400, "e")):
            event = Click(user_id="u", item_id=item, ts=1e9 + t)
            replay._at([event])
            history = replay._history(replay.store.read_now(0, ["u"]))
            seen.append((t, [float(x - 1e9) for x in history.times]))
            replay.step(event, "")
    finally:
        assert Replay._history is plain
    assert seen == [(0, []), (50, []), (120, [0.0]), (160, [50.0, 0.0]), (400, [160.0, 120.0, 50.0, 0.0])]


# -- intervals --------------------------------------------------------------------------------------------------------


def test_leads_are_paired() -> None:
    events = read_events(planted(1500), protocol="line", exclusion="none")
    theirs = online.run_popularity(events, {}, setup_of(events))
    same = compare.lead(events, theirs, theirs)
    assert same["ndcg@10"] == 0.0
    assert same["ndcg@10_interval"] == [0.0, 0.0]
    rng = np.random.default_rng(1)
    better = replace(theirs, ranks=np.where(rng.random(len(events)) < 0.5, 0.0, 1.0) * theirs.ranks)
    lead, own = compare.lead(events, better, theirs), compare.figures(events, better)
    base = compare.figures(events, theirs)
    assert lead["ndcg@10"] == pytest.approx(own["ndcg@10"] - base["ndcg@10"])
    assert lead["hit_rate@10"] == pytest.approx(own["hit_rate@10"] - base["hit_rate@10"])
    low, high = lead["ndcg@10_interval"]
    assert low < lead["ndcg@10"] < high
    # A miss where ours noted nothing: the event set is not ours to shrink.
    blind = replace(theirs, ranks=np.full(len(events), np.nan))
    assert compare.lead(events, blind, theirs)["ndcg@10"] == pytest.approx(-base["ndcg@10"])


def test_paired_errors_of_ratings() -> None:
    events = read_events(planted(500, ratings=True), protocol="line", exclusion="none")
    none = np.full(len(events), np.nan)
    good = Result(none, none, predictions=events.value + 0.5)
    bad = Result(none, none, predictions=events.value - 1.0)
    lead = compare.rmse_lead(events, good, bad)
    assert lead["rating_rmse"] == pytest.approx(-0.5)
    assert lead["rating_rmse_interval"] == pytest.approx([-0.5, -0.5])


# -- the whole --------------------------------------------------------------------------------------------------------

QUICK = ["ours", "popularity", "isgd", "ease", "ease_frozen"]


def bench(folder: Path | None, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"protocol": "line", "exclusion": "none", "only": QUICK, "freshness": 0, **more}
    return run.bench(planted(400, hates=True), folder=folder, **options)


def test_a_run_that_was_killed_goes_on_and_a_second_one_computes_nothing(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what == "ease":
            raise Killed

    with pytest.raises(Killed):
        bench(tmp_path, advance=kill)
    kept = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir())
    assert kept.count("isgd") == 1
    assert "ease" not in kept
    begun: list[str] = []
    first = bench(tmp_path, advance=lambda what, *_: begun.append(what))
    assert "isgd" not in begun
    assert "ease" in begun
    assert "ours" in begun
    again = bench(tmp_path, advance=lambda what, *_: pytest.fail(f"{what} was computed again"))
    assert again["cache"]["made"] == 0
    for name in ("ours", "references", "lead", "over_time"):
        assert again[name] == first[name]
    part = next(tmp_path.glob("ours-*.npz"))
    part.write_bytes(part.read_bytes()[:100])
    assert bench(tmp_path)["cache"]["made"] == 1


def test_changed_code_or_events_are_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ["popularity", "isgd"]
    bench(tmp_path, only=only)
    plain = code_of
    monkeypatch.setattr(run, "code_of", lambda *paths: "new" if run.OURS in paths else plain(*paths))
    assert bench(tmp_path, only=only)["cache"]["made"] == 0
    monkeypatch.setattr(run, "code_of", lambda *paths: "new" if any("online" in p for p in paths) else plain(*paths))
    assert bench(tmp_path, only=only)["cache"]["made"] > 0
    monkeypatch.undo()
    assert bench(tmp_path, only=only, exclusion="seen")["cache"]["made"] > 0


def test_the_cache_keeps_what_it_was_given(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new")
    assert cache.load("x", {"a": 1}) is None
    cache.save("x", {"a": 1}, {"ranks": np.array([0.0, np.nan, np.inf])}, {"told": [1]})
    found = cache.load("x", {"a": 1})
    assert found is not None
    np.testing.assert_array_equal(found[0]["ranks"], [0.0, np.nan, np.inf])
    assert found[1]["told"] == [1]
    assert cache.load("x", {"a": 2}) is None


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(None, freshness=100)
    for row in (report["ours"], *report["references"].values()):
        for key in ("hit_rate@10", "ndcg@10"):
            low, high = row[f"{key}_interval"]
            assert low <= row[key] <= high
        assert row["seconds"] >= 0
    assert list(report["lead"]) == list(report["references"]) == QUICK[1:]
    for lead in report["lead"].values():
        assert {"ndcg@10", "ndcg@10_interval", "hit_rate@10", "hit_rate@10_interval"} <= set(lead)
    for name in ("ours", "isgd", "ease"):
        row = report["ours"] if name == "ours" else report["references"][name]
        assert 0.0 <= row["auc_interval"][0] <= row["auc"] <= row["auc_interval"][1] <= 1.0
    assert len(report["references"]["isgd"]["grid"]) == 12
    best = max(report["references"]["isgd"]["grid"], key=lambda row: row["figure"])
    assert report["references"]["isgd"]["chosen"] == {k: v for k, v in best.items() if k != "figure"}
    assert report["references"]["ease"]["schedule"] == "every 1 % of the events"
    assert report["references"]["ease_frozen"]["judged_from"] == 80
    assert sum(period["events"] for period in report["over_time"]["ours"]) == report["counted"]
    assert list(report["freshness"]["learning"]) == list(ours.DELAYS)
    assert report["freshness"]["user_state"]["0"]["loses"]["ndcg@10"] == 0.0
    report = {"data": "planted", **report}
    json.dumps(report)
    show(report, console())
    assert "Freshet" in capsys.readouterr().out
    plot(report, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_command_line(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rows = [f"u{t % 9},i{(t * t) % 17},{1e9 + 60 * t}" for t in range(200)]
    log.write_text("\n".join(["uid,sku,when", *rows]) + "\n")
    call = ["bench", "quality", "--data", str(log), "--columns", "user=uid,item=sku,ts=when", "--json"]
    call += ["--only", "popularity,item_knn", "--resume", str(tmp_path / "kept"), "--delays", "0"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report["references"]) == {"popularity", "item_knn"}
    assert (report["data"], report["events"], report["exclusion"]) == ("log.csv", 200, "none")
    assert list((tmp_path / "kept").glob("item_knn-*.npz"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--data PATH"),
        (["--protocol", "basket"], "this log has none"),
        (["--protocol", "page"], "expected line or basket"),
        (["--only", "magic"], "expected some of ours, popularity"),
    ],
)
def test_what_a_person_got_wrong(tmp_path: Path, words: list[str], expected: str) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item,ts\na,b,1000000000\na,c,1000000001\n")
    data = ["--data", str(log)] if words else []
    done = CliRunner().invoke(app, ["bench", "quality", *data, *words, "--resume", str(tmp_path / "kept")])
    assert isinstance(done.exception, ReplayError)
    assert expected in str(done.exception)
