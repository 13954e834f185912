"""`prune-llm serve`: options, refusals, the line when it is ready."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

# stands for the engine beside the server, in this process or another
FAKE_MODULE = """
from dataclasses import dataclass
from fake_engine import FakeEngine

@dataclass(frozen=True)
class EngineConfig:
    model: str
    served_name: str
    levels: bool = True
    max_rows: int = 0
    chunk_tokens: int = 0
    cache_bytes: int = 0
    max_queue: int = 0
    default_level: str | None = None
    device: str = ""
    threads: int | None = None
    trust_remote_code: bool = False
    load_seconds: float = 0.0
    stuck_seconds: float = 0.0
    max_restarts: int = 0

class EmbeddedEngine(FakeEngine):
    configs = []

    def __init__(self, config, on_dead):
        super().__init__()
        self.configs.append(config)
        if config.model == "missing":
            self.start_error = ValueError("model 'missing': is no directory")
"""
MAIN = f"""
import sys, types
fake = types.ModuleType("prune_llm_server.embedded")
sys.modules["prune_llm_server.embedded"] = fake
exec({FAKE_MODULE!r}, fake.__dict__)
from prune_llm.cli import main
main()
"""


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = types.ModuleType("prune_llm_server.embedded")
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    exec(FAKE_MODULE, fake.__dict__)
    return fake


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port 70000: must be in [0, 65535]"),
        (["--host", "192.0.2.1"], "host 192.0.2.1, port 8000: cannot listen there"),
        (["--max-rows", "0"], "--max-rows"),
        (["--kv-cache-gb", "0"], "--kv-cache-gb"),
        (["--load-seconds", "0"], "--load-seconds"),
        (
            ["--api-key-file", "nowhere"],
            "api_key_file 'nowhere': cannot be read (No such file or directory); give a file",
        ),
    ],
)
def test_bad_values_are_one_line(cli: Any, embedded: Any, options: list[str], message: str) -> None:
    result = cli("serve", "some/model", *options)
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device 'tpu': unknown; choose one of auto, cpu, cuda, cuda:N"),
        ("cuda:x", "device 'cuda:x': unknown"),
        ("cuda:99", "device 'cuda:99': this machine has "),
    ],
)
def test_a_device_that_does_not_exist_starts_nothing(
    cli: Any, embedded: Any, device: str, message: str
) -> None:
    result = cli("serve", "missing", "--port", "0", "--device", device)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {message}")
    assert embedded.EmbeddedEngine.configs == []


def test_a_model_that_does_not_load_is_one_line(cli: Any, embedded: Any) -> None:
    result = cli("serve", "missing", "--port", "0")
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1] == "error: model 'missing': is no directory"


def test_options_reach_the_engine(cli: Any, embedded: Any) -> None:
    cli(
        "serve", "missing", "--port", "0", "--served-model-name", "name", "--max-rows", "8",
        "--chunk-tokens", "64", "--kv-cache-gb", "1.5", "--max-queue", "9", "--default-level",
        "40%", "--no-levels", "--device", "cpu", "--threads", "2", "--trust-remote-code",
        "--load-seconds", "90", "--stuck-seconds", "2.5", "--max-restarts", "0",
    )  # fmt: skip
    assert embedded.EmbeddedEngine.configs == [
        embedded.EngineConfig(
            *("missing", "name", False, 8, 64, 1_500_000_000, 9, "40%", "cpu", 2, True),
            *(90.0, 2.5, 0),
        )
    ]


def test_without_the_extra(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def missing(name: str, package: str | None = None) -> Any:
        return None if name == "fastapi" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    result = cli("serve", "some/model")
    assert result.exit_code == 2
    assert "needs fastapi" in result.stderr and "prune-llm[serve]" in result.stderr


@dataclass
class Served:
    line: str
    log: str
    code: int


def serve(tmp_path: Path, *options: str) -> Served:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", "some/tiny", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        url = line.split(" at ")[1].split("/v1")[0].replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(url + "/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
    return Served(line, log.read_text(), code)


def test_serving(tmp_path: Path) -> None:
    served = serve(tmp_path, "--host", "0.0.0.0")
    assert served.line.startswith("serving tiny/fake at http://0.0.0.0:")
    assert served.line.endswith("/v1: context 256 tokens, KV cache 1 GB")
    assert served.code == 0
    assert "0.0.0.0 can be reached from other machines and no API key is set" in served.log
    assert all(line.startswith('{"time": ') for line in served.log.splitlines())
