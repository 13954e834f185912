"""Linear layers over channel-major weights: the form that decode with skipped inputs needs.

A model is converted in place, linear by linear, when the first level is chosen: there is never a
second copy of its weights. Saved, it is what it was.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prune_llm.sparse_linear import SparseLinear
from prune_llm_kernels import ChannelWeight, PackedWeight, channel_linear, to_channels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ChannelLinear(nn.Module):
    """y = x W^T + bias; a single row of x skips its zeros. For inference.

    Args:
        weight: the runtime layout; it is no parameter and does not move with the module.
        bias: [O] or None.
        transposed: stands for GPT-2's Conv1D, which stores [I, O].
        name: of the weight in its model, for error messages.
    """

    def __init__(
        self,
        weight: ChannelWeight,
        bias: nn.Parameter | None,
        *,
        transposed: bool = False,
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.channel_weight = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.transposed = transposed
        self.name = name
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the weight's dtype."""
        return channel_linear(x, self.channel_weight, self._parameters["bias"])

    @property
    def weight(self) -> Tensor:
        """The dense weight as the replaced module had it, made at every access."""
        dense_OI = self.channel_weight.dense()
        return dense_OI.T if self.transposed else dense_OI

    def restored(self) -> nn.Module:
        """The module that this one replaced."""
        stored, bias = self.channel_weight.stored(), self._parameters["bias"]
        if isinstance(stored, PackedWeight):
            parts = stored.bitmask, stored.packed, stored.offsets
            return SparseLinear(
                *parts, self.in_features, bias, transposed=self.transposed, name=self.name
            )
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                module: nn.Module = Conv1D(self.out_features, self.in_features)
            stored = stored.T.contiguous()
        else:
            with torch.device("meta"):
                module = nn.Linear(self.in_features, self.out_features, bias=False)
        module.register_parameter("weight", nn.Parameter(stored, requires_grad=False))
        module.register_parameter("bias", bias)
        return module

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.restored()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        weight = self.channel_weight
        form = "dense" if weight.starts is None else "packed"
        return f"in_features={self.in_features}, out_features={self.out_features}, {form}"


def use_channels(model: PreTrainedModel, names: Collection[str]) -> None:
    """Convert linears of a loaded model to channel-major order, in place. Idempotent.

    Raises:
        ValueError: a linear is offloaded, on another device, or of an unknown kind.
    """
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, ChannelLinear):
            model.set_submodule(name, _converted(module, name))


def packed_linears(model: PreTrainedModel) -> list[str]:
    """Names of the linears whose weights are packed in rows."""
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def _converted(module: nn.Module, name: str) -> ChannelLinear:
    from transformers.pytorch_utils import Conv1D

    if hasattr(module, "_hf_hook"):
        raise ValueError(f"{name}: is offloaded; levels need the model in memory")
    bias = module._parameters.get("bias")
    if isinstance(module, SparseLinear):
        channels = to_channels(module.packed_weight())
        return ChannelLinear(channels, bias, transposed=module.transposed, name=module.name)
    if not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(f"{name}: is a {type(module).__name__}, which has no channel-major form")
    transposed = isinstance(module, Conv1D)
    weight = module.weight.detach()
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: is on {weight.device}; levels need the CPU or CUDA")
    channels = to_channels(weight.T if transposed else weight)
    return ChannelLinear(channels, bias, transposed=transposed, name=f"{name}.weight")
