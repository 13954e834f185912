"""A report's files: report.json, and report.md and report.html made of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prune_llm_eval.report.gathering import SCHEMA, SCHEMA_VERSION
from prune_llm_eval.report.markdown import render_markdown
from prune_llm_eval.report.page import render_page

JSON_FILE, MARKDOWN_FILE, PAGE_FILE = "report.json", "report.md", "report.html"


def write_report(report: dict[str, Any], output: Path) -> None:
    """All three files, in a directory that may hold an older report; JSON comes last.

    Every file is complete before any is put in its place.
    """
    # both ways through JSON: what is rendered now is what is rendered from the file later
    content = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    plain = json.loads(content)
    texts = {
        PAGE_FILE: render_page(plain),
        MARKDOWN_FILE: render_markdown(plain),
        JSON_FILE: content,
    }
    output.mkdir(parents=True, exist_ok=True)
    parts = {name: output / f".{name}.part" for name in texts}
    try:
        for name, text in texts.items():
            parts[name].write_text(text)
        for name, part in parts.items():
            os.replace(part, output / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def read_report_file(file: Path) -> dict[str, Any]:
    """The values of a report.json.

    Raises:
        ValueError: cannot be read, is no report, or is of another version.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{file}: is no report.json of prune-llm report")
    if found.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{file}: has schema_version {found.get('schema_version')}, this version of prune-llm "
            f"reads {SCHEMA_VERSION}; make the report again"
        )
    return found
