"""Inputs of random layers, and what calibration collects of them."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_llm.statistics import InputStatistics, Needs

CPU = torch.device("cpu")


def correlated_inputs(width: int, seed: int = 0) -> Tensor:
    """Inputs [T, I] whose features are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * 0.3 + torch.eye(width)
    scale = torch.rand(width, generator=generator) * 2 + 0.05
    return (torch.randn(3 * width + 40, width, generator=generator) @ mix) * scale


def collect(x_TI: Tensor, needs: Needs = Needs.GRAM | Needs.MEANS) -> InputStatistics:
    statistics = InputStatistics(x_TI.shape[1], CPU, needs)
    for part in x_TI.split(50):
        statistics.update(part, sample=10)
    statistics.finish()
    return statistics
