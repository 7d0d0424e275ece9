"""`freshet evaluate`: real logs judged in all four ways and beside plain loops, planted differences, errors, output."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from infra.cli import app
from infra.evaluating.compare import Source, compare, frequencies
from infra.evaluating.open_bandit import COLUMNS, BanditLog, BanditLogError, read_bandit_log
from infra.evaluating.verb import NAMES
from models import ope

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "open-bandit"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets (../shared/data) are not here")
GOOD = ["2019-11-24 00:03:13+00:00", "14", "3", "0", "0.25"]


def told(*words: str) -> str:
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def write(folder: Path, rows: list[list[str]], columns: tuple[str, ...] = COLUMNS) -> Path:
    (folder / "random-men.csv").write_text("\n".join(",".join(row) for row in [list(columns), *rows]) + "\n")
    return folder


def simulated(
    policy: NDArray[np.float64], rates: NDArray[np.float64], rows: int, rng: np.random.Generator, name: str = "made"
) -> BanditLog:
    """A log of policy f64[positions, items]."""
    position = rng.integers(0, len(policy), rows)
    item = np.array([rng.choice(policy.shape[1], p=policy[k]) for k in position])
    click = (rng.random(rows) < rates[item]).astype(np.float64)
    return BanditLog(name, item, position, click, policy[position, item], np.arange(rows))


# -- real logs --------------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("campaign", ["men", "women"])
@pytest.mark.parametrize(("source", "target"), [("random", "bts"), ("bts", "random")])
def test_both_directions_of_both_campaigns(campaign: str, source: str, target: str) -> None:
    words = ("--log", str(DATA), "--campaign", campaign, "--from", source, "--to", target)
    report = json.loads(told(*words, "--json"))
    clicks = {("random", "men"): 46, ("bts", "men"): 69, ("random", "women"): 46, ("bts", "women"): 46}
    for side, policy in (("from", source), ("to", target)):
        assert report[side] == policy
        assert report["logged"][side]["rows"] == 10_000
        assert report["logged"][side]["clicks"] == clicks[policy, campaign]
    own = report["on_policy"]
    assert own["low"] < own["value"] == clicks[target, campaign] / 10_000 < own["high"]
    assert set(report["estimates"]) == set(report["difference"]) == set(ope.ESTIMATORS)
    lost = (campaign, source) == (
        "women",
        "bts",
    )  # a propensity of 1e-6: one row weighs 22,525
    assert report["verdict"] == ("no overlap" if lost else "agrees")
    assert (report["effective_sample_size"] < 500) == lost
    for name in ope.ESTIMATORS:
        estimate, apart = report["estimates"][name], report["difference"][name]
        if lost or (name == "replay" and source == "bts"):
            assert estimate["value"] is None is apart["value"]
            assert "expected 500 or more" in estimate["reason"]
            continue
        assert 0.0 <= estimate["low"] <= estimate["value"] <= estimate["high"]
        assert apart["value"] == pytest.approx(estimate["value"] - own["value"])
        assert apart["low"] < apart["value"] < apart["high"]
        # noise of both logs: wider than the estimate's own interval
        assert apart["high"] - apart["low"] > estimate["high"] - estimate["low"]
    if not lost:
        assert 0.6 < report["detectable"]["relative"] < 1.3  # as the help says
    text = told(*words)
    assert report["verdict"] in text
    assert ("would be found in four of five" in " ".join(text.split())) != lost


@needs_data
def test_values_beside_plain_loops_over_the_file() -> None:
    with gzip.open(DATA / "random-men.csv.gz", "rt") as one, gzip.open(DATA / "bts-men.csv.gz", "rt") as two:
        source, target = list(csv.DictReader(one)), list(csv.DictReader(two))
    shown = Counter((row["item_id"], row["position"]) for row in target)
    at = Counter(row["position"] for row in target)
    weight = [
        shown[row["item_id"], row["position"]] / at[row["position"]] / float(row["propensity_score"]) for row in source
    ]
    clicked = sum(w for w, row in zip(weight, source, strict=True) if row["click"] == "1")
    report = compare(read_bandit_log(DATA, "random", "men"), read_bandit_log(DATA, "bts", "men"), draws=50)
    assert report["estimates"]["ips"]["value"] == pytest.approx(clicked / 10_000)
    assert report["estimates"]["snips"]["value"] == pytest.approx(clicked / sum(weight))
    assert report["overlap"]["largest_weight"] == pytest.approx(max(weight))
    assert report["effective_sample_size"] == pytest.approx(sum(weight) ** 2 / sum(w * w for w in weight), rel=0.01)


@needs_data
def test_a_propensity_is_of_the_item_given_the_position() -> None:
    """The uniform log says 1 / items, not 1 / (items x positions): weights under its own frequencies average 1."""
    log = read_bandit_log(DATA, "random", "women")
    assert np.allclose(log.propensity, 1 / 46)
    assert set(log.position.tolist()) == {0, 1, 2}
    own = Source(log, 3, 46, np.random.default_rng(0)).under(frequencies(log, 3, 46))
    assert ope.overlap(own).mean_weight == pytest.approx(1.0, abs=0.02)


# -- planted ----------------------------------------------------------------------------------------------------------


def planted(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A uniform policy, one that prefers what is clicked, f64[2, 8] each, and click rates around .2, f64[8]."""
    rates = rng.uniform(0.05, 0.35, 8)
    better = np.exp(6 * rates + 0.3 * rng.standard_normal((2, 8)))
    return np.full((2, 8), 1 / 8), better / better.sum(axis=1, keepdims=True), rates


