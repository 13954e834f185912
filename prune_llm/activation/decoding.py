"""Levels while decoding: the thresholds a plan reads, a column for each of its rows.

Shape letters: S = sites, B = rows of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_llm.activation.gates import Gates, channel_scales
from prune_llm.activation.levels import DENSE, Level, LevelTable, read_table
from prune_llm.activation.sites import table_sites
from prune_llm.channel_linear import use_channels
from prune_llm.pinned import HostCopy, host_to
from prune_llm_kernels.plan import Gate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVERY_INPUT = -1.0  # a threshold: see prune_llm_kernels.plan.Gate


@dataclass(frozen=True)
class ModelLevels:
    """The levels of a loaded model and what it takes to apply them.

    Holds no module: the weights that a conversion replaces must be free to go.

    Attributes:
        weights: of each site, counted dense.
    """

    table: LevelTable
    weights: tuple[int, ...]
    scales: tuple[Tensor | None, ...]

    def gates(self, model: PreTrainedModel, level: str) -> Gates:
        """Zeros instead of inactive inputs, for models that decode through transformers."""
        sites = table_sites(model, self.table)  # its modules have changed with their form
        return Gates(sites, self.scales, self.table.level(level).thresholds, first_dense=0)


def model_levels(model: PreTrainedModel) -> ModelLevels | None:
    """The levels of a loaded model, read once; None where its checkpoint has none.

    Raises:
        ValueError: the table is damaged or belongs to another model.
    """
    known: dict[str, ModelLevels | None] = model.__dict__.setdefault("_prune_llm_levels", {})
    if "levels" not in known:
        table = read_table(model)
        known["levels"] = None
        if table is not None:
            weights = tuple(site.weights for site in table_sites(model, table))
            known["levels"] = ModelLevels(table, weights, tuple(channel_scales(model, table)))
    return known["levels"]


def choose_level(model: PreTrainedModel, name: str) -> ModelLevels | None:
    """Make a model ready to decode at a level. The first that skips anything converts its weights.

    Raises:
        ValueError: it has no such level; the message lists those it has.
    """
    levels = model_levels(model)
    if levels is None:
        if name == DENSE:
            return None
        raise ValueError(
            f"level {name!r}: this model has no activation thresholds, only the level {DENSE!r}; "
            "prune-llm sparsify makes them"
        )
    levels.table.level(name)
    if name != DENSE:
        use_channels(model, [linear for site in levels.table.sites for linear in site.linears])
    return levels


class PlanGates:
    """Gates of the sites of a plan with B rows; every row starts at the level "dense"."""

    def __init__(self, levels: ModelLevels, rows: int, device: torch.device | str = "cpu") -> None:
        sites = levels.table.sites
        self._levels = levels
        self._scales = [None if s is None else s.to(device) for s in levels.scales]
        self._thresholds_SB = torch.full((len(sites), rows), EVERY_INPUT, device=device)
        self._counts_S3 = torch.zeros(len(sites), 3, dtype=torch.int64, device=device)
        self._before_S3 = self._counts_S3.clone()  # at the last `note_run`
        self._inputs_S = torch.tensor([site.in_features for site in sites])
        self._weights_S = torch.tensor(levels.weights, dtype=torch.float64)
        self._site_of = {name: s for s, site in enumerate(sites) for name in site.linears}

    def site(self, linear: str) -> int | None:
        """The number of the site that a linear reads."""
        return self._site_of.get(linear)

    def gate(self, linear: str) -> Gate | None:
        """Of the site that a linear reads, by its name in the model; None: it has no threshold."""
        s = self._site_of.get(linear)
        if s is None:
            return None
        return Gate(self._thresholds_SB[s], self._scales[s], self._counts_S3[s])

    def choose(self, row: int, level: Level | None) -> None:
        """What a row skips from now on; None leaves the row out."""
        self._thresholds_SB[:, row] = self._column_S(level)

    def choose_rows(self, names: Sequence[str | None]) -> None:
        """The levels of the first rows, by name; None leaves a row out. The others stay as they
        are."""
        table = self._levels.table
        columns = {n: self._column_S(None if n is None else table.level(n)) for n in set(names)}
        chosen_SB = torch.stack([columns[n] for n in names], dim=1)
        self._thresholds_SB[:, : len(names)] = host_to(self._thresholds_SB.device, chosen_SB)

    def _column_S(self, level: Level | None) -> Tensor:
        if level is None or level.name == DENSE:
            return torch.full((len(self._weights_S),), torch.inf if level is None else EVERY_INPUT)
        return torch.tensor(level.thresholds)

    def note_run(self) -> HostCopy:
        """What the run counted, on its way to the host; to be called after each."""
        new_S3 = self._counts_S3 - self._before_S3
        self._before_S3 += new_S3
        return HostCopy(new_S3)

    def run_active(self, noted: HostCopy, dense: int) -> float | None:
        """As `active`, of a noted run alone and of its rows that skip. Waits for that run.

        Args:
            dense: rows of the run that skip nothing.
        """
        new_S3 = noted.wait()
        rows_S = new_S3[:, 2] - dense
        if not bool((rows_S > 0).any()):
            return None
        counted_S = new_S3[:, 1] - dense * self._inputs_S
        shares_S = counted_S / (rows_S * self._inputs_S).clamp(min=1)
        shares_S = torch.where(rows_S > 0, shares_S, 1.0)  # a site that is not gated
        return float((shares_S * self._weights_S).sum() / self._weights_S.sum())

    @property
    def active(self) -> float | None:
        """Share of the inputs that counted, weighted by the weights they meet; None: no run yet."""
        return self._share(1, rows=True)

    @property
    def read(self) -> float | None:
        """Share of the channels that were read: those that any row of a run counted."""
        return self._share(0, rows=False)

    def _share(self, column: int, rows: bool) -> float | None:
        counts_S3 = self._counts_S3.tolist()
        if not any(map(any, counts_S3)):
            return None
        shares = []
        for site, counts in zip(self._levels.table.sites, counts_S3, strict=True):
            runs = counts[2] if rows else counts[2] / self._thresholds_SB.shape[1]
            shares.append(counts[column] / (site.in_features * runs) if runs else 1.0)
        weights = self._levels.weights
        return sum(s * w for s, w in zip(shares, weights, strict=True)) / sum(weights)
