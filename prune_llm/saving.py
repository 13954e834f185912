"""The pruned weights of a block on their way to disk: packed and written one by one, as they come.

On a GPU a thread does that beside the work, one block behind it at most: the first weight of a
block waits until the block before is written. What fails there is raised at that place.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from prune_llm.part_file import PartFile
from prune_llm.sparse_writer import Part

if TYPE_CHECKING:
    from prune_llm.block import Block
    from prune_llm.job import Job

# device types that leave the CPU free to pack; on a CPU it would take cores and memory of the work
BESIDE = frozenset({"cuda"})


class OpenPart(Protocol):
    """A part that weights can be added to."""

    def add(self, name: str, stored: Tensor, transposed: bool) -> None: ...

    def close(self) -> Part: ...


class DensePart:
    """Weights as they are."""

    def __init__(self, job: Job, file: Path, names: list[str]) -> None:
        self._job, self._file = job, PartFile(file, names)

    def add(self, name: str, stored: Tensor, transposed: bool) -> None:
        self._file.append(name, stored)

    def close(self) -> Part:
        self._job.parts |= self._file.close()
        return Part(self._file.path)


class Saving:
    """Of one block.

    Args:
        directory: where parts lie.
    """

    def __init__(self, job: Job, block: Block, directory: Path) -> None:
        self._job, self._directory, self._index = job, directory, block.index
        disk_names = job.architecture.disk_names
        self._names = [disk_names[linear.weight_name] for linear in block.linears]
        self._part: OpenPart | None = None

    def add(self, name: str, stored: Tensor, transposed: bool) -> None:
        """A weight by its name on disk, as it is to be stored."""
        if not self._job.ranks.first:
            return
        if self._part is None:
            self._job.packer.drain()
            self._part = self._open()
        self._job.packer.submit(self._part.add, name, stored.cpu(), transposed)

    def close(self) -> Future[Part] | None:
        """The block's part, once it is written; None where no weight came."""
        return None if self._part is None else self._job.packer.submit(self._part.close)

    def _open(self) -> OpenPart:
        if self._job.writer is not None:
            return self._job.writer.open(self._names)
        return DensePart(self._job, self._directory / f"block-{self._index:05d}.part", self._names)
