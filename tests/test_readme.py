"""The README's commands are run as printed, on the bundled model and small text."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# run by a person or by CI itself, not inside the tests
NOT_HERE = ("git clone", "cd ", "make ", "pip install", "python -m prune_llm.demo.train")

# what a command is in this environment
MODULES = {"prune-llm": "prune_llm", "torchrun": "torch.distributed.run"}


def shell_commands() -> list[str]:
    """Lines of the README's sh blocks, continuation lines joined, comments cut."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.partition("  #")[0].strip() for line in lines]
    return [c for c in commands if c and not c.startswith("#")]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the README calls MODEL, calibration.txt, held_out.txt and my-tasks."""
    from prune_llm.demo import model_path, text

    place = tmp_path_factory.mktemp("readme")
    (place / "MODEL").symlink_to(model_path())
    (place / "calibration.txt").write_text(text("calibration", 200))
    (place / "held_out.txt").write_text(text("held_out", 40))
    write_tasks(place / "my-tasks")
    return place


def write_tasks(place: Path) -> None:
    """The task file that the README shows, and its data: which word comes next in a story."""
    from prune_llm.demo import stories

    place.mkdir()
    (task,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (place / "next_word.yaml").write_text(task)
    words = [story.split()[:40] for story in stories("held_out", 30)]
    lines = [
        {"text": " ".join(own[:20]), "choices": [own[20], other[30]], "label": 0}
        for own, other in pairwise(words)
    ]
    (place / "next_word.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_every_command_runs_in_order(workplace: Path) -> None:
    ran = 0
    for command in shell_commands():
        if command.startswith(NOT_HERE):
            continue
        words = shlex.split(command)
        assert words[0] in MODULES, f"README shows a command that no test runs: {command}"
        if words[1] == "serve" or "--url" in words:
            continue  # runs until it is told to end: see below
        done = subprocess.run(
            [sys.executable, "-m", MODULES[words[0]], *words[1:]],
            cwd=workplace,
            env=os.environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 4


def test_python_blocks_run(workplace: Path) -> None:
    blocks = [block for block in python_blocks() if "openai" not in block]
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_the_servers_client_gets_its_answer(workplace: Path) -> None:
    (command,) = [line for line in shell_commands() if line.startswith("prune-llm serve")]
    (client,) = [block for block in python_blocks() if "openai" in block]
    assert ":8000/" in client and command.endswith("--port 8000")
    words = [*shlex.split(command)[1:-1], "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "prune_llm", *words],
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline()
            (port,) = re.findall(r"http://127.0.0.1:(\d+)/v1", ready)
            done = subprocess.run(
                [sys.executable, "-c", client.replace(":8000/", f":{port}/")],
                capture_output=True,
                text=True,
            )
            (asking,) = [line for line in shell_commands() if "--url" in line]
            scored = subprocess.run(
                [sys.executable, "-m", "prune_llm", *shlex.split(asking.replace("8000", port))[1:]],
                cwd=workplace,
                capture_output=True,
                text=True,
            )
        finally:
            server.terminate()
        assert scored.returncode == 0, scored.stderr
        assert "skipping (served)" in scored.stdout
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) > 20
        assert server.wait(60) == 0


def test_named_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"`make ([a-z]+)`", README)) | set(
        re.findall(r"^make (\w+)", README, re.M)
    )
    assert used and used <= targets
