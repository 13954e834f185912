"""How long something takes where it runs: by the host's clock, or by a GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prune_llm_kernels import cpu

Call = Callable[[], object]


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def clock(calls: Sequence[Call], device: torch.device) -> Callable[[], list[float]]:
    """Makes the calls and tells the seconds of each.

    On a GPU they are recorded in one CUDA graph, and each counts as the mean of a replay between
    two events: the host, slower than a small kernel, is not measured.
    """
    if device.type != "cuda":
        return lambda: [seconds_of(call) for call in calls]
    for call in calls:
        call()  # compiles, which no graph records
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return lambda: [_replay_seconds(graph, device) / len(calls)] * len(calls)


def _replay_seconds(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def read_all(buffer: Tensor) -> None:
    """Read a buffer that is larger than all caches, as fast as the memory delivers it."""
    if buffer.is_cuda:
        buffer.sum()
    else:
        cpu.read_all(buffer)


def threads_on(device: torch.device) -> int | None:
    """Threads of a CPU; None: a GPU computes."""
    return None if device.type == "cuda" else torch.get_num_threads()
