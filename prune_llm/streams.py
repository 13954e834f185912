"""Hidden states between two blocks, and how a model calls its blocks.

Shape letters: S = samples, T = tokens of one sample, D = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_llm.fused_block import is_plain_call


class Captured(Exception):
    """Raised inside a forward pass when what was wanted has been seen."""


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


@dataclass
class Stream:
    """Hidden states between two blocks, in batches on the CPU, and how to call each block.

    ``calls`` holds one list (an entry per block) for each batch size that occurs.
    """

    batches: list[Tensor]
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def sample(self, number: int) -> Tensor:
        """The hidden states of one sample [1, T, D]; batches but the last are of one size."""
        size = len(self.batches[0])
        row = number % size
        return self.batches[number // size][row : row + 1]


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
