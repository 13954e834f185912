"""Errors as OpenAI's clients know them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from prune_llm_server.engine import Busy, Failed, TimeLimit, Unavailable

LOGGER = logging.getLogger("prune_llm_server")
CLIENT_GONE = 499  # nginx's number; never sent, as nobody would hear it
_LONGEST_MESSAGE = 1000
_UNAVAILABLE_RETRY_SECONDS = 2.0
# what to tell programs where nothing more precise is known
_CODES = {
    401: "invalid_api_key",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
    504: "time_limit",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP. param: the field that is wrong. code: for programs.
        retry_after: seconds after which to try again. headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = " ".join(message.split())
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + "..."
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    @property
    def body(self) -> dict[str, Any]:
        if self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


class ClientGone(ApiError):
    """The client closed the connection, or reads so slowly that it is taken for gone."""

    def __init__(self, message: str) -> None:
        super().__init__(CLIENT_GONE, message, code="client_gone")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an exception; what nobody expected is logged and is a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ClientGone("the client closed the connection before its request was whole")
    if isinstance(error, Busy):
        return ApiError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), retry_after=_UNAVAILABLE_RETRY_SECONDS)
    if isinstance(error, TimeLimit):
        return ApiError(504, str(error))
    if isinstance(error, Failed):
        return ApiError(500, str(error), code="engine_failed")
    # the message is left out: it may quote a prompt
    where = "".join(traceback.format_tb(error.__traceback__)[-6:])
    name = type(error).__name__
    LOGGER.error("unexpected error", extra={"fields": {"error": name, "traceback": where}})
    return ApiError(500, "the server made an error; its log says more")


async def http_error(request: Request, error: Exception) -> Response:
    """For what the router refuses: an address that does not exist, a method it does not take."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        known = ApiError(404, f"Unknown request URL: {what}", code="unknown_url")
    elif error.status_code == 405:
        known = ApiError(405, f"Method not allowed: {what}", code="method_not_allowed")
    else:
        known = ApiError(error.status_code, str(error.detail))
    known.headers.update(error.headers or {})
    return known.response()
