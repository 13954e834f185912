"""`prune-llm serve` in a process of its own, under everything that goes wrong; with counts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Process, ask, children, metric, runs, served, starting, until
from tiny_models import llama_config, save_model

LONG = {"max_tokens": 1200, "ignore_eos": True}
MOST_RESTARTS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with a long context: an answer takes as long as a test wants."""
    return save_model(tmp_path_factory.mktemp("model"), llama_config(max_position_embeddings=2048))


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("log") / "log"
    options = (
        "--stuck-seconds",
        "1",
        "--max-queue",
        "4",
        "--max-rows",
        "4",
        "--max-restarts",
        str(MOST_RESTARTS),
    )
    with served(model, log, *options) as found:
        assert found.url, found.log
        yield found


def in_background(pool: ThreadPoolExecutor, server: Process, count: int) -> list[Future[Any]]:
    """Long requests, every second one streamed, that run when this returns."""
    before = metric(server.url, "num_requests_running")
    found = [
        pool.submit(server.complete, f"story {n}", stream=n % 2 == 1, **LONG) for n in range(count)
    ]
    until(lambda: metric(server.url, "num_requests_running") >= before + count)
    return found


def test_a_killed_worker_is_replaced(shared: Process) -> None:
    expected = shared.complete("the fox").json()["choices"]
    restarts = metric(shared.url, "engine_restarts_total")
    files, (worker,) = shared.files, shared.workers
    with ThreadPoolExecutor(4) as pool:
        running = in_background(pool, shared, 4)
        os.kill(worker, signal.SIGKILL)
        until(lambda: shared.status("/ready") == 503)
        assert shared.status("/health") == 200  # it is being replaced
        refused = shared.complete("x")
        assert refused.status_code == 503 and "being restarted" in refused.text
        for number, answer in enumerate(future.result() for future in running):
            if number % 2:
                event = answer.text.strip().splitlines()[-1]
                error = json.loads(event.removeprefix("data: "))["error"]
                assert answer.status_code == 200
            else:
                error = answer.json()["error"]
                assert answer.status_code == 500
            assert error["code"] == "engine_failed"
            assert "the engine was killed by SIGKILL" in error["message"]
    until(lambda: shared.status("/ready") == 200, 60)
    assert shared.complete("the fox").json()["choices"] == expected
    assert metric(shared.url, "engine_restarts_total") == restarts + 1
    assert metric(shared.url, "num_requests_running") == 0
    assert not runs(worker) and len(shared.workers) == 1
    until(lambda: shared.files <= files)


def test_a_stuck_worker_is_seen_and_replaced(shared: Process) -> None:
    expected = shared.complete("the fox").json()["choices"]
    restarts, (worker,) = metric(shared.url, "engine_restarts_total"), shared.workers
    with ThreadPoolExecutor(1) as pool:
        (running,) = in_background(pool, shared, 1)
        os.kill(worker, signal.SIGSTOP)
        until(lambda: shared.status("/health") == 503)
        assert runs(worker) and shared.status("/ready") == 503
        reason = httpx.get(shared.url + "/health").json()["reason"]
        assert "the engine has said nothing for" in reason
        assert running.result().status_code == 500
    until(lambda: shared.status("/ready") == 200, 60)
    assert not runs(worker) and metric(shared.url, "engine_restarts_total") == restarts + 1
    assert shared.complete("the fox").json()["choices"] == expected


def test_a_server_that_was_stopped_for_a_while_keeps_its_worker(shared: Process) -> None:
    """The silence was its own."""
    restarts, workers = metric(shared.url, "engine_restarts_total"), shared.workers
    os.kill(shared.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(shared.pid, signal.SIGCONT)
    assert shared.complete("the fox").status_code == 200
    assert shared.workers == workers
    assert metric(shared.url, "engine_restarts_total") == restarts


def test_a_full_queue_refuses(shared: Process) -> None:
    expected = shared.complete("story", ignore_eos=True, max_tokens=300).json()["choices"][0][
        "text"
    ]
    with ThreadPoolExecutor(24) as pool:
        futures = [
            pool.submit(shared.complete, "story", ignore_eos=True, max_tokens=300)
            for _ in range(24)
        ]
        answers = [future.result() for future in futures]
    taken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(taken) + len(refused) == 24 and len(taken) >= 8 and refused
    assert all(answer.json()["choices"][0]["text"] == expected for answer in taken)
    assert all(1 <= int(answer.headers["retry-after"]) <= 600 for answer in refused)
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)


