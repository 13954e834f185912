"""Sites, the rule that makes an input inactive, and what it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model
from torch import Tensor, nn

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.activation.gates import Gates, channel_scales, gate, score, site_scales
from prune_llm.activation.levels import Level, LevelTable
from prune_llm.activation.measure import GatedModel
from prune_llm.activation.sites import GRANULARITIES, find_sites, table_sites

QKV = "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj"


def model_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def table_of(model: Any, criterion: str) -> LevelTable:
    return LevelTable(criterion, tuple(site.site for site in find_sites(model)), ())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 13), (1, 129, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rule_is_that_of_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(dtype)
    scale_I = torch.rand(shape[-1], generator=generator) + 0.5
    exact = x.double().abs() * scale_I.double()
    threshold = float(exact.median().float())
    gated = gate(x, scale_I, threshold)
    # the product is rounded once to float32: half a unit from the threshold it may go either way
    sure = (exact - threshold).abs() > 2.0**-23 * threshold
    expected = torch.where(exact > threshold, x, torch.zeros_like(x))
    assert torch.equal(gated[sure], expected[sure])
    assert not torch.signbit(gated[gated == 0]).any()  # never -0.0


def test_an_input_at_the_threshold_is_inactive() -> None:
    x = torch.tensor([-0.5, 0.5, 0.5000001, -0.0, 0.0])
    assert gate(x, None, 0.5).tolist() == [0, 0, pytest.approx(0.5, abs=1e-6), 0, 0]
    assert gate(x, None, 0.0)[:3].tolist() == x[:3].tolist()


def test_sites_of_a_llama() -> None:
    model = model_of(llama_config())
    sites = find_sites(model)
    assert [site.name for site in sites[:4]] == [
        f"model.layers.0.{QKV}",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj,mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert [site.weights for site in sites[:4]] == [64 * 128, 64 * 64, 64 * 200, 64 * 100]
    assert [site.block for site in sites] == [0] * 4 + [1] * 4 + [2] * 4
    assert sites[0].site.linears[2] == "model.layers.0.self_attn.v_proj"
    assert sites[3].site.in_features == 100


def test_every_linear_a_site_of_its_own() -> None:
    """Same inputs, same quantiles; the weights and the norms are the linear's own."""
    model = model_of(llama_config(num_hidden_layers=1))
    together, alone = find_sites(model), find_sites(model, granularity="linear")
    linears = [name for site in together for name in site.site.linears]
    assert [site.name for site in alone] == linears
    assert [site.site.linears for site in alone] == [(name,) for name in linears]
    q, k, v, *_ = alone
    assert [site.weights for site in (q, k, v)] == [64 * 64, 64 * 32, 64 * 32]
    assert sum(site.weights for site in alone) == sum(site.weights for site in together)
    norms = site_scales(alone, "weight-aware")
    for site, norm_I in zip(alone, norms, strict=True):
        weight_OI = model.get_submodule(site.name).weight
        assert norm_I is not None and torch.allclose(norm_I, weight_OI.norm(dim=0), rtol=1e-6)
    windows_ST = torch.randint(264, (4, 33), generator=torch.Generator().manual_seed(0))
    shared = GatedModel.of(model, "magnitude").quantiles(windows_ST).grid_NG
    own = GatedModel.of(model, "magnitude", granularity="linear").quantiles(windows_ST).grid_NG
    assert torch.equal(own, shared[[0, 0, 0, 1, 2, 2, 3]])
    again = table_sites(model, LevelTable("magnitude", tuple(site.site for site in alone), ()))
    assert [site.linears[0].name for site in again] == linears
    with pytest.raises(ValueError, match="granularity 'row': unknown; choose one of site, linear"):
        find_sites(model, granularity="row")


def families() -> dict[str, tuple[Any, list[str]]]:
    import transformers as tf

    small = {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 4}
    sizes: dict[str, Any] = {
        **small,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return {
        "gpt2": (
            tf.GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=64),
            ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ),
        "phi3": (
            tf.Phi3Config(**sizes, pad_token_id=0),
            ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
        ),
        "cohere": (
            tf.CohereConfig(**sizes),
            [f"{QKV},mlp.gate_proj,mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"],
        ),
        "opt": (
            tf.OPTConfig(
                **small, ffn_dim=48, num_hidden_layers=2, max_position_embeddings=64,
                word_embed_proj_dim=32,
            ),
            ["self_attn.q_proj,self_attn.k_proj,self_attn.v_proj", "self_attn.out_proj", "fc1",
             "fc2"],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "phi3", "cohere", "opt"])
