"""A decode step on the GPU between its linears: norm, SwiGLU's product and attention.

Launches of gpu_triton_step.py over the first rows of buffers; nothing waits for the device and no
grid depends on what tensors hold, so that a CUDA graph can record it. Rows past a run are neither
read nor written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prune_llm_kernels import gpu, gpu_triton_step
from prune_llm_kernels.gpu_lists import power
from prune_llm_kernels.kv_cache import LANES
from prune_llm_kernels.plan import AttentionStep

MOST_SPLITS = 128  # of a context; their partial results are read at once
_WAVES = 8  # attention programs, a warp each, for each multiprocessor
_SLICE = 32  # elements of a head that one program combines
_PRODUCTS = 1024  # elements of SwiGLU's product that a program makes
_HELD = 512  # elements of queries that an attention program holds; of sums as many
_MOST_QUERIES = 8  # heads that share a read
_ENDLESS = 1 << 30  # a window that no position leaves


def rms_norm(x_BI: Tensor, weight_I: Tensor, eps: float, out_BI: Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension of any shape; out may be x.

    One launch, a program for each vector.
    """
    gpu.check_device(x_BI)
    columns = x_BI.shape[-1]
    gpu_triton_step.rms_norm[(x_BI.numel() // columns,)](
        x_BI, weight_I, out_BI, columns, eps, **norm_config(columns)
    )


def silu_mul(gate_BI: Tensor, up_BI: Tensor, out_BI: Tensor) -> None:
    """out = gate / (1 + e^-gate) * up; out may be gate or up. One launch."""
    gpu.check_device(gate_BI)
    elements = gate_BI.numel()
    grid = (-(-elements // _PRODUCTS),)
    gpu_triton_step.silu_mul[grid](gate_BI, up_BI, out_BI, elements, BLOCK=_PRODUCTS)


def attention(step: AttentionStep, rows: int) -> None:
    """Plan.attention of the first rows, in three launches.

    A row whose position lies behind its pages becomes NaN and stores nothing.
    """
    gpu.check_device(step.q_BHD)
    _rotate_and_store(step, rows)
    _, H, D = step.q_BHD.shape
    cache, columns = step.cache, step.pages_BN.shape[1]
    sizes = attention_config(H // cache.kv_heads, D)
    parts = -(-H // cache.kv_heads // sizes["GROUP"])
    page_blocks = cache.page_size // LANES
    window = step.window if step.window > 0 else _ENDLESS
    blocks = min(columns * page_blocks, window // LANES + 2)
    programs = cache.kv_heads * parts * rows
    splits = splits_for(programs, blocks, gpu.multiprocessors(step.q_BHD.device))
    partials_BHSD = step.q_BHD.new_empty(rows, H, splits, D, dtype=torch.float32)
    maxima_BHS, sums_BHS = partials_BHSD.new_empty(2, rows, H, splits)
    gpu_triton_step.attend[(splits, cache.kv_heads * parts, rows)](
        step.q_BHD,
        cache.keys,
        cache.values,
        step.pages_BN,
        step.positions_B,
        partials_BHSD,
        maxima_BHS,
        sums_BHS,
        H,
        cache.kv_heads,
        page_blocks,
        cache.pages,
        columns,
        window,
        splits,
        step.scale * math.log2(math.e),
        **sizes,
    )
    gpu_triton_step.combine[(-(-D // _SLICE), H, rows)](
        partials_BHSD,
        maxima_BHS,
        sums_BHS,
        step.positions_B,
        step.out_BHD,
        H,
        columns * cache.page_size,
        window,
        splits,
        **combine_config(splits, D),
    )


def _rotate_and_store(step: AttentionStep, rows: int) -> None:
    """q rotated in place, k rotated and v in the cache; nothing of rows left out."""
    _, H, D = step.q_BHD.shape
    cache = step.cache
    gpu_triton_step.rotate_and_store[(rows, H + cache.kv_heads)](
        step.q_BHD,
        step.k_BKD,
        step.v_BKD,
        step.cosine_TR,
        step.sine_TR,
        cache.keys,
        cache.values,
        step.pages_BN,
        step.positions_B,
        H,
        cache.kv_heads,
        cache.page_size // LANES,
        cache.pages,
        step.pages_BN.shape[1],
        **rotation_config(D, step.cosine_TR.shape[1]),
    )


def norm_config(columns: int) -> dict[str, int]:
    """How the norm of so many columns is compiled: 16 elements a thread, where warps suffice."""
    block = power(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def rotation_config(size: int, rotated: int) -> dict[str, int]:
    """How the rotation is compiled for a head size, ``rotated`` of its elements turning."""
    sizes = {"SIZE": size, "HALF": rotated // 2, "HEAD": power(size)}
    return {**sizes, "LANES": LANES, "num_warps": 1}


def attention_config(group: int, size: int) -> dict[str, int]:
    """How attention is compiled for a head size and the query heads of a key-value head.

    A program of one warp needs no exchange between warps; so many heads of a group share a read
    that their queries and sums fit its registers, more are read for again, from the L2 cache.
    """
    head = power(size)
    shared = min(group, max(_HELD // head, 1), _MOST_QUERIES)
    return {"SIZE": size, "HEAD": head, "GROUP": shared, "LANES": LANES, "num_warps": 1}


def combine_config(splits: int, size: int) -> dict[str, int]:
    """How the sum of so many splits is compiled for a head size."""
    sizes = {"SIZE": size, "SPLITS": power(splits), "SLICE": _SLICE}
    return {**sizes, "LANES": LANES, "num_warps": 4}


def splits_for(programs: int, blocks: int, processors: int) -> int:
    """Parts of a context of so many blocks, so that every multiprocessor has a few programs.

    Args:
        programs: rows and key-value heads that share the multiprocessors.
    """
    wanted = -(-_WAVES * processors // programs)
    return max(1, min(wanted, blocks, MOST_SPLITS))
