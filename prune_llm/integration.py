"""Sparse checkpoints in transformers: `from_pretrained` builds packed modules and fills them.

Importing this imports transformers and registers with it: reach it through `prune_llm.load`, or
through registration.py, which waits until somebody imports transformers.

The way of a load: transformers reads config.json and finds our quantizer; that points it at the
files of the variant "sparse"; the model is built on the meta device; its linears are replaced by
packed modules of exactly the sizes in the files' headers; transformers loads the tensors into
them; they are checked once. No dense weight exists at any time.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prune_llm.architecture import _in_memory
from prune_llm.checkpoint import StoredTensor, _read_config, locate, open_checkpoint, read_header
from prune_llm.config import select_device
from prune_llm.experts import Experts, fused_layout, is_expert_merge, unfuse, without_index
from prune_llm.format import (
    BITMASK,
    OFFSETS,
    PACKED,
    SUFFIXES,
    offsets_dtype,
)
from prune_llm.sparse_checkpoint import (
    VARIANT,
    PackedTensor,
    is_sparse,
    open_sparse,
    sparse_files,
    split_packed,
)
from prune_llm.sparse_experts import SparseExperts
from prune_llm.sparse_format import QUANT_METHOD, SparseFormat
from prune_llm.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    dequantize: bool = False,
    device: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load a checkpoint that `prune` wrote; sparse linears stay packed, in memory as on disk.

    Args:
        model: directory or hub name, of the sparse or the dense form.
        dtype: of the weights; None: as stored.
        device_map: as transformers takes it: "cpu", {"": "cpu"}, "auto", or a table that puts
            modules on "disk" (with ``offload_folder``).
        dequantize: unpack every linear after loading.
        device: for the whole model, instead of device_map: "auto" (CUDA where there is one), "cpu",
            "cuda" or "cuda:1". None: as device_map says, the CPU if that says nothing.
        settings: further arguments of ``from_pretrained``.

    Raises:
        ValueError: not a checkpoint, another format version, damaged, incomplete: the message names
            the tensor; or a device that does not exist.
    """
    from transformers import AutoModelForCausalLM

    to = None if device is None else select_device(device)
    if to is not None and device_map is not None:
        raise ValueError(f"device {device!r}: device_map {device_map!r} is given as well; give one")
    register()
    directory = locate(model)
    arguments = {"dtype": dtype or "auto", "device_map": device_map, **settings}
    # so that what is wrong comes back, instead of random weights in its place
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if is_sparse(_read_config(directory)):
        open_sparse(directory)  # our messages, before transformers builds anything
        arguments["variant"] = VARIANT
    elif not any(file.suffix in (".safetensors", ".bin") for file in directory.iterdir()):
        open_checkpoint(directory)  # says what is missing
    loaded: PreTrainedModel
    loaded, found = AutoModelForCausalLM.from_pretrained(directory, **arguments)
    _refuse_gaps(directory, loaded, found)
    if dequantize and getattr(loaded, "is_quantized", False):
        loaded = loaded.dequantize()
    return loaded if to is None else loaded.to(to)


