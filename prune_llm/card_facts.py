"""What a model card tells: read from a checkpoint's reports and from the card of its base model.

A card is published, the reports are not written for that: of a path only its last part is told.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_llm.checkpoint import MEASURED_FILE, REPORT_FILE, read_json
from prune_llm.sparse_checkpoint import is_sparse, open_stored

CARD_FILE = "README.md"
LEVELS_REPORT_FILE = "activation_report.json"
FRONTIER_FILE = "frontier.json"
# in the tags of every card that we write
TAG = "prune-llm"
# where the hub's client keeps what it downloads: models--ORGANISATION--NAME/snapshots/REVISION
SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/[^/]+/?$")
HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
LICENCE = ("license", "license_name", "license_link")
TEXT_FILES = {".txt", ".jsonl", ".json", ".md"}


@dataclass(frozen=True)
class Base:
    """The model that was pruned.

    Attributes:
        name: to show; hub: its name on the hub, None where that is not known.
        licence: of LICENCE what its card says; language: as there.
    """

    name: str
    hub: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    language: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardFacts:
    """Everything a card tells.

    Attributes:
        name: of the checkpoint, as users load it. form: "sparse" or "dense".
        nbytes: of its tensors on disk; dense_nbytes: if its zeros were stored.
        pruning, levels, frontier: the reports, empty where there is none.
        measured: entries of `measured.json`, the last one last.
    """

    name: str
    form: str
    base: Base
    architecture: str
    nbytes: int
    dense_nbytes: int
    pruning: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, Any] = field(default_factory=dict)
    frontier: dict[str, Any] = field(default_factory=dict)
    measured: tuple[dict[str, Any], ...] = ()


def read_facts(directory: Path, source: Path, name: str) -> CardFacts:
    """Of a checkpoint in ``directory``.

    Args:
        source: the directory it was made from, or itself: whose card tells licence and language.

    Raises:
        ValueError: no checkpoint, or a report that is damaged.
    """
    stored = open_stored(directory)
    packed = sum(weight.dense_nbytes for weight in stored.packed.values())
    kinds = stored.config.get("architectures")
    pruning = read_report(directory)
    return CardFacts(
        name=name,
        form="sparse" if is_sparse(stored.config) else "dense",
        base=read_base(source, pruning.get("model")),
        architecture=str(kinds[0]) if isinstance(kinds, list) and kinds else "unknown",
        nbytes=stored.nbytes,
        dense_nbytes=packed + sum(tensor.nbytes for tensor in stored.plain.values()),
        pruning=pruning,
        levels=read_levels_report(directory) if stored.form.activation else {},
        frontier=_own_frontier(directory, name),
        measured=tuple(read_measured(directory)),
    )


def read_base(source: Path, pruned_from: str | None = None) -> Base:
    """From the card of ``source``: the base model's own, or ours of a checkpoint made of it.

    Args:
        pruned_from: the directory that the pruning's report names.
    """
    known = read_metadata(source / CARD_FILE)
    model = str(pruned_from or source)
    hub = known.get("base_model") if is_ours(known) else hub_name(model)
    hub = hub if isinstance(hub, str) and HUB_NAME.fullmatch(hub) else None
    language = known.get("language")
    languages = language if isinstance(language, list) else [language]
    return Base(
        name=hub or Path(model).name or "the base model",
        hub=hub,
        licence={key: known[key] for key in LICENCE if isinstance(known.get(key), str)},
        language=tuple(x for x in languages if isinstance(x, str)),
    )


def read_report(directory: Path) -> dict[str, Any]:
    """prune_report.json, or an empty table where there is none."""
    file = directory / REPORT_FILE
    if not file.is_file():
        return {}
    report = read_json(file)
    if not isinstance(report, dict) or not isinstance(report.get("linears"), list):
        raise ValueError(f"{file}: is not a report of prune; remove it or get it again")
    return report


def read_levels_report(directory: Path) -> dict[str, Any]:
    """activation_report.json, or an empty table where there is none."""
    return _table(directory / LEVELS_REPORT_FILE)


def is_ours(metadata: dict[str, Any]) -> bool:
    tags = metadata.get("tags")
    return isinstance(tags, list) and TAG in tags


def hub_name(directory: str) -> str | None:
    """Of a snapshot in the hub's cache."""
    found = SNAPSHOT.search(directory)
    return None if found is None else found[1].replace("--", "/")


def read_metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card of anyone; empty where there is none that can be read.

    A run does not fail over it: it tells licence and language, which are left out then.
    """
    try:
        return parse_metadata(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def parse_metadata(text: str) -> dict[str, Any]:
    """Front matter of a card; empty where there is none. ValueError where it cannot be read."""
    import yaml

    found = FRONT_MATTER.match(text)
    try:
        metadata = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the metadata at its top cannot be read ({reason})") from None
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise ValueError("the metadata at its top is no table of names")
    return metadata


def read_measured(directory: Path) -> list[dict[str, Any]]:
    """Raises ValueError for a file that holds anything else than a list of entries."""
    file = directory / MEASURED_FILE
    if not file.is_file():
        return []
    found = read_json(file)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{file}: is not a list of measurements; remove it and measure again")
    return found


def add_measured(directory: Path, entry: dict[str, Any]) -> None:
    """One more; it replaces that of the same kind on the same text or tasks."""
    same = {name: entry.get(name) for name in ("kind", "on", "seq_len")}
    kept = [
        old
        for old in read_measured(directory)
        if any(old.get(name) != value for name, value in same.items())
    ]
    text = json.dumps([*kept, entry], indent=1, allow_nan=False)
    (directory / MEASURED_FILE).write_text(text + "\n")


def copy_measured(source: Path, directory: Path) -> None:
    """What was measured of the same weights in another directory."""
    if (source / MEASURED_FILE).is_file():
        shutil.copyfile(source / MEASURED_FILE, directory / MEASURED_FILE)


def shown_text(source: str) -> str:
    """A text's name without the place where it lay; datasets of the hub keep theirs."""
    path = Path(source)
    local = path.is_absolute() or path.suffix in TEXT_FILES or source.startswith((".", "~"))
    return path.name if local else source


def _own_frontier(directory: Path, name: str) -> dict[str, Any]:
    """frontier.json, which travels with copies that are no result of that run."""
    found = _table(directory / FRONTIER_FILE)
    return found if Path(str(found.get("output"))).name == name else {}


def _table(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object; get it again")
    return found
