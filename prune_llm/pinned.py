"""Data of the host on its way to a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def host_to(device: torch.device, host: Tensor) -> Tensor:
    """A copy of a CPU tensor on the device; on the CPU the tensor itself.

    To a GPU it goes through pinned memory, which torch keeps until the copy is over.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def host_buffer(like: Tensor) -> Tensor:
    """Zeros on the host that a device can copy to while the host goes on."""
    pinned = like.device.type == "cuda"
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=pinned)
