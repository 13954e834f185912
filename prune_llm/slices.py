"""The experts of a fused tensor [E, ...], taken apart on disk and put together again.

Some checkpoints hold the experts of a block in one tensor. An expert's slice of it is one stretch
of bytes: it is read, pruned and packed like any other weight, as ``experts.down_proj[3]``, and the
slices are joined where the checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prune_llm.checkpoint import StoredTensor
from prune_llm.experts import slice_name


@dataclass(frozen=True, slots=True)
class JoinedTensor(StoredTensor):
    """A tensor to be written: its bytes are those of its pieces, one behind the other."""

    pieces: tuple[StoredTensor, ...] = ()

    def chunks(self) -> Iterator[bytes]:
        for piece in self.pieces:
            yield from piece.chunks()


def joined(name: str, pieces: list[StoredTensor], shape: tuple[int, ...]) -> JoinedTensor:
    """Pieces of one dtype as one tensor."""
    first, nbytes = pieces[0], sum(piece.nbytes for piece in pieces)
    assert all(piece.dtype == first.dtype for piece in pieces)
    return JoinedTensor(name, first.dtype, shape, first.file, first.start, nbytes, tuple(pieces))


def slice_names(tensor: StoredTensor) -> list[str]:
    """Names of the entries of the first dimension of a fused tensor; none of another one."""
    return [slice_name(tensor.name, i) for i in range(tensor.shape[0])] if tensor.is_fused else []


def with_parts(tensor: StoredTensor, parts: Mapping[str, StoredTensor]) -> StoredTensor:
    """The tensor as it is to be written: its new part, or with the new parts of its slices."""
    if tensor.name in parts:
        return parts[tensor.name]
    names = slice_names(tensor)
    if not any(name in parts for name in names):
        return tensor
    pieces = [parts.get(name, tensor.slice(index)) for index, name in enumerate(names)]
    return joined(tensor.name, pieces, tensor.shape)


def stacked(name: str, slices: Mapping[str, StoredTensor]) -> JoinedTensor:
    """All slices of a fused tensor, in their order, as one."""
    pieces = list(slices.values())
    return joined(name, pieces, (len(pieces), *pieces[0].shape))


def joined_packed(name: str, suffix: str, pieces: list[StoredTensor]) -> JoinedTensor:
    """One part of every expert's packed form, as fused experts are stored (see `format`)."""
    shape: tuple[int, ...] = (len(pieces), *pieces[0].shape)
    if suffix == "_packed" and len(pieces[0].shape) == 1:
        shape = (sum(piece.shape[0] for piece in pieces),)
    return joined(name + suffix, pieces, shape)
