"""The shop front in a real browser, on a real stack: it loads under its content policy, a click changes the slate, and
the crowd comes and goes as the page wishes."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright

from infra.demo import simulate
from infra.process import free_port
from infra.proving.browser import FLAGS, found
from infra.settings import Settings
from infra.stack import Stack
from streaming.simulation.people import Api, ApiError, Simulation, catalogue_entry, item_id
from streaming.simulation.world import World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(found() is None, reason="no Chromium on PATH: `make browser` asks apt-get for one"),
]


class Shop:
    """The shop front in a tab, and what went wrong there."""

    def __init__(self, page: Page) -> None:
        self.page, self.problems = page, list[str]()
        page.on("console", lambda said: self.problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    async def run(self, script: str) -> Any:
        return await self.page.evaluate(script)

    async def until(self, script: str, seconds: float = 60.0) -> Any:
        async with asyncio.timeout(seconds):
            while not (value := await self.page.evaluate(script)):
                await asyncio.sleep(0.05)
            return value


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Shop]:
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=found(), args=list(FLAGS))
        try:
            shop = Shop(await browser.new_page(viewport={"width": 1440, "height": 900}))
            await shop.page.goto(url)
            yield shop
        finally:
            await browser.close()


@pytest.fixture(scope="module")
def stack(kafka: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("page")
    settings = Settings.load(
        folder, env={}, kafka=kafka, redis=redis_url, namespace=f"t{uuid.uuid4().hex[:10]}", port=free_port()
    )
    with Stack(settings, processes=("users", "items", "api")) as running:
        yield running


SLATE = "[...document.querySelectorAll('.tile .title')].map((title) => title.textContent).join('|')"


async def test_a_click_changes_the_slate_in_the_browser(stack: Stack) -> None:
    world = World(users=1, items=60, seed=1, start=1e9)
    async with Api(stack.api) as api:
        await api.post("/v1/items", [catalogue_entry(world, row) for row in range(60)])
        async with asyncio.timeout(60):
            while len((await api.get("/v1/popular", n="60"))["items"]) < 60:
                await asyncio.sleep(0.05)
        async with opened(stack.api + "/") as shop:
            await shop.until("document.querySelectorAll('.tile').length === 12")
            assert await shop.until("document.getElementById('status').dataset.state === 'live'")
            before = await shop.run(SLATE)
            clicked = before.split("|")[0]
            visitor = await shop.run("document.getElementById('visitor').textContent")
            await shop.run("document.querySelector('.tile .open').focus()")
            await shop.page.keyboard.press("Enter")
            await shop.until("!document.getElementById('timing').hidden")
            after = await shop.run(SLATE)
            assert clicked not in after.split("|")
            assert re.fullmatch(r"[\d.]+ ms", await shop.run("document.getElementById('timing-total').textContent"))
            assert "are new" in await shop.run("document.getElementById('changed').textContent")
            await shop.until("document.getElementById('sequence') !== null")
            assert clicked in await shop.run("document.getElementById('sequence').textContent")
            assert clicked in await shop.run("document.getElementById('detail-title').textContent")
            known = json.dumps(await api.get(f"/v1/users/{visitor}"))
            assert any(item_id(row) in known for row in range(60) if world.texts[row].title == clicked)
            await shop.until("document.querySelector('#numbers .value b').textContent !== '–'")
            await shop.page.set_viewport_size({"width": 390, "height": 844})
            await shop.until("document.documentElement.scrollWidth <= window.innerWidth")
            assert shop.problems == []


async def test_the_crowd_and_its_trend_follow_the_page(stack: Stack) -> None:
    async with Api(stack.api) as api:
        with pytest.raises(ApiError, match="a simulation that runs"):
            await api.post("/-/crowd", {"users": 7})
        met: list[Simulation] = []
        people = asyncio.create_task(
            simulate(
                stack.settings, stack.api, users=20, items=60, rate=10.0, seed=1, seconds=60.0, began=time.time(),
                show=lambda simulation, screen: met.append(simulation),
            )
        )  # fmt: skip

        async def until(**wanted: object) -> None:
            async with asyncio.timeout(60):
                while not wanted.items() <= (await api.get("/-/crowd")).items():
                    assert not people.done(), people
                    await asyncio.sleep(0.1)

        try:
            await until(running=True, users=20)
            async with opened(stack.api + "/") as shop:
                await shop.until("document.getElementById('people').value === '20'")
                await shop.until("!document.getElementById('crowd').querySelector('.controls').hidden")
                slide = (
                    "people.value = 40, ['input', 'change'].forEach((name) => people.dispatchEvent(new Event(name)))"
                )
                await shop.run(slide)
                await until(users=40)
                await shop.until("document.getElementById('people-now').textContent.startsWith('40 people')")
                await shop.run("topic.value = 'Cycling', document.querySelector('.trend .button').click()")
                await shop.until("document.querySelector('.news-line').textContent.includes('Cycling surges')")
                assert shop.problems == []
            simulation, told = met[-1], await api.get("/-/crowd")
            assert told["surge"]["topic"] == "Cycling"
            assert simulation.world.surge_strength() > 0.5
            assert (simulation.active, simulation.world.users) == (40, 40)
            await api.post("/-/crowd", {"users": 0})
            await until(users=0)
            async with asyncio.timeout(60):  # visits under way go on to their end, then it is quiet
                before = -1
                while simulation.lookups > before:
                    before = simulation.lookups
                    await asyncio.sleep(1.5)
        finally:
            people.cancel()
            await asyncio.gather(people, return_exceptions=True)
