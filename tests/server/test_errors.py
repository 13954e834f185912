"""Every error has its status, OpenAI's shape, and one clear line."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine

from prune_llm_server.engine import Busy, Failed, TimeLimit, Unavailable


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"] and len(found["message"]) < 1100
    return found


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": "other"}, "model", "does not exist"),
        ({"temperature": 3.5}, "temperature", "temperature 3.5: input should be less than"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": 1e-40}, "temperature", "must be 0 (greedy) or in [0.0001, 2]"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 2.0}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal"),
        ({"max_tokens": 0}, "max_tokens", "without echo"),
        ({"n": 129}, "n", "at most 128 together"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128 together"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": [[]]}, "prompt", "empty prompt"),
        ({"prompt": [1, "a"]}, "prompt", "must be all texts"),
        ({"prompt": [1, True]}, "prompt", "must be all texts"),
        ({"prompt": [-1]}, "prompt", "must be all texts"),
        ({"prompt": {"a": 1}}, "prompt", "must be a text"),
        ({"prompt": [5, 258]}, "prompt", "token id 258 is not in the vocabulary (0 to 257)"),
        ({"logit_bias": {"258": 1}}, "logit_bias", "not in the vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "at most 1024"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"best_of": 2}, "best_of", "only n sequences"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop.0", "at least 1"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"level": "60%"}, "level", "this model has: dense, 40%, 50%"),
        ({"activation_sparsity": 0.6}, "activation_sparsity", "60%: no such level"),
        ({"activation_sparsity": "x"}, "activation_sparsity", 'such as "40%"'),
        ({"activation_sparsity": 0.4, "level": "50%"}, "activation_sparsity", "level is 50%"),
        ({"nonsense": 1}, "nonsense", "Unrecognized request argument supplied: nonsense"),
    ],
)
def test_fields(server: Any, fields: dict[str, Any], param: str, message: str) -> None:
    response = server.post("/v1/completions", **{"prompt": "hello", **fields})
    found = error(response, 404 if "model" in fields else 400)
    assert found["param"] == param and message in found["message"]
    assert found["type"] == "invalid_request_error"


def test_missing_fields(server: Any) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "x"})
    assert error(response, 400)["message"] == "you must provide a model parameter"
    assert "'prompt'" in error(server.post("/v1/completions"), 400)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"null",
        b"[]",
        b'"x"',
        b'{"model": "tiny/fake", "prompt": "\\ud800"}',
        b'{"model": "tiny/fake", "prompt": "\xff"}',
        b'{"model": "tiny/fake", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny/fake", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny/fake", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny/fake", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"user": ' + b'{"a":' * 100_000,
    ],
)
def test_bodies_that_are_no_request(server: Any, body: bytes) -> None:
    response = server.client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    error(response, 400)


def test_null_bytes_and_doubled_keys_are_text_and_the_last_one(server: Any) -> None:
    body = b'{"model": "tiny/fake", "prompt": 5, "prompt": "a\\u0000b", "max_tokens": 1}'
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = server.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 200
    assert server.engine.requests[-1].ids == (99, 2, 100)


def test_context(server: Any, start: Any) -> None:
    found = error(server.post("/v1/completions", prompt="x" * 300), 400)
    assert found["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens; the prompt has 300" in found["message"]
    found = error(server.post("/v1/completions", prompt="x" * 200, max_tokens=57), 400)
    assert found["code"] == "context_length_exceeded"
    server.complete(prompt="x" * 200, max_tokens=56)
    assert server.complete(prompt="x" * 250)["usage"]["completion_tokens"] == 6
    limited = start(max_prompt_tokens=10, max_tokens_limit=20)
    found = error(limited.post("/v1/completions", prompt="x" * 11), 400)
    assert found["code"] == "context_length_exceeded" and "at most 10" in found["message"]
    found = error(limited.post("/v1/completions", prompt="x", max_tokens=21), 400)
    assert found["param"] == "max_tokens" and "at most 20" in found["message"]


def test_addresses_and_methods(server: Any) -> None:
    assert error(server.client.get("/nowhere"), 404)["code"] == "unknown_url"
    response = server.client.get("/v1/completions")
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error(server.client.get("/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_only_json_bodies(server: Any, kind: str | None) -> None:
    """A form or a text can be sent by any web page without the browser asking first."""
    headers = {} if kind is None else {"Content-Type": kind}
    response = server.client.post("/v1/completions", content=b"{}", headers=headers)
    assert "application/json" in error(response, 415)["message"]


def statuses(log: Any) -> list[int]:
    return [line["status"] for line in log() if line["event"] == "request"]


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (Busy("the queue is full", retry_after=1.5), 429, "rate_limit_exceeded"),
        (Unavailable("the engine is gone"), 503, "unavailable"),
        (Failed("the engine died"), 500, "engine_failed"),
        (TimeLimit("it took longer than 600 seconds"), 504, "time_limit"),
        (ValueError("prompt: token 7 does not exist"), 400, None),
        (RuntimeError("a secret prompt"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_engine_errors(
    start: Any, log: Any, wait_until: Any, raised: Exception, status: int, code: str, n: int
) -> None:
    server = start(FakeEngine(errors={0: raised}))
    for stream in (False, True):  # before the first token, a stream has a status as well
        response = server.post("/v1/completions", prompt="x", n=n, stream=stream)
        found = error(response, status)
        assert found["code"] == code
        if status == 429:
            assert response.headers["retry-after"] == "2"
        if status == 503:
            assert int(response.headers["retry-after"]) >= 1
        if code == "internal_error":
            assert "secret" not in response.text + json.dumps(log())
            assert any(line.get("error") == "RuntimeError" for line in log())
        else:
            assert str(raised) in found["message"]
    # behind it, there is only an event
    server.engine.errors = {2: raised}
    response = server.post("/v1/completions", prompt="x", stream=True)
    lines = [line for line in response.text.split("\n\n") if line]
    assert response.status_code == 200 and len(lines) == 3
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == code
    assert server.engine.cancelled + server.engine.running == 0
    wait_until(lambda: len(statuses(log)) == 3)
    assert statuses(log) == [status] * 3


def test_openai_client_raises(start: Any) -> None:
    server = start(FakeEngine(errors={2: Failed("the engine died")}))
    with server.openai() as client:
        stream = client.completions.create(model="tiny/fake", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the engine died"):
            list(stream)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny/fake", prompt="x")
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(model="other", prompt="x")
        assert raised.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            client.completions.create(model="tiny/fake", prompt="x", temperature=9)
        assert bad.value.param == "temperature"
        server.engine.capacity = 0
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(
                model="tiny/fake", messages=[{"role": "user", "content": "x"}]
            )
