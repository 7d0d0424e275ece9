"""The shop front and the dashboard in a real browser, on a real stack beside simulated people."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from playwright.sync_api import TimeoutError as TooLate

from infra.process import free_port
from infra.proving.browser import Tab, chromium, found
from infra.proving.dashboard import PAGES, VISIBLE, addresses, people
from infra.settings import Settings
from infra.stack import Stack

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SHOTS = Path(os.environ.get("FRESHET_SHOTS", Path(__file__).parent.parent / "build" / "screenshots"))
"""Screenshots of every page in both themes are left here to be looked at."""
FRAMES = "import('/static/stream.js').then((stream) => stream.frames.map((frame) => frame.t))"
FLAT_S, FLAT_BYTES = 60.0, 3_000_000
SHOWN_S = 1.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(found() is None, reason="no Chromium on PATH: `make browser` asks apt-get for one"),
]


class Site(NamedTuple):
    """A stack that 200 simulated people use, and a browser with two tabs that stay open from the beginning on.

    heaps: what their scripts held at `since` (s, monotonic), when they had settled.
    """

    stack: Stack
    browser: Browser
    pages: dict[str, str]
    tabs: tuple[Tab, Tab]
    heaps: list[int]
    since: float


@pytest.fixture(scope="module")
def site(kafka: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    settings = Settings.load(
        folder, env={}, kafka=kafka, redis=redis_url, namespace=f"t{uuid.uuid4().hex[:10]}", port=free_port()
    )
    with (
        Stack(settings, processes=("users", "items", "learner", "api")) as stack,
        people(stack, users=200, rate=15.0),
        chromium() as browser,
    ):
        pages = addresses(stack, "person-0001", "item-00001")
        with Tab(browser) as shop, Tab(browser) as bandits:
            shop.page.goto(pages["shop"])
            shop.page.locator(".tile").nth(9).wait_for(timeout=60_000)
            bandits.page.goto(pages["bandits"])
            for tab in (shop, bandits):
                live(tab)
                tab.page.wait_for_timeout(4000)
            heaps = [shop.heap_bytes(), bandits.heap_bytes()]
            yield Site(stack, browser, pages, (shop, bandits), heaps, time.monotonic())


def live(tab: Tab) -> None:
    """Wait until the page receives figures."""
    tab.page.locator('#status[data-state="live"]').wait_for(timeout=30_000)


def test_every_page_is_sound_in_both_themes(site: Site) -> None:
    """No error in the console, nothing that axe-core calls serious, nothing beside the screen of a phone."""
    from axe_playwright_python.sync_playwright import Axe

    SHOTS.mkdir(parents=True, exist_ok=True)
    bad = []
    for theme in ("light", "dark"):
        for name, address in site.pages.items():
            with Tab(site.browser, dark=theme == "dark") as tab:
                tab.page.goto(address)
                live(tab)
                tab.page.wait_for_timeout(1000)
                tab.page.screenshot(path=SHOTS / f"{name}-{theme}.png", full_page=True)
                told: dict[str, Any] = Axe().run(tab.page).response
                bad += [f"{name}, {theme}: {problem}" for problem in tab.problems]
                bad += [
                    f"{name}, {theme}: {fault['id']}: {fault['help']}: {fault['nodes'][0]['html'][:200]}"
                    for fault in told["violations"]
                    if fault["impact"] in ("serious", "critical")
                ]
                tab.page.set_viewport_size({"width": 390, "height": 844})
                tab.page.wait_for_timeout(300)
                if theme == "light":
                    tab.page.screenshot(path=SHOTS / f"{name}-phone.png", full_page=True)
                if tab.page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
                    bad.append(f"{name}, {theme}: wider than a phone")
    assert bad == []


def test_charts_receive_data(site: Site) -> None:
    """The numbers beside the lines of the first chart of Now and of Learning come, and change."""
    for name in ("now", "learning"):
        with Tab(site.browser) as tab:
            tab.page.goto(site.pages[name])
            live(tab)
            keys = tab.page.locator("figure.plot").first.locator("ul.keys b")
            until(lambda keys=keys: any(set("123456789") & set(text) for text in keys.all_inner_texts()), 60.0)
            before = keys.all_inner_texts()
            until(lambda keys=keys, before=before: keys.all_inner_texts() != before, 60.0)
            assert tab.page.locator("figure.plot").first.locator("canvas").count() == 1
            assert tab.problems == []


def until(holds: Any, seconds: float = 30.0) -> None:
    """Wait until it holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"did not come within {seconds} s"
        time.sleep(0.1)


def test_a_click_changes_slate_and_map_within_a_second(site: Site) -> None:
    """The visitor's point on the map of the dashboard follows, too; of several clicks, for the machine may be busy."""
    with Tab(site.browser) as shop, Tab(site.browser) as dashboard:
        shop.page.goto(site.stack.api + "/")
        shop.page.locator(".tile").nth(9).wait_for()
        visitor = shop.page.locator("#visitor").inner_text()
        dashboard.page.goto(addresses(site.stack, visitor, "item-00001")["user"])
        live(dashboard)
        slates, maps = [], []
        for _ in range(8):
            where = dashboard.page.locator(".atlas").get_attribute("data-user")
            began = time.monotonic()
            slates.append(shop.page.evaluate(VISIBLE) / 1000.0)
            with contextlib.suppress(TooLate):
                dashboard.page.wait_for_selector(f'.atlas:not([data-user="{where}"])', state="attached", timeout=10_000)
                maps.append(time.monotonic() - began)
            shop.page.keyboard.press("Escape")
            shop.page.wait_for_timeout(500)
        assert min(slates) < SHOWN_S
        assert min(maps, default=float("inf")) < SHOWN_S


def test_the_stream_goes_on_where_it_was_after_the_api_restarts(site: Site) -> None:
    with Tab(site.browser) as tab:
        asked: list[str] = []
        tab.page.on("request", lambda request: asked.append(request.url) if request.url.count("/-/live") else None)
        tab.page.goto(site.pages["now"])
        live(tab)
        until(lambda: len(tab.page.evaluate(FRAMES)) >= 3)
        before = tab.page.evaluate(FRAMES)
        site.stack.kill("api")
        tab.page.locator('#status[data-state="lost"]').wait_for(timeout=30_000)
        site.stack.wait_ready()
        live(tab)
        until(lambda: tab.page.evaluate(FRAMES)[-1] > before[-1] + 3)
        after = tab.page.evaluate(FRAMES)
        assert after == sorted(set(after)), "a frame came twice, or out of order"
        assert after[: len(before)] == before
        assert len(asked) >= 2
        problems = [problem for problem in tab.problems if "ERR_" not in problem]  # the connection was lost on purpose
        assert problems == []


def test_every_page_of_the_bench_is_in_the_navigation(site: Site) -> None:
    with Tab(site.browser) as tab:
        tab.page.goto(site.stack.api + "/dashboard")
        links = tab.page.locator("#pages a").evaluate_all("(links) => links.map((link) => link.dataset.page)")
        assert tuple(links) == PAGES


def test_a_minute_of_two_hundred_people_leaves_memory_flat(site: Site) -> None:
    """The two tabs have been open during the tests above, over a restart of the API too; alone, this waits a minute."""
    shop, bandits = site.tabs
    bandits.page.wait_for_timeout(1000 * max(0.0, site.since + FLAT_S - time.monotonic()))
    for tab, was in zip((shop, bandits), site.heaps, strict=True):
        live(tab)
        now = tab.heap_bytes()
        assert now - was < FLAT_BYTES, f"the heap grew from {was} to {now} bytes"
