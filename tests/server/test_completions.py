"""POST /v1/completions as OpenAI's client and lm-eval read it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import continuation, encode, following

from prune_llm_server.engine import Candidate, TokenReport
from prune_llm_server.logprobs import LegacyLogprobs, prompt_text

PROMPT = "hello"


def events(text: str) -> list[Any]:
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


def test_text_and_usage(server: Any) -> None:
    with server.openai() as client:
        answer = client.completions.create(model="tiny/fake", prompt=PROMPT, max_tokens=5)
    assert answer.object == "text_completion" and answer.model == "tiny/fake"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert choice.text == continuation(encode(PROMPT), 5)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 5, 10)
    assert usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT], list(encode(PROMPT)), [encode(PROMPT)]])
def test_forms_of_a_prompt_are_the_same(server: Any, prompt: Any) -> None:
    (choice,) = server.complete(prompt=prompt)["choices"]
    assert choice["text"] == continuation(encode(PROMPT), 16)  # OpenAI's default


def test_prompts_times_n_in_the_order_of_their_index(server: Any) -> None:
    answer = server.complete(prompt=["ab", "cde"], n=3, seed=7, temperature=1, max_tokens=4)
    expected = [
        continuation(encode(prompt), 4, seed) for prompt in ("ab", "cde") for seed in (7, 8, 9)
    ]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 24,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_stop(server: Any) -> None:
    whole = continuation(encode(PROMPT), 16)
    choice = server.complete(prompt=PROMPT, stop=["never", whole[6:8]])["choices"][0]
    assert choice["text"] == whole[: whole.index(whole[6:8])]
    assert choice["finish_reason"] == "stop"


def test_all_sampling_fields_reach_the_engine(server: Any) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": 3,
        "ignore_eos": True,
        "max_tokens": 7,
    }
    server.complete(prompt=PROMPT, logit_bias={"100": 5, "7": -100}, stop="#", user="x", **fields)
    request = server.engine.requests[-1]
    found = {name: getattr(request.params, name) for name in fields}
    assert found == fields
    assert request.params.logit_bias == {100: 5, 7: -100}
    assert request.params.stop == ("#",)
    assert request.level == "dense" and request.seconds == 600


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({}, "dense"),
        ({"level": "40%"}, "40%"),
        ({"activation_sparsity": 0.4}, "40%"),
        ({"activation_sparsity": "50%"}, "50%"),
        ({"activation_sparsity": 0}, "dense"),
        ({"activation_sparsity": 0.5, "level": "50%"}, "50%"),
    ],
)
def test_levels(server: Any, fields: dict[str, Any], level: str) -> None:
    server.complete(prompt=PROMPT, max_tokens=1, **fields)
    assert server.engine.requests[-1].level == level


def test_echo_and_logprobs(server: Any) -> None:
    """As lm-eval asks: the prompt's tokens come first, the first of them without a number."""
    ids = [*encode("ab"), following(encode("ab")), 100]
    answer = server.complete(prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0)
    choice = answer["choices"][0]
    text = bytes(i - 2 for i in ids).decode() + continuation(ids, 1)
    assert choice["text"] == text
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(
            logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        )
    ]
    assert greedy == [False, True, False, True]
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in top


def test_max_tokens_0_with_echo_tells_only_of_the_prompt(server: Any) -> None:
    answer = server.complete(prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == list(PROMPT)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * 4
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_of_ids_without_logprobs(server: Any) -> None:
    choice = server.complete(prompt=list(encode("hé")), echo=True, max_tokens=2)["choices"][0]
    assert choice["text"] == "hé" + continuation(encode("hé"), 2)
    assert choice["logprobs"] is None


def test_stream_equals_the_whole(server: Any) -> None:
    asked = {"prompt": [PROMPT, "x"], "n": 2, "echo": True, "logprobs": 2, "max_tokens": 6}
    whole = server.complete(**asked)
    response = server.post(
        "/v1/completions", stream=True, stream_options={"include_usage": True}, **asked
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks[:-1]]
        parts = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts][-1] == "length"
        assert not any(p["finish_reason"] for p in parts[:-1])
        for name, values in choice["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][name]] == values


def test_streams_of_n_interleave(start: Any) -> None:
    from fake_engine import FakeEngine

    server = start(FakeEngine(step_seconds=0.01))
    chunks = events(server.post("/v1/completions", prompt="a", n=3, stream=True).text)
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert sorted(order) == [0] * 16 + [1] * 16 + [2] * 16
    assert set(order[:6]) == {0, 1, 2}
    assert "usage" not in chunks[-1]


def test_openai_client_streams(server: Any) -> None:
    with server.openai() as client:
        stream = client.completions.create(
            model="tiny/fake",
            prompt=PROMPT,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"level": "40%", "top_k": 5},
        )
        chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == continuation(
        encode(PROMPT), 16
    )
    assert chunks[-1].usage.completion_tokens == 16


def _report(token: int, text: str, data: bytes | None, logprob: float | None, *top: Any) -> Any:
    return TokenReport(token, text, None if data is None else tuple(data), logprob, top)


def test_offsets_skip_special_tokens_and_split_characters() -> None:
    reports = [
        _report(0, "<s>", None, None),
        _report(1, " h", b" h", -1.0),
        _report(2, "\ufffd", b"\xc3", -1.0),
        _report(3, "\ufffd", b"\xa9", -1.0),
        _report(4, "!", b"!", -1.0),
    ]
    assert prompt_text(reports) == "<s> hé!"
    block = LegacyLogprobs("hé!").of_prompt(reports)
    assert block["text_offset"] == [0, 0, 1, 1, 2]
    assert block["tokens"] == ["<s>", " h", "bytes:\\xc3", "bytes:\\xa9", "!"]


def test_of_equal_texts_the_likeliest_counts() -> None:
    """Else a token would look greedy beside another that reads the same."""
    other = Candidate(9, "a", (97,), -0.1)
    block = LegacyLogprobs().of_answer([_report(8, "a", b"a", -3.0, other)])
    assert block["top_logprobs"] == [{"a": -0.1}] and block["token_logprobs"] == [-3.0]


def test_no_infinity_in_json() -> None:
    other = Candidate(9, "b", (98,), float("nan"))
    block = LegacyLogprobs().of_answer([_report(8, "a", b"a", float("-inf"), other)])
    assert block["top_logprobs"] == [{"a": -9999.0, "b": -9999.0}]
    assert block["token_logprobs"] == [-9999.0]
