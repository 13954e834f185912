"""Between the dense and the sparse form of a checkpoint, both ways, and what a directory holds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_llm.card_facts import copy_measured, read_report
from prune_llm.checkpoint import (
    DTYPES,
    REPORT_FILE,
    Checkpoint,
    StoredTensor,
    _read_config,
    locate,
    open_checkpoint,
    write_shards,
)
from prune_llm.experts import whole_name, without_index
from prune_llm.format import DTYPES as PACKABLE
from prune_llm.format import PACKED
from prune_llm.masks import Pattern
from prune_llm.memory import return_freed_memory
from prune_llm.model_card import write_card
from prune_llm.part_file import save_part
from prune_llm.slices import stacked
from prune_llm.sparse_checkpoint import (
    SparseCheckpoint,
    finish_directory,
    is_sparse,
    open_sparse,
    open_stored,
)
from prune_llm.sparse_writer import SparseWriter
from prune_llm.staging import Staging

FORMATS = ("dense", "sparse")
# "model.layers.3.mlp.up_proj.weight" -> "mlp.up_proj"
BLOCK_WEIGHT = re.compile(r"(?:^|\.)\d+\.(.+)\.weight$")
# "model.layers.3.mlp.experts.down_proj": no convolution, which has three dimensions too
FUSED_EXPERTS = re.compile(r"\.experts\.\w+$|_linear\.weight$")


OnProgress = Callable[[int, int], None]


def export(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str = "dense",
    on_progress: OnProgress | None = None,
) -> None:
    """Write ``model`` in the other form; every tensor is read back and compared, bit for bit.

    One weight is in memory at a time. The output appears when it is complete.

    Args:
        model: a directory that `prune` wrote, or any dense checkpoint with zeros in its linears.
        output: directory to write; must not exist yet.
        format: "dense" (plain zeros, loads everywhere) or "sparse" (packed).
        on_progress: called with the weights done and their number.

    Raises:
        ValueError: a bad format, model or output, or a model that has the form already.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: unknown; choose one of {', '.join(FORMATS)}")
    directory = locate(model)
    if is_sparse(_read_config(directory)) == (format == "sparse"):
        raise ValueError(f"{directory}: is in the {format} form already; copy it instead")
    return_freed_memory()
    with Staging(Path(output)) as staging:
        if format == "sparse":
            dense = open_checkpoint(directory)
            _write_sparse(dense, staging.directory, on_progress)
            _compare(open_sparse(staging.directory), dense)
        else:
            sparse = open_sparse(directory)
            _write_dense(sparse, staging.directory, on_progress)
            _compare(sparse, open_checkpoint(staging.directory))
        copy_measured(directory, staging.directory)
        write_card(staging.directory, directory, output)
        staging.publish()


def _compare(sparse: SparseCheckpoint, dense: Checkpoint) -> None:
    """Both hold the same tensors; what was written is read back from the disk."""
    if set(sparse.names) != dense.tensors.keys():
        different = sorted(set(sparse.names) ^ dense.tensors.keys())
        raise RuntimeError(f"tensor names differ after writing, first {different[0]!r}")
    for name in (piece for whole in dense.tensors for piece in sparse.pieces(whole)):
        one, other = sparse.read(name), dense.tensor(name).read()
        if one.dtype != other.dtype or one.shape != other.shape or not _same_bits(one, other):
            raise RuntimeError(f"{name}: differs after writing: a bug, or a broken disk")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _write_dense(source: SparseCheckpoint, directory: Path, on_progress: OnProgress | None) -> None:
    tensors, parts = dict(source.plain), 0
    for index, name in enumerate(source.packed):
        written: dict[str, StoredTensor] = {}
        for piece in source.pieces(name):
            parts += 1
            part = directory / f"weight-{parts:06d}.part"
            written |= save_part(part, {piece: source.read(piece)})
        tensors[name] = written[name] if name in written else stacked(name, written)
        _tell(on_progress, index + 1, len(source.packed))
    write_shards(directory, [tensors[name] for name in sorted(tensors)])
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    finish_directory(source.directory, directory, config)


