"""The CPU backend: C++ for each instruction set, called with raw pointers.

The stored form is the runtime layout: row-major mask and values are read in place, at the speed of
memory (kernels/bench), and any other layout would need a copy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

try:
    from prune_llm_kernels import _C
except ImportError as error:
    raise ImportError(
        "the C++ kernels of prune_llm are not built; run `pip install .` in the repository, or set"
        f" PRUNE_LLM_BACKEND=reference to run without them, slowly ({error})"
    ) from error

from prune_llm_kernels.channel_weight import SLACK, WORD, ChannelWeight
from prune_llm_kernels.channel_weight import choose_tile as choose_tile
from prune_llm_kernels.reference import channel_keep_mask as channel_keep_mask
from prune_llm_kernels.wide_products import linear as wide_linear
from prune_llm_kernels.wide_products import multiplier

if TYPE_CHECKING:
    from prune_llm_kernels.packed_weight import PackedWeight
    from prune_llm_kernels.plan import Plan

_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# up to this many rows of x our kernels multiply; above, a slice of a packed weight at a time is
# unpacked and given to torch's GEMM
MAX_DIRECT_ROWS = 64
_SLICE_BYTES = 4 * 2**20


def dtype_code(dtype: torch.dtype) -> int:
    """DType of csrc/kernels.h."""
    return _DTYPE_CODES[dtype]


def isa_names() -> list[str]:
    """Instruction sets that this machine runs and this build contains, fastest first."""
    return _C.isa_names()


def thread_pool_name() -> str:
    """ "openmp": torch's own threads; "own": a pool of ours, where torch's were not found."""
    return _C.thread_pool_name()


def read_all(buffer: Tensor) -> None:
    """Read a buffer once, as fast as memory allows: what benchmarks measure bandwidth with."""
    _C.read_all(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads())


@functools.cache
def isa_index(name: str | None = None) -> int:
    """Place in isa_names() of `name`, else of PRUNE_LLM_ISA, else of the fastest.

    Raises:
        ValueError: this machine or this build cannot run it.
    """
    names = isa_names()
    asked = name or os.environ.get("PRUNE_LLM_ISA") or names[0]
    if asked not in names:
        raise ValueError(
            f"instruction set (PRUNE_LLM_ISA) is {asked!r};"
            f" this machine supports {', '.join(names)}"
        )
    return names.index(asked)


def check_contents(bitmask: Tensor, packed: Tensor, offsets: Tensor | None, columns: int) -> None:
    """Raise ValueError unless bitmask and offsets agree; reads every mask byte and offset."""
    fault, row, expected, found = _C.check(
        bitmask.data_ptr(),
        *offset_arguments(offsets),
        bitmask.shape[0],
        columns,
        packed.numel(),
    )
    if fault:
        sizes = {"next": row + 1, "last": columns - 1, "values": packed.numel()}
        raise ValueError(_FAULTS[fault].format(row=row, expected=expected, found=found, **sizes))


_FAULTS = {
    "offsets_start": "offsets[0] is {found}; it must be 0",
    "offsets_order": (
        "offsets[{next}] is {found}; it must lie between offsets[{row}] = {expected} and the"
        " {values} values of packed"
    ),
    "offsets_end": "offsets[{row}] is {found}; it must be the {expected} values of packed",
    "row_count": "bitmask row {row} keeps {found} weights; packed has {expected} for it",
    "padding": "bitmask row {row} has a padding bit set behind column {last}",
}


def settle(tensor: Tensor) -> None:
    """Move a weight that will be read often to huge pages, where the system can.

    Measured at 4096 x 4096, density 0.5: 20 to 30 % faster. Content and address stay.
    """
    _C.use_huge_pages(tensor.data_ptr(), tensor.nbytes)


def offset_arguments(offsets: Tensor | None) -> tuple[int, int]:
    """Address and bytes of an offset, zeros for none."""
    return (0, 0) if offsets is None else (offsets.data_ptr(), offsets.element_size())


def unpack(
    bitmask: Tensor, packed: Tensor, offsets: Tensor | None, columns: int, isa: str | None = None
) -> Tensor:
    """Stored form -> dense weight [O, I]; exact."""
    dense = packed.new_empty(bitmask.shape[0], columns)
    _unpack_rows(bitmask, packed, offsets, dense, 0, isa_index(isa))
    return dense


def _unpack_rows(
    bitmask: Tensor, packed: Tensor, offsets: Tensor | None, out: Tensor, begin: int, isa: int
) -> None:
    """Rows begin to begin + len(out) to out [rows, I]."""
    _C.unpack(
        isa,
        _DTYPE_CODES[packed.dtype],
        torch.get_num_threads(),
        bitmask.data_ptr(),
        packed.data_ptr(),
        *offset_arguments(offsets),
        bitmask.shape[0],
        out.shape[1],
        packed.numel(),
        out.data_ptr(),
        begin,
        begin + out.shape[0],
    )


def sparse_linear(
    x: Tensor,
    bitmask: Tensor,
    packed: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    isa: str | None = None,
) -> Tensor:
    """y = x W^T + bias; x [..., I] -> y [..., O]. The weight must come from a PackedWeight."""
    columns = x.shape[-1]
    O = bitmask.shape[0]
    rows = x.numel() // columns
    if rows > MAX_DIRECT_ROWS:
        return _prefill(x, bitmask, packed, offsets, bias, isa_index(isa))
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], O))
    _C.linear(
        isa_index(isa),
        _DTYPE_CODES[packed.dtype],
        torch.get_num_threads(),
        x.data_ptr(),
        rows,
        bitmask.data_ptr(),
        packed.data_ptr(),
        *offset_arguments(offsets),
        O,
        columns,
        packed.numel(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y


def _prefill(
    x: Tensor,
    bitmask: Tensor,
    packed: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    isa: int,
) -> Tensor:
    """Many rows: unpack a slice of output rows that stays in the cache, multiply it with torch."""
    O, columns = bitmask.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], O))
    step = max(1, _SLICE_BYTES // (columns * packed.element_size()))
    buffer, product = packed.new_empty(min(step, O), columns), multiplier(x)
    for begin in range(0, O, step):
        rows = slice(begin, min(begin + step, O))
        dense = buffer[: rows.stop - begin]
        _unpack_rows(bitmask, packed, offsets, dense, begin, isa)
        y[..., rows] = product(dense, None if bias is None else bias[rows])
    return y


def dense_linear(
    x: Tensor, weight_OI: Tensor, bias: Tensor | None, isa: str | None = None
) -> Tensor:
    """y = x W^T + bias; x [..., I] -> y [..., O]; few rows by our kernel, many by torch's."""
    O, columns = weight_OI.shape
    rows = x.numel() // columns
    if rows > MAX_DIRECT_ROWS:
        return wide_linear(x, weight_OI, bias)
    x, weight_OI = x.contiguous(), weight_OI.contiguous()
    y = x.new_empty((*x.shape[:-1], O))
    _C.linear(
        isa_index(isa),
        _DTYPE_CODES[weight_OI.dtype],
        torch.get_num_threads(),
        x.data_ptr(),
        rows,
        0,
        weight_OI.data_ptr(),
        0,
        0,
        O,
        columns,
        O * columns,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    return y


def pack_channels(weight: PackedWeight, tile: int) -> ChannelWeight:
    """The channel-major form of a packed weight; see channel_weight.py.

    Raises:
        ValueError: it has more than 2**32 elements.
    """
    O, I, dtype = weight.out_features, weight.in_features, weight.dtype
    threads, size = torch.get_num_threads(), dtype.itemsize
    counts = *offset_arguments(weight.offsets), O, I, weight.packed.numel(), tile, size
    starts = torch.empty(-(-O // tile) * I + 1, dtype=torch.uint32)
    elements = _C.channels_measure(threads, weight.bitmask.data_ptr(), *counts, starts.data_ptr())
    if elements < 0:
        raise ValueError(f"{weight.name}: has more than 2**32 weights and masks; use N:M or shards")
    data = torch.empty(elements + SLACK, dtype=dtype)
    data[elements:] = 0
    addresses = weight.bitmask.data_ptr(), weight.packed.data_ptr()
    _C.channels_fill(threads, *addresses, *counts, starts.data_ptr(), data.data_ptr())
    settle(data)
    return ChannelWeight(data, starts, O, I, tile, weight.offsets is None)


def unpack_channels(weight: ChannelWeight, isa: str | None = None) -> Tensor:
    """The dense weight [O, I], bit for bit."""
    O, I = weight.out_features, weight.in_features
    dense = weight.data.new_empty(O, I)
    for begin, end, piece_IO in _channel_slices(weight, isa_index(isa)):
        dense[begin:end] = piece_IO.T
    return dense


def _channel_slices(weight: ChannelWeight, isa: int) -> Iterator[tuple[int, int, Tensor]]:
    """Outputs begin to end of the weight, dense [I, end - begin]; valid until the next one."""
    O, I, data = weight.out_features, weight.in_features, weight.data
    fitting = _SLICE_BYTES // (I * data.element_size()) // WORD * WORD
    step = min(weight.tile, max(WORD, fitting))
    buffer = data.new_empty(0 if weight.starts is None else I * step)
    for first in range(0, O, weight.tile):
        for begin in range(first, min(first + weight.tile, O), step):
            end = min(begin + step, first + weight.tile, O)
            if weight.starts is None:
                yield begin, end, data[:, begin:end]
                continue
            piece = buffer[: I * (end - begin)].view(I, end - begin)
            _C.channels_unpack(
                isa,
                dtype_code(data.dtype),
                data.data_ptr(),
                weight.starts.data_ptr(),
                O,
                I,
                weight.tile,
                piece.data_ptr(),
                begin,
                end,
            )
            yield begin, end, piece


def channel_linear(
    x: Tensor, weight: ChannelWeight, bias: Tensor | None, isa: str | None = None
) -> Tensor:
    """y = x W^T + bias; x [..., I] -> y [..., O]. One row skips the channels that are zero."""
    from prune_llm_kernels.cpu_plan import CpuPlan
    from prune_llm_kernels.plan import Gate

    I, O = weight.in_features, weight.out_features
    rows = x.numel() // I
    y = x.new_empty((*x.shape[:-1], O))
    if rows > MAX_DIRECT_ROWS:
        product = multiplier(x)
        for begin, end, piece_IO in _channel_slices(weight, isa_index(isa)):
            shift = None if bias is None else bias[begin:end]
            y[..., begin:end] = product(piece_IO.T, shift)
        return y
    plan = CpuPlan(weight.dtype, isa)
    every = torch.full((rows,), 0.0 if rows == 1 else -1.0)
    plan.linears(x.reshape(rows, I), [weight], [bias], [y.view(rows, O)], gate=Gate(every))
    plan.run()
    return y


def new_plan(dtype: torch.dtype) -> Plan:
    """An empty plan; see plan.py."""
    from prune_llm_kernels.cpu_plan import CpuPlan

    return CpuPlan(dtype)
