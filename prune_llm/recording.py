"""The plan of one step of a model of Llama's parts, and the buffers it runs through.

Shape letters: B = rows, one token each; N = pages of a sequence, D = hidden size, I = inputs of a
linear, H = query heads, K = key-value heads, T = positions, R = rotated part of a head,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_llm.activation.decoding import PlanGates
from prune_llm.parts import BlockParts, LinearPart, ModelParts, NormPart
from prune_llm_kernels import ChannelWeight
from prune_llm_kernels.kv_cache import KeyValueCache
from prune_llm_kernels.plan import AttentionStep, Plan, new_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Recording:
    """Records the blocks. Before each run fill x_BD with embeddings; it then holds what they made.

    Args:
        pages_BN, positions_B: int64, read at every run: the cache pages of each row's sequence, and
            the position of its token; -1 leaves the row out. See `AttentionStep`.
        gates: of the plan's rows, for weights in channel-major order; None: nothing is skipped.
    """

    def __init__(
        self,
        parts: ModelParts,
        caches: Sequence[KeyValueCache],
        pages_BN: Tensor,
        positions_B: Tensor,
        angles: tuple[Tensor, Tensor],
        gates: PlanGates | None = None,
    ) -> None:
        self._rows = len(positions_B)
        self._dtype, self._device = parts.dtype, parts.device
        self._positions_B, self._pages_BN = positions_B, pages_BN
        self.gates = gates
        self.plan: Plan = new_plan(parts.device.type, parts.dtype)
        width = parts.embedding_VD.shape[1]
        self.x_BD = self._buffer(width)
        self._normed_BD = self._buffer(width)
        first = parts.blocks[0]
        self._q_BI, self._out_BI = (self._buffer(first.query.out_features) for _ in range(2))
        self._k_BI, self._v_BI = (self._buffer(first.key.out_features) for _ in range(2))
        self._gate_BI, self._up_BI = (self._buffer(first.gate.out_features) for _ in range(2))
        for block, cache in zip(parts.blocks, caches, strict=True):
            self._attention(block, cache, angles)
            self._mlp(block)

    def _buffer(self, width: int) -> Tensor:
        return torch.zeros(self._rows, width, dtype=self._dtype, device=self._device)

    def _attention(
        self, block: BlockParts, cache: KeyValueCache, angles: tuple[Tensor, Tensor]
    ) -> None:
        size = block.head_size
        self._norm(block.input_norm, self.x_BD, self._normed_BD)
        q, k, v = self._q_BI, self._k_BI, self._v_BI
        self._linears(self._normed_BD, [block.query, block.key, block.value], [q, k, v])
        q_BHD, k_BKD, v_BKD, out_BHD = (
            tensor.view(self._rows, -1, size) for tensor in (q, k, v, self._out_BI)
        )
        if block.query_norm is not None:
            self._norm(block.query_norm, q_BHD, q_BHD)
        if block.key_norm is not None:
            self._norm(block.key_norm, k_BKD, k_BKD)
        step = AttentionStep(
            q_BHD,
            k_BKD,
            v_BKD,
            out_BHD,
            *angles,
            cache,
            self._pages_BN,
            self._positions_B,
            block.scale,
            block.window,
        )
        self.plan.attention(step)
        self._linears(self._out_BI, [block.output], [self.x_BD], accumulate=True)

    def _mlp(self, block: BlockParts) -> None:
        self._norm(block.mlp_norm, self.x_BD, self._normed_BD)
        gate, up = self._gate_BI, self._up_BI
        if not self._swiglu(block, gate):
            self._linears(self._normed_BD, [block.gate, block.up], [gate, up])
            self.plan.silu_mul(gate, up, gate)
        self._linears(gate, [block.down], [self.x_BD], accumulate=True)

    def _norm(self, norm: NormPart, x: Tensor, out: Tensor) -> None:
        self.plan.rms_norm(x, norm.weight, norm.eps, out)

    def _swiglu(self, block: BlockParts, out_BI: Tensor) -> bool:
        """Gate, up and SiLU in one pass, where both weights are channel-major; whether they are."""
        gate_weight, up_weight = block.gate.weight, block.up.weight
        gate = None if self.gates is None else self.gates.gate(block.gate.name)
        if not (isinstance(gate_weight, ChannelWeight) and isinstance(up_weight, ChannelWeight)):
            return False
        if gate is None or not self._gates_alike(block.gate, block.up):
            return False
        biases = block.gate.bias, block.up.bias
        self.plan.swiglu(self._normed_BD, (gate_weight, up_weight), biases, out_BI, gate)
        return True

    def _linears(
        self, x_BI: Tensor, linears: list[LinearPart], outs: list[Tensor], accumulate: bool = False
    ) -> None:
        """Linears that share an input; one list of channels for those that share their gate."""
        left = list(zip(linears, outs, strict=True))
        while left:
            first = left[0][0]
            some = [pair for pair in left if self._gates_alike(first, pair[0])]
            left = [pair for pair in left if not self._gates_alike(first, pair[0])]
            weights, biases = [p.weight for p, _ in some], [p.bias for p, _ in some]
            skips = self.gates is not None and isinstance(first.weight, ChannelWeight)
            gate = self.gates.gate(first.name) if skips and self.gates is not None else None
            self.plan.linears(x_BI, weights, biases, [out for _, out in some], accumulate, gate)

    def _gates_alike(self, one: LinearPart, other: LinearPart) -> bool:
        """Whether two linears of one input have the same thresholds, and weights of one order."""
        if isinstance(one.weight, ChannelWeight) != isinstance(other.weight, ChannelWeight):
            return False
        return self.gates is None or self.gates.site(one.name) == self.gates.site(other.name)


class Head:
    """Norm and head behind the last block.

    Args:
        x_BD: what to start from.
        plan: to append to; None: one of its own.
    """

    def __init__(self, parts: ModelParts, x_BD: Tensor, plan: Plan | None = None) -> None:
        self.plan = new_plan(parts.device.type, parts.dtype) if plan is None else plan
        self.x_BD, normed_BD = x_BD, torch.zeros_like(x_BD)
        self.logits_BV = x_BD.new_zeros(len(x_BD), parts.head.out_features)
        self.plan.rms_norm(x_BD, parts.norm.weight, parts.norm.eps, normed_BD)
        self.plan.linears(normed_BD, [parts.head.weight], [parts.head.bias], [self.logits_BV])


def rotary_angles(model: PreTrainedModel, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, R] of every position, float32, as the model makes them."""
    with torch.no_grad():
        like = torch.zeros(1, 1, 1, device=model.device)
        places = torch.arange(positions, device=model.device)
        cosine, sine = model.base_model.rotary_emb(like, places[None])
    return cosine[0].float().contiguous(), sine[0].float().contiguous()
