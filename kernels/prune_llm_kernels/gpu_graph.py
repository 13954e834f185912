"""Operations over fixed buffers as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Recorded:
    """An operation that is recorded when it is called the second time, and replayed from then on.

    The first call compiles kernels and makes the libraries' work spaces, which must not happen in a
    recording. On the CPU every call runs the operation.

    Args:
        operation: reads and writes tensors that keep their addresses, and waits for nothing.
    """

    def __init__(self, operation: Callable[[], None], device: torch.device) -> None:
        self._operation, self._device = operation, device
        self._ran = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._device.type != "cuda" or not self._ran:
            with torch.no_grad():
                self._operation()
            self._ran = True
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            self._operation()
        return graph
