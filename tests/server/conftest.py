"""Servers over the fake engine, their log, a way to wait."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import Running, running, until

from prune_llm_server.logs import JsonFormatter
from prune_llm_server.settings import ServerSettings


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start a server: start(engine, **settings)."""
    with ExitStack() as stack:

        def run(engine: FakeEngine | None = None, **settings: Any) -> Running:
            chosen = ServerSettings(port=0, **settings)
            return stack.enter_context(running(engine or FakeEngine(), chosen))

        yield run


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One for tests that leave it as it is."""
    with running(FakeEngine(), ServerSettings(port=0)) as found:
        yield found


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What the server logs, line by line, of all that begins after this."""
    began, stream = time.time(), io.StringIO()

    def ours(record: logging.LogRecord) -> bool:
        """A request is logged behind its answer: the last one of an earlier test may come late."""
        seconds: float = getattr(record, "fields", {}).get("seconds", 0.0)
        return record.created - seconds >= began

    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(ours)
    loggers = [logging.getLogger(name) for name in ("prune_llm_server", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return until
