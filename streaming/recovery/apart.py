"""A half in a process of its own, so that both halves fold at once; knows nothing of what a half does.

Calls go through a pipe as (method, arguments); answers come back as ("done", value) or ("failed", error), progress as
("advance", ...) in between. The process ends when the pipe closes: it never outlives the one that asked.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

Advance = Callable[[str, int, int], None]
TAKES_PROGRESS = "fold"


class Apart:
    """An object of `made(*arguments)` in another process: `await call("method", ...)` runs its coroutine there."""

    def __init__(self, made: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        # Not multiprocessing's own start: it would import the caller's main module again.
        command = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._pipe.send((made, arguments, named))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def call(self, method: str, *arguments: Any, advance: Advance | None = None) -> Any:
        """Run a method there and return what it returns; raises what it raises."""
        self._pipe.send((method, arguments))
        while True:
            try:
                kind, value = await asyncio.to_thread(self._pipe.recv)
            except (EOFError, OSError):
                raise RuntimeError(f"the process of {method} ended (code {self._process.poll()})") from None
            if kind == "done":
                return value
            if kind == "failed":
                raise value
            if advance is not None:
                advance(*value)


class Here:
    """The same calls in this process, for a log that is read sooner than a process starts."""

    def __init__(self, made: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        self._object = made(*arguments, **named)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def call(self, method: str, *arguments: Any, advance: Advance | None = None) -> Any:
        """Run a method and return what it returns."""
        more = {"advance": advance or _silent} if method == TAKES_PROGRESS else {}
        return await getattr(self._object, method)(*arguments, **more)


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def serve() -> None:
    """Be the other process: its pipe is the descriptor that the last argument names."""
    import uvloop

    uvloop.run(_answer(Connection(int(sys.argv[-1]))))


async def _answer(pipe: Connection) -> None:
    made, arguments, named = pipe.recv()
    thing = made(*arguments, **named)
    while True:
        try:
            method, given = await asyncio.to_thread(pipe.recv)
        except (EOFError, OSError):
            return
        more = {}
        if method == TAKES_PROGRESS:
            more = {"advance": lambda *step: pipe.send(("advance", step))}
        try:
            answer: tuple[str, Any] = ("done", await getattr(thing, method)(*given, **more))
        except Exception as error:
            answer = ("failed", _told(error))
        pipe.send(answer)


def _told(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
