"""The simulated world: people with known, drifting tastes, and items that appear and age.

It knows what no recommender may know: the chance that a person clicks an item they look at. So it can say, for any
slate, how many clicks to expect, and what the best possible slate is. It knows nothing about HTTP, Kafka, Redis, clocks
or the models: time is an argument, randomness a seed or a generator, and the same seed gives the same world.

The law of a click, for person `u`, item `i`, position `k` (from 0) and time `t`:

    p(click | u, i, looked at) = r sigmoid(base + bias_u + gain <taste_u(t), vector_i> + appeal_i - aged_i(t))
    aged_i(t)                  = min(floor, ln 2 age_i(t) / shelf_i)
    p(looked at | k)           = (k + 1)^-eta
    expected clicks of a slate = sum_k p(looked at | k) p(click | u, i_k, looked at)

`r` is 1, and `repeat` once the person has clicked the item. Both popularity and taste carry information: about three
fifths of the variance of the log-odds are the item's own appeal, age and topic, about two fifths are personal.

A topic may surge (`surge`): for `surge_s` after it began at time b, every item of that topic gains

    lift(t) = surge_lift 2^-((t - b) / surge_half_life_s)     in log-odds, for everybody

and the chance that a visitor also finds an item without us rises by `surge_browse` lift(t) / surge_lift. It is part of
the truth, so the best slate and the expected clicks of every slate follow it at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaming.simulation import titles

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

BLOCK = 256  # items are made in blocks, each from its own generator, so that a world can grow for ever


@dataclass(frozen=True, slots=True)
class Parameters:
    """Everything that shapes the world; committed before the first run with a recommender (see DECISIONS.md)."""

    dims: int = 16  # of the taste space
    topic_skew: float = 0.6  # topic j is liked and written about in proportion to (j + 1)^-skew
    tag_share: float = 0.5  # weight of the tags in an item's vector, its topic has 1
    item_noise: float = 0.4
    interests: int = 3  # topics that one person follows
    interest_weights: tuple[float, ...] = (1.0, 0.7, 0.45)
    person_noise: float = 0.5  # size of the part of a taste that follows no topic
    gain: float = 4.5  # log-odds per unit of <taste, vector>
    base: float = -4.5  # log-odds of a click on a plain item that is looked at
    bias: float = 0.3  # standard deviation of a person's readiness to click
    appeal: float = 1.0  # standard deviation of an item's log-odds: its odds are log-normal, a heavy tail
    repeat: float = 0.1  # factor on a click on an item already clicked
    eta: float = 0.7  # position bias: looked at with (k + 1)^-eta
    evergreen: float = 0.6  # share of items that never age
    shelf_s: float = 1200.0  # median half-life of the odds of the others, log-normal with sigma .7
    oldest_s: float = 7200.0  # the first catalogue was published evenly over this long before the start
    floor: float = 3.0  # ageing costs at most this much log-odds
    arrivals: float = 0.01  # new items per minute, as a share of the first catalogue
    drift_s: float = 900.0  # relaxation time of the random walk of a taste
    jump_s: float = 1200.0  # mean time between jumps, where one interest is replaced by another
    activity: float = 0.8  # sigma of the log-normal that says how often a person comes
    session: float = 3.0  # mean slates per visit
    pause_s: float = 1.0  # mean time between two slates of a visit
    browse: float = 0.3  # chance per visit that the person also finds an item without us
    browse_pool: int = 40  # how many items they glance at then
    rate: float = 0.12  # chance that a click leads to a rating
    surge_lift: float = 2.0  # log-odds that the items of a surging topic gain at first: its odds are 7.4 times as high
    surge_half_life_s: float = 120.0  # in which that halves
    surge_s: float = 600.0  # then the surge is over (it has fallen to a 32nd)
    surge_browse: float = 0.5  # what it adds at first to the chance that a visitor finds an item without us


PARAMETERS = Parameters()
TICK_S = 1.0  # tastes move in steps of this size


class Outcome(NamedTuple):
    """What a person did with one item: kind view, click, dwell, rating or action; position -1 is not from a slate."""

    kind: str
    item: int
    position: int
    value: float = 0.0  # dwell: seconds; rating: 1 to 5
    action: str = ""


class Visit(NamedTuple):
    """A person comes at `time` and asks for one slate, then one more after each pause (seconds)."""

    time: float
    user: int
    pauses: tuple[float, ...]


class Surge(NamedTuple):
    """A topic everybody wants more of since `began`."""

    topic: int
    began: float


class World:
    """People, items and the truth about them at the time of the last `advance`."""

    def __init__(self, *, users: int, items: int, seed: int, start: float, parameters: Parameters = PARAMETERS) -> None:
        self.parameters = p = parameters
        self.seed, self.start, self.now, self.first_items = seed, start, start, items
        self._ticks = 0
        self.surging: Surge | None = None
        rng = self._generator(0)
        self.topic_share = _skewed(len(titles.TOPICS), p.topic_skew)
        self.topics = _unit(rng.standard_normal((len(titles.TOPICS), p.dims)))
        self.tags = _unit(rng.standard_normal((len(titles.TOPICS), 6, p.dims)))
        self.liking = rng.permutation(self.topic_share)  # what people follow is skewed otherwise than what is written
        self._people(users, self._generator(1))
        self._walk = self._generator(2)
        self._blocks = 0
        self._titles: dict[str, int] = {}
        self.texts: list[titles.Text] = []
        self.topic_of = np.empty(0, np.int64)
        self.vectors = np.empty((0, p.dims))
        self.appeal, self.shelf, self.quality, self.published = (np.empty(0) for _ in range(4))
        while len(self.texts) < items or self.published[-1] <= start:
            self._write_block()

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=key)))

    def _people(self, users: int, rng: np.random.Generator) -> None:
        p = self.parameters
        self.users = users
        self.bias = p.bias * rng.standard_normal(users)
        self.activity = np.exp(p.activity * rng.standard_normal(users))
        self._bustle = self.activity.sum()
        self.activity /= self._bustle
        self.interests = np.array([self._pick_topics(p.interests, rng) for _ in range(users)]).reshape(
            users, p.interests
        )
        self.personal = rng.standard_normal((users, p.dims)) / np.sqrt(p.dims)
        self.clicked: list[set[int]] = [set() for _ in range(users)]
        self._retaste()

    def grow(self, users: int) -> None:
        """Let people come into being, by the same laws, until there are `users`; nobody leaves.

        Each has a generator of their own, so who comes does not depend on how many come at once. `activity` is
        relative to the first people's, whose sum is 1.
        """
        p = self.parameters
        for user in range(self.users, users):
            rng = self._generator(4, user)
            self.bias = np.append(self.bias, p.bias * rng.standard_normal())
            self.activity = np.append(self.activity, np.exp(p.activity * rng.standard_normal()) / self._bustle)
            self.interests = np.vstack([self.interests, self._pick_topics(p.interests, rng)])
            self.personal = np.vstack([self.personal, rng.standard_normal(p.dims) / np.sqrt(p.dims)])
            self.clicked.append(set())
        self.users = max(users, self.users)
        self._retaste()

    def _pick_topics(self, count: int, rng: np.random.Generator) -> Rows:
        return rng.choice(len(titles.TOPICS), count, replace=False, p=self.liking)

    def _retaste(self) -> None:
        weights = np.array(self.parameters.interest_weights)
        followed = np.einsum("k,ukd->ud", weights, self.topics[self.interests])
        self.taste = _unit(followed + self.parameters.person_noise * self.personal)

    def _write_block(self) -> None:
        """Make the next BLOCK items; the last of them is published after everything made before."""
        p, rng, first = self.parameters, self._generator(3, self._blocks), len(self.texts)
        topic = rng.choice(len(titles.TOPICS), BLOCK, p=self.topic_share)
        tags = [tuple(int(t) for t in rng.choice(6, int(rng.integers(1, 4)), replace=False)) for _ in range(BLOCK)]
        tagged = np.array([self.tags[k, list(chosen)].mean(axis=0) for k, chosen in zip(topic, tags, strict=True)])
        noise = p.item_noise * rng.standard_normal((BLOCK, p.dims)) / np.sqrt(p.dims)
        vectors = _unit(self.topics[topic] + p.tag_share * _unit(tagged) + noise)
        appeal = p.appeal * rng.standard_normal(BLOCK)
        shelf = np.where(rng.random(BLOCK) < p.evergreen, np.inf, p.shelf_s * np.exp(0.7 * rng.standard_normal(BLOCK)))
        gaps = rng.exponential(60.0 / (p.arrivals * self.first_items) if p.arrivals else np.inf, BLOCK)
        number = np.arange(first, first + BLOCK)
        early = self.start - p.oldest_s * rng.random(BLOCK)
        latest = max(self.start, float(self.published[-1])) if first > self.first_items else self.start
        later = latest + np.cumsum(np.where(number < self.first_items, 0.0, gaps))
        self.published = np.concatenate([self.published, np.where(number < self.first_items, early, later)])
        self.topic_of = np.concatenate([self.topic_of, topic])
        self.vectors = np.concatenate([self.vectors, vectors])
        self.appeal = np.concatenate([self.appeal, appeal])
        self.shelf = np.concatenate([self.shelf, shelf])
        self.quality = np.concatenate([self.quality, rng.standard_normal(BLOCK)])
        self.texts.extend(self._title(titles.TOPICS[k], chosen, rng) for k, chosen in zip(topic, tags, strict=True))
        self._blocks += 1

    def _title(self, topic: titles.Topic, tags: tuple[int, ...], rng: np.random.Generator) -> titles.Text:
        """Words that no earlier item has: a few tries, then a part number."""
        for _ in range(12):
            text = titles.write(topic, tags, rng)
            if text.title not in self._titles:
                break
        part = self._titles[text.title] = self._titles.get(text.title, 0) + 1
        return text if part == 1 else text._replace(title=f"{text.title}, part {part}")

    # ---- time

    def advance(self, now: float) -> None:
        """Let tastes drift, people change their minds and items appear until `now` (never backwards)."""
        self.now = max(now, self.now)
        while self.start + (self._ticks + 1) * TICK_S <= self.now:
            self._ticks += 1
            self._drift()
        while self.published[-1] <= self.now:
            self._write_block()

    def _drift(self) -> None:
        p, rng = self.parameters, self._walk
        pull = TICK_S / p.drift_s
        shock = rng.standard_normal((self.users, p.dims)) / np.sqrt(p.dims)
        self.personal += np.sqrt(2 * pull) * shock - pull * self.personal
        for user in np.flatnonzero(rng.random(self.users) < TICK_S / p.jump_s):
            self.interests[user, rng.integers(p.interests)] = self._pick_topics(1, rng)[0]
        self._retaste()

    @property
    def live(self) -> int:
        """How many items are out: the items 0 to live - 1."""
        return self.first_items + int(np.searchsorted(self.published[self.first_items :], self.now, side="right"))

    def break_off(self, rng: np.random.Generator) -> None:
        """Change everything at once: items swap their appeal, and every person replaces one interest."""
        self.appeal = rng.permutation(self.appeal)
        for user in range(self.users):
            self.interests[user, rng.integers(self.parameters.interests)] = self._pick_topics(1, rng)[0]
        self._retaste()

    def surge(self, topic: int) -> None:
        """Let a topic (its place in `titles.TOPICS`) surge from now on; an earlier surge ends."""
        self.surging = Surge(topic, self.now)

    def surge_strength(self) -> float:
        """How much of the surge is left, 1 at its beginning, 0 where none is on."""
        p = self.parameters
        if self.surging is None or self.now - self.surging.began >= p.surge_s:
            return 0.0
        return float(2.0 ** (-(self.now - self.surging.began) / p.surge_half_life_s))

    # ---- the truth

    def _wanted(self, rows: Rows) -> Floats:
        """Log-odds of `rows` that are the same for everybody: their appeal, and what a surge adds."""
        strength = self.surge_strength()
        wanted: Floats = self.appeal[rows]
        if self.surging is None or strength == 0.0:
            return wanted
        return np.asarray(wanted + self.parameters.surge_lift * strength * (self.topic_of[rows] == self.surging.topic))

    def attraction(self, user: int, rows: Rows) -> Floats:
        """p(click | looked at) of `user` for each item of `rows` now."""
        p = self.parameters
        age = np.maximum(0.0, self.now - self.published[rows])
        logit = p.base + self.bias[user] + p.gain * (self.vectors[rows] @ self.taste[user]) + self._wanted(rows)
        chance = 1.0 / (1.0 + np.exp(-(logit - np.minimum(np.log(2.0) * age / self.shelf[rows], p.floor))))
        known = self.clicked[user]
        if known:
            chance[np.isin(rows, np.fromiter(known, np.int64, len(known)))] *= p.repeat
        return np.asarray(chance)

    def welcome(self, rows: Rows) -> Floats:
        """Mean over all people of p(click | looked at) of each item of `rows`, as if new and clicked by nobody."""
        p = self.parameters
        logit = p.base + self.bias[:, None] + p.gain * (self.taste @ self.vectors[rows].T) + self._wanted(rows)
        return np.asarray((1.0 / (1.0 + np.exp(-logit))).mean(axis=0))

    def looked_at(self, n: int) -> Floats:
        """p(looked at | position) for the first n positions."""
        return np.asarray(np.arange(1, n + 1) ** -self.parameters.eta)

    def expected_clicks(self, user: int, rows: Rows) -> float:
        """Expected clicks of this slate for this person now."""
        return float(self.looked_at(len(rows)) @ self.attraction(user, rows))

    def expected_joy(self, user: int, rows: Rows) -> float:
        """Expected sum of satisfaction (0 to 1 each) of the clicks on this slate: what dwells and ratings tell of."""
        joy = np.array([self._satisfaction(user, item) for item in rows.tolist()])
        return float((self.looked_at(len(rows)) * self.attraction(user, rows)) @ joy)

    def oracle(self, user: int, n: int, exclude: frozenset[int] = frozenset()) -> Rows:
        """The best slate there is: the n most attractive live items, best first."""
        rows = np.arange(self.live)
        if exclude:
            rows = rows[~np.isin(rows, list(exclude))]
        return rows[np.argsort(-self.attraction(user, rows), kind="stable")[:n]]

    # ---- what people do

    def react(self, user: int, rows: Rows, rng: np.random.Generator) -> list[Outcome]:
        """The person looks down the slate: views, clicks and what follows, skips, hides; clicks are remembered."""
        chance = self.attraction(user, rows)
        seen = rng.random(len(rows)) < self.looked_at(len(rows))
        clicks = seen & (rng.random(len(rows)) < chance)
        done: list[Outcome] = []
        for position in np.flatnonzero(seen).tolist():
            item = int(rows[position])
            done.append(Outcome("view", item, position))
            done.extend(
                self._click(user, item, position, rng) if clicks[position] else self._pass(user, item, position, rng)
            )
        return done

    def browses(self, rng: np.random.Generator) -> bool:
        """Draw whether a visitor also finds an item without us; more often while a topic surges."""
        p = self.parameters
        return bool(rng.random() < min(1.0, p.browse + p.surge_browse * self.surge_strength()))

    def browse(self, user: int, rng: np.random.Generator) -> list[Outcome]:
        """The person finds one item without us (a search, a friend's link): the talked-about, chosen by taste."""
        rows = np.arange(self.live)
        age = np.log(2.0) * np.maximum(0.0, self.now - self.published[rows]) / self.shelf[rows]
        talk = np.exp(self._wanted(rows) - np.minimum(age, self.parameters.floor))
        pool = rng.choice(rows, min(self.parameters.browse_pool, len(rows)), replace=False, p=talk / talk.sum())
        chance = self.attraction(user, pool)
        return self._click(user, int(rng.choice(pool, p=chance / chance.sum())), -1, rng)

    def _satisfaction(self, user: int, item: int) -> float:
        fit = float(self.vectors[item] @ self.taste[user])
        return float(1.0 / (1.0 + np.exp(-(4.0 * fit - 1.0 + 0.8 * self.quality[item]))))

    def _click(self, user: int, item: int, position: int, rng: np.random.Generator) -> list[Outcome]:
        """A click, the time spent (compressed: told, not waited for), and now and then a rating or a named action."""
        self.clicked[user].add(item)
        joy = self._satisfaction(user, item)
        dwell = float(np.exp(np.log(4.0) + 3.0 * joy + 0.8 * rng.standard_normal()))
        done = [Outcome("click", item, position), Outcome("dwell", item, position, value=round(min(dwell, 900.0), 1))]
        if rng.random() < self.parameters.rate:
            stars = float(np.clip(np.round(1.0 + 4.0 * joy + 0.6 * rng.standard_normal()), 1.0, 5.0))
            done.append(Outcome("rating", item, position, value=stars))
        for name, chance in (("like", 0.25), ("save", 0.08), ("share", 0.05)):
            if rng.random() < chance * joy:
                done.append(Outcome("action", item, position, action=name))
        return done

    def _pass(self, user: int, item: int, position: int, rng: np.random.Generator) -> list[Outcome]:
        """Looked at, not clicked: sometimes skipped, rarely hidden, the more so the less it fits."""
        dislike = 1.0 - self._satisfaction(user, item)
        if rng.random() >= 0.06 * dislike:
            return []
        return [Outcome("action", item, position, action="hide" if rng.random() < 0.2 else "skip")]


def visits(
    world: World, *, slates_per_s: float, seconds: float, rng: np.random.Generator, since: float | None = None,
    people: int | None = None,
) -> list[Visit]:  # fmt: skip
    """Visits for `seconds` from `since` (the world's start): Poisson arrivals, busy people more often, by time.

    people: only the first so many of the world's people come; None: all.
    """
    p = world.parameters
    count = int(rng.poisson(slates_per_s * seconds / p.session))
    times = np.sort((world.start if since is None else since) + seconds * rng.random(count))
    activity = world.activity[:people]
    if not np.isclose(whole := activity.sum(), 1.0, rtol=1e-12):
        activity = activity / whole
    users = rng.choice(len(activity), count, p=activity)
    more = rng.geometric(1.0 / p.session, count) - 1
    return [
        Visit(float(t), int(u), tuple(rng.exponential(p.pause_s, int(m)).tolist()))
        for t, u, m in zip(times, users, more, strict=True)
    ]


def _unit(x: Floats) -> Floats:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def _skewed(count: int, exponent: float) -> Floats:
    share = np.arange(1, count + 1) ** -exponent
    return np.asarray(share / share.sum())
