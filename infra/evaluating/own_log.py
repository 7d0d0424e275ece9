"""One's own log judged under changed settings: `freshet evaluate --log EXPORT --policy candidate.toml`.

The export is replayed through the very code, in the order of the log. At each slate the candidate, having learnt what
came before, is asked how probable it makes each shown item given those above; then the slate as it was shown and its
outcomes are learnt. The weights candidate / logged are true whatever was learnt live: the candidate is a policy of its
own. Where it ranks as the log did and only draws otherwise, the scores are those of the log (redrawing.py). Rewards
are the export's. What is estimated are other slates at the moments of the log, not what users would come to in time.
Knows nothing of files and terminals.

    cascade   weight of a row: the product of those of the items down to it. Takes what a position earns as independent
              of what stands below it. The headline
    position  weight of a row: that of its item alone, given those above. Also takes what is above as the log had it,
              which favours less exploration where lower positions live on what was left for them
    slate     weight of a slate: the product over its positions. Assumes nothing; too few effective slates as a rule

All self-normalised; the log's own mean is taken on the same rows, so that the difference is paired; users are drawn
together. McInerney, Brost, Chandar, Mehrotra, Carterette: Counterfactual evaluation of slate recommendations with
sequential reward interactions (KDD 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import merge
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from infra.evaluating.candidate import chosen
from infra.evaluating.redrawing import only_draws, redrawn
from infra.settings import Settings
from models import ope
from models.bandit import Policy
from models.examples import Entries, Shown, item_hash
from models.recommend import Request, Slate, as_served, samples
from streaming.events import Interaction, Item, catalogue_item, impression, item_key
from streaming.replay import exports
from streaming.replay.exports import ExportError, Served
from streaming.replay.prequential import Replay, warm

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
BETTER, WORSE, SAME = "better", "worse", "no difference shown"
USERS: Final = 20
"""Fewer users than this are drawn again too coarsely for an interval."""
HEADLINE: Final = "cascade"
Order = tuple[float, int, int]
"""(time recorded, partition, offset): the order of a log, in which each partition keeps its own."""


@dataclass(slots=True)
class OwnLog:
    """An export: entries of the catalogue, events and slates, each in the order of the log; rejected: unread rows."""

    things: list[tuple[Order, Item | Interaction | Served]] = field(default_factory=list)
    slates: int = 0
    events: int = 0
    rejected: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Rows:
    """Shown positions, as lists of one length; greedy: slates left out, for the log could not have shown others.

    redrawn: slates whose scores are taken from the log; off: positions of these whose logged probability is not what
    the present settings would give.
    """

    reward: list[float] = field(default_factory=list)
    logging: list[float] = field(default_factory=list)
    evaluation: list[float] = field(default_factory=list)
    user: list[int] = field(default_factory=list)
    slate: list[int] = field(default_factory=list)
    greedy: int = 0
    slates: int = 0
    redrawn: int = 0
    off: int = 0


def read_own_log(log: Path) -> OwnLog:
    """Read an export: `slates` and `events`, and `items` where it is there, in a folder or beside each other."""
    out, places = OwnLog(), {what: exports.find(log, what) for what in exports.TABLES}
    for what in ("slates", "events"):
        if places[what] is None:
            raise ExportError(
                f"{log}: expected tables of slates and of events, got no {what}; `freshet export slates events items"
                " --out FOLDER` writes them"
            )
    items = places["items"]
    entries = [] if items is None else [((at, -1, i), item) for i, (at, item) in enumerate(exports.items(items))]
    events = list(exports.events(cast(Path, places["events"]), lambda at, why: out.rejected.append(f"{at}: {why}")))
    slates = [(slate.order, slate) for slate in exports.slates(cast(Path, places["slates"]))]
    if not slates:
        raise ExportError(f"{places['slates']}: expected at least one slate, got none")
    out.slates, out.events = len(slates), len(events)
    parts: Sequence[list[tuple[Order, Any]]] = (entries, events, slates)
    out.things = list(merge(*(sorted(part, key=lambda pair: pair[0]) for part in parts), key=lambda pair: pair[0]))
    return out


class LoggedReplay(Replay):
    """A replay that learns the slates of a log as they were shown, not slates of its own.

    present: the settings under which the log was made, where they are known.
    """

    def __init__(self, settings: Settings, present: Settings | None = None) -> None:
        super().__init__(seed=settings.seed, chosen=chosen(settings))
        self.settings, self.present = settings, present
        self.redrawn = self.off = 0

    def know(self, item: Item) -> None:
        """Set a catalogue entry."""
        self.items.set_item(item_key(item), item.item_id, catalogue_item(item))

    def show(self, served: Served) -> F64:
        """Return how probable the candidate makes each shown item f64[k], given those above; then learn the slate."""
        read = self.store.read_now(0, [served.user_id])
        history, settings = self._history(read), self.settings
        keys = np.array([item_hash(position.item_id) for position in served.positions], np.uint64)
        # What a lookup asked for is not logged; a slate with an item that was seen was asked for with seen=include.
        known = bool(len(history.seen)) and bool(np.isin(keys & np.uint64(0xFFFFFFFF), history.seen).any())
        request = Request(
            slate_id=served.slate_id, now=served.ts, n=len(keys), surface=served.surface,
            policy=cast(Policy, settings.policy_of(served.surface)), epsilon=settings.epsilon,
            first=settings.first_share, seen="include" if known else "exclude",
            keep_candidates=samples(served.slate_id, settings.feature_share), weights=self._weights,
        )  # fmt: skip
        slate = as_served(self.items, self.learner.model, history, request, keys)
        ids = [position.item_id for position in served.positions]
        found = self._redrawn(served, slate)
        payload = self._shown(served, slate).to_bytes()
        self._fold(
            [impression(served.user_id, served.slate_id, served.ts, served.surface, ids, payload)], read
        )  # fmt: skip
        return slate.propensities.astype(np.float64) if found is None else found

    def _redrawn(self, served: Served, slate: Slate) -> F64 | None:
        """Return the probabilities with the scores of the log, None where the candidate ranks otherwise."""
        present = self.present
        if present is None or served.policy != "epsilon" or not only_draws(present, self.settings, served.surface):
            return None
        logged = np.array([position.propensity for position in served.positions])
        found, expected = redrawn(logged, slate, self.items, present, self.settings)
        self.redrawn += 1
        self.off += int((np.abs(expected - logged) > 0.02).sum())
        return found

    def _shown(self, served: Served, slate: Slate) -> Shown:
        """Return what the log said of the slate, with the features that this state of the model gives."""
        logged = np.array([position.propensity for position in served.positions], np.float32)
        return Shown(
            item_hash(served.slate_id), slate.step, slate.items, logged, slate.channels,
            slate.candidates if slate.request.keep_candidates else slate.items, slate.features, served.surface,
            served.policy,
        )  # fmt: skip

    def hear(self, event: Interaction) -> None:
        """Learn an event."""
        self._fold([event], self.store.read_now(0, [event.user_id]))

    def learn_entries(self, entries: Entries) -> None:
        """Let items and learner learn; nothing is noted, for nothing is ranked."""
        self.items.fold(entries)
        self.learner.learn(entries)


def run(
    log: OwnLog, settings: Settings, present: Settings | None = None, *,
    tell: Callable[[int], None] = lambda done: None,
) -> Rows:  # fmt: skip
    """Replay a log under settings and return its shown positions; `tell` hears how many things were taken.

    present: the settings under which the log was made, where they are known.
    """
    warm()
    replay, rows, users = LoggedReplay(settings, present), Rows(), dict[str, int]()
    for done, (_, thing) in enumerate(log.things, 1):
        if isinstance(thing, Served):
            _note(rows, thing, replay.show(thing), users.setdefault(thing.user_id, len(users)))
        elif isinstance(thing, Item):
            replay.know(thing)
        else:
            replay.hear(thing)
        if done % 100 == 0:
            tell(done)
    tell(len(log.things))
    rows.redrawn, rows.off = replay.redrawn, replay.off
    return rows


def _note(rows: Rows, served: Served, evaluation: F64, user: int) -> None:
    if served.policy.partition("/")[0] == "greedy":
        rows.greedy += 1
        return
    k = len(served.positions)
    rows.reward += [position.reward for position in served.positions]
    rows.logging += [position.propensity for position in served.positions]
    rows.evaluation += evaluation.tolist()
    rows.user += [user] * k
    rows.slate += [rows.slates] * k
    rows.slates += 1


def judge(rows: Rows, *, seed: int = 1, draws: int = 1000) -> dict[str, Any]:
    """Return what the rows say of the candidate: three estimators, paired differences, overlap, a verdict."""
    told: dict[str, Any] = {
        "slates": rows.slates, "greedy_slates": rows.greedy, "positions": len(rows.reward),
        "redrawn_slates": rows.redrawn, "users": len(set(rows.user)), "headline": HEADLINE, "level": 0.95,
        "assumes": "what a position earns does not depend on those below it",
    }  # fmt: skip
    if not rows.reward:
        why = f"all {rows.greedy} slates were drawn greedily: the log never shows what else could have been shown"
        return told | _nothing(why)
    reward, logging = np.array(rows.reward), np.array(rows.logging)
    evaluation, user, slate = np.array(rows.evaluation), np.array(rows.user), np.array(rows.slate)
    alone = ope.Logged(reward, logging, evaluation, top=max(1.0, float(reward.max())))
    weights, effective = slate_weights(alone.weight, slate)
    seen = ope.overlap(alone)
    warnings = [warning for warning in seen.warnings if not warning.startswith("effective")]
    if rows.greedy:
        warnings.append(f"{rows.greedy} slates that were drawn greedily are left out: nothing else could be shown")
    told |= {
        "effective_sample_size": effective[HEADLINE],
        "overlap": {
            "largest_weight": float(weights[HEADLINE].max()), "mean_weight": seen.mean_weight,
            "unsupported": seen.unsupported, "not_retrieved": float((evaluation == 0.0).mean()), "warnings": warnings,
        },
        "logged": {"value": float(reward.mean())},
    }  # fmt: skip
    why = _too_little(rows, effective[HEADLINE], told["users"])
    if why:
        return told | _nothing(why, overlap=told["overlap"])
    rng = np.random.default_rng(seed)
    estimates: dict[str, Any] = {}
    for name, weight in weights.items():
        estimates[name] = {"effective_sample_size": effective[name]}
        if effective[name] >= ope.FEWEST:
            estimates[name] |= difference(reward, weight, user, rng, draws=draws)
        else:
            estimates[name]["reason"] = f"{effective[name]:,.0f} effective ones, expected {ope.FEWEST:g}"
    apart = {end: estimates[HEADLINE][end] for end in ("value", "low", "high")}
    return told | {
        "verdict": verdict(apart), "value": {"value": float(reward.mean()) + apart["value"]}, "difference": apart,
        "estimates": estimates,
    }  # fmt: skip


def _too_little(rows: Rows, effective: float, users: int) -> str:
    """Return why the rows can say nothing, "" where they can."""
    if rows.off * 20 > len(rows.reward):
        return (
            f"{rows.off / len(rows.reward):.0%} of the logged propensities are not what the present settings give: name"
            " the settings that the log was made under with --logged FILE"
        )
    if effective < ope.FEWEST:
        return f"{effective:,.0f} effective positions of {len(rows.reward):,}, expected {ope.FEWEST:g}"
    if users < USERS:
        return f"{users} users, expected {USERS} or more: their number is what an interval is made of"
    return ""


def slate_weights(weight: F64, slate: I64) -> tuple[dict[str, F64], dict[str, float]]:
    """Return the weights f64[n] of each estimator, from those of single items given those above, and effective sizes.

    slate i64[n]: rows of a slate lie together, from the top. Those of `cascade` average 1 at each position; the size of
    `slate` is in slates, the others' in positions.
    """
    starts = np.flatnonzero(np.diff(slate, prepend=-1))
    lengths = np.diff(np.append(starts, len(slate)))
    logs = np.log(np.maximum(weight, 1e-300))
    sums = np.cumsum(logs)
    cascade = np.exp(np.minimum(sums - np.repeat(sums[starts] - logs[starts], lengths), 600.0))
    whole = cascade[starts + lengths - 1]
    position = np.arange(len(slate)) - np.repeat(starts, lengths)
    mean = np.bincount(position, cascade) / np.bincount(position)
    cascade = cascade / np.maximum(mean[position], 1e-300)
    weights = {"cascade": cascade, "position": weight, "slate": np.repeat(whole, lengths)}
    sizes = {"cascade": cascade, "position": weight, "slate": whole}
    return weights, {name: float(w.sum()) ** 2 / max(float((w * w).sum()), 1e-300) for name, w in sizes.items()}


def _nothing(reason: str, overlap: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is said where nothing can be: no number."""
    return {
        "verdict": ope.NO_OVERLAP, "reason": reason, "value": {"value": None},
        "difference": {"value": None, "low": None, "high": None}, "estimates": {},
        "overlap": overlap or {"warnings": []},
    }  # fmt: skip


