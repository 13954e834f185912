"""A decode step recorded once and replayed: the operations around the linears, over fixed buffers.

A backend has a class with the methods of `Plan`; `new_plan` chooses it. Shape letters: B = rows
(one new token of each sequence), H = query heads, K = key-value heads, D = head size, R = its
rotated part, T = positions, N = pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.dispatch import backend_for
from prune_llm_kernels.kv_cache import KeyValueCache
from prune_llm_kernels.packed_weight import DTYPES, PackedWeight


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Buffers and constants of one layer's attention over one new token of each sequence.

    Attributes:
        q_BHD: not yet rotated; rotated in place.
        k_BKD, v_BKD: of the new token, not yet rotated.
        out_BHD: the result; zeros for a sequence whose position is negative (left out).
        cosine_TR, sine_TR: float32, of the angle of each position and rotated element; elements i
            and i + R/2 turn together (Llama's convention); R even, at most D.
        pages_BN, positions_B: int64; the pages of the row's sequence, and which of its tokens
            this is, from 0: token t lies on page t // page_size. Several rows may be successive
            tokens of one sequence: all are stored before any is attended to.
        scale: of the scores, usually D ** -0.5.
        window: tokens a query sees, itself included; 0: all.
    """

    q_BHD: Tensor
    k_BKD: Tensor
    v_BKD: Tensor
    out_BHD: Tensor
    cosine_TR: Tensor
    sine_TR: Tensor
    cache: KeyValueCache
    pages_BN: Tensor
    positions_B: Tensor
    scale: float
    window: int = 0


@dataclass(frozen=True, slots=True)
class Gate:
    """Which inputs of linears count: |x| * scale > threshold in float32, and every NaN.

    Attributes:
        thresholds_B: float32, one per row, read at every run. Negative: every input counts, and the
            row's result is the same bits alone and beside others; infinite: the row is left out.
        scales_I: float32, of the channels; None: ones.
        counts: int64 [3]; runs add the channels read, the inputs that counted, and the rows.
    """

    thresholds_B: Tensor
    scales_I: Tensor | None = None
    counts: Tensor | None = None


AnyWeight = PackedWeight | ChannelWeight | Tensor


class Plan(Protocol):
    """Operations in the order they were added; `run` replays them with what the buffers then hold.

    Every tensor must be contiguous, stay alive and keep its address: a plan reads and writes it in
    place. All are of the plan's dtype unless said otherwise, and their first dimension is the rows
    of a run. A row's result does not depend on the other rows or on how many there are, but for
    rows that skip inputs beside others (`Gate`).
    """

    def linears(
        self,
        x_BI: Tensor,
        weights: Sequence[AnyWeight],
        biases: Sequence[Tensor | None],
        outs_BO: Sequence[Tensor],
        accumulate: bool = False,
        gate: Gate | None = None,
    ) -> None:
        """out = x W^T + bias for weights that share x; ``accumulate`` adds to out instead.

        Inputs that do not count for ``gate`` are zeros. Weights are either all channel-major or
        all not; those that are not cannot skip anything.
        """

    def swiglu(
        self,
        x_BI: Tensor,
        weights: tuple[ChannelWeight, ChannelWeight],
        biases: tuple[Tensor | None, Tensor | None],
        out_BO: Tensor,
        gate: Gate,
    ) -> None:
        """out = silu(x W1^T + bias1) * (x W2^T + bias2), in one pass over both weights."""

    def rms_norm(self, x_BI: Tensor, weight_I: Tensor, eps: float, out_BI: Tensor) -> None:
        """out = x / sqrt(mean(x^2) + eps) * weight along the last dimension; out may be x."""

    def silu_mul(self, gate_BI: Tensor, up_BI: Tensor, out_BI: Tensor) -> None:
        """out = gate / (1 + e^-gate) * up; out may be gate or up."""

    def attention(self, step: AttentionStep) -> None:
        """Rotate q and k, store k and v in the cache, attend to what the cache then holds."""

    def run(self, rows: int | None = None) -> None:
        """Replay for the first ``rows`` of every buffer; None: all. Nothing else is written.

        Raises:
            ValueError: a position or page is outside the cache, or a buffer has fewer rows; nothing
                was run.
        """


@runtime_checkable
class DevicePlan(Plan, Protocol):
    """A plan whose operations a graph of the caller's can hold: they wait for nothing."""

    def replay(self, rows: int) -> None:
        """One operation after the other; ``rows`` as in `run`, and checked by nobody."""


