"""Lists of the channels that count, made and kept on the device.

Shape letters: B = rows, I = input features, C = chunks of CHUNK channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import gpu_triton, reference
from prune_llm_kernels.gpu_ops import CHUNK

MAX_ROWS = 16  # more rows are multiplied with the unpacked weight


@dataclass(frozen=True, slots=True)
class ChannelList:
    """The channels of x [B, I] that count, found on the device.

    Attributes:
        listed_CN: int32 [C, CHUNK], of each chunk the channels that any row counts, ascending, then
            the last of them again. Of more than MAX_ROWS rows all are listed: hardly any channel
            is left that none of them counts.
        x_CBN: [C, B, CHUNK], their inputs; zero where a row does not count one, and behind them.
        counts_C: int32 [C], their number.
        in_features: I.
    """

    listed_CN: Tensor
    x_CBN: Tensor
    counts_C: Tensor
    in_features: int


def list_channels(
    x_BI: Tensor, thresholds_B: Tensor, scales_I: Tensor | None, totals: Tensor | None = None
) -> ChannelList:
    """Which channels count: |x| * scale > threshold in float32; see reference.counting.

    Args:
        totals: int64 [3]; the numbers of channels, inputs and rows that count are added to it.
    """
    B, I = x_BI.shape
    check_device(x_BI)
    if B > MAX_ROWS:
        return _list_all(x_BI, thresholds_B, scales_I)
    channels = empty_list(x_BI, I)
    gpu_triton.list_channels[(len(channels.counts_C),)](
        x_BI,
        thresholds_B,
        thresholds_B if scales_I is None else scales_I,
        channels.listed_CN,
        channels.x_CBN,
        channels.counts_C,
        channels.counts_C if totals is None else totals,
        B,
        I,
        B=power(B),
        CHUNK=CHUNK,
        SCALED=scales_I is not None,
        TOTAL=totals is not None,
    )
    return channels


def _list_all(x_BI: Tensor, thresholds_B: Tensor, scales_I: Tensor | None) -> ChannelList:
    """Every channel in its place, and zeros where a row does not count one."""
    B, I = x_BI.shape
    chunks = -(-I // CHUNK)
    counted_BI = reference.counting(x_BI, thresholds_B, scales_I)
    kept_BI = F.pad(torch.where(counted_BI, x_BI, 0), (0, chunks * CHUNK - I))
    channel_I = torch.arange(chunks * CHUNK, dtype=torch.int32, device=x_BI.device)
    return ChannelList(
        channel_I.clamp(max=I - 1).view(chunks, CHUNK),
        kept_BI.view(B, chunks, CHUNK).transpose(0, 1).contiguous(),
        (I - channel_I[::CHUNK]).clamp(max=CHUNK),
        I,
    )


def many_rows(channels: ChannelList) -> Tensor | None:
    """The inputs [B, I] of a list of more rows than kernels take; None: they take them."""
    x_CBN = channels.x_CBN
    rows = x_CBN.shape[1]
    if rows <= MAX_ROWS:
        return None
    return x_CBN.transpose(0, 1).reshape(rows, -1)[:, : channels.in_features].contiguous()


def empty_list(like_B: Tensor, in_features: int) -> ChannelList:
    """Memory for a list of as many rows."""
    B, chunks = like_B.shape[0], -(-in_features // CHUNK)
    listed_CN = like_B.new_empty(chunks, CHUNK, dtype=torch.int32)
    counts_C = like_B.new_empty(chunks, dtype=torch.int32)
    return ChannelList(listed_CN, like_B.new_empty(chunks, B, CHUNK), counts_C, in_features)


def native() -> bool:
    """Kernels are compiled, not interpreted on the CPU."""
    return isinstance(gpu_triton.packed_linear, triton.runtime.JITFunction)


def check_device(x: Tensor) -> None:
    """Raise ValueError where a kernel cannot run."""
    if native() and x.device.type != "cuda":
        raise ValueError(f"x is on {x.device}; the GPU kernels run on CUDA devices")


def power(rows: int) -> int:
    """Rounded up to a power of two."""
    return 1 << (rows - 1).bit_length()
