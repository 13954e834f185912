"""Runs the application: a socket, signals, the way to the end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from prune_llm_server.errors import LOGGER, ApiError
from prune_llm_server.lifecycle import Lifecycle
from prune_llm_server.settings import ServerSettings

_KEEP_ALIVE_SECONDS = 75  # longer than a gateway keeps an idle connection, which is usually 60
_CLOSING_SECONDS = 3  # for the last answers, behind the end


def serve(
    app: FastAPI, settings: ServerSettings, announce: Callable[[str], None] = lambda url: None
) -> int:
    """Serve until the end, and return the exit code.

    The first SIGTERM or SIGINT drains, the second ends at once. ``announce`` is called with the
    address when the engine is ready. ``app.state.lifecycle.stop_with(code)`` ends the server.

    Returns:
        0 after a drain that let every request finish, 1 if some had to be ended, 128 + number
        after a second signal, or the code of `Lifecycle.stop_with`.

    Raises:
        ValueError: the address cannot be listened on.
        Exception: what the engine's start raised.
    """
    lifecycle: Lifecycle = app.state.lifecycle
    listener = _listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    protocol = type("TimedProtocol", (GuardedProtocol,), {"read_seconds": settings.read_seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    Runner(config, lifecycle, settings.drain_seconds, lambda: announce(url)).run([listener])
    if lifecycle.failure is not None:
        raise lifecycle.failure
    return lifecycle.exit_code or 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"host {host}, port {port}: cannot listen there ({reason})") from None
    # connections inherit it; without, each small answer waits 40 ms for the client's acknowledgment
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class GuardedProtocol(H11Protocol):
    """uvicorn's, with an end for clients that stall.

    A request's headers must arrive within ``read_seconds``, and so must what is left of a body
    that was refused. Applications find ``abort`` in the scope's state: it drops the connection.
    """

    read_seconds = 30.0
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state = {**self.app_state, "abort": transport.abort}
        super().connection_made(transport)
        self._guard()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._guard()

    def connection_lost(self, exc: Exception | None) -> None:
        self._release()
        super().connection_lost(exc)

    def _guard(self) -> None:
        """Start the time while no request runs; the application limits those that do."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._release()
        elif self._due is None:
            self._due = self.loop.call_later(self.read_seconds, self.transport.abort)

    def _release(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


class Runner(uvicorn.Server):
    """uvicorn's server, which drains with its socket open instead of closing it at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        drain_seconds: float,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._lifecycle, self._announce = lifecycle, announce
        self._drain_seconds = drain_seconds
        self._drained_by: float | None = None
        self._announced = False

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but the signal is not raised again: the exit code is ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = signal.SIGINT, signal.SIGTERM
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._lifecycle.draining:
            self._lifecycle.stop_with(128 + sig)
        else:
            self._lifecycle.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if await super().on_tick(counter):
            return True
        lifecycle = self._lifecycle
        if lifecycle.exit_code is not None:
            self._end_running("the server was stopped")
            return True
        if lifecycle.draining:
            return self._drained()
        if lifecycle.loaded and not self._announced:
            self._announced = True
            self._announce()
        return False

    def _drained(self) -> bool:
        lifecycle, now = self._lifecycle, time.monotonic()
        if self._drained_by is None:
            LOGGER.info("draining", extra={"fields": {"running": lifecycle.running}})
            self._drained_by = now + self._drain_seconds
        if lifecycle.running and now < self._drained_by:
            return False
        lifecycle.exit_code = 1 if self._end_running("the server shut down") else 0
        return True

    def _end_running(self, why: str) -> int:
        ended = self._lifecycle.end_running(ApiError(503, why, retry_after=1))
        LOGGER.info("ending", extra={"fields": {"requests_ended": ended}})
        return ended
