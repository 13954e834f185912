"""A safetensors file that is written tensor by tensor, so that one is in memory at a time.

The header tells all sizes and stands in front: room is left for it, and it is written at the end.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from prune_llm.checkpoint import DTYPE_NAMES, StoredTensor, layout, read_header

# of a header's entry, beside the name: what it says of a tensor, with the longest numbers
ENTRY_BYTES = 200


class PartFile:
    """Tensors of one block; they are collected into shards by `write_shards`.

    Args:
        names: of the tensors that may come.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self._room = 64 + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
        self._room += -self._room % 8
        self._tensors: list[StoredTensor] = []
        self._out = path.open("wb", buffering=0)
        weakref.finalize(self, self._out.close)  # also where a run ends in the middle of it
        self._out.seek(self._room)

    def append(self, name: str, tensor: Tensor) -> None:
        """Raises OSError where the disk is full."""
        shape, dtype = tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]
        self._tensors.append(StoredTensor(name, dtype, shape, self.path, 0, tensor.nbytes))
        self._write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _write(self, data: memoryview | bytes) -> None:
        while len(data) > 0:
            data = data[self._out.write(data) :]

    def close(self) -> dict[str, StoredTensor]:
        """Complete the file; where its tensors lie."""
        header, _ = layout(self._tensors)
        assert len(header) <= self._room, "a header has more entries than were foreseen"
        text = header[8:].ljust(self._room - 8)
        self._out.seek(0)
        self._write(len(text).to_bytes(8, "little") + text)
        self._out.close()
        return {tensor.name: tensor for tensor in read_header(self.path)}


def save_part(path: Path, tensors: dict[str, Tensor]) -> dict[str, StoredTensor]:
    """Write tensors at once."""
    part = PartFile(path, tensors)
    for name, tensor in tensors.items():
        part.append(name, tensor)
    return part.close()
