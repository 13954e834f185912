"""Every variant of a comparison, a method at a pattern, pruned: together or each by itself.

With shared statistics the dense model is walked once. Each block's statistics serve all variants,
whose pruned weights go to disk block by block, so that memory holds one block and its statistics.
`prune` differs: there a block is calibrated behind the pruned blocks before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Protocol

from prune_llm.block import Block
from prune_llm.checkpoint import read_header
from prune_llm.config import PruneConfig
from prune_llm.footprint import streams_on_disk
from prune_llm.job import Job, Progress
from prune_llm.memory import return_freed_memory
from prune_llm.plan import Plan, make_plan
from prune_llm.prune import prune_into
from prune_llm.prune_block import solve_site
from prune_llm.report import LinearResult, highest, peak_memory, restart_peak_memory
from prune_llm.saving import Saving
from prune_llm.sites import Site
from prune_llm.sparse_writer import SparseWriter
from prune_llm.statistics import InputStatistics, Needs, disable_tf32
from prune_llm.stream_files import Store
from prune_llm.verification import verify
from prune_llm.windows import needs, needs_no_text
from prune_llm_eval.journal import Journal

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Variant:
    """A method at a pattern."""

    method: str
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.pattern}"

    @property
    def folder(self) -> str:
        return f"{self.method}-{self.pattern.replace(':', 'of')}"


@dataclass(frozen=True)
class Pruned:
    """What pruning a variant took.

    Attributes:
        sparsity: achieved over all pruned linears.
        seconds: of solving with shared statistics, of the whole pruning without.
        peak_memory: bytes, meanwhile.
    """

    sparsity: float
    seconds: float
    peak_memory: dict[str, int]
    warnings: tuple[str, ...]


class Pruner(Protocol):
    """Prunes variants, each into a packed checkpoint."""

    def prepare(self) -> None:
        """What is done for all variants together."""

    def write(self, variant: Variant, directory: Path) -> Pruned:
        """The variant's checkpoint, into an empty directory."""


class OwnStatistics:
    """Each variant is pruned as `prune` does it.

    Args:
        base: of the variant that needs most; the windows it drew are those of all.
    """

    def __init__(
        self, base: Job, configs: dict[Variant, PruneConfig], on_progress: OnProgress
    ) -> None:
        self._base, self._configs, self._on_progress = base, configs, on_progress

    def prepare(self) -> None:
        """Nothing is shared but the windows."""

    def write(self, variant: Variant, directory: Path) -> Pruned:
        config = self._configs[variant]

        def tell(progress: Progress) -> None:
            text = f"{variant.name}: {progress.text}"
            self._on_progress(text, progress.done, progress.total or 0)

        calibration = None if needs_no_text(config) else self._base.calibration
        restart_peak_memory(self._base.device)
        model = self._base.checkpoint.directory
        report = prune_into(directory, model, config, tell, calibration)
        return Pruned(report.sparsity, report.seconds, report.peak_memory, tuple(report.warnings))


