"""The GPU backend: kernels over channel-major weights, in Triton and for few rows in CUDA C++.

Written and proved without a GPU: in the tests Triton's interpreter and a stand-in for CUDA run the
kernels on the CPU, and they are compiled for five architectures. Everything is launched without
waiting for the device, so that a CUDA graph can record it; what is compiled at the first call must
run once before.

Shape letters: B = rows, I = input features, O = output features, C = chunks of CHUNK channels.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from prune_llm_kernels import gpu_lists, gpu_triton
except ImportError as error:
    raise ImportError(
        "the GPU kernels of prune_llm need triton; run `pip install triton`, or set"
        f" PRUNE_LLM_BACKEND=reference to run without them, slowly ({error})"
    ) from error

from prune_llm_kernels import gpu_cuda, gpu_layout, reference
from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.gpu_lists import many_rows, power
from prune_llm_kernels.gpu_ops import CHUNK
from prune_llm_kernels.plan import Gate
from prune_llm_kernels.reference_plan import silu_mul

if TYPE_CHECKING:
    from prune_llm_kernels.packed_weight import PackedWeight
    from prune_llm_kernels.plan import Plan

MAX_SIDE = 3  # products that are finished together
SUMMED_ROWS = 4  # up to so many rows the sums stay in threads; more go to the tensor cores
DENSE_BLOCK = 512  # outputs of a program over a dense weight
# Of an H200, in chunks of a block of 512 outputs at density 0.5 (75 KB, 2.3 us at 4.3 TB/s over 132
# multiprocessors): writing and reading a program's sums; waiting for the sums of a split, of which
# eight are read at once. And the programs that a multiprocessor must run at once for enough reads
# in flight: a program has 10 KB of them, memory needs 23 KB.
_PARTIAL, _READ, _ENOUGH = 0.06, 0.014, 2.4

check_contents = reference.check_contents
settle = reference.settle
unpack = reference.unpack
dense_linear = reference.dense_linear
unpack_channels = gpu_layout.unpack_channels
channel_keep_mask = gpu_layout.channel_keep_mask
MAX_ROWS = gpu_lists.MAX_ROWS
ChannelList = gpu_lists.ChannelList
empty_list = gpu_lists.empty_list
list_channels = gpu_lists.list_channels
native = gpu_lists.native
check_device = gpu_lists.check_device


def choose_tile(out_features: int) -> int:
    """Outputs of a block: a warp reads at least 256 bytes of a segment; more waste little."""
    return 256 if out_features <= 256 else gpu_layout.BLOCK


def pack_channels(weight: PackedWeight, tile: int) -> ChannelWeight:
    """The channel-major form of a packed weight; see gpu_layout.py."""
    return gpu_layout.pack_channels(weight, tile)


def listed_linear(channels: ChannelList, weight: ChannelWeight, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias over the listed channels, [B, O]."""
    x_BI = many_rows(channels)
    if x_BI is not None:
        return F.linear(x_BI, _dense(weight), bias)
    partials_SBO = _partials(channels.x_CBN, channels, weight)
    return _finished(partials_SBO, bias, weight.dtype)


def listed_swiglu(
    channels: ChannelList,
    stacked: ChannelWeight,
    bias: Tensor | None,
    thresholds_B: Tensor | None,
    scales_O: Tensor | None,
) -> tuple[Tensor, ChannelList | None]:
    """silu(x W1^T) * (x W2^T), [B, O], and with thresholds the list of its channels.

    Args:
        stacked: W1 above W2, [2 O, I]; see gpu_layout.stack_rows.
        bias: of both, [2 O].
    """
    x_BI = many_rows(channels)
    if x_BI is not None:
        halves = F.linear(x_BI, _dense(stacked), bias).float().chunk(2, dim=-1)
        product_BO = silu_mul(*halves).to(stacked.dtype)
        if thresholds_B is None:
            return product_BO, None
        return product_BO, list_channels(product_BO, thresholds_B, scales_O)
    O = stacked.out_features // 2
    y_BO = channels.x_CBN.new_empty(channels.x_CBN.shape[1], O)
    biases = None if bias is None else (bias[:O], bias[O:])
    gate = None if thresholds_B is None else Gate(thresholds_B, scales_O)
    partials_SBO = _partials(channels.x_CBN, channels, stacked)
    return y_BO, finish_swiglu(partials_SBO, biases, y_BO, gate)


def product_sums(x_BI: Tensor, channels: ChannelList | None, weight: ChannelWeight) -> Tensor:
    """x W^T in float32, split by channels, [splits, B, O]; with a list over its channels only."""
    return _partials(x_BI if channels is None else channels.x_CBN, channels, weight)


