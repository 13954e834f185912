"""The speed report: what it measures, what it refuses; a wrong result is not timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm_eval import speed
from prune_llm_eval.speed import DecodeRow, LinearRow, Resident, SpeedConfig, measure


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("dense"), llama_config(), torch.bfloat16)


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "out"
    prune(dense, PruneConfig(method="magnitude"), output)
    return output


def test_report_of_a_packed_model(packed: Path) -> None:
    config = SpeedConfig(contexts=(5, 20), tokens=4, rounds=1, threads=(1, 2), batches=(1, 3))
    seen: list[tuple[int, int]] = []
    report = measure(
        str(packed), None, config, lambda _what, done, total: seen.append((done, total))
    )
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [(row.kind, row.batch, row.threads) for row in report.linears] == [
        (kind, batch, threads) for threads in (1, 2) for batch in (1, 3) for kind in kinds
    ]
    for row in report.linears:
        assert row.packed_seconds > 0 and row.torch_seconds > 0 and row.cached
        assert row.sparsity == pytest.approx(0.5, abs=0.1)
    assert [(row.context, row.threads) for row in report.decodes] == [
        (5, 1),
        (20, 1),
        (5, 2),
        (20, 2),
    ]
    for decode in report.decodes:
        assert min(decode.packed, decode.own_dense, decode.transformers, decode.bandwidth) > 0
    stored = sum(f.stat().st_size for f in packed.glob("*.safetensors"))
    assert report.resident.weights == pytest.approx(stored, rel=0.1)
    assert report.resident.imported > 50e6
    assert seen[-1][0] < seen[-1][1] == 32
    found = json.loads(report.json_line())
    assert found["decodes"][0] == asdict(report.decodes[0])


def test_what_rows_derive() -> None:
    row = LinearRow("q", 4, 8, 0.5, 1, 1, 6.0, 4.0, 2.0, 100, 60, 40.0, False)
    assert row.speed_up == 3.0 and row.limit == pytest.approx(60 / 40 / 2)
    decode = DecodeRow(5, 1, 10.0, 7.0, 4.0, 0.1, 0.2, 300, 4000.0)
    assert decode.speed_up == 2.5 and decode.limit == pytest.approx(0.75)
    assert Resident(1000, 130, 100, 20).other == 10


def test_a_wrong_kernel_is_not_timed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed.sparse_linear
    monkeypatch.setattr(speed, "sparse_linear", lambda x, w: real(x, w) + 1)
    with pytest.raises(RuntimeError, match=r"wrong by .* not timed"):
        measure(str(packed), None, SpeedConfig(contexts=(4,), tokens=2), lambda *_: None)


def test_dense_models_and_other_shapes_are_refused(
    dense: Path, packed: Path, tmp_path: Path
) -> None:
    config = SpeedConfig(contexts=(4,), tokens=2)
    with pytest.raises(ValueError, match="holds no packed weights"):
        measure(str(dense), None, config, lambda *_: None)
    other = save_model(tmp_path / "wide", llama_config(intermediate_size=120), torch.bfloat16)
    with pytest.raises(ValueError, match=r"has no linear \[100, 64\]"):
        measure(str(packed), str(other), config, lambda *_: None)
    long = SpeedConfig(contexts=(120,), tokens=20)
    with pytest.raises(ValueError, match="140 together, the model's context is 128"):
        measure(str(packed), None, long, lambda *_: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contexts": ()}, "contexts: give at least one"),
        ({"contexts": (0,)}, "contexts 0"),
        ({"tokens": 1}, "tokens 1: must be at least 2"),
        ({"rounds": 0}, "rounds 0"),
        ({"threads": (-1,)}, "threads -1"),
        ({"batches": (0,)}, "batches 0"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeedConfig(**settings)


def test_bench_command(cli: Callable[..., Any], packed: Path, dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    result = cli(
        "bench", packed, "--against", dense, "--context", 6, "--tokens", 3, "--rounds", 1,
        "--threads", 1, "--no-linears", "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "decoding, tokens/s" in result.stdout and "memory: loading" in result.stdout
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == json.loads(file.read_text()) and line["about"]["against"] == dense.name
    assert line["linears"] == []
    refused = cli("bench", dense)
    assert refused.exit_code == 2 and "holds no packed weights" in " ".join(refused.output.split())
