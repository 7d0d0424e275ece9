"""`freshet bench dashboard`: what the pages cost and how soon a click shows, in a real browser beside simulated people.

A private stack, 200 people, and a Chromium that opens the shop front and every page of the dashboard in both themes.
Knows the pages by their addresses and by what a visitor presses, nothing of how they are drawn.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import numpy as np

from infra.process import Process
from infra.proving.bench import load_now, private_stack
from infra.proving.browser import Tab, chromium, cpu_seconds
from infra.stack import Stack
from infra.terminal import console, show_json

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from rich.console import Console

PAGES: Final = ("now", "learning", "bandits", "user", "item", "slates", "models", "quality", "system")
PEOPLE: Final = 200
RATE: Final = 20.0
"""Slates a second that people ask for."""
CLICKS: Final = 30
VIEWERS: Final = 10
WINDOW_S: Final = 10.0
"""Length of one window of CPU; windows with and without viewers take turns."""
TURNS: Final = 3
SETTLE_S: Final = 3.0
MOST_BYTES: Final = 300_000
WIDTHS: Final = {"wide": (1440, 900), "phone": (390, 844)}
VISIBLE: Final = """() => new Promise((done) => {
  const tiles = document.getElementById("tiles");
  const button = tiles.querySelector(".tile .open");
  const began = performance.now();
  const watch = new MutationObserver(() => {
    watch.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
  });
  watch.observe(tiles, { childList: true });
  button.click();
})"""
"""Presses the first tile and resolves to milliseconds until another slate is painted."""
Advance = Callable[[str], None]


@contextlib.contextmanager
def people(stack: Stack, *, users: int = PEOPLE, rate: float = RATE, items: int = 500) -> Iterator[None]:
    """Let simulated people use a stack, in a process of their own, from the first slates served to the end."""
    words = ["simulate", "--users", str(users), "--rate", str(rate), "--items", str(items), "--data", str(stack.data)]
    process = Process(
        "people", [sys.executable, "-P", "-m", "infra.cli", *words], log=stack.data / "people.log", nice=5
    )
    process.start()
    try:
        yield
    finally:
        process.stop()


@contextlib.contextmanager
def viewers(api: str, count: int = VIEWERS) -> Iterator[None]:
    """Hold so many streams of figures open, each read as fast as it comes."""
    address, connections = urlsplit(api), list[socket.socket]()

    def read(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                pass

    try:
        for _ in range(count):
            connection = socket.create_connection((address.hostname or "", address.port or 80), timeout=30.0)
            connections.append(connection)
            connection.sendall(f"GET /-/live HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            threading.Thread(target=read, args=(connection,), daemon=True).start()
        yield
    finally:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def sse_cpu(stack: Stack, advance: Advance) -> dict[str, float]:
    """Return the share of a core that ten viewers cost the API: windows with them less windows without."""
    shares: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(TURNS):
        for watched in (False, True):
            advance(f"viewers, {turn + 1} of {TURNS}")
            with viewers(stack.api) if watched else contextlib.nullcontext():
                time.sleep(1.0)
                before, began = cpu_seconds(stack.pids()["api"]), time.perf_counter()
                time.sleep(WINDOW_S)
                shares[watched].append((cpu_seconds(stack.pids()["api"]) - before) / (time.perf_counter() - began))
    off, on = float(np.mean(shares[False])), float(np.mean(shares[True]))
    return {"sse_cpu_share_10_viewers": round(on - off, 4), "api_cpu_share": round(off, 4)}


def clicks(browser: Browser, stack: Stack, advance: Advance, count: int = CLICKS) -> dict[str, float]:
    """Return milliseconds from pressing a tile to another slate on the screen, as the page itself measures them."""
    found = []
    with Tab(browser) as tab:
        tab.page.goto(stack.api + "/")
        tab.page.locator(".tile").nth(9).wait_for()
        for number in range(count + 2):
            advance(f"clicks, {number + 1} of {count + 2}")
            found.append(float(tab.page.evaluate(VISIBLE)))
            tab.page.keyboard.press("Escape")
            tab.page.wait_for_timeout(400)
    p50, p95 = np.percentile(found[2:], [50, 95]).tolist()  # the first two load what is not yet loaded
    return {"p50": round(p50, 1), "p95": round(p95, 1), "max": round(max(found[2:]), 1), "n": count}


def addresses(stack: Stack, user: str, item: str) -> dict[str, str]:
    """Return the pages by name."""
    named = {"user": f"user/{user}", "item": f"item/{item}"}
    return {"shop": stack.api + "/", **{page: f"{stack.api}/dashboard#{named.get(page, page)}" for page in PAGES}}


def looked_at(
    browser: Browser, pages: dict[str, str], advance: Advance, *, shots: Path | None = None
) -> dict[str, Any]:
    """Open every page in both themes and on a phone; return bytes, CPU shares of the main thread, and all problems."""
    shares, sizes, problems = {}, dict[str, int](), list[str]()
    for theme in ("light", "dark"):
        for shape, (width, height) in WIDTHS.items():
            if (theme, shape) == ("dark", "phone"):
                continue
            for name, address in pages.items():
                advance(f"{name}, {theme}, {shape}")
                with Tab(browser, dark=theme == "dark", width=width, height=height) as tab:
                    tab.page.goto(address)
                    tab.page.wait_for_timeout(1000 * SETTLE_S)
                    if (theme, shape) == ("light", "wide"):
                        before, began = tab.busy_seconds(), time.perf_counter()
                        tab.page.wait_for_timeout(1000 * WINDOW_S)
                        shares[name] = round((tab.busy_seconds() - before) / (time.perf_counter() - began), 4)
                    if shots is not None:
                        tab.page.screenshot(path=shots / f"{name}-{theme}-{shape}.png", full_page=True)
                    sizes |= {url.split("#")[0]: size for url, size in tab.sizes.items() if _ours(url)}
                    problems += [f"{name}, {theme}, {shape}: {problem}" for problem in tab.problems]
    return {
        "page_bytes": sum(sizes.values()), "page_cpu_share": max(shares.values()), "page_cpu_share_by_page": shares,
        "console_errors": len(problems), "problems": problems[:50],
    }  # fmt: skip


def _ours(url: str) -> bool:
    path = urlsplit(url).path
    return path in ("/", "/dashboard") or path.startswith("/static/")


def measure(*, seconds: float, shots: Path | None, advance: Advance = lambda _: None) -> dict[str, Any]:
    """Return the report; raises BrowserError, StackError. Screenshots go to the folder `shots`."""
    if shots is not None:
        shots.mkdir(parents=True, exist_ok=True)
    machine: dict[str, Any] = {"cores": os.cpu_count(), "load_before": load_now()}
    with chromium() as browser, private_stack() as stack, people(stack):
        advance("people arrive")
        time.sleep(seconds)
        clicked = clicks(browser, stack, advance)
        pages = looked_at(browser, addresses(stack, "person-0001", "item-00001"), advance, shots=shots)
        cost = sse_cpu(stack, advance)
    machine["load_after"] = load_now()
    return {"click_to_visible_ms": clicked, **pages, **cost, "people": PEOPLE, "slates_per_s": RATE, "machine": machine}


def dashboard_verb(seconds: float, *, as_json: bool, shots: Path | None) -> None:
    """Measure with a line that says what is next, print the report; exit 1 where a page met an error."""
    screen = console(err=True)
    with screen.status("starting", spinner="dots") as status:
        report = measure(seconds=seconds, shots=shots, advance=lambda what: status.update(what))
    if as_json:
        show_json(report)
    else:
        show(report, console())
    if report["console_errors"]:
        raise SystemExit(1)


def show(report: dict[str, Any], screen: Console) -> None:
    """Print the figures beside what was wanted."""
    from rich.table import Table

    clicked = report["click_to_visible_ms"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("click to another slate on screen", f"{clicked['p50']} ms, 95 % {clicked['p95']} ms", "wanted 1,000")
    table.add_row("all files of all pages", f"{report['page_bytes'] / 1e3:,.0f} kB", f"wanted {MOST_BYTES / 1e3:,.0f}")
    table.add_row("busiest page, of a core", f"{report['page_cpu_share']:.1%}", "")
    table.add_row("ten viewers, of the API's core", f"{report['sse_cpu_share_10_viewers']:.1%}",
                  f"without them {report['api_cpu_share']:.1%}")  # fmt: skip
    table.add_row("errors in the console", str(report["console_errors"]), "wanted 0")
    screen.print(table)
    for problem in report["problems"]:
        screen.print(f"[red]{problem}", highlight=False, markup=False)
    screen.print(
        "[dim]by page: " + ", ".join(f"{name} {share:.1%}" for name, share in report["page_cpu_share_by_page"].items())
    )
