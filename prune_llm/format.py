"""The stored form of a sparse weight: a bitmask, the kept values, and where each row starts.

Pure tensors: no file, no model. A weight ``P.weight`` [O, I] becomes ``P.weight_bitmask``,
``P.weight_packed`` and, unless its pattern fixes the count per row, ``P.weight_offsets``.

Fused experts, a tensor P [E, O, I] or [E, I, O] on disk (with or without ".weight" at the end of
its name), are packed expert by expert, each as if it were alone, and stored one behind the other:
``P_bitmask`` uint8 [E, O, B], ``P_packed`` [E, O, K], or [nnz] flat with ``P_offsets`` [E, O + 1].
An expert's offsets count from its own first value: its values begin where those of the expert
before it end, and offsets[e, O] of them are its own. Rows are output features in the order of the
dense tensor (gate and up interleaved stay interleaved); I-major tensors are named in
``transposed``, like GPT-2's. Such a tensor is packed whole or not at all.

Shape letters: E = experts, O = output features, I = input features, B = ceil(I / 8) bytes of mask
per row, K = kept per row (N:M patterns), nnz = kept in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prune_llm.masks import Pattern, pruned_per_row, tail_kept

BITMASK, PACKED, OFFSETS = "_bitmask", "_packed", "_offsets"
SUFFIXES = (BITMASK, PACKED, OFFSETS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# offsets of a weight with fewer elements fit int32
WIDE_OFFSETS = 1 << 31

# weights handled at once
CHUNK = 1 << 22

# a weight's elements as unsigned integers: numpy knows no bfloat16, and bits compare exactly
_INTEGERS = {2: torch.uint16, 4: torch.uint32}
Bits = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def pack(weight_OI: Tensor, pattern: Pattern, name: str = "weight") -> dict[str, Tensor]:
    """Store the weights that are not zero.

    An N:M weight keeps exactly N of every M: where a kept weight happened to be zero, the leftmost
    zeros of its group count as kept.

    Args:
        weight_OI: bfloat16, float16 or float32 on the CPU; finite, no -0.0.
        name: of the weight, for error messages.

    Returns:
        Suffix -> tensor: ``_bitmask`` uint8 [O, B], least significant bit first; ``_packed`` in
        the weight's dtype, row-major: [nnz], or [O, K] for N:M; ``_offsets`` [O + 1] int32, int64
        from 2**31 weights on, only where the rows may differ.

    Raises:
        ValueError: another dtype or number of dimensions, NaN, infinite, -0.0, or too few zeros
            for an N:M pattern.
    """
    _check_packable(weight_OI, name)
    rows, width = weight_OI.shape
    bits_OI = _bits(weight_OI)
    values = np.empty(_kept(bits_OI, pattern), dtype=bits_OI.dtype)
    masks, position = [], 0
    for start, stop in _row_chunks(rows, width):
        keep_RI = bits_OI[start:stop] != 0
        if pattern.m is not None:
            _fill_groups(keep_RI, pattern, name)
        masks.append(np.packbits(keep_RI, axis=1, bitorder="little"))
        chosen = np.flatnonzero(keep_RI)  # three times as fast as indexing by the mask
        bits_OI[start:stop].reshape(-1).take(chosen, out=values[position : position + len(chosen)])
        position += len(chosen)
    assert position == len(values)
    bitmask_OB = np.concatenate(masks) if masks else np.empty((0, -(-width // 8)), np.uint8)
    packed = torch.from_numpy(values).view(weight_OI.dtype)
    if pattern.m is not None:
        packed = packed.reshape(rows, kept_per_row(width, pattern))
        return {BITMASK: torch.from_numpy(bitmask_OB), PACKED: packed}
    offsets = torch.from_numpy(np.concatenate([[0], _row_counts(bitmask_OB).cumsum()]))
    return {
        BITMASK: torch.from_numpy(bitmask_OB),
        PACKED: packed,
        OFFSETS: offsets.to(offsets_dtype(rows, width)),
    }


def unpack(parts: dict[str, Tensor], in_features: int) -> Tensor:
    """The dense weight [O, I], bit for bit what was packed. Trusts its input: see `validate`."""
    bitmask_OB, packed = parts[BITMASK].numpy(), parts[PACKED]
    values, position = _bits(packed.reshape(-1)), 0
    dense_OI = np.zeros((len(bitmask_OB), in_features), dtype=values.dtype)
    for start, stop in _row_chunks(*dense_OI.shape):
        chosen = np.flatnonzero(_keep(bitmask_OB[start:stop], in_features))
        dense_OI[start:stop].reshape(-1)[chosen] = values[position : position + len(chosen)]
        position += len(chosen)
    return torch.from_numpy(dense_OI).view(packed.dtype)


def _row_chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK weights: temporary indices take 8 bytes for each."""
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _kept(bits_OI: Bits, pattern: Pattern) -> int:
    if pattern.m is None:
        return int(np.count_nonzero(bits_OI))
    return len(bits_OI) * kept_per_row(bits_OI.shape[1], pattern)


