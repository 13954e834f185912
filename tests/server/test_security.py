"""Keys, body limits, origins; what never reaches a log."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from prune_llm_server.security import ApiKeys, read_api_keys
from prune_llm_server.settings import ServerSettings

KEYS = ("first-key-0123456789", "second-key-0123456789")


def test_keys(start: Any, log: Any, wait_until: Any) -> None:
    server = start(api_keys=KEYS)
    for address in ("/health", "/ready", "/version", "/metrics"):
        assert server.client.get(address).status_code == 200
    for key in KEYS:
        with server.openai(key) as client:
            assert client.models.list().data[0].id == "tiny/fake"
    with server.openai("wrong-key-0123456789") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    for header in (None, "", "Bearer", "Basic " + KEYS[0], KEYS[0], "Bearer \xe9"):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        response = server.client.post("/v1/completions", content=b"{}", headers=headers)
        found = response.json()["error"]
        assert (response.status_code, found["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "key-0123456789" not in response.text
    wait_until(lambda: json.dumps(log()).count('"status": 401') == 7)
    text = json.dumps(log()) + repr(ServerSettings(api_keys=KEYS))
    assert "key-0123456789" not in text


def test_every_key_is_compared_behind_a_match() -> None:
    keys = ApiKeys(KEYS)
    assert KEYS[0] in keys and KEYS[1] in keys
    assert "" not in keys and KEYS[0][:-1] not in keys and "\xff" not in keys


def test_reading_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEYS[0]}  # of a team\n\n")
    environment = {"PRUNE_LLM_API_KEYS": f"{KEYS[1]}, {KEYS[0]},"}
    assert read_api_keys(file, environment) == KEYS
    assert read_api_keys(None, {}) == ()
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_api_keys(file, {})
    file.write_text("\ntoo-short-SECRET\n"[:12])
    with pytest.raises(ValueError, match=r"line 2\): has 11 characters; give at least 16") as short:
        read_api_keys(file, {})
    assert "too-short" not in str(short.value)
    with pytest.raises(ValueError, match=r"number 1.*printable ASCII"):
        read_api_keys(None, {"PRUNE_LLM_API_KEYS": "with blanks in it, and more"})


def test_body_limit(start: Any) -> None:
    server = start(max_body_bytes=100_000)
    headers = {"Content-Type": "application/json"}

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 10_000

    for content in (b" " * 300_000, chunks()):
        response = server.client.post("/v1/completions", content=content, headers=headers)
        found = response.json()["error"]
        assert (response.status_code, found["code"]) == (413, "request_too_large")
        assert "100000 bytes" in found["message"]
    fits = json.dumps({"model": "tiny/fake", "prompt": "x", "max_tokens": 1}).encode()
    fits += b" " * (100_000 - len(fits))
    ok = server.client.post("/v1/completions", content=fits, headers=headers)
    assert ok.status_code == 200
    assert server.engine.opened == 1


def raw(server: Any, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.settimeout(10)
    connection.sendall(data)
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """All that the server sends: a head and its body may come in packets of their own."""
    return b"".join(iter(lambda: connection.recv(10_000), b""))


def test_bodies_and_headers_must_arrive_in_time(start: Any) -> None:
    server = start(read_seconds=1.0)  # enough for a head on a busy machine
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with raw(server, head + b"Content-Length: 50\r\n\r\n{") as connection:
        answer = until_closed(connection)
        assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 1 seconds" in answer
    began = time.monotonic()
    with raw(server, head) as connection:
        assert until_closed(connection) == b""
    assert time.monotonic() - began < 5


def test_no_origin_by_default(server: Any, start: Any) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    closed = server.client.options("/v1/completions", headers=asked)
    assert closed.status_code == 405
    assert "access-control-allow-origin" not in closed.headers
    open_ = start(cors_origins=("https://page.example",), api_keys=KEYS)
    response = open_.client.options("/v1/completions", headers=asked)
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    # a page may read why it was refused
    refused = open_.client.post("/v1/completions", headers={"Origin": "https://page.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
    other = open_.client.options("/v1/completions", headers={**asked, "Origin": "https://evil"})
    assert "access-control-allow-origin" not in other.headers


def test_prompts_are_logged_only_if_asked(start: Any, log: Any, wait_until: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 1}
    server = start()
    server.complete(prompt="my secret")
    server.post("/v1/chat/completions", **chat)
    server.post("/v1/completions", prompt="my secret", temperature="my secret")
    server.post("/v1/completions", prompt=["my secret"], suffix="my secret")
    wait_until(lambda: json.dumps(log()).count('"status"') == 4)
    assert "secret" not in json.dumps(log())
    server = start(log_prompts=True)
    server.complete(prompt="my secret")
    server.post("/v1/chat/completions", **chat)
    wait_until(lambda: json.dumps(log()).count('"status"') == 6)
    found = [line["prompt"] for line in log() if "prompt" in line]
    assert found == [["my secret"], chat["messages"]]
