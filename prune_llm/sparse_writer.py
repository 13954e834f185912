"""Packs pruned weights as they come, and writes the sparse directory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_llm.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    StoredTensor,
    read_header,
    write_shards,
)
from prune_llm.experts import whole_name
from prune_llm.format import BITMASK, PACKED, SUFFIXES, pack, saves_space, unpack
from prune_llm.masks import Pattern
from prune_llm.part_file import PartFile, save_part
from prune_llm.slices import joined_packed, slice_names, with_parts
from prune_llm.sparse_checkpoint import SPARSE_INDEX_FILE, VARIANT, finish_directory
from prune_llm.sparse_format import SparseFormat


@dataclass(frozen=True)
class Part:
    """A file of pruned weights that waits to be put into a checkpoint.

    Attributes:
        packed: by name on disk how a weight is packed: "parts", names of its tensors in the file,
            "in_features", "transposed". The others are dense.
    """

    file: Path
    packed: dict[str, dict[str, Any]] = field(default_factory=dict)


class SparseWriter:
    """Packs weights as they come, then writes the sparse directory.

    Used by `export`, and by anything that makes pruned weights one block at a time.

    Args:
        directory: where the weights lie until `finish`.
        pattern: of all weights; None where they differ or it is unknown: they are then packed as
            unstructured ones, which fits any, and the pattern saved is the sparsity realised.
    """

    def __init__(self, directory: Path, pattern: Pattern | None) -> None:
        self.directory = directory
        self.pattern = pattern
        self.form = SparseFormat(str(pattern or Pattern(0.0)))
        self.parts: dict[str, StoredTensor] = {}
        self.packed: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self._files, self._kept, self._weights = 0, 0, 0

    def add(self, weights: dict[str, Tensor], transposed: Collection[str] = ()) -> None:
        """Pack and save pruned weights, by name on disk, in their orientation on disk."""
        part = self.open(weights)
        for name, stored in weights.items():
            part.add(name, stored, name in transposed)
        part.close()

    def open(self, names: Iterable[str]) -> PackedPart:
        """A part that weights of these names can be added to; one is open at a time."""
        return PackedPart(self, self.directory / f"weight-{self._files + 1:06d}.part", names)

    def restore(self, part: Part) -> None:
        """As if the weights of a part had been added again."""
        self._take(part, {tensor.name: tensor for tensor in read_header(part.file)})

    def _take(self, part: Part, tensors: dict[str, StoredTensor]) -> None:
        for name, how in part.packed.items():
            self._note(whole_name(name), how["in_features"], how["transposed"])
            self._kept += math.prod(tensors[name + PACKED].shape)
            self._weights += tensors[name + BITMASK].shape[0] * how["in_features"]
            self.packed[name] = how["parts"]
            self.sizes[name] = sum(tensors[part].nbytes for part in how["parts"])
        stored = {part for how in part.packed.values() for part in how["parts"]}
        self.sizes |= {n: tensor.nbytes for n, tensor in tensors.items() if n not in stored}
        self.parts |= tensors
        self._files += 1

    def _note(self, name: str, width: int, transposed: bool) -> None:
        in_features = {name: width} if width % 8 else {}
        names = (name,) if transposed and name not in self.form.transposed else ()
        self.form = replace(
            self.form,
            in_features=self.form.in_features | in_features,
            transposed=self.form.transposed + names,
        )

    def finish(self, source: Checkpoint, directory: Path | None = None) -> None:
        """Write the shards, their index, config.json and what travels with the weights.

        Args:
            directory: None: that of the parts, which are removed.
        """
        directory = directory or self.directory
        tensors: list[StoredTensor] = []
        for name, tensor in source.tensors.items():
            self._join(tensor)
            names = self.packed.get(name, [name])
            tensors += [self.parts.get(part, tensor) for part in names]
        write_shards(directory, tensors)
        _rename_to_variant(directory)
        dense = [t for name, t in source.tensors.items() if name not in self.packed]
        ignore = [t.name.removesuffix(".weight") for t in dense if len(t.shape) == 2]
        form = replace(self.form, ignore=tuple(sorted(ignore)))
        if self.pattern is None and self._weights:
            sparsity = min(1 - self._kept / self._weights, 0.9999)
            form = replace(form, pattern=f"{sparsity:.4g}")
        config = source.config | {"quantization_config": form.to_json()}
        finish_directory(source.directory, directory, config)

    def _join(self, tensor: StoredTensor) -> None:
        """Put the experts of a fused tensor together: packed where each of them is, else dense."""
        names = slice_names(tensor)
        packed = [name for name in names if name in self.packed]
        if names and packed == names:
            for suffix in (s for s in SUFFIXES if names[0] + s in self.parts):
                pieces = [self.parts[name + suffix] for name in names]
                self.parts[tensor.name + suffix] = joined_packed(tensor.name, suffix, pieces)
            kept = [tensor.name + s for s in SUFFIXES if tensor.name + s in self.parts]
            self.packed[tensor.name] = kept
            return
        for name in packed:
            self._unpack(name)
        self.parts[tensor.name] = with_parts(tensor, self.parts)

    def _unpack(self, name: str) -> None:
        """Store an expert dense after all, as others beside it in one tensor are."""
        parts = {s: self.parts[name + s].read() for s in SUFFIXES if name + s in self.parts}
        whole = whole_name(name)
        width = self.form.in_features.get(whole, 8 * parts[BITMASK].shape[1])
        weight_OI = unpack(parts, width)
        stored = weight_OI.T.contiguous() if whole in self.form.transposed else weight_OI
        self._kept -= parts[PACKED].numel()
        self._weights -= weight_OI.numel()
        del self.packed[name]
        file = self.directory / f"weight-{self._files + 1:06d}.part"
        self._take(Part(file), save_part(file, {name: stored}))


class PackedPart:
    """Weights that are packed as they come. One that packing does not make smaller stays dense."""

    def __init__(self, writer: SparseWriter, path: Path, names: Iterable[str]) -> None:
        self._writer, self._part = writer, Part(path)
        self._file = PartFile(path, [name + suffix for name in names for suffix in ("", *SUFFIXES)])

    def add(self, name: str, stored: Tensor, transposed: bool) -> None:
        weight_OI = stored.T.contiguous() if transposed else stored
        parts = pack(weight_OI, self._writer.pattern or Pattern(0.0), name)
        if not saves_space(parts, weight_OI):
            self._file.append(name, stored)
            return
        for suffix, tensor in parts.items():
            self._file.append(name + suffix, tensor)
        self._part.packed[name] = {
            "parts": [name + suffix for suffix in parts],
            "in_features": weight_OI.shape[1],
            "transposed": transposed,
        }

    def close(self) -> Part:
        self._writer._take(self._part, self._file.close())
        return self._part


def _rename_to_variant(directory: Path) -> None:
    """model-00001-of-00002.safetensors becomes model.sparse-00001-of-00002.safetensors."""
    for file in directory.glob("model*.safetensors"):
        file.rename(directory / file.name.replace("model", f"model.{VARIANT}", 1))
    index = directory / INDEX_FILE
    if index.is_file():
        content = index.read_text().replace('"model-', f'"model.{VARIANT}-')
        (directory / SPARSE_INDEX_FILE).write_text(content)
        index.unlink()
