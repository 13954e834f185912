"""No input gives a 5xx or a hang: cases made from the OpenAPI schema, and bodies made of noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import Running, metric, running, save_served

from prune_llm_server.embedded import EmbeddedEngine, EngineConfig
from prune_llm_server.settings import ServerSettings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
VALID = {
    "model": "tiny/fake",
    "prompt": ["hello", "you"],
    "max_tokens": 3,
    "temperature": 0.5,
    "stop": ["a", "b"],
    "logit_bias": {"70": 1.5},
    "logprobs": 2,
    "echo": True,
    "n": 2,
    "stream_options": {"include_usage": True},
    "stream": True,
    "seed": 1,
    "level": "40%",
}
CHAT = {
    "model": "tiny/fake",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "max_completion_tokens": 3,
    "logprobs": True,
    "top_logprobs": 1,
    "response_format": {"type": "text"},
}


OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model_id}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/version", "GET"),
    ("/metrics", "GET"),
]


def test_every_operation_is_tried(server: Any) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    found = {(path, method.upper()) for path, item in paths.items() for method in item}
    assert found == set(OPERATIONS)


CASES = [
    (path, method, mode)
    for path, method in OPERATIONS
    for mode in GenerationMode
    # what takes no input has no wrong input
    if mode is GenerationMode.POSITIVE or method == "POST"
]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_cases_of_the_schema(server: Any, path: str, method: str, mode: GenerationMode) -> None:
    _check_cases(server, path, method, mode, 60 if method == "POST" else 5)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The engine that comes with the server, which has more to fail with than the fake one."""
    model = save_served(tmp_path_factory.mktemp("served"))
    engine = EmbeddedEngine(EngineConfig(str(model), "tiny/fake", threads=1), lambda code: None)
    with running(engine, ServerSettings(port=0)) as found:
        yield found


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_cases_of_the_schema_with_a_model(real: Running, path: str, mode: GenerationMode) -> None:
    _check_cases(real, path, "POST", mode, 30)
    assert metric(real.url, "engine_restarts_total") == 0


def _check_cases(server: Any, path: str, method: str, mode: GenerationMode, count: int) -> None:
    document = server.client.get("/openapi.json").json()
    # so that some cases get as far as an answer
    for name in ("CompletionRequest", "ChatRequest"):
        document["components"]["schemas"][name]["properties"]["model"]["enum"] = ["tiny/fake"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=count, suppress_health_check=QUIET, deadline=None)
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=20)

    check()


def send(server: Any, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = server.client.post(path, content=body, headers=headers)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions"])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["\x00", "\ud800", "\ufffe", "40%", "1e400", "{}", "{message}", "%s"]),
    st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=8),
)


@given(path=PATHS, body=st.binary(max_size=200))
@settings(max_examples=100, suppress_health_check=QUIET)
def test_random_bytes(server: Any, path: str, body: bytes) -> None:
    send(server, path, body)


@given(chat=st.booleans(), data=st.data())
@settings(max_examples=200, suppress_health_check=QUIET)
def test_requests_with_odd_values(server: Any, chat: bool, data: st.DataObject) -> None:
    valid = CHAT if chat else VALID
    names = [*valid, "top_p", "top_k", "min_p", "activation_sparsity", "user", "tools", "xyz"]
    body: dict[str, Any] = dict(valid)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        body[name] = data.draw(ODD)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    send(server, path, json.dumps(body).encode("utf-8", "surrogatepass"))


@given(chat=st.booleans(), at=st.integers(0, 400), cut=st.integers(0, 30), noise=st.binary())
@settings(max_examples=150, suppress_health_check=QUIET)
def test_broken_json(server: Any, chat: bool, at: int, cut: int, noise: bytes) -> None:
    whole = json.dumps(CHAT if chat else VALID).encode()
    at = min(at, len(whole))
    path = "/v1/chat/completions" if chat else "/v1/completions"
    send(server, path, whole[:at] + noise + whole[at + cut :])
