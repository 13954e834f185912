"""The linears of a GPU's plan: weights that lie together in one launch, results where they belong.

An operation is called with the rows of a run and launches, without the host waiting for anything:
a list of channels where inputs are skipped and no epilogue has made it, the products, and one
kernel that adds the splits and writes, adds to or gates what was there.

Shape letters: B = rows, I = input features, O = output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import gpu, gpu_layout, gpu_step, reference
from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.gpu_ways import COPIED, DENSE, PACKED, Ways
from prune_llm_kernels.packed_weight import PackedWeight
from prune_llm_kernels.plan import AnyWeight, Gate


@dataclass(frozen=True)
class Part:
    """One of the linears: weight, bias [O] or None, and where its result goes, [B, O]."""

    weight: ChannelWeight | Tensor
    bias: Tensor | None
    out_BO: Tensor


@dataclass
class Input:
    """What one operation reads, and the list of its channels where an epilogue has made one.

    Attributes:
        counted: what the gate lets through is in its counts already, for this run.
    """

    x_BI: Tensor
    gate: Gate | None
    listed: gpu.ChannelList | None = None
    counted: bool = False

    def channels(self, rows: int) -> gpu.ChannelList:
        """Of the first rows."""
        if self.listed is None:
            gate = self.gate_of(rows)
            assert gate is not None
            x_BI = self.x_BI[:rows]
            self.listed = gpu.list_channels(x_BI, gate.thresholds_B, gate.scales_I, gate.counts)
        return self.listed

    def masked(self, rows: int) -> Tensor:
        """The first rows with zeros where inputs do not count: for products that read them all."""
        gate, x_BI = self.gate_of(rows), self.x_BI[:rows]
        if gate is None:
            return x_BI
        counted_BI = reference.counting(x_BI, gate.thresholds_B, gate.scales_I)
        if gate.counts is not None:
            live, read = (gate.thresholds_B < torch.inf).sum(), counted_BI.any(0).sum()
            gate.counts.add_(torch.stack([read, counted_BI.sum(), live]))
        return torch.where(counted_BI, x_BI, 0)

    def gate_of(self, rows: int) -> Gate | None:
        """The gate of the first rows; with its counts for the first that asks."""
        if self.gate is None:
            return None
        counts = None if self.counted else self.gate.counts
        self.counted = True
        return Gate(self.gate.thresholds_B[:rows], self.gate.scales_I, counts)

    def used(self) -> None:
        """The next run reads other inputs."""
        self.listed, self.counted = None, False


@dataclass
class Linears:
    """out = x W^T + bias of weights that share x, or out + that."""

    x: Input
    parts: Sequence[Part]
    accumulate: bool
    groups: list[tuple[ChannelWeight | Tensor, Sequence[Part]]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = list(_groups(self.parts))

    def __call__(self, rows: int) -> None:
        x_BI = channels = None
        for weight, parts in self.groups:
            if _sparse(weight, self.x.gate, rows):
                assert isinstance(weight, ChannelWeight)
                if _listed(weight, self.x.gate, rows):
                    channels = channels or self.x.channels(rows)
                    sums_SBO = gpu.product_sums(self.x.x_BI[:rows], channels, weight)
                else:
                    x_BI = self.x.masked(rows) if x_BI is None else x_BI
                    sums_SBO = gpu.product_sums(x_BI, None, weight)
                outs = [part.out_BO[:rows] for part in parts]
                gpu.finish_linears(sums_SBO, [part.bias for part in parts], outs, self.accumulate)
            else:
                x_BI = self.x.masked(rows) if x_BI is None else x_BI
                self._dense(x_BI, weight, parts)
        self.x.used()

    def _dense(self, x_BI: Tensor, weight: ChannelWeight | Tensor, parts: Sequence[Part]) -> None:
        y_BO = dense_product(x_BI, weight)
        widths = [part.out_BO.shape[1] for part in parts]
        for part, one_BO in zip(parts, y_BO.split(widths, 1), strict=True):
            out_BO = part.out_BO[: len(x_BI)]
            result = one_BO if part.bias is None else one_BO + part.bias
            out_BO.copy_(out_BO + result if self.accumulate else result)


@dataclass
class SwiGLU:
    """out = silu(x W1^T + bias1) * (x W2^T + bias2), and the list of what reads it.

    ``linears`` has the two weights; where they cannot be multiplied together it runs as it is.
    """

    linears: Linears
    out_BO: Tensor
    following: Input | None = None

    def __call__(self, rows: int) -> None:
        x, (gate_part, up_part) = self.linears.x, self.linears.parts
        weight = self.linears.groups[0][0]
        if len(self.linears.groups) > 1 or not _sparse(weight, x.gate, rows):
            self.linears(rows)
            gate_BO, up_BO = (part.out_BO[:rows] for part in (gate_part, up_part))
            gpu_step.silu_mul(gate_BO, up_BO, self.out_BO[:rows])
            return
        assert isinstance(weight, ChannelWeight)
        if _listed(weight, x.gate, rows):
            sums_SBO = gpu.product_sums(x.x_BI[:rows], x.channels(rows), weight)
        else:
            sums_SBO = gpu.product_sums(x.masked(rows), None, weight)
        x.used()
        gate = None if self.following is None else self.following.gate_of(rows)
        found = gpu.finish_swiglu(sums_SBO, self._biases(), self.out_BO[:rows], gate)
        if self.following is not None:
            self.following.listed = found

    def _biases(self) -> tuple[Tensor, Tensor] | None:
        one, other = (part.bias for part in self.linears.parts)
        if one is None and other is None:
            return None
        none = self.out_BO.new_zeros(self.out_BO.shape[1])
        return none if one is None else one, none if other is None else other


def parts(
    weights: Sequence[AnyWeight], biases: Sequence[Tensor | None], outs_BO: Sequence[Tensor]
) -> list[Part]:
    """Raises ValueError for a weight that is packed in rows."""
    found = []
    for weight, bias, out_BO in zip(weights, biases, outs_BO, strict=True):
        if isinstance(weight, PackedWeight):
            raise ValueError("a packed weight is in rows; a GPU decodes to_channels(weight)")
        found.append(Part(weight, bias, out_BO))
    return found


def dense_product(x_BI: Tensor, weight: ChannelWeight | Tensor) -> Tensor:
    """x W^T by torch's product, [B, O]; of a packed weight, unpacked for it or of its copy."""
    if isinstance(weight, Tensor):
        return F.linear(x_BI, weight)
    if (ways := _ways(weight)) is not None:
        way = ways.way(len(x_BI))
        if way in COPIED:
            return ways.product(way, x_BI)
        if ways.dense_IO is not None:
            return ways.product(DENSE, x_BI)
    if weight.starts is None:
        return F.linear(x_BI, weight.data[:, : weight.out_features].T)
    return F.linear(x_BI, gpu.dense_columns(weight)[:, : weight.out_features].T)


