"""`sparsify`: the checkpoint it writes, its levels, allocations, bad input, the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model
from torch import Tensor

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.activation import balance
from prune_llm.activation import greedy as greedy_module
from prune_llm.activation.allocation import ALLOCATIONS
from prune_llm.activation.curve import Task, units
from prune_llm.activation.greedy import STEP, greedy
from prune_llm.activation.levels import LevelTable, read_table
from prune_llm.activation.measure import GatedModel
from prune_llm.activation.sparsify import SparsifyConfig, sparsify
from prune_llm.activation.texts import overlap
from prune_llm.sparse_checkpoint import open_stored

Cli = Callable[..., Any]
SMALL: dict[str, Any] = {"samples": 12, "seq_len": 32, "device": "cpu"}


def small(corpus: Path, **changes: Any) -> SparsifyConfig:
    return SparsifyConfig(**{"calibration": str(corpus), "allocation": "uniform"} | SMALL | changes)


def tensors(directory: Path) -> dict[str, bytes]:
    stored = open_stored(directory)
    packed = [part for weight in stored.packed.values() for part in weight.parts.values()]
    return {t.name: b"".join(t.chunks()) for t in (*stored.plain.values(), *packed)}


@pytest.mark.parametrize("pruned", [False, True])
def test_levels_are_added_and_nothing_else_changes(
    pruned: bool, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    source = tiny_llama
    if pruned:
        source = tmp_path / "pruned"
        prune(tiny_llama, PruneConfig(method="magnitude", pattern="2:4"), source)
    config = small(corpus, criterion="weight-aware", activation_sparsity=(0.4, 0.2))
    report = sparsify(source, config, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(source)
    model = prune_llm.load(tmp_path / "out")
    table = read_table(model)
    assert table is not None
    assert table.names == ["dense", "20%", "40%"] and len(table.sites) == 12
    assert table.criterion == "weight-aware" and table.calibration["sha256"]
    for level, wanted in zip(table.levels, (0.2, 0.4), strict=True):
        assert level.sparsity == pytest.approx(wanted, abs=0.03)
        assert level.ppl_increase is not None and level.tokens == 3 * 31
        assert len(level.site_sparsity) == 12
    assert table.levels[0].thresholds < table.levels[1].thresholds
    saved = json.loads((tmp_path / "out" / "activation_report.json").read_text())
    assert saved["levels"] == report.levels and saved["dense_ppl"]["held_out"] > 1
    assert (tmp_path / "out" / "prune_report.json").is_file() == pruned
    assert prune_llm.info(tmp_path / "out", verify=True).levels == ["20%", "40%"]
    again = sparsify(source, config, tmp_path / "again")
    assert again.levels == report.levels


def test_a_threshold_for_every_linear(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, activation_sparsity=(0.3,), allocation="greedy", granularity="linear")
    report = sparsify(tiny_llama, config, tmp_path / "out")
    model = prune_llm.load(tmp_path / "out")
    table = read_table(model)
    assert table is not None and len(table.sites) == 21
    assert table.calibration["granularity"] == "linear"
    level = table.levels[0]
    q, k, v = level.thresholds[:3]
    assert not q == k == v
    assert level.sparsity == pytest.approx(0.3, abs=0.03)
    # what is realised is counted for every linear
    shares = [site["sparsity"] for site in report.levels[0]["sites"]]
    weights = [model.get_submodule(site.name).weight.numel() for site in table.sites]
    mean = sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(level.sparsity, abs=1e-12)
    answer = prune_llm.generate(model, "the", max_tokens=8, level="30%")
    assert answer.statistics.level == "30%" and answer.statistics.active < 0.85


def test_levels_can_be_made_anew(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    sparsify(tiny_llama, small(corpus, activation_sparsity=(0.2,)), tmp_path / "one")
    sparsify(tmp_path / "one", small(corpus, activation_sparsity=(0.3,)), tmp_path / "two")
    assert prune_llm.info(tmp_path / "two").levels == ["30%"]


def test_experts_have_thresholds_of_their_own(corpus: Path, tmp_path: Path) -> None:
    """Fused in memory, a matrix each on disk; the router reads everything."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    source = save_model(tmp_path / "moe", config)
    sparsify(source, small(corpus, activation_sparsity=(0.3,)), tmp_path / "out")
    model = prune_llm.load(tmp_path / "out")
    table = read_table(model)
    assert table is not None and len(table.sites) == 2 * (2 + 2 * 4)
    assert not any("gate." in name for site in table.sites for name in site.linears)
    experts = [site for site in table.sites if ".experts.3." in site.name]
    assert [len(site.linears) for site in experts] == [2, 1, 2, 1]
    gated = GatedModel.of(model, "magnitude")
    assert [len(unit) for unit in units(gated)] == [1, 1, 4, 4] * 2
    assert tensors(tmp_path / "out") == tensors(source)


