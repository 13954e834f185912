"""Elements of a picture or page as text, axes, and what a picture consists of.

Colours are CSS classes that the page defines for light and dark; nothing here names a colour.
Lengths are units of a picture 400 wide, which a phone shows nearly at their size.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 400
Labelled = tuple[float, str]


def tag(name: str, *content: str, **attributes: Any) -> str:
    """An element. Attributes are escaped, content is not: it is other elements, or `text`.

    A trailing underscore is dropped from a name, other underscores become hyphens; None is left
    out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(content)}</{name}>"


def _plain(value: Any) -> str:
    """Lengths to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(value: str) -> str:
    """Any text, as content of an element."""
    return html.escape(value, quote=False)


def picture(height: float, title: str, description: str, *content: str) -> str:
    """An SVG that scales with its place and says what it shows to those who cannot see it."""
    return tag(
        "svg",
        tag("title", text(title)),
        tag("desc", text(description)),
        *content,
        viewBox=f"0 0 {WIDTH} {_plain(float(height))}",
        role="img",
        aria_label=f"{title}. {description}",
        class_="picture",
    )


@dataclass(frozen=True)
class Axis:
    """Values to a length from ``start`` to ``end``; a log axis needs values above 0."""

    label: str
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[Labelled, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, own = self.low, self.high, value
        if self.log:
            low, high, own = math.log(low), math.log(high), math.log(value)
        return self.start + (own - low) / (high - low) * (self.end - self.start)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At multiples of 1, 2 or 5 times a power of ten, from below ``low`` to above ``high``."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 12) for n in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At 1, 2 and 5 of each decade, or at 1 alone where there are many."""
    digits = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [float(f"{d}e{power}") for power in decades for d in digits]


def value_axis(
    label: str, values: Sequence[float], start: float, end: float, show: Callable[[float], str]
) -> Axis:
    """From 0 to above the largest value."""
    ticks = linear_ticks(0.0, max(values))
    named = tuple((tick, show(tick)) for tick in ticks)
    return Axis(label, ticks[0], ticks[-1], start, end, named)


def choice_axis(label: str, values: Sequence[float], start: float, end: float) -> Axis:
    """Logarithmic, a tick at each of a few values that were chosen."""
    chosen = sorted(set(values))
    margin = (chosen[-1] / chosen[0]) ** 0.06 if len(chosen) > 1 else 2.0
    ticks = tuple((value, f"{value:g}") for value in chosen)
    return Axis(label, chosen[0] / margin, chosen[-1] * margin, start, end, ticks, log=True)


def ratio_axis(label: str, ratios: Sequence[float], start: float, end: float) -> Axis:
    """Logarithmic, for times a baseline: ticks as changes in percent, far off as factors."""
    low, high = min(*ratios, 1.0), max(*ratios, 1.0)
    if high / low < 1.02:
        low, high = min(low, 0.99), max(high, 1.02)
    margin = (high / low) ** 0.08
    low, high = low / margin, high * margin
    steps = [tick for tick in _ratio_ticks(low, high) if low <= tick <= high]
    ticks = tuple((tick, ratio_name(tick)) for tick in steps)
    return Axis(label, low, high, start, end, ticks, log=True)


def _ratio_ticks(low: float, high: float) -> list[float]:
    if high < 2.2:
        return [1 + change for change in linear_ticks(low - 1, high - 1)]
    rest = [tick for tick in log_ticks(2.0, high) if tick >= 2]
    return [*([0.5] if low <= 0.5 else []), 1.0, *([1.5] if high < 6 else []), *rest]


def ratio_name(ratio: float) -> str:
    if ratio >= 2 or ratio == 0.5:
        return f"×{ratio:g}" if ratio < 1e5 else f"×{ratio:.0e}"
    return "dense" if ratio == 1 else f"{100 * (ratio - 1):+.3g} %".replace("-", "−")
