"""`freshet compare` and `freshet evaluate --policy`: no change is no difference, what is worse is found, the truth lies
inside, a greedy log says nothing, settings that a replay cannot see are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from infra.cli import app
from infra.evaluating.candidate import chosen, read_candidate
from infra.evaluating.export import Files
from infra.evaluating.labels import event_row
from infra.evaluating.own_log import LoggedReplay, OwnLog, difference, judge, read_own_log, run, slate_weights
from infra.evaluating.paired import compare
from infra.settings import Settings, SettingsError
from models import ope
from models.recommend import Request, as_served, recommend
from streaming.events import Action, Click, Dwell, Rating
from streaming.replay import exports
from streaming.replay.exports import ExportError, Position, Served
from streaming.replay.logs import ReplayLog
from streaming.replay.prequential import Chosen

ITEMS, USERS, LONG = 120, 60, 5
START = 1.7e9


def settings(**given: Any) -> Settings:
    return Settings.load(env={}, running=False, **{"first_share": 0.0, "feature_share": 1.0, **given})


def rates(user: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a user clicks of what is shown, whatever its position: the first items more, an own tenth still more."""
    likes = 0.02 + 0.3 * np.exp(-np.arange(ITEMS) / 12.0)
    likes[user % 10 :: 10] += 0.1
    return likes


@cache
def live(slates: int, world: int, *, come_back: bool = True, **given: Any) -> OwnLog:
    """Run these settings in a small world and return what an export of it would hold.

    Users who come back have seen the best items before, which are not shown again: what a policy shows now costs it
    later. No estimate from a log can know that; where everybody comes once it need not.
    """
    how, rng, log = settings(**given), np.random.default_rng(world), OwnLog()
    replay, at = LoggedReplay(how), 0

    def put(thing: Any) -> None:
        nonlocal at
        at += 1
        order = START + 10.0 * at, 0, at
        if isinstance(thing, Served):
            thing.order = order
            log.slates += 1
        log.things.append((order, thing))

    def hear(click: Click) -> None:
        put(Click(user_id=click.user_id, item_id=click.item_id, ts=click.ts, slate_id=click.slate_id))
        replay.hear(click)

    known = np.mean([rates(user) for user in range(10)], axis=0) ** 2
    for k, item in enumerate(rng.choice(ITEMS, 500, p=known / known.sum())):
        hear(Click(user_id=f"u{k % USERS}", item_id=f"i{item}", ts=START + k))
    for k in range(slates):
        user, ts = int(rng.integers(USERS)) if come_back else USERS + k, START + 10.0 * (at + 1)
        history = replay._history(replay.store.read_now(0, [f"u{user}"]))
        slate = recommend(
            replay.items, replay.learner.model, history,
            Request(
                f"s{world}-{k}", ts, n=LONG, policy=how.policy_of("home"), epsilon=how.epsilon, first=how.first_share,  # type: ignore[arg-type]
                keep_candidates=True,
            ),
        )  # fmt: skip
        ids = [replay.items.ids[row] for row in slate.rows]
        clicked = rng.random(len(ids)) < rates(user)[[int(name[1:]) for name in ids]]
        shown = zip(ids, slate.propensities.tolist(), clicked.tolist(), strict=True)
        served = Served(
            f"s{world}-{k}", ts, f"u{user}", "home", slate.impression().policy, True, (0.0, 0, 0),
            [Position(name, p, float(hit)) for name, p, hit in shown],
        )  # fmt: skip
        put(served)
        replay.show(served)
        for name, hit in zip(ids, clicked, strict=True):
            if hit:
                hear(Click(user_id=f"u{user}", item_id=name, ts=ts + 1.0, slate_id=served.slate_id))
    return log


def expected(log: OwnLog, candidate: Settings) -> float:
    """Return the mean clicks a position of slates that the candidate draws itself at each slate of a log."""
    replay, found = LoggedReplay(candidate), []
    for _, thing in log.things:
        if isinstance(thing, Served):
            history = replay._history(replay.store.read_now(0, [thing.user_id]))
            request = Request(f"own-{thing.slate_id}", thing.ts, n=LONG, epsilon=candidate.epsilon)
            rows = recommend(replay.items, replay.learner.model, history, request).rows
            places = [int(replay.items.ids[row][1:]) for row in rows]
            found.append(rates(int(thing.user_id[1:]))[places].mean())
            replay.show(thing)
        elif isinstance(thing, Click):
            replay.hear(thing)
    return float(np.mean(found))


