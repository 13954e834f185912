"""POST /v1/chat/completions as OpenAI's client reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import continuation, encode

MESSAGES = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]
IDS = encode("<system>be brief<user>a\nb")


def test_message_and_usage(server: Any) -> None:
    with server.openai() as client:
        answer = client.chat.completions.create(
            model="tiny/fake", messages=MESSAGES, max_completion_tokens=6
        )
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.message.content == continuation(IDS, 6)
    assert answer.usage.total_tokens == len(IDS) + 6


def test_an_answer_can_be_sent_back(server: Any) -> None:
    with server.openai() as client:
        first = client.chat.completions.create(
            model="tiny/fake", messages=MESSAGES, max_tokens=3
        ).choices[0]
        more = [*MESSAGES, first.message, {"role": "user", "content": "go on"}]
        second = client.chat.completions.create(model="tiny/fake", messages=more, max_tokens=3)
    assert second.usage.prompt_tokens > len(IDS)


def test_max_tokens_default_to_what_the_context_leaves(start: Any, server: Any) -> None:
    asked = {"messages": MESSAGES}
    usage = server.post("/v1/chat/completions", **asked).json()["usage"]
    assert usage["total_tokens"] == server.engine.context
    limited = start(max_tokens_limit=9)
    usage = limited.post("/v1/chat/completions", **asked).json()["usage"]
    assert usage["completion_tokens"] == 9


def test_logprobs(server: Any) -> None:
    with server.openai() as client:
        answer = client.chat.completions.create(
            model="tiny/fake", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2
        )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == continuation(IDS, 3)
    for entry in content:
        assert entry.logprob == -0.1 and entry.bytes == list(entry.token.encode())
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token


def test_stream(server: Any) -> None:
    response = server.post(
        "/v1/chat/completions",
        messages=MESSAGES,
        max_tokens=4,
        n=2,
        stream=True,
        logprobs=True,
        stream_options={"include_usage": True},
    )
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    for index in range(2):
        parts = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == continuation(IDS, 4)
        assert [p["finish_reason"] for p in parts] == [None] * 4 + ["length"]
        tokens = [e["token"] for p in parts if p["logprobs"] for e in p["logprobs"]["content"]]
        assert "".join(tokens) == text


def test_openai_client_streams(server: Any) -> None:
    with server.openai() as client:
        stream = client.chat.completions.create(
            model="tiny/fake", messages=MESSAGES, max_tokens=5, stream=True, seed=1
        )
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == continuation(IDS, 5)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_what_changes_nothing_is_taken(server: Any) -> None:
    fields = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "logit_bias": None,
        "top_k": -1,
    }
    response = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1, **fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", 'only {"type": "text"}'),
        ({"modalities": ["text", "audio"]}, "modalities", "only"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "older name"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "should be 'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "Missing required parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
            "'image_url' is not supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "messages",
            "the template wants a user's message first",
        ),
    ],
)
def test_refusals(server: Any, fields: dict[str, Any], param: str, message: str) -> None:
    response = server.post("/v1/chat/completions", **{"messages": MESSAGES, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"] and error["type"] == "invalid_request_error"
