"""lm-eval tasks on one or two models and their activation levels, with paired differences.

Values are lm-eval's own: its tasks, prompts, metrics and aggregates, on `harness.PruneLM`. Standard
errors are its own too where it has one; for others, such as word_perplexity, a jackknife over
documents. Differences are from the first model, document by document: see paired.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.metrics import mean
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from prune_llm.activation.levels import DENSE, LevelTable
from prune_llm.calibration import load_tokenizer
from prune_llm.config import select_device
from prune_llm.sparse_checkpoint import SparseCheckpoint, open_stored
from prune_llm_eval.harness import PruneLM
from prune_llm_eval.paired import Paired, combine, compare_pairs, jackknife
from prune_llm_eval.task_loading import LoadedTasks, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnModel = Callable[[str, int, int], None]
# resamples for the few metrics whose standard error lm-eval bootstraps; its own default of 100,000
# takes minutes
BOOTSTRAP = 1000
# tokenizers that differ nowhere here and have one vocabulary are taken for the same
PROBE = "Once upon a time, in 1984, she said: “naïve café” -- x_1 = {a[0]};\n\t    İstanbul 漢字 🙂"


@dataclass(frozen=True)
class TaskConfig:
    """What to run and how.

    Attributes:
        tasks: names of tasks, groups or tags, patterns, or YAML files.
        num_fewshot: examples in front of each question; None: as each task says.
        limit: only the first so many documents of each task.
        include_path: a directory with further task files.
        levels: of the last model, each a model of its own; "dense" needs none.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    include_path: str | None = None
    apply_chat_template: bool = False
    levels: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks: there are none; give one or more, such as --tasks arc_easy")
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value}: must be at least {least}")


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task for one model.

    Attributes:
        model: its name, or "level NAME" for a level of the last model.
        filter: what lm-eval did to the answers first; "none" for most tasks.
        stderr: nan where there is none. documents: those that the metric was taken over.
        paired: the difference from the first model; None in the first model's own rows.
    """

    task: str
    metric: str
    filter: str
    model: str
    value: float
    stderr: float
    documents: int
    num_fewshot: int
    higher_is_better: bool | None
    paired: Paired | None = None


@dataclass(frozen=True)
class TaskReport:
    """Rows by task, metric and model. ``skipped``: what each level skipped, weighted by weights."""

    rows: list[TaskRow]
    models: list[str]
    skipped: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lm_eval: str = ""


@dataclass(frozen=True)
class _Run:
    """lm-eval's results for one model: its table, and the values by task and (metric, filter)."""

    model: str
    results: dict[str, Any]
    values: dict[str, dict[tuple[str, str], dict[int, Any]]]
    truncated: int


def evaluate_tasks(
    model: str, against: str | None, config: TaskConfig, on_model: OnModel
) -> TaskReport:
    """Run tasks on ``against``, where given, then on ``model`` and on each of its levels.

    Raises:
        ValueError: models, levels or tasks that cannot be run, before anything is run.
    """
    select_device(config.device)
    names = [model] if against is None else [against, model]
    checkpoints = [open_stored(name) for name in names]
    _check_levels(model, checkpoints[-1], config.levels)
    _check_tokenizers(names, checkpoints, config.apply_chat_template)
    loaded = load_tasks(config.tasks, config.include_path)
    runs: list[_Run] = []
    skipped: dict[str, float] = {}
    total = len(names) + len(config.levels)
    for place, (name, checkpoint) in enumerate(zip(names, checkpoints, strict=True)):
        lm = PruneLM(
            str(checkpoint.directory),
            batch_size=config.batch_size,
            device=config.device,
            dtype=config.dtype,
        )
        levels = config.levels if place == len(names) - 1 else ()
        for label, level in [(name, DENSE), *((f"level {level}", level) for level in levels)]:
            on_model(label, len(runs), total)
            lm.use_level(level)
            runs.append(_run(label, lm, loaded, config))
            if lm.gates is not None:
                skipped[label] = lm.gates.sparsity
        del lm  # before the next one is loaded
    rows = _task_rows(runs, loaded) + _group_rows(runs, loaded)
    notes = _notes(runs, config)
    return TaskReport(rows, [run.model for run in runs], skipped, notes, version("lm-eval"))


