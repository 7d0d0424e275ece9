"""The shop front in a real browser, on a real stack: it loads under its content policy, a click changes the slate, and
the crowd comes and goes as the page wishes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from infra.demo import simulate
from infra.process import free_port
from infra.settings import Settings
from infra.stack import Stack
from streaming.simulation.people import Api, ApiError, Simulation, catalogue_entry, item_id
from streaming.simulation.world import World

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--remote-debugging-port=0", "--window-size=1440,900",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: the page is not tried in a browser"),
]


class Page:
    """One tab, driven over the browser's debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.problems: list[str] = []

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(20)).data)
            if message.get("id") == self._number:
                result: dict[str, Any] = message["result"]
                return result
            if message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(message["params"])[:500])

    async def run(self, script: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = 60.0) -> Any:
        async with asyncio.timeout(seconds):
            while not (value := await self.run(script)):
                await asyncio.sleep(0.05)
            return value


@asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank",
        stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert browser.stderr is not None
        async with asyncio.timeout(30):
            while not (match := re.search(rb"ws://(127\.0\.0\.1:\d+)/", await browser.stderr.readline())):
                pass
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{match[1].decode()}/json/list") as answer:
                tabs = json.loads(await answer.read())
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                yield page
    finally:
        browser.terminate()
        await browser.communicate()


@pytest.fixture(scope="module")
def stack(kafka: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("page")
    settings = Settings.load(
        folder, env={}, kafka=kafka, redis=redis_url, namespace=f"t{uuid.uuid4().hex[:10]}", port=free_port()
    )
    with Stack(settings, processes=("users", "items", "api")) as running:
        yield running


SLATE = "[...document.querySelectorAll('.tile .title')].map((title) => title.textContent).join('|')"


@pytest.mark.timeout(180)
async def test_a_click_changes_the_slate_in_the_browser(stack: Stack, tmp_path: Path) -> None:
    world = World(users=1, items=60, seed=1, start=1e9)
    async with Api(stack.api) as api:
        await api.post("/v1/items", [catalogue_entry(world, row) for row in range(60)])
        async with asyncio.timeout(60):
            while len((await api.get("/v1/popular", n="60"))["items"]) < 60:
                await asyncio.sleep(0.05)
        async with opened(stack.api + "/", tmp_path / "browser") as page:
            await page.until("document.querySelectorAll('.tile').length === 12")
            assert await page.until("document.getElementById('status').dataset.state === 'live'")
            before = await page.run(SLATE)
            clicked = before.split("|")[0]
            visitor = await page.run("document.getElementById('visitor').textContent")
            await page.run("document.querySelector('.tile .open').focus()")
            await page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", text="\r", windowsVirtualKeyCode=13)
            await page.until("!document.getElementById('timing').hidden")
            after = await page.run(SLATE)
            assert clicked not in after.split("|")
            assert re.fullmatch(r"[\d.]+ ms", await page.run("document.getElementById('timing-total').textContent"))
            assert "are new" in await page.run("document.getElementById('changed').textContent")
            await page.until("document.getElementById('sequence') !== null")
            assert clicked in await page.run("document.getElementById('sequence').textContent")
            assert clicked in await page.run("document.getElementById('detail-title').textContent")
            known = json.dumps(await api.get(f"/v1/users/{visitor}"))
            assert any(item_id(row) in known for row in range(60) if world.texts[row].title == clicked)
            await page.until("document.querySelector('#numbers .value b').textContent !== '–'")
            await page.call(
                "Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True
            )
            assert await page.run("document.documentElement.scrollWidth <= window.innerWidth")
            assert page.problems == []


@pytest.mark.timeout(180)
async def test_the_crowd_and_its_trend_follow_the_page(stack: Stack, tmp_path: Path) -> None:
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
            async with opened(stack.api + "/", tmp_path / "browser") as page:
                await page.until("document.getElementById('people').value === '20'")
                await page.until("!document.getElementById('crowd').querySelector('.controls').hidden")
                slide = (
                    "people.value = 40, ['input', 'change'].forEach((name) => people.dispatchEvent(new Event(name)))"
                )
                await page.run(slide)
                await until(users=40)
                await page.until("document.getElementById('people-now').textContent.startsWith('40 people')")
                await page.run("topic.value = 'Cycling', document.querySelector('.trend .button').click()")
                await page.until("document.querySelector('.news-line').textContent.includes('Cycling surges')")
                assert page.problems == []
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
