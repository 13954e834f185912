"""How numbers are written in a report, the same in text, tables and pictures."""

from __future__ import annotations

import math

from prune_llm import cli_tables

UNKNOWN = "–"
# between a number and its unit, where no line may break
SPACE = "\u00a0"
NARROW = "\u202f"
MINUS = "−"


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits, no exponent below a million."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= 6 or magnitude < -5:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}".replace(",", NARROW)


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as percent."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f}{SPACE}%"


def signed(share: float | None, digits: int = 1) -> str:
    """A change as percent, with its sign; more than tenfold as a factor."""
    if share is None:
        return UNKNOWN
    if share > 9:
        return f"×{number(1 + share, 3)}"
    text = f"{100 * share:+.{digits}f}{SPACE}%"
    return text.replace("-", MINUS)


def times(ratio: float | None) -> str:
    return UNKNOWN if ratio is None else f"{ratio:.2f}×"


def seconds(value: float | None) -> str:
    """With a unit that leaves no leading zeros."""
    if value is None:
        return UNKNOWN
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{number(value * factor, 3)}{SPACE}{unit}"
    return f"{number(value * 1e6, 3)}{SPACE}µs"


def size(nbytes: float) -> str:
    """In decimal units."""
    return cli_tables.size(nbytes).replace(" ", SPACE)


def per_second(value: float | None) -> str:
    return UNKNOWN if value is None else number(value, 3 if value < 1000 else 4)


def clean(text: str) -> str:
    r"""A line that is safe to show: \n, \x1b and others that do not print as escapes."""
    own = {SPACE, NARROW}
    return "".join(
        c if c.isprintable() or c in own else c.encode("unicode_escape").decode() for c in text
    )
