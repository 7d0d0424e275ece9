"""The beacon in a real browser, on a real stack: what is done on a page arrives, once, whatever happens on the way."""

from __future__ import annotations

import json
import textwrap
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from infra.process import free_port
from infra.proving.browser import Tab, chromium, found
from infra.settings import Settings
from infra.stack import Stack
from models.examples import item_hash
from serving.dashboard.files import STATIC

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request, Route

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(found() is None, reason="no Chromium on PATH: `make browser` asks apt-get for one"),
]
EVENTS = "**/v1/events"
PAGE = """<!doctype html><title>A shop</title>
<script src="{api}/beacon.js" data-user="{user}" data-key="publish-key" defer></script>
<p data-item="a">A</p>"""


class Site(NamedTuple):
    """A stack, a browser, and a page of another origin that the stack's `cors` lists."""

    api: str
    browser: Browser
    other: str

    def known(self, user: str) -> dict[str, Any]:
        """What the stack knows of a user."""
        with urllib.request.urlopen(f"{self.api}/v1/users/{user}") as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    def counted(self, user: str, **wanted: int) -> dict[str, int]:
        """Wait until the user's counters are at least those; then all that differ from 0."""
        end = time.monotonic() + 30.0
        while any((counters := self.known(user)["counters"])[name] < count for name, count in wanted.items()):
            assert time.monotonic() < end, f"expected {wanted}, got {counters}"
            time.sleep(0.1)
        return {name: count for name, count in counters.items() if count and name != "negative"}


