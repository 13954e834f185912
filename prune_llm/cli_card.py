"""`eval --update-card`: what was just measured, in the model card of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_llm import model_card
from prune_llm.activation.levels import DENSE
from prune_llm.card_facts import add_measured
from prune_llm.cli_tasks import finite
from prune_llm.config import select_device

if TYPE_CHECKING:
    from prune_llm_eval.compare import ModelQuality
    from prune_llm_eval.tasks import TaskReport, TaskRow


def check_card(model: str) -> Path:
    """Before anything is measured. Raises ValueError for what has no card that can be written."""
    directory = Path(model)
    if not directory.is_dir():
        raise ValueError(f"update_card: {model!r} is no local directory; download it first")
    model_card.check_card(directory)
    return directory


def record_quality(
    directory: Path, rows: list[ModelQuality], against: str | None, options: dict[str, Any]
) -> None:
    """Rows of `eval`: the dense model where there is one, then the model and its levels."""
    from prune_llm_eval.card_entries import text_entry

    own = rows if against is None else rows[1:]
    dense = None if against is None else rows[0].quality
    scored = [(_level(row.name), row.quality, row.skipped) for row in own]
    entry = text_entry(options["text"], dense, scored)
    _write(directory, {**entry, "protocol": options["protocol"]}, options)


def record_tasks(
    directory: Path, report: TaskReport, against: str | None, options: dict[str, Any]
) -> None:
    first = report.models[0]
    dense = {_key(row): row.value for row in report.rows if row.model == first}
    own = [row for row in report.rows if against is None or row.model != first]
    entry = {
        "kind": "tasks",
        "on": ",".join(options["tasks"]),
        "lm_eval": report.lm_eval,
        "limit": options["limit"],
        "rows": [_task(row, None if against is None else dense[_key(row)]) for row in own],
    }
    _write(directory, entry, options)


def _write(directory: Path, entry: dict[str, Any], options: dict[str, Any]) -> None:
    from prune_llm_eval.card_entries import where

    told = where(select_device(options["device"]), options["dtype"])
    add_measured(directory, finite({**entry, **told}))
    model_card.update_figures(directory)


def _level(name: str) -> str:
    """A level's row is called "level NAME", any other is the model itself."""
    return name.removeprefix("level ") if name.startswith("level ") else DENSE


def _key(row: TaskRow) -> tuple[str, str, str]:
    return row.task, row.metric, row.filter


def _task(row: TaskRow, dense: float | None) -> dict[str, Any]:
    paired = row.paired if dense is not None else None
    return {
        "task": row.task,
        "metric": row.metric,
        "filter": row.filter,
        "level": _level(row.model),
        "value": row.value,
        "stderr": row.stderr,
        "documents": row.documents,
        "num_fewshot": row.num_fewshot,
        "dense": dense,
        "difference": None if paired is None else paired.difference,
        "difference_stderr": None if paired is None else paired.stderr,
    }
