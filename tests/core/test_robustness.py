"""Models whose own content is bad: one clear line, status 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm import architecture as arch
from prune_llm.checkpoint import open_checkpoint
from prune_llm.methods import METHODS

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "in" / "model"))


def change_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensor(model: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def assert_one_line(cli: Any, model: Path, corpus: Path, message: str, *more: str) -> None:
    output = model.parent.parent / "out"
    options = ["--calibration", corpus, "--samples", "4", "--seq-len", "16", "--device", "cpu"]
    result = cli("prune", model, "-o", output / "pruned", *options, *more)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if not line.startswith("needs about")]
    assert len(lines) == 1 and lines[0].startswith("error:") and message in lines[0], lines
    assert not output.exists() or not list(output.iterdir())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number(
    value: float, method: str, model: Path, corpus: Path, cli: Any
) -> None:
    change_tensor(model, UP, lambda weight: weight[3].__setitem__(5, value))
    name = "model.layers.1.mlp.up_proj.weight: holds NaN or infinite weights"
    assert_one_line(cli, model, corpus, name, "--method", method)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (NORM, f"{NORM}: holds NaN or infinite weights"),
        (EMBEDDING, "model.layers.0.self_attn.q_proj: its calibration inputs are not finite"),
    ],
)
def test_activations_that_are_no_numbers(
    name: str, message: str, model: Path, corpus: Path, cli: Any
) -> None:
    change_tensor(model, name, lambda weight: weight.fill_(float("nan")))
    assert_one_line(cli, model, corpus, message, "--method", "wanda")


def test_activations_that_overflow(tmp_path: Path, corpus: Path, cli: Any) -> None:
    """float16 ends at 65504."""
    model = save_model(tmp_path / "in" / "model", llama_config(), torch.float16)
    change_tensor(model, NORM, lambda weight: weight.fill_(60000))
    message = "model.layers.0.self_attn.q_proj: its calibration inputs are not finite; run with"
    assert_one_line(cli, model, corpus, message)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
    "fewer than no layers": ({"num_hidden_layers": -3}, "num_hidden_layers -3"),
    "too many layers": ({"num_hidden_layers": 10**8}, "has num_hidden_layers 100000000"),
    "layers that are none": ({"num_hidden_layers": "three"}, "cannot build a causal language"),
    "negative width": ({"hidden_size": -64}, "cannot build a causal language model"),
    "huge width": ({"hidden_size": 1 << 40}, "describes a larger model than the weights"),
    "huge vocabulary": ({"vocab_size": 1 << 50}, "describes a larger model than the weights"),
    "no heads": ({"num_attention_heads": 0}, "cannot build a causal language model"),
    "other experts": (
        {"num_local_experts": 3, "model_type": "mixtral"},
        "lacks",
    ),
    "another width": ({"hidden_size": 32}, "config.json and the weights are not of one model"),
    "unknown family": ({"model_type": "no_such_family"}, "no_such_family"),
    "a family that is none": ({"model_type": ["llama"]}, "cannot build a causal language model"),
    "encoder and decoder": ({"model_type": "t5"}, "cannot build a causal language model"),
    "decoder of both": (
        {"model_type": "bart", "is_encoder_decoder": True, "d_model": 64, "decoder_layers": 3},
        "models that only decode can be pruned",
    ),
    "vision": ({"model_type": "vit"}, "cannot build a causal language model"),
    "sound": ({"model_type": "wav2vec2"}, "cannot build a causal language model"),
    "code of its own": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
        "needs code that comes with the model",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_make_no_sense(case: str, model: Path, corpus: Path, cli: Any) -> None:
    changes, message = CONFIGS[case]
    change_config(model, **changes)
    assert_one_line(cli, model, corpus, message)


def test_a_mask_of_all_positions_takes_no_memory(tmp_path: Path, corpus: Path, cli: Any) -> None:
    """GPT-2 would make a table of every position for every position while it is built."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=264, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    model = save_model(tmp_path / "in" / "model", config)
    change_config(model, n_positions=10**7)
    assert_one_line(cli, model, corpus, "describes a larger model than the weights")


def test_a_block_that_raises(
    model: Path, corpus: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def fail(*_: Any) -> None:
        raise KeyError("no such\nthing")

    monkeypatch.setattr(LlamaMLP, "forward", fail)
    message = "model.layers.0: fails when it runs (KeyError: 'no such\\nthing')"
    assert_one_line(cli, model, corpus, message, "--method", "wanda")


@pytest.mark.parametrize(
    ("method", "refine"), [*((name, "none") for name in METHODS), ("wanda", "both")]
)
def test_inputs_that_never_vary(
    method: str, refine: str, model: Path, corpus: Path, tmp_path: Path
) -> None:
    """Dead columns: their weights go first where a method looks at inputs; counts stay exact."""
    change_tensor(model, NORM, lambda weight: weight[:20].zero_())
    settings: dict[str, Any] = {
        "samples": 4,
        "seq_len": 16,
        "calibration": str(corpus),
        "refine": refine,
    }
    if method == "random" and refine != "none":
        settings["refine"] = "none"
    config = PruneConfig(method=method, format="dense", **settings)
    report = prune(model, config, tmp_path / "out")
    query_OI = (
        open_checkpoint(tmp_path / "out").tensors["model.layers.0.self_attn.q_proj.weight"].read()
    )
    assert int((query_OI == 0).sum()) == query_OI.numel() // 2
    assert all(r.kept * 2 == r.weights and r.error is not None for r in report.linears)
    if method not in ("magnitude", "random", "ria"):
        assert bool((query_OI[:, :20] == 0).all())


def test_tensors_of_no_module_are_told(model: Path, tmp_path: Path) -> None:
    change_config(model, num_hidden_layers=2)
    report = prune(model, PruneConfig(method="magnitude"), tmp_path / "out")
    (warning,) = report.warnings
    assert "belong to no module of LlamaForCausalLM, first 'model.layers.2" in warning


def test_a_model_that_is_mostly_no_linears(tmp_path: Path) -> None:
    """Its report would say 50 %, and nearly all of it would be dense."""
    block = torch.nn.Module()
    block.gate = torch.nn.Linear(8, 8)
    block.experts = torch.nn.Module()
    block.experts.w1 = torch.nn.Parameter(torch.zeros(64, 8))
    with pytest.raises(ValueError, match=r"layers\.0\.experts\.w1: weights of shape \(64, 8\)"):
        arch._refuse_other_weights(torch.nn.ModuleList([block]), "layers")