def _groups(
    parts: Sequence[Part],
) -> list[tuple[ChannelWeight | Tensor, Sequence[Part]]]:
    """All parts as one weight where they lie together in memory, else each by itself."""
    weights = [part.weight for part in parts if isinstance(part.weight, ChannelWeight)]
    if 1 < len(parts) == len(weights) <= gpu.MAX_SIDE:
        together = gpu_layout.joined(weights)
        if together is not None:
            return [(together, parts)]
    return [(part.weight, [part]) for part in parts]


def _sparse(weight: ChannelWeight | Tensor, gate: Gate | None, rows: int) -> bool:
    """Whether our kernels multiply so many rows, and torch does not."""
    if isinstance(weight, Tensor) or rows > gpu.MAX_ROWS:
        return False
    ways = _ways(weight)
    if ways is not None and ways.way(rows) in COPIED:
        return False
    return weight.starts is not None or gate is not None


def _listed(weight: ChannelWeight, gate: Gate | None, rows: int) -> bool:
    """Whether channels that do not count are left out, and not multiplied as zeros."""
    ways = _ways(weight)
    return gate is not None and (ways is None or ways.way(rows) != PACKED)


def _ways(weight: ChannelWeight) -> Ways | None:
    """What was measured for the very product: of one weight, or of those that lie together."""
    ways = weight.ways
    return ways if ways is not None and ways.out_features == weight.out_features else None
