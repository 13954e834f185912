"""Results of other runs that a report draws beside its model.

Read are comparison.json (`compare`), frontier.json (`frontier`), sweep.json (`sweep`) and
report.json of another model.
Perplexities of different texts do not compare, so each point keeps only its ratio to the dense
model's on its own text; likewise speed, to the dense model of its own run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune_llm.masks import Pattern


def read_beside(file: Path) -> dict[str, Any]:
    """The points of a file: sparsity of the weights and of the inputs, perplexity, speed.

    Raises:
        ValueError: no such file, or none of ours.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"beside {str(file)!r}: cannot be read ({error})") from None
    for is_it, read in READERS:
        if isinstance(found, dict) and is_it(found):
            try:
                return {"source": file.name, "points": read(found)}
            except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
                raise ValueError(
                    f"beside {str(file)!r}: is damaged ({type(error).__name__}: {error})"
                ) from None
    raise ValueError(
        f"beside {str(file)!r}: is none of comparison.json, frontier.json, sweep.json and "
        "report.json; give one that prune-llm compare, frontier, sweep or report wrote"
    )


def _point(label: str, series: str, **values: float | None) -> dict[str, Any]:
    names = ("weight_sparsity", "input_sparsity", "ppl_ratio", "speed_ratio")
    return {"label": label, "series": series, **{name: values.get(name) for name in names}}


def _comparison(found: dict[str, Any]) -> list[dict[str, Any]]:
    dense = found["rows"][0]["quality"]["token_ppl"]
    return [
        _point(
            f"{row['method']} {row['pattern']}",
            row["method"] if ":" not in row["pattern"] else f"{row['method']} N:M",
            weight_sparsity=Pattern.parse(row["pattern"]).sparsity,
            input_sparsity=0.0,
            ppl_ratio=_ratio(row["quality"]["token_ppl"], dense),
        )
        for row in found["rows"][1:]
    ]


def _ratio(value: float | None, dense: float, more: float = 0.0) -> float | None:
    return None if value is None else more + value / dense


def _frontier(found: dict[str, Any]) -> list[dict[str, Any]]:
    dense = found["rows"][0]["tokens_per_second"]
    points = []
    for row in found["rows"]:
        label = f"{100 * row['sparsity']:g} % of the weights"
        if row["activation_sparsity"]:
            label += f", {100 * row['activation_sparsity']:.0f} % of the inputs"
        points.append(
            _point(
                label,
                "frontier",
                weight_sparsity=row["sparsity"],
                input_sparsity=row["activation_sparsity"],
                ppl_ratio=1 + row["ppl_increase"]["held_out"],
                speed_ratio=_ratio(row["tokens_per_second"], dense),
            )
        )
    return points


def _sweep(found: dict[str, Any]) -> list[dict[str, Any]]:
    dense = found["rows"][0]["tokens_per_second"]
    return [
        _point(
            row["name"],
            row["method"] if row["skipped"] is None else f"{row['method']}, levels",
            weight_sparsity=row["sparsity"],
            input_sparsity=row["skipped"] or 0.0,
            ppl_ratio=_ratio(row["ppl_increase"], 1.0, 1.0),
            speed_ratio=_ratio(row["tokens_per_second"], dense),
        )
        for row in found["rows"][1:]
    ]


def _report(found: dict[str, Any]) -> list[dict[str, Any]]:
    from prune_llm_eval.report.points import own_points

    return [
        {**point, "label": f"{found['model']['name']} {point['label']}", "series": "other reports"}
        for point in own_points(found)
        if point["label"] != "dense"
    ]


Values = dict[str, Any]
READERS: tuple[tuple[Callable[[Values], bool], Callable[[Values], list[Values]]], ...] = (
    (lambda found: found.get("schema") == "prune_llm.report", _report),
    (lambda found: {"rows", "fastest", "smallest"} <= found.keys(), _sweep),
    (lambda found: {"rows", "knees"} <= found.keys(), _comparison),
    (lambda found: {"rows", "chosen", "dense_ppl"} <= found.keys(), _frontier),
)