def _check_levels(model: str, checkpoint: SparseCheckpoint, levels: Sequence[str]) -> None:
    settings = (checkpoint.config.get("quantization_config") or {}).get("activation")
    for level in levels:
        if settings:
            LevelTable.from_json(settings).level(level)
        else:
            raise ValueError(
                f"level {level!r}: {model!r} has no activation levels; prune-llm sparsify makes "
                "them"
            )


def _check_tokenizers(
    names: Sequence[str], checkpoints: Sequence[SparseCheckpoint], chat: bool
) -> None:
    tokenizers = [load_tokenizer(checkpoint.directory) for checkpoint in checkpoints]
    for name, tokenizer in zip(names, tokenizers, strict=True):
        if chat and not tokenizer.chat_template:
            raise ValueError(f"apply_chat_template: the tokenizer of {name!r} has no chat template")
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        different = _difference(tokenizers[0], tokenizer, chat)
        if different is not None:
            raise ValueError(
                f"{names[0]!r} and {name!r} have different tokenizers ({different}); compare "
                "models that share a tokenizer"
            )


def _difference(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, chat: bool
) -> str | None:
    if first.get_vocab() != second.get_vocab():
        return f"vocabularies of {len(first)} and {len(second)} tokens, not the same ones"
    if first.encode(PROBE) != second.encode(PROBE):
        return "the same text becomes different tokens"
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(first, token) != getattr(second, token):
            return f"{token} {getattr(first, token)} and {getattr(second, token)}"
    if chat and first.chat_template != second.chat_template:
        return "their chat templates"
    return None


def _run(label: str, lm: PruneLM, loaded: LoadedTasks, config: TaskConfig) -> _Run:
    _prepare(loaded, config)
    with _count_truncations() as truncated:
        try:
            results = evaluate(
                lm,
                loaded.found,
                limit=config.limit,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=True,
                bootstrap_iters=BOOTSTRAP,
            )
        except (AssertionError, KeyError) as error:  # how lm-eval refuses what a task asks for
            raise ValueError(f"{label}: lm-eval refuses the tasks ({error})") from error
    values: dict[str, dict[tuple[str, str], dict[int, Any]]] = {}
    for task, samples in results.pop("samples").items():
        own = values.setdefault(task, {})
        for sample in samples:
            for metric in sample["metrics"]:
                key = metric, sample["filter"]
                own.setdefault(key, {})[sample["doc_id"]] = sample[metric]
    return _Run(label, results, values, truncated[0])


