"""Methods x patterns in one run: what each costs in quality, time, memory and bytes.

All variants see the same calibration windows and are scored on the same evaluation windows beside
the dense model. A journal in the output keeps what is finished, so that a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prune_llm.activation.texts import OVERLAP, overlap
from prune_llm.calibration import BUNDLED, Calibration
from prune_llm.config import PruneConfig, select_device
from prune_llm.job import Job
from prune_llm.masks import Pattern
from prune_llm.memory import return_freed_memory
from prune_llm.quality import load_to_measure
from prune_llm.report import environment, highest, peak_memory, restart_peak_memory
from prune_llm.sparse_checkpoint import open_stored
from prune_llm.windows import describe, needs, surveys
from prune_llm_eval.compare import EvalConfig, text_windows
from prune_llm_eval.comparison_plot import need_matplotlib
from prune_llm_eval.comparison_report import DENSE, ComparisonReport, Row, find_knees, write_report
from prune_llm_eval.journal import Journal, check_output
from prune_llm_eval.perplexity import Quality, compare
from prune_llm_eval.variants import (
    OnProgress,
    OwnStatistics,
    Pruner,
    SharedStatistics,
    Variant,
    check_plan,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATISTICS = ("shared", "own")


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared.

    Attributes:
        methods: keys of ``METHODS``; patterns: as in `PruneConfig`. Every method meets every
            pattern.
        prune: text, seed and everything else that decides a result; its method and pattern are not
            read.
        text: scored on; ``windows``: only its first so many. Cut as the calibration text is.
        statistics: "shared": of the dense model, gathered once; "own": each variant is pruned as
            `prune` does it.
        knee: the increase in perplexity, as a fraction, that essential sparsity allows.
    """

    methods: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt", "alps")
    patterns: tuple[str, ...] = ("0.3", "0.4", "0.5", "0.6", "0.7", "2:4", "4:8")
    prune: PruneConfig = field(default_factory=PruneConfig)
    text: str = BUNDLED
    windows: int | None = None
    statistics: str = "shared"
    knee: float = 0.05

    def __post_init__(self) -> None:
        if self.statistics not in STATISTICS:
            choices = ", ".join(STATISTICS)
            raise ValueError(f"statistics {self.statistics!r}: unknown; choose one of {choices}")
        if not (math.isfinite(self.knee) and self.knee > 0):
            raise ValueError(f"knee {self.knee:g}: must be above 0, such as 5%")
        if self.prune.format != "sparse":
            raise ValueError(f"format {self.prune.format!r}: a comparison needs the sparse form")
        self._check_lists()
        for config in self.configs.values():
            if self.statistics == "shared":
                _check_shared(config)
        _ = self.scoring

    def _check_lists(self) -> None:
        with _plural():
            patterns = [Pattern.parse(pattern) for pattern in self.patterns]
        for name, given in (("methods", self.methods), ("patterns", patterns)):
            if not given:
                raise ValueError(f"{name}: none are given; give at least one")
            twice = next((entry for entry in given if list(given).count(entry) > 1), None)
            if twice is not None:
                raise ValueError(f"{name} {twice}: is given twice; give it once")

    @property
    def configs(self) -> dict[Variant, PruneConfig]:
        """Every variant, method by method."""
        return {
            Variant(method, pattern): self._config(method, pattern)
            for method in self.methods
            for pattern in self.patterns
        }

    def _config(self, method: str, pattern: str) -> PruneConfig:
        with _plural():
            return replace(self.prune, method=method, pattern=pattern)

    @property
    def scoring(self) -> EvalConfig:
        pruning = self.prune
        return EvalConfig(
            self.text,
            pruning.separator,
            pruning.seq_len,
            self.windows,
            pruning.device,
            pruning.dtype,
        )


@contextmanager
def _plural() -> Iterator[None]:
    """Errors of a method or a pattern name the options here: methods, patterns."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub("^(method|pattern) ", r"\1s ", str(error))) from None


def _check_shared(config: PruneConfig) -> None:
    """Raises ValueError for what looks at the pruned model or at the dense one again."""
    asked = {
        "target": config.target if config.target != "pruned" else None,
        "reconstruction": config.reconstruction if config.reconstruction != "none" else None,
        "allocation": config.allocation if surveys(config) else None,
    }
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{name} {value!r}: has no statistics that variants could share; give "
                "--statistics own as well"
            )


OnRow = Callable[[Row], None]


def compare_methods(
    model: str | os.PathLike[str],
    config: ComparisonConfig,
    output: str | os.PathLike[str],
    on_progress: OnProgress = lambda *_: None,
    on_row: OnRow = lambda _: None,
) -> ComparisonReport:
    """Prune and score every variant; write comparison.json, .csv, .svg and .png to ``output``.

    Stopped at any point, the same call goes on where it was, with the same results. Until it ends,
    ``output`` holds a dense copy of the pruned linears of every variant that is not scored yet.

    Args:
        on_row: told of every row, in their order, as soon as it is known.

    Raises:
        ValueError: a bad option, model or text, or an output that another run is writing, that was
            begun with other settings, or that holds something else.
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    output = Path(output)
    check_output(output)
    on_progress("reading the model and the texts", 0, 1)
    neediest = max(config.configs.values(), key=lambda own: int(needs(own)))
    base = Job.open(model, neediest, select_device(neediest.device), None, None)
    check_plan(base)
    windows_ST = text_windows(open_stored(base.checkpoint.directory), config.scoring)
    _refuse_overlap(base.calibration, windows_ST, config.text)
    with Journal(output, _settings(base, config, windows_ST)) as journal:
        run = _Run(base, config, windows_ST, journal, on_progress)
        try:
            report = run.report(run.rows(on_row))
            write_report(report, output, run.work)
            shutil.rmtree(run.work)
        finally:
            if not (journal.of_kind("solved") or journal.of_kind("scored")):
                journal.remove()  # what would be found again at once need not stay
    return report


