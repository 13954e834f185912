"""Messages between the server and its engine process: JSON behind its length, over a socket pair.

JSON, because what crosses is small and nothing that is read may run code.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

_LENGTH_BYTES = 4

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def messages(connection: socket.socket) -> Iterator[Message]:
    """Until the other side is gone."""
    with connection.makefile("rb") as stream:
        while len(length := stream.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
            size = int.from_bytes(length, "little")
            body = stream.read(size)
            if len(body) < size:
                return
            yield json.loads(body)


async def read(stream: asyncio.StreamReader) -> Message | None:
    """The next message; None: the other side is gone."""
    try:
        length = int.from_bytes(await stream.readexactly(_LENGTH_BYTES), "little")
        message: Message = json.loads(await stream.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message
