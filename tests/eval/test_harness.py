"""lm-eval tasks: its own numbers, thresholds behind the first token, one line for bad input."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tiny_models import save_tokenizer

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.activation.gates import Gates
from prune_llm.activation.sites import table_sites
from prune_llm.activation.sparsify import SparsifyConfig, sparsify
from prune_llm_eval import task_loading
from prune_llm_eval.harness import MODEL_NAME, PruneLM, first_tokens
from prune_llm_eval.paired import Paired, combine, compare_pairs, jackknife
from prune_llm_eval.perplexity import token_perplexity
from prune_llm_eval.task_values import task_values
from prune_llm_eval.tasks import TaskConfig, TaskReport, evaluate_tasks

Cli = Callable[..., Any]
# lm-eval and what it uses warn of their own future
pytestmark = pytest.mark.filterwarnings("default")
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
metadata: {{version: 1.0}}
"""
CHOICE = """
task: my_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
CHOICE_2 = CHOICE.replace("my_choice", "my_other").replace("{{label}}", "{{1 - label}}")
GROUP = """
group: my_group
task: [my_choice, my_other]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
ANSWER = """
task: my_answer
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text[:1]}}"
generation_kwargs: {until: ["x"], max_gen_toks: 8, do_sample: false}
filter_list:
- name: first
  filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: my_pages
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
HUB = "task: my_hub\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n"
NAMES = ("my_choice", "my_answer", "my_pages")


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, because rounding depends on it, and a cache of datasets of our own."""
    import datasets

    before, cache = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Task files and their data; the texts differ in length, so that batches are padded."""
    place = tmp_path_factory.mktemp("tasks")
    words = corpus.read_text().split()
    lines = []
    for i in range(12):
        text = " ".join(words[7 * i : 7 * i + 2 + i])
        lines.append({"text": text, "choices": words[100 + 3 * i :][: 2 + i % 2], "label": i % 2})
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DATA.format(data=place / "data.jsonl")
    for name, text in {"a": CHOICE, "b": CHOICE_2, "c": ANSWER, "d": ROLLING}.items():
        (place / f"{name}.yaml").write_text(text + data)
    (place / "group.yaml").write_text(GROUP)
    (place / "hub.yaml").write_text(HUB)
    return place


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of every linear pruned, with the levels 30% and 60%."""
    place = tmp_path_factory.mktemp("packed")
    prune(tiny_llama, PruneConfig(method="magnitude", device="cpu"), place / "pruned")
    settings: dict[str, Any] = {"samples": 12, "seq_len": 32, "device": "cpu"}
    config = SparsifyConfig(
        calibration=str(corpus), activation_sparsity=(0.3, 0.6), allocation="uniform", **settings
    )
    sparsify(place / "pruned", config, place / "out")
    return place / "out"


def samples_of(model: Any, tasks: Path, **arguments: Any) -> Any:
    """lm-eval run directly."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model=model, tasks=list(NAMES), task_manager=manager, num_fewshot=2, bootstrap_iters=1000,
        batch_size=5, device="cpu", **arguments,
    )  # fmt: skip


def responses(results: Any) -> list[Any]:
    return [
        (sample["doc_id"], sample["arguments"], sample["resps"])
        for name in NAMES
        for sample in results["samples"][name]
    ]


@pytest.fixture(scope="module")
def own(packed: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The export with zeros, and lm-eval's own transformers model on it."""
    dense = tmp_path_factory.mktemp("export") / "dense"
    prune_llm.export(packed, dense, "dense")
    return dense, samples_of("hf", tasks, model_args={"pretrained": str(dense)})


def test_dequantized_gives_exactly_the_numbers_of_the_export(
    packed: Path, tasks: Path, own: tuple[Path, Any]
) -> None:
    """And lm-eval finds our model by its name."""
    ours = samples_of("prune-llm", tasks, model_args=f"pretrained={packed},dequantize=True")
    assert responses(ours) == responses(own[1])
    assert ours["results"] == own[1]["results"]
    assert ours["config"]["prune_llm_level"] == "dense"


def test_lm_eval_versions_with_entry_points_find_our_model() -> None:
    """Those after 0.4.13 read this group; what is declared must load, and bear the name's class."""
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    (name, value), *rest = declared["lm_eval.models"].items()
    assert (name, rest) == (MODEL_NAME, [])
    assert EntryPoint(name, value, "lm_eval.models").load() is PruneLM is get_model(MODEL_NAME)


