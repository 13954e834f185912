"""The weights of a checkpoint, copied as they are into the sparse form, to carry thresholds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prune_llm.activation.levels import LevelTable
from prune_llm.checkpoint import Checkpoint, StoredTensor, write_shards
from prune_llm.masks import Pattern
from prune_llm.sparse_checkpoint import (
    SparseCheckpoint,
    finish_directory,
    is_sparse,
    open_sparse,
)
from prune_llm.sparse_writer import SparseWriter, _rename_to_variant


def copy_weights(source: SparseCheckpoint, directory: Path, table: LevelTable) -> None:
    """Write the sparse form of ``source`` with its tensors byte for byte and the table.

    A dense checkpoint gets the sparse form with nothing packed and the pattern "0".

    Raises:
        RuntimeError: what was written is not what was read.
    """
    if is_sparse(source.config):
        write_shards(directory, _stored(source).values())
        _rename_to_variant(directory)
        finish_directory(source.directory, directory, source.config)
    else:
        dense = Checkpoint(source.directory, source.config, source.plain)
        SparseWriter(directory, Pattern(0.0)).finish(dense)
    write_table(directory, table)
    _compare(_stored(source), _stored(open_sparse(directory)))


def write_table(directory: Path, table: LevelTable) -> None:
    """Put the table into the config.json of a sparse directory."""
    file = directory / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    config["quantization_config"]["activation"] = table.to_json()
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _stored(checkpoint: SparseCheckpoint) -> dict[str, StoredTensor]:
    """All tensors as they lie on disk, by their names there."""
    parts = (part for weight in checkpoint.packed.values() for part in weight.parts.values())
    return {tensor.name: tensor for tensor in (*checkpoint.plain.values(), *parts)}


def _compare(one: dict[str, StoredTensor], other: dict[str, StoredTensor]) -> None:
    if one.keys() != other.keys():
        different = sorted(one.keys() ^ other.keys())
        raise RuntimeError(f"tensor names differ after writing, first {different[0]!r}")
    for name, tensor in one.items():
        same = zip(tensor.chunks(), other[name].chunks(), strict=True)
        if tensor.nbytes != other[name].nbytes or any(a != b for a, b in same):
            raise RuntimeError(f"{name}: differs after writing: a bug, or a broken disk")
