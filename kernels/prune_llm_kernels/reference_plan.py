"""Plans in plain PyTorch: the specification of `prune_llm_kernels.plan.Plan`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

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
from prune_llm_kernels.reference import counting, dense_linear, unpack, unpack_channels


class ReferencePlan:
    """Runs each operation in float32 (float64 where the plan's dtype is) and rounds it once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._operations: list[Callable[[int], object]] = []  # each is told the rows of the run
        self._steps: list[AttentionStep] = []
        self._fewest: int | None = None  # rows of the smallest buffer

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
        self._add(x_BI, partial(_gather, x_BI, gate))
        for weight, bias, out in zip(weights, biases, outs_BO, strict=True):
            self._add(x_BI, partial(_linear, x_BI, weight, bias, out, accumulate, gate))

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
        check_buffer("out", out_BI, self._dtype, tuple(x_BI.shape))
        norm = partial(rms_norm, weight_I=weight_I, eps=eps)
        self._add(x_BI, lambda n: out_BI[:n].copy_(norm(x_BI[:n].float())))

    def silu_mul(self, gate_BI: Tensor, up_BI: Tensor, out_BI: Tensor) -> None:
        check_buffer("up", up_BI, self._dtype, tuple(gate_BI.shape))
        check_buffer("out", out_BI, self._dtype, tuple(gate_BI.shape))
        self._add(
            gate_BI,
            lambda n: out_BI[:n].copy_(_by_row(silu_mul, gate_BI[:n].float(), up_BI[:n].float())),
        )

    def attention(self, step: AttentionStep) -> None:
        check_step(step, self._dtype)
        self._steps.append(step)
        self._add(step.q_BHD, partial(_attend, step))

    def _add(self, buffer_B: Tensor, operation: Callable[[int], object]) -> None:
        rows = len(buffer_B)
        self._fewest = rows if self._fewest is None else min(self._fewest, rows)
        self._operations.append(operation)

    def run(self, rows: int | None = None) -> None:
        if self._fewest is None:
            return
        # slices end where a buffer ends: None runs every row of buffers of different lengths
        count = sys.maxsize if rows is None else check_rows(rows, self._fewest)
        for step in self._steps:
            check_places(step, count)
        for operation in self._operations:
            operation(count)


def _gather(x_BI: Tensor, gate: Gate | None, rows: int) -> None:
    """Count what a gate lets through."""
    if gate is None or gate.counts is None:
        return
    counted_BI = counting(x_BI[:rows], gate.thresholds_B[:rows], gate.scales_I)
    live = int((gate.thresholds_B[:rows] < torch.inf).sum())
    listed, counted = int(counted_BI.any(0).sum()), int(counted_BI.sum())
    gate.counts.add_(torch.tensor([listed, counted, live]))


def _linear(
    x_BI: Tensor,
    weight: AnyWeight,
    bias: Tensor | None,
    out_BO: Tensor,
    accumulate: bool,
    gate: Gate | None,
    rows: int,
) -> None:
    x_BI, out_BO = x_BI[:rows], out_BO[:rows]
    if gate is not None:
        x_BI = torch.where(counting(x_BI, gate.thresholds_B[:rows], gate.scales_I), x_BI, 0)
    if isinstance(weight, ChannelWeight):
        weight_OI = unpack_channels(weight)
    elif isinstance(weight, PackedWeight):
        weight_OI = unpack(weight.bitmask, weight.packed, weight.offsets, weight.in_features)
    else:
        weight_OI = weight
    y_BO = _by_row(partial(dense_linear, weight_OI=weight_OI, bias=bias), x_BI)
    out_BO.copy_(out_BO + y_BO if accumulate else y_BO)


def _by_row(function: Callable[..., Tensor], *tensors_B: Tensor) -> Tensor:
    """Of each row alone: torch takes other paths, with other bits, where there are more."""
    return torch.cat([function(*row) for row in zip(*(x.split(1) for x in tensors_B), strict=True)])


def rms_norm(x_BI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of x (Zhang & Sennrich 2019, eq. 4)."""
    mean = x_BI.square().mean(-1, keepdim=True)
    return x_BI * torch.rsqrt(mean + eps) * weight_I.to(x_BI.dtype)


def silu_mul(gate_BI: Tensor, up_BI: Tensor) -> Tensor:
    """SwiGLU's product (Shazeer 2020): gate * sigmoid(gate) * up."""
    return gate_BI * torch.sigmoid(gate_BI) * up_BI


def rotate(x_BHD: Tensor, cosine_BR: Tensor, sine_BR: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of the first R elements; i and i + R/2 turn together."""
    R = cosine_BR.shape[-1]
    turned, rest = x_BHD[..., :R], x_BHD[..., R:]
    low, high = turned.chunk(2, dim=-1)
    other = torch.cat([-high, low], dim=-1)
    turned = turned * cosine_BR[:, None] + other * sine_BR[:, None]
    return torch.cat([turned, rest], dim=-1)


def attend(
    q_HD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, scale: float, window: int = 0
) -> Tensor:
    """softmax(scale q k^T) v of one query behind T keys, [H, D], in the dtype of q."""
    if window > 0:
        keys_KTD, values_KTD = keys_KTD[:, -window:], values_KTD[:, -window:]
    group = len(q_HD) // len(keys_KTD)
    keys_HTD = keys_KTD.to(q_HD.dtype).repeat_interleave(group, 0)
    values_HTD = values_KTD.to(q_HD.dtype).repeat_interleave(group, 0)
    scores_HT = torch.einsum("hd,htd->ht", q_HD, keys_HTD) * scale
    return torch.einsum("ht,htd->hd", scores_HT.softmax(-1), values_HTD)


def _attend(step: AttentionStep, rows: int) -> None:
    step.out_BHD[:rows].zero_()
    positions = step.positions_B[:rows].tolist()
    live = [(b, position) for b, position in enumerate(positions) if position >= 0]
    for b, position in live:
        page, offset = divmod(position, step.cache.page_size)
        angles = step.cosine_TR[position][None], step.sine_TR[position][None]
        q_HD, k_KD = step.q_BHD[b], step.k_BKD[b]
        q_HD.copy_(rotate(q_HD[None].float(), *angles)[0])
        rotated_KD = rotate(k_KD[None].float(), *angles)[0].to(k_KD.dtype)
        at = int(step.pages_BN[b, page])
        step.cache.write(at, offset, rotated_KD[:, None], step.v_BKD[b][:, None])
    for b, position in live:
        pages = step.pages_BN[b, : position // step.cache.page_size + 1].tolist()
        keys_KTD, values_KTD = step.cache.read(pages, position + 1)
        q_HD = step.q_BHD[b].float()
        step.out_BHD[b] = attend(q_HD, keys_KTD, values_KTD, step.scale, step.window)
