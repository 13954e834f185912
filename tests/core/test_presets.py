"""Qualities: what they stand for, in Python and on the command line, and what they reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prune_llm.cli_prune import quality_chosen
from prune_llm.presets import CHOSEN, PRESETS
from prune_llm.prune import PruneConfig, prune

PUBLISHED = {
    "method": "sparsegpt",
    "target": "pruned",
    "refine": "none",
    "reconstruction": "none",
    "allocation": "uniform",
}


def chosen(**given: str) -> dict[str, Any]:
    options = {"quality": None, **dict.fromkeys(CHOSEN), "samples": 3, **given}
    return quality_chosen(options)


def test_presets_hold_only_what_they_choose() -> None:
    for fields in PRESETS.values():
        assert set(fields) <= set(CHOSEN)
        PruneConfig(**fields)


def test_the_command_line_takes_balanced_unless_a_part_is_given() -> None:
    balanced = {**PUBLISHED, **PRESETS["balanced"], "samples": 3}
    assert chosen() == chosen(quality="balanced") == balanced
    assert chosen(method="wanda") == {**PUBLISHED, "method": "wanda", "samples": 3}
    assert chosen(target="dense") == {**PUBLISHED, "target": "dense", "samples": 3}
    assert chosen(allocation="owl") == {**balanced, "allocation": "owl"}
    both = chosen(quality="best", reconstruction="block", refine="swaps")
    expected = {**PRESETS["best"], "reconstruction": "block", "refine": "swaps"}
    assert both == {**PUBLISHED, **expected, "samples": 3}
    # nothing to allocate
    assert chosen(quality="best", pattern="2:4") == {
        **PUBLISHED,
        **PRESETS["best"],
        "allocation": "uniform",
        "pattern": "2:4",
        "samples": 3,
    }


def test_python_takes_the_same() -> None:
    best = PruneConfig.of_quality("best", pattern="2:4", reconstruction_steps=3)
    assert (best.allocation, best.reconstruction, best.pattern) == ("uniform", "logits", "2:4")
    assert PruneConfig.of_quality("best").allocation == "error"
    config = PruneConfig.of_quality("fast", pattern="2:4", refine="swaps")
    assert config == PruneConfig(method="wanda", pattern="2:4", refine="swaps")
    with pytest.raises(ValueError, match="quality 'good': unknown; choose one of fast, balanced"):
        PruneConfig.of_quality("good")


@pytest.mark.parametrize("options", [[], ["--quality", "balanced"]])
def test_a_run_without_a_method_is_balanced(
    cli: Any, tmp_path: Path, tiny_llama: Path, corpus: Path, options: list[str]
) -> None:
    shared = {"calibration": str(corpus), "samples": 4, "seq_len": 16}
    arguments = ["--calibration", str(corpus), "--samples", "4", "--seq-len", "16"]
    result = cli("prune", tiny_llama, "-o", str(tmp_path / "cli"), *arguments, *options)
    assert result.exit_code == 0, result.stderr
    prune(tiny_llama, PruneConfig.of_quality(**shared), tmp_path / "python")
    found, expected = (
        load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("cli", "python")
    )
    assert all(found[name].equal(expected[name]) for name in expected)
    report = json.loads((tmp_path / "cli" / "prune_report.json").read_text())
    assert {name: report["config"][name] for name in CHOSEN} == {
        **PUBLISHED,
        **PRESETS["balanced"],
    }


def test_an_unknown_quality_is_one_line(cli: Any, tmp_path: Path) -> None:
    result = cli("prune", "model", "-o", str(tmp_path / "out"), "--quality", "good")
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        "error: quality 'good': unknown; choose one of fast, balanced, best"
    )
    assert not (tmp_path / "out").exists()
