"""One HTTP request and its answer as one task, which the client's leaving cancels.

Routes need not care: whatever ends an exchange reaches them as a cancellation or an error in a
send, and what they raise becomes an answer here: JSON before the answer has begun, an event in a
stream that runs.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import AbstractContextManager, nullcontext

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prune_llm_server.errors import CLIENT_GONE, LOGGER, ApiError, ClientGone, as_api_error
from prune_llm_server.lifecycle import Lifecycle
from prune_llm_server.logs import RequestRecord
from prune_llm_server.metrics import Metrics
from prune_llm_server.streaming import CONTENT_TYPE, event

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ExchangeMiddleware:
    """Gives each request its id, its record, its end, its line in the log."""

    def __init__(
        self, app: ASGIApp, *, lifecycle: Lifecycle, metrics: Metrics, write_seconds: float
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._write_seconds = write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._write_seconds)
        record = exchange.record
        guarded = scope["path"].startswith("/v1/")
        held: AbstractContextManager[None] = nullcontext()
        if guarded and not self._lifecycle.draining:
            held = self._lifecycle.holding(exchange.end)
        try:
            with held:
                try:
                    if guarded and self._lifecycle.draining:
                        raise _draining()
                    await exchange.run(self._app)
                except Exception as error:
                    await exchange.fail(as_api_error(error))
        finally:
            if guarded and record.status is not None and record.status >= 400:
                self._metrics.failed(record.status)
            record.write(quiet=not guarded and record.status is not None and record.status < 400)


def _draining() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down and takes no new requests; try another one",
        retry_after=1,
        headers={"Connection": "close"},
    )


class Exchange:
    """A request that runs, and the answer as far as it went."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, write_seconds: float) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        self.record = RequestRecord(request_id, scope["method"], scope["path"])
        self._scope = scope
        self._scope.setdefault("state", {})["record"] = self.record
        self._client_receive, self._client_send = receive, send
        self._write_seconds = write_seconds
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._ended: ApiError | None = None
        self._begun = self._complete = self._streams = False

    async def run(self, app: ASGIApp) -> None:
        """Answer the request. Raises what ``app`` raises, or what `end` was called with."""
        self._task = asyncio.create_task(self._answer(app))
        try:
            await self._task
        except asyncio.CancelledError:
            if self._ended is None:
                raise
            raise self._ended from None
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    async def _answer(self, app: ASGIApp) -> None:
        await app(self._scope, self._receive, self._send)

    def end(self, error: ApiError) -> None:
        """End it with an error, unless the answer is whole."""
        if self._task is not None and self._ended is None and not self._complete:
            self._ended = error
            self._task.cancel()

    async def fail(self, error: ApiError) -> None:
        """Tell the client, as far as it can still hear."""
        self.record.error = error.code
        if error.status >= CLIENT_GONE:
            self.record.reason = error.message
        try:
            if error.status != CLIENT_GONE and not self._begun:
                await error.response()(self._scope, self._receive, self._send)
            elif error.status != CLIENT_GONE and self._streams:
                body = event(error.body)
                await self._send({"type": "http.response.body", "body": body, "more_body": False})
        except ClientGone as gone:
            self.record.reason = gone.message
            error = gone
        self.record.status = error.status

    async def _receive(self) -> Message:
        if self._watcher is not None:
            await asyncio.shield(self._watcher)
            return {"type": "http.disconnect"}
        message = await self._client_receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        """Behind the body, only the end of the connection can follow."""
        while (await self._client_receive())["type"] != "http.disconnect":
            pass
        self.end(ClientGone("the client closed the connection"))

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self.record.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.record.id
            self._streams = headers.get("content-type", "").startswith(CONTENT_TYPE)
        try:
            async with asyncio.timeout(self._write_seconds):
                await self._client_send(message)
        except TimeoutError:
            await self._drop_connection()
            raise ClientGone(
                f"the client read nothing for {self._write_seconds:g} seconds"
            ) from None
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True

    async def _drop_connection(self) -> None:
        """What was written stays in buffers until it is read, so an ordinary close never ends."""
        abort = self._scope["state"].get("abort")
        if abort is None:
            LOGGER.warning("this server cannot drop a connection; it stays until the client closes")
            return
        abort()
        await asyncio.sleep(0)  # the transport tells its protocol in the next turn of the loop
