"""The texts of a `sparsify` run, cut apart: what thresholds, search and report each may see."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm.calibration import Calibration, Source, load_calibration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of the calibration windows: thresholds, then search; the rest is held out
FIT_SHARE, SEARCH_SHARE = 0.5, 0.25
LEAST_WINDOWS = 4
# two texts overlap where more than this share of one's runs of so many tokens are in the other;
# single runs occur in both where texts share a licence or a phrase
RUN, OVERLAP = 32, 0.05


@dataclass(frozen=True)
class Texts:
    """Windows of token ids int64 [S, T], disjoint.

    Attributes:
        fit_ST: thresholds and allocations are made on them.
        search_ST: overall sparsities are found on them.
        held_out_ST: of the same text; neither saw them.
        other_ST: of the text given as held-out; None without one.
        source: where the calibration windows come from, with their hash, for the checkpoint.
    """

    fit_ST: Tensor
    search_ST: Tensor
    held_out_ST: Tensor
    other_ST: Tensor | None
    source: dict[str, Any]

    @property
    def report_ST(self) -> Tensor:
        """What a level's figures are measured on."""
        return self.held_out_ST if self.other_ST is None else self.other_ST


def read_texts(
    calibration: Source, held_out: Source | None, tokenizer: PreTrainedTokenizerBase
) -> Texts:
    """Read, tokenise, cut into windows and split them.

    Raises:
        ValueError: too little text, or a held-out text that repeats the calibration text.
    """
    return cut_texts(load_calibration(calibration, tokenizer), held_out, tokenizer)


def cut_texts(
    found: Calibration,
    held_out: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    pruning: Calibration | None = None,
) -> Texts:
    """Split windows that were read.

    Args:
        pruning: the windows of the text that pruning saw; a held-out text may not repeat them.

    Raises:
        ValueError: as `read_texts`.
    """
    count, seq_len = found.samples_ST.shape
    if count < LEAST_WINDOWS:
        beside = "" if pruning is None else " beside those for pruning"
        raise ValueError(
            f"text {found.source!r}: gives {count} windows of {seq_len} tokens{beside} and "
            f"{LEAST_WINDOWS} are needed; give more text, more --samples or a smaller --seq-len"
        )
    fit, search = int(count * FIT_SHARE), max(1, int(count * SEARCH_SHARE))
    fit_ST, search_ST, held_out_ST = found.samples_ST.tensor_split([fit, fit + search])
    other_ST = None
    if held_out is not None:
        other_ST = load_calibration(held_out, tokenizer).samples_ST
        seen = [found.samples_ST] if pruning is None else [pruning.samples_ST, found.samples_ST]
        _refuse_overlap(torch.cat(seen), other_ST, held_out.name)
    source = {
        "source": found.source,
        "sha256": found.sha256,
        "seq_len": seq_len,
        "windows": {"fit": fit, "search": search, "held_out": len(held_out_ST)},
    }
    if held_out is not None and other_ST is not None:
        digest = hashlib.sha256(other_ST.numpy().tobytes()).hexdigest()
        source["held_out"] = {"source": held_out.name, "sha256": digest, "windows": len(other_ST)}
    return Texts(fit_ST, search_ST, held_out_ST, other_ST, source)


def _refuse_overlap(calibration_ST: Tensor, other_ST: Tensor, name: str) -> None:
    share = overlap(calibration_ST, other_ST)
    if share > OVERLAP:
        raise ValueError(
            f"held_out {name!r}: {share:.0%} of it is in the calibration text, so it would not "
            "tell what the levels cost on new text; give another text"
        )


def overlap(calibration_ST: Tensor, other_ST: Tensor) -> float:
    """Share of the other text's runs of RUN tokens that occur anywhere in the calibration text."""
    run = min(RUN, calibration_ST.shape[1], other_ST.shape[1])
    starts = range(0, other_ST.shape[1] - run + 1, run)
    runs = {row[k : k + run].numpy().tobytes() for row in other_ST for k in starts}
    common: set[bytes] = set()
    for row in calibration_ST.numpy():
        found = (row[k : k + run].tobytes() for k in range(len(row) - run + 1))
        common.update(piece for piece in found if piece in runs)
    return len(common) / len(runs)
