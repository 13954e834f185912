"""Prune a checkpoint in one shot, block by block: the loop."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from prune_llm.activation.sparsify import REPORT_FILE as LEVELS_REPORT_FILE
from prune_llm.activation.sparsify import Progress as LevelProgress
from prune_llm.activation.sparsify import SparsifyConfig, add_levels
from prune_llm.activation.texts import Texts
from prune_llm.calibration import BUNDLED, Calibration
from prune_llm.checkpoint import REPORT_FILE, Staging, companions, write_shards
from prune_llm.config import PruneConfig, select_device
from prune_llm.job import Job, OnProgress, Progress
from prune_llm.memory import return_freed_memory
from prune_llm.plan import make_plan
from prune_llm.prune_block import prune_block
from prune_llm.report import PruneReport
from prune_llm.sparse_checkpoint import SparseWriter
from prune_llm.statistics import disable_tf32
from prune_llm.verification import verify
from prune_llm.windows import draw_windows

# of a SparsifyConfig beside a PruneConfig: what both read the same
LEVELS_SHARE = ("calibration", "separator", "seq_len", "seed", "device", "dtype")


def prune(
    model: str | os.PathLike[str],
    config: PruneConfig | None = None,
    output: str | os.PathLike[str] = "pruned",
    on_progress: OnProgress | None = None,
    levels: SparsifyConfig | None = None,
) -> PruneReport:
    """Prune ``model`` (directory or hub name) and write the checkpoint ``output``.

    One decoder block is in memory at a time; for levels, the pruned model. The output appears when
    it is complete and verified; on any error nothing is left behind.

    Args:
        config: None: `PruneConfig.of_quality`'s default.
        levels: activation levels to calibrate on the pruned model, on ``levels.samples`` windows of
            the same text that pruning does not see. Its text, seed, device and dtype are those of
            ``config``.

    Raises:
        ValueError: a bad option, model, calibration text or output; the message names the fix.
    """
    config = config or PruneConfig.of_quality()
    started = time.perf_counter()
    with Staging(Path(output)) as staging:
        if levels is None:
            report = prune_into(staging.directory, model, config, on_progress)
        else:
            levels = levels_of(config, levels)
            windows = draw_windows(model, config, levels.samples, levels.held_out)
            report = prune_into(staging.directory, model, config, on_progress, windows.pruning)
            add_pruned_levels(staging.directory, levels, windows.apart, report, on_progress)
        finish(staging, report, time.perf_counter() - started)
    return report


def finish(
    staging: Staging, report: PruneReport, seconds: float, finished: Path | None = None
) -> None:
    """Put the reports beside the weights and give the directory its name."""
    directory = finished or staging.directory
    report.output, report.seconds = str(staging.output), seconds
    report.save(directory / REPORT_FILE)
    if report.levels is not None:
        report.levels.output = report.output
        report.levels.save(directory / LEVELS_REPORT_FILE)
    staging.publish(finished)


def prune_into(
    directory: Path,
    model: str | os.PathLike[str],
    config: PruneConfig,
    on_progress: OnProgress | None = None,
    calibration: Calibration | None = None,
) -> PruneReport:
    """Prune into an empty directory and verify it; the report is not written yet.

    Args:
        calibration: windows that were drawn already.
    """
    started = time.perf_counter()
    device = select_device(config.device)
    return_freed_memory()
    with disable_tf32():
        job = Job.open(model, config, device, on_progress, calibration)
        job.plan = make_plan(job)
        if config.format == "sparse":
            job.writer = SparseWriter(directory, job.plan.common)
        walk = job.walk()
        for block in walk:
            prune_block(job, block, directory)
        _write(job, directory)
        report = job.report(output=str(directory), seconds=time.perf_counter() - started)
        report.environment["fused blocks"] = f"{len(walk.fused)} of {len(walk.architecture.blocks)}"
        report.verification = verify(directory, job.checkpoint, report.linears)
    return report


def levels_of(config: PruneConfig, levels: SparsifyConfig) -> SparsifyConfig:
    """The levels' configuration with the pruning's text, seed, device and dtype.

    Raises:
        ValueError: it asks for others, or the form pruned to holds no levels.
    """
    if config.format != "sparse":
        raise ValueError(
            f"format {config.format!r}: activation levels need the sparse form; give --format "
            "sparse, or leave the levels out"
        )
    shared = {name: getattr(config, name) for name in LEVELS_SHARE}
    shared["calibration"] = config.calibration or BUNDLED
    for entry in fields(SparsifyConfig):
        asked = getattr(levels, entry.name)
        if entry.name in shared and asked not in (entry.default, shared[entry.name]):
            raise ValueError(
                f"levels.{entry.name} {asked!r}: levels use the pruning's, which is "
                f"{shared[entry.name]!r}; give it there"
            )
    return replace(levels, **shared)


def add_pruned_levels(
    directory: Path,
    levels: SparsifyConfig,
    texts: Texts,
    report: PruneReport,
    on_progress: OnProgress | None,
) -> None:
    """Calibrate levels on a model that was just pruned; they go into its directory and report."""
    return_freed_memory()
    told = None if on_progress is None else partial(_tell_phase, on_progress)
    report.levels = add_levels(directory, levels, told, texts)
    report.levels.model = report.model


def _tell_phase(on_progress: OnProgress, progress: LevelProgress) -> None:
    on_progress(Progress(progress.done, progress.total, 0, 0, progress.phase))


def _write(job: Job, directory: Path) -> None:
    """Collect pruned and untouched tensors into shards, and copy what travels with them."""
    if job.writer is not None:
        job.writer.finish(job.checkpoint)
        return
    write_shards(
        directory,
        [job.parts.get(name, tensor) for name, tensor in job.checkpoint.tensors.items()],
    )
    for part in directory.glob("block-*.part"):
        part.unlink()
    for file in companions(job.checkpoint.directory):
        shutil.copyfile(file, directory / file.name)
