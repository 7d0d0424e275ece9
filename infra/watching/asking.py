"""Asks a running API from outside: JSON routes, `/metrics`, and the stream of live figures.

Knows nothing about what the answers mean.
"""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from infra.settings import Settings, read_stack

TIMEOUT_S: Final = 5.0
NEWS: Final = 50
AWAY: Final = (OSError, ValueError, http.client.HTTPException)
"""No answer (URLError is an OSError), one that is no JSON, or one that broke off in the middle."""


class Api:
    """The API of a stack: its address from the stack's folder, else from the settings, and the admin key."""

    def __init__(self, settings: Settings) -> None:
        stack = read_stack(settings.data) or {}
        self.address = str(stack.get("api") or f"http://{settings.host}:{settings.port}")
        self._key = settings.admin_key

    def open(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        """Open a path; raises OSError, HTTPError among them."""
        given = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.address + path, headers={**given, **(headers or {})})
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)

    def ask(self, path: str) -> Any:
        """Return the JSON that a route answers; None where it does not answer, or refuses."""
        try:
            with self.open(path) as answer:
                return json.loads(answer.read() or b"{}")
        except AWAY:
            return None

    def why_not(self) -> str:
        """Return why nothing is answered, and the next step."""
        try:
            self.open("/-/state").close()
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return f"the API at {self.address} wants a key of scope admin: set FRESHET_ADMIN_KEY."
            return f"the API at {self.address} answers {error.code}; its log says why."
        except AWAY:
            pass
        return (
            f"the API at {self.address} gives no answer. Start the stack with `freshet up`, or name its folder:"
            " --data DIR."
        )

    def series(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Return every sample of `/metrics`: name -> sorted labels -> value; empty where it does not answer."""
        from prometheus_client.parser import text_string_to_metric_families

        try:
            with self.open("/metrics") as answer:
                text = answer.read().decode()
        except AWAY:
            return {}
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found


class Frames(threading.Thread):
    """Follows the live figures: `parts` has the newest of each part, `news` what broke last; goes on after a loss."""

    def __init__(self, api: Api) -> None:
        super().__init__(name="frames", daemon=True)
        self._api, self.last = api, ""
        self.parts: dict[str, dict[str, Any]] = {}
        self.told: dict[str, float] = {}
        """When a part was last told, monotonic."""
        self.news: deque[dict[str, Any]] = deque(maxlen=NEWS)
        self.second = 0
        self.problem = "connecting"
        self.new = threading.Event()

    def run(self) -> None:
        """Read for as long as the process lives."""
        while True:
            try:
                since = self.last or str(int(time.time()) - 5)
                with self._api.open("/-/live", {"Last-Event-ID": since}) as stream:
                    self.problem = ""
                    for line in stream:
                        self.read(line.decode().rstrip())
                self.problem = "the stream of figures ended"
            except AWAY as error:
                self.problem = str(error) or type(error).__name__
            time.sleep(1.0)

    def read(self, line: str) -> None:
        """Take in one line of the stream."""
        name, _, value = line.partition(": ")
        if name == "id":
            self.last = value
        elif name == "data":
            self.take(json.loads(value))

    def take(self, frame: Mapping[str, Any]) -> None:
        """Take in one frame."""
        self.second = int(frame["t"])
        for name, part in frame.items():
            if isinstance(part, dict):
                self.parts[name], self.told[name] = part, time.monotonic()
        for line in frame.get("broke", ()):
            if line not in self.news:
                self.news.append(line)
        self.new.set()

    def fresh(self, name: str, within_s: float = math.inf) -> dict[str, Any]:
        """Return a part as last told; empty where that is too long ago."""
        return self.parts.get(name, {}) if time.monotonic() - self.told.get(name, -math.inf) < within_s else {}
