"""Hidden states between two blocks, and how a model calls its blocks.

Shape letters: S = samples, T = tokens of one sample, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_llm.fused_block import is_plain_call
from prune_llm.pinned import HostCopy
from prune_llm.stream_files import Store, StreamFile


class Captured(Exception):
    """Raised inside a forward pass when what was wanted has been seen."""


@contextmanager
def told(name: str) -> Iterator[None]:
    """What a model's own code raises, as one line that names the module."""
    try:
        yield
    except (Captured, ValueError, AssertionError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: fails when it runs ({type(error).__name__}: {reason}); config.json and the "
            "weights may not be of one model, or transformers of another version"
        ) from error


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden states, and how it answers."""

    positional: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def is_plain(self, hidden_STD: Tensor) -> bool:
        """Whether a fused block may take the call (see `fused_block.is_plain_call`)."""
        return not self.args and is_plain_call(hidden_STD, self.kwargs)

    def run(self, block: nn.Module, hidden_STD: Tensor) -> Any:
        if self.positional:
            return block(hidden_STD, *self.args, **self.kwargs)
        return block(*self.args, hidden_states=hidden_STD, **self.kwargs)


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(True, args[1:], kwargs)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], Call(False, args, rest)


def _append(file: StreamFile, copy: HostCopy) -> None:
    file.append(copy.wait())


@dataclass
class Stream:
    """Hidden states between two blocks, in batches on the CPU, and how to call each block.

    A pass over the blocks replaces all batches, in order; they are then a new generation.

    Attributes:
        calls: one list (an entry per block) for each batch size that occurs.
        journaled: what comes next is written to a file wherever it is kept.
        file: of this generation, where it has one.
    """

    name: str
    count: int
    store: Store
    calls: dict[int, list[Call]] = field(default_factory=dict)
    journaled: bool = False
    generation: int = -1
    file: StreamFile | None = None
    _held: list[HostCopy] = field(default_factory=list)
    _next: StreamFile | None = None
    _shared: bool = False  # the file is another stream's

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        if not self.store.on_disk:
            return self._held[number].wait()
        assert self.file is not None
        return self.file.read(number)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(self.count))

    @property
    def samples(self) -> int:
        return sum(len(batch) for batch in self)

    def sample(self, number: int) -> Tensor:
        """The hidden states of one sample [1, T, D]; batches but the last are of one size."""
        size = len(self[0])
        row = number % size
        return self[number // size][row : row + 1]

    def replace(self, number: int, hidden_STD: Tensor) -> None:
        """Batch ``number`` of the next generation, which is the current one after its last."""
        copy = HostCopy(hidden_STD)  # nobody waits for a GPU here
        if number == 0 and (self.store.on_disk or self.journaled):
            self._next = self.store.file(self.name, self.generation + 1, self.journaled)
        if self._next is not None:
            self.store.writer.submit(_append, self._next, copy)
        if not self.store.on_disk:
            self._held[number : number + 1] = [copy]
        if number + 1 == self.count:
            self._turn()

    def _turn(self) -> None:
        if self.store.on_disk:
            assert self._next is not None
            self.store.writer.drain()
        before, self.file, self._next = self.file, self._next, None
        self.generation += 1
        if before is not None and not self._shared:
            self.store.replace(before)
        self._shared = False

    def copy(self, name: str) -> Stream:
        """Another stream that begins where this one is."""
        return Stream(
            name,
            self.count,
            self.store,
            self.calls,
            generation=self.generation,
            file=self.file,
            _held=list(self._held),
            _shared=True,
        )

    def restore(self, file: StreamFile, generation: int) -> None:
        """Go on from a file."""
        self.file, self.generation = file, generation
        if not self.store.on_disk:
            self._held = [HostCopy(file.read(number).clone()) for number in range(self.count)]

    def drop(self) -> None:
        """Nothing will be read any more."""
        self._held = []
        if self.file is not None and not self._shared:
            self.store.replace(self.file)
        self.file = None


def hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def same_call(one: Call, other: Call) -> bool:
    for a, b in zip(tree_leaves(one.kwargs), tree_leaves(other.kwargs), strict=True):
        if isinstance(a, Tensor) and not (a.shape == b.shape and torch.equal(a, b)):
            return False
    return all(
        torch.equal(a, b)
        for a, b in zip(tree_leaves(one.args), tree_leaves(other.args), strict=True)
        if isinstance(a, Tensor)
    )
