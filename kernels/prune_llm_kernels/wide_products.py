"""Products of 16-bit matrices in float32, for CPUs whose 16-bit multiply instructions are slow.

On a CPU without any (AVX2 only, say) torch multiplies bfloat16 and float16 matrices without its
GEMM library: many rows take 4 to 7 times as long as in float32. Intel's cores with AVX-512 BF16 do
a dot product of pairs in the time of almost four multiply-adds, of which it stands for two; where
AMX is missing or hidden from a virtual machine, 512 rows take 1.4 to 1.6 times as long. A float32
product of the same values, rounded once at its end, is as exact and costs one conversion of each
operand.

Shape letters: T = rows (tokens), I = inner features, O = output features.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# fewer rows do not pay for converting the weight: without a library (measured: 16 rows lose, 128
# gain 3 times), and with slow dot products (measured: 128 rows lose by a large weight, 256 gain)
MIN_ROWS, MIN_ROWS_OF_PAIRS = 64, 256
# of a weight's float32 copy; a larger one is converted and multiplied a slice at a time. Memory
# that malloc maps for each costs a fault a page, so they stay below the 8 MB from which it does
# with `prune_llm.memory` (measured: 4096 x 4096 by 512 rows takes 63 ms, in slices of 32 MB 74)
SLICE_BYTES = 6 * 2**20

# dtype -> what tells whether torch's GEMM library has it natively
_CHECKS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@functools.cache
def slow_dtypes() -> dict[torch.dtype, int]:
    """The 16-bit types that torch multiplies slowly on this CPU, and from how many rows on."""
    names = {dtype: name for dtype, name in _CHECKS.items() if hasattr(torch.ops.mkldnn, name)}
    slow = {d: MIN_ROWS for d, name in names.items() if not getattr(torch.ops.mkldnn, name)()}
    if _slow_pairs() and not torch.cpu._is_amx_tile_supported():
        slow.setdefault(torch.bfloat16, MIN_ROWS_OF_PAIRS)
    return slow


def _slow_pairs() -> bool:
    try:
        from prune_llm_kernels import _C
    except ImportError:
        return False  # whoever needs the extension says so
    return _C.has_slow_pairs()


def pays(x: Tensor, rows: int) -> bool:
    """Whether a product of that many rows of x's type is faster in float32."""
    return x.device.type == "cpu" and rows >= slow_dtypes().get(x.dtype, sys.maxsize)


def product(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W + bias [T, O] in x's dtype: float32 sums, rounded once.

    Holds float32 copies of x and of at most SLICE_BYTES of the weight.
    """
    wide_TI, (I, O) = x_TI.float(), weight_IO.shape
    y_TO = x_TI.new_empty(len(x_TI), O)
    step = max(1, SLICE_BYTES // max(1, 4 * I))
    for begin in range(0, O, step):
        part = slice(begin, begin + step)
        piece = wide_TI @ weight_IO[:, part].float()
        y_TO[:, part] = piece if bias_O is None else piece.add_(bias_O[part])
    return y_TO


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """torch's linear, x [..., I] -> [..., O], in float32 where that is faster."""
    if not pays(x, x.numel() // max(1, x.shape[-1])):
        return torch.nn.functional.linear(x, weight_OI, bias_O)
    y_TO = product(x.reshape(-1, x.shape[-1]), weight_OI.T, bias_O)
    return y_TO.view(*x.shape[:-1], len(weight_OI))


def multiplier(x: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What multiplies x by slices of a weight [O, I] in turn; in float32 where that is faster.

    Its results are float32 then, to be rounded where they are put.
    """
    if not pays(x, x.numel() // max(1, x.shape[-1])):
        return functools.partial(torch.nn.functional.linear, x)
    wide = x.float()

    def multiply(weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        y = torch.nn.functional.linear(wide, weight_OI.float())
        return y if bias_O is None else y.add_(bias_O)

    return multiply


class WideProducts(TorchDispatchMode):
    """Within it torch's matrix products, of whatever module, run in float32 where that is faster.

    Covers backward passes that run within it too. Everything else runs as it is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN.linear.default:  # in inference mode it arrives whole
            return linear(*args, **kwargs)
        place = _PLACES.get(func)
        if place is None or args[place].ndim < 2 or not pays(args[place], args[place].shape[-2]):
            return func(*args, **kwargs)
        return _widened(func, args, kwargs)


_ATEN = torch.ops.aten
# product -> the place of its left factor among its arguments
_PLACES = {
    _ATEN.mm.default: 0,
    _ATEN.bmm.default: 0,
    _ATEN.matmul.default: 0,
    _ATEN.addmm.default: 1,
    _ATEN.baddbmm.default: 1,
}


def _widened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if func is _ATEN.mm.default:
        return product(*args)
    if func is _ATEN.addmm.default and args[0].ndim == 1 and not kwargs:
        bias_O, x_TI, weight_IO = args
        if len(bias_O) == weight_IO.shape[1]:
            return product(x_TI, weight_IO, bias_O)
    wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
    result: Tensor = func(*wide, **kwargs)
    return result.to(args[0].dtype)
