"""Everything a report says, as one table of plain values: report.json.

A section that was not asked for, or that this model does not have, is None, and `missing` says
what it would take. What was not measured is not guessed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prune_llm.activation.levels import LevelTable
from prune_llm.card_facts import read_report
from prune_llm.checkpoint import Checkpoint
from prune_llm.memory import return_freed_memory
from prune_llm.report import environment
from prune_llm.sparse_checkpoint import SparseCheckpoint, is_sparse, open_stored
from prune_llm_eval.compare import EvalConfig, ModelQuality, evaluate, text_windows
from prune_llm_eval.comparison_report import finite
from prune_llm_eval.report.beside import read_beside
from prune_llm_eval.report.sparsity import stored_linears
from prune_llm_eval.report.speed_section import DENSE, MODEL, fitting_contexts, speed_section
from prune_llm_eval.report.verdict import decide
from prune_llm_eval.throughput import ThroughputConfig

if TYPE_CHECKING:
    from prune_llm_eval.tasks import TaskConfig

SCHEMA = "prune_llm.report"
SCHEMA_VERSION = 1
OnProgress = Callable[[str, int, int], None]
# of what pruning wrote about itself, what a reader of figures needs
PROVENANCE = (
    "model",
    "model_sha256",
    "config",
    "calibration",
    "environment",
    "warnings",
    "seconds",
)


@dataclass(frozen=True)
class ReportConfig:
    """What a report measures.

    Attributes:
        quality: what is scored, at which levels; None: nothing.
        tasks: lm-eval tasks; None: none.
        speed: what is timed; None: nothing. levels: of the model that are timed.
        max_ppl_increase: what may be lost, as a fraction; None: no target.
        beside: files of other runs, to draw beside the model.
        command: that made the report.
    """

    quality: EvalConfig | None = field(default_factory=EvalConfig)
    tasks: TaskConfig | None = None
    speed: ThroughputConfig | None = field(default_factory=ThroughputConfig)
    levels: tuple[str, ...] = ()
    max_ppl_increase: float | None = None
    beside: tuple[str, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        target = self.max_ppl_increase
        if target is not None and not target > 0:
            raise ValueError(f"max_ppl_increase {target:g}: must be above 0, such as 5%")
        if target is not None and self.quality is None:
            raise ValueError("max_ppl_increase: needs the perplexity, which was left out")


def gather(
    model: str, against: str | None, config: ReportConfig, on_progress: OnProgress
) -> dict[str, Any]:
    """Measure everything and put it into the values of report.json.

    Raises:
        ValueError: a model, text, level, task or file that cannot be used.
    """
    started = time.perf_counter()
    checkpoint = open_stored(model)
    dense = None if against is None else open_stored(against)
    levels = level_names(checkpoint)
    beside = [read_beside(Path(file)) for file in config.beside]
    _check(checkpoint, config)
    pruned = read_report(checkpoint.directory)
    on_progress("reading the weights", 0, 1)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "model": _about(checkpoint, model, levels),
        "against": None if dense is None else _about(dense, str(against), []),
        "target": config.max_ppl_increase,
        "sparsity": {"linears": stored_linears(checkpoint, pruned)},
        "size": _size(checkpoint, dense),
        "quality": None,
        "tasks": None,
        "speed": None,
        "beside": beside,
    }
    if config.quality is not None:
        report["quality"] = _quality(model, against, config.quality, on_progress)
    if config.tasks is not None:
        report["tasks"] = _tasks(model, against, config.tasks, on_progress)
    return_freed_memory()
    if config.speed is not None:
        found = speed_section(model, against, config.levels, config.speed, on_progress)
        report["speed"], memory = found
        for row in report["size"]:
            row["memory"] = memory.get(row["role"])
    report["provenance"] = {
        "command": config.command,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(torch.device("cpu"), torch.get_default_dtype()),
        "pruning": {name: pruned[name] for name in PROVENANCE if name in pruned} or None,
        "activation": checkpoint.form.activation.get("calibration") or None,
    }
    report["provenance"]["environment"].pop("dtype")  # of the model, which has its own
    report["missing"] = missing(report)
    report["warnings"] = warnings(report)
    report["verdict"] = decide(report)
    found_values: dict[str, Any] = finite(report)
    return found_values


def _check(checkpoint: SparseCheckpoint, config: ReportConfig) -> None:
    """What can be known to fail is said before anything is measured."""
    if config.speed is not None:
        fitting_contexts(config.speed, checkpoint.config.get("max_position_embeddings"))
    if config.quality is not None:
        text_windows(checkpoint, config.quality)
    if config.tasks is not None:
        from prune_llm_eval.task_loading import load_tasks

        load_tasks(config.tasks.tasks, config.tasks.include_path)


def level_names(checkpoint: SparseCheckpoint) -> list[str]:
    """Of activation sparsity, without "dense"."""
    settings = checkpoint.form.activation
    return LevelTable.from_json(settings).names[1:] if settings else []


def _sites(checkpoint: SparseCheckpoint) -> dict[str, list[str]]:
    """The linears that share an input whose size a level looks at, by its name."""
    settings = checkpoint.form.activation
    sites = LevelTable.from_json(settings).sites if settings else ()
    return {site.name: list(site.linears) for site in sites}


def _about(checkpoint: SparseCheckpoint, given: str, levels: list[str]) -> dict[str, Any]:
    sparse = is_sparse(checkpoint.config)
    stored = dict(checkpoint.plain)
    for packed in checkpoint.packed.values():
        stored |= {part.name: part for part in packed.parts.values()}
    dtypes = sorted({tensor.dtype for tensor in checkpoint.plain.values()})
    return {
        "name": Path(given).name or given,
        "given": given,
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "form": "sparse" if sparse else "dense",
        "pattern": checkpoint.form.pattern if sparse else None,
        "levels": levels,
        "sites": _sites(checkpoint),
        "weights": checkpoint.elements,
        "stored_as": dtypes,
        "context": checkpoint.config.get("max_position_embeddings"),
        "sha256": Checkpoint(checkpoint.directory, checkpoint.config, stored).sha256(),
    }


def _size(checkpoint: SparseCheckpoint, dense: SparseCheckpoint | None) -> list[dict[str, Any]]:
    """Bytes of the tensors on disk; dense ones counted where no dense model was given."""
    packed = sum(weight.nbytes for weight in checkpoint.packed.values())
    unpacked = sum(weight.dense_nbytes for weight in checkpoint.packed.values())
    as_dense = checkpoint.nbytes - packed + unpacked if dense is None else dense.nbytes
    return [
        {"role": DENSE, "disk": as_dense, "memory": None},
        {"role": MODEL, "disk": checkpoint.nbytes, "memory": None},
    ]


def _quality(
    model: str, against: str | None, config: EvalConfig, on_progress: OnProgress
) -> dict[str, Any]:
    rows = evaluate(model, against, config, on_progress)
    windows_ST = text_windows(open_stored(model), config)
    first = rows[0]
    return {
        "text": {
            "source": config.text,
            "tokens": first.quality.tokens,
            "windows": first.quality.windows,
            "seq_len": first.quality.seq_len,
            "protocol": config.protocol,
            "sha256": hashlib.sha256(windows_ST.numpy().tobytes()).hexdigest(),
        },
        "rows": [
            _quality_row(row, first, _role(place, against, config))
            for place, row in enumerate(rows)
        ],
    }


def _role(place: int, against: str | None, config: EvalConfig) -> tuple[str, str | None]:
    """What a row of `evaluate` is, and its level."""
    models = [MODEL] if against is None else [DENSE, MODEL]
    if place < len(models):
        return models[place], None
    return "level", config.levels[place - len(models)]


def _quality_row(
    row: ModelQuality, first: ModelQuality, role: tuple[str, str | None]
) -> dict[str, Any]:
    found = row.forgotten
    ratio = row.quality.token_ppl / first.quality.token_ppl
    return {
        "role": role[0],
        "level": role[1],
        **asdict(row.quality),
        "zeros": row.zeros,
        "skipped": row.skipped,
        "site_sparsity": row.site_sparsity,
        "ppl_increase": None if found is None else ratio - 1,
        "forgotten": None if found is None else _rounded(asdict(found)),
    }


def _rounded(value: Any) -> Any:
    """Numbers of single tokens to five digits, which is more than they are worth."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _tasks(
    model: str, against: str | None, config: TaskConfig, on_progress: OnProgress
) -> dict[str, Any]:
    from prune_llm_eval.tasks import evaluate_tasks

    found = evaluate_tasks(model, against, config, on_progress)
    roles = [MODEL] if against is None else [DENSE, MODEL]
    names = dict(zip(found.models, [*roles, *found.models[len(roles) :]], strict=True))
    rows = []
    for row in found.rows:
        own = {**asdict(row), "model": names[row.model]}
        if row.paired is not None:
            own["paired"]["significant"] = row.paired.significant
        rows.append(own)
    return {
        "rows": rows,
        "config": asdict(config),
        "skipped": found.skipped,
        "notes": found.notes,
        "lm_eval": found.lm_eval,
    }