def _write_sparse(source: Checkpoint, directory: Path, on_progress: OnProgress | None) -> None:
    linears = pruned_linears(source)
    writer = SparseWriter(directory, common_pattern(linears))
    for done, linear in enumerate(linears, 1):
        stored = source.tensor(linear.tensor).read()
        writer.add({linear.tensor: stored}, [linear.tensor] if linear.transposed else [])
        _tell(on_progress, done, len(linears))
    if not writer.packed:
        raise ValueError(
            f"{source.directory}: packing makes none of its {len(linears)} linears smaller; "
            "prune it first, or keep it dense"
        )
    writer.finish(source)


def _tell(on_progress: OnProgress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)


@dataclass(frozen=True)
class PrunedLinear:
    """A weight to pack: its name on disk, its pattern if known, whether disk has it as [I, O]."""

    tensor: str
    pattern: str | None
    transposed: bool
    nonzero: int | None = None


def pruned_linears(source: Checkpoint) -> list[PrunedLinear]:
    """What `prune` says it pruned, or for checkpoints of others every linear of every block."""
    report = read_report(source.directory)
    if report:
        known = source.tensors
        return [linear for linear in _reported(report) if whole_name(linear.tensor) in known]
    from prune_llm import architecture

    model = architecture.build(source.directory, source.tensors)
    return [
        PrunedLinear(model.disk_names[linear.weight_name], None, linear.transposed)
        for index in range(len(model.blocks))
        for linear in model.linears(index)
        if DTYPES[source.tensor(model.disk_names[linear.weight_name]).dtype] in PACKABLE
    ]


