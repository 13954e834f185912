"""`compare`: its figures are those of pruning and scoring by hand, whatever stops it in between."""

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
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from tiny_models import SIZES, llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm.integration import load
from prune_llm.job import Job
from prune_llm.masks import Pattern
from prune_llm.methods import METHODS, Problem
from prune_llm.report import peak_memory, restart_peak_memory
from prune_llm.saving import DensePart
from prune_llm.sparse_checkpoint import open_stored
from prune_llm.staging import Staging
from prune_llm.statistics import Needs
from prune_llm_eval import comparison
from prune_llm_eval.compare import evaluate_all, zeros_share
from prune_llm_eval.comparison import ComparisonConfig, compare_methods
from prune_llm_eval.journal import JOURNAL_FILE, Journal
from prune_llm_eval.variants import SharedStatistics, Variant

Cli = Callable[..., Any]
FILES = {"comparison.json", "comparison.csv", "comparison.svg", "comparison.png", JOURNAL_FILE}
SAMPLES, SEQ_LEN = 12, 32


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to score on that has nothing of the calibration text."""
    file = tmp_path_factory.mktemp("other") / "other.txt"
    generator = random.Random(3)
    file.write_text(" ".join(generator.choice(["sun", "rain", "31", "oak"]) for _ in range(400)))
    return file


@pytest.fixture
def config(corpus: Path, other: Path) -> ComparisonConfig:
    pruning = PruneConfig(
        calibration=str(corpus), samples=SAMPLES, seq_len=SEQ_LEN, device="cpu", batch_size=5
    )
    return ComparisonConfig(
        methods=("wanda", "sparsegpt"),
        patterns=("0.3", "0.5", "2:4"),
        prune=pruning,
        text=str(other),
        windows=6,
    )


def results(output: Path) -> dict[str, Any]:
    """comparison.json without what differs from run to run: times, memory, its own path."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: kept(entry)
                for name, entry in value.items()
                if "seconds" not in name and name not in ("peak_memory", "output")
            }
        return [kept(entry) for entry in value] if isinstance(value, list) else value

    found: dict[str, Any] = kept(json.loads((output / "comparison.json").read_text()))
    return found


# -- the figures -----------------------------------------------------------------------------


def test_shared_statistics_are_those_of_the_dense_model(
    tiny_llama: Path, config: ComparisonConfig, tmp_path: Path
) -> None:
    """Weights and figures are those of every linear solved by hand on the dense model's inputs."""
    job = Job.open(
        tiny_llama, replace(config.prune, method="sparsegpt"), torch.device("cpu"), None, None
    )
    expected: dict[tuple[str, str, str], torch.Tensor] = {}
    for block in job.walk(survey=True):
        for site, statistics in block.collect(Needs.GRAM).items():
            weights = tuple(linear.module.weight.detach().clone() for linear in site.linears)
            for variant, own in config.configs.items():
                patterns = (Pattern.parse(variant.pattern),) * len(weights)
                problem = Problem(weights, patterns, statistics, own.damping, own.column_block)
                solved = METHODS[variant.method].solve(problem)
                for linear, solution in zip(site.linears, solved, strict=True):
                    name = f"{linear.name}.weight"
                    expected[variant.method, variant.pattern, name] = solution.weight_OI
    report = compare_methods(tiny_llama, config, tmp_path / "out")
    rows = {(row.method, row.pattern): row for row in report.rows}
    assert len(expected) == len(config.configs) * 3 * 7 and len(rows) == 7
    with Journal(tmp_path / "again", {}) as journal:
        (tmp_path / "again" / "work").mkdir()
        pruner = SharedStatistics(
            job, config.configs, lambda *_: None, journal, tmp_path / "again" / "work"
        )
        pruner.prepare()
        for variant in config.configs:
            directory = tmp_path / variant.folder
            directory.mkdir()
            pruner.write(variant, directory)
            stored, row = open_stored(directory), rows[variant.method, variant.pattern]
            for name in stored.packed:
                wanted = expected[variant.method, variant.pattern, name]
                assert torch.equal(stored.read(name), wanted), (variant, name)
            assert len(stored.packed) == 21
            scored = evaluate_all(
                [str(tiny_llama), str(directory)], config.scoring, lambda *_: None
            )
            assert (scored[1].quality, scored[1].nbytes) == (row.quality, row.nbytes)
            assert scored[0].quality == report.dense.quality
            on_disk = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
            assert 0 < on_disk - row.nbytes < 20_000  # the header


