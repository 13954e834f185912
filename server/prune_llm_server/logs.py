"""The log: one JSON object a line, and what one line says of a request."""

from __future__ import annotations

import json
import logging
import time
import traceback
from dataclasses import dataclass, field
from typing import IO, Any

REQUESTS = logging.getLogger("prune_llm_server.requests")


@dataclass
class RequestRecord:
    """One request, from its headers to its last byte.

    Attributes:
        id: as in the answer's header x-request-id.
        started: `time.perf_counter()`. status: of HTTP; 499 where the client left.
        first_token_seconds: until the first token was there.
        error: code of the error, if any. prompt: only where the operator wants it logged.
    """

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    stream: bool = False
    level: str | None = None
    first_token_seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    reason: str | None = None
    prompt: Any = None

    def write(self, quiet: bool) -> None:
        """Log it; ``quiet`` for what would fill the log with health checks."""
        fields: dict[str, Any] = {
            "request_id": self.id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "seconds": round(time.perf_counter() - self.started, 6),
        }
        if self.prompt_tokens:
            fields |= {
                "stream": self.stream,
                "level": self.level,
                "ttft": _rounded(self.first_token_seconds),
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "cached_tokens": self.cached_tokens,
                "finish_reasons": self.finish_reasons,
            }
        more = {"error": self.error, "reason": self.reason, "prompt": self.prompt}
        fields |= {name: value for name, value in more.items() if value is not None}
        REQUESTS.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


class JsonFormatter(logging.Formatter):
    """Time, severity, logger and event, then the fields the caller gave."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "severity": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # frames and the type: the message of an exception may quote a prompt
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = "".join(traceback.format_tb(record.exc_info[2])[-6:])
        return json.dumps(line, default=str)


def configure_logging(stream: IO[str]) -> None:
    """Write our messages, uvicorn's and asyncio's to ``stream``, one JSON object a line."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    for name in ("prune_llm_server", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