def mean_reward(log: OwnLog) -> float:
    return float(np.mean([p.reward for _, thing in log.things if isinstance(thing, Served) for p in thing.positions]))


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_the_logging_policy_itself_weighs_one_and_changes_nothing() -> None:
    rows = run(live(400, 1, epsilon=0.4), settings(epsilon=0.4))
    assert rows.slates == 400
    np.testing.assert_array_equal(np.array(rows.evaluation), np.array(rows.logging))
    told = judge(rows)
    assert told["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert told["estimates"]["position"]["value"] == 0.0
    assert "expected 500" in told["estimates"]["slate"]["reason"]
    assert told["verdict"] == "no difference shown"
    assert told["effective_sample_size"] == pytest.approx(2000)


@pytest.mark.parametrize("policy", ["softmax", "thompson"])
def test_policies_with_draws_weigh_one_too(policy: str) -> None:
    rows = run(live(60, 2, policy=policy, first_share=0.05), settings(policy=policy, first_share=0.05))
    np.testing.assert_array_equal(np.array(rows.evaluation), np.array(rows.logging))


def test_an_epsilon_log_tells_what_less_exploration_would_earn() -> None:
    """Against what the candidate would show at each moment of the log, and against a run of its own.

    The run has noise of its own, and learns from what it showed, which the estimate does not claim to know.
    """
    log, candidate = live(600, 1, come_back=False, epsilon=0.4), settings(epsilon=0.1)
    told = judge(run(log, candidate))
    apart, own = told["difference"], mean_reward(log)
    assert told["verdict"] == "better"
    assert apart["low"] < expected(log, candidate) - own < apart["high"]
    ran = mean_reward(live(600, 5, come_back=False, epsilon=0.1))
    noise = 1.96 * float(np.sqrt(ran * (1.0 - ran) / (600 * LONG)))
    assert abs(ran - own - apart["value"]) < np.hypot(apart["value"] - apart["low"], noise)
    assert told["overlap"]["mean_weight"] == pytest.approx(1.0, abs=0.05)
    worse = judge(run(log, settings(epsilon=0.55)))
    assert worse["verdict"] == "worse"


def test_only_drawing_otherwise_is_told_from_a_log_of_another_state_of_the_model() -> None:
    """The learner that served was another one, so that its best item often is not the replay's."""
    log = live(400, 3, epsilon=0.4, seed=9)
    alone = judge(run(log, settings(epsilon=0.1)))
    assert alone["verdict"] == ope.NO_OVERLAP
    present, less = settings(epsilon=0.4), settings(epsilon=0.1)
    told = judge(run(log, less, present))
    assert told["redrawn_slates"] == 400
    truth = expected(log, settings(epsilon=0.1, seed=9)) - mean_reward(log)
    assert told["difference"]["low"] < truth < told["difference"]["high"]
    assert truth < told["estimates"]["position"]["low"]  # what was left for lower positions flatters it
    assert judge(run(log, present, present))["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    wrong = judge(run(log, less, settings(epsilon=0.2)))
    assert wrong["verdict"] == ope.NO_OVERLAP
    assert "--logged" in wrong["reason"]


def test_a_greedy_log_says_nothing() -> None:
    told = judge(run(live(120, 1, policy="greedy"), settings(epsilon=0.2)))
    assert told["verdict"] == ope.NO_OVERLAP
    assert told["difference"]["value"] is None
    assert told["reason"].startswith("all 120 slates were drawn greedily")


def test_weights_of_slates() -> None:
    weights, effective = slate_weights(np.array([2.0, 0.5, 1.0, 3.0]), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(weights["cascade"], [2 / 1.5, 0.5, 1 / 1.5, 1.5])
    np.testing.assert_allclose(weights["slate"], [1.0, 1.0, 3.0, 3.0])
    assert effective["slate"] == pytest.approx(16 / 10)


def test_a_candidate_that_shows_other_things_has_no_overlap() -> None:
    told = judge(run(live(400, 1, epsilon=0.4), settings(policy="greedy", head_weights=[["click", -1]])))
    assert told["verdict"] == ope.NO_OVERLAP
    assert "expected 500" in told["reason"]
    assert told["value"]["value"] is None


def test_differences_hold_the_truth() -> None:
    """Clustered rewards, known weights: the interval of the paired difference covers as often as it says."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        user = rng.integers(0, 80, 1500)
        taste = rng.normal(0.0, 0.03, 80)
        good = rng.random(1500) < 0.3
        weight = np.where(good, 0.6 / 0.3, 0.4 / 0.7)
        reward = (rng.random(1500) < np.clip(np.where(good, 0.12, 0.06) + taste[user], 0.0, 1.0)).astype(np.float64)
        apart = difference(reward, weight, user, rng, draws=200)
        held += apart["low"] <= 0.3 * 0.06 <= apart["high"]
    assert held / 200 >= 0.93


def test_what_is_not_retrieved_has_probability_zero_and_is_left_out_of_the_others() -> None:
    replay = LoggedReplay(settings(epsilon=0.2))
    for i in range(30):
        replay.hear(Click(user_id=f"u{i % 3}", item_id=f"i{i}", ts=START + i))
    request = Request("s", START + 100.0, n=3, epsilon=0.2, keep_candidates=True)
    model, history = replay.learner.model, replay._history(replay.store.read_now(0, ["nobody"]))
    keys = recommend(replay.items, model, history, request).items
    among = np.array([keys[0], 77, keys[1], 78, keys[2]], np.uint64)
    whole, holed = (as_served(replay.items, model, history, request, each) for each in (keys, among))
    np.testing.assert_array_equal(holed.propensities[[0, 2, 4]], whole.propensities)
    assert holed.propensities[[1, 3]].tolist() == [0.0, 0.0]
    assert holed.candidates[-2:].tolist() == [77, 78]
    assert len(holed.features) == len(holed.candidates) == len(whole.candidates) + 2
    assert holed.impression().items.tolist() == among.tolist()


# -- compare ----------------------------------------------------------------------------------------------------------


def walks(n: int) -> ReplayLog:
    """Users who walk i -> i + 1, rate what they see, and hide every seventh item."""
    rng, log, place = np.random.default_rng(0), ReplayLog(), dict[int, int]()
    for t in range(n):
        user = int(rng.integers(25))
        place[user] = (place.get(user, 0) + (1 if rng.random() < 0.85 else int(rng.integers(40)))) % 40
        given: dict[str, Any] = {"user_id": f"u{user}", "item_id": f"i{place[user]}", "ts": START + 30.0 * t}
        if place[user] % 7 == 0:
            log.events.append(Action(**given, name="hide"))
        elif rng.random() < 0.3:
            log.events.append(Rating(**given, value=float(1 + place[user] % 5)))
        else:
            log.events.append(Click(**given))
        log.baskets.append("")
    return log


def both(a: Chosen, b: Chosen, n: int = 600) -> dict[str, Any]:
    return compare(walks(n), ("a.toml", a, 1), ("b.toml", b, 1), exclusion="none")


def test_a_configuration_does_not_differ_from_itself() -> None:
    report = both(Chosen(), Chosen())
    assert set(report["difference"]) == {"hit_rate@10", "ndcg@10", "rating_rmse", "auc"}
    for apart in report["difference"].values():
        assert apart == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert report["verdict"] == "no difference shown"
    assert report["says"].startswith("This log shows no difference between b.toml and a.toml")


def test_a_worse_setting_is_found_worse_and_the_better_one_better() -> None:
    turned = Chosen(head_weights=(("click", -1.0), ("hide", 10.0)))
    report = both(Chosen(), turned)
    assert report["verdict"] == "worse"
    assert report["difference"]["ndcg@10"]["high"] < 0.0
    assert report["difference"]["auc"]["high"] < 0.0
    assert report["b"]["ndcg@10"] - report["a"]["ndcg@10"] == pytest.approx(report["difference"]["ndcg@10"]["value"])
    assert "worse than a.toml" in report["says"]
    assert "AUC -" in report["says"]
    assert both(turned, Chosen(), 400)["verdict"] == "better"


# -- files and verbs --------------------------------------------------------------------------------------------------


def saved(log: OwnLog, folder: Path) -> Path:
    """The log as `freshet export` writes it."""
    slates, events = list[dict[str, Any]](), list[dict[str, Any]]()
    for (recorded, partition, offset), thing in log.things:
        place = {"recorded": recorded, "partition": partition, "offset": offset}
        if isinstance(thing, Served):
            for k, position in enumerate(thing.positions):
                row = dict.fromkeys(exports.SLATES) | {
                    "slate_id": thing.slate_id, "ts": thing.ts, "user_id": thing.user_id, "surface": "home",
                    "policy": thing.policy, "step": 0, "position": k, "item_id": position.item_id, "candidates": 9,
                    "propensity": position.propensity, "channel": "popular", "viewed": 0, "clicked": 0,
                    "reward": position.reward, **place,
                }  # fmt: skip
                slates.append(row)
        elif isinstance(thing, Click | Dwell):
            events.append(event_row(thing, recorded, partition, offset))
    with Files({"slates": folder / "slates.csv", "events": folder / "events.csv.gz"}) as files:
        files.add("slates", slates)
        files.add("events", events)
    return folder


@pytest.fixture
def toml(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "candidate.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def told(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in words else result.stdout


def test_the_verb_evaluates_an_export(tmp_path: Path, toml: Callable[..., Path]) -> None:
    folder = saved(live(400, 1, epsilon=0.4), tmp_path / "log")
    again = read_own_log(folder)
    assert [order for order, _ in again.things] == [order for order, _ in live(400, 1, epsilon=0.4).things]
    same = toml("epsilon = 0.4\nfirst_share = 0.0\nfeature_share = 1.0", "present.toml")
    report = told("evaluate", "--log", folder, "--policy", same, "--logged", same, "--json")
    assert report["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert report["policy"] == {"epsilon": 0.4, "first_share": 0.0, "feature_share": 1.0}
    shown = told("evaluate", "--log", folder, "--policy", toml("epsilon = 0.1"), "--logged", same)
    assert "epsilon = 0.1" in shown
    assert "the scores of 400 slates are the log's" in shown
    assert "better" in shown
    assert "does not depend on those below it" in " ".join(shown.split())


def test_the_verb_compares(tmp_path: Path, toml: Callable[..., Path]) -> None:
    log = walks(200)
    lines = [f"{e.user_id},{e.item_id},{e.ts}" for e in log.events]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,ts", *lines]) + "\n")
    now, turned = toml("", "now.toml"), toml('head_weights = [["click", -1]]', "turned.toml")
    words = ("compare", now, turned, "--log", tmp_path / "log.csv", "--format", "csv")
    report = told(*words, "--json")
    assert report["verdict"] == "worse"
    assert report["a"]["name"] == "now.toml"
    pytest.importorskip("matplotlib")
    shown = told(*words, "--limit", 100, "--plot", tmp_path / "both.png")
    assert "turned.toml ranks what users did next worse than now.toml" in " ".join(shown.split())
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("text", "drawing", "said"),
    [
        ("port = 9000", False, "port: a replay cannot see it; expected some of event_weights, head_weights"),
        ("port = 9000", True, "port: a replay cannot see it"),
        ("epsilon = 0.1", False, "epsilon: a replay ranks and draws nothing"),
        ("epsilom = 0.1", True, "epsilom: no such setting; expected some of"),
        ("epsilon = 2", True, "setting epsilon .argument.: expected a number from 0 to 1, got 2"),
        ('head_weights = [["clicks", 1]]', False, "head one of click, dwell"),
        ("epsilon 0.1", True, "expected settings as TOML, such as: epsilon = 0.1, got"),
    ],
)
def test_settings_that_are_refused(toml: Callable[..., Path], text: str, drawing: bool, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read_candidate(toml(text), drawing=drawing)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_candidate(tmp_path / "none.toml", drawing=True)


def test_a_replay_keeps_its_own_defaults_where_a_file_says_nothing(toml: Callable[..., Path]) -> None:
    how, given = read_candidate(toml('rewards = [["*", "dwell", 1]]\nseed = 3'), drawing=False)
    assert chosen(how, list(given)) == Chosen(rewards=(("*", "dwell", 1.0),))
    assert (chosen(how).feature_share, how.seed) == (0.1, 3)


def test_an_export_without_slates(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="got no slates; `freshet export slates events items --out FOLDER`"):
        read_own_log(tmp_path)


def test_a_slate_without_its_first_position(tmp_path: Path) -> None:
    folder = saved(live(120, 1, policy="greedy"), tmp_path / "log")
    lines = (folder / "slates.csv").read_text().splitlines()
    (folder / "slates.csv").write_text("\n".join([lines[0], *lines[2:]]))
    with pytest.raises(ExportError, match=r"slates.csv:2: expected position 0 of slate s1-0, an item and its"):
        read_own_log(folder)


@pytest.mark.parametrize("words", [[], ["--from", "a"], ["--policy", "x.toml", "--to", "bts"]])
def test_evaluate_asks_for_one_kind_of_log(tmp_path: Path, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["evaluate", "--log", str(tmp_path), *words])
    assert result.exit_code == 2
