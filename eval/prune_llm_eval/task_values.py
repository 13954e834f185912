"""lm-eval tasks of one checkpoint and its levels as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_llm.activation.levels import DENSE
from prune_llm_eval.task_loading import load_tasks
from prune_llm_eval.tasks import TaskConfig, evaluate_tasks, quiet


def check_tasks(settings: Mapping[str, Any]) -> None:
    """Before any work. Raises ValueError for tasks that cannot be run."""
    config = TaskConfig(**settings)
    with quiet():
        load_tasks(config.tasks, config.include_path)


def task_values(
    directory: Path, levels: tuple[str, ...], settings: Mapping[str, Any]
) -> dict[str, dict[str, tuple[float, float | None]]]:
    """By level and "task metric": value and standard error (None: not known)."""
    config = TaskConfig(**settings, levels=levels)
    with quiet():
        report = evaluate_tasks(str(directory), None, config, lambda *_: None)
    level_of = dict(zip(report.models, (DENSE, *levels), strict=True))
    found: dict[str, dict[str, tuple[float, float | None]]] = {
        level: {} for level in (DENSE, *levels)
    }
    for row in report.rows:
        filtered = "" if row.filter == "none" else f" {row.filter}"
        stderr = None if math.isnan(row.stderr) else row.stderr
        found[level_of[row.model]][f"{row.task} {row.metric}{filtered}"] = (row.value, stderr)
    return found
