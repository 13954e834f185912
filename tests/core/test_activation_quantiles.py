"""Thresholds as quantiles, the curve between allocations, the search for one scalar."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prune_llm.activation.curve import Curve
from prune_llm.activation.quantiles import GRID, Quantiles, ScoreHistogram
from prune_llm.activation.search import largest_sparsity, matching_sparsity


def scores(count: int, seed: int = 0) -> Tensor:
    """Skewed, over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).exp() * torch.rand(count, generator=generator)


def test_grid_against_torch_quantile() -> None:
    values = scores(50_001)
    histogram = ScoreHistogram()
    for part in values.split(777):
        histogram.update(part, "site")
    assert histogram.total == 50_001
    grid = histogram.grid()
    shares = torch.arange(1, GRID, dtype=torch.float64) / GRID
    exact = torch.quantile(values.double(), shares, interpolation="lower")
    # a bin is a thousandth of its value wide; neighbours in rank are further apart at the ends
    inner = (shares > 0.005) & (shares < 0.995)
    assert torch.allclose(grid[1:-1][inner], exact[inner], rtol=5e-3)
    assert grid[0] == 0 and (grid.diff() >= 0).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.77, 0.99, 1.0])
def test_a_threshold_realises_its_share(share: float) -> None:
    one, other = ScoreHistogram(), ScoreHistogram()
    values = scores(20_000)
    one.update(values, "one")
    other.update(scores(20_000, seed=1) * 1e-9, "other")
    low, high = Quantiles.of([one, other]).thresholds([share, share])
    assert float((values <= low).double().mean()) == pytest.approx(share, abs=2e-3)
    assert low == float(torch.tensor(low, dtype=torch.float32)) and high < 1e-6


def test_zeros_extremes_and_nothing() -> None:
    histogram = ScoreHistogram()
    assert histogram.grid().abs().sum() == 0
    histogram.update(torch.tensor([0.0] * 6 + [1e-30, 1e30, 1.0, 2.0]), "site")
    grid = histogram.grid()
    assert grid[GRID // 2] == 0 and grid[-1] > 1e11 and torch.isfinite(grid).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="site down: its calibration inputs are not finite"):
        ScoreHistogram().update(torch.tensor([1.0, bad]), "down")


def test_curve_keeps_the_weighted_mean() -> None:
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64) / 4
    curve = Curve.through(2, [(0.5, (0.2, 0.6)), (0.25, (0.25, 0.25))])
    for overall in (0.0, 0.1, 0.25, 0.3, 0.5, 0.8, 1.0):
        shares = torch.tensor(curve.at(overall), dtype=torch.float64)
        assert float((shares * weights).sum()) == pytest.approx(overall, abs=1e-12)
    assert curve.at(0.5) == [0.2, 0.6] and curve.at(1.0) == [1.0, 1.0]


def test_largest_sparsity() -> None:
    asked: list[float] = []

    def increase(sparsity: float) -> float:
        asked.append(sparsity)
        return sparsity**2

    assert largest_sparsity(increase, 0.09) == pytest.approx(0.3, abs=1e-3)
    assert len(asked) < 15
    assert largest_sparsity(lambda _: 0.0, 0.01) == 0.9
    with pytest.raises(ValueError, match=r"cannot be met.*costs 5.00%.*allow at least 5.25%"):
        largest_sparsity(lambda _: 0.05, 0.01)
    with pytest.raises(ValueError, match="cannot be met"):
        largest_sparsity(lambda _: float("nan"), 0.01)


def test_matching_sparsity() -> None:
    planned = matching_sparsity(lambda share: 0.97 * share, 0.4)
    assert 0.97 * planned == pytest.approx(0.4, abs=1e-3)
