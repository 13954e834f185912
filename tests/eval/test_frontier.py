"""The frontier: what its rows say is true of the checkpoint it writes; what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prune_llm
from prune_llm import PruneConfig
from prune_llm.activation.gates import Gates, channel_scales
from prune_llm.activation.levels import read_table
from prune_llm.activation.sites import table_sites
from prune_llm.demo import model_path, text
from prune_llm.quality import mean_nll, ppl_increase
from prune_llm.windows import draw_windows
from prune_llm_eval import frontier as module
from prune_llm_eval.frontier import Combination, FrontierConfig, frontier

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tales") / "tales.txt"
    file.write_text(text("calibration", 60))
    return file


def config(tales: Path, **changes: Any) -> FrontierConfig:
    pruning = PruneConfig(
        method="wanda", calibration=str(tales), samples=8, seq_len=64, device="cpu"
    )
    given = {"sparsities": (0.3, 0.9, 0.95), "allocation": "uniform", "criterion": "weight-aware"}
    small = {"prune": pruning, "context": 5, "tokens": 4, "rounds": 2, "threads": 1}
    return FrontierConfig(**{"max_ppl_increase": 0.2, **given, **small, **changes})


def speeds_by(speed: dict[tuple[float, str], float]) -> Callable[[Any, Combination], float]:
    return lambda _run, row: speed[row.sparsity, row.level]


def test_the_fastest_combination_is_written(
    tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {(0.0, "dense"): 10.0, (0.0, "ppl-20%"): 12.0}
    speed |= {(0.3, "dense"): 14.0, (0.3, "ppl-20%"): 15.0}
    monkeypatch.setattr(module._Run, "_speed", speeds_by(speed))
    given = config(tales)
    seen: list[Combination] = []
    report = frontier(model_path(), given, tmp_path / "out", on_combination=seen.append)
    assert [(row.sparsity, row.level, row.feasible) for row in report.rows] == [
        (0.0, "dense", True),
        (0.0, "ppl-20%", True),
        (0.3, "dense", True),
        (0.3, "ppl-20%", True),
        (0.9, "dense", False),
    ]
    assert report.untried == [0.95] and len(seen) == 5
    assert report.best.speeds == (15.0, 15.0) and not report.overlaps
    assert report.rows[1].activation_sparsity > report.best.activation_sparsity > 0.1
    assert report.best.nbytes < report.dense.nbytes
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    saved = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert saved["chosen"] == 3 and saved["rows"][3]["tokens_per_second"] == 15.0
    assert saved["rows"][4]["tokens_per_second"] is None and saved["untried"] == [0.95]
    assert (tmp_path / "out" / "prune_report.json").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The fastest of 5 combinations within 20% more perplexity, at level ppl-20%" in card
    assert "15.0 tokens/s, the dense model 10.0" in card and "serve out " in card
    assert prune_llm.info(tmp_path / "out", verify=True).levels == ["ppl-20%"]
    saved = json.loads((tmp_path / "out" / "activation_report.json").read_text())
    assert saved["output"] == str(tmp_path / "out") and saved["model"] == str(model_path())
    # the total increase of the checkpoint that was written, over the dense model
    dense, loaded = prune_llm.load(model_path()), prune_llm.load(tmp_path / "out")
    table = read_table(loaded)
    assert table is not None
    windows = draw_windows(model_path(), given.prune).apart
    thresholds = table.level("ppl-20%").thresholds
    gates = Gates(table_sites(loaded, table), channel_scales(loaded, table), thresholds)
    for name, text_ST in (("search", windows.search_ST), ("held_out", windows.held_out_ST)):
        with gates:
            nll = mean_nll(loaded, text_ST)
        found = ppl_increase(nll, mean_nll(dense, text_ST))
        assert report.best.ppl_increase[name] == pytest.approx(found, rel=1e-6)
    assert 0.05 < report.best.ppl_increase["search"] <= 0.2


def test_command_line_times_and_prints(cli: Cli, tales: Path, tmp_path: Path) -> None:
    result = cli(
        "frontier", model_path(), "-o", tmp_path / "out", "--max-ppl-increase", "30%",
        "--sparsities", "0,40%", "--method", "magnitude", "--calibration", tales, "--samples", 8,
        "--seq-len", 64, "--activation-allocation", "uniform", "--context", 5, "--tokens", 4,
        "--rounds", 1, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for shown in ("30% more perplexity", "40%", "fastest", "tokens/s", "held-out", "kernels"):
        assert shown in result.output
    rows = json.loads((tmp_path / "out" / "frontier.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["tokens_per_second"] > 0 for row in rows)
    answer = prune_llm.generate(tmp_path / "out", "One day", level="ppl-30%", max_tokens=3)
    assert len(answer.token_ids) == 3


def test_a_dense_model_that_is_fastest_is_said_to_be(
    cli: Cli, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Run, "_speed", lambda _run, row: 9.0 - row.sparsity)
    monkeypatch.setattr(module, "add_levels", _no_level)
    result = cli(
        "frontier", model_path(), "-o", tmp_path / "out", "--max-ppl-increase", "30%",
        "--sparsities", "0.3", "--method", "magnitude", "--calibration", tales, "--samples", 8,
        "--seq-len", 64, "--rounds", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the dense model is the fastest within the target here" in result.output
    assert prune_llm.info(tmp_path / "out").levels == []


def _no_level(*_: Any) -> None:
    raise module.TargetNotMet("max_ppl_increase 0.3: cannot be met")


def test_a_stopped_run_leaves_nothing(
    tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Run, "_speed", stop)
    with pytest.raises(KeyboardInterrupt):
        frontier(model_path(), config(tales, sparsities=()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


BAD = [
    (["--max-ppl-increase", "0"], "max_ppl_increase 0.0: must be above 0"),
    (["--max-ppl-increase", "5%", "--sparsities", "0.3,1"], "sparsities 1: must be in [0, 1)"),
    (["--max-ppl-increase", "5%", "--sparsities", "2:4"], "sparsities '2:4': not a number"),
    (["--max-ppl-increase", "5%", "--activation-allocation", "x"], "activation_allocation 'x'"),
    (["--max-ppl-increase", "5%", "--activation-criterion", "x"], "activation_criterion 'x'"),
    (["--max-ppl-increase", "5%", "--method", "x"], "method 'x': unknown"),
    (["--max-ppl-increase", "5%", "--tokens", "1"], "tokens 1: must be at least 2"),
    (["--max-ppl-increase", "5%", "--rounds", "0"], "rounds 0: must be at least 1"),
    (["--max-ppl-increase", "5%", "--context", "510"], "574 together, the model's context is 512"),
    (["--max-ppl-increase", "5%", "--context", "9999"], "context 9999: the prompt comes from"),
    (["--sparsities", "0.3"], "Missing option '--max-ppl-increase'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    cli: Cli, arguments: list[str], message: str, tales: Path, tmp_path: Path
) -> None:
    given = ["--calibration", tales, "--samples", 32, "--seq-len", 64, *arguments]
    result = cli("frontier", model_path(), "-o", tmp_path / "out", *given)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == []
