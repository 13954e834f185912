"""Where the zeros are: every linear of every block as it is stored, and what pruning said of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from prune_llm.checkpoint import DTYPES
from prune_llm.experts import without_index
from prune_llm.format import DTYPES as PACKABLE
from prune_llm.sparse_checkpoint import SparseCheckpoint

# "model.layers.3.mlp.up_proj.weight" -> 3, "mlp.up_proj"
BLOCK_WEIGHT = re.compile(r"(?:^|\.)(\d+)\.(.+)\.weight$")


def stored_linears(
    checkpoint: SparseCheckpoint, prune_report: dict[str, Any]
) -> list[dict[str, Any]]:
    """An entry for each linear of the blocks, experts of a mixture together.

    ``sparsity`` counts zeros as stored; ``asked`` and ``error`` are those of prune_report.json,
    None for linears that it does not know.
    """
    told = prune_report.get("linears", [])
    reported = {entry["tensor"]: entry for entry in told}
    kinds = list(dict.fromkeys(without_index(entry["kind"]) for entry in told))
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for name, weights, zeros in _counted(checkpoint):
        place = BLOCK_WEIGHT.search(name)
        if place is not None:
            entry = {"weights": weights, "zeros": zeros, "report": reported.get(name)}
            found.setdefault((int(place[1]), without_index(place[2])), []).append(entry)
    # as they come in a block, where pruning told
    order = {kind: place for place, kind in enumerate([*kinds, *sorted(k for _, k in found)])}
    order |= {kind: place for place, kind in enumerate(kinds)}
    places = sorted(found, key=lambda place: (place[0], order[place[1]]))
    return [_linear(*place, found[place]) for place in places]


def _counted(checkpoint: SparseCheckpoint) -> Iterator[tuple[str, int, int]]:
    """Name, weights and zeros of each matrix."""
    for name, packed in checkpoint.packed.items():
        weights = packed.shape_OI[0] * packed.shape_OI[1]
        yield name, weights, weights - packed.kept
    for name, tensor in checkpoint.plain.items():
        is_matrix = len(tensor.shape) == 2 and DTYPES[tensor.dtype] in PACKABLE
        if is_matrix and BLOCK_WEIGHT.search(name):
            weight = tensor.read()
            yield name, weight.numel(), weight.numel() - int(torch.count_nonzero(weight))


def _linear(block: int, kind: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(entry["weights"] for entry in entries)
    known = [entry for entry in entries if entry["report"] is not None]
    asked = [(entry["report"]["requested"], entry["weights"]) for entry in known]
    errors = [entry["report"]["error"] for entry in known]
    errors = [error for error in errors if error is not None]
    return {
        "block": block,
        "kind": kind,
        "weights": weights,
        "sparsity": sum(entry["zeros"] for entry in entries) / weights,
        "asked": _mean(asked),
        "pattern": known[0]["report"]["pattern"] if known else None,
        "error": sum(errors) / len(errors) if errors else None,
    }


def _mean(pairs: Iterable[tuple[float, int]]) -> float | None:
    """Weighted."""
    pairs = list(pairs)
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
