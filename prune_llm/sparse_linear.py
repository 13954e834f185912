"""Linear layers over packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prune_llm_kernels import PackedWeight, sparse_linear, unpack

NAMES = ("weight_bitmask", "weight_packed", "weight_offsets")


class SparseLinear(nn.Module):
    """y = x W^T + bias over a packed weight [O, I]; for inference, no gradient flows back.

    The three tensors have the names and the layout of the stored form (format.py), so that a
    state dict of this module is a piece of a sparse checkpoint. They are parameters without
    gradient, not buffers: what offloads a model to disk leaves buffers in memory.

    The tensors are checked against each other when they are first used, and again after they
    were replaced, moved or loaded; the kernels trust what passed.

    Args:
        bitmask, packed, offsets: see `prune_llm_kernels.PackedWeight`; offsets None for N:M. On
            the meta device they stand for tensors that are still to be loaded.
        in_features: I.
        bias: [O] or None.
        transposed: the module this stands for is GPT-2's Conv1D, which stores [I, O]; packed it is
            [O, I] like every other.
        name: of the weight in its model, for error messages.
    """

    def __init__(
        self,
        bitmask: Tensor,
        packed: Tensor,
        offsets: Tensor | None,
        in_features: int,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = bitmask.shape[0]
        self.transposed = transposed
        self.name = name
        self._checked: PackedWeight | None = None
        for key, tensor in zip(NAMES, (bitmask, packed, offsets), strict=True):
            self.register_parameter(key, _frozen(tensor))
        self.register_parameter("bias", _frozen(bias))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the weight's dtype."""
        return sparse_linear(x, self.packed_weight(), self._parameters["bias"])

    def packed_weight(self) -> PackedWeight:
        """The checked weight. Raises ValueError, naming the tensor, when it is damaged."""
        tensors = self._parameters  # not by attribute: this runs for every linear of every token
        checked = self._checked
        if (
            checked is not None
            and checked.packed is tensors["weight_packed"]
            and checked.bitmask is tensors["weight_bitmask"]
            and checked.offsets is tensors["weight_offsets"]
        ):
            return checked
        bitmask, packed, offsets = (tensors[key] for key in NAMES)
        assert bitmask is not None and packed is not None
        checked = PackedWeight(bitmask, packed, offsets, self.in_features, self.name)
        # a hook of accelerate puts the tensors in place for one call and takes them away again;
        # to remember them would keep the whole model in memory
        self._checked = None if hasattr(self, "_hf_hook") else checked
        return checked

    @property
    def weight(self) -> Tensor:
        """The dense weight as the replaced module had it, unpacked at every access.

        For code that asks a linear for its weight, as some models' weight initialisation does;
        nothing here uses it. Changes to it are lost.
        """
        packed = self._parameters["weight_packed"]
        assert packed is not None
        if packed.device.type == "meta":
            dense_OI = packed.new_empty(self.out_features, self.in_features)
        else:
            dense_OI = unpack(self.packed_weight())
        dense = dense_OI.T if self.transposed else dense_OI
        dense._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone
        return dense

    def dequantize(self) -> nn.Module:
        """The dense module: nn.Linear, or Conv1D where this stands for one."""
        weight_OI = unpack(self.packed_weight())
        if self.transposed:
            return self._conv1d(weight_OI)
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features)
        return _fill(dense, weight_OI, self._parameters["bias"])

    def _conv1d(self, weight_OI: Tensor) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense: nn.Module = Conv1D(self.out_features, self.in_features)
        return _fill(dense, weight_OI.T.contiguous(), self._parameters["bias"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._checked = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._checked = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        _, packed, offsets = (self._parameters[key] for key in NAMES)
        kept = 0 if packed is None else packed.numel()
        sparsity = 1 - kept / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._parameters['bias'] is not None}, sparsity={sparsity:.4f}, "
            f"{'N:M' if offsets is None else 'unstructured'}"
        )


def _fill(dense: nn.Module, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    dense.register_parameter("weight", _frozen(weight))
    dense.register_parameter("bias", bias)
    return dense


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
