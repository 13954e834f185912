"""Mixture-of-experts weights as linears of their own.

transformers holds the experts of a block fused, in one tensor [experts, ...] for gate and up and
one for down. Here they are taken apart: pruned and multiplied like every other linear. A checkpoint
holds either a matrix for each, and they have its names, or the fused tensors themselves: then an
expert's weight is a slice of one, in the orientation and order of rows that it has there.

Shape letters: N = tokens, D = hidden size, E = experts, k = experts of a token.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
_SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight\$?$")


@dataclass(frozen=True)
class Layout:
    """The weights of one expert.

    Attributes:
        names: of its linears, down last: (w1, w3, w2), or (gate_up_proj, down_proj), as on disk.
        fused: on disk one tensor holds all experts.
        transposed: its matrices are [I, O].
        bias: its linears have one.
    """

    names: tuple[str, ...]
    fused: bool = False
    transposed: bool = False
    bias: bool = False


class Gate(nn.Module):
    """What lies between an expert's linears: the module's own, such as act(gate) * up."""

    owner: Any

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.gated = bool(getattr(fused, "has_gate", True))
        own = getattr(type(fused), "_apply_gate", None)
        self.usual = own is None or own is _usual_gate()
        # its settings and its activation, and none of its weights; no child of this module, as
        # transformers would want to initialise it
        owner = copy.copy(fused)
        owner._parameters = {}
        self.__dict__["owner"] = owner

    def forward(self, *inputs_NI: Tensor) -> Tensor:
        """Gate and up, or both of them in one tensor, or up alone where nothing is gated."""
        if not self.gated:
            return self.owner.act_fn(inputs_NI[0])  # type: ignore[no-any-return]
        if not self.usual:
            return self.owner._apply_gate(torch.cat(inputs_NI, dim=-1))  # type: ignore[no-any-return]
        gate, up = inputs_NI if len(inputs_NI) == 2 else inputs_NI[0].chunk(2, dim=-1)
        return self.owner.act_fn(gate) * up  # type: ignore[no-any-return]


def _usual_gate() -> Any:
    from transformers.integrations import moe

    return getattr(moe, "_default_apply_gate", None)


class RoutedExperts(nn.Module):
    """The experts of a block. Each sees the tokens that the router sends it, and only those."""

    def __init__(self, count: int, gate: Gate) -> None:
        super().__init__()
        self.count = count
        self.gate = gate

    def __len__(self) -> int:
        return self.count

    def expert(self, index: int, x_nD: Tensor) -> Tensor:
        """What one expert makes of its tokens, [n, D]."""
        raise NotImplementedError

    def forward(
        self,
        hidden_ND: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Sum over each token's experts of weight * expert(token), [N, D].

        Without an index the tokens come once for each expert [E * N, D], scaled, and zero where
        they are not for it (Llama 4); so do the results.
        """
        output_ND = torch.zeros_like(hidden_ND)
        if top_k_index is None or top_k_weights is None:
            for index, x_ND in enumerate(hidden_ND.chunk(self.count)):
                token_n = torch.where(x_ND.any(dim=-1))[0]
                if len(token_n):
                    y_nD = self.expert(index, x_ND[token_n])
                    output_ND.index_add_(0, token_n + index * len(x_ND), y_nD)
            return output_ND
        for index in top_k_index.unique().tolist():
            if not 0 <= index < self.count:
                continue  # stands for no expert
            token_n, place_n = torch.where(top_k_index == index)
            y_nD = self.expert(index, hidden_ND[token_n])
            y_nD = y_nD * top_k_weights[token_n, place_n, None]
            output_ND.index_add_(0, token_n, y_nD.to(output_ND.dtype))
        return output_ND


class Experts(RoutedExperts):
    """The experts of a block, each a module with its linears, in place of the fused ones."""

    def __init__(self, layout: Layout, fused: Any) -> None:
        super().__init__(len(fused.down_proj), Gate(fused))
        self.layout = layout
        first, down = fused._parameters.get(GATE_UP, fused._parameters.get(UP)), fused.down_proj
        kind = {"device": down.device, "dtype": down.dtype}
        into, between = _sizes(first, layout.transposed)
        between_each = between // (len(layout.names) - 1)
        for index in range(self.count):
            expert = nn.Module()
            for name in layout.names[:-1]:
                setattr(expert, name, _linear(into, between_each, layout, kind))
            back, out = _sizes(down, layout.transposed)
            setattr(expert, layout.names[-1], _linear(back, out, layout, kind))
            self.add_module(str(index), expert)
        self.requires_grad_(False)

    def expert(self, index: int, x_nD: Tensor) -> Tensor:
        linears = [getattr(self._modules[str(index)], name) for name in self.layout.names]
        y_nD: Tensor = linears[-1](self.gate(*(linear(x_nD) for linear in linears[:-1])))
        return y_nD

    def stored_names(self) -> dict[str, tuple[str, int]]:
        """Where fused tensors hold the weights of single experts: "3.down_proj.bias" is entry 3 of
        "down_proj_bias"."""
        found = {}
        for index in range(self.count):
            for name in self.layout.names:
                found[f"{index}.{name}.weight"] = (name, index)
                if self.layout.bias:
                    found[f"{index}.{name}.bias"] = (f"{name}_bias", index)
        return found


