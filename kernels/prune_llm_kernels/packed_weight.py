"""A packed weight that has been checked: what the kernels may trust."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_llm_kernels.dispatch import backend_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The stored form of a weight [O, I], checked when it is made and used as it is.

    The kernels read these tensors in place: no second copy exists, so memory is what the file has.
    After changing one of them in place, make a new PackedWeight; the kernels do not check again.

    Args:
        bitmask: uint8 [O, ceil(I/8)]; bit j (least significant first) of byte b keeps column
            8b + j; padding bits are 0.
        packed: kept values in row-major order; [nnz] with offsets, else [O, K].
        offsets: int32 or int64 [O + 1], start of each row in packed; None for N:M patterns.
        in_features: I.
        name: of the weight in its model, for error messages.

    Raises:
        ValueError: names the tensor and the rule it breaks.
    """

    bitmask: Tensor
    packed: Tensor
    offsets: Tensor | None
    in_features: int
    name: str = "weight"

    def __post_init__(self) -> None:
        _check_tensors(self)
        backend = backend_for(self.packed.device.type)
        try:
            backend.check_contents(self.bitmask, self.packed, self.offsets, self.in_features)
        except ValueError as error:
            raise ValueError(f"{self.name}_{error}") from None
        backend.settle(self.bitmask)
        backend.settle(self.packed)

    @property
    def out_features(self) -> int:
        return self.bitmask.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all three tensors."""
        tensors = (self.bitmask, self.packed, self.offsets)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _check_tensors(weight: PackedWeight) -> None:
    """Everything that can be told without reading a tensor's content."""
    name, columns = weight.name, weight.in_features
    if columns < 1:
        raise ValueError(f"{name}: in_features is {columns}; it must be at least 1")
    _check_form(f"{name}_bitmask", weight.bitmask, (torch.uint8,), 2, weight.packed.device)
    O, B = weight.bitmask.shape
    if (columns + 7) // 8 != B:
        raise ValueError(
            f"{name}_bitmask has shape {[O, B]}; {columns} input features need {(columns + 7) // 8}"
            " bytes a row"
        )
    dimensions = 1 if weight.offsets is not None else 2
    _check_form(f"{name}_packed", weight.packed, DTYPES, dimensions, weight.packed.device)
    if weight.offsets is None:
        if weight.packed.shape[0] != O or weight.packed.shape[1] > columns:
            raise ValueError(
                f"{name}_packed has shape {list(weight.packed.shape)}; without offsets it must be"
                f" [{O}, K] with K at most {columns}"
            )
        return
    offsets = weight.offsets
    _check_form(f"{name}_offsets", offsets, (torch.int32, torch.int64), 1, weight.packed.device)
    if offsets.shape[0] != O + 1:
        raise ValueError(
            f"{name}_offsets has {offsets.shape[0]} entries; {O} output features need {O + 1}"
        )


def _check_form(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    dimensions: int,
    device: torch.device,
) -> None:
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be one of {allowed}")
    if tensor.dim() != dimensions:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; it must have {dimensions} dimensions"
        )
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; the packed values are on {device}")
    if tensor.device.type == "cpu" and tensor.data_ptr() % tensor.element_size():
        raise ValueError(f"{name} is not aligned to its {tensor.element_size()}-byte elements")