class SharedStatistics:
    """All variants are solved in one walk over the dense model; ``work`` keeps their weights.

    What the journal says is solved is not solved again: its blocks are only run.
    """

    def __init__(
        self,
        base: Job,
        configs: dict[Variant, PruneConfig],
        on_progress: OnProgress,
        journal: Journal,
        work: Path,
    ) -> None:
        self._base, self._journal, self._work = base, journal, work
        self._on_progress, self._done = on_progress, 0
        base.store = Store(work, streams_on_disk(base))
        self._jobs = {variant: _job(base, config) for variant, config in configs.items()}
        self._peaks: dict[Variant, dict[str, int]] = {variant: {} for variant in configs}
        self._needs = reduce(or_, map(needs, configs.values()), Needs.NOTHING)
        blocks = range(len(base.architecture.blocks))
        self._waiting = {index: list(configs) for index in blocks}
        base.on_progress = lambda progress: self._tick(progress.block, "gathering statistics")
        for record in journal.of_kind("solved"):
            self._note(Variant(record["method"], record["pattern"]), record)
        self._total = self._ticks()

    def prepare(self) -> None:
        """Solve every variant that is not solved yet, block by block."""
        if not any(self._waiting.values()):
            return
        return_freed_memory()
        with disable_tf32():
            started = time.perf_counter()
            restart_peak_memory(self._base.device)
            for block in self._base.walk(survey=True):
                waiting = list(self._waiting[block.index])
                if not waiting:
                    continue
                statistics = block.collect(self._needs)
                self._add("calibrated", block, seconds=time.perf_counter() - started)
                for variant in waiting:
                    self._solve(variant, block, statistics)
                del statistics
                started = time.perf_counter()

    def write(self, variant: Variant, directory: Path) -> Pruned:
        """Pack the blocks' weights, and verify what was written as `prune` does."""
        job, written = self._jobs[variant], set[str]()
        writer = SparseWriter(directory, job.plan.common)
        for part in sorted(self._folder(variant).glob("block-*.part")):
            tensors = {tensor.name: tensor.read() for tensor in read_header(part)}
            writer.add(tensors, [result.tensor for result in job.linears if result.transposed])
            written |= tensors.keys()
        if written != {result.tensor for result in job.linears}:
            raise ValueError(
                f"{self._folder(variant)}: weights that were pruned are lost; give another output"
            )
        writer.finish(job.checkpoint)
        verify(directory, job.checkpoint, job.linears)
        pruned = 1 - sum(r.kept for r in job.linears) / sum(r.weights for r in job.linears)
        seconds = sum(result.seconds for result in job.linears)
        return Pruned(pruned, seconds, self._peaks[variant], tuple(job.warnings))

    def _folder(self, variant: Variant) -> Path:
        return self._work / variant.folder

    def _solve(
        self, variant: Variant, block: Block, statistics: dict[Site, InputStatistics | None]
    ) -> None:
        self._tick(block.index, variant.name)
        job, folder = self._jobs[variant], self._folder(variant)
        linears, warnings = len(job.linears), len(job.warnings)
        restart_peak_memory(job.device)
        folder.mkdir(parents=True, exist_ok=True)
        saving = Saving(job, block, folder)
        for site, own in statistics.items():
            for linear, disk_name, stored in solve_site(job, block, site, own):
                saving.add(disk_name, stored, linear.transposed)
        saving.close()
        found = [asdict(result) for result in job.linears[linears:]]
        told = job.warnings[warnings:]
        del job.linears[linears:], job.warnings[warnings:]
        record = self._add("solved", block, **asdict(variant), linears=found, warnings=told)
        self._note(variant, record)

    def _add(self, kind: str, block: Block, **entries: Any) -> dict[str, Any]:
        peak = peak_memory(self._base.device)
        record = {"kind": kind, "block": block.index, "peak_memory": peak, **entries}
        self._journal.add(record)
        return record

    def _note(self, variant: Variant, record: dict[str, Any]) -> None:
        """A block of a variant that was solved, now or before a stop."""
        job = self._jobs[variant]
        self._waiting[record["block"]].remove(variant)
        job.linears += [LinearResult.restored(found) for found in record["linears"]]
        job.warnings += record["warnings"]
        self._peaks[variant] = highest([self._peaks[variant], record["peak_memory"]])

    def _tick(self, block: int, what: str) -> None:
        self._done += 1
        blocks = len(self._base.architecture.blocks)
        self._on_progress(f"block {block + 1}/{blocks}: {what}", self._done, self._total)

    def _ticks(self) -> int:
        """Batches gathered, batches run to the next block, and variants solved."""
        solving = sum(map(len, self._waiting.values()))
        if self._base.calibration is None:
            return solving
        batches = -(-len(self._base.calibration.samples_ST) // self._base.batch_size)
        gathered = sum(1 for waiting in self._waiting.values() if waiting)
        return solving + batches * (gathered + len(self._waiting) - 1)


def _job(base: Job, config: PruneConfig) -> Job:
    """A run of its own over what ``base`` has opened."""
    own = replace(
        base,
        config=config,
        linears=[],
        reconstruction=[],
        parts={},
        warnings=[],
        partly_paired=[],
        plan=Plan({}),
        on_progress=None,
    )
    own.plan = make_plan(own)
    return own


def check_plan(base: Job, config: PruneConfig | None = None) -> None:
    """Raises ValueError where no linear is left to prune, or an override matches none.

    Args:
        config: of one variant; None: the run's own.
    """
    config = replace(config or base.config, allocation="uniform")
    if not _job(base, config).plan.patterns:
        raise ValueError(
            "nothing to prune: every linear of every block is ignored "
            f"({', '.join(config.ignore)}) or tied"
        )
