"""Greedy sparsities inside each block (algorithm 1 of TEAL, 2408.14690).

Every block has the overall sparsity. Inside, it is raised in equal steps of the block's weights,
each given to the site whose gating then costs the block's output least, measured on the dense
model's inputs of the block. The steps are in weights, so a site with few of them takes a larger
step in sparsity; equal errors go to the site that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_llm.activation.curve import HIGHEST, Curve, Task, units
from prune_llm.activation.gates import Gates
from prune_llm.architecture import _decoder_blocks
from prune_llm.streams import Call, split_call

# share of a block's weights that one step gates, and the tokens its error is measured on
STEP = 0.005
ERROR_TOKENS = 1024
# how far beyond the largest target the curve goes: what is searched on it may lie above
MARGIN = 0.05


def greedy(task: Task) -> Curve:
    """A curve with an anchor at every step, of all blocks together."""
    steps = math.ceil((max(task.targets) + MARGIN) / STEP)
    sites = task.gated.sites
    shares = [[0.0] * len(sites) for _ in range(steps)]
    for block in _captured(task):
        for step, row in enumerate(_rows(task, block, steps)):
            for index, share in row.items():
                shares[step][index] = share
    points = [(task.gated.mean(row), row) for row in shares]
    return Curve.through(len(sites), _ascending(points))


def _ascending(
    points: list[tuple[float, list[float]]],
) -> list[tuple[float, list[float]]]:
    """Without the last rows of blocks that could take no further step."""
    kept: list[tuple[float, list[float]]] = []
    for overall, row in points:
        if overall > (kept[-1][0] if kept else 0.0) + STEP / 10:
            kept.append((overall, row))
    return kept


@dataclass(frozen=True, eq=False)
class _Block:
    """A block, how it is called on the dense level, and what it answers."""

    index: int
    module: nn.Module
    hidden_BTD: Tensor
    call: Call
    output_BTD: Tensor

    def error(self, task: Task, sites: Sequence[int], shares: dict[int, float]) -> float:
        """Error of the output with these sparsities: the L2 norm over all tokens, summed over the
        channels, so that the few large channels of the residual stream do not decide alone."""
        chosen = [task.gated.sites[index] for index in sites]
        scales = [task.gated.scales[index] for index in sites]
        everywhere = [shares.get(index, 0.0) for index in range(len(task.gated.sites))]
        thresholds = task.quantiles.thresholds(everywhere)
        gates = Gates(chosen, scales, [thresholds[i] for i in sites], task.gated.first_dense)
        with gates:
            answer = _hidden(self.call.run(self.module, self.hidden_BTD))
        difference_ND = (answer - self.output_BTD).double().flatten(0, -2)
        return float(difference_ND.square().sum(dim=0).sqrt().sum())


def _hidden(answer: Any) -> Tensor:
    hidden: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return hidden


@torch.no_grad()
def _captured(task: Task) -> list[_Block]:
    """Every block with its input in one dense pass over the first windows."""
    model = task.gated.model
    found: list[_Block] = []
    windows = max(1, ERROR_TOKENS // task.windows_ST.shape[1])
    _, blocks = _decoder_blocks(model)

    def catch(module: nn.Module, args: Any, kwargs: Any, answer: Any) -> None:
        hidden_BTD, call = split_call(args, kwargs)
        found.append(_Block(len(found), module, hidden_BTD, call, _hidden(answer)))

    handles = [block.register_forward_hook(catch, with_kwargs=True) for block in blocks]
    try:
        ids_BT = task.windows_ST[:windows].to(model.device)
        model.base_model(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _rows(task: Task, block: _Block, steps: int) -> list[dict[int, float]]:
    """Sparsities of the block's sites after 1 .. steps steps."""
    mine = [unit for unit in units(task.gated) if task.gated.sites[unit[0]].block == block.index]
    indices = [index for unit in mine for index in unit]
    weights = [sum(task.gated.sites[index].weights for index in unit) for unit in mine]
    shares = dict.fromkeys(indices, 0.0)
    rows = []
    for _ in range(steps):
        raised = []
        for unit, weight in zip(mine, weights, strict=True):
            share = shares[unit[0]] + STEP * sum(weights) / weight
            if share <= HIGHEST:
                raised.append(shares | dict.fromkeys(unit, share))
        if raised:
            errors = [block.error(task, indices, candidate) for candidate in raised]
            shares = raised[errors.index(min(errors))]
        rows.append(shares)
        task.gated.tick()
    return rows