def test_a_target_in_quality(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    report = sparsify(tiny_llama, small(corpus, max_ppl_increase=(0.05,)), tmp_path / "out")
    assert [level["name"] for level in report.levels] == ["ppl-5%"]
    assert report.levels[0]["sparsity"] > 0.01


@pytest.fixture(scope="module")
def task(tiny_llama: Path, corpus: Path) -> Task:
    model = prune_llm.load(tiny_llama)
    gated = GatedModel.of(model, "magnitude")
    windows_ST = torch.randint(264, (8, 32), generator=torch.Generator().manual_seed(0))
    return Task(gated, gated.quantiles(windows_ST), windows_ST, (0.06,))


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_allocations_keep_the_budget_and_are_deterministic(
    name: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "ROUNDS", 1)
    curve = ALLOCATIONS[name](task)
    for overall in (0.0, 0.1, 0.2, 0.3, 0.7):
        shares = curve.at(overall)
        # global's realise it, on the windows it was measured on
        near = 0.05 if name == "global" else 1e-6
        assert task.gated.mean(shares) == pytest.approx(overall, abs=near)
        assert all(0 <= share <= 1 for share in shares)
    assert ALLOCATIONS[name](task) == curve


def test_greedy_steps_are_in_weights(task: Task) -> None:
    """A step of a small site is a larger share of it: TEAL's, with the weights counted right."""
    curve = greedy(task)
    overall, first = curve.anchors[1]
    assert overall == pytest.approx(STEP)
    for block in range(3):
        sites = [i for i, site in enumerate(task.gated.sites) if site.block == block]
        weights = [task.gated.sites[i].weights for i in sites]
        changed = [i for i in sites if first[i] > 0]
        assert len(changed) == 1
        expected = STEP * sum(weights) / task.gated.sites[changed[0]].weights
        assert first[changed[0]] == pytest.approx(expected)


def test_hadamard_columns_are_orthogonal() -> None:
    for least in (1, 2, 5, 21):
        matrix = balance.hadamard(least)
        assert len(matrix) >= least and (matrix[:, 0] == 1).all()
        assert torch.equal(matrix.T @ matrix, len(matrix) * torch.eye(len(matrix)).double())


def test_greedy_gives_equal_errors_to_the_first(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy_module._Block, "error", lambda *_: 1.0)
    _, first = greedy(task).anchors[1]
    assert [i for i, share in enumerate(first) if share > 0] == [0, 4, 8]


BAD = [
    ({"activation_sparsity": (1.0,)}, r"activation_sparsity 1.0: must be in \[0, 1\)"),
    ({"activation_sparsity": (-0.1,)}, r"must be in \[0, 1\)"),
    ({"max_ppl_increase": (0.0,)}, "max_ppl_increase 0.0: must be above 0"),
    ({"max_ppl_increase": (float("nan"),)}, "must be above 0"),
    ({"criterion": "size"}, "criterion 'size': unknown; choose one of magnitude, weight-aware"),
    ({"allocation": "best"}, "allocation 'best': unknown; choose one of uniform, greedy, global"),
    ({"granularity": "row"}, "granularity 'row': unknown; choose one of site, linear"),
    ({"samples": 3}, "samples 3: must be at least 4"),
    ({"seq_len": 1}, "seq_len 1: must be at least 2"),
    ({"activation_sparsity": (0.4, 0.4)}, "two have one name"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**changes)


def test_texts_that_cannot_serve(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="100% of it is in the calibration text"):
        sparsify(tiny_llama, small(corpus, held_out=str(corpus), samples=300), out)
    with pytest.raises(ValueError, match="gives 2 windows of 32 tokens and 4 are needed"):
        (tmp_path / "short.txt").write_text("x" * 70)
        sparsify(tiny_llama, small(corpus, calibration=str(tmp_path / "short.txt")), out)
    with pytest.raises(ValueError, match="context is 128 tokens"):
        sparsify(tiny_llama, small(corpus, seq_len=1000), out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_another_text_gives_the_figures(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("0123456789 ABCDEFG " * 40)
    config = small(corpus, held_out=str(other), activation_sparsity=(0.3,))
    report = sparsify(tiny_llama, config, tmp_path / "out")
    assert set(report.dense_ppl) == {"search", "held_out", "other"}
    table = read_table(prune_llm.load(tmp_path / "out"))
    assert table is not None
    assert table.levels[0].sparsity == report.levels[0]["texts"]["other"]["sparsity"]


def test_overlap_counts_runs() -> None:
    text_ST = torch.arange(400).view(4, 100)
    assert overlap(text_ST, text_ST) == 1
    assert overlap(text_ST, text_ST[:, 7:]) == 1  # shifted
    assert overlap(text_ST, text_ST + 1000) == 0


def test_activations_that_are_not_finite(corpus: Path, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", llama_config())
    model = prune_llm.load(source)
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("inf")
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"site model.layers.1.mlp.down_proj: .* not finite"):
        sparsify(source, small(corpus), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_thresholds_of_another_model(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    sparsify(tiny_llama, small(corpus), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["activation"]["sites"][0]["in_features"] = 65
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="belong to another model"):
        read_table(prune_llm.load(tmp_path / "out"))


def test_command_line(cli: Cli, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    given = [
        "sparsify", tiny_llama, "--calibration", corpus, "--allocation", "uniform",
        "--samples", 8, "--seq-len", 32,
    ]  # fmt: skip
    out = tmp_path / "out"
    result = cli(*given, "-o", out, "--activation-sparsity", "0.3,45%", "--max-ppl-increase", "20%")
    assert result.exit_code == 0, result.output
    for text in ("30%", "45%", "ppl-20%", "skipped", "held-out windows", "prune-llm eval"):
        assert text in result.output
    info = cli("info", out)
    assert "activation levels: 30%, 45%, ppl-20%" in info.output
    file = tmp_path / "eval.json"
    scored = ["eval", out, "--text", corpus, "--seq-len", 32, "--windows", 4, "--json", file]
    result = cli(*scored, "--level", "30%", "--level", "45%")
    assert result.exit_code == 0, result.output
    dense, low, high = json.loads(file.read_text())
    assert dense["skipped"] is None and 0.2 < low["skipped"] < high["skipped"] < 0.55
    assert low["quality"]["kl"] < high["quality"]["kl"] and len(low["site_sparsity"]) == 12
    result = cli(*scored, "--level", "45%", "--protocol", "first-half-dense")
    assert result.exit_code == 0 and "second half" in result.output
    half = json.loads(file.read_text())[1]
    assert half["quality"]["tokens"] == 4 * 16 and half["quality"]["kl"] < high["quality"]["kl"]


CLI_BAD = [
    (["sparsify", "--activation-sparsity", "1.5"], "activation_sparsity 1.5: must be in [0, 1)"),
    (["sparsify", "--activation-sparsity", "much"], "activation_sparsity 'much': not a number"),
    (["sparsify", "--held-out", "none.txt"], "no such file"),
    (["eval", "--level", "30%"], "has no activation levels; prune-llm sparsify makes them"),
    (["eval", "--protocol", "half"], "protocol 'half': unknown; choose one of all-sparse"),
]


@pytest.mark.parametrize(("arguments", "message"), CLI_BAD, ids=[" ".join(a) for a, _ in CLI_BAD])
def test_bad_input_is_one_line_and_exit_2(
    cli: Cli, arguments: list[str], message: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    text = ["--text", corpus] if arguments[0] == "eval" else ["--calibration", corpus]
    if arguments[0] == "sparsify":
        text += ["-o", tmp_path / "out", "--samples", 8, "--seq-len", 32]
    result = cli(arguments[0], tiny_llama, *text, *arguments[1:])
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_level_that_does_not_exist(
    cli: Cli, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    sparsify(tiny_llama, small(corpus), tmp_path / "out")
    result = cli("eval", tmp_path / "out", "--text", corpus, "--level", "60%")
    assert result.exit_code == 2
    assert "this model has dense, 25%, 40%, 50%" in result.stderr


def test_table_of_a_model_without_levels(tiny_llama: Path) -> None:
    assert read_table(prune_llm.load(tiny_llama)) is None
    assert LevelTable("magnitude", (), ()).names == ["dense"]


def test_gates_do_not_outlive_a_run(tiny_llama: Path) -> None:
    model = prune_llm.load(tiny_llama)
    gated = GatedModel.of(model, "magnitude")
    windows_ST: Tensor = torch.arange(64).view(2, 32)
    gated.measure(windows_ST, [1.0] * 12)
    assert not any(module._forward_pre_hooks for module in model.modules())