def test_shared_statistics_see_what_transformers_computes(
    tiny_llama: Path, config: ComparisonConfig, tmp_path: Path
) -> None:
    """Wanda's masks from inputs seen by hooks on the whole dense model, in float64."""
    from transformers import AutoModelForCausalLM

    given = replace(config, methods=("wanda",), patterns=("2:4",))
    job = Job.open(
        tiny_llama, given.configs[Variant("wanda", "2:4")], torch.device("cpu"), None, None
    )
    assert job.calibration is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    squares: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any) -> None:
            found = args[0].double().square().sum(dim=(0, 1))
            squares[name] = squares.get(name, torch.zeros_like(found)) + found

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(job.calibration.samples_ST)
    with Journal(tmp_path / "work", {}) as journal:
        pruner = SharedStatistics(job, given.configs, lambda *_: None, journal, tmp_path / "work")
        pruner.prepare()
        (tmp_path / "out").mkdir()
        pruned = pruner.write(Variant("wanda", "2:4"), tmp_path / "out")
    stored, differing, total = open_stored(tmp_path / "out"), 0, 0
    for name, square_I in squares.items():
        scores_OI = model.get_submodule(name).weight.double().abs() * square_I.sqrt()
        groups = scores_OI.unflatten(1, (-1, 4)) if scores_OI.shape[1] % 4 == 0 else None
        assert groups is not None
        keep_OI = groups.argsort(-1).argsort(-1).ge(2).flatten(1)
        differing += int((keep_OI != (stored.read(f"{name}.weight") != 0)).sum())
        total += keep_OI.numel()
    assert len(squares) == 21 and pruned.sparsity == 0.5
    assert differing <= 1e-4 * total  # ranks of scores equal to the last digit


def test_own_statistics_are_prunes(
    tiny_llama: Path, config: ComparisonConfig, tmp_path: Path
) -> None:
    given = replace(
        config, statistics="own", methods=("magnitude", "wanda"), patterns=("0.5", "2:4")
    )
    report = compare_methods(tiny_llama, given, tmp_path / "out")
    assert report.calibration_seconds == 0
    for row, (variant, own) in zip(report.rows[1:], given.configs.items(), strict=True):
        directory = tmp_path / variant.folder
        pruned = prune(tiny_llama, own, directory)
        scored = evaluate_all([str(tiny_llama), str(directory)], given.scoring, lambda *_: None)
        assert (row.method, row.pattern) == (variant.method, variant.pattern)
        assert (row.quality, row.nbytes) == (scored[1].quality, scored[1].nbytes)
        assert row.sparsity == pruned.sparsity and row.nbytes == pruned.bytes_after


def other_architectures() -> dict[str, Any]:
    """Weights stored transposed; experts, of which some are reached by few tokens."""
    from transformers import GPT2Config, MixtralConfig

    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    experts = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "gpt2": GPT2Config(vocab_size=264, bos_token_id=0, eos_token_id=1, **gpt2),
        "mixtral": MixtralConfig(**(SIZES | experts)),
    }


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_architectures(name: str, config: ComparisonConfig, tmp_path: Path) -> None:
    """Magnitude asks no statistics, so that shared ones give what `prune` does."""
    model = save_model(tmp_path / "model", other_architectures()[name])
    given = replace(config, methods=("magnitude", "sparsegpt"), patterns=("2:4",))
    _, plain, repaired = compare_methods(model, given, tmp_path / "out").rows
    prune(model, given.configs[Variant("magnitude", "2:4")], tmp_path / "alone")
    scored = evaluate_all([str(model), str(tmp_path / "alone")], given.scoring, lambda *_: None)
    assert (plain.quality, plain.nbytes) == (scored[1].quality, scored[1].nbytes)
    assert repaired.nbytes == plain.nbytes and repaired.sparsity == 0.5
    assert repaired.quality.kl is not None and plain.quality.kl is not None
    assert 0 < repaired.quality.kl < plain.quality.kl


