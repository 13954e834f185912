"""What a transformers model is made of, read from the model itself and never from its name:
decoder blocks, prunable weights, ties, and where each parameter lies on disk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prune_llm.admission import check_built, check_config
from prune_llm.checkpoint import StoredTensor, _read_config
from prune_llm.experts import (
    Experts,
    RoutedExperts,
    is_expert_merge,
    slice_name,
    unfuse,
    whole_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Linear:
    """A prunable weight: ``name`` in the whole model, ``kind`` inside its block.

    ``transposed``: the module stores [I, O] (GPT-2's Conv1D) instead of [O, I].
    """

    name: str
    kind: str
    module: nn.Module
    transposed: bool

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def weight(self) -> Tensor:
        """As the module holds it now: [O, I], or [I, O] when transposed."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def to_OI(self, stored: Tensor) -> Tensor:
        return stored.T if self.transposed else stored

    def from_OI(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.T if self.transposed else weight_OI


@dataclass(frozen=True)
class Architecture:
    """A model on the meta device (buffers real) and what was found in it.

    Attributes:
        blocks_name: module path of the list of decoder blocks, such as "model.layers".
        disk_names: name on disk of each parameter and persistent buffer in the model; a tied
            parameter has it under each of its names.
        tied: names of parameters that share their storage with another one.
    """

    model: PreTrainedModel
    blocks_name: str
    blocks: nn.ModuleList
    disk_names: dict[str, str]
    tied: frozenset[str]

    def block_name(self, index: int) -> str:
        return f"{self.blocks_name}.{index}"

    def outside_names(self) -> list[str]:
        """State of the base model outside its blocks (embeddings, final norm): no output head."""
        prefix = self.blocks_name + "."
        base = self.model.base_model
        inside_base = {id(tensor) for tensor in base.state_dict(keep_vars=True).values()}
        return [
            name
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if not name.startswith(prefix) and id(tensor) in inside_base
        ]

    def linears(self, index: int) -> list[Linear]:
        """Prunable weights of one block, in module order; tied ones are left out."""
        found = _linears(self.blocks[index], self.block_name(index))
        return [linear for linear in found if linear.weight_name not in self.tied]


def build(directory: Path, tensors: Mapping[str, StoredTensor]) -> Architecture:
    """Build the model of a checkpoint without its weights and take it apart.

    Raises:
        ValueError: not a causal LM that transformers knows, or larger than its weights; no list of
            decoder blocks; weights that are missing on disk or stored in a form that needs
            conversion, or that are mostly no linears.
    """
    tensor_names = list(tensors)
    check_config(directory, _read_config(directory), len(tensors))
    check_built(directory, len(tensors), sum(math.prod(t.shape) for t in tensors.values()))
    model = _skeleton(directory)
    stored = {memory: disk for disk, memory in _in_memory(model, tensor_names).items()}
    _check_shapes(model, stored, tensors)
    unfuse(model, stored)
    model.tie_weights()
    model.requires_grad_(False)
    blocks_name, blocks = _decoder_blocks(model)
    _refuse_other_weights(blocks, blocks_name)
    disk_names = _disk_names(model, tensor_names, stored)
    _check_shapes(model, disk_names, tensors)
    return Architecture(model, blocks_name, blocks, disk_names, tied_names(model))


def _skeleton(directory: Path) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("it encodes and decodes; models that only decode can be pruned")
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # anything, of what a config.json may say
        # what it could build is a long list
        reason = " ".join(str(error).split()).partition(" Model type should be one of")[0][:300]
        raise ValueError(
            f"{directory}: transformers cannot build a causal language model from its config.json "
            f"({reason})"
        ) from None
    return model.eval()


def _decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The module list with one entry per hidden layer that holds the most parameters."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if count < 1:
        raise ValueError(f"{type(model).__name__}: its config.json has num_hidden_layers {count}")
    found = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__}: has no list of {count} decoder blocks; "
            "this architecture is not supported"
        )
    _, name, blocks = max(found, key=lambda entry: entry[0])
    return name, blocks


def _linears(block: nn.Module, block_name: str) -> list[Linear]:
    from transformers.pytorch_utils import Conv1D

    return [
        Linear(f"{block_name}.{kind}", kind, module, transposed=isinstance(module, Conv1D))
        for kind, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _is_router(block, kind, module)
    ]


