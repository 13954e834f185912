"""What a comparison found: a row for each variant, the knees, the files they are written to."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prune_llm_eval.comparison_plot import draw
from prune_llm_eval.knee import Knee, find_knee
from prune_llm_eval.perplexity import Quality

JSON_FILE, CSV_FILE = "comparison.json", "comparison.csv"
PICTURES = ("comparison.svg", "comparison.png")
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One variant, or the dense model.

    Attributes:
        method: "dense" for the dense model, whose pattern is "".
        sparsity: achieved over all pruned linears.
        nbytes: of its tensors on disk, packed.
        seconds: of solving (of the whole pruning with statistics "own"); scoring_seconds: of the
            evaluation, the dense model beside it.
        peak_memory: bytes, while it was pruned; empty for the dense model.
    """

    method: str
    pattern: str
    sparsity: float
    quality: Quality
    nbytes: int
    seconds: float
    scoring_seconds: float
    peak_memory: dict[str, int]
    warnings: tuple[str, ...] = ()

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> Row:
        own = {name: saved[name] for name in cls.__dataclass_fields__}
        own |= {"quality": Quality(**own["quality"]), "warnings": tuple(own["warnings"])}
        return cls(**own)


@dataclass
class ComparisonReport:
    """The whole comparison; saved as comparison.json.

    Attributes:
        text: where the evaluation windows come from, with their hash.
        rows: the dense model first.
        knees: essential sparsity by method, from its unstructured patterns.
        calibration_seconds: spent for all variants together; seconds: in all, stops not counted.
        peak_memory: the highest of all phases, scoring included, where two models are loaded whole.
    """

    model: str
    output: str
    config: dict[str, Any]
    model_sha256: str
    environment: dict[str, str]
    calibration: dict[str, object] | None
    text: dict[str, object]
    rows: list[Row]
    knees: dict[str, Knee]
    calibration_seconds: float
    seconds: float
    peak_memory: dict[str, int]
    warnings: list[str]

    @property
    def dense(self) -> Row:
        return self.rows[0]

    def to_json(self) -> str:
        return json.dumps(finite(asdict(self)), indent=1, allow_nan=False) + "\n"

    def write_csv(self, file: Path) -> None:
        """A line for each row; what is not known or not finite is empty."""
        names = ("token_ppl", "nll", "nll_stderr", "kl", "flips")
        with file.open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(
                ["method", "pattern", "sparsity", *names, "bytes", "seconds", "peak_bytes"]
            )
            for row in self.rows:
                quality = finite(asdict(row.quality))
                values = [quality[name] for name in names]
                costs = [row.nbytes, round(row.seconds, 3), row.peak_memory.get("process")]
                out.writerow([row.method, row.pattern, row.sparsity, *values, *costs])


def finite(value: Any) -> Any:
    """JSON knows no nan and no infinity: None in their place."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_knees(rows: list[Row], increase: float) -> dict[str, Knee]:
    """Of every method that has unstructured patterns; ``rows`` begin with the dense model."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        if ":" not in row.pattern:
            curves.setdefault(row.method, []).append((row.sparsity, row.quality.nll))
    found = {
        method: find_knee(curve, rows[0].quality.nll, increase) for method, curve in curves.items()
    }
    return {method: knee for method, knee in found.items() if knee is not None}


def write_report(report: ComparisonReport, output: Path, work: Path) -> None:
    """Make all files in ``work``, then move them to ``output``, the JSON last."""
    draw(report, [work / name for name in PICTURES])
    report.write_csv(work / CSV_FILE)
    (work / JSON_FILE).write_text(report.to_json())
    for name in (*PICTURES, CSV_FILE, JSON_FILE):
        os.replace(work / name, output / name)
