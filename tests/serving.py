"""Servers that run: in a thread of this process, or as `prune-llm serve` in one of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import openai
import torch
from tiny_models import add_levels, llama_config, save_model

from prune_llm_server.app import create_app
from prune_llm_server.lifecycle import Lifecycle
from prune_llm_server.runner import serve
from prune_llm_server.settings import ServerSettings

MODEL = "tiny/fake"


@dataclass
class Running:
    """A server that runs; `client` sends plain HTTP, `openai` is the official client."""

    engine: Any
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
def running(engine: Any, settings: ServerSettings) -> Iterator[Running]:
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
    assert listening.wait(60)
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


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for it, or fail."""
    due = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < due, "it did not happen"
        time.sleep(0.01)


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
)


def save_served(directory: Path) -> Path:
    """A random sparse model with two levels, 30% and 60%, and a chat template."""
    import prune_llm

    config = llama_config(max_position_embeddings=256)
    dense = save_model(directory / "dense", config)
    model = prune_llm.load(dense)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight[weight.abs() < weight.abs().median()] = 0
    model.save_pretrained(dense)
    prune_llm.export(dense, directory / "sparse", "sparse")
    table = add_levels(prune_llm.load(directory / "sparse"))
    file = directory / "sparse" / "config.json"
    saved = json.loads(file.read_text())
    saved["quantization_config"]["activation"] = table.to_json()
    file.write_text(json.dumps(saved))
    (directory / "sparse" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory / "sparse"


def ask(url: str, path: str = "/v1/completions", **body: Any) -> socket.socket:
    """Send a request by hand and leave the answer unread."""
    content = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    connection.sendall(
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (path.encode(), len(content), content)
    )
    return connection


# none: to read them takes 50 ms a request, in which others that should run beside it end
CERTIFICATES = False


def metric(url: str, name: str) -> float:
    """The sum of a metric's values, whatever their labels."""
    text = httpx.get(url + "/metrics", verify=CERTIFICATES).text
    found = re.findall(rf"^prune_llm:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert found, name
    return sum(map(float, found))


@dataclass
class Process:
    """`prune-llm serve` in a process of its own."""

    process: subprocess.Popen[str]
    log_file: Path
    url: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def workers(self) -> list[int]:
        return children(self.pid)

    @property
    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def status(self, path: str) -> int:
        return httpx.get(self.url + path, timeout=20, verify=CERTIFICATES).status_code

    def complete(self, prompt: str, max_tokens: int = 16, **body: Any) -> httpx.Response:
        fields = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return httpx.post(
            self.url + "/v1/completions",
            json={**fields, **body},
            timeout=60,
            verify=CERTIFICATES,
        )


@contextmanager
def starting(model: Path, log: IO[str], *options: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prune_llm", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--served-model-name", "tiny", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def served(model: Path, log_file: Path, *options: str) -> Iterator[Process]:
    """A process that is ready, or has ended before it was."""
    with log_file.open("w") as log, starting(model, log, *options) as process:
        found = Process(process, log_file)
        assert process.stdout is not None
        if line := process.stdout.readline().strip():
            found.url = line.split(" at ")[1].split("/v1")[0]
        yield found


def children(pid: int) -> list[int]:
    """Processes that a process started and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