def saves_space(parts: dict[str, Tensor], weight_OI: Tensor) -> bool:
    """Whether the packed form is smaller; a weight for which it is not is stored dense."""
    return sum(part.nbytes for part in parts.values()) < weight_OI.nbytes


def offsets_dtype(rows: int, width: int) -> torch.dtype:
    return torch.int64 if rows * width >= WIDE_OFFSETS else torch.int32


def kept_per_row(width: int, pattern: Pattern) -> int:
    """K of an N:M pattern for rows of ``width`` inputs, the short last group included."""
    return width - pruned_per_row((1, width), pattern)[0]


def _bits(tensor: Tensor) -> Bits:
    """The same memory as unsigned integers."""
    return np.asarray(tensor.contiguous().view(_INTEGERS[tensor.element_size()]).numpy())


def _keep(bitmask_RB: npt.NDArray[np.uint8], in_features: int) -> Mask:
    bits_RI = np.unpackbits(bitmask_RB, axis=1, count=in_features, bitorder="little")
    return bits_RI.view(np.bool_)


def _row_counts(bitmask_OB: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    counts_O: npt.NDArray[np.int64] = np.bitwise_count(bitmask_OB).sum(axis=1, dtype=np.int64)
    return counts_O


def _check_packable(weight_OI: Tensor, name: str) -> None:
    if weight_OI.ndim != 2:
        raise ValueError(f"{name}: has shape {list(weight_OI.shape)}; only matrices are packed")
    if weight_OI.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name}: has dtype {weight_OI.dtype}; packed weights are {allowed}")
    _check_values(weight_OI, name)


def _check_values(values: Tensor, name: str) -> None:
    """Finite, and no -0.0: a zero has one spelling, so that packing loses nothing."""
    bits = _bits(values.reshape(-1))
    infinity = int(_bits(torch.tensor([torch.inf], dtype=values.dtype))[0])
    sign = 1 << (8 * bits.itemsize - 1)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK]
        if int((chunk & bits.dtype.type(sign - 1)).max()) >= infinity:
            raise ValueError(f"{name}: holds NaN or infinite weights; prune the original again")
        if bool((chunk == sign).any()):
            raise ValueError(f"{name}: holds -0.0, zeros must be +0.0; add 0.0 to it first")


def _groups(width: int, pattern: Pattern) -> Iterator[tuple[slice, int, int]]:
    """The columns of full groups and of a short last one: columns, inputs a group, kept of them."""
    assert pattern.n is not None and pattern.m is not None
    full = width - width % pattern.m
    if full:
        yield slice(0, full), pattern.m, pattern.n
    if full < width:
        yield slice(full, width), width - full, tail_kept(width - full, pattern)


def _group_counts(keep_GM: Mask) -> npt.NDArray[np.uint16]:
    """Kept in each group; adding columns is twenty times as fast as summing short rows."""
    counts_G = np.zeros(len(keep_GM), dtype=np.uint16)
    for column in range(keep_GM.shape[1]):
        counts_G += keep_GM[:, column]
    return counts_G


def _fill_groups(keep_RI: Mask, pattern: Pattern, name: str) -> None:
    """In place: keep exactly N of every M, all that are not zero and then the leftmost zeros."""
    for columns, size, kept in _groups(keep_RI.shape[1], pattern):
        groups_GM = keep_RI[:, columns].reshape(-1, size)
        counts_G = _group_counts(groups_GM)
        if bool((counts_G > kept).any()):
            raise ValueError(
                f"{name}: a group of {size} inputs has {counts_G.max()} weights that are not zero,"
                f" pattern {pattern} allows {kept}"
            )
        short_G = np.flatnonzero(counts_G < kept)  # few: a kept weight is rarely zero
        zeros = ~groups_GM[short_G]
        missing = (kept - counts_G[short_G])[:, None]
        groups_GM[short_G] |= zeros & (zeros.cumsum(axis=1) <= missing)
        keep_RI[:, columns] = groups_GM.reshape(len(keep_RI), -1)


