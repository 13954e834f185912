"""What a long run has finished, line by line in a file, so that a stopped one can go on.

The first line holds the run's settings, every other one a record. A line counts when it is whole:
what a kill cut off is dropped. The file is locked while a run has it open; a kill frees it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

JOURNAL_FILE = "journal.jsonl"
# changed settings that an error names
NAMED = 3

Settings = Mapping[str, Mapping[str, Any]]


def check_output(output: Path) -> None:
    """Raises ValueError where ``output`` is neither new, nor empty, nor holds a journal."""
    if not output.exists() or (output / JOURNAL_FILE).is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise ValueError(f"output {str(output)!r}: exists and holds no comparison; give a new one")


class Journal:
    """The records of one run; use as a context.

    Args:
        directory: made where it does not exist.
        settings: what the results depend on: "options", "inputs" (hashes, not worth printing) and
            "environment".

    Raises:
        ValueError: another run has it open, or it was begun with other settings.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        check_output(directory)
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / JOURNAL_FILE).open("a+b")
        try:
            self._lock()
            self.records = self._read()
            self._begin(json.loads(json.dumps(settings)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is on disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def remove(self) -> None:
        """The directory and all in it: there was nothing else when the journal was begun."""
        shutil.rmtree(self.directory)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"output {str(self.directory)!r}: another run is writing it; wait or give another "
                "one"
            ) from None

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; a last one that was cut off is removed."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            file = self.directory / JOURNAL_FILE
            raise ValueError(f"{file}: damaged; give another output, or remove it") from None

    def _begin(self, settings: Settings) -> None:
        if not self.records:
            self.add({"kind": "settings", **settings})
            return
        before = self.records[0]
        changes = [
            _told(group, name, before.get(group, {}).get(name), value)
            for group, values in settings.items()
            for name, value in values.items()
            if before.get(group, {}).get(name) != value
        ]
        if changes:
            more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
            raise ValueError(
                f"output {str(self.directory)!r}: was begun with other settings: "
                f"{', '.join(changes[:NAMED])}{more}; repeat that command, or give another output"
            )


def _told(group: str, name: str, before: Any, now: Any) -> str:
    if group == "inputs":
        return f"{name} has changed"
    return f"{name} was {_plain(before)}, is {_plain(now)}"


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
