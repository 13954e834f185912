"""A checkpoint directory in the sparse form: opened by its headers, written weight by weight."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_llm.checkpoint import (
    DTYPES,
    INDEX_FILE,
    REPORT_FILE,
    Checkpoint,
    StoredTensor,
    _indexed_files,
    _read_config,
    companions,
    locate,
    open_checkpoint,
    read_header,
    save_part,
    write_shards,
)
from prune_llm.format import (
    BITMASK,
    PACKED,
    QUANT_METHOD,
    SUFFIXES,
    Header,
    SparseFormat,
    check_headers,
    pack,
    saves_space,
    unpack,
    validate,
)
from prune_llm.masks import Pattern

# transformers' names for the variant "sparse"; one that does not know our form finds no file
VARIANT = "sparse"
SPARSE_WEIGHTS_FILE = "model.sparse.safetensors"
SPARSE_INDEX_FILE = "model.safetensors.index.sparse.json"


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight on disk: ``parts`` by suffix, ``in_features`` its I."""

    name: str
    parts: dict[str, StoredTensor]
    in_features: int

    @property
    def shape_OI(self) -> tuple[int, int]:
        return self.parts[BITMASK].shape[0], self.in_features

    @property
    def kept(self) -> int:
        part = self.parts[PACKED]
        return part.nbytes // DTYPES[part.dtype].itemsize

    @property
    def dense_nbytes(self) -> int:
        rows, width = self.shape_OI
        return rows * width * DTYPES[self.parts[PACKED].dtype].itemsize

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def read(self, pattern: Pattern) -> dict[str, Tensor]:
        """The parts by suffix, checked completely. Raises ValueError naming the tensor."""
        parts = {suffix: part.read() for suffix, part in self.parts.items()}
        validate(self.name, parts, self.in_features, pattern)
        return parts


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
        return plain + sum(math.prod(weight.shape_OI) for weight in self.packed.values())

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.form.pattern)

    def read(self, name: str) -> Tensor:
        """One tensor as a dense checkpoint stores it; a packed one is checked first."""
        if name in self.plain:
            return self.plain[name].read()
        weight = self.packed[name]
        dense_OI = unpack(weight.read(self.pattern), weight.in_features)
        return dense_OI.T.contiguous() if name in self.form.transposed else dense_OI


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
    plain: dict[str, StoredTensor] = {}
    gathered: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((s for s in SUFFIXES if name.endswith("weight" + s)), None)
        if suffix is None:
            plain[name] = tensor
        else:
            gathered.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    packed = {}
    for name, parts in gathered.items():
        headers = {s: Header(DTYPES[part.dtype], part.shape) for s, part in parts.items()}
        width = check_headers(name, headers, form.in_features.get(name), pattern)
        packed[name] = PackedTensor(name, parts, width)
    return packed, plain


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
        self.last: Part | None = None  # what was added last
        self._files, self._kept, self._weights = 0, 0, 0

    def add(self, weights: dict[str, Tensor], transposed: Collection[str] = ()) -> dict[str, int]:
        """Pack and save pruned weights, by name on disk, in their orientation on disk.

        A weight that packing does not make smaller is stored dense.

        Returns:
            The bytes each takes on disk.
        """
        tensors: dict[str, Tensor] = {}
        packed: dict[str, dict[str, Any]] = {}
        sizes = {name: stored.nbytes for name, stored in weights.items()}
        for name, stored in weights.items():
            weight_OI = stored.T.contiguous() if name in transposed else stored
            parts = pack(weight_OI, self.pattern or Pattern(0.0), name)
            if not saves_space(parts, weight_OI):
                tensors[name] = stored
                continue
            names = [name + suffix for suffix in parts]
            tensors |= dict(zip(names, parts.values(), strict=True))
            packed[name] = {
                "parts": names,
                "in_features": weight_OI.shape[1],
                "transposed": name in transposed,
            }
            sizes[name] = sum(part.nbytes for part in parts.values())
        file = self.directory / f"weight-{self._files + 1:06d}.part"
        self._take(Part(file, packed), save_part(file, tensors))
        return sizes

    def restore(self, part: Part) -> None:
        """As if the weights of a part had been added again."""
        self._take(part, {tensor.name: tensor for tensor in read_header(part.file)})

    def _take(self, part: Part, tensors: dict[str, StoredTensor]) -> None:
        for name, how in part.packed.items():
            self._note(name, how["in_features"], how["transposed"])
            self._kept += math.prod(tensors[name + PACKED].shape)
            self._weights += tensors[name + BITMASK].shape[0] * how["in_features"]
            self.packed[name] = how["parts"]
        self.parts |= tensors
        self._files += 1
        self.last = part

    def _note(self, name: str, width: int, transposed: bool) -> None:
        in_features = {name: width} if width % 8 else {}
        self.form = replace(
            self.form,
            in_features=self.form.in_features | in_features,
            transposed=self.form.transposed + ((name,) if transposed else ()),
        )

    def finish(self, source: Checkpoint, directory: Path | None = None) -> None:
        """Write the shards, their index, config.json and what travels with the weights.

        Args:
            directory: None: that of the parts, which are removed.
        """
        directory = directory or self.directory
        tensors = []
        for name, tensor in source.tensors.items():
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


def _rename_to_variant(directory: Path) -> None:
    """model-00001-of-00002.safetensors becomes model.sparse-00001-of-00002.safetensors."""
    for file in directory.glob("model*.safetensors"):
        file.rename(directory / file.name.replace("model", f"model.{VARIANT}", 1))
    index = directory / INDEX_FILE
    if index.is_file():
        content = index.read_text().replace('"model-', f'"model.{VARIANT}-')
        (directory / SPARSE_INDEX_FILE).write_text(content)
        index.unlink()


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
