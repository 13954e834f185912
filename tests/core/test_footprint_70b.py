"""The memory formula for a 70B model on one GPU, from its config alone: no weight is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import FAMILIES

from prune_llm import PruneConfig
from prune_llm import architecture as arch
from prune_llm.calibration import Calibration
from prune_llm.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from prune_llm.footprint import Footprint, _Shapes, footprint
from prune_llm.job import Job

GB = 10**9
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoint and architecture of each size; the weights are only names and shapes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    found = {}
    for size, shape in SHAPES.items():
        heads = shape["hidden_size"] // 128
        config = LlamaConfig(
            **shape, num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256
        )
        directory = tmp_path_factory.mktemp(size)
        config.save_pretrained(directory)
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()
        file = directory / "model.safetensors"
        tensors = {
            name: StoredTensor(name, "BF16", tuple(t.shape), file, 0, 2 * t.numel())
            for name, t in state.items()
        }
        checkpoint = Checkpoint(directory, config.to_dict(), tensors)
        found[size] = checkpoint, arch.build(directory, tensors)
    return found


def foreseen(jobs: dict[str, Any], size: str, method: str) -> Footprint:
    return footprint(job_of(jobs, size, method))


def job_of(jobs: dict[str, Any], size: str, method: str) -> Job:
    checkpoint, architecture = jobs[size]
    text = Calibration(torch.zeros(128, 2048, dtype=torch.int64), "none", 1, 128 * 2048)
    config = PruneConfig(method=method, activations="disk")
    device = torch.device("cuda")
    hashing = cast(Any, None)
    return Job(config, checkpoint, architecture, text, device, torch.bfloat16, None, hashing)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("size", SHAPES)
def test_it_fits_a_card_of_24_gb(jobs: dict[str, Any], size: str, method: str) -> None:
    gpu = foreseen(jobs, size, method).gpu
    assert gpu is not None
    print(f"{size} {method}: {gpu / GB:.2f} GB")
    assert gpu < 24 * GB


def test_sparsegpt_of_70b_by_hand(jobs: dict[str, Any]) -> None:
    """Block in bfloat16 + down_proj's Gram matrix and weights + what factorising takes."""
    d, f, kv = 8192, 28672, 1024
    block = 2 * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d)
    down, gram = 4 * d * f, 4 * f * f
    solving = gram + down + max(2.3 * gram, gram + (2.6 + 1.0) * down)
    assert foreseen(jobs, "70B", "sparsegpt").gpu == pytest.approx(block + solving)


def test_the_next_block_waits_in_pinned_memory(jobs: dict[str, Any]) -> None:
    found = foreseen(jobs, "70B", "wanda")
    block = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)
    assert found.on_disk and found.memory - found.held > 2 * block


def test_experts_that_are_solved_together_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that one block's sites take, up to a bound, beside the Gram matrices still to come."""
    directory = FAMILIES["mixtral"].save(tmp_path / "mixtral")
    checkpoint = open_checkpoint(directory)
    jobs = {"mixtral": (checkpoint, arch.build(directory, checkpoint.tensors))}
    job = job_of(jobs, "mixtral", "sparsegpt")
    d, f, kv = 32, 48, 16
    expert = (4 * d * d + 5 * 2 * d * f) + (4 * f * f + 5 * f * d)
    attention = (4 * d * d + 5 * (d * d + 2 * kv * d)) + (4 * d * d + 5 * d * d)
    grams = 4 * (d * d + f * f) * 4  # when the first expert is solved
    assert _Shapes(job).solving == grams + 4 * (attention + 4 * expert)
    monkeypatch.setattr("prune_llm.footprint.TOGETHER_BYTES", 70_000)
    assert _Shapes(job).solving == grams + 70_000
    monkeypatch.setattr(Job, "solves_together", False)
    assert _Shapes(job).solving < grams + 70_000
