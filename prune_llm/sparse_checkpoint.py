"""A checkpoint directory in the sparse form: opened by its headers, written weight by weight."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_llm.checkpoint import (
    DTYPES,
    REPORT_FILE,
    StoredTensor,
    _indexed_files,
    _read_config,
    companions,
    locate,
    open_checkpoint,
    read_header,
)
from prune_llm.experts import slice_name, split_name, whole_name
from prune_llm.format import (
    BITMASK,
    OFFSETS,
    PACKED,
    SUFFIXES,
    Header,
    check_headers,
    unpack,
    validate,
)
from prune_llm.masks import Pattern
from prune_llm.sparse_format import QUANT_METHOD, SparseFormat

# transformers' names for the variant "sparse"; one that does not know our form finds no file
VARIANT = "sparse"
SPARSE_WEIGHTS_FILE = "model.sparse.safetensors"
SPARSE_INDEX_FILE = "model.safetensors.index.sparse.json"


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight on disk: ``parts`` by suffix, ``in_features`` its I; or fused experts."""

    name: str
    parts: dict[str, StoredTensor]
    in_features: int

    @property
    def experts(self) -> int | None:
        """How many weights it holds where it is the fused experts of a block."""
        shape = self.parts[BITMASK].shape
        return shape[0] if len(shape) == 3 else None

    @property
    def shape_OI(self) -> tuple[int, int]:
        """Of the weight, or of each expert."""
        return self.parts[BITMASK].shape[-2], self.in_features

    @property
    def elements(self) -> int:
        """Of the dense form."""
        return (self.experts or 1) * math.prod(self.shape_OI)

    @property
    def kept(self) -> int:
        part = self.parts[PACKED]
        return part.nbytes // DTYPES[part.dtype].itemsize

    @property
    def dense_nbytes(self) -> int:
        return self.elements * DTYPES[self.parts[PACKED].dtype].itemsize

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self, pattern: Pattern) -> dict[str, Tensor]:
        """The parts by suffix, checked completely. Raises ValueError naming the tensor.

        Of fused experts one at a time is read: see `expert`.
        """
        assert self.experts is None
        parts = {suffix: part.read() for suffix, part in self.parts.items()}
        validate(self.name, parts, self.in_features, pattern)
        return parts

    def expert(self, index: int) -> PackedTensor:
        """One of the fused experts. Raises ValueError where the offsets lead outside."""
        values = self.parts[PACKED]
        parts = {BITMASK: self.parts[BITMASK].slice(index)}
        if OFFSETS in self.parts:
            parts[OFFSETS] = self.parts[OFFSETS].slice(index)
            parts[PACKED] = _stretch(values, *self._values(index))
        else:
            parts[PACKED] = values.slice(index)
        return PackedTensor(slice_name(self.name, index), parts, self.in_features)

    def _values(self, index: int) -> tuple[int, int]:
        """Where an expert's values lie: behind those of the experts before it."""
        ends = self._ends
        if ends != sorted(ends) or ends[-1] != self.kept:
            raise ValueError(
                f"{self.name}{OFFSETS}: lead to value {ends[-1]} of {self.kept}; get it again"
            )
        return ends[index - 1] if index else 0, ends[index]

    @cached_property
    def _ends(self) -> list[int]:
        counts_E = self.parts[OFFSETS].read()[:, -1].to(torch.int64)
        return [int(end) for end in counts_E.cumsum(0)]


@dataclass(frozen=True)
class SparseCheckpoint:
    """An opened sparse directory; everything is keyed by the dense names on disk.

    Attributes:
        packed: the weights stored packed.
        plain: the tensors stored as they were.
    """

    directory: Path
    config: dict[str, Any]
    form: SparseFormat
    packed: dict[str, PackedTensor]
    plain: dict[str, StoredTensor]

    @property
    def names(self) -> list[str]:
        return [*self.plain, *self.packed]

    @property
    def nbytes(self) -> int:
        plain = sum(tensor.nbytes for tensor in self.plain.values())
        return plain + sum(weight.nbytes for weight in self.packed.values())

    @property
    def elements(self) -> int:
        """Of all weights in their dense form."""
        plain = sum(math.prod(tensor.shape) for tensor in self.plain.values())
        return plain + sum(weight.elements for weight in self.packed.values())

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.form.pattern)

    def pieces(self, name: str) -> list[str]:
        """What to read a tensor by: itself, or the slices of packed fused experts."""
        experts = self.packed[name].experts if name in self.packed else None
        return [name] if experts is None else [slice_name(name, i) for i in range(experts)]

    def weight(self, name: str) -> PackedTensor:
        """A packed weight, or one expert of a fused one."""
        whole, index = split_name(name)
        return self.packed[whole] if index is None else self.packed[whole].expert(index)

    def plain_tensor(self, name: str) -> StoredTensor | None:
        """A tensor, or a slice of one, that is stored as it was."""
        whole, index = split_name(name)
        tensor = self.plain.get(whole)
        return tensor if tensor is None or index is None else tensor.slice(index)

    def read(self, name: str) -> Tensor:
        """A tensor, or a slice, as a dense checkpoint has it; what is packed is checked first."""
        plain, whole = self.plain_tensor(name), whole_name(name)
        if plain is not None:
            return plain.read()
        pieces = self.pieces(name)
        if pieces != [name]:
            return torch.stack([self.read(piece) for piece in pieces])
        weight = self.weight(name)
        dense_OI = unpack(weight.read(self.pattern), weight.in_features)
        return dense_OI.T.contiguous() if whole in self.form.transposed else dense_OI

    def check(self, name: str) -> None:
        """Read a packed weight and check it. Raises ValueError naming the tensor."""
        for piece in self.pieces(name):
            self.weight(piece).read(self.pattern)