def verdict(apart: dict[str, float]) -> str:
    """Return BETTER or WORSE where the interval of the difference does not hold 0, else SAME."""
    return BETTER if apart["low"] > 0.0 else WORSE if apart["high"] < 0.0 else SAME


def difference(
    reward: F64, weight: F64, user: I64, rng: np.random.Generator, *, level: float = 0.95, draws: int = 1000
) -> dict[str, float]:
    """Return sum w r / sum w - mean r with its interval over users, the wider end of two: rewards, weights f64[n].

    Percentiles of users drawn again, and value -+ t standard errors (delta method, users - 1 degrees of freedom).
    """
    _, of = np.unique(user, return_inverse=True)
    a, b, c = (np.bincount(of, x).astype(np.float64) for x in (weight * reward, weight, reward))
    n = np.bincount(of).astype(np.float64)
    changed, own, users = float(a.sum() / b.sum()), float(c.sum() / n.sum()), len(n)
    influence = (a - changed * b) / b.sum() - (c - own * n) / n.sum()
    error = math.sqrt(float((influence**2).sum()) * users / max(users - 1, 1))
    half = float(stdtrit(max(users - 1, 1), (1.0 + level) / 2.0)) * error
    drawn = np.concatenate([
        _redrawn(rng.multinomial(users, np.full(users, 1.0 / users), size=some).astype(np.float64), a, b, c, n)
        for some in _portions(draws, max(1, 2_000_000 // users))
    ])  # fmt: skip
    low, high = np.quantile(drawn, ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    at = changed - own
    return {"value": at, "low": min(float(low), at - half), "high": max(float(high), at + half)}


def _portions(total: int, most: int) -> list[int]:
    return [min(most, total - at) for at in range(0, total, most)]


def _redrawn(picked: F64, a: F64, b: F64, c: F64, n: F64) -> F64:
    """Return the difference under each draw of users f64[draws, users]."""
    below = picked @ b
    out: F64 = np.divide(picked @ a, below, out=np.zeros(len(picked)), where=below > 0.0) - (picked @ c) / (picked @ n)
    return out
