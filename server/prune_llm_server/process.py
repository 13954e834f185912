"""The engine's process: its start, the talk with it, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from prune_llm_server.engine import EngineError
from prune_llm_server.security import KEYS_VARIABLE
from prune_llm_server.wire import Message, pack, read

if TYPE_CHECKING:
    from prune_llm_server.embedded import EngineConfig

_CLOSING_SECONDS = 3.0


class EngineProcess:
    """A running worker.py and the two ends of the talk with it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._heard = time.monotonic()
        self.last_status: Message = {}

    @staticmethod
    async def start(config: EngineConfig) -> EngineProcess:
        mine, theirs = socket.socketpair()
        with theirs:
            environment = {k: v for k, v in os.environ.items() if k != KEYS_VARIABLE}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "prune_llm_server.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the terminal is for the server
            )
        reader, writer = await asyncio.open_connection(sock=mine)
        found = EngineProcess(process, reader, writer)
        found.send(asdict(config))
        return found

    async def until_ready(self, seconds: float) -> Message:
        """What it says of the model.

        Raises:
            ValueError: it cannot be loaded as it is. EngineError: the engine died over it, or took
                longer than ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._until_ready()
        except TimeoutError:
            raise EngineError(
                f"load_seconds {seconds:g}: the model was not ready by then; give it longer if it "
                "only loads slowly"
            ) from None

    async def _until_ready(self) -> Message:
        while (message := await self.read()) is not None:
            if "ready" in message:
                self.last_status = message["status"]
                ready: Message = message["ready"]
                return ready
            if "failed" in message:
                await self.end()
                raise ValueError(message["failed"])
        raise EngineError(f"the engine {await self.end()} while it loaded the model")

    @property
    def silence(self) -> float:
        """Seconds since its last word."""
        return time.monotonic() - self._heard

    async def read(self) -> Message | None:
        message = await read(self._reader)
        self._heard = time.monotonic()
        return message

    def send(self, message: Message) -> None:
        self._writer.write(pack(message))

    def kill(self) -> None:
        if self._process.returncode is None:
            # not by the process object, which may take the exit code from the one that waits for it
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def end(self) -> str:
        """Wait for its end, which a closed connection brings; how it ended."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()
        try:
            code = await asyncio.wait_for(self._process.wait(), _CLOSING_SECONDS)
        except TimeoutError:
            self.kill()
            code = await self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


@asynccontextmanager
async def ended_if_unused(process: EngineProcess) -> AsyncGenerator[None, None]:
    """End a process again that does not get ready, or that nobody waits for any more."""
    try:
        yield
    except BaseException:
        process.kill()
        await process.end()
        raise
