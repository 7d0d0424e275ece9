"""`freshet bench exploration`: what does finding out cost and bring, in a world whose truth is known?

Every policy goes on from a fork of one state: the same people, items and log of a warm-up that epsilon played. Regret
is expected clicks of the best slate less those of ours, per slate after the warm-up. Retrieval, learning, the share of
slots for first impressions (greedy has none) and who comes when are the same for all; intervals are t intervals over
seeds, paired where two policies are compared. Beside them stands somebody who knows every item and only has to learn
what each person likes (`streaming/simulation/informed.py`): hardly any policy can go below that regret. Knows nothing
of Kafka, Redis, HTTP or terminals.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from models.bandit import POLICIES, SAMPLES, Policy, RewardTable, draw, propensities
from streaming.simulation.informed import Informed
from streaming.simulation.scorecard import Entry, Play, Recommender, Scorecard
from streaming.simulation.trial import Trial
from streaming.simulation.world import PARAMETERS, Parameters, Rows, World

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

START: Final = 1e9
HELD_OUT: Final = 2026
"""Seeds from here on were never looked at while constants were chosen: that was done on 1 to 4."""
EPSILON: Final = 0.1
DISCOVERING: Final = 500
"""Impressions within which a good new item should have its fair share."""
GOOD: Final = 0.1
"""Share of the items that arrive which are good: those whose mean attraction over all people is highest."""
SLATES: Final = 200_000
CANDIDATES: Final = 50
DWELL: Final[RewardTable] = (("*", "dwell", 1.0),)
_STILL: Final = replace(PARAMETERS, drift_s=np.inf, jump_s=np.inf, evergreen=1.0, arrivals=0.0)


class Preset(NamedTuple):
    """How a world changes: its parameters, and whether everything changes at once halfway after the warm-up."""

    parameters: Parameters
    breaks: bool


PRESETS: Final = {
    "stationary": Preset(_STILL, False),
    "drifting": Preset(replace(PARAMETERS, arrivals=0.05), False),
    "abrupt": Preset(_STILL, True),
}
"""Fixed before policies were compared on them. drifting: the demo's world with five times its arrivals."""


@dataclass(frozen=True, slots=True)
class Size:
    """People, items at the start, slates a second, and seconds of the warm-up, after it, and of a block of slates."""

    users: int = 400
    items: int = 200
    slates_per_s: float = 5.0
    warmup_s: float = 240.0
    after_s: float = 300.0
    block_s: float = 60.0
    lookups: int = 200


SIZE: Final = Size()
Advance = Callable[[str], None]


@dataclass(slots=True)
class Ledger(Scorecard):
    """A scorecard that also keeps what was shown, what the best slates show, and expected satisfaction, by slate."""

    shown: list[tuple[Rows, Rows]] = field(default_factory=list)
    joys: list[float] = field(default_factory=list)

    def add(self, world: World, user: int, ours: Rows, popular: Rows, n: int, *, best: Rows | None = None) -> Entry:
        """Score our slate beside the best one; popularity is not asked for here."""
        best = world.oracle(user, n) if best is None else best
        entry = Entry(world.now, user, world.expected_clicks(user, ours), np.nan, world.expected_clicks(user, best))
        self.entries.append(entry)
        self.shown.append((ours, best))
        self.joys.append(world.expected_joy(user, ours))
        return entry


class Ran(NamedTuple):
    """One policy's run after the warm-up: per slate regret, clicks and satisfaction; blocks of regret; good new items.

    found: of each good new item the impressions it had when it reached its fair share, inf where it did not.
    """

    regret: float
    clicks: float
    joy: float
    blocks: list[float]
    found: list[float]


def warmed(preset: str, seed: int, size: Size = SIZE, rewards: RewardTable = ()) -> Play:
    """Return a world played by epsilon until the end of the warm-up."""
    world = _world(preset, seed, size)
    return _warm(world, Trial(world, policy="epsilon", seed=seed, epsilon=EPSILON, rewards=rewards), seed, size)


def informed(preset: str, seed: int, size: Size = SIZE) -> float:
    """Return the regret a slate after the warm-up of somebody who knows the items; the warm-up is their own."""
    world = _world(preset, seed, size)
    played = _warm(world, Informed(world), seed, size)
    first = len(played.card.entries)
    _to_the_end(played, preset, size)
    return float(np.mean([entry.oracle - entry.ours for entry in played.card.entries[first:]]))


