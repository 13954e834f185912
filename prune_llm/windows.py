"""Which windows of a text a pruning run may see: those it prunes with, and others beside them.

A target in quality is searched and levels are calibrated on windows that pruning did not see, and
what is reported comes from windows that neither saw.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_llm import architecture as arch
from prune_llm.activation.texts import LEAST_WINDOWS, Texts, cut_texts
from prune_llm.allocation import ALLOCATIONS
from prune_llm.calibration import (
    BUNDLED,
    Calibration,
    Source,
    check_seq_len,
    load_apart,
    load_calibration,
    load_tokenizer,
)
from prune_llm.checkpoint import Checkpoint, open_checkpoint
from prune_llm.methods import METHODS
from prune_llm.statistics import Needs

if TYPE_CHECKING:
    from prune_llm.config import PruneConfig


@dataclass(frozen=True)
class Windows:
    """Windows of one text that share none.

    Attributes:
        pruning: what pruning sees; None where its method needs no text.
        apart: what it does not see, split for thresholds, search and figures.
    """

    pruning: Calibration | None
    apart: Texts

    @property
    def search_ST(self) -> Tensor:
        """Where a target in weights is searched: those for thresholds serve as well."""
        return torch.cat([self.apart.fit_ST, self.apart.search_ST])

    @property
    def report_ST(self) -> Tensor:
        return self.apart.report_ST

    @property
    def apart_sha256(self) -> str:
        """Hash of the windows that pruning does not see."""
        digest = hashlib.sha256()
        for windows_ST in (self.apart.fit_ST, self.apart.search_ST, self.report_ST):
            digest.update(windows_ST.numpy().tobytes())
        return digest.hexdigest()


def needs(config: PruneConfig) -> Needs:
    """What calibration collects: for the method, to aim at the dense model, and to refine.

    An allocation has a pass of its own; the text that it reads then serves both.
    """
    gram = config.target == "dense" or config.refine != "none"
    surveyed = Needs.NORMS if surveys(config) else Needs.NOTHING
    return METHODS[config.method].needs | (Needs.GRAM if gram else Needs.NOTHING) | surveyed


def surveys(config: PruneConfig) -> bool:
    """Whether the allocation runs the dense model over the text, block by block."""
    allocation = ALLOCATIONS[config.allocation]
    return allocation is not None and allocation.needs != Needs.NOTHING


def draw_calibration(
    config: PruneConfig, checkpoint: Checkpoint, architecture: arch.Architecture
) -> Calibration | None:
    """The windows a run prunes with; None where its method needs no text."""
    if needs_no_text(config):
        return None
    source = _source(config, architecture)
    calibration = load_calibration(source, load_tokenizer(checkpoint.directory))
    _check_vocabulary(calibration, checkpoint, architecture)
    return calibration


def draw_windows(
    model: str | os.PathLike[str],
    config: PruneConfig,
    others: int | None = None,
    held_out: str | None = None,
) -> Windows:
    """The windows of a run that prunes, and ``others`` (None: as many again) beside them.

    Args:
        held_out: another text for the reported figures; it must not repeat the calibration text.

    Raises:
        ValueError: too little text, or a held-out text that repeats the calibration text.
    """
    checkpoint = open_checkpoint(model)
    architecture = arch.build(checkpoint.directory, checkpoint.tensors)
    tokenizer = load_tokenizer(checkpoint.directory)
    source = _source(config, architecture)
    if source.seq_len < 2:
        raise ValueError(f"seq_len {source.seq_len}: must be at least 2, one token predicts one")
    others = max(LEAST_WINDOWS, config.samples) if others is None else others
    if needs_no_text(config):
        pruning, rest = None, load_calibration(replace(source, samples=others), tokenizer)
    else:
        pruning, rest = load_apart(source, others, tokenizer)
        _check_vocabulary(pruning, checkpoint, architecture)
    _check_vocabulary(rest, checkpoint, architecture)
    other = None if held_out is None else replace(source, name=held_out, sampling="first")
    return Windows(pruning, cut_texts(rest, other, tokenizer, pruning))


def needs_no_text(config: PruneConfig) -> bool:
    """Whether a run neither needs calibration text nor was given one."""
    without = needs(config) == Needs.NOTHING and config.reconstruction == "none"
    return config.calibration is None and without


def _source(config: PruneConfig, architecture: arch.Architecture) -> Source:
    context = arch.text_width(architecture.model)
    check_seq_len(config.seq_len, context)
    return Source(
        name=config.calibration or BUNDLED,
        separator=config.separator,
        samples=config.samples,
        seq_len=config.seq_len or min(2048, context),
        seed=config.seed,
        sampling=config.sampling,
    )


def _check_vocabulary(
    calibration: Calibration, checkpoint: Checkpoint, architecture: arch.Architecture
) -> None:
    vocabulary = architecture.model.get_input_embeddings().weight.shape[0]
    highest = int(calibration.samples_ST.max())
    if highest >= vocabulary:
        raise ValueError(
            f"{checkpoint.directory}: its tokenizer made token {highest}, its embedding has "
            f"{vocabulary} rows; the tokenizer belongs to another model"
        )


def calibration_warnings(config: PruneConfig, calibration: Calibration | None) -> list[str]:
    """What the user should know about the text."""
    if calibration is None:
        return []
    samples, seq_len = calibration.samples_ST.shape
    if samples >= config.samples:
        return []
    return [
        f"calibration text {calibration.source!r} gives {samples} samples of "
        f"{seq_len} tokens, {config.samples} were asked for"
    ]


def describe(calibration: Calibration | None) -> dict[str, object] | None:
    """The text in the report."""
    if calibration is None:
        return None
    samples, seq_len = calibration.samples_ST.shape
    return {
        "source": calibration.source,
        "documents": calibration.documents,
        "tokens_available": calibration.tokens_available,
        "samples": samples,
        "seq_len": seq_len,
        "sha256": calibration.sha256,
    }
