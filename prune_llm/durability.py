"""Files that outlive a crash: put on disk for good, and known again by their checksum."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# read at once
CHUNK_BYTES = 1 << 24


class CannotResume(ValueError):
    """What was found of a stopped run does not go on with what was asked; it is left as it is."""


def sync_file(file: Path) -> None:
    """Its content is on disk when this returns."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_directory(directory: Path) -> None:
    """The names in it are on disk when this returns."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """All files and names below it are on disk when this returns."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync_file(Path(folder, name))
        sync_directory(Path(folder))


def described(file: Path) -> dict[str, Any]:
    """Name, size and checksum, for `check_file`."""
    size, crc = 0, 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return {"file": file.name, "bytes": size, "crc32": crc}


def check_file(directory: Path, expected: Mapping[str, Any]) -> Path:
    """The file that was described. Raises CannotResume where it is another now."""
    file = directory / str(expected["file"])
    if not file.is_file():
        raise CannotResume(f"{file}: is missing, so this run cannot go on; give --restart")
    found = described(file)
    if any(found[name] != expected[name] for name in found):
        raise CannotResume(
            f"{file}: damaged ({found['bytes']} bytes, {expected['bytes']} were written), so this "
            "run cannot go on; give --restart"
        )
    return file
