"""Every learner keeps the contract; what the learner learns: joins, negatives, mixture, refill."""

from __future__ import annotations

import numpy as np
import pytest

from models.bandit.last_layer import RIDGE
from models.decay import RATES
from models.encoder import RATE, SQUARE
from models.examples import DWELL, ENTERS, IMPRESSION, SHOWN, VIEW, VOICE, Entries, Shown
from models.factors import mix64
from models.features import F
from models.learner import CALIBRATED, Learned, Learner, Sums
from models.motion import Motion
from models.ranker import Ranker
from models.rows import LEARNT, Rows
from models.window import WINDOW_S, Origin
from streaming.training.process import judged, told_sums
from tests.entries import KEYS, Walk, cuts, entry, shown
from tests.learner_checks import CHECKS, EXEMPT, SUBJECTS, Subject


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, subject: type[Subject]) -> None:  # type: ignore[no-untyped-def]
    if (check.__name__, subject) in EXEMPT:
        pytest.skip(EXEMPT[check.__name__, subject])
    check(subject)


def impression(slate: int, items: list[int], candidates: list[int], time: float, seed: int = 0) -> Entries:
    features = np.random.default_rng(seed).normal(size=(len(candidates), F))
    payload = shown(slate, items, candidates, features)
    return entry(-1, time, flags=0, kind=IMPRESSION, extra=payload, slates=(slate,))


def outcome(item: int, time: float, *slates: int) -> Entries:
    return entry(item, time, flags=ENTERS | VOICE | SHOWN, slates=slates)


def test_an_outcome_trains_on_the_newest_slate_that_lists_it() -> None:
    learner = Learner(rows=Rows())
    learner.learn(impression(1, [1, 2], [1, 2, 3, 4], 1e9))
    learner.learn(impression(2, [5, 6], [5, 6, 7, 3], 1e9 + 1))
    assert learner.learn(outcome(3, 1e9 + 2, 2, 1)).lists == 1
    expected = Ranker()
    expected.learn(np.random.default_rng(0).normal(size=(4, F)).astype(np.float16).astype(float), 3)
    np.testing.assert_array_equal(learner.model.ranker.weights, expected.weights)
    assert learner.learn(outcome(4, 1e9 + 3, 2, 1)).joined == 1  # only the older one lists it
    assert learner.learn(outcome(9, 1e9 + 4, 2, 1)).joined == 0  # in no list: counts and encoder only
    assert learner.learn(outcome(3, 1e9 + 5)).joined == 0


def test_an_exposure_counts_when_it_happens_and_its_success_once_when_it_comes() -> None:
    """The last layer: exposures at once, then a view, the choice and a dwell, each however often it is said."""
    learner, items = Learner(rows=Rows(), rewards=[("*", "click", 1.0), ("*", "dwell", 1.0)]), [10, 11, 12]
    layer = learner.model.last_layer
    learner.learn(impression(1, items, items, 1e9))
    learner.learn(impression(1, items, items, 1e9))  # said again
    assert layer.slates == 1
    assert layer.b[-1] < 0.0  # nothing chosen yet: less than was expected
    examined = 1.0 + 1.0 / np.log2(3.0) + 0.5
    assert layer.precision[-1, -1] == pytest.approx(RIDGE + examined)
    for _ in range(2):
        learner.learn(entry(12, 1e9 + 1, flags=0, kind=VIEW, slates=(1,)))
    assert layer.precision[-1, -1] == pytest.approx(RIDGE + examined + 0.5)  # certainly looked at
    expected = float(layer.b[-1])
    for _ in range(2):
        learner.learn(outcome(12, 1e9 + 2, 1))
    assert layer.b[-1] == pytest.approx(expected + 0.5)  # half of the rewards' weights
    dwell = entry(12, 1e9 + 3, flags=SHOWN, kind=DWELL, slates=(1,))
    dwell.value[:] = 60.0
    for _ in range(2):
        learner.learn(dwell)
    assert layer.b[-1] == pytest.approx(expected + 1.0)
    learner.learn(outcome(50, 1e9 + 4, 1))  # never shown
    assert layer.b[-1] == pytest.approx(expected + 1.0)
    assert layer.precision[-1, -1] == pytest.approx(RIDGE + examined + 0.5)


def test_the_window_is_bounded_in_stream_time() -> None:
    learner = Learner(rows=Rows())
    learner.learn(impression(1, [1], [1, 2], 1e9))
    learner.learn(impression(2, [1], [1, 2], 1e9 + WINDOW_S + 1))
    assert list(learner.window) == [2]


