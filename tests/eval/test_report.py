"""`report`: its values are those of the parts that measure; what it refuses and warns of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm.activation.sparsify import SparsifyConfig
from prune_llm.sparse_checkpoint import open_stored
from prune_llm_eval import speed
from prune_llm_eval.compare import EvalConfig, evaluate
from prune_llm_eval.report.gathering import ReportConfig, gather
from prune_llm_eval.report.sparsity import stored_linears

Cli = Callable[..., Any]
TEXT = ("--seq-len", 32, "--windows", 6, "--device", "cpu", "--passages", 1)
SPEED = ("--context", 5, "--batch", 1, "--batch", 2, "--tokens", 3, "--rounds", 3, "--threads", 1)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth means nothing here."""
    monkeypatch.setattr(speed, "BANDWIDTH_BYTES", 1 << 22)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "small", llama_config(), torch.bfloat16)


@pytest.fixture(scope="module")
def packed(dense: Path, corpus: Path) -> Path:
    """Half of the weights, and one level."""
    text = {"calibration": str(corpus), "samples": 8, "seq_len": 32}
    levels = SparsifyConfig(activation_sparsity=(0.4,), allocation="uniform", device="cpu", **text)
    output = dense.parent / "small-50"
    prune(dense, PruneConfig(method="wanda", device="cpu", **text), output, levels=levels)
    return output


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not what was calibrated on."""
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text("seven grey cats and 19 dogs watch the rain, " * 12)
    return file


@pytest.fixture(scope="module")
def report(packed: Path, dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one whole report, made by the command."""
    from click.testing import CliRunner

    from prune_llm.cli import main

    output = tmp_path_factory.mktemp("report") / "new" / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "BANDWIDTH_BYTES", 1 << 22)
        arguments = ("report", packed, "--against", dense, "-o", output, "--text", text,
                     *TEXT, *SPEED, "--max-ppl-increase", "400%")  # fmt: skip
        result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    assert "Within the target of 400.0" in result.stdout and "decoding: " in result.stdout
    return output


