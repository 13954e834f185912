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

from prune_llm_kernels import gpu_step
from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.gpu_graph import Recorded
from prune_llm_kernels.gpu_linears import Input, Linears, SwiGLU, parts
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

Operation = Callable[[int], object]  # is told the rows of the run


class GpuPlan:
    """A plan over CUDA tensors; over CPU tensors in Triton's interpreter, without graphs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._operations: list[Operation] = []
        self._steps: list[AttentionStep] = []
        self._fewest: int | None = None  # rows of the smallest buffer
        self._device = torch.device("cpu")
        self._recorded: dict[int, Recorded] = {}

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
        found = parts(weights, biases, outs_BO)
        if gate is not None and not all(isinstance(w, ChannelWeight) for w in weights):
            raise ValueError("skipping inputs needs channel-major weights: to_channels(weight)")
        source, last = Input(x_BI, gate), self._operations[-1] if self._operations else None
        if gate is not None and isinstance(last, SwiGLU) and last.out_BO is x_BI:
            last.following = source  # its epilogue makes the list
        self._add(x_BI, Linears(source, found, accumulate))

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
        last = self._operations[-1] if self._operations else None
        if isinstance(last, Linears) and not last.accumulate:
            outs = [part.out_BO for part in last.parts]
            if len(outs) == 2 and outs[0] is gate_BI and outs[1] is up_BI:
                self._operations[-1] = SwiGLU(last, out_BI)
                self._recorded.clear()
                return
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
        self._recorded.clear()

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
        if count not in self._recorded:
            self._recorded[count] = Recorded(partial(self.replay, count), self._device)
        self._recorded[count]()

    def replay(self, rows: int) -> None:
        """As DevicePlan.replay."""
        for operation in self._operations:
            operation(rows)
