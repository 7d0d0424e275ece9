"""One picture again and again: in a terminal until q or Ctrl-C, with keys; as plain lines where there is none.

Knows nothing about what is shown.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

ENDS: Final = ("q", "Q", "\x03", "\x04")

Draw = Callable[[str], Any]
"""(key pressed, "" none) -> what rich shows."""


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """Give what waits up to so many seconds for a key; "" where none was pressed. The terminal is left as it was."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    place = sys.stdin.fileno()
    before = termios.tcgetattr(place)
    try:
        tty.setcbreak(place)

        def wait(seconds: float) -> str:
            if select.select([place], [], [], seconds)[0]:
                return os.read(place, 16).decode(errors="replace")
            return ""

        yield wait
    finally:
        termios.tcsetattr(place, termios.TCSADRAIN, before)


def _no_key(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def follow(console: Console, draw: Draw, interval: float) -> None:
    """Show what `draw` gives every `interval` seconds, and at once after a key, until q or Ctrl-C."""
    from rich.live import Live

    key = ""
    with (
        keys() as wait,
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        while key not in ENDS:
            live.update(draw(key), refresh=True)
            key = wait(interval)


def lines(write: Callable[[], str], interval: float) -> None:
    """Print a line every `interval` seconds, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            print(write(), flush=True)
            time.sleep(interval)