def missing(report: dict[str, Any]) -> list[dict[str, str]]:
    """What was not measured, and how to get it."""
    lacks = [
        ("what pruning cost: KL, flipped tokens, what was forgotten", "--against DENSE")
        if report["against"] is None
        else None,
        ("perplexity", "leave out --no-quality") if report["quality"] is None else None,
        ("tasks", "--tasks NAME,...") if report["tasks"] is None else None,
        ("speed and memory", "leave out --no-speed") if report["speed"] is None else None,
        (
            "bytes read per token and share of the bandwidth",
            "known only for models built of Llama's parts, which decode by a plan",
        )
        if report["speed"] is not None and bytes_unknown(report["speed"])
        else None,
        ("activation levels", "prune-llm sparsify MODEL, or prune --activation-sparsity")
        if not report["model"]["levels"]
        else None,
        ("the error of each linear", "prune with this program, which writes prune_report.json")
        if not any(one["error"] is not None for one in report["sparsity"]["linears"])
        else None,
        ("other models beside this one", "--beside comparison.json, frontier.json or sweep.json")
        if not report["beside"]
        else None,
    ]
    return [{"what": what, "how": how} for what, how in filter(None, lacks)]


def bytes_unknown(speed: dict[str, Any]) -> bool:
    """Where the model itself runs through transformers."""
    rows = [row for load in speed["loads"] for row in load["rows"] if row["variant"] == MODEL]
    return any(row["bytes_per_step"] is None for row in rows)


