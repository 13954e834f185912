"""What a run has finished, line by line in a file, so that a stopped one can go on.

The first line holds the run's settings, every other one a record. A line begins with its checksum.
It counts when it is whole: what a kill cut off at the end is dropped, anything else that does not
agree with its checksum is damage.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_llm.durability import CannotResume, sync_directory

JOURNAL_FILE = "journal.jsonl"
# where a search for a sparsity prunes, with the percent behind it: a run with its own journal
TRY = "try-"
# changed settings that an error names
NAMED = 3

Settings = Mapping[str, Mapping[str, Any]]
Record = dict[str, Any]


def read_journal(file: Path) -> tuple[list[Record], int]:
    """The records, and how many bytes of the file they are. Raises CannotResume for damage."""
    if not file.is_file():
        return [], 0
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    records: list[Record] = []
    for line in whole.splitlines():
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            raise CannotResume(
                f"{file}: damaged at line {len(records) + 1}, so this run cannot go on; give "
                "--restart to begin anew"
            )
        records.append(json.loads(text))
    return records, len(whole)


class Journal:
    """The records of one run, which must hold the lock of its directory."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / JOURNAL_FILE
        self.records, self._end = read_journal(self.file)

    def append(self, record: Record) -> None:
        """The record is on disk when this returns."""
        text = json.dumps(record).encode()
        with self.file.open("ab") as opened:
            opened.truncate(self._end)  # what a kill cut off
            try:
                opened.write(b"%08x %s\n" % (zlib.crc32(text), text))
                opened.flush()
                os.fsync(opened.fileno())
            except OSError:
                opened.truncate(self._end)  # it must not count, now that it was not acknowledged
                raise
            self._end = opened.tell()
        if not self.records:
            sync_directory(self.file.parent)
        self.records.append(json.loads(text))

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]


def changes(before: Settings, now: Settings) -> list[str]:
    """What differs, with its old and new value."""
    now = json.loads(json.dumps(now))
    found = []
    for group, values in now.items():
        known = before.get(group, {})
        for name in dict.fromkeys((*values, *known)):
            was, now_is = known.get(name), values.get(name)
            if was != now_is:
                plain = _short if group == "inputs" else _plain
                found.append(f"{name} was {plain(was)}, is {plain(now_is)}")
    return found


def check_settings(what: str, before: Settings, now: Settings) -> None:
    """Raises CannotResume that names what has changed."""
    found = changes(before, now)
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise CannotResume(
            f"{what}: the stopped run was begun with other settings: {', '.join(found[:NAMED])}"
            f"{more}; repeat its command with --resume, or give --restart to begin anew"
        )


def _short(sha256: Any) -> str:
    return "none" if sha256 is None else f"{sha256[:12]}... (SHA-256)"


def _plain(value: Any) -> str:
    if value in (None, [], ""):
        return "not given"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def finished(directory: Path) -> str | None:
    """What a run in this directory has finished, in words. Raises CannotResume for damage."""
    records, _ = read_journal(directory / JOURNAL_FILE)
    blocks = [record["index"] for record in records if record["kind"] == "block"]
    if blocks:
        return f"{len(blocks)} of {records[0]['blocks']} blocks"
    tries = [record for record in records if record["kind"] == "try"]
    done = {f"{TRY}{record['percent']}" for record in tries}
    trying = next(map(finished, (d for d in directory.glob(f"{TRY}*") if d.name not in done)), None)
    if tries:
        return f"{len(tries)} sparsities" + ("" if trying is None else f" and {trying} of another")
    if trying is not None:
        return f"{trying} of the first sparsity"
    return "the allocation" if any(record["kind"] == "plan" for record in records) else None
