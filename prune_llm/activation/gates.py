"""Zero the inactive inputs of a loaded model's linears, as the decode kernels skip them.

This is the rule of levels.py in plain PyTorch, for calibration and for evaluation: the linears
still multiply by the zeros, so nothing gets faster. Shape letters: B = sequences, T = tokens,
I = inputs, O = outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from prune_llm.activation.levels import CRITERIA, LevelTable
from prune_llm.activation.sites import ModelSite, weight_OI
from prune_llm.architecture import Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# how many tokens at the start of a sequence are left dense; "half" is the papers' protocol
FirstDense = int | Literal["half"]
# what a watcher is told: the site's number, its input and scores, and the gated input
Watcher = Callable[[int, Tensor, Tensor, Tensor], None]
# rows of a weight whose squares are summed at once
SQUARE_ROWS = 1024


def score(x: Tensor, scale_I: Tensor | None) -> Tensor:
    """|x_i| * c_i in float32; scale_I float32 [I], None for c = 1."""
    size = x.detach().abs().float()
    return size if scale_I is None else size * scale_I


def gate(x: Tensor, scale_I: Tensor | None, threshold: float) -> Tensor:
    """x with its inactive inputs, where score <= threshold, replaced by +0. A NaN stays."""
    return torch.where(score(x, scale_I) <= threshold, torch.zeros_like(x), x)


class Gates:
    """While entered, every linear of the sites reads its input gated.

    For passes over whole sequences without a cache: position 0 of the input is the first token.
    Inputs of experts [N, I] have no positions any more: all their rows are gated.

    Args:
        sites: of a loaded model, as `find_sites` returns them.
        scales: one per site, as `channel_scales` returns them.
        thresholds: one per site; `set` changes them.
        first_dense: so many tokens at the start of every sequence stay dense. 1 leaves out the
            first token, whose large activations are like no other's; "half" leaves the first half
            of the sequence dense, as the papers do.
        watcher: told of every gated input, once for each site and pass.

    Attributes:
        active, seen: int64 [sites], inputs that were active and all that were gated.
    """

    def __init__(
        self,
        sites: Sequence[ModelSite],
        scales: Sequence[Tensor | None],
        thresholds: Sequence[float],
        first_dense: FirstDense = 1,
        watcher: Watcher | None = None,
    ) -> None:
        self.sites, self.scales, self.first_dense = tuple(sites), tuple(scales), first_dense
        self.watcher = watcher
        self._handles: list[Any] = []
        self._shared: list[tuple[Tensor, Tensor] | None] = [None] * len(self.sites)
        self.set(thresholds)
        self.reset()

    def set(self, thresholds: Sequence[float]) -> None:
        if not len(thresholds) == len(self.scales) == len(self.sites):
            raise ValueError(
                f"{len(thresholds)} thresholds and {len(self.scales)} scales for "
                f"{len(self.sites)} sites; give one each"
            )
        self.thresholds = tuple(float(torch.tensor(t, dtype=torch.float32)) for t in thresholds)

    def reset(self) -> None:
        """Count from zero again."""
        self._active: list[Tensor | int] = [0] * len(self.sites)
        self._seen = [0] * len(self.sites)

    @property
    def active(self) -> list[int]:
        return [int(count) for count in self._active]

    @property
    def site_sparsity(self) -> list[float]:
        """Share of inactive inputs of each site since `reset`; 0 where none was seen."""
        return [
            1 - active / seen if seen else 0.0
            for active, seen in zip(self.active, self._seen, strict=True)
        ]

    @property
    def sparsity(self) -> float:
        """Over all sites, weighted by the weights that the inputs meet."""
        return weighted_mean(self.site_sparsity, self.sites)

    def __enter__(self) -> Gates:
        for index, site in enumerate(self.sites):
            for place, module in enumerate(site.modules):
                hook = self._hook(index, place == 0)
                self._handles.append(module.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._shared = [None] * len(self.sites)

    def _hook(self, index: int, first: bool) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            shared = self._shared[index]
            if first or shared is None or shared[0] is not args[0]:
                shared = args[0], self._gated(index, args[0], first)
                self._shared[index] = shared if len(self.sites[index].linears) > 1 else None
            return (shared[1], *args[1:])

        return hook

    def _gated(self, index: int, x: Tensor, count: bool) -> Tensor:
        scores = score(x, self.scales[index])
        active = ~(scores <= self.thresholds[index])  # a NaN must show, as in the kernels
        start = self.dense_tokens(x)
        if start:
            active[:, :start] = True
        gated = torch.where(active, x, torch.zeros_like(x))
        if count:
            self._active[index] += active[:, start:].sum() if x.ndim == 3 else active.sum()
            self._seen[index] += active.numel() - active[:, :start].numel() * (x.ndim == 3)
            if self.watcher is not None:
                self.watcher(index, x, scores, gated)
        return gated

    def dense_tokens(self, x: Tensor) -> int:
        """How many tokens at the start of x [B, T, I] stay dense; 0 for x [N, I]."""
        if x.ndim != 3:
            return 0
        return x.shape[1] // 2 if self.first_dense == "half" else int(self.first_dense)


def weighted_mean(shares: Sequence[float], sites: Sequence[ModelSite]) -> float:
    total = sum(site.weights for site in sites)
    return sum(s * site.weights for s, site in zip(shares, sites, strict=True)) / total


def channel_scales(model: PreTrainedModel, table: LevelTable) -> list[Tensor | None]:
    """c_I of every site of the table, float32 [I] on its weights' device; None for c = 1.

    Weight-aware: c_i = sqrt(sum over the site's linears of ||W[:, i]||^2), summed in float64 from
    the weights as the model holds them, dense or packed.
    """
    if table.criterion == "magnitude":
        return [None] * len(table.sites)
    found = []
    for site in table.sites:
        modules = [model.get_submodule(name) for name in site.linears]
        found.append(_column_norms([_linear(m) for m in modules]))
    return list(found)


def site_scales(sites: Sequence[ModelSite], criterion: str) -> list[Tensor | None]:
    """The same for sites that were just found. Raises ValueError for an unknown criterion."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r}: unknown; choose one of {', '.join(CRITERIA)}")
    if criterion == "magnitude":
        return [None] * len(sites)
    return [_column_norms(site.linears) for site in sites]


def _linear(module: nn.Module) -> Linear:
    from transformers.pytorch_utils import Conv1D

    transposed = isinstance(module, Conv1D) or bool(getattr(module, "transposed", False))
    return Linear("", "", module, transposed)


def _column_norms(linears: Sequence[Linear]) -> Tensor:
    total_I: Tensor | None = None
    for linear in linears:
        for rows in weight_OI(linear).split(SQUARE_ROWS):
            squares_I = rows.double().square().sum(dim=0)
            total_I = squares_I if total_I is None else total_I + squares_I
    assert total_I is not None
    return total_I.sqrt().float()