def test_own_takes_what_cannot_be_shared(
    tiny_llama: Path, config: ComparisonConfig, tmp_path: Path
) -> None:
    pruning = replace(config.prune, target="dense")
    given = replace(config, prune=pruning, methods=("wanda",), patterns=("0.5",), statistics="own")
    report = compare_methods(tiny_llama, given, tmp_path / "out")
    prune(tiny_llama, replace(pruning, method="wanda"), tmp_path / "alone")
    scored = evaluate_all(
        [str(tiny_llama), str(tmp_path / "alone")], given.scoring, lambda *_: None
    )
    assert report.rows[1].quality == scored[1].quality


def test_methods_that_need_no_text_read_none(
    tiny_llama: Path, config: ComparisonConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_llm.windows.load_calibration", None)  # would fail
    pruning = replace(config.prune, calibration=None)
    for statistics in ("shared", "own"):
        given = replace(
            config, prune=pruning, methods=("magnitude",), patterns=("0.5",), statistics=statistics
        )
        report = compare_methods(tiny_llama, given, tmp_path / statistics)
        assert report.calibration is None and report.rows[1].sparsity == 0.5


# -- stopped and gone on ---------------------------------------------------------------------


class Stop(BaseException):
    """Like a kill: nothing catches it."""


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, corpus: Path, other: Path, tmp_path_factory: Any) -> Path:
    """An uninterrupted run of `small`."""
    output = tmp_path_factory.mktemp("whole") / "out"
    compare_methods(tiny_llama, small(corpus, other), output)
    return Path(output)


def small(corpus: Path, other: Path) -> ComparisonConfig:
    pruning = PruneConfig(calibration=str(corpus), samples=SAMPLES, seq_len=SEQ_LEN, device="cpu")
    return ComparisonConfig(("magnitude", "sparsegpt"), ("0.5", "2:4"), pruning, str(other), 6)


