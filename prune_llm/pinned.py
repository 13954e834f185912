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


class HostCopy:
    """A copy on the host of what a device computes; from a GPU on its way, into pinned memory.

    On the CPU it is the tensor itself.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        """The values, whole."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
