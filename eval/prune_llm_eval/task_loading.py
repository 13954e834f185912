"""lm-eval tasks by name: found, their data at hand, or one clear line that says what is missing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.utils import pattern_match

# names that are suggested for an unknown one
SUGGESTIONS = 3
# what lm-eval and datasets say when the hub cannot be reached and the data is not in the cache
NO_DATA = re.compile(r"on the Hub|offline mode|OfflineMode|LocalEntryNotFound", re.IGNORECASE)


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data. ``found`` is how lm-eval takes them; ``tasks`` and ``groups`` are its
    Task and Group objects by name, with what lies inside groups."""

    found: Any
    tasks: dict[str, Any]
    groups: dict[str, Any]


def load_tasks(names: Sequence[str], include_path: str | None) -> LoadedTasks:
    """Load tasks, groups, tags, patterns such as 'mmlu_*', or YAML files.

    Raises:
        ValueError: an unknown name, data that must be downloaded and cannot be, a broken task.
    """
    manager = _manager(names, include_path)
    names = _known(names, manager, include_path)
    top: list[Any] = []
    missing = []
    for name in names:
        try:
            top += _top(manager.load([name]))
        except Exception as error:  # anything that the code and data of a task can raise
            if not _needs_download(error):
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"task {name!r}: cannot be loaded ({reason})") from error
            missing.append(f"{name} ({_dataset(manager, name, error)})")
    if missing:
        raise ValueError(
            f"tasks {', '.join(missing)}: their data is not on this machine and the hub cannot be "
            "reached; run once where it can, or give tasks with local data by --include-path"
        )
    loaded = manager.load(top)  # refuses a task that is there twice
    return LoadedTasks(loaded, loaded["tasks"], loaded.get("groups", {}))


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """Reading lm-eval's own 14,000 tasks takes seconds, so not where local ones are enough."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {include_path!r}: is not a directory of task files")
    local = TaskManager(include_path=include_path, include_defaults=False)
    if all(_is_local(name, local) or _is_file(name) for name in names):
        return local
    return TaskManager(include_path=include_path)


def _is_local(name: str, local: TaskManager) -> bool:
    """With everything that a group of this name holds."""
    if name not in local.all_groups:
        return name in local.all_subtasks
    held = (local.task_index[name].cfg or {}).get("task") or []
    return all(isinstance(task, str) and _is_local(task, local) for task in held)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _known(names: Sequence[str], manager: TaskManager, include_path: str | None) -> list[str]:
    """Patterns replaced by what they match; ValueError for a name there is nothing for."""
    found: list[str] = []
    for name in names:
        if name in manager.all_tasks or _is_file(name):
            found.append(name)
            continue
        matches = pattern_match([name], manager.all_tasks) if set(name) & set("*?[") else []
        if not matches:
            raise ValueError(_unknown(name, manager, include_path))
        found += matches
    return list(dict.fromkeys(found))


def _unknown(name: str, manager: TaskManager, include_path: str | None) -> str:
    close = difflib.get_close_matches(name, manager.all_tasks, SUGGESTIONS)
    hint = f"did you mean {', '.join(close)}?" if close else "prune-llm lm-eval ls tasks lists all"
    broken = _broken_files(include_path)
    if broken:
        hint += f"; lm-eval could not read {', '.join(broken)}"
    return f"task {name!r}: unknown; {hint}"


def _broken_files(include_path: str | None) -> list[str]:
    """Task files that lm-eval passes over in silence."""
    from lm_eval.tasks._yaml_loader import load_yaml

    broken = []
    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else []:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # of the YAML parser, or of a file that it includes
            broken.append(f"{file} ({type(error).__name__})")
    return broken


def _top(loaded: Any) -> list[Any]:
    """The outermost groups and the tasks in no group."""
    groups = loaded.get("groups", {})
    inside = {child for group in groups.values() for child in group.child_names}
    in_groups = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    outer = [group for name, group in groups.items() if name not in inside]
    return outer + [task for name, task in loaded["tasks"].items() if name not in in_groups]


def _needs_download(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError) or NO_DATA.search(f"{type(error).__name__} {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _dataset(manager: TaskManager, name: str, error: BaseException) -> str:
    """Which dataset is missing: as the task says, or for a group as the error does."""
    entry = manager.task_index.get(name)
    path = (entry.cfg or {}).get("dataset_path") if entry is not None else None
    if path is None:
        named = re.search(r"'([\w.-]+/[\w.-]+)'", str(error))
        path = named[1] if named else "data that its definition names"
    return str(path)
