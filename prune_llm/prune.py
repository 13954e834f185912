"""Prune a checkpoint in one shot, block by block: the loop."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from prune_llm import saving
from prune_llm.activation.sparsify import Progress as LevelProgress
from prune_llm.activation.sparsify import SparsifyConfig, add_levels
from prune_llm.activation.texts import Texts
from prune_llm.calibration import BUNDLED, Calibration
from prune_llm.card_facts import LEVELS_REPORT_FILE
from prune_llm.checkpoint import REPORT_FILE, companions, write_shards
from prune_llm.commits import Commits
from prune_llm.config import PruneConfig, select_device
from prune_llm.job import Job, OnNote, OnProgress, Progress
from prune_llm.journal import Settings
from prune_llm.memory import return_freed_memory
from prune_llm.model_card import write_card
from prune_llm.prune_block import prune_block
from prune_llm.ranks import ALONE, Ranks, joined, launched_count, refuse_launched
from prune_llm.report import PruneReport
from prune_llm.slices import with_parts
from prune_llm.sparse_writer import SparseWriter
from prune_llm.staging import Staging
from prune_llm.statistics import disable_tf32
from prune_llm.verification import verify
from prune_llm.windows import Windows, draw_windows

# the finished directory inside of the one where a run works
CHECKPOINT = "checkpoint"
# of a SparsifyConfig beside a PruneConfig: what both read the same
LEVELS_SHARE = ("calibration", "separator", "seq_len", "seed", "device", "dtype")


def prune(
    model: str | os.PathLike[str],
    config: PruneConfig | None = None,
    output: str | os.PathLike[str] = "pruned",
    on_progress: OnProgress | None = None,
    levels: SparsifyConfig | None = None,
    *,
    resume: bool = False,
    restart: bool = False,
    on_note: OnNote | None = None,
) -> PruneReport:
    """Prune ``model`` (directory or hub name) and write the checkpoint ``output``.

    One decoder block is in memory at a time; for levels, the pruned model. The output appears when
    it is complete and verified. Finished blocks are kept beside it: a run that was stopped, by a
    signal, a crash or a full disk, goes on with ``resume`` and ends with the same bytes. Of a run
    that ends by any other error nothing is left.

    Args:
        config: None: `PruneConfig.of_quality`'s default.
        levels: activation levels to calibrate on the pruned model, on ``levels.samples`` windows of
            the same text that pruning does not see. Its text, seed, device and dtype are those of
            ``config``.
        resume: go on with a stopped run of the same options, model and text, or begin where there
            is none; restart: discard it. One of them is needed where there is one.
        on_note: told in a sentence what the user should know before the work.

    Raises:
        ValueError: a bad option, model, calibration text or output; the message names the fix.
    """
    config = config or PruneConfig.of_quality()
    started = time.perf_counter()
    if launched_count() > 1:
        check_together(config, resume)
        return prune_together(model, config, Path(output), on_progress, levels, restart)
    tell = on_note or (lambda _: None)
    with Staging(Path(output), resume, restart) as staging:
        tell_found(staging, resume, tell)
        directory = staging.directory / CHECKPOINT
        levels = None if levels is None else levels_of(config, levels)
        windows = None
        if levels is not None:
            windows = draw_windows(model, config, levels.samples, levels.held_out)
        own = settings_of(levels, windows)
        with Commits(staging.directory, staging, own, tell, levels is not None) as commits:
            calibration = None if windows is None else windows.pruning
            report = prune_into(directory, model, config, on_progress, calibration, commits)
            if levels is not None and windows is not None:
                add_pruned_levels(directory, levels, windows.apart, report, on_progress)
            seconds = commits.seconds_before + time.perf_counter() - started
            finish(staging, report, seconds, directory)
    return report


def check_together(config: PruneConfig, resume: bool) -> None:
    """Raises ValueError for what several processes do not do."""
    if resume:
        refuse_launched("resume")
    if config.reconstruction != "none":
        refuse_launched(f"reconstruction {config.reconstruction!r}")


def prune_together(
    model: str | os.PathLike[str],
    config: PruneConfig,
    output: Path,
    on_progress: OnProgress | None = None,
    levels: SparsifyConfig | None = None,
    restart: bool = False,
) -> PruneReport:
    """`prune` in each of the processes that a launcher started; they share the samples.

    The first process writes. A run that is stopped begins anew.
    """
    started = time.perf_counter()
    ranks = joined()
    with ExitStack() as stack:
        staging = ranks.done_by_first(lambda: stack.enter_context(Staging(output, restart=restart)))
        own = stack.enter_context(TemporaryDirectory(prefix="prune-llm-"))
        directory = (Path(own) if staging is None else staging.directory) / CHECKPOINT
        windows = None
        if levels is not None:
            levels = levels_of(config, levels)
            windows = draw_windows(model, config, levels.samples, levels.held_out)
        calibration = None if windows is None else windows.pruning
        told = on_progress if ranks.first else None
        report = prune_into(directory, model, config, told, calibration, ranks=ranks)
        if staging is not None:
            if levels is not None and windows is not None:
                add_pruned_levels(directory, levels, windows.apart, report, told)
            finish(staging, report, time.perf_counter() - started, directory)
        return ranks.of_first(report)


def tell_found(staging: Staging, resume: bool, tell: OnNote) -> None:
    """Whether there is something to resume."""
    if staging.found is not None:
        tell(f"going on: {staging.found} done before")
    elif resume:
        tell("nothing to resume: beginning with the first block")


def settings_of(levels: SparsifyConfig | None, windows: Windows | None) -> Settings:
    """What a stopped run must have been begun with, beside the options of pruning."""
    if levels is None or windows is None:
        return {}
    asked = {f"activation_{name}": value for name, value in asdict(levels).items()}
    return {"options": asked, "inputs": {"the text beside it": windows.apart_sha256}}


def finish(staging: Staging, report: PruneReport, seconds: float, directory: Path) -> None:
    """Put the reports beside the weights and give the directory its name."""
    report.output, report.seconds = str(staging.output), seconds
    report.save(directory / REPORT_FILE)
    if report.levels is not None:
        report.levels.output = report.output
        report.levels.save(directory / LEVELS_REPORT_FILE)
    write_card(directory, report.model, report.output)
    staging.publish(directory)


def prune_into(
    directory: Path,
    model: str | os.PathLike[str],
    config: PruneConfig,
    on_progress: OnProgress | None = None,
    calibration: Calibration | None = None,
    commits: Commits | None = None,
    ranks: Ranks = ALONE,
) -> PruneReport:
    """Prune into an empty directory and verify it; the report is not written yet.

    Args:
        calibration: windows that were drawn already.
        commits: what a stopped run has finished, and where this one's blocks are kept; None: the
            run cannot go on when it is stopped.
        ranks: the processes that share the samples; only the first fills the directory.
    """
    started = time.perf_counter()
    device = ranks.device(select_device(config.device))
    return_freed_memory()
    with disable_tf32(), commits or Commits(directory / "work") as commits:
        job = Job.open(model, config, device, on_progress, calibration, ranks)
        commits.begin(job)
        foreseen = commits.foresee(job)
        directory.mkdir(exist_ok=True)
        job.store = commits.store(foreseen.on_disk)
        job.scratch = commits.directory if foreseen.experts else None
        job.packer = commits.packer
        job.packer.beside = device.type in saving.BESIDE
        job.plan = ranks.of_first(commits.plan(job))
        if config.format == "sparse" and ranks.first:
            job.writer = SparseWriter(commits.directory, job.plan.common)
        walk = job.walk()
        commits.restore(job, walk)
        for block in walk:
            part = prune_block(job, block, commits.directory)
            block.pass_on()
            commits.commit(job, walk, block.index, part)
        commits.finish()
        if ranks.first:
            _write(job, directory)
        seconds = commits.seconds_before + time.perf_counter() - started
        report = job.report(output=str(directory), seconds=seconds)
        report.peak_memory = commits.peak_memory(report.peak_memory)
        report.predicted = asdict(foreseen)
        report.environment["fused blocks"] = f"{len(walk.fused)} of {len(walk.architecture.blocks)}"
        if ranks.count > 1:
            report.environment["processes"] = str(ranks.count)
        if ranks.first:
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
        job.writer.finish(job.checkpoint, directory)
        sizes = job.writer.sizes
        job.linears = [replace(r, bytes_after=sizes[r.tensor]) for r in job.linears]
        return
    write_shards(
        directory,
        [with_parts(tensor, job.parts) for tensor in job.checkpoint.tensors.values()],
    )
    for file in companions(job.checkpoint.directory):
        shutil.copyfile(file, directory / file.name)
