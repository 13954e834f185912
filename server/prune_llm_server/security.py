"""Who may ask, and how much: API keys and the size of bodies."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prune_llm_server.errors import ApiError

KEYS_VARIABLE = "PRUNE_LLM_API_KEYS"
_SHORTEST_KEY = 16


def read_api_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of a file, one a line (# begins a comment), and of the environment, between commas.

    Raises:
        ValueError: a key is too short or holds what no header can; a file without one, or that
            cannot be read. It never quotes a key.
    """
    found: list[tuple[str, str]] = []
    if file is not None:
        for number, line in enumerate(_read(file).splitlines(), 1):
            if key := line.partition("#")[0].strip():
                found.append((f"{file}, line {number}", key))
        if not found:
            raise ValueError(f"api keys {str(file)!r}: holds no key; give one a line")
    for number, key in enumerate(environment.get(KEYS_VARIABLE, "").split(","), 1):
        if key.strip():
            found.append((f"{KEYS_VARIABLE}, number {number}", key.strip()))
    for where, key in found:
        if len(key) < _SHORTEST_KEY:
            raise ValueError(
                f"api key ({where}): has {len(key)} characters; give at least {_SHORTEST_KEY}"
            )
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(f"api key ({where}): must be printable ASCII without spaces")
    return tuple(dict.fromkeys(key for _, key in found))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"api_key_file {str(file)!r}: cannot be read ({error.strerror}); give a file of keys, "
            "one a line"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"api_key_file {str(file)!r}: must be text in UTF-8") from None


class ApiKeys:
    """Knows keys by their digests, and compares in a time that tells nothing of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __contains__(self, key: str) -> bool:
        digest = sha256(key.encode()).digest()
        # every one is compared, also behind a match
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class KeyMiddleware:
    """Everything below /v1 needs a key."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = ApiKeys(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            known = key.strip() in self._keys
            if scheme.lower() != "bearer" or not key.strip():
                raise _unauthorized("You didn't provide an API key: send Authorization: Bearer KEY")
            if not known:
                raise _unauthorized("Incorrect API key provided")
        await self._app(scope, receive, send)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


class BodyMiddleware:
    """Reads bodies up to a size and within a time, whatever their Content-Length says.

    What follows behind a refusal is thrown away by the HTTP protocol: a client that is cut off
    while it writes would never read why.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_bytes:
            raise self._too_large()
        size = 0
        due = time.monotonic() + self._seconds

        async def limited() -> Message:
            nonlocal size
            try:
                async with asyncio.timeout(None if size < 0 else due - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {self._seconds:g} seconds",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._max_bytes:
                    raise self._too_large()
                if not message.get("more_body", False):
                    size = -1  # it is whole; what follows is the connection's end
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_bytes} bytes, the most this server takes",
        )
