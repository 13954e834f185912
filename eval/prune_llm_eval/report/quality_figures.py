"""Pictures of quality beside sparsity and speed: this model, its levels, and others beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from prune_llm_eval.report.charts import BOTTOM, LEFT, RIGHT, TOP, Mark, Series
from prune_llm_eval.report.drawing import Axis, linear_ticks, ratio_axis
from prune_llm_eval.report.figure import Figure, chart, slot_of
from prune_llm_eval.report.notation import clean, percent, signed, times
from prune_llm_eval.report.points import display, load_words, own_points, speed_row
from prune_llm_eval.report.tables import Table


def all_points(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of this model and of the files beside it."""
    return [*own_points(report), *(p for one in report["beside"] for p in one["points"])]


def quality_figure(report: dict[str, Any]) -> Figure | None:
    """Perplexity over the share of the multiplications that are left out, by zeros or inputs."""
    points = [p for p in all_points(report) if _finite(p["ppl_ratio"]) and _skipped(p) is not None]
    if report["quality"] is None or len(points) < 2:
        return None
    x_ticks = tuple((n / 5, f"{20 * n} %") for n in range(6))
    x = Axis("multiplications left out", 0.0, 1.0, LEFT, RIGHT, x_ticks)
    y = ratio_axis("perplexity, beside dense", [p["ppl_ratio"] for p in points], BOTTOM, TOP)
    series = _series(report, points, lambda p: (_skipped(p), p["ppl_ratio"]), _describe)
    title = _quality_title(report, points)
    about = (
        "Perplexity beside the dense model's (logarithmic) over the share of the linears' "
        "multiplications that zero weights and skipped inputs leave out."
    )
    return chart(
        "quality", title, about, series, x, y, baseline=1.0, table=_points_table(report, points)
    )


def _quality_title(report: dict[str, Any], points: list[dict[str, Any]]) -> str:
    own = [p for p in points if p["label"] == "model" and p["ppl_ratio"] != 1.0]
    own = own or [p for p in points if p["label"].startswith("level")]
    if not own:
        return "Perplexity against sparsity"
    change = signed(own[0]["ppl_ratio"] - 1)
    return f"{change} perplexity with {percent(_skipped(own[0]), 0)} left out"


def _skipped(point: dict[str, Any]) -> float | None:
    """Share of the multiplications that nothing needs; None where a part is not known."""
    weights, inputs = point["weight_sparsity"], point["input_sparsity"]
    return None if weights is None or inputs is None else 1 - (1 - weights) * (1 - inputs)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _describe(point: dict[str, Any]) -> str:
    parts = [clean(str(point["label"]))]
    if _finite(point["ppl_ratio"]):
        parts.append(f"{signed(point['ppl_ratio'] - 1, 2)} perplexity")
    parts.append(f"{percent(point['weight_sparsity'])} of the weights zero")
    parts.append(f"{percent(point['input_sparsity'])} of the inputs skipped")
    if point["speed_ratio"] is not None:
        parts.append(f"{times(point['speed_ratio'])} as fast as dense")
    return ", ".join(parts)


def frontier_figure(report: dict[str, Any]) -> Figure | None:
    """Perplexity over speed, both beside the dense model of the same run."""
    points = [
        p for p in all_points(report) if _finite(p["ppl_ratio"]) and p["speed_ratio"] is not None
    ]
    if report["quality"] is None or len(points) < 2:
        return None
    speeds = [p["speed_ratio"] for p in points]
    ticks = linear_ticks(min(*speeds, 0.9), max(*speeds, 1.1))
    named = tuple((tick, f"{tick:g}×") for tick in ticks)
    x = Axis("decoding speed, times dense", ticks[0], ticks[-1], LEFT, RIGHT, named)
    y = ratio_axis("perplexity, beside dense", [p["ppl_ratio"] for p in points], BOTTOM, TOP)
    series = _series(report, points, lambda p: (p["speed_ratio"], p["ppl_ratio"]), _describe)
    series = tuple(Series(one.name, one.slot, one.marks, line=False) for one in series)
    load = "" if report["speed"] is None else load_words(report["speed"]["loads"][0])
    best = max(points, key=lambda p: p["speed_ratio"])
    timed = speed_row(report, best["label"])
    gain = None if timed is None else timed["decode_gain"]
    title = "Nothing is faster than the dense model here"
    if gain is not None and gain["clear"] is None:
        title = "Nothing is clearly faster than the dense model here"
    elif best["speed_ratio"] > 1:
        title = f"Fastest: {_named(report, best['label'])}, {times(best['speed_ratio'])} dense"
    about = (
        f"Perplexity (logarithmic) over the speed of decoding{load}; lower and further right is "
        "better."
    )
    table = _points_table(report, points)
    return chart("frontier", title, about, series, x, y, baseline=1.0, table=table)


def _named(report: dict[str, Any], label: str) -> str:
    return display(report, label) if label in ("dense", "model") else clean(label)


def _series(
    report: dict[str, Any],
    points: list[dict[str, Any]],
    place: Callable[[dict[str, Any]], tuple[float | None, float]],
    describe: Callable[[dict[str, Any]], str],
) -> tuple[Series, ...]:
    names = list(dict.fromkeys(point["series"] for point in points))
    found = []
    for name in names:
        own = [(place(point), describe(point)) for point in points if point["series"] == name]
        marks = tuple(Mark(x, y, label) for (x, y), label in own if x is not None)
        line = "N:M" not in name
        found.append(Series(_named(report, name), slot_of(name, names), marks, line))
    return tuple(found)


def _points_table(report: dict[str, Any], points: list[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            _named(report, p["label"]),
            percent(p["weight_sparsity"]),
            percent(p["input_sparsity"]),
            signed(p["ppl_ratio"] - 1, 2),
            times(p["speed_ratio"]),
        )
        for p in points
    )
    columns = ("", "weights zero", "inputs skipped", "perplexity", "decoding, times dense")
    return Table(columns, rows, "perplexity: beside the dense model on the same text.")
