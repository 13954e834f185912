"""A target in quality for the weights, and levels in the same run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prune_llm
from prune_llm import PruneConfig, SparsifyConfig, prune
from prune_llm.calibration import Source, load_apart, load_calibration, load_tokenizer
from prune_llm.demo import model_path, text
from prune_llm.prune import levels_of
from prune_llm.pruning_level import GUESSES, Try, next_try, prune_within
from prune_llm.sparse_checkpoint import open_stored
from prune_llm.windows import draw_windows

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tales") / "tales.txt"
    file.write_text(text("calibration", 60))
    return file


def config(tales: Path, **changes: Any) -> PruneConfig:
    given = {"method": "wanda", "calibration": str(tales), "samples": 4, "seq_len": 64}
    return PruneConfig(**{**given, "device": "cpu", **changes})


def small(**changes: Any) -> SparsifyConfig:
    return SparsifyConfig(**{"allocation": "uniform", "samples": 8} | changes)


def tensors(directory: Path) -> dict[str, bytes]:
    stored = open_stored(directory)
    packed = [part for weight in stored.packed.values() for part in weight.parts.values()]
    return {t.name: b"".join(t.chunks()) for t in (*stored.plain.values(), *packed)}


CURVES: dict[str, Callable[[int], float]] = {
    "cubic": lambda p: 0.5 * (p / 50) ** 3,
    "steep": lambda p: 1e-4 * (p / 10) ** 9,
    "cliff": lambda p: -0.001 if p < 83 else 1e9,
    "noise below nothing": lambda p: (p / 60) ** 4 - 0.001 * (p % 3),
    "harmless": lambda p: 0.0,
    "broken": lambda p: 1e40,
}


@pytest.mark.parametrize("allowed", [0.001, 0.01, 0.05, 0.5])
@pytest.mark.parametrize("name", list(CURVES))
def test_the_search_finds_the_largest_percent_in_few_tries(name: str, allowed: float) -> None:
    tried: dict[int, float] = {}
    while (percent := next_try(tried, allowed)) is not None:
        assert percent not in tried and 1 <= percent <= 95
        tried[percent] = CURVES[name](percent)
    found = max((p for p in tried if tried[p] <= allowed), default=0)
    assert found == 95 or tried[found + 1] > allowed
    if name != "noise below nothing":
        assert found == max((p for p in range(1, 96) if CURVES[name](p) <= allowed), default=0)
    assert len(tried) <= GUESSES + 7


def test_windows_apart_share_none(tales: Path) -> None:
    tokenizer = load_tokenizer(model_path())
    source = Source(str(tales), None, 5, 32, 0, "random")
    own, others = load_apart(source, 7, tokenizer)
    assert torch.equal(own.samples_ST, load_calibration(source, tokenizer).samples_ST)
    every = {row.numpy().tobytes() for found in (own, others) for row in found.samples_ST}
    assert len(own.samples_ST) == 5 and len(others.samples_ST) == 7 and len(every) == 12
    own, others = load_apart(Source(str(tales), None, 9000, 512, 0, "first"), 9000, tokenizer)
    assert 1 <= len(own.samples_ST) <= len(others.samples_ST) <= len(own.samples_ST) + 1
    whole = Source(str(tales), None, None, 512, 0, "first")
    together = torch.cat([own.samples_ST, others.samples_ST])
    assert torch.equal(together, load_calibration(whole, tokenizer).samples_ST)


def test_levels_are_added_in_the_same_run(tales: Path, tmp_path: Path) -> None:
    """The weights are those of pruning alone; the levels are measured on other windows."""
    prune(model_path(), config(tales), tmp_path / "alone")
    levels = small(activation_sparsity=(0.3,), max_ppl_increase=(0.2,), criterion="weight-aware")
    report = prune(model_path(), config(tales), tmp_path / "out", levels=levels)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "alone")
    assert prune_llm.info(tmp_path / "out", verify=True).levels == ["30%", "ppl-20%"]
    assert report.levels is not None and report.search is None
    assert report.levels.calibration["windows"] == {"fit": 4, "search": 2, "held_out": 2}
    target = report.levels.levels[1]["texts"]["search"]
    assert 0.15 < target["ppl_increase"] <= 0.2 and target["sparsity"] > 0.2
    saved = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert saved["levels"] == ["30%", "ppl-20%"] and saved["output"] == str(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "activation_report.json").read_text())
    assert saved["output"] == str(tmp_path / "out") and saved["config"]["seq_len"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_nothing_is_left_where_the_second_part_fails(
    tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    def fail(*_: Any) -> None:
        raise ValueError("activations are not finite")

    monkeypatch.setattr(sys.modules["prune_llm.prune"], "add_levels", fail)
    with pytest.raises(ValueError, match="not finite"):
        prune(model_path(), config(tales), tmp_path / "out", levels=small())
    assert list(tmp_path.iterdir()) == []


def test_levels_share_the_settings_of_pruning(tales: Path) -> None:
    levels = levels_of(config(tales, seed=3), small())
    assert (levels.calibration, levels.seq_len, levels.seed) == (str(tales), 64, 3)
    assert levels_of(config(tales, calibration=None), small()).calibration == "bundled"
    with pytest.raises(ValueError, match=r"levels\.seed 5: levels use the pruning's, which is 0"):
        levels_of(config(tales), small(seed=5))
    with pytest.raises(ValueError, match="format 'dense': activation levels need the sparse form"):
        levels_of(config(tales, format="dense"), small())


def test_a_target_finds_the_sparsity(tales: Path, tmp_path: Path) -> None:
    """The result is what pruning to that sparsity gives, and costs what the report says."""
    from prune_llm_eval.perplexity import token_perplexity

    tries: list[Try] = []
    report = prune_within(model_path(), 0.1, config(tales), tmp_path / "out", on_try=tries.append)
    search = report.search
    assert search is not None and 0.2 < search["sparsity"] < 0.6
    assert 0 < search["ppl_increase"]["search"] <= 0.1 and len(tries) <= 8
    above = [t for t in tries if t.sparsity == pytest.approx(search["sparsity"] + 0.01)]
    assert above and above[0].ppl_increase > 0.1
    assert search["windows"] == {"search": 3, "held_out": 1, "seq_len": 64}
    assert report.sparsity == pytest.approx(search["sparsity"], abs=0.001)
    pattern = f"{search['sparsity']:.2f}"
    prune(model_path(), config(tales, pattern=pattern), tmp_path / "alone")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "alone")
    windows = draw_windows(model_path(), config(tales))
    dense, pruned = prune_llm.load(model_path()), prune_llm.load(tmp_path / "out")
    for name, text_ST in (("search", windows.search_ST), ("held_out", windows.report_ST)):
        before, after = (token_perplexity(model, text_ST).nll for model in (dense, pruned))
        expected = math.expm1(after - before)
        assert search["ppl_increase"][name] == pytest.approx(expected, rel=1e-6)
    again = prune_within(model_path(), 0.1, config(tales), tmp_path / "again")
    assert again.search == search and tensors(tmp_path / "again") == tensors(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert saved["search"] == search and saved["config"]["pattern"] == pattern
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"allows: {search['ppl_increase']['held_out']:+.2%} on 1 windows" in card


def test_a_target_and_levels_together(cli: Cli, tales: Path, tmp_path: Path) -> None:
    result = cli(
        "prune", model_path(), "-o", tmp_path / "out", "--method", "magnitude", "--calibration",
        tales, "--samples", 4, "--seq-len", 64, "--max-ppl-increase", "20%",
        "--activation-sparsity", "30%", "--activation-allocation", "uniform",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for shown in ("within 20%", "above 20%", "held-out windows", "30%", "sparsities were tried"):
        assert shown in result.output
    assert prune_llm.info(tmp_path / "out").levels == ["30%"]


def test_a_target_that_cannot_be_met(
    cli: Cli, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_llm import pruning_level

    costs = iter([1.0, 2.0, 2.5, 2.4, 2.3, 2.2])  # the dense model is the best by far
    monkeypatch.setattr(pruning_level, "mean_nll", lambda *_: next(costs))
    monkeypatch.setattr(pruning_level, "FIRST", 1)
    result = cli(
        "prune", model_path(), "-o", tmp_path / "out", "--method", "magnitude",
        "--calibration", tales, "--samples", 4, "--seq-len", 64, "--max-ppl-increase", "1%",
    )  # fmt: skip
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert "max_ppl_increase 0.01: cannot be met, a sparsity of 1% already costs" in line
    assert "allow at least" in line and list(tmp_path.iterdir()) == []


BAD = [
    (["--max-ppl-increase", "5%", "--pattern", "2:4"], "give one of --sparsity, --pattern and"),
    (["--max-ppl-increase", "5%", "--sparsity", "0.5"], "give one of --sparsity, --pattern and"),
    (["--max-ppl-increase", "0"], "max_ppl_increase 0.0: must be above 0"),
    (["--max-ppl-increase", "-5%"], "max_ppl_increase -0.05: must be above 0"),
    (["--max-ppl-increase", "nan"], "max_ppl_increase nan: must be above 0"),
    (["--max-ppl-increase", "some"], "max_ppl_increase 'some': not a number"),
    (["--max-ppl-increase", "1%,5%"], "max_ppl_increase '1%,5%': give one target"),
    (["--activation-sparsity", "1"], "activation_sparsity 1.0: must be in [0, 1)"),
    (["--activation-max-ppl-increase", "0"], "activation_max_ppl_increase 0.0: must be above 0"),
    (
        ["--activation-sparsity", "0.4", "--activation-allocation", "best"],
        "activation_allocation 'best': unknown; choose one of uniform, greedy, global",
    ),
    (
        ["--activation-sparsity", "0.4", "--activation-criterion", "size"],
        "activation_criterion 'size': unknown",
    ),
    (["--activation-criterion", "magnitude"], "--activation-criterion needs --activation-sparsity"),
    (["--activation-sparsity", "0.4", "--format", "dense"], "activation levels need the sparse"),
    (["--activation-sparsity", "0.4", "--seq-len", "100"], "beside those for pruning and 4 are"),
    (["--max-ppl-increase", "5%", "--seq-len", "200"], "must not be searched on"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    cli: Cli, arguments: list[str], message: str, tmp_path_factory: Any, tmp_path: Path
) -> None:
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text(text("calibration", 2))
    result = cli("prune", model_path(), "-o", tmp_path / "out", "--calibration", file, *arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == []
