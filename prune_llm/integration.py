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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prune_llm.architecture import _memory_name
from prune_llm.checkpoint import StoredTensor, _read_config, locate, open_checkpoint, read_header
from prune_llm.experts import Experts, is_expert_merge, unfuse, without_index
from prune_llm.format import BITMASK, OFFSETS, PACKED, QUANT_METHOD, SparseFormat, offsets_dtype
from prune_llm.sparse_checkpoint import (
    VARIANT,
    PackedTensor,
    is_sparse,
    open_sparse,
    sparse_files,
    split_packed,
)
from prune_llm.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    dequantize: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load a checkpoint that `prune` wrote; sparse linears stay packed, in memory as on disk.

    Args:
        model: directory or hub name, of the sparse or the dense form.
        dtype: of the weights; None: as stored.
        device_map: as transformers takes it: "cpu", {"": "cpu"}, "auto", or a table that puts
            modules on "disk" (with ``offload_folder``).
        dequantize: unpack every linear after loading.
        settings: further arguments of ``from_pretrained``.

    Raises:
        ValueError: not a checkpoint, another format version, damaged, incomplete: the message names
            the tensor.
    """
    from transformers import AutoModelForCausalLM

    register()
    directory = locate(model)
    arguments = {"dtype": dtype or "auto", "device_map": device_map, **settings}
    # so that what is wrong comes back, instead of random weights in its place
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if is_sparse(_read_config(directory)):
        open_sparse(directory)  # our messages, before transformers builds anything
    elif not any(file.suffix in (".safetensors", ".bin") for file in directory.iterdir()):
        open_checkpoint(directory)  # says what is missing
    loaded: PreTrainedModel
    loaded, found = AutoModelForCausalLM.from_pretrained(directory, **arguments)
    _refuse_gaps(directory, loaded, found)
    if dequantize and getattr(loaded, "is_quantized", False):
        loaded = loaded.dequantize()
    return loaded


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
        if directory.is_dir():
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
        state = model.state_dict(keep_vars=True)
        for weight in packed.values():
            name = _memory_name(model, weight.name, state)
            _replace(model, name.removesuffix(".weight"), weight)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without the rules that merge experts, where they stay apart."""
        if any(isinstance(module, Experts) for module in model.modules()):
            return [rule for rule in weight_conversions if not is_expert_merge(rule)]
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for module in _sparse_linears(model).values():
            module.requires_grad_(False)  # transformers made new parameters of them
            if module.weight_packed.device.type != "meta":  # else on disk: checked when used
                module.packed_weight()
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
        for name, module in _sparse_linears(model).items():
            if module.weight_packed.device.type == "meta":
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


def _add_shards(checkpoint_files: list[str]) -> None:
    """In place: transformers has the first shard only, when the configuration named it."""
    first = Path(checkpoint_files[0])
    have = {Path(file).name for file in checkpoint_files}
    if f".{VARIANT}-" in first.name:
        others = (str(file) for file in sparse_files(first.parent) if file.name not in have)
        checkpoint_files.extend(others)


def _sparse_linears(model: PreTrainedModel) -> dict[str, SparseLinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, SparseLinear)}


def _replace(model: PreTrainedModel, name: str, weight: PackedTensor) -> None:
    """Put a packed module of the stored sizes, still on the meta device, in a linear's place."""
    from transformers.pytorch_utils import Conv1D

    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
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
    rows, width = weight.shape_OI
    shapes = {suffix: part.shape for suffix, part in weight.parts.items()}
    offsets = None
    if OFFSETS in shapes:
        offsets = torch.empty(shapes[OFFSETS], dtype=offsets_dtype(rows, width), device="meta")
    module = SparseLinear(
        torch.empty(shapes[BITMASK], dtype=torch.uint8, device="meta"),
        torch.empty(shapes[PACKED], dtype=linear.weight.dtype, device="meta"),
        offsets,
        width,
        linear.bias,
        transposed=transposed,
        name=f"{name}.weight",
    )
    model.set_submodule(name, module.train(linear.training))


register()
