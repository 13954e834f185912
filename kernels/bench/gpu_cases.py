"""What the GPU benchmark and its prediction multiply: shapes, masks, inputs, bytes that are read.

A case is a weight sparsity and a share of skipped inputs: W50A50; A50 has a dense weight, W50 skips
nothing. Masks are random, or Wanda's: |W| times the norm of the input, where norms of channels are
log-normal. The inputs are drawn with the same norms, so that the channels that count are those that
kept more of their weights.

Shape letters: B = rows, O = output features, I = input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout, reference

# what predict_gpu.py writes: .md, and .json that a measured page is held against
PREDICTED = Path(__file__).parents[2] / "eval" / "reports" / "gpu_decode_predicted_2026-11-29"
RANDOM, WANDA = "random", "wanda"
MASKS = (RANDOM, WANDA)
SIGMA = 0.5  # of the logarithm of a channel's norm under Wanda
PIECE = 64  # bytes that memory hands over at least
START = 4  # bytes of a segment's start


@dataclass(frozen=True)
class Sizes:
    """Of a model of Llama's parts."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    layers: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[O, I] of the linears of a block, those that share an input as one."""
        wide = (self.heads + 2 * self.kv_heads) * self.head_size
        return {
            "qkv": (wide, self.hidden),
            "o": (self.hidden, self.heads * self.head_size),
            "gate+up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def cache_bytes(self, context: int, itemsize: int) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * context * itemsize


LLAMA_8B = Sizes(4096, 14336, 32, 8, 128, 128256, 32)


def title(case: str, masks: str) -> str:
    """As pages name a case."""
    return f"{case}, Wanda masks" if masks == WANDA else case


def channel_norms(I: int, masks: str, device: str = "cpu") -> Tensor:
    """Norms of the inputs' channels, float32 [I]."""
    if masks == RANDOM:
        return torch.ones(I, device=device)
    return (SIGMA * torch.randn(I, device=device)).exp()


def random_weight(O: int, pruned: float, norms_I: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, I]; where norms are equal pruned at random, else by Wanda's scores, row by row."""
    I = len(norms_I)
    weight_OI = torch.randn(O, I, device=norms_I.device) / I**0.5
    if not pruned:
        return weight_OI.to(dtype)
    if bool((norms_I == 1).all()):
        keep_OI = torch.rand(O, I, device=norms_I.device) >= pruned
    else:
        scores_OI = weight_OI.abs() * norms_I
        drop = min(max(round(pruned * I), 1), I - 1)
        keep_OI = scores_OI > scores_OI.kthvalue(drop, 1, keepdim=True).values
    return torch.where(keep_OI, weight_OI, 0).to(dtype)


def random_inputs(rows: int, norms_I: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, I]"""
    return (torch.randn(rows, len(norms_I), device=norms_I.device) * norms_I).to(dtype)


def limits(x_BI: Tensor, skipped: float) -> Tensor:
    """Thresholds that skip a share of each row's inputs, float32 [B]."""
    if not skipped:
        return torch.full((len(x_BI),), -1.0, device=x_BI.device)
    return x_BI.float().abs().quantile(skipped, 1)


def form(weight_OI: Tensor, pruned: float) -> ChannelWeight:
    """Packed, or dense in channel-major order."""
    O, I = weight_OI.shape
    if pruned:
        return gpu_layout.pack_channels(reference.pack(weight_OI), gpu.choose_tile(O))
    return ChannelWeight(weight_OI.T.contiguous(), None, O, I, gpu.DENSE_BLOCK)


def read_bytes(weight: ChannelWeight, active_I: Tensor) -> int:
    """Of the segments or columns of the active channels."""
    if weight.starts is None:
        return int(active_I.sum()) * weight.out_features * weight.data.element_size()
    units = weight.starts.diff().reshape(weight.tiles, -1)[:, active_I]
    return int(units.sum()) * gpu_layout.UNIT


def moved_bytes(weight: ChannelWeight, active_I: Tensor) -> int:
    """What memory hands over for the active channels: whole pieces, their starts among them."""
    if weight.starts is None:
        column = -(-weight.out_features * weight.data.element_size() // PIECE) * PIECE
        return int(active_I.sum()) * column
    active = active_I.repeat(weight.tiles).to(weight.starts.device)
    starts = weight.starts.to(torch.int64) * gpu_layout.UNIT
    spans = _pieces(starts[:-1][active], starts[1:][active])
    places = active.nonzero()[:, 0] * START
    return (spans + _pieces(places, places + 2 * START)) * PIECE


def _pieces(starts: Tensor, ends: Tensor) -> int:
    """How many pieces ascending spans of bytes touch; spans may share one."""
    some = ends > starts
    first, last = starts[some] // PIECE, (ends[some] - 1) // PIECE
    if not len(first):
        return 0
    reached = torch.cat([first.new_full((1,), -1), last.cummax(0).values[:-1]])
    return int((last - torch.maximum(first, reached + 1) + 1).clamp(min=0).sum())


@dataclass(frozen=True)
class Target:
    """What is asked of an H200 in bfloat16: times faster than cuBLAS in the same graph.

    Attributes:
        kernel: of every linear of 8B's blocks; wide: of gate+up, where it is another.
        step: of a decode step at batch 1; None: not asked.
    """

    name: str
    case: str
    rows: tuple[int, ...]
    kernel: float
    wide: float
    step: float | None

    def of(self, shape: str) -> float:
        return self.wide if shape == "gate+up" else self.kernel


TARGETS = (
    Target("activations 50 %", "A50", (1,), 1.65, 1.65, 1.55),
    Target("weights 50 %", "W50", (1,), 1.4, 1.5, 1.4),
    Target("weights 70 %", "W70", (1,), 1.9, 1.9, 1.6),
    Target("both 50 %", "W50A50", (1,), 2.5, 2.5, 2.1),
    Target("weights 50 %, batch 2 to 8", "W50", (2, 4, 8), 1.35, 1.35, None),
)
