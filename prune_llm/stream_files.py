"""Streams of hidden states on disk: one file a generation, and the thread that writes them.

A generation is what lies between two blocks. Its batches are written in order, each at an address
as aligned as memory of its own would be (a product may round by the alignment of what it reads),
and are mapped one at a time, so that what is not in use takes no memory. Writing is plain writing:
a full disk raises, where a mapped page would end the process.

Shape letters: S = samples, T = tokens of one sample, D = hidden size.
"""

from __future__ import annotations

import mmap
import os
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from prune_llm.checkpoint import DTYPE_NAMES, DTYPES
from prune_llm.durability import CHUNK_BYTES, check_file

T = TypeVar("T")

# where a batch may begin in its file
ALIGNMENT = 64
# tasks that may wait for the thread; each holds a batch
WAITING = 4


class StreamFile:
    """One generation of a stream: written by `append`, then read by `read`."""

    def __init__(self, path: Path, journaled: bool = False) -> None:
        self.path, self.journaled = path, journaled
        self.dtype: torch.dtype | None = None
        self.batches: list[tuple[int, tuple[int, ...]]] = []  # where it begins, its shape
        self._crc, self._end = 0, 0
        self._open(os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def _open(self, flags: int) -> None:
        """Closed when nobody has this object any more: streams may share it."""
        self._handle = os.open(self.path, flags, 0o666)
        weakref.finalize(self, os.close, self._handle)

    def append(self, hidden_STD: Tensor) -> None:
        """The next batch. Raises OSError where the disk is full."""
        self.dtype = hidden_STD.dtype
        self._write(bytes(-self._end % ALIGNMENT))
        self.batches.append((self._end, tuple(hidden_STD.shape)))
        data = memoryview(hidden_STD.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), CHUNK_BYTES):
            self._write(data[start : start + CHUNK_BYTES])

    def _write(self, data: bytes | memoryview) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._end += len(data)
        while len(data) > 0:
            data = data[os.write(self._handle, data) :]

    def sync(self) -> None:
        """What was appended is on disk when this returns."""
        os.fsync(self._handle)

    def read(self, number: int) -> Tensor:
        """A batch [S, T, D], mapped; writing to it does not reach the file."""
        assert self.dtype is not None
        start, shape = self.batches[number]
        values = torch.Size(shape).numel()
        page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = start - page + values * self.dtype.itemsize
        mapped = mmap.mmap(self._handle, length, access=mmap.ACCESS_COPY, offset=page)
        found = torch.frombuffer(mapped, dtype=self.dtype, count=values, offset=start - page)
        return found.view(shape)

    def remove(self) -> None:
        """Take its name away; batches can still be read while this object lives."""
        self.path.unlink(missing_ok=True)

    def described(self) -> dict[str, Any]:
        """For the journal: what `reopened` needs to find it undamaged."""
        assert self.dtype is not None
        return {
            "file": self.path.name,
            "dtype": DTYPE_NAMES[self.dtype],
            "batches": self.batches,
            "bytes": self._end,
            "crc32": self._crc,
        }

    @classmethod
    def reopened(cls, directory: Path, described: dict[str, Any]) -> StreamFile:
        """Raises ValueError where the file is not what was described."""
        file = cls.__new__(cls)
        file.path, file.journaled = directory / described["file"], True
        file.dtype = DTYPES[described["dtype"]]
        file.batches = [(start, tuple(shape)) for start, shape in described["batches"]]
        file._crc, file._end = described["crc32"], described["bytes"]
        check_file(directory, described)
        file._open(os.O_RDONLY)
        return file


@dataclass
class Writer:
    """A thread that does what it is given, in order, until something fails.

    What fails is raised by the next call, and nothing given after it is done.

    Attributes:
        most: tasks that may wait.
        beside: whether there is a thread; else all is done where it is given.
    """

    most: int = WAITING
    beside: bool = True
    _pool: ThreadPoolExecutor | None = None
    _waiting: deque[Future[Any]] = field(default_factory=deque)
    _failed: BaseException | None = None

    def submit(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """Waits while too much is to be done."""
        if not self.beside:
            done: Future[T] = Future()
            done.set_result(task(*arguments))
            return done
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "writer")
        while len(self._waiting) >= self.most:
            self._next()
        self._waiting.append(self._pool.submit(self._run, task, *arguments))
        return self._waiting[-1]

    def drain(self) -> None:
        """Wait until all is done; raises what failed."""
        while self._waiting:
            self._next()

    def stop(self) -> None:
        """End with what is being done now; raises nothing."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._waiting.clear()

    def _next(self) -> None:
        self._waiting[0].result()
        self._waiting.popleft()

    def _run(self, task: Callable[..., T], *arguments: Any) -> T:
        if self._failed is not None:
            raise self._failed
        try:
            return task(*arguments)
        except BaseException as error:
            self._failed = error
            raise


@dataclass
class Store:
    """Where the streams of a run are kept: in memory, or in files of ``directory``.

    Attributes:
        on_disk: files are read as well; else they are only written, where a stream is journaled.
        journaled: streams are written to files in any case, which stay until their successors are
            in the journal: who writes that takes them out of ``replaced``, and removes them.
    """

    directory: Path | None = None
    on_disk: bool = False
    journaled: bool = False
    writer: Writer = field(default_factory=Writer)
    replaced: list[StreamFile] = field(default_factory=list)

    def beside(self) -> Store:
        """For streams that are not journaled."""
        return Store(self.directory, self.on_disk, writer=self.writer)

    def file(self, name: str, generation: int, journaled: bool) -> StreamFile:
        assert self.directory is not None, "a store in memory has no files"
        return StreamFile(self.directory / f"{name}-{generation:05d}.stream", journaled)

    def replace(self, file: StreamFile) -> None:
        """A file that is no longer needed, once what follows it is safe."""
        if file.journaled:
            self.replaced.append(file)
        else:
            file.remove()
