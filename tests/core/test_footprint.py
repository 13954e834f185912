"""What a run needs is foreseen by the documented formula, and what cannot fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm.calibration import Calibration
from prune_llm.footprint import LATER, Footprint, available_memory, footprint, streams_on_disk
from prune_llm.job import Job
from prune_llm.methods import METHODS
from prune_llm.refinement import REFINEMENTS
from prune_llm.solver_copies import AIMED, FACTORING, GROUPS, REFINED, UNSTRUCTURED

# of one block of the model below
D, F, KV = 64, 100, 32
SITES = [(D, [D * D, D * KV, D * KV]), (D, [D * D]), (D, [D * F, D * F]), (F, [D * F])]
LINEARS = sum(sum(sizes) for _, sizes in SITES)
BLOCK = LINEARS + 2 * D


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "it", llama_config(), torch.bfloat16)


def foreseen(model: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Job, Footprint]:
    monkeypatch.setattr("prune_llm.footprint.resident_memory", lambda: 1000)
    monkeypatch.setattr("prune_llm.footprint.slow_dtypes", dict)
    text = Calibration(torch.zeros(6, 32, dtype=torch.int64), "none", 1, 192)
    config = PruneConfig(**{"method": "wanda", "device": "cpu", **changes})
    job = Job.open(model, config, torch.device("cpu"), None, text)
    job.hashing.result()
    return job, footprint(job)


def test_every_method_was_measured() -> None:
    assert UNSTRUCTURED.keys() == GROUPS.keys() == METHODS.keys()
    assert REFINED.keys() == set(REFINEMENTS)


def test_sparsegpt_by_hand(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = foreseen(model, monkeypatch, method="sparsegpt")
    taken = UNSTRUCTURED["sparsegpt"]
    solving = []
    for number, (width, sizes) in enumerate(SITES):
        gram, site, one = 4 * width**2, 4 * sum(sizes), 4 * max(sizes)
        grams = sum(4 * other**2 for other, _ in SITES[number:])  # those that wait, and this one
        sweeping = taken.grams * gram + taken.site * site + taken.linear * one
        solving.append(grams + site + max(sweeping, FACTORING["sparsegpt"].grams * gram))
    stream = 6 * 32 * D * 2
    assert found.streams == stream and not found.on_disk
    # in so small a model a batch through the block may take more
    running = max(int(max(solving)), 6 * 32 * F * (3 * 2 + 4))
    assert found.memory == 1000 + LATER + stream + 2 * BLOCK + running


def test_products_in_float32_are_foreseen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plain = foreseen(model, monkeypatch)
    monkeypatch.setattr("prune_llm.footprint.slow_dtypes", lambda: {torch.bfloat16: 64})
    assert footprint(job).memory - plain.memory == 4 * 6 * 32 * F + 4 * D * F


def test_the_dense_target_keeps_two_streams_and_two_blocks(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = foreseen(model, monkeypatch)
    _, dense = foreseen(model, monkeypatch, target="dense")
    assert dense.streams == 2 * plain.streams
    assert dense.memory >= plain.memory + plain.streams + 2 * BLOCK
    assert AIMED.grams >= 4  # a factor, and the matrix it is made of, both in float64


def test_the_disk_holds_the_parts_and_the_output(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, found = foreseen(model, monkeypatch, format="dense")
    assert found.disk == 3 * 2 * LINEARS + job.checkpoint.nbytes
    _, packed = foreseen(model, monkeypatch)
    parts = 3 * (LINEARS + LINEARS // 8)
    assert packed.disk == pytest.approx(2 * parts + job.checkpoint.nbytes - 3 * 2 * LINEARS, abs=9)


def test_what_is_reported(model: Path, corpus: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    config = PruneConfig(
        method="wanda", calibration=str(corpus), samples=4, seq_len=32, device="cpu"
    )
    report = prune(model, config, tmp_path / "out", on_note=notes.append)
    predicted = report.predicted["memory"]
    assert predicted - LATER > report.predicted["held"]
    assert len(notes) == 1 and notes[0].startswith("needs about ")
    output = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert output < report.predicted["disk"] < 2.5 * output


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_streams_go_to_disk_where_they_take_too_much(
    share: float, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, found = foreseen(model, monkeypatch)
    monkeypatch.setattr("prune_llm.footprint.available_memory", lambda: int(found.streams / share))
    assert streams_on_disk(job) == (share > 0.5)


def test_too_little_memory_is_refused_at_once(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_llm.footprint.available_memory", lambda: 1000)
    config = PruneConfig(method="wanda", calibration=str(corpus), samples=4, seq_len=32)
    with pytest.raises(ValueError, match=r"memory: this run needs about .* available; give fewer"):
        prune(model, config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_refused_at_once(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    config = PruneConfig(method="magnitude")
    with pytest.raises(ValueError, match=r"needs about .* of disk and 0.0 MB are free"):
        prune(model, config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_available_memory_is_some(tmp_path: Path) -> None:
    assert 1e6 < available_memory() < 1e15