@pytest.fixture(scope="module")
def values(report: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((report / "report.json").read_text())
    return found


def test_three_files_and_nothing_else(report: Path, values: dict[str, Any]) -> None:
    assert {file.name for file in report.iterdir()} == {"report.html", "report.md", "report.json"}
    page = (report / "report.html").read_text()
    assert page.count("<figure ") == 9 and values["model"]["sha256"] in page
    assert "small-50" in (report / "report.md").read_text()


def test_quality_is_that_of_eval(
    values: dict[str, Any], packed: Path, dense: Path, text: Path
) -> None:
    config = EvalConfig(
        text=str(text), seq_len=32, windows=6, device="cpu", levels=("40%",), passages=1
    )
    expected = evaluate(str(packed), str(dense), config, lambda *_: None)
    rows = values["quality"]["rows"]
    assert [(r["role"], r["level"]) for r in rows] == [
        ("dense", None), ("model", None), ("level", "40%"),
    ]  # fmt: skip
    for row, own in zip(rows, expected, strict=True):
        assert row["token_ppl"] == own.quality.token_ppl and row["kl"] == own.quality.kl
        assert row["zeros"] == own.zeros and row["skipped"] == own.skipped
    first = expected[0].quality.token_ppl
    for row, own in zip(rows[1:], expected[1:], strict=True):
        assert row["ppl_increase"] == pytest.approx(own.quality.token_ppl / first - 1)
        assert own.forgotten is not None
        told = row["forgotten"]
        assert told["nll_increase"] == pytest.approx(own.forgotten.nll_increase, rel=1e-4)
        assert len(told["passages"][0]["pieces"]) == len(own.forgotten.passages[0].pieces)
    assert values["verdict"]["target"]["within"] == ["model", "level 40%"]


def test_speed_covers_every_variant_and_load(values: dict[str, Any]) -> None:
    section = values["speed"]
    assert [(load["context"], load["batch"]) for load in section["loads"]] == [(5, 1), (5, 2)]
    for load in section["loads"]:
        names = [row["variant"] for row in load["rows"]]
        assert names == ["dense", "model", "level 40%", "transformers"]
        for row in load["rows"]:
            assert len(row["tpot"]["rounds"]) == 3
            assert row["tpot"]["low"] <= row["tpot"]["median"] <= row["tpot"]["high"]
            rate = row["decode_tokens_per_second"]["median"]
            assert rate == pytest.approx(load["batch"] / row["tpot"]["median"])
            assert (row["decode_gain"] is None) == (row["variant"] == "dense")
        dense, model, level, generate = load["rows"]
        assert model["bytes_per_step"] < 0.8 * dense["bytes_per_step"]
        assert dense["bandwidth_share"]["median"] > 0 and dense["cached"]
        assert 0.3 < level["active"] < 0.95
        assert (level["bytes_per_step"] is None) == (load["batch"] > 1)
        assert generate["bytes_per_step"] is None
    assert section["load_average"] >= 0 and section["cores"] >= 1
    assert section["packed_linears"] == 21 and section["baseline"] == "the dense model"


def test_sizes(values: dict[str, Any], packed: Path, dense: Path) -> None:
    rows = {row["role"]: row for row in values["size"]}
    for role, directory in (("dense", dense), ("model", packed)):
        stored = open_stored(directory).nbytes
        assert rows[role]["disk"] == stored
        assert rows[role]["memory"]["weights"] == pytest.approx(stored, rel=0.05)
        assert rows[role]["memory"]["libraries"] > 50e6
    assert rows["model"]["disk"] < 0.8 * rows["dense"]["disk"]


def test_linears_are_as_stored(packed: Path, dense: Path, values: dict[str, Any]) -> None:
    told = json.loads((packed / "prune_report.json").read_text())
    linears = values["sparsity"]["linears"]
    expected = {(one["block"], one["kind"]): one for one in told["linears"]}
    assert [(one["block"], one["kind"]) for one in linears] == list(expected)
    for one in linears:
        own = expected[one["block"], one["kind"]]
        assert one["sparsity"] == pytest.approx(own["achieved"]) and one["error"] == own["error"]
        assert one["asked"] == 0.5 and one["weights"] == own["weights"]
    # of others' checkpoints: counted, with no error known
    plain = stored_linears(open_stored(dense), {})
    assert len(plain) == 21 and {one["sparsity"] for one in plain} == {0.0}
    assert {one["error"] for one in plain} == {None}


def test_provenance(values: dict[str, Any], packed: Path, dense: Path, text: Path) -> None:
    told = values["provenance"]
    assert told["command"].startswith(f"prune-llm report {packed} --output ")
    assert f"--against {dense}" in told["command"] and told["command"].count("--batch") == 2
    assert "--dtype" not in told["command"], "only what was given"
    assert told["pruning"]["model_sha256"] == values["against"]["sha256"]
    assert told["pruning"]["config"]["method"] == "wanda"
    assert told["environment"]["torch"] == torch.__version__
    assert values["quality"]["text"]["source"] == str(text)
    assert len(values["quality"]["text"]["sha256"]) == 64
    assert not any("not pruned from" in warning for warning in values["warnings"])
    assert {one["how"] for one in values["missing"]} == {
        "--tasks NAME,...", "--beside comparison.json, frontier.json or sweep.json",
    }  # fmt: skip


def test_rendered_again(cli: Cli, report: Path, tmp_path: Path) -> None:
    result = cli("report", "--from", report / "report.json", "-o", tmp_path / "again")
    assert result.exit_code == 0, result.output
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (report / name).read_bytes()


def test_alone_and_only_its_weights(cli: Cli, packed: Path, tmp_path: Path) -> None:
    """Nothing is measured: what is stored is still told, beside the same stored dense."""
    result = cli("report", packed, "-o", tmp_path, "--no-quality", "--no-speed")
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["quality"] is values["speed"] is values["against"] is None
    sizes = {row["role"]: row["disk"] for row in values["size"]}
    tensors = open_stored(packed)
    assert sizes["dense"] == 2 * tensors.elements and sizes["model"] == tensors.nbytes
    assert "--against DENSE" in (tmp_path / "report.html").read_text()


def test_tasks_beside(cli: Cli, packed: Path, dense: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [{"text": f"word {n}", "choices": [" a", " b"], "label": n % 2} for n in range(6)]
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tasks / "which.yaml").write_text(
        "task: which\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'data.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\nmetric_list: [{metric: acc}]\n"
    )
    result = cli(
        "report", packed, "--against", dense, "-o", tmp_path / "out", "--no-quality", "--no-speed",
        "--tasks", "which", "--include-path", tasks, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]["rows"]
    assert [row["model"] for row in rows] == ["dense", "model", "level 40%"]
    assert rows[0]["paired"] is None and "significant" in rows[1]["paired"]
    assert "which, 0-shot" in (tmp_path / "out" / "report.html").read_text()


def test_another_dense_model_is_told(packed: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = save_model(tmp_path / "other", llama_config(initializer_range=0.2), torch.bfloat16)
    config = ReportConfig(quality=None, speed=None)
    found = gather(str(packed), str(other), config, lambda *_: None)
    assert "small-50 was not pruned from this other" in found["warnings"][0]


def test_the_calibration_text_is_told(packed: Path, corpus: Path) -> None:
    quality = EvalConfig(text=str(corpus), seq_len=32, windows=2, device="cpu")
    config = ReportConfig(quality=quality, speed=None)
    warned = gather(str(packed), None, config, lambda *_: None)["warnings"]
    assert any("scored on the text that it was calibrated on" in one for one in warned)
    assert any("2 windows of text" in one for one in warned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "OUT"), "Missing argument 'MODEL'"),
        (("MODEL",), "Missing option '-o'"),
        (("MODEL", "-o", "MODEL/config.json"), "is a file; give a directory"),
        (("MODEL", "-o", "OUT", "--from", "x.json"), "--from takes no MODEL"),
        (("-o", "OUT", "--from", "x.json"), "x.json: cannot be read"),
        (("MODEL", "-o", "OUT", "--level", "70%"), "level '70%': does not exist"),
        (("MODEL", "-o", "OUT", "--level", "70%", "--no-quality", "--no-speed"), "level '70%'"),
        (("MODEL", "-o", "OUT", "--rounds", "0"), "rounds 0: must be at least 1"),
        (("MODEL", "-o", "OUT", "--context", "4000"), "the model's context is 128"),
        (
            ("MODEL", "-o", "OUT", "--against", "MODEL", "--max-ppl-increase", "0"),
            "max_ppl_increase 0: must be above 0",
        ),
        (("MODEL", "-o", "OUT", "--text", "none.txt"), "none.txt"),
        (("MODEL", "-o", "OUT", "--max-ppl-increase", "5%"), "needs a dense model"),
        (("MODEL", "-o", "OUT", "--against", "nowhere"), "'nowhere': no such directory"),
        (("MODEL", "-o", "OUT", "--beside", "none.json"), "beside 'none.json': cannot be read"),
        (("MODEL", "-o", "OUT", "--num-fewshot", "2"), "--num-fewshot needs --tasks"),
        (("MODEL", "-o", "OUT", "--no-speed", "--rounds", "2"), "--rounds does not go with"),
        (("MODEL", "-o", "OUT", "--no-quality", "--windows", "2"), "--windows does not go with"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) else "",
)
def test_bad_input(
    cli: Cli, packed: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """One line, before anything is measured, and nothing written."""
    output = tmp_path / "out"
    given = [a.replace("MODEL", str(packed)).replace("OUT", str(output)) for a in arguments]
    result = cli("report", *given)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert len(result.stderr.strip().splitlines()) == 1 and not output.exists()
