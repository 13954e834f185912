"""Mixture-of-experts weights as linears of their own.

transformers holds the experts of a block fused, in one tensor [experts, O, I] for gate and up and
one for down; checkpoints hold a matrix each. Here they are taken apart again, under the names they
have on disk: pruned, stored and multiplied like every other linear.

Shape letters: N = tokens, D = hidden size, E = experts, k = experts of a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight\$?$")


@dataclass(frozen=True)
class ExpertNames:
    """What the three matrices of an expert are called on disk, such as w1, w3, w2."""

    gate: str
    up: str
    down: str


class Experts(nn.Module):
    """The experts of a block, each a module with three linears, in place of the fused ones.

    Every expert sees the tokens that the router sends it, and only those.
    """

    def __init__(self, names: ExpertNames, activation: nn.Module, fused: Any) -> None:
        super().__init__()
        count, twice, width = fused.gate_up_proj.shape
        self.count: int = count
        self.names = names
        self.act_fn = activation
        like = {"bias": False, "device": fused.down_proj.device, "dtype": fused.down_proj.dtype}
        for index in range(self.count):
            expert = nn.Module()
            setattr(expert, names.gate, nn.Linear(width, twice // 2, **like))
            setattr(expert, names.up, nn.Linear(width, twice // 2, **like))
            setattr(expert, names.down, nn.Linear(twice // 2, width, **like))
            self.add_module(str(index), expert)
        self.requires_grad_(False)

    def __len__(self) -> int:
        return self.count

    def forward(
        self, hidden_ND: Tensor, top_k_index_Nk: Tensor, top_k_weights_Nk: Tensor
    ) -> Tensor:
        """Sum over each token's experts of weight * expert(token), [N, D]."""
        output_ND = torch.zeros_like(hidden_ND)
        for index in top_k_index_Nk.unique().tolist():
            if not 0 <= index < self.count:
                continue  # stands for no expert
            token_n, place_n = torch.where(top_k_index_Nk == index)
            expert: Any = self._modules[str(index)]
            x_nD = hidden_ND[token_n]
            gate, up = getattr(expert, self.names.gate), getattr(expert, self.names.up)
            y_nD = getattr(expert, self.names.down)(self.act_fn(gate(x_nD)) * up(x_nD))
            y_nD = y_nD * top_k_weights_Nk[token_n, place_n, None]
            output_ND.index_add_(0, token_n, y_nD.to(output_ND.dtype))
        return output_ND


def unfuse(model: PreTrainedModel) -> bool:
    """Take the fused experts of a model apart, where they are of the usual kind; whether any was.

    The usual kind: gate and up one behind the other, no bias, act(gate) * up. Others stay as they
    are. The weights are not carried over: they are read later, or the model is on the meta device.
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    if not fused:
        return False
    names = _names_on_disk(model)
    if names is None:
        return False
    for name, module in fused.items():
        model.set_submodule(name, Experts(names, module.act_fn, module))
    return True


def _is_fused(module: Any) -> bool:
    from transformers.integrations import moe

    default_gate = getattr(moe, "_default_apply_gate", None)
    return (
        all(isinstance(getattr(module, name, None), nn.Parameter) for name in (GATE_UP, DOWN))
        and module.gate_up_proj.ndim == module.down_proj.ndim == 3
        and len(list(module.parameters())) == 2
        and getattr(type(module), "_apply_gate", None) is default_gate
        and getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "has_post_expert_norm", False)
        and isinstance(getattr(module, "act_fn", None), nn.Module)
    )


def _names_on_disk(model: PreTrainedModel) -> ExpertNames | None:
    """From transformers' own rules for merging the experts of a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for rule in get_model_conversion_mapping(model):
        if is_expert_merge(rule):
            sources = [_SOURCE.search(source) for source in rule._original_source_patterns]
            target = GATE_UP if GATE_UP in rule._original_target_patterns[0] else DOWN
            found[target] = [match[1] for match in sources if match is not None]
    if [len(found.get(name, [])) for name in (GATE_UP, DOWN)] != [2, 1]:
        return None
    return ExpertNames(*found[GATE_UP], *found[DOWN])


def is_expert_merge(rule: Any) -> bool:
    """Whether a rule of transformers collects matrices of single experts into a fused tensor."""
    sources = getattr(rule, "_original_source_patterns", [])
    return bool(sources) and all(_SOURCE.search(source) for source in sources)


def without_index(name: str) -> str:
    """``mlp.experts.7.w1`` -> ``mlp.experts.*.w1``: what the experts of a block have in common."""
    return re.sub(r"(?<=\bexperts\.)\d+(?=\.)", "*", name)


def with_index(name: str, like: str) -> str:
    """The name with the expert's index that ``like`` has."""
    index = re.search(r"\bexperts\.(\d+)\.", like)
    return name if index is None else re.sub(r"(?<=\bexperts\.)(\d+|\*)(?=\.)", index[1], name)