@pytest.mark.parametrize(
    ("views", "chosen", "examined"),
    [([], 1, [0, 1, 2]), ([4], 1, [0, 1, 2, 4]), ([], 0, [0, 1]), ([], 4, [0, 1, 2, 3, 4])],
)
def test_shown_items_alone_use_what_was_examined(views: list[int], chosen: int, examined: list[int]) -> None:
    """Without logged candidates: viewed items, and those down to one below the lowest choice, are the negatives."""
    learner, items = Learner(rows=Rows()), [10, 11, 12, 13, 14]
    learner.learn(impression(1, items, items, 1e9))
    for place in views:
        learner.learn(entry(items[place], 1e9, flags=0, kind=VIEW, slates=(1,)))
    learner.learn(outcome(items[chosen], 1e9 + 1, 1))
    expected, x = Ranker(), np.random.default_rng(0).normal(size=(5, F)).astype(np.float16).astype(float)
    expected.learn(x[examined], examined.index(chosen))
    np.testing.assert_array_equal(learner.model.ranker.weights, expected.weights)


def test_the_mixture_goes_to_what_predicts() -> None:
    """Items that live for a day each: half-lives of hours and days gain, years lose."""
    learner, rng = Learner(rows=Rows()), np.random.default_rng(0)
    for i in range(4000):
        time = 1.7e9 + i * 120.0
        item = (int(time // 86400) * 3 + int(rng.integers(3))) % len(KEYS)
        learner.learn(entry(item, time))
    mixture = learner.model.mixture
    assert mixture.sum() == pytest.approx(1.0)
    assert mixture[:5].sum() > 0.8
    assert RATES[0] > RATES[-1]


def test_vectors_learn_what_follows_what() -> None:
    """On a walk i -> i + 1 the encoder's score of the next item is far above the others'."""
    learner = Learner(rows=Rows())
    entries = Walk(n=1500, users=3).entries()
    for part in cuts(entries, list(range(8, 1500, 8))):
        learner.learn(part)
    factors, above = learner.model.factors, []
    for i in range(50):
        history = learner.rows.find(KEYS[[i]])
        scores = factors.vectors[learner.rows.find(KEYS)] @ factors.encode(history)
        above.append(float((scores < scores[i + 1]).mean()))
    assert np.mean(above) > 0.85


def test_refill_brings_back_the_window() -> None:
    parts = cuts(Walk(n=300, width=F, pace=60.0).entries(), list(range(5, 300, 5)))
    straight, again = Learner(rows=Rows()), Learner(rows=Rows())
    for number, part in enumerate(parts):
        straight.learn(part, Origin(number, straight.stream_time))
    origin = straight.window_origin()
    assert origin is not None
    again.stream_time = origin.time
    for number, part in enumerate(parts):
        if number >= origin.offset:
            again.refill(part, Origin(number, again.stream_time))
    assert list(again.window) == list(straight.window)
    for slate, held in straight.window.items():
        assert again.window[slate].chosen == held.chosen
        assert again.window[slate].viewed == held.viewed
        assert again.window[slate].told == held.told
        assert again.window[slate].hit == held.hit
    assert again.learnt == 0


def test_slates_hits_and_rewards_are_told_by_policy_each_hit_once() -> None:
    learner, items = Learner(rows=Rows()), [10, 11, 12]
    came = [learner.learn(impression(slate, items, [*items, 13], 1e9 + slate)).sums for slate in (1, 2, 3)]
    assert came == [{"slates_epsilon": 1.0}] * 3
    assert learner.learn(outcome(13, 1e9 + 4, 1)).sums == {}, "never shown: no hit"
    hit = learner.learn(outcome(12, 1e9 + 5, 1)).sums
    assert hit["hits_epsilon"] == 1.0
    assert hit["ndcg_epsilon"] == pytest.approx(0.5)
    assert hit["reward_epsilon"] > 0.0
    again = learner.learn(outcome(10, 1e9 + 6, 1)).sums
    assert "hits_epsilon" not in again, "a slate is hit once"
    assert again["reward_epsilon"] > 0.0
    assert learner.learn(outcome(10, 1e9 + 7, 2)).sums["ndcg_epsilon"] == 1.0
    foreign = impression(4, items, items, 1e9 + 8)
    payload = Shown.from_bytes(foreign.extra[0])
    payload.policy, payload.slate = "theirs", 5
    foreign.extra = [payload.to_bytes()]
    assert learner.learn(foreign).sums == {"slates_other": 1.0}
    assert Sums({"a": 1.0, "b": 2.0}) + Sums({"a": 0.5, "c": -3.0}) == {"a": 1.5, "b": 2.0, "c": -3.0}


def test_predicted_and_chosen_are_of_the_same_items() -> None:
    """What is chosen later of a judged slate counts as chosen, each item once, however often it is told."""
    slate = next(n for n in range(1, 1000) if float(mix64(np.uint64(n))) < CALIBRATED * 2.0**64)
    learner, items = Learner(rows=Rows()), [10, 11, 12, 13]
    learner.learn(impression(slate, items, [*items, 14], 1e9))
    told = [judged(learner.learn(outcome(item, 1e9 + k, slate))) for k, item in enumerate((11, 11, 13, 11, 14))]
    first, again, later, once_more, unseen = told
    assert (first["shown"], first["shown_chosen"], later["shown"], later["shown_chosen"]) == (4, 1, 0, 1)
    assert again == once_more == unseen == {}
    assert 0.0 < first["shown_predicted"] < 4.0
    assert first["click_loss"] > 0.0
    assert "click_loss" not in later
    assert learner.model.calibration.numbers[0] == 1.0
    assert judged(Learned()) == {}


def test_what_a_step_tells_of_all_policies_is_the_sum_of_each() -> None:
    sums = Sums(slates_epsilon=3, slates_ucb=2, ndcg_epsilon=0.5, ndcg_ucb=1, alarm_encoder=1)
    told = told_sums(sums)
    assert (told["slates"], told["ndcg_sum"], told["alarm_encoder"]) == (5, 1.5, 1)
    assert (told["slates_ucb"], told["ndcg_epsilon"]) == (2, 0.5)
    assert "alarm" not in told
    assert told_sums(Sums()) == {}


def test_how_far_a_step_moved_is_read_off_and_changes_nothing() -> None:
    walk = Walk(n=1200, width=F, users=3)
    parts = cuts(walk.entries(), list(range(8, 1200, 8)))
    watched, alone, motion = Learner(rows=Rows()), Learner(rows=Rows()), Motion()
    told = []
    for part in parts:
        before = watched.model.factors.vectors.copy()
        done = watched.learn(part)
        rows = watched.take_changed()
        told.append(motion.step(watched, rows, done))
        alone.learn(part)
        alone.take_changed()
        figures = told[-1]
        if figures.get("vector_drift_n") == len(rows):  # every one was touched before
            then, now = before[rows], watched.model.factors.vectors[rows]
            cosines = (then * now).sum(1) / np.linalg.norm(then, axis=1) / np.linalg.norm(now, axis=1)
            assert figures["vector_drift"] == pytest.approx(1.0 - cosines.mean(), rel=1e-3, abs=1e-6)
    last = told[-1]
    assert sum(figures.get("vector_drift_n", 0) > 0 for figures in told) > 100
    assert 0.0 < last["vector_drift"] < 0.1
    assert 0.0 < last["rate_encoder"] < told[0]["rate_encoder"] <= RATE / np.sqrt(SQUARE)
    assert last["gradient_norm_encoder"] > 0.0
    assert last["rate_linear"] > 0.0
    assert last["scorer"] in (0.0, 1.0)
    assert watched.dense_state() == alone.dense_state()
    everything = watched.rows.held_by(LEARNT)
    assert watched.pack_state(everything) == alone.pack_state(everything)


def test_the_gradient_of_the_ranker_is_what_its_squares_grew_by() -> None:
    learner, motion = Learner(rows=Rows()), Motion()
    no_rows = np.empty(0, np.int64)
    motion.step(learner, no_rows, Learned())
    before = learner.model.ranker.square_sum()
    learner.learn(impression(1, [10, 11], [10, 11, 12], 1e9))
    done = learner.learn(outcome(11, 1e9 + 1, 1))
    grown = learner.model.ranker.square_sum() - before
    assert motion.step(learner, no_rows, done)["gradient_norm"] == pytest.approx(np.sqrt(grown), rel=1e-4)
    learner.model.ranker.loosen(0.1)
    assert "gradient_norm" not in motion.step(learner, no_rows, done), "squares that fell say nothing of gradients"
    assert "gradient_norm" not in motion.step(Learner(rows=Rows()), no_rows, done), "another learner's"
