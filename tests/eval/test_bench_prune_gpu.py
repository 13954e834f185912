"""The GPU pruning benchmark runs on a tiny shape without a GPU, and says so where it needs one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "eval" / "bench" / "bench_prune_gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_dry_run_prunes_by_both_methods() -> None:
    done = run("--tiny", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["method"] for line in lines] == ["wanda", "sparsegpt"]
    for line in lines:
        assert abs(line["sparsity"] - 0.5) < 1e-3
        assert line["predicted"]["gpu"] is None and "gpu" not in line["peak_memory"]
        assert "within_seconds" not in line  # nothing was measured that a target is for


def test_an_absent_device_ends_in_one_line() -> None:
    done = run("--device", "cuda:99")
    assert done.returncode == 2
    assert "CUDA devices" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
