"""Models, versions, metrics, request ids, the lines of the log."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_engine import FakeEngine

from prune_llm import __version__
from prune_llm_server.settings import ServerSettings


def test_models(server: Any) -> None:
    with server.openai() as client:
        (model,) = client.models.list().data
        assert model.id == "tiny/fake" and model.created == 1_700_000_000
        assert client.models.retrieve("tiny/fake").model_extra["levels"] == ["dense", "40%", "50%"]
    assert server.client.get("/v1/models").json()["data"][0]["max_model_len"] == 256


def test_version(server: Any) -> None:
    found = server.client.get("/version").json()
    assert found["version"] == __version__ and found["details"]["threads"] == 1


def test_request_ids(server: Any) -> None:
    for given in ("abc_-9", "x" * 64):
        response = server.client.get("/health", headers={"X-Request-Id": given})
        assert response.headers["x-request-id"] == given
    for given in ("x" * 65, "a b", "a\tb", "<script>", ""):
        response = server.client.get("/nowhere", headers={"X-Request-Id": given})
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    response = server.client.post(
        "/v1/completions",
        json={"model": "tiny/fake", "prompt": "x", "max_tokens": 1},
        headers={"X-Request-Id": "mine"},
    )
    assert response.json()["id"] == "cmpl-mine"
    assert server.engine.requests[-1].id == "mine-0"


def values(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics(start: Any) -> None:
    server = start()
    server.complete(prompt="hello", n=2, max_tokens=5, level="40%")
    server.complete(prompt="hello", max_tokens=200)
    server.post("/v1/completions", prompt="x", temperature=9)
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = values(response.text)
    label = '{model_name="tiny/fake"}'
    expected = {
        f"num_requests_running{label}": 0,
        f"num_requests_waiting{label}": 3,
        f"kv_cache_usage_perc{label}": 0.25,
        f"num_preemptions_total{label}": 4,
        f"engine_restarts_total{label}": 2,
        f"prefix_cache_queries_total{label}": 200,
        f"prefix_cache_hits_total{label}": 50,
        f"prompt_tokens_total{label}": 15,
        f"generation_tokens_total{label}": 210,
        'request_success_total{finished_reason="length",model_name="tiny/fake"}': 3,
        'request_failures_total{status="400"}': 1,
        f"time_to_first_token_seconds_count{label}": 3,
        f"inter_token_latency_seconds_count{label}": 4 + 4 + 199,
        f"request_time_per_output_token_seconds_count{label}": 3,
        f"e2e_request_latency_seconds_count{label}": 3,
        f"request_queue_time_seconds_count{label}": 3,
        f"request_queue_time_seconds_sum{label}": 1.5,
        f"request_prefill_time_seconds_sum{label}": 0.75,
        f"request_decode_time_seconds_count{label}": 3,
        f"request_prompt_tokens_sum{label}": 15,
        f"request_generation_tokens_sum{label}": 210,
        'activation_sparsity_sum{level="40%",model_name="tiny/fake"}': pytest.approx(0.8),
        'activation_sparsity_count{level="40%",model_name="tiny/fake"}': 2,
    }
    assert {name: found[f"prune_llm:{name}"] for name in expected} == expected
    assert found["process_open_fds"] > 0


def log_lines(log: Any) -> list[dict[str, Any]]:
    return [line for line in log() if line["event"] == "request"]


def test_a_line_for_each_request(start: Any, log: Any, wait_until: Any) -> None:
    server = start(FakeEngine(step_seconds=0.002))
    server.complete(prompt="hello", n=2, max_tokens=5, activation_sparsity="40%")
    server.client.get("/health")
    server.client.get("/nowhere")
    server.post("/v1/completions", prompt="x", temperature=9)
    wait_until(lambda: len(log_lines(log)) == 3)  # the last is written behind its answer
    first, unknown, refused = log_lines(log)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert 0 < first.pop("ttft") < first.pop("seconds")
    assert len(first.pop("request_id")) == 32
    assert first == {
        "severity": "info",
        "level": "40%",
        "logger": "prune_llm_server.requests",
        "event": "request",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "stream": False,
        "prompt_tokens": 5,
        "completion_tokens": 10,
        "cached_tokens": 2,
        "finish_reasons": ["length", "length"],
    }
    assert unknown["status"] == 404
    assert (refused["status"], refused["error"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70000}, "port 70000"),
        ({"max_body_bytes": 0}, "max_body_bytes 0"),
        ({"request_seconds": 0}, "request_seconds 0"),
        ({"write_seconds": float("nan")}, "write_seconds nan"),
        ({"drain_seconds": -1}, "drain_seconds -1"),
    ],
)
def test_settings_name_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(**fields)
