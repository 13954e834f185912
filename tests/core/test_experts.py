"""Mixture-of-experts models: taken apart, pruned, stored packed, loaded, saved."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import save_model

import prune_llm
from prune_llm import PruneConfig, block, prune
from prune_llm.activation.sparsify import SparsifyConfig, sparsify
from prune_llm.architecture import build
from prune_llm.block import Block
from prune_llm.checkpoint import open_checkpoint
from prune_llm.convert import export, info
from prune_llm.experts import Experts, unfuse, with_index, without_index
from prune_llm.prune_block import prune_block
from prune_llm.sites import within_budget
from prune_llm.sparse_checkpoint import SPARSE_WEIGHTS_FILE, open_sparse, open_stored
from prune_llm.sparse_experts import SparseExperts
from prune_llm.sparse_linear import SparseLinear
from prune_llm.windows import draw_calibration

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
TOKENS = torch.arange(3, 40).reshape(1, -1)


def configs() -> dict[str, Any]:
    import transformers as tf

    moe = {**SIZES, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
    return {
        "mixtral": tf.MixtralConfig(**SIZES, num_local_experts=5, sliding_window=None),
        "qwen3_moe": tf.Qwen3MoeConfig(**moe, head_dim=8),
        "qwen2_moe": tf.Qwen2MoeConfig(**moe, shared_expert_intermediate_size=40),
        "olmoe": tf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    }


@pytest.fixture(scope="module", params=configs())
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(folder / "dense", configs()[request.param])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def load_dense(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def test_experts_apart_compute_what_fused_ones_do(dense: Path) -> None:
    model = load_dense(dense)
    expected = logits(model)
    stored = open_checkpoint(dense).tensors
    assert unfuse(model)
    for name, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        for path, linear in module.named_modules():
            if isinstance(linear, torch.nn.Linear):
                on_disk = f"{name}.{path}.weight"
                if on_disk not in stored:
                    on_disk = on_disk.replace(".mlp.", ".block_sparse_moe.")
                linear.weight = torch.nn.Parameter(stored[on_disk].read(), requires_grad=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_experts_are_pruned_packed_and_loaded(
    dense: Path, method: str, corpus: Path, tmp_path: Path
) -> None:
    config = PruneConfig(method=method, calibration=str(corpus), samples=8, seq_len=64)
    report = prune(dense, config, tmp_path / "sparse")
    experts = [result for result in report.linears if ".experts." in result.name]
    model = load_dense(dense)
    count = sum(
        len(module.gate_up_proj) * 3
        for module in model.modules()
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3
    )
    assert len(experts) == count > 0
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert not any("router" in r.name or r.name.endswith("gate") for r in report.linears)
    assert not any(r.name.endswith("shared_expert_gate") for r in report.linears)
    kinds = [kind.kind for kind in report.kinds()]
    assert sum("experts.*." in kind for kind in kinds) == 3
    loaded = prune_llm.load(tmp_path / "sparse")
    packed = [m for m in loaded.modules() if isinstance(m, SparseLinear)]
    assert len(packed) == len(report.linears)
    export(tmp_path / "sparse", tmp_path / "plain", "dense")
    expected = logits(load_dense(tmp_path / "plain"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    stored = info(tmp_path / "sparse", True)
    assert stored.verified and sum("experts.*." in kind.kind for kind in stored.kinds) == 3


def test_saved_and_loaded_again(dense: Path, tmp_path: Path) -> None:
    prune(dense, PruneConfig(method="magnitude", pattern="2:4"), tmp_path / "sparse")
    loaded = prune_llm.load(tmp_path / "sparse")
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(prune_llm.load(tmp_path / "again")), expected)
    dequantized = prune_llm.load(tmp_path / "sparse", dequantize=True)
    torch.testing.assert_close(logits(dequantized), expected, rtol=1e-4, atol=1e-5)
    dequantized.save_pretrained(tmp_path / "plain")
    plain = logits(load_dense(tmp_path / "plain"))
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_generated_by_packed_experts(dense: Path, tmp_path: Path) -> None:
    prune(dense, PruneConfig(method="magnitude"), tmp_path / "sparse")
    found = prune_llm.generate(tmp_path / "sparse", [5, 6, 7], max_tokens=8, ignore_eos=True)
    assert len(found.token_ids) == 8 and found.decoder.startswith("transformers (")


def test_an_expert_without_tokens_is_pruned_by_magnitude(
    dense: Path, corpus: Path, tmp_path: Path
) -> None:
    config = PruneConfig(method="wanda", calibration=str(corpus), samples=1, seq_len=2)
    report = prune(dense, config, tmp_path / "sparse")
    unseen = [r for r in report.linears if r.tokens == 0]
    assert unseen and all(r.error is None and r.method == "magnitude" for r in unseen)
    (warning,) = [w for w in report.warnings if "no calibration token reached" in w]
    assert f"reached {len(unseen)} of" in warning and f"{unseen[0].name}: 0" in warning
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("asked", ["sparsegpt", "dsnot"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_expert_with_fewer_tokens_than_inputs_is_pruned_by_wanda(
    asked: str, fused: bool, corpus: Path, tmp_path: Path
) -> None:
    """Instead of a method on the Gram matrix; the report has the counts of transformers' router."""
    name = "gpt_oss" if fused else "qwen3_moe"
    source = FAMILIES[name].save(tmp_path / "model")
    config = PruneConfig(
        method=asked, calibration=str(corpus), samples=2, seq_len=30, refine="backsolve"
    )
    report = prune(source, config, tmp_path / "out")
    experts = [r for r in report.linears if ".experts." in r.name]
    counts = routed_tokens(source, report, config)
    few = set()
    for result in experts:
        inputs = result.shape[0] if result.transposed else result.shape[1]
        assert result.tokens is not None
        if result.block == 0:
            index = int(re.findall(r"experts\.(\d+)\.", result.name)[0])
            assert result.tokens == counts[index], result.name
        how = "wanda" if result.tokens < inputs and asked == "sparsegpt" else asked
        assert result.method == ("magnitude" if result.tokens == 0 else how)
        few |= {result.name} if 0 < result.tokens < inputs else set()
    assert 0 < len(few) < len(experts)
    (warning,) = [w for w in report.warnings if "fewer tokens than they have inputs" in w]
    assert warning.startswith(f"{len(few)} of {len(experts)} linears of experts")
    assert all(r.method == asked and r.tokens == 60 for r in report.linears if r not in experts)


