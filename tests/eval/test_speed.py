"""The speed report: what it measures, what it refuses; a wrong result is not timed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm.cli_bench import print_speed
from prune_llm_eval import linear_speed, speed
from prune_llm_eval.clock import clock, threads_on
from prune_llm_eval.decode_speed import DecodeRow
from prune_llm_eval.linear_speed import LinearRow, check_linears, time_linear
from prune_llm_eval.resident import Resident
from prune_llm_eval.speed import SpeedConfig, SpeedReport, measure
from prune_llm_kernels import to_channels
from prune_llm_kernels.reference import pack

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("dense"), llama_config(), torch.bfloat16)


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "out"
    prune(dense, PruneConfig(method="magnitude"), output)
    return output


def test_report_of_a_packed_model(packed: Path) -> None:
    config = SpeedConfig(
        contexts=(5, 20), tokens=4, rounds=1, threads=(1, 2), batches=(1, 3), device="cpu"
    )
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
    real = linear_speed.sparse_linear
    monkeypatch.setattr(linear_speed, "sparse_linear", lambda x, w: real(x, w) + 1)
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
        ({"device": "tpu"}, "device 'tpu': unknown; choose one of auto, cpu, cuda, cuda:N"),
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
        "--threads", 1, "--no-linears", "--device", "cpu", "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "decoding, tokens/s" in result.stdout and "memory: loading" in result.stdout
    line = json.loads(result.stdout.splitlines()[-1])
    assert line == json.loads(file.read_text()) and line["about"]["against"] == dense.name
    assert line["linears"] == []
    assert line["about"]["device"] == "cpu" and "isa" in line["about"]
    refused = cli("bench", dense)
    assert refused.exit_code == 2 and "holds no packed weights" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "device 'gpu': unknown"), ("cuda:99", "device 'cuda:99': this machine has")],
)
def test_a_device_that_does_not_exist(cli: Callable[..., Any], device: str, message: str) -> None:
    result = cli("bench", "nowhere", "--device", device)  # before the model is looked for
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {message}")


# -- a GPU, as far as it can be followed without one ------------------------------------------


def test_a_gpu_has_no_threads() -> None:
    assert SpeedConfig().thread_counts(CUDA) == (None,)
    with pytest.raises(ValueError, match="threads 1, 2: cuda:0 has none; leave them out"):
        SpeedConfig(threads=(1, 2)).thread_counts(CUDA)
    assert threads_on(CUDA) is None and threads_on(torch.device("cpu")) == torch.get_num_threads()


def test_nothing_of_the_cpu_is_told_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    parts: Any = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.bfloat16)
    about = speed._about("some/model", None, parts)
    assert about["device"] == "cuda:1" and about["gpu"] == "A GPU"
    assert not {"cpu", "isa", "thread_pool"} & about.keys()
    rows = [LinearRow("q", 4, 8, 0.5, 1, None, 6.0, 4.0, 2.0, 100, 60, 40.0, False)]
    decodes = [DecodeRow(5, None, 10.0, 7.0, 4.0, 0.1, 0.2, 300, 4000.0)]
    text = io.StringIO()
    print_speed(Console(file=text, width=120), SpeedReport(about, None, rows, decodes))
    assert "device cuda:1, gpu A GPU" in text.getvalue()
    for absent in ("memory:", "isa", "None"):
        assert absent not in text.getvalue()


def test_linears_of_a_gpu_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form that a GPU decodes, by the CPU's kernels."""
    torch.manual_seed(0)
    dense = [torch.where(torch.rand(40, 24) < 0.5, torch.randn(40, 24), 0) for _ in range(2)]
    weights = [to_channels(pack(weight)) for weight in dense]
    check_linears({str(place): weight for place, weight in enumerate(weights)})
    pairs = list(zip(weights, dense, strict=True))
    row = time_linear("q_proj", pairs, 1, 2, torch.ones(1 << 16, dtype=torch.int64))
    assert row.packed_seconds > 0 and row.packed_bytes == weights[0].nbytes
    assert row.sparsity == pytest.approx(float((dense[0] == 0).float().mean()))
    real = linear_speed.channel_linear
    monkeypatch.setattr(linear_speed, "channel_linear", lambda x, w: real(x, w) * 1.1)
    with pytest.raises(RuntimeError, match="not timed"):
        check_linears({"q": weights[0]})


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called once to compile, once to record; then replayed between two events."""
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 6.0  # milliseconds

    graph = SimpleNamespace(replay=lambda: happened.append("replay"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda found: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    run = clock([partial(happened.append, "a"), partial(happened.append, "b")], CUDA)
    assert happened == ["a", "b", "wait", "a", "b"]
    happened.clear()
    assert run() == [0.003, 0.003]
    assert happened == ["wait", "event", "replay", "event", "wait"]
