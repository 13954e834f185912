"""A loaded model made ready to decode on a GPU: channel order, one launch where linears share an
input, and for every product the way that was measured to be fastest.

Shape letters: B = rows, I = input features, O = output features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from prune_llm.activation.decoding import ModelLevels
from prune_llm.activation.levels import DENSE as DENSE_LEVEL
from prune_llm.channel_linear import ChannelLinear, packed_linears, use_channels
from prune_llm.parts import BlockParts, OtherParts, read_parts
from prune_llm_kernels.channel_weight import ChannelWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prune_llm_kernels.gpu_selection import Call, Choice

Timer = Callable[["Call"], float]
Group = list[ChannelLinear]
_KEPT_FREE = 0.1  # of the device's memory: for activations and what torch holds back


def prepare(
    model: PreTrainedModel,
    rows: Collection[int],
    levels: ModelLevels | None = None,
    spare_bytes: int = 0,
    timer: Timer | None = None,
) -> list[dict[str, Any]]:
    """Convert the packed weights, lay together what shares an input, choose ways by measurement.

    What was chosen for the same rows before is not measured again.

    Args:
        rows: batches that will be decoded.
        levels: of activation sparsity, where some may be chosen.
        spare_bytes: that copies of weights must leave free, beside what is always left.
        timer: seconds of a call; None: by the device's own events.

    Returns:
        The choices, for statistics: a dictionary for each shape and batch.
    """
    use_channels(model, packed_linears(model))
    try:
        groups = _groups(model)
    except OtherParts:
        return []  # it decodes through transformers
    wanted = sorted({n for n in rows if n <= _most_rows()})
    known: dict[Any, list[dict[str, Any]]] = model.__dict__.setdefault("_prune_llm_ways", {})
    form = tuple(wanted), sum(map(len, groups)), levels is not None
    if form not in known:
        for group in groups:
            _lay_together(group)
        known[form] = _choose(groups, wanted, levels, _free_bytes(model) - spare_bytes, timer)
    return known[form]


def _most_rows() -> int:
    from prune_llm_kernels.gpu import MAX_ROWS

    return MAX_ROWS


def _groups(model: PreTrainedModel) -> list[Group]:
    """Linears in channel order, those that share an input together."""
    found = []
    for block in read_parts(model).blocks:
        for names in _sharing(block):
            modules = [model.get_submodule(name) for name in names]
            channels = [module for module in modules if isinstance(module, ChannelLinear)]
            if len(channels) == len(modules):
                found.append(channels)
            else:
                found += [[module] for module in channels]
    return found


def _sharing(block: BlockParts) -> list[list[str]]:
    return [
        [block.query.name, block.key.name, block.value.name],
        [block.output.name],
        [block.gate.name, block.up.name],
        [block.down.name],
    ]


def _lay_together(group: Group) -> None:
    from prune_llm_kernels.gpu_layout import joined, lay_together

    weights = [module.channel_weight for module in group]
    if joined(weights) is None:
        for module, weight in zip(group, lay_together(weights), strict=True):
            module.channel_weight = weight


def _wholes(groups: Sequence[Group]) -> list[tuple[ChannelWeight, Group]]:
    """What is multiplied at once, and the modules it belongs to."""
    from prune_llm_kernels.gpu_layout import joined

    found = []
    for group in groups:
        whole = joined([module.channel_weight for module in group])
        if whole is not None:
            found.append((whole, group))
        else:
            found += [(module.channel_weight, [module]) for module in group]
    return found


def _choose(
    groups: Sequence[Group],
    rows: Sequence[int],
    levels: ModelLevels | None,
    free_bytes: int,
    timer: Timer | None,
) -> list[dict[str, Any]]:
    """Measure the first weight of every shape, and make the copies that the ways need."""
    from prune_llm_kernels import gpu_selection as selection

    wholes, gated = _wholes(groups), levels is not None
    kinds: dict[Any, ChannelWeight] = {}
    for weight, _ in wholes:
        kinds.setdefault(_kind(weight), weight)
    report: list[Choice] = []
    chosen: dict[Any, dict[int, Choice]] = {}
    share = selection.SECONDS / max(1, len(kinds))
    for kind, weight in kinds.items():
        found = selection.calibrate(
            _cases(weight, rows, levels),
            lambda _, weight=weight: selection.sparse_way(weight, gated),  # type: ignore[misc]
            timer,
            share,
        )
        chosen[kind] = {key[2]: choice for key, choice in found.items()}
    for kind, choices in chosen.items():
        weights = [(weight, group) for weight, group in wholes if _kind(weight) == kind]
        sparse = selection.sparse_way(weights[0][0], gated)
        ways = {n: choice.way for n, choice in choices.items()}
        need = sum(_copy_bytes(weight, ways) for weight, _ in weights)
        if need > free_bytes:
            choices = {n: _kept(choice, sparse) for n, choice in choices.items()}
        else:
            free_bytes -= need
        _give_ways(weights, {n: choice.way for n, choice in choices.items()})
        report += choices.values()
    return [choice.report() for choice in report]


def _kept(choice: Choice, sparse: str) -> Choice:
    from prune_llm_kernels.gpu_selection import without_copy
    from prune_llm_kernels.gpu_ways import COPIED

    return without_copy(choice, sparse) if choice.way in COPIED else choice


def _kind(weight: ChannelWeight) -> tuple[Any, ...]:
    return weight.out_features, weight.in_features, weight.starts is None, weight.fixed_count


def _cases(
    weight: ChannelWeight, rows: Sequence[int], levels: ModelLevels | None
) -> dict[tuple[int, int, int], Callable[[], Mapping[str, Call]]]:
    from prune_llm_kernels import gpu_selection as selection

    copies = selection.copies_of(weight)
    I, share = weight.in_features, 0.0 if levels is None else _least_sparsity(levels)

    def calls(count: int) -> Mapping[str, Call]:
        generator = torch.Generator().manual_seed(count)
        x_BI = torch.randn(count, I, generator=generator).to(weight.data)
        thresholds_B = None
        if levels is not None:
            thresholds_B = x_BI.abs().float().quantile(share, dim=1)
        return selection.ways(x_BI, weight, copies, thresholds_B)

    return {
        (weight.out_features, I, count): lambda count=count: calls(count)  # type: ignore[misc]
        for count in rows
    }


def _least_sparsity(levels: ModelLevels) -> float:
    """Of the level that skips least: what is faster there is faster at every other that skips."""
    found = [level.sparsity for level in levels.table.levels if level.name != DENSE_LEVEL]
    return min(found, default=0.0)


def _copy_bytes(weight: ChannelWeight, ways: Mapping[int, str]) -> int:
    """Of the copies that ways need; a weight that is not packed is its own."""
    from prune_llm_kernels.gpu_ways import COPIED

    if weight.starts is None:
        return 0
    needed = COPIED & set(ways.values())
    return len(needed) * weight.out_features * weight.in_features * weight.dtype.itemsize


def _give_ways(weights: Sequence[tuple[ChannelWeight, Group]], ways: Mapping[int, str]) -> None:
    from prune_llm_kernels import gpu_selection as selection
    from prune_llm_kernels.gpu_ways import COPIED, DENSE, SEMI_STRUCTURED, Ways

    for weight, group in weights:
        copies = Ways(weight.out_features, None, None, ways)
        if COPIED & set(ways.values()):
            made = selection.copies_of(weight)
            copies = replace(
                copies,
                dense_IO=made.dense_IO if DENSE in ways.values() else None,
                semi_OI=made.semi_OI if SEMI_STRUCTURED in ways.values() else None,
            )
        for module in group:
            module.channel_weight = replace(module.channel_weight, ways=copies)


def _free_bytes(model: PreTrainedModel) -> int:
    """For copies of weights; without bound where no GPU is asked."""
    if model.device.type != "cuda":
        return sys.maxsize
    free, total = torch.cuda.mem_get_info(model.device)
    return int(free - _KEPT_FREE * total)
