"""Clients that leave or stall, loading, draining, ending."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine

from prune_llm_server.engine import EngineError

BODY = {"model": "tiny/fake", "prompt": "x", "max_tokens": 200}


def ask(server: Any, **fields: Any) -> socket.socket:
    """Send a request by hand and leave the answer unread."""
    body = json.dumps({**BODY, **fields}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return connection


def requests(log: Any) -> list[dict[str, Any]]:
    return [line for line in log() if line["event"] == "request"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_is_cancelled(
    start: Any, log: Any, wait_until: Any, stream: bool, n: int
) -> None:
    engine = FakeEngine(step_seconds=0.05)
    server = start(engine)
    with ask(server, stream=stream, n=n):
        wait_until(lambda: engine.running == n)
        if stream:
            time.sleep(0.2)
    began = time.monotonic()
    wait_until(lambda: engine.cancelled == n)
    assert engine.running == 0 and time.monotonic() - began < 1
    wait_until(lambda: bool(requests(log)))
    line = requests(log)[-1]
    assert (line["status"], line["error"]) == (499, "client_gone")
    assert 'request_failures_total{status="499"} 1.0' in server.client.get("/metrics").text
    assert server.lifecycle.running == 0
    assert not [line for line in log() if line["severity"] == "error"]


def test_many_leave_and_nothing_stays(start: Any, wait_until: Any) -> None:
    engine = FakeEngine(step_seconds=0.005)
    server = start(engine)
    server.complete(prompt="x", max_tokens=1)
    files = len(os.listdir("/proc/self/fd"))
    for number in range(60):
        with ask(server, stream=number % 2 == 0):
            time.sleep(0.001 * (number % 10))
    wait_until(lambda: engine.running == 0 and server.lifecycle.running == 0)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)
    assert engine.opened - 1 == engine.cancelled <= 60
    server.complete(prompt="x", max_tokens=1)


def test_a_reader_that_stalls_is_dropped(start: Any, log: Any, wait_until: Any) -> None:
    engine = FakeEngine(width=400_000)
    server = start(engine, write_seconds=0.3)
    files = len(os.listdir("/proc/self/fd"))
    with ask(server, stream=True):
        wait_until(lambda: engine.cancelled == 1)
        wait_until(lambda: bool(requests(log)))
        # the connection is gone, too, although the client still holds its side
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files + 1)
    line = requests(log)[-1]
    assert line["status"] == 499 and "read nothing for 0.3 seconds" in line["reason"]
    assert not [line for line in log() if line["severity"] == "error"]


def test_ready_and_health_follow_the_engine(start: Any) -> None:
    server = start()
    assert server.client.get("/ready").json() == {"status": "ok", "reason": ""}
    server.engine.healthy = False
    for address in ("/health", "/ready"):
        response = server.client.get(address)
        assert response.status_code == 503
        assert response.json() == {"status": "unhealthy", "reason": "as the test wants it"}
    server.engine.healthy, server.engine.loaded = True, False
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/ready").json()["status"] == "loading"
    for response in (server.client.get("/v1/models"), server.post("/v1/completions", prompt="x")):
        assert response.status_code == 503 and "retry-after" in response.headers
        assert response.json()["error"]["message"] == "the model is loading"
    assert server.client.get("/version").json()["model"] is None
    assert "prune_llm:num_requests" not in server.client.get("/metrics").text


def test_drain_lets_requests_finish(start: Any, log: Any, wait_until: Any) -> None:
    engine = FakeEngine(step_seconds=0.01)
    server = start(engine)
    answers: list[httpx.Response] = []

    def work(stream: bool) -> None:
        body = {**BODY, "max_tokens": 60, "stream": stream}
        answers.append(httpx.post(server.url + "/v1/completions", json=body, timeout=20))

    threads = [threading.Thread(target=work, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine.running == 2)
    server.lifecycle.drain()
    refused = server.post("/v1/completions", prompt="x")
    assert refused.status_code == 503 and refused.headers["connection"] == "close"
    assert refused.headers["retry-after"] == "1"
    ready = server.client.get("/ready")
    assert ready.status_code == 503 and ready.json()["status"] == "draining"
    assert server.client.get("/health").status_code == 200
    for thread in threads:
        thread.join()
    server.thread.join(10)
    assert server.exit_code == [0] and engine.stopped == 1
    assert [answer.status_code for answer in answers] == [200, 200]
    assert any(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    assert engine.cancelled == 0


def test_what_outlasts_the_drain_is_told(start: Any, log: Any, wait_until: Any) -> None:
    engine = FakeEngine(step_seconds=0.05)
    server = start(engine, drain_seconds=0.3)
    answers: dict[bool, httpx.Response] = {}

    def work(stream: bool) -> None:
        body = {**BODY, "stream": stream}
        answers[stream] = httpx.post(server.url + "/v1/completions", json=body, timeout=20)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine.running == 2)
    server.lifecycle.drain()
    for thread in [*threads, server.thread]:
        thread.join(10)
    assert server.exit_code == [1] and engine.cancelled == 2
    assert answers[False].status_code == 503 and "retry-after" in answers[False].headers
    last = answers[True].text.rstrip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["code"] == "unavailable"
    assert [line["status"] for line in requests(log)] == [503, 503]


def test_stop_with_ends_at_once(start: Any, wait_until: Any) -> None:
    engine = FakeEngine(step_seconds=0.05)
    server = start(engine)
    with ask(server):
        wait_until(lambda: engine.running == 1)
        server.lifecycle.stop_with(3)
        server.thread.join(10)
    assert server.exit_code == [3] and engine.cancelled == 1 and engine.stopped == 1


SCRIPT = """
import sys
from fake_engine import FakeEngine
from prune_llm_server.app import create_app
from prune_llm_server.runner import serve
from prune_llm_server.settings import ServerSettings

settings = ServerSettings(port=0, drain_seconds=20)
app = create_app(FakeEngine(step_seconds=float(sys.argv[1])), settings)
sys.exit(serve(app, settings, lambda url: print(url, flush=True)))
"""


@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 143)])
def test_signals(signals: int, code: int) -> None:
    """The first drains, the second ends."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "0.01" if signals == 1 else "0.5"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    with process, httpx.Client(base_url=process.stdout.readline().strip(), timeout=20) as client:
        body = {**BODY, "stream": True, "max_tokens": 50}
        with client.stream("POST", "/v1/completions", json=body) as response:
            chunks = response.iter_text()
            text = next(chunks)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            text += "".join(chunks)
        assert process.wait(20) == code
    assert text.endswith("[DONE]\n\n") == (code == 0)
    assert ("the server was stopped" in text) == (code != 0)


def test_a_start_that_fails_ends_the_server() -> None:
    from prune_llm_server.app import create_app
    from prune_llm_server.runner import serve
    from prune_llm_server.settings import ServerSettings

    settings = ServerSettings(port=0)
    for error in (ValueError("model 'x': is none"), EngineError("out of memory")):
        engine = FakeEngine(loaded=False, start_error=error)
        with pytest.raises(type(error), match=str(error)):
            serve(create_app(engine, settings), settings)
        assert engine.stopped == 1


def test_an_address_in_use_is_one_clear_line(server: Any) -> None:
    from prune_llm_server.app import create_app
    from prune_llm_server.runner import serve
    from prune_llm_server.settings import ServerSettings

    settings = ServerSettings(port=int(server.url.rpartition(":")[2]))
    with pytest.raises(ValueError, match=r"port \d+: cannot listen there \(Address already in use"):
        serve(create_app(FakeEngine(), settings), settings)
