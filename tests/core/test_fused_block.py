"""Blocks that run with our kernels around their linears: where they agree, and never unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm.fused_block import agrees, is_plain_call


def block_and_input(config: Any) -> tuple[Any, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval().base_model
    hidden_BTD = torch.randn(2, 9, config.hidden_size)
    return base.layers[0], hidden_BTD, base.rotary_emb(hidden_BTD, torch.arange(9)[None])


@torch.no_grad()
def test_llama_agrees_and_what_computes_something_else_does_not() -> None:
    block, hidden_BTD, angles = block_and_input(llama_config())
    assert agrees(block, hidden_BTD, angles)
    forward = block.forward
    block.forward = lambda *a, **k: forward(*a, **k) * 1.001
    assert not agrees(block, hidden_BTD, angles)


def test_a_call_with_anything_unknown_is_not_plain() -> None:
    _, hidden_BTD, angles = block_and_input(llama_config())
    plain = {"position_embeddings": angles, "attention_mask": None, "use_cache": False}
    assert is_plain_call(hidden_BTD, plain)
    assert is_plain_call(hidden_BTD, {**plain, "something_new": None})
    assert not is_plain_call(hidden_BTD, {**plain, "something_new": torch.ones(1)})
    assert not is_plain_call(hidden_BTD, {**plain, "attention_mask": torch.ones(1)})
    assert not is_plain_call(hidden_BTD, {"attention_mask": None})


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2"])
def test_the_report_says_how_many_blocks_ran_fused(
    family: str, corpus: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GraniteConfig

    config = {
        "llama": llama_config(),
        "granite": GraniteConfig(**llama_config().to_diff_dict(), residual_multiplier=0.22),
        "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    }[family]
    dense = save_model(tmp_path / "dense", config)
    settings = PruneConfig(method="wanda", calibration=str(corpus), samples=4, seq_len=32)
    report = prune(dense, settings, tmp_path / "out")
    expected = {"llama": "3 of 3", "granite": "0 of 3", "gpt2": "0 of 2"}
    assert report.environment["fused blocks"] == expected[family]
