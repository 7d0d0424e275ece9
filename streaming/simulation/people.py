"""Simulated people at work: they ask for slates and send events as any client would, and the world keeps score.

They use the public API only; a fifth of them publish their events through the Kafka inlets instead. It knows nothing
about how slates are made. What the world alone knows (expected clicks) goes to the scorecard and to a learning curve,
never to the recommender.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import aiohttp
import msgspec
import numpy as np

from streaming.simulation import titles
from streaming.simulation.scorecard import Lead, Means, Scorecard
from streaming.simulation.trend import Trend
from streaming.simulation.world import Outcome, Rows, Visit, World, visits
from streaming.topics import Log, Topics, partition_of

N: Final = 10
INLET_EVERY: Final = 5  # every fifth person publishes through the inlets
MAX_VISITS: Final = 256  # at once; who comes then is turned away and counted
BATCH: Final = 500  # catalogue entries a request
WINDOW_S: Final = 10.0  # of the means shown
LEAD_S: Final = 60.0  # of the lead
FINISH_S: Final = 1.0
HORIZON_S: Final = 1.0  # visits are drawn this far ahead, and the crowd asked how many may come
MAX_CROWD: Final = 500  # people that the page may call
INLET_OF: Final = {"click": "clicks", "dwell": "dwells", "rating": "ratings", "action": "actions", "view": "views"}

Send = Callable[[str, Sequence[dict[str, Any]]], Awaitable[str | None]]
"""(user id, events) -> the token of the user's last one, None where nothing was taken."""


def user_id(user: int) -> str:
    """The id of a person."""
    return f"person-{user:04d}"


def item_id(row: int) -> str:
    """The id of an item."""
    return f"item-{row:05d}"


def row_of(identifier: str) -> int | None:
    """The row of an item id; None for an item that is not of this world."""
    number = identifier.removeprefix("item-")
    return int(number) if number.isdecimal() and item_id(int(number)) == identifier else None


def catalogue_entry(world: World, row: int) -> dict[str, Any]:
    """What `POST /v1/items` takes for an item: its words, nothing of its appeal."""
    text = world.texts[row]
    return {
        "item_id": item_id(row), "title": text.title, "text": text.text, "tags": list(text.tags),
        "categories": [titles.TOPICS[world.topic_of[row]].name], "provider": text.provider,
        "published_at": float(world.published[row]),
    }  # fmt: skip


def event_of(user: int, outcome: Outcome, *, slate_id: str | None, ts: float, event_id: str) -> dict[str, Any]:
    """What `POST /v1/events` takes for what a person did."""
    event: dict[str, Any] = {
        "type": outcome.kind, "user_id": user_id(user), "item_id": item_id(outcome.item), "ts": ts, "event_id": event_id
    }  # fmt: skip
    if outcome.position >= 0:
        event |= {"slate_id": slate_id, "position": outcome.position, "surface": "home"}
    else:
        event["surface"] = "search"
    if outcome.kind == "dwell":
        event["seconds"] = outcome.value
    elif outcome.kind == "rating":
        event |= {"value": outcome.value, "scale": [1, 5]}
    elif outcome.kind == "action":
        event["name"] = outcome.action
    return event


def inlet_sender(log: Log, topics: Topics) -> Send:
    """Send events as a Kafka client does: JSON to the inlet of their type."""

    async def send(user: str, events: Sequence[dict[str, Any]]) -> str | None:
        partition, token = partition_of(user, topics.partitions), None
        for name in {INLET_OF[event["type"]] for event in events}:
            wanted = [msgspec.json.encode(event) for event in events if INLET_OF[event["type"]] == name]
            last = await log.append(topics.inlet(name), [(partition, user.encode(), value) for value in wanted])
            if name == "clicks" or token is None:
                token = f"{name}:{partition}:{last[partition]}"
        return token

    return send


