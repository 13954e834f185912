"""The sites of a loaded model: the linears of its decoder blocks by what has one threshold.

That is the input that linears share, or every linear by itself: then q, k and v read one input and
each skips its own part of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prune_llm.activation.levels import ActivationSite, LevelTable
from prune_llm.architecture import Linear, _decoder_blocks, _linears, matches
from prune_llm.channel_linear import ChannelLinear
from prune_llm.experts import is_fused
from prune_llm.sites import _complete, _observe
from prune_llm.sparse_experts import SparseExperts
from prune_llm.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRANULARITIES = ("site", "linear")
# enough for every expert of a block to be reached, or for another of its kind to be
PROBE_TOKENS = 64


@dataclass(frozen=True, eq=False)
class ModelSite:
    """A site and its modules in a loaded model.

    Attributes:
        block: index of its decoder block.
        weights: of its linears, counted dense: what the site weighs in an overall sparsity.
    """

    site: ActivationSite
    block: int
    linears: tuple[Linear, ...]
    weights: int

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(linear.module for linear in self.linears)


def find_sites(
    model: PreTrainedModel, ignore: tuple[str, ...] = (), granularity: str = "site"
) -> list[ModelSite]:
    """Sites of all decoder blocks, in the order in which the model reads them.

    Found by running the model, dense or packed, once on a few tokens. Linears that match one of
    the shell patterns in ``ignore`` are left out: their inputs stay dense.

    Args:
        granularity: "site": the linears that share an input are one; "linear": each is one.

    Raises:
        ValueError: an unknown granularity; a linear that reads nothing, or more than one input;
            there is no linear; or there are experts in one tensor, which are not ignored.
    """
    if granularity not in GRANULARITIES:
        known = ", ".join(GRANULARITIES)
        raise ValueError(f"granularity {granularity!r}: unknown; choose one of {known}")
    _refuse_fused_experts(model, ignore)
    by_block = _linears_by_block(model)
    kept = [
        (index, linear)
        for index, linears in enumerate(by_block)
        for linear in linears
        if not any(matches(linear, pattern) for pattern in ignore)
    ]
    if not kept:
        raise ValueError(
            f"{type(model).__name__}: has no linears whose inputs could be skipped "
            f"(ignored: {', '.join(ignore) or 'none'})"
        )
    # one run of the whole model: linears are told apart by their full names
    named = [Linear(x.name, x.name, x.module, x.transposed) for _, x in kept]
    names = tuple(linear.name for linear in named)
    grouped = _complete(_observe(named, lambda: _probe(model)), names)
    _check_reads(grouped, names)
    by_name = {linear.name: (index, linear) for index, linear in kept}
    if granularity == "linear":
        grouped = [(name,) for group in grouped for name in group]
    return [_site([by_name[name] for name in group]) for group in grouped]


def _refuse_fused_experts(model: PreTrainedModel, ignore: tuple[str, ...]) -> None:
    blocks_name, blocks = _decoder_blocks(model)
    for path, module in blocks.named_modules():
        if not isinstance(module, SparseExperts) and not is_fused(module):
            continue
        experts = Linear(f"{blocks_name}.{path}", path.partition(".")[2], module, False)
        if not any(matches(experts, pattern) for pattern in ignore):
            raise ValueError(
                f"{experts.name}: experts in one tensor have no thresholds of their own; leave "
                f"their inputs dense with --ignore {experts.kind}"
            )


def table_sites(model: PreTrainedModel, table: LevelTable) -> list[ModelSite]:
    """The sites of the table that belongs to a loaded model (`levels.read_table` checks that)."""
    by_name = {
        linear.name: (index, linear)
        for index, linears in enumerate(_linears_by_block(model))
        for linear in linears
    }
    found = []
    for site in table.sites:
        missing = [name for name in site.linears if name not in by_name]
        if missing:
            raise ValueError(
                f"activation thresholds in config.json: site {site.name!r} is for {missing[0]}, "
                "which is no linear of a decoder block; they belong to another model"
            )
        found.append(_site([by_name[name] for name in site.linears]))
    return found


def weight_OI(linear: Linear) -> Tensor:
    """The dense weight [O, I] in the module's dtype; a packed one is unpacked."""
    return linear.to_OI(linear.weight.detach())


def _linears_by_block(model: PreTrainedModel) -> list[list[Linear]]:
    """As `architecture.block_linears`, with the packed ones, in module order."""
    blocks_name, blocks = _decoder_blocks(model)
    found = []
    for index, block in enumerate(blocks):
        name = f"{blocks_name}.{index}"
        dense = {linear.kind: linear for linear in _linears(block, name)}
        linears = []
        for kind, module in block.named_modules():
            if isinstance(module, SparseLinear | ChannelLinear):
                linears.append(Linear(f"{name}.{kind}", kind, module, module.transposed))
            elif kind in dense:
                linears.append(dense[kind])
        found.append(linears)
    return found


@torch.no_grad()  # not inference_mode: its tensors have no version to tell them apart
def _probe(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    width = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    ids_1T = torch.arange(width, device=model.device)[None] % config.vocab_size
    model(input_ids=ids_1T, use_cache=False)


def _check_reads(grouped: list[tuple[str, ...]], names: tuple[str, ...]) -> None:
    reads = Counter(name for group in grouped for name in group)
    for name in names:
        if reads[name] != 1:
            how = "several different inputs" if reads[name] else "no input"
            raise ValueError(
                f"{name}: reads {how} when the model runs, so there is no threshold for it; "
                f"leave it dense with --ignore {name}"
            )


def _site(members: list[tuple[int, Linear]]) -> ModelSite:
    index, first = members[0]
    linears = tuple(linear for _, linear in members)
    prefix = first.name.removesuffix(first.kind)
    name = prefix + ",".join(linear.kind for linear in linears)
    sizes = [_size(linear) for linear in linears]
    site = ActivationSite(name, tuple(linear.name for linear in linears), sizes[0][1])
    return ModelSite(site, index, linears, sum(rows * width for rows, width in sizes))


def _size(linear: Linear) -> tuple[int, int]:
    """O and I, without unpacking anything."""
    if isinstance(linear.module, SparseLinear | ChannelLinear):
        return linear.module.out_features, linear.module.in_features
    rows, width = linear.to_OI(linear.weight).shape
    return rows, width
