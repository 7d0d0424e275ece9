"""A TCP proxy that spoils the connections it carries: cuts, stalls, half-closes. Knows nothing of what they say.

It stands between a server and its clients, on a port of its own, with an event loop and a thread of its own:

    proxy = Proxy("redis").start()
    proxy.lead_to(6379)            # clients connect to proxy.port
    proxy.cut(seconds=1.0)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

CHUNK = 65_536
_RESET = struct.pack("ii", 1, 0)  # close() then answers with RST instead of FIN


class Proxy:
    """Carries connections from `port` to the port it leads to, on loopback; faults may be called from any thread."""

    def __init__(self, name: str, *, seed: int = 0) -> None:
        self.name, self.port, self.target = name, 0, 0
        self.carried = self.spoiled = 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"proxy-{name}", daemon=True)
        self._lines: set[_Line] = set()
        self._open, self._refusing = asyncio.Event(), False
        self._server: asyncio.Server | None = None
        self._ready = threading.Event()

    def start(self) -> Self:
        """Listen on a free port; connections are refused until `lead_to` says where they go."""
        self._thread.start()
        if not self._ready.wait(10):
            raise OSError(f"proxy of {self.name}: it does not listen after 10 s")
        return self

    def lead_to(self, port: int) -> None:
        """Say where connections go from now on."""
        self.target = port

    def stop(self) -> None:
        """End every connection and the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    # -- faults: each returns how many connections it met ---------------------------------------------------------

    def cut(self, *, seconds: float, share: float = 1.0) -> int:
        """Reset a share of the connections and refuse new ones for some seconds."""
        return self._on_loop(lambda: self._cut(seconds, share))

    def stall(self, *, seconds: float) -> int:
        """Let nothing through for some seconds, then everything that waited."""
        return self._on_loop(lambda: self._stall(seconds))

    def half_close(self, *, share: float = 1.0) -> int:
        """Close one direction of a share of the connections for good.

        Of each, either the client is told the end while it may go on sending into the void, or the server is, and the
        client keeps an open connection on which no answer ever comes.
        """
        return self._on_loop(lambda: self._half_close(share))

    def _cut(self, seconds: float, share: float) -> int:
        self._refusing = True
        self._loop.call_later(seconds, setattr, self, "_refusing", False)
        chosen = self._chosen(share)
        for line in chosen:
            line.reset()
        return len(chosen)

    def _stall(self, seconds: float) -> int:
        self._open.clear()
        self._loop.call_later(seconds, self._open.set)
        return len(self._lines)

    def _half_close(self, share: float) -> int:
        chosen = self._chosen(share)
        for line in chosen:
            line.half_close(to_client=self._random.random() < 0.5)
        return len(chosen)

    def _chosen(self, share: float) -> list[_Line]:
        chosen = [line for line in list(self._lines) if self._random.random() < share]
        self.spoiled += len(chosen)
        return chosen

    def _on_loop(self, work: Callable[[], int]) -> int:
        async def call() -> int:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._open.set()
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._end())
            self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        for line in list(self._lines):
            line.reset()
        tasks = [task for task in asyncio.all_tasks(self._loop) if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._refusing or not self.target:
                raise ConnectionRefusedError
            there = await asyncio.open_connection("127.0.0.1", self.target, limit=CHUNK)
        except OSError:
            _reset(writer)
            return
        self.carried += 1
        line = _Line((reader, writer), there, self._open)
        self._lines.add(line)
        try:
            await line.carry()
        finally:
            self._lines.discard(line)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Line:
    """One connection: its two ends and whether each direction still carries."""

    def __init__(self, client: Stream, server: Stream, gate: asyncio.Event) -> None:
        self._client, self._server, self._gate = client, server, gate
        self._void: set[asyncio.StreamWriter] = set()
        """Ends that get nothing any more."""

    async def carry(self) -> None:
        """Carry both directions until both have ended."""
        try:
            await asyncio.gather(
                self._pump(self._client[0], self._server[1]), self._pump(self._server[0], self._client[1])
            )
        finally:
            for _, writer in (self._client, self._server):
                writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._gate.wait()
                if writer not in self._void:
                    writer.write(data)
                    await writer.drain()
        await self._gate.wait()
        if writer not in self._void:
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()
        elif writer is self._server[1]:  # the client went; what it left behind ends too
            writer.close()

    def reset(self) -> None:
        """End it with a reset on both sides."""
        for _, writer in (self._client, self._server):
            _reset(writer)

    def half_close(self, *, to_client: bool) -> None:
        """Tell one end that the other has finished; nothing of that other comes through any more."""
        told, deaf = (self._client[1], self._server[1]) if to_client else (self._server[1], self._client[1])
        self._void.update((told, deaf))
        with contextlib.suppress(OSError, RuntimeError):
            told.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