class Shop(BaseHTTPRequestHandler):
    """One page of another origin; its address names the API and the user: /api-port/user."""

    def do_GET(self) -> None:
        port, _, user = self.path.strip("/").partition("/")
        body = PAGE.format(api=f"http://127.0.0.1:{port}", user=user).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def site(kafka: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        other = f"http://127.0.0.1:{server.server_port}"
        settings = Settings.load(
            tmp_path_factory.mktemp("beacon"), env={}, kafka=kafka, redis=redis_url, cors=other,
            namespace=f"t{uuid.uuid4().hex[:10]}", port=free_port(),
        )  # fmt: skip
        try:
            with Stack(settings, processes=("users", "api")) as stack, chromium() as browser:
                yield Site(stack.api, browser, other)
        finally:
            server.shutdown()


def opened(site: Site, tab: Tab, user: str) -> Page:
    """The example page, told by `user`."""
    body = (STATIC / "example.html").read_text()
    assert 'data-user="ann"' in body
    headers = {"content-type": "text/html", "content-security-policy": "default-src 'self'"}
    tab.page.route(
        "**/static/example.html",
        lambda route: route.fulfill(body=body.replace("ann", user), headers=headers),
    )
    tab.page.goto(site.api + "/static/example.html")
    return tab.page


def test_the_readme_shows_the_page_that_is_served() -> None:
    page = (STATIC / "example.html").read_text()
    assert textwrap.indent(page, "    ") in (STATIC.parent.parent / "README.md").read_text()


def test_what_is_done_on_the_example_arrives_once(site: Site) -> None:
    with Tab(site.browser) as tab:
        page = opened(site, tab, "once")
        page.get_by_text("The last reel").click()
        page.locator('[data-item="film-2"] button').click()
        assert site.counted("once", click=1, action=1, view=3) == {"click": 1, "action": 1, "view": 3}
        page.wait_for_timeout(3200)
        page.goto("about:blank")  # the reading time goes out while the page ends
        assert site.counted("once", dwell=1) == {"click": 1, "action": 1, "view": 3, "dwell": 1}
        known = {entry["hash"] for entry in site.known("once")["sequence"]}
        assert known == {f"{item_hash('film-1'):016x}"}  # one was hidden, three seconds of reading say nothing yet
        assert tab.problems == []


def test_a_page_left_at_once_still_tells_its_click(site: Site) -> None:
    with Tab(site.browser) as tab:
        page = opened(site, tab, "left")
        page.evaluate("document.querySelector('[data-item] a').click(); location.href = 'about:blank'")
        page.wait_for_url("about:blank")
        assert site.counted("left", click=1) == {"click": 1}  # less than three seconds of reading are not told


def test_what_did_not_arrive_is_sent_again_and_counts_once(site: Site) -> None:
    failing: list[str] = []

    def fail(route: Route) -> None:
        failing.append(route.request.post_data or "")
        if len(failing) == 1:
            route.abort()  # it never arrived
        elif len(failing) == 2:
            route.fetch()  # it arrived, but its answer did not
            route.abort()
        else:
            route.continue_()

    with Tab(site.browser) as tab:
        tab.page.route(EVENTS, fail)
        page = opened(site, tab, "again")
        page.get_by_text("The last reel").click()
        page.evaluate("freshet.flush()")
        while len(failing) < 3:
            page.wait_for_timeout(100)
        assert site.counted("again", click=1, duplicate=1)["click"] == 1
        ids = [json.loads(body)[0]["event_id"] for body in failing[:3]]
        assert len(set(ids)) == 1


def test_reading_counts_while_the_page_is_seen(site: Site) -> None:
    hide = """(hidden) => { Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange")); }"""
    with Tab(site.browser) as tab:
        page = opened(site, tab, "seen")
        told: list[dict[str, Any]] = []

        def hear(sent: Request) -> None:
            if sent.url.endswith("/events"):
                told.extend(sent.post_data_json or [])

        page.on("request", hear)
        page.wait_for_timeout(3300)
        page.evaluate(hide, True)
        page.wait_for_timeout(1500)
        page.evaluate(hide, False)
        page.wait_for_timeout(500)
        page.evaluate(hide, True)  # half a second more: too little to be told
        site.counted("seen", dwell=1)
        (dwell,) = [event for event in told if event["type"] == "dwell"]
        assert dwell["item_id"] == "film-3"
        assert 3.0 <= dwell["seconds"] < 5.0


def test_many_events_go_in_batches_that_the_api_takes(site: Site) -> None:
    with Tab(site.browser) as tab:
        page = opened(site, tab, "many")
        sizes: list[int] = []
        page.on("request", lambda sent: sizes.append(len(sent.post_data or "")) if "/v1/events" in sent.url else None)
        token = page.evaluate("""async () => {
          for (let k = 0; k < 120; k++) freshet.send({ type: "view", item_id: `${k}-${"é".repeat(200)}` });
          return freshet.flush(); }""")
        assert site.counted("many", view=120)["view"] >= 120
        assert token
        assert max(sizes) < 64_000
        page.evaluate("for (let k = 0; k < 120; k++) freshet.send({ type: 'click', item_id: `${k}` })")
        page.goto("about:blank")
        assert site.counted("many", click=120)["click"] == 120


def test_from_another_origin_it_sends_with_a_key_and_without_cookies(site: Site) -> None:
    with Tab(site.browser) as tab:
        sent: list[dict[str, str]] = []
        tab.page.on("request", lambda asked: sent.append(asked.headers) if asked.url.endswith("/events") else None)
        tab.page.goto(f"{site.other}/{site.api.rpartition(':')[2]}/elsewhere")
        tab.page.get_by_text("A", exact=True).click()
        assert site.counted("elsewhere", click=1, view=1) == {"click": 1, "view": 1}
        tab.page.wait_for_timeout(100)
        posts = [headers for headers in sent if "x-api-key" in headers]
        assert posts
        assert all(headers["x-api-key"] == "publish-key" and "cookie" not in headers for headers in posts)
        tab.page.get_by_text("A", exact=True).click()
        tab.page.goto("about:blank")  # without sendBeacon: a fetch that outlives the page
        assert site.counted("elsewhere", click=2) == {"click": 2, "view": 1}


def test_why_send_beacon_is_for_its_own_origin_only(site: Site) -> None:
    """Chromium takes it, asks if it may send JSON with cookies, and drops it: the API allows none. Nobody is told."""
    send = """([url, user, type]) => navigator.sendBeacon(url, new Blob([JSON.stringify([
      { type: "click", user_id: user, item_id: "a", ts: Date.now() / 1000, event_id: user }])], { type }))"""
    with Tab(site.browser) as tab:
        tab.page.goto(f"{site.other}/{site.api.rpartition(':')[2]}/nobody")
        assert tab.page.evaluate(send, [site.api + "/v1/events", "by-beacon", "application/json"])
        assert tab.page.evaluate(send, [site.api + "/v1/events", "by-text", "text/plain"])  # asks nothing, has no key
        assert site.counted("by-text", click=1) == {"click": 1}
        tab.page.wait_for_timeout(500)
        assert site.known("by-beacon")["known"] is False


def test_without_a_user_it_remembers_a_name_of_its_own(site: Site) -> None:
    with Tab(site.browser) as tab:
        page = tab.page
        page.route("**/named.html", lambda route: route.fulfill(
            body='<script src="/beacon.js" defer></script>', content_type="text/html"))  # fmt: skip
        page.goto(site.api + "/named.html")
        first = page.evaluate("freshet.user")
        page.reload()
        assert page.evaluate("freshet.user") == first
        assert first.startswith("anon-")