def busy(speed: dict[str, Any]) -> bool:
    """More ran than this process, with all of its threads, can have caused."""
    return bool(speed["load_average"] > speed["cores"] + 0.5)


def warnings(report: dict[str, Any]) -> list[str]:
    """What makes figures of this report less than they seem."""
    found = []
    pruned = report["provenance"]["pruning"] or {}
    against, quality, speed = report["against"], report["quality"], report["speed"]
    origin = pruned.get("model_sha256")
    if against is not None and origin is not None and origin != against["sha256"]:
        found.append(
            f"{report['model']['name']} was not pruned from this {against['name']}: "
            "the hashes of their weights differ"
        )
    calibration = (pruned.get("calibration") or {}).get("source")
    if quality is not None and calibration == quality["text"]["source"] != "bundled":
        found.append(f"scored on the text that it was calibrated on ({calibration})")
    if quality is not None and quality["text"]["windows"] < 30:
        found.append(
            f"{quality['text']['windows']} windows of text: standard errors are rough; "
            "30 or more are better"
        )
    if speed is not None and not speed["packed_linears"]:
        found.append("nothing is packed in this checkpoint, so no kernel can skip its zeros")
    if speed is not None and busy(speed):
        found.append(
            f"other programs were running while it was timed (load average "
            f"{speed['load_average']:g} on {speed['cores']} cores): figures of speed are rough"
        )
    return [*found, *pruned.get("warnings", [])]
