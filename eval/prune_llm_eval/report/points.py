"""The model of a report and its levels as points: sparsity, perplexity and speed beside dense."""

from __future__ import annotations

from typing import Any

from prune_llm_eval.report.notation import clean


def own_points(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The dense model, where there is one, the model and its levels.

    ``weight_sparsity`` and ``input_sparsity`` are realised; ``ppl_ratio`` is to the dense model,
    or to the model itself where none was given; ``speed_ratio`` to the baseline, of decoding at the
    smallest load. None where not measured.
    """
    rows = {name_of(row): row for row in (report["quality"] or {"rows": []})["rows"]}
    first = "model" if report["against"] is None else "dense"
    names = ["dense", "model", *(f"level {level}" for level in report["model"]["levels"])]
    zeros = overall_sparsity(report)
    points = []
    for name in names[names.index(first) :]:
        increase = rows.get(name, {}).get("ppl_increase")
        points.append(
            {
                "label": name,
                "series": name,
                "weight_sparsity": 0.0 if name == "dense" else zeros,
                "input_sparsity": rows.get(name, {}).get("skipped")
                if name.startswith("level")
                else 0.0,
                "ppl_ratio": 1.0 if name == first else None if increase is None else 1 + increase,
                "speed_ratio": 1.0 if name == "dense" else speed_ratio(report, name),
            }
        )
    return points


def name_of(row: dict[str, Any]) -> str:
    """Of a row of quality: dense, model or "level NAME"."""
    return f"level {row['level']}" if row["role"] == "level" else str(row["role"])


def display(report: dict[str, Any], name: str) -> str:
    """What a reader calls it: the models by their names."""
    if name == "model":
        return clean(str(report["model"]["name"]))
    if name == "dense":
        against = report["against"]
        return "dense" if against is None else f"{clean(str(against['name']))} (dense)"
    return "transformers, dense" if name == "transformers" else clean(name)


def quality_row(report: dict[str, Any], name: str) -> dict[str, Any] | None:
    rows = (report["quality"] or {"rows": []})["rows"]
    return next((row for row in rows if name_of(row) == name), None)


def overall_sparsity(report: dict[str, Any]) -> float | None:
    """Of all linears of the blocks, as stored."""
    linears = report["sparsity"]["linears"]
    weights = sum(one["weights"] for one in linears)
    return sum(one["weights"] * one["sparsity"] for one in linears) / weights if weights else None


def speed_row(report: dict[str, Any], name: str, load: int = 0) -> dict[str, Any] | None:
    """Of a variant, at the smallest load if none is named."""
    if report["speed"] is None:
        return None
    rows = report["speed"]["loads"][load]["rows"]
    return next((row for row in rows if row["variant"] == name), None)


def speed_ratio(report: dict[str, Any], name: str) -> float | None:
    """Decoding of a variant at the smallest load, in times the dense model's."""
    row = speed_row(report, name)
    gain = None if row is None else row["decode_gain"]
    return None if gain is None else float(gain["median"])


def size_row(report: dict[str, Any], role: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in report["size"] if row["role"] == role)
    return found


def load_words(load: dict[str, Any]) -> str:
    return f" at batch {load['batch']}, context {load['context']}"