def _stretch(values: StoredTensor, start: int, stop: int) -> StoredTensor:
    """The values from start to stop of a flat tensor."""
    size = DTYPES[values.dtype].itemsize
    place, nbytes = values.start + start * size, (stop - start) * size
    return replace(values, shape=(stop - start,), start=place, nbytes=nbytes)


def is_sparse(config: dict[str, Any]) -> bool:
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD


def open_sparse(model: str | os.PathLike[str]) -> SparseCheckpoint:
    """Open a sparse directory, or a hub name after downloading it; its headers are checked.

    Raises:
        ValueError: not found, not sparse, another format version, damaged or incomplete.
    """
    directory = locate(model)
    config = _read_config(directory)
    if not is_sparse(config):
        raise ValueError(f"{directory}: is not in the sparse form (prune-llm export makes it)")
    try:
        form = SparseFormat.parse(config["quantization_config"])
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    tensors: dict[str, StoredTensor] = {}
    for file in sparse_files(directory):
        tensors |= {tensor.name: tensor for tensor in read_header(file)}
    packed, plain = split_packed(tensors, form)
    return SparseCheckpoint(directory, config, form, packed, plain)


def open_stored(model: str | os.PathLike[str]) -> SparseCheckpoint:
    """Open a directory of either form; a dense one is seen as one with nothing packed.

    Raises:
        ValueError: as `open_sparse` and `open_checkpoint` do.
    """
    directory = locate(model)
    if is_sparse(_read_config(directory)):
        return open_sparse(directory)
    dense = open_checkpoint(directory)
    return SparseCheckpoint(dense.directory, dense.config, SparseFormat("0"), {}, dense.tensors)


def sparse_files(directory: Path) -> list[Path]:
    """The safetensors files of a sparse directory. Raises ValueError when one is missing."""
    if (directory / SPARSE_WEIGHTS_FILE).is_file():
        return [directory / SPARSE_WEIGHTS_FILE]
    if not (directory / SPARSE_INDEX_FILE).is_file():
        raise ValueError(
            f"{directory}: has no {SPARSE_WEIGHTS_FILE} and no {SPARSE_INDEX_FILE}; "
            "get the checkpoint again"
        )
    return _indexed_files(directory, directory / SPARSE_INDEX_FILE)


def split_packed(
    tensors: dict[str, StoredTensor], form: SparseFormat
) -> tuple[dict[str, PackedTensor], dict[str, StoredTensor]]:
    """Gather the parts of each packed weight; the rest is plain. Checks headers only."""
    pattern = Pattern.parse(form.pattern)
    gathered: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        if suffix is not None:
            gathered.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    # fused experts have no "weight" at the end of their name, and are known by two parts
    gathered = {n: p for n, p in gathered.items() if n.endswith("weight") or len(p) > 1}
    taken = {name + suffix for name, parts in gathered.items() for suffix in parts}
    packed = {}
    for name, parts in gathered.items():
        headers = {s: Header(DTYPES[part.dtype], part.shape) for s, part in parts.items()}
        width = check_headers(name, headers, form.in_features.get(name), pattern)
        packed[name] = PackedTensor(name, parts, width)
    return packed, {name: tensor for name, tensor in tensors.items() if name not in taken}


def finish_directory(source: Path, directory: Path, config: dict[str, Any]) -> None:
    """Remove the parts, copy what travels with the weights, write config.json."""
    for part in directory.glob("weight-*.part"):
        part.unlink()
    files = [file for file in companions(source) if file.name != SPARSE_INDEX_FILE]
    report = source / REPORT_FILE
    for file in [*files, report] if report.is_file() else files:
        shutil.copyfile(file, directory / file.name)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n")
