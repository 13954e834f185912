"""Reads the next block's tensors from disk while a block is worked on: exactly one block ahead.

For a GPU, where the work runs beside the CPU and the block that waits lies in pinned memory. On a
CPU the block that waits would be a second one in the memory that pruning is held to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from torch import Tensor

Read = Callable[[str], Tensor]


class Prefetch:
    """One block of tensors in the making; a stopped program does not wait for it.

    Args:
        read: of a tensor by its name on disk, on the CPU.
        pinned: put what was read where a GPU copies it from beside other work.
    """

    def __init__(self, read: Read, pinned: bool = False) -> None:
        self._read, self._pinned = read, pinned
        self._reading: _Reading | None = None

    def start(self, index: int, names: Iterable[str]) -> None:
        """Begin with a block; the one before it must have been taken."""
        assert self._reading is None, "one block is read ahead, not two"
        self._reading = _Reading(index, lambda name: self._one(name), list(names))

    def _one(self, name: str) -> Tensor:
        tensor = self._read(name)
        return tensor.pin_memory() if self._pinned else tensor

    def take(self, index: int) -> dict[str, Tensor]:
        """The block's tensors by name, waited for; nothing where another or none was begun.

        Raises what reading raised, here and not before: the block that is worked on meanwhile can
        still be committed.
        """
        reading, self._reading = self._reading, None
        if reading is None:
            return {}
        if reading.index != index:
            reading.stop()
            return {}
        return reading.result()

    def stop(self) -> None:
        """Give up what is being read."""
        if self._reading is not None:
            self._reading.stop()
            self._reading = None


class _Reading:
    def __init__(self, index: int, read: Read, names: list[str]) -> None:
        self.index, self._names = index, names
        self._read, self._stopping = read, False
        self._tensors: dict[str, Tensor] = {}
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for name in self._names:
                if self._stopping:
                    return
                self._tensors[name] = self._read(name)
        except BaseException as error:  # raised again where the result is asked for
            self._failed = error

    def result(self) -> dict[str, Tensor]:
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._tensors

    def stop(self) -> None:
        """After the tensor that is being read now."""
        self._stopping = True
        self._thread.join()
        self._tensors.clear()
