"""The GPU's way through a decode step, followed on the CPU: its plan, its layout, its kernels.

Kernels are interpreted; on a GPU the same step is recorded as a CUDA graph, and nothing else
differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PROMPT, add_levels, llama_config, save_model

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.channel_linear import ChannelLinear, packed_linears, use_channels
from prune_llm.decoder import PlanDecoder, new_decoder, recordable
from prune_llm.runners import _not_planned
from prune_llm_kernels import gpu
from prune_llm_kernels.gpu_plan import GpuPlan

STEPS = 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu")
    dense = save_model(directory / "dense", llama_config(attention_bias=True, num_hidden_layers=1))
    prune(dense, PruneConfig(method="magnitude", pattern="0.5"), directory / "packed")
    return directory / "packed"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What asks for the backend of the CPU gets the GPU's; packed weights are checked as before."""
    for module in ("plan", "channel_weight", "ops"):
        monkeypatch.setattr(f"prune_llm_kernels.{module}.backend_for", lambda device: gpu)
    # what reads the CPU's layouts without asking
    monkeypatch.setattr("prune_llm_kernels.tokens.supports_rows", lambda x: False)
    yield


def decoded(model: Any, level: str) -> tuple[list[torch.Tensor], Any]:
    decoder = new_decoder(model, 64, level)
    logits = [decoder.prefill(PROMPT[:3]).clone()]
    logits += [decoder.step(int(logits[-1].argmax())).clone() for _ in range(STEPS)]
    return logits, decoder


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[torch.Tensor]:
    """By the CPU's kernels."""
    model = prune_llm.load(packed)
    return decoded(model, add_levels(model).levels[-1].name)[0]


def test_the_step_is_that_of_the_cpu(
    packed: Path, expected: list[torch.Tensor], on_gpu: None
) -> None:
    model = prune_llm.load(packed)
    level = add_levels(model).levels[-1].name
    use_channels(model, packed_linears(model))  # as new_decoder does on CUDA
    assert packed_linears(model) == []
    assert any(isinstance(module, ChannelLinear) for module in model.modules())
    assert recordable(model) is None  # at the level "dense" its plan does what transformers does
    found, decoder = decoded(model, level)
    assert isinstance(decoder, PlanDecoder)
    assert isinstance(decoder._recording.blocks.plan, GpuPlan)
    for one, other in zip(found, expected, strict=True):
        assert int(one.argmax()) == int(other.argmax())
        assert torch.allclose(one.float(), other.float(), atol=2e-3 * float(other.std()))
    assert 0.2 < decoder.statistics().active < 0.9


def test_batches_of_a_gpu_go_through_transformers(packed: Path) -> None:
    model = prune_llm.load(packed)
    assert _not_planned(model) is None
    assert "the model is on meta" in str(_not_planned(model.to("meta")))
