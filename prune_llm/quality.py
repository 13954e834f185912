"""What a target in quality is measured by: the perplexity of a checkpoint, dense or pruned.

Windows are token ids int64 [S, T]; every window is a sequence of its own and predicts T - 1 tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from prune_llm.activation.measure import BATCH_TOKENS, LOGITS, Tick
from prune_llm.architecture import RUN_DTYPES
from prune_llm_kernels.wide_products import WideProducts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_to_measure(directory: Path, device: str, dtype: str) -> PreTrainedModel:
    """A checkpoint of either form, whole; ``device`` and ``dtype`` as in `PruneConfig`."""
    from transformers.utils import logging

    from prune_llm.config import select_device
    from prune_llm.integration import load

    logging.disable_progress_bar()
    model = load(directory, dtype=None if dtype == "auto" else RUN_DTYPES[dtype])
    model.requires_grad_(False)
    return model.to(select_device(device)).eval()


@torch.inference_mode()
def mean_nll(model: PreTrainedModel, windows_ST: Tensor, tick: Tick = lambda: None) -> float:
    """Mean negative log likelihood of a predicted token in nats, float64 sums.

    Args:
        tick: told after every batch.
    """
    total = 0.0
    for ids_BT in batches(model, windows_ST):
        ids_BT = ids_BT.to(model.device)
        with WideProducts():
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        nll_N = functional.cross_entropy(
            logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
        )
        total += float(nll_N.sum(dtype=torch.float64))
        tick()
    return total / (windows_ST.shape[0] * (windows_ST.shape[1] - 1))


def batches(model: PreTrainedModel, windows_ST: Tensor) -> tuple[Tensor, ...]:
    """Windows that run at once."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    seq_len = windows_ST.shape[1]
    fit = min(BATCH_TOKENS // seq_len, LOGITS // (seq_len * vocabulary))
    found: tuple[Tensor, ...] = windows_ST.split(max(1, fit))
    return found


def ppl_increase(nll: float, dense_nll: float) -> float:
    """As a fraction: 0.01 is 1 %; a broken model's stays a number that JSON knows."""
    difference = nll - dense_nll
    return math.expm1(min(difference, 100.0)) if not math.isnan(difference) else math.expm1(100.0)


def check_max_ppl_increase(name: str, target: float) -> None:
    """Raise ValueError for a target in quality that makes no sense."""
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"{name} {target}: must be above 0, such as 1%")