def test_a_true_log_agrees_and_one_whose_items_earn_more_disagrees() -> None:
    rng = np.random.default_rng(0)
    flat, better, rates = planted(rng)
    source, target = simulated(flat, rates, 8000, rng), simulated(better, rates, 8000, rng)
    agreed = compare(source, target, draws=100)
    assert agreed["verdict"] == "agrees"
    assert {row["verdict"] for row in agreed["difference"].values()} == {"agrees"}
    assert compare(target, source, draws=100)["verdict"] == "agrees"
    risen = replace(target, click=np.maximum(target.click, (rng.random(8000) < 0.05).astype(np.float64)))
    report = compare(source, risen, draws=100)
    assert report["verdict"] == "disagrees"
    assert report["difference"]["snips"]["high"] < 0.0


def test_the_interval_of_the_difference_holds_0_with_estimated_frequencies() -> None:
    """Small logs and high click rates, where the noise of the target's frequencies counts: 95 % and not fewer."""
    rng = np.random.default_rng(1)
    flat, better, rates = planted(rng)
    reports = [
        compare(simulated(flat, rates, 1200, rng), simulated(better, rates, 1200, rng), seed=i, policy_draws=40,
                estimators=("snips", "dr"), draws=20)
        for i in range(120)
    ]  # fmt: skip
    for name in ("snips", "dr"):
        inside = [row["difference"][name]["low"] <= 0.0 <= row["difference"][name]["high"] for row in reports]
        assert np.mean(inside) >= 0.95 - 4 * (0.95 * 0.05 / 120) ** 0.5
        assert np.mean([row["estimates"][name]["policy_variance_share"] for row in reports]) > 0.01


def test_a_reward_model_makes_doubly_robust_the_surer_one() -> None:
    rng = np.random.default_rng(2)
    flat, better, rates = planted(rng)
    rates = np.where(rates > 0.2, 0.9, 0.1)
    report = compare(simulated(flat, rates, 6000, rng), simulated(better, rates, 6000, rng), draws=20)
    errors = {name: row["standard_error"] for name, row in report["estimates"].items()}
    assert errors["dr"] < 0.8 * errors["ips"]
    assert errors["dr"] < errors["replay"]


def test_what_the_source_never_shows_is_told() -> None:
    rng = np.random.default_rng(3)
    flat, _, rates = planted(rng)
    narrow = np.tile([0.25] * 4 + [0.0] * 4, (2, 1))
    source, target = simulated(narrow, rates, 4000, rng), simulated(flat, rates, 4000, rng)
    report = compare(source, target, draws=20)
    assert report["overlap"]["unsupported"] == pytest.approx(0.5, abs=0.03)
    assert any("was never shown in the log" in warning for warning in report["overlap"]["warnings"])


