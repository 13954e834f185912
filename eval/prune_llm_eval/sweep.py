"""A grid of ways to prune, patterns and activation levels: pruned, scored, timed, and one chosen.

Every variant is pruned as `prune` does it, scored on one text beside the dense model as `eval` does
it, and timed in turns with all others. A journal in the output keeps what is finished, so that a
stopped sweep goes on; the checkpoints lie there side by side until all are timed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_llm import prune, sparsify
from prune_llm.activation.levels import DENSE, LevelTable
from prune_llm.card_facts import add_measured, read_levels_report, read_report
from prune_llm.config import select_device
from prune_llm.job import Job
from prune_llm.model_card import update_figures
from prune_llm.prune import levels_of
from prune_llm.report import environment
from prune_llm.sparse_checkpoint import open_stored
from prune_llm.windows import describe, needs
from prune_llm_eval.card_entries import text_entry, where
from prune_llm_eval.compare import evaluate_all, text_windows
from prune_llm_eval.comparison import refuse_overlap, sha256_of
from prune_llm_eval.comparison_plot import need_matplotlib
from prune_llm_eval.journal import Journal, check_output
from prune_llm_eval.speed import OnProgress
from prune_llm_eval.sweep_config import DENSE_MODEL, SweepConfig, options_of
from prune_llm_eval.sweep_report import SweepReport, SweepRow, write_report
from prune_llm_eval.turns import Decoding, decode_speed, in_turn, threads_of
from prune_llm_eval.variants import Variant, check_plan

OnRow = Callable[[SweepRow], None]


def sweep(
    model: str | os.PathLike[str],
    config: SweepConfig,
    output: str | os.PathLike[str],
    on_progress: OnProgress = lambda *_: None,
    on_row: OnRow = lambda _: None,
) -> SweepReport:
    """Prune, score and time every setting; write sweep.json, .csv, .svg and .png to ``output``.

    Stopped at any point, the same call goes on where it was: what is scored stays, and so does
    every whole round of the timing. Target and ``keep`` may be others then.

    Args:
        on_row: told of every setting as soon as its quality is known, in their order.

    Raises:
        ValueError: a bad option, model or text, or an output that another run is writing, that was
            begun with other settings, or that holds something else.
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    output = Path(output)
    check_output(output)
    on_progress("reading the model and the texts", 0, 1)
    if config.tasks is not None:
        from prune_llm_eval.task_values import check_tasks

        check_tasks(config.tasks)
    neediest = max(config.variants.values(), key=lambda own: int(needs(own)))
    base = Job.open(model, neediest, select_device(neediest.device), None, None)
    for own in config.variants.values():
        check_plan(base, own)
    windows_ST = text_windows(open_stored(base.checkpoint.directory), config.scoring)
    refuse_overlap(base.calibration, windows_ST, config.text)
    _check_decoding(base, windows_ST, config.decoding)
    with Journal(output, _settings(base, config, windows_ST)) as journal:
        run = _Run(base, config, windows_ST, journal, on_progress)
        try:
            return run.report(run.timed(run.scored(on_row)))
        finally:
            if not journal.of_kind("scored"):
                journal.remove()  # what would be found again at once need not stay


def _check_decoding(base: Job, windows_ST: Tensor, decoding: Decoding) -> None:
    if decoding.context > windows_ST.numel():
        raise ValueError(
            f"context {decoding.context}: the prompt comes from the evaluation text, which has "
            f"{windows_ST.numel()} tokens; ask for less"
        )
    most = base.checkpoint.config.get("max_position_embeddings")
    longest = decoding.context + decoding.tokens
    if isinstance(most, int) and longest > most:
        raise ValueError(
            f"context and tokens: {longest} together, the model's context is {most}; ask for less"
        )


def _settings(base: Job, config: SweepConfig, windows_ST: Tensor) -> dict[str, dict[str, Any]]:
    """What the rows depend on; the recommendation is made anew from them."""
    calibration = None if base.calibration is None else base.calibration.sha256
    inputs = {
        "the model": base.hashing.result(),
        "the calibration text": calibration,
        "the evaluation text": sha256_of(windows_ST),
    }
    return {
        "options": options_of(config),
        "inputs": inputs,
        "environment": environment(base.device, base.dtype),
    }