def test_packed_gives_the_numbers_of_the_export(
    packed: Path, tasks: Path, own: tuple[Path, Any]
) -> None:
    """The kernels add the products in another order. float32 has 6e-8 of relative rounding; over
    three blocks of 64 to 100 inputs that stays under 1e-5 of a text's loglikelihood."""
    config = TaskConfig(NAMES, 2, batch_size=5, include_path=str(tasks), device="cpu")
    report = evaluate_tasks(str(packed), str(own[0]), config, lambda *_: None)
    theirs = own[1]["results"]
    assert {row.task for row in report.rows} == set(NAMES)
    for row in report.rows:
        key, stderr = f"{row.metric},{row.filter}", f"{row.metric}_stderr,{row.filter}"
        if row.paired is None:  # the export itself: the very same numbers
            assert row.value == theirs[row.task][key]
            assert theirs[row.task][stderr] in (row.stderr, "N/A")
        else:
            assert row.value == pytest.approx(theirs[row.task][key], rel=1e-5)
            assert abs(row.paired.difference) <= 1e-5 * abs(row.value)
        assert row.num_fewshot == 2 and row.documents == 12


def table_gates(model: Any, level: str, first_dense: int) -> Gates:
    levels = prune_llm.activation.decoding.model_levels(model)
    assert levels is not None
    thresholds = levels.table.level(level).thresholds
    sites = table_sites(model, levels.table)
    return Gates(sites, levels.scales, thresholds, first_dense=first_dense)


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]  # type: ignore[arg-type]


TEXTS = ["a quick fox", "the lazy dog jumps over", "eggs", "42 brown eggs boil while a"]


def test_first_tokens_are_found_in_padded_rows_and_behind_a_cache() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(first_tokens(ids, mask, 0), expected)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    assert not first_tokens(ids[:, :1], longer, 4).any()
    assert torch.equal(first_tokens(ids, None, 0), torch.tensor([[1, 0, 0, 0]] * 2).bool())
    assert not first_tokens(ids, None, 7).any()
    with pytest.raises(ValueError, match="batch size 1, or at level 'dense'"):
        first_tokens(ids, mask[:, None, None], 0)


def test_answers_of_a_padded_batch_are_those_of_each_prompt_alone(packed: Path) -> None:
    """At a level, against whole passes without a cache in which column 0 alone is dense."""
    lm = PruneLM(str(packed), level="60%", batch_size=4, device="cpu")
    given = {"until": ["never said"], "max_gen_toks": 10, "do_sample": False}
    answers = lm.generate_until(requests("generate_until", [(t, given) for t in TEXTS]), True)
    gates = table_gates(lm.model, "60%", first_dense=1)
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = lm.tok_encode(text)
        for _ in range(10):
            with torch.no_grad(), gates:
                logits = lm.model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == lm.eot_token_id:
                break
        assert answer == lm.tok_decode(ids[len(lm.tok_encode(text)) :])


def test_left_padding_does_not_move_the_first_token(packed: Path) -> None:
    lm = PruneLM(str(packed), level="60%", device="cpu")
    ids, mask = lm.tok_batch_encode(TEXTS)
    assert mask[0, 0] == 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert lm.gates is not None
    column_0 = table_gates(lm.model, "60%", first_dense=1)
    logits = []
    with torch.no_grad():
        for gates in (lm.gates, column_0):
            with gates:
                out = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions)
            logits.append(out.logits[0, -1])
        with column_0:
            alone = lm.model(torch.tensor([lm.tok_encode(TEXTS[0])])).logits[0, -1]
    assert torch.allclose(logits[0], alone, atol=1e-4)
    assert not torch.allclose(logits[1], alone, atol=1e-2)  # what a fixed column would give


def test_loglikelihoods_at_a_level_are_those_of_eval_without_tasks(packed: Path) -> None:
    """Scored texts are padded on the right; skipped inputs are counted without the padding."""
    shares = []
    for batch_size in (1, 4):
        lm = PruneLM(str(packed), level="60%", batch_size=batch_size, device="cpu")
        scored = lm.loglikelihood_rolling(requests("x", [(text,) for text in TEXTS]), True)
        gates = table_gates(lm.model, "60%", first_dense=1)
        for text, found in zip(TEXTS, scored, strict=True):
            ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
            with gates:
                expected = token_perplexity(lm.model, ids)
            dense = token_perplexity(lm.model, ids)
            # the last token is read there and not here; it predicts nothing
            assert found == pytest.approx(-expected.nll * expected.tokens, rel=1e-5)
            assert abs(found + dense.nll * dense.tokens) > 1e-3
        assert lm.gates is not None
        shares.append(lm.gates.sparsity)
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert 0.5 < shares[0] < 0.7