def routed_tokens(source: Path, report: Any, config: PruneConfig) -> list[int]:
    """Tokens of the calibration text that the first block's router sends to each expert."""
    model = load_dense(source)
    seen: list[torch.Tensor] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    checkpoint = open_checkpoint(source)
    drawn = draw_calibration(config, checkpoint, build(source, checkpoint.tensors))
    assert drawn is not None
    with torch.no_grad():
        model(drawn.samples_ST)
    return torch.cat(seen).flatten().bincount(minlength=experts.num_experts).tolist()


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_levels_of_experts_in_one_tensor_are_refused(
    form: str, corpus: Path, tmp_path: Path
) -> None:
    """Their inputs would stay dense without a word; with --ignore they do."""
    source = FAMILIES["gpt_oss"].save(tmp_path / "model")
    prune(source, PruneConfig(method="magnitude", format=form), tmp_path / "pruned")
    config = SparsifyConfig(calibration=str(corpus), samples=4, seq_len=24)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: .* --ignore mlp\.experts"):
        sparsify(tmp_path / "pruned", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sparsify(tmp_path / "pruned", replace(config, ignore=("mlp.experts",)), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    sites = stored["quantization_config"]["activation"]["sites"]
    assert len(sites) == 4 and not any("experts" in site["name"] for site in sites)
    plain = logits(prune_llm.load(tmp_path / "pruned"))
    assert torch.equal(logits(prune_llm.load(tmp_path / "out")), plain)


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "deepseek_v3"])
def test_every_quality_prunes_experts(
    name: str, quality: str, corpus: Path, tmp_path: Path
) -> None:
    """Targets, refinement, reconstruction and allocation; counts are exact."""
    options: dict[str, Any] = {"calibration": str(corpus), "samples": 8, "seq_len": 32}
    if quality == "best":
        options["reconstruction_steps"] = 2
    config = PruneConfig.of_quality(quality, **options)
    report = prune(FAMILIES[name].save(tmp_path / "model"), config, tmp_path / "out")
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.verification["linears_checked"] == len(report.linears)
    assert sum(".experts." in r.name for r in report.linears) >= 16
    loaded = prune_llm.load(tmp_path / "out")
    assert bool(logits(loaded).isfinite().all())


