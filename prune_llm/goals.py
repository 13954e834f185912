"""What a block that is reconstructed is held to, on one calibration sample at a time.

"block": the output of the dense block, sum of squares of the difference over that of the output.
"logits": the dense model's predictions, KL(dense || pruned) in nats a token; the blocks behind are
still dense (`tail`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prune_llm.block import Block
from prune_llm.streams import Call, Stream, hidden_of
from prune_llm.tail import Tail


class Goal(Protocol):
    """The loss of single samples, with the weights that the block holds."""

    @property
    def name(self) -> str: ...

    @property
    def samples(self) -> int: ...

    def loss(self, sample: int) -> Tensor:
        """A float32 scalar; differentiable where gradients are enabled."""


class Runner:
    """Runs a block on what the pruned model feeds it, in float32, by its own forward."""

    def __init__(self, block: Block) -> None:
        self._module, self._stream = block.module, block.stream
        self._device = block.walk.device
        call = block.stream.calls[1][block.index]
        args, kwargs = tree_map(_to_float32, (call.args, call.kwargs))
        self._call = Call(call.positional, args, kwargs)

    @property
    def samples(self) -> int:
        return self._stream.samples

    def __call__(self, sample: int) -> Tensor:
        """The block's output [1, T, D]."""
        hidden_1TD = self._stream.sample(sample).to(self._device, torch.float32)
        return hidden_of(self._call.run(self._module, hidden_1TD))


class BlockGoal:
    """The dense block's output; ``dense`` is its stream, already behind the block."""

    name = "block"

    def __init__(self, run: Runner, dense: Stream) -> None:
        self._run, self._dense, self.samples = run, dense, run.samples
        squares = [float(b.float().square().sum(dtype=torch.float64)) for b in dense]
        values = sum(batch.numel() for batch in dense)
        self._scale = max(sum(squares) / values, torch.finfo(torch.float32).tiny)

    def loss(self, sample: int) -> Tensor:
        output_1TD = self._run(sample)
        wanted_1TD = self._dense.sample(sample).to(output_1TD.device, torch.float32)
        return (output_1TD - wanted_1TD).square().mean() / self._scale


class LogitsGoal:
    """The dense model's predictions, through the dense blocks behind."""

    name = "logits"

    def __init__(self, run: Runner, tail: Tail) -> None:
        self._run, self._tail, self.samples = run, tail, run.samples

    def loss(self, sample: int) -> Tensor:
        output_1TD = self._run(sample)
        value, slope_1TD = self._tail.divergence(output_1TD.detach(), sample)
        if slope_1TD is None:
            return value
        # the value of the one, the derivative of the other: the tail is never held in one piece
        return value + (slope_1TD * (output_1TD - output_1TD.detach())).sum()


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """All floating parameters and buffers as float32 copies; in the end what they were before."""
    before: list[tuple[Any, str, Tensor]] = [
        (store, leaf, tensor)
        for part in module.modules()
        for store in (part._parameters, part._buffers)
        for leaf, tensor in store.items()
        if tensor is not None and tensor.is_floating_point()
    ]
    for store, leaf, tensor in before:
        copy = tensor.detach().to(torch.float32, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        store[leaf] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
    try:
        yield
    finally:
        for store, leaf, tensor in before:
            store[leaf] = tensor


def _to_float32(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float32)
    return value
