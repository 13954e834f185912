from __future__ import annotations

import pytest
import torch

from prune_llm.statistics import InputStatistics, Needs, disable_tf32

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, 5, 255, 600, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_equals_float64(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 70, width).to(dtype)
    statistics = InputStatistics(width, CPU, Needs.GRAM)
    for batch in x:
        statistics.update(batch)
    statistics.finish()
    rows = x.double().reshape(-1, width)
    expected = rows.T @ rows
    torch.testing.assert_close(statistics.gram_II.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(statistics.gram_II, statistics.gram_II.T)
    torch.testing.assert_close(
        statistics.norms_I().double(), rows.norm(dim=0), rtol=1e-5, atol=1e-5
    )
    assert statistics.tokens == 210


def test_norms_without_gram() -> None:
    x = torch.randn(4, 30, 12)
    statistics = InputStatistics(12, CPU, Needs.NORMS)
    for batch in x:
        statistics.update(batch, sample=5)
    statistics.finish()
    torch.testing.assert_close(statistics.norms_I(), x.reshape(-1, 12).norm(dim=0))
    assert statistics.sample_TI.shape == (20, 12)
    with pytest.raises(ValueError, match="Gram"):
        _ = statistics.gram_II


def test_relative_error_agrees_with_its_definition() -> None:
    x, weight = torch.randn(50, 8), torch.randn(6, 8)
    pruned = weight * (torch.rand(6, 8) > 0.5)
    expected = float((x @ (weight - pruned).T).norm() ** 2 / (x @ weight.T).norm() ** 2)
    for needs in (Needs.NORMS, Needs.GRAM):
        statistics = InputStatistics(8, CPU, needs)
        statistics.update(x, sample=50)
        statistics.finish()
        error = statistics.relative_error(weight, pruned)
        assert error.value == pytest.approx(expected, rel=1e-4)
        assert error.tokens == 50


def test_tf32_is_restored() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with disable_tf32():
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 == before
