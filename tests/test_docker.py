"""The container's files: what can be known without an engine. docker/check.sh executes them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from prune_llm.cli_serve import serve_command

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
TARGETS = ("cpu", "cuda")


def load_reader() -> ModuleType:
    """docker/dockerfile.py: the folder is no package."""
    spec = importlib.util.spec_from_file_location("dockerfile", DOCKER / "dockerfile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reader = load_reader()
dockerfile = reader.parse((DOCKER / "Dockerfile").read_text())


def instructions(target: str, name: str) -> list[Any]:
    """Of a target and what it is built on, in order."""
    chain = dockerfile.chain(target)
    return [found for stage in chain for found in stage.instructions if found.name == name]


def everything() -> Iterator[Any]:
    for stage in dockerfile.stages.values():
        yield from stage.instructions


def test_cpu_is_the_default_target() -> None:
    assert set(TARGETS) < set(dockerfile.stages)
    assert list(dockerfile.stages)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_is_root(target: str) -> None:
    order = [found for stage in dockerfile.chain(target) for found in stage.instructions]
    names = [found.name for found in order]
    users = [found.text for found in order if found.name == "USER"]
    assert len(users) == 1 and re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[0])
    assert names.index("USER") < names.index("ENTRYPOINT")


@pytest.mark.parametrize("target", TARGETS)
def test_what_it_runs(target: str) -> None:
    (entry,), (command,) = instructions(target, "ENTRYPOINT"), instructions(target, "CMD")
    assert entry.exec_form() == ["prune-llm"]
    assert command.exec_form() == ["serve", "/model", "--host", "0.0.0.0"]
    assert [found.text for found in instructions(target, "STOPSIGNAL")] == ["SIGTERM"]
    assert [found.text for found in instructions(target, "EXPOSE")] == ["8000"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_runtime_gets_only_the_environment(target: str) -> None:
    (copied,) = instructions(target, "COPY")
    assert copied.flags == (("from", f"environment-{target}"),)
    assert copied.text == "/opt/prune_llm /opt/prune_llm"
    assert not any("apt-get" in found.text for found in instructions(target, "RUN"))


def test_torch_is_the_version_of_everything_else() -> None:
    pinned = {
        file: set(re.findall(r"\btorch==([\d.]+)", (ROOT / file).read_text()))
        for file in ("Makefile", "constraints.txt", "docker/Dockerfile")
    }
    assert all(len(versions) == 1 for versions in pinned.values()), pinned
    assert len(set.union(*pinned.values())) == 1, pinned
    # one for each target, alone
    installed = [f.text for f in everything() if f.name == "RUN" and "torch==" in f.text]
    assert len(installed) == 2 and all("--no-deps" in text for text in installed)


def test_every_version_is_exact() -> None:
    (base,) = dockerfile.arguments
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11-slim-[a-z]+", base.text)
    for found in everything():
        if found.name == "RUN" and "pip install" in found.text:
            words = shlex.split(found.text)[2:]
            assert all("==" in word or word.startswith("--") for word in words)
        elif found.name == "RUN" and " install " in found.text and "[serve]" in found.text:
            assert "--constraint /src/constraints.txt" in found.text


def test_nothing_from_elsewhere_and_no_key() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    # the reader refuses ADD; what RUN fetches comes from package indexes
    assert not re.search(r"^\s*ADD\b|\bcurl\b|\bwget\b|\bgit clone\b", text, re.MULTILINE)
    for found in everything():
        if found.name in ("ARG", "ENV"):
            name = found.text.partition("=")[0]
            assert not re.search("key|token|password|secret", name, re.IGNORECASE)
    assert "PRUNE_LLM_API_KEYS" not in text


def test_what_it_copies_is_there_and_not_ignored() -> None:
    patterns = reader.read_patterns((DOCKER / "Dockerfile.dockerignore").read_text())
    for found in everything():
        if found.name == "COPY" and not found.flags:
            for source in found.text.split()[:-1]:
                seen = [ROOT / source, *(ROOT / source).rglob("*")]
                files = [str(path.relative_to(ROOT)) for path in seen if path.is_file()]
                assert any(not reader.ignored(file, patterns) for file in files), source
    for file in (
        "prune_llm/demo/model/model.safetensors",
        "kernels/csrc/linear.cpp",
        "kernels/prune_llm_kernels/_C.pyi",
        "server/prune_llm_server/app.py",
    ):
        assert (ROOT / file).is_file() and not reader.ignored(file, patterns)
    for file in (
        ".git/config",
        ".venv/bin/python",
        "tests/test_docker.py",
        "kernels/prune_llm_kernels/_C.cpython-311-x86_64-linux-gnu.so",
        "prune_llm/__pycache__/cli.cpython-311.pyc",
        "eval/reports/LOG.md",
    ):
        assert reader.ignored(file, patterns), file


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that gives this status; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def health_code() -> str:
    (found,) = instructions("cpu", "HEALTHCHECK")
    assert instructions("cuda", "HEALTHCHECK") == [found]
    python, flag, code = found.exec_form()
    assert (python, flag) == ("python", "-c")
    assert "8000" in code
    return str(code)


def exit_code(health_code: str, port: int) -> int:
    code = health_code.replace("8000", str(port))
    # a proxy is for other machines
    environment = {"http_proxy": "http://127.0.0.1:9"}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env=environment, stderr=subprocess.DEVNULL, check=False).returncode


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (404, 1)])
def test_the_health_check(health_code: str, status: int, expected: int) -> None:
    with answering(status) as port:
        assert exit_code(health_code, port) == expected


def test_the_health_check_without_a_server(health_code: str) -> None:
    with answering(200) as port:
        pass
    assert exit_code(health_code, port) == 1


def test_compose_names_what_there_is() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    (service,) = compose["services"].values()
    assert service["build"]["target"] in TARGETS
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert service["read_only"] and service["mem_limit"] and service["healthcheck"]
    assert service["ports"] == ["127.0.0.1:${PORT:-8000}:8000"]
    assert set(service["secrets"]) == set(compose["secrets"])
    known = {option for parameter in serve_command.params for option in parameter.opts}
    used = {word.partition("=")[0] for word in service["command"] if word.startswith("--")}
    assert used <= known
    assert "--api-key-file=/run/secrets/api_keys" in service["command"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM a AS b\nADD https://example.org/x /x", "ADD is not one of"),
        ("FROM a", "give FROM base AS name"),
        ("RUN x\nFROM a AS b", "RUN before FROM"),
        ("FROM a AS b\nRUN <<END", "here-documents"),
        ("FROM a AS b\nRUN x \\", "does not end"),
    ],
)
def test_the_reader_refuses_what_it_does_not_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader.parse(text)
