"""Operations over many tokens on the CPU, for calibration and prefill.

Products (Gram matrix, causal attention) exist for bfloat16 on some machines; `supports_*` say
whether this machine and these tensors have the fast form, so that a caller chooses knowingly. The
small operations exist for every dtype and machine where the extension is built. Shape letters:
B = samples, H = query heads, K = key-value heads, T = tokens, D = head size, R = its rotated part,
I = input features, D also the columns of a left factor.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from prune_llm_kernels.packed_weight import DTYPES
from prune_llm_kernels.plan import check_buffer

GRAM_PANEL = 48  # kGramPanel of csrc/tokens.h


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What multiplies tokens of this kind: an instruction set, or "torch" where we have none."""
    if not _ours(device, dtype):
        return "torch"
    from prune_llm_kernels import _C, cpu

    index = cpu.isa_index()
    return cpu.isa_names()[index] if _C.has_gram(index) else "torch"


def _ours(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there may be a kernel for products of tokens."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return os.environ.get("PRUNE_LLM_BACKEND") != "reference" and _built()


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
    _check_product(sum_II, x_TI, x_TI)
    x_TI, packed = x_TI.contiguous(), _packing_room(x_TI)
    _C.gram_add(
        cpu.isa_index(),
        torch.get_num_threads(),
        x_TI.data_ptr(),
        tokens,
        width,
        packed.data_ptr(),
        sum_II.data_ptr(),
    )


def cross_add(sum_DI: Tensor, a_TD: Tensor, b_TI: Tensor) -> None:
    """sum += a^T b; as `gram_add`, whose machines have it.

    Args:
        sum_DI: float32 [D, I], contiguous. a_TD, b_TI: bfloat16.

    Raises:
        ValueError: a shape, dtype or layout that does not fit.
    """
    from prune_llm_kernels import _C, cpu

    _check_product(sum_DI, a_TD, b_TI)
    a_TD, b_TI = a_TD.contiguous(), b_TI.contiguous()
    packed_a, packed_b = _packing_room(a_TD), _packing_room(b_TI)
    _C.cross_add(
        cpu.isa_index(),
        torch.get_num_threads(),
        a_TD.data_ptr(),
        b_TI.data_ptr(),
        len(b_TI),
        a_TD.shape[1],
        b_TI.shape[1],
        packed_a.data_ptr(),
        packed_b.data_ptr(),
        sum_DI.data_ptr(),
    )


def _check_product(sum_DI: Tensor, a_TD: Tensor, b_TI: Tensor) -> None:
    shape = (a_TD.shape[1], b_TI.shape[1])
    if sum_DI.shape != shape or sum_DI.dtype != torch.float32:
        raise ValueError(
            f"sum is {sum_DI.dtype} of shape {list(sum_DI.shape)}; it must be torch.float32 "
            f"{list(shape)}"
        )
    if not sum_DI.is_contiguous():
        raise ValueError("sum is not contiguous; pass a contiguous tensor, it is changed in place")
    named = {"x": a_TD} if a_TD is b_TI else {"a": a_TD, "b": b_TI}
    for name, x in named.items():
        if x.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {x.dtype}; it must be torch.bfloat16")
    if len(a_TD) != len(b_TI):
        raise ValueError(f"a has {len(a_TD)} tokens and b {len(b_TI)}; they must be the same")


def _packing_room(x_TI: Tensor) -> Tensor:
    tokens, width = x_TI.shape
    return torch.empty(-(-width // GRAM_PANEL) * -(-tokens // 2) * GRAM_PANEL, dtype=torch.int32)


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
    if not fits or not _ours(q_BHTD.device, q_BHTD.dtype):
        return False
    from prune_llm_kernels import _C, cpu

    return _C.has_attention(cpu.isa_index())


def causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v, bfloat16 [B, H, T, D]; query heads share key-value heads.

    Scores and softmax are float32. Where products are bfloat16 (AVX-512 with BF16) the weights are
    rounded to it for the second one, as torch's own kernel does. Does not depend on the number of
    threads.

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


def supports_rows(x: Tensor) -> bool:
    """Whether `rms_norm`, `silu_mul`, `rotate_heads` and `add_squares` take this tensor."""
    if os.environ.get("PRUNE_LLM_BACKEND") == "reference" or not _built():
        return False
    return x.device.type == "cpu" and x.dtype in DTYPES


def rms_norm(x: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight along the last dimension, rounded once."""
    from prune_llm_kernels import _C

    x = x.contiguous()
    check_buffer("weight", weight_I, x.dtype, (x.shape[-1],))
    out = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    _C.rms_norm(
        *_where(x),
        x.data_ptr(),
        weight_I.data_ptr(),
        out.data_ptr(),
        rows,
        x.shape[-1],
        eps,
    )
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + e^-gate) * up, rounded once."""
    from prune_llm_kernels import _C

    gate, up = gate.contiguous(), up.contiguous()
    check_buffer("up", up, gate.dtype, tuple(gate.shape))
    out = torch.empty_like(gate)
    _C.silu_mul(*_where(gate), gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())
    return out


def rotate_heads(x_BTHD: Tensor, cosine_TR: Tensor, sine_TR: Tensor) -> Tensor:
    """Heads [B, H, T, D], contiguous, their first R elements turned by the angle of each token.

    Args:
        x_BTHD: heads and their elements contiguous, tokens at any stride.
        cosine_TR, sine_TR: elements i and i + R/2 turn together; R = 0 moves the heads only.
    """
    from prune_llm_kernels import _C

    B, T, H, D = x_BTHD.shape
    R = cosine_TR.shape[-1]
    if R % 2 or R > D or sine_TR.shape != cosine_TR.shape or cosine_TR.shape[0] != T:
        raise ValueError(
            f"cosine {list(cosine_TR.shape)}, sine {list(sine_TR.shape)}: must be [{T}, R] with R "
            f"even and at most {D}"
        )
    pitch = x_BTHD.stride(1)
    if x_BTHD.stride()[2:] != (D, 1) or (B > 1 and x_BTHD.stride(0) != T * pitch):
        x_BTHD = x_BTHD.contiguous()
        pitch = H * D
    cosine_TR, sine_TR = cosine_TR.float().contiguous(), sine_TR.float().contiguous()
    out = x_BTHD.new_empty(B, H, T, D)
    _C.rotate(
        *_where(x_BTHD),
        x_BTHD.data_ptr(),
        out.data_ptr(),
        cosine_TR.data_ptr(),
        sine_TR.data_ptr(),
        B,
        T,
        H,
        D,
        R,
        pitch,
    )
    return out


def add_squares(sum_I: Tensor, x_TI: Tensor) -> None:
    """sum += the squares of x over its tokens, in float64.

    Args:
        sum_I: float64 [I], contiguous.
    """
    from prune_llm_kernels import _C

    x_TI = x_TI.contiguous()
    tokens, width = x_TI.shape
    check_buffer("sum", sum_I, torch.float64, (width,))
    _C.add_squares(*_where(x_TI), x_TI.data_ptr(), sum_I.data_ptr(), tokens, width)


def _where(x: Tensor) -> tuple[int, int, int]:
    """Instruction set, dtype and threads of a call."""
    from prune_llm_kernels import cpu

    return cpu.isa_index(), cpu.dtype_code(x.dtype), torch.get_num_threads()
