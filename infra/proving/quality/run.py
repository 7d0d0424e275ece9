"""The whole of `freshet bench quality`: tune each reference, run all over the same events, put ours beside them.

Every reference is tuned by NDCG@10 (predictors of ratings by RMSE, of labels by AUC) over its small grid on the first
tenth of the events, then runs over all of them. What was computed is kept in a folder. Knows nothing of terminals.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from infra.proving.quality import compare, online, ours, refit, river_rating
from infra.proving.quality.cache import Cache, code_of
from infra.proving.quality.events import Events, read_events, schedule
from infra.proving.quality.ranking import NAMES
from infra.proving.quality.reference import Reference, Result, Setup
from models import metrics
from streaming.replay.logs import ReplayError, ReplayLog

TUNED_ON: Final = 0.1
"""Share of the stream that references are tuned on."""
FROZEN_AT: Final = 0.2
"""Share of the stream that frozen references learn; they are judged on the rest."""
FRESHNESS_EVENTS: Final = 20_000
FOLDER: Final = "infra/proving/quality/"
OURS: Final = FOLDER + "ours.py"
SHARED: Final = (FOLDER + "ranking.py", FOLDER + "reference.py")
FROZEN_POPULARITY: Final = Reference(
    "popularity_frozen", "decayed counts of the first 20 %, of the best half-life in hindsight; nothing is live",
    online.run_popularity, ({},), frozen=True, hindsight=True,
)  # fmt: skip
CODE: Final = {online: "online.py", refit: "refit.py", river_rating: "river_rating.py"}
REFERENCES: Final = {
    reference.name: (reference, (*SHARED, FOLDER + file))
    for module, file in CODE.items()
    for reference in (*module.REFERENCES, *((FROZEN_POPULARITY,) if module is online else ()))
}
Advance = Callable[[str, int, int], None]
"""Told of (what is under way, events done, events in all)."""


@dataclass(frozen=True)
class Bench:
    """What all methods share in one run."""

    log: ReplayLog
    events: Events
    cache: Cache
    advance: Advance
    seed: int = 1
    digest: str = ""

    def on(self, **more: Any) -> dict[str, Any]:
        """Return what a result of these events depends on."""
        return {"events": self.digest, "seed": self.seed, **more}


def names(chosen: list[str] | None, events: Events) -> list[str]:
    """Return the references to run: those chosen, else all that fit the log; raises ReplayError."""
    if unknown := set(chosen or ()) - set(REFERENCES) - {"ours"}:
        raise ReplayError(f"--only: expected some of ours, {', '.join(REFERENCES)}; got {', '.join(sorted(unknown))}")
    has = {"": True, "ratings": bool(np.isfinite(events.value).any()), "negatives": bool((events.label == 0).any())}
    return [name for name, (method, _) in REFERENCES.items() if has[method.needs] and (not chosen or name in chosen)]


def bench(
    log: ReplayLog,
    *,
    protocol: str,
    exclusion: str,
    folder: Path | None,
    only: list[str] | None = None,
    seed: int = 1,
    freshness: int = FRESHNESS_EVENTS,
    advance: Advance = lambda *_: None,
) -> dict[str, Any]:
    """Run ours and the references over a log; returns the report. Raises ReplayError."""
    for code in (*(code for _, code in REFERENCES.values()), ours.CODE, (*ours.CODE, OURS)):
        code_of(*code)  # now: an edit while this runs is none of what runs
    events = read_events(log, protocol=protocol, exclusion=exclusion)
    state = Bench(log, events, Cache(folder), advance, seed, events.digest())
    report: dict[str, Any] = {
        "protocol": protocol, "exclusion": exclusion, "events": len(events), "targets": int((events.label == 1).sum()),
        "counted": int(events.counted.sum()), "users": events.users, "items": events.items,
        "never_seen_share": float(1.0 - events.counted.sum() / max(int((events.label == 1).sum()), 1)),
        "tuned_on": int(len(events) * TUNED_ON), "refits": schedule(events)[1],
        "bad_rows": {"count": log.bad, "first": log.bad_rows}, "dropped_rows": log.dropped,
        "references": {}, "lead": {},
    }  # fmt: skip
    if not all(importlib.util.find_spec("implicit") for name in names(only, events) if REFERENCES[name][0].fits):
        raise ReplayError("ALS, BPR and EASE need implicit: install freshet[bench], or name others: --only")
    results: dict[str, tuple[Result, int]] = {}
    for name in names(only, events):
        result, told = run_reference(state, name)
        since = told.get("judged_from", 0)
        results[name] = result, since
        report["references"][name] = {**_figures(events, result, since), **told}
    if not only or "ours" in only:
        mine, told = run_ours(state)
        report["ours"] = {**_figures(events, mine, 0), **told}
        report["over_time"] = {"ours": report["ours"].pop("over_time")}
        for name, (result, since) in results.items():
            report["lead"][name] = _lead(events, mine, result, since)
        if freshness:
            report["freshness"] = freshness_curve(state, freshness)
    report.setdefault("over_time", {})
    for name, row in report["references"].items():
        if "over_time" in row:
            report["over_time"][name] = row.pop("over_time")
    report["cache"] = {"found": state.cache.found, "made": state.cache.made}
    return report


def _spent(began: tuple[float, float]) -> dict[str, float]:
    """Return seconds since, by the clock and of this process: others work on the machine too."""
    return {
        "seconds": round(time.perf_counter() - began[0], 1), "cpu_seconds": round(time.process_time() - began[1], 1),
    }  # fmt: skip


def _figures(events: Events, result: Result, since: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if np.isfinite(result.ranks).any():
        out |= compare.figures(events, result, since)
    if (events.label == 0).any() and not since and not np.isnan(result.scores).any():
        out |= compare.auc_figures(events, result)
    if result.predictions is not None:
        out |= compare.rmse_figures(events, result)
    return out


def _lead(events: Events, mine: Result, theirs: Result, since: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if np.isfinite(theirs.ranks).any():
        out |= compare.lead(events, mine, theirs, since)
    scored = not np.isnan(mine.scores).any() and not np.isnan(theirs.scores).any()
    if (events.label == 0).any() and not since and scored:
        out |= compare.auc_lead(events, mine, theirs)
    if mine.predictions is not None and theirs.predictions is not None:
        out |= compare.rmse_lead(events, mine, theirs)
    return out


# -- references -------------------------------------------------------------------------------------------------------


def run_reference(state: Bench, name: str) -> tuple[Result, dict[str, Any]]:
    """Return what a reference noted over all events, and how it was tuned and fitted; from the cache where it can."""
    method, code = REFERENCES[name]
    events = state.events
    base = state.on(code=code_of(*code), half_life=None if method.hindsight else fallback(state))
    tuning = tune(state, name)
    since = int(events.start[int(len(events) * FROZEN_AT)]) if method.frozen else 0
    on = {**base, "chosen": tuning["chosen"], "from": since, "fits": schedule(events)[1] if method.fits else ""}
    found = state.cache.load(name, on)
    if found is None:
        fits, _ = schedule(events)
        state.advance(name, 0, len(events))
        began = time.perf_counter(), time.process_time()
        setup = Setup(
            np.array([since], np.int64) if method.frozen else fits, NAMES.index(fallback(state)), state.seed,
            method.frozen, lambda done: state.advance(name, done, len(events)),
        )  # fmt: skip
        result = method.run(events, tuning["chosen"], setup)
        arrays = {"ranks": result.ranks, "scores": result.scores}
        if result.predictions is not None:
            arrays["predictions"] = result.predictions
        found = arrays, {**_spent(began), **result.told}
        state.cache.save(name, on, *found)
    arrays, facts = found
    facts.pop("on", None)
    told = {"about": method.about, **facts, **tuning}
    if method.fits and not method.frozen:
        told["schedule"] = schedule(events)[1]
    if method.frozen:
        told["judged_from"] = since
    if method.ranks and not method.hindsight:
        told["falls_back_on"] = f"popularity {fallback(state)} for a user without history, and to break ties"
    return Result(arrays["ranks"], arrays["scores"], predictions=arrays.get("predictions")), told


def fallback(state: Bench) -> str:
    """Return the half-life that ranks best on the tuning part: the popularity that other references fall back on."""
    return str(tune(state, "popularity")["half_life_of_tuning"])


def tune(state: Bench, name: str) -> dict[str, Any]:
    """Return the grid of a reference, its figures on the first tenth, and the parameters chosen by them."""
    method, code = REFERENCES[name]
    if method.tuned_as:
        return {"chosen": tune(state, method.tuned_as)["chosen"], "tuned_as": method.tuned_as}
    part = state.events.head(int(len(state.events) * TUNED_ON))
    grid = [g for g in method.grid if g.get("rows") != "basket" or part.has_baskets]
    grid = [g for g in grid if g.get("learns") != "ratings" or np.isfinite(part.value).any()]
    if method.hindsight and name != "popularity":
        return {"chosen": grid[0]}
    half_life = None if name == "popularity" else fallback(state)
    fits = schedule(state.events)[0]
    setup = Setup(fits[fits < len(part)], NAMES.index(half_life or "none"), state.seed)
    figures, spent = [], 0.0
    for i, chosen in enumerate(grid):
        on = state.on(code=code_of(*code), half_life=half_life, chosen=chosen, part=len(part))
        found = state.cache.load(f"tune-{name}", on)
        if found is None:
            state.advance(f"{name}, tuning", i, len(grid))
            began = time.perf_counter(), time.process_time()
            result = method.run(part, chosen, setup)
            facts = {**result.told, "figure": _figure(part, result, method), **_spent(began)}
            found = {}, facts
            state.cache.save(f"tune-{name}", on, *found)
        figures.append(found[1])
        spent += found[1]["seconds"]
    best = max(range(len(grid)), key=lambda i: (figures[i]["figure"], -i))
    if name == "popularity":
        return {"chosen": {}, "half_life_of_tuning": figures[0]["half_life"]}
    return {
        "chosen": grid[best], "tuning_seconds": round(spent, 1),
        "grid": [{**g, "figure": round(row["figure"], 5)} for g, row in zip(grid, figures, strict=True)],
    }  # fmt: skip


def _figure(part: Events, result: Result, method: Reference) -> float:
    """What tuning maximises: NDCG@10, minus the RMSE of ratings, or the AUC of labels."""
    if result.predictions is not None:
        rated = np.isfinite(part.value)
        error = float(np.sqrt(np.mean((result.predictions[rated] - part.value[rated]) ** 2)))
        return -error if np.isfinite(error) else -np.inf
    if not method.ranks:
        found = metrics.auc(np.nan_to_num(result.scores), part.label == 1)
        return found if np.isfinite(found) else 0.0
    ranks, counts = compare.judged(part, result, 0)
    return float(metrics.ndcg(ranks[counts]).mean()) if counts.any() else 0.0


# -- ours -------------------------------------------------------------------------------------------------------------


def run_ours(state: Bench) -> tuple[Result, dict[str, Any]]:
    """Return what Freshet noted over all events, and what its own report adds."""
    on = state.on(code=code_of(*ours.CODE))
    found = state.cache.load("ours", on)
    if found is None:
        began = time.perf_counter(), time.process_time()
        result = ours.run_ours(
            state.log, state.events, seed=state.seed, tell=lambda done: state.advance("ours", done, len(state.events))
        )
        arrays = {"ranks": result.ranks, "scores": result.scores}
        if result.predictions is not None:
            arrays["predictions"] = result.predictions
        found = arrays, {**_spent(began), **result.told}
        state.cache.save("ours", on, *found)
    arrays, facts = found
    facts.pop("on", None)
    return Result(arrays["ranks"], arrays["scores"], predictions=arrays.get("predictions")), facts


def freshness_curve(state: Bench, limit: int) -> dict[str, Any]:
    """Return ours with the reading of user state, and with learning, held back by each delay, on the first events."""
    part = state.events.head(limit)
    whole = replace(state, events=part, digest=part.digest())
    out: dict[str, Any] = {"events": len(part), "user_state": {}, "learning": {}}
    none: Result | None = None
    for what in ("user_state", "learning"):
        for name, seconds in ours.DELAYS.items():
            if seconds == 0.0 and none is not None:
                result = none
            else:
                result = _held(whole, what, seconds, f"freshness, {what.replace('_', ' ')} {name} late")
            none = none or result
            ranks, counts = compare.judged(part, result, 0)
            row: dict[str, Any] = dict(metrics.summary(ranks[counts]))
            row["loses"] = compare.lead(part, none, result)
            out[what][name] = row
    return out


def _held(state: Bench, what: str, seconds: float, title: str) -> Result:
    on = state.on(code=code_of(*ours.CODE, OURS), delay=what if seconds else "", seconds=seconds)
    found = state.cache.load("freshness", on)
    if found is None:
        result = ours.run_ours(
            state.log, state.events, seed=state.seed, tell=lambda done: state.advance(title, done, len(state.events)),
            **{"reading" if what == "user_state" else "learning": seconds},
        )  # fmt: skip
        found = {"ranks": result.ranks}, {}
        state.cache.save("freshness", on, *found)
    ranks = found[0]["ranks"]
    return Result(ranks, np.full(len(ranks), np.nan))