def _refuse_overlap(calibration: Calibration | None, windows_ST: Tensor, text: str) -> None:
    share = 0.0 if calibration is None else overlap(calibration.samples_ST, windows_ST)
    if share > OVERLAP:
        raise ValueError(
            f"text {text!r}: {share:.0%} of it is in the calibration text, so it would not tell "
            "what pruning costs on new text; give another text"
        )


def _settings(base: Job, config: ComparisonConfig, windows_ST: Tensor) -> dict[str, dict[str, Any]]:
    """What the results depend on; the knee is found anew from them."""
    options = asdict(config)
    options |= {name: value for name, value in options.pop("prune").items() if name not in options}
    for unread in ("knee", "method", "pattern"):
        del options[unread]
    calibration = None if base.calibration is None else base.calibration.sha256
    inputs = {
        "the model": base.hashing.result(),
        "the calibration text": calibration,
        "the evaluation text": _sha256(windows_ST),
    }
    return {
        "options": options,
        "inputs": inputs,
        "environment": environment(base.device, base.dtype),
    }


def _sha256(windows_ST: Tensor) -> str:
    return hashlib.sha256(windows_ST.numpy().tobytes()).hexdigest()


class _Run:
    """One run: the variants, what is known of them, and where they lie."""

    def __init__(
        self,
        base: Job,
        config: ComparisonConfig,
        windows_ST: Tensor,
        journal: Journal,
        on_progress: OnProgress,
    ) -> None:
        self.base, self.config, self.windows_ST = base, config, windows_ST
        self.journal, self.on_progress = journal, on_progress
        self.work = journal.directory / "work"
        self.work.mkdir(exist_ok=True)

    def rows(self, on_row: OnRow) -> list[Row]:
        """The dense model and every variant; what the journal has is not computed again."""
        known = {
            Variant(found["method"], found["pattern"]): Row.restored(found)
            for found in self.journal.of_kind("scored")
        }
        if len(known) <= len(self.config.configs):
            self._pruner.prepare()  # before a model is loaded whole
        rows = []
        for variant in (Variant(DENSE, ""), *self.config.configs):
            row = known.get(variant)
            if row is None:
                row = self._dense_row() if variant.method == DENSE else self._row(variant)
                self._add(row)
            rows.append(row)
            on_row(row)
        return rows

    def report(self, rows: list[Row]) -> ComparisonReport:
        base, records = self.base, self.journal.records
        shared = sum(record["seconds"] for record in self.journal.of_kind("calibrated"))
        windows, seq_len = self.windows_ST.shape
        warnings, config = list(base.warnings), asdict(self.config)
        del config["prune"]["method"], config["prune"]["pattern"]  # not read
        if not restart_peak_memory(base.device):
            warnings.append(
                "peak memory is that since the program began: this system does not let it restart"
            )
        return ComparisonReport(
            model=str(base.checkpoint.directory),
            output=str(self.journal.directory),
            config=config,
            model_sha256=base.hashing.result(),
            environment=environment(base.device, base.dtype),
            calibration=describe(base.calibration),
            text={
                "source": self.config.text,
                "windows": windows,
                "seq_len": seq_len,
                "sha256": _sha256(self.windows_ST),
            },
            rows=rows,
            knees=find_knees(rows, self.config.knee),
            calibration_seconds=shared,
            seconds=shared + sum(row.seconds + row.scoring_seconds for row in rows),
            peak_memory=highest([r.get("peak", r.get("peak_memory", {})) for r in records]),
            warnings=warnings,
        )

    @cached_property
    def _pruner(self) -> Pruner:
        configs = self.config.configs
        pruner: Pruner = OwnStatistics(self.base, configs, self.on_progress)
        if self.config.statistics == "shared":
            pruner = SharedStatistics(self.base, configs, self.on_progress, self.journal, self.work)
        return pruner

    def _load(self, directory: Path) -> PreTrainedModel:
        return load_to_measure(directory, self.config.prune.device, self.config.prune.dtype)

    def _dense_row(self) -> Row:
        quality, seconds = self._scored("the dense model")
        return Row(DENSE, "", 0.0, quality, self.base.checkpoint.nbytes, 0.0, seconds, {})

    def _row(self, variant: Variant) -> Row:
        """Prune and score."""
        directory = self.work / variant.folder / "checkpoint"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        pruned = self._pruner.write(variant, directory)
        return_freed_memory()
        quality, seconds = self._scored(variant.name, directory)
        return Row(
            method=variant.method,
            pattern=variant.pattern,
            sparsity=pruned.sparsity,
            quality=quality,
            nbytes=open_stored(directory).nbytes,
            seconds=pruned.seconds,
            scoring_seconds=seconds,
            peak_memory=pruned.peak_memory,
            warnings=pruned.warnings,
        )

    def _scored(self, name: str, *pruned: Path) -> tuple[Quality, float]:
        """What the checkpoint, or without one the dense model, makes of the text; seconds."""
        started = time.perf_counter()
        restart_peak_memory(self.base.device)
        models = [self._load(path) for path in (self.base.checkpoint.directory, *pruned)]
        found = compare(
            models,
            self.windows_ST,
            against_first=True,
            on_window=lambda done, total: self.on_progress(f"scoring {name}", done, total),
        )
        return found[-1], time.perf_counter() - started

    def _add(self, row: Row) -> None:
        peak = highest([peak_memory(self.base.device), row.peak_memory])
        self.journal.add({"kind": "scored", **asdict(row), "peak": peak})
        shutil.rmtree(self.work / Variant(row.method, row.pattern).folder, ignore_errors=True)
