"""`freshet bench ope`: how often do the 95 % intervals of off-policy evaluation hold a truth that is known?

Worlds of 34 items, as in the Open Bandit men campaign, are drawn anew in every repetition: click rates around .5 %, and
a policy that shows better items more often; and one world made to mislead, `hidden`. Knows nothing of logs on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from infra.evaluating.compare import Source, compare
from infra.evaluating.open_bandit import BanditLog
from infra.terminal import console, show_json
from models import ope

if TYPE_CHECKING:
    from rich.console import Console

F64 = NDArray[np.float64]
ITEMS: Final = 34
RATE: Final = 0.005
REPETITIONS: Final = 500
ROWS: Final = (1_000, 10_000)
MISMATCHES: Final = ("mild", "strong", "strong, from the peaked log", "hidden")
INTERVALS: Final = ("headline", "cautious", "normal", "bootstrap", "bernstein")


def world(mismatch: str, rng: np.random.Generator) -> tuple[F64, F64, F64]:
    """Return click rates, logging and evaluation policy, all f64[ITEMS].

    One policy is uniform, the other a softmax that prefers better items. hidden: half of all clicks under the
    evaluation policy are on an item of which the log has 20 rows in 10,000.
    """
    taste = rng.standard_normal(ITEMS)
    rates = np.exp(0.6 * taste)
    rates *= RATE / rates.mean()
    logits = (0.5 if mismatch == "mild" else 1.1) * (0.5 * taste + 0.87 * rng.standard_normal(ITEMS))
    flat, peaked = np.full(ITEMS, 1.0 / ITEMS), np.exp(logits) / np.exp(logits).sum()
    if mismatch == "hidden":
        most = np.full(ITEMS - 1, 1.0 / (ITEMS - 1))
        return np.append(rates[1:] / 2, RATE * 10), np.append(0.998 * most, 0.002), np.append(0.95 * most, 0.05)
    return (rates, peaked, flat) if "peaked" in mismatch else (rates, flat, peaked)


def draw(policy: F64, rates: F64, rows: int, name: str, rng: np.random.Generator) -> BanditLog:
    """Return a log of `rows` impressions that this policy made, one position."""
    item = rng.choice(ITEMS, size=rows, p=policy)
    click = (rng.random(rows) < rates[item]).astype(np.float64)
    return BanditLog(name, item, np.zeros(rows, np.int64), click, policy[item], np.arange(rows))


def measure(
    *, repetitions: int = REPETITIONS, rows: tuple[int, ...] = ROWS, mismatches: tuple[str, ...] = MISMATCHES,
    seed: int = 1, advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Return coverage, width and bias of every estimator in every setting; `advance` is called once a repetition."""
    settings: list[dict[str, Any]] = []
    for name in mismatches:
        for n in rows:
            rng = np.random.default_rng([seed, len(settings)])
            found = []
            for _ in range(repetitions):
                found.append(_repetition(name, n, rng))
                advance()
            settings.append({"mismatch": name, "rows": n, **_summary(found)})
    return {"level": 0.95, "repetitions": repetitions, "click_rate": RATE, "items": ITEMS, "settings": settings}


def _repetition(mismatch: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    rates, logging, evaluation = world(mismatch, rng)
    truth = float(rates @ evaluation)
    source, target = draw(logging, rates, n, "source", rng), draw(evaluation, rates, n, "target", rng)
    logged = replace(Source(source, 1, ITEMS, rng).under(evaluation[None]), cluster=None)
    bound = float((evaluation / logging).max())
    out: dict[str, Any] = {"ess": ope.overlap(logged).effective_sample_size}
    for name in ope.ESTIMATORS:
        told = ope.estimate(name, logged, rng=rng, weight_bound=bound)
        half = 1.959964 * told.variance**0.5
        ends = (
            (told.low, told.high),
            told.cautious,
            (told.value - half, told.value + half),
            told.bootstrap,
            told.bernstein,
        )
        out[name] = [told.value / truth - 1.0, *(_place(truth, pair) for pair in ends),
                     *((high - max(low, 0.0)) / truth for low, high in ends)]  # fmt: skip
    # as `freshet evaluate` does it: the policy is the frequencies of the target log; the true difference is 0
    report = compare(source, target, seed=int(rng.integers(2**31)), estimators=(ope.HEADLINE,), draws=20,
                     policy_draws=20)  # fmt: skip
    apart = report["difference"][ope.HEADLINE]
    out["difference"] = None if apart["value"] is None else _place(0.0, (apart["low"], apart["high"]))
    return out


def _place(truth: float, ends: ope.Interval) -> int:
    """0: inside; -1: the truth lies below the interval; 1: above."""
    return int(truth > ends[1]) - int(truth < ends[0])


def _summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    estimators = {}
    for name in ope.ESTIMATORS:
        # replay of a small log may accept no row at all
        rows = np.array([row[name] for row in found if np.isfinite(row[name][0])], np.float64).reshape(-1, 11)
        estimators[name] = {
            "bias": float(rows[:, 0].mean()), "error": float(np.sqrt((rows[:, 0] ** 2).mean())),
            **{
                kind: {
                    "coverage": float((rows[:, 1 + k] == 0).mean()), "above": float((rows[:, 1 + k] > 0).mean()),
                    "below": float((rows[:, 1 + k] < 0).mean()), "width": float(rows[:, 6 + k].mean()),
                }
                for k, kind in enumerate(INTERVALS)
            },
        }  # fmt: skip
    apart = [row["difference"] for row in found if row["difference"] is not None]
    return {
        "effective_sample_size": float(np.median([row["ess"] for row in found])),
        "refused": float(np.mean([row["ess"] < ope.FEWEST for row in found])),
        "difference": {"judged": len(apart), "coverage": float(np.mean([p == 0 for p in apart])) if apart else None},
        "estimators": estimators,
    }  # fmt: skip


def coverage_verb(*, as_json: bool) -> None:
    """Measure with a progress bar, print the report."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(err=True)
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("coverage", total=REPETITIONS * len(ROWS) * len(MISMATCHES))
        report = measure(advance=lambda: bar.advance(task))
    if as_json:
        show_json(report)
    else:
        show(report, console())


def show(report: dict[str, Any], screen: Console) -> None:
    """Print a table a setting: share of repetitions in which each interval held the truth, and how wide it was."""
    from rich.table import Table

    for setting in report["settings"]:
        apart = setting["difference"]
        held = "-" if apart["coverage"] is None else f"{apart['coverage']:.1%}"
        screen.print(
            f"[bold]{setting['mismatch']}[/], {setting['rows']:,} rows: effective"
            f" {setting['effective_sample_size']:,.0f}, {setting['refused']:.0%} refused; difference of two logs {held}"
        )
        table = Table("", "bias", "error", *INTERVALS, box=None, header_style="bold", pad_edge=False)
        for name, row in setting["estimators"].items():
            cells = (f"{row[kind]['coverage']:.1%} [dim]{row[kind]['width']:.2f}[/]" for kind in INTERVALS)
            table.add_row(name, f"{row['bias']:+.1%}", f"{row['error']:.0%}", *cells)
        screen.print(table)
    screen.print(
        f"[dim]{report['repetitions']} repetitions, click rate {report['click_rate']:.1%}; share of intervals meant for"
        " 95 % that held the truth, and mean width in multiples of it; headline: gamma"
    )