def _world(preset: str, seed: int, size: Size) -> World:
    return World(users=size.users, items=size.items, seed=seed, start=START, parameters=PRESETS[preset].parameters)


def _warm(world: World, people: Recommender, seed: int, size: Size) -> Play:
    seconds = size.warmup_s + size.after_s
    played = Play(world, people, slates_per_s=size.slates_per_s, seconds=seconds, seed=seed, card=Ledger([]))
    played.until(START + size.warmup_s)
    return played


def _to_the_end(played: Play, preset: str, size: Size) -> None:
    if PRESETS[preset].breaks:
        played.until(START + size.warmup_s + 0.5 * size.after_s)
        played.world.break_off(np.random.default_rng([played.world.seed, 3]))
    played.until(START + size.warmup_s + size.after_s)


def goes_on(played: Play, preset: str, policy: Policy, size: Size = SIZE) -> Ran:
    """Let a policy go on from a copy of what was played, to the end."""
    forked = copy.deepcopy(played)
    people, world, card = forked.people, forked.world, forked.card
    assert isinstance(people, Trial)
    assert isinstance(card, Ledger)
    people.policy = policy
    first = len(card.entries)
    _to_the_end(forked, preset, size)
    entries = np.array([(entry.time, entry.ours, entry.oracle) for entry in card.entries[first:]])
    regret, block = entries[:, 2] - entries[:, 1], ((entries[:, 0] - START - size.warmup_s) // size.block_s).astype(int)
    return Ran(
        float(regret.mean()), float(entries[:, 1].mean()), float(np.mean(card.joys[first:])),
        [float(regret[block == b].mean()) for b in range(int(block.max()) + 1) if (block == b).any()],
        discovered(world, card.shown[first:], entries[:, 0], size),
    )  # fmt: skip


def discovered(world: World, shown: Sequence[tuple[Rows, Rows]], times: F64, size: Size) -> list[float]:
    """Return of each good new item the impressions it had had by the block in which it reached its fair share.

    Fair is half of what the best slates give it in the same block; blocks in which they give it nothing do not count.
    Good are the first GOOD of the arrivals after the warm-up that are there for at least two blocks.
    """
    began, end = START + size.warmup_s, START + size.warmup_s + size.after_s
    rows = np.arange(world.first_items, world.live)
    rows = rows[(world.published[rows] >= began) & (world.published[rows] <= end - 2 * size.block_s)]
    if not len(rows):
        return []
    best = rows[np.argsort(-world.welcome(rows), kind="stable")[: max(1, round(GOOD * len(rows)))]]
    blocks = ((times - began) // size.block_s).astype(np.int64)
    counts = np.zeros((2, int(blocks.max()) + 1, world.live), np.int64)
    for block, pair in zip(blocks.tolist(), shown, strict=True):
        for which, slate in enumerate(pair):
            counts[which, block, slate] += 1
    found = []
    for row in best.tolist():
        ours, fair = counts[0, :, row], counts[1, :, row]
        reached = np.flatnonzero((fair > 0) & (2 * ours >= fair))
        found.append(float(ours[: reached[0] + 1].sum()) if len(reached) else np.inf)
    return found


# ---- what a lookup costs, and whether propensities are true


def propensity_p(
    scores: F64, exploring: U8, policy: Policy, *, slates: int = SLATES, seed: int = HELD_OUT,
    chance: Callable[..., F32] = propensities,
) -> float:  # fmt: skip
    """Return the chi-square p of how often each pair came first and second in slates drawn from one fixed state.

    scores f64[m, S], exploring u8[m] as for `draw`; expected from `chance`. 0 where something came that could not.
    """
    asked: dict[str, Any] = {"epsilon": EPSILON, "first": 0.05, "exploring": exploring}
    m, rng = len(scores), np.random.default_rng(seed)
    counts, expected = np.zeros((m, m)), np.zeros((m, m))
    for _ in range(slates):
        places, _ = draw(scores, policy, 10, rng, **asked)
        counts[places[0], places[1]] += 1.0
    for a in range(m):
        for b in range(m):
            if a != b:
                pair = chance(scores, policy, np.array([a, b]), **asked)
                expected[a, b] = slates * float(pair.astype(np.float64).prod())
    if (counts[expected == 0.0] > 0.0).any():
        return 0.0
    large = expected >= 5.0  # the others are taken together
    seen, wanted = counts[large], expected[large]
    if (rest := expected[~large].sum()) > 0.0:
        seen, wanted = np.append(seen, counts[~large].sum()), np.append(wanted, rest)
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    # Propensities that do not add up to one show here too; where only one pair can come there is no freedom.
    return float(stats.chi2.sf(statistic, max(len(seen) - 1, 1)))


def looked_up(played: Play, size: Size = SIZE) -> dict[str, float]:
    """Return milliseconds that thompson adds to greedy's lookup, medians over users, on one state and after a step."""
    people = copy.deepcopy(played).people
    assert isinstance(people, Trial)
    users, now = list(range(min(size.lookups, size.users))), played.world.now
    out = {}
    for name, fresh in (("lookup_ms_added", False), ("lookup_ms_added_after_step", True)):
        taken = people.lookup_seconds(users, now, ("greedy", "thompson"), fresh=fresh)
        out[name] = 1e3 * float(np.median(taken[:, 1] - taken[:, 0]))
        out["lookup_ms_greedy"] = 1e3 * float(np.median(taken[:, 0]))
    return out


def propensity_ps(played: Play, slates: int = SLATES) -> dict[str, float]:
    """Return each policy's p, from the first CANDIDATES candidates of one person.

    Of what draws from particles also with noise of 1 between them, `at odds`: those of a settled model may all agree.
    """
    people = copy.deepcopy(played).people
    assert isinstance(people, Trial)
    out, rng = dict[str, float](), np.random.default_rng(HELD_OUT)
    for policy in POLICIES:
        scores, exploring = people.drawn_from(0, played.world.now, policy, CANDIDATES)
        out[policy] = propensity_p(scores, exploring, policy, slates=slates)
        if policy in SAMPLES:
            at_odds = scores + rng.standard_normal(scores.shape)
            out[f"{policy}, at odds"] = propensity_p(at_odds, exploring, policy, slates=slates)
    return out


# ---- the report


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and 95 % t interval over seeds; no ends from one seed."""
    x = np.asarray(values, np.float64)
    half = float(stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)) if len(x) > 1 else None
    mean = float(x.mean())
    return {
        "mean": mean, "low": mean - half if half is not None else None,
        "high": mean + half if half is not None else None,
    }  # fmt: skip


def measure(
    seeds: Sequence[int], *, size: Size = SIZE, presets: Sequence[str] = tuple(PRESETS),
    policies: Sequence[Policy] = POLICIES, slates: int = SLATES, advance: Advance = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Play every policy in every preset with every seed; `advance` is told what is next, once a run."""
    ran: dict[str, dict[str, list[Ran]]] = {preset: {policy: [] for policy in policies} for preset in presets}
    dwelt: list[Ran] = []
    floor: dict[str, list[float]] = {preset: [] for preset in presets}
    lookups, ps = dict[str, float](), dict[str, float]()
    for seed in seeds:
        for preset in presets:
            floor[preset].append(informed(preset, seed, size))
            played = warmed(preset, seed, size)
            for policy in policies:
                advance(f"{preset}, seed {seed}, {policy}")
                ran[preset][policy].append(goes_on(played, preset, policy, size))
            if preset == presets[-1] and not ps:
                advance("propensities and lookups")
                lookups, ps = looked_up(played, size), propensity_ps(played, slates)
            if preset == "drifting":
                advance(f"drifting, seed {seed}, rewarding dwell")
                dwelt.append(goes_on(warmed(preset, seed, size, DWELL), preset, "thompson", size))
    return reported(seeds, size, ran, floor, dwelt, lookups, ps)


def runs(seeds: int) -> int:
    """Return how often `measure` tells of progress."""
    return seeds * (len(PRESETS) * len(POLICIES) + 1) + 1


def reported(
    seeds: Sequence[int], size: Size, ran: dict[str, dict[str, list[Ran]]], floor: dict[str, list[float]],
    dwelt: list[Ran], lookups: dict[str, float], ps: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Return the report of these runs, each list by seed; floor: regret of `informed` by preset."""
    regret, discovery, until, share, blocks = {}, {}, {}, {}, {}
    for preset, by_policy in ran.items():
        regret[preset] = {policy: interval([run.regret for run in each]) for policy, each in by_policy.items()}
        share[preset] = {policy: interval([run.clicks for run in each]) for policy, each in by_policy.items()}
        blocks[preset] = {
            policy: np.mean([run.blocks[: min(len(r.blocks) for r in each)] for run in each], axis=0).tolist()
            for policy, each in by_policy.items()
        }
        found = {policy: np.array([n for run in each for n in run.found]) for policy, each in by_policy.items()}
        discovery[preset] = {
            policy: float((n <= DISCOVERING).mean()) if len(n) else None for policy, n in found.items()
        }
        until[preset] = {policy: _median(n) for policy, n in found.items()}
    report = {
        "seeds": list(seeds), "size": {name: getattr(size, name) for name in size.__dataclass_fields__},
        "regret": regret, "informed": {preset: interval(each) for preset, each in floor.items()}, "clicks": share,
        "regret_by_block": blocks, "discovery": discovery,
        "impressions_until_fair_share": until,
        "good_new_items": len([n for run in ran.get("drifting", {}).get("greedy", []) for n in run.found]),
        "compared": _compared(ran), "satisfaction": _satisfaction(ran, dwelt), **lookups,
        "propensity": ps, "propensity_p": min(1.0, len(ps) * min(ps.values())) if ps else None,
    }  # fmt: skip
    return report | {"targets": targets(report)}


def _median(impressions: F64) -> float | None:
    """Return the median, None where it is an item that was not found or there is none."""
    middle = float(np.median(impressions)) if len(impressions) else np.inf
    return middle if np.isfinite(middle) else None


def _compared(ran: dict[str, dict[str, list[Ran]]]) -> dict[str, Any]:
    """Return by preset and policy the regret over greedy's and epsilon's, as a share of theirs, paired by seed."""
    out: dict[str, Any] = {}
    for preset, by_policy in ran.items():
        for policy, each in by_policy.items():
            for other in ("greedy", "epsilon"):
                if other in by_policy and policy != other:
                    theirs = float(np.mean([run.regret for run in by_policy[other]]))
                    apart = [(a.regret - b.regret) / theirs for a, b in zip(each, by_policy[other], strict=True)]
                    out.setdefault(preset, {}).setdefault(policy, {})[f"over_{other}"] = interval(apart)
    return out


def _satisfaction(ran: dict[str, dict[str, list[Ran]]], dwelt: list[Ran]) -> dict[str, Any]:
    """Return thompson's expected satisfaction and clicks a slate in the drifting world, by what it is rewarded for."""
    clicked = ran.get("drifting", {}).get("thompson", [])
    if not clicked or not dwelt:
        return {}
    return {
        "click": interval([run.joy for run in clicked]), "dwell": interval([run.joy for run in dwelt]),
        "difference": interval([b.joy - a.joy for a, b in zip(clicked, dwelt, strict=True)]),
        "clicks": {
            name: float(np.mean([run.clicks for run in each])) for name, each in (("click", clicked), ("dwell", dwelt))
        },
    }  # fmt: skip


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was wanted beside what was found, as shares: name, wanted (at most, or above), found, reached."""
    compared = report["compared"]
    out = []
    for name, preset, other, most in (
        ("drifting: regret of thompson over greedy", "drifting", "over_greedy", -0.30),
        ("drifting: regret of thompson over epsilon .1", "drifting", "over_epsilon", -0.50),
        ("stationary: regret of thompson over greedy", "stationary", "over_greedy", 0.05),
    ):
        found = compared.get(preset, {}).get("thompson", {}).get(other)
        if found is not None:
            out.append({"name": name, "wanted": most, **found, "reached": found["mean"] <= most})
    if report["propensity_p"] is not None:
        p = report["propensity_p"]
        out.append({"name": "propensities: smallest p, times the checks", "wanted": 0.001, "mean": p,
                    "low": None, "high": None, "reached": p > 0.001})  # fmt: skip
    return out