def _is_router(block: nn.Module, kind: str, module: nn.Module) -> bool:
    """Whether a linear scores experts: it has one output, or one for each entry of a list beside it
    or beside what it is part of."""
    outputs = getattr(module, "out_features", None)
    if outputs == 1:  # how much a shared expert counts
        return True
    path = kind.split(".")
    above = [block.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    beside = [child for owner in above for child in owner.children()]
    return any(isinstance(s, nn.ModuleList | RoutedExperts) and len(s) == outputs for s in beside)


def block_linears(model: PreTrainedModel) -> list[Linear]:
    """The linears of all decoder blocks of a loaded model."""
    name, blocks = _decoder_blocks(model)
    return [
        linear
        for index, block in enumerate(blocks)
        for linear in _linears(block, f"{name}.{index}")
    ]


def tied_names(model: nn.Module) -> frozenset[str]:
    """Parameters that appear under more than one name, found by identity."""
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    return frozenset(name for name, parameter in named if uses[id(parameter)] > 1)


# of a checkpoint's bytes: below it, masks and the like
UNUSED_SHARE = 0.01
# modules whose weights are not matrices that tokens are multiplied by
_DENSE = (nn.Conv1d, nn.Embedding)


def _refuse_other_weights(blocks: nn.ModuleList, blocks_name: str) -> None:
    """Raise where most of the blocks' weights lie in something that is no linear."""
    own = {id(linear.weight) for block in blocks for linear in _linears(block, blocks_name)}
    others = []
    for name, parameter in blocks.named_parameters():
        owner = blocks.get_submodule(name.rpartition(".")[0])
        if parameter.ndim < 2 or id(parameter) in own or isinstance(owner, _DENSE):
            continue
        if parameter.ndim >= 3:
            raise ValueError(
                f"{blocks_name}.{name}: fused weights of shape {tuple(parameter.shape)} are of a "
                "kind that is not supported; linears, and experts that transformers can switch "
                "between implementations, are"
            )
        others.append((parameter.numel(), name, tuple(parameter.shape)))
    linears = sum(p.numel() for p in blocks.parameters() if id(p) in own)
    if sum(size for size, _, _ in others) > linears:
        _, name, shape = max(others)
        raise ValueError(
            f"{blocks_name}.{name}: weights of shape {shape} are no linear, and most of the model "
            "is of their kind; it would stay dense, this architecture is not supported"
        )


def _disk_names(
    model: PreTrainedModel, tensor_names: list[str], fused: dict[str, str]
) -> dict[str, str]:
    """Match the names on disk with the names in memory, by transformers' own renaming rules.

    Args:
        fused: the same before the model's experts were taken apart.
    """
    state = model.state_dict(keep_vars=True)
    found = _in_memory(model, tensor_names)
    names = {memory: disk for disk, memory in found.items() if memory in state}
    names |= _names_in_fused(model, fused)
    stored = {id(state[name]): disk_name for name, disk_name in names.items()}
    names |= {n: stored[id(t)] for n, t in state.items() if n not in names and id(t) in stored}
    missing = [name for name, _ in model.named_parameters() if name not in names]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} weights of {type(model).__name__}, "
            f"first {missing[0]!r}; it is incomplete or stored in a form that needs conversion"
        )
    return names


def _check_shapes(
    model: PreTrainedModel, disk_names: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = tensors.get(disk_names.get(name, ""))
        if stored is not None and tuple(tensor.shape) != stored.shape:
            raise ValueError(
                f"{stored.name}: is stored with shape {list(stored.shape)}, and "
                f"{type(model).__name__} has {list(tensor.shape)}; config.json and the weights are "
                "not of one model"
            )


def _names_in_fused(model: PreTrainedModel, fused: dict[str, str]) -> dict[str, str]:
    """The weights of experts that lie in one tensor on disk, as slices of it."""
    return {
        f"{path}.{name}": slice_name(fused[f"{path}.{tensor}"], index)
        for path, module in model.named_modules()
        if isinstance(module, Experts) and module.layout.fused
        for name, (tensor, index) in module.stored_names().items()
        if f"{path}.{tensor}" in fused
    }


def _in_memory(model: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, str]:
    """What a tensor on disk is called in the model; one that needs conversion keeps its name."""
    state = model.state_dict(keep_vars=True)
    found = {name: name for name in disk_names}
    others = [name for name in found if name not in state]
    if not others:  # transformers takes 0.4 s to put its rules together
        return found

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = [rule for rule in get_model_conversion_mapping(model) if not is_expert_merge(rule)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    for disk_name in others:
        name, converter = rename_source_key(
            disk_name, renamings, converters, model.base_model_prefix, state
        )
        if converter is None:
            found[disk_name] = str(name)
    return found


def unused_warnings(architecture: Architecture, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Where much of a checkpoint belongs to no module: it is carried along as it is."""
    used = {whole_name(name) for name in architecture.disk_names.values()}
    others = [tensor for name, tensor in tensors.items() if name not in used]
    share = sum(t.nbytes for t in others) / max(1, sum(t.nbytes for t in tensors.values()))
    if share < UNUSED_SHARE:
        return []
    return [
        f"{len(others)} tensors, {share:.0%} of the checkpoint, belong to no module of "
        f"{type(architecture.model).__name__}, first {others[0].name!r}: copied as they are"
    ]


def select(linears: list[Linear], ignore: tuple[str, ...]) -> list[Linear]:
    """Leave out linears whose full name or kind matches one of the shell patterns in ``ignore``."""
    return [linear for linear in linears if not any(matches(linear, p) for p in ignore)]


def matches(linear: Linear, pattern: str) -> bool:
    return fnmatchcase(linear.name, pattern) or fnmatchcase(linear.kind, pattern)


def text_width(model: PreTrainedModel) -> int:
    """Longest context the model was made for; 2048 when its config does not say."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 2048)


def run_dtype(name: str, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype blocks run in: "auto" is what most of the checkpoint is stored in."""
    if name != "auto":
        return RUN_DTYPES[name]
    floating = Counter(dtype for dtype in stored if dtype in RUN_DTYPES.values())
    if not floating:
        raise ValueError("the checkpoint holds no float32, bfloat16 or float16 weights to prune")
    return floating.most_common(1)[0][0]


RUN_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