def test_same_seed_same_report() -> None:
    rng = np.random.default_rng(4)
    flat, better, rates = planted(rng)
    source, target = simulated(flat, rates, 1500, rng), simulated(better, rates, 1500, rng)
    assert compare(source, target, seed=3, draws=50) == compare(source, target, seed=3, draws=50)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_rows_of_one_time_and_user_are_one_slate(tmp_path: Path) -> None:
    columns = (*COLUMNS, "user_feature_0")
    rows = [["t1", "0", "1", "1", "0.5", "a"], ["t1", "1", "2", "0", "1", "a"], ["t1", "0", "3", "0", "0.1", "b"],
            ["t2", "2", "1", "0", "0.2", "a"]]  # fmt: skip
    log = read_bandit_log(write(tmp_path, rows, columns), "random", "men")
    assert log.slate.tolist() == [0, 0, 1, 2]
    assert log.item.tolist() == [0, 1, 0, 2]
    assert log.position.tolist() == [0, 1, 2, 0]
    assert log.click.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert log.propensity.tolist() == [0.5, 1.0, 0.1, 0.2]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (4, "0", "random-men.csv:3: propensity_score: expected a probability above 0 and at most 1, got '0'"),
        (4, "1.2", "propensity_score: expected a probability above 0 and at most 1, got '1.2'"),
        (4, "nan", "propensity_score: expected a probability above 0"),
        (4, "often", "propensity_score: expected a number, got 'often'"),
        (3, "2", "click: expected 0 or 1, got '2'"),
        (2, "0", "position: expected a whole number from 1, got '0'"),
        (2, "inf", "position: expected a whole number from 1, got 'inf'"),
        (1, "-1", "item_id: expected a whole number from 0, got '-1'"),
        (1, "inf", "item_id: expected a whole number from 0, got 'inf'"),
        (1, "1,2", "expected 5 fields as in the header, got 6"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, place: int, value: str, said: str) -> None:
    bad = [*GOOD[:place], value, *GOOD[place + 1 :]]
    with pytest.raises(BanditLogError) as refused:
        read_bandit_log(write(tmp_path, [GOOD, bad]), "random", "men")
    assert said in str(refused.value)


def test_files_that_are_not_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(BanditLogError, match="expected a folder of Open Bandit files"):
        read_bandit_log(tmp_path / "nowhere", "random", "men")
    with pytest.raises(BanditLogError, match="propensity_score missing"):
        read_bandit_log(write(tmp_path, [GOOD[:4]], COLUMNS[:4]), "random", "men")
    with pytest.raises(BanditLogError, match="at least one row"):
        read_bandit_log(write(tmp_path, []), "random", "men")
    with pytest.raises(BanditLogError, match=r"expected bts-kids.csv .* found random-men; choose --from"):
        read_bandit_log(tmp_path, "bts", "kids")
    (tmp_path / "bts-men.csv.gz").write_bytes(b"not gzip at all")
    with pytest.raises(BanditLogError, match="expected a gzip file"):
        read_bandit_log(tmp_path, "bts", "men")
    (tmp_path / "bts-men.csv.gz").write_bytes(gzip.compress(b"\xff\xfe\n" * 9)[:-4])
    with pytest.raises(BanditLogError, match=r"utf-8|gzip"):
        read_bandit_log(tmp_path, "bts", "men")


# -- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--campaign", "kids", "--from", "random", "--to", "bts"], "expected random-kids.csv"),
        (["--from", "random", "--to", "random"], "expected another policy than --from"),
        (["--from", "random", "--to", "bts", "--clip", "0"], "--clip: expected a weight above 0, got 0"),
    ],
)
def test_a_wrong_question_is_answered_in_a_line(tmp_path: Path, words: list[str], said: str) -> None:
    write(tmp_path, [GOOD])
    done = subprocess.run(
        [sys.executable, "-m", "infra.cli", "evaluate", "--log", str(tmp_path), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.startswith("freshet: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_says_what_so_few_clicks_can_show() -> None:
    text = " ".join(told("--help").split())
    for words in ("agrees", "disagrees", "no overlap", "46 to 69 clicks", "--from random --to bts"):
        assert words in text


def test_the_table_has_every_estimator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from infra.evaluating.verb import show

    rng = np.random.default_rng(5)
    flat, better, rates = planted(rng)
    found: dict[str, Any] = compare(simulated(flat, rates, 3000, rng), simulated(better, rates, 3000, rng), draws=20)
    show({"campaign": "made", **found}, Console(width=120))
    text = capsys.readouterr().out
    for title in NAMES.values():
        assert title in text
    assert f"{found['estimates']['snips']['value']:.3%}" in text
