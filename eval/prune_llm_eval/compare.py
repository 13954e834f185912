"""Put models beside each other on one text: perplexity, KL to the dense one, zeros, bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_llm.activation.gates import FirstDense, Gates, channel_scales
from prune_llm.activation.levels import read_table
from prune_llm.activation.sites import table_sites
from prune_llm.architecture import RUN_DTYPES, block_linears
from prune_llm.calibration import (
    BUNDLED,
    check_seq_len,
    cut_windows,
    load_tokenizer,
    read_documents,
    tokenize,
)
from prune_llm.config import select_device
from prune_llm.demo import stories
from prune_llm.experts import DOWN, GATE_UP, UP, is_fused
from prune_llm.sparse_checkpoint import SparseCheckpoint, open_stored
from prune_llm.sparse_experts import SparseExperts, packed_weights
from prune_llm.vocabulary import Vocabulary
from prune_llm_eval.forgetting import Forgotten, forgotten
from prune_llm_eval.perplexity import Quality, TokenScores, quality, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnProgress = Callable[[str, int, int], None]
BUNDLED_STORIES = 400
# all-sparse: every token after the first of a window is sparse and scored. first-half-dense: the
# first half of a window is dense and not scored, as the papers on activation sparsity do it; they
# read dense what a deployed model has read sparse, so their figures are better.
PROTOCOLS: dict[str, FirstDense] = {"all-sparse": 1, "first-half-dense": "half"}


@dataclass(frozen=True)
class EvalConfig:
    """What to score on and how.

    Attributes:
        windows: only the first so many; None scores the whole text.
        levels: of the last model, a row each; "dense" needs none.
        protocol: how levels are scored: one of PROTOCOLS.
        passages: how many of the worst to report of a model that is compared.
    """

    text: str = BUNDLED
    separator: str | None = None
    seq_len: int | None = None
    windows: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    levels: tuple[str, ...] = ()
    protocol: str = "all-sparse"
    passages: int = 5

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            choices = ", ".join(PROTOCOLS)
            raise ValueError(f"protocol {self.protocol!r}: unknown; choose one of {choices}")
        if self.dtype not in ("auto", *RUN_DTYPES):
            choices = ", ".join(("auto", *RUN_DTYPES))
            raise ValueError(f"dtype {self.dtype!r}: unknown; choose one of {choices}")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len {self.seq_len}: must be at least 2, one token predicts one")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"windows {self.windows}: must be at least 1")
        if self.passages < 0:
            raise ValueError(f"passages {self.passages}: must be at least 0, which shows none")


@dataclass(frozen=True)
class ModelQuality:
    """One row: ``zeros`` is the share of exact zeros in the linears of the decoder blocks;
    ``nbytes`` is the size of the checkpoint's tensors on disk; ``skipped`` the share of inputs that
    a level skipped, weighted by the weights they meet, and ``site_sparsity`` the same by site, None
    and empty for the dense level; ``forgotten`` where it differs from the first model, None for the
    first."""

    name: str
    quality: Quality
    zeros: float
    nbytes: int
    skipped: float | None = None
    site_sparsity: dict[str, float] = field(default_factory=dict)
    forgotten: Forgotten | None = None


def evaluate(
    model: str, against: str | None, config: EvalConfig, on_progress: OnProgress
) -> list[ModelQuality]:
    """Score ``model`` and, where given, the dense model ``against``; the dense row comes first.

    Raises:
        ValueError: a model or text that cannot be read, or tokenizers that differ.
    """
    return evaluate_all([model] if against is None else [against, model], config, on_progress)


def evaluate_all(
    models: list[str], config: EvalConfig, on_progress: OnProgress
) -> list[ModelQuality]:
    """Score several models on one text, the last at the dense level and at ``config.levels``.

    The first of several rows is the dense one.
    """
    checkpoints = [open_stored(model) for model in models]
    windows_ST = text_windows(checkpoints[0], config)
    for model, checkpoint in zip(models[1:], checkpoints[1:], strict=True):
        if not torch.equal(text_windows(checkpoint, config), windows_ST):
            raise ValueError(
                f"{models[0]!r} and {model!r} cut the text into different tokens; "
                "compare models that share a tokenizer"
            )
    device = select_device(config.device)
    loaded = [_load(checkpoint, config.dtype, device) for checkpoint in checkpoints]
    gates = _gates(loaded[-1], models[-1], config)
    context = windows_ST.shape[1] // 2 if config.protocol == "first-half-dense" else 1
    scores = score_tokens(
        [*loaded, *[loaded[-1]] * len(gates)],
        windows_ST,
        against_first=len(models) + len(gates) > 1,
        on_window=lambda done, total: on_progress("scoring", done, total),
        gates=[*[nullcontext()] * len(models), *gates],
        context=context,
    )
    qualities = [quality(own, windows_ST.shape[1]) for own in scores]
    rows = [
        ModelQuality(name, own, zeros_share(net), checkpoint.nbytes)
        for name, own, net, checkpoint in zip(
            models, qualities[: len(models)], loaded, checkpoints, strict=True
        )
    ]
    levels = zip(config.levels, qualities[len(models) :], gates, strict=True)
    rows += [_level_row(rows[-1], *level) for level in levels]
    vocabulary = Vocabulary(load_tokenizer(checkpoints[0].directory))
    return _with_forgotten(rows, scores, windows_ST, vocabulary, config.passages)


def _with_forgotten(
    rows: list[ModelQuality],
    scores: list[TokenScores],
    windows_ST: Tensor,
    vocabulary: Vocabulary,
    passages: int,
) -> list[ModelQuality]:
    """All but the first, which they are compared with."""
    return rows[:1] + [
        replace(row, forgotten=forgotten(scores[0], own, windows_ST, vocabulary, passages))
        for row, own in zip(rows[1:], scores[1:], strict=True)
    ]


def _gates(model: PreTrainedModel, name: str, config: EvalConfig) -> list[Gates]:
    """One for each level. ValueError, listing those there are, for one that does not exist."""
    if not config.levels:
        return []
    table = read_table(model)
    if table is None:
        raise ValueError(
            f"level {config.levels[0]!r}: {name!r} has no activation levels; "
            "prune-llm sparsify makes them"
        )
    sites, scales = table_sites(model, table), channel_scales(model, table)
    first_dense = PROTOCOLS[config.protocol]
    return [
        Gates(sites, scales, table.level(level).thresholds, first_dense) for level in config.levels
    ]


def _level_row(dense: ModelQuality, level: str, quality: Quality, gates: Gates) -> ModelQuality:
    names = [site.name for site in gates.sites]
    return replace(
        dense,
        name=f"level {level}",
        quality=quality,
        skipped=gates.sparsity,
        site_sparsity=dict(zip(names, gates.site_sparsity, strict=True)),
    )


def text_windows(checkpoint: SparseCheckpoint, config: EvalConfig) -> Tensor:
    """Token ids int64 [S, T] that a model of this checkpoint is scored on.

    Raises:
        ValueError: a text that cannot be read or is too short, or a window beyond the context.
    """
    context = checkpoint.config.get("max_position_embeddings")
    if isinstance(context, int):
        check_seq_len(config.seq_len, context)
    seq_len = config.seq_len or min(2048, context if isinstance(context, int) else 2048)
    tokenizer = load_tokenizer(checkpoint.directory)
    ids, _ = tokenize(_documents(config), tokenizer)
    return cut_windows(ids, seq_len, config.text)[: config.windows]


def _documents(config: EvalConfig) -> list[str]:
    if config.text == BUNDLED and not Path(BUNDLED).is_file():
        return stories("held_out", BUNDLED_STORIES)
    return read_documents(config.text, config.separator)


def _load(checkpoint: SparseCheckpoint, dtype: str, device: torch.device) -> PreTrainedModel:
    from transformers.utils import logging

    from prune_llm.integration import load

    logging.disable_progress_bar()
    model = load(checkpoint.directory, dtype=None if dtype == "auto" else RUN_DTYPES[dtype])
    return model.to(device).eval()


def zeros_share(model: PreTrainedModel) -> float:
    """Share of exact zeros in the linears of the decoder blocks, as the model holds them."""
    weights = [linear.weight for linear in block_linears(model)]
    experts = [m for m in model.modules() if isinstance(m, SparseExperts) or is_fused(m)]
    weights += [p for m in experts for n, p in m.named_parameters() if n in (GATE_UP, UP, DOWN)]
    packed = packed_weights(model).values()
    total = sum(weight.numel() for weight in weights)
    total += sum(weight.in_features * weight.out_features for weight in packed)
    stored = [*weights, *(weight.packed for weight in packed)]
    nonzero = sum(int(torch.count_nonzero(weight)) for weight in stored)
    return 1 - nonzero / total if total else 0.0