class ApiError(RuntimeError):
    """The API did not answer (`status` 0), or not with success; the message says what was asked and what came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """The public API as a client sees it: JSON in, JSON out, connections kept. Use it as a context manager.

    (aiohttp: the people share the machine with what they measure, and a request costs a fifth of httpx's CPU.)
    """

    def __init__(self, url: str, *, key: str = "", timeout: float = 10.0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        connector = aiohttp.TCPConnector(limit=64)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, **query: str) -> Any:
        """The answer's body; raises ApiError."""
        return await self._ask("GET", path, params=query)

    async def post(self, path: str, body: object) -> Any:
        """The answer's body; a 503 is asked once more, after its Retry-After. Raises ApiError."""
        data = msgspec.json.encode(body)
        return await self._ask("POST", path, data=data, headers={"Content-Type": "application/json"}, again=True)

    async def _ask(self, method: str, path: str, *, again: bool = False, **rest: Any) -> Any:
        assert self._session is not None, "use it as a context manager"
        try:
            async with self._session.request(method, self.url + path, **rest) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(f"{method} {path}: {type(error).__name__}: {error}") from error
        if answer.status == 503 and again:
            await asyncio.sleep(float(answer.headers.get("Retry-After", "1")))
            return await self._ask(method, path, **rest)
        if answer.status >= 400:
            got = body[:200].decode(errors="replace")
            raise ApiError(f"{method} {path}: {answer.status} {got}", answer.status)
        return msgspec.json.decode(body)


class Simulation:
    """The world's people against one API; `world` must start at about now.

    `inlet` sends for every fifth person; None: all use HTTP. `clock` gives seconds since the epoch. Each second it asks
    `GET /-/crowd` what the page wishes: how many people come (each as often as before) and which topic surges.
    """

    def __init__(
        self, world: World, api: Api, *, inlet: Send | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.world, self.card = world, Scorecard([])
        self._api, self._inlet, self._clock = api, inlet, clock
        self._rng = np.random.default_rng([world.seed, 1])
        self._hands: list[np.random.Generator] = []
        self._told = 0
        self._numbers: list[int] = []
        self.active = 0
        self.invite(world.users)
        self.trend = Trend()
        self._obeyed = world.start  # wishes of before are not ours
        self._waits: deque[tuple[float, float]] = deque(maxlen=20_000)  # (time, seconds) of each lookup
        self.events = self.lookups = self.errors = self.turned_away = 0
        self.problem = ""
        self.first_slate: float | None = None
        self.first_learnt: float | None = None

    # ---- the catalogue

    async def publish(self) -> int:
        """Tell the API of the items that appeared since the last call; returns how many."""
        self.world.advance(self._clock())
        first, last = self._told, self.world.live
        for at in range(first, last, BATCH):
            entries = [catalogue_entry(self.world, row) for row in range(at, min(at + BATCH, last))]
            await self._api.post("/v1/items", entries)
            self._told = min(at + BATCH, last)
        return last - first

    async def wait_served(self, timeout: float = 120.0) -> None:
        """Wait until the newest item told is known to the API; raises ApiError."""
        until, path = time.monotonic() + timeout, f"/v1/items/{item_id(self._told - 1)}"
        while True:
            try:
                await self._api.get(path)
                return
            except ApiError as error:  # 404 until then
                if time.monotonic() > until:
                    text = f"{error}; {timeout:g} s after it was told: the log of the process `items` says why"
                    raise ApiError(text, error.status) from error
            await asyncio.sleep(0.05)

    # ---- the crowd

    def invite(self, people: int) -> None:
        """Let the first so many people come from now on; those the world does not know yet come into being."""
        self.world.grow(people)
        for user in range(len(self._hands), people):
            self._hands.append(np.random.default_rng([self.world.seed, 2, user]))
            self._numbers.append(0)
        self.active = people

    def surge(self, topic: str) -> None:
        """Let a topic surge from now on, and watch how soon it shows in what is served; an unknown one is ignored."""
        names = [known.name for known in titles.TOPICS]
        if topic in names:
            self.world.advance(self._clock())
            self.world.surge(names.index(topic))
            self.trend.begin(names.index(topic), self.world.now)

    async def obey(self) -> None:
        """Ask what the page wishes and do what is new; an API without `/-/crowd` wishes nothing. Raises ApiError."""
        try:
            wish = (await self._api.get("/-/crowd")).get("wish")
        except ApiError as error:
            if error.status == 404:
                return
            raise
        if not wish:
            return
        before, self._obeyed = self._obeyed, max(self._obeyed, wish["users_t"], wish["surge_t"])
        if wish["users"] is not None and wish["users_t"] > before:
            self.invite(min(int(wish["users"]), MAX_CROWD))
        if wish["surge"] is not None and wish["surge_t"] > before:
            self.surge(wish["surge"])

    # ---- the people

    async def run(self, seconds: float, *, slates_per_s: float) -> None:
        """Let people come for `seconds` (inf: until cancelled); a visit that is not over soon after is cut short.

        `slates_per_s` is for the people that the world began with; where more or fewer are invited, it goes with them.
        """
        began = self._clock()
        running: set[asyncio.Task[None]] = set()
        publisher = asyncio.create_task(self._keep_publishing())
        try:
            since = began
            while since < began + seconds:
                span = min(HORIZON_S, began + seconds - since)
                for visit in self._coming(slates_per_s, span, since):
                    await asyncio.sleep(visit.time - self._clock())
                    if len(running) >= MAX_VISITS:
                        self.turned_away += 1
                        continue
                    task = asyncio.create_task(self._visit(visit))
                    running.add(task)
                    task.add_done_callback(running.discard)
                since += span
                await asyncio.sleep(since - self._clock())
            if running:
                await asyncio.wait(running, timeout=FINISH_S)
        finally:
            for task in (publisher, *running):
                task.cancel()
            await asyncio.gather(publisher, *running, return_exceptions=True)

    def _coming(self, slates_per_s: float, seconds: float, since: float) -> list[Visit]:
        if self.active == 0:
            return []
        rate = slates_per_s * float(self.world.activity[: self.active].sum())  # the sum over the first people is 1
        return visits(self.world, slates_per_s=rate, seconds=seconds, rng=self._rng, since=since, people=self.active)

    async def _keep_publishing(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                await self.publish()
                await self.obey()
            except ApiError as error:
                self._note(error)

    async def _visit(self, visit: Visit) -> None:
        user, rng, token = visit.user, self._hands[visit.user], None
        try:
            if self.world.browses(rng):
                token = await self._send(user, self.world.browse(user, rng), None)
            for pause in (0.0, *visit.pauses):
                await asyncio.sleep(pause)
                token = await self._one_slate(user, rng, token) or token
        except ApiError as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        self.errors += 1
        self.problem = f"{type(error).__name__}: {error}"

    async def _one_slate(self, user: int, rng: np.random.Generator, token: str | None) -> str | None:
        """Ask, keep score, react, tell; returns the token of what was told."""
        query = {"n": str(N)} | ({"after": token} if token else {})
        began = time.perf_counter()
        answer = await self._api.get(f"/v1/recommendations/{user_id(user)}", **query)
        self.lookups += 1
        self._waits.append((self._clock(), time.perf_counter() - began))
        popular = await self._api.get("/v1/popular", n=str(N), user_id=user_id(user))
        self.world.advance(self._clock())
        ours, theirs = (rows_of(told["items"], self.world.live) for told in (answer, popular))
        best, topics = self.world.oracle(user, N), self.world.topic_of
        self.card.add(self.world, user, ours, theirs, N, best=best)
        self.trend.add(self.world.now, user, topics[ours], topics[best])
        self._firsts(answer["model_step"])
        return await self._send(user, self.world.react(user, ours, rng), answer["slate_id"])

    def _firsts(self, model_step: int) -> None:
        if self.first_slate is None:
            self.first_slate = self._clock()
        if self.first_learnt is None and model_step > 0:
            self.first_learnt = self._clock()

    async def _send(self, user: int, outcomes: Sequence[Outcome], slate_id: str | None) -> str | None:
        if not outcomes:
            return None
        events = []
        for outcome in outcomes:
            self._numbers[user] += 1
            name = f"{self.world.start:.3f}-{user}-{self._numbers[user]}"
            events.append(event_of(user, outcome, slate_id=slate_id, ts=self._clock(), event_id=name))
        send = self._inlet if self._inlet is not None and user % INLET_EVERY == 0 else self._post
        token = await send(user_id(user), events)
        self.events += len(events)
        return token

    async def _post(self, user: str, events: Sequence[dict[str, Any]]) -> str | None:
        token: str | None = (await self._api.post("/v1/events", events))["token"]
        return token

    # ---- the score

    def means(self) -> Means:
        """Expected clicks over the last ten seconds."""
        return self.card.means(since=self._clock() - WINDOW_S)

    def lead(self) -> Lead:
        """Ours - popular over the last minute, with its interval."""
        return self.card.lead(since=self._clock() - LEAD_S, rng=np.random.default_rng(self.world.seed))

    def waits(self) -> tuple[float, float]:
        """Median and 99th percentile of the lookups of the last ten seconds, ms, as the people measured them."""
        recent = [wait for at, wait in self._waits if at > self._clock() - WINDOW_S]
        p50, p99 = np.percentile(recent, [50, 99]).tolist() if recent else (float("nan"), float("nan"))
        return 1000 * p50, 1000 * p99

    def curve(self) -> dict[str, float]:
        """The point of this moment on the learning curve `world`; names without a finite figure are left out."""
        now, means, lead, (p50, p99) = self._clock(), self.means(), self.lead(), self.waits()
        point = {
            "t": round(now, 3), "ours": means.ours, "popular": means.popular, "oracle": means.oracle,
            "lead": lead.mean, "lead_low": lead.low, "lead_high": lead.high,
            "lead_s": min(LEAD_S, now - self.world.start), "slates": len(self.card.entries), "events": self.events,
            "lookup_p50_ms": p50, "lookup_p99_ms": p99, "errors": self.errors, "items": self._told,
            "users": self.active, **self._trending(now),
        }  # fmt: skip
        return {name: round(float(value), 5) for name, value in point.items() if np.isfinite(value)}

    def _trending(self, now: float) -> dict[str, float]:
        """Shares of the slots by topic, and how far the surge that is on has shown; NaN for what is not known."""
        ours, best = self.trend.shares()
        told = {f"share_{topic}": share for topic, share in enumerate(ours.tolist())}
        if self.world.surge_strength() == 0.0:
            self.trend.end()
        if (watched := self.trend.watched) is None:
            return told
        return told | {
            "surge_t": watched.began, "surge_age_s": now - watched.began, "surge_base": watched.base,
            "surge_share": told[f"share_{watched.topic}"], "surge_best": float(best[watched.topic]),
            "noticed_s": np.nan if watched.noticed is None else watched.noticed,
        }  # fmt: skip

    def names(self) -> dict[str, str]:
        """What the curve `world` carries beside its figures: the topics, joined by "|", and the one that surges."""
        watched = self.trend.watched
        return {
            "topics": "|".join(topic.name for topic in titles.TOPICS),
            "topic": "" if watched is None else titles.TOPICS[watched.topic].name,
        }

    def report(self) -> dict[str, Any]:
        """The run so far, for `--json`: expected clicks and lead of the last minute, and what was sent."""
        now = self._clock()
        means, lead = self.card.means(since=now - LEAD_S), self.lead()
        return {
            "expected_clicks": {name: _plain(getattr(means, name)) for name in ("ours", "popular", "oracle")},
            "lead": {name: _plain(getattr(lead, name)) for name in ("low", "high", "mean")},
            "lead_seconds": round(min(LEAD_S, now - self.world.start), 1),
            "curve": self.by_ten_seconds(),
            "seed": self.world.seed, "users": self.world.users, "items": self._told,
            "slates": len(self.card.entries), "events": self.events, "errors": self.errors,
            "turned_away": self.turned_away,
        }  # fmt: skip

    def by_ten_seconds(self) -> list[dict[str, float | None]]:
        points = []
        for at in np.arange(self.world.start, self._clock(), WINDOW_S).tolist():
            means = self.card.means(at, at + WINDOW_S)
            if means.slates:
                point = {name: _plain(getattr(means, name)) for name in ("ours", "popular", "oracle")}
                points.append({"second": round(at - self.world.start), "slates": means.slates, **point})
        return points


def rows_of(items: Sequence[dict[str, Any]], live: int) -> Rows:
    """The rows of an answer's items in a world where `live` items are out, in order; those of another are left out.

    A stack that other people used before may hold more items than this world, under the same ids.
    """
    found = (row_of(item["item_id"]) for item in items)
    return np.array([row for row in found if row is not None and row < live], np.int64)


def _plain(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