def _prepare(loaded: LoadedTasks, config: TaskConfig) -> None:
    """Seeds and examples as lm-eval's simple_evaluate has them.

    That function is not called because it also runs git and looks through the machine.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in loaded.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (config.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def _count_truncations() -> Iterator[list[int]]:
    """How often lm-eval cut a text to the model's context: it says so only in its log."""
    count = [0]

    class Counter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            count[0] += "runcati" in record.getMessage()

    logger, handler = logging.getLogger("lm_eval"), Counter(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield count
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _task_rows(runs: Sequence[_Run], loaded: LoadedTasks) -> list[TaskRow]:
    rows = []
    for task, metrics in runs[0].values.items():
        for metric, filter_ in metrics:
            if f"{metric},{filter_}" in runs[0].results["results"][task]:
                aggregate = _aggregate(loaded.tasks[task], metric)
                rows += [_row(run, runs[0], task, (metric, filter_), aggregate) for run in runs]
    return rows


def _aggregate(task: Any, metric: str) -> Callable[[Sequence[Any]], float]:
    """lm-eval's; a mean for metrics without one, as lm-eval does."""
    found: Callable[[Sequence[Any]], float] = task.aggregation().get(metric, mean)
    return fmean if found is mean else found


def _row(
    run: _Run,
    first: _Run,
    task: str,
    key: tuple[str, str],
    aggregate: Callable[[Sequence[Any]], float],
) -> TaskRow:
    results = run.results["results"][task]
    by_document = run.values[task][key]
    own = list(by_document.values())
    higher = run.results["higher_is_better"].get(task, {}).get(key[0])
    stderr = results.get(f"{key[0]}_stderr,{key[1]}")
    if not isinstance(stderr, int | float):
        stderr = jackknife(lambda ids: aggregate([own[i] for i in ids]), len(own))
    theirs = first.values[task][key]
    paired = None
    if run is not first and by_document.keys() == theirs.keys():
        pairs = [(theirs[document], by_document[document]) for document in by_document]
        paired = compare_pairs([a for a, _ in pairs], [b for _, b in pairs], aggregate, higher)
    return TaskRow(
        task,
        *key,
        run.model,
        float(results[",".join(key)]),
        float(stderr),
        len(own),
        run.results["n-shot"].get(task, 0),
        higher,
        paired,
    )


def _group_rows(runs: Sequence[_Run], loaded: LoadedTasks) -> list[TaskRow]:
    """Groups that have a value of their own, such as mmlu."""
    rows = []
    for name, metrics in runs[0].results.get("groups", {}).items():
        members = [task.task_name for task in loaded.groups[name].get_all_tasks()]
        for key in metrics:
            metric, _, filter_ = key.partition(",")
            if filter_ and not metric.endswith("_stderr"):
                for run in runs:
                    own = _members(run, runs[0], members, (metric, filter_), loaded)
                    rows += [_group_row(name, run, own, runs[0])] if own else []
    return rows


def _members(
    run: _Run, first: _Run, tasks: Sequence[str], key: tuple[str, str], loaded: LoadedTasks
) -> list[TaskRow]:
    return [
        _row(run, first, task, key, _aggregate(loaded.tasks[task], key[0]))
        for task in tasks
        if key in run.values.get(task, {})
    ]


def _group_row(group: str, run: _Run, members: Sequence[TaskRow], first: _Run) -> TaskRow:
    metric, filter_ = members[0].metric, members[0].filter
    key = f"{metric},{filter_}"
    value = float(run.results["groups"][group][key])
    stderr = run.results["groups"][group].get(f"{metric}_stderr,{filter_}")
    paired = None
    if run is not first:
        difference = value - float(first.results["groups"][group][key])
        paired = _group_difference(members, value, difference)
    return TaskRow(
        group,
        metric,
        filter_,
        run.model,
        value,
        float(stderr) if isinstance(stderr, int | float) else math.nan,
        sum(member.documents for member in members),
        members[0].num_fewshot,
        members[0].higher_is_better,
        paired,
    )


def _group_difference(members: Sequence[TaskRow], value: float, difference: float) -> Paired:
    """With a standard error where the group is a mean of its tasks, by size or plain."""
    parts = [member.paired for member in members if member.paired is not None]
    by_size = [float(member.documents) for member in members]
    for weights in (by_size, [1.0] * len(members)):
        mean = math.fsum(w * m.value for w, m in zip(weights, members, strict=True)) / sum(weights)
        if len(parts) == len(members) and math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
            return combine(parts, weights)
    return Paired(difference, math.nan)


def _notes(runs: Sequence[_Run], config: TaskConfig) -> list[str]:
    notes = [
        f"{run.model}: {run.truncated} warnings of lm-eval that texts were cut on the left to the "
        "model's context"
        for run in runs
        if run.truncated
    ]
    if config.num_fewshot is not None:
        shots = runs[0].results["n-shot"]
        fixed = [task for task in runs[0].values if shots.get(task) != config.num_fewshot]
        notes += [f"{task}: stays {shots.get(task)}-shot, as its definition says" for task in fixed]
    if config.limit is not None:
        notes.append(f"only the first {config.limit} documents of each task: no figure to publish")
    return notes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what lm-eval and the libraries below print: progress bars and their own remarks."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
