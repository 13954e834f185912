"""A real server in a thread, over the fake engine."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine

from prune_llm_server.app import create_app
from prune_llm_server.lifecycle import Lifecycle
from prune_llm_server.logs import JsonFormatter
from prune_llm_server.runner import serve
from prune_llm_server.settings import ServerSettings

MODEL = "tiny/fake"


@dataclass
class Running:
    """A server that runs; `client` sends plain HTTP, `openai` is the official client."""

    engine: FakeEngine
    lifecycle: Lifecycle
    thread: threading.Thread
    url: str = ""
    exit_code: list[int] = field(default_factory=list)
    client: httpx.Client = field(default_factory=httpx.Client)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": MODEL, **body})

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=20)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


@contextmanager
def running(engine: FakeEngine, settings: ServerSettings) -> Iterator[Running]:
    app = create_app(engine, settings)
    listening = threading.Event()
    server = Running(engine, app.state.lifecycle, threading.Thread())

    def announce(url: str) -> None:
        server.url = url
        listening.set()

    def work() -> None:
        server.exit_code.append(serve(app, settings, announce))

    server.thread = threading.Thread(target=work)
    server.thread.start()
    assert listening.wait(20)
    server.client.close()
    server.client = httpx.Client(base_url=server.url, timeout=20)
    try:
        yield server
    finally:
        server.client.close()
        if server.lifecycle.exit_code is None:
            server.lifecycle.stop_with(0)
        server.thread.join(20)
        assert not server.thread.is_alive()


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
    """What the server logs, line by line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    loggers = [logging.getLogger(name) for name in ("prune_llm_server", "uvicorn")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger in loggers:
        logger.removeHandler(handler)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for it, or fail."""
    due = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < due, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return until