def _reported(report: dict[str, Any]) -> Iterator[PrunedLinear]:
    for entry in report["linears"]:
        try:
            tensor, pattern = str(entry["tensor"]), str(entry["pattern"])
            yield PrunedLinear(tensor, pattern, bool(entry["transposed"]), int(entry["nonzero"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{REPORT_FILE}: an entry of linears is malformed") from None


def common_pattern(linears: list[PrunedLinear]) -> Pattern | None:
    """The pattern of all linears; None where they differ or it is unknown."""
    texts = {linear.pattern for linear in linears}
    only = texts.pop() if len(texts) == 1 else None
    return None if only is None else Pattern.parse(only)


@dataclass(frozen=True)
class KindInfo:
    """Linears of one kind over all blocks. ``bytes_stored``: as they lie on disk."""

    kind: str
    count: int
    packed: int
    weights: int
    zeros: int
    bytes_dense: int
    bytes_stored: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights

    def __add__(self, other: KindInfo) -> KindInfo:
        return KindInfo(
            self.kind,
            self.count + other.count,
            self.packed + other.packed,
            self.weights + other.weights,
            self.zeros + other.zeros,
            self.bytes_dense + other.bytes_dense,
            self.bytes_stored + other.bytes_stored,
        )


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint directory holds.

    Attributes:
        format: "sparse" or "dense"; format_version: of the sparse form.
        pattern: as the checkpoint or its report says; None where neither does.
        kinds: linears of the blocks; a packed weight's zeros are those its mask leaves out.
        bytes_dense, bytes_stored: of all tensors, embeddings included.
        levels: names of the activation levels.
        provenance: who pruned it from what, out of prune_report.json; empty without one.
        verified: tensors read and checked; None when it was not asked for.
    """

    directory: str
    format: str
    format_version: int | None
    pattern: str | None
    kinds: list[KindInfo]
    bytes_dense: int
    bytes_stored: int
    levels: list[str]
    provenance: dict[str, Any]
    verified: int | None = None

    @property
    def total(self) -> KindInfo | None:
        """All linears of the blocks; None where there are none."""
        total = None
        for kind in self.kinds:
            total = kind if total is None else total + kind
        return None if total is None else replace(total, kind="total")


def info(model: str | os.PathLike[str], verify: bool = False) -> CheckpointInfo:
    """Describe a checkpoint directory in either form.

    Args:
        verify: read every tensor: packed ones are checked completely, all must be finite, and the
            counts must be those of the report.

    Raises:
        ValueError: not a checkpoint, damaged, or what `verify` found, naming the tensor.
    """
    checkpoint = open_stored(model)
    report = read_report(checkpoint.directory)
    sparse = is_sparse(checkpoint.config)
    verified = _verify(checkpoint, report) if verify else None
    patterns = {linear.pattern for linear in _reported(report)} if report else set()
    reported = patterns.pop() if len(patterns) == 1 else None
    dense_nbytes = sum(weight.dense_nbytes for weight in checkpoint.packed.values())
    return CheckpointInfo(
        directory=str(checkpoint.directory),
        format="sparse" if sparse else "dense",
        format_version=checkpoint.form.format_version if sparse else None,
        pattern=checkpoint.form.pattern if sparse else reported,
        kinds=_kinds(checkpoint),
        bytes_dense=dense_nbytes + sum(tensor.nbytes for tensor in checkpoint.plain.values()),
        bytes_stored=checkpoint.nbytes,
        levels=_levels(checkpoint.form.activation),
        provenance=_provenance(report),
        verified=verified,
    )


def _levels(activation: dict[str, Any]) -> list[str]:
    levels = activation.get("levels", [])
    return [str(level["name"] if isinstance(level, dict) else level) for level in levels]


def _kinds(checkpoint: SparseCheckpoint) -> list[KindInfo]:
    found: dict[str, KindInfo] = {}
    for name, tensor in checkpoint.plain.items():
        if not _is_linear(name, tensor):
            continue
        for piece in _plain_pieces(tensor):
            weight, size = piece.read(), piece.nbytes
            zeros = weight.numel() - int(torch.count_nonzero(weight))
            label = _kind(name, tensor.is_fused)
            _add(found, KindInfo(label, 1, 0, weight.numel(), zeros, size, size))
    for packed in checkpoint.packed.values():
        count, zeros = packed.experts or 1, packed.elements - packed.kept
        label = _kind(packed.name, fused=packed.experts is not None)
        sizes = packed.dense_nbytes, packed.nbytes
        _add(found, KindInfo(label, count, count, packed.elements, zeros, *sizes))
    return list(found.values())


def _is_linear(name: str, tensor: StoredTensor) -> bool:
    """As far as names and shapes tell: a matrix of a block, or its experts' in one tensor."""
    if DTYPES[tensor.dtype] not in PACKABLE or len(tensor.shape) not in (2, 3):
        return False
    if len(tensor.shape) == 2:
        return BLOCK_WEIGHT.search(name) is not None
    return FUSED_EXPERTS.search(name) is not None and min(tensor.shape) > 1


def _plain_pieces(tensor: StoredTensor) -> list[StoredTensor]:
    if not tensor.is_fused:
        return [tensor]
    return [tensor.slice(index) for index in range(tensor.shape[0])]


def _kind(name: str, fused: bool) -> str:
    """ "mlp.experts.*.up_proj", whether each expert has a tensor or all have one."""
    found = BLOCK_WEIGHT.search(name if name.endswith(".weight") else name + ".weight")
    kind = without_index(found[1]) if found else name
    path, _, leaf = kind.rpartition(".")
    return f"{path}.*.{leaf}" if fused and path.endswith("experts") else kind


def _add(found: dict[str, KindInfo], one: KindInfo) -> None:
    found[one.kind] = found[one.kind] + one if one.kind in found else one


def _provenance(report: dict[str, Any]) -> dict[str, Any]:
    keys = ("model", "model_sha256", "config", "calibration", "environment", "warnings")
    return {key: report[key] for key in keys if key in report}


def _verify(checkpoint: SparseCheckpoint, report: dict[str, Any]) -> int:
    """Read and check everything; returns the number of tensors."""
    nonzero = {x.tensor: x.nonzero for x in _reported(report)} if report else {}
    missing = sorted({whole_name(name) for name in nonzero} - set(checkpoint.names))
    if missing:
        raise ValueError(f"{missing[0]}: is in {REPORT_FILE} and not in the checkpoint")
    fused = {whole_name(name) for name in nonzero} - nonzero.keys()
    for name, tensor in checkpoint.plain.items():
        for piece in _plain_pieces(tensor) if name in fused else [tensor]:
            _check_values(piece.name, piece.read(), nonzero.get(piece.name))
    for name in (piece for whole in checkpoint.packed for piece in checkpoint.pieces(whole)):
        values = checkpoint.weight(name).read(checkpoint.pattern)[PACKED]
        _check_values(name, values, nonzero.get(name))
    return len(checkpoint.names)


def _check_values(name: str, values: Tensor, nonzero: int | None) -> None:
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: holds NaN or infinite values")
    if nonzero is not None and int(torch.count_nonzero(values)) != nonzero:
        raise ValueError(
            f"{name}: has {int(torch.count_nonzero(values))} weights that are not zero, "
            f"{REPORT_FILE} says {nonzero}"
        )
