"""Decoder blocks over whole sequences with fewer passes over memory, for calibration and prompts.

A block of Llama's parts runs with our kernels for everything but its linears, which are called as
the modules they are: hooks see them, and packed ones stay packed. A block is replaced only where
its first run agrees with the model's own forward.

Shape letters: B = samples, T = tokens, D = hidden size, H = heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from prune_llm.parts import OtherParts, check_block
from prune_llm_kernels import tokens

# relative distance of two outputs that rounding explains; a missing part or factor is far above
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


@dataclass(frozen=True)
class FusedBlock:
    """Runs one decoder block in place of its own forward."""

    block: Any
    keep: Callable[[Tensor, Tensor], None] | None = None  # told keys and values [B, K, T, D]

    def __call__(self, hidden_BTD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The block's output [B, T, D] for whole sequences under causal attention.

        Args:
            angles: cosine and sine [1, T, R], what models call position_embeddings.
        """
        block, attention = self.block, self.block.self_attn
        normed_BTD = _norm(block.input_layernorm, hidden_BTD)
        hidden_BTD = hidden_BTD + self._attend(attention, normed_BTD, angles)
        normed_BTD = _norm(block.post_attention_layernorm, hidden_BTD)
        mlp = block.mlp
        inner = tokens.silu_mul(mlp.gate_proj(normed_BTD), mlp.up_proj(normed_BTD))
        output: Tensor = hidden_BTD + mlp.down_proj(inner)
        return output

    def _attend(self, attention: Any, normed_BTD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        B, T, _ = normed_BTD.shape
        size = attention.head_dim
        q, k, v = (
            linear(normed_BTD).view(B, T, -1, size)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = _norm(attention.q_norm, q), _norm(attention.k_norm, k)
        cosine_TR, sine_TR = (angle[0] for angle in angles)
        still = cosine_TR[:, :0]
        q_BHTD = tokens.rotate_heads(q, cosine_TR, sine_TR)
        k_BKTD = tokens.rotate_heads(k, cosine_TR, sine_TR)
        v_BKTD = tokens.rotate_heads(v, still, still)
        if self.keep is not None:
            self.keep(k_BKTD, v_BKTD)
        out_BHTD = _causal(q_BHTD, k_BKTD, v_BKTD, float(attention.scaling))
        out: Tensor = attention.o_proj(out_BHTD.transpose(1, 2).reshape(B, T, -1))
        return out


def _causal(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    if tokens.supports_causal_attention(q_BHTD, k_BKTD, v_BKTD):
        return tokens.causal_attention(q_BHTD, k_BKTD, v_BKTD, scale)
    return scaled_dot_product_attention(
        q_BHTD, k_BKTD, v_BKTD, is_causal=True, scale=scale, enable_gqa=True
    )


def _norm(norm: Any, x: Tensor) -> Tensor:
    return tokens.rms_norm(x, norm.weight, norm.variance_epsilon)


def agrees(block: nn.Module, hidden_BTD: Tensor, angles: tuple[Tensor, Tensor]) -> bool:
    """Whether a block may run fused: it has Llama's parts, and both forms give one result."""
    try:
        check_block(block)
    except OtherParts:
        return False
    expected = block(hidden_BTD, position_embeddings=angles, attention_mask=None)
    if not isinstance(expected, Tensor):
        return False
    change = (expected - hidden_BTD).float()
    distance = (FusedBlock(block)(hidden_BTD, angles) - expected).float().norm() / change.norm()
    return float(distance) <= _TOLERANCE[hidden_BTD.dtype]


# what a block may be given beside its angles: it says nothing that they do not
_REDUNDANT = frozenset({"position_embeddings", "position_ids", "cache_position", "use_cache"})


def is_plain_call(hidden_BTD: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a block is asked for causal attention over whole sequences and nothing else."""
    angles = kwargs.get("position_embeddings")
    return (
        tokens.supports_rows(hidden_BTD)
        and all(value is None for name, value in kwargs.items() if name not in _REDUNDANT)
        and isinstance(angles, tuple)
        and len(angles) == 2
        and all(isinstance(angle, Tensor) and len(angle) == 1 for angle in angles)
    )