def _refuse_gaps(directory: Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise unless every weight of the model came from the files."""
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{directory}: {name} is stored with shape {list(stored)}, and {type(model).__name__} "
            f"has {list(expected)}; config.json and the weights are not of one model"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{directory}: lacks {len(missing)} weights of {type(model).__name__}, first "
            f"{missing[0]!r}; get the checkpoint again"
        )


def register() -> None:
    """Make transformers know our quantization method. Idempotent."""
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(SparseConfig)
    auto.register_quantizer(QUANT_METHOD)(SparseQuantizer)
    # only these may be given to from_pretrained beside the settings of the checkpoint
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SparseConfig,)


class SparseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a sparse checkpoint, as transformers wants it.

    ``from_pretrained(DIR, quantization_config=SparseConfig(dequantize=True))`` unpacks every linear
    after loading; everything else is read from the checkpoint.
    """

    def __init__(self, dequantize: bool = False, **settings: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.dequantize = dequantize
        self.settings = settings

    @property
    def form(self) -> SparseFormat:
        """Raises ValueError for another format version or malformed settings."""
        return SparseFormat.parse(self.settings)

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        return {**self.settings, "quant_method": QUANT_METHOD}


class SparseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds packed modules where the checkpoint holds packed weights."""

    # a dense model cannot be made sparse by loading it
    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """The last call before transformers looks for files: point it at the variant's.

        transformers has no way for a quantizer to choose the variant, but it loads the file that
        the configuration names. Further shards are added in `_process_model_before_weight_loading`.
        """
        directory = Path(str(config.name_or_path or ""))
        # the decoder of a model with more parts is told no path: its variant is to be asked for
        if config.name_or_path and directory.is_dir():
            config.transformers_weights = sparse_files(directory)[0].name
        return config

    # the same moment in transformers before 5.20
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        model.config.__dict__.pop("transformers_weights", None)
        assert checkpoint_files is not None
        _add_shards(checkpoint_files)
        tensors: dict[str, StoredTensor] = {}
        for file in checkpoint_files:
            tensors |= {tensor.name: tensor for tensor in read_header(Path(file))}
        form = self.quantization_config.form
        packed, _plain = split_packed(tensors, form)
        if form.activation or any(without_index(name) != name for name in packed):
            unfuse(model)  # experts are stored, and stay, a matrix each; so are their thresholds
        names = _in_memory(model, packed)
        experts: dict[str, dict[str, PackedTensor]] = {}
        for weight in packed.values():
            if weight.experts is None:
                _replace(model, names[weight.name].removesuffix(".weight"), weight)
            else:
                path, _dot, leaf = names[weight.name].rpartition(".")
                experts.setdefault(path, {})[leaf] = weight
        for path, weights in experts.items():
            _replace_experts(model, path, weights)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without the rules that merge experts, where they stay apart; with the names of packed
        experts where a rule renames the dense ones."""
        if any(isinstance(module, Experts) for module in model.modules()):
            return [rule for rule in weight_conversions if not is_expert_merge(rule)]
        return weight_conversions + _renamings(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for module in _packed_modules(model).values():
            module.requires_grad_(False)  # transformers made new parameters of them
            if not _is_offloaded(module):  # else checked when used
                _check(module)
        if self.quantization_config.dequantize:
            self._dequantize(model)
            return
        # without the variant the written model.safetensors would be loaded by a transformers that
        # does not know us, with random weights in place of ours
        model.save_pretrained = functools.partial(model.save_pretrained, variant=VARIANT)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Replace packed modules by dense ones, one by one."""
        if isinstance(dtype, str):  # as the configuration has it after save_pretrained
            dtype = getattr(torch, dtype)
        if renamings := _renamings(model, ("",)):  # transformers forgot those it had no use for
            model._weight_conversions = [*(model._weight_conversions or []), *renamings]
        for name, module in _packed_modules(model).items():
            if _is_offloaded(module):
                raise ValueError(
                    f"{name}: is offloaded to disk; load without offloading to dequantize"
                )
            model.set_submodule(name, module.dequantize().to(dtype))
        model.__dict__.pop("save_pretrained", None)
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _renamings(model: PreTrainedModel, suffixes: tuple[str, ...] = SUFFIXES) -> list[Any]:
    """Rules for packed experts that have other names on disk."""
    from transformers.core_model_loading import WeightRenaming

    return [
        WeightRenaming(re.escape(module.stored_names[leaf] + suffix), f"{path}.{leaf}{suffix}")
        for path, module in _packed_modules(model).items()
        if isinstance(module, SparseExperts)
        for leaf in module.packed_names
        if module.stored_names[leaf] != f"{path}.{leaf}"
        for suffix in suffixes
        if not suffix or leaf + suffix in module._parameters
    ]


def _add_shards(checkpoint_files: list[str]) -> None:
    """In place: transformers has the first shard only, when the configuration named it."""
    first = Path(checkpoint_files[0])
    have = {Path(file).name for file in checkpoint_files}
    if f".{VARIANT}-" in first.name:
        others = (str(file) for file in sparse_files(first.parent) if file.name not in have)
        checkpoint_files.extend(others)


Packed = SparseLinear | SparseExperts


def _packed_modules(model: PreTrainedModel) -> dict[str, Packed]:
    return {n: module for n, module in model.named_modules() if isinstance(module, Packed)}


def _is_offloaded(module: Packed) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def _check(module: Packed) -> None:
    """Raise ValueError, naming the tensor, where packed weights are damaged."""
    if isinstance(module, SparseLinear):
        module.packed_weight()
        return
    for leaf in module.packed_names:
        module.packed_weights(leaf)


def _replace_experts(model: PreTrainedModel, path: str, weights: dict[str, PackedTensor]) -> None:
    """Put experts over packed weights, still on the meta device, in the place of the fused ones."""
    fused = _submodule(model, path)
    layout = None if fused is None else fused_layout(fused)
    for leaf, weight in weights.items():
        if layout is None or leaf not in layout.names or fused is None:
            raise ValueError(
                f"{weight.name}: the checkpoint has it packed, and {type(model).__name__} has no "
                f"fused experts {path}.{leaf}; export it with --format dense to load it"
            )
        count, rows, width = weight.experts or 0, *weight.shape_OI
        expected = tuple(fused._parameters[leaf].shape)
        if (count, *((width, rows) if layout.transposed else (rows, width))) != expected:
            raise ValueError(
                f"{weight.name}{BITMASK}: describes {count} weights of shape {[rows, width]}, "
                f"{type(model).__name__} has {list(expected)}"
            )
    assert layout is not None and fused is not None
    parts = {leaf: _on_meta(weight, fused.down_proj.dtype) for leaf, weight in weights.items()}
    widths = {leaf: weight.in_features for leaf, weight in weights.items()}
    module = SparseExperts(fused, layout, parts, widths, name=path)
    module.stored_names = {leaf: weight.name for leaf, weight in weights.items()}
    model.set_submodule(path, module.train(fused.training))


def _submodule(model: PreTrainedModel, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _on_meta(weight: PackedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the stored sizes; the values in the dtype that the model is loaded in."""
    dtypes = {BITMASK: torch.uint8, PACKED: dtype, OFFSETS: offsets_dtype(*weight.shape_OI)}
    return {
        suffix: torch.empty(part.shape, dtype=dtypes[suffix], device="meta")
        for suffix, part in weight.parts.items()
    }


def _replace(model: PreTrainedModel, name: str, weight: PackedTensor) -> None:
    """Put a packed module of the stored sizes, still on the meta device, in a linear's place."""
    from transformers.pytorch_utils import Conv1D

    linear = _submodule(model, name)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise ValueError(
            f"{weight.name}: the checkpoint has it packed, and {type(model).__name__} has no "
            f"linear {name}; export it with --format dense to load it"
        )
    transposed = isinstance(linear, Conv1D)
    expected = tuple(reversed(linear.weight.shape)) if transposed else tuple(linear.weight.shape)
    if weight.shape_OI != expected:
        raise ValueError(
            f"{weight.name}{BITMASK}: describes a weight of shape {list(weight.shape_OI)}, "
            f"{type(model).__name__} has {list(expected)}"
        )
    parts = _on_meta(weight, linear.weight.dtype)
    module = SparseLinear(
        parts[BITMASK],
        parts[PACKED],
        parts.get(OFFSETS),
        weight.in_features,
        linear.bias,
        transposed=transposed,
        name=f"{name}.weight",
    )
    model.set_submodule(name, module.train(linear.training))


register()
