"""The fused experts of a block over packed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prune_llm.experts import Gate, Layout, RoutedExperts
from prune_llm.format import BITMASK, OFFSETS, PACKED
from prune_llm.sparse_linear import SparseLinear
from prune_llm_kernels import PackedWeight, sparse_linear, unpack

PARTS = (BITMASK, PACKED, OFFSETS)


class SparseExperts(RoutedExperts):
    """Experts whose checkpoint has them in one tensor, packed (see `format`); for inference.

    The parameters have the names and the layout of the stored form, as those of `SparseLinear`:
    ``gate_up_proj_bitmask`` [E, O, B] and so on, ``gate_up_proj_bias`` [E, O]. A fused tensor that
    is stored dense stays as it is. All experts are checked when the first is used, and again after
    tensors were replaced, moved or loaded.

    Args:
        fused: the module that this one stands for, on the meta device.
        layout: how its weights lie on disk.
        parts: of each packed tensor by its name in the module; suffix -> tensor, on meta.
        in_features: I of each packed tensor.
        name: of the module in its model, for error messages.

    Attributes:
        stored_names: what the packed tensors are called on disk.
    """

    def __init__(
        self,
        fused: Any,
        layout: Layout,
        parts: dict[str, dict[str, Tensor]],
        in_features: dict[str, int],
        name: str = "experts",
    ) -> None:
        super().__init__(len(fused.down_proj), Gate(fused))
        self.layout, self.in_features, self.name = layout, in_features, name
        self.stored_names: dict[str, str] = {}
        self._checked: dict[str, tuple[tuple[Any, ...], list[PackedWeight]]] = {}
        for leaf in layout.names:
            if leaf in parts:
                for suffix, tensor in parts[leaf].items():
                    self.register_parameter(leaf + suffix, nn.Parameter(tensor, False))
            else:
                self.register_parameter(leaf, fused._parameters[leaf])
            if layout.bias:
                self.register_parameter(f"{leaf}_bias", fused._parameters[f"{leaf}_bias"])
        self.requires_grad_(False)

    def expert(self, index: int, x_nD: Tensor) -> Tensor:
        first, down = self.layout.names
        return self._linear(down, index, self.gate(self._linear(first, index, x_nD)))

    def _linear(self, leaf: str, index: int, x_nI: Tensor) -> Tensor:
        biases_EO = self._parameters.get(f"{leaf}_bias")
        bias_O = None if biases_EO is None else biases_EO[index]
        dense = self._parameters.get(leaf)
        if dense is None:
            return sparse_linear(x_nI, self.packed_weights(leaf)[index], bias_O)
        weight_OI = dense[index].T if self.layout.transposed else dense[index]
        return nn.functional.linear(x_nI, weight_OI, bias_O)

    @property
    def packed_names(self) -> list[str]:
        """Of the fused tensors that are packed."""
        return [leaf for leaf in self.layout.names if leaf + PACKED in self._parameters]

    def packed_weights(self, leaf: str) -> list[PackedWeight]:
        """The checked weights, one for each expert. ValueError, naming the tensor, when damaged."""
        tensors = tuple(self._parameters.get(leaf + suffix) for suffix in PARTS)
        known = self._checked.get(leaf)
        if known is not None and all(a is b for a, b in zip(known[0], tensors, strict=True)):
            return known[1]
        weights = self._checked_weights(leaf, *tensors)
        if not hasattr(self, "_hf_hook"):  # see SparseLinear
            self._checked[leaf] = (tensors, weights)
        return weights

    def _checked_weights(
        self, leaf: str, bitmask: Any, packed: Any, offsets: Any
    ) -> list[PackedWeight]:
        if offsets is None:
            values = list(packed)
        else:
            counts = offsets[:, -1].tolist()
            if min(counts) < 0 or sum(counts) != packed.numel():
                raise ValueError(
                    f"{self.name}.{leaf}{OFFSETS} lead to value {sum(counts)} of {packed.numel()}; "
                    "get the checkpoint again"
                )
            values = list(packed.split(counts))
        return [
            PackedWeight(
                bitmask[index].data,
                values[index].data,
                None if offsets is None else offsets[index].data,
                self.in_features[leaf],
                f"{self.name}.{leaf}[{index}]",
            )
            for index in range(self.count)
        ]

    def dequantize(self) -> nn.Module:
        """The module that this one stands for, with dense weights."""
        dense: Any = copy.copy(self.gate.owner)
        dense._parameters = {k: p for k, p in self._parameters.items() if not k.endswith(PARTS)}
        for leaf in self.packed_names:
            first = self.packed_weights(leaf)[0]
            shape_OI = (first.out_features, first.in_features)
            shape = shape_OI[::-1] if self.layout.transposed else shape_OI
            fused = torch.empty(self.count, *shape, dtype=first.dtype, device=first.packed.device)
            for index, weight in enumerate(self.packed_weights(leaf)):
                weight_OI = unpack(weight)
                fused[index] = weight_OI.T if self.layout.transposed else weight_OI
            dense._parameters[leaf] = nn.Parameter(fused, requires_grad=False)
        module: nn.Module = dense
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseExperts:
        self._checked.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._checked.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"experts={self.count}, packed={', '.join(self.packed_names)}"


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """All packed weights of a model by name: its linears', and those of single experts."""
    found: dict[str, PackedWeight] = {}
    for path, module in model.named_modules():
        if isinstance(module, SparseLinear):
            found[path] = module.packed_weight()
        elif isinstance(module, SparseExperts):
            for leaf in module.packed_names:
                weights = module.packed_weights(leaf)
                found |= {f"{path}.{i}.{leaf}": weight for i, weight in enumerate(weights)}
    return found
