"""What a sweep found: its rows, the frontier, the recommendation, the files they are written to."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prune_llm.activation.levels import DENSE
from prune_llm.quality import ppl_increase
from prune_llm_eval.comparison_report import finite
from prune_llm_eval.perplexity import Quality

JSON_FILE, CSV_FILE = "sweep.json", "sweep.csv"
PICTURES = ("sweep.svg", "sweep.png")


@dataclass(frozen=True)
class SweepRow:
    """One setting: a way of pruning, a pattern, an activation level.

    Attributes:
        method: a method or a quality; "dense" for the dense model, whose pattern is "".
        level: "dense" where no activation is skipped; skipped: what it skipped of the evaluation
            text, None there.
        sparsity: achieved over all pruned linears. nbytes: of the tensors on disk.
        tasks: lm-eval's value and its standard error (None: not known), by "task metric".
        seconds: of pruning, levels included. speeds: tokens per second of every round.
    """

    method: str
    pattern: str
    level: str
    sparsity: float
    skipped: float | None
    quality: Quality
    nbytes: int
    seconds: float
    tasks: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    speeds: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        level = "" if self.level == DENSE else f" @{self.level}"
        return f"{self.method} {self.pattern}".strip() + level

    @property
    def tokens_per_second(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.speeds)

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> SweepRow:
        own = {name: saved[name] for name in cls.__dataclass_fields__}
        tasks = {name: (value, stderr) for name, (value, stderr) in own["tasks"].items()}
        quality = Quality(**own["quality"])
        return cls(**{**own, "quality": quality, "tasks": tasks, "speeds": tuple(own["speeds"])})


@dataclass
class SweepReport:
    """The whole sweep; saved as sweep.json. ``rows``: the dense model first.

    Attributes:
        kept: directories of checkpoints that stay, inside ``output``.
        seconds: of pruning and everything measured, stops not counted.
    """

    model: str
    output: str
    config: dict[str, Any]
    model_sha256: str
    environment: dict[str, str]
    calibration: dict[str, object] | None
    text: dict[str, object]
    rows: list[SweepRow]
    decoder: str
    kept: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def dense(self) -> SweepRow:
        return self.rows[0]

    @property
    def target(self) -> float:
        return float(self.config["max_ppl_increase"])

    def increase(self, row: SweepRow) -> float:
        """Of the perplexity over the dense model, as a fraction."""
        return ppl_increase(row.quality.nll, self.dense.quality.nll)

    def within(self, row: SweepRow) -> bool:
        return self.increase(row) <= self.target

    @property
    def fastest(self) -> SweepRow:
        """Within the target; the dense model is."""
        return max(filter(self.within, self.rows), key=lambda row: row.tokens_per_second)

    @property
    def smallest(self) -> SweepRow:
        """Within the target, on disk; of equal ones the fastest."""
        rows = filter(self.within, self.rows)
        return min(rows, key=lambda row: (row.nbytes, -row.tokens_per_second))

    @property
    def closest(self) -> SweepRow | None:
        """The smallest increase but for the dense model's own."""
        return min(self.rows[1:], key=self.increase, default=None)

    def overlaps(self, row: SweepRow) -> bool:
        """Whether a round of the dense model was as fast as one of this setting."""
        return min(row.speeds) <= max(self.dense.speeds)

    def frontier(self, by_size: bool = False) -> list[SweepRow]:
        """Rows that no other one beats in both: speed (or size on disk) and quality."""
        points = [
            (float(row.nbytes) if by_size else -row.tokens_per_second, row.quality.nll)
            for row in self.rows
        ]
        return [self.rows[index] for index in pareto(points)]

    def to_json(self) -> str:
        found: dict[str, Any] = finite(asdict(self))
        frontiers = self.frontier(), self.frontier(by_size=True)
        for entry, row in zip(found["rows"], self.rows, strict=True):
            entry["name"], entry["tokens_per_second"] = row.name, row.tokens_per_second
            entry["ppl_increase"], entry["within"] = self.increase(row), self.within(row)
            entry["on_speed_frontier"], entry["on_size_frontier"] = (row in f for f in frontiers)
        found |= {"fastest": self.fastest.name, "smallest": self.smallest.name}
        return json.dumps(found, indent=1, allow_nan=False) + "\n"

    def write_csv(self, file: Path) -> None:
        """A line for each row; what is not known or not finite is empty."""
        tasks = list(dict.fromkeys(name for row in self.rows for name in row.tasks))
        with file.open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow([*COLUMNS, *tasks])
            for row in self.rows:
                values = [row.tasks.get(name, (None,))[0] for name in tasks]
                out.writerow([finite(value) for value in (*self._cells(row), *values)])

    def _cells(self, row: SweepRow) -> list[Any]:
        quality = row.quality
        return [
            *(row.method, row.pattern, row.level, row.sparsity, row.skipped),
            *(quality.token_ppl, self.increase(row), quality.kl, quality.flips),
            *(row.tokens_per_second, min(row.speeds), max(row.speeds)),
            *(row.nbytes, round(row.seconds, 3), int(self.within(row))),
        ]


COLUMNS = (
    *("method", "pattern", "level", "sparsity", "skipped", "token_ppl", "ppl_increase", "kl"),
    *("flips", "tokens_per_second", "slowest", "fastest", "bytes", "seconds", "within"),
)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats, ascending in the first; less is better in both.

    Of equal points the first counts; one that is not finite never does.
    """
    order = sorted(range(len(points)), key=lambda index: (*points[index], index))
    found: list[int] = []
    best = math.inf
    for index in order:
        first, second = points[index]
        if math.isfinite(first) and second < best:
            found.append(index)
            best = second
    return found


def write_report(report: SweepReport, output: Path, work: Path) -> None:
    """Make all files in ``work``, then move them to ``output``, the JSON last."""
    from prune_llm_eval.sweep_plot import draw

    draw(report, [work / name for name in PICTURES])
    report.write_csv(work / CSV_FILE)
    (work / JSON_FILE).write_text(report.to_json())
    for name in (*PICTURES, CSV_FILE, JSON_FILE):
        os.replace(work / name, output / name)
