"""What a model of Llama's parts is made of: RMSNorm, rotary attention, SwiGLU (Llama, Mistral,
Qwen2, Qwen3 and their kin), found by its modules and never by its name.

Structure alone proves nothing about what a forward pass computes: users of these parts compare
their results with the model's own.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prune_llm.channel_linear import ChannelLinear
from prune_llm.sparse_linear import SparseLinear
from prune_llm_kernels import (
    ChannelWeight,
    PackedWeight,
    channel_linear,
    dense_linear,
    sparse_linear,
)
from prune_llm_kernels.kv_cache import MAX_HEAD_SIZE
from prune_llm_kernels.packed_weight import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# rotary embeddings whose angles depend on the position alone, not on the length so far
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


class OtherParts(Exception):
    """What in a model is not Llama's."""


@dataclass(frozen=True)
class LinearPart:
    """A weight [O, I] in any form, its bias [O], and its module's name in the model."""

    weight: PackedWeight | ChannelWeight | Tensor
    bias: Tensor | None
    name: str

    @property
    def out_features(self) -> int:
        weight = self.weight
        return weight.shape[0] if isinstance(weight, Tensor) else weight.out_features

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, PackedWeight):
            return sparse_linear(x, self.weight, self.bias)
        if isinstance(self.weight, ChannelWeight):
            return channel_linear(x, self.weight, self.bias)
        return dense_linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class NormPart:
    """RMSNorm: weight [D] and the epsilon under the root."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class BlockParts:
    """One decoder block."""

    input_norm: NormPart
    query: LinearPart
    key: LinearPart
    value: LinearPart
    output: LinearPart
    query_norm: NormPart | None
    key_norm: NormPart | None
    mlp_norm: NormPart
    gate: LinearPart
    up: LinearPart
    down: LinearPart
    head_size: int
    scale: float
    window: int


@dataclass(frozen=True)
class ModelParts:
    """A model as the plan needs it; the tensors are the model's own."""

    model: PreTrainedModel
    embedding_VD: Tensor
    blocks: tuple[BlockParts, ...]
    norm: NormPart
    head: LinearPart

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VD.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device


def read_parts(model: PreTrainedModel) -> ModelParts:
    """Take a model apart. Raises OtherParts, with the reason, where it has other parts."""
    base = model.base_model
    _expect_children(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
    _expect_children(model, {model.base_model_prefix, "lm_head"})
    rotary = (getattr(base.rotary_emb.config, "rope_parameters", None) or {}).get("rope_type")
    if rotary not in _FIXED_ROTARY:
        raise OtherParts(f"rotary embedding of type {rotary}")
    embedding = base.embed_tokens.weight
    if type(base.embed_tokens) is not nn.Embedding or embedding.device.type not in ("cpu", "cuda"):
        raise OtherParts(f"embedding {type(base.embed_tokens).__name__} on {embedding.device}")
    if embedding.dtype not in DTYPES:
        raise OtherParts(f"weights of {embedding.dtype}")
    blocks = tuple(_read_block(block, model, i) for i, block in enumerate(base.layers))
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise OtherParts("weights on several devices")
    return ModelParts(
        model, embedding, blocks, _read_norm(base.norm), _read_linear(model.lm_head, "lm_head")
    )


def check_block(block: Any) -> None:
    """Raise OtherParts unless a decoder block has exactly the modules of Llama's."""
    norms = {"input_layernorm", "post_attention_layernorm"}
    _expect_children(block, {"self_attn", "mlp"} | norms)
    attention, mlp = block.self_attn, block.mlp
    _expect_children(
        attention, {"q_proj", "k_proj", "v_proj", "o_proj"}, optional={"q_norm", "k_norm"}
    )
    _expect_children(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if not isinstance(mlp.act_fn, _silu_classes()):
        raise OtherParts(f"activation {type(mlp.act_fn).__name__}")
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        _read_norm(norm)
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            _read_norm(getattr(attention, name))
    if not attention.head_dim <= MAX_HEAD_SIZE:
        raise OtherParts(f"heads of {attention.head_dim}")


def _read_block(block: Any, model: PreTrainedModel, index: int) -> BlockParts:
    check_block(block)
    attention, mlp = block.self_attn, block.mlp
    name = f"{model.base_model_prefix}.layers.{index}"
    return BlockParts(
        input_norm=_read_norm(block.input_layernorm),
        query=_read_linear(attention.q_proj, f"{name}.self_attn.q_proj"),
        key=_read_linear(attention.k_proj, f"{name}.self_attn.k_proj"),
        value=_read_linear(attention.v_proj, f"{name}.self_attn.v_proj"),
        output=_read_linear(attention.o_proj, f"{name}.self_attn.o_proj"),
        query_norm=_read_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_read_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        mlp_norm=_read_norm(block.post_attention_layernorm),
        gate=_read_linear(mlp.gate_proj, f"{name}.mlp.gate_proj"),
        up=_read_linear(mlp.up_proj, f"{name}.mlp.up_proj"),
        down=_read_linear(mlp.down_proj, f"{name}.mlp.down_proj"),
        head_size=attention.head_dim,
        scale=float(attention.scaling),
        window=_window(model.config, index),
    )


def _silu_classes() -> tuple[type[nn.Module], ...]:
    from transformers.activations import SiLUActivation

    return (nn.SiLU, SiLUActivation)


def _window(config: Any, index: int) -> int:
    """Tokens that a block's queries see; 0: all."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return int(window or 0)
    if kinds[index] not in ("full_attention", "sliding_attention"):
        raise OtherParts(f"attention of type {kinds[index]}")
    return int(window or 0) if kinds[index] == "sliding_attention" else 0


def _expect_children(
    module: nn.Module, names: set[str], optional: AbstractSet[str] = frozenset()
) -> None:
    found = {name for name, _ in module.named_children()} - optional
    if found != names:
        strange = sorted(found ^ names)
        raise OtherParts(f"{type(module).__name__} differs from Llama's in {', '.join(strange)}")


def _read_norm(norm: nn.Module) -> NormPart:
    names = {name for name, _ in norm.named_parameters()}
    if names != {"weight"} or not hasattr(norm, "variance_epsilon"):
        raise OtherParts(f"normalisation {type(norm).__name__}")
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return NormPart(weight, float(norm.variance_epsilon))  # type: ignore[arg-type]


def _read_linear(module: nn.Module, name: str) -> LinearPart:
    if hasattr(module, "_hf_hook"):
        raise OtherParts(f"{name} is offloaded")
    if isinstance(module, SparseLinear):
        return LinearPart(module.packed_weight(), module._parameters["bias"], name)
    if isinstance(module, ChannelLinear):
        return LinearPart(module.channel_weight, module._parameters["bias"], name)
    if type(module) is not nn.Linear:
        raise OtherParts(f"{name} is a {type(module).__name__}")
    return LinearPart(module.weight, module.bias, name)
