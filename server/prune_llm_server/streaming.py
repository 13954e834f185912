"""Server-sent events: one ``data:`` line of JSON each, as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

CONTENT_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


class EventStream(Response):
    """Events as they come, then ``[DONE]``; an error in between goes up and ends them without it.

    Starlette's StreamingResponse runs a second task that waits for the client's end; the exchange
    does that already.
    """

    media_type = CONTENT_TYPE

    def __init__(
        self, events: AsyncGenerator[Any, None], close: Callable[[], Awaitable[None]]
    ) -> None:
        """``close``: what to call at the end, even if no event was ever asked for."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for data in self._events:
                message = {"type": "http.response.body", "body": event(data), "more_body": True}
                await send(message)
            await send({"type": "http.response.body", "body": DONE, "more_body": False})
        finally:
            await self._events.aclose()
            await self._close()
