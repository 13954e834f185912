"""Models are taken apart by what they are: families with their own shapes, ties, orientations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny_models import llama_config, save_model
from torch import nn

from prune_llm import PruneConfig, prune
from prune_llm import architecture as arch
from prune_llm.blocks import Walk
from prune_llm.checkpoint import open_checkpoint
from prune_llm.methods import METHODS
from prune_llm.statistics import Needs

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


# with our own kernels around the linears; without them, bit for bit, in test_families
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_walk_without_pruning_reproduces_the_hidden_states(name: str, tmp_path: Path) -> None:
    """Block by block from disk is the whole model in memory, but for rounding."""
    from transformers import AutoModelForCausalLM

    directory = FAMILIES[name].save(tmp_path)
    checkpoint = open_checkpoint(directory)
    ids = torch.randint(3, 200, (5, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    walk = Walk(
        arch.build(directory, checkpoint.tensors), checkpoint, ids, list,
        device=CPU, dtype=torch.float32, batch_size=2, tick=lambda *_: None,
    )  # fmt: skip
    for block in walk:
        assert block._stream is not None
        found = torch.cat(list(block._stream))
        # a fused block rounds once where the model rounds after every operation
        torch.testing.assert_close(found, expected[block.index], rtol=1e-5, atol=1e-6)
        assert tuple(site.name for site in block.collect(Needs.GRAM)) == FAMILIES[name].sites
    assert walk.fused == {0, 1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_family_prunes_and_reloads(name: str, method: str, corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = FAMILIES[name].save(tmp_path / "model")
    settings = PruneConfig(
        method=method,
        calibration=str(corpus),
        samples=6,
        seq_len=32,
        device="cpu",
        pattern="2:4",
        format="dense",
    )
    report = prune(directory, settings, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(report.linears) == len(arch.block_linears(model))
    for linear in arch.block_linears(model):
        zeros_OI = linear.to_OI(linear.weight) == 0
        assert bool((zeros_OI.reshape(len(zeros_OI), -1, 4).sum(-1) == 2).all()), linear.name


def test_conv1d_groups_run_along_its_inputs(tmp_path: Path, corpus: Path) -> None:
    """GPT-2 stores [I, O]: groups of four inputs are four consecutive rows on disk."""
    directory = FAMILIES["gpt2"].save(tmp_path / "model")
    prune(
        directory, PruneConfig(method="magnitude", pattern="1:4", format="dense"), tmp_path / "out"
    )
    stored = open_checkpoint(tmp_path / "out").tensors
    weight_IO = next(t for n, t in stored.items() if n.endswith("h.0.attn.c_attn.weight")).read()
    kept = (weight_IO != 0).reshape(-1, 4, weight_IO.shape[1]).sum(1)
    assert bool((kept == 1).all())


def test_experts_of_another_kind_are_refused(tmp_path: Path, corpus: Path) -> None:
    """JetMoe: a class of its own around each fused tensor."""
    import transformers as tf

    settings = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    directory = save_model(tmp_path / "model", tf.JetMoeConfig(**settings))
    with pytest.raises(ValueError, match=r"fused weights of shape .* not supported"):
        prune(directory, PruneConfig(calibration=str(corpus)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsupported_config_is_one_clear_error(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    (tmp_path / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"cannot build a causal language model.*no_such_family"):
        prune(tmp_path, PruneConfig(method="magnitude"), tmp_path / "out")


def test_router_is_not_a_prunable_linear() -> None:
    block = nn.Module()
    block.moe = nn.Module()
    block.moe.gate = nn.Linear(8, 4)
    block.moe.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    found = [linear.kind for linear in arch._linears(block, "layers.0")]
    assert found == [f"moe.experts.{i}" for i in range(4)]


class Reader(nn.Module):
    """A block that reads one linear twice and another never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(x))  # type: ignore[no-any-return]


def test_a_linear_must_read_exactly_one_input(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    block = Reader()
    linears = arch._linears(block, "layers.0")
    for kept, message in (("twice", "several different inputs"), ("never", "no input")):
        walk = Walk(
            arch.build(tiny_llama, checkpoint.tensors), checkpoint, None, list,
            device=CPU, dtype=torch.float32, batch_size=1, tick=lambda *_: None,
        )  # fmt: skip
        chosen = [linear for linear in linears if linear.kind == kept]
        with pytest.raises(ValueError, match=f"{kept}: reads {message}"):
            walk.sites(0, chosen, lambda: block(torch.zeros(2, 4)))


def test_what_a_block_gets_beside_hidden_states_must_not_depend_on_tokens(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def with_tokens(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids=input_ids, position_ids=input_ids % 7, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", with_tokens)
    checkpoint = open_checkpoint(tiny_llama)
    walk = Walk(
        arch.build(tiny_llama, checkpoint.tensors), checkpoint, torch.arange(40).view(2, 20), list,
        device=CPU, dtype=torch.float32, batch_size=2, tick=lambda *_: None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="more than the hidden states"):
        next(iter(walk))


def test_unequal_block_counts_and_names() -> None:
    model = nn.Module()
    model.config = llama_config(num_hidden_layers=5)
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ValueError, match="no list of 5 decoder blocks"):
        arch._decoder_blocks(model)  # type: ignore[arg-type]


def test_bfloat16_stream_stays_close_to_the_whole_model(tmp_path: Path) -> None:
    """Our attention kernel and torch's differ by rounding only, whatever the head layout."""
    from transformers import AutoModelForCausalLM

    directory = save_model(tmp_path, FAMILIES["qwen3"].make(), torch.bfloat16)
    checkpoint = open_checkpoint(directory)
    ids = torch.randint(3, 200, (4, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        in_bfloat16 = model(ids, output_hidden_states=True).hidden_states[1].float()
        exact = model.float()(ids, output_hidden_states=True).hidden_states[1]
    walk = Walk(
        arch.build(directory, checkpoint.tensors), checkpoint, ids, list,
        device=CPU, dtype=torch.bfloat16, batch_size=2, tick=lambda *_: None,
    )  # fmt: skip
    blocks = iter(walk)
    next(blocks)
    block = next(blocks)
    assert block._stream is not None
    ours = torch.cat(list(block._stream)).float()
    assert (ours - exact).norm() <= 1.5 * (in_bfloat16 - exact).norm()