def finish_linears(
    partials_SBO: Tensor,
    biases: Sequence[Tensor | None],
    outs_BO: Sequence[Tensor],
    accumulate: bool = False,
) -> None:
    """Add the splits of up to three products side by side, and write each where it belongs.

    Args:
        outs_BO: contiguous; all but the last have a multiple of CHUNK columns.
        accumulate: add to what they hold.
    """
    splits, B, wide = partials_SBO.shape
    count, given = len(outs_BO), [bias for bias in biases if bias is not None]
    assert 1 <= count <= MAX_SIDE and sum(out.shape[1] for out in outs_BO) == wide
    if given and len(given) < count:  # some have none
        biases = [outs_BO[i].new_zeros(outs_BO[i].shape[1]) if bias is None else bias
                  for i, bias in enumerate(biases)]  # fmt: skip
    firsts = [sum(out.shape[1] for out in outs_BO[:i]) for i in range(count)]
    firsts += [wide] * (MAX_SIDE - count)
    assert not any(first % CHUNK for first in firsts[1:count])
    outs = [*outs_BO, *[outs_BO[0]] * (MAX_SIDE - count)]
    added = [*biases, *[biases[0]] * (MAX_SIDE - count)] if given else outs
    gpu_triton.finish_linears[(-(-wide // CHUNK),)](
        partials_SBO,
        *added,
        *outs,
        B,
        wide,
        *firsts[1:],
        splits,
        B=power(B),
        CHUNK=CHUNK,
        BIASED=bool(given),
        ADD=accumulate,
    )


def finish_swiglu(
    partials_SBO: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    out_BO: Tensor,
    gate: Gate | None,
) -> ChannelList | None:
    """out = silu(a) * b of two products side by side, and for a gate the list of its channels."""
    splits, B, wide = partials_SBO.shape
    following = None if gate is None else empty_list(out_BO, wide // 2)
    unused = partials_SBO  # an argument that the kernel does not read
    scales = totals = None
    if gate is not None:
        scales, totals = gate.scales_I, gate.counts
    gpu_triton.finish_swiglu[(-(-wide // 2 // CHUNK),)](
        partials_SBO,
        *((unused, unused) if biases is None else biases),
        out_BO,
        unused if gate is None else gate.thresholds_B,
        unused if scales is None else scales,
        unused if following is None else following.listed_CN,
        out_BO if following is None else following.x_CBN,
        unused if following is None else following.counts_C,
        unused if totals is None else totals,
        B,
        wide // 2,
        splits,
        B=power(B),
        CHUNK=CHUNK,
        BIASED=biases is not None,
        SCALED=scales is not None,
        LIST=following is not None,
        TOTAL=totals is not None,
    )
    return following


def channel_linear(x: Tensor, weight: ChannelWeight, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias; x [..., I] -> y [..., O]. Every channel is read."""
    I, O = weight.in_features, weight.out_features
    x_BI = x.reshape(-1, I).contiguous()
    if weight.starts is None or not 0 < len(x_BI) <= MAX_ROWS:
        y_BO = F.linear(x_BI, _dense(weight), bias)
    else:
        y_BO = _finished(_partials(x_BI, None, weight), bias, weight.dtype)
    return y_BO.view(*x.shape[:-1], O)


def _dense(weight: ChannelWeight) -> Tensor:
    """The dense weight [O, I], as a view of its channel-major form."""
    columns_IO = weight.data if weight.starts is None else dense_columns(weight)
    return columns_IO[:, : weight.out_features].T


def dense_columns(weight: ChannelWeight) -> Tensor:
    """The dense weight in channel-major order, [I, O rounded up to blocks]; exact."""
    assert weight.starts is not None
    check_device(weight.data)
    I, width, step = weight.in_features, weight.tiles * weight.tile, 4
    dense_IO = weight.data.new_empty(I, width)
    gpu_triton.unpack[(weight.tiles, -(-I // step))](
        weight.data,
        weight.data.view(torch.int32),
        weight.starts,
        dense_IO,
        I,
        width,
        STEP=step,
        BLOCK=weight.tile,
        NATIVE=native(),
        num_warps=weight.tile // 128,
    )
    return dense_IO


def sparse_linear(
    x: Tensor, bitmask: Tensor, packed: Tensor, offsets: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y = x W^T + bias over the stored form: unpacked at every call. Decode wants ChannelWeight."""
    return reference.sparse_linear(x, bitmask, packed, offsets, bias)


def new_plan(dtype: torch.dtype) -> Plan:
    """An empty plan; see gpu_plan.py."""
    from prune_llm_kernels.gpu_plan import GpuPlan

    return GpuPlan(dtype)


def _partials(x: Tensor, channels: ChannelList | None, weight: ChannelWeight) -> Tensor:
    """The product in float32, [splits, B, O]; x is [B, I], or a list's."""
    check_device(x)
    if x.data_ptr() % 4:  # a view: the CUDA kernel reads inputs in pairs
        x = x.clone()
    rows, I, O = x.shape[-2], weight.in_features, weight.out_features
    block = DENSE_BLOCK if weight.starts is None else weight.tile
    blocks, chunks = -(-O // block), -(-I // CHUNK)
    per_split = chunks_per_split(blocks, chunks, multiprocessors(x.device))
    splits = -(-chunks // per_split)
    partials_SBO = x.new_empty(splits, rows, O, dtype=torch.float32)
    lists = (x, x) if channels is None else (channels.listed_CN, channels.counts_C)
    sizes: dict[str, Any] = {"CHUNK": CHUNK, "BLOCK": block, "LISTED": channels is not None}
    sizes["EVEN"] = I % CHUNK == 0
    arguments: tuple[Any, ...]
    grid, ends = (blocks, splits), (rows, I, O, per_split, chunks)
    if weight.starts is None:
        arguments = x, *lists, weight.data, partials_SBO, *ends, weight.data.stride(0)
        gpu_triton.dense_linear[grid](*arguments, **sizes, **dense_config(rows))
        return partials_SBO
    stored = weight.data, weight.data.view(torch.int32), weight.starts
    if _in_cuda(x, rows, weight, channels is not None):
        function = gpu_cuda.kernel(x.device, x.dtype, power(rows), block, channels is not None)
        tensors = (x, *lists, weight.data, weight.starts, partials_SBO)
        gpu_cuda.launch(function, grid, tensors, ends)
        return partials_SBO
    arguments = x, *lists, *stored, partials_SBO, *ends, weight.data.element_size()
    sizes |= packed_config(rows, block) | {"NATIVE": native()}
    if rows > SUMMED_ROWS:
        gpu_triton.packed_matmul[grid](*arguments[:-1], **sizes)
    else:
        load = load_code(weight.dtype, block) if native() else None
        gpu_triton.packed_linear[grid](*arguments, **sizes, LOAD=load)
    return partials_SBO


def _in_cuda(x: Tensor, rows: int, weight: ChannelWeight, listed: bool) -> bool:
    """Whether the CUDA kernel multiplies instead of Triton's."""
    supported = gpu_cuda.supports(x.dtype, rows, weight.in_features, listed)
    return x.device.type == "cuda" and supported and implementation(x.device) == "cuda"


@functools.cache
def implementation(device: torch.device) -> str:
    """What multiplies small batches on a device: "cuda" where NVRTC compiles it, else "triton"."""
    if torch.cuda.get_device_capability(device)[0] * 10 < gpu_cuda.ARCHITECTURE:
        return "triton"
    try:
        gpu_cuda.kernel(device, torch.bfloat16, 1, gpu_layout.BLOCK, True)
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(f"{error}; the GPU kernels are Triton's, which are slower", stacklevel=2)
        return "triton"
    return "cuda"


def load_code(dtype: torch.dtype, block: int) -> str | None:
    """How compiled kernels load weights of a block; None: as Triton does."""
    if dtype.itemsize != 2:
        return None
    return gpu_triton.load_code(dtype is torch.bfloat16, block)


def packed_config(rows: int, block: int) -> dict[str, int]:
    """How a packed kernel is compiled for so many rows."""
    summed = rows <= SUMMED_ROWS
    B = power(rows) if summed else MAX_ROWS
    step = 8 if summed else 16  # 16: what a matrix instruction multiplies at least
    return {"B": B, "STEP": step, "num_warps": block // 128}  # a nibble for every thread


def dense_config(rows: int) -> dict[str, int]:
    """How the dense kernel is compiled for so many rows."""
    B = power(rows)
    return {"B": B, "STEP": 16 if B == 1 else 8, "num_warps": 4}


def _finished(partials_SBO: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the splits, rounded once."""
    y_BO = partials_SBO.new_empty(partials_SBO.shape[1:], dtype=dtype)
    finish_linears(partials_SBO, [bias], [y_BO])
    return y_BO


@functools.cache
def chunks_per_split(blocks: int, chunks: int, processors: int) -> int:
    """Chunks that one program reads, by what the busiest multiprocessor reads and what adding the
    splits costs; in units of the time that it needs for a chunk."""

    def cost(each: int) -> float:
        splits = -(-chunks // each)
        programs = blocks * splits / processors
        reading = min(1.0, programs / _ENOUGH)
        adding = _PARTIAL * programs + _READ * splits
        return math.ceil(programs) * each / reading + adding

    return min(range(chunks, 0, -1), key=cost)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; 2 where kernels are interpreted, so that there are splits to add."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
