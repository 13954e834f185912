"""The picture of a comparison: perplexity and KL against sparsity, a line for each method.

N:M patterns stand in columns of their own beside the lines: they share a sparsity with points of
the lines and would cover them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_llm.masks import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from prune_llm_eval.comparison_report import ComparisonReport, Row

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers do it without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A1F5C", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# times the dense perplexity: a model beyond it is broken, and would flatten all others
MOST = 100
SETTINGS: dict[Any, Any] = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "svg.hashsalt": "prune-llm",  # the same figures make the same file
}

Value = Callable[["Row"], float | None]


def need_matplotlib() -> None:
    """It is an extra: nothing else needs it. Raises ImportError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib is not installed: pip install 'prune-llm[eval]'")


def draw(report: ComparisonReport, files: list[Path]) -> None:
    """Write the picture to each file, in the format that its name ends in."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(13, 6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        scored = f"{report.dense.quality.tokens} tokens of {Path(str(report.text['source'])).name}"
        figure.suptitle(f"{Path(report.model).name}, {scored}")
        _draw_perplexity(left, report)
        _draw_kl(right, report)
        _add_legend(figure, report)
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {}
            figure.savefig(file, dpi=150, metadata=metadata)


def _draw_perplexity(axes: Axes, report: ComparisonReport) -> None:
    dense = report.dense.quality.token_ppl
    axes.axhline(dense, color="black", linewidth=1.5)
    _draw_lines(axes, report, lambda row: row.quality.token_ppl)
    styles = dict(_styles(report))
    for method, knee in report.knees.items():
        if knee.relation == "at":
            colour = styles[method]["color"]
            axes.plot(100 * knee.sparsity, dense, "|", color=colour, markersize=22, mew=3)
    axes.set_title("Perplexity")
    low, high = axes.get_ylim()
    cut = high > MOST * dense
    axes.set_ylim(max(low, 0.8 * dense), MOST * dense if cut else high)
    axes.set_ylabel(f"token perplexity (log scale{f', up to {MOST} x dense' if cut else ''})")
    _set_scale(axes)


def _draw_kl(axes: Axes, report: ComparisonReport) -> None:
    _draw_lines(axes, report, lambda row: row.quality.kl)
    axes.set_title("Distance from the dense model")
    axes.set_ylabel("KL divergence, nats per token (log scale)")
    _set_scale(axes)


def _draw_lines(axes: Axes, report: ComparisonReport, value: Value) -> None:
    """Lines over sparsity, then a column for each N:M; what cannot stand on a log axis is left."""
    columns = _columns(report)
    axes.set_yscale("log")
    for method, style in _styles(report):
        rows = [row for row in report.rows[1:] if row.method == method]
        lines = sorted((row for row in rows if ":" not in row.pattern), key=lambda r: r.sparsity)
        axes.plot(*_points(lines, value, lambda row: 100 * row.sparsity), **style)
        points = [row for row in rows if ":" in row.pattern]
        style = style | {"linestyle": "none"}
        axes.plot(*_points(points, value, lambda row: columns[row.pattern]), **style)
    _set_ticks(axes, report, columns)


def _set_scale(axes: Axes) -> None:
    """Plain numbers: over four decades at 1 alone, over one at 1, 2 and 5, else at more."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0)
    locator = LogLocator(subs=(1.0,) if decades > 4 else subs, numticks=20)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _points(
    rows: list[Row], value: Value, place: Callable[[Row], float]
) -> tuple[list[float], list[float]]:
    found = [(place(row), value(row)) for row in rows]
    drawn = [(x, y) for x, y in found if y is not None and math.isfinite(y) and y > 0]
    return [x for x, _ in drawn], [y for _, y in drawn]


def _columns(report: ComparisonReport) -> dict[str, float]:
    """Where each N:M stands, right of the highest sparsity."""
    spans = _spans(report)
    first, step = (spans[-1], max((spans[-1] - spans[0]) / 6, 3.0)) if spans else (0.0, 10.0)
    patterns = dict.fromkeys(row.pattern for row in report.rows[1:] if ":" in row.pattern)
    return {pattern: first + step * (place + 1.2) for place, pattern in enumerate(patterns)}


def _spans(report: ComparisonReport) -> list[float]:
    """Unstructured sparsities in percent, ascending."""
    rows = [row for row in report.rows[1:] if ":" not in row.pattern]
    return sorted({100 * Pattern.parse(row.pattern).sparsity for row in rows})


def _set_ticks(axes: Axes, report: ComparisonReport, columns: dict[str, float]) -> None:
    spans = _spans(report)
    shown = spans[:: -(-len(spans) // 8)] if spans else []
    labels = [f"{share:.3g}" for share in shown]
    axes.set_xticks([*shown, *columns.values()], [*labels, *columns])
    axes.set_xlabel("weights pruned, %" + (";  N of M kept" if columns else ""))
    if spans and columns:
        middle = (spans[-1] + next(iter(columns.values()))) / 2
        axes.axvline(middle, color="#bbbbbb", linewidth=1, linestyle=":")


def _styles(report: ComparisonReport) -> list[tuple[str, dict[str, Any]]]:
    """A colour and marker for each method, the same in both panels."""
    return [
        (
            method,
            {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[place % len(MARKERS)],
                "markersize": 7.5,
                "linewidth": 2.2,
            },
        )
        for place, method in enumerate(report.config["methods"])
    ]


def _add_legend(figure: Figure, report: ComparisonReport) -> None:
    """Methods from the worst to the best, as the lines end, each with its knee."""
    from matplotlib.lines import Line2D

    def worst(entry: tuple[str, dict[str, Any]]) -> float:
        rows = [row for row in report.rows[1:] if row.method == entry[0]]
        return -max(row.quality.nll for row in rows)

    handles, labels = [], []
    for method, style in sorted(_styles(report), key=worst):
        knee = report.knees.get(method)
        handles.append(Line2D([], [], **style))
        labels.append(method if knee is None else f"{method}, {knee.text}")
    handles.append(Line2D([], [], color="black", linewidth=1.5))
    labels.append(f"dense: perplexity {report.dense.quality.token_ppl:.3g}")
    title = "method"
    if report.knees:
        allowed = 100 * report.config["knee"]
        title += f", and how much it\nprunes (|) within\n{allowed:g}% more perplexity"
    legend = figure.legend(
        handles, labels, loc="outside right upper", frameon=False, title=title, labelspacing=0.7
    )
    legend.set_alignment("left")
