"""Plans of the CPU backend: recorded in C++, replayed in one call on torch's threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prune_llm_kernels import _C
from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.cpu import dtype_code, isa_index, offset_arguments
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


class CpuPlan:
    """See `prune_llm_kernels.plan.Plan`. Results do not depend on the number of threads."""

    def __init__(self, dtype: torch.dtype, isa: str | None = None) -> None:
        self._dtype = dtype
        self._plan = _C.Plan(isa_index(isa), dtype_code(dtype))
        self._alive: list[object] = []  # the plan holds addresses only
        self._steps: list[AttentionStep] = []
        self._fewest: int | None = None  # rows of the smallest buffer

    def _row_count(self, buffer_B: Tensor) -> int:
        """Rows of an operation; noted, because a run must not ask for more."""
        rows = len(buffer_B)
        self._fewest = rows if self._fewest is None else min(self._fewest, rows)
        return rows

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
        self._alive += [x_BI, *weights, *biases, *outs_BO, gate]
        if any(isinstance(weight, ChannelWeight) for weight in weights):
            if gate is None:
                gate = Gate(torch.full((len(x_BI),), -1.0))
                self._alive.append(gate)
            self._channels(x_BI, weights, biases, outs_BO, gate, accumulate)
            return
        if gate is not None:
            raise ValueError("gate: needs channel-major weights; convert them with to_channels")
        entries = [
            (*_weight_arguments(weight), _address(bias), out.data_ptr())
            for weight, bias, out in zip(weights, biases, outs_BO, strict=True)
        ]
        rows, columns = self._row_count(x_BI), x_BI.shape[1]
        self._plan.linears(x_BI.data_ptr(), rows, columns, entries, accumulate)

    def swiglu(
        self,
        x_BI: Tensor,
        weights: tuple[ChannelWeight, ChannelWeight],
        biases: tuple[Tensor | None, Tensor | None],
        out_BO: Tensor,
        gate: Gate,
    ) -> None:
        check_linears(x_BI, weights, biases, [out_BO, out_BO], self._dtype, gate)
        self._alive += [x_BI, *weights, *biases, out_BO, gate]
        self._channels(x_BI, weights, biases, [out_BO, out_BO], gate, gated=True)

    def _channels(
        self,
        x_BI: Tensor,
        weights: Sequence[AnyWeight],
        biases: Sequence[Tensor | None],
        outs_BO: Sequence[Tensor],
        gate: Gate,
        accumulate: bool = False,
        gated: bool = False,
    ) -> None:
        entries = []
        for weight, bias, out in zip(weights, biases, outs_BO, strict=True):
            if not isinstance(weight, ChannelWeight):
                raise ValueError("weights: some are channel-major and some are not; convert all")
            entries.append((*_channel_arguments(weight), _address(bias), out.data_ptr()))
        gate_at = _address(gate.scales_I), gate.thresholds_B.data_ptr(), _address(gate.counts)
        rows, columns = self._row_count(x_BI), x_BI.shape[1]
        self._plan.channels(x_BI.data_ptr(), rows, columns, *gate_at, entries, accumulate, gated)

    def rms_norm(self, x_BI: Tensor, weight_I: Tensor, eps: float, out_BI: Tensor) -> None:
        width = x_BI.shape[-1]
        check_buffer("x", x_BI, self._dtype, tuple(x_BI.shape))
        check_buffer("weight", weight_I, self._dtype, (width,))
        check_buffer("out", out_BI, self._dtype, tuple(x_BI.shape))
        self._alive += [x_BI, weight_I, out_BI]
        rows = self._row_count(x_BI)
        heads = x_BI.numel() // (rows * width)
        self._plan.rms_norm(
            x_BI.data_ptr(), weight_I.data_ptr(), out_BI.data_ptr(), rows, heads, width, eps
        )

    def silu_mul(self, gate_BI: Tensor, up_BI: Tensor, out_BI: Tensor) -> None:
        for name, tensor in (("gate", gate_BI), ("up", up_BI), ("out", out_BI)):
            check_buffer(name, tensor, self._dtype, tuple(gate_BI.shape))
        self._alive += [gate_BI, up_BI, out_BI]
        rows = self._row_count(gate_BI)
        self._plan.silu_mul(
            gate_BI.data_ptr(), up_BI.data_ptr(), out_BI.data_ptr(), rows, gate_BI.numel() // rows
        )

    def attention(self, step: AttentionStep) -> None:
        check_step(step, self._dtype)
        self._steps.append(step)
        B, H, D = self._row_count(step.q_BHD), *step.q_BHD.shape[1:]
        cache = step.cache
        self._plan.attention(
            (
                step.q_BHD.data_ptr(),
                step.k_BKD.data_ptr(),
                step.v_BKD.data_ptr(),
                step.out_BHD.data_ptr(),
            ),
            (step.cosine_TR.data_ptr(), step.sine_TR.data_ptr()),
            (cache.keys.data_ptr(), cache.values.data_ptr()),
            (step.pages_BN.data_ptr(), step.positions_B.data_ptr()),
            B,
            H,
            cache.kv_heads,
            D,
            step.cosine_TR.shape[1],
            cache.page_size,
            cache.pages,
            step.pages_BN.shape[1],
            step.window,
            step.scale,
        )

    def run(self, rows: int | None = None) -> None:
        if self._fewest is None:
            return
        # None runs every row of buffers of different lengths
        count = -1 if rows is None else check_rows(rows, self._fewest)
        if not self._plan.run(torch.get_num_threads(), count):
            for step in self._steps:
                check_places(step, len(step.positions_B) if rows is None else rows)
            raise AssertionError("the plan refused to run and every place fits")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _channel_arguments(weight: ChannelWeight) -> tuple[int, int, int, int, int]:
    """data, starts, O, tile, pitch."""
    pitch = weight.data.shape[1] if weight.starts is None else 0
    starts = _address(weight.starts)
    return weight.data.data_ptr(), starts, weight.out_features, weight.tile, pitch


def _weight_arguments(weight: AnyWeight) -> tuple[int, int, int, int, int, int]:
    """bitmask, values, offsets, bytes of an offset, O, nnz."""
    assert not isinstance(weight, ChannelWeight)
    if isinstance(weight, Tensor):
        return 0, weight.data_ptr(), 0, 0, weight.shape[0], weight.numel()
    return (
        weight.bitmask.data_ptr(),
        weight.packed.data_ptr(),
        *offset_arguments(weight.offsets),
        weight.out_features,
        weight.packed.numel(),
    )