@dataclass(frozen=True)
class Header:
    """Dtype and shape of one stored tensor, known before its content is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def check_headers(
    name: str, headers: dict[str, Header], in_features: int | None, pattern: Pattern
) -> int:
    """Check everything about a packed weight that its headers tell; nothing is allocated.

    Args:
        name: of the weight ("P.weight"). headers: suffix -> header.
        in_features: I where it is known; None: 8 for each byte of a mask row.

    Returns:
        I.

    Raises:
        ValueError: naming the tensor.
    """
    for suffix in (BITMASK, PACKED) if pattern.m is not None else SUFFIXES:
        if suffix not in headers:
            raise ValueError(f"{name}{suffix}: is missing; get the checkpoint again")
    if pattern.m is not None and OFFSETS in headers:
        raise ValueError(f"{name}{OFFSETS}: is there, but pattern {pattern} has no offsets")
    if len(headers[BITMASK].shape) == 3:
        headers = _of_one_expert(name, headers)
    bitmask, packed, offsets = headers[BITMASK], headers[PACKED], headers.get(OFFSETS)
    _check_header(f"{name}{BITMASK}", bitmask, (torch.uint8,), 2)
    rows, row_bytes = bitmask.shape
    width = 8 * row_bytes if in_features is None else in_features
    if row_bytes != -(-width // 8) or width < 1:
        raise ValueError(
            f"{name}{BITMASK}: has {row_bytes} bytes a row; {width} inputs need {-(-width // 8)}"
        )
    _check_header(f"{name}{PACKED}", packed, DTYPES, 1 if offsets is not None else 2)
    if offsets is None:
        _check_fixed(name, packed, rows, width, pattern)
        return width
    _check_header(f"{name}{OFFSETS}", offsets, (offsets_dtype(rows, width),), 1)
    if offsets.shape[0] != rows + 1:
        raise ValueError(f"{name}{OFFSETS}: has {offsets.shape[0]} entries, not {rows + 1}")
    if packed.shape[0] > rows * width:
        raise ValueError(
            f"{name}{PACKED}: holds {packed.shape[0]} values, its weight has {rows * width}"
        )
    return width


def _of_one_expert(name: str, headers: dict[str, Header]) -> dict[str, Header]:
    """The headers of fused experts, as those of one of them alone. ValueError where they differ."""
    experts = headers[BITMASK].shape[0]
    found = {}
    for suffix, header in headers.items():
        if suffix == PACKED and OFFSETS in headers:  # flat: at most as many a head, on average
            values = -(-header.shape[0] // max(experts, 1)) if len(header.shape) == 1 else 0
            flat = len(header.shape) == 1
            found[suffix] = Header(header.dtype, (values,) if flat else header.shape)
            continue
        if experts < 1 or header.shape[:1] != (experts,):
            raise ValueError(
                f"{name}{suffix}: has shape {list(header.shape)} for {experts} experts"
            )
        found[suffix] = Header(header.dtype, header.shape[1:])
    return found


def _check_header(
    name: str, header: Header, dtypes: tuple[torch.dtype, ...], dimensions: int
) -> None:
    if header.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: has dtype {header.dtype}, must be {allowed}")
    if len(header.shape) != dimensions:
        raise ValueError(
            f"{name}: has shape {list(header.shape)}, must have {dimensions} dimensions"
        )


def _check_fixed(name: str, packed: Header, rows: int, width: int, pattern: Pattern) -> None:
    shape = (rows, kept_per_row(width, pattern))
    if packed.shape != shape:
        raise ValueError(
            f"{name}{PACKED}: has shape {list(packed.shape)}, pattern {pattern} over {width} "
            f"inputs needs {list(shape)}"
        )


def validate(name: str, parts: dict[str, Tensor], in_features: int, pattern: Pattern) -> None:
    """Check a packed weight completely: headers, counts against offsets, padding, pattern, values.

    Raises:
        ValueError: naming the tensor and the rule it breaks.
    """
    headers = {suffix: Header(part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    check_headers(name, headers, in_features, pattern)
    bitmask, packed = parts[BITMASK], parts[PACKED]
    padding = -in_features % 8
    if padding and bool((bitmask[:, -1] >> (8 - padding)).any()):
        raise ValueError(f"{name}{BITMASK}: has a padding bit set behind input {in_features - 1}")
    if OFFSETS in parts:
        _check_offsets(name, bitmask, packed.numel(), parts[OFFSETS])
    else:
        _check_groups(name, bitmask, in_features, pattern)
    _check_values(packed, f"{name}{PACKED}")


def _check_groups(name: str, bitmask: Tensor, in_features: int, pattern: Pattern) -> None:
    for start, stop in _row_chunks(bitmask.shape[0], in_features):
        keep_RI = _keep(bitmask[start:stop].numpy(), in_features)
        for columns, size, kept in _groups(in_features, pattern):
            counts_G = _group_counts(keep_RI[:, columns].reshape(-1, size))
            if bool((counts_G != kept).any()):
                raise ValueError(
                    f"{name}{BITMASK}: a group of {size} inputs does not keep {kept} weights, "
                    f"pattern {pattern}"
                )


def _check_offsets(name: str, bitmask: Tensor, nnz: int, offsets: Tensor) -> None:
    starts = offsets.to(torch.int64).numpy()
    if starts[0] != 0 or starts[-1] != nnz:
        raise ValueError(
            f"{name}{OFFSETS}: runs from {starts[0]} to {starts[-1]}, must run from 0 to the "
            f"{nnz} values of {name}{PACKED}"
        )
    counts = _row_counts(bitmask.numpy())
    wrong = np.flatnonzero(np.diff(starts) != counts)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{name}{OFFSETS}: gives row {row} {starts[row + 1] - starts[row]} values, its mask "
            f"keeps {counts[row]}"
        )