@pytest.fixture(scope="module")
def report(packed: Path, tiny_llama: Path, tasks: Path) -> TaskReport:
    config = TaskConfig(
        (*NAMES, "my_group"), batch_size=4, include_path=str(tasks), levels=("60%",), device="cpu"
    )
    with pytest.raises(ValueError, match="Duplicate task"):
        evaluate_tasks(str(packed), str(tiny_llama), config, lambda *_: None)
    config = TaskConfig(
        ("my_p*", "my_group"), batch_size=4, include_path=str(tasks), levels=("60%",), device="cpu"
    )
    return evaluate_tasks(str(packed), str(tiny_llama), config, lambda *_: None)


def test_the_report_pairs_documents(report: TaskReport, packed: Path, tiny_llama: Path) -> None:
    assert report.models == [str(tiny_llama), str(packed), "level 60%"]
    assert list(report.skipped) == ["level 60%"] and 0.5 < report.skipped["level 60%"] < 0.7
    assert len(report.rows) == 3 * (2 + 2 + 2 + 1)
    bits = {row.model: row for row in report.rows if row.metric == "bits_per_byte"}
    paired = bits["level 60%"].paired
    assert paired is not None and paired.changed == 12
    assert paired.difference == pytest.approx(
        bits["level 60%"].value - bits[str(tiny_llama)].value, abs=1e-12
    )
    assert 0 < paired.stderr < bits["level 60%"].stderr + bits[str(tiny_llama)].stderr


def test_a_group_has_the_paired_error_of_its_tasks(report: TaskReport) -> None:
    rows = {(row.task, row.metric, row.model): row for row in report.rows}
    group = rows["my_group", "acc", "level 60%"]
    members = [rows[name, "acc", "level 60%"] for name in ("my_choice", "my_other")]
    assert group.documents == 24 and group.paired is not None
    assert group.value == pytest.approx(sum(m.value for m in members) / 2)
    expected = math.hypot(*(m.paired.stderr for m in members if m.paired is not None)) / 2
    assert group.paired.stderr == pytest.approx(expected)


def test_paired_statistics_are_the_textbooks() -> None:
    first = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    second = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    changes = torch.tensor(second) - torch.tensor(first)
    found = compare_pairs(first, second, fmean, True)
    by_leaving_out = compare_pairs(first, second, lambda v: sum(v) / len(v), True)
    assert by_leaving_out.stderr == pytest.approx(found.stderr)
    assert found.difference == pytest.approx(float(changes.mean()))
    assert found.stderr == pytest.approx(float(changes.std() / 8**0.5))
    assert (found.changed, found.better, found.significant) == (4, 1, False)
    grouped = jackknife(lambda ids: sum(ids) / len(ids), 1000)  # in order: a trend
    assert grouped == pytest.approx(stdev(range(1000)) / 1000**0.5, rel=0.1)
    assert math.isnan(jackknife(lambda ids: 0.0, 1))


def test_significance_is_only_claimed_where_it_can_be() -> None:
    assert Paired(0.3, 0.1).significant is True
    assert Paired(0.1, 0.1).significant is False
    assert Paired(0.0, 0.0).significant is False
    assert Paired(0.5, 0.0).significant is None
    assert Paired(0.5, math.nan).significant is None
    assert combine([Paired(1.0, 0.3, 1, 1), Paired(0.0, 0.4)], [1, 1]) == Paired(0.5, 0.25)


