"""Plans on a GPU: one CUDA graph for each number of rows, replayed without the host.

The operations are the linears' kernels and torch's. Positions, pages and thresholds are read on the
device, so that a graph serves every token, sequence and level. Every query reads all pages of its
row and masks what lies behind its position: give rows as many pages as their context needs.

Where a row's bits may depend on the number of rows: torch's dense product and ours choose other
kernels for other numbers. Two runs of as many rows are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.gpu_linears import Input, Linears, SwiGLU, parts
from prune_llm_kernels.kv_cache import LANES, KeyValueCache
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
from prune_llm_kernels.reference_plan import rms_norm, rotate, silu_mul

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
        check_buffer("out", out_BI, self._dtype, tuple(x_BI.shape))
        norm = partial(rms_norm, weight_I=weight_I, eps=eps)
        self._add(x_BI, lambda n: out_BI[:n].copy_(norm(x_BI[:n].float())))

    def silu_mul(self, gate_BI: Tensor, up_BI: Tensor, out_BI: Tensor) -> None:
        check_buffer("up", up_BI, self._dtype, tuple(gate_BI.shape))
        check_buffer("out", out_BI, self._dtype, tuple(gate_BI.shape))
        last = self._operations[-1] if self._operations else None
        if isinstance(last, Linears) and not last.accumulate:
            outs = [part.out_BO for part in last.parts]
            if len(outs) == 2 and outs[0] is gate_BI and outs[1] is up_BI:
                self._operations[-1] = SwiGLU(last, out_BI)
                self._graphs.clear()
                return
        self._add(
            gate_BI,
            lambda n: out_BI[:n].copy_(silu_mul(gate_BI[:n].float(), up_BI[:n].float())),
        )

    def attention(self, step: AttentionStep) -> None:
        check_step(step, self._dtype)
        self._steps.append(step)
        self._add(step.q_BHD, partial(_attend, step))

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


def _attend(step: AttentionStep, rows: int) -> None:
    """Rotate, store, attend; no shape depends on a position."""
    positions_B, cache = step.positions_B[:rows], step.cache
    at_B = positions_B.clamp(min=0)
    angles = step.cosine_TR[at_B], step.sine_TR[at_B]
    q_BHD, k_BKD = (rotate(x[:rows].float(), *angles) for x in (step.q_BHD, step.k_BKD))
    step.q_BHD[:rows] = q_BHD
    pages_BN = step.pages_BN[:rows].clamp(0, cache.pages - 1)
    page_B = pages_BN.gather(1, (at_B // cache.page_size)[:, None])[:, 0]
    tokens = k_BKD.to(step.k_BKD.dtype), step.v_BKD[:rows]
    _store(cache, page_B, at_B % cache.page_size, tokens, positions_B >= 0)
    out_BHD = _attention(step, step.q_BHD[:rows].float(), pages_BN, positions_B)
    step.out_BHD[:rows] = torch.where(positions_B[:, None, None] >= 0, out_BHD, 0)


def _store(
    cache: KeyValueCache,
    page_B: Tensor,
    offset_B: Tensor,
    tokens: tuple[Tensor, Tensor],
    live_B: Tensor,
) -> None:
    """Write one token of each live row. The others write what the first live row writes: the same
    bits at the same place; where no row is live, what lies there."""
    places = torch.arange(len(live_B), device=live_B.device)
    source_B = torch.where(live_B, places, live_B.to(torch.uint8).argmax())
    page_B, offset_B = page_B[source_B], offset_B[source_B]
    keys = (page_B, slice(None), offset_B // LANES, slice(None), offset_B % LANES)
    values = (page_B, slice(None), offset_B, slice(0, cache.head_size))
    for memory, index, new_BKD in (
        (cache.keys, keys, tokens[0]),
        (cache.values, values, tokens[1]),
    ):
        memory[index] = torch.where(live_B.any(), new_BKD[source_B], memory[index])


def _attention(step: AttentionStep, q_BHD: Tensor, pages_BN: Tensor, positions_B: Tensor) -> Tensor:
    """softmax(scale q k^T) v over all tokens of a row's pages up to its own, in float32."""
    cache = step.cache
    B, H, D = q_BHD.shape
    keys_BNKLDl, values_BNKTD = cache.keys[pages_BN], cache.values[pages_BN][..., :D]
    keys_BKTD = keys_BNKLDl.transpose(4, 5).flatten(3, 4).transpose(1, 2).flatten(2, 3)
    values_BKTD = values_BNKTD.transpose(1, 2).flatten(2, 3)
    q_BKGD = q_BHD.view(B, cache.kv_heads, -1, D)
    scores_BKGT = q_BKGD @ keys_BKTD.float().transpose(2, 3) * step.scale
    token_T = torch.arange(scores_BKGT.shape[-1], device=q_BHD.device)
    behind_BT = token_T > positions_B[:, None]
    if step.window > 0:
        behind_BT = behind_BT | (token_T <= positions_B[:, None] - step.window)
    scores_BKGT = scores_BKGT.masked_fill(behind_BT[:, None, None], float("-inf"))
    # a row that is left out sees nothing: NaN here, zeros in the end
    return (scores_BKGT.softmax(-1) @ values_BKTD.float()).reshape(B, H, D)
