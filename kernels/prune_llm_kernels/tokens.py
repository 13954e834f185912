"""Products over many tokens in bfloat16 on the CPU, for calibration and prefill.

Both have a plain torch twin in `reference.py`; `supports_*` say whether this machine and these
tensors have the fast form, so that a caller chooses knowingly. Shape letters: B = samples,
H = query heads, K = key-value heads, T = tokens, D = head size, I = input features.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

GRAM_PANEL = 48  # kGramPanel of csrc/tokens.h


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies tokens of this kind: an instruction set, or "torch" where we have none."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "torch"
    if os.environ.get("PRUNE_LLM_BACKEND") == "reference" or not _built():
        return "torch"
    from prune_llm_kernels import _C, cpu

    index = cpu.isa_index()
    return cpu.isa_names()[index] if _C.has_token_kernels(index) else "torch"


def _built() -> bool:
    try:
        from prune_llm_kernels import _C  # noqa: F401
    except ImportError:
        return False
    return True


def supports_gram(x_TI: Tensor) -> bool:
    return kernel_name(x_TI.device, x_TI.dtype) != "torch"


def gram_add(sum_II: Tensor, x_TI: Tensor) -> None:
    """sum += x^T x on and below the diagonal; what lies above is left undefined.

    Products of bfloat16 are exact, sums are float32; does not depend on the number of threads.

    Args:
        sum_II: float32 [I, I], contiguous.
        x_TI: bfloat16 [T, I]; see `supports_gram`.

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    from prune_llm_kernels import _C, cpu

    tokens, width = x_TI.shape
    if sum_II.shape != (width, width) or sum_II.dtype != torch.float32:
        raise ValueError(
            f"sum is {sum_II.dtype} of shape {list(sum_II.shape)}; it must be torch.float32 "
            f"[{width}, {width}]"
        )
    if not sum_II.is_contiguous():
        raise ValueError("sum is not contiguous; pass a contiguous tensor, it is changed in place")
    if x_TI.dtype != torch.bfloat16:
        raise ValueError(f"x is {x_TI.dtype}; it must be torch.bfloat16")
    x_TI = x_TI.contiguous()
    panels, pairs = -(-width // GRAM_PANEL), -(-tokens // 2)
    packed = torch.empty(panels * pairs * GRAM_PANEL, dtype=torch.int32)
    _C.gram_add(
        cpu.isa_index(),
        torch.get_num_threads(),
        x_TI.data_ptr(),
        tokens,
        width,
        packed.data_ptr(),
        sum_II.data_ptr(),
    )


def supports_causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> bool:
    """Whether `causal_attention` takes these: bfloat16, one length, an even head size up to 256."""
    samples, heads, tokens, size = q_BHTD.shape
    kv_heads = k_BKTD.shape[1]
    fits = (
        k_BKTD.shape == v_BKTD.shape == (samples, kv_heads, tokens, size)
        and heads % kv_heads == 0
        and size % 2 == 0
        and size <= 256
        and tokens > 0
        and all(x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in (q_BHTD, k_BKTD, v_BKTD))
    )
    return fits and kernel_name(q_BHTD.device, q_BHTD.dtype) != "torch"


def causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v, bfloat16 [B, H, T, D]; query heads share key-value heads.

    Scores and softmax are float32; the weights are rounded to bfloat16 for the second product, as
    torch's own kernel does. Does not depend on the number of threads.

    Raises:
        ValueError: tensors that `supports_causal_attention` refuses.
    """
    from prune_llm_kernels import _C, cpu

    if not supports_causal_attention(q_BHTD, k_BKTD, v_BKTD):
        raise ValueError(
            f"q {list(q_BHTD.shape)} {q_BHTD.dtype}, k {list(k_BKTD.shape)}, v "
            f"{list(v_BKTD.shape)}: not supported; use scaled_dot_product_attention"
        )
    samples, heads, tokens, size = q_BHTD.shape
    # tokens before heads: what models transpose it to next
    out_BHTD = q_BHTD.new_empty(samples, tokens, heads, size).transpose(1, 2)
    isa, threads = cpu.isa_index(), torch.get_num_threads()
    scratch = torch.empty(threads * _C.attention_scratch(isa, tokens, size), dtype=torch.uint8)
    _C.causal_attention(
        isa,
        threads,
        _strided(q_BHTD),
        _strided(k_BKTD),
        _strided(v_BKTD),
        _strided(out_BHTD),
        samples,
        heads,
        k_BKTD.shape[1],
        tokens,
        size,
        scale,
        scratch.data_ptr(),
    )
    return out_BHTD


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
