"""A real Chromium, driven by Playwright: what `freshet bench dashboard` and the tests of the pages look through.

Knows nothing of the pages. Playwright brings no browser here: the one on PATH is used.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Response

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
FLAGS: Final = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--enable-precise-memory-info",
)  # fmt: skip
NEXT: Final = "`pip install 'freshet[browser]'` and a Chromium on PATH (`make browser` asks apt-get for one)"


class BrowserError(RuntimeError):
    """There is no browser to look with; the message says what is missing and the next step."""


def found() -> str | None:
    """Return the path of a Chromium on PATH, None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a headless browser, which ends with the context; raises BrowserError."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise BrowserError(f"Playwright is not installed. Next: {NEXT}") from error
    path = found()
    if path is None:
        raise BrowserError(f"none of {', '.join(NAMES)} is on PATH. Next: {NEXT}")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """One page of its own session: `problems` holds each error it met, `sizes` the bytes of each file by address."""

    def __init__(self, browser: Browser, *, dark: bool = False, width: int = 1440, height: int = 900) -> None:
        self.context: BrowserContext = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.sizes: dict[str, int] = {}
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        self.page.on("response", self._came)
        self._session = self.context.new_cdp_session(self.page)
        self._session.send("Performance.enable")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _came(self, response: Response) -> None:
        if (length := response.headers.get("content-length", "")).isdigit():
            self.sizes[response.url] = int(length)

    def busy_seconds(self) -> float:
        """Return how long the page's main thread has worked: scripts, layout, painting."""
        told = self._session.send("Performance.getMetrics")["metrics"]
        return float(next(row["value"] for row in told if row["name"] == "TaskDuration"))

    def heap_bytes(self) -> int:
        """Return what the page's scripts hold after everything unused was collected."""
        self._session.send("HeapProfiler.collectGarbage")
        return int(self._session.send("Runtime.getHeapUsage")["usedSize"])


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
