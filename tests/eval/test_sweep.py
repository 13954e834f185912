"""`sweep`: figures of pruning and scoring by hand, whatever stops it; a plain recommendation."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from prune_llm import PruneConfig, SparsifyConfig, prune
from prune_llm.cli_sweep import verdict
from prune_llm_eval import sweep as sweep_module
from prune_llm_eval.compare import evaluate_all
from prune_llm_eval.journal import JOURNAL_FILE, Journal
from prune_llm_eval.perplexity import Quality
from prune_llm_eval.sweep import sweep
from prune_llm_eval.sweep_config import SweepConfig
from prune_llm_eval.sweep_report import SweepReport, SweepRow, pareto
from prune_llm_eval.turns import Decoding
from prune_llm_eval.variants import Variant

Cli = Callable[..., Any]
FILES = {"sweep.json", "sweep.csv", "sweep.svg", "sweep.png", JOURNAL_FILE}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to score on that has nothing of the calibration text."""
    file = tmp_path_factory.mktemp("other") / "other.txt"
    generator = random.Random(3)
    file.write_text(" ".join(generator.choice(["sun", "rain", "31", "oak"]) for _ in range(400)))
    return file


def settings(corpus: Path, other: Path) -> SweepConfig:
    pruning = PruneConfig(
        method="wanda", calibration=str(corpus), samples=12, seq_len=32, device="cpu"
    )
    balanced = replace(pruning, target="dense", refine="backsolve")
    return SweepConfig(
        variants={
            Variant("wanda", "0.5"): pruning,
            Variant("balanced", "2:4"): replace(balanced, pattern="2:4"),
        },
        levels=SparsifyConfig(activation_sparsity=(0.3,), allocation="uniform", samples=12),
        text=str(other),
        windows=6,
        decoding=Decoding(context=4, tokens=4, rounds=2),
        max_ppl_increase=100.0,
        keep="all",
    )


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, corpus: Path, other: Path, tmp_path_factory: Any) -> Path:
    """An uninterrupted run of `settings`."""
    output = tmp_path_factory.mktemp("whole") / "out"
    sweep(tiny_llama, settings(corpus, other), output)
    return Path(output)


def results(output: Path) -> list[dict[str, Any]]:
    """The rows of sweep.json without what is a matter of time."""
    rows = json.loads((output / "sweep.json").read_text(), parse_constant=pytest.fail)["rows"]
    timed = {"seconds", "speeds", "tokens_per_second", "on_speed_frontier", "on_size_frontier"}
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_rows_are_those_of_prune_and_eval(
    tiny_llama: Path, corpus: Path, other: Path, whole: Path, tmp_path: Path
) -> None:
    config, rows = settings(corpus, other), results(whole)
    assert [row["name"] for row in rows] == [
        "dense", "dense @30%", "wanda 0.5", "wanda 0.5 @30%", "balanced 2:4", "balanced 2:4 @30%"
    ]  # fmt: skip
    for place, own in zip((2, 4), config.variants.values(), strict=True):
        report = prune(tiny_llama, own, tmp_path / str(place), levels=config.levels)
        scoring = replace(config.scoring, levels=("30%",))
        scored = evaluate_all(
            [str(tiny_llama), str(tmp_path / str(place))], scoring, lambda *_: None
        )
        for row, found in zip(rows[place : place + 2], scored[1:], strict=True):
            assert row["quality"] == vars(found.quality) and row["nbytes"] == found.nbytes
            assert row["skipped"] == found.skipped and row["sparsity"] == report.sparsity
        assert rows[0]["quality"]["nll"] == scored[0].quality.nll


