"""The GPU benchmark from beginning to end, tiny and interpreted: typos show before a GPU does."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench" / "bench_gpu.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_dry_run(bench: ModuleType, tmp_path: Path) -> None:
    bench.main(["--dry-run", "--out", str(tmp_path / "gpu")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    products = [row for row in found["rows"] if row["kind"] == "product" and "speedup" in row]
    assert {row["case"] for row in products} >= {"A50", "W50", "W50A50"}
    assert {row["rows"] for row in products} == {1, 5}
    steps = [row["case"] for row in found["rows"] if row["kind"] == "step"]
    assert steps == ["W0", "W50A50"]
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("\n| o |") == len([row for row in found["rows"] if row.get("shape") == "o"])
    assert "left out: torch 2:4" in text


def test_no_time_is_said(bench: ModuleType, tmp_path: Path) -> None:
    bench.main(["--dry-run", "--seconds", "0", "--out", str(tmp_path / "gpu")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "step W0: no time left" in found["skipped"]
    assert {row["kind"] for row in found["rows"]} == {"check", "read"}


def test_bytes_are_those_of_the_channels_read(bench: ModuleType) -> None:
    weight = bench.random_weight(300, 64, 0.5, bench.DRY)
    active = torch.zeros(64, dtype=torch.bool)
    active[::2] = True
    kept = (weight != 0)[:, active].sum(0)
    stored = bench.form(weight, 0.5)
    exact = sum(512 // 8 + int(count) * 2 for count in kept)
    assert exact <= bench.read_bytes(stored, active) < exact + 16 * 32
    assert bench.read_bytes(bench.form(weight, 0.0), active) == 32 * 300 * 2


def test_a_wrong_result_stops_the_run(bench: ModuleType) -> None:
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    with pytest.raises(SystemExit, match="a case: wrong by"):
        bench.check(torch.zeros(1, 4), x, weight, "a case")


def test_without_a_gpu_it_says_what_to_do(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no CUDA device; --dry-run"):
        bench.main([])
