"""Prune a checkpoint in one shot, block by block: the configuration, the loop."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prune_llm import architecture as arch
from prune_llm.activation.sparsify import Progress as LevelProgress
from prune_llm.activation.sparsify import SparsifyConfig, add_levels
from prune_llm.activation.texts import Texts
from prune_llm.allocation import ALLOCATIONS
from prune_llm.blocks import Walk
from prune_llm.calibration import BUNDLED, Calibration, Sampling
from prune_llm.card_facts import LEVELS_REPORT_FILE
from prune_llm.checkpoint import (
    DTYPES,
    REPORT_FILE,
    Checkpoint,
    Hashing,
    Staging,
    StoredTensor,
    companions,
    open_checkpoint,
    write_shards,
)
from prune_llm.masks import Pattern
from prune_llm.memory import return_freed_memory
from prune_llm.methods import METHODS
from prune_llm.model_card import write_card
from prune_llm.plan import Plan, check_allocation, make_plan
from prune_llm.presets import DEFAULT as DEFAULT_QUALITY
from prune_llm.presets import preset
from prune_llm.prune_block import prune_block
from prune_llm.reconstruction import CHECKS, BlockReconstruction, split_samples, training_warnings
from prune_llm.refinement import REFINEMENTS
from prune_llm.report import LinearResult, PruneReport, environment, peak_memory
from prune_llm.sparse_checkpoint import SparseWriter
from prune_llm.statistics import disable_tf32
from prune_llm.verification import verify
from prune_llm.windows import (
    calibration_warnings,
    describe,
    draw_calibration,
    draw_windows,
    surveys,
)

FORMATS = ("dense", "sparse")
TARGETS = ("pruned", "dense")
GOALS = ("none", "block", "logits")
# of a SparsifyConfig beside a PruneConfig: what both read the same
LEVELS_SHARE = ("calibration", "separator", "seq_len", "seed", "device", "dtype")
# tokens run at once: 512 keep the matrix products of wide models at full speed and the working
# memory small; narrow models need more to outweigh the cost of a call
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS, BATCH_VALUES = 512, 4096, 1 << 20
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class PruneConfig:
    """Everything that decides the result; saved with it.

    Attributes:
        method: a key of ``METHODS``.
        pattern: "0.5" (sparsity of every linear) or "2:4" (2 kept of every 4 inputs).
        calibration: text or JSONL file, "bundled" stories, or a `datasets` name
            NAME[:CONFIG[:SPLIT]]. None: bundled where the method needs data, else no data at all.
        separator: line between the documents of a text file; None: one document.
        samples: calibration windows; seq_len: tokens in each (None: the model's context, at most
            2048); sampling: "random" windows by ``seed``, or the "first" ones.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        dtype: what blocks run in while calibrating: "auto" (as stored), "float32", "bfloat16",
            "float16". The dtype on disk never changes.
        damping: fraction of the mean diagonal added to the Gram matrix (SparseGPT, dense target).
        column_block: columns SparseGPT updates together.
        target: what a linear's output should stay: "pruned", that of its dense weights on the
            pruned model's inputs, or "dense", that of the dense model (see `dense_target`). The
            dense model's activations are then kept beside the pruned one's, and a block's dense
            weights beside its pruned ones; the method prunes weights re-solved for the target.
        reconstruction: what the kept weights of a block are trained towards once its linears are
            solved (see `reconstruction`): "none", the dense "block"'s output, or the dense model's
            predictions ("logits").
        reconstruction_steps: at most so many for each block (None: 400, or as many as the minutes
            allow); reconstruction_minutes: of training in the whole run, the same for each block.
        reconstruction_rate: highest step of a weight, as a share of its matrix's root mean square;
            None: by the model's width, see `reconstruction.default_rate`.
        refine: what is done to a method's result on the Gram matrix (see `refinement`): "none",
            "swaps" in its mask, "backsolve" of its weights, or "both".
        allocation: how the linears share the sparsity: "uniform", or a key of ``ALLOCATIONS``.
        overrides: "NAMES=PATTERN": linears (shell patterns as in ``ignore``) with a sparsity or N:M
            of their own; ``pattern`` and ``allocation`` are for the others. The last match counts.
        batch_size: samples run at once; None: as many as hold 512 tokens (more if narrow).
        ignore: shell patterns over linear names ("model.layers.0.*", "mlp.down_proj") left dense.
        format: how weights are stored: "dense" (plain zeros) or "sparse" (packed; export converts).
    """

    method: str = "sparsegpt"
    pattern: str = "0.5"
    calibration: str | None = None
    separator: str | None = None
    samples: int = 128
    seq_len: int | None = None
    sampling: Sampling = "random"
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    damping: float = 0.01
    column_block: int = 128
    target: str = "pruned"
    reconstruction: str = "none"
    reconstruction_steps: int | None = None
    reconstruction_minutes: float | None = None
    reconstruction_rate: float | None = None
    refine: str = "none"
    allocation: str = "uniform"
    overrides: tuple[str, ...] = ()
    batch_size: int | None = None
    ignore: tuple[str, ...] = ()
    format: str = "sparse"

    def __post_init__(self) -> None:
        _check_choice("method", self.method, tuple(METHODS))
        _check_choice("format", self.format, FORMATS)
        _check_choice("target", self.target, TARGETS)
        _check_choice("reconstruction", self.reconstruction, GOALS)
        self._check_reconstruction()
        _check_choice("allocation", self.allocation, tuple(ALLOCATIONS))
        _check_choice("refine", self.refine, REFINEMENTS)
        _check_choice("dtype", self.dtype, ("auto", *arch.RUN_DTYPES))
        _check_choice("sampling", self.sampling, ("random", "first"))
        _check_choice("device", self.device.partition(":")[0], DEVICES)
        if Pattern.parse(self.pattern).sparsity == 0:
            raise ValueError(f"pattern {self.pattern!r}: prunes nothing; give a sparsity above 0")
        check_allocation(self)
        for name in ("samples", "seq_len", "column_block", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if not (math.isfinite(self.damping) and 0 <= self.damping <= 10):
            raise ValueError(f"damping {self.damping}: must be in [0, 10]; 0.01 is usual")

    @classmethod
    def of_quality(cls, quality: str = DEFAULT_QUALITY, **options: Any) -> PruneConfig:
        """A preset (see `presets`) with other fields, or with some of its own replaced.

        Raises:
            ValueError: there is no such preset, or a bad option.
        """
        pattern = Pattern.parse(options.get("pattern", cls.pattern))
        return cls(**{**preset(quality, pattern), **options})

    def _check_reconstruction(self) -> None:
        for name in ("reconstruction_steps", "reconstruction_minutes", "reconstruction_rate"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} {value}: must be above 0")
            if self.reconstruction == "none":
                raise ValueError(
                    f"{name} {value}: nothing is reconstructed; give --reconstruction as well, "
                    f"{' or '.join(GOALS[1:])}"
                )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r}: unknown; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` batches; ``block`` (from 0) of ``blocks`` and what is done to it.

    Attributes:
        blocks: 0 where the phase is none of a block's; total may be None then: it is not known.
        step: of a run that prunes several times: "try 2: 42 %".
    """

    done: int
    total: int | None
    block: int
    blocks: int
    phase: str
    step: str = ""

    @property
    def text(self) -> str:
        """For a progress bar."""
        block = f"block {self.block + 1}/{self.blocks} " if self.blocks else ""
        return f"{self.step}{', ' if self.step else ''}{block}{self.phase}"


