"""What one pruning run holds: its inputs, its progress, what has been pruned so far."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from prune_llm import architecture as arch
from prune_llm.blocks import Walk
from prune_llm.calibration import Calibration
from prune_llm.checkpoint import DTYPES, Checkpoint, StoredTensor, open_checkpoint
from prune_llm.config import PruneConfig
from prune_llm.expert_tokens import expert_warnings
from prune_llm.hashing import Hashing
from prune_llm.plan import Plan
from prune_llm.ranks import ALONE, Ranks
from prune_llm.reconstruction import CHECKS, BlockReconstruction, split_samples, training_warnings
from prune_llm.report import LinearResult, PruneReport, environment, peak_memory
from prune_llm.sparse_writer import SparseWriter
from prune_llm.stream_files import Store, Writer
from prune_llm.windows import calibration_warnings, describe, draw_calibration, surveys

# tokens run at once: 512 keep the matrix products of wide models at full speed and the working
# memory small; narrow models need more to outweigh the cost of a call
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS, BATCH_VALUES = 512, 4096, 1 << 20


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
OnNote = Callable[[str], None]


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
    store: Store = field(default_factory=Store)  # of the streams
    packer: Writer = field(default_factory=lambda: Writer(beside=False))  # see `saving`
    scratch: Path | None = None  # where the experts of a block lie; None: in memory
    plan: Plan = field(default_factory=lambda: Plan({}))
    warnings: list[str] = field(default_factory=list)
    done: int = 0
    partly_paired: list[tuple[int, int]] = field(default_factory=list)  # paired, tokens of a site
    ranks: Ranks = ALONE

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        config: PruneConfig,
        device: torch.device,
        on_progress: OnProgress | None,
        calibration: Calibration | None,
        ranks: Ranks = ALONE,
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
        job.ranks = ranks
        job.warnings += calibration_warnings(config, calibration)
        job.warnings += arch.unused_warnings(architecture, checkpoint.tensors)
        return job

    @property
    def solves_together(self) -> bool:
        """Whether experts are solved at once, where the method can: one keeps a GPU busy for a
        fraction. With a dense target a site is measured behind those before it."""
        return self.device.type == "cuda" and self.config.target == "pruned"

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
            store=self.store.beside() if survey else self.store,
            ranks=self.ranks,
            scratch=self.scratch,
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
        samples = len(self.ranks.share(self.calibration.samples_ST))
        extra = {"none": 0, "block": CHECKS, "logits": CHECKS + 1}[self.config.reconstruction]
        walks = 2 if surveys(self.config) else 1
        return blocks * (1 + extra) + walks * (2 * blocks - 1) * -(-samples // self.batch_size)

    def report(self, output: str, seconds: float) -> PruneReport:
        if not self.linears:
            raise ValueError(
                "nothing was pruned: every linear of every block is ignored "
                f"({', '.join(self.config.ignore)}) or tied"
            )
        smaller = sum(result.bytes_before - result.bytes_after for result in self.linears)
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
            bytes_after=self.checkpoint.nbytes - smaller,
            seconds=seconds,
            peak_memory=peak_memory(self.device),
            warnings=self.warnings
            + expert_warnings(self.linears)
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
