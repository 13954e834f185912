"""The command line: what it prints, and one line with exit code 2 for bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_prune_prints_the_table_and_writes(
    cli: Cli, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    result = cli(
        "prune", tiny_llama, "-o", tmp_path / "out", "--method", "wanda", "--pattern", "2:4",
        "--calibration", corpus, "--samples", 4, "--seq-len", 64,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("wanda 2:4", "mlp.down_proj", "total", "50.00%", "verified", "byte-identical"):
        assert text in result.output
    assert max(len(line) for line in result.output.splitlines()[:12]) <= 80
    assert (tmp_path / "out" / "prune_report.json").is_file()


BAD = [
    (["--method", "foo"], "method 'foo': unknown; choose one of"),
    (["--pattern", "4:2"], "pattern '4:2'"),
    (["--pattern", "0:4"], "pattern '0:4'"),
    (["--sparsity", "1.2"], "sparsity '1.2'"),
    (["--sparsity", "2:4"], "N:M goes to --pattern"),
    (["--sparsity", "0.5", "--pattern", "2:4"], "give one of --sparsity, --pattern and"),
    (["--samples", "abc"], "'abc' is not a valid integer"),
    (["--calibration", "none.txt"], "no such file"),
    (["--device", "cuda:99"], "CUDA devices that torch can use"),
    (["--ignore", "nothing"], "matches no linear"),
    (["--seq-len", "999999"], "seq_len 999999: the model's context is 128 tokens"),
    (["--colour", "red"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    cli: Cli, arguments: list[str], message: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    given = ["prune", tiny_llama, "-o", tmp_path / "out", "--calibration", corpus, *arguments]
    result = cli(*given)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_text_shorter_than_a_sample(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("twenty bytes of text")
    result = cli("prune", tiny_llama, "-o", tmp_path / "out", "--calibration", text)
    assert result.exit_code == 2
    assert "20 tokens" in result.stderr and "needs 128" in result.stderr


def test_output_that_is_not_empty(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep me")
    result = cli("prune", tiny_llama, "-o", tmp_path)
    assert result.exit_code == 2 and "exists and is not empty" in result.stderr
    assert (tmp_path / "mine").read_text() == "keep me"


def test_traceback_on_request(cli: Cli, tmp_path: Path) -> None:
    result = cli("--traceback", "prune", tmp_path, "-o", tmp_path / "out")
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_its_first_block_a_run_leaves_nothing(
    which: signal.Signals, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """Stop while it works: no output, no working directory, no zero exit code."""
    command = [sys.executable, "-m", "prune_llm", "prune", str(tiny_llama), "-o", "out",
               "--calibration", str(corpus), "--samples", "100", "--seq-len", "64",
               "--batch-size", "1", "--reconstruction", "block"]  # fmt: skip
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        env=os.environ,
        # a shell that started the tests in the background made them ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".out.partial").is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        run.send_signal(which)
        assert run.wait(timeout=60) != 0
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option(cli: Cli) -> None:
    from dataclasses import fields

    from prune_llm import PruneConfig

    text = cli("prune", "--help").output
    flags = {f.name: f.name.replace("_", "-") for f in fields(PruneConfig)} | {"overrides": "set"}
    missing = [name for name, flag in flags.items() if "--" + flag not in text]
    assert missing == []
