"""Pieces of Markdown that hold what they are given, whatever that is."""

from __future__ import annotations

import re
import unicodedata

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!$&])")
LEADING = re.compile(r"^(\d+)([.)])(?=\s|$)|^([-+=])")


def clean(text: str) -> str:
    """On one line, without control characters and what turns the reading direction."""
    plain = (" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in text)
    return " ".join("".join(plain).split()) or "?"


def escape(text: str) -> str:
    """As plain text, wherever it stands: in a paragraph, a heading, a cell."""
    escaped = SPECIAL.sub(r"\\\1", clean(text))
    return LEADING.sub(lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", escaped)


def code(text: str) -> str:
    """A code span that backticks do not end and bars do not cut."""
    text = clean(text).replace("|", "\\|")
    fence = "`" * (_longest(text) + 1)
    padded = f" {text} " if "`" in text else text
    return f"{fence}{padded}{fence}"


def fenced(language: str, text: str) -> str:
    """A code block that nothing in it ends."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(rows: list[list[str]]) -> str:
    """The first row is the heading; cells are Markdown."""
    heading, *body = rows
    line = ["---", *["---:"] * (len(heading) - 1)] if len(heading) > 2 else ["---"] * len(heading)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, line, *body))


def size(nbytes: float) -> str:
    """Bytes in decimal units: 1 kB = 1000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5 or unit == "GB":
            digits = 0 if unit == "B" or nbytes >= 99.95 else 1 if nbytes >= 9.995 else 2
            return f"{nbytes:.{digits}f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _longest(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