def new_plan(device_type: str, dtype: torch.dtype) -> Plan:
    """An empty plan of the device's backend.

    Raises:
        ValueError: a dtype no kernel has.
    """
    if dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"dtype {dtype}: plans have {allowed}")
    return backend_for(device_type).new_plan(dtype)


def check_buffer(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a plan can use the tensor in place."""
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; it must be {dtype} "
            f"{list(shape)}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")


def check_linears(
    x_BI: Tensor,
    weights: Sequence[AnyWeight],
    biases: Sequence[Tensor | None],
    outs_BO: Sequence[Tensor],
    dtype: torch.dtype,
    gate: Gate | None = None,
) -> None:
    """What `Plan.linears` asks of its tensors."""
    rows, columns = x_BI.shape
    check_buffer("x", x_BI, dtype, (rows, columns))
    if gate is not None:
        check_buffer("thresholds", gate.thresholds_B, torch.float32, (rows,))
        if gate.scales_I is not None:
            check_buffer("scales", gate.scales_I, torch.float32, (columns,))
        if gate.counts is not None:
            check_buffer("counts", gate.counts, torch.int64, (3,))
    for weight, bias, out in zip(weights, biases, outs_BO, strict=True):
        if isinstance(weight, PackedWeight | ChannelWeight):
            O, I = weight.out_features, weight.in_features
        else:
            O, I = weight.shape
            check_buffer("weight", weight, dtype, (O, I))
        if columns != I or weight.dtype is not dtype:
            raise ValueError(
                f"weight is {weight.dtype} with {I} input features; x is {dtype} with {columns}"
            )
        check_buffer("out", out, dtype, (rows, O))
        if bias is not None:
            check_buffer("bias", bias, dtype, (O,))


def check_step(step: AttentionStep, dtype: torch.dtype) -> None:
    """What `Plan.attention` asks of its tensors."""
    B, H, D = step.q_BHD.shape
    cache = step.cache
    K, R = cache.kv_heads, step.cosine_TR.shape[1]
    N = step.pages_BN.shape[-1]
    T = N * cache.page_size
    if cache.head_size != D or H % K:
        raise ValueError(
            f"q has {H} heads of {D}; the cache has {K} of {cache.head_size}: the number must be a "
            "multiple, the size equal"
        )
    if R % 2 or R > D:
        raise ValueError(f"cosine has {R} columns; it must be even and at most the head size {D}")
    if step.cosine_TR.shape[0] < T:
        raise ValueError(f"cosine has {step.cosine_TR.shape[0]} positions; the pages have {T}")
    for name, tensor, shape in (
        ("q", step.q_BHD, (B, H, D)),
        ("k", step.k_BKD, (B, K, D)),
        ("v", step.v_BKD, (B, K, D)),
        ("out", step.out_BHD, (B, H, D)),
        ("keys", cache.keys, tuple(cache.keys.shape)),
        ("values", cache.values, tuple(cache.values.shape)),
    ):
        check_buffer(name, tensor, dtype, shape)
    for name, tensor in (("cosine", step.cosine_TR), ("sine", step.sine_TR)):
        check_buffer(name, tensor, torch.float32, tuple(step.cosine_TR.shape))
    check_buffer("pages", step.pages_BN, torch.int64, (B, N))
    check_buffer("positions", step.positions_B, torch.int64, (B,))


def check_places(step: AttentionStep, rows: int) -> None:
    """Raise ValueError where a row to be run has no place in the cache."""
    cache, most = step.cache, step.pages_BN.shape[1] * step.cache.page_size
    positions = step.positions_B[:rows].tolist()
    for pages, position in zip(step.pages_BN[:rows].tolist(), positions, strict=True):
        if position >= most:
            raise ValueError(f"position {position}: the row's pages hold {most} tokens")
        for page in pages[: position // cache.page_size + 1]:
            if position >= 0 and not 0 <= page < cache.pages:
                raise ValueError(f"page {page}: the cache has {cache.pages}")


def check_rows(rows: int, most: int) -> int:
    """``rows``; ValueError where a plan whose smallest buffer has ``most`` cannot run as many."""
    if not 0 < rows <= most:
        raise ValueError(f"rows {rows}: must be between 1 and the {most} of the plan's buffers")
    return rows
