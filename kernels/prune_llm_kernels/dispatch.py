"""Which backend runs an op: one per device, or the one that PRUNE_LLM_BACKEND names."""

from __future__ import annotations

import functools
import os
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prune_llm_kernels.channel_weight import ChannelWeight
    from prune_llm_kernels.packed_weight import PackedWeight
    from prune_llm_kernels.plan import Plan


class Backend(Protocol):
    """What a backend module defines; reference.py is the specification."""

    def check_contents(
        self, bitmask: Tensor, packed: Tensor, offsets: Tensor | None, columns: int
    ) -> None: ...

    def settle(self, tensor: Tensor) -> None: ...

    def unpack(
        self, bitmask: Tensor, packed: Tensor, offsets: Tensor | None, columns: int
    ) -> Tensor: ...

    def sparse_linear(
        self,
        x: Tensor,
        bitmask: Tensor,
        packed: Tensor,
        offsets: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor: ...

    def dense_linear(self, x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor: ...

    def choose_tile(self, out_features: int) -> int: ...

    def pack_channels(self, weight: PackedWeight, tile: int) -> ChannelWeight: ...

    def channel_keep_mask(self, weight: ChannelWeight) -> Tensor: ...

    def unpack_channels(self, weight: ChannelWeight) -> Tensor: ...

    def channel_linear(self, x: Tensor, weight: ChannelWeight, bias: Tensor | None) -> Tensor: ...

    def new_plan(self, dtype: torch.dtype) -> Plan: ...


# name -> module, imported at first use
BACKENDS = {
    "cpu": "prune_llm_kernels.cpu",
    "gpu": "prune_llm_kernels.gpu",
    "reference": "prune_llm_kernels.reference",
}
# device type -> name; the reference runs anywhere, but only when it is asked for
_DEFAULTS = {"cpu": "cpu", "cuda": "gpu"}


@functools.cache
def backend_for(device_type: str) -> Backend:
    """The backend of a device ("cpu", "cuda"); chosen at the first call for the device.

    Raises:
        ValueError: PRUNE_LLM_BACKEND names no backend, or the device has none.
        ImportError: the backend is not built; the message says how to build it.
    """
    name = os.environ.get("PRUNE_LLM_BACKEND") or _DEFAULTS.get(device_type)
    if name is None:
        raise ValueError(
            f"no kernel for device {device_type!r}; move the model to one of {sorted(_DEFAULTS)},"
            " or set PRUNE_LLM_BACKEND=reference (slow)"
        )
    if name not in BACKENDS:
        raise ValueError(f"PRUNE_LLM_BACKEND is {name!r}; it must be one of {sorted(BACKENDS)}")
    if name not in ("reference", _DEFAULTS.get(device_type)):
        raise ValueError(
            f"PRUNE_LLM_BACKEND is {name!r}, which cannot run on device {device_type!r}"
        )
    return cast(Backend, import_module(BACKENDS[name]))