def test_files_checkpoints_and_cards(whole: Path, tiny_llama: Path) -> None:
    report = json.loads((whole / "sweep.json").read_text())
    assert {path.name for path in whole.iterdir()} == FILES | {"checkpoints"}
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {
        "dense", "wanda-0.5", "balanced-2of4"
    }  # fmt: skip
    with (whole / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(report["rows"], table, strict=True):
        assert len(row["speeds"]) == 2 and min(row["speeds"]) > 0
        assert float(line["token_ppl"]) == row["quality"]["token_ppl"]
        assert float(line["tokens_per_second"]) == row["tokens_per_second"]
    card = ModelCard.load(whole / "checkpoints" / "wanda-0.5" / "README.md")
    values = [result.metric_value for result in card.data.eval_results]
    assert values == [row["quality"]["token_ppl"] for row in report["rows"][2:4]]
    assert "tokens/s" in card.text and "4 tokens behind 4, one sequence" in card.text


def test_pictures_name_everything(whole: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    from prune_llm_eval.sweep_plot import draw

    drawn = "".join(ElementTree.parse(whole / "sweep.svg").getroot().itertext())
    for text in ("wanda", "balanced", "dense model", "2:4 @30%", "tokens/s", "tensors on disk, MB"):
        assert text in drawn
    pixels = imread(whole / "sweep.png")
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1600
    report = restored(whole)
    draw(report, [tmp_path / "one.svg"])
    assert (tmp_path / "one.svg").read_bytes() == (whole / "sweep.svg").read_bytes()
    broken = Quality(float("inf"), float("nan"), 1.0, 10, 2, 6)
    report.rows[-1] = replace(report.rows[-1], quality=broken)
    report.rows[-2] = replace(report.rows[-2], quality=replace(broken, token_ppl=1e9, nll=50.0))
    draw(report, [tmp_path / "broken.svg"])
    drawn = "".join(ElementTree.parse(tmp_path / "broken.svg").getroot().itertext())
    assert "2 broken ones left out" in drawn


def restored(output: Path) -> SweepReport:
    saved = json.loads((output / "sweep.json").read_text())
    report = SweepReport(**{name: saved[name] for name in SweepReport.__dataclass_fields__})
    report.rows = [SweepRow.restored(row) for row in report.rows]
    return report


# -- stopped and gone on ---------------------------------------------------------------------


class Stop(BaseException):
    """Like a kill: nothing catches it."""


def test_stopped_after_every_record_it_ends_the_same(
    tiny_llama: Path, corpus: Path, other: Path, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Every run adds one record, and is then stopped in the middle of the next line."""
    add = Journal.add

    def stopping(journal: Journal, record: dict[str, Any]) -> None:
        add(journal, record)
        if record["kind"] == "settings":
            return
        with (journal.directory / JOURNAL_FILE).open("a") as file:
            file.write('{"kind": "scored", "row')
        raise Stop

    monkeypatch.setattr(Journal, "add", stopping)
    stops = 0
    for _ in range(20):
        try:
            sweep(tiny_llama, settings(corpus, other), tmp_path / "out")
            break
        except Stop:
            stops += 1
            assert not (tmp_path / "out" / "sweep.json").exists()
    assert stops == 3 + 2  # variants with the dense model, and rounds
    assert results(tmp_path / "out") == results(whole)


def test_a_stop_while_pruning_leaves_no_half_checkpoint(
    tiny_llama: Path, corpus: Path, other: Path, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["prune_llm.prune"], "verify", stop)
        with pytest.raises(Stop):
            sweep(tiny_llama, settings(corpus, other), output)
    # what a kill leaves, which no program can clear
    (output / "checkpoints" / ".wanda-0.5.partial").mkdir(exist_ok=True)
    (output / "checkpoints" / ".wanda-0.5.partial" / "block-00000.part").write_bytes(b"half")
    sweep(tiny_llama, settings(corpus, other), output)
    assert results(output) == results(whole)
    assert not (output / "checkpoints" / ".wanda-0.5.partial").exists()


def arguments(model: Path, corpus: Path, other: Path, output: Path) -> list[str]:
    given = ["sweep", model, "-o", output, "--methods", "wanda", "--patterns", "0.5"]
    given += ["--calibration", corpus, "--samples", 12, "--seq-len", 32, "--text", other]
    given += ["--windows", 6, "--device", "cpu", "--context", 4, "--tokens", 4, "--rounds", 2]
    return [str(word) for word in given]


def test_killed_at_random_it_ends_the_same(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path
) -> None:
    """SIGKILL somewhere; then the same command to its end, and once without a kill."""
    output, least = tmp_path / "out", random.Random(os.getpid()).randint(1, 3)
    given = arguments(tiny_llama, corpus, other, output)
    # as many threads as this process has: rounding depends on them
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "prune_llm", *given]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None and lines(output) < least:
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was faster than the kill"
    before = (output / JOURNAL_FILE).read_text().splitlines()
    for place in (output, tmp_path / "whole"):
        done = cli(*arguments(tiny_llama, corpus, other, place))
        assert done.exit_code == 0, done.output
    after = (output / JOURNAL_FILE).read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1]
    assert results(output) == results(tmp_path / "whole")


def lines(output: Path) -> int:
    file = output / JOURNAL_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_finished_one_is_shown_again_and_keeps_what_is_asked(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    output = tmp_path / "out"
    given = arguments(tiny_llama, corpus, other, output)
    first = cli(*given, "--keep", "none")
    assert first.exit_code == 0, first.output
    assert not any((output / "checkpoints").iterdir()) and "kept: no checkpoint" in first.stdout
    assert max(map(len, first.stdout.split("@: at an")[0].splitlines())) <= 80
    before = results(output)
    monkeypatch.setattr(sweep_module, "evaluate_all", None)  # nothing is scored or timed again
    monkeypatch.setattr(sweep_module, "decode_speed", None)
    again = cli(*given, "--keep", "all", "--max-ppl-increase", "0.0001%")
    assert again.exit_code == 0, again.output
    assert "no setting stays within 0.0001% more perplexity; the closest is" in again.stdout
    assert [row["quality"] for row in results(output)] == [row["quality"] for row in before]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["wanda-0.5"]  # anew


def test_tasks_are_run_on_every_setting(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """lm-eval's values by setting; what lm-eval computes is tested in test_harness.py."""
    from prune_llm_eval import task_values

    asked = []

    def values(directory: Path, levels: tuple[str, ...], given: Any) -> Any:
        asked.append((directory.name, levels, given["tasks"], given["limit"]))
        own = 0.5 if directory == tiny_llama else 0.25
        return {level: {"mine acc": (own, None)} for level in ("dense", *levels)}

    monkeypatch.setattr(task_values, "task_values", values)
    monkeypatch.setattr(task_values, "check_tasks", lambda given: None)
    given = arguments(tiny_llama, corpus, other, tmp_path / "out")
    result = cli(*given, "--tasks", "mine", "--limit", 3)
    assert result.exit_code == 0, result.output
    assert asked == [(tiny_llama.name, (), ("mine",), 3), ("wanda-0.5", (), ("mine",), 3)]
    assert "mine acc" in result.stdout and "-0.2500" in result.stdout
    with (tmp_path / "out" / "sweep.csv").open(newline="") as file:
        assert [line["mine acc"] for line in csv.DictReader(file)] == ["0.5", "0.25"]


# -- what is recommended ---------------------------------------------------------------------


def row(name: str, increase: float, speeds: tuple[float, ...], nbytes: int) -> SweepRow:
    import math

    nll = 1.0 + math.log1p(increase)
    quality = Quality(math.exp(nll), nll, 0.1, 100, 10, 11)
    return SweepRow(name, "", "dense", 0.5, None, quality, nbytes, 1.0, {}, speeds)


def found(*rows: SweepRow, target: float = 0.05) -> SweepReport:
    config = {"max_ppl_increase": target, "text": "text", "decoding": {"rounds": 3}}
    return SweepReport("m", "o", config, "", {}, None, {}, list(rows), "kernels")


DENSE_ROW = row("dense", 0.0, (10.0, 11.0, 10.0), 100)


def test_the_fastest_within_the_target_is_recommended() -> None:
    fast, broken = row("fast", 0.02, (20.0, 21.0, 19.0), 60), row("broken", 0.5, (40.0,) * 3, 50)
    report = found(DENSE_ROW, fast, broken, row("small", 0.04, (12.0,) * 3, 55))
    assert report.fastest is fast
    first, second = verdict(report)
    assert "recommended: [bold]fast[/]" in first and "2.00 times" in first and "noise" not in first
    assert "smallest within it: [bold]small[/]" in second
    assert [r.method for r in report.frontier()] == ["broken", "fast", "dense"]
    assert [r.method for r in report.frontier(by_size=True)] == ["broken", "small", "fast", "dense"]


def test_noise_dense_and_nothing_are_said() -> None:
    (line,) = verdict(found(DENSE_ROW, row("fast", 0.02, (10.9, 12.0, 13.0), 100)))
    assert "take it for noise" in line
    slow = row("slow", 0.02, (5.0,) * 3, 60)
    first, second = verdict(found(DENSE_ROW, slow))
    assert "the dense model is the fastest" in first and "smallest within it" in second
    report = found(DENSE_ROW, row("a", 0.3, (50.0,) * 3, 60), row("b", 0.2, (40.0,) * 3, 60))
    (line,) = verdict(report)
    assert report.fastest is DENSE_ROW
    assert "no setting stays within 5% more perplexity" in line
    assert "the closest is b, at +20.00%" in line


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    kept = {points[index] for index in pareto([(float(a), float(b)) for a, b in points])}
    beaten = {
        (a, b) for a, b in points if any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
    }
    assert kept == set(points) - beaten
    assert pareto([(1.0, float("nan")), (float("inf"), 0.0)]) == []


# -- what is refused -------------------------------------------------------------------------


BAD = [
    (["--methods", "wanda,gpt"], "method 'gpt': unknown; choose one of magnitude"),
    (["--quality", "finest"], "quality 'finest': unknown; choose one of fast, balanced, best"),
    (["--methods", ","], "variants: none are given"),
    (["--methods", "wanda,wanda"], "variants wanda 0.5: is given twice"),
    (["--patterns", "0.5,50%"], "variants wanda 0.5: is given twice"),
    (["--patterns", "4:2"], "pattern '4:2': N weights are kept"),
    (["--keep", "some"], "keep 'some': unknown; choose one of best, all, none"),
    (["--max-ppl-increase", "0"], "max_ppl_increase 0.0: must be above 0"),
    (["--activation-levels", "half"], "activation_levels 'half': not a number"),
    (["--activation-criterion", "magnitude"], "--activation-criterion needs --activation-levels"),
    (["--limit", "3"], "--limit needs --tasks"),
    (["--tasks", "mine", "--limit", "0"], "limit 0: must be at least 1"),
    (
        ["--tasks", "mine", "--include-path", "nowhere"],
        "include_path 'nowhere': is not a directory",
    ),
    (["--reconstruction-steps", "3"], "--reconstruction-steps needs --reconstruction"),
    (["--rounds", "0"], "rounds 0: must be at least 1"),
    (["--tokens", "1"], "tokens 1: must be at least 2"),
    (["--tokens", "200"], "context and tokens: 204 together, the model's context is 128"),
    (["--context", "99999"], "context 99999: the prompt comes from the evaluation text"),
    (["--ignore", "model.*"], "nothing to prune: every linear of every block is ignored"),
    (["--set", "mlp.nose=0.5"], "set 'mlp.nose': matches no linear"),
    (["--text", "CALIBRATION"], "of it is in the calibration text"),
    (["--text", "missing.txt"], "no such file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[" ".join(c) for c, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    cli: Cli, changes: list[str], message: str, tiny_llama: Path, corpus: Path, other: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    given = arguments(tiny_llama, corpus, other, tmp_path / "out")
    result = cli(*given, *(str(corpus) if word == "CALIBRATION" else word for word in changes))
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(told) == 1 and told[0].startswith("error: ") and message in told[0], told
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    given = arguments(tiny_llama, corpus, other, tmp_path / "out")
    assert cli(*given).exit_code == 0
    for changes, message in (
        (["--seed", "1"], "was begun with other settings: seed was 0, is 1"),
        (["--patterns", "0.5,2:4"], "variants was wanda 0.5, is wanda 0.5,wanda 2:4"),
        (["--rounds", "3"], "rounds was 2, is 3"),
    ):
        result = cli(*given, *changes)
        assert result.exit_code == 2 and message in result.stderr, result.output