def _sizes(fused: Tensor, transposed: bool) -> tuple[int, int]:
    """I and O of one expert's matrix."""
    _, rows, columns = fused.shape
    return (rows, columns) if transposed else (columns, rows)


def _linear(width: int, rows: int, layout: Layout, kind: dict[str, Any]) -> nn.Module:
    if not layout.transposed:
        return nn.Linear(width, rows, bias=layout.bias, **kind)
    with torch.device("meta"):
        linear: Any = _conv1d(layout.bias)(rows, width)
    linear.weight = nn.Parameter(torch.empty(width, rows, **kind))
    linear.bias = nn.Parameter(torch.empty(rows, **kind)) if layout.bias else None
    return linear  # type: ignore[no-any-return]


@functools.cache
def _conv1d(bias: bool) -> type[nn.Module]:
    """A linear whose weight is [I, O]."""
    from transformers.pytorch_utils import Conv1D

    class UnbiasedConv1D(Conv1D):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight  # type: ignore[no-any-return]

    return Conv1D if bias else UnbiasedConv1D


def unfuse(model: PreTrainedModel, in_memory: Collection[str] = ()) -> bool:
    """Take the fused experts of a model apart, where they are of a known kind; whether any was.

    Others stay as they are. The weights are not carried over: they are read later, or the model is
    on the meta device.

    Args:
        in_memory: names in the model of the tensors on disk that need no conversion: fused experts
            among them are stored fused.
    """
    unfused = False
    for path, module in list(model.named_modules()):
        if not is_fused(module):
            continue
        layout = _layout(model, path, module, in_memory)
        if layout is not None:
            model.set_submodule(path, Experts(layout, module))
            unfused = True
    return unfused


def is_fused(module: Any) -> bool:
    """Whether it is a block's fused experts, of a kind that can be taken apart."""
    if not hasattr(module, "has_gate"):
        return _is_bare(module)
    weights, biases = _fused_names(module)
    expected = {*weights, *biases}
    return (
        {name for name, _ in module.named_parameters()} == expected
        and all(module._parameters[name].ndim == 3 for name in weights)
        and not getattr(module, "has_post_expert_norm", False)
        and hasattr(type(module), "_apply_gate")
    )


def _is_bare(module: Any) -> bool:
    """Llama 4's experts: they tell nothing about themselves, and take their tokens sorted."""
    names = {name for name, _ in module.named_parameters()}
    if names != {GATE_UP, DOWN} or not hasattr(module, "act_fn"):
        return False
    first, down = module._parameters.get(GATE_UP), module._parameters.get(DOWN)
    if first is None or down is None or not first.ndim == down.ndim == 3:
        return False
    count, width, twice = first.shape
    arguments = inspect.signature(type(module).forward).parameters
    return tuple(down.shape) == (count, twice // 2, width) and len(arguments) == 2


def _fused_names(module: Any) -> tuple[list[str], list[str]]:
    """The fused weights of a module, down last, and their biases."""
    weights = [GATE_UP if getattr(module, "has_gate", True) else UP, DOWN]
    return weights, [f"{name}_bias" for name in weights if getattr(module, "has_bias", False)]


def fused_layout(module: Any) -> Layout | None:
    """Of experts that are stored as they are in memory; None where they are of no known kind."""
    if not is_fused(module):
        return None
    weights, biases = _fused_names(module)
    transposed = bool(getattr(module, "is_transposed", True))  # the bare kind is
    return Layout(tuple(weights), True, transposed, bool(biases))


def _layout(
    model: PreTrainedModel, path: str, module: Any, in_memory: Collection[str]
) -> Layout | None:
    weights, biases = _fused_names(module)
    if all(f"{path}.{name}" in in_memory for name in weights):
        return fused_layout(module)
    apart = _names_on_disk(model, weights)
    whole = getattr(module, "is_concatenated", False) and not module.is_transposed
    return Layout(apart) if apart is not None and whole and not biases else None


def _names_on_disk(model: PreTrainedModel, weights: list[str]) -> tuple[str, ...] | None:
    """Of an expert's matrices, gate, up, down: from transformers' own rules for merging them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for rule in get_model_conversion_mapping(model):
        if is_expert_merge(rule):
            sources = [_SOURCE.search(source) for source in rule._original_source_patterns]
            target = rule._original_target_patterns[0].rpartition(".")[2].rstrip("$")
            found[target] = [match[1] for match in sources if match is not None]
    expected = [2 if weights[0] == GATE_UP else 1, 1]
    if [len(found.get(name, [])) for name in weights] != expected:
        return None
    return (*found[weights[0]], *found[DOWN])


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


_SLICE = re.compile(r"(.+)\[(\d+)\]")


def slice_name(tensor: str, index: int) -> str:
    """Of one expert in a tensor that holds all of a block: ``experts.down_proj[3]``."""
    return f"{tensor}[{index}]"


def split_name(name: str) -> tuple[str, int | None]:
    """The tensor on disk, and the index of a slice of it; None for a whole tensor."""
    match = _SLICE.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def whole_name(name: str) -> str:
    return split_name(name)[0]