def test_sites_of_other_families(name: str) -> None:
    config, expected = families()[name]
    model = model_of(config)
    sites = find_sites(model)
    one_block = [site for site in sites if site.block == 0]
    assert len(sites) == 2 * len(expected)
    for site, kinds in zip(one_block, expected, strict=True):
        assert site.name.endswith("." + kinds)
    gated = GatedModel.of(model, "weight-aware")
    windows_ST = torch.randint(264, (4, 33), generator=torch.Generator().manual_seed(0))
    thresholds = gated.quantiles(windows_ST).thresholds([0.3] * len(sites))
    measured = gated.measure(windows_ST, thresholds)
    # half of what a ReLU lets through is zero anyhow
    assert all(0.2 < share < 0.6 for share in measured.site_sparsity)
    assert measured.kl > 0 and gated.measure(windows_ST, gated.dense).kl == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gates_do_what_masking_by_hand_does(granularity: str) -> None:
    """Against the same forward with every linear replaced by one that masks its own input."""
    model = model_of(llama_config())
    ids_BT = torch.randint(264, (2, 9), generator=torch.Generator().manual_seed(1))
    sites = find_sites(model, granularity=granularity)
    assert len(sites) == {"site": 12, "linear": 21}[granularity]
    # those of q, k, v and of gate, up differ
    thresholds = [0.3 + 0.2 * (index % 4) for index in range(len(sites))]
    with torch.inference_mode():
        with Gates(sites, [None] * len(sites), thresholds) as gates:
            logits = model(input_ids=ids_BT).logits
        dense = model(input_ids=ids_BT).logits
        inactive = [0] * len(sites)
        for index, site in enumerate(sites):
            for place, linear in enumerate(site.linears):
                masks = by_hand(thresholds[index], inactive, index if place == 0 else None)
                linear.module.register_forward_pre_hook(masks)
        expected = model(input_ids=ids_BT).logits
    assert torch.equal(logits, expected) and not torch.equal(logits, dense)
    assert torch.equal(logits[:, 0], dense[:, 0])  # the first token is dense
    seen = [2 * 8 * site.site.in_features for site in sites]
    shares = [count / total for count, total in zip(inactive, seen, strict=True)]
    assert gates.site_sparsity == pytest.approx(shares, abs=1e-12)
    weights = [site.weights for site in sites]
    mean = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(weights)
    assert gates.sparsity == pytest.approx(mean, abs=1e-12)


def by_hand(threshold: float, inactive: list[int], index: int | None) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0].clone()
        small = x.abs() <= threshold
        small[:, 0] = False
        if index is not None:
            inactive[index] += int(small.sum())
        x[small] = 0.0
        return x

    return hook


def test_first_tokens_stay_dense() -> None:
    model = model_of(llama_config())
    sites = find_sites(model)
    ids_BT = torch.arange(10)[None]
    everything = [1e9] * len(sites)
    with torch.inference_mode():
        dense = model(input_ids=ids_BT).logits
        for first_dense, count in ((0, 0), (1, 1), (3, 3), ("half", 5)):
            with Gates(sites, [None] * len(sites), everything, first_dense) as gates:  # type: ignore[arg-type]
                logits = model(input_ids=ids_BT).logits
            same = (logits == dense).all(dim=-1)[0].tolist()
            assert same == [True] * count + [False] * (10 - count)
            assert gates.sparsity == 1.0


def test_scales_are_the_norms_of_all_columns_of_a_site(tmp_path: Path, corpus: Path) -> None:
    """Dense, and packed after pruning; a Conv1D stores its weight the other way round."""
    dense = save_model(tmp_path / "dense", llama_config())
    prune(dense, PruneConfig(method="magnitude", pattern="0.5"), tmp_path / "packed")
    for directory in (dense, tmp_path / "packed"):
        model = prune_llm.load(directory)
        table = table_of(model, "weight-aware")
        for site, scale_I in zip(table.sites, channel_scales(model, table), strict=True):
            modules = [model.get_submodule(name) for name in site.linears]
            stacked = torch.cat([module.weight.double() for module in modules])  # type: ignore[operator]
            assert scale_I is not None and scale_I.dtype == torch.float32
            assert torch.allclose(scale_I.double(), stacked.square().sum(0).sqrt(), rtol=1e-6)
        assert channel_scales(model, table_of(model, "magnitude")) == [None] * len(table.sites)
    gpt2 = model_of(families()["gpt2"][0])
    scales = channel_scales(gpt2, table_of(gpt2, "weight-aware"))
    weight_IO = gpt2.transformer.h[0].mlp.c_proj.weight
    assert scales[3] is not None
    assert torch.allclose(scales[3], weight_IO.norm(dim=1), rtol=1e-6)


def test_sites_of_a_table_are_those_of_the_model() -> None:
    model = model_of(llama_config())
    sites = find_sites(model)
    again = table_sites(model, LevelTable("magnitude", tuple(s.site for s in sites), ()))
    assert [(s.site, s.weights, s.block) for s in again] == [
        (s.site, s.weights, s.block) for s in sites
    ]
    other = model_of(llama_config(num_hidden_layers=1))
    with pytest.raises(ValueError, match="belong to another model"):
        table_sites(other, LevelTable("magnitude", tuple(s.site for s in sites), ()))


def test_bad_input() -> None:
    model = model_of(llama_config(num_hidden_layers=1))
    sites = find_sites(model)
    with pytest.raises(ValueError, match="2 thresholds and 4 scales for 4 sites"):
        Gates(sites, [None] * 4, [0.1, 0.2])
    with pytest.raises(ValueError, match="criterion 'size': unknown; choose one of magnitude"):
        site_scales(sites, "size")
    with pytest.raises(ValueError, match="has no linears whose inputs could be skipped"):
        find_sites(model, ignore=("*",))
    assert len(find_sites(model, ignore=("mlp.*",))) == 2
    x = torch.ones(3)
    assert torch.equal(score(x, None), x)


def test_json_round_trip() -> None:
    model = model_of(llama_config(num_hidden_layers=1))
    sites = tuple(site.site for site in find_sites(model))
    level = Level("25%", (0.1, 0.25, 1e-7, 3.0), 0.25, (0.2, 0.3, 0.25, 0.25), 0.0123, 100)
    table = LevelTable("weight-aware", sites, (level,), {"source": "text", "seq_len": 3})
    assert LevelTable.from_json(table.to_json()) == table
    assert table.names == ["dense", "25%"] and table.level("25%") is level
    with pytest.raises(ValueError, match="does not exist; this model has dense, 25%"):
        table.level("50%")


def test_a_nan_is_never_gated_away() -> None:
    x = torch.tensor([[0.1, float("nan"), 2.0]])
    gated = gate(x, None, 1.0)
    assert gated[0, 0] == 0 and gated[0, 1].isnan() and gated[0, 2] == 2