def test_stopped_after_every_record_it_ends_the_same(
    tiny_llama: Path,
    corpus: Path,
    other: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each run adds one record and is then stopped, every other time in the middle of a line."""
    add, stops, calibrated = Journal.add, 0, set[int]()

    def stopping(journal: Journal, record: dict[str, Any]) -> None:
        nonlocal stops
        add(journal, record)
        if record["kind"] == "calibrated":  # which every run must do again
            if record["block"] in calibrated:
                return
            calibrated.add(record["block"])
        stops += 1
        if stops % 2:
            with (journal.directory / JOURNAL_FILE).open("a") as file:
                file.write('{"kind": "solved", "blo')
        raise Stop

    monkeypatch.setattr(Journal, "add", stopping)
    for _ in range(100):
        try:
            compare_methods(tiny_llama, small(corpus, other), tmp_path / "out")
            break
        except Stop:
            assert not (tmp_path / "out" / "comparison.json").exists()
    text = (tmp_path / "out" / JOURNAL_FILE).read_text()
    kinds = [json.loads(line)["kind"] for line in text.splitlines()]
    assert (kinds.count("settings"), kinds.count("solved"), kinds.count("scored")) == (1, 12, 5)
    # settings twice: where nothing was solved yet, nothing stayed
    assert stops == 2 + 12 + 5 + len(calibrated) and calibrated == {0, 1, 2}
    assert results(tmp_path / "out") == results(whole)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_stopped_between_weights_and_record_it_solves_again(
    tiny_llama: Path,
    corpus: Path,
    other: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(part: DensePart) -> None:
        part._file.path.write_bytes(b"half")
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(DensePart, "close", half)
        with pytest.raises(Stop):
            compare_methods(tiny_llama, small(corpus, other), tmp_path / "out")
    compare_methods(tiny_llama, small(corpus, other), tmp_path / "out")
    assert results(tmp_path / "out") == results(whole)


def test_lost_weights_are_refused(
    tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(SharedStatistics, "write", stop)
        with pytest.raises(Stop):
            compare_methods(tiny_llama, small(corpus, other), tmp_path / "out")
    (tmp_path / "out" / "work" / "sparsegpt-2of4" / "block-00001.part").unlink()
    with pytest.raises(ValueError, match=r"sparsegpt-2of4: .* lost.*give another output"):
        compare_methods(tiny_llama, small(corpus, other), tmp_path / "out")


def arguments(model: Path, corpus: Path, other: Path, output: Path) -> list[str]:
    given = ["compare", model, "-o", output, "--methods", "magnitude,sparsegpt"]
    given += ["--patterns", "0.5,2:4", "--calibration", corpus, "--samples", SAMPLES]
    given += ["--seq-len", SEQ_LEN, "--text", other, "--windows", 6, "--device", "cpu"]
    return [str(word) for word in given]


def test_killed_at_random_it_ends_the_same(
    tiny_llama: Path, corpus: Path, other: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL somewhere; then the same command to its end."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "prune_llm", *arguments(tiny_llama, corpus, other, output)]
    # as many threads as `whole` was made with, which tests before this one may have changed
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    least = random.Random(os.getpid()).randint(2, 18)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None and lines(output) < least:
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it was faster than the kill"
    assert not (output / "comparison.json").exists()
    before = (output / JOURNAL_FILE).read_text().splitlines()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    after = (output / JOURNAL_FILE).read_text().splitlines()
    assert len(before) >= least and after[: len(before) - 1] == before[:-1]
    assert results(output) == results(whole)


def lines(output: Path) -> int:
    file = output / JOURNAL_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_ctrl_c_says_how_to_go_on(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    given = arguments(tiny_llama, corpus, other, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(SharedStatistics, "write", interrupt)
        result = cli(*given)
    assert result.exit_code == 1 and "stopped: the same command goes on in" in result.stderr
    with monkeypatch.context() as patched:
        patched.setattr(SharedStatistics, "_solve", None)  # all were solved
        assert cli(*given).exit_code == 0
    with monkeypatch.context() as patched:  # before anything was solved nothing stays
        patched.setattr(SharedStatistics, "_solve", interrupt)
        result = cli(*arguments(tiny_llama, corpus, other, tmp_path / "early"))
    assert result.exit_code == 1 and "goes on" not in result.stderr
    assert not (tmp_path / "early").exists()


def test_a_finished_one_is_shown_again_at_another_knee(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    given = arguments(tiny_llama, corpus, other, tmp_path / "out")
    first = cli(*given)
    assert first.exit_code == 0, first.output
    for shown in ("dense", "sparsegpt 2:4", "token_ppl", "KL", "flipped", "on disk", "memory"):
        assert shown in first.stdout
    assert "essential sparsity, up to 5% more perplexity" in first.stdout
    assert max(map(len, first.stdout.split("KL: from")[0].splitlines())) <= 80
    before = json.loads((tmp_path / "out" / "comparison.json").read_text())
    monkeypatch.setattr(comparison, "compare", None)  # nothing is scored again
    monkeypatch.setattr(SharedStatistics, "_solve", None)
    again = cli(*given, "--knee", "900%")
    assert again.exit_code == 0, again.output
    assert "up to 900% more perplexity" in again.stdout
    after = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert after["rows"] == before["rows"] and after["knees"] != before["knees"]
    assert after["seconds"] == before["seconds"]


# -- what is refused -------------------------------------------------------------------------


CHANGED = [
    (["--seed", "1"], "seed was 0, is 1"),
    (["--methods", "wanda"], "methods was magnitude,sparsegpt, is wanda"),
    (["--patterns", "0.5"], "patterns was 0.5,2:4, is 0.5"),
    (["--damping", "0.02", "--windows", "5"], "windows was 6, is 5, damping was 0.01, is 0.02"),
    (["--statistics", "own"], "statistics was shared, is own"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGED, ids=[" ".join(c) for c, _ in CHANGED])
def test_other_options_are_refused(
    cli: Cli, changes: list[str], message: str, tiny_llama: Path, corpus: Path, other: Path,
    whole: Path, tmp_path: Path,
) -> None:  # fmt: skip
    given = arguments(tiny_llama, corpus, other, begun(whole, tmp_path))
    result = cli(*given, *changes)
    assert_one_line(result, f"was begun with other settings: {message}")


def begun(whole: Path, tmp_path: Path) -> Path:
    """A comparison that was begun."""
    output = tmp_path / "out"
    output.mkdir()
    (output / JOURNAL_FILE).write_bytes((whole / JOURNAL_FILE).read_bytes())
    return output


def assert_one_line(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(told) == 1 and told[0].startswith("error: ") and message in told[0], told


def test_another_model_text_or_machine_is_refused(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, whole: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", llama_config())
    calibration, text = tmp_path / "calibration.txt", tmp_path / "text.txt"
    calibration.write_text(corpus.read_text())
    text.write_text(other.read_text())
    given = arguments(model, calibration, text, tmp_path / "new")
    assert cli(*given).exit_code == 0
    text.write_text("windy " + other.read_text())
    assert_one_line(cli(*given), "other settings: the evaluation text has changed; repeat")
    text.write_text(other.read_text())
    calibration.write_text("windy " + corpus.read_text())
    assert_one_line(cli(*given), "the calibration text has changed")
    calibration.write_text(corpus.read_text())
    torch.manual_seed(1)
    weights = next(model.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert_one_line(cli(*given), "the model has changed")
    moved = begun(whole, tmp_path)
    record = (moved / JOURNAL_FILE).read_text()
    (moved / JOURNAL_FILE).write_text(record.replace('"torch": "', '"torch": "9', 1))
    result = cli(*arguments(tiny_llama, corpus, other, moved))
    assert_one_line(result, f"torch was 9{torch.__version__}, is {torch.__version__}")


def test_two_at_once_and_other_contents_are_refused(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path
) -> None:
    with Journal(tmp_path / "out", {}):
        result = cli(*arguments(tiny_llama, corpus, other, tmp_path / "out"))
    assert_one_line(result, "another run is writing it")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    result = cli(*arguments(tiny_llama, corpus, other, tmp_path / "full"))
    assert_one_line(result, "exists and holds no comparison; give a new one")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    result = cli(*arguments(tiny_llama, corpus, other, tmp_path / "file"))
    assert_one_line(result, "exists and holds no comparison")
    with Staging(tmp_path / "checkpoint") as staging:
        staging.publish()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / JOURNAL_FILE).write_text("{not json\n")
    result = cli(*arguments(tiny_llama, corpus, other, tmp_path / "damaged"))
    assert_one_line(result, "damaged; give another output")


BAD = [
    (["--methods", "wanda,gpt"], "methods 'gpt': unknown; choose one of magnitude"),
    (["--methods", ","], "methods: none are given"),
    (["--methods", "wanda,wanda"], "methods wanda: is given twice"),
    (["--patterns", "0.5,50%"], "patterns 0.5: is given twice"),
    (["--patterns", "0.5,4:2"], "patterns '4:2': N weights are kept"),
    (["--patterns", "half"], "patterns 'half': neither a sparsity nor N:M"),
    (["--patterns", "0"], "patterns '0': prunes nothing"),
    (["--statistics", "mine"], "statistics 'mine': unknown; choose one of shared, own"),
    (["--knee", "0"], "knee 0: must be above 0"),
    (["--knee", "a lot"], "knee 'a lot': not a number"),
    (["--target", "dense"], "target 'dense': has no statistics that variants could share"),
    (["--reconstruction", "block"], "reconstruction 'block': has no statistics"),
    (["--allocation", "owl"], "allocation 'owl'"),
    (["--windows", "0"], "windows 0: must be at least 1"),
    (["--seq-len", "1"], "seq_len 1: must be at least 2"),
    (["--samples", "0"], "samples 0: must be at least 1"),
    (["--seq-len", "4000"], "seq_len 4000: the model's context is 128"),
    (["--device", "cuda:77"], "device 'cuda:77'"),
    (["--set", "mlp.nose=0.5"], "set 'mlp.nose': matches no linear"),
    (["--ignore", "model.*"], "nothing to prune: every linear of every block is ignored"),
    (["--text", "CALIBRATION"], "of it is in the calibration text"),
    (["--text", "SHORT"], "one sample needs 32"),
    (["--text", "MISSING"], "no such file"),
    (["--calibration", "SHORT"], "one sample needs 32"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[" ".join(c) for c, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    cli: Cli, changes: list[str], message: str, tiny_llama: Path, corpus: Path, other: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "short.txt").write_text("so short")
    places = {"CALIBRATION": corpus, "SHORT": tmp_path / "short.txt", "MISSING": "missing.txt"}
    given = arguments(tiny_llama, corpus, other, tmp_path / "out")
    result = cli(*given, *(places.get(word, word) for word in changes))
    assert_one_line(result, message)
    assert not (tmp_path / "out").exists()


def test_a_broken_model_leaves_nothing(cli: Cli, corpus: Path, other: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "model", llama_config())
    broken = AutoModelForCausalLM.from_pretrained(model)
    broken.model.layers[0].mlp.up_proj.weight.data[3, 4] = float("nan")
    broken.save_pretrained(model)
    result = cli(*arguments(model, corpus, other, tmp_path / "out"))
    assert_one_line(result, "model.layers.0.mlp")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_says_so_first(
    cli: Cli, tiny_llama: Path, corpus: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(Job, "open", None)
    result = cli(*arguments(tiny_llama, corpus, other, tmp_path / "out"))
    assert_one_line(result, "matplotlib is not installed: pip install 'prune-llm[eval]'")
    assert not (tmp_path / "out").exists()


# -- the files -------------------------------------------------------------------------------


def test_files_hold_the_same_figures(whole: Path) -> None:
    report = json.loads((whole / "comparison.json").read_text(), parse_constant=pytest.fail)
    with (whole / "comparison.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(report["rows"]) == len(table) == 5
    for row, line in zip(report["rows"], table, strict=True):
        assert (row["method"], row["pattern"]) == (line["method"], line["pattern"])
        assert float(line["token_ppl"]) == row["quality"]["token_ppl"]
        assert (float(line["kl"]) if line["kl"] else None) == row["quality"]["kl"]
        assert int(line["bytes"]) == row["nbytes"]
    assert report["rows"][0]["method"] == "dense" and report["text"]["windows"] == 6
    assert set(report["knees"]) == {"magnitude", "sparsegpt"}
    assert report["peak_memory"]["process"] >= report["rows"][1]["peak_memory"]["process"] > 10**7


def test_pictures_show_every_method(whole: Path) -> None:
    from matplotlib.image import imread

    drawn = "".join(ElementTree.parse(whole / "comparison.svg").getroot().itertext())
    for text in ("magnitude", "sparsegpt", "dense", "2:4", "50%", "KL divergence, nats", "5%"):
        assert text in drawn
    pixels = imread(whole / "comparison.png")
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1600
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 20


@pytest.fixture
def report(whole: Path) -> Iterator[Any]:
    """What `draw` is given, to be changed."""
    from prune_llm_eval.comparison_report import ComparisonReport, Row
    from prune_llm_eval.knee import Knee

    saved = json.loads((whole / "comparison.json").read_text())
    saved["rows"] = [Row.restored(row) for row in saved["rows"]]
    saved["knees"] = {name: Knee(**knee) for name, knee in saved["knees"].items()}
    yield ComparisonReport(**saved)


def test_pictures_are_repeatable_and_take_broken_models(report: Any, tmp_path: Path) -> None:
    from prune_llm_eval.comparison_plot import draw

    draw(report, [tmp_path / "one.svg"])
    draw(report, [tmp_path / "two.svg"])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    broken = replace(report.rows[1].quality, token_ppl=float("inf"), kl=float("nan"))
    report.rows[1] = replace(report.rows[1], quality=broken)
    draw(report, [tmp_path / "broken.svg"])
    for pattern in ("0.5", "2:4"):  # only a line, only a column
        kept = [row for row in report.rows if row.pattern in ("", pattern)]
        draw(replace(report, rows=kept, knees={}), [tmp_path / "part.svg"])


# -- memory ----------------------------------------------------------------------------------


def test_peak_memory_counts_from_a_restart() -> None:
    cpu = torch.device("cpu")
    ones = torch.ones(75_000_000)
    high = peak_memory(cpu)["process"]
    del ones
    if not restart_peak_memory(cpu):
        pytest.skip("this system does not let the peak restart; `compare` then says so (below)")
    assert peak_memory(cpu)["process"] < high - 200_000_000


def test_a_peak_that_cannot_restart_is_said(
    tiny_llama: Path, config: ComparisonConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(config, methods=("magnitude",), patterns=("0.5",))
    assert compare_methods(tiny_llama, given, tmp_path / "out").warnings == []
    monkeypatch.setattr(comparison, "restart_peak_memory", lambda _device: False)
    report = compare_methods(tiny_llama, given, tmp_path / "out")
    assert [text.split(":")[0] for text in report.warnings] == [
        "peak memory is that since the program began"
    ]


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_zeros_of_experts_count(name: str, tmp_path: Path) -> None:
    """Fused or apart, packed or dense."""
    source = FAMILIES[name].save(tmp_path / "model")
    for form in ("dense", "sparse"):
        prune(source, PruneConfig(method="magnitude", format=form), tmp_path / form)
        assert zeros_share(load(tmp_path / form)) == pytest.approx(0.5, abs=2e-3)