def test_the_command_prints_and_writes(cli: Cli, packed: Path, tasks: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    result = cli(
        "eval", packed, "--tasks", "my_choice,my_answer", "--include-path", tasks, "--limit", 4,
        "--num-fewshot", 1, "--batch-size", 2, "--level", "30%", "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("my_choice acc 1-shot (4)", "level 30%", "differs", "first 4 documents", "rough"):
        assert text in " ".join(result.output.split())
    assert max(len(line) for line in result.output.splitlines()[:15]) <= 80
    found = json.loads(file.read_text())
    assert found["lm_eval"] and found["limit"] == 4 and len(found["rows"]) == 6
    assert found["rows"][-1]["filter"] == "first"
    assert found["rows"][-1]["paired"].keys() == {
        "difference", "stderr", "changed", "better", "significant"
    }  # fmt: skip


def test_values_go_into_the_card(cli: Cli, packed: Path, tasks: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    directory = Path(shutil.copytree(packed, tmp_path / "packed"))
    result = cli(
        "eval", directory, "--tasks", "my_choice", "--include-path", tasks, "--limit", 4,
        "--level", "30%", "--json", tmp_path / "rows.json", "--update-card",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    card = ModelCard.load(directory / "README.md", ignore_metadata_errors=False)
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        (f"{row['metric']}{', level 30%' if row['model'] == 'level 30%' else ''}", row["value"])
        for row in rows
    ]
    assert "Only the first 4 documents" in card.text


def test_a_sweep_takes_the_same_values(packed: Path, tasks: Path) -> None:
    settings = {"tasks": ("my_choice",), "include_path": str(tasks), "device": "cpu"}
    found = task_values(packed, ("30%",), settings)
    config = TaskConfig(("my_choice",), include_path=str(tasks), levels=("30%",), device="cpu")
    report = evaluate_tasks(str(packed), None, config, lambda *_: None)
    for row in report.rows:
        level = "30%" if row.model == "level 30%" else "dense"
        assert found[level][f"my_choice {row.metric}"] == (row.value, row.stderr)
    assert [len(values) for values in found.values()] == [2, 2]


def test_what_lm_eval_does_in_silence_is_said(packed: Path, tmp_path: Path) -> None:
    lines = [
        {"text": f"{animal} " * 50, "choices": [" dog", " egg"], "label": 0}
        for animal in ("fox", "hen")
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = CHOICE + "num_fewshot: 0" + DATA.format(data=tmp_path / "data.jsonl")
    (tmp_path / "task.yaml").write_text(task)
    config = TaskConfig(("my_choice",), 3, include_path=str(tmp_path), device="cpu")
    report = evaluate_tasks(str(packed), None, config, lambda *_: None)
    cut, shots = report.notes
    assert "4 warnings of lm-eval that texts were cut on the left" in cut
    assert shots == "my_choice: stays 0-shot, as its definition says"


def test_without_lm_eval_the_extra_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (("eval", "MODEL", "--tasks", "arc_easy"), ("lm-eval", "ls", "tasks")):
        one_line(cli(*arguments), "lm-eval is not installed: pip install 'prune-llm[eval]'")


BAD = [
    (["--tasks", "my_choise"], "task 'my_choise': unknown; did you mean my_choice"),
    (["--tasks", "nothing_*"], "task 'nothing_*': unknown"),
    (["--tasks", ","], "tasks: there are none"),
    (["--tasks", "my_hub,my_choice"], "tasks my_hub (nobody/nothing): their data is not on this"),
    (["--tasks", "my_choice", "--level", "45%"], "level '45%': does not exist; this model has"),
    (["--tasks", "my_choice", "--apply-chat-template"], "has no chat template"),
    (["--tasks", "my_choice", "--num-fewshot", "-1"], "num_fewshot -1: must be at least 0"),
    (["--tasks", "my_choice", "--limit", "0"], "limit 0: must be at least 1"),
    (["--tasks", "my_choice", "--device", "cuda:7"], "CUDA devices that torch can use"),
    (["--tasks", "my_choice", "--dtype", "int3"], "dtype 'int3': unknown"),
    (["--tasks", "my_choice", "--seq-len", "4"], "--seq-len does not go with --tasks"),
    (["--limit", "4"], "--limit needs --tasks"),
]


@pytest.fixture
def local_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own tasks take seconds to read; names are looked up in them in the same way."""

    def manager(include_path: str | None = None, **_: Any) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(task_loading, "TaskManager", manager)


@pytest.mark.usefixtures("local_tasks_only")
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line(
    cli: Cli, arguments: list[str], message: str, packed: Path, tasks: Path
) -> None:
    include = ["--include-path", tasks] if "--tasks" in arguments else []
    one_line(cli("eval", packed, *include, *arguments), message)


def one_line(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


@pytest.mark.usefixtures("local_tasks_only")
def test_a_task_file_that_cannot_be_read_is_named(cli: Cli, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [my_task\n")
    result = cli("eval", packed, "--tasks", "my_task", "--include-path", tmp_path)
    one_line(result, "broken.yaml")
    (tmp_path / "data.yaml").write_text("task: lost" + DATA.format(data=tmp_path / "none.jsonl"))
    result = cli("eval", packed, "--tasks", "lost", "--include-path", tmp_path)
    one_line(result, "task 'lost': cannot be loaded")


def test_tokenizers_that_differ(cli: Cli, packed: Path, tasks: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = tmp_path / "other"
    prune_llm.load(packed, dequantize=True).save_pretrained(other)
    assert AutoModelForCausalLM.from_pretrained(other)
    save_tokenizer(other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(other)
    result = cli(
        "eval", packed, "--against", other, "--tasks", "my_choice", "--include-path", tasks
    )
    one_line(result, "have different tokenizers (vocabularies of 259 and 258 tokens")


def test_unknown_model_arguments_are_refused(packed: Path) -> None:
    with pytest.raises(ValueError, match="model argument 'levle': unknown; there are"):
        PruneLM(str(packed), levle="30%")
    with pytest.raises(ValueError, match="level '45%': does not exist; this model has dense, 30%"):
        PruneLM(str(packed), level="45%")