def test_a_slow_reader_holds_nobody_up(shared: Process) -> None:
    expected = shared.complete("the fox").json()["choices"]
    files = shared.files
    body = {"model": "tiny", "prompt": "x", "stream": True, "logprobs": 5, **LONG}
    with ask(shared.url, **body) as slow:
        until(lambda: metric(shared.url, "num_requests_running") == 1)
        began = time.monotonic()
        for _ in range(5):
            assert shared.complete("the fox").json()["choices"] == expected
        assert time.monotonic() - began < 10
        slow.recv(100)
    until(lambda: metric(shared.url, "num_requests_running") == 0)
    until(lambda: metric(shared.url, "kv_cache_usage_perc") == 0)
    until(lambda: shared.files <= files)


def test_clients_that_leave_leave_nothing_behind(shared: Process) -> None:
    expected = shared.complete("the fox").json()["choices"]
    files = shared.files
    for number in range(100):
        body = {"model": "tiny", "prompt": f"story {number}", **LONG}
        with ask(shared.url, **body, stream=number % 3 > 0):
            time.sleep(0.002 * (number % 5))
    until(lambda: metric(shared.url, "num_requests_running") == 0)
    until(lambda: metric(shared.url, "num_requests_waiting") == 0)
    until(lambda: metric(shared.url, "kv_cache_usage_perc") == 0)
    until(lambda: shared.files <= files)
    assert shared.complete("the fox").json()["choices"] == expected


def test_too_many_deaths_end_the_server(shared: Process) -> None:
    """The last one of the shared server."""
    killed = []
    while shared.process.poll() is None and len(killed) <= MOST_RESTARTS:
        (worker,) = shared.workers
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)
        # one that is killed is listed until it has died, and may seem ready until that is noticed
        until(lambda: shared.process.poll() is not None or _replaced(shared, killed[-1]), 20)
        until(lambda: shared.process.poll() is not None or _answers_ready(shared), 60)
    assert shared.process.wait(20) == 1
    assert not any(map(runs, killed))
    assert f"was restarted {MOST_RESTARTS} times before" in shared.log
    assert "Traceback" not in shared.log


def _replaced(server: Process, worker: int) -> bool:
    workers = server.workers
    return bool(workers) and worker not in workers


def _answers_ready(server: Process) -> bool:
    try:
        return server.status("/ready") == 200
    except httpx.TransportError:  # it is ending, and closed its socket before
        return False


def test_a_server_told_to_end_finishes_what_it_took(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path / "log") as server, ThreadPoolExecutor(8) as pool:
        (worker,) = server.workers
        running = in_background(pool, server, 8)
        os.kill(server.pid, signal.SIGTERM)
        until(lambda: server.status("/ready") == 503)
        refused = server.complete("x")
        assert refused.status_code == 503 and "retry-after" in refused.headers
        answers = [future.result() for future in running]
        assert server.process.wait(20) == 0
        assert [answer.status_code for answer in answers] == [200] * 8
        for number, answer in enumerate(answers):
            if number % 2:
                assert answer.text.endswith("data: [DONE]\n\n")
            else:
                assert answer.json()["usage"]["completion_tokens"] == LONG["max_tokens"]
        until(lambda: not runs(worker))
    # nothing else writes there, so that programs can read it
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert not [line for line in lines if line["severity"] != "info"]
    requests = [line for line in lines if line["event"] == "request" and line["status"] == 200]
    assert len(requests) == 8


def test_a_hostile_directory_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    """What is refused, and how: tests/core/test_admission.py."""
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 10**9}))
    with served(directory, tmp_path / "log") as server:
        assert server.process.wait(60) == 2 and not server.url
    assert "Traceback" not in server.log
    line = server.log.strip().splitlines()[-1]
    assert line.startswith("error: ") and "describes a larger model than the weights" in line


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (
            ("--load-seconds", "0.2"),
            1,
            "error: load_seconds 0.2: the model was not ready by then; give it longer if it only "
            "loads slowly",
        ),
        (
            ("--kv-cache-gb", "1e-6"),
            2,
            "error: kv_cache_gb 1e-06: holds 0 pages of 32 tokens, 768 bytes each token; must be "
            "at least 49152 bytes",
        ),
    ],
)
def test_an_engine_that_does_not_get_ready_is_one_line(
    model: Path, tmp_path: Path, options: tuple[str, ...], code: int, expected: str
) -> None:
    with served(model, tmp_path / "log", *options) as server:
        assert server.process.wait(60) == code and not server.url
        assert not server.workers
    assert "Traceback" not in server.log
    assert server.log.strip().splitlines()[-1] == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_a_server_that_ends_takes_its_worker_along(
    model: Path, tmp_path: Path, number: int, code: int
) -> None:
    """Also one that is loading, which hears nothing."""
    with (tmp_path / "log").open("w") as log, starting(model, log) as process:
        until(lambda: bool(children(process.pid)), 60)
        (worker,) = children(process.pid)
        process.send_signal(number)
        assert process.wait(20) == code
        until(lambda: not runs(worker))
    assert "Traceback" not in (tmp_path / "log").read_text()
