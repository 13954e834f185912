"""`eval --tasks`: lm-eval tasks in one table."""

from __future__ import annotations

import importlib.util
import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from prune_llm.cli_tables import new_table, short

if TYPE_CHECKING:
    from prune_llm_eval.tasks import TaskReport, TaskRow

COLUMNS = ("model", "value", "change", "better/worse", "differs")
# under so many documents a normal distribution says too much
FEW = 30


def need_lm_eval() -> None:
    """It is an extra: much of what it brings is needed for nothing else."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-eval is not installed: pip install 'prune-llm[eval]'")


def run_tasks(
    console: Console,
    errors: Console,
    model: str | None,
    against: str | None,
    settings: dict[str, Any],
    file: Path | None,
    server: dict[str, Any] | None = None,
) -> TaskReport:
    """Run, print and, where asked, write JSON.

    Args:
        server: fields of a `remote.Server`, in place of a local model.
    """
    need_lm_eval()
    from prune_llm_eval.remote import Server
    from prune_llm_eval.tasks import TaskConfig, evaluate_tasks, quiet

    served = None if server is None else Server(**server)
    config = TaskConfig(**settings, server=served)

    def say(what: str, done: int, total: int) -> None:
        if errors.is_terminal:
            errors.print(f"{what} ({done + 1} of {total})")

    with nullcontext() if errors.is_terminal else quiet():
        report = evaluate_tasks(model, against, config, say)
    print_tasks(console, report)
    if file is not None:
        content = {"model": model, "against": against, **asdict(config), **asdict(report)}
        for entry, row in zip(content["rows"], report.rows, strict=True):
            if row.paired is not None:
                entry["paired"]["significant"] = row.paired.significant
        file.write_text(json.dumps(finite(content), indent=1) + "\n")
    return report


def print_tasks(console: Console, report: TaskReport) -> None:
    compared = any(row.paired is not None for row in report.rows)
    table = new_table(f"lm-eval {report.lm_eval}", COLUMNS if compared else COLUMNS[:2])
    for place, row in enumerate(report.rows):
        first = place % len(report.models) == 0
        if first:
            table.add_section()
            table.add_row(f"[bold]{_title(row)}[/]")
        table.add_row(*_cells(row)[: len(table.columns)])
    console.print(table)
    for label, share in report.skipped.items():
        console.print(f"{label}: skipped {share:.2%} of the inputs, weighted by the weights spared")
    note = "value ± standard error; (n): documents"
    if compared:
        note += (
            f"; change: from {short(report.models[0])}, ± standard error of the paired "
            "difference; better/worse: documents that changed; differs: by more than 1.96 standard "
            "errors, as one equal pair in 20 would by chance"
        )
    if min(row.documents for row in report.rows) < FEW:
        note += f"; under {FEW} documents standard errors are rough"
    console.print(note, soft_wrap=True)
    for line in report.notes:
        console.print(f"[yellow]note:[/] {line}", soft_wrap=True)


def _title(row: TaskRow) -> str:
    filtered = "" if row.filter == "none" else f" {row.filter}"
    return f"{row.task} {row.metric}{filtered} {row.num_fewshot}-shot ({row.documents})"


def _cells(row: TaskRow) -> list[str]:
    cells = [f"  {short(row.model)}", _plus_minus(row.value, row.stderr)]
    if row.paired is None:
        return [*cells, "-", "-", "-"]
    paired = row.paired
    change = _plus_minus(paired.difference, paired.stderr, "+")
    counts = "-"
    if paired.changed is not None and paired.better is not None:
        counts = f"{paired.better}/{paired.changed - paired.better}"
    differs = {True: "yes", False: "no", None: "-"}[paired.significant]
    return [*cells, change, counts, differs]


def _plus_minus(value: float, stderr: float, sign: str = "") -> str:
    """Four digits, fewer behind the point of large numbers."""
    digits = max(0, 4 - max(0, math.floor(math.log10(abs(value))) if value else 0))
    digits = min(digits, 4)
    text = f"{value:{sign}.{digits}f}"
    return text if math.isnan(stderr) else f"{text}±{stderr:.{digits}f}"


def finite(value: Any) -> Any:
    """JSON knows no nan: None in its place."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
