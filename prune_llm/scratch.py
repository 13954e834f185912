"""Weights in a file that has no name, mapped: those that are not in use need no memory.

The system writes them out and reads them again as it needs the memory for other things. The file
is gone when nobody holds a tensor in it any more, however the process ends.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

# as memory of its own would be aligned: a product may round by the alignment of what it reads
ALIGNMENT = 64


class Scratch:
    """Room for ``nbytes`` of tensors; it takes disk as they come.

    Args:
        directory: on the disk that is to be used.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        self._file = TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed below)
        weakref.finalize(self, self._file.close)
        self._file.truncate(nbytes)
        # one mapping: each takes a file handle, and there are thousands of experts
        self._mapped, self._end = mmap.mmap(self._file.fileno(), nbytes), 0

    def put(self, tensor: Tensor) -> Tensor:
        """A copy that lies in the file. Raises OSError where the disk is full."""
        start, handle = self._end, self._file.fileno()
        assert start + tensor.nbytes <= len(self._mapped), "more weights than were foreseen"
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(data) > 0:  # written, not stored to: a full disk would end the process there
            data = data[os.pwrite(handle, data, start + tensor.nbytes - len(data)) :]
        self._end += aligned(tensor.nbytes)
        found = torch.frombuffer(
            self._mapped, dtype=tensor.dtype, count=tensor.numel(), offset=start
        )
        return found.view(tensor.shape)


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes in a scratch."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