def test_a_fused_tensor_with_a_dense_expert_is_stored_dense(tmp_path: Path) -> None:
    """It is packed whole or not at all; the report has the bytes that it really takes."""
    source = FAMILIES["gpt_oss"].save(tmp_path / "model")
    config = PruneConfig(method="magnitude", ignore=("mlp.experts.2.down_proj",))
    report = prune(source, config, tmp_path / "out")
    stored = open_sparse(tmp_path / "out")
    down = "model.layers.0.mlp.experts.down_proj"
    assert down in stored.plain and down.replace("down", "gate_up") in stored.packed
    zeros = [float((expert == 0).float().mean()) for expert in stored.read(down)]
    assert zeros == [0.5, 0.5, 0.0, 0.5]
    sizes = {r.name: (r.bytes_before, r.bytes_after) for r in report.linears}
    before, after = sizes["model.layers.0.mlp.experts.1.down_proj"]
    assert before == after
    assert report.bytes_after == stored.nbytes
    loaded = prune_llm.load(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "dense", "dense")
    expected = logits(load_dense(tmp_path / "dense"))
    torch.testing.assert_close(logits(loaded), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_stopped_run_goes_on_with_the_same_bytes(
    form: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that were packed, and one that makes its tensor a dense one after all."""
    source = FAMILIES["llama4"].save(tmp_path / "model")
    options: dict[str, Any] = {"calibration": str(corpus), "samples": 4, "seq_len": 24}
    config = PruneConfig(
        method="sparsegpt", format=form, ignore=("feed_forward.experts.1.down_proj",), **options
    )
    prune(source, config, tmp_path / "whole")
    module = importlib.import_module("prune_llm.prune")

    def stop(job: Any, block: Block, directory: Path) -> Any:
        if block.index == 1:
            raise KeyboardInterrupt
        return prune_block(job, block, directory)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "prune_block", stop)
        prune(source, config, tmp_path / "cut")
    report = prune(source, config, tmp_path / "cut", resume=True)
    (file,) = (tmp_path / "whole").glob("*.safetensors")
    assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()
    assert report.bytes_after == open_stored(tmp_path / "cut").nbytes


@pytest.mark.parametrize("how", ["experts", "ends", "mask", "short", "config"])
def test_damage_to_fused_experts_is_named(how: str, tmp_path: Path) -> None:
    source = FAMILIES["gpt_oss"].save(tmp_path / "model")
    prune(source, PruneConfig(method="magnitude"), tmp_path / "out")
    file, down = tmp_path / "out" / SPARSE_WEIGHTS_FILE, "model.layers.1.mlp.experts.down_proj"
    stored = load_file(file)
    if how == "experts":
        stored[f"{down}_offsets"] = stored[f"{down}_offsets"][:3].clone()
    elif how == "ends":
        stored[f"{down}_offsets"][1, -1] += 8
    elif how == "mask":
        stored[f"{down}_bitmask"][3, 5, 2] ^= 1
    elif how == "short":
        stored[f"{down}_packed"] = stored[f"{down}_packed"][:-8].clone()
    else:
        settings = json.loads((tmp_path / "out" / "config.json").read_text())
        settings["num_local_experts"] = 3
        (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    save_file(stored, file, metadata={"format": "pt"})
    message = {
        "experts": r"down_proj_offsets: has shape \[3, 33\] for 4 experts",
        "ends": r"down_proj_offsets:? leads? to value",
        "mask": r"down_proj\[3\]_bitmask row 5 keeps",
        "short": r"down_proj_offsets:? leads? to value",
        "config": r"_proj_bitmask: describes 4 weights",
    }[how]
    with pytest.raises(ValueError, match=message):
        prune_llm.load(tmp_path / "out")
    if how != "config":
        with pytest.raises(ValueError, match=r"down_proj"):
            info(tmp_path / "out", verify=True)


def test_fused_experts_on_disk_and_in_another_dtype(tmp_path: Path) -> None:
    """Offloaded, they are read and checked for each call; their values follow the dtype."""
    source = FAMILIES["gpt_oss"].save(tmp_path / "model")
    prune(source, PruneConfig(method="magnitude"), tmp_path / "out")
    loaded = prune_llm.load(tmp_path / "out", dtype=torch.float32)
    experts = loaded.model.layers[1].mlp.experts
    assert isinstance(experts, SparseExperts) and experts.down_proj_packed.dtype == torch.float32
    places: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb", "model.layers.0"), "cpu"
    )
    places["model.layers.1"] = "disk"
    away = prune_llm.load(
        tmp_path / "out", dtype=torch.float32, device_map=places, offload_folder=str(tmp_path / "o")
    )
    assert away.model.layers[1].mlp.experts.down_proj_packed.is_meta
    assert torch.equal(logits(away), logits(loaded))
    assert not away.model.layers[1].mlp.experts._checked
    with pytest.raises(ValueError, match="is offloaded to disk"):
        away.dequantize()


@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_statistics_in_several_passes_are_those_of_one(
    target: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where those of all experts together would not fit; the blocks are run more often."""
    source = FAMILIES["gpt_oss"].save(tmp_path / "model")
    config = PruneConfig(
        method="sparsegpt", calibration=str(corpus), samples=8, seq_len=60, target=target
    )
    ran: list[str] = []
    monkeypatch.setattr(Block, "_run", counted(Block._run, ran))
    held = {}
    for name, budget in (("one", 1 << 30), ("several", 3 * 2 * 4 * 48 * 48)):
        monkeypatch.setattr(block, "STATISTICS_BYTES", budget)
        ran.clear()
        prune(source, config, tmp_path / name)
        held[name] = len(ran)
    assert held["several"] > held["one"]
    one, several = (open_sparse(tmp_path / name) for name in held)
    for name in one.names:
        for piece in one.pieces(name):
            assert torch.equal(one.read(piece), several.read(piece)), piece


def counted(run: Any, ran: list[str]) -> Any:
    def counting(self: Block, *arguments: Any) -> Any:
        ran.append(self.name)
        return run(self, *arguments)

    return counting


def test_sites_are_grouped_within_a_budget() -> None:
    sites: list[Any] = list("abcdef")
    assert within_budget(sites, [3, 3, 4, 20, 1, 2], 10) == [("a", "b", "c"), ("d",), ("e", "f")]
    assert within_budget([], [], 10) == [()]


def test_names() -> None:
    name = "mlp.experts.17.w1"
    assert without_index(name) == "mlp.experts.*.w1"
    assert with_index("mlp.experts.3.w2", name) == "mlp.experts.17.w2"
    assert without_index("mlp.up_proj") == "mlp.up_proj" == with_index("mlp.up_proj", name)
