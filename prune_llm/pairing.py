"""Two passes through a block: which rows of the dense model's and of ours belong to one token, and
what the output of a linear is added to.

A linear outside the experts reads every token in both passes. An expert reads those that the router
sends it, which may be others in each pass: rows are paired by their token.
Shape letters: T = tokens a linear reads, I = input features, D = hidden size, N = tokens of a
batch, k = experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prune_llm.architecture import Linear
from prune_llm.experts import RoutedExperts


@dataclass(frozen=True)
class Read:
    """What a linear read in one pass: rows [T, I] and the token of each, int64 [T] ascending.

    ``token_T`` None: every token of the batch, in order, unless ``known`` is False: then nobody
    knows which.
    """

    x_TI: Tensor
    token_T: Tensor | None = None
    known: bool = True


def paired_rows(ours: Read, dense: Read | None) -> tuple[Tensor, int]:
    """The dense model's row for each row of ours [T, I], and how many of them there are.

    A token that the dense model did not send here has none: it keeps our own row.
    """
    if dense is None or not (ours.known and dense.known):
        return ours.x_TI, 0
    if ours.token_T is None or dense.token_T is None:
        whole = ours.x_TI.shape == dense.x_TI.shape
        return (dense.x_TI, len(dense.x_TI)) if whole else (ours.x_TI, 0)
    common_T = torch.isin(ours.token_T, dense.token_T)
    rows_TI = ours.x_TI.clone()
    rows_TI[common_T] = dense.x_TI[torch.searchsorted(dense.token_T, ours.token_T[common_T])]
    return rows_TI, int(common_T.sum())


@dataclass
class Routing:
    """Which experts the tokens of the pass that runs now were sent to, by the experts' path."""

    block: nn.Module
    chosen: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def watched(self) -> Iterator[Routing]:
        handles = [
            module.register_forward_pre_hook(self._note(path))
            for path, module in self.block.named_modules()
            if isinstance(module, RoutedExperts)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(args) > 1:  # Llama 4's experts are told nothing
                self.chosen[path] = args[1]

        return hook

    def read(self, kind: str, x: Tensor, tokens: int) -> Read:
        """What the linear ``kind`` read of a batch of so many tokens."""
        x_TI = x.reshape(-1, x.shape[-1])
        for path, index_Nk in self.chosen.items():
            if kind.startswith(path + "."):
                expert = int(kind.removeprefix(path + ".").partition(".")[0])
                return Read(x_TI, torch.where(index_Nk == expert)[0])
        return Read(x_TI, known=len(x_TI) == tokens)


@contextmanager
def silenced(linears: tuple[Linear, ...]) -> Iterator[None]:
    """These linears answer zeros, and cost nothing."""
    for linear in linears:
        linear.module.forward = _zeros(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.module.forward


def _zeros(linear: Linear) -> Callable[[Tensor], Tensor]:
    outputs = linear.to_OI(linear.weight).shape[0]
    return lambda x: x.new_zeros(*x.shape[:-1], outputs)


# an output that is added to the hidden states is found in them again, up to rounding; it says
# something where it is larger than that by this factor
DECISIVE, FOUND_AGAIN = 16, 0.25


def adds_to_output(linears: tuple[Linear, ...], run: Callable[[], Tensor]) -> bool:
    """Whether the first linear's output is added to the hidden states that the block returns.

    All linears behind it are silent, so a sum in the middle of the block counts as well. Not so
    where its output is scaled, normalised or gated on the way.

    Args:
        linears: the linear, and all that read their inputs behind it.
        run: runs the block, and returns its output [.., D].
    """
    seen: list[Tensor] = []  # copies: Falcon adds to it in place
    handle = linears[0].module.register_forward_hook(lambda _m, _args, y: seen.append(y.clone()))
    try:
        with silenced(linears[1:]):
            whole = run().float()
    finally:
        handle.remove()
    with silenced(linears):
        rest = run().float()
    y = seen[0].float()
    if y.numel() != whole.numel():
        return False
    y = y.reshape(whole.shape)
    rounding = torch.finfo(seen[0].dtype).eps * (whole.abs() + rest.abs())
    decisive = y.abs() > DECISIVE * rounding
    astray = decisive & ((whole - rest - y).abs() > FOUND_AGAIN * y.abs())
    return bool(decisive.float().mean() > 0.01) and not bool(astray.float().mean() > 1e-4)