class _Run:
    """One run: what is known of its settings, and where their checkpoints lie."""

    def __init__(
        self,
        base: Job,
        config: SweepConfig,
        windows_ST: Tensor,
        journal: Journal,
        on_progress: OnProgress,
    ) -> None:
        self.base, self.config, self.windows_ST = base, config, windows_ST
        self.journal, self.on_progress = journal, on_progress
        self.checkpoints = journal.directory / "checkpoints"
        self.dense = base.checkpoint.directory

    # -- quality

    def scored(self, on_row: OnRow) -> list[SweepRow]:
        """Every setting, the dense model first; what the journal has is not computed again."""
        known = {
            Variant(found["method"], found["pattern"]): found["rows"]
            for found in self.journal.of_kind("scored")
        }
        rows: list[SweepRow] = []
        for variant in (DENSE_MODEL, *self.config.variants):
            if variant not in known:
                found = self._score(variant)
                record = {"kind": "scored", **asdict(variant), "rows": list(map(asdict, found))}
                self.journal.add(record)
                known[variant] = record["rows"]
            own = [SweepRow.restored(saved) for saved in known[variant]]
            for row in own:
                on_row(row)
            rows += own
        return rows

    def _score(self, variant: Variant) -> list[SweepRow]:
        """Without activation levels, and at each."""
        directory = self._made(variant)
        levels = self._levels(directory)
        models = [directory] if variant == DENSE_MODEL else [self.dense, directory]
        scoring = replace(self.config.scoring, levels=levels)
        found = evaluate_all(
            list(map(str, models)),
            scoring,
            lambda _, done, total: self.on_progress(f"scoring {variant.name}", done, total),
        )
        tasks = self._tasks(variant, directory, levels)
        sparsity, seconds = _pruned(directory)
        return [
            SweepRow(
                method=variant.method,
                pattern=variant.pattern,
                level=level,
                sparsity=sparsity,
                skipped=row.skipped,
                quality=row.quality,
                nbytes=row.nbytes,
                seconds=seconds,
                tasks=tasks.get(level, {}),
            )
            for level, row in zip((DENSE, *levels), found[len(models) - 1 :], strict=True)
        ]

    def _directory(self, variant: Variant) -> Path:
        if variant == DENSE_MODEL and self.config.levels is None:
            return self.dense
        return self.checkpoints / variant.folder.rstrip("-")

    def _made(self, variant: Variant) -> Path:
        """The checkpoint; a whole one has its name, of one that was stopped the rest is made."""
        directory = self._directory(variant)
        if directory.is_dir():
            return directory
        if variant == DENSE_MODEL:
            assert self.config.levels is not None
            sparsify(
                self.dense,
                levels_of(self.config.common, self.config.levels),
                directory,
                lambda now: self.on_progress(f"dense: {now.phase}", now.done, now.total or 0),
            )
        else:
            prune(
                self.dense,
                self.config.variants[variant],
                directory,
                lambda now: self.on_progress(
                    f"{variant.name}: {now.text}", now.done, now.total or 0
                ),
                self.config.levels,
                resume=True,
            )
        return directory

    def _levels(self, directory: Path) -> tuple[str, ...]:
        if self.config.levels is None:
            return ()
        return tuple(LevelTable.from_json(open_stored(directory).form.activation).names[1:])

    def _tasks(
        self, variant: Variant, directory: Path, levels: tuple[str, ...]
    ) -> dict[str, dict[str, tuple[float, float | None]]]:
        """By level, values of lm-eval tasks."""
        if self.config.tasks is None:
            return {}
        from prune_llm_eval.task_values import task_values

        own = self.config.common
        settings = {**self.config.tasks, "device": own.device, "dtype": own.dtype}
        self.on_progress(f"tasks of {variant.name}", 0, 1)
        return task_values(directory, levels, settings)

    # -- speed

    def timed(self, rows: list[SweepRow]) -> tuple[list[SweepRow], str]:
        """With the speeds of every round, and what decoded. Whole rounds stay over a stop."""
        rounds = self.journal.of_kind("round")
        decoding, decoder = self.config.decoding, ""
        with threads_of(decoding.threads):
            for round_ in range(len(rounds), decoding.rounds):
                rounds.append(self._round(rows, round_))
        speeds = zip(*(found["speeds"] for found in rounds), strict=True)
        timed = [replace(row, speeds=own) for row, own in zip(rows, speeds, strict=True)]
        decoder = rounds[-1]["decoder"]
        return timed, decoder

    def _round(self, rows: list[SweepRow], round_: int) -> dict[str, Any]:
        ids = self.windows_ST.flatten()[: self.config.decoding.context].tolist()
        speeds: dict[int, float] = {}
        decoder = ""
        for index in in_turn(range(len(rows)), round_):
            total = self.config.decoding.rounds * len(rows)
            self.on_progress("timing", round_ * len(rows) + len(speeds), total)
            row = rows[index]
            directory = self._made(Variant(row.method, row.pattern))
            speeds[index], decoder = decode_speed(
                directory, row.level, ids, self.config.decoding.tokens
            )
        ordered = [speeds[index] for index in range(len(rows))]
        record = {"kind": "round", "round": round_, "speeds": ordered, "decoder": decoder}
        self.journal.add(record)
        return record

    # -- the result

    def report(self, timed: tuple[list[SweepRow], str]) -> SweepReport:
        """Write everything, and remove the checkpoints that need not stay."""
        rows, decoder = timed
        windows, seq_len = self.windows_ST.shape
        report = SweepReport(
            model=str(self.dense),
            output=str(self.journal.directory),
            config=self.config.to_json(),
            model_sha256=self.base.hashing.result(),
            environment=environment(self.base.device, self.base.dtype),
            calibration=describe(self.base.calibration),
            text={
                "source": self.config.text,
                "windows": windows,
                "seq_len": seq_len,
                "sha256": sha256_of(self.windows_ST),
            },
            rows=rows,
            decoder=decoder,
        )
        kept = self._keep(report)
        report.kept = [str(directory) for directory in kept.values()]
        work = self.journal.directory / "work"
        work.mkdir(exist_ok=True)
        write_report(report, self.journal.directory, work)
        shutil.rmtree(work)
        return report

    def _keep(self, report: SweepReport) -> dict[Variant, Path]:
        """The checkpoints that stay, with their figures in their cards."""
        wanted = {
            "all": [DENSE_MODEL, *self.config.variants],
            "best": [Variant(report.fastest.method, report.fastest.pattern)],
            "none": [],
        }[self.config.keep]
        kept = {v: self._made(v) for v in wanted if self._directory(v) != self.dense}
        for path in self.checkpoints.iterdir() if self.checkpoints.is_dir() else []:
            if path not in kept.values():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for variant, directory in kept.items():
            self._tell_card(report, variant, directory)
        return kept

    def _tell_card(self, report: SweepReport, variant: Variant, directory: Path) -> None:
        own = [row for row in report.rows if (row.method, row.pattern) == _key(variant)]
        told = where(self.base.device, self.config.common.dtype)
        dense = None if variant == DENSE_MODEL else report.dense.quality
        scored = [(row.level, row.quality, row.skipped) for row in own]
        add_measured(directory, {**text_entry(self.config.text, dense, scored), **told})
        decoding = self.config.decoding
        behind = f"{decoding.tokens} tokens behind {decoding.context}, one sequence"
        speeds = [
            {
                "level": row.level,
                "tokens_per_second": row.tokens_per_second,
                "dense": report.dense.tokens_per_second,
            }
            for row in own
        ]
        add_measured(directory, {"kind": "speed", "on": behind, "rows": speeds, **told})
        update_figures(directory)


def _key(variant: Variant) -> tuple[str, str]:
    return variant.method, variant.pattern


def _pruned(directory: Path) -> tuple[float, float]:
    """Sparsity over the pruned linears and seconds it took, as the reports tell; 0 without one."""
    pruning, levels = read_report(directory), read_levels_report(directory)
    linears = pruning.get("linears", [])
    weights = sum(entry["weights"] for entry in linears)
    sparsity = 1 - sum(entry["kept"] for entry in linears) / weights if weights else 0.0
    return sparsity, float((pruning or levels).get("seconds", 0.0))
