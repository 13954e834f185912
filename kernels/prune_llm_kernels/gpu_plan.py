"""Plans on a GPU: one CUDA graph for each number of rows, replayed without the host.

Positions, pages and thresholds are read on the device, so that a graph serves every token, sequence
and level. What a row's page table could hold behind its position costs nothing but idle programs.

Where a row's bits may depend on the number of rows: torch's dense product and ours choose other
kernels for other numbers, and attention is cut into other splits. Two runs of as many rows are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import gpu, gpu_step
from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.packed_weight import PackedWeight
from prune_llm_kernels.plan import (
    AnyWeight,
    AttentionStep,
    Gate,
    check_buffer,
    check_linears,
    check_places,
    check_rows,
    check_step,
)
from prune_llm_kernels.reference import counting

Operation = Callable[[int], object]  # is told the rows of the run


class GpuPlan:
    """A plan over CUDA tensors; over CPU tensors in Triton's interpreter, without graphs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._operations: list[Operation] = []
        self._steps: list[AttentionStep] = []
        self._fewest: int | None = None  # rows of the smallest buffer
        self._device = torch.device("cpu")
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: has run once

    def linears(
        self,
        x_BI: Tensor,
        weights: Sequence[AnyWeight],
        biases: Sequence[Tensor | None],
        outs_BO: Sequence[Tensor],
        accumulate: bool = False,
        gate: Gate | None = None,
    ) -> None:
        check_linears(x_BI, weights, biases, outs_BO, self._dtype, gate)
        for weight in weights:
            if isinstance(weight, PackedWeight):
                raise ValueError("a packed weight is in rows; a GPU decodes to_channels(weight)")
            if gate is not None and not isinstance(weight, ChannelWeight):
                raise ValueError("skipping inputs needs channel-major weights: to_channels(weight)")
        parts = list(zip(weights, biases, outs_BO, strict=True))
        self._add(x_BI, partial(_linears, x_BI, parts, accumulate, gate))

    def swiglu(
        self,
        x_BI: Tensor,
        weights: tuple[ChannelWeight, ChannelWeight],
        biases: tuple[Tensor | None, Tensor | None],
        out_BO: Tensor,
        gate: Gate,
    ) -> None:
        gate_BO, up_BO = out_BO.clone(), out_BO.clone()
        self.linears(x_BI, weights, biases, [gate_BO, up_BO], gate=gate)
        self.silu_mul(gate_BO, up_BO, out_BO)

    def rms_norm(self, x_BI: Tensor, weight_I: Tensor, eps: float, out_BI: Tensor) -> None:
        check_buffer("weight", weight_I, self._dtype, (x_BI.shape[-1],))
        for name, buffer in (("x", x_BI), ("out", out_BI)):
            check_buffer(name, buffer, self._dtype, tuple(x_BI.shape))
        self._add(x_BI, lambda n: gpu_step.rms_norm(x_BI[:n], weight_I, eps, out_BI[:n]))

    def silu_mul(self, gate_BI: Tensor, up_BI: Tensor, out_BI: Tensor) -> None:
        for name, buffer in (("gate", gate_BI), ("up", up_BI), ("out", out_BI)):
            check_buffer(name, buffer, self._dtype, tuple(gate_BI.shape))
        self._add(gate_BI, lambda n: gpu_step.silu_mul(gate_BI[:n], up_BI[:n], out_BI[:n]))

    def attention(self, step: AttentionStep) -> None:
        check_step(step, self._dtype)
        self._steps.append(step)
        self._add(step.q_BHD, partial(gpu_step.attention, step))

    def _add(self, buffer_B: Tensor, operation: Operation) -> None:
        rows = len(buffer_B)
        self._fewest = rows if self._fewest is None else min(self._fewest, rows)
        self._device = buffer_B.device
        self._operations.append(operation)
        self._graphs.clear()

    def run(self, rows: int | None = None) -> None:
        """As Plan.run. On a GPU positions and pages are not checked: that would wait for it.

        The first run of a number of rows compiles, the second records a graph.
        """
        if self._fewest is None:
            return
        count = check_rows(self._fewest if rows is None else rows, self._fewest)
        if self._device.type != "cuda":
            for step in self._steps:
                check_places(step, count)
            self._replay(count)
        elif count not in self._graphs:
            self._replay(count)
            self._graphs[count] = None
        else:
            self._graph(count).replay()

    def _replay(self, rows: int) -> None:
        with torch.no_grad():
            for operation in self._operations:
                operation(rows)

    def _graph(self, rows: int) -> torch.cuda.CUDAGraph:
        found = self._graphs[rows]
        if found is None:
            found = torch.cuda.CUDAGraph()
            with torch.cuda.graph(found):
                self._replay(rows)
            self._graphs[rows] = found
        return found


def _linears(
    x_BI: Tensor,
    parts: Sequence[tuple[AnyWeight, Tensor | None, Tensor]],
    accumulate: bool,
    gate: Gate | None,
    rows: int,
) -> None:
    x_BI, channels = x_BI[:rows], None
    if gate is not None:
        channels = gpu.list_channels(x_BI, gate.thresholds_B[:rows], gate.scales_I)
        _count(x_BI, gate, channels)
    for weight, bias, out in parts:
        if isinstance(weight, Tensor):
            y_BO = F.linear(x_BI, weight, bias)
        elif channels is None:
            assert isinstance(weight, ChannelWeight)
            y_BO = gpu.channel_linear(x_BI, weight, bias)
        else:
            assert isinstance(weight, ChannelWeight)
            y_BO = gpu.listed_linear(channels, weight, bias)
        out[:rows].copy_(out[:rows] + y_BO if accumulate else y_BO)


def _count(x_BI: Tensor, gate: Gate, channels: gpu.ChannelList) -> None:
    """Add what a gate lets through to its counts, on the device."""
    if gate.counts is None:
        return
    thresholds_B = gate.thresholds_B[: len(x_BI)]
    counted = counting(x_BI, thresholds_B, gate.scales_I).sum()
    listed, live = channels.counts_C.sum(), (thresholds_B < torch.inf).sum()
    gate.counts.add_(torch.stack([listed, counted, live]))