OnProgress = Callable[[Progress], None]


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
    write_card(directory, report.model, report.output)
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


def select_device(name: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:1"; ValueError where it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (torch.device(name).index or 0) >= count:
            raise ValueError(
                f"device {name!r}: this machine has {count} CUDA devices that torch can use; "
                "give --device cpu"
            )
    return torch.device(name)


@dataclass
class Job:
    """What one run holds: its inputs, and what has been pruned so far."""

    config: PruneConfig
    checkpoint: Checkpoint
    architecture: arch.Architecture
    calibration: Calibration | None
    device: torch.device
    dtype: torch.dtype
    on_progress: OnProgress | None
    hashing: Hashing
    linears: list[LinearResult] = field(default_factory=list)
    reconstruction: list[BlockReconstruction] = field(default_factory=list)
    parts: dict[str, StoredTensor] = field(default_factory=dict)
    writer: SparseWriter | None = None
    plan: Plan = field(default_factory=lambda: Plan({}))
    warnings: list[str] = field(default_factory=list)
    done: int = 0
    partly_paired: list[tuple[int, int]] = field(default_factory=list)  # paired, tokens of a site

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        config: PruneConfig,
        device: torch.device,
        on_progress: OnProgress | None,
        calibration: Calibration | None,
    ) -> Job:
        checkpoint = open_checkpoint(model)
        architecture = arch.build(checkpoint.directory, checkpoint.tensors)
        stored = [DTYPES[tensor.dtype] for tensor in checkpoint.tensors.values()]
        dtype = arch.run_dtype(config.dtype, stored)
        _check_ignore(architecture, config.ignore)
        if calibration is None:
            calibration = draw_calibration(config, checkpoint, architecture)
        if config.reconstruction != "none":
            assert calibration is not None, "reconstruction without calibration samples"
            split_samples(len(calibration.samples_ST))  # refuses too few before any work
        # beside the pruning: to read and hash the model takes as long as a block or two
        hashing = Hashing(checkpoint)
        job = cls(
            config, checkpoint, architecture, calibration, device, dtype, on_progress, hashing
        )
        job.warnings += calibration_warnings(config, calibration)
        return job

    def walk(self, survey: bool = False) -> Walk:
        """Over the blocks as they are pruned; for a survey, over the dense model."""
        samples_ST = self.calibration.samples_ST if self.calibration is not None else None
        return Walk(
            self.architecture,
            self.checkpoint,
            samples_ST,
            lambda linears: arch.select(linears, self.config.ignore),
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            tick=self.tick,
            dense_target=self.config.target == "dense" and not survey,
            goal="none" if survey else self.config.reconstruction,
        )

    @property
    def width(self) -> int:
        """Features of the hidden states."""
        return int(self.architecture.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def batch_size(self) -> int:
        """Samples run at once: as asked, or enough for the matrix products to be efficient."""
        if self.config.batch_size is not None or self.calibration is None:
            return self.config.batch_size or 1
        tokens = max(MIN_BATCH_TOKENS, min(MAX_BATCH_TOKENS, BATCH_VALUES // self.width))
        return max(1, tokens // self.calibration.samples_ST.shape[1])

    def tick(self, block: int, phase: str) -> None:
        self.done += 1
        if self.on_progress is not None:
            blocks = len(self.architecture.blocks)
            self.on_progress(Progress(self.done, self._ticks(), block, blocks, phase))

    def _ticks(self) -> int:
        """Batches run over the whole job: calibrate and propagate each block, but not the last.

        Beside them the checks of the reconstruction, blocks of the dense model, and the dense model
        once more where an allocation looks at it.
        """
        blocks = len(self.architecture.blocks)
        if self.calibration is None:
            return blocks
        samples = len(self.calibration.samples_ST)
        extra = {"none": 0, "block": CHECKS, "logits": CHECKS + 1}[self.config.reconstruction]
        walks = 2 if surveys(self.config) else 1
        return blocks * (1 + extra) + walks * (2 * blocks - 1) * -(-samples // self.batch_size)

    def report(self, output: str, seconds: float) -> PruneReport:
        if not self.linears:
            raise ValueError(
                "nothing was pruned: every linear of every block is ignored "
                f"({', '.join(self.config.ignore)}) or tied"
            )
        pruned = {result.tensor for result in self.linears}
        return PruneReport(
            model=str(self.checkpoint.directory),
            output=output,
            config=asdict(self.config),
            model_sha256=self.hashing.result(),
            calibration=describe(self.calibration),
            environment=environment(self.device, self.dtype),
            linears=self.linears,
            reconstruction=self.reconstruction,
            allocation=self.plan.record,
            bytes_before=self.checkpoint.nbytes,
            bytes_after=sum(result.bytes_after for result in self.linears)
            + sum(t.nbytes for n, t in self.checkpoint.tensors.items() if n not in pruned),
            seconds=seconds,
            peak_memory=peak_memory(self.device),
            warnings=self.warnings
            + _pairing_warnings(self.partly_paired)
            + training_warnings(self.reconstruction),
        )


def _pairing_warnings(sites: list[tuple[int, int]]) -> list[str]:
    if not sites:
        return []
    share = sum(paired for paired, _ in sites) / sum(tokens for _, tokens in sites)
    return [
        f"dense target: {len(sites)} sites of experts share {share:.1%} of their tokens with the "
        "dense model; the other tokens keep the pruned target"
    ]


def _check_ignore(architecture: arch.Architecture, ignore: tuple[str, ...]) -> None:
    linears = [
        linear
        for index in range(len(architecture.blocks))
        for linear in architecture.linears(index)
    ]
    for pattern in ignore:
        if not any(arch.matches(linear, pattern) for linear in linears):
            raise ValueError(
                f"ignore {pattern!r}: matches no linear; their names look like "
                f"{linears[0].name if linears else '(none)'}"
            )


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
