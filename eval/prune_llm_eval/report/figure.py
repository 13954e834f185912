"""A picture of a report: what it shows, its title, the table of its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_llm_eval.report.charts import SLOTS, Series, plot
from prune_llm_eval.report.drawing import Axis
from prune_llm_eval.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """A picture with its title and what it shows; ``series`` for the legend; ``table`` its values.

    ``marks``: how many it must draw.
    """

    id: str
    title: str
    about: str
    svg: str
    marks: int
    table: Table
    series: tuple[Series, ...] = ()


def slot_of(name: str, names: Sequence[str]) -> str:
    """The colour of a series: dense, model and transformers have their own."""
    if name in ("dense", "model", "transformers"):
        return name
    others = [one for one in names if one not in ("dense", "model", "transformers")]
    return SLOTS[others.index(name) % len(SLOTS)]


def chart(
    id: str,
    title: str,
    about: str,
    series: tuple[Series, ...],
    x: Axis,
    y: Axis,
    *,
    table: Table,
    baseline: float | None = None,
) -> Figure:
    drawn = plot(series, x, y, title, about, baseline)
    return Figure(id, title, about, drawn, sum(len(s.marks) for s in series), table, series)
