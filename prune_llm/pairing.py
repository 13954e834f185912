"""Which rows of two passes through a block belong to one token: the dense model's and ours.

A linear outside the experts reads every token in both passes. An expert reads those that the router
sends it, which may be others in each pass: rows are paired by their token.
Shape letters: T = tokens a linear reads, I = input features, N = tokens of a batch, k = experts of
a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prune_llm.experts import Experts


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
            if isinstance(module, Experts)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
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
