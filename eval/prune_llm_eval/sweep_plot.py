"""The picture of a sweep: quality against measured speed, and against size, with both frontiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_llm.activation.levels import DENSE
from prune_llm_eval.comparison_plot import COLOURS, MARKERS, MOST, SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from prune_llm_eval.sweep_report import SweepReport, SweepRow

Value = Callable[["SweepRow"], float]
# beyond so many points only the frontier's are named
NAMED = 12


def draw(report: SweepReport, files: list[Path]) -> None:
    """Write the picture to each file, in the format that its name ends in."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(14, 7), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        scored = f"{report.dense.quality.tokens} tokens of {Path(str(report.text['source'])).name}"
        figure.suptitle(f"{Path(report.model).name}, {scored}")
        _draw_panel(left, report, lambda row: row.tokens_per_second, report.frontier())
        _draw_spread(left, report)
        decoding = report.config["decoding"]
        left.set_title("Speed: further right is faster")
        left.set_xlabel(
            f"tokens/s, {decoding['tokens']} behind {decoding['context']}, one sequence "
            f"(median of {decoding['rounds']} rounds)"
        )
        left.set_ylabel(_quality_label(report))
        _set_increases(left, report)
        unit, name = _unit(report)
        _draw_panel(right, report, lambda row: row.nbytes / unit, report.frontier(by_size=True))
        right.set_title("Size: further left is smaller")
        right.set_xlabel(f"tensors on disk, {name}")
        right.tick_params(labelleft=True)
        for axes in (left, right):
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
        _add_legend(figure, report)
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {}
            figure.savefig(file, dpi=150, metadata=metadata)


def _draw_panel(axes: Axes, report: SweepReport, place: Value, frontier: list[SweepRow]) -> None:
    axes.axhline(report.target, color="#444444", linewidth=1.3, linestyle="--")
    line = [(place(row), report.increase(row)) for row in frontier]
    axes.plot(*zip(*line, strict=True), color="#999999", linewidth=1.8, zorder=1)
    styles = _styles(report)
    for row in filter(_drawable, report.rows):
        axes.plot(place(row), report.increase(row), **_marker(row, styles))
    best = report.fastest
    axes.plot(
        place(best), report.increase(best), "o", markersize=19, markerfacecolor="none",
        markeredgecolor="black", markeredgewidth=1.8, zorder=4,
    )  # fmt: skip
    axes.margins(x=0.12)
    _name_points(axes, report, place, frontier)


def _set_increases(axes: Axes, report: SweepReport) -> None:
    """Even up to the target, where the choice is made; logarithmic beyond it."""
    axes.set_yscale("asinh", linear_width=report.target)
    found = [report.increase(row) for row in report.rows if _drawable(row)]
    low, high = min(found), min(max(*found, 1.5 * report.target), MOST)
    axes.set_ylim(min(1.3 * low, -0.15 * report.target), 1.3 * high)
    steps = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    ticks = [0.0, *(step for step in steps if report.target / 3 < step <= 1.3 * high)]
    axes.set_yticks(ticks, [f"{100 * tick:+g}%" if tick else "0" for tick in ticks])
    axes.minorticks_off()


def _draw_spread(axes: Axes, report: SweepReport) -> None:
    """From the slowest to the fastest round."""
    for row in filter(_drawable, report.rows):
        ends = [min(row.speeds), max(row.speeds)]
        axes.plot(ends, [report.increase(row)] * 2, color="#888888", linewidth=1, zorder=0)


def _name_points(axes: Axes, report: SweepReport, place: Value, frontier: list[SweepRow]) -> None:
    """Pattern and level beside each point; of many points only those of the frontier."""
    for row in report.rows if len(report.rows) <= NAMED else frontier:
        if _drawable(row):
            level = "" if row.level == DENSE else f" @{row.level}"
            axes.annotate(
                f"{row.pattern or 'dense'}{level}",
                (place(row), report.increase(row)),
                textcoords="offset points",
                xytext=(9, 7),
                fontsize=10,
                color="#333333",
                annotation_clip=True,
            )


def _drawable(row: SweepRow) -> bool:
    return math.isfinite(row.quality.token_ppl)


def _quality_label(report: SweepReport) -> str:
    dense = report.dense.quality.token_ppl
    broken = [row for row in report.rows if not report.increase(row) <= MOST]
    left_out = f"; {len(broken)} broken ones left out" if broken else ""
    return f"token perplexity over the dense model's {dense:.4g}{left_out}"


def _unit(report: SweepReport) -> tuple[float, str]:
    most = max(row.nbytes for row in report.rows)
    return (1e9, "GB") if most >= 1e9 else (1e6, "MB")


def _styles(report: SweepReport) -> dict[str, tuple[str, str]]:
    methods = list(dict.fromkeys(row.method for row in report.rows[1:] if row.method != DENSE))
    found = {
        method: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)])
        for place, method in enumerate(methods)
    }
    return {DENSE: ("#000000", "*"), **found}


def _marker(row: SweepRow, styles: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Filled without activation levels, open at one."""
    colour, marker = styles[row.method]
    size = 14 if row.method == DENSE else 9
    filled = colour if row.level == DENSE else "white"
    return {
        "color": colour, "marker": marker, "markersize": size, "markerfacecolor": filled,
        "markeredgewidth": 1.8, "linestyle": "none", "zorder": 3,
    }  # fmt: skip


def _add_legend(figure: Figure, report: SweepReport) -> None:
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for method, (colour, marker) in _styles(report).items():
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=10, linestyle="none"))
        labels.append("dense model" if method == DENSE else method)
    if any(row.level != DENSE for row in report.rows):
        handles.append(Line2D([], [], color="#555555", marker="o", markersize=9, linestyle="none",
                              markerfacecolor="white", markeredgewidth=1.8))  # fmt: skip
        labels.append("open: at an activation level")
    handles += [
        Line2D([], [], color="#999999", linewidth=1.8),
        Line2D([], [], color="#444444", linewidth=1.3, linestyle="--"),
        Line2D([], [], color="black", marker="o", markersize=15, markerfacecolor="none",
               linestyle="none"),
    ]  # fmt: skip
    allowed = f"{100 * report.target:g}%"
    labels += ["frontier", f"{allowed} more perplexity", f"fastest within {allowed}"]
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=4)
